"""YOLOv1Loss: against darknet's own output, a loop over cells, and the rules of an operator; what a step costs."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
import torch._dynamo.testing
import triton
import triton.language as tl
from conftest import DEVICE, PINNED_TRITON
from formulas import plain_iou
from fusedyolo.kernels import cells as kernels
from fusedyolo.kernels import launch
from process import call
from torch import Tensor

import fusedyolo
from bench.count import count
from fusedyolo import Targets, YOLOv1Loss, ops, reference
from fusedyolo.heads import CellHead, cell_head_from_key
from fusedyolo.losses import CELL_RECIPES
from fusedyolo.tools import objects

ROOT = Path(__file__).parents[2]
BACKENDS = ["torch", "triton"]
RECIPES = ["paper", "darknet"]
LAYOUTS = ["flat", "grid"]
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5}
nan, inf = float("nan"), float("inf")


# ---- a second implementation: Python numbers, one cell at a time


def places(S: int, n: int, C: int, layout: str):
    """Where box entry (cell, j, e), confidence (cell, j) and class (cell, c) lie in an image of predictions."""
    if layout == "grid":
        K = 5 * n + C
        return (
            lambda cell, j, e: cell * K + 5 * j + e,
            lambda cell, j: cell * K + 5 * j + 4,
            lambda cell, c: cell * K + 5 * n + c,
        )
    confidences = S * S * C
    boxes = confidences + S * S * n
    return (
        lambda cell, j, e: boxes + (cell * n + j) * 4 + e,
        lambda cell, j: confidences + cell * n + j,
        lambda cell, c: cell * C + c,
    )


def by_hand(pred: Tensor, rows: Tensor, S: int, n: int, C: int, layout: str, recipe: str, **hyp):
    """Parts, gradient, cells with an object, invalid rows, and how often the fallback was taken."""
    paper = recipe == "paper"
    factor, coord, noobj = (1.0, hyp.get("lambda_coord", 5.0), hyp.get("lambda_noobj", 0.5))
    obj = cls = 1.0
    if not paper:
        factor, coord, noobj = 0.5, hyp.get("coord_scale", 5.0), hyp.get("noobject_scale", 0.5)
        obj, cls = hyp.get("object_scale", 1.0), hyp.get("class_scale", 1.0)
    root, rescore = hyp.get("sqrt", 1), hyp.get("rescore", 1)
    B = pred.shape[0]
    values = pred.detach().double().cpu().reshape(B, -1).numpy()
    grad = np.zeros_like(values)
    at_box, at_conf, at_class = places(S, n, C, layout)
    parts = {"box": 0.0, "obj": 0.0, "cls": 0.0}
    found: dict[tuple[int, int], tuple] = {}
    invalid = fallback = 0
    for row in rows.cpu().numpy():
        image, label, cx, cy, w, h = row
        fine = np.isfinite(row).all() and 0 <= image < B and 0 <= label < C and w > 0 and h > 0
        if not fine or not (0 <= cx < 1 and 0 <= cy < 1):
            invalid += 1
            continue
        i, j = int(cx * np.float32(S)), int(cy * np.float32(S))
        truth = (int(label), float(cx) * S - i, float(cy) * S - j, float(w), float(h))
        found.setdefault((int(image), j * S + i), truth)

    def add(part, b, place, gain, target):
        error = values[b, place] - target
        parts[part] += factor * gain * error**2
        grad[b, place] = 2 * factor * gain * error

    for b in range(B):
        for cell in range(S * S):
            truth = found.get((b, cell))
            best, target = -1, 0.0
            if truth is not None:
                label, tx, ty, tw, th = truth
                g = (tx / S, ty / S, tw, th)
                ious, distances = [], []
                for j in range(n):
                    x, y, w, h = (values[b, at_box(cell, j, e)] for e in range(4))
                    p = (x / S, y / S, w * w, h * h) if root else (x / S, y / S, w, h)
                    ious.append(plain_iou(p, g))
                    distances.append(math.sqrt(sum((u - v) ** 2 for u, v in zip(p, g, strict=True))))
                best = ious.index(max(ious))
                if max(ious) == 0:
                    fallback += 1
                    best = 0 if paper else distances.index(min(distances))
                target = ious[best] if rescore else 1.0
                for c in range(C):
                    add("cls", b, at_class(cell, c), cls, float(c == label))
                for e, value in enumerate((tx, ty, *((math.sqrt(tw), math.sqrt(th)) if root else (tw, th)))):
                    add("box", b, at_box(cell, best, e), coord, value)
            for j in range(n):
                add("obj", b, at_conf(cell, j), obj if j == best else noobj, target if j == best else 0.0)
    return parts, torch.from_numpy(grad).view(pred.shape), len(found), invalid, fallback


def make_pred(B=2, S=4, n=2, C=3, layout="grid", dtype=torch.float32, seed=0) -> Tensor:
    """Boxes that meet objects and boxes that do not, some predictors of a cell equal."""
    gen = torch.Generator().manual_seed(seed)
    boxes = torch.rand(B, S, S, n, 5, generator=gen, dtype=torch.float64)
    far = torch.rand(B, S, S, n, generator=gen) < 0.4
    boxes[..., :2] += torch.where(far, 6.0, 0.0)[..., None]
    boxes[..., 2:4] *= torch.where(far, 0.3, 1.0)[..., None] * torch.tensor([1.0, -1.0])
    equal = torch.rand(B, S, S, generator=gen) < 0.3
    boxes[..., :4] = torch.where(equal[..., None, None], boxes[..., :1, :4], boxes[..., :4])
    scores = torch.randn(B, S, S, C, generator=gen, dtype=torch.float64)
    if layout == "grid":
        pred = torch.cat((boxes.flatten(3), scores), -1)
    else:
        pred = torch.cat((scores.flatten(1), boxes[..., 4].flatten(1), boxes[..., :4].flatten(1)), 1)
    return pred.to(DEVICE, dtype)


def make_rows(B=2, C=3, M=9, seed=0, invalid=0) -> Tensor:
    """Objects in any order, several in a cell; and rows that are none."""
    gen = torch.Generator().manual_seed(seed)
    rows = torch.rand(M, 6, generator=gen)
    rows[:, 0] = torch.randint(B, (M,), generator=gen)
    rows[:, 1] = torch.randint(C, (M,), generator=gen)
    rows[:, 4:] = 0.05 + 0.6 * rows[:, 4:]
    bad = torch.tensor(
        [
            [0, C, 0.5, 0.5, 0.2, 0.2], [0, -1, 0.5, 0.5, 0.2, 0.2], [B, 0, 0.5, 0.5, 0.2, 0.2],
            [-1, 0, 0.5, 0.5, 0.2, 0.2], [0, 0, nan, 0.5, 0.2, 0.2], [nan, 0, 0.5, 0.5, 0.2, 0.2],
            [0, 0, 0.5, 0.5, inf, 0.2], [0, 0, 0.5, 0.5, 0.0, 0.2], [0, 0, 0.5, 0.5, 0.2, -0.1],
            [0, 0, 1.0, 0.5, 0.2, 0.2], [0, 0, 0.5, -0.1, 0.2, 0.2], [1e20, 1e9, 1e9, 1e9, 1e9, 1e9],
        ]
    )  # fmt: skip
    rows = torch.cat((rows, bad[:invalid]))
    return rows[torch.randperm(len(rows), generator=gen)].to(DEVICE)


def check(pred: Tensor, rows: Tensor, S: int, n: int, C: int, recipe: str, which: str, tolerance: float, **hyp) -> int:
    """A loss against the loop, with a gradient of the total that is not 1; returns how often the fallback was taken."""
    layout = "flat" if pred.ndim == 2 else "grid"
    parts, grad, found, invalid, fallback = by_hand(pred, rows, S, n, C, layout, recipe, **hyp)
    leaf = pred.detach().requires_grad_()
    out = YOLOv1Loss(C, S, n, recipe, backend=which, **hyp)(leaf, rows)
    got = torch.autograd.grad(out.total, leaf, torch.tensor(0.75).to(out.total))[0]
    assert (int(out.num_pos), int(out.num_invalid)) == (found, invalid)
    assert out.total.dtype == (torch.float64 if pred.dtype == torch.float64 else torch.float32)
    assert out.total.item() == pytest.approx(sum(parts.values()), rel=tolerance)
    for name, value in parts.items():
        assert out.parts[name].item() == pytest.approx(value, rel=tolerance, abs=tolerance)
    assert (got.cpu().double() - 0.75 * grad).abs().max() <= tolerance * max(1.0, grad.abs().max().item())
    return fallback


# ---- numbers


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("name", golden.names("darknet", "detection_v1_*"))
def test_every_delta_of_a_detection_layer_of_darknet(name, which):
    case = golden.detection(name)
    layer = case.layer
    names = ("object_scale", "noobject_scale", "class_scale", "coord_scale", "sqrt", "rescore")
    S, n, C = layer["side"], layer["n"], layer["classes"]
    criterion = YOLOv1Loss(C, S, n, "darknet", backend=which, **{name: layer[name] for name in names})
    pred = case.logits.to(DEVICE).requires_grad_()
    out = criterion(pred, case.rows.to(DEVICE))
    grad = torch.autograd.grad(out.total, pred)[0].cpu()
    assert (grad + case.delta).abs().max() <= 1e-4
    boxes, _, _ = reference.cell_views(grad, criterion.head)
    answers = boxes.ne(0).any(-1).flatten(1, 2)
    chosen = torch.where(answers.any(-1), answers.int().argmax(-1), -1)
    assert torch.equal(chosen, torch.from_numpy(case.responsible).long())
    assert int(out.num_pos) == len(case.rows) == int((chosen >= 0).sum())
    for part, term in (("box", "box"), ("obj", "conf"), ("cls", "cls")):
        assert out.parts[part].item() == pytest.approx(case.terms[term], rel=1e-4)


SHAPES = {  # B, S, n, C, rows
    "plain": (2, 4, 2, 3, 9),
    "crowded": (2, 2, 2, 3, 40),
    "one image": (1, 7, 2, 20, 12),
    "one cell": (3, 1, 2, 2, 5),
    "one predictor": (2, 3, 1, 4, 7),
    "three predictors": (2, 3, 3, 1, 30),
    "an empty image": (3, 3, 2, 3, 2),
    "no rows": (2, 3, 2, 3, 0),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_formula(shape, recipe):
    B, S, n, C, M = SHAPES[shape]
    rows = make_rows(B, C, M)
    fallbacks = 0
    for layout in LAYOUTS:
        for dtype, tolerance in DTYPES.items():
            for which in BACKENDS:
                pred = make_pred(B, S, n, C, layout, dtype)
                fallbacks += check(pred, rows, S, n, C, recipe, which, tolerance)
    assert fallbacks > 0 or M < 9


@pytest.mark.parametrize("hyp", [{"sqrt": 0}, {"rescore": 0}, {"sqrt": False, "rescore": False}])
@pytest.mark.parametrize("which", BACKENDS)
def test_flags_of_darknet(hyp, which):
    pred, rows = make_pred(dtype=torch.float64), make_rows(M=20)
    assert check(pred, rows, 4, 2, 3, "darknet", which, 1e-12, **hyp) > 0


@pytest.mark.parametrize("which", BACKENDS)
def test_gains(which):
    pred, rows = make_pred(dtype=torch.float64), make_rows()
    check(pred, rows, 4, 2, 3, "paper", which, 1e-12, lambda_coord=3, lambda_noobj=0.25)
    scales = {"object_scale": 2, "noobject_scale": 0.75, "class_scale": 1.5, "coord_scale": 3.5}
    check(pred, rows, 4, 2, 3, "darknet", which, 1e-12, **scales)


@pytest.mark.parametrize("classes", [20, 300])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_class_counts_beyond_one_tile(classes, layout):
    pred = make_pred(2, 3, 2, classes, layout, torch.float64)
    check(pred, make_rows(2, classes, 8), 3, 2, classes, "darknet", "triton", 1e-12)


@pytest.mark.parametrize("which", BACKENDS)
def test_ties_go_to_the_first(which):
    """All predictors equal, meeting the object or not, near or at an infinite distance."""
    for shift in (0.0, 5.0, 1e30):
        pred = torch.full((1, 1, 1, 17), 0.5, device=DEVICE, dtype=torch.float64)
        pred[..., 0:15:5] += shift
        rows = torch.tensor([[0, 1, 0.5, 0.5, 0.25, 0.25]], device=DEVICE)
        for recipe in RECIPES:
            leaf = pred.clone().requires_grad_()
            YOLOv1Loss(2, 1, 3, recipe, backend=which)(leaf, rows).total.backward()
            boxes = leaf.grad[0, 0, 0, :15].view(3, 5)[:, :4]
            assert boxes[0].abs().sum() > 0 or shift == 0
            assert boxes[1:].abs().sum() == 0


@pytest.mark.parametrize("which", BACKENDS)
def test_the_first_row_of_a_cell_counts(which):
    pred = make_pred(1, 2, 2, 3)
    rows = make_rows(1, 3, 30, seed=2)
    out = YOLOv1Loss(3, 2, backend=which)(pred, rows)
    cell = (rows[:, 2:4] * 2).long()
    first = [int(((cell == torch.tensor([i, j], device=DEVICE)).all(1)).nonzero()[0]) for i in (0, 1) for j in (0, 1)]
    alone = YOLOv1Loss(3, 2, backend=which)(pred, rows[sorted(first)])
    assert torch.equal(out.total, alone.total)
    assert (int(out.num_pos), int(alone.num_pos)) == (4, 4)


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_mean_divides_by_the_batch(recipe, which):
    pred, rows = make_pred(3, dtype=torch.float64).requires_grad_(), make_rows(3)
    outs = [YOLOv1Loss(3, 4, recipe=recipe, backend=which, reduction=r)(pred, rows) for r in ("sum", "mean")]
    grads = [torch.autograd.grad(out.total, pred)[0] for out in outs]
    torch.testing.assert_close(outs[1].total, outs[0].total / 3, rtol=1e-6, atol=0)
    torch.testing.assert_close(grads[1], grads[0] / 3, rtol=1e-6, atol=0)
    assert outs[0].num_pos == outs[1].num_pos


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_good_as_eager(dtype):
    pred, rows = make_pred(dtype=dtype), make_rows()
    grads = {}
    for name, which, leaf in (("want", "torch", pred.double()), ("eager", "torch", pred), ("ours", "triton", pred)):
        leaf = leaf.detach().clone().requires_grad_()
        total = YOLOv1Loss(3, 4, backend=which)(leaf, rows).total
        assert total.dtype == (torch.float64 if name == "want" else torch.float32)
        grads[name] = torch.autograd.grad(total, leaf)[0]
    assert grads["ours"].dtype == dtype
    rounding = torch.finfo(dtype).eps * grads["want"].abs() + torch.finfo(dtype).smallest_normal
    error, theirs = (grads[name].double() - grads["want"] for name in ("ours", "eager"))
    assert (error.abs() <= theirs.abs() + rounding).all()


# ---- rows, layouts, bad values


@pytest.mark.parametrize("which", BACKENDS)
def test_invalid_rows_are_skipped_and_counted(which):
    pred, rows = make_pred(dtype=torch.float64), make_rows(invalid=12)
    check(pred, rows, 4, 2, 3, "darknet", which, 1e-12)
    check(pred, make_rows(M=0, invalid=12), 4, 2, 3, "paper", which, 1e-12)


@pytest.mark.parametrize("which", BACKENDS)
def test_every_form_of_targets(which):
    """One set of objects, sorted by image, in all forms; with rows of no image and with spare capacity."""
    pred, rows = make_pred(), make_rows(M=11)
    rows = rows[rows[:, 0].sort(stable=True).indices]
    half = rows[:, 4:] / 2
    corners = torch.cat((rows[:, 2:4] - half, rows[:, 2:4] + half), 1) * torch.tensor([640, 480] * 2, device=DEVICE)
    dicts = [{"boxes": corners[rows[:, 0] == b], "labels": rows[rows[:, 0] == b, 1].long()} for b in (0, 1)]
    padded = torch.zeros(2, 12, 5, device=DEVICE)
    for b in (0, 1):
        own = rows[rows[:, 0] == b, 1:]
        padded[b, : len(own)] = own
    forms = [rows, padded, dicts, Targets.from_packed(rows, 2), Targets.from_packed(rows, 2, capacity=32)]
    criterion = YOLOv1Loss(3, 4, backend=which, image_size=(480, 640))
    want = criterion(pred, rows)
    for form in forms:
        out = criterion(pred, form)
        torch.testing.assert_close(out.total, want.total, rtol=1e-5, atol=0)
        assert (out.num_pos, out.num_invalid) == (want.num_pos, 0)
    strange = Targets.from_packed(torch.cat((make_rows(invalid=6), rows)), 2, capacity=64)
    assert criterion(pred, strange).num_invalid == 6


@pytest.mark.parametrize("which", BACKENDS)
def test_rows_of_capacity_are_no_rows(which):
    """Nor are those that an earlier batch left there; invalid rows before them still count, as int32."""
    pred, rows = make_pred(), make_rows(invalid=6)
    targets, fresh = Targets.from_packed(torch.cat((rows, rows)), 2, capacity=64), Targets.from_packed(rows, 2)
    targets.rows[: len(rows)] = fresh.rows
    targets.offsets.copy_(fresh.offsets)
    criterion = YOLOv1Loss(3, 4, backend=which)
    got, want = criterion(pred, targets), criterion(pred, rows)
    assert got.num_pos.dtype == got.num_invalid.dtype == torch.int32
    assert (got.num_pos, got.num_invalid) == (want.num_pos, 6)
    torch.testing.assert_close(got.total, want.total, rtol=1e-6, atol=0)


def views_of(pred: Tensor) -> dict[str, Tensor]:
    wide = torch.stack((pred, pred + 9), -1)[..., 0]
    views = {"as it is": pred, "entries apart": wide, "images last": pred.movedim(0, -1).contiguous().movedim(-1, 0)}
    if pred.ndim == 4:
        views["channels first"] = pred.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        views["transposed"] = pred.transpose(1, 2).contiguous().transpose(1, 2)
        views["part of a map"] = torch.nn.functional.pad(pred, (2, 3, 1, 1))[:, :, 1:-1, 2:-3]
    else:
        views["part of a row"] = torch.nn.functional.pad(pred, (3, 5))[:, 3:-5]
    return views


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_give_the_same_bits(layout):
    pred, rows = make_pred(layout=layout), make_rows()
    criterion = YOLOv1Loss(3, 4, recipe="darknet", backend="triton")
    found = {}
    for name, view in views_of(pred).items():
        assert torch.equal(view, pred)
        leaf = view.detach().requires_grad_()
        out = criterion(leaf, rows)
        found[name] = (out.total, *out.parts.values(), torch.autograd.grad(out.total, leaf)[0])
    for values in found.values():
        for a, b in zip(values, found["as it is"], strict=True):
            assert torch.equal(a, b)


def test_both_layouts_are_one_loss():
    rows = make_rows()
    for which in BACKENDS:
        outs = []
        for layout in LAYOUTS:
            pred = make_pred(layout=layout).requires_grad_()
            criterion = YOLOv1Loss(3, 4, backend=which)
            out = criterion(pred, rows)
            grad = torch.autograd.grad(out.total, pred)[0]
            outs.append((out.total, *reference.cell_views(grad, criterion.head)))
        for a, b in zip(*outs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize(
    ("channel", "part"),
    [(3, "box"), (4, "obj"), (10, "cls")],  # an entry of the first box, its confidence, the first class score
)
@pytest.mark.parametrize("has", [True, False])
def test_a_nan_stays_in_its_cell(channel, part, has, which):
    pred, rows = make_pred(), make_rows()
    cell = (rows[0, 3] * 4).long(), (rows[0, 2] * 4).long()
    b = int(rows[0, 0])
    if not has:
        taken = {(int(r[0]), int(r[3] * 4), int(r[2] * 4)) for r in rows}
        b, *cell = next(at for at in np.ndindex(2, 4, 4) if at not in taken)
    grads = []
    for value in (None, nan):
        dirty = pred.clone()
        if value is not None:
            dirty[b, cell[0], cell[1], channel] = value
        dirty.requires_grad_()
        out = YOLOv1Loss(3, 4, recipe="darknet", backend=which)(dirty, rows)
        grads.append(torch.autograd.grad(out.total, dirty)[0])
    read = has or channel == 4
    assert out.total.isnan() == read
    assert [name for name, value in out.parts.items() if value.isnan()] == ([part] if read else [])
    same = grads[0] == grads[1]
    same[b, cell[0], cell[1]] = True
    assert same.all()


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_extreme_values_stay_finite(recipe, which):
    """Predictions of 1e15 and 1e-15, objects of 1e30 and 1e-30."""
    scale = 10.0 ** torch.tensor([15.0, -15.0, 8.0, 0.0], device=DEVICE)
    pred = make_pred(4) * scale[:, None, None, None]
    rows = make_rows(4, M=24)
    rows[::3, 4:] *= 1e30
    rows[1::3, 4:] *= 1e-30
    leaf = pred.requires_grad_()
    out = YOLOv1Loss(3, 4, recipe=recipe, backend=which)(leaf, rows)
    assert all(value.isfinite() for value in (out.total, *out.parts.values()))
    assert torch.autograd.grad(out.total, leaf)[0].isfinite().all()
    truth = pred.detach().double().requires_grad_()
    want = YOLOv1Loss(3, 4, recipe=recipe, backend="torch")(truth, rows)
    torch.testing.assert_close(out.total.double(), want.total, rtol=1e-5, atol=0)


def test_predictions_beyond_2_to_the_31_elements_are_addressed():
    """Strides that only fit 64 bits: the second image lies 2^31 elements behind the first."""
    small = make_pred()
    try:
        far = torch.empty(2**31 + small[0].numel(), device=DEVICE)
    except RuntimeError:
        pytest.skip("cannot reserve 9 GB of address space")
    far = far.as_strided(small.shape, (2**31, *small.stride()[1:]))
    far.copy_(small)
    criterion = YOLOv1Loss(3, 4, backend="triton")
    assert torch.equal(criterion(far, make_rows()).total, criterion(small, make_rows()).total)


# ---- autograd


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_backward_twice_with_other_gradients(layout, dtype):
    """The gradient that was handed out first is the caller's: what follows must not touch it."""
    pred, rows = make_pred(layout=layout, dtype=dtype).requires_grad_(), make_rows()
    criterion = YOLOv1Loss(3, 4, backend="triton")
    truth = torch.autograd.grad(YOLOv1Loss(3, 4, backend="torch")(pred, rows).total, pred)[0]
    for first in (1.0, 0.375):  # the stored gradient as it is, and overwritten
        total = criterion(pred, rows).total
        scales = [torch.tensor(value).to(total) for value in (first, 3.0, 1.0)]
        grads, kept = [], []
        for i, scale in enumerate(scales):
            grads.append(torch.autograd.grad(total, pred, scale, retain_graph=i < 2)[0])
            kept.append(grads[-1].clone())
        assert len({grad.data_ptr() for grad in grads}) == 3
        for scale, grad, copy_ in zip(scales, grads, kept, strict=True):
            assert torch.equal(grad, copy_)
            torch.testing.assert_close(
                grad, scale.to(dtype) * truth, rtol=2e-3 if dtype == torch.float16 else 1e-12, atol=0
            )
        if first == 1.0:
            assert torch.equal(grads[0], grads[2])  # in one launch with the loss, and in one of its own


@pytest.mark.parametrize("which", BACKENDS)
def test_without_grad(which):
    pred, rows = make_pred(), make_rows()
    criterion = YOLOv1Loss(3, 4, backend=which)
    total = criterion(pred.clone().requires_grad_(), rows).total
    with torch.no_grad():
        out = criterion(pred.clone().requires_grad_(), rows)
    assert not out.total.requires_grad
    assert not criterion(pred, rows).total.requires_grad
    assert torch.equal(out.total, total)
    assert not any(value.requires_grad for value in (*out.parts.values(), out.num_pos, out.num_invalid))


def test_no_gradient_is_kept_where_none_is_wanted():
    head = YOLOv1Loss(3, 4).head
    assert ops.cell_loss(make_pred(), make_rows(), None, head.key, False)[4].numel() == 0


def test_gradcheck():
    """With the confidence target 1: as an IoU it is a constant of the loss, but not of its numerical derivative."""
    pred = make_pred(1, 2, 2, 2, dtype=torch.float64).requires_grad_()
    rows = make_rows(1, 2, 3)
    for which in BACKENDS:
        criterion = YOLOv1Loss(2, 2, recipe="darknet", backend=which, rescore=0)
        assert torch.autograd.gradcheck(lambda p, c=criterion: c(p, rows).total, pred, atol=1e-6)


def test_double_backward_says_what_to_do():
    pred = make_pred().requires_grad_()
    total = YOLOv1Loss(3, 4, backend="triton")(pred, make_rows()).total
    grad = torch.autograd.grad(total, pred, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match=r"double backward is not supported; use backend='torch'"):
        grad.sum().backward()


def test_changing_predictions_before_backward_is_caught():
    pred = make_pred().requires_grad_()
    inner = pred * 1
    total = YOLOv1Loss(3, 4, backend="triton")(inner, make_rows()).total
    inner.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_every_output_is_written(monkeypatch):
    """No result depends on what memory held: buffers come filled with NaN."""
    empty_like, new_empty = torch.empty_like, Tensor.new_empty

    def poison(tensor: Tensor) -> Tensor:
        return tensor.fill_(nan if tensor.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty_like", lambda *args, **kw: poison(empty_like(*args, **kw)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kw: poison(new_empty(*args, **kw)))
    check(make_pred(dtype=torch.float64), make_rows(invalid=5), 4, 2, 3, "darknet", "triton", 1e-12)


def test_runs_are_bit_identical_for_every_tile(monkeypatch):
    """Gradients do not depend on the tile; sums do, in the last digit, but not on the run."""
    pred, rows = make_pred(8, 7).requires_grad_(), make_rows(8, M=60)
    criterion = YOLOv1Loss(3, 7, backend="triton")
    totals, grads = [], []
    for tile in (launch.CELL_TILE, launch.CELL_TILE, 2048):
        monkeypatch.setattr(launch, "CELL_TILE", tile)
        ops.forget_plans()
        total = criterion(pred, rows).total
        totals.append(total.detach())
        grads.append(torch.autograd.grad(total, pred)[0])
    ops.forget_plans()
    assert torch.equal(totals[0], totals[1])
    torch.testing.assert_close(totals[2], totals[0], rtol=1e-6, atol=0)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


# ---- PyTorch's rules for operators


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    pred, rows = make_pred(layout=layout).requires_grad_(), make_rows()
    key = YOLOv1Loss(3, 4).head.key
    targets = Targets.from_packed(rows, 2)
    torch.library.opcheck(ops.cell_loss, (pred, rows, None, key, False))
    torch.library.opcheck(ops.cell_loss, (pred, targets.rows, targets.offsets, key, True))
    one = torch.ones((), device=DEVICE)
    plain = pred.detach()
    taken = ops.cell_loss(plain, rows, None, key, False)[3]
    torch.library.opcheck(ops.cell_loss_grad, (one, plain, rows, taken, key))
    torch.library.opcheck(ops.cell_loss_rescale, (torch.zeros_like(plain), 2 * one, plain, rows, taken, key))


@pytest.mark.parametrize("which", BACKENDS)
def test_compiled_is_eager_and_object_counts_do_not_recompile(which):
    criterion = YOLOv1Loss(3, 4, backend=which, reduction="mean")

    def step(pred, targets):
        out = criterion(pred, targets)
        return out.total, out.parts["box"], out.num_pos

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for M in (3, 5, 0, 9):
        targets = Targets.from_packed(make_rows(M=M), 2, capacity=32)
        mine, theirs = make_pred().requires_grad_(), make_pred().requires_grad_()
        got, want = compiled(mine, targets), step(theirs, targets)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
        (got[0] * 3).backward()
        (want[0] * 3).backward()
        assert torch.equal(mine.grad, theirs.grad)
    assert counter.frame_count == 1


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_cuda_graph():
    criterion = YOLOv1Loss(3, 4, backend="triton")
    pred = make_pred().requires_grad_()
    targets = Targets.from_packed(make_rows(), 2, capacity=32)
    scale = torch.tensor(3.0, device=DEVICE)
    want = criterion(pred, targets).total
    wanted = torch.autograd.grad(want, pred, scale)[0]
    want = want.detach()  # no node of another stream may be left that the captured backward would wait for
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = criterion(pred, targets).total
        grad = torch.autograd.grad(total, pred, scale)[0]
    for _ in range(3):
        graph.replay()
        assert torch.equal(total, want)
        assert torch.equal(grad, wanted)


# ---- the module


def test_defaults():
    paper, darknet = YOLOv1Loss(20), YOLOv1Loss(20, recipe="darknet")
    assert paper.head == CellHead(20, 7, 2, box_gain=5.0, noobj_gain=0.5)
    gains = {"box_gain": 2.5, "obj_gain": 0.5, "noobj_gain": 0.25, "cls_gain": 0.5}
    assert darknet.head == CellHead(20, 7, 2, nearest=True, **gains)
    assert YOLOv1Loss(20, recipe="darknet", sqrt=0, rescore=0).head == CellHead(
        20, 7, 2, root=False, nearest=True, rescore=False, **gains
    )
    assert list(CELL_RECIPES) == RECIPES
    assert cell_head_from_key(darknet.head.key) == darknet.head
    assert fusedyolo.YOLOv1Loss is YOLOv1Loss


def test_module_is_copied_pickled_and_described():
    criterion = YOLOv1Loss(3, 4, recipe="darknet", coord_scale=2, reduction="mean")
    pred, rows = make_pred(), make_rows()
    for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(other(pred, rows).total, criterion(pred, rows).total)
    assert "num_classes=3, grid_size=4, num_boxes=2" in repr(criterion)
    assert "coord_scale=2" in repr(criterion)
    assert "noobject_scale" not in repr(criterion)
    assert not list(criterion.state_dict())


@pytest.mark.parametrize(
    ("argument", "arguments"),
    [
        ("num_classes", {"num_classes": 0}),
        ("grid_size", {"grid_size": 0}),
        ("grid_size", {"grid_size": 7.0}),
        ("num_boxes", {"num_boxes": -1}),
        ("recipe", {"recipe": "yolov1"}),
        ("image_size", {"image_size": (0, 3)}),
        ("backend", {"backend": "cuda"}),
        ("reduction", {"reduction": "max"}),
        ("lambda_coord", {"lambda_coord": -1}),
        ("lambda_noobj", {"lambda_noobj": nan}),
        ("coord_scale", {"coord_scale": 1}),
        ("lambda_coord", {"recipe": "darknet", "lambda_coord": 1}),
        ("sqrt", {"recipe": "darknet", "sqrt": 2}),
        ("rescore", {"recipe": "darknet", "rescore": 0.5}),
    ],
)
def test_errors_of_the_constructor(argument, arguments):
    with pytest.raises(ValueError, match=rf"^{argument}: .*, want "):
        YOLOv1Loss(**({"num_classes": 3} | arguments))


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize(
    ("argument", "pred", "targets"),
    [
        ("pred", [torch.zeros(2, 4, 4, 13)], None),
        ("pred", torch.zeros(2, 4, 4, 12), None),
        ("pred", torch.zeros(2, 4, 3, 13), None),
        ("pred", torch.zeros(2, 13, 4, 4), None),
        ("pred", torch.zeros(2, 207), None),
        ("pred", torch.zeros(0, 208), None),
        ("pred", torch.zeros(2, 208, dtype=torch.int32), None),
        ("targets", torch.zeros(2, 208), torch.zeros(3, 5)),
        ("targets", torch.zeros(2, 208), torch.zeros(3, 2, 5)),
        ("targets", torch.zeros(2, 208), torch.zeros(3, 6, dtype=torch.int64)),
        ("targets", torch.zeros(2, 208), "boxes"),
        ("image_size", torch.zeros(2, 208), [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0)}] * 2),
    ],
)
def test_errors_of_a_call(argument, pred, targets, which):
    with pytest.raises(ValueError, match=rf"^{argument}: .*, want "):
        YOLOv1Loss(3, 4, backend=which)(pred, torch.zeros(0, 6) if targets is None else targets)


# ---- what a step costs


@pytest.mark.interpreter("sectors are counted in the interpreter")
@pytest.mark.parametrize(
    ("layout", "packed", "bound"),
    [("flat", False, 1.37), ("flat", True, 1.44), ("grid", False, 1.62)],
)
def test_a_step_is_two_launches_and_little_more_than_the_gradient(layout, packed, bound):
    """Batch 16, 7 x 7 cells, 20 classes, COCO-like objects; forward and backward.

    Where confidences lie beside their boxes and classes, reading them alone moves .4 of the predictions.
    """
    rows = objects.coco_like(16, torch.Generator().manual_seed(18), num_classes=20)
    assert len(rows) == 118
    targets = rows if packed else Targets.from_packed(rows, 16)
    pred = make_pred(16, 7, 2, 20, layout).requires_grad_()
    criterion, one = YOLOv1Loss(20, backend="triton"), torch.ones(())
    criterion(pred, targets).total.backward(gradient=one)
    pred.grad = None
    counts = count(lambda: criterion(pred, targets).total.backward(gradient=one))
    assert (counts.triton_launches, counts.other_launches, counts.syncs) == (2, 0, 0), (counts.ops, counts.sync_ops)
    moved = counts.bytes / (pred.numel() * 4)
    assert 1.3 < moved <= bound
    other = count(lambda: criterion(pred, targets).total.backward(gradient=2 * one))
    assert other.bytes > 2 * counts.bytes_stored  # a gradient that has to be made anew is made anew


@PINNED_TRITON
@pytest.mark.parametrize(
    ("dtype", "target"),
    [
        ("float32", "gfx942"),
        ("bfloat16", "sm_80"),
    ],
)
def test_compiled_without_spills(dtype, target):
    """In a process without the interpreter."""
    found = call("compiles", "cells", dtype, target)
    assert len(found) == 4
    for mode, resources in found.items():
        assert resources["stack"] == 0, (mode, resources)
        assert resources["spills"] == resources["scalar_spills"] == 0, (mode, resources)


@PINNED_TRITON
def test_registers_for_all_threads():
    """On GPUs where launches may take more, too: a multiprocessor has 65,536."""
    for mode, resources in call("compiles", "cells", "float32", "sm_100").items():
        assert resources["registers"] * resources["threads"] <= 65536, (mode, resources)


# ---- the tests tested: each broken piece must fail what the whole one passes


@triton.jit
def last_of_equals(tile, k, truth, SPEC: tl.constexpr):
    CELLS: tl.constexpr = SPEC.CELLS
    chosen = tl.zeros([CELLS], tl.int32)
    best = tl.zeros([CELLS], SPEC.ACC)
    for j in tl.static_range(SPEC.N):
        iou, _distance = kernels._overlap(kernels._box(tile, k, tl.full([1], j, tl.int32)), truth, SPEC)
        chosen = tl.where(iou >= best, j, chosen)
        best = tl.maximum(best, iou)
    return chosen, best


@triton.jit
def sizes_unsquared(a, ROOT: tl.constexpr):
    return tl.abs(a)


def whole_check() -> None:
    for layout in LAYOUTS:
        for recipe in RECIPES:
            pred, rows = make_pred(layout=layout, dtype=torch.float64), make_rows(M=40)
            check(pred, rows, 4, 2, 3, recipe, "triton", 1e-12)


def change_head(**changes):
    def changed(key):
        return CellHead(**{**json.loads(key), **changes})

    return changed


@pytest.mark.interpreter("compiled kernels keep the functions they were compiled with")
@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        (kernels, "_responsible", last_of_equals),
        (kernels, "_size", sizes_unsquared),
        (ops.cells, "cell_head_from_key", change_head(nearest=False)),
        (ops.cells, "cell_head_from_key", change_head(nearest=True)),
        (ops.cells, "cell_head_from_key", change_head(rescore=False)),
        (ops.cells, "cell_head_from_key", change_head(noobj_gain=0.45)),
        (ops.cells, "cell_head_from_key", change_head(box_gain=5.0)),  # of darknet, the missing half
    ],
)
def test_mutants_are_rejected(owner, name, broken, monkeypatch):
    whole_check()
    monkeypatch.setattr(owner, name, broken)
    ops.forget_plans()
    try:
        with pytest.raises(AssertionError):
            whole_check()
    finally:
        ops.forget_plans()


@pytest.mark.parametrize("recipe", RECIPES)
def test_mutants_of_recipes_are_rejected(recipe, monkeypatch):
    """The factor a half, and lambda, of the constructor itself."""
    row = CELL_RECIPES[recipe]
    coord = row.gains["box_gain"]
    for changes in ({"factor": 1.5 - row.factor}, {"hyp": {**row.hyp, coord: 4.0}}, {"nearest": not row.nearest}):
        monkeypatch.setitem(CELL_RECIPES, recipe, type(row)(**{**vars(row), **changes}))
        with pytest.raises(AssertionError):
            whole_check()
