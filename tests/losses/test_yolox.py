"""YOLOXLoss against what YOLOX computed, in its two versions, and against its rules written as loops."""

from __future__ import annotations

from typing import Any

import golden
import loop_picks as loops
import pytest
import torch
from golden import arrays
from torch import Tensor

import fusedyolo
from fusedyolo import Targets, YOLOXLoss

RECORDED = golden.names("torch", "yolox_*") + golden.names("torch", "yolox030_*")
MAPS, STRIDES = ((8, 12), (4, 6), (2, 3)), (8, 16, 32)
PARTS = ("box", "obj", "cls", "l1")
in_both_precisions = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
by_both_rules = pytest.mark.parametrize("rule", ["main", "0.3.0"])


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    """Within ``tolerance`` times the largest entry."""
    scale = float(want.detach().abs().max()) if want.numel() else 0.0
    torch.testing.assert_close(got.detach().double(), want.detach().double(), rtol=0, atol=tolerance * scale)


def assigned(criterion: YOLOXLoss, preds: Any, rows: Any) -> tuple[Tensor, Tensor]:
    """Row and soft score of all predictions, [B, N]."""
    levels = fusedyolo.assign(criterion, preds, rows).levels
    for level in levels:
        assert torch.equal(level.objectness, (level.row >= 0).to(level.objectness.dtype))
    row, score = (torch.cat([getattr(level, name).flatten(1) for level in levels], 1) for name in ("row", "score"))
    return row, score


@in_both_precisions
@pytest.mark.parametrize("name", RECORDED)
def test_what_yolox_computed(name, dtype):
    data = arrays(name)
    meta = data["meta"]
    height, width = meta["image_hw"]
    # the recorded pixels are what counts; padding stands where it stood
    labels = (data["labels"].double() / torch.tensor([1.0, width, height, width, height])).float()
    leaves = [data[f"pred_{i}"].to(dtype).requires_grad_() for i in range(3)]
    criterion = YOLOXLoss(meta["nc"], meta["strides"], meta["use_l1"], meta.get("rule", "main"), backend="torch")
    out = criterion(leaves, labels)
    assert out.total.dtype == dtype
    close(out.total, data["total"])
    parts = [data[f"loss_{part}"] for part in ("iou_x5", "obj", "cls", "l1")]
    for part, want in zip(PARTS, parts, strict=True):
        close(out.parts[part], want)
    largest = max(float(data[f"grad_{i}"].abs().max()) for i in range(3))
    for i, grad in enumerate(torch.autograd.grad(out.total, leaves)):
        torch.testing.assert_close(grad.double(), data[f"grad_{i}"].double(), rtol=0, atol=1e-5 * largest)
    row, score = assigned(criterion, leaves, labels)
    # of each image the objects are counted from 0
    first = torch.tensor([0, *(labels.abs().sum(2) > 0).sum(1).cumsum(0).tolist()])[: len(row), None]
    assert torch.equal(torch.where(row >= 0, row - first, -1), data["match"].long())
    close(score, torch.where(data["match"] >= 0, data["match_iou"], 0.0))
    assert int(out.num_pos) == int((data["match"] >= 0).sum()) > 0
    assert int(out.num_invalid) == 0


# ---- the rules as loops

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "L1": {"seed": 1, "use_l1": True},
    "an empty image": {"seed": 2, "images": 3, "empty": True},
    "one level": {"seed": 3, "maps": ((9, 7),), "strides": (16,)},
    "tiny objects": {"seed": 4, "objects": 12, "smallest": 0.01, "largest": 0.06, "use_l1": True},
    "large objects": {"seed": 5, "smallest": 0.6, "largest": 1.5},
    "a crowd": {"seed": 6, "images": 1, "objects": 300, "smallest": 0.03, "largest": 0.3},
    "another crowd": {"seed": 7, "objects": 60, "smallest": 0.1, "largest": 0.9},
    "one class": {"seed": 8, "classes": 1},
    "more classes": {"seed": 9, "classes": 20},
    "a wide radius": {"seed": 10, "radius": 4.0},
    "a narrow radius": {"seed": 11, "radius": 0.6},
    "faint logits": {"seed": 13, "faint": True},  # down to where logarithms end
    "uneven maps": {"seed": 12, "maps": ((7, 13), (4, 7), (2, 4))},
}


def case(
    *,
    seed: int = 0,
    images: int = 2,
    objects: int = 4,
    classes: int = 3,
    smallest: float = 0.05,
    largest: float = 0.6,
    empty: bool = False,
    maps: Any = MAPS,
    strides: Any = STRIDES,
    faint: bool = False,
    **options: Any,
) -> tuple[list[Tensor], Tensor, Any, int, dict[str, Any]]:
    """Predictions, rows, strides, classes and options of the loss."""
    rows = loops.some_rows(seed, images, objects, classes, smallest, largest, empty)
    leaves = loops.yolox_predictions(rows, maps, strides, images, classes, seed)
    if faint:
        leaves = [torch.cat((leaf[:, :4], -150 * leaf[:, 4:].abs()), 1) for leaf in leaves]
    return [leaf.requires_grad_() for leaf in leaves], rows, strides, classes, options


def against_loops(
    leaves: list[Tensor], rows: Tensor, strides: Any, classes: int, options: dict[str, Any], rule: str
) -> Tensor:
    """Parts, gradients and assignment; of each prediction its row."""
    radius, use_l1 = options.get("radius"), options.get("use_l1", False)
    criterion = YOLOXLoss(classes, strides, use_l1, rule, center_radius=radius, backend="torch")
    out = criterion(leaves, rows)
    want = loops.yolox(leaves, rows, strides, rule, use_l1, criterion.head.radius)
    row, score = assigned(criterion, leaves, rows)
    assert torch.equal(row, want.row)
    close(score, want.score, 1e-10)
    for name in PARTS:
        close(out.parts[name], want.parts[name], 1e-10)
    total = torch.stack(list(want.parts.values())).sum()
    for got, grad in zip(torch.autograd.grad(out.total, leaves), torch.autograd.grad(total, leaves), strict=True):
        close(got, grad, 1e-9)
    assert int(out.num_pos) == int((row >= 0).sum())
    return row


@by_both_rules
@pytest.mark.parametrize("name", CASES)
def test_the_rules_as_loops(name, rule):
    assert (against_loops(*case(**CASES[name]), rule) >= 0).any()


@by_both_rules
def test_equals_come_in_their_order(rule):
    """Objects twice, and predictions that are all the same on dyadic places: everything ties."""
    rows = torch.tensor([
        [0, 1, 0.5, 0.5, 0.5, 0.5],
        [0, 1, 0.5, 0.5, 0.5, 0.5],
        [0, 0, 0.25, 0.75, 0.25, 0.25],
        [0, 0, 0.25, 0.75, 0.25, 0.25],
    ])  # fmt: skip
    leaves = [torch.zeros(1, 8, side, side).double() for side in (8, 4, 2)]
    for leaf in leaves:
        leaf[:, :2] = 0.5
        leaf.requires_grad_()
    row = against_loops(leaves, rows, STRIDES, 3, {}, rule)
    assert set(row[row >= 0].tolist()) == {0, 2}


@by_both_rules
def test_what_is_not_preferred_comes_last_in_its_true_order(rule):
    """Objects that take more cells than they prefer. In float32 too, where 1e6 would leave no digits for a cost."""
    small = [[0, 1, cx, cy, 0.05, 0.05] for cx, cy in ((0.2, 0.2), (0.8, 0.3), (0.3, 0.8), (0.7, 0.75))]
    rows = torch.tensor([[0, 0, 0.45, 0.45, 0.9, 0.9], *small])
    leaves = loops.yolox_predictions(rows[:1], ((8, 8), (4, 4), (2, 2)), STRIDES, 1, 3, 5)
    radius = 0.3
    row = against_loops([leaf.requires_grad_() for leaf in leaves], rows, STRIDES, 3, {"radius": radius}, rule)
    criterion = YOLOXLoss(3, STRIDES, rule=rule, center_radius=radius, backend="torch")
    found, _ = assigned(criterion, [leaf.detach().float() for leaf in leaves], rows)
    assert torch.equal(found, row)
    x, y, s = loops.cells(((8, 8), (4, 4), (2, 2)), STRIDES)
    far = 0
    for a in (row[0] >= 0).nonzero().flatten().tolist():
        centre = rows[row[0, a], 2:4].double() * 64
        far += max(abs((x[a] + 0.5) * s[a] - centre[0]), abs((y[a] + 0.5) * s[a] - centre[1])) >= radius * s[a]
    assert far > 0  # some do


# ---- forms, gains, empty calls


def test_forms_of_predictions_agree():
    leaves, rows, strides, classes, _ = case()
    criterion = YOLOXLoss(classes, strides, True, backend="torch")
    want = criterion(leaves, rows)
    grads = torch.cat([grad.flatten(2) for grad in torch.autograd.grad(want.total, leaves)], 2)
    names, widths = ("boxes", "objectness", "scores"), (4, 1, classes)
    apart = [[part.detach().clone() for part in leaf.split(widths, 1)] for leaf in leaves]
    lists = {name: [level[i].requires_grad_() for level in apart] for i, name in enumerate(names)}
    planes = {name: torch.cat([part.detach().flatten(2) for part in maps], 2) for name, maps in lists.items()}
    planes = {name: plane.requires_grad_() for name, plane in planes.items()}
    last = [leaf.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for leaf in leaves]
    feats = {"feats": [torch.empty(1, 1, *sides) for sides in MAPS]}
    for preds, tensors in (
        (lists, [part for maps in lists.values() for part in maps]),
        (planes | feats, list(planes.values())),
        (last, last),
    ):
        out = criterion(preds, rows)
        close(out.total, want.total, 1e-12)
        got = [grad.flatten(2) for grad in torch.autograd.grad(out.total, tensors)]
        if preds is last:
            flat = torch.cat(got, 2)
        else:
            flat = torch.cat([torch.cat(got[i : i + len(got) // 3], 2) for i in range(0, len(got), len(got) // 3)], 1)
        close(flat, grads, 1e-12)


def test_forms_of_targets_agree():
    leaves, rows, strides, classes, _ = case()
    criterion = YOLOXLoss(classes, strides, backend="torch")
    want = criterion(leaves, rows)
    out = criterion(leaves, Targets.from_packed(rows, 2, capacity=50))
    assert torch.equal(out.total, want.total)
    assert int(out.num_invalid) == 0
    padded = torch.zeros(2, 6, 5)
    for image in range(2):
        padded[image, :4] = rows[rows[:, 0] == image, 1:]
    assert torch.equal(criterion(leaves, padded).total, want.total)


@pytest.mark.parametrize("rows", [torch.zeros(0, 6), torch.tensor([[0, 9, 0.5, 0.5, 0.5, 0.5]])])
def test_without_objects_boxes_have_gradients_of_zero(rows):
    names, widths = ("boxes", "objectness", "scores"), (4, 1, 3)
    parts = zip(names, widths, strict=True)
    preds = {name: [torch.randn(2, width, *hw).requires_grad_() for hw in MAPS] for name, width in parts}
    out = YOLOXLoss(3, STRIDES, True, backend="torch")(preds, rows)
    out.total.backward()
    for box, obj, cls in zip(*preds.values(), strict=True):
        assert not box.grad.any()
        assert not cls.grad.any()
        close(obj.grad, obj.sigmoid())
    assert (int(out.num_pos), int(out.num_invalid)) == (0, len(rows))


def test_gains_are_read_at_each_call():
    leaves, rows, strides, classes, _ = case()
    criterion = YOLOXLoss(classes, strides, backend="torch")
    first = criterion(leaves, rows)
    assert float(first.parts["l1"]) == 0.0
    criterion.use_l1, criterion.reg_weight = True, 2.5
    second = criterion(leaves, rows)
    close(second.parts["box"], first.parts["box"] / 2, 1e-12)
    assert float(second.parts["l1"]) > 0
    criterion.use_l1 = 2
    with pytest.raises(ValueError, match=r"^use_l1: 2, want 0 or 1"):
        criterion(leaves, rows)


def test_parts_have_gradients_of_their_own():
    leaves, rows, strides, classes, _ = case()
    criterion = YOLOXLoss(classes, strides, True, backend="torch")
    total, terms = criterion(leaves, rows).total, criterion.terms(leaves, rows)
    assert list(terms) == list(PARTS)
    channels = {"box": range(4), "obj": range(4, 5), "cls": range(5, 5 + classes), "l1": range(4)}
    summed = [torch.zeros_like(leaf) for leaf in leaves]
    for name, term in terms.items():
        grads = torch.autograd.grad(term, leaves, retain_graph=True)
        touched = torch.cat([grad.abs().flatten(2) for grad in grads], 2).sum((0, 2)).nonzero().flatten().tolist()
        assert touched == list(channels[name])
        summed = [s + g for s, g in zip(summed, grads, strict=True)]
    for got, want in zip(summed, torch.autograd.grad(total, leaves), strict=True):
        close(got, want, 1e-12)


# ---- decoding


def test_decoding():
    leaves, _, strides, classes, _ = case()
    criterion = YOLOXLoss(classes, strides, backend="torch")
    boxes, scores = fusedyolo.decode(leaves, criterion)
    raw = torch.cat([leaf.flatten(2) for leaf in leaves], 2).transpose(1, 2)
    x, y, s = loops.cells(MAPS, strides)
    centre, size = (raw[..., :2] + torch.stack((x, y), 1)) * s[:, None], raw[..., 2:4].exp() * s[:, None]
    torch.testing.assert_close(boxes, torch.cat((centre - size / 2, centre + size / 2), 2))
    torch.testing.assert_close(scores, raw[..., 5:].sigmoid() * raw[..., 4:5].sigmoid())
    found = fusedyolo.select(leaves, criterion, conf=0.2, max_det=10)
    torch.testing.assert_close(found.scores[:, 0], scores.amax((1, 2)))


def test_encoded_targets_decode_to_the_true_boxes():
    leaves, rows, strides, classes, _ = case()
    criterion = YOLOXLoss(classes, strides, True, backend="torch")
    found = fusedyolo.assign(criterion, leaves, rows)
    moved = []
    for leaf, level in zip(leaves, found.levels, strict=True):
        raw = torch.where(level.row >= 0, level.encoded.permute(0, 4, 1, 2, 3)[:, :, 0], leaf[:, :4])
        moved.append(torch.cat((raw, leaf[:, 4:]), 1).detach())
    boxes, _ = fusedyolo.decode(moved, criterion)
    row = torch.cat([level.row.flatten(1) for level in found.levels], 1)
    true = torch.cat([level.boxes.flatten(1, 3) for level in found.levels], 1)
    assert (row >= 0).any()
    torch.testing.assert_close(boxes[row >= 0], true[row >= 0], rtol=0, atol=1e-5)


# ---- bad input

WRONG = {
    r"^preds: 2 levels, want 3, one for each of strides": [torch.zeros(2, 8, 8, 12)] * 2,
    r"^preds\[2\]: shape \(2, 9, 2, 3\), want \(B, 8, H, W\)": [torch.zeros(2, 8 + (hw == (2, 3)), *hw) for hw in MAPS],
    r"^preds: a dict with \['boxes', 'scores'\], want a list of 3 maps, or a dict with 'boxes', 'objectness', 's": {
        "boxes": [], "scores": []
    },
    r"^preds\[1\]: dtype torch.float64, want torch.float32 as preds\[0\]": [
        torch.zeros(2, 8, *hw, dtype=torch.float64 if hw == (4, 6) else torch.float32) for hw in MAPS
    ],
    r"^preds\[0\]: 'x', want a tensor": ["x"] * 3,
    r"^preds\[0\]: shape \(0, 8, 8, 12\), want no empty dimension": [torch.zeros(0, 8, *hw) for hw in MAPS],
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_wrong_predictions_are_named(message):
    with pytest.raises(ValueError, match=message):
        YOLOXLoss(3, STRIDES, backend="torch")(WRONG[message], torch.zeros(0, 6))


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"^rule: '0.2.0', want one of 'main', '0.3.0'", {"rule": "0.2.0"}),
        (r"^use_l1: 'yes', want 0 or 1", {"use_l1": "yes"}),
        (r"^center_radius: 0, want a finite number > 0", {"center_radius": 0}),
        (r"^reg_weight: -1, want", {"reg_weight": -1}),
        (r"^strides: 8, want a sequence", {"strides": 8}),
        (r"^iou_loss: 'l1', want one of", {"iou_loss": "l1"}),
    ],
)
def test_wrong_arguments_are_named(message, arguments):
    with pytest.raises(ValueError, match=message):
        YOLOXLoss(**{"num_classes": 3, "strides": STRIDES, **arguments})


def test_the_size_of_the_image_must_be_that_of_the_maps():
    preds = [torch.zeros(2, 8, *hw) for hw in MAPS]
    odd = YOLOXLoss(3, STRIDES, image_size=(60, 90), backend="torch")  # maps reach past the border
    assert float(odd(preds, torch.tensor([[0, 0, 0.5, 0.5, 0.5, 0.5]])).total) > 0
    with pytest.raises(
        ValueError, match=r"^preds\[0\]: a map of 8 x 12 cells, want 8 x 16 cells of 8 pixels for image_"
    ):
        YOLOXLoss(3, STRIDES, image_size=(64, 128), backend="torch")(preds, torch.zeros(0, 6))
    with pytest.raises(ValueError, match=r"^anchors: .*, want no such argument for this loss"):
        fusedyolo.assign(odd, preds, torch.zeros(0, 6), anchors=torch.zeros(1, 4))
