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
from swaps import (
    assert_near,
    check_two_threads,
    decoupled_case,
    labels_of,
    objects,
    over_a_wrapper,
    run_without_us,
    slopes,
    snapshot,
)
from torch import nn

import fusedyolo

models = peers.module("yolox.models")
head_module, losses_module = peers.module("yolox.models.yolo_head"), peers.module("yolox.models.losses")
integration = import_module("fusedyolo.integrations.yolox")
patch, unpatch = integration.patch, integration.unpatch
YOLOXHead = models.YOLOXHead
MAIN = hasattr(YOLOXHead, "get_geometry_constraint")

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.autocast:FutureWarning")


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.delenv("FUSEDYOLO_DISABLE")


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    monkeypatch.setenv("FUSEDYOLO_DISABLE", "1")
    yield
    unpatch()
    integration._criteria.kept.clear()


def case(seed):
    return decoupled_case(YOLOXHead, seed)


def both(head, features, labels, rtol):
    inputs = [*features, *head.parameters()]
    expected = head(features, labels, None)
    slopes_expected = slopes(expected[0], inputs)
    patch()
    found = head(features, labels, None)
    assert integration._criteria.kept[head][1] is not None
    unpatch()
    assert len(found) == len(expected) == 6
    for i, (own, value) in enumerate(zip(found, expected, strict=True)):
        if i == 4 and not head.use_l1:
            assert own == value == 0.0
            continue
        value = torch.as_tensor(value, dtype=torch.get_default_dtype())
        torch.testing.assert_close(
            own.to(value.dtype), value, rtol=rtol, atol=1e-8, msg=lambda text, i=i: f"{i}: {text}"
        )
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


def test_l1_is_read_at_each_call(wide, kernels):
    head, features, labels = case(0)
    patch()
    for use_l1 in (False, True, False):
        head.use_l1 = use_l1
        found = head(features, labels, None)
        assert (found[4] > 0) == use_l1
        torch.testing.assert_close(found[0], sum(found[1:5]))


def test_counts_of_the_last_call():
    head, features, labels = case(0)
    labels[0, 0, 1] = -5.0  # left of the image
    patch()
    model = torch.nn.Sequential(head)
    assert fusedyolo.last_counts(model) == []
    before = set(vars(head))
    ratio = head(features, labels, None)[5]
    (found,) = fusedyolo.last_counts(torch.nn.DataParallel(model))
    assert int(found.num_invalid) == 1  # and none of the padding
    assert int(found.num_pos) == round(float(ratio) * int((labels.sum(2) > 0).sum()))
    assert set(vars(head)) == before


def test_predictions_stay_as_they_are():
    head, features, _ = case(0)
    head.eval()
    expected = head(features)
    patch()
    assert torch.equal(head(features), expected)


def test_half_labels_and_predictions(kernels):
    """As its trainer makes labels with fp16."""
    patch()
    head, features, labels = case(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head(features, labels.half(), None)
    found[0].backward()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters() if parameter.grad is not None)
    assert all(each.dtype == torch.float32 for each in found[:4])


def foreign():
    class Loss(losses_module.IOUloss):
        pass

    return {
        "giou": (lambda head: setattr(head.iou_loss, "loss_type", "giou"), "loss_type: 'giou', want 'iou'"),
        "derived": (lambda head: setattr(head, "iou_loss", Loss("none")), "iou_loss: a Loss"),
        "bce": (lambda head: setattr(head, "bcewithlog_loss", nn.MSELoss(reduction="none")), "a MSELoss"),
        "hook": (lambda head: head.iou_loss.register_forward_hook(lambda *args: None), "iou_loss: with hooks"),
        "matching": (lambda head: setattr(head, "get_assignments", head.get_assignments), "get_assignments: one of"),
    }


@pytest.mark.parametrize("late", [False, True], ids=["at once", "later"])
@pytest.mark.parametrize("name", foreign())
def test_a_head_with_foreign_parts_keeps_its_own(name, late):
    change, why = foreign()[name]
    head, features, labels = case(0)
    state = copy.deepcopy(head.state_dict())
    if late:
        patch()
        head(features, labels, None)
        unpatch()
    change(head)
    head.load_state_dict(state)
    expected = head(features, labels, None)[0]
    head.load_state_dict(state)
    patch()
    with pytest.warns(UserWarning, match=why):
        found = head(features, labels, None)[0]
    assert torch.equal(found, expected)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)  # told once
        head(features, labels, None)


def test_derived_classes_keep_theirs():
    class Derived(YOLOXHead):
        pass

    head, features, labels = case(0)
    head.__class__ = Derived
    expected = head(features, labels, None)[0]
    patch()
    assert torch.equal(head(features, labels, None)[0], expected)
    assert not integration._criteria.kept


def other_iou(monkeypatch):
    original = losses_module.IOUloss.forward
    monkeypatch.setattr(losses_module.IOUloss, "forward", lambda self, *args: original(self, *args) ** 2)


def other_radius(monkeypatch):
    name = "get_geometry_constraint" if MAIN else "get_in_boxes_info"
    original = getattr(YOLOXHead, name)

    def wider(self, boxes, strides, *args, **options):
        return original(self, boxes, strides * 2, *(each / 2 for each in args[:2]), *args[2:], **options)

    monkeypatch.setattr(YOLOXHead, name, wider)


def a_number(monkeypatch):
    original = YOLOXHead.get_losses
    monkeypatch.setattr(YOLOXHead, "get_losses", lambda self, *args, **options: original(self, *args, **options)[0])


REFUSED = {
    other_iou: "computes something else: number",
    other_radius: "computes something else: number",
    a_number: "returns something else than six numbers",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_what_computes_something_else_is_refused(change, monkeypatch):
    change(monkeypatch)
    before = YOLOXHead.forward
    with pytest.raises(ValueError, match=rf"^yolox .*: .*{REFUSED[change]}.*, want the loss of YOLOX"):
        patch()
    assert YOLOXHead.forward is before


def test_a_wrapper_of_ours_is_not_what_ours_falls_back_to():
    head, features, _ = case(0)
    expected = head.eval()(features)
    with over_a_wrapper(integration, YOLOXHead, "forward"):
        assert torch.equal(head(features), expected)


def test_two_threads_patch_at_once():
    check_two_threads(integration, YOLOXHead, "forward")


def test_unpatch_leaves_the_package_as_it_was():
    before = snapshot(models, head_module, losses_module)
    unpatch()
    patch()
    patch()
    changed = {key[1:] for key, value in snapshot(models, head_module, losses_module).items() if before[key] != value}
    assert changed == {("YOLOXHead", "forward")}
    unpatch()
    assert snapshot(models, head_module, losses_module) == before


# ---- whole models


def nano():
    torch.manual_seed(0)
    head = YOLOXHead(3, 0.25, depthwise=True)
    model = models.YOLOX(models.YOLOPAFPN(0.33, 0.25, depthwise=True), head)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = 1e-3, 0.03
    head.initialize_biases(1e-2)
    head.use_l1 = True
    return model.train()


def pictures(count, side, seed):
    """Coloured boxes on noise, and their labels."""
    gen = torch.Generator().manual_seed(seed)
    rows = objects("plain", seed, count, 3)
    found = 75 * torch.rand(count, 3, side, side, generator=gen)
    for image, label, cx, cy, w, h in rows.tolist():
        x1, x2, y1, y2 = (int(side * each) for each in (cx - w / 2, cx + w / 2, cy - h / 2, cy + h / 2))
        found[int(image), int(label), y1 : y2 + 1, x1 : x2 + 1] += 150
    return found, labels_of(rows, count, side, side)


def test_twenty_steps_are_the_same_one_by_one(wide):
    """Each from where YOLOX's own loss has taken the network: losses, and gradients of what its head is given."""
    model = nano().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=5e-4, momentum=0.9)
    for seed in range(20):
        images, labels = (each.double() for each in pictures(2, 160, seed))
        features = model.backbone(images)
        losses = model.head(features, labels, images)
        patch()
        own = model.head(features, labels, images)
        unpatch()
        for found, expected in zip(own, losses, strict=True):
            assert float(found) == pytest.approx(float(expected), rel=1e-6)
        for found, expected in zip(slopes(own[0], features), slopes(losses[0], features), strict=True):
            assert_near(found, expected, 1e-6)
        optimizer.zero_grad()
        losses[0].backward()
        optimizer.step()


LOADING = """
import pickle, torch
with open(os.environ["MODEL"], "rb") as file:
    model = pickle.load(file)
print(model.eval()(torch.zeros(1, 3, 64, 64)).sum().item())
"""


def test_a_whole_model_loads_without_us(tmp_path):
    patch()
    model = nano()
    images, labels = pictures(2, 64, 0)
    model(images, labels)["total_loss"].backward()
    copied = copy.deepcopy(model)
    assert copied(images, labels)["total_loss"].isfinite()
    model.eval()
    expected = model(torch.zeros(1, 3, 64, 64)).sum().item()
    path = tmp_path / "model.pickle"
    path.write_bytes(pickle.dumps(model))
    torch.save(model, io.BytesIO())
    assert b"fusedyolo" not in path.read_bytes()
    found = float(run_without_us("import os\n" + LOADING, MODEL=str(path)).split()[-1])
    assert found == pytest.approx(expected, rel=1e-5)
