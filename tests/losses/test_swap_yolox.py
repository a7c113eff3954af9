"""YOLOX's own head, trained with our loss and with its own: the same numbers."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from importlib import import_module

import peers
import pytest
import torch
from swaps import MODES, assert_near, objects, run_without_us, slopes, snapshot
from torch import nn

models = peers.module("yolox.models")
head_module, losses_module = peers.module("yolox.models.yolo_head"), peers.module("yolox.models.losses")
integration = import_module("fusedyolo.integrations.yolox")
patch, unpatch = integration.patch, integration.unpatch
YOLOXHead = models.YOLOXHead
MAIN = hasattr(YOLOXHead, "get_geometry_constraint")

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.autocast:FutureWarning")


@pytest.fixture(autouse=True)
def _as_it_was():
    yield
    unpatch()
    integration._criteria.kept.clear()


@pytest.fixture
def wide():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def labels_of(rows, batch, height, width):
    """[B, G, 5] in pixels, of zeros where there is none."""
    most = max([int((rows[:, 0] == image).sum()) for image in range(batch)]) + 2
    found = torch.zeros(batch, most, 5)
    for image in range(batch):
        own = rows[rows[:, 0] == image, 1:] * torch.tensor((1, width, height, width, height))
        found[image, : len(own)] = own
    return found


def case(seed):
    """A head, its features and labels; ``exp`` of a side is such that boxes are of the size of objects."""
    gen, mode = torch.Generator().manual_seed(seed), MODES[seed % len(MODES)]
    classes = (3, 1, 7)[seed // 6 % 3]
    height, width = ((64, 64), (96, 64), (64, 128))[seed // 2 % 3]
    torch.manual_seed(seed)
    head = YOLOXHead(classes, 1 / 32, in_channels=[256] * 3)
    head.use_l1 = seed % 4 == 1
    with torch.no_grad():
        for level in range(3):
            head.reg_preds[level].weight.mul_(4)
            head.cls_preds[level].weight.mul_(4)
            head.obj_preds[level].weight.mul_(4)
    shapes = [(3, 8, height // s, width // s) for s in head.strides]
    dtype = torch.get_default_dtype()
    features = [torch.randn(shape, generator=gen, dtype=torch.float32).to(dtype).requires_grad_() for shape in shapes]
    rows = objects(mode, seed, 3, classes)
    return head.to(dtype), features, labels_of(rows, 3, height, width).to(dtype)


def both(head, features, labels, rtol):
    inputs = [*features, *head.parameters()]
    expected = head(features, labels, None)
    slopes_expected = slopes(expected[0], inputs)
    patch()
    found = head(features, labels, None)
    unpatch()
    assert len(found) == len(expected) == 6
    for i, (own, value) in enumerate(zip(found, expected, strict=True)):
        if i == 4 and not head.use_l1:
            assert own == value == 0.0
            continue
        value = torch.as_tensor(value, dtype=torch.get_default_dtype())
        torch.testing.assert_close(own.to(value.dtype), value, rtol=rtol, atol=1e-8, msg=lambda text, i=i: f"{i}: {text}")
    largest = max(each.abs().max().item() for each in slopes_expected)
    for own, value in zip(slopes(found[0], inputs), slopes_expected, strict=True):
        torch.testing.assert_close(own, value, rtol=0, atol=rtol * max(value.abs().max().item(), 1e-2 * largest))
    return found


@pytest.mark.parametrize("seed", range(24))
def test_random_cases(seed, wide):
    """In float64, where the peer's penalties leave costs their digits; it takes logits for float32 in its costs."""
    both(*case(seed), 1e-6)


@pytest.mark.parametrize("seed", [0, 4, 6])
def test_random_cases_in_float32(seed):
    both(*case(seed), 1e-5)
