"""What tools and benchmarks ask of a driver, for every row of the registry."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from fusedyolo.kernels.launch import KINDS
from torch.utils._pytree import tree_flatten, tree_unflatten

import fusedyolo
from fusedyolo import drivers
from fusedyolo.drivers.protocol import LOGIT, POSITIVE, UNIT, Known
from fusedyolo.tools import codegen
from fusedyolo.tools.registry import CASES, DTYPES, Workload, choose

WORK = Workload(batch=2, size=128, classes=5)
ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
FLOORS = {  # bytes over those of the predictions at 5 classes: the gradient, and what has to be read of so many numbers
    "YOLOv1": 1 + 2 / 15,
    "YOLOv2": 1 + 5 / 10,
    "YOLOv3": 1 + 5 / 10,
    "YOLOv4": 1 + 5 / 10,
    "ScaledYOLOv4": 1 + 1 / 10,
    "YOLOv5": 1 + 1 / 10,
    "RetinaNet": 1 + 5 / 9,
    "EfficientDet": 1 + 5 / 9,
    "SSD": 1 + 6 / 10,
    "FCOS": 1 + 6 / 10,
    "YOLOX": 1 + 5 / 10,
    "YOLOv8": 2.0,
    "E2E": 2.0,
}


def test_a_driver_is_found_by_the_head():
    found = {case.name: drivers.of(case.build(5, "torch")) for case in CASES.values()}
    assert {driver.kind for driver in found.values()} == set(KINDS)
    assert len({id(driver) for driver in found.values()}) == len(KINDS)  # one object each
    for nothing in (torch.nn.Linear(1, 1), None, object()):
        with pytest.raises(ValueError, match=r"^criterion: .*, want a loss of fusedyolo"):
            drivers.of(nothing)


@ALL
def test_a_case_has_predictions_of_every_layout_and_type(case):
    """Laid out in another way they are the same numbers, and the loss of them is the same."""
    losses = {}
    for layout in case.layouts:
        for dtype in ("float32", "bfloat16"):
            work = replace(WORK, layout=layout, dtype=dtype)
            preds, empty = case.predictions(work), case.predictions(work, empty=True)
            assert [(p.shape, p.stride(), p.dtype) for p in empty] == [(p.shape, p.stride(), p.dtype) for p in preds]
            assert all(pred.dtype == DTYPES[dtype] and pred.is_leaf and pred.requires_grad for pred in preds)
            assert sum(pred.nbytes for pred in preds) == case.prediction_bytes(work)
            losses[layout, dtype] = case.bind(case.build(5, "torch"), work)(preds, case.targets(work)).total
    for (_, dtype), total in (
        losses.items() if case.driver.kind != "cell" else ()
    ):  # whose flat form is ordered otherwise
        torch.testing.assert_close(total, losses[case.layouts[0], dtype], rtol=1e-5, atol=0)


@ALL
def test_pieces_say_what_numbers_may_be(case):
    frame, pieces = case.frame(WORK), case.pieces(WORK)
    assert sum(math.prod(piece.shape) for piece in pieces) * 4 == case.prediction_bytes(WORK)
    for piece in pieces:
        cells = sum(frame.maps[level][0] * frame.maps[level][1] * frame.cell[level] for level in piece.levels)
        assert math.prod(piece.shape) == WORK.batch * cells * piece.width
        assert all(0 <= channel < piece.width for channel in piece.rare)
    flat = torch.cat([p.detach().flatten() for p in case.predictions(WORK)])
    values = {piece.values for piece in pieces}
    assert values <= {LOGIT, UNIT, POSITIVE}
    assert (flat.min() >= 0) == (values == {UNIT})


@pytest.mark.parametrize("case", [case for case in CASES.values() if not case.branches], ids=lambda case: case.name)
def test_the_reference_loss_is_that_of_the_module(case):
    criterion, targets = case.build(5, "torch"), fusedyolo.Targets.from_packed(case.targets(WORK), 2, capacity=200)
    preds = case.pack([p.detach() for p in case.predictions(WORK)], WORK)
    call = case.driver.read(criterion, preds, targets, **case.geometry(WORK))
    head = criterion._head_of(2)[0] if hasattr(criterion, "_head_of") else criterion.head
    total, parts, counts, _ = case.driver.reference_loss(head, call)
    want = criterion(preds, targets, **case.geometry(WORK))
    assert torch.equal(total, want.total)
    assert all(map(torch.equal, list(parts)[: len(want.parts)], want.parts.values()))
    assert counts.tolist() == [int(want.num_pos), int(want.num_invalid)]
    assert counts[0] > 0


@ALL
def test_a_call_brings_no_more_than_the_loss_takes(case):
    preds, geometry = case.pack(case.predictions(WORK), WORK), case.geometry(WORK)
    criterion = case.build(5, "torch")
    if geometry:
        with pytest.raises(ValueError, match=r"^anchors: None, want a tensor"):
            fusedyolo.assign(criterion, preds, case.targets(WORK))
        return
    with pytest.raises(ValueError, match=r"^anchors: a tensor of shape \(1, 4\), want no such argument for this loss"):
        fusedyolo.assign(criterion, preds, case.targets(WORK), anchors=torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"^anchors: .*, want none: this loss has its own"):
        fusedyolo.decode(preds, criterion, anchors=torch.zeros(1, 4))


@ALL
@pytest.mark.interpreter("kernels are not run, only prepared to")
def test_programs_have_kinds_and_efforts(case):
    """One for each program of each launch; where there is more than one kind, more than one is met."""
    targets = case.targets(WORK)
    preds = [pred.detach() for pred in case.predictions(WORK)]
    rows = torch.bincount(targets[:, 0].long(), minlength=2).tolist()
    criterion = case.build(5, "torch")
    packed, geometry = case.pack(preds, WORK), case.geometry(WORK)
    known = Known(criterion.head, preds, rows, lambda: fusedyolo.assign(criterion, packed, targets, **geometry))
    found = codegen.launches(case, WORK)
    *_, before, last = found
    assert last == "grad"
    assert before == ("rank" if "rank" in found else "loss")
    differing = 0
    for launch in found.values():
        name, programs = launch.kernel.__name__, launch.grid[0]
        kinds = case.driver.kinds(name, programs, launch.arguments)
        finer, efforts = case.driver.efforts(name, kinds, launch.arguments, known)
        assert len(kinds) == len(finer) == len(efforts) == programs, name
        assert len(set(finer)) >= len(set(kinds))
        differing += len(set(kinds)) > 1
    assert differing or len(case.maps(WORK)) == 1


@pytest.mark.parametrize("loss", FLOORS)
def test_floors_are_the_bytes_that_must_move(loss):
    for case in choose([loss], CASES).values():
        assert case.floor(WORK) == pytest.approx(FLOORS[loss])


TYPES = (torch.bfloat16, torch.float32, torch.float16)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ["YOLOv5", "RetinaNet", "FCOS", "SSD", "YOLOX", "YOLOv8", "E2E/yolo26"])
def test_predictions_of_several_types(name, backend):
    """Each is read as what it is: the loss is that of the same numbers in float32, gradients are rounded at the end."""
    case, work = CASES[name], replace(WORK, size=64)
    leaves, form = tree_flatten(case.predictions(work))
    mixed = [leaf.detach().to(TYPES[i % 3]).requires_grad_() for i, leaf in enumerate(leaves)]
    alike = [leaf.detach().float().requires_grad_() for leaf in mixed]
    loss, targets = case.bind(case.build(5, backend), work), case.targets(work)
    found, want = (loss(tree_unflatten(preds, form), targets).total for preds in (mixed, alike))
    torch.testing.assert_close(found, want, rtol=1e-6, atol=0)
    found.backward()
    want.backward()
    for half, whole in zip(mixed, alike, strict=True):
        rounding = 1e-6 if half.dtype == torch.float32 else torch.finfo(half.dtype).eps
        assert half.grad.dtype == half.dtype
        assert (half.grad.float() - whole.grad).abs().max() <= rounding * whole.grad.abs().max()
