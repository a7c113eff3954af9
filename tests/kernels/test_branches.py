"""Losses of two branches: one set of launches computes both, to the bits of two sets."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import DEVICE
from torch import Tensor

import fusedyolo
from fusedyolo import E2ELoss, YOLOv8Loss, ops
from fusedyolo.tools import codegen
from fusedyolo.tools.registry import CASES, Workload

CLASSES, STRIDES, MAPS = 5, (8, 16, 32), ((8, 12), (4, 6), (2, 3))
WAYS = ("nchw", "channels_last", "planes")
OPTIONS: dict[str, dict[str, Any]] = {
    "yolo26": {},
    "yolov10": {"recipe": "yolov10", "reg_max": 4},
    "class weights": {"class_weights": [1.0, 0.5, 2.0, 1.5, 0.0]},
    "of each image": {"reduction": "none", "reg_max": 4},
}


def branch(seed: int, way: str, width: int) -> list[Tensor]:
    """Maps, or boxes and scores in one piece, that are leaves."""
    gen = torch.Generator().manual_seed(seed)
    if way == "planes":
        parts = [torch.randn(2, n, 126, generator=gen) for n in (width - CLASSES, CLASSES)]
        return [part.abs().to(DEVICE).requires_grad_() for part in parts]
    order = torch.channels_last if way == "channels_last" else torch.contiguous_format
    maps = [torch.randn(2, width, *sides, generator=gen).abs().to(DEVICE) for sides in MAPS]
    return [each.contiguous(memory_format=order).requires_grad_() for each in maps]


def packed(tensors: list[Tensor], way: str) -> Any:
    """As a loss takes them."""
    if way == "planes":
        return {"boxes": tensors[0], "scores": tensors[1], "feats": [torch.empty(2, 1, *sides) for sides in MAPS]}
    return tensors


def some_rows(weighed: bool = False) -> Tensor:
    """Of two images, objects of which several want one cell, and one of a class that there is not; with weights, one of
    them an ignored region."""
    gen = torch.Generator().manual_seed(7)
    rows = torch.rand(12, 6, generator=gen)
    rows[:, 0], rows[:, 1] = torch.arange(12) % 2, torch.arange(12) % CLASSES
    rows[:, 4:] = 0.1 + 0.6 * rows[:, 4:]
    rows[3, 1], rows[5, 2:] = 99, rows[7, 2:]
    if weighed:
        weights = torch.linspace(0.0, 2.0, 12)
        weights[1] = -1
        rows = torch.cat((rows, weights[:, None]), 1)
    return rows.to(DEVICE)


def both_ways(
    options: dict[str, Any], way: str, rows: Tensor, seeds: tuple[int, int] = (1, 2), second: str = ""
) -> Any:
    """Of both branches at once, and of one after the other: total, parts, counts and gradients."""
    found = []
    for at_once in (True, False):
        criterion = E2ELoss(CLASSES, STRIDES, backend="triton", **options)
        assert criterion._together is not None
        if not at_once:
            criterion._together = None
        width = 4 * criterion.one2one.head.reg_max + CLASSES
        many, one = branch(seeds[0], way, width), branch(seeds[1], second or way, width)
        out = criterion({"one2many": packed(many, way), "one2one": packed(one, second or way)}, rows)
        asked = out.total.sum() * 1.5
        asked.backward(retain_graph=True)
        first = [leaf.grad.clone() for leaf in (*many, *one)]
        asked.backward()
        twice = [leaf.grad for leaf in (*many, *one)]
        counts = [each for own in fusedyolo.last_counts(criterion) for each in own]
        found.append([out.total, *out.parts.values(), out.num_pos, out.num_invalid, *counts, *first, *twice])
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPTIONS)
def test_at_once_is_one_after_the_other(name, way):
    found = both_ways(OPTIONS[name], way, some_rows())
    assert all(map(torch.equal, *found))
    assert found[0][-1].any()


@pytest.mark.parametrize("rows", [some_rows(True), torch.zeros(0, 6, device=DEVICE)], ids=["weights", "no objects"])
def test_with_weights_and_without_objects(rows):
    assert all(map(torch.equal, *both_ways({"reg_max": 4}, "nchw", rows)))


def test_parts_apart():
    """Each with a weight of its own, some with none."""
    found = []
    for at_once in (True, False):
        criterion = E2ELoss(CLASSES, STRIDES, backend="triton")
        criterion._together = criterion._together if at_once else None
        many, one = branch(1, "nchw", 4 + CLASSES), branch(2, "nchw", 4 + CLASSES)
        terms = criterion.terms({"one2many": many, "one2one": one}, some_rows())
        assert list(terms) == [f"{b}_{p}" for b in ("one2many", "one2one") for p in ("box", "cls", "l1")]
        weights = 0.5, 2.0, 1.0, 3.0, 0.25
        sum(weight * term for weight, term in zip(weights, terms.values(), strict=False)).backward()
        found.append([leaf.grad for leaf in (*many, *one)])
    assert all(map(torch.equal, *found))


def test_of_the_layouts_of_both():
    """Where they lie otherwise in memory sums are in another order."""
    at_once, apart = both_ways({}, "nchw", some_rows(), second="channels_last")
    for a, b in zip(at_once, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-9)


def test_a_branch_that_nobody_asks_has_no_gradient():
    """Of parts; with a NaN in it, too."""
    criterion = E2ELoss(CLASSES, STRIDES, backend="triton")
    many, one = branch(1, "nchw", 4 + CLASSES), branch(2, "nchw", 4 + CLASSES)
    with torch.no_grad():
        many[0][:, 5] = float("nan")
    terms = criterion.terms({"one2many": many, "one2one": one}, some_rows())
    terms["one2one_box"].backward(retain_graph=True)
    assert all(leaf.grad is None for leaf in many)
    assert all(leaf.grad.isfinite().all() for leaf in one)
    (terms["one2one_box"] + terms["one2many_box"]).backward()
    assert all(leaf.grad is not None for leaf in many)


def called(criterion: E2ELoss, preds: dict[str, Any], monkeypatch) -> int:
    """Operators of a call."""
    through, seen = ops.call, []
    monkeypatch.setattr(ops, "call", lambda op, *given, **more: seen.append(op) or through(op, *given, **more))
    criterion(preds, some_rows())
    monkeypatch.undo()
    return len(seen)


def test_what_cannot_be_at_once_is_not(monkeypatch):
    def preds(first: str = "nchw", second: str = "nchw", reg_max: int = 1) -> dict[str, Any]:
        many, one = branch(1, first, 4 + CLASSES), branch(2, second, 4 * reg_max + CLASSES)
        return {"one2many": packed(many, first), "one2one": packed(one, second)}

    criterion = E2ELoss(CLASSES, STRIDES, backend="triton")
    assert called(criterion, preds(), monkeypatch) == 1
    assert called(criterion, preds("planes"), monkeypatch) == 2
    larger = [torch.rand(2, 4 + CLASSES, 2 * h, 2 * w, device=DEVICE) for h, w in MAPS]
    assert called(criterion, preds() | {"one2one": larger}, monkeypatch) == 2
    frozen = preds() | {"one2many": [each.detach() for each in branch(1, "nchw", 4 + CLASSES)]}
    assert called(criterion, frozen, monkeypatch) == 2
    halves = preds() | {"one2many": [each.half() for each in branch(1, "nchw", 4 + CLASSES)]}
    assert called(criterion, halves, monkeypatch) == 2
    more_images = preds() | {"one2one": [torch.cat((each, each)) for each in branch(2, "nchw", 4 + CLASSES)]}
    assert called(criterion, more_images, monkeypatch) == 2
    criterion.one2one.image_size = (60.0, 92.0)
    assert called(criterion, preds(), monkeypatch) == 2
    criterion = copy.deepcopy(E2ELoss(CLASSES, STRIDES, backend="triton"))
    criterion.one2one = copy.deepcopy(criterion.one2one)
    assert called(criterion, preds(), monkeypatch) == 1
    criterion.one2many.backend = "torch"
    assert called(criterion, preds(), monkeypatch) == 1  # of the other
    weighed = E2ELoss(CLASSES, STRIDES, backend="triton", class_weights=[1.0] * CLASSES)
    weighed.one2one.class_weights = None
    assert called(weighed, preds(), monkeypatch) == 2
    other = E2ELoss(CLASSES, STRIDES, backend="triton")
    other.one2one = YOLOv8Loss(CLASSES, STRIDES, 4, backend="triton")
    assert called(other, preds(reg_max=4), monkeypatch) == 2


@pytest.mark.interpreter("launches are not run, only prepared to")
def test_launches_are_those_of_one_branch():
    work = Workload(batch=2, size=64, classes=3)
    pair, single = (codegen.launches(CASES[name], work) for name in ("E2E/yolo26", "YOLOv8"))
    assert list(pair) == list(single) == ["decode", "pick", "settle", "loss", "grad"]
    assert all(2 * single[name].grid[0] == launch.grid[0] for name, launch in pair.items())
