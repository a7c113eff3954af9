"""Loss and gradient of picked cells, given who picks what: the launch alone, against the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import loop_picks as loops
import pytest
import torch
from conftest import DEVICE
from torch import Tensor

from fusedyolo import YOLOv8Loss, YOLOXLoss, reference
from fusedyolo.drivers.picks import planes
from fusedyolo.heads import PickHead
from fusedyolo.ops import picks as ops
from fusedyolo.ops.launch import accumulator, run_all, shared_zeros

C, B, STRIDES = 5, 2, (8, 16, 32)
MAPS = ((8, 12), (4, 6), (2, 3))
FORMS = ("maps", "apart", "planes")


class Call(NamedTuple):
    """Predictions of a head in a form, and what goes with them."""

    head: PickHead
    form: str
    preds: list[Tensor]
    rows: Tensor
    gains: tuple[float, ...]
    class_weights: Tensor | None = None
    maps: Any = MAPS

    @property
    def size(self) -> tuple[float, float]:
        return self.maps[0][0] * self.head.strides[0], self.maps[0][1] * self.head.strides[0]

    def seen(self, dtype: torch.dtype) -> list[Tensor]:
        """The predictions in another type, each a leaf."""
        return [pred.detach().to(dtype).requires_grad_() for pred in self.preds]


class Result(NamedTuple):
    """What a loss gives."""

    total: Tensor
    parts: list[Tensor]
    grads: list[Tensor]


def head_of(kind: str) -> tuple[PickHead, tuple[float, ...]]:
    """A head and its gains: "v8" or "v8/" and a reg_max, "x" or "x/l1"."""
    name, _, option = kind.partition("/")
    if name == "v8":
        loss: Any = YOLOv8Loss(C, STRIDES, int(option or 16), backend="torch")
        return loss.head, tuple(B * gain for gain in loss.gains())
    loss = YOLOXLoss(C, STRIDES, use_l1=option == "l1", backend="torch")
    return loss.head, loss.gains()


def call_of(kind: str, form: str = "maps", order: str = "nchw", objects: int = 6, dtype=torch.float32, **more) -> Call:
    """Predictions that objects like, in a form; maps may be channels-last, or the inside of larger tensors."""
    head, gains = head_of(kind)
    maps, seed = more.pop("maps", MAPS), more.pop("seed", 0)
    rows = loops.some_rows(seed, B, max(objects, 1), C, 0.05, 0.7)
    if head.objectness:
        flat = [pred.flatten(2) for pred in loops.yolox_predictions(rows, maps, STRIDES, B, C, seed)]
        parts = list(torch.cat(flat, 2).split(head.widths, 1))
    else:
        parts = list(loops.v8_predictions(rows, maps, STRIDES, B, C, head.reg_max, seed))
    areas = [h * w for h, w in maps]
    if form == "planes":
        preds = parts
    else:
        levels = zip(*(part.split(areas, 2) for part in parts), strict=True)
        apart = [[p.unflatten(2, sides) for p in level] for level, sides in zip(levels, maps, strict=True)]
        preds = [p for level in apart for p in level] if form == "apart" else [torch.cat(level, 1) for level in apart]
    preds = [arranged(pred.to(DEVICE, dtype), order) for pred in preds]
    rows = rows[: 0 if objects == 0 else len(rows)].to(DEVICE)
    return Call(head, form, preds, rows, gains, more.pop("class_weights", None), maps)


def arranged(pred: Tensor, order: str) -> Tensor:
    """The same values, otherwise in memory."""
    if order == "channels_last":
        return pred.contiguous(memory_format=torch.channels_last) if pred.ndim == 4 else pred.mT.contiguous().mT
    if order == "inside":
        room = pred.new_full((*pred.shape[:-1], pred.shape[-1] + 3), 7.0)
        room[..., 1:-2] = pred
        return room[..., 1:-2]
    return pred.contiguous()


def reference_of(call: Call, dtype: torch.dtype = torch.float64, weights: Sequence[float] | None = None) -> Result:
    """Loss and gradient of the reference, of the total or of the parts times ``weights``."""
    seen = call.seen(dtype)
    args = call.rows, call.head, call.gains, call.maps, call.size, call.class_weights
    parts, _ = reference.pick_loss(planes(call.form, seen, call.head), *args)
    total = torch.stack(parts).sum()
    asked = total if weights is None else sum(w * part for w, part in zip(weights, parts, strict=True))
    grads = torch.autograd.grad(asked, seen)
    return Result(total.detach(), [part.detach() for part in parts], list(grads))


def assignment_of(call: Call) -> ops.Assignment:
    """What the reference assigns, as launches leave it."""
    head, dtype = call.head, torch.float64
    acc = accumulator(call.preds[0].dtype)[1]
    points = reference.points_of(call.maps, head.strides, call.rows.device)
    objects = reference.read_objects(call.rows, head, B, call.size, dtype)
    seen = reference.see(planes(call.form, call.seen(dtype), head), points, head)
    found = reference.pick(seen, objects, head)
    has = found.row >= 0
    weight = torch.where(has, found.score if head.soft else 1.0, 0.0)
    return ops.Assignment(
        seen.boxes.to(acc).contiguous(),
        torch.where(has, found.row, len(call.rows)).to(torch.int32),
        torch.where(has, found.score, math.nan).to(acc),
        weight.sum().clamp(min=1).to(acc),
        found.nans.to(acc),
    )


def run(call: Call, with_grad: bool = True, assignment: ops.Assignment | None = None) -> Result:
    """The launch with loss."""
    acc = accumulator(call.preds[0].dtype)[1]
    total, *parts = (call.preds[0].new_full((), math.nan, dtype=acc) for _ in range(1 + len(call.head.parts)))
    grads = [torch.empty_like(pred) for pred in call.preds] if with_grad else []
    assignment = assignment or assignment_of(call)
    launch = ops.head_launch(
        call.preds, call.rows, call.class_weights, call.head, ops.Geometry(call.form, call.maps, call.size),
        call.gains, assignment, (total, parts), grads or None,
    )  # fmt: skip
    run_all([launch], call.rows.device)
    return Result(total, list(parts), grads)


def gradient_only(call: Call, grad_outs: Sequence[float | None], grads: list[Tensor] | None = None) -> list[Tensor]:
    """The launch without loss; on ``grads`` that are there for ones."""
    outs = [None if g is None else torch.tensor(g, device=DEVICE) for g in grad_outs]
    skip, grads = grads is not None, [torch.empty_like(pred) for pred in call.preds] if grads is None else grads
    launch = ops.head_launch(
        call.preds, call.rows, call.class_weights, call.head, ops.Geometry(call.form, call.maps, call.size),
        call.gains, assignment_of(call), None, grads, outs, skip,
    )  # fmt: skip
    run_all([launch], call.rows.device)
    return grads


def same_gradients(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """To the digits of the type, beside the largest number of a tensor; and zeros are zeros."""
    for found, true in zip(got, want, strict=True):
        exact = true.double()
        assert found.isfinite().all()
        assert not found[true == 0].any()
        bound = (1e-12 if found.dtype == torch.float64 else 2e-6) * exact.abs().max()
        if found.dtype in (torch.float16, torch.bfloat16):
            bound = bound + torch.finfo(found.dtype).eps * exact.abs() + torch.finfo(found.dtype).smallest_normal
        assert ((found.double() - exact).abs() <= bound).all()


def check(call: Call, want: Result | None = None) -> Result:
    """The launch on predictions against the reference in float64 on the same values."""
    want = want or reference_of(call)
    got, dtype = run(call), call.preds[0].dtype
    exact = 1e-12 if dtype == torch.float64 else 1e-6
    for found, true in zip((got.total, *got.parts), (want.total, *want.parts), strict=True):
        assert float(found) == pytest.approx(float(true), rel=exact, abs=1e-30)
    same_gradients(got.grads, want.grads)
    assert not any(bool(zeros.any()) for zeros in shared_zeros())
    return got


KINDS = ("v8", "v8/4", "v8/1", "x", "x/l1")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient(kind, form):
    check(call_of(kind, form))


@pytest.mark.parametrize("order", ["channels_last", "inside"])
@pytest.mark.parametrize(("kind", "form"), [("v8/4", "maps"), ("v8/4", "planes"), ("x/l1", "maps"), ("x/l1", "apart")])
def test_layouts(kind, form, order):
    check(call_of(kind, form, order))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["v8/4", "v8/1", "x/l1"])
def test_types(kind, dtype):
    check(call_of(kind, dtype=dtype))
