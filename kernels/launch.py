"""Block sizes and warps: a pure function of the launch, never of a measurement taken at run time."""

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class GridConfig:
    """Tile of a driver: cells a program owns, channels stored at a time, threads, rows searched at a time.

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
def grid_config(largest_map: int, cells_contiguous: bool, itemsize: int) -> GridConfig:
    """Tile for maps of at most ``largest_map`` cells; ``cells_contiguous`` says that neighbouring cells are neighbours
    in memory (NCHW), else neighbouring channels are (channels-last, ``[B, A, H, W, 5 + C]``).

    Eight channels at a time read whole sectors of what the loss launch has kept; of half predictions four, which take
    half the registers and no stack on gfx942.
    """
    if not cells_contiguous:
        return GridConfig(cells=128, channels=32, threads=128)
    cells = 1024
    while cells > SMALLEST_TILE and cells >= 2 * largest_map:
        cells //= 2
    return GridConfig(cells=cells, channels=8 if itemsize > 2 else 4, threads=max(64, cells // 4))


CELL_TILE = 32768  # bytes of a tile of the driver of cells
WIDEST = 128  # channels in it, unless the boxes of a cell have more


def cell_config(cells: int, channels: int, box_channels: int, itemsize: int) -> GridConfig:
    """Tile for as many ``cells`` of ``channels``, of which ``box_channels`` must be in the first tile."""
    width = max(_power(box_channels), min(_power(channels), WIDEST))
    several = width < channels  # what is kept from one tile to the next takes registers
    height = max(16, min(_power(cells), CELL_TILE // width // itemsize // (1 + several)))
    return GridConfig(cells=height, channels=width, threads=512, rows=16)


def _power(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class DenseConfig:
    """Tile of the driver of dense heads: numbers of a stream a program takes at a time and how often, cells and planes
    of a level in planes, anchors whose boxes it owns, threads.
    """

    block: int
    steps: int
    cells: int
    planes: int
    anchors: int
    threads: int


@lru_cache(maxsize=256)
def dense_config(smallest_stream: int, largest_map: int, classes: int, itemsize: int, ranked: bool) -> DenseConfig:
    """Tile for streams of at least so many numbers an image, so that a chunk meets two images at most, and for maps of
    at most so many cells; ``ranked`` takes all classes of an anchor at once.

    Sixteen tiles a program keep the last one's sum of all partial sums short.
    """
    chunk = 1 << (max(smallest_stream, 1).bit_length() - 1)
    block = min(2048, chunk)
    cells = max(1, 2048 // _power(classes)) if ranked else 512
    return DenseConfig(
        block=block,
        steps=16 if ranked else min(16, chunk // block),
        cells=min(cells, _power(largest_map)),
        planes=4,
        anchors=min(512 if itemsize > 2 else 256, _power(largest_map)),
        threads=256,
    )


MATCH_BLOCK = 1024  # anchors of a program
MATCH_ROWS = 256  # rows it searches at a time for those of its image
RANK_BLOCK = 1024  # anchors of an image looked at at a time
RANK_THREADS = 512


POINTWISE_BLOCK = 512
POINTWISE_THREADS = 128
