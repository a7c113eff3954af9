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
from fusedyolo.kernels.terms.records import Jacobian, Span, axis_of_sizes
from oracle import EXTENT, SMALL_EPS, TOLERANCE, box_loss, compare, extreme_boxes, label_numbers, lattice
from oracle import value_and_grads as run

from fusedyolo import ops, reference
from fusedyolo.terms import TERMS, term_names

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
SOME_NUMBERS = {"alpha": (-1.0, 0.25), "gamma": GAMMAS, "pos_weight": (2.5,)}
LABELS = {kind: label_numbers(kind, SOME_NUMBERS) for kind in term_names("objectness")}
LABELS["focal"] += [[0.25, gamma, 2.5] for gamma in (0.0, 0.1)]


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

# eps, of which 0 hides least, alpha and gamma
BOX_ARGS = [(0.0, 0.0), (1e-7, 1e-6, 0.25, 0.0), (0.0, 0.0, 0.5, 0.1), (0.0, 0.0, 5.0, 2.0)]


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
    return p[kept][::2], g[kept][::2]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", term_names("iou"))
def test_boxes(kind, mode, subnormal):
    """Finite in every corner of the domain; and the reference's where float32 can tell one box from another."""
    subnormal(mode)
    for numbers in BOX_ARGS if TERMS[kind].optional else [SMALL_EPS[kind]]:
        args = torch.tensor(numbers).tolist()  # as the kernel sees them
        p, g = far_and_thin_boxes()
        for got in (*run(box_loss(kind, args, True), p, g), *run(box_loss(kind, args, False), p, g)):
            assert got.isfinite().all(), (args, p[~got.isfinite().view(len(p), -1).all(1)][:3])
        if len(args) > 2 and args[2] < 1:  # no slope where a penalty vanishes
            continue
        largest = 1e-3 if TERMS[kind].needs_extent else 1.0  # of 1e5 px: in images without bound, to the fifth power
        p, g = (largest * boxes.float().to(DEVICE) for boxes in extreme_boxes(40))
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
    pair_x = axis_of_sizes(x.size, gw, x.centre - gx)
    pair_y = axis_of_sizes(y.size, gh, y.centre - gy)
    loss, by_x, by_y = BOX(pair_x, pair_y, args, extent)
    d_a, d_c = decode.chain(by_x.centre, by_x.size, jx)
    d_b, d_d = decode.chain(by_y.centre, by_y.size, jy)
    tl.store(loss_ptr + at, loss, mask=mask)
    tl.store(grad_ptr + 4 * at, d_a, mask=mask)
    tl.store(grad_ptr + 4 * at + 1, d_b, mask=mask)
    tl.store(grad_ptr + 4 * at + 2, d_c, mask=mask)
    tl.store(grad_ptr + 4 * at + 3, d_d, mask=mask)


def decoded(kind, axis, raw, true, args, anchor, stride, scale):
    """Loss of decoded boxes and its gradient by the logits, by the kernel."""
    loss, grad = torch.empty_like(raw[:, 0]), torch.empty_like(raw)
    acc = tl.float64 if raw.dtype == torch.float64 else tl.float32
    decoded_kernel[(1,)](
        raw, true, len(raw), anchor, stride, scale, tuple(args), EXTENT, loss, grad, AXIS=TERMS[axis].kernel,
        BOX=TERMS[kind].kernel, ACC=acc, BLOCK=triton.next_power_of_2(len(raw)),
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


def decoded_sides(axis, raw):
    anchor, stride, scale = (
        torch.tensor(value, dtype=torch.float64, device=raw.device) for value in NUMBERS.get(axis, OTHER_NUMBERS)
    )
    return reference.DECODE[axis](raw[:, :2].double(), raw[:, 2:].double(), anchor, stride, scale)[1]


SIZES = {
    "exp": [-1e4, -120.0, -60.0, -46.0, -44.0, -43.0, -30.0, 0.0, 3.0, 40.0],
    "sigmoid_square": [-1e4, -745.0, -120.0, -60.0, -45.0, -43.8, -30.0, -20.0, 0.0, 1e4],
    "delta": [-1e4, -745.0, -104.0, -88.5, -87.4, -60.0, -43.0, 0.0, 4.0, 5.0, 1e4],
    "ltrb": [0.5, 1.0, 40.0, 1e4],
}
NUMBERS = {"exp": (13.0, 8.0, 1.25), "sigmoid_square": (13.0, 8.0, 2.0), "delta": (32.0, 32.0, 1.0)}
OTHER_SIZES, OTHER_NUMBERS = [-120.0, -30.0, 0.0, 3.0, 40.0], (13.0, 8.0, 1.0)


def decoded_sweep(axis, dtype):
    sizes = SIZES.get(axis, OTHER_SIZES)
    raw = [(x, 0.3, w, h) for x in (-0.4, 90.0 if axis in term_names("grid") else 3.0) for w in sizes for h in sizes]
    true = [(3.0, 5.0, 10.0, 6.0), (40.0, -3.0, 1e3, 1e-3), (4.0, 4.0, 0.0, 0.0)]
    raw, true = torch.tensor(raw, dtype=dtype), torch.tensor(true, dtype=dtype)
    return raw.repeat_interleave(len(true), 0).to(DEVICE), true.repeat(len(raw), 1).to(DEVICE)


def check_decoded(kind, axis, dtype):
    raw, true = decoded_sweep(axis, dtype)
    for eps in (SMALL_EPS[kind],) if kind in SMALL_EPS else ((0.0, 0.0), (1e-7, 1e-7)):
        args = (torch.tensor(eps).tolist(), *NUMBERS.get(axis, OTHER_NUMBERS))
        got = decoded(kind, axis, raw, true, *args)
        want = decoded_reference(kind, axis, raw.double(), true.double(), *args)
        settled = torch.ones_like(raw[:, 0], dtype=torch.bool)
        if kind == "siou":  # its angle is lost beside a huge box, and in gradients by the edges of a tiny one
            sides = decoded_sides(axis, raw)
            settled = (sides > 1e-8).all(-1) & (sides < 1e3).all(-1)
        for a, b in zip(got, want, strict=True):
            assert a.isfinite().all(), (args, raw[~a.isfinite().view(len(raw), -1).all(1)][:3])
            assert b.isfinite().all(), (args, raw[~b.isfinite().view(len(raw), -1).all(1)][:3])
            compare(a[settled], b[settled], TOLERANCE[dtype])
        for a in decoded_reference(kind, axis, raw, true, *args):
            assert a.isfinite().all(), (args, raw[~a.isfinite().view(len(raw), -1).all(1)][:3])


@pytest.mark.parametrize("axis", term_names("grid", "anchor"))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", term_names("iou"))
def test_decoded_boxes(kind, mode, axis, subnormal):
    subnormal(mode)
    check_decoded(kind, axis, torch.float32)


# ---- NaN


@triton.jit
def pair_kernel(a_ptr, b_ptr, out_ptr, n, OP: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a, b = tl.load(a_ptr + at, mask=at < n), tl.load(b_ptr + at, mask=at < n)
    tl.store(out_ptr + at, OP(a, b), mask=at < n)


@triton.jit
def dropping_larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def dropping_smaller(a, b):
    return tl.minimum(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("function", "want"),
    [
        (primitives.larger, torch.maximum), (primitives.smaller, torch.minimum),
        (dropping_larger, torch.fmax), (dropping_smaller, torch.fmin),
    ],
)  # fmt: skip
def test_larger_and_smaller(function, want, dtype):
    """Triton's own drop a NaN, on a GPU and in the interpreter as the tests set it up."""
    values = torch.tensor([math.nan, -math.inf, -1.0, 0.0, 1.0, math.inf], dtype=dtype, device=DEVICE)
    a, b = torch.cartesian_prod(values, values).T.contiguous()
    out = torch.empty_like(a)
    pair_kernel[(1,)](a, b, out, len(a), OP=function, BLOCK=64)
    torch.testing.assert_close(out, want(a, b), rtol=0, atol=0, equal_nan=True)


def spoiled(boxes):
    """The same number of boxes four times, a NaN in another coordinate each time."""
    return torch.cat([torch.where(torch.arange(4, device=boxes.device) == k, math.nan, boxes) for k in range(4)])


def check_nan_in_boxes(kind, fused=True):
    shapes = [(), (3.0, 0.5), (0.5, 0.0)] if TERMS[kind].optional else [()]
    p, g = (boxes.to(DEVICE, torch.float32) for boxes in lattice(2, empty=True))
    for shape in shapes:
        for bad, good in ((p, g), (g, p)):
            pair = (spoiled(bad), good.repeat(4, 1))
            loss, *grads = run(box_loss(kind, [1e-7, 1e-7, *shape], fused), *(pair if bad is p else pair[::-1]))
            assert loss.isnan().all()
            if fused:
                assert all(grad.isnan().all() for grad in grads)


@pytest.mark.parametrize("fused", BACKENDS)
@pytest.mark.parametrize("kind", term_names("iou"))
def test_nan_in_boxes(kind, fused):
    """Of the predicted or of the true box: the loss is NaN, and the gradient of the prediction."""
    check_nan_in_boxes(kind, fused)


def check_nan_in_logits(kind, axis):
    raw = torch.tensor([[0.3, -0.2, 0.1, 0.4], [1.0, 2.0, 5.0, -1.0]], device=DEVICE)
    raw = torch.cat((raw, spoiled(raw)))
    true = torch.tensor([[3.0, 5.0, 10.0, 6.0]], device=DEVICE).repeat(len(raw), 1)
    for function in (decoded, decoded_reference):
        loss, grad = function(kind, axis, raw, true, [1e-7, 1e-7], *NUMBERS.get(axis, OTHER_NUMBERS))
        assert loss[:2].isfinite().all()
        assert loss[2:].isnan().all()
        assert grad[:2].isfinite().all()
        assert grad[2:][raw[2:].isnan()].isnan().all()  # by the NaN itself, and by what it spoils


@pytest.mark.parametrize("axis", term_names("grid", "anchor"))
@pytest.mark.parametrize("kind", term_names("iou"))
def test_nan_in_logits(kind, axis):
    check_nan_in_logits(kind, axis)


@triton.jit
def offset_kernel(
    a_ptr, b_ptr, ta_ptr, tb_ptr, scale, loss_ptr, da_ptr, db_ptr, n, OFFSET: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.arange(0, BLOCK)
    mask = at < n
    a, b = tl.load(a_ptr + at, mask=mask, other=0.0), tl.load(b_ptr + at, mask=mask, other=0.0)
    ta, tb = tl.load(ta_ptr + at, mask=mask, other=0.0), tl.load(tb_ptr + at, mask=mask, other=0.0)
    loss, d_a, d_b = OFFSET(a, b, ta, tb, scale)
    tl.store(loss_ptr + at, loss, mask=mask)
    tl.store(da_ptr + at, d_a, mask=mask)
    tl.store(db_ptr + at, d_b, mask=mask)


def check_offset(kind, dtype):
    """Logits in their tails, differences of 0, beta that vanishes, and NaN in each of a and b."""
    edge = torch.tensor([0.0, 1e-38, 1e-30, 0.25, 1.0, 17.0, 40.0, 88.75, 104.0, 745.0, 1e4])
    edge = torch.cat((edge, -edge, torch.tensor([math.nan])))
    a, b = torch.cartesian_prod(edge, edge).T.contiguous().to(DEVICE, dtype)
    ta, tb = torch.full_like(a, 0.25), torch.full_like(b, -0.5)
    for scale in (1.0, 2.0) if "sensitivity" in TERMS[kind].numbers else (0.0, 1e-40, 1e-8, 1.0):
        got = [torch.empty_like(a) for _ in range(3)]
        offset_kernel[(1,)](a, b, ta, tb, scale, *got, len(a), OFFSET=TERMS[kind].kernel, BLOCK=1024)
        leaves = [a.double().requires_grad_(), b.double().requires_grad_()]
        loss = reference.OFFSET_TERMS[kind](*leaves, ta.double(), tb.double(), scale)
        want = (loss.detach(), *torch.autograd.grad(loss.sum(), leaves))
        for x, y, own in zip(got, want, (a + b, a, b), strict=True):
            assert torch.equal(x.isnan(), own.isnan())
            if scale or x is got[0]:  # torch's smooth_l1 of beta 0 has a slope of 0 at NaN
                assert torch.equal(y.isnan(), own.isnan())
            compare(x[~own.isnan()], y[~own.isnan()], 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", reference.OFFSET_TERMS)
def test_offsets(kind, mode, dtype, subnormal):
    subnormal(mode)
    check_offset(kind, dtype)


@pytest.mark.parametrize("fused", BACKENDS)
@pytest.mark.parametrize("kind", LABELS)
def test_nan_in_labels(kind, fused):
    """In the logit or in its target: NaN, with its gradient, and nowhere else."""
    x = torch.tensor([0.5, math.nan, 0.5, -2.0, math.nan, 90.0], device=DEVICE)
    t = torch.tensor([0.0, 0.0, math.nan, 1.0, 1.0, 0.3], device=DEVICE)
    bad = x.isnan() | t.isnan()
    for args in LABELS[kind]:
        if fused:
            loss, grad = run(lambda x, args=args: ops.label_loss(x, t, kind, args, "none"), x)
            assert torch.equal(grad.isnan(), bad)
        else:
            loss, grad = run(lambda x, args=args: reference.LABEL_TERMS[kind](x, t, args), x)
            assert not grad[~bad].isnan().any()
        assert torch.equal(loss.isnan(), bad), args


# ---- the tests tested: what these functions were, or what one would write


@triton.jit
def pow_of_subnormals(q, g):
    return tl.where(q <= 0, tl.where(g == 0, 1.0, 0.0), tl.exp(g * tl.log(tl.where(q <= 0, 1.0, q))))


@triton.jit
def div_by_subnormals(a, b):
    return tl.where(b != 0, a / tl.where(b != 0, b, 1.0), 0.0)


@triton.jit
def qfl_divided_late(x, t, args):
    ce, miss = label.bce(x, t, ())
    p, r, _e = primitives.logistic(x)
    w = label._balance(t, args[0]) * label._raised(tl.abs(miss), args[1])
    return w * ce, w * miss + args[1].exponent * div_by_subnormals(w, miss) * (p * r) * ce


@triton.jit
def sigmoid_square_to_nothing(a, b, anchor, stride, scale):
    v, dv = decode.scaled_sigmoid(a, scale)
    p, q, _e = primitives.logistic(b)
    w = anchor * (4.0 * p * p)
    return Span(v * stride, w), Jacobian(dv * stride, 0.0, 0.0, 2.0 * w * q)


@triton.jit
def delta_to_nothing(a, b, anchor, stride, scale):
    z = b * scale
    limit = tl.full([], 4.135166556742356, tl.float64).to(b.dtype)
    w = anchor * tl.exp(primitives.smaller(z, limit))
    return Span(a * stride, w), Jacobian(stride, 0.0, 0.0, tl.where(z <= limit, scale * w, 0.0))


@triton.jit
def sign_of_nan(d):
    return tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))


def check_general_power():
    """Of exponents of 0, 1 and 2 too, where label terms do without it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(label, "_POWERS", {})
        check_labels("focal", torch.float32)


MUTANTS = [
    (label, "qfl", qfl_divided_late, "kept", lambda: check_labels("qfl", torch.float32)),
    (label, "pow_pos", pow_of_subnormals, "approximate", check_general_power),
    (box, "safe_div", div_by_subnormals, "kept", lambda: check_decoded("iou", "exp", torch.float32)),
    (decode, "sigmoid_square", sigmoid_square_to_nothing, "kept",
     lambda: check_decoded("ciou", "sigmoid_square", torch.float32)),
    (decode, "delta", delta_to_nothing, "kept", lambda: check_decoded("ciou", "delta", torch.float32)),
    (box, "smaller", dropping_smaller, "kept", lambda: check_nan_in_logits("giou", "exp")),
    (box, "larger", dropping_larger, "kept", lambda: check_nan_in_logits("giou", "exp")),
    (decode, "larger", dropping_larger, "kept", lambda: check_nan_in_logits("iou", "exp")),
    (decode, "smaller", dropping_smaller, "kept", lambda: check_nan_in_logits("iou", "delta")),
    (offset, "sign", sign_of_nan, "kept", lambda: check_offset("l1", torch.float32)),
]  # fmt: skip


@pytest.mark.skipif(DEVICE != "cpu", reason="compiled kernels keep the functions they were compiled with")
@pytest.mark.parametrize(
    ("module", "name", "broken", "mode", "check"), MUTANTS, ids=[f"{m[1]}-{m[2].__name__}" for m in MUTANTS]
)
def test_a_broken_function_is_caught(module, name, broken, mode, check, monkeypatch, subnormal):
    subnormal(mode)
    check()
    monkeypatch.setattr(module, name, broken)
    with pytest.raises(AssertionError):
        check()
