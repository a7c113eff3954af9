"""YOLOv7Loss: predictions that objects pick by cost, among what all objects of their image offer."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from torch import Tensor

from fusedyolo import Targets, YOLOv5Loss, YOLOv7Loss, assign

ANCHORS, STRIDES = [[(12, 16), (19, 36)], [(36, 75), (76, 55)], [(72, 146), (142, 110)]], (8, 16, 32)
HYP = {  # as the repository has them, with what no loss reads
    "lr0": 0.01, "box": 0.05, "cls": 0.3, "cls_pw": 1.0, "obj": 0.7, "obj_pw": 1.0, "iou_t": 0.2, "anchor_t": 4.0,
    "fl_gamma": 0.0, "hsv_h": 0.015, "paste_in": 0.15, "loss_ota": 1,
}  # fmt: skip


def loss_of(backend: str, classes: int = 3, **options) -> YOLOv7Loss:
    return YOLOv7Loss(ANCHORS, STRIDES, classes, backend=backend, **options)


def predictions(size: tuple[int, int] = (2, 3), batch: int = 2, classes: int = 3, seed: int = 0) -> list[Tensor]:
    """On maps of which the coarsest has so many cells."""
    generator = torch.Generator().manual_seed(seed)
    maps = [(size[0] << n, size[1] << n) for n in (2, 1, 0)]
    return [
        torch.randn(batch, 2 * (5 + classes), *sides, generator=generator, dtype=torch.float64).to(DEVICE)
        for sides in maps
    ]


def objects(count: int, batch: int = 2, classes: int = 3, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    image, label = (torch.randint(n, (count, 1), generator=generator) for n in (batch, classes))
    boxes = torch.rand(count, 4, generator=generator) * torch.tensor([1, 1, 0.5, 0.8]) + torch.tensor([0, 0, 0.05, 0.1])
    return torch.cat((image, label, boxes), 1).to(DEVICE)


def step(loss: YOLOv5Loss, preds: list[Tensor], targets: Tensor | Targets) -> list[Tensor]:
    """Total, counts and gradients."""
    leaves = [pred.detach().requires_grad_() for pred in preds]
    out = loss(leaves, targets)
    return [out.total.detach(), out.num_pos, out.num_invalid, *torch.autograd.grad(out.total, leaves)]


def same(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-10) -> None:
    assert [int(count) for count in got[1:3]] == [int(count) for count in want[1:3]]
    torch.testing.assert_close(got[0].double(), want[0].double(), rtol=tolerance, atol=0)
    largest = max(float(grad.abs().max()) for grad in want[3:])
    for a, b in zip(got[3:], want[3:], strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("count", [0, 1, 9, 20])
@pytest.mark.parametrize("form", ["packed", "Targets", "weighed"])
def test_kernels_are_the_reference(form, count):
    """Rows in any order, as offsets say, and with weights and a region."""
    preds, rows = predictions(), objects(count)
    targets = rows
    if form == "Targets":
        targets = Targets.from_packed(rows.cpu(), 2, capacity=count + 5).to(DEVICE)
    elif form == "weighed":
        weights = torch.linspace(0.5, 2.0, count)
        weights[1::4] = -1.0
        targets = Targets.from_packed(torch.cat((rows.cpu(), weights[:, None]), 1), 2).to(DEVICE)
    same(step(loss_of("triton"), preds, targets), step(loss_of("torch"), preds, targets))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Picked and computed in float32: of the gradient alone the last digits are the type's."""
    preds, rows = [pred.to(dtype) for pred in predictions()], objects(12)
    want = step(loss_of("torch"), [pred.double() for pred in preds], rows)
    same(step(loss_of("triton"), preds, rows), want, torch.finfo(dtype).eps)


@pytest.mark.parametrize("options", [{"neighbours": 0}, {"neighbours": 4, "anchor_t": 3.0}, {"reduction": "none"}])
def test_variants(options):
    preds, rows = predictions(seed=3), objects(11)
    got, want = (loss_of(backend, **options) for backend in ("triton", "torch"))
    if "reduction" in options:
        torch.testing.assert_close(got(preds, rows).total, want(preds, rows).total, rtol=1e-10, atol=0)
    else:
        same(step(got, preds, rows), step(want, preds, rows))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_ota_is_the_default(backend):
    """Without it each object has its own predictions, as of YOLOv5 with these gains."""
    preds, rows = predictions(), objects(9)
    own = step(loss_of(backend, loss_ota=0), preds, rows)
    plain = YOLOv5Loss(ANCHORS, STRIDES, 3, box=0.05, obj=0.7, cls=0.3, backend=backend)
    same(own, step(plain, preds, rows), 1e-15)
    assert float(own[0]) != float(step(loss_of(backend), preds, rows)[0])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_row_without_overlap_picks_one(backend):
    """All boxes are far smaller than cells, and lie away from the object: the least cost of classes decides."""
    preds = predictions((1, 1), batch=1, seed=5)
    for pred in preds:
        pred.unflatten(1, (2, -1))[:, :, :2] = -8.0  # the corner before the cell
        pred.unflatten(1, (2, -1))[:, :, 2:4] = -12.0
    rows = torch.tensor([[0, 1, 0.53, 0.53, 0.02, 0.9], [0, 2, 0.9, 0.9, 0.9, 0.02]], device=DEVICE)
    rows = torch.cat((rows, torch.tensor([[0, 0, 0.5, 0.5, 0.5, 0.5]], device=DEVICE)))
    found = step(loss_of(backend), preds, rows)
    assert int(found[1]) in (1, 2, 3)
    same(found, step(loss_of("torch"), preds, rows))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_is_far_may_cost_less_than_what_is_near(backend):
    """Where predictions that an object overlaps are sure of another class it takes those that it does not overlap."""
    preds = predictions((2, 2), batch=1, seed=7)
    for pred in preds:
        own = pred.unflatten(1, (2, -1))
        own[:, :, 4:] = 0.0
        own[:, :, 6, : pred.shape[2] // 2] = 60.0  # of the upper half of the image
        own[:, :, 4, : pred.shape[2] // 2] = 60.0
    rows = torch.tensor([[0, 0, 0.3, 0.25, 0.3, 0.3], [0, 0, 0.6, 0.9, 0.1, 0.1]], device=DEVICE)
    criterion = loss_of(backend)
    matched = assign(criterion, preds, rows)
    lower = [level.row[0, :, level.row.shape[2] // 2 :] for level in matched.levels]
    assert any(bool((row == 0).any()) for row in lower)
    same(step(criterion, preds, rows), step(loss_of("torch"), preds, rows))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_equal_rows(backend):
    """Their offers are the same predictions twice, each of which is trained as often as it is picked."""
    preds, row = predictions(batch=1), objects(1, batch=1)
    once, twice = (step(loss_of(backend), preds, row.repeat(n, 1)) for n in (1, 2))
    assert 1 <= int(twice[1]) <= 2 * int(once[1])
    same(twice, step(loss_of("torch"), preds, row.repeat(2, 1)))


def test_a_nan_class_logit_is_picked_by_none():
    preds, rows = predictions(), objects(9)
    taken = assign(loss_of("torch"), preds, rows).levels[0].row
    at = tuple((taken >= 0).nonzero()[0].tolist())
    for pred in preds[:1]:
        pred.unflatten(1, (2, -1))[at[0], at[1], 5:, at[2], at[3]] = torch.nan
    for backend in ("torch", "triton"):
        found = step(loss_of(backend), preds, rows)
        assert found[0].isfinite()
        assert int(assign(loss_of(backend), preds, rows).levels[0].row[at]) == -1
    same(step(loss_of("triton"), preds, rows), step(loss_of("torch"), preds, rows))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_crowd_beside_empty_images(backend):
    preds, rows = predictions((1, 2), batch=3), objects(40, batch=1)
    rows[:, 0] = 1
    found = step(loss_of(backend), preds, rows)
    assert int(found[1]) > 20
    assert all(float(grad[[0, 2]].abs().max()) > 0 for grad in found[3:])  # objectness alone
    same(found, step(loss_of("torch"), preds, rows))


def test_hyper_parameters_of_the_repository():
    loss = YOLOv7Loss.from_hyp(HYP, ANCHORS, STRIDES, 3, gr=1.0)
    assert set(loss.unused) == {"lr0", "iou_t", "hsv_h", "paste_in"}
    assert loss.head.by_cost
    assert not YOLOv7Loss.from_hyp(HYP | {"loss_ota": 0}, ANCHORS, STRIDES, 3).head.by_cost
    with pytest.raises(ValueError, match="loss_ota: 2, want 0 or 1"):
        YOLOv7Loss(ANCHORS, STRIDES, 3, loss_ota=2)
    with pytest.raises(ValueError, match="loss_ota"):
        YOLOv5Loss(ANCHORS, STRIDES, 3, loss_ota=1)
