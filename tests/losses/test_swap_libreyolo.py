"""YOLOX as LibreYOLO has it, trained with our loss and with its own: the same numbers."""

from __future__ import annotations

import copy
import pickle
from importlib import import_module

import peers
import pytest
import torch
from swaps import check_two_threads, decoupled_case, over_a_wrapper, slopes, snapshot

nn_module = peers.module("libreyolo.models.yolox.nn")
loss_module = peers.module("libreyolo.models.yolox.loss")
integration = import_module("fusedyolo.integrations.libreyolo")
patch, unpatch = integration.patch, integration.unpatch
YOLOXHead = nn_module.YOLOXHead


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    monkeypatch.setenv("FUSEDYOLO_DISABLE", "1")
    yield
    unpatch()
    integration._criteria.kept.clear()


def both(head, features, labels, rtol):
    inputs = [*features, *head.parameters()]
    expected = head(features, labels)
    wanted = slopes(expected["total_loss"], inputs)
    patch()
    found = head(features, labels)
    assert integration._criteria.kept[head][1] is not None
    unpatch()
    assert list(found) == list(expected)
    for name, value in expected.items():
        own, value = (torch.as_tensor(each).detach().item() for each in (found[name], value))
        assert own == pytest.approx(value, rel=rtol, abs=1e-8), name
    largest = max(each.abs().max().item() for each in wanted)
    for own, value in zip(slopes(found["total_loss"], inputs), wanted, strict=True):
        torch.testing.assert_close(own, value, rtol=0, atol=rtol * max(value.abs().max().item(), 1e-2 * largest))


@pytest.mark.parametrize("seed", range(12))
def test_random_cases(seed, wide):
    """In float64, where the penalties leave costs their digits."""
    both(*decoupled_case(YOLOXHead, seed), 1e-6)


@pytest.mark.parametrize("seed", [0, 4])
def test_random_cases_in_float32(seed):
    both(*decoupled_case(YOLOXHead, seed), 1e-5)


@pytest.mark.parametrize("seed", [1, 4])
def test_several_processes_divide_by_the_cells_of_all(seed, wide, monkeypatch):
    """Another process has seven; with no object at all, here and there, the sum is 1 before it is shared."""

    def of_two(value, **options):
        return (torch.as_tensor(value, dtype=torch.float32) + (7.0 if seed == 1 else 0.0)).clamp(min=1) / 2

    monkeypatch.setattr(nn_module, "all_reduce_avg_scalar", lambda value, **options: float(of_two(value)))
    monkeypatch.setattr(integration, "all_reduce_avg_scalar_tensor", of_two)
    # what is tried while patching is shared out as well
    monkeypatch.setattr(integration.decoupled, "differs", lambda *args: "")
    both(*decoupled_case(YOLOXHead, seed), 1e-6)


def test_kernels_and_l1_at_each_call(wide, monkeypatch):
    monkeypatch.delenv("FUSEDYOLO_DISABLE")
    head, features, labels = decoupled_case(YOLOXHead, 0)
    patch()
    for use_l1 in (False, True):
        head.use_l1 = use_l1
        found = head(features, labels)
        assert (found["l1_loss"] > 0) == use_l1
        torch.testing.assert_close(found["total_loss"], sum(list(found.values())[1:5]))


def test_what_is_no_training_with_labels_stays():
    head, features, _labels = decoupled_case(YOLOXHead, 0)
    for mode in (False, True):
        head.train(mode)
        expected = head(features)
        patch()
        for own, value in zip(head(features), expected, strict=True):
            assert torch.equal(own, value)
        unpatch()


def test_a_head_with_a_foreign_part_keeps_its_own():
    head, features, labels = decoupled_case(YOLOXHead, 0)
    head.iou_loss.loss_type = "giou"
    state = copy.deepcopy(head.state_dict())
    expected = head(features, labels)["total_loss"]
    head.load_state_dict(state)
    patch()
    with pytest.warns(UserWarning, match="loss_type: 'giou', want 'iou'"):
        assert torch.equal(head(features, labels)["total_loss"], expected)


def test_nothing_is_asked_of_other_processes_while_patching(monkeypatch):
    """One of them may patch alone; and CPU tensors are not for every process group."""
    distributed = peers.module("libreyolo.training.distributed")
    for name in ("is_distributed", "get_world_size"):
        monkeypatch.setattr(distributed, name, lambda: 2)
    monkeypatch.setattr(distributed.dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda value: pytest.fail("asked"))
    asked = distributed.is_distributed
    patch()
    assert distributed.is_distributed is asked


def test_what_computes_something_else_is_refused(monkeypatch):
    original = loss_module.IoULoss.forward
    monkeypatch.setattr(loss_module.IoULoss, "forward", lambda self, *args: original(self, *args) ** 2)
    before = YOLOXHead.forward
    with pytest.raises(ValueError, match=r"^libreyolo .*computes something else: number"):
        patch()
    assert YOLOXHead.forward is before


def test_a_wrapper_of_ours_is_not_what_ours_falls_back_to():
    head, features, _ = decoupled_case(YOLOXHead, 0)
    expected = head.eval()(features)
    with over_a_wrapper(integration, YOLOXHead, "forward"):
        for own, value in zip(head(features), expected, strict=True):
            assert torch.equal(own, value)


def test_two_threads_patch_at_once():
    check_two_threads(integration, YOLOXHead, "forward")


def test_unpatch_leaves_the_package_as_it_was():
    before = snapshot(nn_module, loss_module)
    patch()
    patch()
    changed = {key[1:] for key, value in snapshot(nn_module, loss_module).items() if before[key] != value}
    assert changed == {("YOLOXHead", "forward")}
    unpatch()
    assert snapshot(nn_module, loss_module) == before


def test_a_model_is_stored_as_if_nothing_had_happened():
    patch()
    model = nn_module.LibreYOLOXModel("n", 3).train()
    labels = torch.tensor([[[1.0, 30, 32, 40, 44]], [[0, 0, 0, 0, 0]]])
    model(torch.rand(2, 3, 64, 64), labels)["total_loss"].backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    assert b"fusedyolo" not in pickle.dumps(model)
