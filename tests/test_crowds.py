"""Crowded cells give the same bits on every run, and thousands of objects in an image need no table of pairs."""

from __future__ import annotations

import time

import pytest
import torch
from conftest import DEVICE
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusedyolo import ScaledYOLOv4Loss, Targets, YOLOv2Loss, YOLOv3Loss, YOLOv4Loss, YOLOv5Loss

CLASSES = 2
LOSSES = {
    "v2": lambda **kw: YOLOv2Loss([(1.0, 1.0)], CLASSES, 8, **kw),
    "v2 of darknet": lambda **kw: YOLOv2Loss([(1.0, 1.0)], CLASSES, 8, recipe="darknet", **kw),
    "v3": lambda **kw: YOLOv3Loss([[(8, 8)]], (8,), CLASSES, **kw),
    "v3 by an IoU band": lambda **kw: YOLOv3Loss(
        [[(8, 8)]], (8,), CLASSES, assigner="iou_band", iou_band=(0.1, 0.2), **kw
    ),
    "v4": lambda **kw: YOLOv4Loss([[(8, 8)]], (8,), CLASSES, recipe="darknet", **kw),
    "v5": lambda **kw: YOLOv5Loss([[(8, 8)]], (8,), CLASSES, **kw),
    "scaled": lambda **kw: ScaledYOLOv4Loss(
        [[(8, 8)], [(1e5, 1e5)], [(1e5, 1e5)]], (8, 8, 8), CLASSES, **kw
    ),
}


class Watch(TorchDispatchMode):
    """The largest tensor that an operation returned, and the bytes of all that were allocated, views aside."""

    def __init__(self):
        super().__init__()
        self.largest = self.allocated = 0
        self._seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {value.untyped_storage()._cdata for value in tree_leaves((args, kwargs)) if torch.is_tensor(value)}
        for value in tree_leaves(out):
            if torch.is_tensor(value) and value.untyped_storage()._cdata not in inputs:
                self.largest = max(self.largest, value.numel())
                self.allocated += value.numel() * value.element_size()
        return out


def make_preds(name, dtype=torch.float32, width=2, batch=1):
    generator = torch.Generator().manual_seed(0)
    levels = 3 if name == "scaled" else 1
    preds = [torch.randn(batch, 5 + CLASSES, 1, width, generator=generator) for _ in range(levels)]
    return [pred.to(DEVICE, dtype).requires_grad_() for pred in preds]


def make_rows(n, width=2):
    """Objects of about a cell, many of them on every cell of a map."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.rand(n, 6, generator=generator)
    rows[:, 0] = 0
    rows[:, 1] = torch.randint(CLASSES, (n,), generator=generator)
    rows[:, 4] = (0.5 + rows[:, 4]) / width
    rows[:, 5] = 0.5 + rows[:, 5]
    return rows.to(DEVICE)


def outcome(criterion, preds, targets):
    out = criterion(preds[0] if isinstance(criterion, YOLOv2Loss) else preds, targets)
    grads = torch.autograd.grad(out.total, preds)
    return (out.total.detach(), *out.parts.values(), out.num_pos, out.num_invalid, *grads)


@pytest.mark.parametrize("name", LOSSES)
def test_crowded_cells_are_bit_identical_from_run_to_run(name):
    preds, rows = make_preds(name), make_rows(4)
    criterion = LOSSES[name](backend="triton")
    first = outcome(criterion, preds, rows)
    assert 0 < first[4] < 4
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(outcome(criterion, preds, rows), first, strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_a_crowd_by_both_backends(name):
    """Two hundred objects on two cells, in float64."""
    preds, rows = make_preds(name, torch.float64), make_rows(60)
    want, got = (outcome(LOSSES[name](backend=backend), preds, rows) for backend in ("torch", "triton"))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("name", LOSSES)
def test_thousands_of_objects_in_an_image_eagerly(name):
    """Time and memory of the reference are linear in the objects: no tensor of pairs of objects and predictions."""
    width = 300
    preds, criterion = make_preds(name, width=width), LOSSES[name](backend="torch")
    began = time.perf_counter()
    with Watch() as watch:
        results = outcome(criterion, preds, make_rows(5000, width))
    assert time.perf_counter() - began < 60
    assert all(value.isfinite().all() for value in results)
    assert results[4] > 100
    # 5000 * 300 pairs; a chunk of them is 2^18, a row of an object 5 + C numbers for each of its places
    assert watch.largest <= max(2**18, 5000 * 5 * (5 + CLASSES))


KERNELS = {"v2": 200, "v4": 200, "v5": 200}


@pytest.mark.parametrize("name", KERNELS)
def test_thousands_of_objects_in_an_image_by_the_kernels(name):
    n, preds = KERNELS[name], make_preds(name, width=1)
    rows = make_rows(n, 1)
    criterion = LOSSES[name](backend="triton")
    targets = Targets.from_packed(rows, 1)
    began = time.perf_counter()
    with Watch() as watch:
        got = outcome(criterion, preds, targets)
    print(name, n, time.perf_counter() - began)
    assert watch.largest <= 64  # one prediction: state, kept gradient, partial sums
    want = outcome(LOSSES[name](backend="torch"), preds, targets)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
