"""YOLOv8Loss and E2ELoss against what Ultralytics computed, and against its rules written as loops."""

from __future__ import annotations

import copy
from typing import Any

import golden
import loop_picks as loops
import pytest
import torch
from conftest import DEVICE
from golden import arrays
from torch import Tensor

import fusedyolo
from fusedyolo import E2ELoss, Targets, YOLOv8Loss
from fusedyolo.losses import picks
from fusedyolo.terms import term_names

V8 = golden.names("torch", "ultra_v8*")
E2E = golden.names("torch", "ultra_e2e*") + golden.names("torch", "ultra_v10*")
MAPS, STRIDES = ((8, 12), (4, 6), (2, 3)), (8, 16, 32)
in_both_precisions = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def feats(maps: Any) -> list[Tensor]:
    return [torch.empty(1, 1, *sides) for sides in maps]


def planes(boxes: Tensor, scores: Tensor, maps: Any = MAPS) -> dict[str, Any]:
    return {"boxes": boxes, "scores": scores, "feats": feats(maps)}


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    """Within ``tolerance`` times the largest entry."""
    scale = float(want.detach().abs().max()) if want.numel() else 0.0
    torch.testing.assert_close(got.detach().double(), want.detach().double(), rtol=0, atol=tolerance * scale)


def assigned(criterion: Any, preds: Any, rows: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Row, label and soft score of all predictions, [B, N]."""
    levels = fusedyolo.assign(criterion, preds, rows).levels
    row, label, score = (
        torch.cat([getattr(level, name).flatten(1) for level in levels], 1) for name in ("row", "label", "score")
    )
    return row, label, score


def check_assignment(criterion: YOLOv8Loss, preds: Any, data: dict[str, Any], prefix: str) -> None:
    _, label, score = assigned(criterion, preds, data["targets"])
    effective = data[prefix + "fg_effective"]
    assert torch.equal(score > 0, effective)
    close(score, data[prefix + "target_score"])
    assert torch.equal(label[effective], data[prefix + "target_label"][effective].long())
    assert effective.any()


@in_both_precisions
@pytest.mark.parametrize("name", V8)
def test_what_ultralytics_computed(name, dtype):
    data = arrays(name)
    meta, tal = data["meta"], data["meta"]["tal"]
    gains = {gain: meta["hyp"][gain] for gain in ("box", "cls", "dfl")}
    criterion = YOLOv8Loss(
        meta["nc"], meta["strides"], meta["reg_max"], topk=tal.get("topk", 10), alpha=tal["alpha"], beta=tal["beta"],
        backend="torch", **gains,
    )  # fmt: skip
    leaves = [data[name].to(dtype).requires_grad_() for name in ("boxes", "scores")]
    preds = planes(*leaves, meta["level_hw"])
    out = criterion(preds, data["targets"])
    assert out.total.dtype == dtype
    close(out.total, data["total"])
    close(torch.stack(list(out.parts.values())), data["loss_vector"])
    assert list(out.parts) == ["box", "cls", "l1" if meta["reg_max"] == 1 else "dfl"]
    assert not any(part.requires_grad for part in out.parts.values())
    for leaf, name in zip(leaves, ("boxes", "scores"), strict=True):
        (grad,) = torch.autograd.grad(out.total, leaf, retain_graph=True)
        close(grad, data[f"grad_{name}"])
    assert int(out.num_invalid) == 0
    assert int(out.num_pos) >= int(data["fg_effective"].sum())
    check_assignment(criterion, preds, data, "")


@in_both_precisions
@pytest.mark.parametrize("name", E2E)
def test_what_ultralytics_computed_of_two_branches(name, dtype):
    data = arrays(name)
    meta = data["meta"]
    gains = {gain: meta["hyp"][gain] for gain in ("box", "cls", "dfl")}
    recipe = "yolov10" if meta["loss"].startswith("E2EDetectLoss") else "yolo26"
    criterion = E2ELoss(
        meta["nc"], meta["strides"], meta["reg_max"], recipe, meta["hyp"]["epochs"], backend="torch", **gains
    )
    for _ in range(meta["updates"]):
        criterion.update()
    if recipe == "yolo26":
        assert (criterion.o2m, criterion.o2o) == (meta["o2m"], meta["o2o"])
    names = [f"{prefix}_{plane}" for prefix in ("o2m", "o2o") for plane in ("boxes", "scores")]
    leaves = [data[name].to(dtype).requires_grad_() for name in names]
    preds = {
        "one2many": planes(*leaves[:2], meta["level_hw"]),
        "one2one": planes(*leaves[2:], meta["level_hw"]),
    }
    out = criterion(preds, data["targets"])
    close(out.total, data["total"])
    last = "l1" if meta["reg_max"] == 1 else "dfl"
    vector = [out.parts[f"one2many_{part}"] + out.parts[f"one2one_{part}"] for part in ("box", "cls", last)]
    close(torch.stack(vector), data["loss_vector"])
    for grad, name in zip(torch.autograd.grad(out.total, leaves), names, strict=True):
        close(grad, data[f"grad_{name}"])
    # what the peer logs: the second branch's parts as they are, but of the old recipe the sums of both
    batch = len(data["o2m_boxes"])
    for key, item in meta["items"].items():
        part = key.removesuffix("_loss")
        mine = out.parts[f"one2one_{part}"] / criterion.o2o
        if recipe == "yolov10":
            mine = mine + out.parts[f"one2many_{part}"]
        assert float(mine) / batch == pytest.approx(item, rel=1e-5)
    check_assignment(criterion.one2many, preds["one2many"], data, "o2m_")
    check_assignment(criterion.one2one, preds["one2one"], data, "o2o_")
    check_assignment(criterion, preds, data, "o2o_")  # the branch that detects


# ---- the rules as loops


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain, another": {"seed": 1},
    "an empty image": {"seed": 2, "images": 3, "empty": True},
    "raw distances": {"seed": 3, "reg_max": 1},
    "five bins": {"seed": 4, "reg_max": 5},
    "class weights": {"seed": 5, "class_weights": (1.0, 2.0, 0.25)},
    "one cell an object": {"seed": 6, "reg_max": 1, "topk": 7, "topk2": 1},
    "a few of many": {"seed": 7, "topk": 13, "topk2": 4, "alpha": 1.0, "beta": 2.0},
    "one pick": {"seed": 8, "topk": 1},
    "one level": {"seed": 9, "maps": ((9, 7),), "strides": (16,), "topk": 100},
    "tiny objects": {"seed": 10, "objects": 12, "smallest": 0.01, "largest": 0.06},
    "tiny objects, raw": {"seed": 11, "objects": 12, "smallest": 0.01, "largest": 0.06, "reg_max": 1},
    "large objects": {"seed": 12, "smallest": 0.6, "largest": 1.5},
    "a crowd": {"seed": 13, "images": 1, "objects": 300, "smallest": 0.03, "largest": 0.3},
    "a crowd, one each": {
        "seed": 14, "images": 2, "objects": 100, "smallest": 0.05, "largest": 0.5, "reg_max": 1, "topk": 7, "topk2": 1
    },
    "one class": {"seed": 15, "classes": 1},
    "uneven maps": {"seed": 16, "maps": ((7, 13), (4, 7), (2, 4))},
    "small sides reach": {"seed": 17, "objects": 12, "smallest": 0.01, "largest": 0.06, "small": 40},
    "ranges": {"seed": 18, "rule": "libreyolo"},
    "ranges of four bins": {"seed": 19, "rule": "libreyolo", "reg_max": 4, "topk": 13, "topk2": 4},
    "ranges, one at least": {
        "seed": 20, "rule": "libreyolo", "reg_max": 4, "objects": 20, "smallest": 0.01, "largest": 1.5
    },
    "ranges, a crowd": {
        "seed": 21, "rule": "libreyolo", "images": 1, "objects": 150, "smallest": 0.03, "largest": 0.3, "beta": 1.0
    },
}  # fmt: skip


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
    reg_max: int = 16,
    **options: Any,
) -> tuple[list[Tensor], Tensor, tuple[int, Any, Any, int], dict[str, Any]]:
    """Predictions, rows, what they are of, and options of the loss."""
    rows = loops.some_rows(seed, images, objects, classes, smallest, largest, empty)
    leaves = loops.v8_predictions(rows, maps, strides, images, classes, reg_max, seed)
    return [leaf.requires_grad_() for leaf in leaves], rows, (classes, maps, strides, reg_max), options


def against_loops(leaves: list[Tensor], rows: Tensor, of: tuple[int, Any, Any, int], options: dict[str, Any]) -> int:
    """Parts, gradients and assignment; how many predictions have an object."""
    classes, maps, strides, reg_max = of
    criterion = YOLOv8Loss(classes, strides, reg_max, backend="torch", **options)
    preds = planes(*leaves, maps)
    out = criterion(preds, rows)
    weights = options.get("class_weights")
    options = {**options, "class_weights": None if weights is None else torch.tensor(weights, dtype=torch.float64)}
    # ours takes heights as they are, the peer with eps: 1e-7 cells
    for taller, tolerance in ((loops.EPS, 1e-5), (0.0, 1e-9)):
        want = loops.yolov8(*leaves, rows, maps, strides, reg_max=reg_max, taller=taller, **options)
        row, _, score = assigned(criterion, preds, rows)
        close(score, want.score, tolerance)
        assert torch.equal(torch.where(score > 0, row, -1), torch.where(want.score > 0, want.row, -1))
        for name, part in want.parts.items():
            close(out.parts[name], part, tolerance)
        total = torch.stack(list(want.parts.values())).sum()
        close(out.total, total, tolerance)
        for got, grad in zip(
            torch.autograd.grad(out.total, leaves, retain_graph=True), torch.autograd.grad(total, leaves), strict=True
        ):
            close(got, grad, tolerance)
    assert int(out.num_pos) == int((row >= 0).sum())
    return int(out.num_pos)


@pytest.mark.parametrize("name", CASES)
def test_the_rules_as_loops(name):
    assert against_loops(*case(**CASES[name])) > 0


@pytest.mark.parametrize("topk2", [None, 2])
def test_equals_come_in_their_order(topk2):
    """Objects twice, and predictions that are all the same on dyadic places: everything ties."""
    rows = torch.tensor([
        [0, 1, 0.5, 0.5, 0.5, 0.5],
        [0, 1, 0.5, 0.5, 0.5, 0.5],
        [0, 0, 0.25, 0.75, 0.25, 0.25],
        [0, 2, 0.25, 0.75, 0.25, 0.25],
    ])  # fmt: skip
    leaves = [torch.full((1, 4, 84), 1.5).double(), torch.zeros(1, 3, 84).double()]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    of = (3, ((8, 8), (4, 4), (2, 2)), STRIDES, 1)
    found = against_loops(leaves, rows, of, {"topk": 5, "topk2": topk2})
    assert found == (4 if topk2 else 10)
    row, *_ = assigned(YOLOv8Loss(3, STRIDES, 1, topk=5, topk2=topk2, backend="torch"), planes(*leaves, of[1]), rows)
    assert set(row[row >= 0].tolist()) == {0, 2}  # of equals the first


def test_nothing_is_picked_for_nothing():
    """Predictions that do not meet an object are not picked, even where an object gets none."""
    rows = torch.tensor([[0, 0, 0.5, 0.5, 0.5, 0.5]])
    leaves = [torch.full((1, 4, 84), -1.0).requires_grad_(), torch.zeros(1, 1, 84).requires_grad_()]
    out = YOLOv8Loss(1, STRIDES, 1, backend="torch")(planes(*leaves, ((8, 8), (4, 4), (2, 2))), rows)
    assert (int(out.num_pos), float(out.parts["box"]), float(out.parts["l1"])) == (0, 0.0, 0.0)


def test_the_small_object_rule():
    """A side below ``small`` pixels reaches as far as ``small``."""
    rows = torch.tensor([[0, 0, 0.5, 0.5, 1 / 64, 1 / 64]])  # a pixel in the middle between four cells of stride 8
    maps = (8, 8), (4, 4), (2, 2)
    boxes = loops.near_boxes(rows, maps, STRIDES, 1, 0, noise=0.0).transpose(1, 2)
    preds = planes(boxes, torch.zeros(1, 1, 84).double(), maps)
    found = {small: YOLOv8Loss(1, STRIDES, 1, small=small, backend="torch")(preds, rows) for small in (None, 0, 8.1)}
    assert [int(out.num_pos) for out in found.values()] == [4, 0, 4]


# ---- forms, gains, empty calls


def test_forms_of_predictions_agree():
    leaves, rows, (classes, maps, strides, reg_max), _ = case(seed=3)
    criterion = YOLOv8Loss(classes, strides, reg_max, backend="torch")
    want = criterion(planes(*leaves), rows)
    grads = torch.cat([grad.flatten(2) for grad in torch.autograd.grad(want.total, leaves)], 1)
    areas = [h * w for h, w in maps]

    def levels(plane: Tensor) -> list[Tensor]:
        return [p.detach().unflatten(2, sides).clone() for p, sides in zip(plane.split(areas, 2), maps, strict=True)]

    boxes, scores = map(levels, leaves)
    both = [
        torch.cat(pair, 1).contiguous(memory_format=torch.channels_last) for pair in zip(boxes, scores, strict=True)
    ]
    for preds, tensors in (({"boxes": boxes, "scores": scores}, [*boxes, *scores]), (both, both)):
        tensors = [tensor.requires_grad_() for tensor in tensors]
        out = criterion(preds, rows)
        close(out.total, want.total, 1e-12)
        got = [grad.flatten(2) for grad in torch.autograd.grad(out.total, tensors)]
        flat = torch.cat(got, 2) if preds is both else torch.cat((torch.cat(got[:3], 2), torch.cat(got[3:], 2)), 1)
        close(flat, grads, 1e-12)
    sized = YOLOv8Loss(classes, strides, reg_max, image_size=(64, 96), backend="torch")
    out = sized({"boxes": leaves[0], "scores": leaves[1]}, rows)  # no feats
    assert torch.equal(out.total, want.total)


def test_forms_of_targets_agree():
    leaves, rows, (classes, *_, reg_max), _ = case(seed=3)
    criterion = YOLOv8Loss(classes, STRIDES, reg_max, backend="torch")
    preds = planes(*leaves)
    want = criterion(preds, rows)
    targets = Targets.from_packed(rows, 2, capacity=50)
    out = criterion(preds, targets)
    assert torch.equal(out.total, want.total)
    assert int(out.num_invalid) == 0
    size = torch.tensor([96.0, 64.0])
    listed = []
    for image in range(2):
        own = rows[rows[:, 0] == image]
        corners = torch.cat((own[:, 2:4] - own[:, 4:] / 2, own[:, 2:4] + own[:, 4:] / 2), 1) * size.repeat(2)
        listed.append({"boxes": corners, "labels": own[:, 1].long()})
    close(criterion(preds, listed).total, want.total, 1e-6)


@pytest.mark.parametrize(("scale", "times"), [(1, 1), (2, 2)])
def test_two_branches_read_targets_once_of_images_of_one_size(scale, times, monkeypatch):
    """Pixels of an image of another size are other boxes."""
    boxes, scores = torch.randn(2, 4, 126), torch.randn(2, 3, 126)
    larger = torch.randn(2, 4, 126 * scale**2), torch.randn(2, 3, 126 * scale**2)
    preds = {
        "one2many": planes(boxes, scores),
        "one2one": planes(*larger, [(height * scale, width * scale) for height, width in MAPS]),
    }
    listed = [{"boxes": torch.tensor([[3.0, 5.0, 40.0, 60.0]]), "labels": torch.tensor([2])} for _ in range(2)]
    criterion = E2ELoss(3, STRIDES, backend="torch")
    alone = [getattr(criterion, name)(preds[name], listed).total for name in preds]
    read, calls = picks.as_targets, []
    monkeypatch.setattr(picks, "as_targets", lambda *given: calls.append(given) or read(*given))
    total = criterion(preds, listed).total
    assert len(calls) == times
    close(total, criterion.o2m * alone[0] + criterion.o2o * alone[1], 1e-6)


@pytest.mark.parametrize("reg_max", [1, 16])
@pytest.mark.parametrize("rows", [torch.zeros(0, 6), torch.tensor([[0, 9, 0.5, 0.5, 0.5, 0.5]])])
def test_without_objects_boxes_have_gradients_of_zero(rows, reg_max):
    leaves = [torch.randn(2, 4 * reg_max, 126).requires_grad_(), torch.randn(2, 3, 126).requires_grad_()]
    out = YOLOv8Loss(3, STRIDES, reg_max, backend="torch")(planes(*leaves), rows)
    out.total.backward()
    assert torch.equal(leaves[0].grad, torch.zeros_like(leaves[0]))
    close(leaves[1].grad, 2 * 0.5 * leaves[1].sigmoid())
    assert (int(out.num_pos), int(out.num_invalid)) == (0, len(rows))


def test_invalid_rows_are_skipped_and_counted():
    leaves, rows, (classes, *_, reg_max), _ = case(seed=3)
    bad = torch.tensor([
        [0, 3, 0.5, 0.5, 0.5, 0.5],  # no such class
        [2, 0, 0.5, 0.5, 0.5, 0.5],  # no such image
        [0, 0, 0.5, 0.5, 0.0, 0.5],  # no area
        [0, 0, float("nan"), 0.5, 0.5, 0.5],
        [0, 0, 1.5, 0.5, 0.5, 0.5],  # outside
    ])  # fmt: skip
    criterion = YOLOv8Loss(classes, STRIDES, reg_max, backend="torch")
    mixed = torch.cat((bad[:2], rows, bad[2:]))
    want, out = criterion(planes(*leaves), rows), criterion(planes(*leaves), mixed)
    assert torch.equal(out.total, want.total)
    assert int(out.num_invalid) == 5
    row, *_ = assigned(criterion, planes(*leaves), mixed)
    taken = row[row >= 0]
    assert ((taken >= 2) & (taken < 2 + len(rows))).all()
    assert fusedyolo.assign(criterion, planes(*leaves), mixed).valid.tolist() == [False] * 2 + [True] * 8 + [False] * 3


def test_gains_are_read_at_each_call():
    leaves, rows, (classes, *_, reg_max), _ = case(seed=3)
    criterion = YOLOv8Loss(classes, STRIDES, reg_max, backend="torch")
    first = criterion(planes(*leaves), rows)
    criterion.box, criterion.dfl = 15.0, 0.0
    second = criterion(planes(*leaves), rows)
    close(second.parts["box"], 2 * first.parts["box"], 1e-12)
    assert torch.equal(second.parts["cls"], first.parts["cls"])
    assert float(second.parts["dfl"]) == 0.0
    criterion.cls = float("nan")
    with pytest.raises(ValueError, match=r"^cls: nan, want a finite number >= 0"):
        criterion(planes(*leaves), rows)


def test_parts_have_gradients_of_their_own():
    leaves, rows, (classes, *_, reg_max), _ = case(seed=3)
    criterion = YOLOv8Loss(classes, STRIDES, reg_max, backend="torch")
    total = criterion(planes(*leaves), rows).total
    terms = criterion.terms(planes(*leaves), rows)
    assert list(terms) == ["box", "cls", "dfl"]
    summed = [torch.zeros_like(leaf) for leaf in leaves]
    for name, term in terms.items():
        grads = torch.autograd.grad(term, leaves, allow_unused=True, retain_graph=True)
        assert [grad is not None and bool(grad.any()) for grad in grads] == [name != "cls", name == "cls"]
        summed = [s if g is None else s + g for s, g in zip(summed, grads, strict=True)]
    for got, want in zip(summed, torch.autograd.grad(total, leaves), strict=True):
        close(got, want, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_float32(dtype):
    leaves, rows, (classes, *_, reg_max), _ = case(seed=3)
    half = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    wide = [leaf.detach().float().requires_grad_() for leaf in half]
    criterion = YOLOv8Loss(classes, STRIDES, reg_max, backend="torch")
    out, want = criterion(planes(*half), rows), criterion(planes(*wide), rows)
    assert out.total.dtype == torch.float32
    assert torch.equal(out.total, want.total)
    for got, grad in zip(torch.autograd.grad(out.total, half), torch.autograd.grad(want.total, wide), strict=True):
        assert torch.equal(got, grad.to(dtype))


def test_weights_of_branches_fall_and_rise():
    criterion = E2ELoss(3, STRIDES, epochs=3, backend="torch")
    seen = [(criterion.o2m, criterion.o2o)]
    for _ in range(3):
        criterion.update()
        seen.append((criterion.o2m, criterion.o2o))
    assert seen == [pytest.approx(pair) for pair in ((0.8, 0.2), (0.45, 0.55), (0.1, 0.9), (0.1, 0.9))]
    criterion = E2ELoss(3, STRIDES, epochs=3, backend="torch")
    criterion.epochs = 1
    criterion.update()
    assert criterion.o2m == pytest.approx(0.1)
    old = E2ELoss(3, STRIDES, 16, "yolov10", backend="torch")
    old.update()
    assert (old.o2m, old.o2o) == (1.0, 1.0)


def test_updates_are_saved_and_act_at_once():
    def fresh(recipe="yolo26"):
        return E2ELoss(3, STRIDES, 1, recipe, epochs=10, backend="torch")

    criterion = fresh()
    for _ in range(6):
        criterion.update()
    other, third = fresh(), fresh()
    assert other.load_state_dict(criterion.state_dict()) == ([], [])
    third.updates = 6
    for each in (other, third, copy.deepcopy(criterion)):
        assert (each.updates, each.o2m, each.o2o) == (6, criterion.o2m, criterion.o2o)
    (state,) = criterion.state_dict().values()
    assert (state.dtype, state.shape, int(state)) == (torch.int64, (), 6)
    third.updates = 0
    assert (third.o2m, third.o2o) == (fresh().o2m, fresh().o2o)
    for wrong in (-1, 2.5):
        with pytest.raises(ValueError, match=rf"^updates: {wrong}, want an integer >= 0$"):
            third.updates = wrong

    # a checkpoint that knows nothing of the loss is whole; nor do weights that never move have anything to save
    assert torch.nn.ModuleDict({"loss": fresh()}).load_state_dict({}) == ([], [])
    assert not fresh("yolov10").state_dict()
    assert fresh("yolov10").load_state_dict(criterion.state_dict()) == ([], [])


# ---- decoding


@pytest.mark.parametrize("reg_max", [1, 16])
def test_decoding(reg_max):
    leaves, _, (classes, maps, strides, _), _ = case(seed=3, reg_max=reg_max)
    criterion = YOLOv8Loss(classes, strides, reg_max, backend="torch")
    boxes, scores = fusedyolo.decode(planes(*leaves), criterion)
    torch.testing.assert_close(scores, leaves[1].sigmoid().transpose(1, 2))
    x, y, s = loops.cells(maps, strides)
    raw = leaves[0].view(2, 4, reg_max, -1)
    d = (raw.softmax(2) * torch.arange(reg_max).double().view(1, 1, -1, 1)).sum(2) if reg_max > 1 else raw[:, :, 0]
    want = torch.stack((x + 0.5 - d[:, 0], y + 0.5 - d[:, 1], x + 0.5 + d[:, 2], y + 0.5 + d[:, 3]), 2) * s[:, None]
    torch.testing.assert_close(boxes, want)
    found = fusedyolo.select(planes(*leaves), criterion, conf=0.3, max_det=20)
    assert (found.count > 0).all()
    best = scores.amax((1, 2))
    torch.testing.assert_close(found.scores[:, 0], best)
    pair = {"one2many": planes(leaves[0] + 1, leaves[1]), "one2one": planes(*leaves)}
    both = E2ELoss(classes, strides, reg_max, backend="torch")
    assert torch.equal(fusedyolo.decode(pair, both)[0], boxes)
    assert torch.equal(fusedyolo.select(pair, both, conf=0.3, max_det=20).boxes, found.boxes)


def test_encoded_distances_decode_to_the_true_boxes():
    leaves, rows, (classes, *_), _ = case(seed=3, reg_max=1)
    criterion = YOLOv8Loss(classes, STRIDES, 1, backend="torch")
    found = fusedyolo.assign(criterion, planes(*leaves), rows)
    encoded = torch.cat([level.encoded.flatten(1, 3) for level in found.levels], 1).transpose(1, 2)
    boxes, _ = fusedyolo.decode(planes(encoded, leaves[1]), criterion)
    row = torch.cat([level.row.flatten(1) for level in found.levels], 1)
    true = torch.cat([level.boxes.flatten(1, 3) for level in found.levels], 1)
    torch.testing.assert_close(boxes[row >= 0], true[row >= 0])
    own = rows[row[row >= 0], 2:].double() * torch.tensor([96.0, 64.0] * 2)
    torch.testing.assert_close(true[row >= 0], torch.cat((own[:, :2] - own[:, 2:] / 2, own[:, :2] + own[:, 2:] / 2), 1))
    for level in found.levels:
        assert torch.equal(level.objectness, level.score)
        assert not level.ignored.any()
        pairs = level.pairs[:, level.pairs[1] < level.row.numel()]
        assert torch.equal(level.row.flatten()[pairs[1]], pairs[0])
        assert len(pairs[0]) == int((level.row >= 0).sum())


def test_the_picture():
    leaves, rows, (classes, *_), _ = case(seed=3, reg_max=1)
    found = fusedyolo.assign(YOLOv8Loss(classes, STRIDES, 1, backend="torch"), planes(*leaves), rows)
    figure = fusedyolo.draw_assignment(torch.zeros(3, 64, 96), found, 1)
    shown = [int((level.row[1] >= 0).sum()) for level in found.levels]
    assert sum(shown) > 0
    assert [axes.get_title() for axes in figure.axes] == [
        f"stride {stride}: {n} positive" for stride, n in zip(STRIDES, shown, strict=True)
    ]


def test_repr():
    criterion = YOLOv8Loss(3, STRIDES, assign_iou="iou", cls_loss="varifocal", rule="libreyolo", backend="torch")
    assert repr(criterion) == (
        "YOLOv8Loss(num_classes=3, strides=(8, 16, 32), backend='torch', box=7.5, cls=0.5, dfl=1.5, rule='libreyolo', "
        "assign_iou='iou', cls_loss='varifocal')"
    )
    text = repr(E2ELoss(3, STRIDES, recipe="yolov10", epochs=5, assign_iou="giou", backend="torch"))
    assert text.startswith("E2ELoss(\n  recipe='yolov10', epochs=5\n")
    assert text.count("assign_iou='giou', cls_loss='bce'") == 2


# ---- bad input


GOOD = {"boxes": torch.zeros(2, 64, 126), "scores": torch.zeros(2, 3, 126), "feats": feats(MAPS)}
WRONG = {
    r"^preds: 2 levels, want 3, one for each of strides": [torch.zeros(2, 67, 8, 12)] * 2,
    r"^preds: a tensor of shape \(1,\), want a list of 3 maps, or a dict with 'boxes', 'scores'": torch.zeros(1),
    r"^preds: a dict with \['boxes'\], want": {"boxes": torch.zeros(1)},
    r"^preds\[0\]: shape \(2, 66, 8, 12\), want \(B, 67, H, W\): boxes 4 \* 16, scores 3$": [
        torch.zeros(2, 66, *hw) for hw in MAPS
    ],
    r"^preds\[1\]: a map of 8 x 12 cells, want 4 x 6 cells of 16 pixels": [torch.zeros(2, 67, 8, 12)] * 3,
    r"^boxes: shape \(2, 4, 126\), want \(B, 64, 126\)": GOOD | {"boxes": torch.zeros(2, 4, 126)},
    r"^scores: shape \(2, 3, 125\), want \(B, 3, 126\)": GOOD | {"scores": torch.zeros(2, 3, 125)},
    r"^scores: batch size 1, want 2 as boxes": GOOD | {"scores": torch.zeros(1, 3, 126)},
    r"^scores: dtype torch.float64, want torch.float32 as boxes": GOOD | {"scores": torch.zeros(2, 3, 126).double()},
    r"^boxes: dtype torch.int64, want one of": GOOD | {"boxes": torch.zeros(2, 64, 126, dtype=torch.int64)},
    r"^scores: None, want a tensor of shape \(B, 3, 126\)": GOOD | {"scores": None},
    r"^feats: .*, want a list of 3 maps": GOOD | {"feats": feats(MAPS[:2])},
    r"^feats\[1\]: a map of 3 x 6 cells, want 4 x 6 cells": GOOD | {"feats": feats([(8, 12), (3, 6), (2, 3)])},
    r"^preds: planes without 'feats', want these": {name: GOOD[name] for name in ("boxes", "scores")},
    r"^scores: 1 levels, want a list of 3 maps as boxes": {
        "boxes": [torch.zeros(2, 64, *hw) for hw in MAPS], "scores": [torch.zeros(2, 3, 8, 12)]
    },
    r"^scores\[1\]: shape \(2, 4, 4, 6\), want \(B, 3, H, W\)": {
        "boxes": [torch.zeros(2, 64, *hw) for hw in MAPS],
        "scores": [torch.zeros(2, 3 + (hw == (4, 6)), *hw) for hw in MAPS],
    },
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_wrong_predictions_are_named(message):
    with pytest.raises(ValueError, match=message):
        YOLOv8Loss(3, STRIDES, backend="torch")(WRONG[message], torch.zeros(0, 6))


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"^strides: 8, want a sequence", {"strides": 8}),
        (r"^strides\[1\]: 0, want a finite number > 0", {"strides": (8, 0)}),
        (r"^num_classes: 0, want an integer >= 1", {"num_classes": 0}),
        (r"^reg_max: 0, want", {"reg_max": 0}),
        (r"^topk: 0, want", {"topk": 0}),
        (r"^topk2: -1, want", {"topk2": -1}),
        (r"^alpha: -1, want", {"alpha": -1}),
        (r"^box: 'x', want", {"box": "x"}),
        (r"^class_weights: 2 numbers, want 3, one a class", {"class_weights": [1.0, 2.0]}),
        (r"^class_weights\[1\]: -2.0, want", {"class_weights": [1.0, -2.0, 1.0]}),
        (r"^iou_loss: 'mse', want one of", {"iou_loss": "mse"}),
        (r"^backend: 'cuda', want one of", {"backend": "cuda"}),
    ],
)
def test_wrong_arguments_are_named(message, arguments):
    with pytest.raises(ValueError, match=message):
        YOLOv8Loss(**{"num_classes": 3, "strides": STRIDES, **arguments})


def test_wrong_arguments_of_two_branches_are_named():
    with pytest.raises(ValueError, match=r"^recipe: 'v10', want one of 'yolo26', 'yolov10'"):
        E2ELoss(3, STRIDES, recipe="v10")
    with pytest.raises(ValueError, match=r"^topk: 5, want none: the recipe says it"):
        E2ELoss(3, STRIDES, topk=5)
    criterion = E2ELoss(3, STRIDES, 16, backend="torch")
    with pytest.raises(ValueError, match=r"^preds: a dict with \['one2many'\], want a dict with 'one2many', 'one2one'"):
        criterion({"one2many": GOOD}, torch.zeros(0, 6))
    with pytest.raises(ValueError, match=r"^preds: \[\], want a dict with 'one2many', 'one2one'"):
        criterion([], torch.zeros(0, 6))
    with pytest.raises(ValueError, match=r"^image_size: .*|^boxes: shape"):
        criterion({"one2many": GOOD, "one2one": GOOD | {"boxes": torch.zeros(2, 4, 126)}}, torch.zeros(0, 6))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_compiles_with_symbols_for_all_numbers(backend):
    """``dynamic=True`` makes symbols of gains, too."""
    torch.compiler.reset()
    criterion = YOLOv8Loss(3, (8, 16), 1, backend=backend)
    compiled = torch.compile(criterion, dynamic=True, fullgraph=True, backend="eager")
    for side, count in ((4, 2), (6, 3)):
        preds = [torch.randn(2, 7, side // k, side // k, device=DEVICE, requires_grad=True) for k in (1, 2)]
        rows = torch.rand(count, 6, device=DEVICE)
        rows[:, :2] = 1
        assert torch.equal(compiled(preds, rows).total, criterion(preds, rows).total)


@pytest.mark.parametrize("name", [term for term in term_names("iou", users=True) if term != "mpdiou"])
def test_objects_pick_by_any_overlap_of_two_boxes(name):
    """No other is taken, and no other named."""
    leaves, rows, (classes, maps, strides, reg_max), _ = case(seed=3, images=1)
    criterion = YOLOv8Loss(classes, strides, reg_max, assign_iou=name, backend="torch")
    assert int(criterion(planes(*leaves, maps), rows).num_pos) > 0
    with pytest.raises(ValueError, match=r"^assign_iou: 'mpdiou', want one of 'iou', .*'siou'$"):
        YOLOv8Loss(classes, strides, reg_max, assign_iou="mpdiou")


def test_what_ppyoloe_and_yolo_nas_train():
    """Other numbers, IoU where objects pick, GIoU and a varifocal loss: of the assignment, by formulas written here."""
    images = 2
    leaves, rows, (classes, maps, strides, reg_max), _ = case(seed=3, images=images)
    gains = {"box": 2.5, "cls": 1.0, "dfl": 0.5}
    numbers = {"topk": 13, "alpha": 1.0, "beta": 6.0, "small": 0, "reg_max": reg_max}
    criterion = YOLOv8Loss(
        classes, strides, **numbers, **gains, iou_loss="giou", assign_iou="iou", cls_loss="varifocal", backend="torch"
    )
    preds = planes(*leaves, maps)
    out = criterion(preds, rows)
    row, _, score = assigned(criterion, preds, rows)
    boxes, scores = fusedyolo.decode(preds, criterion)
    H, W = maps[0][0] * strides[0], maps[0][1] * strides[0]
    centre, sides = rows[:, 2:4].double() * torch.tensor([W, H]), rows[:, 4:].double() * torch.tensor([W, H])
    true = torch.cat((centre - sides / 2, centre + sides / 2), 1)
    for image in range(images):
        own = (rows[:, 0] == image).nonzero().flatten()
        overlap = box_iou(true[own], boxes[image])
        metric = scores[image].T[rows[own, 1].long()] * overlap**6
        for i, g in enumerate(own.tolist()):
            cells = (row[image] == g).nonzero().flatten()
            if len(cells):
                want = metric[i, cells] * overlap[i, cells].max() / (metric[i, cells].max() + 1e-9)
                close(score[image, cells], want, 1e-6)
    target = torch.zeros_like(scores)
    has = row >= 0
    target[has] = torch.nn.functional.one_hot(rows[row[has], 1].long(), classes) * score[has][:, None]
    weight = torch.where(target > 0, target, 0.75 * scores**2)
    entropy = torch.nn.functional.binary_cross_entropy(scores, target, reduction="none")
    close(out.parts["cls"], images * (weight * entropy).sum() / score.sum().clamp(min=1), 1e-9)
    each = loops.cells(maps, strides)[2].expand(images, -1)[has][:, None]  # boxes are in cells, for eps
    giou = torch.stack([_giou(a, b) for a, b in zip(boxes[has] / each, true[row[has]] / each, strict=True)])
    close(out.parts["box"], images * 2.5 * (score[has] * (1 - giou)).sum() / score.sum().clamp(min=1), 1e-9)


def _giou(a: Tensor, b: Tensor) -> Tensor:
    low, high = torch.maximum(a[:2], b[:2]), torch.minimum(a[2:], b[2:])
    shared, both = (high - low).clamp(min=0).prod(), (a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod()
    around = (torch.maximum(a[2:], b[2:]) - torch.minimum(a[:2], b[:2])).prod()
    union = both - shared
    return shared / (union + 1e-7) - (around - union) / (around + 1e-7)


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """[G, N]."""
    low, high = torch.maximum(a[:, None, :2], b[:, :2]), torch.minimum(a[:, None, 2:], b[:, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    return shared / ((a[:, 2:] - a[:, :2]).prod(-1)[:, None] + (b[:, 2:] - b[:, :2]).prod(-1) - shared)
