"""Block sizes and warps: a pure function of the launch, never of a measurement taken at run time."""

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class GridConfig:
    """Tile of the grid driver: cells a program owns, channels stored at a time, threads, rows searched at a time.

    Told of a limit of ``max_registers`` a thread, ptxas spills nothing; left alone it stops at the same 128 (for two
    programs of 256 threads a multiprocessor) but keeps a word or two of some variants on the stack.
    """

    cells: int
    channels: int
    threads: int
    rows: int = 256
    max_registers: int = 128


SMALLEST_TILE = 64


@lru_cache(maxsize=256)
def grid_config(largest_map: int, cells_contiguous: bool) -> GridConfig:
    """Tile for maps of at most ``largest_map`` cells; ``cells_contiguous`` says that neighbouring cells are neighbours
    in memory (NCHW), else neighbouring channels are (channels-last, ``[B, A, H, W, 5 + C]``).
    """
    if not cells_contiguous:
        return GridConfig(cells=128, channels=32, threads=128)
    cells = 1024
    while cells > SMALLEST_TILE and cells >= 2 * largest_map:
        cells //= 2
    return GridConfig(cells=cells, channels=8, threads=max(64, cells // 4))


POINTWISE_BLOCK = 512
POINTWISE_THREADS = 128
