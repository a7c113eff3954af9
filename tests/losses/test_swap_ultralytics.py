"""Ultralytics' detectors, trained with our loss and with its own: the same numbers."""

from __future__ import annotations

import copy
import io
import warnings
from importlib import import_module
from types import SimpleNamespace

import peers
import pytest
import torch
from swaps import MODES, assert_near, middles, objects, run, run_without_us, slopes, snapshot
from torch import nn

import fusedyolo

losses = peers.module("ultralytics.utils.loss")
tasks = peers.module("ultralytics.nn.tasks")
tal = peers.module("ultralytics.utils.tal")
trainer = peers.module("ultralytics.engine.trainer")
YOLO = peers.module("ultralytics").YOLO
integration = import_module("fusedyolo.integrations.ultralytics")  # after Ultralytics, which may need help to load
patch, unpatch = integration.patch, integration.unpatch
v8, E2ELoss = losses.v8DetectionLoss, losses.E2ELoss

STRIDES = (8.0, 16.0, 32.0)
SEEDS = 36
RTOL = 1e-5  # in float64, too, for the peer adds 1e-7 to heights; metrics hold the sixth power of what follows


@pytest.fixture(autouse=True)
def _as_it_was():
    yield
    unpatch()
    integration._criteria.kept.clear()


@pytest.fixture
def patched():
    patch()


@pytest.fixture
def wide(monkeypatch):
    """Float64 for what the peer makes itself."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def strict(monkeypatch):
    """The peer does not pick cells of metric 0, which it otherwise does by an order that PyTorch leaves open."""
    original = tal.TaskAlignedAssigner.select_topk_candidates

    def select(self, metrics, topk_mask=None):
        return original(self, metrics, topk_mask) * (metrics > 0)

    monkeypatch.setattr(tal.TaskAlignedAssigner, "select_topk_candidates", select)


def detector(classes=3, reg_max=16, weights=None, **gains):
    """What a loss looks at of a model."""
    head = SimpleNamespace(stride=torch.tensor(STRIDES), nc=classes, reg_max=reg_max, no=classes + 4 * reg_max)
    args = SimpleNamespace(**{"box": 7.5, "cls": 0.5, "dfl": 1.5, "epochs": 5} | gains)
    return SimpleNamespace(
        args=args, model=[head], class_weights=weights, parameters=lambda: iter([torch.zeros(1)]), names={}
    )


def boxes_near(rows, size, reg_max, gen):
    """Predicted sides [B, 4 * reg_max, N] in cells, that often are those of an object of the image."""
    maps = [(int(size[0] / s), int(size[1] / s)) for s in STRIDES]
    middle, stride = middles(maps, STRIDES)
    batch = int(rows[:, 0].max()) + 1 if len(rows) else 1
    found = []
    for image in range(max(batch, 3)):
        own = rows[rows[:, 0] == image, 2:].double() * torch.tensor([size[1], size[0]] * 2, dtype=torch.float64)
        sides = 0.3 + 4 * torch.rand(len(middle), 4, generator=gen, dtype=torch.float64)
        if len(own):
            to = own[torch.randint(len(own), (len(middle),), generator=gen)]
            off = middle - to[:, :2]
            true = torch.cat((off + to[:, 2:] / 2, to[:, 2:] / 2 - off), 1) / stride[:, None]
            near = (off.abs() < to[:, 2:] / 2 + 12).all(1) & (torch.rand(len(middle), generator=gen) < 0.8)
            noise = 1 + 0.3 * torch.randn(len(middle), 4, generator=gen, dtype=torch.float64)
            sides = torch.where(near[:, None], true.clamp(min=0.05) * noise, sides)
        found.append(sides)
    sides = torch.stack(found)
    if reg_max > 1:
        bins = torch.arange(reg_max)
        sides = -((sides[..., None] - bins) ** 2) / 2 + torch.randn(*sides.shape, reg_max, generator=gen).double()
        return sides.flatten(2).transpose(1, 2), maps
    return sides.transpose(1, 2), maps


def case(seed, e2e=False):
    """A detector, predictions of three images and their objects."""
    mode, gen = MODES[seed % len(MODES)], torch.Generator().manual_seed(seed)
    reg_max = (16, 1)[seed // 6 % 2]
    classes = (3, 1, 7)[seed // 12 % 3]
    size = ((64, 64), (96, 64), (64, 128))[seed // 2 % 3]
    weights = torch.rand(classes, generator=gen) + 0.5 if seed % 5 == 2 else None
    rows = objects(mode, seed, 3, classes)
    preds = {}
    for name in ("one2many", "one2one")[: 2 if e2e else 1]:
        boxes, maps = boxes_near(rows, size, reg_max, gen)
        scores = 2 * torch.randn(3, classes, boxes.shape[2], generator=gen).double() - 1
        feats = [torch.zeros(3, 1, *each) for each in maps]
        # float32 numbers, as ours are float64 only where predictions are
        preds[name] = {
            "boxes": boxes.float().to(torch.get_default_dtype()).contiguous().requires_grad_(),
            "scores": scores.float().to(torch.get_default_dtype()).requires_grad_(),
            "feats": feats,
        }
    gains = {"box": 7.5 - seed % 3, "cls": 0.5 + seed % 4, "dfl": 1.5}
    return detector(classes, reg_max, weights, **gains), preds if e2e else preds["one2many"], batch_of(rows)


def batch_of(rows):
    rows = rows.to(torch.get_default_dtype())  # that of what the peer makes itself
    return {"batch_idx": rows[:, 0], "cls": rows[:, 1:2], "bboxes": rows[:, 2:]}


def tensors(preds):
    planes = [preds] if "boxes" in preds else list(preds.values())
    return [each[name] for each in planes for name in ("boxes", "scores")]


def both(make, preds, batch, rtol, update=0):
    """Ultralytics' numbers and ours, which are the same; what it returned comes back."""
    results = []
    for ours in (False, True):
        if ours:
            patch()
        loss = make()
        for _ in range(update):
            loss.update()
        total, items = loss(preds, batch)
        assert total.shape == (3,)
        assert total.requires_grad
        assert not any(value.requires_grad for value in items.values())
        weights = total.new_tensor((1.0, 0.75, 1.25))  # else errors of two parts may cancel
        results.append((total, items, slopes((total * weights).sum(), tensors(preds))))
    unpatch()
    (total, items, grads), (own_total, own_items, own_grads) = results
    assert list(items) == list(own_items)
    assert_near(own_total, total, rtol, "parts")
    for i, name in enumerate(items):
        assert items[name].shape == own_items[name].shape == ()
        assert items[name].dtype == own_items[name].dtype
        torch.testing.assert_close(own_items[name], items[name], rtol=rtol, atol=rtol * total[i].abs().item())
    for i, (grad, own) in enumerate(zip(grads, own_grads, strict=True)):
        assert_near(own, grad, rtol, f"gradient {i}")
    return total, items


# ---- the same numbers


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_cases(seed, wide, strict):
    model, preds, batch = case(seed)
    topk2 = (None, 1, 4)[seed % 3]
    total, _ = both(lambda: v8(model, tal_topk=(10, 7)[seed % 2], tal_topk2=topk2), preds, batch, RTOL)
    assert (total[0] == 0) == (MODES[seed % 6] == "empty")


@pytest.mark.parametrize("seed", range(SEEDS // 2))
def test_random_cases_of_two_branches(seed, wide, strict):
    model, preds, batch = case(seed + 100, e2e=True)
    both(lambda: E2ELoss(model), preds, batch, RTOL, update=seed % 6)


@pytest.mark.parametrize("seed", [seed for seed in range(SEEDS) if MODES[seed % 6] == "plain"])
def test_random_cases_of_the_peer_as_it_is_in_float32(seed):
    model, preds, batch = case(seed)
    both(lambda: v8(model), preds, batch, RTOL)


@pytest.mark.parametrize("seed", range(SEEDS // 2))
def test_the_assignment(seed, wide, strict):
    model, preds, batch = case(seed + 200)
    topk2 = (None, 1, 4)[seed % 3]
    loss, seen = v8(model, tal_topk=7, tal_topk2=topk2), []
    loss.assigner.register_forward_hook(lambda module, args, out: seen.append(out))
    loss(preds, batch)
    _, _, scores, foreground, index = seen[0]
    criterion = fusedyolo.YOLOv8Loss(loss.nc, STRIDES, loss.reg_max, topk=7, topk2=topk2, backend="torch")
    rows = torch.cat((batch["batch_idx"][:, None], batch["cls"], batch["bboxes"]), 1)
    levels = fusedyolo.assign(criterion, preds, rows).levels
    row, score = (torch.cat([getattr(level, name).flatten(1) for level in levels], 1) for name in ("row", "score"))
    first = torch.searchsorted(rows[:, 0].contiguous(), torch.arange(3, dtype=rows.dtype))
    has = foreground & (scores.sum(2) > 0)
    assert torch.equal(row, torch.where(has, index.long() + first[:, None], -1))
    torch.testing.assert_close(score.double(), scores.sum(2), rtol=RTOL, atol=1e-12)
    assert has.any() or not len(rows)


def test_gains_are_read_at_each_call(patched):
    model, preds, batch = case(0)
    loss = v8(model)
    before = loss(preds, batch)[0]
    model.args.box, model.args.dfl = 2 * model.args.box, 0.0
    after = loss(preds, batch)[0]
    torch.testing.assert_close(after, before * torch.tensor((2.0, 1.0, 0.0)))


def test_sizes_and_classes_may_change_between_calls(strict):
    cases = [case(seed) for seed in (0, 2, 3, 5)]  # of three sizes
    expected = [v8(cases[0][0])(preds, batch)[0] for _, preds, batch in cases]
    patch()
    loss = v8(cases[0][0])
    for (_, preds, batch), want in zip(cases, expected, strict=True):
        torch.testing.assert_close(loss(preds, batch)[0], want, rtol=1e-4, atol=1e-5)
    _, preds, batch = case(24)
    loss.nc = loss.assigner.num_classes = preds["scores"].shape[1]  # as heads of text do
    found = loss(preds, batch)[0]
    unpatch()
    torch.testing.assert_close(found, loss(preds, batch)[0], rtol=1e-4, atol=1e-5)
