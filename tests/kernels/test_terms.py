"""Every Triton term against its eager twin, and both against the formulas of papers and peers."""

import math
from functools import partial

import pytest
import torch
import triton
import triton.language as tl
from conftest import DEVICE
from formulas import PENALTIES, box_term, label_term
from fusedyolo.kernels.terms.records import axis_of_edges
from oracle import (
    EXTENT,
    box_loss,
    check_box_term,
    check_label_term,
    check_row_term,
    label_numbers,
    lattice,
    random_boxes,
)  # fmt: skip
from oracle import value_and_grads as run

from fusedyolo import ops, reference
from fusedyolo.terms import TERMS, term_names

DTYPES = (torch.float64, torch.float32)
ULP = torch.finfo(torch.float64).eps
GAMMAS = (0.0, 0.5, 1.0, 2.0)
BOX_KINDS = term_names("iou")
SHAPED = [kind for kind in BOX_KINDS if TERMS[kind].optional]  # those that have an alpha and a focal form
LABELS = [(kind, args) for kind in term_names("objectness") for args in label_numbers(kind)]
SHAPES = [((1.0, 0.5), torch.float64), ((3.0, 0.0), torch.float32), ((0.75, 1.0), torch.float64)]  # alpha and gamma
BACKENDS = [pytest.param(True, id="triton"), pytest.param(False, id="torch")]
EPS = [0.0, 0.0]


@pytest.mark.parametrize("name", TERMS)
def test_a_term_has_both_twins_and_its_name_once(name):
    term = TERMS[name]
    assert term.kernel.fn.__module__ == f"fusedyolo.kernels.terms.{term.room}"
    twins = {"box": reference.BOX_TERMS, "offset": reference.OFFSET_TERMS, "label": reference.LABEL_TERMS}
    assert name in twins.get(term.room, reference.DECODE)
    assert term.source
    assert term.kernel.fn.__doc__


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [*BOX_KINDS, *term_names("boxes")])
def test_box_term(kind, dtype):
    check_box_term(kind, dtype)


@pytest.mark.parametrize(("shape", "dtype"), SHAPES)
@pytest.mark.parametrize("kind", SHAPED)
def test_box_term_with_alpha_and_gamma(kind, shape, dtype):
    check_box_term(kind, dtype, shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "args"), LABELS)
def test_label_term(kind, args, dtype):
    check_label_term(kind, args, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [kind for kind in term_names("class") if not TERMS[kind].elementwise])
def test_row_term(kind, dtype):
    check_row_term(kind, dtype)


@triton.jit
def _box_kernel(one_ptr, out_ptr, args, extent, TERM: tl.constexpr):
    """A box term of lengths of 1."""
    one = tl.load(one_ptr + tl.arange(0, 1))
    axis = axis_of_edges(one, one + one, one, one + one)
    loss, _x, _y = TERM(axis, axis, args, (extent, extent))
    tl.store(out_ptr + tl.arange(0, 1), loss)


@triton.jit
def _label_kernel(one_ptr, out_ptr, args, extent, TERM: tl.constexpr):
    """A label term of a logit of 1."""
    one = tl.load(one_ptr + tl.arange(0, 1))
    loss, _d_x = TERM(one, one, args)
    tl.store(out_ptr + tl.arange(0, 1), loss)


TAKING = {"box": _box_kernel, "label": _label_kernel}


def reasons(error: BaseException | None) -> str:
    """What an error says, and those that it came of: the compiler says at which call it stood."""
    return "" if error is None else f"{error}\n{reasons(error.__cause__ or error.__context__)}"


@pytest.mark.parametrize("kind", [name for name, term in TERMS.items() if term.room in TAKING])
def test_a_kernel_takes_the_numbers_of_the_table(kind):
    """A term itself refuses another number of them, when it is compiled."""
    term = TERMS[kind]
    taken = {len(term.numbers), len(term.numbers) + len(term.optional)}
    for n in range(6):
        one, args = torch.ones(1, device=DEVICE), term.kernel_args((0.5,) * n)
        args += (0.5,) * (n - len(args))
        launch = partial(TAKING[term.room][(1,)], one, torch.empty_like(one), args, EXTENT[0], term.kernel)
        if n in taken:
            launch()
        else:
            with pytest.raises(Exception) as refused:  # noqa: PT011 (of Triton, or of its interpreter)
                launch()
            assert "a term takes another number of args" in reasons(refused.value)


# ---- the formulas, on boxes without ties


def centred(corners):
    low, high = corners[..., :2], corners[..., 2:]
    return (*((low + high) / 2).unbind(-1), *(high - low).unbind(-1))


@pytest.mark.parametrize("fused", BACKENDS)
@pytest.mark.parametrize("kind", PENALTIES)
def test_box_formula(kind, fused):
    p, g = (boxes[:40].to(DEVICE) for boxes in random_boxes())
    for shape in [(), (3.0, 0.0), (1.0, 0.5), (2.0, 0.25)] if TERMS[kind].optional else [()]:
        args = [*EPS, *shape]

        def loss(p, g, args=args):
            return box_term(kind, centred(p), centred(g), args, EXTENT)

        got = run(box_loss(kind, args, fused), p, g)
        for a, b in zip(got, run(loss, p, g), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("fused", BACKENDS)
def test_logarithm_of_the_iou(fused):
    """By hand: halves and thirds of boxes; one of no overlap, and one of so little that it counts as none."""
    p = torch.tensor([[0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 1e4, 1]], dtype=torch.float64, device=DEVICE)
    g = torch.tensor([[0, 0, 2, 2], [1, 0, 3, 2], [5, 0, 6, 2], [0, 0, 1e-4, 1]], dtype=torch.float64, device=DEVICE)
    loss, d_p, d_g = run(box_loss("iou_log", [1e-6], fused), p, g)
    want = torch.tensor([0.0, math.log(3), -math.log(1e-6), -math.log(1e-6)], dtype=torch.float64)
    torch.testing.assert_close(loss.cpu(), want, rtol=1e-7, atol=1e-15)  # floor in float32
    assert not d_p[2:].any()
    assert not d_g[2:].any()
    assert d_p[1, ::2].abs().min() > 0


@pytest.mark.parametrize("fused", BACKENDS)
def test_ciou_plus_keeps_within_its_bounds(fused):
    """Its clip is left out, so no pair may reach it: thin boxes across each other come nearest."""
    thin = torch.tensor([[-w / 2, -h / 2, w / 2, h / 2] for w in (1e-3, 0.1, 0.9, 1.0) for h in (1e-3, 0.1, 1.0)])
    pairs = [thin.double().repeat_interleave(12, 0), thin.double().repeat(12, 1)]
    for p, g in (pairs, lattice(3, empty=True), random_boxes()):
        loss = box_loss("ciou_plus", [1e-16, 0.0], fused)(p.to(DEVICE), g.to(DEVICE))
        assert (loss >= 0).all()
        assert (loss <= 2).all()


@pytest.mark.parametrize("fused", BACKENDS)
def test_ciou_plus_of_a_true_box_without_size(fused):
    """No overlap, and the angle of 0 / (0 + eps) is 0."""
    p = torch.tensor([[0.0, 0.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64, device=DEVICE)
    g = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64, device=DEVICE)
    loss, *grads = run(box_loss("ciou_plus", [1e-16, 0.0], fused), p, g)
    v = 4 / math.pi**2 * math.atan(2.0) ** 2
    want = torch.tensor([1 + 0.25 / 5 - v * v / (1 + v), 1.0], dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("fused", BACKENDS)
@pytest.mark.parametrize("kind", SHAPED)
def test_alpha_of_one_and_gamma_of_zero_are_the_plain_loss(kind, fused):
    p, g = (boxes.to(DEVICE) for boxes in lattice(3, empty=True))
    plain = run(box_loss(kind, EPS, fused), p, g)
    for a, b in zip(run(box_loss(kind, [*EPS, 1.0, 0.0], fused), p, g), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0 if DEVICE == "cpu" else 4 * ULP)  # a compiler fuses sums


@pytest.mark.parametrize("fused", BACKENDS)
@pytest.mark.parametrize("kind", SHAPED)
def test_roots_have_no_slope_where_they_vanish(kind, fused):
    """alpha < 1: penalties of 0, IoUs of 0, and what is left of them by rounding."""
    p, g = (boxes.to(DEVICE) for boxes in lattice(3, empty=True))
    for dtype in DTYPES:
        loss, *grads = run(box_loss(kind, [*EPS, 0.25, 0.0], fused), p.to(dtype), g.to(dtype))
        assert loss.isfinite().all()
        assert all(grad.isfinite().all() for grad in grads)
    same = (p == g).all(-1) & (p[:, 2:] > p[:, :2]).all(-1)
    torch.testing.assert_close(loss[same], torch.zeros_like(loss[same]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("fused", BACKENDS)
def test_focal_factor_is_0_without_overlap_and_its_zeroth_power_1(fused):
    p = torch.tensor([[0.0, 0.0, 1.0, 1.0]], dtype=torch.float64, device=DEVICE)
    for kind in SHAPED:
        loss, *grads = run(box_loss(kind, [*EPS, 1.0, 0.5], fused), p, p + 3)
        assert loss == 0
        assert not any(grad.any() for grad in grads)
        assert box_loss(kind, [*EPS, 1.0, 0.0], fused)(p, p + 3) >= 1


@pytest.mark.parametrize("fused", BACKENDS)
def test_siou_at_rest(fused):
    """Equal boxes: edges that coincide share their slopes, which leaves none."""
    p = torch.tensor([[1.0, 2.0, 4.0, 4.0]], dtype=torch.float64, device=DEVICE)
    for got in run(box_loss("siou", EPS, fused), p, p):
        torch.testing.assert_close(got, torch.zeros_like(got), rtol=0, atol=1e-15)


@pytest.mark.parametrize("fused", BACKENDS)
@pytest.mark.parametrize("kind", BOX_KINDS)
def test_nan_stays_nan_and_in_its_lane(kind, fused):
    p, g = (boxes[:3].to(DEVICE) for boxes in random_boxes())
    for shape in [(), (3.0, 0.5)] if TERMS[kind].optional else [()]:
        args = [*EPS, *shape]
        want = run(box_loss(kind, args, fused), p, g)
        bad = p.clone()
        bad[1, 2] = math.nan
        loss, d_p, _ = run(box_loss(kind, args, fused), bad, g)
        assert loss[1].isnan()
        assert torch.equal(loss[::2], want[0][::2])
        assert torch.equal(d_p[::2], want[1][::2])


def logits():
    gen = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(60, generator=gen, dtype=torch.float64)
    return x.to(DEVICE), torch.rand(60, generator=gen, dtype=torch.float64).to(DEVICE)


FORMULAS = [
    ("bce", [2.5]),
    ("focal", [0.25, 2.0, 2.5]),
    ("qfl", [-1.0, 2.0]),
    ("qfl", [0.25, 1.5]),
    ("qfl", [0.75, 0.0]),
    ("varifocal", [0.75, 2.0]),
    ("varifocal", [-1.0, 1.0]),
    ("sse", []),
]


@pytest.mark.parametrize("fused", BACKENDS)
@pytest.mark.parametrize(("kind", "args"), FORMULAS)
def test_label_formula(kind, args, fused):
    x, soft = logits()
    for t in (soft, (soft > 0.5).double(), torch.where(soft > 0.5, soft, 0.0)):
        if fused:
            got = run(lambda x, t=t: ops.label_loss(x, t, kind, args, "none"), x)
        else:
            got = run(lambda x, t=t: reference.LABEL_TERMS[kind](x, t, args), x)
        for a, b in zip(got, run(lambda x, t=t: label_term(kind, x, t, args), x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fused", BACKENDS)
@pytest.mark.parametrize("gamma", [*GAMMAS, 1.5])
def test_qfl_where_the_prediction_is_its_target(gamma, fused):
    x, t = torch.zeros(3, dtype=torch.float64, device=DEVICE), torch.full((3,), 0.5, device=DEVICE).double()
    if fused:
        loss, d_x = run(lambda x: ops.label_loss(x, t, "qfl", [-1.0, gamma], "none"), x)
    else:
        loss, d_x = run(lambda x: reference.LABEL_TERMS["qfl"](x, t, [-1.0, gamma]), x)
    torch.testing.assert_close(loss, torch.full_like(x, math.log(2) if gamma == 0 else 0.0))
    assert not d_x.any()


def test_softmax_formula():
    """The reference's, which check_row_term compares the kernel's with: PyTorch's own, where that has digits."""
    gen = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 5, 7, generator=gen, dtype=torch.float64)
    got = run(reference.LABEL_TERMS["softmax_ce"], x, t)
    want = run(lambda x, t: -t * x.log_softmax(-1), x, t)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
