"""What the reference leaves out where it can, on a CPU above all, changes nothing."""

from __future__ import annotations

import math

import pytest
import torch

from fusedyolo import reference
from fusedyolo.heads import DenseHead
from fusedyolo.reference import choose, dense, grid, pairs, pick_pairs, picks, primitives
from fusedyolo.reference.primitives import Places, at_hand
from fusedyolo.reference.terms.label import LOW, cross_entropy
from fusedyolo.tools.registry import CASES, Workload

TAILS = torch.tensor((-120.0, -40, -17, -3, -0.5, 0, 0.25, 2, 17, 40, 120), dtype=torch.float64)
ARGS = {
    "bce": [(), (1.5,)],
    "focal": [(0.25, 2.0), (-1.0, 0.5), (0.25, 0.0), (0.25, 1.0, 2.0)],
    "qfl": [(-1.0, 2.0), (0.3, 1.0)],
    "varifocal": [(0.75, 2.0), (-1.0, 1.0)],
    "sse": [()],
}


def value_and_slope(loss, x):
    x = x.clone().requires_grad_()
    found = loss(x)
    (slope,) = torch.autograd.grad(found.sum(), x)
    return found.detach(), slope


@pytest.mark.parametrize(("name", "args"), [(name, args) for name, each in ARGS.items() for args in each])
@pytest.mark.parametrize("target", [False, True])
def test_targets_that_are_known_leave_out_what_they_multiply_by_0(name, args, target):
    term = reference.LABEL_TERMS[name]
    found = value_and_slope(lambda x: term(x, target, args), TAILS)
    wanted = value_and_slope(lambda x: term(x, torch.full_like(x, float(target)), args), TAILS)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-14, atol=0)


@pytest.mark.parametrize(("name", "args"), [(name, args) for name, each in ARGS.items() for args in each])
def test_a_low_logit_costs_nothing(name, args):
    for dtype in (torch.float32, torch.float64):
        x = torch.full((3,), LOW, dtype=dtype)
        loss, slope = value_and_slope(lambda x: reference.LABEL_TERMS[name](x, False, args), x)
        assert not loss.any()
        assert not slope.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_cross_entropy_is_that_of_all_classes(dtype):
    """Also of a class that is nearly sure, or nearly impossible; to the last digits of its type."""
    torch.manual_seed(0)
    x = torch.cat((torch.randn(50, 7) * 3, torch.randn(50, 7) * 60)).to(dtype)
    label = torch.randint(0, 7, (100,))
    one_hot = torch.nn.functional.one_hot(label, 7).double()
    found = value_and_slope(lambda x: cross_entropy(x, label), x)
    wanted = value_and_slope(lambda x: reference.LABEL_TERMS["softmax_ce"](x, one_hot).sum(-1), x.double())
    near = {torch.float32: {"rtol": 2e-5, "atol": 1e-37}, torch.float64: {"rtol": 1e-12, "atol": 0.0}}[dtype]
    torch.testing.assert_close(found[0].double(), wanted[0], **near)
    torch.testing.assert_close(found[1].double(), wanted[1], **near)
    sure = cross_entropy(torch.tensor([[30.0, 0, 0]]), torch.tensor([0]))
    assert math.isclose(sure.item(), 2 * math.exp(-30), rel_tol=1e-5)  # log_softmax has 0


def test_equal_differences_cost_the_same():
    """To the bit: hard negatives rank by it, equals by their index."""
    x = torch.randint(-3, 4, (200, 7)).double()
    label = torch.randint(0, 7, (200,))
    for more in (1.0, -5.0, 60.0):
        assert torch.equal(cross_entropy(x + more, label), cross_entropy(x, label))


def test_places():
    mask = torch.tensor((False, True, True, False))
    values = torch.arange(8.0).view(4, 2)
    assert Places(mask).of(values).tolist() == [[2, 3], [4, 5]]
    assert Places(mask).index.tolist() == [1, 2]
    seen = []
    torch.func.vmap(lambda each: seen.append(Places(each)) or each)(torch.stack((mask, mask)))
    assert seen[0].of(values) is values
    assert not at_hand(mask.to("meta"))
    with torch._subclasses.FakeTensorMode():
        assert not at_hand(torch.zeros(2))


@pytest.mark.parametrize("spoilt", [False, True])
@pytest.mark.parametrize("values", [4, 1 << 30], ids=["equals", "none equal"])
def test_the_hardest_are_those_of_a_sort(values, spoilt, monkeypatch):
    gen = torch.Generator().manual_seed(0)
    hardness = torch.randint(0, values, (5, 400), generator=gen).double()
    hardness[:, ::7] = -1.0
    if spoilt:
        hardness[1, 50] = math.nan
    for count in (torch.tensor((0, 1, 30, 99, 100)), torch.tensor((0, 0, 0, 0, 0)), torch.tensor((3, 401, 390, 0, 7))):
        found = dense._hardest(hardness, count)
        with monkeypatch.context() as patched:
            patched.setattr(dense, "at_hand", lambda values: False)
            assert torch.equal(found, dense._hardest(hardness, count))
        assert found.sum(1).tolist() == count.clamp(max=400).tolist()


LOSSES = ["YOLOv3/darknet", "YOLOv5", "RetinaNet", "SSD", "FCOS", "YOLOX", "YOLOv8", "E2E/yolo26"]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("spoilt", [False, True])
def test_shapes_that_depend_on_data_change_nothing(name, spoilt, monkeypatch):
    """Also where there is a NaN, that no gradient but its own may see."""
    case, work = CASES[name], Workload(batch=2, size=64, classes=5, dtype="float64")
    criterion, targets = case.bind(case.build(work.classes, "torch"), work), case.targets(work)

    def step():
        preds = case.predictions(work)
        if spoilt:
            with torch.no_grad():
                preds[-1].flatten()[7] = preds[0].flatten()[11] = math.nan
        out = criterion(preds, targets)
        out.total.backward()
        return [out.total.detach(), *out.parts.values(), out.num_pos, *(pred.grad for pred in preds)]

    quick = step()
    for module in (primitives, choose, pick_pairs, dense, grid, pairs, picks):
        monkeypatch.setattr(module, "at_hand", lambda values: False)
    slow = step()
    assert quick[0].isnan() == spoilt or name in ("YOLOX", "YOLOv5")  # which do not read every logit
    for mine, theirs in zip(quick, slow, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-15, equal_nan=True)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_a_gradient_of_a_grid_lies_as_its_map(layout):
    """So that nothing is transposed: of planes and of channels side by side."""
    work = Workload(batch=2, size=64, classes=5, layout=layout)
    preds = CASES["YOLOv5"].predictions(work)
    view = reference.grid_view(preds[0], 3)
    parts = grid._split(view)
    assert [part.shape[2] for part in parts] == [4, 1, 5]
    whole = torch.cat(parts, 2).permute(0, 1, 3, 4, 2)
    assert torch.equal(whole, view)
    order = (0, 1, 3, 4, 2) if layout == "channels_last" else (0, 1, 2, 3, 4)
    grad = torch.autograd.grad(sum(part.sum() for part in parts), view)[0]
    assert grad.permute(0, 1, 4, 2, 3).permute(order).is_contiguous()


def test_overlaps_are_kept_where_they_are_few(monkeypatch):
    torch.manual_seed(0)
    work = Workload(batch=2, size=64, classes=5, dtype="float64")
    case = CASES["RetinaNet"]
    criterion, preds, targets = case.bind(case.build(5, "torch"), work), case.predictions(work), case.targets(work)
    wanted = criterion(preds, targets).total
    made = []
    real = reference.pairs.PairIoU._near
    monkeypatch.setattr(reference.pairs.PairIoU, "_near", lambda self, images: made.append(1) or real(self, images))
    assert criterion(preds, targets).total == wanted
    assert len(made) == 1
    monkeypatch.setattr(reference.pairs, "PAIRS_KEPT", 0)
    assert criterion(preds, targets).total == wanted
    assert len(made) == 3


@pytest.mark.parametrize("chunk", [1, 100, 1 << 18])
@pytest.mark.parametrize("rescue", ["equal", "own", "best", "best_first", None])
def test_matches_image_by_image(rescue, chunk, monkeypatch):
    """Boxes on a small lattice, equal overlaps everywhere; rows in no order, some invalid, one image without."""
    gen = torch.Generator().manual_seed(0)
    corner = torch.randint(0, 5, (60, 2), generator=gen).double()
    boxes = torch.cat((corner, corner + torch.randint(1, 4, (60, 2), generator=gen)), 1)
    rows = torch.cat((torch.tensor([0.0, 2.0, 3.0])[torch.arange(20) % 3, None], torch.ones(20, 1), boxes[:20]), 1)
    rows[3, 1] = 9.0
    rows[7, 4:] += 20.0  # meets no anchor but one
    head = DenseHead(num_classes=3, rescue=rescue, band=(0.3, 0.5))
    read = reference.read_corners(rows, head, 4, None, True, torch.float64)
    quick = dense.dense_match(boxes[15:], read, head, 4)
    monkeypatch.setattr(pairs, "at_hand", lambda values: False)
    slow = dense.dense_match(boxes[15:], read, head, 4)
    assert torch.equal(quick, slow)
    assert len(quick.unique()) > 4
    monkeypatch.undo()
    monkeypatch.setattr(pairs, "PAIRS_NEAR", chunk)
    monkeypatch.setattr(pairs, "FEWEST", 1)
    assert torch.equal(dense.dense_match(boxes[15:], read, head, 4), slow)
