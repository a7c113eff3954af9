"""Block sizes and warps: a pure function of the launch, never of a measurement taken at run time."""

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class GridConfig:
    """Tile of the grid driver: cells a program owns, channels stored at a time, warps, rows searched at a time."""

    cells: int
    channels: int
    warps: int
    rows: int = 128


@lru_cache(maxsize=256)
def grid_config(largest_map: int, cells_contiguous: bool, with_grad: bool) -> GridConfig:
    """Tile for maps of at most ``largest_map`` cells; ``cells_contiguous`` says that neighbouring cells are neighbours
    in memory (NCHW), else neighbouring channels are (channels-last, ``[B, A, H, W, 5 + C]``).
    """
    if not cells_contiguous:
        return GridConfig(cells=128, channels=32, warps=4)
    cells = 1024
    while cells > 64 and cells >= 2 * largest_map:
        cells //= 2
    return GridConfig(cells=cells, channels=4 if with_grad else 1, warps=max(1, cells // 128))


POINTWISE_BLOCK = 512
POINTWISE_WARPS = 4
