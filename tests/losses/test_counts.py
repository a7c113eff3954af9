"""The counts of the last call of a loss, for who does not get its output."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from importlib import import_module

import peers
import pytest
import torch
from conftest import DEVICE
from swaps import decoupled_case
from torch import nn

import fusedyolo
from fusedyolo.distributed import GlobalLoss

ROWS = torch.tensor([[0, 1, 0.45, 0.52, 0.2, 0.3], [1, 2, 0.3, 0.7, 0.1, 0.15], [1, 5, 0.3, 0.7, 0.1, 0.15]])
ANCHORS, STRIDES, CLASSES = [[(10, 13), (16, 30)], [(30, 61), (62, 45)]], (8, 16), 3
CORNERS = torch.tensor([[4.0, 4, 36, 36], [20, 10, 60, 44], [30, 8, 48, 24]])


def maps(channels):
    gen = torch.Generator().manual_seed(0)
    return [torch.randn(2, channels, 64 // s, 64 // s, generator=gen).to(DEVICE) for s in STRIDES]


def of_anchors(n):
    gen = torch.Generator().manual_seed(0)
    return [torch.rand(2, 3, channels, generator=gen).to(DEVICE) for channels in (CLASSES, 4, 1)[:n]]


GRIDS = {
    "YOLOv1": (lambda: fusedyolo.YOLOv1Loss(CLASSES, 4), lambda: torch.zeros(2, 4, 4, 13, device=DEVICE)),
    "YOLOv2": (lambda: fusedyolo.YOLOv2Loss([(1, 2), (3, 3)], CLASSES, 8), lambda: maps(16)[0]),
    "YOLOv4": (lambda: fusedyolo.YOLOv4Loss(ANCHORS, STRIDES, CLASSES), lambda: maps(16)),
    "YOLOX": (lambda: fusedyolo.YOLOXLoss(CLASSES, STRIDES), lambda: maps(8)),
    "YOLOv8": (lambda: fusedyolo.YOLOv8Loss(CLASSES, STRIDES, 4), lambda: maps(19)),
}
DENSE = {"RetinaNet": fusedyolo.RetinaNetLoss, "SSD": fusedyolo.SSDLoss, "FCOS": fusedyolo.FCOSLoss}


def numbers(found):
    return [(int(each.num_pos), int(each.num_invalid)) for each in found]


@pytest.mark.parametrize("name", GRIDS)
def test_a_loss_has_those_of_its_last_call(name):
    make, preds = GRIDS[name]
    criterion = make()
    assert fusedyolo.last_counts(criterion) == []
    outs = [criterion(preds(), rows.to(DEVICE)) for rows in (ROWS[:1], ROWS)]
    (found,) = fusedyolo.last_counts(criterion)
    assert numbers([found]) == numbers(outs[1:])
    assert int(found.num_invalid) == 1
    assert int(found.num_pos) > 0
    assert found.num_pos.shape == found.num_invalid.shape == ()


@pytest.mark.parametrize("name", DENSE)
def test_of_terms_alone(name):
    """Which return no counts."""
    criterion = DENSE[name](CLASSES)
    boxes = [{"boxes": CORNERS[i:].to(DEVICE), "labels": torch.tensor([2, 1, 9])[i:].to(DEVICE)} for i in (0, 2)]
    more = {"num_anchors_per_level": [3]} if name == "FCOS" else {}
    preds, anchors = of_anchors(3 if name == "FCOS" else 2), CORNERS.to(DEVICE)
    criterion.terms(preds, boxes, anchors=anchors, **more)
    want = criterion(preds, boxes, anchors=anchors, **more)
    criterion.terms(preds, boxes, anchors=anchors, **more)
    assert numbers(fusedyolo.last_counts(criterion)) == numbers([want])
    assert int(want.num_invalid) == 2


def test_of_both_branches():
    criterion = fusedyolo.E2ELoss(CLASSES, STRIDES)
    out = criterion({"one2many": maps(7), "one2one": maps(7)}, ROWS.to(DEVICE))
    many, one = numbers(fusedyolo.last_counts(criterion))
    assert many[0] + one[0] == int(out.num_pos)
    assert many[1] == one[1] == int(out.num_invalid) == 1


def test_in_whatever_holds_the_loss():
    make, preds = GRIDS["YOLOv4"]
    model = nn.Sequential(nn.Linear(1, 1))
    model.criterion = make()
    out = GlobalLoss(model.criterion)(preds(), ROWS.to(DEVICE))
    for owner in (model, nn.DataParallel(model), {"loss": model.criterion}, (0, "", None, model.criterion)):
        assert numbers(fusedyolo.last_counts(owner)) == numbers([out])
    assert fusedyolo.last_counts(nn.Linear(1, 1)) == fusedyolo.last_counts(None) == []


def test_of_modules_that_are_held_by_no_module():
    """Each loss once, whatever holds what it is in."""
    both, (make, preds) = fusedyolo.E2ELoss(CLASSES, STRIDES), GRIDS["YOLOv4"]
    both({"one2many": maps(7), "one2one": maps(7)}, ROWS.to(DEVICE))
    of_all = GlobalLoss(make())
    out = of_all(preds(), ROWS.to(DEVICE))
    model = nn.Sequential(nn.Linear(1, 1))
    model.losses = [both, of_all]
    model[0].above = [model]
    want = numbers(fusedyolo.last_counts(both)) + numbers([out])
    assert len(want) == 3
    for owner in (model, {"model": model}, [both, of_all], (both, nn.Sequential(both, of_all))):
        assert sorted(numbers(fusedyolo.last_counts(owner))) == sorted(want)


def test_no_loss_keeps_them():
    """Nor is kept by them; a copy has made no call."""
    make, preds = GRIDS["YOLOv4"]
    criterion = make()
    criterion(preds(), ROWS.to(DEVICE))
    for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert fusedyolo.last_counts(other) == []
    kept = weakref.ref(criterion._last.counts)
    assert kept() is not None
    del criterion, other
    gc.collect()
    assert kept() is None


def test_what_a_transform_has_left_is_none():
    criterion, preds = fusedyolo.YOLOXLoss(CLASSES, STRIDES, backend="torch"), maps(8)
    torch.func.grad(lambda pred: criterion([pred, preds[1]], ROWS.to(DEVICE)).total)(preds[0])
    assert fusedyolo.last_counts(criterion) == []


def test_a_compiled_loss_leaves_none():
    criterion = fusedyolo.YOLOXLoss(CLASSES, STRIDES, backend="torch")
    torch.compile(criterion, backend="eager")(maps(8), ROWS.to(DEVICE))
    assert fusedyolo.last_counts(criterion) == []


def test_of_a_patched_head_of_libreyolo(monkeypatch):
    head_class = peers.module("libreyolo.models.yolox.nn").YOLOXHead
    swap = import_module("fusedyolo.integrations.libreyolo")
    head, features, labels = decoupled_case(head_class, 0)
    monkeypatch.setenv("FUSEDYOLO_DISABLE", "1")
    labels[0, 0, 1] = -5.0  # left of the image
    try:
        swap.patch()
        head(features, labels)
        (found,) = fusedyolo.last_counts(nn.Sequential(head))
        assert int(found.num_invalid) == 1  # and none of the padding
        assert int(found.num_pos) > 0
    finally:
        swap.unpatch()
        swap._criteria.kept.clear()
