"""Ultralytics' detectors, trained with our loss and with its own: the same numbers."""

from __future__ import annotations

import copy
import json
import math
import warnings
from importlib import import_module
from types import SimpleNamespace

import peers
import pytest
import torch
from PIL import Image
from swaps import MODES, TORCHVISION, assert_near, middles, objects, run_without_us, slopes, snapshot
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


@pytest.fixture
def kernels(monkeypatch):
    """What is patched runs them; tests of the reference alone take a tenth of the time."""
    monkeypatch.delenv("FUSEDYOLO_DISABLE")


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    monkeypatch.setenv("FUSEDYOLO_DISABLE", "1")
    yield
    unpatch()
    integration._criteria.kept.clear()


@pytest.fixture
def patched():
    patch()


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
    assert all(criterion is not None for _, criterion, _ in integration._criteria.kept.values())
    assert integration._criteria.kept
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


def test_a_case_on_the_kernels(wide, strict, kernels):
    model, preds, batch = case(1)
    both(lambda: v8(model), preds, batch, RTOL)


@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolo26n.yaml"])
def test_a_step_on_the_kernels(name, strict, kernels):
    model, batch = built(name), images(1, 64)
    model.criterion = model.init_criterion()
    both(lambda: model.criterion, model(batch["img"]), batch, 1e-4)


@pytest.mark.parametrize("seed", range(SEEDS // 2))
def test_random_cases_of_two_branches(seed, wide, strict):
    model, preds, batch = case(seed + 100, e2e=True)
    both(lambda: E2ELoss(model), preds, batch, RTOL, update=seed % 6)


def operators_of(loss, preds, batch, monkeypatch):
    """How often a call asks for the kernels."""
    from fusedyolo import ops

    through, seen = ops.call, []
    with monkeypatch.context() as patched:
        patched.setattr(ops, "call", lambda op, *given, **more: seen.append(op) or through(op, *given, **more))
        loss(preds, batch)
    return len(seen)


def test_both_branches_at_once(kernels, patched, monkeypatch):
    """As long as both are replaced, and alike."""
    model, preds, batch = case(0, e2e=True)
    loss = E2ELoss(model)
    assert operators_of(loss, preds, batch, monkeypatch) == 1
    assert operators_of(loss, (None, preds), batch, monkeypatch) == 1  # as in validation
    loss.one2one.assigner.alpha = 0.7
    assert operators_of(loss, preds, batch, monkeypatch) == 2
    loss.one2one = v8(model, tal_topk=7, tal_topk2=1)
    loss.one2many.bbox_loss = nn.Identity()
    with pytest.warns(UserWarning, match="keeps its own loss") as told, pytest.raises(TypeError):
        loss(preds, batch)
    assert told[0].filename == __file__
    loss = E2ELoss(model)
    loss.one2one.loss = lambda preds, batch: (torch.ones(3), {"box_loss": 4})
    assert loss(preds, batch)[1] == {"box_loss": 4}

    class Derived(E2ELoss):
        pass

    assert operators_of(Derived(model), preds, batch, monkeypatch) == 2


def test_a_pair_that_does_otherwise_goes_on_calling_its_losses(monkeypatch, kernels):
    monkeypatch.setattr(E2ELoss, "__call__", lambda self, preds, batch: self.one2one.loss(preds["one2one"], batch))
    own = E2ELoss.__call__
    patch()
    assert E2ELoss.__call__ is own
    model, preds, batch = case(0, e2e=True)
    assert operators_of(E2ELoss(model), preds, batch, monkeypatch) == 1  # of one branch


@pytest.mark.parametrize("seed", [seed for seed in range(SEEDS) if MODES[seed % 6] == "plain"])
def test_random_cases_of_the_peer_as_it_is_in_float32(seed):
    model, preds, batch = case(seed)
    both(lambda: v8(model), preds, batch, RTOL)


@pytest.mark.parametrize("seed", range(12))
def test_edges_of_boxes_in_whole_pixels_on_the_middles_of_cells(seed, strict):
    """As boxes of real images often are: whether an edge holds such a cell is a matter of the peer's rounding."""
    model, preds, _ = case(6 * seed + 2)
    height, width = (8 * side for side in preds["feats"][0].shape[2:])
    assert (height, width) == (96, 64)  # whose thirds no float has
    gen = torch.Generator().manual_seed(seed)
    low = torch.randint(0, 10, (40, 2), generator=gen) * 4
    side = torch.randint(2, 7, (40, 2), generator=gen) * 4
    corners = torch.cat((low, low + side), 1).float()
    boxes = torch.cat(((corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]), 1)
    boxes = boxes / torch.tensor((width, height) * 2)
    image = torch.arange(40) // 14
    label = torch.randint(model.model[0].nc, (40,), generator=gen)
    both(lambda: v8(model), preds, batch_of(torch.cat((image[:, None], label[:, None], boxes), 1)), RTOL)


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


@pytest.mark.parametrize("e2e", [False, True])
def test_counts_of_the_last_call(e2e, patched):
    """Of the loss that a model has when it has been trained, and of both branches."""
    model, preds, batch = case(0, e2e=e2e)
    batch["cls"][0] = 99.0
    loss = E2ELoss(model) if e2e else v8(model)
    holder = nn.Linear(1, 1)
    holder.criterion = loss
    assert fusedyolo.last_counts(holder) == []
    loss(preds, batch)
    found = fusedyolo.last_counts(nn.DataParallel(holder))
    assert found == fusedyolo.last_counts(loss)
    assert [int(each.num_invalid) for each in found] == [1] * (1 + e2e)
    assert all(int(each.num_pos) > 0 for each in found)


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


# ---- what may differ in a call


def test_mixed_types_as_text_heads_have_them_under_autocast(patched):
    model, preds, batch = case(0)
    boxes = preds["boxes"].detach().bfloat16().requires_grad_()
    mixed = preds | {"boxes": boxes}
    found = v8(model)(mixed, batch)[0]
    found.sum().backward()
    torch.testing.assert_close(found, v8(model)(preds | {"boxes": boxes.float()}, batch)[0])
    assert boxes.grad.dtype == torch.bfloat16
    assert boxes.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_predictions(dtype, patched):
    """As autocast makes them; Ultralytics computes distances in half precision."""
    model, preds, batch = case(0)
    for name in ("boxes", "scores"):
        preds[name] = preds[name].detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = v8(model)(preds, batch)[0]
    assert found.dtype == torch.float32
    (found.sum() * 2**10).backward()
    assert all(preds[name].grad.isfinite().all() for name in ("boxes", "scores"))
    wide = {name: value.float() if name != "feats" else value for name, value in preds.items()}
    torch.testing.assert_close(found, v8(model)(wide, batch)[0])
    unpatch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(found, v8(model)(preds, batch)[0], rtol=5e-2, atol=1e-2)


def test_predictions_of_validation(strict):
    """With an inference output before them, in inference mode; what is first made there can be trained with."""
    model, preds, batch = case(0)
    both(lambda: v8(model), preds, batch, RTOL)
    patch()
    loss = v8(model)
    with torch.inference_mode():
        found, items = loss((torch.zeros(()), preds), batch)
    assert not found.requires_grad
    trained, _ = loss(preds, batch)
    assert torch.equal(found, trained)
    trained.sum().backward()
    assert list(items) == ["box_loss", "cls_loss", "dfl_loss"]


def test_compiled(patched):
    model, preds, batch = case(0)
    loss = v8(model)
    expected = loss(preds, batch)[0]
    found = torch.compile(loss.loss, backend="eager")(preds, batch)[0]
    torch.testing.assert_close(found, expected)


def test_disabled(patched, kernels, monkeypatch):
    """By the environment: the reference in place of kernels."""
    model, preds, batch = case(0)
    loss = v8(model)
    expected = loss(preds, batch)[0]
    monkeypatch.setenv("FUSEDYOLO_DISABLE", "1")
    torch.testing.assert_close(loss(preds, batch)[0], expected)


# ---- who keeps their own loss


KEPT = ("yolov8n-seg.yaml", "yolov8n-pose.yaml", "yolov8n-obb.yaml", "yolo26n-obb.yaml")


@pytest.mark.parametrize("name", KEPT)
def test_losses_of_other_tasks_stay_as_they_are(name):
    """The same bits, and our criterion is never asked for."""
    torch.manual_seed(0)
    model = YOLO(name, verbose=False).model
    model.args = SimpleNamespace(**trainer.get_cfg().__dict__)
    batch = images(2, 64) | {"masks": torch.randint(0, 2, (2, 16, 16)).float()}
    batch["keypoints"] = torch.rand(len(batch["cls"]), 17, 3)
    batch["cls"] = torch.zeros_like(batch["cls"])
    if "obb" in name:
        batch["bboxes"] = torch.cat((batch["bboxes"], torch.zeros(len(batch["cls"]), 1)), 1)
    model.train()
    state = copy.deepcopy(model.state_dict())
    expected = model.loss(batch)
    patch()
    model.load_state_dict(state)
    model.criterion = None
    found = model.loss(batch)
    assert torch.equal(found[0], expected[0])
    assert not integration._criteria.kept


def foreign():
    """Changes to a loss that is v8DetectionLoss, and what is said of them."""

    class Assigner(tal.TaskAlignedAssigner):
        pass

    class Box(losses.BboxLoss):
        pass

    def swap(name, make):
        return lambda loss: setattr(loss, name, make(loss))

    def cut(loss):
        loss.assigner.forward = loss.assigner.forward

    return {
        "assigner": (
            swap("assigner", lambda loss: Assigner(10, loss.nc, 0.5, stride=[8, 16, 32])),
            "assigner: a Assig",
        ),
        "box": (swap("bbox_loss", lambda loss: Box(loss.reg_max)), "bbox_loss: a Box"),
        "bce": (swap("bce", lambda loss: nn.MultiLabelSoftMarginLoss(reduction="none")), "bce: a MultiLabel"),
        "weights": (
            swap("bce", lambda loss: nn.BCEWithLogitsLoss(torch.ones(3) / 2, reduction="none")),
            "with weights",
        ),
        "hook": (lambda loss: loss.bbox_loss.register_forward_hook(lambda *args: None), "bbox_loss: with hooks"),
        "forward": (cut, "assigner.forward: one of its own"),
        "decode": (swap("bbox_decode", lambda loss: loss.bbox_decode), "bbox_decode: one of its own"),
        "eps": (lambda loss: setattr(loss.assigner, "eps", 1e-6), "assigner.eps"),
        "positives": (lambda loss: setattr(loss.bce, "pos_weight", torch.full((3,), 5.0)), "bce: with weights"),
        "bins": (lambda loss: setattr(loss.bbox_loss.dfl_loss, "reg_max", 8), "dfl_loss.reg_max: 8, want 16"),
    }


@pytest.mark.parametrize("late", [False, True], ids=["at once", "later"])
@pytest.mark.parametrize("name", foreign())
def test_a_loss_with_foreign_parts_keeps_its_own(name, late, patched):
    change, why = foreign()[name]
    model, preds, batch = case(0)
    plain = v8(model)(preds, batch)
    loss = v8(model)
    if late:
        loss(preds, batch)
    change(loss)
    if name == "bce":
        loss.bce.forward = lambda x, t: nn.functional.binary_cross_entropy_with_logits(x, t, reduction="none")
    with pytest.warns(UserWarning, match=why):
        found = loss(preds, batch)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once
        loss(preds, batch)
    unpatch()
    assert torch.equal(loss(preds, batch)[0], found)
    assert plain[0].shape == found.shape


def test_derived_classes_keep_theirs(patched):
    class Derived(v8):
        pass

    model, preds, batch = case(0)
    found = Derived(model)(preds, batch)[0]
    unpatch()
    assert torch.equal(v8(model)(preds, batch)[0], found)
    assert not integration._criteria.kept


# ---- refusal, and the way back


def test_unpatch_leaves_the_package_as_it_was():
    modules = losses, tasks, tal, trainer
    before = snapshot(*modules)
    unpatch()  # nothing to do
    patch()
    patch()
    after = snapshot(*modules)
    changed = {key for key, value in after.items() if before[key] != value}
    assert {key[1:] for key in changed} == {("v8DetectionLoss", "loss"), ("E2ELoss", "__call__")}
    unpatch()
    assert snapshot(*modules) == before


def test_a_wrapper_of_ours_is_not_what_ours_falls_back_to(monkeypatch):
    model, preds, batch = case(0, e2e=True)
    patch()
    inner = E2ELoss.__call__
    monkeypatch.setattr(E2ELoss, "__call__", lambda *given: inner(*given))
    unpatch()
    patch()

    class Derived(E2ELoss):
        pass

    assert Derived(model)(preds, batch)[0].shape == (3,)
    monkeypatch.undo()
    unpatch()


def test_what_another_has_put_there_since_is_left_alone(monkeypatch):
    patch()
    own = v8.loss
    monkeypatch.setattr(v8, "loss", lambda self, preds, batch: own(self, preds, batch))
    other, (model, preds, batch) = v8.loss, case(0)
    unpatch()
    assert v8.loss is other
    assert v8(model)(preds, batch)[0].shape == (3,)
    monkeypatch.undo()
    unpatch()


def as_before_128(monkeypatch):
    """A side below the first stride counts for the second one."""

    def inside(self, middle, boxes, mask, eps=1e-9):
        centre, side = (boxes[..., 2:] + boxes[..., :2]) / 2, boxes[..., 2:] - boxes[..., :2]
        half = torch.where(side < self.stride[0], self.stride[1], side)[..., None, :] / 2
        return (((middle - centre[..., None, :]).abs() - half).amax(-1) < -eps) & mask.bool()

    monkeypatch.setattr(tal.TaskAlignedAssigner, "select_candidates_in_gts", inside)


def no_enlarging(monkeypatch):
    def inside(self, middle, boxes, mask, eps=1e-9):
        low, high = boxes[..., None, :2], boxes[..., None, 2:]
        return (torch.cat((middle - low, high - middle), -1).amin(-1) > eps) & mask.bool()

    monkeypatch.setattr(tal.TaskAlignedAssigner, "select_candidates_in_gts", inside)


def other_iou(monkeypatch):
    original = losses.bbox_iou
    monkeypatch.setattr(losses, "bbox_iou", lambda *args, CIoU, **options: original(*args, GIoU=CIoU, **options))


def a_sum(monkeypatch):
    original = v8.loss
    monkeypatch.setattr(v8, "loss", lambda self, *args: (original(self, *args)[0].sum(), original(self, *args)[1]))


def maps_wanted(monkeypatch):
    monkeypatch.setattr(v8, "loss", lambda self, preds, batch: preds[0].shape)


def other_gradient(monkeypatch):
    original = v8.loss
    monkeypatch.setattr(
        v8, "loss", lambda self, *args: (lambda t, i: (t.detach() + (t - t.detach()) * 1.1, i))(*original(self, *args))
    )


REFUSED = {
    as_before_128: "its assigner does otherwise with objects smaller than its second stride",
    no_enlarging: "its assigner does otherwise with objects smaller than its second stride",
    other_iou: "computes something else: number",
    other_gradient: "computes something else: number 4",
    a_sum: "returns something else than three parts and a dictionary",
    maps_wanted: "stops at a call: KeyError",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_what_computes_something_else_is_refused(change, monkeypatch):
    change(monkeypatch)
    before = v8.loss
    with pytest.raises(ValueError, match=rf"^ultralytics [\d.]+: .*{REFUSED[change]}.*, want the loss of Ultralytics"):
        patch()
    assert v8.loss is before


def test_patching_leaves_random_numbers_and_modes_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        patch()
    assert torch.equal(torch.rand(2), expected)


# ---- whole models


def images(count, side, seed=0):
    """A batch of pictures of coloured boxes on noise, and their rows."""
    gen = torch.Generator().manual_seed(seed)
    rows = objects("plain", seed, count, 3)
    pictures = 0.3 * torch.rand(count, 3, side, side, generator=gen)
    for image, label, cx, cy, w, h in rows.tolist():
        x1, x2, y1, y2 = (int(side * each) for each in (cx - w / 2, cx + w / 2, cy - h / 2, cy + h / 2))
        pictures[int(image), int(label), y1 : y2 + 1, x1 : x2 + 1] += 0.6
    return {"img": pictures, **batch_of(rows)}


def built(name):
    torch.manual_seed(0)
    model = YOLO(name, verbose=False).model
    model.args = SimpleNamespace(box=7.5, cls=0.5, dfl=1.5, epochs=3)
    return model.train()


def curve(model, batches):
    """Losses of steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    found = []
    for i, batch in enumerate(batches):
        total, items = model.loss(batch)
        optimizer.zero_grad()
        total.sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        found.append(torch.stack((*total.detach(), *items.values())))
        if i % 7 == 6 and hasattr(model.criterion, "update"):
            model.criterion.update()
    return torch.stack(found)


def test_twenty_steps_have_the_same_curve(wide, strict):
    """In float64: in float32 rounding alone takes two runs of a network apart after ten steps."""
    batches = [{key: value.double() for key, value in images(2, 160, seed % 2).items()} for seed in range(20)]
    model = built("yolov8n.yaml").double()
    same = copy.deepcopy(model)
    expected = curve(model, batches)
    patch()
    found = curve(same, batches)
    assert (expected[-1] - expected[1]).abs().max() > 0.2  # of the same images
    torch.testing.assert_close(found[:1], expected[:1], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolo26n.yaml"])
def test_twenty_steps_are_the_same_one_by_one(name, strict):
    """Each from where Ultralytics' own loss has taken the network: parts, and gradients of what it predicts.

    In float32, of whose rounding the metric takes the sixth power.
    """
    model = built(name)
    model.criterion = model.init_criterion()
    optimizer = torch.optim.SGD(model.parameters(), lr=2e-3, momentum=0.9)
    for seed in range(20):
        batch = images(2, 160, seed)
        preds = model(batch["img"])
        total, items = model.criterion(preds, batch)
        patch()
        own_total, own_items = model.criterion(preds, batch)
        unpatch()
        torch.testing.assert_close(own_total, total, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(own_items, items, rtol=1e-4, atol=1e-6)
        grads, own_grads = (slopes(each.sum(), tensors(preds)) for each in (total, own_total))
        for own, grad in zip(own_grads, grads, strict=True):
            assert_near(own, grad, 1e-4)
        optimizer.zero_grad()
        total.sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Of a training of one epoch on eight generated images. No box is suppressed: torchvision's part may not load."""
    monkeypatch.setattr(peers.torchvision().ops, "nms", lambda boxes, scores, iou: scores.argsort(descending=True))
    for part, seed in (("train", 0), ("val", 1)):
        folder = tmp_path / "data" / "images" / part
        folder.mkdir(parents=True)
        (tmp_path / "data" / "labels" / part).mkdir(parents=True)
        batch = images(8, 160, seed)
        for i, picture in enumerate(batch["img"]):
            pixels = (255 * picture.clamp(max=1)).byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(folder / f"{i}.png")
            own = batch["batch_idx"] == i
            rows = torch.cat((batch["cls"][own], batch["bboxes"][own]), 1).tolist()
            lines = (" ".join([str(int(row[0])), *(f"{value:.6f}" for value in row[1:])]) for row in rows)
            (tmp_path / "data" / "labels" / part / f"{i}.txt").write_text("\n".join(lines))
    data = tmp_path / "data.yaml"
    data.write_text(f"path: {tmp_path / 'data'}\ntrain: images/train\nval: images/val\nnames: [red, green, blue]\n")
    return {
        **{"data": str(data), "epochs": 1, "imgsz": 160, "batch": 4, "nbs": 4, "workers": 0, "device": "cpu"},
        **{"amp": False, "plots": False, "warmup_epochs": 0, "mosaic": 0, "optimizer": "SGD", "pretrained": False},
        **{"project": str(tmp_path / "runs"), "name": "run", "exist_ok": True, "verbose": False, "cache": False},
    }


LOADING = """
import os, torch
from ultralytics import YOLO
model = YOLO(os.environ["MODEL"]).model
print("sum", model.float().eval()(torch.zeros(1, 3, 64, 64))[0].double().sum().item())
"""


def test_a_training_and_its_checkpoint_without_us(settings, tmp_path):
    """Through ``YOLO.train`` with its validation; by our trainer and by its own after a patch, to the same end."""
    found, calls = [], []
    for name, ours in (("theirs", None), ("patched", patch), ("trainer", integration.Trainer)):
        if name == "patched":
            ours()
        seen = []
        model = YOLO("yolo26n.yaml", verbose=False)
        model.add_callback("on_train_batch_end", lambda trainer, seen=seen: seen.append(v8.loss is integration._loss))
        model.train(**settings | {"name": name}, **({"trainer": ours} if name == "trainer" else {}))
        calls.append(seen)
        found.append([row.split(",") for row in (tmp_path / "runs" / name / "results.csv").read_text().splitlines()])
        unpatch()
    assert calls == [[False] * 2, [True] * 2, [True] * 2]
    assert found[0][0] == found[1][0] == found[2][0]
    numbers = [
        {key.strip(): float(value) for key, value in zip(head, row, strict=True) if key.strip() != "time"}
        for head, row in found
    ]
    assert numbers[1] == numbers[2]
    for key, value in numbers[0].items():
        if "loss" in key:
            assert numbers[1][key] == pytest.approx(value, rel=1e-2), key
    path = tmp_path / "runs" / "trainer" / "weights" / "best.pt"
    assert b"fusedyolo" not in path.read_bytes()
    expected = YOLO(path).model.float().eval()(torch.zeros(1, 3, 64, 64))[0].double().sum().item()
    for safe in ("0", "1"):
        printed = run_without_us(LOADING, MODEL=str(path), ULTRALYTICS_SAFE_LOAD=safe)
        assert float(printed.split()[-1]) == pytest.approx(expected, rel=1e-4)


def test_a_whole_model_loads_without_us(patched, tmp_path):
    model = built("yolov8n.yaml")
    model.loss(images(2, 64))[0].sum().backward()
    assert isinstance(model.criterion, v8)
    assert copy.deepcopy(model).loss(images(2, 64))[0].isfinite().all()
    path = tmp_path / "model.pt"
    torch.save(model, path)
    assert b"fusedyolo" not in path.read_bytes()
    code = """
import os, torch
model = torch.load(os.environ["MODEL"], weights_only=False)
print(type(model.criterion).__name__, model.eval()(torch.zeros(1, 3, 64, 64))[0].shape)
"""
    assert "v8DetectionLoss torch.Size([1, 84, 84])" in run_without_us(code, MODEL=str(path))


WORKER = """
import os
if "RANK" in os.environ:
    {torchvision}
    import json
    import torch.distributed as dist
    from torch import nn
    from ultralytics.engine.trainer import BaseTrainer
    from ultralytics.utils.loss import v8DetectionLoss

    class OnCPU(nn.parallel.DistributedDataParallel):
        def __init__(self, module, device_ids=None, **options):
            super().__init__(module, **options)

    make, train = BaseTrainer.__init__, BaseTrainer._do_train

    def made(self, *args, **options):
        make(self, *args, **options)
        self.world_size, self.ddp = 2, False

    def trained(self):
        before = v8DetectionLoss.loss.__module__
        train(self)
        total = sum(parameter.double().sum().item() for parameter in self.model.parameters())
        with open(os.path.join({out!r}, os.environ["RANK"]), "w") as file:
            json.dump([before, type(self.model).__name__, total, self.loss.item()], file)

    def joined(self):
        self.device = torch.device("cpu")
        dist.init_process_group("gloo")

    BaseTrainer.__init__, BaseTrainer._do_train, BaseTrainer._setup_ddp = made, trained, joined
    BaseTrainer.final_eval = lambda self: None  # asks for a GPU
    nn.parallel.DistributedDataParallel = OnCPU
"""


def test_processes_of_a_distributed_training_are_patched(settings, tmp_path, monkeypatch):
    """Two of them, on a CPU by gloo, started by Ultralytics itself from a process in which nothing is patched."""
    pytest.importorskip("cloudpickle")
    out = tmp_path / "out"
    out.mkdir()
    shim = TORCHVISION.strip().replace("\n", "\n    ")
    (out / "sitecustomize.py").write_text(WORKER.format(torchvision=shim, out=str(out)))
    monkeypatch.setenv("PYTHONPATH", str(out))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    trainer = integration.Trainer(overrides=settings | {"model": "yolo26n.yaml"})
    trainer.world_size, trainer.ddp = 2, True
    trainer.train()
    assert v8.loss is not integration._loss
    found = [json.loads((out / rank).read_text()) for rank in "01"]
    for module, model, total, loss in found:
        assert module == "fusedyolo.integrations.ultralytics"
        assert model == "OnCPU"
        assert math.isfinite(loss)
        assert total == pytest.approx(found[0][2], rel=1e-12)
    assert found[0][3] != found[1][3]  # each has images of its own
