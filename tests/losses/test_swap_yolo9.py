"""YOLOv9 as LibreYOLO has it, trained with our loss and with its own: the same numbers."""

from __future__ import annotations

import pickle
from importlib import import_module

import peers
import pytest
import torch
from swaps import MODES, check_two_threads, objects, over_a_wrapper, slopes, snapshot

loss_module = peers.module("libreyolo.models.yolo9.loss")
nn_module = peers.module("libreyolo.models.yolo9.nn")
e2e = peers.module("libreyolo.models.yolo9_e2e.loss")
integration = import_module("fusedyolo.integrations.libreyolo")
own = import_module("fusedyolo.integrations.libreyolo_yolo9")
patch, unpatch = integration.patch, integration.unpatch
YOLO9Loss = loss_module.YOLO9Loss
YOLOXHead = peers.module("libreyolo.models.yolox.nn").YOLOXHead
STRIDES = [8, 16, 32]


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    monkeypatch.setenv("FUSEDYOLO_DISABLE", "1")
    yield
    unpatch()
    own.criteria.kept.clear()


def case(seed, classes=3, reg_max=16):
    """A loss, predictions whose distances are of many lengths, and targets, padded with zeros."""
    gen = torch.Generator().manual_seed(seed)
    height, width = ((64, 64), (96, 128), (160, 96))[seed // 2 % 3]
    rows = objects(MODES[seed % len(MODES)], seed, 3, classes)
    most = max(int((rows[:, 0] == image).sum()) for image in range(3)) + 2
    targets = torch.zeros(3, most, 5)
    for image in range(3):
        of = rows[rows[:, 0] == image, 1:]
        targets[image, : len(of)] = torch.cat((of[:, :1], of[:, 1:3] - of[:, 3:] / 2, of[:, 1:3] + of[:, 3:] / 2), 1)
    preds = []
    for stride in STRIDES:
        pred = torch.randn(3, 4 * reg_max + classes, height // stride, width // stride, generator=gen)
        pred[:, : 4 * reg_max] *= 3
        if seed % 4 != 3:  # shorter than the mean of all numbers
            pred[:, : 4 * reg_max] -= torch.arange(reg_max).repeat(4)[:, None, None] * 0.5
        preds.append(pred.requires_grad_())
    loss = YOLO9Loss(classes, reg_max, STRIDES, [width, height], torch.device("cpu"))
    return loss, preds, targets


def both(call, preds, rtol=1e-5):
    """What a loss returns, with its own and with ours."""
    expected = call()
    wanted = slopes(expected["total_loss"], preds)
    patch()
    found = call()
    unpatch()
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].requires_grad == value.requires_grad
        assert found[name].item() == pytest.approx(value.item(), rel=rtol, abs=1e-7), name
    largest = max(each.abs().max().item() for each in wanted)
    for each, value in zip(slopes(found["total_loss"], preds), wanted, strict=True):
        torch.testing.assert_close(each, value, rtol=0, atol=2 * rtol * largest)
    return found


@pytest.mark.parametrize("seed", range(36))
def test_random_cases(seed):
    loss, preds, targets = case(seed)
    found = both(lambda: loss(preds, targets), preds)
    assert own.criteria.kept[loss][1] is not None
    assert (found["num_fg"] > 0) == bool(targets.any())


@pytest.mark.parametrize("seed", [2, 3])
def test_short_distributions(seed):
    """Large objects are in no cell's range, and have one cell all the same."""
    loss, preds, targets = case(seed, reg_max=3)
    assert both(lambda: loss(preds, targets), preds)["num_fg"] > 0


def test_two_branches(monkeypatch):
    monkeypatch.delenv("FUSEDYOLO_DISABLE")  # by the kernels
    _, preds, targets = case(0)
    loss = e2e.YOLO9E2ELoss(3, 16, STRIDES, [64, 64], torch.device("cpu"))
    other = [(0.5 * pred).detach().requires_grad_() for pred in preds]
    both(lambda: loss(preds, other, targets), [*preds, *other])
    assert len(own.criteria.kept) == 2


def test_labels_in_whole_pixels():
    """Edges on the middles of cells, which are in; and padding of another class."""
    loss, preds, _ = case(0)
    targets = torch.tensor([[[1, 12, 12, 36, 52], [0, 20, 4, 28, 12], [-1, 0, 0, 0, 0]]] * 3) / torch.tensor(
        [1.0, 64, 64, 64, 64]
    )
    both(lambda: loss(preds, targets), preds)


class OtherBoxLoss(loss_module.BoxLoss):
    pass


FOREIGN = {
    "box": (lambda loss: setattr(loss, "box_loss", OtherBoxLoss()), "box_loss: a OtherBoxLoss, want a BoxLoss"),
    "weights": (lambda loss: setattr(loss.cls_loss.bce, "pos_weight", torch.ones(1)), "bce: with weights"),
    "matcher": (lambda loss: setattr(loss.matcher, "filter_topk", loss.matcher.filter_topk), "filter_topk: one of its"),
    "range": (lambda loss: setattr(loss.matcher, "reg_max", 8), "matcher.reg_max: 8, want 16"),
}


@pytest.mark.parametrize("late", [False, True], ids=["at once", "later"])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_loss_with_a_foreign_part_keeps_its_own(name, late):
    change, why = FOREIGN[name]
    loss, preds, targets = case(0)
    patch()
    if late:
        loss(preds, targets)
    change(loss)
    with pytest.warns(UserWarning, match=why):
        found = loss(preds, targets)["total_loss"]
    unpatch()
    assert torch.equal(loss(preds, targets)["total_loss"], found)


def test_the_rule_is_that_of_the_matcher():
    """Which is made for each size of image, of what the loss then says."""
    loss, preds, targets = case(0)
    found = both(lambda: loss(preds, targets), preds)
    loss.topk = 3
    assert both(lambda: loss(preds, targets), preds)["num_fg"] == found["num_fg"]
    loss.matcher.topk = 3
    assert both(lambda: loss(preds, targets), preds)["num_fg"] < found["num_fg"]


@pytest.mark.parametrize("seed", [0, 4])
def test_several_processes_divide_by_the_scores_of_all(seed, monkeypatch):
    """Another process has a sum of seven; with no object at all, here and there, it is 1 before it is shared."""

    def of_two(value, **options):
        return (value.detach().float().sum() + (7.0 if seed == 0 else 0.0)).clamp(min=1) / 2

    loss, preds, targets = case(seed)
    alone = loss(preds, targets)["total_loss"]
    monkeypatch.setattr(loss_module, "all_reduce_avg_scalar_tensor", of_two)
    monkeypatch.setattr(own, "all_reduce_avg_scalar_tensor", of_two)
    monkeypatch.setattr(own, "differs", lambda: "")  # what is tried while patching is shared out as well
    found = both(lambda: loss(preds, targets), preds)["total_loss"]
    assert (found - alone).abs() > 0.1
    loss.distributed_normalize = False
    torch.testing.assert_close(both(lambda: loss(preds, targets), preds)["total_loss"], alone)


def test_what_computes_something_else_is_refused(monkeypatch):
    monkeypatch.setattr(loss_module.BoxMatcher, "ensure_one_anchor", lambda self, matrix, mask: mask)
    before = YOLO9Loss.__call__
    with pytest.raises(ValueError, match=r"^libreyolo .*YOLO9Loss computes something else: number"):
        patch()
    assert YOLO9Loss.__call__ is before


@pytest.mark.parametrize(("cls", "name"), [(YOLO9Loss, "__call__"), (YOLOXHead, "forward")])
def test_a_wrapper_of_ours_is_not_what_ours_falls_back_to(cls, name):
    """Of this class, nor where one of the other class was patched over."""

    class Derived(YOLO9Loss):
        pass

    loss, preds, targets = case(0)
    expected = loss(preds, targets)["total_loss"]
    loss.__class__ = Derived
    before = YOLO9Loss.__call__
    with over_a_wrapper(integration, cls, name):
        assert torch.equal(loss(preds, targets)["total_loss"], expected)
    assert YOLO9Loss.__call__ is before


def test_two_threads_patch_at_once():
    check_two_threads(integration, YOLO9Loss, "__call__")


def test_unpatch_leaves_the_package_as_it_was():
    before = snapshot(loss_module)
    patch()
    patch()
    changed = {key[1:] for key, value in snapshot(loss_module).items() if before[key] != value}
    assert changed == {("YOLO9Loss", "__call__")}
    unpatch()
    assert snapshot(loss_module) == before


def test_a_model_trains_and_is_stored_as_if_nothing_had_happened():
    patch()
    model = nn_module.LibreYOLO9Model("t", nb_classes=3).train()
    targets = torch.tensor([[[1, 0.1, 0.2, 0.6, 0.7]], [[2, 0.3, 0.3, 0.5, 0.9]]])
    model(torch.rand(2, 3, 64, 64), targets)["total_loss"].backward()
    assert len(own.criteria.kept) == 1
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    assert b"fusedyolo" not in pickle.dumps(model)
