"""Which prediction answers for which object, as the kernels of picked cells settle it: equal to the reference."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import DEVICE
from fusedyolo.kernels import launch
from fusedyolo.kernels.picks import pick
from torch import Tensor

from fusedyolo import YOLOv8Loss, YOLOXLoss, reference
from fusedyolo.drivers.picks import planes
from fusedyolo.heads import PickHead
from fusedyolo.ops.launch import run_all, shared_zeros
from fusedyolo.ops.picking import Maps, pick_launches, reach_of
from fusedyolo.targets import Targets, without_spare

STRIDES, MAPS = (8, 16, 32), ((8, 12), (4, 6), (2, 3))
LARGE = ((32, 48), (16, 24), (8, 12))  # 2,016 cells
CLASSES = 3
HEADS = {
    "v8": YOLOv8Loss(CLASSES, STRIDES, backend="torch").head,
    "v8 distances": YOLOv8Loss(CLASSES, STRIDES, reg_max=1, backend="torch").head,
    "v8 five numbers": YOLOv8Loss(CLASSES, STRIDES, reg_max=5, backend="torch").head,
    "yolo26 one": YOLOv8Loss(CLASSES, STRIDES, reg_max=1, topk=7, topk2=1, backend="torch").head,
    "three of five": YOLOv8Loss(CLASSES, STRIDES, reg_max=1, topk=5, topk2=3, backend="torch").head,
    "topk 13": YOLOv8Loss(CLASSES, STRIDES, topk=13, alpha=1.0, small=0.0, backend="torch").head,
    "other powers": YOLOv8Loss(CLASSES, STRIDES, alpha=0.0, beta=2.5, backend="torch").head,
    "no overlap": YOLOv8Loss(CLASSES, STRIDES, alpha=1.0, beta=0.0, backend="torch").head,  # is asked for
    "v9 range": YOLOv8Loss(CLASSES, STRIDES, reg_max=4, rule="libreyolo", backend="torch").head,
    "YOLOX": YOLOXLoss(CLASSES, STRIDES, backend="torch").head,
    "YOLOX/0.3.0": YOLOXLoss(CLASSES, STRIDES, rule="0.3.0", backend="torch").head,
}


def predictions(
    head: PickHead, batch: int, seed: int, dtype: torch.dtype = torch.float32, maps: Maps = MAPS
) -> list[Tensor]:
    """Maps [B, widths, H, W], whose boxes are of some cells' sides."""
    gen = torch.Generator().manual_seed(seed)
    found = []
    for H, W in maps:
        pred = torch.randn(batch, sum(head.widths), H, W, generator=gen, dtype=torch.float64)
        if head.decode == "distance":
            pred[:, :4] = pred[:, :4].abs() * 1.5 + 0.3
        elif head.decode == "exp":
            pred[:, 2:4] += 1.0
        found.append(pred.to(dtype).to(DEVICE))
    return found


def some_rows(batch: int, count: int, seed: int, largest: float = 0.6) -> Tensor:
    """So many rows of each image [B * count, 6]."""
    gen = torch.Generator().manual_seed(seed)
    image = torch.arange(batch).repeat_interleave(count)
    label = torch.randint(CLASSES, (batch * count,), generator=gen)
    sides = torch.rand(batch * count, 2, generator=gen) * largest + 0.02
    centre = torch.rand(batch * count, 2, generator=gen)
    return torch.cat((image[:, None], label[:, None], centre, sides), 1).to(DEVICE)


def check(
    head: PickHead,
    preds: Sequence[Tensor],
    rows: Tensor,
    offsets: Tensor | None = None,
    form: str = "maps",
    maps: Maps = MAPS,
) -> dict[str, Any]:
    """Run the launches, and compare all that they leave with the reference in float64."""
    size = (float(maps[0][0] * STRIDES[0]), float(maps[0][1] * STRIDES[0]))
    launches, decoded, settled = pick_launches(preds, form, maps, rows, offsets, head, size)
    (picks,) = launches[-2].arguments["branches"]
    run_all(launches, rows.device)
    safe, spare = without_spare(rows, offsets)
    seen_planes = planes(form, preds, head).to(torch.float64)
    points = reference.points_of(maps, head.strides, rows.device)
    objects = reference.read_objects(safe, head, len(seen_planes.box), size, torch.float64)
    seen = reference.see(seen_planes, points, head)
    picked = reference.pick(seen, objects, head)
    exact = preds[0].dtype == torch.float64
    close = {"rtol": 1e-9, "atol": 1e-11} if exact else {"rtol": 3e-5, "atol": 1e-6}
    boxes = {"rtol": 1e-12, "atol": 1e-10} if exact else {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(decoded.boxes_ptr.double(), seen.boxes, **boxes, equal_nan=True)
    row = torch.where(decoded.row_ptr == len(rows), -1, decoded.row_ptr.long())
    assert torch.equal(row, picked.row), (row - picked.row).nonzero()
    has = picked.row >= 0
    torch.testing.assert_close(decoded.score_ptr[has].double(), picked.score[has], **close)
    weights = picked.score.sum() if head.soft else has.sum().double()
    torch.testing.assert_close(settled.norm_ptr.double(), torch.stack((weights.clamp(min=1), weights)), **close)
    invalid = (~objects.valid).sum().cpu() - (0 if spare is None else spare.cpu())
    assert settled.counts_ptr.tolist() == [int(has.sum()), int(invalid)]
    assert settled.nans_ptr.isnan().tolist() == [bool(seen.boxes.isnan().any()), bool(picked.nans.isnan())]
    assert all(not each.any() for each in shared_zeros())
    assert not decoded.done_ptr.any()
    return {"picked": picked, "decoded": decoded, "settled": settled, "picks": picks}


@pytest.mark.parametrize("name", HEADS)
def test_random(name):
    head = HEADS[name]
    found = check(head, predictions(head, 2, 1), some_rows(2, 3, 2))
    assert (found["picked"].row >= 0).sum() > 5


@pytest.mark.parametrize(
    "name", ["v8 five numbers", "three of five", "other powers", "v9 range", "YOLOX", "YOLOX/0.3.0"]
)
def test_float64(name):
    head = HEADS[name]
    check(head, predictions(head, 1, 1, torch.float64), some_rows(1, 6, 2))


@pytest.mark.parametrize("name", HEADS)
def test_crowd(name):
    """Many cells are picked by several rows, and some of these go to one that did not pick them, if that may be."""
    head = HEADS[name]
    found = check(head, predictions(head, 1, 3), some_rows(1, 12, 4))
    several = found["decoded"].picker_ptr == -1
    assert several.sum() > (1 if head.objectness else 7)
    row, index = found["decoded"].row_ptr.flatten(), found["picks"].picked.index_ptr
    further = [cell for cell in several.flatten().nonzero().flatten().tolist() if cell not in index[row[cell] % 12]]
    if head.region == "range":
        assert not further
    else:
        assert further or head.objectness or head.topk == 13


@pytest.mark.parametrize(("name", "dtype"), [("v8 distances", torch.float32), ("three of five", torch.float64)])
def test_rows_of_several_programs(name, dtype, monkeypatch):
    """Large regions are shared out; who finishes last, and how many programs there are, does not show."""
    head = HEADS[name]
    rows = some_rows(1, 3, 24)
    rows[:, 2:] = torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.4, 0.6, 0.4, 0.5], [0.3, 0.3, 0.05, 0.05]], device=DEVICE)
    preds = predictions(head, 1, 25, dtype, LARGE)
    found = []
    for shift in (5, 2):
        monkeypatch.setattr(launch, "PICK_PROGRAMS", 3 << shift)
        found.append(check(head, preds, rows, maps=LARGE)["decoded"])
    for field in ("row_ptr", "score_ptr", "picker_ptr", "claim_ptr"):
        assert torch.equal(*[getattr(one, field) for one in found])


@pytest.mark.parametrize("name", ["v8 distances", "yolo26 one"])
def test_equals_of_several_programs(name):
    """Of cells as good as each other the first are taken, whichever program has met them."""
    head = HEADS[name]
    preds = [torch.ones(1, sum(head.widths), *sides, device=DEVICE) for sides in LARGE]
    rows = torch.tensor([[0, 1, 0.5, 0.5, 0.9, 0.9], [0, 2, 0.5, 0.5, 0.9, 0.9]], device=DEVICE)
    check(head, preds, rows, maps=LARGE)


def test_programs_of_a_row():
    """As many as a launch may have, but no more than the largest row has work for; one of each in a crowd."""
    shifts = {rows: launch.pick_shift(rows) for rows in (0, 1, 118, 129, 300, 2048, 2049, 80_000)}
    assert list(shifts.values()) == [5, 5, 5, 4, 3, 1, 0, 0]


def cells_reached(head: PickHead, rows: Tensor, maps: Maps) -> Tensor:
    """How many cells each row goes through: rectangles of those within its sides, and a margin."""
    height, width = (STRIDES[0] * side for side in maps[0])
    boxes = rows[:, 2:].double() * rows.new_tensor([width, height, width, height])
    total = torch.zeros_like(boxes[:, 0])
    for stride, (H, W) in zip(head.strides, maps, strict=True):
        counts = []
        for centre, side, cells in zip(boxes[:, :2].T, boxes[:, 2:].T, (W, H), strict=True):
            far = side.clamp(min=head.small) / 2
            first = ((centre - far) / stride - 0.625).ceil().clamp(min=0)
            last = ((centre + far) / stride - 0.375).floor().clamp(max=cells - 1)
            counts.append((last - first + 1).clamp(min=0))
        total += counts[0] * counts[1]
    return total


def test_no_program_with_a_share_is_left_out():
    """The limit that a program is told by holds for boxes of any sides, wherever they lie."""
    head, rows = HEADS["v8"], some_rows(1, 400, 26, largest=1.0)
    sides = (rows[:, 4:] * rows.new_tensor([384.0, 256.0])).clamp(min=head.small)
    area, side, least = reach_of(head)
    most = sides.prod(1) * area + sides.sum(1) * side + least
    reached = cells_reached(head, rows, LARGE)
    assert (reached <= most).all()
    assert (most < 1.1 * reached).any()


@pytest.mark.parametrize(("name", "seed"), [("v8 distances", 34), ("three of five", 41)])
def test_clashes_are_met_on_a_list_or_in_a_region(name, seed):
    """Whichever has fewer cells."""
    head, count = HEADS[name], 16
    rows = some_rows(1, count, 27)
    rows[:, 4:] = torch.linspace(0.2, 0.5, count, device=DEVICE)[:, None]
    rows[:, 2:4] = 0.5 + (rows[:, 2:4] - 0.5) * 0.4
    found = check(head, predictions(head, 1, seed), rows)
    several, row = found["decoded"].picker_ptr.flatten() == -1, found["decoded"].row_ptr.flatten()
    index = found["picks"].picked.index_ptr
    cells = [cell for cell in several.nonzero().flatten().tolist() if row[cell] < count]
    gaining = cells_reached(head, rows, MAPS)[[int(row[cell]) for cell in cells if cell not in index[row[cell]]]]
    assert gaining.min() < several.sum() < gaining.max()


def test_candidates_of_a_crowded_image():
    """Those of tiles whose bounds an object meets, where there are too many to look at all."""
    head, rows = HEADS["YOLOX/0.3.0"], some_rows(1, 4, 30, largest=0.3)
    rows[2, 2:] = torch.tensor([0.5, 0.5, 0.9, 0.9])
    found = check(head, predictions(head, 1, 29, maps=LARGE), rows, maps=LARGE)
    assert found["decoded"].cost_ptr.isfinite().sum() > pick.FEW.value


def small_boxes(head: PickHead, maps: Maps) -> list[Tensor]:
    """Predictions of one image that overlap nothing but the middles of their cells."""
    preds = [torch.zeros(1, sum(head.widths), *sides, device=DEVICE) for sides in maps]
    for pred in preds:
        pred[:, :2], pred[:, 2:4] = 0.5, -5.0
        pred[:, 4:] = torch.linspace(-1, 1, pred[0, 4:].numel(), device=DEVICE).view_as(pred[:, 4:])
    return preds


def test_a_cell_that_is_nobodys_own_goes_to_whom_it_costs_least():
    """Two objects without a cell of their own pick it, a third, which does not, has it."""
    head = HEADS["YOLOX/0.3.0"]
    preds = small_boxes(head, MAPS)
    # 3.5 cells left of the middle of the third, of which it predicts the box
    preds[0][0, :4, 3, 2] = torch.tensor([48 / 8 - 2, 32 / 8 - 3, math.log(9), math.log(7)], device=DEVICE)
    tiny, at = [0.01, 0.01], 3 * MAPS[0][1] + 2
    large = [0.5, 0.5, 72 / 96, 56 / 64]
    rows = [[0, 0, 34 / 96, 34 / 64, *tiny], [0, 1, 66 / 96, 26 / 64, *tiny], [0, 2, *large]]
    found = check(head, preds, torch.tensor(rows, device=DEVICE))
    assert [at in row for row in found["picks"].picked.index_ptr.tolist()] == [True, True, False]
    assert found["decoded"].row_ptr[0, at] == 2


def test_an_object_that_no_candidate_overlaps():
    """Where there are too many to look at all, it does so all the same, of any tile."""
    head = HEADS["YOLOX/0.3.0"]
    preds = small_boxes(head, LARGE)
    preds[0][0, 4:, 30, 40] = torch.tensor([5.0, -5.0, 5.0, -5.0], device=DEVICE)  # it costs least, and lies far off
    rows = torch.tensor([[0, 0, 0.5, 0.5, 0.95, 0.98], [0, 1, 64 / 384, 64 / 256, 0.002, 0.003]], device=DEVICE)
    found = check(head, preds, rows, maps=LARGE)
    assert found["decoded"].cost_ptr.isfinite().sum() > pick.FEW.value
    assert found["decoded"].row_ptr[0, 30 * LARGE[0][1] + 40] == 1


def test_an_object_without_a_cell_takes_the_best_of_all():
    """One between the middles of cells, for which 32 programs look; one too large for any distribution; one that no
    cell in its box overlaps, which the last of its programs finds out; and one that nothing overlaps, which has none.
    """
    head = HEADS["v9 range"]
    preds = predictions(head, 2, 50, maps=LARGE)
    nothing = torch.tensor([9.0, -9.0, -9.0, -9.0], device=DEVICE)
    for pred in preds:
        pred[1, :16] = nothing.repeat(4)[:, None, None]
    # left of the third, whose right side it reaches
    preds[2][1, 4:16, 2, 1] = torch.tensor([0.0, 0, -9, -9, -9, -9, 0, 0.8, 0.85, 0, -9, -9], device=DEVICE)
    boxes = [[0.5, 0.5, 0.01, 0.01], [0.5, 0.5, 0.98, 0.97], [0.3, 0.3, 0.1, 0.1], [0.75, 0.75, 0.005, 0.005]]
    rows = torch.tensor([[i // 2, i % 3, *box] for i, box in enumerate(boxes)], device=DEVICE)
    index = check(head, preds, rows, maps=LARGE)["picks"].picked.index_ptr
    assert (index >= 0).sum(1).tolist() == [1, 1, 1, 0]
    assert index[2].max() == 2016 + 32 * 48 + 16 * 24 + 2 * 12 + 1


@pytest.mark.parametrize("name", ["v8", "yolo26 one", "v9 range", "YOLOX", "YOLOX/0.3.0"])
def test_tiny(name):
    head = HEADS[name]
    rows = some_rows(2, 4, 5, largest=0.0)
    rows[:, 4:] *= torch.logspace(0, -6, 8, device=DEVICE)[:, None]
    check(head, predictions(head, 2, 6), rows)


@pytest.mark.parametrize("name", ["v8", "yolo26 one", "v9 range", "YOLOX", "YOLOX/0.3.0"])
def test_images_without_rows(name):
    head = HEADS[name]
    check(head, predictions(head, 3, 7), some_rows(3, 2, 8)[2:4])
    check(head, predictions(head, 2, 7), some_rows(1, 4, 8)[:0])


@pytest.mark.parametrize("name", ["v8", "three of five", "YOLOX", "YOLOX/0.3.0"])
def test_invalid_rows(name):
    head = HEADS[name]
    rows = some_rows(2, 6, 9)
    faults = {0: (0, 2.0), 1: (0, -1.0), 2: (1, CLASSES), 3: (2, 1.5), 4: (4, 0.0), 5: (5, float("nan")), 6: (1, -1.0)}
    for place, (column, value) in faults.items():
        rows[place, column] = value
    rows[11, 4] = float("inf")
    rows[10, 4:] = 1e30  # can be, and fits nothing
    found = check(head, predictions(head, 2, 10), rows)
    assert found["settled"].counts_ptr[1] == 8


@pytest.mark.parametrize("name", ["v8", "YOLOX", "YOLOX/0.3.0"])
def test_offsets(name):
    """Rows of images of which it is known where they begin, with spare ones; rows that lie elsewhere; wrong offsets."""
    head = HEADS[name]
    rows = some_rows(3, 3, 11)
    rows[[2, 5]] = rows[[5, 2]]
    preds = predictions(head, 3, 12)
    for offsets in ([0, 3, 6, 7, 8], [0, 4, 2, 12, 9]):
        check(head, preds, rows, torch.tensor(offsets, dtype=torch.int32, device=DEVICE))


def test_targets():
    head = HEADS["v8"]
    rows = some_rows(2, 5, 13)
    targets = Targets(rows, torch.tensor([0, 5, 10, 10], dtype=torch.int32, device=DEVICE), 2)
    check(head, predictions(head, 2, 14), targets.rows, targets.offsets)


@pytest.mark.parametrize("form", ["apart", "planes"])
@pytest.mark.parametrize("name", ["v8", "YOLOX"])
def test_forms(name, form):
    """Parts apart, channels last and with gaps between; and in one piece, cells before channels."""
    head, rows = HEADS[name], some_rows(2, 3, 15)
    parts = [pred.split(head.widths, 1) for pred in predictions(head, 2, 16)]
    if form == "apart":
        preds = [part.contiguous(memory_format=torch.channels_last) for level in parts for part in level]
        preds[0] = torch.nn.functional.pad(preds[0], (2, 3))[..., 2:-3]
    else:
        preds = [
            torch.cat([part.flatten(2) for part in each], 2).mT.contiguous().mT for each in zip(*parts, strict=True)
        ]
    check(head, preds, rows, form=form)


@pytest.mark.parametrize("name", ["v8 distances", "yolo26 one", "v9 range", "YOLOX", "YOLOX/0.3.0"])
def test_equals(name):
    """All cells predict the same, and rows come twice: of equal metrics the first cell, of equal overlaps the first row
    is taken."""
    head = HEADS[name]
    preds = [torch.zeros(2, sum(head.widths), *sides, device=DEVICE) for sides in MAPS]
    for pred in preds:
        pred[:, :4] = 1.0
        pred[:, 4:] = 0.5
    rows = torch.tensor([[0, 1, 0.5, 0.5, 0.5, 0.5], [1, 0, 0.25, 0.5, 0.25, 0.25]], device=DEVICE).repeat(3, 1)
    rows[4:, 1] = 2
    check(head, preds, rows)


@pytest.mark.parametrize("name", ["v8", "yolo26 one", "other powers", "v9 range", "YOLOX", "YOLOX/0.3.0"])
def test_nans(name):
    """Of boxes, classes and objectness."""
    head, rows = HEADS[name], some_rows(2, 4, 17)
    preds = predictions(head, 2, 18)
    gen = torch.Generator().manual_seed(19)
    for pred in preds:
        pred[(torch.rand(pred.shape, generator=gen) < 0.02).to(DEVICE)] = float("nan")
    check(head, preds, rows)


@pytest.mark.parametrize("name", ["YOLOX", "YOLOX/0.3.0"])
def test_a_nan_counts_for_nothing(name):
    """Four boxes are those of an object, which picks as many; where the cost of one of them is NaN, three."""
    head = HEADS[name]
    preds = [torch.zeros(1, sum(head.widths), *sides, device=DEVICE) for sides in MAPS]
    for pred in preds:
        pred[:, 2:4] = -5.0
    for line, column in ((3, 5), (3, 6), (4, 5), (4, 6)):
        preds[0][0, :4, line, column] = torch.tensor([6.0 - column, 4.0 - line, *[math.log(2.5)] * 2])
    rows = torch.tensor([[0, 1, 0.5, 0.5, 20 / 96, 20 / 64]], device=DEVICE)
    assert (check(head, preds, rows)["picked"].row >= 0).sum() == 4
    preds[0][0, 6, 3, 5] = math.nan
    assert (check(head, preds, rows)["picked"].row >= 0).sum() == 3


def test_other_overlaps():
    """Another term, and small regions."""
    for overlap in ("iou", "giou", "siou"):
        head = dataclasses.replace(HEADS["v8 distances"], overlap=overlap, small=20.0)
        check(head, predictions(head, 1, 20), some_rows(1, 4, 21, largest=0.1))


@pytest.mark.parametrize("name", ["v8", "YOLOX"])
def test_half(name):
    head = HEADS[name]
    check(head, predictions(head, 1, 22, torch.float16), some_rows(1, 4, 23))
