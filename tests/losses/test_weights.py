"""A weight a row, and ignored regions: what they multiply and hide, in every loss, and nothing else."""

from __future__ import annotations

import functools
from importlib import import_module

import peers
import pytest
import torch
import triton
import triton.language as tl
from conftest import DEVICE

import fusedyolo
from fusedyolo import Targets
from fusedyolo.reference import cell_views, grid_view
from fusedyolo.tools.registry import CASES, Workload

NAN, INF = float("nan"), float("inf")
WORK = Workload(batch=2, size=64, classes=3, seed=3, objects="crowded:5")
ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
KERNELS = pytest.mark.parametrize(
    "name",
    ["YOLOv1/paper", "YOLOv2/region", "YOLOv5", "RetinaNet", "SSD", "FCOS", "YOLOX", "YOLOv8"],
)
REGION = (0.5, 0.5, 0.5, 0.5)  # its edges lie on the middles of cells of some maps
TINY = (0.25, 0.25, 0.01, 0.01)


@functools.lru_cache(maxsize=64)
def predictions(case):
    return [pred.detach().double() for pred in case.predictions(WORK)]


def packed(case, weights=None, *regions, label=0):
    """The objects of the workload, with these weights, and regions of its first image."""
    rows = case.targets(WORK)
    weights = torch.ones(len(rows)) if weights is None else weights
    rows = torch.cat((rows, weights[:, None]), 1)
    more = [(0.0, label + case.background, *region, -1.0) for region in regions]
    return torch.cat((rows, torch.tensor(more).view(-1, 7)))


def step(case, preds, rows, backend="torch"):
    """Total, parts and counts, and the gradient of the total."""
    leaves = [pred.to(DEVICE).requires_grad_() for pred in preds]
    out = case.bind(case.build(WORK.classes, backend), WORK, DEVICE)(leaves, rows.to(DEVICE))
    return out, torch.autograd.grad(out.total, leaves)


def close(found, wanted, tolerance=1e-12):
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1)


def some_weights(count, seed):
    """Sixteenths, so that sums of them are exact."""
    return torch.randint(0, 48, (count,), generator=torch.Generator().manual_seed(seed)) / 16


# ------------------------------------------------------------------------------------------------------------- weights


@ALL
def test_a_weight_of_1_changes_no_bit(case):
    rows = case.targets(WORK)
    (plain, grads), (weighed, same) = step(case, predictions(case), rows), step(case, predictions(case), packed(case))
    assert torch.equal(plain.total, weighed.total)
    assert all(torch.equal(a, b) for a, b in zip(grads, same, strict=True))
    assert (plain.num_pos, plain.num_invalid) == (weighed.num_pos, weighed.num_invalid)


@pytest.mark.filterwarnings("ignore:.*no target row has a weight above 0")
@ALL
def test_gradients_are_linear_in_the_weights(case):
    count = len(case.targets(WORK))
    one, other = some_weights(count, 1), some_weights(count, 2)
    none = torch.zeros(count)
    found = [step(case, predictions(case), packed(case, weights)) for weights in (one + other, none, one, other)]
    for a, b, c, d in zip(*(grads for _, grads in found), strict=True):
        close([a + b], [c + d])
    totals = [out.total for out, _ in found]
    close([totals[0] + totals[1]], [totals[2] + totals[3]])
    assert len({int(out.num_pos) for out, _ in found}) == 1
    assert totals[2] != totals[3]


@ALL
def test_an_object_of_weight_0_takes_no_part(case):
    """The gradient is 0 at predictions that answer for it alone, and elsewhere what it was."""
    rows = case.targets(WORK)
    weights = torch.ones(len(rows))
    weights[::2] = 0
    (_, before), (_, after) = step(case, predictions(case), rows), step(case, predictions(case), packed(case, weights))
    seen = 0
    for was, now, row, own in answers(case, before, after, rows):
        difficult = (row >= 0) & (row % 2 == 0) & ~own  # of several rows the last is not all
        if case.driver.kind != "cell":  # where class scores and other boxes are of the cell
            assert not now[difficult].any()
        assert was[difficult].any() or not difficult.any()
        untouched = ~own & ((row < 0) | (row % 2 == 1))
        close([now[untouched]], [was[untouched]])
        seen += int(difficult.sum())
    assert seen


def parts(case, criterion, preds):
    """Of each branch the loss and the predictions."""
    if not case.branches:
        return [(criterion, preds)]
    return [(getattr(criterion, name), preds[name]) for name in case.branches]


def answers(case, before, after, rows):
    """Of each map, or of all anchors: two gradients [predictions, numbers], the row of each prediction, -1 for none,
    and whether it has several."""
    criterion, geometry, kind = case.build(WORK.classes, "torch"), case.geometry(WORK), case.driver.kind
    for i, (loss, own) in enumerate(parts(case, criterion, case.pack(predictions(case), WORK))):
        levels = maps(fusedyolo.assign(loss, own, rows, **geometry))
        row = [level.row.flatten() for level in levels]
        if kind == "pick":
            row = [torch.cat([level.row.flatten(1) for level in levels], 1).flatten()]
        shared = [
            several(level) if kind == "grid" else torch.zeros(1, dtype=torch.bool) for level in levels[: len(row)]
        ]
        was, now = (numbers(case, loss.head, halves(case, each)[i]) for each in (before, after))
        yield from zip(was, now, row, shared, strict=True)


def several(level):
    """[N]: predictions that several rows are assigned to."""
    slots = level.pairs[1]
    count = torch.zeros(level.row.numel() + 1, dtype=torch.int64).scatter_add(0, slots, torch.ones_like(slots))
    return count[:-1] > 1


def halves(case, tensors):
    """Those of each branch."""
    each = len(tensors) // max(1, len(case.branches))
    return [tensors[i : i + each] for i in range(0, len(tensors), each)]


def numbers(case, head, preds):
    """Of each map, or of all of them, predictions [N, numbers]."""
    kind = case.driver.kind
    if kind == "grid":
        return [grid_view(pred, len(own)).flatten(0, 3) for pred, own in zip(preds, head.levels, strict=True)]
    if kind == "dense":
        return [torch.cat(list(preds), 2).flatten(0, 1)]
    if kind == "pick":
        return [torch.cat(list(preds), 1).transpose(1, 2).flatten(0, 1)]
    boxes, confidence, _ = cell_views(preds[0], head)
    return [torch.cat((boxes, confidence[..., None]), -1).permute(0, 3, 1, 2, 4).flatten(0, 3)]


# ------------------------------------------------------------------------------------------------------------- regions


@ALL
def test_a_region_hides_background_and_nothing_else(case):
    """As if predictions without an object in it said, without a doubt, that there is nothing."""
    rows, covered = case.targets(WORK), packed(case, None, REGION, TINY)
    criterion, geometry = case.build(WORK.classes, "torch"), case.geometry(WORK)
    leaves = [pred.clone().requires_grad_() for pred in predictions(case)]
    for i, (loss, own) in enumerate(parts(case, criterion, case.pack(leaves, WORK))):
        plain, found = (fusedyolo.assign(loss, own, each, **geometry) for each in (rows, covered))
        hidden = []
        for level, before, points in zip(maps(found), maps(plain), middles(case, loss.head), strict=True):
            assert torch.equal(level.row, before.row)
            inside = torch.stack([in_box(points, REGION) | in_box(points, TINY), torch.zeros(len(points)).bool()])
            inside = inside.view(2, -1)[:, None] if level.row.dim() > 2 else inside
            shaped = (
                inside.expand(2, level.row.shape[1], -1).reshape(level.row.shape) if level.row.dim() > 2 else inside
            )
            hidden.append(shaped & (level.row < 0))
            assert torch.equal(level.ignored, before.ignored | hidden[-1])
        assert any(each.any() for each in hidden)
        assert not all(each[0].all() for each in hidden)
        if loss.head.__dict__.get("obj_mean") == "used":
            continue  # there are fewer of these
        quiet = [pred.requires_grad_() for pred in silenced(case, halves(case, predictions(case))[i], hidden)]
        own_leaves = halves(case, leaves)[i]
        out, wanted = loss(own, covered, **geometry), loss(pack_one(case, quiet), rows, **geometry)
        close([out.total], [wanted.total])
        close(torch.autograd.grad(out.total, own_leaves), torch.autograd.grad(wanted.total, quiet))
        assert (out.num_pos, out.num_invalid) == (wanted.num_pos, wanted.num_invalid)


def maps(found):
    return getattr(found, "levels", [found])


def middles(case, head):
    """Of each map, or of all anchors, the anchor points [N, 2], relative to the image."""
    if case.driver.kind == "dense":
        anchors = case.geometry(WORK)["anchors"]
        return [((anchors[:, :2] + anchors[:, 2:]) / 2).double() / WORK.size]
    points = []
    for height, width in case.maps(WORK):
        x, y = (torch.arange(n, dtype=torch.float64) + 0.5 for n in (width, height))
        points.append(torch.stack(((x / width).expand(height, width), (y / height)[:, None].expand(height, width)), -1))
    return [each.flatten(0, 1) for each in points]


def in_box(points, box):
    centre, sides = torch.tensor(box, dtype=torch.float64).split(2)
    return ((centre - sides / 2 <= points) & (points < centre + sides / 2)).all(-1)


def pack_one(case, preds):
    """The predictions of a branch, or of all."""
    return case.driver.pack(preds, case.frame(WORK))


def silenced(case, preds, hidden):
    """Predictions of which those that are hidden are sure to be background."""
    preds, kind, head = [pred.clone() for pred in preds], case.driver.kind, case.head(WORK.classes)
    if kind == "grid":
        for pred, own, level in zip(preds, hidden, head.levels, strict=True):
            grid_view(pred, len(level))[..., 4][own] = -1e4
    elif kind == "cell":
        cell_views(preds[0], head)[1].permute(0, 3, 1, 2)[hidden[0]] = 0
    elif kind == "pick":
        preds[1].transpose(1, 2)[torch.cat([level.flatten(1) for level in hidden], 1)] = -1e4
    elif head.background:
        preds[0][..., 0][hidden[0]] = 1e4
    else:
        preds[0][hidden[0]] = -1e4
    return preds


def test_hard_negatives_are_as_many_as_without_weights():
    """Of SSD: what hides some neither asks for more nor for fewer of the others, and trains no object twice."""
    case = CASES["SSD"]
    rows, few = case.targets(WORK), packed(case, None, REGION)
    (out, grads), (same, others) = step(case, predictions(case), rows), step(case, predictions(case), few)
    count = [int(each[0].any(-1).sum()) for each in (grads, others)]
    assert count[0] == count[1] == 4 * int(out.num_pos)
    (_, hardly) = step(case, predictions(case), packed(case, None, (0.5, 0.5, 1, 1)))
    row = fusedyolo.assign(case.build(3, "torch"), pack_one(case, predictions(case)), rows, **case.geometry(WORK)).row
    row = row.to(DEVICE)
    assert torch.equal(hardly[0][0].any(-1), row[0] >= 0)
    close([hardly[0][row >= 0]], [grads[0][row >= 0]])
    assert same.num_pos == out.num_pos


# ------------------------------------------------------------------------------------------------------------- kernels


@functools.lru_cache
def mixture(case):
    """Objects of many weights, of which some are none, and regions: a crowd, the whole of an image, and wrong ones."""
    generator = torch.Generator().manual_seed(7)
    rows = case.targets(WORK)
    kinds = torch.tensor([1.0, 0.0, 0.5, 2.0, NAN, -INF])
    weights = kinds[torch.randint(0, len(kinds), (len(rows),), generator=generator)]
    small = [(*torch.rand(2, generator=generator).tolist(), 0.1, 0.1) for _ in range(24)]
    rows = packed(case, weights, REGION, TINY, *small)
    whole = torch.tensor(
        [[1, case.background, 0.5, 0.5, 1, 1, -2], [0, 9, 0.5, 0.5, 1, 1, -1], [5, 1, 0.5, 0.5, 1, 1, -1]]
    )
    rows = torch.cat((rows, whole))
    return rows[torch.randperm(len(rows), generator=generator)]


@KERNELS
def test_kernels_equal_the_reference(name):
    case, rows = CASES[name], mixture(CASES[name])
    (wanted, grads), (out, own) = (step(case, predictions(case), rows, backend) for backend in ("torch", "triton"))
    tolerance = 1e-8 if case.driver.kind == "pick" else 1e-12  # soft scores are powers
    close([out.total, *out.parts.values()], [wanted.total, *wanted.parts.values()], tolerance)
    close(own, grads, tolerance)
    assert (out.num_pos, out.num_invalid) == (wanted.num_pos, wanted.num_invalid)
    assert 0 < out.num_invalid < len(rows) / 2


@triton.jit
def within_both(edges, x, y):
    """The right and the lower edge included."""
    x1, y1, x2, y2 = edges
    return (x1 <= x) & (x <= x2) & (y1 <= y) & (y <= y2)


@triton.jit
def of_any(row, g, mask, weights_ptr, KIND):
    """Every row an object."""
    return row


@triton.jit
def weights_of_1(matched, match, ACC: tl.constexpr):
    return tl.full(match.shape, 1.0, ACC)


@pytest.mark.interpreter("compiled kernels keep the functions they were compiled with")
@pytest.mark.parametrize(
    ("name", "module", "function", "broken"),
    [
        ("YOLOv2/region", "regions", "within", within_both),
        ("FCOS", "regions", "within", within_both),
        ("YOLOv2/region", "grid.assign", "of_kind", of_any),
        ("FCOS", "dense.classes", "own_weights", weights_of_1),
    ],
)
def test_a_broken_kernel_differs(name, module, function, broken, monkeypatch):
    monkeypatch.setattr(import_module(f"fusedyolo.kernels.{module}"), function, broken)
    with pytest.raises(AssertionError):
        test_kernels_equal_the_reference(name)


def test_smooth_objectness_is_weighed_and_hidden():
    """Of every prediction it is trained towards an IoU, but not with a weight of 0, nor in a region."""
    case = CASES["YOLOv4/darknet"]
    arguments = case.anchors[1:2], case.strides[1:2], WORK.classes
    preds, rows = predictions(case)[1:2], mixture(case)
    found = []
    for backend in ("torch", "triton"):
        loss = fusedyolo.YOLOv4Loss(*arguments, recipe="darknet", objectness_smooth=1, backend=backend)
        leaves = [pred.to(DEVICE).requires_grad_() for pred in preds]
        out = loss(leaves, rows.to(DEVICE))
        found.append((out, torch.autograd.grad(out.total, leaves)))
    (wanted, grads), (out, own) = found
    close([out.total, *out.parts.values()], [wanted.total, *wanted.parts.values()])
    close(own, grads)
    level = fusedyolo.assign(loss, preds, rows).levels[0]
    weight = torch.where(level.row >= 0, rows[level.row, 6], 1.0)
    objectness = grid_view(own[0], 3)[..., 4]
    assert not objectness[level.ignored | (weight == 0)].any()
    assert objectness[~level.ignored & (weight > 0)].all()
    assert (weight == 0).any()


@pytest.mark.interpreter("compiled, another sum may be contracted with a product by a weight than without")
@pytest.mark.parametrize("name", ["YOLOv1/paper", "FCOS"])
def test_a_weight_of_1_changes_no_bit_of_a_kernel(name):
    case = CASES[name]
    (plain, grads), (weighed, same) = (
        step(case, predictions(case), rows, "triton") for rows in (case.targets(WORK), packed(case))
    )
    assert torch.equal(plain.total, weighed.total)
    assert all(torch.equal(a, b) for a, b in zip(grads, same, strict=True))


@pytest.mark.interpreter("a tracer takes the emulator for part of what it traces")
@pytest.mark.parametrize("name", ["YOLOv1/paper", "YOLOv2/region", "FCOS", "YOLOX"])
def test_operators_are_what_pytorch_expects(name, monkeypatch):
    """With weights they trace as without."""
    from fusedyolo import ops

    case, made = CASES[name], []
    monkeypatch.setattr(ops, "call", lambda op, *given, **_: made.append((op, given)) or op(*given))
    step(case, [pred.float() for pred in predictions(case)], packed(case, None, REGION), "triton")
    ((op, given),) = made
    assert sum(isinstance(each, torch.Tensor) and each.shape == (len(packed(case, None, REGION)),) for each in given)
    torch.library.opcheck(op, given, test_utils="test_faketensor")


# --------------------------------------------------------------------------------------------------------------- forms

BOXES = torch.tensor([[8.0, 8.0, 24.0, 40.0], [16.0, 16.0, 32.0, 32.0], [0.0, 0.0, 64.0, 64.0]])
DICTS = [
    {"boxes": BOXES, "labels": torch.tensor([0, 1, 2]), "weights": torch.tensor([0.5, 2.0, 3.0])},
    {"boxes": BOXES[:2], "labels": torch.tensor([2, 0])},
]
DICTS[0]["iscrowd"] = torch.tensor([0, 0, 1])
DICTS[1]["ignore"] = torch.tensor([True, False])
WEIGHTS = [0.5, 2.0, -1.0, -1.0, 1.0]


def forms():
    """The same objects in every form."""
    whole = Targets.from_torchvision(DICTS, 64)
    rows = torch.cat((whole.rows, whole.weights[:, None]), 1)
    padded = torch.nn.utils.rnn.pad_sequence([rows[:3, 1:], rows[3:, 1:]], batch_first=True, padding_value=-1.0)
    return {
        "dicts": whole,
        "packed": Targets.from_packed(rows[[4, 2, 0, 1, 3]], 2),
        "many": Targets.from_packed(rows.repeat(2, 1)[:5].double(), 2, capacity=9),
        "padded": Targets.from_padded(padded),
    }


@pytest.mark.parametrize("form", ["dicts", "packed", "many", "padded"])
def test_every_form_has_weights(form):
    found, wanted = forms()[form], forms()["dicts"]
    order = [2, 0, 1, 4, 3] if form == "packed" else range(5)
    assert found.weights.dtype == torch.float32
    assert found.weights[:5].tolist() == [WEIGHTS[i] for i in order]
    assert form != "many" or (len(found.weights) == 9 and not found.weights[5:].any())
    assert torch.equal(found.rows[:5], wanted.rows[list(order)])
    assert found.offsets[:3].tolist() == [0, 3, 5]
    assert found.to("meta").weights.device.type == "meta"
    assert found.validate(3) is found
    assert "weighed" in repr(found)


def test_a_loss_takes_every_form():
    case = CASES["YOLOv2/region"]
    whole = forms()["dicts"]
    rows = torch.cat((whole.rows, whole.weights[:, None]), 1)
    listed = [rows[:3, 1:], rows[3:, 1:]]
    padded = torch.cat((listed[0], torch.nn.functional.pad(listed[1], (0, 0, 0, 1), value=-1)))
    criterion, preds = case.build(3, "torch"), case.pack(predictions(case), WORK)
    totals = [criterion(preds, targets).total for targets in (whole, DICTS, rows, listed, padded.view(2, 3, 6))]
    assert all(torch.equal(total, totals[0]) for total in totals)
    assert criterion(preds, [rows[:3, 1:], rows[3:, 1:6]]).total != totals[0]  # of which the second has none
    without = [{key: item[key] for key in ("boxes", "labels")} for item in DICTS]
    assert criterion(preds, without).total != totals[0]


@pytest.mark.parametrize("weight", [NAN, INF, -INF])
def test_a_weight_that_is_not_finite_makes_a_row_invalid(weight):
    rows = forms()["dicts"]
    weights = rows.weights.clone()
    weights[1] = weight
    with pytest.raises(ValueError, match=r"targets row 1 .*: its weight is not finite, want a finite weight"):
        Targets(rows.rows, rows.offsets, 2, weights).validate(3)
    case = CASES["YOLOv5"]
    out, grads = step(case, predictions(case), torch.cat((rows.rows, weights[:, None]), 1))
    fewer, wanted = step(case, predictions(case), torch.cat((rows.rows, rows.weights[:, None]), 1)[[0, 2, 3, 4]])
    assert (out.num_invalid, fewer.num_invalid) == (1, 0)
    assert torch.equal(out.total, fewer.total)
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weights": torch.ones(2)}, r"targets\[0\]\['weights'\]: .*, want a tensor of shape \(3,\), one a row"),
        ({"weights": torch.ones(3).bool()}, r"targets\[0\]\['weights'\]: dtype torch.bool, want a real number type"),
        ({"iscrowd": [0, 0, 1]}, r"targets\[0\]\['iscrowd'\]: \[0, 0, 1\], want a tensor of shape \(3,\), one a row"),
        ({"ignore": torch.ones(3, device="meta")}, r"targets\[0\]\['ignore'\]: device meta, want cpu as the rows"),
    ],
)
def test_wrong_weights_are_told(change, said):
    with pytest.raises(ValueError, match="^" + said + "$"):
        Targets.from_torchvision([{**DICTS[0], **change}], 64)


def test_weights_of_targets_are_checked():
    rows, offsets = torch.zeros(2, 6), torch.tensor([0, 2, 2], dtype=torch.int32)
    for weights, said in (
        (torch.ones(3), r"weights: .*, want a tensor of shape \(2,\), one a row"),
        (torch.ones(2).double(), "weights: dtype torch.float64, want a contiguous tensor of torch.float32"),
        (torch.ones(4)[::2], "weights: a strided view, want a contiguous tensor of torch.float32"),
    ):
        with pytest.raises(ValueError, match="^" + said + "$"):
            Targets(rows, offsets, 1, weights)


def test_weights_that_teach_nothing_are_told():
    """Such as crowd flags in their place, which are 0 nearly everywhere."""
    case = CASES["YOLOv2/region"]
    criterion, preds = case.build(3, "torch"), case.pack(predictions(case), WORK)
    with pytest.warns(UserWarning, match="YOLOv2Loss: no target row has a weight above 0, so no object is learnt"):
        criterion(preds, packed(case, torch.zeros(len(case.targets(WORK)))))


def test_torchvision_reads_no_crowds_and_neither_do_its_patched_models():
    peers.torchvision()
    integration = import_module("fusedyolo.integrations.torchvision")  # after torchvision: it may need help to load
    case = CASES["RetinaNet"]
    outputs = dict(zip(("cls_logits", "bbox_regression"), predictions(case), strict=True))
    loss = integration._RetinaNetLoss(fusedyolo.RetinaNetLoss, {"image_size": WORK.size})  # what patch puts in place
    plain = [{"boxes": item["boxes"], "labels": item["labels"]} for item in DICTS]
    found, wanted = (loss(targets, outputs, [case.geometry(WORK)["anchors"]] * 2) for targets in (DICTS, plain))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
