"""Terms where float32 ends: subnormal numbers, kept or flushed to 0, sizes that vanish, powers near 0, and NaN."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from conftest import DEVICE
from fusedyolo.kernels import primitives
from fusedyolo.kernels.terms import box, decode, label, offset
from oracle import EXTENT, TOLERANCE, box_loss, compare, extreme_boxes, lattice, random_boxes
from oracle import value_and_grads as run

from fusedyolo import ops, reference
from fusedyolo.heads import BOX_KINDS, IOU_KINDS

# What a GPU does with subnormal numbers: keep them, flush them in approximate operations (ex2, lg2, div) alone, or in
# every operation. A GPU does one of these by itself; the interpreter is made to.
MODES = ["kept", "approximate", "flushed"] if DEVICE == "cpu" else ["kept"]
DTYPES = (torch.float32, torch.float64)
BACKENDS = [pytest.param(True, id="triton"), pytest.param(False, id="torch")]
GAMMAS = (0.0, 0.1, 0.15, 0.5, 1.0, 1.5, 2.0, 5.0)


def flush(values):
    """Subnormal numbers of float32 made 0, with their sign."""
    if getattr(values, "dtype", None) != np.float32:
        return values
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), values), values)


@pytest.fixture
def subnormal(monkeypatch):
    """A function that makes the interpreter treat subnormal numbers as one of MODES says."""

    def choose(mode: str) -> None:
        if mode == "kept":
            return
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

        binary, unary = InterpreterBuilder.binary_op, InterpreterBuilder.unary_op
        rough = (np.exp, np.exp2, np.log, np.log2, np.divide)

        def flushed(operation, values, function):
            if mode == "approximate" and function not in rough:
                return operation(*values, function)
            result = operation(*(TensorHandle(flush(value.data), value.dtype) for value in values), function)
            result.data = flush(result.data)
            return result

        def binary_op(self, lhs, rhs, function):
            return flushed(lambda *args: binary(self, *args), (lhs, rhs), function)

        def unary_op(self, arg, function):
            return flushed(lambda *args: unary(self, *args), (arg,), function)

        monkeypatch.setattr(InterpreterBuilder, "binary_op", binary_op)
        monkeypatch.setattr(InterpreterBuilder, "unary_op", unary_op)

    return choose


# ---- labels

LOGITS = [
    0.0, 1e-30, 1e-8, 1.0, 5.0, 17.0, 40.0, 80.0, 87.0, 87.4, 88.0, 88.75, 89.0, 90.0, 95.0, 100.0, 103.0, 104.0, 110.0,
    120.0, 745.0, 1e4,
]  # fmt: skip
SOFT = [0.5, 0.3, 1e-3, 1e-30, 1 - 2.0**-24]
LABELS = {
    "bce": [[], [2.5]],
    "sse": [[]],
    "focal": [[a, g] for a in (-1.0, 0.25) for g in GAMMAS] + [[0.25, g, 2.5] for g in (0.0, 0.1, 2.0)],
    "qfl": [[a, g] for a in (-1.0, 0.25) for g in GAMMAS],
    "varifocal": [[a, g] for a in (-1.0, 0.25) for g in GAMMAS],
}


def label_sweep(dtype):
    """Every logit against hard and soft targets, and the soft ones that equal the prediction, as far as dtype can."""
    x = torch.tensor(LOGITS, device=DEVICE)
    x = torch.cat((x, -x))
    targets = [torch.full_like(x, t) for t in (0.0, 1.0, *SOFT)] + [x.double().sigmoid().float()]
    return x.repeat(len(targets)).to(dtype), torch.cat(targets).to(dtype)


def check_labels(kind, dtype, backend=True):
    x, t = label_sweep(dtype)
    settled = torch.ones_like(x, dtype=torch.bool)
    if kind == "qfl":  # p - t is rounding here, and the slope whatever that makes of it
        settled = ((x.double().sigmoid() - t.double()).abs() > 1e-3) | (t == 0) | (t == 1)
    for args in LABELS[kind]:
        args = torch.tensor(args).tolist()  # as the kernel sees them
        truth = run(lambda x, args=args: reference.LABEL_TERMS[kind](x, t.double(), args), x.double())
        if backend:
            got = run(lambda x, args=args: ops.label_loss(x, t, kind, args, "none"), x)
        else:
            got = run(lambda x, args=args: reference.LABEL_TERMS[kind](x, t, args), x)
        for a, b in zip(got, truth, strict=True):
            assert a.isfinite().all(), (kind, args, x[~a.isfinite()], t[~a.isfinite()])
            assert b.isfinite().all(), (kind, args)
            compare(a[settled], b[settled], 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", LABELS)
def test_labels(kind, mode, dtype, subnormal):
    subnormal(mode)
    check_labels(kind, dtype)


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_the_reference(kind):
    check_labels(kind, torch.float32, backend=False)


# ---- boxes

SHAPES = [(), (0.25, 0.0), (0.5, 0.1), (3.0, 0.5), (5.0, 2.0)]  # alpha and gamma


def far_and_thin_boxes():
    """Sides from 1e-3 to 1e5, true boxes without area among them, with a corner in common, near it and far off."""
    sides, true = (1e-3, 1.0, 1e5), [*itertools.product((1e-3, 7.0, 1e5), repeat=2), (0.0, 0.0)]
    pairs = []
    for pw, ph, (gw, gh), (dx, dy) in itertools.product(
        sides, sides, true, ((0.0, 0.0), (1e-3, 0.5), (0.5, 1e5), (40.0, 40.0), (1e5, 0.0))
    ):
        pairs.append((0.0, 0.0, pw, ph, dx, dy, dx + gw, dy + gh))
        pairs.append((-pw, -ph, 0.0, 0.0, -dx, -dy, gw - dx, gh - dy))
    p, g = torch.tensor(pairs, device=DEVICE).split(4, -1)
    kept = (p[:, 2:] > p[:, :2]).all(-1)
    return p[kept], g[kept]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", BOX_KINDS)
def test_boxes(kind, mode, subnormal):
    """Finite in every corner of the domain; and the reference's where float32 can tell one box from another."""
    subnormal(mode)
    for shape in SHAPES if kind in IOU_KINDS else [()]:
        for eps in ((1e-16, 1e-16),) if kind == "ciou_plus" else ((0.0, 0.0), (1e-7, 1e-6)):
            args = torch.tensor((*eps, *shape)).tolist()
            p, g = far_and_thin_boxes()
            for got in (*run(box_loss(kind, args, True), p, g), *run(box_loss(kind, args, False), p, g)):
                assert got.isfinite().all(), (args, p[~got.isfinite().view(len(p), -1).all(1)][:3])
            if shape and shape[0] < 1:  # no slope where a penalty vanishes
                continue
            p, g = (boxes.float().to(DEVICE) for boxes in extreme_boxes(40))
            got = run(box_loss(kind, args, True), p, g)
            want = run(box_loss(kind, args, False), p.double(), g.double())
            compare(got[0], want[0], 1e-5)
            for a, b, boxes in zip(got[1:], want[1:], (p, g), strict=True):
                sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
                compare(a * sides, b * sides, 1e-5)


# ---- decoded boxes: raw logits, whose sizes vanish and grow without bound


@triton.jit
def decoded_kernel(
    raw_ptr, true_ptr, n, anchor, stride, scale, args, extent, loss_ptr, grad_ptr,
    AXIS: tl.constexpr, BOX: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A box term on decoded boxes, as the drivers put them together; true boxes are centres and sizes."""
    at = tl.arange(0, BLOCK)
    mask = at < n
    w = tl.cast(anchor, ACC)
    a = tl.load(raw_ptr + 4 * at, mask=mask, other=0.0)
    b = tl.load(raw_ptr + 4 * at + 1, mask=mask, other=0.0)
    c = tl.load(raw_ptr + 4 * at + 2, mask=mask, other=0.0)
    d = tl.load(raw_ptr + 4 * at + 3, mask=mask, other=0.0)
    gx = tl.load(true_ptr + 4 * at, mask=mask, other=0.0)
    gy = tl.load(true_ptr + 4 * at + 1, mask=mask, other=0.0)
    gw = tl.load(true_ptr + 4 * at + 2, mask=mask, other=1.0)
    gh = tl.load(true_ptr + 4 * at + 3, mask=mask, other=1.0)
    x, jx = AXIS(a, c, w, tl.cast(stride, ACC), tl.cast(scale, ACC))
    y, jy = AXIS(b, d, w, tl.cast(stride, ACC), tl.cast(scale, ACC))
    hx = 0.5 * (gw - x[1])
    hy = 0.5 * (gh - y[1])
    pair_x = (x[1], gw, x[0] - gx + hx, hx - (x[0] - gx), extent[0])
    pair_y = (y[1], gh, y[0] - gy + hy, hy - (y[0] - gy), extent[1])
    loss, g_x, g_y = BOX(pair_x, pair_y, args)
    tl.store(loss_ptr + at, loss, mask=mask)
    tl.store(grad_ptr + 4 * at, g_x[0] * jx[0] + g_x[1] * jx[2], mask=mask)
    tl.store(grad_ptr + 4 * at + 1, g_y[0] * jy[0] + g_y[1] * jy[2], mask=mask)
    tl.store(grad_ptr + 4 * at + 2, g_x[0] * jx[1] + g_x[1] * jx[3], mask=mask)
    tl.store(grad_ptr + 4 * at + 3, g_y[0] * jy[1] + g_y[1] * jy[3], mask=mask)


def decoded(kind, axis, raw, true, args, anchor, stride, scale):
    """Loss of decoded boxes and its gradient by the logits, by the kernel."""
    loss, grad = torch.empty_like(raw[:, 0]), torch.empty_like(raw)
    acc = tl.float64 if raw.dtype == torch.float64 else tl.float32
    decoded_kernel[(1,)](
        raw, true, len(raw), anchor, stride, scale, tuple(args), EXTENT, loss, grad, AXIS=getattr(decode, axis),
        BOX=getattr(box, kind), ACC=acc, BLOCK=triton.next_power_of_2(len(raw)),
    )  # fmt: skip
    return loss, grad


def decoded_reference(kind, axis, raw, true, args, anchor, stride, scale):
    """The same by the reference."""
    raw = raw.clone().requires_grad_()
    number = [torch.tensor(value, dtype=raw.dtype, device=raw.device) for value in (anchor, stride, scale)]
    centre, size = reference.DECODE[axis](raw[:, :2], raw[:, 2:], *number)
    # relative to the predicted centre: a tiny box keeps its sides
    moved = true[:, :2] - centre
    p = torch.cat((-size / 2, size / 2), -1)
    g = torch.cat((moved - true[:, 2:] / 2, moved + true[:, 2:] / 2), -1)
    loss = reference.BOX_TERMS[kind](p, g, args, torch.tensor(EXTENT, dtype=raw.dtype, device=raw.device))
    return loss.detach(), torch.autograd.grad(loss.sum(), raw)[0]


SIZES = {
    "exp": [-1e4, -120.0, -60.0, -46.0, -44.0, -43.0, -30.0, 0.0, 3.0, 40.0],
    "sigmoid_square": [-1e4, -745.0, -120.0, -60.0, -45.0, -43.8, -30.0, -20.0, 0.0, 1e4],
    "delta": [-1e4, -745.0, -104.0, -88.5, -87.4, -60.0, -43.0, 0.0, 4.0, 5.0, 1e4],
}
NUMBERS = {"exp": (13.0, 8.0, 1.25), "sigmoid_square": (13.0, 8.0, 2.0), "delta": (32.0, 32.0, 1.0)}


def decoded_sweep(axis, dtype):
    raw = [(x, 0.3, w, h) for x in (-0.4, 90.0 if axis != "delta" else 3.0) for w in SIZES[axis] for h in SIZES[axis]]
    true = [(3.0, 5.0, 10.0, 6.0), (40.0, -3.0, 1e3, 1e-3), (4.0, 4.0, 0.0, 0.0)]
    raw, true = torch.tensor(raw, dtype=dtype), torch.tensor(true, dtype=dtype)
    return raw.repeat_interleave(len(true), 0).to(DEVICE), true.repeat(len(raw), 1).to(DEVICE)


def check_decoded(kind, axis, dtype):
    raw, true = decoded_sweep(axis, dtype)
    for eps in ((1e-16, 1e-16),) if kind == "ciou_plus" else ((0.0, 0.0), (1e-7, 1e-7)):
        args = (torch.tensor(eps).tolist(), *NUMBERS[axis])
        got = decoded(kind, axis, raw, true, *args)
        want = decoded_reference(kind, axis, raw.double(), true.double(), *args)
        for a, b in zip(got, want, strict=True):
            assert a.isfinite().all(), (args, raw[~a.isfinite().view(len(raw), -1).all(1)][:3])
            assert b.isfinite().all(), (args, raw[~b.isfinite().view(len(raw), -1).all(1)][:3])
            compare(a, b, TOLERANCE[dtype])
        for a in decoded_reference(kind, axis, raw, true, *args):
            assert a.isfinite().all(), (args, raw[~a.isfinite().view(len(raw), -1).all(1)][:3])


@pytest.mark.parametrize("axis", SIZES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", BOX_KINDS)
def test_decoded_boxes(kind, mode, axis, subnormal):
    subnormal(mode)
    check_decoded(kind, axis, torch.float32)
