"""Block sizes, warps and stages: a pure function of the launch and of wishes, never of a measurement at run time. And
a limit that both backends keep to.
"""

import math
from dataclasses import dataclass, fields, replace
from functools import lru_cache

Wishes = tuple[tuple[str, int], ...]
"""Fields of a configuration, and what a measurement found best for them; a launch takes them as far as it can."""


@dataclass(frozen=True)
class GridConfig:
    """Tile of a driver: cells a program owns, channels stored at a time, threads, rows searched at a time.

    Told of a limit of ``max_registers`` a thread, ptxas spills nothing but in few variants, of which tests keep count,
    and several programs fit a multiprocessor.
    """

    cells: int
    channels: int
    threads: int
    rows: int = 256
    max_registers: int = 128
    stages: int | None = None  # of a loop's loads under way at a time; None leaves it to the compiler


LARGEST_SIDE = 2.0**100
"""Sides of valid rows lie below this, in images: a box of more has no finite side in pixels."""

MOST_REGISTERS = 255
"""Of a thread. Told of no limit, ptxas keeps launches of float64 to 168, and spills."""

WEIGHED_REGISTERS = 24
"""Of a thread, more, where rows or classes have weights: without these nothing spills, with them a few do."""

SMALLEST_TILE = 64
FEWEST_TILES = 5
"""Of a plane: the coarser a map, the more objects a cell has, and a launch takes as long as its slowest program."""

FEWEST_TURNS = 4


def grad_parts(config: GridConfig, channels: int, cells_contiguous: bool) -> int:
    """Programs that share out the channels of a tile's gradient: two where each has enough to do, so that
    multiprocessors get more even shares of it.
    """
    turns = -(-channels // config.channels)
    return 2 if cells_contiguous and turns >= 2 * FEWEST_TURNS else 1


LOSS_REGISTERS = 112
"""Of a thread of the loss launch of grids: for fewer it spills. Nine programs share a multiprocessor."""

IGNORING_REGISTERS = 168  # where the boxes of eight cells of a plane are compared with rows: six programs
GRID_GRADIENT_REGISTERS = {True: 128, False: 168}  # by whether cells are neighbours in memory


def even_tile(cells: int, largest: int, few: bool = False) -> int:
    """Cells of a program, of a map with so many: evenly, at most ``largest``, and of coarse maps fewer, unless there is
    one map alone (``few``), of which what each program reads besides would be too much.
    """
    least = 1 if few else min(FEWEST_TILES, -(-cells // SMALLEST_TILE))
    return -(-cells // max(-(-cells // largest), least) // 16) * 16


@lru_cache(maxsize=256)
def grid_config(
    largest_map: int,
    cells_contiguous: bool,
    itemsize: int,
    wishes: Wishes = (),
    ignores: bool = True,
    few: bool = False,
) -> GridConfig:
    """Tile for maps of at most ``largest_map`` cells; ``cells_contiguous`` says that neighbouring cells are neighbours
    in memory (NCHW), else neighbouring channels are (channels-last, ``[B, A, H, W, 5 + C]``), ``ignores`` that boxes
    are compared with all rows, ``few`` that there is one map alone, whose programs do not fill a GPU.

    A thread of the loss launch has eight cells of a plane: what a program does besides, to find out who is assigned,
    all of its warps do, and that is most of what they execute. Where there are ``few`` programs their number decides
    less than how long each takes, and a thread has four.

    Eight channels at a time read whole sectors of what the loss launch has kept; of half predictions four, which take
    half the registers and no stack on gfx942. The less a thread of the loss launch holds, the more programs wait for
    memory at a time.
    """
    registers = IGNORING_REGISTERS if ignores and cells_contiguous else LOSS_REGISTERS
    if itemsize > 4:
        registers = MOST_REGISTERS
    if not cells_contiguous:
        usual = GridConfig(cells=128 if few else 256, channels=16, threads=64, rows=64, max_registers=registers)
        return replace(usual, **dict(wishes))
    wanted = dict(wishes)
    cells = largest = wanted.pop("cells", 512)
    while cells > SMALLEST_TILE and cells >= 4 * largest_map:  # by fours: a kernel is compiled for each of them
        cells = max(SMALLEST_TILE, cells // 4)
    threads = max(64, wanted.pop("threads", largest // (4 if few else 8)) * cells // largest)
    rows = min(256, threads)  # of more a thread would hold several, and spill
    channels = 8 if itemsize > 2 else 4
    config = GridConfig(cells=cells, channels=channels, threads=threads, rows=rows, max_registers=registers)
    return replace(config, **wanted)


def grid_gradient(config: GridConfig, cells_contiguous: bool) -> GridConfig:
    """Tile of the gradient, which holds many channels of a cell at a time, of four cells a thread in planes, or two."""
    threads = max(WARP, config.cells // (4 if cells_contiguous else 2))
    return replace(config, threads=threads, max_registers=GRID_GRADIENT_REGISTERS[cells_contiguous])


HELD = (8, 4)  # classes of a listed prediction that a thread may hold, the more the fewer turns wait for memory


def class_tile(classes: int, threads: int, apart: bool) -> dict[str, int]:
    """How threads share out the classes of listed predictions: where these are judged apart each holds a few, of which
    the fewest are padding; else one lane holds all channels of a prediction.
    """
    if not apart:
        channels = power_of_two(5 + classes)
        return {"FIRST": 0, "GROUPS": 1, "HELD": channels, "LANES": max(1, max(HELD) * threads // channels), "REST": 0}
    held = min(min(max(HELD), power_of_two(classes)), min(HELD), key=lambda n: -(-classes // n) * n)
    groups = -(-classes // held)
    return {"FIRST": 5, "GROUPS": groups, "HELD": held, "LANES": threads, "REST": power_of_two(-(-3 // groups))}


CELL_TILE = 32768  # bytes of a tile of the driver of cells
CELL_PAIRS = 8192  # of cells and rows that are compared at a time
CELL_GROUPS = 16  # of the cells of a program, each of which looks at all rows: warps, of 512 threads
WIDEST = 128  # channels in it, unless the boxes of a cell have more


def cell_config(cells: int, channels: int, box_channels: int, itemsize: int, wishes: Wishes = ()) -> GridConfig:
    """Tile for as many ``cells`` of ``channels``, of which ``box_channels`` must be in the first tile."""
    width = max(power_of_two(box_channels), min(power_of_two(channels), WIDEST))
    several = width < channels  # what is kept from one tile to the next takes registers
    height = max(16, min(power_of_two(cells), CELL_TILE // width // itemsize // (1 + several)))
    config = replace(GridConfig(cells=height, channels=width, threads=512), **dict(wishes))
    rows = max(16, min(config.threads // CELL_GROUPS, CELL_PAIRS // config.cells))  # at most one a thread
    return config if "rows" in dict(wishes) else replace(config, rows=rows)


def power_of_two(n: int) -> int:
    """The least power of two that is no less."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class DenseConfig:
    """Tile of the driver of dense heads: numbers of a stream a program takes at a time, those of them that are always
    of one anchor, and how often; cells and planes of a level in planes; of a ranked head anchors and threads an anchor;
    anchors whose boxes a program takes at a time, threads; threads of the launches that match and rank. ``repeats``:
    boxes are taken as often as class logits.
    """

    block: int
    group: int
    steps: int
    cells: int
    planes: int
    width: int
    anchors: int
    threads: int
    max_registers: int = 128
    match_threads: int = 32
    rank_threads: int = 128
    stages: int | None = None
    repeats: bool = False


WARP = 32  # threads
STREAM_REGISTERS = {"offset": 48, "iou": 64, "giou": 64}
"""Of a thread, by the term of the boxes: for fewer it spills. Others take 112."""
RANKED_REGISTERS = 64
GRADIENT_REGISTERS = 80  # at least; nobody waits for what it leaves alone
RANKED_GRADIENT_REGISTERS = 88
WAVE = 4 * 132  # programs that a GPU runs at a time: four a multiprocessor
MOST_CHUNKS = 12  # classes of an anchor that a thread holds
ACCESS = 16  # bytes of the widest
SECTOR = 32  # bytes that memory moves at least


def _registers(itemsize: int, ranked: bool, box: str) -> int:
    """At most so many a thread, of streams; of halves a thread has twice as many numbers."""
    if itemsize == 8:
        return 255
    if ranked:
        return RANKED_REGISTERS
    return STREAM_REGISTERS.get(box, 112) + 16 * (itemsize == 2)


@lru_cache(maxsize=256)
def dense_config(
    smallest_stream: int,
    largest_map: int,
    logits: int,
    classes: int,
    itemsize: int,
    ranked: bool,
    flat: bool,
    box: str,
    wishes: Wishes = (),
) -> DenseConfig:
    """Tile for streams of at least so many numbers an image, so that a chunk meets two images at most, for maps of at
    most so many cells, and for so many ``logits`` in all; ``ranked`` takes all classes of an anchor at once. ``flat``
    says that logits are streams, of anchors without gaps; ``box`` is the term of the boxes, or ``offset``.

    A thread has 16 bytes of a stream at a time, and few registers, so that three to five programs share a
    multiprocessor: while one waits for memory others compute. Planes take more. Up to 32 tiles a program keep the last
    one's sum of all partial sums short, as long as there are two waves of programs.

    Of a ranked head threads share out the classes of an anchor, two sectors at a time: rows begin anywhere, and fewer
    would touch twice as many. Its streams are gone through by programs of one warp, with eight tiles: none waits for
    another.
    """
    width = max(2 * SECTOR // max(itemsize, 4), power_of_two(-(-classes // MOST_CHUNKS)))
    alone = ranked and flat  # of one warp
    warps = 1 if alone else 8
    usual = DenseConfig(
        block=256 * (ACCESS // itemsize),
        group=1,
        steps=32 if not ranked else 8 if alone else 4,
        cells=max(1, 128 * warps // width) if ranked else 512,
        planes=4,
        width=width,
        anchors=64 * warps,
        threads=32 * warps,
        max_registers=_registers(itemsize, ranked, box) if flat else 128,
        repeats=alone,
    )
    tile = classes * usual.cells if ranked else usual.block
    least = 1 if ranked else 2  # of less a program is not worth what it reads first
    while usual.steps > least and logits < 2 * WAVE * usual.steps * tile:
        usual = replace(usual, steps=usual.steps // 2)
    wanted = replace(usual, **dict(wishes))
    chunk = 1 << (max(smallest_stream, 1).bit_length() - 1)
    block = min(wanted.block, chunk)
    return replace(
        wanted,
        block=block,
        group=math.gcd(classes, ACCESS // itemsize, block),
        steps=wanted.steps if ranked else min(wanted.steps, chunk // block),
        cells=min(wanted.cells, power_of_two(largest_map)),
        anchors=min(wanted.anchors, power_of_two(largest_map)),
    )


def dense_gradient(config: DenseConfig, ranked: bool) -> DenseConfig:
    """Tile of the gradient alone; of a ranked head, the fewer anchors it has, the more often none of them counts."""
    if ranked and config.threads > WARP:
        return replace(config, cells=max(1, config.cells // 2), steps=2 * config.steps)
    least = RANKED_GRADIENT_REGISTERS if ranked else GRADIENT_REGISTERS
    return replace(config, max_registers=max(least, config.max_registers))


MATCH_BLOCK = 256  # anchors of a program
MATCH_REGISTERS = 160  # of a thread: for fewer the compiler spills
MOST_CLAIMS = 256  # words that a block of anchors leaves, of 32 rows each: as much memory as the matches themselves
MATCH_ROWS = 256  # rows it searches at a time for those of its image
RANK_PART = 1024  # anchors of a program
RANK_REGISTERS = 96  # of a thread: five programs share a multiprocessor


@dataclass(frozen=True)
class PickConfig:
    """Tile of the loss of picked cells: cells of a program, channels at a time, classes of a program, cells with a row
    at a time, threads; cells of a row's region at a time.
    """

    cells: int
    planes: int
    group: int
    picks: int
    threads: int = 128
    region: int = 64
    max_registers: int = 168

    def boxes(self, bins: bool) -> int:
        """Cells with a row whose boxes are looked at at a time: of four numbers, unlike those of ``bins``, a thread
        has registers for all.
        """
        return self.picks if bins else min(self.cells, self.threads)


PICK_NUMBERS = 10240  # at most that many a program, of classes
PICK_DECODED = 128  # cells of a program that decodes boxes: four, or eight halves, a thread are an access
PICK_THREADS = 32  # of programs that have no more to share: those that decode, pick and settle
WIDE_THREADS = 128  # of those that decode float64, of which a warp would have to spill most
PRICE_THREADS = 128  # of programs that read all classes of candidates, at most
OFFER_THREADS = 64  # of those that decode them, too, and have no registers for more
CANDIDATE_REGISTERS = 168  # of those that decode candidates, or look at many: told of none, on some GPUs it spills
PICK_SETTLED = 64  # cells of a row at a time, as it settles what it keeps
AWARDED = 32  # rows at a time, to one of which goes what several picked
AWARDING = 1024  # programs, at most, that share that out
PICK_PROGRAMS = 4096  # of rows, if those may be shared out
MOST_SHARES = 32  # of a row


def price_tile(classes: int, threads: int) -> tuple[int, int]:
    """Classes of candidates that are read at a time, and the threads for that: of so many at most, and of classes no
    more than there are. The more, the fewer turns wait for memory.
    """
    across = min(threads // 4, max(8, power_of_two(classes)))
    return across, 4 * across


def pick_shift(rows: int) -> int:
    """Two to this power: programs of a row that picks cells, most of which have nothing to do unless it is large."""
    return max(0, min(MOST_SHARES, PICK_PROGRAMS // max(rows, 1)).bit_length() - 1)


def pick_config(largest_map: int, layout: str, classes: int, itemsize: int, wishes: Wishes = ()) -> PickConfig:
    """Tile for maps of at most so many cells. Eight planes of a wide tile at a time, so that enough is under way, or
    where channels follow each other 16 of them, of each cell two sectors; classes are shared out evenly. Of more cells
    with a row at a time the logits of their distances take more registers than there are; float64 takes two each.
    """
    cells, planes, picks = (64, 16, 8) if layout == "channels" else (512, 8, 16)
    usual = PickConfig(cells, planes, group=0, picks=picks)
    if itemsize > 4:
        usual = replace(usual, planes=planes // 2, picks=picks // 2, max_registers=MOST_REGISTERS)
    wanted = replace(usual, **dict(wishes))
    cells = wanted.cells
    while cells > SMALLEST_TILE and cells >= 2 * largest_map:
        cells //= 2
    tiles = -(-classes // wanted.planes)
    programs = -(-tiles * wanted.planes * cells // PICK_NUMBERS)
    return replace(wanted, cells=cells, group=-(-tiles // programs) * wanted.planes)


@dataclass(frozen=True)
class Kind:
    """What may be asked of the launches of a driver, as configurations are filed."""

    config: type[GridConfig | DenseConfig | PickConfig]
    cells: tuple[int, int]  # smallest and largest, as in _LEGAL
    threads: int = 256  # where nothing is asked for
    most_a_thread: int | None = None  # cells
    fixed: tuple[str, ...] = ()  # fields that follow from the launch alone


KINDS = {
    # more than 32 cells a thread take the compiler minutes
    "grid": Kind(GridConfig, (SMALLEST_TILE, 4096), most_a_thread=32),
    "cell": Kind(GridConfig, (16, 1024), threads=512, fixed=("channels",)),
    "dense": Kind(DenseConfig, (1, 2048), fixed=("group", "width", "repeats")),
    "pick": Kind(PickConfig, (SMALLEST_TILE, 1024), threads=128, fixed=("group",)),
}

REGISTERS = 65536  # of a multiprocessor of NVIDIA's: no launch of more
_LEGAL = {  # smallest and largest; powers of two
    "threads": (32, 1024),
    "match_threads": (32, 1024),
    "rank_threads": (32, 1024),
    "channels": (4, 128),
    "steps": (1, 64),
    "planes": (1, 16),
    "block": (256, 8192),
    "anchors": (64, 2048),
    "rows": (16, 1024),
    "picks": (8, 128),
    "region": (32, 256),
}


def legal_wishes(kind: str, wishes: dict[str, int]) -> bool:
    """Whether ``kind`` is one of ``KINDS`` and its launches can be given these, whoever wrote them."""
    if kind not in KINDS:
        return False
    own = KINDS[kind]
    known = {field.name for field in fields(own.config)}.difference(own.fixed)
    for name, value in wishes.items():
        if name not in known or type(value) is not int:
            return False
        if name == "stages":
            if not 1 <= value <= 8:
                return False
        elif name == "max_registers":
            if not 32 <= value <= 255:
                return False
        else:
            low, high = own.cells if name == "cells" else _LEGAL[name]
            if not low <= value <= high or value & (value - 1):
                return False
    threads, registers = wishes.get("threads", own.threads), wishes.get("max_registers", 128)
    if own.most_a_thread is not None and wishes.get("cells", 0) > own.most_a_thread * threads:
        return False
    return threads * registers <= REGISTERS


POINTWISE_BLOCK = 512
POINTWISE_THREADS = 128
