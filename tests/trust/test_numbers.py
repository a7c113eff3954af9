"""Half precision is as good as eager PyTorch's; autocast and a GradScaler change nothing; no NaN of finite numbers."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import peers
import pytest
import torch
import triton
import triton.language as tl
from conftest import DEVICE
from fusedyolo.kernels.launch import LARGEST_SIDE
from torch import Tensor
from trust.cases import ALL, BACKENDS, CASES, RECIPES, Problem, Result, step

import fusedyolo
from fusedyolo.drivers.protocol import LOGIT, POSITIVE, UNIT
from fusedyolo.reference import LABEL_TERMS
from fusedyolo.terms import term_names
from fusedyolo.tools.registry import Case

SCALE = 2.0**16  # a GradScaler's first one
TURNED = 0.0 if DEVICE == "cpu" else torch.finfo(torch.float32).eps  # of the largest: a rounding the other way


def spread(problem: Problem, dtype: torch.dtype) -> list[Tensor]:
    """Logits to 120 either way, and boxes from a thousandth of a pixel to 1e5 pixels, as far as their type goes."""
    preds = problem.predictions(torch.float64)
    generator = torch.Generator().manual_seed(7)
    found = []
    for pred in preds:
        far = 120 * torch.rand(pred.shape, generator=generator, dtype=torch.float64).to(DEVICE)
        rare = torch.rand(pred.shape, generator=generator).to(DEVICE) < 0.2
        sizes = pred.detach()
        found.append(torch.where(rare, sizes.sign() * far, sizes))
    return [_tamed(problem, i, pred).to(dtype).requires_grad_() for i, pred in enumerate(found)]


def _tamed(problem: Problem, at: int, pred: Tensor) -> Tensor:
    """Sizes whose logarithms are predicted end at 1e5 pixels; distances are positive, fractions at most 1."""
    case, driver = problem.case, problem.case.driver
    head = problem.criterion("torch").head
    pieces = driver.pieces(head, problem.frame) * max(1, len(case.branches))
    each = len(problem.predictions()) // len(pieces)
    values = pieces[at // max(1, each)].values
    if values in (POSITIVE, UNIT):
        return pred.abs() if values == POSITIVE else pred.abs() % 1
    if driver.kind == "grid":
        pred = pred.clone()
        for anchor in range(pred.shape[1] // (5 + head.num_classes)):
            sizes = pred[:, anchor * (5 + head.num_classes) + 2 :][:, :2]
            sizes.clamp_(-9, 9)
    elif head.decode in ("exp", "delta") and pred.shape[1 if driver.kind == "pick" else -1] == 4:
        pred = pred.clamp(-9, 9)
    return pred


def error(got: Result, want: Result, scale: float = 1.0) -> float:
    """Of gradients, relative to the largest entry; where the type overflows, both do."""
    largest = max(float(grad.abs().max()) for grad in want.grads)
    worst = 0.0
    for a, b in zip(got.grads, want.grads, strict=True):
        over = b.abs() * scale > torch.finfo(a.dtype).max
        assert bool((a.isfinite() | over).all())
        worst = max(worst, float(torch.where(over, 0.0, a.double() / scale - b).abs().max()))
    return worst / largest


@RECIPES
def test_float16_under_autocast_and_a_scaler(case):
    """The scale reaches the gradient before it is rounded; the total is float32, and as good as eager's."""
    problem = Problem(case)
    preds, rows = spread(problem, torch.float16), problem.rows(3)
    exact = step(problem.bind("torch"), [pred.detach().double() for pred in preds], rows)
    with torch.autocast(DEVICE, dtype=torch.float16 if DEVICE == "cuda" else torch.bfloat16):
        fused = step(problem.bind("triton"), preds, rows, SCALE)
    eager = step(problem.bind("torch"), preds, rows, SCALE)
    assert fused.total.dtype == torch.float32
    assert error(fused, exact, SCALE) <= error(eager, exact, SCALE) + TURNED
    torch.testing.assert_close(fused.total.double(), exact.total, rtol=1e-4, atol=0)


@RECIPES
def test_bfloat16(case):
    problem = Problem(case)
    preds, rows = spread(problem, torch.bfloat16), problem.rows(3)
    exact = step(problem.bind("torch"), [pred.detach().double() for pred in preds], rows)
    fused, eager = (step(problem.bind(backend), preds, rows) for backend in ("triton", "torch"))
    assert error(fused, exact) <= error(eager, exact) + TURNED


def with_huge(problem: Problem, dtype: torch.dtype, huge: float, share: float) -> list[Tensor]:
    """Predictions of which this share are huge, as far as they may be: of either sign, positive, or fractions."""
    head, driver = problem.criterion("torch").head, problem.case.driver
    pieces = driver.pieces(head, problem.frame) * max(1, len(problem.case.branches))
    preds = problem.predictions(dtype)
    generator = torch.Generator().manual_seed(3)
    for i, pred in enumerate(preds):
        far = (torch.rand(pred.shape, generator=generator) < share).to(DEVICE)
        value = torch.full_like(pred, 1.0).detach() * torch.tensor(huge, dtype=torch.float64).to(dtype)
        may_be_less = pieces[i * len(pieces) // len(preds)].values == LOGIT
        pred.data = torch.where(far, torch.where((pred > 0) | (not may_be_less), value, -value), pred.data)
    return preds


LARGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
SQUARES = ("YOLOv1", "YOLOv2", "YOLOv3")  # of errors: their slopes leave a type by a factor of 2, and by gains


WAYS = [("torch", dtype, share) for dtype in LARGEST for share in (0.15, 0.6)]
WAYS += [("triton", torch.float32, 0.6), ("triton", torch.float16, 0.6)]  # of fewer, the interpreter is slow


@RECIPES
@pytest.mark.parametrize(("backend", "dtype", "share"), WAYS, ids=lambda way: str(way).rpartition("torch.")[2])
def test_finite_predictions_have_finite_gradients(case, backend, dtype, share):
    """Up to the largest number of a type. A total whose mathematics leave it is infinite, as the peers' is, and no
    NaN; a gradient is neither, but for errors that are squared.
    """
    problem = Problem(case)
    got = step(problem.bind(backend), with_huge(problem, dtype, LARGEST[dtype], share), problem.rows(6))
    assert not any(bool(number.isnan()) for number in (got.total, *got.parts.values()))
    for grad in got.grads:
        assert not grad.isnan().any()
        assert case.loss in SQUARES or bool(grad.isfinite().all())


@BACKENDS
@RECIPES
def test_numbers_that_can_be_squared_are_finite(case, backend):
    problem = Problem(case)
    got = step(problem.bind(backend), with_huge(problem, torch.float32, 1e16, 0.6), problem.rows(6))
    assert all(bool(number.isfinite().all()) for number in (got.total, *got.parts.values(), *got.grads))


@BACKENDS
@pytest.mark.parametrize("term", term_names("iou", users=True))
@pytest.mark.parametrize("name", ["RetinaNet", "FCOS", "YOLOX", "YOLOv4/paper"])
def test_iou_terms_of_huge_predictions(name, term, backend):
    """Whatever says the box; MPDIoU squares the size of a box, of whose logarithm that is no finite number."""
    option = "loss_type" if name in ("RetinaNet", "FCOS") else "iou_loss"
    problem = Problem(CASES[name], options={option: term})
    got = step(problem.bind(backend), with_huge(problem, torch.float32, LARGEST[torch.float32], 0.6), problem.rows(6))
    assert not any(bool(number.isnan()) for number in (got.total, *got.parts.values()))
    for grad in got.grads:
        assert not grad.isnan().any()
        assert term == "mpdiou" or bool(grad.isfinite().all())


VARIANTS = {  # whose terms are other ones
    "RetinaNet": [{"class_weights": [0.0, 1.0, 3.0], "gamma": 2.5, "alpha": -1}, {"loss_type": "mpdiou"}],
    "SSD": [{"class_weights": [1.0, 0.0, 2.0, 3.0], "reduction": "none"}],
    "YOLOv5": [{"class_weights": [0.0, 1.0, 3.0], "fl_gamma": 2.5, "cls_pw": 2.0}, {"cls_pw": 3.0, "obj_pw": 3.0}],
    "YOLOv8": [{"rule": "libreyolo", "beta": 0.0, "assign_iou": "giou", "cls_loss": "qfl", "reg_max": 4}],
    "YOLOX": [{"iou_loss": "mpdiou"}, {"class_weights": [0.0, 1e3, 1.0]}],
    "YOLOv4/paper": [{"iou_loss": "mpdiou"}, {"class_weights": [0.0, 1e3, 1.0], "cls_loss": "focal"}],
}


@BACKENDS
@pytest.mark.parametrize("name", VARIANTS)
def test_weights_of_0_of_the_largest(name, backend):
    kinds = [kind for kind in WEIGHTS if kind != "large" or backend == "triton"]  # autograd multiplies by them first
    for options in VARIANTS[name]:
        problem = Problem(CASES[name], options=options)
        for kind in kinds:
            for dtype, largest in LARGEST.items():
                preds = [pred.requires_grad_() for pred in with_huge(problem, dtype, largest, 0.6)]
                out = problem.bind(backend)(preds, weighed_rows(problem, kind))
                grads = torch.autograd.grad(out.total.sum(), preds)
                found = (out.total, *out.parts.values(), *grads)
                assert not any(bool(number.isnan().any()) for number in found), (options, kind, dtype)


GAINS = {
    "YOLOv1/paper": ("lambda_coord", "lambda_noobj"),
    "YOLOv2/region": ("lambda_coord", "lambda_obj", "lambda_noobj", "lambda_class"),
    "YOLOv2/darknet": ("coord_scale", "object_scale", "noobject_scale", "class_scale"),
    "YOLOv3/darknet": ("iou_normalizer", "obj_normalizer", "cls_normalizer"),
    "YOLOv5": ("box", "obj", "cls"),
    "YOLOv8": ("box", "cls", "dfl"),
}
"""Arguments that are 0 one at a time, which the reference withstands up to the largest number of a type."""


WEIGHTS = {
    "none": None,
    "some": [1.0, 0.0, 2.0] * 2,
    "zeros": [0.0] * 6,
    "large": [1e30, 0.0, 1e20] * 2,
}
"""Of six rows."""


def weighed_rows(problem: Problem, kind: str) -> Tensor:
    rows, weights = problem.rows(6), WEIGHTS[kind]
    return rows if weights is None else torch.cat((rows, torch.tensor(weights, device=DEVICE)[:, None]), 1)


def with_zeros(case: Case) -> list[dict[str, Any]]:
    """Options by which something is weighed with 0: nothing, one class, all classes, each part."""
    plain = Problem(case).criterion("torch")
    one, *others = [0.0] + [1.0] * (plain.head.num_classes - 1)
    of_classes = [{"class_weights": [one, *others]}, {"class_weights": [0.0] * (1 + len(others))}]
    return [{}, *of_classes, *({name: 0.0} for name in GAINS.get(case.name, ()))]


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_nothing_infinite_is_weighed_with_0(case):
    """Weights of rows, of one class and of all, and gains, of 0: a term that leaves its type and its slope count for
    nothing. A NaN shows all the same.
    """
    for given in with_zeros(case):
        problem = Problem(case, options=given)
        for dtype, largest in LARGEST.items():
            preds = [pred.requires_grad_() for pred in with_huge(problem, dtype, largest, 0.6)]
            for kind in ("none", "some"):
                out = problem.bind("torch")(preds, weighed_rows(problem, kind))
                grads = torch.autograd.grad(out.total.sum(), preds)
                assert not any(bool(number.isnan().any()) for number in (out.total, *out.parts.values(), *grads)), given
        spoilt = [pred.detach().fill_(float("nan")) for pred in preds]
        for backend in ("torch", "triton"):
            rows = weighed_rows(problem, "some")
            assert problem.bind(backend)([pred.float() for pred in spoilt], rows).total.isnan(), given


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_kernels_weigh_nothing_infinite_with_0(case, kind):
    """As the reference in float64, as far as float32 goes; sums before they are divided may leave it."""
    # of boxes whose squared distances are all infinite float32 knows no nearest
    one_box = {"num_boxes": 1} if case.name == "YOLOv1/darknet" else {}
    for given in with_zeros(case):
        problem = Problem(case, options=given | one_box)
        rows, largest = weighed_rows(problem, kind), max(WEIGHTS[kind] or [1.0])
        for huge in (1e30, LARGEST[torch.float32]):
            preds = with_huge(problem, torch.float32, huge, 0.6)
            got = step(problem.bind("triton"), preds, rows)
            want = step(problem.bind("torch"), [pred.detach().double() for pred in preds], rows)
            assert got.counts == want.counts
            for a, b in zip(got.tensors, want.tensors, strict=True):
                assert not a.isnan().any(), (given, huge)
                finite = a.isfinite() | (b.abs() < 1e36)
                near = ((a.double() - b)[finite].abs() <= 1e-4 * (b[finite].abs() + largest)).all()
                assert near, (given, huge)


SIDES = (1e-38, 1e-12, 1e12, 1e30, float(np.nextafter(np.float32(LARGEST_SIDE), np.float32(0))), LARGEST_SIDE, 3e38)


@BACKENDS
@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_boxes_of_any_side(case, backend):
    """Up to 2^100 images, which float32 still holds in pixels; what is larger is invalid, as what is infinite is."""
    problem = Problem(case)
    wide = problem.rows(2 * len(SIDES))
    wide[:, 4], wide[::2, 5] = torch.tensor(SIDES).repeat_interleave(2), torch.tensor(SIDES)
    for rows in (wide, wide[:, [0, 1, 3, 2, 5, 4]]):
        for row in (*rows.split(1), rows):
            got = step(problem.bind(backend), problem.predictions(), row.to(DEVICE))
            assert got.counts[1] == int((row[:, 4:] >= LARGEST_SIDE).any(1).sum())
            assert all(bool(number.isfinite().all()) for number in got.tensors), row


@triton.jit
def times(weight, value, ZEROS: tl.constexpr = True):
    """What ``weigh`` is not."""
    return weight * value


@pytest.mark.interpreter("compiled kernels keep the functions they were compiled with")
@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("YOLOv1/paper", "cells"),
        ("YOLOv3/paper", "grid.positives"),
        ("SSD", "dense.ranked"),
        ("YOLOX", "picks.box"),
    ],
)
def test_a_plain_product_is_seen(name, module, monkeypatch):
    monkeypatch.setattr(import_module(f"fusedyolo.kernels.{module}"), "weigh", times)
    with pytest.raises(AssertionError):
        test_kernels_weigh_nothing_infinite_with_0(CASES[name], "some")


@BACKENDS
@pytest.mark.parametrize("side", [1.0, 0.9])
def test_distributions_next_to_the_largest(side, backend):
    """Of distances, each sure to be one cell; the true ones are that, or lie between two of which one has no chance."""
    problem = Problem(CASES["YOLOv8"])
    assert problem.maps == ((2, 2),)
    rows = torch.tensor([[0, 1, 0.25, 0.25, side, side], [1, 0, 0.75, 0.25, side, side]], device=DEVICE)
    for huge in (1e30, LARGEST[torch.float32]):
        boxes, scores = problem.predictions()
        sides = torch.full_like(boxes, -huge).detach().unflatten(1, (4, -1))
        sides[:, :, 1] = huge
        preds = [sides.flatten(1, 2), scores]
        got = step(problem.bind(backend), preds, rows)
        want = step(problem.bind("torch"), [pred.detach().double() for pred in preds], rows)
        assert got.counts == want.counts == (2, 0)
        assert not any(bool(number.isnan().any()) for number in got.tensors)
        assert got.parts["dfl"] == 0 if side == 1 else got.parts["dfl"] > 1e27
        for a, b in zip(got.grads, want.grads, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def of_torchvision(problem: Problem, preds: list[Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    """FCOS's box loss by the formula of the peer, in float64, and its gradient."""
    ops = peers.torchvision().ops
    anchors = problem.geometry["anchors"].double()
    row = fusedyolo.assign(problem.criterion("torch"), problem.pack(preds), rows, **problem.geometry).row
    has = row >= 0
    centre, side = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
    raw = preds[1].detach().double().requires_grad_()
    boxes = torch.cat((centre - raw[..., :2] * side, centre + raw[..., 2:] * side), -1)[has]
    true = rows[row[has], 2:6].double() * torch.tensor(problem.size[::-1] * 2, device=DEVICE)
    true = torch.cat((true[:, :2] - true[:, 2:] / 2, true[:, :2] + true[:, 2:] / 2), 1)
    loss = ops.generalized_box_iou_loss(boxes, true, "sum") / has.sum()
    return loss.detach(), torch.autograd.grad(loss, raw)[0]


@pytest.mark.parametrize("far", [10.0, 1e5, 1e8])
def test_distances_far_below_0(far):
    """Of boxes turned inside out, whose enclosing box is the true one. In float32 all that is left of the sum of a far
    and a near distance is the far one: there a box is right if all of its distances are as far.
    """
    problem = Problem(CASES["FCOS"])
    rows = problem.rows(6)
    for some in (True, False):
        preds = [pred.detach() for pred in problem.predictions()]
        drawn = torch.rand(preds[1].shape, generator=torch.Generator().manual_seed(5)).to(DEVICE)
        kept = drawn < 0.5 if some else torch.zeros_like(drawn) > 0
        preds[1] = torch.where(kept, preds[1], -far * drawn)
        value, slope = of_torchvision(problem, preds, rows)
        for backend, dtype in (("torch", torch.float64), ("triton", torch.float64), ("triton", torch.float32)):
            if some and dtype == torch.float32 and far > 10:
                continue
            got = step(problem.bind(backend), [pred.to(dtype) for pred in preds], rows)
            tolerance = 1e-12 if dtype == torch.float64 else 1e-5
            torch.testing.assert_close(got.parts["bbox_regression"].double(), value, rtol=tolerance, atol=0)
            assert (got.grads[1].double() - slope).abs().max() <= tolerance * slope.abs().max(), (some, backend, dtype)


@pytest.mark.parametrize("target", [False, True, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("term", ["focal", "qfl", "varifocal"])
def test_slopes_of_the_largest_logits(term, target):
    """That of a factor which has none is 0, though what it is a factor of leaves the type."""
    for dtype, largest in LARGEST.items():
        if dtype.itemsize >= 4:  # halves are computed in float32
            x = torch.tensor([-largest, -1e4, 0.0, 1e4, largest], dtype=dtype, requires_grad=True)
            t = target if isinstance(target, bool) else torch.full_like(x, target).detach()
            (3.0 * LABEL_TERMS[term](x, t, (0.75, 2.5))).sum().backward()
            assert x.grad.isfinite().all(), dtype


@ALL
def test_autocast_leaves_the_reference_alone(case):
    problem = Problem(case)
    preds, rows = problem.predictions(torch.float16), problem.rows(3)
    want = step(problem.bind("torch"), preds, rows)
    with torch.autocast(DEVICE, dtype=torch.float16 if DEVICE == "cuda" else torch.bfloat16):
        got = step(problem.bind("torch"), preds, rows)
    assert torch.equal(got.total, want.total)
    assert all(map(torch.equal, got.grads, want.grads))


def answers(problem: Problem, rows: Tensor, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Any]:
    """A step of the reference, its counts, and what is assigned, where PyTorch's defaults are these."""
    preds, criterion, geometry = problem.predictions(), problem.criterion("torch"), problem.geometry
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        out = criterion(problem.pack(preds), rows, **geometry)
        grads = torch.autograd.grad(out.total, preds)
        found = fusedyolo.assign(criterion, problem.pack(preds), rows, **geometry)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    fields = [level._asdict() for level in found.levels] if hasattr(found, "levels") else [found._asdict()]
    assigned = [value for field in fields for value in field.values()]
    return [out.total, *out.parts.values(), out.num_pos, out.num_invalid, *grads, *assigned]


@ALL
def test_defaults_of_pytorch_are_of_no_account(case):
    """Numbers are of the type of predictions, counts whole, whatever the default type, which Lightning sets for
    ``precision="bf16-true"``; and all is made where these are.
    """
    levels = range(1 if case.grid or case.one_map else 3)
    problem = Problem(case, maps=tuple((12 >> i, 12 >> i) for i in levels), strides=tuple(4 << i for i in levels))
    rows = problem.rows(150)
    rows = torch.cat((rows, torch.linspace(-0.1, 2.0, len(rows), device=DEVICE)[:, None]), 1)
    want = answers(problem, rows)
    for default in ({"dtype": torch.bfloat16}, {"dtype": torch.float64}, {"device": "meta"}):
        for got, other in zip(answers(problem, rows, **default), want, strict=True):
            if other is None:
                assert got is None
            else:
                assert got.dtype == other.dtype
                assert torch.equal(got, other)
