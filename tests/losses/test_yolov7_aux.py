"""YOLOv7AuxLoss: auxiliary heads, of which objects pick by what the lead heads cost them."""

from __future__ import annotations

from typing import Any

import golden
import pytest
import torch
from conftest import DEVICE
from test_yolov7 import ANCHORS, HYP, STRIDES, objects, predictions
from torch import Tensor

import fusedyolo
from fusedyolo import Targets, YOLOv7AuxLoss, YOLOv7Loss
from fusedyolo.distributed import GlobalLoss

PARTS = [f"{head}_{part}" for head in ("lead", "aux") for part in ("box", "obj", "cls")]


def loss_of(backend: str, **options: Any) -> YOLOv7AuxLoss:
    return YOLOv7AuxLoss(ANCHORS, STRIDES, 3, backend=backend, **options)


def maps(seed: int = 0, **options: Any) -> list[Tensor]:
    """Lead maps and auxiliary ones."""
    return predictions(seed=seed, **options) + predictions(seed=seed + 100, **options)


def step(loss: YOLOv7AuxLoss, preds: list[Tensor], targets: Any, weight: float = 1.0) -> tuple[Any, list[Tensor]]:
    leaves = [pred.detach().requires_grad_() for pred in preds]
    out = loss(leaves, targets)
    return out, list(torch.autograd.grad(out.total, leaves, torch.full_like(out.total, weight)))


def same(got: tuple[Any, list[Tensor]], want: tuple[Any, list[Tensor]], tolerance: float = 1e-10) -> None:
    (a, grads), (b, others) = got, want
    assert list(a.parts) == list(b.parts) == PARTS
    assert (int(a.num_pos), int(a.num_invalid)) == (int(b.num_pos), int(b.num_invalid))
    torch.testing.assert_close(a.total.double(), b.total.double(), rtol=tolerance, atol=0)
    torch.testing.assert_close(a.parts, b.parts, rtol=max(tolerance, 1e-9), atol=1e-12, check_dtype=False)
    largest = max(float(grad.abs().max()) for grad in others)
    for grad, other in zip(grads, others, strict=True):
        torch.testing.assert_close(grad.double(), other.double(), rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize(("backend", "dtype"), [("torch", torch.float64), ("triton", torch.float32)])
@pytest.mark.parametrize("name", golden.names("torch", "yolov7_aux_*"))
def test_what_yolov7_computed(name, dtype, backend):
    """``ComputeLossAuxOTA`` in float64."""
    data = golden.arrays(name)
    meta = data["meta"]
    loss = YOLOv7AuxLoss(meta["anchors_px"], meta["strides"], meta["nc"], backend=backend, gr=meta["gr"], **meta["hyp"])
    preds = [data[f"pred_{i}"].to(DEVICE, dtype) for i in range(6)]
    out, grads = step(loss, preds, data["targets"].to(DEVICE))
    total = float(data["total"])
    assert float(out.total.detach()) == pytest.approx(total, rel=1e-5)
    for part in ("box", "obj", "cls"):
        found = float(out.parts[f"lead_{part}"] + out.parts[f"aux_{part}"])
        assert found == pytest.approx(float(data[f"loss_{part}"]), abs=1e-5 * total)
    largest = max(float(data[f"grad_{i}"].abs().max()) for i in range(6))
    for i, grad in enumerate(grads):
        torch.testing.assert_close(grad.cpu().float(), data[f"grad_{i}"], rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("count", [0, 1, 9, 20])
@pytest.mark.parametrize("form", ["packed", "Targets", "weighed"])
def test_kernels_are_the_reference(form, count):
    preds, targets = maps(), objects(count)
    if form == "Targets":
        targets = Targets.from_packed(targets.cpu(), 2, capacity=count + 5).to(DEVICE)
    elif form == "weighed":
        weights = torch.linspace(0.5, 2.0, count)
        weights[1::4] = -1.0
        targets = Targets.from_packed(torch.cat((targets.cpu(), weights[:, None]), 1), 2).to(DEVICE)
    same(step(loss_of("triton"), preds, targets, 0.5), step(loss_of("torch"), preds, targets, 0.5))


@pytest.mark.parametrize("options", [{"aux": 0.0}, {"class_weights": (1.0, 3.0, 0.5)}, {"label_smoothing": 0.1}])
def test_variants(options):
    preds, rows = maps(3), objects(11)
    same(step(loss_of("triton", **options), preds, rows), step(loss_of("torch", **options), preds, rows))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_objects_pick_auxiliary_predictions_by_the_lead_heads(backend):
    """Which auxiliary predictions are trained hangs on the lead maps, and not on what they are themselves."""
    lead, rows = predictions(), objects(9)

    def trained(of_lead: list[Tensor], seed: int) -> Tensor:
        _, grads = step(loss_of(backend, obj=0.0), of_lead + predictions(seed=seed), rows)
        return torch.cat([(grad != 0).unflatten(1, (2, -1)).any(2).flatten() for grad in grads[3:]])

    usual = trained(lead, 7)
    assert usual.any()
    assert torch.equal(usual, trained(lead, 8))
    assert not torch.equal(usual, trained(predictions(seed=1), 7))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_heads_are_two_losses(backend):
    """The lead one is a YOLOv7Loss; where auxiliary maps are the lead ones, the other is, too."""
    lead, rows = predictions(), objects(9)
    out, grads = step(loss_of(backend), lead + lead, rows)
    for head, options in (("lead", {}), ("aux", {"neighbours": 4, "box": 0.0125, "obj": 0.175, "cls": 0.075})):
        alone = YOLOv7Loss(ANCHORS, STRIDES, 3, topk=20, backend=backend, **options)
        leaves = [pred.detach().requires_grad_() for pred in lead]
        want = alone(leaves, rows)
        for part, value in want.parts.items():
            torch.testing.assert_close(out.parts[f"{head}_{part}"], value, rtol=1e-10, atol=0)
        own = grads[:3] if head == "lead" else grads[3:]
        for got, other in zip(own, torch.autograd.grad(want.total, leaves), strict=True):
            torch.testing.assert_close(got, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_maps_of_other_layouts_and_types(backend):
    """Auxiliary maps may lie otherwise than lead maps, and be of another type."""
    preds, rows = [pred.float() for pred in maps()], objects(9)
    mixed = preds[:3] + [pred.half().contiguous(memory_format=torch.channels_last) for pred in preds[3:]]
    want = step(loss_of("torch"), [pred.double() for pred in mixed], rows)
    same(step(loss_of(backend), mixed, rows), want, 1e-3)
    five = [pred.unflatten(1, (2, -1)).permute(0, 1, 3, 4, 2).contiguous() for pred in preds]
    out = loss_of(backend)({"lead": five[:3], "aux": five[3:]}, rows)
    torch.testing.assert_close(out.total, loss_of(backend)(preds, rows).total, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_loss_of_each_image(backend):
    preds, rows = maps(), objects(9)
    out, grads = step(loss_of(backend, reduction="none"), preds, rows)
    want, others = step(loss_of("torch"), preds, rows)
    assert out.total.shape == (2,)
    torch.testing.assert_close(out.total.sum(), want.total, rtol=1e-10, atol=0)
    for grad, other in zip(grads, others, strict=True):
        torch.testing.assert_close(grad, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_pieces_add_up(backend):
    """As a loss of the batch of all processes takes them apart."""
    preds, rows = maps(), objects(9)
    criterion = loss_of(backend)
    own, out = criterion.apart(preds, rows), criterion(preds, rows)
    assert own.shares(own.amounts).shape == own.pieces.shape
    torch.testing.assert_close(own.pieces.sum(), out.total, rtol=1e-10, atol=0)
    for name, (part, where) in own.parts.items():
        torch.testing.assert_close(part.sum(), out.parts[name], rtol=1e-10, atol=1e-15)
        assert own.pieces[where].shape == part.shape
    assert float(GlobalLoss(criterion)(preds, rows).total) == float(out.total)


def test_halves_of_a_batch_make_the_whole():
    """As two processes have it, each with an image, of which one has more objects than the other."""
    preds, rows = maps(), objects(9)
    criterion = loss_of("torch")
    halves = []
    for image in range(2):
        own = rows[rows[:, 0] == image].clone()
        own[:, 0] = 0
        halves.append(criterion.apart([pred[image : image + 1] for pred in preds], own))
    every = halves[0].amounts + halves[1].amounts
    means = [(2 * own.shares(every) / own.shares(own.amounts) * own.pieces).sum() for own in halves]
    torch.testing.assert_close(sum(means) / 2, criterion(preds, rows).total, rtol=1e-9, atol=0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_detects_is_the_lead_head(backend):
    preds, rows = maps(), objects(9)
    criterion = loss_of(backend)
    alone = YOLOv7Loss(ANCHORS, STRIDES, 3, topk=20, backend=backend)
    detections = fusedyolo.select(preds[:3], alone, 0.3, 0.5, backend=backend)
    assert detections.count.all()
    for given in (preds, preds[:3], {"lead": preds[:3], "aux": preds[3:]}):
        for got, want in zip(fusedyolo.decode(given, criterion), fusedyolo.decode(preds[:3], alone), strict=True):
            assert torch.equal(got, want)
        found = fusedyolo.select(given, criterion, 0.3, 0.5, backend=backend)
        assert all(torch.equal(got, want) for got, want in zip(found, detections, strict=True))
        if given is not preds[:3]:
            found, want = fusedyolo.assign(criterion, given, rows), fusedyolo.assign(alone, preds[:3], rows)
            assert all(torch.equal(a.row, b.row) for a, b in zip(found.levels, want.levels, strict=True))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles(backend):
    torch._dynamo.reset()
    criterion = loss_of(backend)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (3, 9, 12):
        preds, rows = maps(count), objects(count)
        torch.testing.assert_close(compiled(preds, rows).total, criterion(preds, rows).total, rtol=1e-9, atol=0)


def test_hyper_parameters_of_the_repository():
    loss = YOLOv7AuxLoss.from_hyp(HYP, ANCHORS, STRIDES, 3, gr=1.0)
    assert set(loss.unused) == {"lr0", "iou_t", "hsv_h", "paste_in"}
    assert loss.lead.hyp["box"] == 0.05
    assert loss.aux.hyp["box"] == pytest.approx(0.0125)
    assert "weight=0.25" in repr(loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aux": -1}, "aux: -1, want a finite number >= 0"),
        ({"topk": 10}, "topk: 10, want none: the auxiliary heads say it"),
        ({"loss_ota": 0}, "loss_ota: 0, want none"),
        ({"boks": 1}, "boks"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        loss_of("torch", **options)


def test_wrong_predictions_are_named():
    criterion, preds, rows = loss_of("torch"), maps(), objects(3)
    for given, message in (
        (preds[:3], "preds: 3 maps, want 6 maps, those of 3 lead heads and of as many auxiliary ones"),
        (preds[0], "preds: a tensor of shape .*, want 6 maps"),
        ({"lead": preds[:3]}, r"preds: a dict with \['lead'\], want a dict with 'lead', 'aux'"),
        (
            preds[:3] + maps(size=(4, 6))[3:],
            r"preds\[3\]: \(2, 16, 16, 24\) on .*, want \(2, 16, 8, 12\) on .* as preds\[0\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            criterion(given, rows)
