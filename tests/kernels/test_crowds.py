"""Crowded cells give the same bits on every run, and thousands of objects in an image need no table of pairs."""

from __future__ import annotations

import time

import pytest
import torch
from conftest import DEVICE
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusedyolo import ScaledYOLOv4Loss, Targets, YOLOv2Loss, YOLOv3Loss, YOLOv4Loss, YOLOv5Loss
from fusedyolo.ops.grid import near_places

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
    "scaled": lambda **kw: ScaledYOLOv4Loss([[(8, 8)], [(1e5, 1e5)], [(1e5, 1e5)]], (8, 8, 8), CLASSES, **kw),
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


def looked_at(cy, reach, height, width, tile):
    """Tiles of a plane in which ``_near_rows`` of ``kernels/grid/assign.py`` looks at a row."""
    first = torch.arange(0, height * width, tile)
    last = (first + tile).clamp(max=height * width) - 1
    y = cy * height
    return int(((last // width > y - (1.1 + reach)) & (first // width < y + (0.1 + reach))).sum())


@pytest.mark.parametrize("reach", [0.5, 1.0])
def test_there_is_room_for_a_row_in_every_tile_that_looks_at_it(reach):
    for height, width in ((16, 60), (8, 30), (33, 7), (1, 100), (100, 1), (20, 20)):
        for tile in (16, 64, 192, 512):
            most = max(looked_at(cy, reach, height, width, tile) for cy in torch.linspace(0, 1, 997).tolist())
            assert most <= near_places(reach, [1], [(height, width)], [tile]), (height, width, tile)
    assert near_places(reach, [3, 2], [(16, 60), (1, 1)], [60, 1]) == 3 * (2 + (4 if reach == 1 else 3)) + 2


def test_a_line_of_objects_that_reach_far_by_both_backends():
    """All of them are looked at in as many tiles as can be: what is listed for each fills the room that there is."""
    rows = make_rows(257)
    rows[:, 1], rows[:, 3] = 0, (8.02 + 0.02 * rows[:, 3]) / 16
    rows[:, 4:] = 0.05 + 0.05 * rows[:, 4:]
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, 6, *size, generator=generator).to(DEVICE) for size in ((16, 60), (8, 30))]
    results = []
    for backend in ("triton", "torch"):
        preds = [each.to(DEVICE, torch.float32 if backend == "triton" else torch.float64) for each in maps]
        preds = [pred.requires_grad_() for pred in preds]
        criterion = YOLOv5Loss([[(40, 40)], [(60, 60)]], (8, 16), 1, neighbours=4, anchor_t=50.0, backend=backend)
        results.append(outcome(criterion, preds, rows))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs.to(mine.dtype), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "scaled"])  # it is v5 in the kernels
def test_crowded_cells_are_bit_identical_from_run_to_run(name):
    preds, rows = make_preds(name, width=1), make_rows(3, 1)
    criterion = LOSSES[name](backend="triton")
    first = outcome(criterion, preds, rows)
    assert first[4] == 1
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(outcome(criterion, preds, rows), first, strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_a_crowd_by_both_backends(name):
    """Many objects on two cells, in float64."""
    n = 12 if name in ("v5", "scaled") else 40
    preds, rows = make_preds(name, torch.float64), make_rows(n)
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


def crowd_of_strangers(n, of_map):
    """Objects on one cell: ``of_map`` of them, spread over all rows, of its anchor, the rest too large for it."""
    rows = make_rows(n, 1)
    rows[:, 4:] = 0.5 * rows[:, 4:] + 100.0
    own = torch.linspace(0, n - 1, of_map, device=rows.device).long()
    rows[own, 4:] = 0.5 + 0.2 * torch.rand(of_map, 2, generator=torch.Generator().manual_seed(2)).to(rows)
    return rows


@pytest.mark.parametrize("name", ["v4", "v5"])
def test_thousands_of_objects_in_an_image_by_the_kernels(name):
    """More rows than are searched at a time; in the interpreter each takes milliseconds, so it gets 300 of them."""
    n = 5000 if DEVICE == "cuda" else 300
    preds, rows = make_preds(name, width=1), crowd_of_strangers(n, 4)

    def make(backend):
        if name == "v4":  # most objects are for an anchor of another level
            return YOLOv4Loss([[(8, 8)]], (8,), CLASSES, "darknet", all_anchors=[(8, 8), (800, 800)], backend=backend)
        return LOSSES[name](backend=backend)

    targets = Targets.from_packed(rows, 1)
    with Watch() as watch:
        got = outcome(make("triton"), preds, targets)
    assert watch.largest <= 256  # one prediction: state, kept gradient, partial sums
    assert got[4] == 1
    want = outcome(make("torch"), preds, targets)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("name", LOSSES)
def test_what_the_operator_allocates_is_linear_in_the_predictions(name):
    """However many the rows, no more gradients are kept than there are predictions, and fewer for few rows."""
    from fusedyolo.ops.grid import grid_outputs

    head = LOSSES[name](backend="torch").head
    maps = [torch.empty(2, 5 + CLASSES, 20, 30, device="meta") for _ in head.levels]
    predictions, channels = sum(p[:, 0].numel() for p in maps), 8
    for m in (0, 1, 3, 5000):
        rows = torch.empty(m, 6, device="meta")
        with Watch() as watch:
            outputs = grid_outputs(maps, rows, head, True)
        assert outputs.kept.shape == (min(predictions, m * head.places_per_row), channels)
        assert watch.largest <= max(outputs.kept.numel(), 2 * predictions)
        assert watch.allocated <= predictions * (4 * channels + 4) + 4096
