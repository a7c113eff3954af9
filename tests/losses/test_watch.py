"""What is wrong with all targets of a loader is said in the first batches of a loss, once, and without a wait."""

from __future__ import annotations

import copy
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch

import fusedyolo
from fusedyolo import Targets, watch
from fusedyolo.watch import BATCHES, FEWEST, LONGEST, Watch

ANCHORS, STRIDES, CLASSES, SIDE = [[(10, 13), (16, 30)], [(30, 61)]], (8, 16), 3, 64


def rows(batch=2, each=6, seed=0, first=0):
    """Rows that are as they should be."""
    torch.manual_seed(seed)
    found = torch.rand(batch * each, 6) * 0.5 + 0.2
    found[:, 0] = torch.arange(batch).repeat_interleave(each)
    found[:, 1] = torch.arange(batch * each) % CLASSES + first
    return found


def grid(**options):
    loss = fusedyolo.YOLOv5Loss(ANCHORS, STRIDES, CLASSES, backend="torch", **options)
    preds = [torch.zeros(2, 2 * 8, 8, 8), torch.zeros(2, 8, 4, 4)]
    return lambda targets: loss(preds, targets)


def picks(**options):
    loss = fusedyolo.YOLOXLoss(CLASSES, STRIDES, backend="torch", **options)
    preds = [torch.zeros(2, 8, 8, 8), torch.zeros(2, 8, 4, 4)]
    return lambda targets: loss(preds, targets)


def branches(**options):
    loss = fusedyolo.E2ELoss(CLASSES, STRIDES, backend="torch", **options)
    preds = {name: [torch.zeros(2, 7, 8, 8), torch.zeros(2, 7, 4, 4)] for name in ("one2many", "one2one")}
    return lambda targets: loss(preds, targets)


def cells(**options):
    loss = fusedyolo.YOLOv1Loss(CLASSES, image_size=SIDE, backend="torch", **options)
    return lambda targets: loss(torch.zeros(2, 7, 7, 13), targets)


def dense(kind=fusedyolo.RetinaNetLoss, **options):
    loss = kind(CLASSES + (kind is fusedyolo.SSDLoss), image_size=SIDE, backend="torch", **options)
    anchors = fusedyolo.anchors.fcos_anchors([(8, 8)], SIDE, [16])
    preds = torch.zeros(2, 64, loss.head.num_classes), torch.zeros(2, 64, 4)
    return lambda targets: loss(preds, targets, anchors)


EVERY = {"grid": grid, "picks": picks, "branches": branches, "cells": cells, "dense": dense}


def pixels(found):
    return torch.cat((found[:, :2], found[:, 2:] * SIDE), 1)


def dicts(found, scale=SIDE):
    corners = torch.cat((found[:, 2:4] - found[:, 4:] / 2, found[:, 2:4] + found[:, 4:] / 2), 1).clamp(0, 1) * scale
    return [{"boxes": corners[found[:, 0] == b], "labels": found[found[:, 0] == b, 1].long()} for b in range(2)]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (pixels(rows()), "12 of 12 target rows were skipped as invalid. Centres are about .* say so: unit='pixel'"),
        (rows(first=1), "classes of targets run from 1 to 3, want 0 to 2: .* Subtract 1, or let num_classes be 4"),
        (dicts(rows(), 1), "all boxes of the targets lie within the first pixel .* say so: unit='relative'"),
        (rows() * torch.tensor((1, 1, 1, 1, 0, 0)), "Sides are not above 0: if boxes are x, y, w, h"),
        (rows() + torch.tensor((9.0, 0, 0, 0, 0, 0)), "12 of 12 target rows .* Targets.validate.. says which and why"),
    ],
    ids=["pixels", "classes", "relative", "sides", "images"],
)
def test_usual_mistakes_are_told_once(name, wrong, message):
    call = EVERY[name]()
    with pytest.warns(UserWarning, match=message) as caught:
        call(wrong)
    assert len(caught) == 1
    assert caught[0].filename != watch.__file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2 * BATCHES):
            call(wrong)


@pytest.mark.parametrize("name", EVERY)
def test_what_is_right_is_not_spoken_of(name):
    call = EVERY[name]()
    few = pixels(rows())
    few[:, 2:] = rows()[:, 2:]
    few[: len(few) // 2, 2:] *= SIDE  # half of them
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for targets in (rows(), dicts(rows()), torch.zeros(0, 6), few, pixels(rows()[: FEWEST - 1])):
            EVERY[name]()(targets)
        for seed in range(2 * BATCHES):
            call(rows(seed=seed) if seed < BATCHES else pixels(rows()))  # later ones are not looked at


def test_the_background_is_no_class():
    with pytest.warns(UserWarning, match="SSDLoss: rows of class 0, the background, are skipped, want 1 to 3"):
        dense(fusedyolo.SSDLoss)(rows())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dense(fusedyolo.SSDLoss)(rows(first=1))


def test_rows_add_up_over_batches():
    call, few = grid(), pixels(rows()[: FEWEST - 2])
    call(few)
    with pytest.warns(UserWarning, match=f"{2 * len(few)} of {2 * len(few)} target rows"):
        call(few)


def test_a_few_rows_in_each_batch_are_enough():
    call, one = grid(), pixels(rows()[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(FEWEST - 1):
            call(one)
    with pytest.warns(UserWarning, match=f"{FEWEST} of {FEWEST} target rows"):
        call(one)


def test_it_ends():
    looks, counts = Watch("Loss", range(CLASSES)), torch.zeros(2, dtype=torch.int32)
    for number in range(LONGEST):
        assert looks is not None, number
        looks = looks.after(rows()[:0], None, counts)
    assert looks is None
    looks = Watch("Loss", range(CLASSES))
    for _ in range(BATCHES):
        looks = looks.after(rows(), None, counts)
    assert looks is None


def test_capacity_is_no_row():
    call = grid()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(BATCHES):
            call(Targets.from_packed(rows(), 2, capacity=99))


def test_numbers_that_are_none():
    wrong = rows()
    wrong[:-1] = float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grid()(wrong)  # one row that is left says nothing


class Device:
    """Stands for a GPU: copies arrive when it says so."""

    def __init__(self, monkeypatch):
        self.arrived = self.capturing = False
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
        monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=self.record, query=self.query))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(watch, "_on_gpu", lambda tensor: True)

    def record(self, stream):
        assert stream == "stream"  # that of the device of the loss, whatever the current one is

    def query(self):
        return self.arrived


def test_on_a_gpu_a_later_call_reads(monkeypatch):
    device, wrong = Device(monkeypatch), pixels(rows())
    counts = torch.tensor((0, len(wrong)), dtype=torch.int32)
    looks = Watch("Loss", range(CLASSES))
    for _ in range(BATCHES + 2):
        assert looks.after(wrong, None, counts) is looks
    assert len(looks.pending) == BATCHES
    device.arrived = True
    with pytest.warns(UserWarning, match="Loss: 12 of 12 target rows"):
        assert looks.after(wrong, None, counts) is None


def test_captured_calls_are_not_looked_at(monkeypatch):
    device = Device(monkeypatch)
    device.capturing = device.arrived = True
    looks = Watch("Loss", range(CLASSES))
    assert looks.after(pixels(rows()), None, torch.tensor((0, 12), dtype=torch.int32)) is looks
    assert looks.left == BATCHES
    assert not looks.pending


def test_nothing_is_asked_of_a_gpu_during_a_capture(monkeypatch):
    device, wrong, counts = Device(monkeypatch), pixels(rows()), torch.tensor((0, 12), dtype=torch.int32)
    looks = Watch("Loss", range(CLASSES))
    assert looks.after(wrong, None, counts) is looks
    device.capturing = device.arrived = True
    assert looks.after(wrong, None, counts) is looks
    assert len(looks.pending) == 1
    device.capturing = False
    with pytest.warns(UserWarning, match="Loss: 12 of 12 target rows"):
        assert looks.after(wrong, None, counts) is None


def test_nothing_without_values_is_looked_at():
    loss = fusedyolo.YOLOv5Loss(ANCHORS, STRIDES, CLASSES, backend="torch")
    loss([torch.zeros(2, 16, 8, 8, device="meta"), torch.zeros(2, 8, 4, 4, device="meta")], rows().to("meta"))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        loss([torch.zeros(2, 16, 8, 8), torch.zeros(2, 8, 4, 4)], rows())
    preds = [torch.zeros(2, 16, 8, 8), torch.zeros(2, 8, 4, 4)]
    many = torch.stack((pixels(rows()),) * 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        torch.func.vmap(lambda each: loss(preds, each).total)(many)
    assert loss._watch.left == BATCHES


def test_a_compiled_loss_does_not_look():
    loss = fusedyolo.YOLOv5Loss(ANCHORS, STRIDES, CLASSES, backend="torch")
    preds, wrong = [torch.zeros(2, 16, 8, 8), torch.zeros(2, 8, 4, 4)], pixels(rows())
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compiled(preds, wrong)
    assert loss._watch.left == BATCHES


def test_a_loss_that_looks_can_be_copied(monkeypatch):
    Device(monkeypatch)
    loss = fusedyolo.YOLOv5Loss(ANCHORS, STRIDES, CLASSES, backend="torch")
    loss([torch.zeros(2, 16, 8, 8), torch.zeros(2, 8, 4, 4)], rows())
    assert len(loss._watch.pending) == 1
    for again in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert again._watch.pending == []
