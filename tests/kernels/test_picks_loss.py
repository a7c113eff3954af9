"""Loss and gradient of picked cells, given who picks what: the launch alone, against the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import loop_picks as loops
import pytest
import torch
from conftest import DEVICE
from fusedyolo.kernels import launch
from torch import Tensor

from fusedyolo import YOLOv8Loss, YOLOXLoss, reference
from fusedyolo.drivers.picks import planes, views
from fusedyolo.heads import PickHead
from fusedyolo.ops import picks as ops
from fusedyolo.ops.launch import accumulator, run_all, shared_zeros

C, B, STRIDES = 5, 2, (8, 16)
MAPS = ((8, 12), (4, 6))


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
    """A head and its gains: "v8" or "v8/" and a reg_max, "x" or "x/l1"; of "v8" also "v8/" and a class term."""
    name, _, option = kind.partition("/")
    if option in ("varifocal", "qfl"):
        loss = YOLOv8Loss(C, STRIDES, 4, topk=13, alpha=1.0, assign_iou="iou", cls_loss=option, backend="torch")
        return loss.head, tuple(B * gain for gain in loss.gains())
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
    parts, _, _ = reference.pick_loss(planes(call.form, seen, call.head), *args)
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
        torch.where(has, found.row, len(call.rows)).to(torch.int32),
        torch.where(has, found.score, math.nan).to(acc),
        weight.sum().clamp(min=1).to(acc),
        torch.stack((torch.where(seen.boxes.isnan(), seen.boxes, 0.0).sum(), found.nans)).to(acc),
    )


def weights_of(call: Call) -> list[Tensor]:
    """As launches take them."""
    return [] if call.class_weights is None else [call.class_weights]


def run(call: Call, with_grad: bool = True, assignment: ops.Assignment | None = None) -> Result:
    """The launch with loss."""
    acc = accumulator(call.preds[0].dtype)[1]
    total, *parts = (call.preds[0].new_full((), math.nan, dtype=acc) for _ in range(1 + len(call.head.parts)))
    grads = [torch.empty_like(pred) for pred in call.preds] if with_grad else []
    assignment = assignment or assignment_of(call)
    last = ops.head_launch(
        call.preds, call.rows, weights_of(call), [call.head], ops.Geometry(call.form, call.maps, call.size),
        call.gains, assignment, (total, parts), grads or None,
    )  # fmt: skip
    run_all([last], call.rows.device)
    return Result(total, list(parts), grads)


def gradient_only(call: Call, grad_outs: Sequence[float | None], grads: list[Tensor] | None = None) -> list[Tensor]:
    """The launch without loss; on ``grads`` that are there for ones."""
    outs = [None if g is None else torch.tensor(g, device=DEVICE) for g in grad_outs]
    skip, grads = grads is not None, [torch.empty_like(pred) for pred in call.preds] if grads is None else grads
    last = ops.head_launch(
        call.preds, call.rows, weights_of(call), [call.head], ops.Geometry(call.form, call.maps, call.size),
        call.gains, assignment_of(call), None, grads, outs, skip,
    )  # fmt: skip
    run_all([last], call.rows.device)
    return grads


def same_gradients(call: Call, got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """To the digits of the type, beside the largest number of a tensor; and 0 where a cell has no row."""
    for found, true in zip(got, want, strict=True):
        exact = true.double()
        assert found.isfinite().all()
        bound = (1e-12 if found.dtype == torch.float64 else 2e-6) * exact.abs().max()
        if found.dtype in (torch.float16, torch.bfloat16):
            bound = bound + torch.finfo(found.dtype).eps * exact.abs() + torch.finfo(found.dtype).smallest_normal
        assert ((found.double() - exact).abs() <= bound).all()
    for levels in zip(*(views(call.form, grads, call.head, call.maps) for grads in (got, want)), strict=True):
        for found, true in zip(*levels, strict=True):
            none = (true == 0).all(1)
            assert not found.movedim(1, -1)[none].any()


def check(call: Call, want: Result | None = None) -> Result:
    """The launch on predictions against the reference in float64 on the same values."""
    want = want or reference_of(call)
    got, dtype = run(call), call.preds[0].dtype
    exact = 1e-12 if dtype == torch.float64 else 1e-6
    for found, true in zip((got.total, *got.parts), (want.total, *want.parts), strict=True):
        assert float(found) == pytest.approx(float(true), rel=exact, abs=1e-30)
    same_gradients(call, got.grads, want.grads)
    assert not any(bool(zeros.any()) for zeros in shared_zeros())
    return got


KINDS = ("v8", "v8/4", "v8/1", "v8/varifocal", "v8/qfl", "x", "x/l1")


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient(kind):
    check(call_of(kind))


@pytest.mark.parametrize(
    ("kind", "form", "order"),
    [
        ("v8/4", "apart", "nchw"),
        ("x/l1", "planes", "nchw"),
        ("v8/4", "maps", "channels_last"),
        ("x/l1", "apart", "channels_last"),
        ("v8/4", "planes", "inside"),
        ("x/l1", "maps", "inside"),
    ],
)
def test_layouts(kind, form, order):
    check(call_of(kind, form, order))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("v8/4", torch.float64),
        ("x/l1", torch.float64),
        ("v8/4", torch.bfloat16),
        ("v8/1", torch.float16),
        ("x/l1", torch.float16),
    ],
)
def test_types(kind, dtype):
    check(call_of(kind, dtype=dtype))


def test_a_tile_with_rows_everywhere():
    """More cells with a row than are looked at at a time, and none of some levels."""
    call = call_of("v8/4", objects=40)
    assert int((assignment_of(call).row < len(call.rows)).sum()) > 96
    check(call)
    check(call_of("x", objects=40))


@pytest.mark.parametrize(
    ("kind", "classes", "order"), [("v8/1", 81, "nchw"), ("v8/1", 37, "channels_last"), ("x", 70, "nchw")]
)
def test_classes_of_several_programs(kind, classes, order, monkeypatch):
    """Of each some, and a rest."""
    monkeypatch.setitem(globals(), "C", classes)
    monkeypatch.setattr(launch, "PICK_NUMBERS", 2048)
    check(call_of(kind, order=order, maps=((8, 8), (4, 4))))


@pytest.mark.parametrize("order", ["nchw", "channels_last"])
@pytest.mark.parametrize("kind", ["v8/16", "x"])
def test_wide_accesses(kind, order, monkeypatch):
    """Maps and widths that are multiples of 16 numbers."""
    monkeypatch.setitem(globals(), "C", 16 if kind == "v8/16" else 11)
    check(call_of(kind, order=order, maps=((8, 16), (4, 8))))


@pytest.mark.parametrize("kind", ["v8/4", "x/l1"])
def test_class_weights_and_gains(kind):
    weights = torch.linspace(0.2, 3, C, device=DEVICE)
    call = call_of(kind, class_weights=weights)
    check(call._replace(gains=tuple(0.1 + 1.7 * i for i in range(len(call.gains)))))
    got = check(call._replace(gains=(0.0,) * len(call.gains)))
    assert not any(bool(grad.any()) for grad in got.grads)


@pytest.mark.parametrize("kind", ["v8/4", "v8/1", "x/l1"])
def test_no_rows(kind):
    call = call_of(kind, objects=0)
    got = check(call)
    assert not float(got.parts[0])
    assert not float(got.parts[-1])
    assert not got.grads[0][:, : 4 * call.head.reg_max].any()


def test_a_loss_without_a_gradient():
    call = call_of("v8/4")
    assert torch.equal(run(call, with_grad=False).total, run(call).total)


@pytest.mark.parametrize("kind", ["v8/4", "x/l1"])
def test_gradients_of_parts(kind):
    """Of the total times a number, and of the parts apart; those that are there for ones made these."""
    call = call_of(kind)
    parts = len(call.head.parts)
    weights = [0.5, -2.0, 1.25, 3.0][:parts]
    want = reference_of(call, weights=weights).grads
    same_gradients(call, gradient_only(call, [None, *weights]), want)
    same_gradients(call, gradient_only(call, [0.5, *(w - 0.5 for w in weights)], run(call).grads), want)
    same_gradients(call, gradient_only(call, [-3.0, *[None] * parts]), reference_of(call, weights=[-3.0] * parts).grads)


@pytest.mark.parametrize("kind", ["v8/4", "x"])
def test_what_is_multiplied_by_one_stays(kind):
    """Programs of such parts store nothing."""
    call = call_of(kind, "apart")
    count = len(call.head.widths)
    marked = [torch.full_like(pred, 7.0) for pred in call.preds]
    gradient_only(call, [1.0, *[None] * len(call.head.parts)], marked)
    assert all(bool((grad == 7).all()) for grad in marked)
    outs = [1.0] + [0.5 if name == "cls" else None for name in call.head.parts]
    gradient_only(call, outs, marked)
    for i, grad in enumerate(marked):
        assert bool((grad == 7).all()) == (i % count != count - 1)


@pytest.mark.parametrize("kind", ["v8/4", "v8/1", "x/l1"])
def test_logits_in_the_tails(kind):
    """All of them far on either side: nothing overflows, and small gradients keep their digits."""
    call = call_of(kind)
    first = 4 * call.head.reg_max
    generator = torch.Generator().manual_seed(5)
    for pred in call.preds:
        sign = torch.randint(2, pred[:, first:].shape, generator=generator).to(pred) * 2 - 1
        pred[:, first:] = sign * (120 if call.head.objectness else 80)
    # of equal logits many cells are as good, and the types may tell them apart by rounding: one assignment for both
    got, want, assignment = run(call), reference_of(call), assignment_of(call)
    assert assignment.norm.isfinite()
    for found, true in zip((got.total, *got.parts), (want.total, *want.parts), strict=True):
        assert float(found) == pytest.approx(float(true), rel=2e-6)
    same_gradients(call, got.grads, want.grads)
    small = want.grads[0][:, first:].double()
    tiny = (small != 0) & (small.abs() < 1e-30)
    if not call.head.objectness:
        assert tiny.any()
        assert ((got.grads[0][:, first:].double() - small).abs()[tiny] <= 1e-5 * small.abs()[tiny]).all()


def poisoned(call: Call, channel: int, level: int = 0, cell: tuple[int, int] = (0, 0)) -> Call:
    """With a NaN in one number."""
    preds = [pred.clone() for pred in call.preds]
    preds[level][1, channel, cell[0], cell[1]] = math.nan
    return call._replace(preds=preds)


@pytest.mark.parametrize("kind", ["v8/4", "v8/1", "x"])
def test_nan(kind):
    """A box logit shows in the part of boxes, objectness and, without it, a class logit in theirs."""
    call = call_of(kind)
    names = dict.fromkeys(call.head.parts)
    first = 4 * call.head.reg_max
    places = {0: "box", first - 1: "box", first: "obj" if call.head.objectness else "cls"}
    for channel, name in places.items():
        found = run(poisoned(call, channel, level=1))
        assert found.total.isnan()
        shown = [part for part, value in zip(names, found.parts, strict=True) if value.isnan()]
        assert name in shown
    for place, name in enumerate(("box", "cls")):
        nans = torch.zeros(2, device=DEVICE)
        nans[place] = math.nan
        found = run(call, assignment=assignment_of(call)._replace(nans=nans))
        assert [name for name, value in zip(names, found.parts, strict=True) if value.isnan()] == [name]


# ---- with the launches before it


def criterion_of(kind: str, **options: Any) -> Any:
    """A loss on a backend."""
    name, _, option = kind.partition("/")
    if name == "v8":
        return YOLOv8Loss(C, STRIDES, int(option or 16), **options)
    return YOLOXLoss(C, STRIDES, use_l1=option == "l1", **options)


@pytest.mark.parametrize("kind", ["v8/4", "x/l1"])
def test_a_training_step(kind):
    """Total, parts, counts and gradients; those of several backwards; of the parts apart."""
    call = call_of(kind, maps=((4, 6), (2, 3)), objects=3)
    call = call._replace(rows=torch.cat((call.rows, call.rows.new_tensor([[0, C, 0.5, 0.5, 0.1, 0.1]]))))
    seen = {backend: call.seen(call.preds[0].dtype) for backend in ("torch", "triton")}
    outs = {backend: criterion_of(kind, backend=backend)(preds, call.rows) for backend, preds in seen.items()}
    want, got = outs["torch"], outs["triton"]
    assert int(got.num_pos) == int(want.num_pos) > 0
    assert int(got.num_invalid) == int(want.num_invalid) == 1
    for name, part in want.parts.items():
        assert float(got.parts[name]) == pytest.approx(float(part), rel=1e-5)
    weights = torch.tensor(1.0), torch.tensor(0.25), torch.tensor(1.0)
    for weight in weights:
        grads = {
            backend: torch.autograd.grad(outs[backend].total, seen[backend], weight.to(DEVICE), retain_graph=True)
            for backend in seen
        }
        for found, true in zip(grads["triton"], grads["torch"], strict=True):
            torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-5 * float(true.abs().max()))
    terms = {backend: criterion_of(kind, backend=backend).terms(preds, call.rows) for backend, preds in seen.items()}
    for found, true in zip(
        *(torch.autograd.grad(terms[b]["box"] + 3 * terms[b]["cls"], seen[b]) for b in ("triton", "torch")), strict=True
    ):
        torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-5 * float(true.abs().max()))


def test_a_second_derivative_is_refused():
    call = call_of("v8/1", maps=((2, 3), (1, 2)), objects=1)
    seen = call.seen(torch.float32)
    total = criterion_of("v8/1", backend="triton")(seen, call.rows).total
    (grad, *_) = torch.autograd.grad(total, seen, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"picked_loss_grad.*double backward"):
        grad.sum().backward()
