"""fusedyolo.functional against what torchvision gave, and torchvision's rules for shapes, dtypes and reductions.

What torchvision lacks is checked, term by term, in test_terms.py.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re

import golden
import numpy as np
import pytest
import torch
from conftest import DEVICE

from fusedyolo import functional, ops, reference
from fusedyolo.terms import TERMS, term_names

BACKENDS = ["torch", "triton"]
IOU_KINDS = term_names("iou", users=True)
BOXES = {
    "giou": functional.generalized_box_iou_loss,
    "diou": functional.distance_box_iou_loss,
    "ciou": functional.complete_box_iou_loss,
}
LABELS = {
    "focal": functional.sigmoid_focal_loss,
    "qfl": functional.quality_focal_loss,
    "varifocal": functional.varifocal_loss,
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def assert_close(got, want, bound, what):
    """Within ``bound``, relative to the largest entry; only where torchvision is finite itself."""
    assert got.shape == want.shape, what
    want, got = want.double(), got.double().cpu()
    known = want.isfinite()
    assert got[known].isfinite().all(), what
    if not known.any():
        return
    error = (got - want)[known].abs().max()
    assert error <= bound * max(1.0, want[known].abs().max().item()), (what, error)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", BOXES)
@pytest.mark.parametrize("name", golden.names("torch", "tv_boxloss_*"))
def test_box_losses_of_torchvision(name, kind, dtype, backend):
    data = golden.arrays(name)
    boxes = [data[key].to(DEVICE, dtype).requires_grad_() for key in ("boxes1", "boxes2")]
    checked = 0
    bound = TOLERANCE[dtype] if backend == "torch" else max(TOLERANCE[dtype], 1e-9)  # eps reaches a kernel as float32
    for reduction in ("none", "sum", "mean"):
        loss = BOXES[kind](*boxes, reduction=reduction, backend=backend)
        assert loss.dtype == dtype
        assert_close(loss.detach(), data[f"{kind}_{reduction}"], bound, reduction)
        grads = torch.autograd.grad(loss.sum(), boxes)
        for i, grad in enumerate(grads, 1):
            want = data.get(f"{kind}_{reduction}_grad{i}")
            if want is not None:
                checked += 1
                assert_close(grad, want, bound, (reduction, i))
    assert checked == 4


def focal_cases(name):
    return golden.arrays(name)["meta"]["cases"]


FOCAL = [(name, *case) for name in golden.names("torch", "tv_focal_*") for case in focal_cases(name)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("name", "key", "alpha", "gamma"), FOCAL)
def test_focal_loss_of_torchvision(name, key, alpha, gamma, dtype, backend):
    data = golden.arrays(name)
    inputs, targets = data["logits"].to(DEVICE, dtype).requires_grad_(), data["targets"].to(DEVICE, dtype)
    exact = backend == "torch" or float(np.float32(alpha)) == alpha
    bound = TOLERANCE[dtype] if exact else max(TOLERANCE[dtype], 1e-7)  # a number reaches a kernel as float32
    for reduction in ("none", "sum", "mean"):
        loss = functional.sigmoid_focal_loss(inputs, targets, alpha, gamma, reduction, backend=backend)
        assert loss.dtype == dtype
        assert_close(loss.detach(), data[f"{reduction}_{key}"], bound, reduction)
        (grad,) = torch.autograd.grad(loss.sum(), inputs)
        assert_close(grad, data[f"grad_{'mean' if reduction == 'mean' else 'sum'}_{key}"], bound, reduction)


def pairs(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    low, size = torch.rand(2, 2, *shape, 2, generator=generator, dtype=torch.float64)
    boxes = torch.cat([low, low + 0.1 + size], -1)
    return [box.to(DEVICE, dtype).requires_grad_() for box in boxes]


def run(function, inputs, *args, **kwargs):
    loss = function(*inputs, *args, **kwargs)
    return loss.detach(), *torch.autograd.grad(
        (loss * torch.arange(1, loss.numel() + 1, device=loss.device).view(loss.shape)).sum(), inputs
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", IOU_KINDS)
def test_boxes_of_any_number_of_dimensions(kind, backend):
    boxes, options = pairs(2, 3), {"kind": kind, "backend": backend, "image_size": (3, 4)}
    want = run(functional.box_iou_loss, [b.detach().reshape(6, 4).requires_grad_() for b in boxes], **options)
    got = run(functional.box_iou_loss, boxes, **options)
    assert got[0].shape == (2, 3)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.flatten(), b.flatten(), rtol=0, atol=0)
    strided = [b.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_() for b in boxes]
    for a, b in zip(run(functional.box_iou_loss, strided, **options), got, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    one = functional.box_iou_loss(boxes[0][1, 2], boxes[1][1, 2], **options)
    assert one.shape == ()
    torch.testing.assert_close(one.detach(), got[0][1, 2], rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", BOXES.values())
def test_boxes_broadcast(function, backend):
    many, one = pairs(3)[0], pairs(1, seed=1)[0]
    loss, d_many, d_one = run(function, (many, one), backend=backend)
    want, w_many, w_one = run(function, (many, one.expand(3, 4)), backend=backend)
    torch.testing.assert_close((loss, d_many, d_one), (want, w_many, w_one.sum(0, keepdim=True)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_eps(backend):
    """torchvision's complete_box_iou_loss hands its eps to alpha alone; ours of that kind uses it everywhere."""
    boxes = pairs(5, dtype=torch.float64)
    d = [functional.distance_box_iou_loss(*boxes, eps=eps, backend=backend) for eps in (1e-7, 0.5)]
    c = [functional.complete_box_iou_loss(*boxes, eps=eps, backend=backend) for eps in (1e-7, 0.5)]
    b = [functional.box_iou_loss(*boxes, "ciou", eps=eps, backend=backend) for eps in (1e-7, 0.5)]
    torch.testing.assert_close(b[0], c[0], rtol=1e-12, atol=0)
    v = 4 / math.pi**2 * (torch.atan2(*sides(boxes[1])) - torch.atan2(*sides(boxes[0]))) ** 2
    overlap = 1 - functional.box_iou_loss(*boxes, "iou", backend=backend)
    torch.testing.assert_close(c[1] - d[0], v * v / (1 - overlap + v + 0.5), rtol=1e-6, atol=1e-12)
    assert ((b[1] - c[1]).abs() > 1e-3).all()
    assert ((d[1] - d[0]).abs() > 1e-3).all()


def sides(boxes):
    return boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_is_computed_in_float32(dtype, backend):
    boxes = pairs(7, dtype=dtype)
    logits, labels = torch.randn(9, device=DEVICE).to(dtype).requires_grad_(), torch.rand(9, device=DEVICE).to(dtype)
    for kind, function in BOXES.items():
        got = run(function, boxes, backend=backend)
        want = run(function, [b.detach().float().requires_grad_() for b in boxes], backend=backend)
        assert [t.dtype for t in got] == [torch.float32, dtype, dtype], kind
        torch.testing.assert_close(got[0], want[0], rtol=0, atol=0)
        for grad, exact in zip(got[1:], want[1:], strict=True):  # Triton's interpreter rounds bfloat16 towards 0
            torch.testing.assert_close(grad.float(), exact, rtol=torch.finfo(dtype).eps, atol=1e-7)
    loss = functional.sigmoid_focal_loss(logits, labels, reduction="sum", backend=backend)
    want = functional.sigmoid_focal_loss(logits.detach().float(), labels.float(), reduction="sum", backend=backend)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), want, rtol=1e-6, atol=0)
    assert torch.autograd.grad(loss, logits)[0].dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_dtypes(backend):
    whole = torch.tensor([[0, 0, 4, 4], [1, 2, 5, 8]], device=DEVICE)
    other = torch.tensor([[1, 1, 3, 6], [1, 2, 5, 8]], device=DEVICE)
    for function in BOXES.values():
        want = function(whole.float(), other.float(), backend=backend)
        assert torch.equal(function(whole, other, backend=backend), want)
        assert function(whole.double(), other.float(), backend=backend).dtype == torch.float64
    x, t = torch.randn(4, device=DEVICE), torch.tensor([0, 1, 1, 0], device=DEVICE)
    want = functional.sigmoid_focal_loss(x, t.float(), backend=backend)
    assert torch.equal(functional.sigmoid_focal_loss(x, t, backend=backend), want)
    assert functional.sigmoid_focal_loss(x, t.double(), backend=backend).dtype == torch.float64
    torch.testing.assert_close(
        functional.sigmoid_focal_loss(x.bfloat16().float(), t.float(), backend=backend),
        functional.sigmoid_focal_loss(x.bfloat16(), t.float(), backend=backend),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing(backend):
    """The mean of no boxes is 0, of no logits NaN: torchvision's rule."""
    boxes = pairs(0)
    for function in BOXES.values():
        assert function(*boxes, backend=backend).shape == (0,)
        for reduction in ("sum", "mean"):
            loss = function(*boxes, reduction=reduction, backend=backend)
            assert loss.shape == ()
            assert loss == 0
            assert [grad.shape for grad in torch.autograd.grad(loss, boxes)] == [(0, 4)] * 2
    x = torch.zeros(0, 3, requires_grad=True, device=DEVICE)
    for function in LABELS.values():
        assert function(x, x.detach(), backend=backend).shape == (0, 3)
        assert function(x, x.detach(), reduction="sum", backend=backend) == 0
        assert function(x, x.detach(), reduction="mean", backend=backend).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_focal_targets_may_need_a_gradient(backend):
    x, t = (
        torch.randn(5, dtype=torch.float64, device=DEVICE),
        torch.rand(5, dtype=torch.float64, device=DEVICE).requires_grad_(),
    )
    loss = functional.sigmoid_focal_loss(x, t, gamma=0, alpha=-1, reduction="sum", backend=backend)
    torch.testing.assert_close(torch.autograd.grad(loss, t)[0], -x, rtol=1e-10, atol=1e-12)  # d BCE / d t


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    boxes = pairs(2, dtype=torch.float64, seed=3)
    kinds = (kind for kind in IOU_KINDS if kind != "ciou")  # which holds its alpha constant, as all do a focal factor
    for kind, reduction in zip(kinds, itertools.cycle(("mean", "none", "sum")), strict=False):
        options = {"kind": kind, "reduction": reduction, "backend": backend, "image_size": 2}
        for alpha in (1.0, 1.5):
            assert torch.autograd.gradcheck(
                lambda a, b, options=options, alpha=alpha: functional.box_iou_loss(a, b, alpha=alpha, **options),
                boxes,
                fast_mode=True,
            )
    x = torch.randn(5, dtype=torch.float64, requires_grad=True, device=DEVICE)
    t = torch.tensor([0.0, 0.3, 1.0, 0.0, 0.7], dtype=torch.float64, device=DEVICE)
    for function in LABELS.values():
        assert torch.autograd.gradcheck(lambda x, f=function: f(x, t, backend=backend), x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled(backend):
    def losses(a, b, x, t):
        boxes = [function(a, b, "mean", backend=backend) for function in BOXES.values()]
        options = {"backend": backend, "alpha": 2.0, "gamma": 0.5, "image_size": (3, 4)}
        boxes.append(functional.box_iou_loss(a, b, "mpdiou", "mean", **options))
        return sum(boxes) + sum(function(x, t, reduction="mean", backend=backend) for function in LABELS.values())

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    for n in (5, 6, 7):
        x = torch.randn(n, 2, requires_grad=True, device=DEVICE)
        inputs = (*pairs(n), x, torch.rand(n, 2, device=DEVICE))
        got, want = compiled(*inputs), losses(*inputs)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
        grads = torch.autograd.grad(got, inputs[:3]), torch.autograd.grad(want, inputs[:3])
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-8)


def test_arguments_are_those_of_torchvision():
    def defaults(function):
        return {
            name: p.default for name, p in inspect.signature(function).parameters.items() if p.default is not p.empty
        }

    for function in BOXES.values():
        assert list(inspect.signature(function).parameters) == ["boxes1", "boxes2", "reduction", "eps", "backend"]
        assert defaults(function) == {"reduction": "none", "eps": 1e-7, "backend": "auto"}
    focal = functional.sigmoid_focal_loss
    assert list(inspect.signature(focal).parameters) == ["inputs", "targets", "alpha", "gamma", "reduction", "backend"]
    assert defaults(focal) == {"alpha": 0.25, "gamma": 2, "reduction": "none", "backend": "auto"}
    for kind, function in LABELS.items():
        assert defaults(function) == {**TERMS[kind].numbers, "reduction": "none", "backend": "auto"}


@pytest.mark.parametrize("kind", term_names("iou"))
def test_opcheck_boxes(kind):
    boxes = pairs(3)
    args = [1e-7, 1e-7, 3.0, 0.5] if TERMS[kind].optional else [1e-7, 1e-7]
    extent = [4.0, 3.0] if TERMS[kind].needs_extent else None
    torch.library.opcheck(ops.box_loss, (*boxes, kind, args, "mean", extent))


@pytest.mark.parametrize("kind", term_names("objectness"))
def test_opcheck_labels(kind):
    args = [*TERMS[kind].numbers.values(), *TERMS[kind].optional.values()]
    x, t = torch.randn(3, 2, device=DEVICE, requires_grad=True), torch.rand(3, 2, device=DEVICE)
    torch.library.opcheck(ops.label_loss, (x, t, kind, args, "none"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", IOU_KINDS)
def test_alpha_and_gamma(kind, backend):
    """Powers of what the plain loss is made of, where that is known: the IoU and one penalty."""
    boxes = pairs(6, dtype=torch.float64)
    options = {"kind": kind, "backend": backend, "image_size": (3, 4), "eps": 0.0}
    value = 1 - functional.box_iou_loss(*boxes, "iou", eps=0.0, backend=backend)
    plain = functional.box_iou_loss(*boxes, **options)
    focal = functional.box_iou_loss(*boxes, gamma=0.5, **options)
    torch.testing.assert_close(focal, value.sqrt() * plain, rtol=1e-12, atol=0)
    if kind in ("iou", "giou", "diou", "siou"):
        squared = functional.box_iou_loss(*boxes, alpha=2, **options)
        torch.testing.assert_close(squared, 1 - value**2 + (plain - 1 + value) ** 2, rtol=1e-12, atol=1e-14)
    grads = [torch.autograd.grad(loss.sum(), boxes, retain_graph=True) for loss in (plain, focal)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b, a * value.detach().sqrt()[:, None], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_image_size(backend):
    boxes = pairs(4, dtype=torch.float64)
    value = functional.box_iou_loss(*boxes, "iou", backend=backend)
    d1, d2 = (((boxes[0] - boxes[1])[:, i : i + 2] ** 2).sum(-1) for i in (0, 2))
    got = functional.box_iou_loss(*boxes, "mpdiou", backend=backend, image_size=(3, 4))
    torch.testing.assert_close(got, value + (d1 + d2) / 25, rtol=1e-12, atol=0)
    got = functional.box_iou_loss(*boxes, "mpdiou", backend=backend, image_size=5)
    torch.testing.assert_close(got, value + (d1 + d2) / 50, rtol=1e-12, atol=0)
    assert torch.equal(functional.box_iou_loss(*boxes, "iou", backend=backend, image_size=5), value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"kind": "ciou_plus"},
            f"kind: 'ciou_plus', want one of {', '.join(map(repr, IOU_KINDS))}",
        ),
        ({"kind": "mpdiou"}, "image_size: None, want (height, width)"),
        ({"kind": "mpdiou", "image_size": (480,)}, "image_size: (480,), want (height, width)"),
        ({"kind": "mpdiou", "image_size": (480, 0)}, "image_size: 0, want a finite number > 0"),
        ({"image_size": -1}, "image_size: -1, want a finite number > 0"),
        ({"alpha": 0}, "alpha: 0, want a finite number > 0"),
        ({"alpha": math.inf}, "alpha: inf, want a finite number > 0"),
        ({"gamma": -0.5}, "gamma: -0.5, want a finite number >= 0"),
        ({"eps": -1.0, "alpha": 2.0}, "eps: -1.0, want a finite number >= 0"),
    ],
)
def test_bad_arguments_of_boxes(arguments, message):
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        functional.box_iou_loss(*pairs(2), **arguments)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (functional.quality_focal_loss, {"alpha": 1.5}, "alpha: 1.5, want a number in [0, 1], or -1 for none"),
        (functional.quality_focal_loss, {"gamma": -1}, "gamma: -1, want a finite number >= 0"),
        (functional.quality_focal_loss, {"reduction": "max"}, "reduction: 'max', want one of 'none', 'mean', 'sum'"),
        (functional.quality_focal_loss, {"backend": "cpu"}, "backend: 'cpu', want one of 'auto', 'triton', 'torch'"),
        (functional.varifocal_loss, {"alpha": -0.5}, "alpha: -0.5, want a finite number >= 0, or -1 for none"),
        (functional.varifocal_loss, {"alpha": math.nan}, "alpha: nan, want a finite number >= 0, or -1 for none"),
        (functional.varifocal_loss, {"gamma": math.nan}, "gamma: nan, want a finite number >= 0"),
        (functional.varifocal_loss, {"targets": torch.zeros(3)}, "targets: shape (3,), want (2, 2) as inputs"),
        (functional.varifocal_loss, {"inputs": None}, "inputs: None, want a tensor"),
    ],
)
def test_bad_arguments_of_labels(function, arguments, message):
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        function(**{"inputs": torch.zeros(2, 2), "targets": torch.zeros(2, 2), **arguments})


def test_operators_refuse_what_they_cannot_compute():
    x = torch.zeros(2, 2, device=DEVICE)
    with pytest.raises(ValueError, match="kind: 'softmax_ce', want a label term that is elementwise"):
        ops.label_loss(x, x, "softmax_ce", [], "none")
    with pytest.raises(ValueError, match="extent: None, want the width and height of the image"):
        reference.BOX_TERMS["mpdiou"](*pairs(2), (0.0, 0.0))
