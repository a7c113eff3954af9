"""YOLOv5's own ``ComputeLoss``, and ours in its place: the same numbers."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace

import peers
import pytest
import torch
from swaps import MODES, assert_near, check_two_threads, objects, over_a_wrapper, slopes, snapshot

import fusedyolo

losses = peers.module("yolov5.utils.loss")
integration = import_module("fusedyolo.integrations.yolov5")
patch, unpatch = integration.patch, integration.unpatch
ComputeLoss = losses.ComputeLoss

STRIDES = (8, 16, 32)
ANCHORS = (((10, 13), (16, 30)), ((30, 61), (62, 45)), ((59, 90), (116, 90)))
HYP = {"box": 0.05, "obj": 1.0, "cls": 0.5, "cls_pw": 1.0, "obj_pw": 1.0, "fl_gamma": 0.0, "anchor_t": 4.0}


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.delenv("FUSEDYOLO_DISABLE")


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    monkeypatch.setenv("FUSEDYOLO_DISABLE", "1")
    yield
    unpatch()
    integration._criteria.kept.clear()


def detector(classes=3, levels=3, **hyp):
    """What a loss looks at of a model."""
    anchors = torch.tensor(ANCHORS[:levels], dtype=torch.float64) / torch.tensor(STRIDES[:levels])[:, None, None]
    stride = torch.tensor([float(each) for each in STRIDES[:levels]])
    head = SimpleNamespace(nl=levels, na=2, nc=classes, stride=stride, anchors=anchors.to(torch.get_default_dtype()))
    return SimpleNamespace(hyp=HYP | hyp, model=[head], parameters=lambda: iter([torch.zeros(1)]))


def case(seed):
    gen, mode = torch.Generator().manual_seed(seed), MODES[seed % len(MODES)]
    classes, levels = (3, 1, 5)[seed // 2 % 3], (3, 3, 2)[seed % 3]
    hyp = [{}, {"fl_gamma": 1.5, "cls_pw": 1.3}, {"label_smoothing": 0.1, "obj_pw": 0.7}, {"anchor_t": 2.5, "box": 0.1}]
    height, width = ((64, 64), (96, 64), (64, 128))[seed % 3]
    rows = objects(mode, seed, 3, classes)
    if mode == "twins":
        rows = rows[torch.randperm(len(rows), generator=gen)]  # of equal ones the last counts
    shapes = [(3, 2, height // s, width // s, 5 + classes) for s in STRIDES[:levels]]
    preds = [torch.randn(shape, generator=gen, dtype=torch.float32) for shape in shapes]
    dtype = torch.get_default_dtype()
    return (
        detector(classes, levels, **hyp[seed % 4]),
        [each.to(dtype).requires_grad_() for each in preds],
        rows.to(dtype),
    )


def check(seed, rtol):
    model, preds, rows = case(seed)
    total, items = ComputeLoss(model)(preds, rows)
    patch()
    loss = ComputeLoss(model)
    own_total, own_items = loss(preds, rows)
    assert integration._criteria.kept[loss][1] is not None
    assert own_total.shape == total.shape == (1,)
    assert own_items.shape == items.shape == (3,)
    assert not own_items.requires_grad
    assert own_total.dtype == total.dtype
    assert_near(own_total, total, rtol)
    torch.testing.assert_close(own_items, items, rtol=rtol, atol=rtol * 1e-3)
    for own, grad in zip(slopes(own_total, preds), slopes(total, preds), strict=True):
        assert_near(own, grad, rtol)


@pytest.mark.parametrize("seed", range(24))
def test_random_cases(seed, wide):
    check(seed, 1e-6)  # our settings are rounded to float32


@pytest.mark.parametrize("seed", [0, 3])
def test_random_cases_on_triton(seed, kernels):
    check(seed, 1e-5)


def test_gains_are_read_at_each_call():
    patch()
    model, preds, rows = case(0)
    loss = ComputeLoss(model)
    total, items = loss(preds, rows)
    loss.hyp["box"] *= 2
    torch.testing.assert_close(loss(preds, rows)[1], items * torch.tensor((2.0, 1.0, 1.0)))
    loss.hyp["box"] /= 2
    with torch.inference_mode():
        torch.testing.assert_close(loss(preds, rows)[0], total)
    unpatch()
    torch.testing.assert_close(loss(preds, rows)[0], total)


def test_counts_of_the_last_call():
    model, preds, rows = case(0)
    rows[0, 1] = 99.0  # no such class
    loss = ComputeLoss(model)
    assert fusedyolo.last_counts(loss) == []
    patch()
    before = dict(vars(loss))
    loss(preds, rows)
    (found,) = fusedyolo.last_counts(loss)
    assert int(found.num_invalid) == 1
    assert int(found.num_pos) > 0
    assert vars(loss) == before
    holder = torch.nn.Linear(1, 1)
    holder.compute_loss = loss
    assert fusedyolo.last_counts(torch.nn.DataParallel(holder)) == [found]


def test_half_predictions():
    patch()
    model, preds, rows = case(0)
    half = [pred.detach().half().requires_grad_() for pred in preds]
    total, _ = ComputeLoss(model)(half, rows)
    total.backward()
    assert total.dtype == torch.float32
    assert all(pred.grad.isfinite().all() for pred in half)


def test_what_is_not_supported_is_refused(monkeypatch):
    model, preds, rows = case(0)
    patch()
    with pytest.raises(ValueError, match=r"^compute_loss\.autobalance: True, want False"):
        ComputeLoss(model, autobalance=True)(preds, rows)
    loss = ComputeLoss(model)
    loss.sort_obj_iou = True
    with pytest.raises(ValueError, match=r"^compute_loss\.sort_obj_iou: True, want False"):
        loss(preds, rows)
    unpatch()
    monkeypatch.setattr(ComputeLoss, "sort_obj_iou", True)
    with pytest.raises(ValueError, match=r"^ComputeLoss\.sort_obj_iou: True, want False"):
        patch()


def other_iou(monkeypatch):
    original = losses.bbox_iou
    monkeypatch.setattr(losses, "bbox_iou", lambda *args, CIoU, **options: original(*args, GIoU=CIoU, **options))


def a_number(monkeypatch):
    original = ComputeLoss.__call__
    monkeypatch.setattr(ComputeLoss, "__call__", lambda self, *args: original(self, *args)[0])


def no_maps(monkeypatch):
    monkeypatch.setattr(ComputeLoss, "build_targets", lambda self, p, targets: p["maps"])


REFUSED = {other_iou: "computes something else: number", a_number: "returns something else", no_maps: "TypeError"}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_what_computes_something_else_is_refused(change, monkeypatch):
    change(monkeypatch)
    before = ComputeLoss.__call__
    with pytest.raises(ValueError, match=rf"^yolov5 ComputeLoss: .*{REFUSED[change]}.*, want the loss of YOLOv5 7\.0"):
        patch()
    assert ComputeLoss.__call__ is before


def weighted():
    return torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor((1.0, 2.0, 3.0)))


def foreign():
    class Focal(losses.FocalLoss):
        pass

    def blurred(loss):
        loss.BCEcls = losses.BCEBlurWithLogitsLoss()

    def focal(loss):
        loss.BCEcls = loss.BCEobj = Focal(loss.BCEcls)

    def matching(loss):
        own = loss.build_targets
        loss.build_targets = lambda p, targets: own(p, targets[:1])

    def alpha(loss):
        loss.BCEcls = loss.BCEobj = losses.FocalLoss(loss.BCEcls, alpha=0.5)

    return {
        "blurred": (blurred, "BCEcls: a BCEBlur"),
        "focal": (focal, "BCEcls: a Focal"),
        "alpha": (alpha, "alpha 0.5"),
        "balance": (lambda loss: setattr(loss, "balance", [1.0, 1.0, 1.0]), "balance"),
        "smoothing": (lambda loss: setattr(loss, "cp", 0.8), "cp"),
        "matching": (matching, "compute_loss.build_targets: one of its own"),
        "weights": (lambda loss: setattr(loss, "BCEcls", weighted()), "BCEcls.pos_weight: 3 numbers, want one"),
        "focal weights": (
            lambda loss: setattr(loss, "BCEcls", losses.FocalLoss(weighted())),
            "BCEcls.loss_fcn.pos_weight: 3 numbers, want one",
        ),
    }


@pytest.mark.parametrize("late", [False, True], ids=["at once", "later"])
@pytest.mark.parametrize("name", foreign())
def test_a_loss_with_foreign_parts_keeps_its_own(name, late):
    change, why = foreign()[name]
    model, preds, rows = case(0)
    loss = ComputeLoss(model)
    if late:
        patch()
        loss(preds, rows)
        unpatch()
    change(loss)
    expected = loss(preds, rows)
    patch()
    with pytest.warns(UserWarning, match=why):
        found = loss(preds, rows)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def fill(loss):
    loss.BCEcls.pos_weight.fill_(3.0)


def replace(loss):
    loss.BCEobj.pos_weight = torch.full((1,), 0.5)


def widen(loss):
    loss.anchors.mul_(1.5)


@pytest.mark.parametrize("change", [fill, replace, widen], ids=lambda change: change.__name__)
def test_what_is_set_after_a_call_counts_in_the_next(change):
    model, preds, rows = case(0)
    loss = ComputeLoss(model)
    patch()
    before = loss(preds, rows)[1]
    change(loss)
    found = loss(preds, rows)[1]
    unpatch()
    torch.testing.assert_close(found, loss(preds, rows)[1])
    assert not torch.equal(found, before)


def test_a_class_that_weighs_classes_is_refused():
    class Weighed(ComputeLoss):
        def __init__(self, model):
            super().__init__(model)
            self.BCEcls = weighted()

    with pytest.raises(ValueError, match=r"BCEcls\.pos_weight: 3 numbers, want one"):
        patch(Weighed)
    assert "__call__" not in vars(Weighed)


def test_derived_classes_keep_theirs():
    class Derived(ComputeLoss):
        pass

    model, preds, rows = case(0)
    loss = Derived(model, autobalance=True)
    expected = loss(preds, rows)[0]
    loss = Derived(model, autobalance=True)
    patch()
    assert torch.equal(loss(preds, rows)[0], expected)


def test_a_wrapper_of_ours_is_not_what_ours_falls_back_to():
    class Derived(ComputeLoss):
        pass

    model, preds, rows = case(0)
    expected = ComputeLoss(model)(preds, rows)[0]
    with over_a_wrapper(integration, ComputeLoss, "__call__"):
        assert torch.equal(Derived(model)(preds, rows)[0], expected)


def test_two_threads_patch_at_once():
    check_two_threads(integration, ComputeLoss, "__call__")


def test_a_derived_class_has_nothing_to_get_back():
    class Derived(ComputeLoss):
        pass

    patch()
    unpatch(Derived)
    assert "__call__" not in vars(Derived)


def test_unpatch_leaves_the_package_as_it_was():
    before = snapshot(losses)
    unpatch()
    patch()
    patch(ComputeLoss)
    changed = {key for key, value in snapshot(losses).items() if before[key] != value}
    assert changed == {("yolov5.utils.loss", "ComputeLoss", "__call__")}
    unpatch()
    assert snapshot(losses) == before


def test_an_object_is_no_class():
    with pytest.raises(ValueError, match="compute_loss: a ComputeLoss, want the class, ComputeLoss"):
        patch(ComputeLoss(case(0)[0]))
