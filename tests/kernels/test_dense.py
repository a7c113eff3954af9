"""RetinaNet, SSD and FCOS: torchvision's recorded numbers, kernels against the reference, and what users do."""

from __future__ import annotations

import math
from typing import Any

import golden
import numpy as np
import pytest
import torch
import torch._dynamo.testing
from conftest import DEVICE
from test_crowds import Watch
from test_select import greedy
from torch import Tensor

import fusedyolo
from bench.count import count
from fusedyolo import FCOSLoss, RetinaNetLoss, SSDLoss, anchors, ops, reference
from fusedyolo.ops import dense_plan, launch
from fusedyolo.ops.dense import dense_outputs
from fusedyolo.targets import corner_rows
from fusedyolo.terms import TERMS, term_names

BACKENDS = ["torch", "triton"]
C = 3
SIZE = (48, 64)  # of images
MAPS = ((6, 8), (3, 4))
KINDS: dict[str, Any] = {"retinanet": RetinaNetLoss, "ssd": SSDLoss, "fcos": FCOSLoss}
PER_CELL = {"retinanet": (3, 3), "ssd": (4, 6), "fcos": (1, 1)}


def make_anchors(kind: str) -> Tensor:
    if kind == "ssd":
        return anchors.ssd_anchors(MAPS, SIZE, ((2,), (2, 3)), scales=(0.2, 0.4, 0.8), device=DEVICE)
    if kind == "fcos":
        return anchors.fcos_anchors(MAPS, SIZE, (8, 16), device=DEVICE)
    return anchors.retinanet_anchors(MAPS, SIZE, (12, 24), device=DEVICE)


def sizes(kind: str) -> list[int]:
    return [h * w * a for (h, w), a in zip(MAPS, PER_CELL[kind], strict=True)]


def criterion(kind: str, backend: str, **options: Any) -> Any:
    return KINDS[kind](C, backend=backend, **options)


def make_preds(kind: str, batch: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """[B, N, C], [B, N, 4] and of FCOS [B, N, 1], each a leaf."""
    generator, n = torch.Generator().manual_seed(seed), sum(sizes(kind))
    preds = [torch.randn(batch, n, c, generator=generator) for c in (C, 4, 1)[: 3 if kind == "fcos" else 2]]
    if kind == "fcos":
        preds[1] = preds[1].abs() * 2
    return [pred.to(DEVICE, dtype).requires_grad_() for pred in preds]


def make_targets(kind: str, batch: int = 2, n: int = 4, seed: int = 0, side: float = 24.0) -> list[dict[str, Tensor]]:
    """Boxes in pixels; the last image is empty if there are several."""
    generator, targets = torch.Generator().manual_seed(seed), []
    for image in range(batch):
        many = 0 if batch > 1 and image == batch - 1 else n
        corner = torch.rand(many, 2, generator=generator) * torch.tensor([SIZE[1] - 8.0, SIZE[0] - 8.0])
        far = corner + 3 + torch.rand(many, 2, generator=generator) * side
        labels = torch.randint(1, C, (many,), generator=generator) if many else torch.zeros(0, dtype=torch.int64)
        far = torch.minimum(far, torch.tensor([float(SIZE[1]), float(SIZE[0])]))
        targets.append({"boxes": torch.cat((corner, far), 1).to(DEVICE), "labels": labels.to(DEVICE)})
    return targets


def geometry(kind: str) -> dict[str, Any]:
    return {"anchors": make_anchors(kind), "num_anchors_per_level": sizes(kind)}


def gradients(preds: list[Tensor]) -> Tensor:
    return torch.cat([pred.grad.double().flatten() for pred in preds])


def run(kind: str, backend: str, preds: list[Tensor], targets: Any, scale: float = 1.0, **options: Any):
    """The loss and its gradient."""
    for pred in preds:
        pred.grad = None
    out = criterion(kind, backend, **options)(preds, targets, **geometry(kind))
    (out.total * scale).backward()
    return out, gradients(preds)


def check(kind: str, preds: list[Tensor], targets: Any, tolerance: float = 1e-5, **options: Any) -> None:
    """Kernels on predictions against the reference in float64 on the same values."""
    exact = [pred.detach().double().requires_grad_() for pred in preds]
    want, true = run(kind, "torch", exact, targets, **options)
    got, found = run(kind, "triton", preds, targets, **options)
    scale = max(float(want.total), 1e-3)
    assert abs(float(got.total) - float(want.total)) <= tolerance * scale
    for name, part in want.parts.items():
        assert abs(float(got.parts[name]) - float(part)) <= tolerance * scale, name
    assert found.isfinite().all()
    assert (found - true).abs().max() <= tolerance * max(float(true.abs().max()), 1e-6)
    assert int(got.num_pos) == int(want.num_pos)
    assert int(got.num_invalid) == int(want.num_invalid)


# ---- recorded numbers

GOLDENS = [name for kind in KINDS for name in golden.names("torch", f"tv_{kind}*")]


def recorded(name: str):
    """Arrays, the loss as a function of its backend, and the call's arguments."""
    data = golden.arrays(name)
    meta, counts = data["meta"], data["gt_count"].tolist()
    boxes, labels = data["gt_boxes_xyxy"].split(counts), data["gt_labels"].split(counts)
    targets = [{"boxes": b.to(DEVICE), "labels": k.to(DEVICE)} for b, k in zip(boxes, labels, strict=True)]
    options: dict[str, Any] = {"anchors": data["anchors"].to(DEVICE)}
    if "ssd" in name:
        make = lambda backend: SSDLoss(meta["nc_with_background"], backend=backend)  # noqa: E731
    elif "fcos" in name:
        make = lambda backend: FCOSLoss(meta["nc"], backend=backend)  # noqa: E731
        options["num_anchors_per_level"] = data["num_anchors_per_level"].tolist()
    else:
        make = lambda backend: RetinaNetLoss(meta["nc"], loss_type=meta["reg_loss"], backend=backend)  # noqa: E731
    names = [key for key in ("cls_logits", "bbox_regression", "bbox_ctrness") if key in data]
    return data, make, targets, options, names


@pytest.mark.parametrize(("backend", "dtype"), [("torch", torch.float64), ("triton", torch.float32)])
@pytest.mark.parametrize("name", GOLDENS)
def test_torchvisions_losses_and_gradients(name, backend, dtype):
    data, make, targets, options, names = recorded(name)
    preds = [data[key].to(DEVICE, dtype).clone().requires_grad_() for key in names]
    out = make(backend)(preds, targets, **options)
    out.total.backward()
    bound = 1e-12 if dtype == torch.float64 else 1e-6
    for part, value in out.parts.items():
        assert float(value) == pytest.approx(float(data[f"loss_{part}"]), rel=bound)
    assert float(out.total) == pytest.approx(float(data["total"]), rel=bound)
    for key, pred in zip(names, preds, strict=True):
        want = data[f"grad_{key}"].to(DEVICE).double()
        assert (pred.grad.double() - want).abs().max() <= 1e-6 * want.abs().max(), key  # recorded in float32


@pytest.mark.parametrize("name", GOLDENS)
def test_torchvisions_matches(name):
    data, make, targets, options, names = recorded(name)
    preds = [data[key].to(DEVICE) for key in names]
    found = fusedyolo.assign(make("torch"), preds, targets, **options)
    first = np.cumsum([0, *data["gt_count"].tolist()[:-1]])
    want = data["matched_idxs"].to(DEVICE)
    row = torch.where(found.ignored, -2, found.row)
    start = torch.from_numpy(first).to(DEVICE)[:, None]
    assert torch.equal(torch.where(row >= 0, row - start, row), want)


# ---- kernels against the reference

LOOSE = {"allow_low_quality_matches": False, "fg_iou_thresh": 0.3, "bg_iou_thresh": 0.2}
BOX_TERMS = [name for name in term_names("delta", "iou", users=True) if not TERMS[name].needs_extent]
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "retinanet": [
        {},
        *({"loss_type": name, "beta": 0.3} for name in BOX_TERMS),
        {"loss_type": "ciou", "alpha": -1, "gamma": 1.5},
        {"loss_type": "giou", **LOOSE},
        {"recipe": "mmdet", "loss_type": "giou"},
        {"normalizer": "batch", "class_weights": [0.5, 2.0, 0.0]},
    ],
    "ssd": [
        {},
        {"loss_type": "l1", "neg_to_pos_ratio": 0.6},
        {"neg_to_pos_ratio": 500.0, "iou_thresh": 0.2},
        {"class_weights": [0.75, 2.0, 0.5]},
    ],
    "fcos": [
        {},
        {"loss_type": "ciou", "center_sampling_radius": 0.7, "gamma": 0.0},
        {"recipe": "mmdet", "class_weights": [0.5, 2.0, 0.0]},
        {"box_weight": "centreness", "scale_range": (1.0, 3.0)},
    ],
}


@pytest.mark.parametrize(("kind", "options"), [(kind, o) for kind, each in VARIANTS.items() for o in each])
def test_kernels_equal_the_reference(kind, options):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        check(kind, make_preds(kind, 3, dtype), make_targets(kind, 3), tolerance, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_class_weights_of_maps(kind):
    """Planes of classes are read otherwise than rows of them."""
    options = {"class_weights": [0.75, 2.0, 0.5], **({"recipe": "mmdet"} if kind == "fcos" else {})}
    preds, targets = make_preds(kind, 2, torch.float64), make_targets(kind)
    want, true = run(kind, "torch", preds, targets, **options)
    maps = [
        [
            part.reshape(2, h, w, -1).permute(0, 3, 1, 2).contiguous().detach().requires_grad_()
            for part, (h, w) in zip(pred.split(sizes(kind), 1), MAPS, strict=True)
        ]
        for pred in preds
    ]
    out = criterion(kind, "triton", **options)(maps, targets, make_anchors(kind))
    out.total.backward()
    assert float(out.total) == pytest.approx(float(want.total), rel=1e-12)
    grads = [
        torch.cat([each.grad.permute(0, 2, 3, 1).reshape(2, -1, pred.shape[2]) for each in kinds], 1)
        for kinds, pred in zip(maps, preds, strict=True)
    ]
    found = torch.cat([grad.flatten() for grad in grads])
    assert (found - true).abs().max() <= 1e-12 * true.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_of_targets(kind):
    """Packed rows in any order, padded ones and Targets with capacity, with rows that cannot be among them."""
    preds, listed = make_preds(kind, 3, torch.float64), make_targets(kind, 3)
    want, true = run(kind, "torch", preds, listed)
    packed = fusedyolo.Targets.from_torchvision(listed, SIZE).rows
    bad = torch.tensor([0, 1, 0.5, 0.5, 0.2, 0.2]).repeat(6, 1)
    for row, (column, value) in enumerate(((0, 9.0), (1, 7.0), (1, -1.0), (2, math.nan), (3, 1.5), (4, 0.0))):
        bad[row, column] = value
    order = torch.randperm(len(packed) + len(bad), generator=torch.Generator().manual_seed(1))
    rows = torch.cat((packed, bad.to(DEVICE)))[order]
    padded = torch.zeros(3, 5, 5, device=DEVICE)
    for image in range(2):
        padded[image, :4] = packed[packed[:, 0] == image][:, 1:]
    for targets, invalid in (
        (rows, 6),
        (padded, 0),
        (fusedyolo.Targets.from_packed(rows.cpu(), 3, capacity=32).to(DEVICE), 6),
    ):
        for backend in BACKENDS:
            got, found = run(kind, backend, preds, targets, image_size=SIZE)
            assert int(got.num_invalid) == invalid
            # boxes are rounded once more on the way
            assert float(got.total) == pytest.approx(float(want.total), rel=1e-5)
            assert (found - true).abs().max() <= 1e-5 * true.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_small_objects_far_from_the_origin_keep_their_digits(kind):
    """Rows relative to the image: gradients within 1e-5 of float64's, also of predictions that are nearly right."""
    maps, side = ((80, 80),), 640
    boxes = {
        "retinanet": lambda: anchors.retinanet_anchors(maps, side, (8,), device=DEVICE),
        "ssd": lambda: anchors.ssd_anchors(maps, side, ((2,),), scales=(0.015, 0.03), device=DEVICE),
        "fcos": lambda: anchors.fcos_anchors(maps, side, (8,), device=DEVICE),
    }[kind]()
    generator = torch.Generator().manual_seed(0)
    rows = torch.cat((torch.tensor([[0.0, 1.0]] * 6), torch.rand(6, 2, generator=generator) * 0.5 + 0.45), 1)
    rows = torch.cat((rows, (8 + 16 * torch.rand(6, 2, generator=generator)) / side), 1).to(DEVICE)
    middle = 0.5 * (boxes[:, None, :2] + boxes[:, None, 2:])
    boxes = boxes[((middle - rows[:, 2:4] * side).abs().amax(2) < 16).any(1)]  # those around the objects
    options = {"anchors": boxes, "num_anchors_per_level": [len(boxes)], "image_size": side}
    channels = (C, 4, 1)[: 3 if kind == "fcos" else 2]
    preds = [torch.randn(1, len(boxes), c, generator=generator).to(DEVICE) for c in channels]
    loss = lambda backend: criterion(kind, backend, **({"loss_type": "smooth_l1"} if kind == "retinanet" else {}))  # noqa: E731
    found = fusedyolo.assign(loss("torch"), preds, rows, **options)
    preds[1] = torch.where((found.row >= 0)[..., None], found.encoded + 0.05 * preds[1], preds[1].abs())
    grads, parts = {}, {}
    for backend, dtype in (("torch", torch.float64), ("triton", torch.float32), ("torch", torch.float32)):
        leaves = [pred.to(dtype).clone().requires_grad_() for pred in preds]
        out = loss(backend)(leaves, rows, **options)
        out.total.backward()
        assert int(out.num_pos) == int((found.row >= 0).sum()) > 0
        grads[backend, dtype], parts[backend, dtype] = leaves[1].grad.double(), float(out.parts["bbox_regression"])
    true, part = grads.pop(("torch", torch.float64)), parts.pop(("torch", torch.float64))
    for key, grad in grads.items():
        assert (grad - true).abs().max() <= 1e-5 * true.abs().max(), key
        assert parts[key] == pytest.approx(part, rel=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["retinanet", "ssd"])
def test_a_row_whose_corners_coincide_in_float32(kind, backend):
    for side in (1e-9, 1e-30, 1e-38):
        rows = torch.tensor([[0, 1, 0.5, 0.5, side, side]], device=DEVICE)
        out, grad = run(kind, backend, make_preds(kind, 1), rows, image_size=SIZE)
        assert out.total.isfinite()
        assert grad.isfinite().all()


def test_deltas_beyond_the_largest_size():
    """In float64: held at ln(1000 / 16), not at what float32 makes of it."""
    preds = make_preds("retinanet", 1, torch.float64)
    with torch.no_grad():
        preds[1][..., 2:] = 9.0
        preds[1][0, ::2, 2:] = math.log(1000 / 16)
    check("retinanet", preds, make_targets("retinanet", 1), 1e-13, loss_type="giou")


def as_maps(kind: str, preds: list[Tensor], channels_last: bool) -> list[list[Tensor]]:
    """For each prediction its maps ``[B, A * channels, H, W]``."""
    found = []
    for pred in preds:
        maps = []
        for level, (h, w), a in zip(pred.detach().split(sizes(kind), 1), MAPS, PER_CELL[kind], strict=True):
            view = level.unflatten(1, (h, w, a)).permute(0, 3, 4, 1, 2).flatten(1, 2)
            form = torch.channels_last if channels_last else torch.contiguous_format
            maps.append(view.contiguous(memory_format=form).requires_grad_())
        found.append(maps)
    return found


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_maps_are_read_in_place(kind, channels_last):
    """Per-level maps, NCHW (planes) and channels-last (streams), give what one piece gives."""
    preds, targets = make_preds(kind), make_targets(kind)
    want, _true = run(kind, "triton", preds, targets)
    maps = as_maps(kind, preds, channels_last)
    out = criterion(kind, "triton")(maps, targets, anchors=make_anchors(kind))
    out.total.backward()
    assert float(out.total) == pytest.approx(float(want.total), rel=1e-6)
    for each, c, pred in zip(maps, (C, 4, 1), preds, strict=False):
        parts = [m.grad.unflatten(1, (-1, c)).permute(0, 3, 4, 1, 2).flatten(1, 3) for m in each]
        torch.testing.assert_close(torch.cat(parts, 1), pred.grad, rtol=1e-5, atol=1e-7)
        assert all(m.grad.stride() == m.stride() for m in each)
    eager = criterion(kind, "torch")(maps, targets, anchors=make_anchors(kind))
    assert float(eager.total) == pytest.approx(float(want.total), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_strided_predictions_are_read_in_place(kind):
    """[B, N, C] as views of [B, C, N], and of a tensor that is wider."""
    preds, targets = make_preds(kind), make_targets(kind)
    want, true = run(kind, "triton", preds, targets)
    for make in (
        lambda p: p.detach().transpose(1, 2).contiguous().transpose(1, 2),
        lambda p: torch.cat((p.detach(), p.detach()), 2)[..., : p.shape[2]],
    ):
        views = [make(pred).requires_grad_() for pred in preds]
        assert any(not view.is_contiguous() for view in views)
        got, found = run(kind, "triton", views, targets)
        assert float(got.total) == pytest.approx(float(want.total), rel=1e-6)
        torch.testing.assert_close(found, true, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_as_good_as_eager(kind, dtype):
    """Error against float64 on the same values: no more than the eager reference's own, and one rounding."""
    preds = make_preds(kind, dtype=dtype)
    exact = [pred.detach().double().requires_grad_() for pred in preds]
    want, true = run(kind, "torch", exact, make_targets(kind))
    _, eager = run(kind, "torch", preds, make_targets(kind))
    got, found = run(kind, "triton", preds, make_targets(kind))
    assert got.total.dtype == torch.float32
    assert float(got.total) == pytest.approx(float(want.total), rel=1e-5)
    rounding = torch.finfo(dtype).eps * true.abs() + torch.finfo(dtype).smallest_normal
    assert ((found - true).abs() <= (eager - true).abs() + rounding).all()


@pytest.mark.parametrize("kind", KINDS)
def test_small_gradients_survive_in_float16(kind):
    """What float16 would lose before the factor of a GradScaler reaches it."""
    preds = make_preds(kind, dtype=torch.float16)
    with torch.no_grad():
        preds[0].sub_(7)
    exact = [pred.detach().double().requires_grad_() for pred in preds]
    _, true = run(kind, "torch", exact, make_targets(kind), scale=65536.0)
    _, found = run(kind, "triton", preds, make_targets(kind), scale=65536.0)
    background = true.abs() < 65536 * 6e-8
    assert background.any()
    assert (found - true)[background].abs().max() <= 2e-3 * true[background].abs().max()


# ---- corners


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_find(kind, backend):
    """No object in a batch, in any form, and a batch of one image."""
    for batch in (1, 2):
        preds = make_preds(kind, batch)
        empty = [{"boxes": torch.zeros(0, 4, device=DEVICE), "labels": torch.zeros(0, device=DEVICE)}] * batch
        for targets in (empty, torch.zeros(0, 6, device=DEVICE), torch.zeros(batch, 0, 5, device=DEVICE)):
            out, grad = run(kind, backend, preds, targets, image_size=SIZE)
            assert out.total.isfinite()
            assert grad.isfinite().all()
            assert int(out.num_pos) == int(out.num_invalid) == 0
            assert float(out.parts["bbox_regression"]) == 0
            assert (float(out.total) == 0) == (kind == "ssd")


@pytest.mark.parametrize("kind", KINDS)
def test_ties_and_duplicates(kind):
    """Objects on anchors, twice, and midway between two: dyadic numbers, so that ties are exact."""
    boxes = make_anchors(kind)
    size = torch.tensor([SIZE[1], SIZE[0]] * 2, device=DEVICE)
    inside = ((boxes >= 0) & (boxes <= size)).all(1).nonzero().flatten()[:2]
    a, b = boxes[inside].round()
    exact = torch.stack((a, a, b, (a + b) / 2, a + 4))
    labels = torch.tensor([1, 2, 1, 2, 1], device=DEVICE)
    targets = [{"boxes": exact, "labels": labels}, {"boxes": exact.flip(0), "labels": labels}]
    check(kind, make_preds(kind), targets)


@pytest.mark.parametrize("kind", KINDS)
def test_more_objects_than_anchors(kind):
    """In float64: among so many boxes some are told apart by the last bits."""
    targets = make_targets(kind, 1, n=sum(sizes(kind)) + 40, side=60.0)
    check(kind, make_preds(kind, 1, torch.float64), targets, 1e-12)
    assert int(run(kind, "torch", make_preds(kind, 1), targets)[0].num_pos) > 0


def matches(outputs):
    """As the reference has them: here a negative number also says which row an anchor overlaps most."""
    match = outputs[5].long()
    return torch.where(match >= 0, match, torch.where(match % 2 == 0, reference.IGNORED, -1))


def test_float32_decisions_are_those_of_float32():
    """Matches of the kernels, bit by bit those of the reference in the same type, among boxes that are hard to part."""
    for kind in KINDS:
        targets, preds = make_targets(kind, 1, n=150, side=60.0), make_preds(kind, 1)
        head, boxes = criterion(kind, "triton").head, make_anchors(kind)
        rows, offsets, _ = corner_rows(targets, 1)
        ends = [sizes(kind)[0], sizes(kind)[-1]]
        outputs = ops.dense_loss(preds, boxes, rows, offsets, head.key, [math.inf] * 2, True, ends, False)
        read = reference.read_corners(rows, head, 1, None, True, torch.float32)
        assert torch.equal(matches(outputs), reference.dense_match(boxes, read, head, 1, tuple(ends)))


def test_thresholds_are_not_rounded():
    """An IoU of exactly 2 / 5 is not below 0.4, in float64 as in float32: as torchvision compares them."""
    box = torch.tensor([[0.0, 0, 5, 2]], device=DEVICE)
    targets = [{"boxes": box, "labels": torch.zeros(1, dtype=torch.int64, device=DEVICE)}]
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 5, 2]], device=DEVICE)
    for backend in BACKENDS:
        for dtype in (torch.float32, torch.float64):
            preds = [torch.zeros(1, 2, c, device=DEVICE, dtype=dtype) for c in (1, 4)]
            out = RetinaNetLoss(1, allow_low_quality_matches=False, backend=backend)(preds, targets, boxes)
            assert float(out.parts["classification"]) == pytest.approx(0.25 * 0.25 * math.log(2), rel=1e-6)


def test_an_object_that_meets_no_anchor_claims_those_that_it_does_not_meet():
    """torchvision's rule for RetinaNet, kept; without it nothing would be matched here."""
    targets = [{"boxes": torch.tensor([[60.0, 44.0, 60.25, 44.25]], device=DEVICE), "labels": torch.tensor([1])}]
    targets[0]["labels"] = targets[0]["labels"].to(DEVICE)
    tiny = torch.tensor([[0.0, 0, 8, 8], [8, 0, 16, 8], [59, 43, 59.5, 43.5]], device=DEVICE)
    for backend in BACKENDS:
        preds = [torch.zeros(1, 3, c, device=DEVICE, requires_grad=True) for c in (C, 4)]
        out = RetinaNetLoss(C, backend=backend)(preds, targets, tiny)
        assert int(out.num_pos) == 3
        without = RetinaNetLoss(C, allow_low_quality_matches=False, backend=backend)(preds, targets, tiny)
        assert int(without.num_pos) == 0


@pytest.mark.parametrize("kind", ["retinanet", "ssd"])
def test_an_object_that_meets_no_anchor_claims_none_of_another_image(kind):
    """Packed rows in no order: between those of an image lies one of another, which no anchor there answers for."""
    rows = torch.tensor(
        [[1, 1, 0.5, 0.5, 0.2, 0.2], [0, 2, 0.95, 0.05, 0.004, 0.004], [1, 1, 0.4, 0.6, 0.2, 0.3]], device=DEVICE
    )
    anchors = torch.tensor([[8.0, 40, 24, 56], [20, 20, 44, 44], [24, 16, 40, 48]], device=DEVICE)
    make = {"retinanet": RetinaNetLoss, "ssd": SSDLoss}[kind]
    found = []
    for backend in BACKENDS:
        generator = torch.Generator().manual_seed(1)
        preds = [torch.randn(2, 3, c, generator=generator).to(DEVICE).requires_grad_() for c in (C, 4)]
        out = make(C, backend=backend)(preds, rows, anchors=anchors, image_size=64)
        out.total.backward()
        found.append((out.total.detach(), out.num_pos, *(pred.grad for pred in preds)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_hard_negatives_at_equal_losses_come_first_by_their_index():
    """Equal logits: of 40 negatives the 3 that count are the first."""
    place = torch.arange(40, device=DEVICE).float()[:, None] * 10
    boxes = torch.cat((place, place, place + 8, place + 8), 1)
    targets = [{"boxes": boxes[5:6].clone(), "labels": torch.ones(1, dtype=torch.int64, device=DEVICE)}]
    for backend in BACKENDS:
        preds = [torch.zeros(1, 40, c, device=DEVICE, requires_grad=True) for c in (C, 4)]
        SSDLoss(C, backend=backend)(preds, targets, boxes).total.backward()
        assert preds[0].grad[0].abs().sum(1).nonzero().flatten().tolist() == [0, 1, 2, 5]


@pytest.mark.parametrize("count", [4000, 5300])
def test_hard_negatives_of_a_long_list(count):
    """All anchors cost about as much as each other, many the same: more than are held, or nearly, are gone through."""
    place = torch.arange(count, device=DEVICE).float()[:, None] * 10
    boxes = torch.cat((place, place, place + 8, place + 8), 1)
    targets = [{"boxes": boxes[::7].clone(), "labels": torch.ones(len(boxes[::7]), dtype=torch.int64, device=DEVICE)}]
    logits = torch.randint(64, (1, count, C), generator=torch.Generator().manual_seed(3)) / 4096
    found = []
    for backend in BACKENDS:
        preds = [
            logits.to(DEVICE, copy=True).requires_grad_(),
            torch.zeros(1, count, 4, device=DEVICE, requires_grad=True),
        ]
        SSDLoss(C, neg_to_pos_ratio=2.5, backend=backend)(preds, targets, boxes).total.backward()
        found.append(preds[0].grad)
    assert torch.equal(found[0] != 0, found[1] != 0)
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize(("ratio", "dtype"), [(0.5, torch.float32), (3.0, torch.float64), (40.0, torch.float32)])
def test_a_ranking_by_several_programs(monkeypatch, ratio, dtype):
    """Parts of 64 anchors, ties within and across them, a NaN, and with a large ratio fewer negatives than wanted."""
    monkeypatch.setattr(dense_plan, "RANK_PART", 64)
    preds, targets = make_preds("ssd", 2, dtype), make_targets("ssd", 2, n=6)
    with torch.no_grad():
        preds[0].copy_(preds[0].round())  # of few values: many are as hard as each other
    exact = [pred.detach().double().requires_grad_() for pred in preds]
    want, true = run("ssd", "torch", exact, targets, neg_to_pos_ratio=ratio)
    got, found = run("ssd", "triton", preds, targets, neg_to_pos_ratio=ratio)
    assert float(got.total) == pytest.approx(float(want.total), rel=1e-5)
    assert torch.equal(found != 0, true != 0)  # the same anchors count
    torch.testing.assert_close(found, true, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        preds[0][0, 150, 1] = math.nan
    got, found = run("ssd", "triton", preds, targets, neg_to_pos_ratio=ratio)
    assert math.isnan(float(got.total))
    assert int(found.isnan().sum()) == C  # as hard as can be


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_meet_no_anchor_of_a_block(kind):
    """Objects far from each other and from most anchors, and more than are tested at a time: each as if all were."""
    targets, preds = make_targets(kind, 1, n=70, side=3.0), make_preds(kind, 1)
    head, boxes = criterion(kind, "triton").head, make_anchors(kind)
    rows, offsets, _ = corner_rows(targets, 1)
    ends = [sizes(kind)[0], sizes(kind)[-1]]
    read = reference.read_corners(rows, head, 1, None, True, torch.float32)
    want = reference.dense_match(boxes, read, head, 1, tuple(ends))
    for block in (16, 256):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dense_plan, "MATCH_BLOCK", block)
            outputs = ops.dense_loss(preds, boxes, rows, offsets, head.key, [math.inf] * 2, True, ends, False)
        assert torch.equal(matches(outputs), want)
        assert outputs[6].tolist() == [int((want >= 0).sum())] * 2


def test_hard_negatives_of_maps_are_those_of_anchors():
    """Equal logits on a map of two anchors a cell: which ones count goes by anchor, wherever they lie in memory."""
    place = torch.tensor([[16.0 * x, 16.0 * y] for y in range(4) for x in range(4) for _ in range(2)])
    boxes = torch.cat((place, place + torch.tensor([[16.0], [8.0]]).repeat(16, 1)), 1).to(DEVICE)
    targets = [{"boxes": boxes[5:6].clone(), "labels": torch.ones(1, dtype=torch.int64, device=DEVICE)}]
    for ratio, want in ((3.0, [0, 1, 2, 5]), (40.0, list(range(32)))):
        for backend in BACKENDS:
            cls = torch.zeros(1, 2 * C, 4, 4, device=DEVICE, requires_grad=True)
            box = torch.zeros(1, 8, 4, 4, device=DEVICE, requires_grad=True)
            SSDLoss(C, neg_to_pos_ratio=ratio, backend=backend)(([cls], [box]), targets, boxes).total.backward()
            counted = cls.grad.unflatten(1, (2, C)).permute(0, 3, 4, 1, 2).flatten(1, 3)[0].abs().sum(1)
            assert counted.nonzero().flatten().tolist() == want


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_objects_all_anchors_are_background(backend):
    """Whatever the threshold."""
    nothing = [{"boxes": torch.zeros(0, 4, device=DEVICE), "labels": torch.zeros(0, device=DEVICE)}]
    preds = make_preds("retinanet", 1)
    want, _ = run("retinanet", backend, preds, nothing)
    got, _ = run("retinanet", backend, preds, nothing, bg_iou_thresh=0.0)
    assert float(got.total) == float(want.total) > 0


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 1.25, 1.5, 2.0])
@pytest.mark.parametrize("alpha", [0.25, -1.0])
def test_focal_loss_of_any_shape_at_any_logit(alpha, gamma):
    """Finite losses and gradients at +-120, and those of the reference."""
    preds = make_preds("retinanet", 1)
    with torch.no_grad():
        preds[0][0, :40] = torch.tensor([120.0, -120.0, 0.0], device=DEVICE)
        preds[0][0, 40:80] = torch.tensor([-120.0, 120.0, 60.0], device=DEVICE)
        preds[1][0, ::3] = 120.0
        preds[1][0, 1::3] = -120.0
    for loss_type in ("l1", "giou"):
        check("retinanet", preds, make_targets("retinanet", 1), 2e-5, alpha=alpha, gamma=gamma, loss_type=loss_type)


@pytest.mark.parametrize("kind", ["ssd", "fcos"])
def test_tails(kind):
    preds = make_preds(kind, 1)
    with torch.no_grad():
        preds[0][0, ::2] = torch.tensor([120.0, -120.0, 0.0], device=DEVICE)
        preds[1][0, ::3] = 120.0
        preds[1][0, 1::3] = 0.0
    check(kind, preds, make_targets(kind, 1), 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_shows_in_the_total_and_stays_where_it_is(kind, backend):
    preds = make_preds(kind, 1)
    found = fusedyolo.assign(criterion(kind, "torch"), preds, make_targets(kind, 1), **geometry(kind))
    anchor = int((found.row[0] >= 0).nonzero()[0])
    with torch.no_grad():
        preds[0][0, anchor, 1] = math.nan
    out, grad = run(kind, backend, preds, make_targets(kind, 1))
    assert out.total.isnan()
    assert grad.isnan().sum() <= (C if kind == "ssd" else 1)
    assert preds[0].grad[0, anchor].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_that_does_not_count_shows_all_the_same(backend):
    """SSD in an image without objects, RetinaNet on an ignored anchor: in the total, and in no gradient."""
    preds = make_preds("ssd", 2)
    with torch.no_grad():
        preds[0][1, 2, 0] = math.nan
    out, grad = run("ssd", backend, preds, make_targets("ssd", 2))
    assert out.total.isnan()
    assert grad.isfinite().all()
    preds, targets = make_preds("retinanet", 1), make_targets("retinanet", 1)
    found = fusedyolo.assign(criterion("retinanet", "torch"), preds, targets, **geometry("retinanet"))
    with torch.no_grad():
        preds[0][0, int(found.ignored[0].nonzero()[0]), 1] = math.nan
    out, grad = run("retinanet", backend, preds, targets)
    assert out.total.isnan()
    assert grad.isfinite().all()


# ---- autograd


@pytest.mark.parametrize("kind", KINDS)
def test_parts_have_gradients_of_their_own(kind):
    """Weighed apart, as torchvision's dictionaries are; one of them alone; and grad_output other than 1."""
    weights = (0.5, 2.0, 3.0)
    found = {}
    for backend in BACKENDS:
        preds = make_preds(kind)
        terms = criterion(kind, backend).terms(preds, make_targets(kind), **geometry(kind))
        sum(w * term for w, term in zip(weights, terms.values(), strict=False)).backward()
        both = gradients(preds)
        alone = make_preds(kind)
        terms = criterion(kind, backend).terms(alone, make_targets(kind), **geometry(kind))
        terms["bbox_regression"].backward()
        assert alone[0].grad is None or not alone[0].grad.any()
        found[backend] = torch.cat((both, alone[1].grad.double().flatten()))
    assert (found["triton"] - found["torch"]).abs().max() <= 1e-5 * found["torch"].abs().max()


@pytest.mark.interpreter("sectors are counted in the interpreter")
@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
def test_a_backward_of_ones_moves_next_to_nothing(kind):
    """Of the total and of the sum of the parts."""
    for use in (lambda c, *a: c(*a, **geometry(kind)).total, lambda c, *a: sum(c.terms(*a, **geometry(kind)).values())):
        preds = make_preds(kind)
        value = use(criterion(kind, "triton"), preds, make_targets(kind))
        counts = count(value.backward)
        assert counts.triton_launches == 1
        assert counts.bytes < 0.25 * sum(pred.nbytes for pred in preds)


@pytest.mark.parametrize("kind", KINDS)
def test_backward_twice_and_not_at_all(kind):
    preds, targets = make_preds(kind), make_targets(kind)
    loss = criterion(kind, "triton")
    once = gradients([p for p in preds if loss and run(kind, "triton", preds, targets)])
    for pred in preds:
        pred.grad = None
    out = loss(preds, targets, **geometry(kind))
    out.total.backward(retain_graph=True)
    (3.0 * out.total).backward()
    torch.testing.assert_close(gradients(preds), 4 * once, rtol=1e-5, atol=1e-8)
    with torch.no_grad():
        assert not loss(preds, targets, **geometry(kind)).total.requires_grad
    out = loss(preds, targets, **geometry(kind))
    grads = torch.autograd.grad(out.total, preds, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        grads[0].sum().backward()


def test_the_same_bits_on_every_run():
    for kind in KINDS:
        preds, targets = make_preds(kind, 3), make_targets(kind, 3, n=30)
        runs = [run(kind, "triton", preds, targets) for _ in range(3)]
        assert all(torch.equal(runs[0][1], grad) and runs[0][0].total == out.total for out, grad in runs[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)  # what no launch writes is compared too
    preds, head = make_preds(kind, 1), criterion(kind, "triton").head
    rows = torch.tensor([[0, 1, 0.4, 0.4, 0.3, 0.4], [0, 2, 0.6, 0.7, 0.2, 0.2]], device=DEVICE)
    call = (make_anchors(kind), rows, None, head.key, [64.0, 48.0], False, [sizes(kind)[0], sizes(kind)[-1]])
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.dense_loss, (preds, *call, False), test_utils=tests)
    outputs = ops.dense_loss(preds, *call, False)
    saved = [call[0], rows, *outputs[5:9]]
    one = torch.ones((), device=DEVICE)
    raw = [pred.detach() for pred in preds]
    torch.library.opcheck(ops.dense_loss_grad, (one, None, one, None, raw, saved, *call[3:]))
    stored = [torch.zeros_like(pred) for pred in raw]
    torch.library.opcheck(ops.dense_loss_rescale, (stored, one, None, one, None, raw, saved, *call[3:]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_break_or_a_recompilation(backend):
    torch._dynamo.reset()
    loss, settings = criterion("retinanet", backend), {"anchors": make_anchors("retinanet"), "image_size": SIZE}
    compiled = torch.compile(lambda preds, rows: loss(preds, rows, **settings), backend="aot_eager", fullgraph=True)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    counted = torch.compile(lambda preds, rows: loss(preds, rows, **settings), backend=counter, fullgraph=True)
    for n in (3, 5, 8) if backend == "triton" else (3,):
        rows = fusedyolo.Targets.from_torchvision(make_targets("retinanet", n=n), SIZE).rows
        preds = make_preds("retinanet")
        (counted if backend == "triton" else compiled)(preds, rows).total.backward()
        _want, true = run("retinanet", backend, [p.detach().requires_grad_() for p in preds], rows, image_size=SIZE)
        torch.testing.assert_close(gradients(preds), true, rtol=1e-5, atol=1e-8)
    assert counter.frame_count <= 2  # one for a fixed and one for any number of rows


def test_compiles_once_for_maps_of_any_size():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    loss, counter = criterion("retinanet", "triton"), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda p, t, a: loss(p, t, anchors=a, image_size=SIZE), backend=counter, fullgraph=True)
    rows = fusedyolo.Targets.from_torchvision(make_targets("retinanet"), SIZE).rows
    for side in (4, 5, 6, 7, 9, 11):
        boxes = anchors.retinanet_anchors([(side, 6)], SIZE, (12,), device=DEVICE)
        maps = [torch.randn(2, 3 * c, side, 6, device=DEVICE) for c in (C, 4)]
        compiled(([maps[0]], [maps[1]]), rows, boxes)
    assert counter.frame_count <= 3


# ---- cost


@pytest.mark.interpreter("sectors are counted in the interpreter")
@pytest.mark.parametrize("kind", KINDS)
def test_cost_grows_linearly_with_the_objects(kind):
    """Bytes of a step in the number of objects of an image, the same ones again; the programs stay the same."""
    corner = torch.rand(4, 2, generator=torch.Generator().manual_seed(0)) * 32
    boxes = torch.cat((corner, corner + 16), 1)
    moved, programs = {}, set()
    launch.zeros(torch.device("cpu"), 4096, torch.int64)  # room for all of them
    for n in (160, 280, 400):
        again = [{name: torch.cat([value] * (n // 40)) for name, value in make_targets(kind, 1, n=40)[0].items()}]
        targets = fusedyolo.Targets.from_torchvision(again, SIZE)
        preds = [torch.randn(1, 4, c).abs().requires_grad_() for c in (C, 4, 1)[: 3 if kind == "fcos" else 2]]
        loss = criterion(kind, "triton", image_size=SIZE)
        counts = count(lambda: loss(preds, targets, boxes, num_anchors_per_level=[2, 2]).total.backward())  # noqa: B023
        moved[n] = counts.bytes
        programs.add(counts.programs)
        assert counts.syncs == 0
    assert len(programs) == 1
    first, second = moved[280] - moved[160], moved[400] - moved[280]
    assert second == pytest.approx(first, rel=0.05)
    assert (
        first < 120 * 400
    )  # bytes an object; those that a block of anchors meets are read twice, the second time from a cache


@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_objects_need_no_table_of_pairs(kind):
    targets, preds = make_targets(kind, 1, n=5000), make_preds(kind, 1)
    with Watch() as watch:
        out, _ = run(kind, "torch", preds, targets)
    assert int(out.num_pos) > 0
    assert watch.largest < 5000 * sum(sizes(kind)) or watch.largest <= 1 << 18


@pytest.mark.parametrize("kind", KINDS)
def test_memory_beyond_the_inputs(kind):
    """What a step allocates on top of the predictions, at 80 classes: gradients, and little more."""
    batch, n = 2, 4096
    channels = (80, 4, 1)[: 3 if kind == "fcos" else 2]
    preds = [torch.empty(batch, n, c) for c in channels]
    kept = dense_outputs(preds, torch.empty(n, 4), KINDS[kind](80).head, True)
    grads = kept.grads or preds  # SSD's are made in the backward
    extra = sum(t.nbytes for t in [*kept[:-1], *grads])
    assert extra <= 1.1 * sum(pred.nbytes for pred in preds)


# ---- arguments


def test_maps_tell_their_sizes_themselves():
    """Also a single one, of FCOS."""
    boxes = anchors.fcos_anchors([(3, 4)], SIZE, (16,), device=DEVICE)
    maps = [[torch.randn(2, c, 3, 4, device=DEVICE).abs()] for c in (C, 4, 1)]
    out = criterion("fcos", "torch")(maps, make_targets("fcos"), boxes)
    flat = [m[0].flatten(2).transpose(1, 2) for m in maps]
    want = criterion("fcos", "torch")(flat, make_targets("fcos"), boxes, num_anchors_per_level=[12])
    assert float(out.total) == pytest.approx(float(want.total))


def test_wrong_arguments_are_named():
    preds, targets = make_preds("retinanet"), make_targets("retinanet")
    loss, boxes = criterion("retinanet", "torch"), make_anchors("retinanet")
    packed = fusedyolo.Targets.from_torchvision(targets, SIZE).rows
    for call, message in (
        (lambda: RetinaNetLoss(0), "num_classes: 0, want an integer >= 1"),
        (lambda: SSDLoss(1), "num_classes: 1, want an integer >= 2"),
        (lambda: RetinaNetLoss(3, loss_type="l2"), "loss_type: 'l2', want one of 'l1', 'smooth_l1', 'iou'"),
        (lambda: FCOSLoss(3, loss_type="l1"), "loss_type: 'l1', want one of 'iou'"),
        (lambda: RetinaNetLoss(3, bg_iou_thresh=0.6), "bg_iou_thresh: 0.6, want at most fg_iou_thresh, 0.5"),
        (lambda: RetinaNetLoss(3, alpha=-0.5), r"alpha: -0.5, want a number in \[0, 1\], or -1 for none"),
        (lambda: SSDLoss(3, weights=(1, 2)), r"weights: \(1, 2\), want four positive numbers, of x, y, w and h"),
        (lambda: loss(preds[:1], targets, boxes), r"preds: .*, want \(cls_logits, bbox_regression\)"),
        (lambda: loss([preds[0][..., :2], preds[1]], targets, boxes), r"cls_logits: shape \(2, 180, 2\), want"),
        (lambda: loss([preds[0], preds[1][:, 1:]], targets, boxes), r"bbox_regression: shape \(2, 179, 4\), want that"),
        (lambda: loss([preds[0], preds[1].double()], targets, boxes), "bbox_regression: dtype torch.float64, want"),
        (lambda: loss(preds, targets, boxes[1:]), r"anchors: shape \(179, 4\), want \(180, 4\), one for each"),
        (lambda: loss(preds, targets, None), r"anchors: None, want a tensor of shape \(N, 4\)"),
        (lambda: loss(preds, targets[:1], boxes), "targets: a list of 1, want 2 dicts, one an image of preds"),
        (lambda: loss(preds, packed, boxes), r"image_size: None, want \(height, width\) of the images, for targets"),
        (
            lambda: RetinaNetLoss(3, loss_type="mpdiou")(preds, targets, boxes),
            "image_size: None, want .* 'mpdiou'|mpdiou",
        ),
        (
            lambda: loss(preds, targets, boxes, [100, 70]),
            r"num_anchors_per_level: \[100, 70\], want integers that add up",
        ),
        (
            lambda: criterion("fcos", "torch")(make_preds("fcos"), targets, make_anchors("fcos")),
            "num_anchors_per_level: None, want the number of anchors of each level",
        ),
        (lambda: fusedyolo.assign(loss, preds, targets), r"anchors: None, want a tensor"),
        (
            lambda: criterion("fcos", "torch")(
                as_maps("fcos", make_preds("fcos"), False), targets, make_anchors("fcos"), [30, 30]
            ),
            r"num_anchors_per_level: \[30, 30\], want \[48, 12\], as the maps",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# ---- around the losses


@pytest.mark.parametrize("kind", KINDS)
def test_encoded_targets_decode_to_the_true_boxes(kind):
    preds, targets, loss = make_preds(kind), make_targets(kind), criterion(kind, "torch")
    found = fusedyolo.assign(loss, preds, targets, **geometry(kind))
    has = found.row >= 0
    assert int(has.sum()) == int(loss(preds, targets, **geometry(kind)).num_pos) > 0
    encoded = torch.where(has[..., None], found.encoded, preds[1].detach())
    boxes, scores = fusedyolo.decode([preds[0], encoded, *preds[2:]], loss, anchors=make_anchors(kind))
    torch.testing.assert_close(boxes[has], found.boxes[has], rtol=1e-5, atol=1e-3)
    assert scores.shape == preds[0].shape
    assert (found.label[has] >= 1).all()
    assert ((found.objectness >= 0) & (found.objectness <= 1)).all()
    _, _grad = run(kind, "torch", [preds[0].detach().requires_grad_(), encoded.requires_grad_(), *preds[2:]], targets)
    assert encoded.grad.abs().max() < 1e-3 or kind == "retinanet"  # |d| has a kink where it is right


def test_the_picture_shows_boxes_and_anchors():
    found = fusedyolo.assign(
        criterion("retinanet", "torch"), make_preds("retinanet"), make_targets("retinanet"), **geometry("retinanet")
    )
    figure = fusedyolo.draw_assignment(torch.zeros(3, *SIZE), found, 0, names=["a", "b", "c"])
    (axes,) = figure.axes
    positive = int((found.row[0] >= 0).sum())
    assert axes.get_title() == f"{positive} positive"
    assert len(axes.patches) == positive + 4
    assert len(axes.texts) == 4
    assert sum(line.get_marker() == "x" for line in axes.lines) == int(found.ignored[0].sum())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_select(kind, backend):
    """The boxes that torchvision's recipe gives: scores, clipped boxes, greedy suppression class by class."""
    preds, loss = make_preds(kind), criterion(kind, backend)
    found = fusedyolo.select(
        preds, loss, conf=0.3, iou=0.4, max_det=20, anchors=make_anchors(kind), image_size=SIZE, backend=backend
    )
    boxes, scores = fusedyolo.decode(
        [p.detach().double() for p in preds], loss, image_size=SIZE, anchors=make_anchors(kind)
    )
    assert boxes.min() >= 0
    assert (boxes <= torch.tensor([SIZE[1], SIZE[0]] * 2, device=DEVICE)).all()
    for image in range(2):
        kept = greedy(boxes[image].cpu().numpy(), scores[image].cpu().numpy(), conf=0.3, iou=0.4, max_det=20)
        assert int(found.count[image]) == len(kept) > 0
        assert found.labels[image, : len(kept)].tolist() == [k for _, k in kept]
        want = boxes[image, [n for n, _ in kept]].float()
        torch.testing.assert_close(found.boxes[image, : len(kept)], want, rtol=1e-6, atol=1e-4)
