"""Variants of losses that many code bases use, against what these compute: recorded, or described here."""

from __future__ import annotations

import golden
import numpy as np
import pytest
import torch
from conftest import DEVICE
from formulas import box_term, label_term, plain_iou
from test_goldens import check_torch_golden, close, on_both_backends

import fusedyolo
from fusedyolo import (
    E2ELoss,
    EfficientDetLoss,
    FCOSLoss,
    RetinaNetLoss,
    ScaledYOLOv4Loss,
    SSDLoss,
    YOLOv1Loss,
    YOLOv2Loss,
    YOLOv3Loss,
    YOLOv4Loss,
    YOLOv5Loss,
    YOLOv8Loss,
    YOLOXLoss,
)

ARCHIVE = golden.names("torch", "yolov3_archive_*")
BUBBLIIIING = golden.names("torch", "bubb_*")
BACKENDS = ["torch", "triton"]
ANCHORS, STRIDES = [[(10, 13), (16, 30)], [(30, 61), (62, 45)]], (8, 16)


def f32(value):
    """A constant as the losses hold it."""
    return float(np.float32(value))


# ------------------------------------------------------------------------------------------------- recorded numbers


@on_both_backends
@pytest.mark.parametrize("name", ARCHIVE)
def test_the_archive_of_yolov3(name, dtype, backend):
    data = golden.arrays(name)
    meta = data["meta"]
    loss = YOLOv3Loss(
        meta["anchors_px"], meta["strides"], meta["nc"], "archive", gr=meta["gr"], backend=backend, **meta["hyp"]
    )
    parts = {part: data[f"loss_{part}"] for part in ("box", "obj", "cls")}
    found = check_torch_golden(loss, data, dtype, parts)
    matches = [data[f"match_{i}_image_anchor_y_x_class"][:, :4] for i in range(len(meta["strides"]))]
    assert found == sum(len(match.unique(dim=0)) for match in matches)


def bubbliiiing(meta, backend, **hyp):
    cls = YOLOv3Loss if meta["box"] == "giou" else YOLOv4Loss
    focal = int(meta["options"].get("focal_loss", False))
    return cls(meta["anchors_px"], meta["strides"], meta["nc"], "bubbliiiing", focal_loss=focal, backend=backend, **hyp)


@on_both_backends
@pytest.mark.parametrize("name", BUBBLIIIING)
def test_bubbliiiing(name, dtype, backend):
    data = golden.arrays(name)
    loss = bubbliiiing(data["meta"], backend, image_size=tuple(data["meta"]["image_hw"]))
    found = check_torch_golden(loss, data, dtype, {})
    assert found == sum(int(data[f"positive_{i}"].sum()) for i in range(3))


def test_bubbliiiing_without_the_size_of_images():
    meta = golden.arrays(BUBBLIIIING[0])["meta"]
    with pytest.raises(ValueError, match=r"^obj_ratio: None, want a number, or image_size: .* 5 H W / 416\^2$"):
        bubbliiiing(meta, "torch")
    same = bubbliiiing(meta, "torch", obj_ratio=meta["obj_ratio"], cls_ratio=meta["cls_ratio"])
    assert same.head == bubbliiiing(meta, "torch", image_size=tuple(meta["image_hw"])).head


# --------------------------------------------------------------------------------- eriklindernoren/PyTorch-YOLOv3


def small_maps(dtype=torch.float64, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 2, 32 // stride, 48 // stride, 5 + classes) for stride in STRIDES]
    return [torch.randn(shape, generator=generator, dtype=dtype).to(DEVICE).requires_grad_() for shape in shapes]


ROWS = torch.tensor([
    [0, 1, 0.40, 0.52, 0.30, 0.60], [1, 2, 0.30, 0.70, 0.60, 0.90], [0, 2, 0.41, 0.53, 0.35, 0.50],
    [1, 0, 0.10, 0.20, 0.20, 0.30], [1, 1, 0.98, 0.99, 0.25, 0.60],
])  # fmt: skip


def described(preds, classes=3):
    """Its text: own cell, ratio below 4, CIoU with eps 1e-9, plain means, objectness towards the CIoU."""
    box = obj = cls = torch.zeros((), dtype=torch.float64)
    taken = 0
    for pred, anchors, stride in zip(preds, ANCHORS, STRIDES, strict=True):
        height, width = pred.shape[2:4]
        target = torch.zeros(pred.shape[:4], dtype=torch.float64)
        boxes, classes_of = [], []
        for k, (aw, ah) in enumerate(anchors):
            for row in ROWS.double().tolist():
                w, h = row[4] * width * stride, row[5] * height * stride
                if max(w / aw, aw / w, h / ah, ah / h) >= 4:
                    continue
                gx, gy = row[2] * width, row[3] * height
                at = (int(row[0]), k, int(gy), int(gx))
                raw = pred[at].double().cpu()
                side = (aw / stride, ah / stride)
                p = (raw[0].sigmoid(), raw[1].sigmoid(), raw[2].exp() * side[0], raw[3].exp() * side[1])
                g = [torch.tensor(v, dtype=torch.float64) for v in (gx - at[3], gy - at[2], w / stride, h / stride)]
                boxes.append(box_term("ciou", p, g, (f32(1e-9), f32(1e-9))))
                wanted = torch.zeros(classes, dtype=torch.float64)
                wanted[int(row[1])] = 1
                classes_of.append(label_term("bce", raw[5:], wanted, ()).mean())
                taken += target[at] == 0
                target[at] = (1 - boxes[-1].detach()).clamp(min=0)
        if boxes:
            box, cls = box + torch.stack(boxes).mean(), cls + torch.stack(classes_of).mean()
        obj = obj + label_term("bce", pred[..., 4].double().cpu(), target, ()).mean()
    return {"box": f32(0.05) * box, "obj": obj, "cls": 0.5 * cls}


@pytest.mark.parametrize("backend", BACKENDS)
def test_eriklindernoren(backend):
    exact = [pred.detach().cpu().requires_grad_() for pred in small_maps()]
    parts = described(exact)
    want = torch.autograd.grad(sum(parts.values()), exact)
    preds = small_maps()
    out = YOLOv3Loss(ANCHORS, STRIDES, 3, "eriklindernoren", backend=backend)(preds, ROWS.to(DEVICE))
    for part, value in parts.items():
        torch.testing.assert_close(out.parts[part].cpu(), value.detach(), rtol=1e-6, atol=0)
    for got, expected in zip(torch.autograd.grad(out.total, preds), want, strict=True):
        assert (got.cpu() - expected).abs().max() <= 1e-6 * expected.abs().max()


# --------------------------------------------------------------------------------------------- options one by one


def total(loss, preds=None, rows=ROWS):
    return loss(small_maps() if preds is None else preds, rows.to(DEVICE))


def v3(**options):
    return YOLOv3Loss(ANCHORS, STRIDES, 3, backend="torch", **options)


def test_balance_weighs_the_objectness_of_a_level():
    preds = small_maps()
    alone = [total(v3(balance=each), preds).parts for each in ((1, 0), (0, 1))]
    both = total(v3(balance=(4, 0.5)), preds).parts
    assert both["obj"] == pytest.approx(4 * float(alone[0]["obj"]) + 0.5 * float(alone[1]["obj"]), rel=1e-12)
    assert both["box"] == alone[0]["box"]
    for cls in (YOLOv5Loss, ScaledYOLOv4Loss):  # of two levels, of which Scaled-YOLOv4 has no table
        loss = cls(ANCHORS, STRIDES, 3, balance=(4, 1), backend="torch")
        assert loss.head.obj_balance == (4, 1)
        assert total(loss, preds).parts["obj"] > 0
    with pytest.raises(ValueError, match=r"^anchors: 2 levels, want one of \[3, 4, 5\], or a balance$"):
        ScaledYOLOv4Loss(ANCHORS, STRIDES, 3)
    with pytest.raises(ValueError, match=r"^balance: 3 numbers, want one for each of 2 levels$"):
        YOLOv5Loss(ANCHORS, STRIDES, 3, balance=(4, 1, 0.4))
    with pytest.raises(ValueError, match=r"^balance: no hyper-parameter of recipe 'darknet'"):
        v3(recipe="darknet", balance=(1, 1))


def test_means_over_each_level():
    """What a level's sums are divided by: rows in use, and predictions whose objectness counts."""
    preds = small_maps()
    options = {"iou_loss": "giou", "shared": "each", "lambda_noobj": 1, "ignore_thresh": 0.3}
    for level in range(2):
        only = {"anchors": ANCHORS[level : level + 1], "strides": STRIDES[level : level + 1]}
        head = {"num_classes": 3, "backend": "torch"} | only | options
        summed, mean = (YOLOv3Loss(reduction=kind, **head) for kind in ("sum", "level"))
        assert (mean.head.mean_rows, mean.head.obj_mean) == (True, "used")
        a, b = total(summed, preds[level : level + 1]), total(mean, preds[level : level + 1])
        assert a.num_pos == b.num_pos > 0
        rows = float(a.parts["box"] / b.parts["box"])
        assert rows == pytest.approx(round(rows), rel=1e-6)
        assert a.parts["cls"] / b.parts["cls"] == pytest.approx(rows, rel=1e-6)
        used = float(a.parts["obj"] / b.parts["obj"])
        assert used == pytest.approx(round(used), rel=1e-6)
        assert rows < used <= preds[level][..., 0].numel()


def test_objectness_of_other_targets_and_terms():
    head = v3(gr=0.5, iou_loss="giou").head
    assert (head.quality, head.quality_ratio) == ("giou", 0.5)
    assert v3(gr=1).head.quality == "iou"  # of squared errors there is no similarity
    assert v3().head.quality is None
    assert (v3(obj_gamma=1.5).head.objectness, v3(obj_gamma=1.5).head.obj_args) == ("focal", (-1.0, 1.5))
    assert v3(obj_loss="qfl", obj_alpha=0.25).head.obj_args == (0.25, 2.0)
    assert (v3().head.objectness, v3().head.obj_args) == ("bce", ())
    with pytest.raises(ValueError, match=r"^obj_loss: 'softmax_ce', want one of 'bce', 'focal', 'qfl', 'varifocal'$"):
        v3(obj_loss="softmax_ce")
    with pytest.raises(ValueError, match=r"^gr: 2, want a finite number in \[0, 1\]$"):
        v3(gr=2)
    gains = {"lambda_obj": 3.0, "lambda_class": 0.25}
    plain, scaled = total(v3(lambda_noobj=0)).parts, total(v3(lambda_noobj=0, **gains)).parts
    assert scaled["obj"] == pytest.approx(3 * float(plain["obj"]), rel=1e-12)
    assert scaled["cls"] == pytest.approx(0.25 * float(plain["cls"]), rel=1e-12)


def test_assigners_of_yolov3():
    assert v3(assigner="ratio", anchor_t=3, neighbours=2).head.anchor_t == 3
    assert v3(assigner="ratio").head.neighbours == 0
    assert YOLOv5Loss(ANCHORS, STRIDES, 3, neighbours=4).head.neighbours == 4
    counts = [int(total(YOLOv5Loss(ANCHORS, STRIDES, 3, neighbours=n, backend="torch")).num_pos) for n in (0, 2, 4)]
    assert 0 < counts[0] < counts[1] < counts[2]
    with pytest.raises(ValueError, match=r"^neighbours: 3, want 0, 2 or 4$"):
        YOLOv5Loss(ANCHORS, STRIDES, 3, neighbours=3)
    with pytest.raises(ValueError, match=r"^iou_thresh: 0.3 with recipe 'archive', want iou_t in its place$"):
        v3(recipe="archive", iou_thresh=0.3)


def test_a_file_of_the_archive():
    file = {
        "giou": 3.0,
        "cls": 30.0,
        "cls_pw": 1.0,
        "obj": 60.0,
        "obj_pw": 2.0,
        "iou_t": 0.25,
        "lr0": 0.01,
        "fl_gamma": 0,
    }
    found = YOLOv3Loss.from_hyp(file, ANCHORS, STRIDES, 3, "archive", backend="torch")
    own = {name: value for name, value in file.items() if name != "lr0"}
    assert found.head == v3(recipe="archive", **own).head
    assert (found.unused, found.backend) == (("lr0",), "torch")
    with pytest.warns(UserWarning, match=r"^YOLOv3Loss\.from_hyp takes no notice of giou"):
        assert YOLOv3Loss.from_hyp(file, ANCHORS, STRIDES, 3).head == v3().head


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_neighbours_begin(backend):
    """One object of 8 x 8 pixels on a map of 4 x 4 cells: the cells that it takes, by hand."""
    for (gx, gy), (own, others) in {
        (1.5, 1.5): ((1, 1), {(0, 1), (1, 0), (2, 1), (1, 2)}),
        (2.0, 1.5): ((2, 1), {(1, 1), (2, 0), (3, 1), (2, 2)}),
        (1.0, 2.5): ((1, 2), {(1, 1), (2, 2), (1, 3)}),  # 1 > 1 is false: nothing left of it
        (0.75, 0.25): ((0, 0), {(1, 0), (0, 1)}),
        (3.75, 3.25): ((3, 3), {(2, 3), (3, 2)}),
        (3.0, 3.0): ((3, 3), {(2, 3), (3, 2)}),  # 4 - 3 > 1 is false, too
        (4.0, 4.0): ((3, 3), set()),  # a cell left of the border is its own
    }.items():
        rows = torch.tensor([[0, 0, gx / 4, gy / 4, 0.25, 0.25]], device=DEVICE)
        for neighbours, cells in ((0, {own}), (4, {own, *others})):
            loss = YOLOv5Loss([[(8, 8)]], (8,), 1, neighbours=neighbours, backend=backend)
            pred = leaf(1, 1, 4, 4, 6)
            (grad,) = torch.autograd.grad(loss([pred], rows).total, pred)
            assert {(int(x), int(y)) for y, x in grad[0, 0, :, :, :4].any(-1).nonzero()} == cells, (gx, gy, neighbours)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shape_that_is_just_like_enough(backend):
    """An IoU of widths and heights of exactly a half, and one above it."""
    loss = YOLOv3Loss([[(8, 8)]], (8,), 1, assigner="shape_iou", iou_thresh=0.5, backend=backend)
    for width, count in ((4, 0), (4.125, 1), (16, 0), (15.75, 1)):
        rows = torch.tensor([[0, 0, 0.4, 0.4, width / 32, 8 / 32]], device=DEVICE)
        assert int(loss([leaf(1, 1, 4, 4, 6)], rows).num_pos) == count


@pytest.mark.parametrize("loss", [
    lambda **hyp: v3(label_smooth_eps=0.25, **hyp),
    lambda **hyp: v3(recipe="darknet", label_smooth_eps=0.25, **hyp),
    lambda **hyp: YOLOv5Loss(ANCHORS, STRIDES, 3, label_smoothing=0.25, backend="torch", **hyp),
])  # fmt: skip
def test_smoothing(loss):
    """Over the two answers to each class, or over the classes."""
    assert loss().head.class_targets == loss(smoothing="binary").head.class_targets == (0.875, 0.125)
    assert loss(smoothing="uniform").head.class_targets == (f32(0.75 + 0.25 / 3), f32(0.25 / 3))
    assert total(loss(smoothing="uniform")).parts["cls"] != total(loss()).parts["cls"]
    with pytest.raises(ValueError, match=r"^smoothing: 'both', want one of 'binary', 'uniform'$"):
        loss(smoothing="both")


# -------------------------------------------------------------------------------------------------- mmdet's losses


@on_both_backends
@pytest.mark.parametrize("name", golden.names("torch", "mmdet_*"))
def test_mmdet(name, dtype, backend):
    data = golden.arrays(name)
    meta, counts = data["meta"], data["gt_count"].tolist()
    boxes, labels = data["gt_boxes_xyxy"].split(counts), data["gt_labels"].split(counts)
    targets = [{"boxes": b.to(DEVICE), "labels": k.to(DEVICE)} for b, k in zip(boxes, labels, strict=True)]
    names = [key for key in ("cls_logits", "bbox_regression", "bbox_ctrness") if key in data]
    leaves = [data[key].to(DEVICE, dtype).requires_grad_() for key in names]
    preds, anchors = list(leaves), data["anchors"].to(DEVICE)
    if meta["loss"] == "RetinaHead":
        loss = RetinaNetLoss(meta["nc"], "mmdet", backend=backend)
    else:
        radius = meta["center_sample_radius"] if meta["center_sampling"] else None
        low, high = (end / meta["strides"][1] for end in meta["regress_ranges"][1])
        loss_type = None if meta["reg_loss"] == "iou_log" else meta["reg_loss"]
        loss = FCOSLoss(
            meta["nc"], "mmdet", center_sampling_radius=radius, scale_range=(low, high), loss_type=loss_type,
            backend=backend,
        )  # fmt: skip
        preds[1] = preds[1] / (anchors[:, 2] - anchors[:, 0])[:, None].to(dtype)
    sizes = data["num_anchors_per_level"].tolist()
    out = loss(preds, targets, anchors=anchors, num_anchors_per_level=sizes)
    close(out.total, data["total"], data["total"].item())
    for part, value in out.parts.items():
        close(value, data[f"loss_{part}"], data["total"].item())
    for key, grad in zip(names, torch.autograd.grad(out.total, leaves), strict=True):
        close(grad, data[f"grad_{key}"], data[f"grad_{key}"].abs().max().item())
    found = fusedyolo.assign(loss, preds, targets, anchors=anchors, num_anchors_per_level=sizes)
    first = torch.tensor([0, *counts[:-1]], device=DEVICE).cumsum(0)[:, None]
    row = torch.where(found.row >= 0, found.row - first, torch.where(found.ignored, -2, -1))
    assert torch.equal(row.cpu(), data["matched_idxs"])


def test_what_sums_are_divided_by():
    """Of two images with objects and one without."""
    preds, targets = anchored(3)
    kinds = ("image", "images", "batch")
    outs = [RetinaNetLoss(3, normalizer=kind, backend="torch")(preds, targets, ANCHOR_BOXES) for kind in kinds]
    found = fusedyolo.assign(RetinaNetLoss(3, backend="torch"), preds, targets, anchors=ANCHOR_BOXES).row
    counts = (found >= 0).sum(1).tolist()
    assert counts[2] == 0 < min(counts[:2])
    box = float(outs[2].parts["bbox_regression"]) * sum(counts)  # the sum
    assert float(outs[1].parts["bbox_regression"]) * (sum(counts) + 1) == pytest.approx(box, rel=1e-12)
    for backend in BACKENDS:
        other = [RetinaNetLoss(3, normalizer=kind, backend=backend)(preds, targets, ANCHOR_BOXES) for kind in kinds]
        assert [float(a.total) for a in other] == pytest.approx([float(a.total) for a in outs], rel=1e-12)
    with pytest.raises(ValueError, match=r"^normalizer: 'sum', want one of 'image', 'images', 'batch'$"):
        RetinaNetLoss(3, normalizer="sum")
    with pytest.raises(ValueError, match=r"^recipe: 'detectron2', want one of 'torchvision', 'mmdet'$"):
        FCOSLoss(3, "detectron2")
    with pytest.raises(ValueError, match=r"^scale_range: \(8, 4\), want \(low, high\), 0 <= low <= high$"):
        FCOSLoss(3, scale_range=(8, 4))


# ---------------------------------------------------------------------------------------------------- class weights

SIZE, MAPS = (48, 64), ((6, 8), (3, 4))
ANCHOR_BOXES = fusedyolo.anchors.retinanet_anchors(MAPS, SIZE, (12, 24), device=DEVICE)
POINT_BOXES = fusedyolo.anchors.fcos_anchors(MAPS, SIZE, (8, 16), device=DEVICE)


def leaf(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE).requires_grad_()


def anchored(images=2, anchors=ANCHOR_BOXES, centres=False):
    """Predictions, and corners in pixels: of classes 1 and 2, the last image of three without an object."""
    n = len(anchors)
    preds = [leaf(images, n, 3), leaf(images, n, 4, seed=1), *([leaf(images, n, 1, seed=2)] if centres else [])]
    boxes = torch.tensor([[4.0, 4, 28, 30], [20, 10, 60, 44], [30, 8, 48, 24]], device=DEVICE)
    labels = torch.tensor([1, 2, 1], device=DEVICE)
    objects = [{"boxes": boxes[i:], "labels": labels[i:]} for i in (0, 1, 3)]
    return preds, objects[:images]


def of_anchors(cls, boxes, centres=False):
    preds, targets = anchored(2, boxes, centres)
    if centres:
        preds[1] = preds[1].detach().abs().requires_grad_()
    sizes = {"num_anchors_per_level": [len(boxes) * 4 // 5, len(boxes) // 5]} if centres else {}
    return lambda backend, w: cls(3, backend=backend, class_weights=w)(preds, targets, boxes, **sizes), preds


def weighable(name):
    """The loss as a function of backend and class weights, its predictions, and where in them class c is."""
    grids = small_maps()
    if name == "YOLOv1":
        pred = leaf(2, 4, 4, 13)
        return (lambda backend, w: YOLOv1Loss(3, 4, backend=backend, class_weights=w)(pred, ROWS)), [pred], -3
    if name.startswith("YOLOv2"):
        pred, sides = leaf(2, 2, 4, 6, 8), [(1.5, 2.0), (4.0, 4.0)]
        options = {"recipe": name[7:], **({} if name[7:] == "region" else SEEN)}
        return (
            (lambda backend, w: YOLOv2Loss(sides, 3, 8, backend=backend, class_weights=w, **options)(pred, ROWS)),
            [pred],
            -3,
        )
    if name == "YOLOX":
        maps = [leaf(2, 8, 32 // s, 48 // s) for s in STRIDES]
        return (lambda backend, w: YOLOXLoss(3, STRIDES, backend=backend, class_weights=w)(maps, ROWS)), maps, None
    if name in ("RetinaNet", "SSD"):
        run, preds = of_anchors({"RetinaNet": RetinaNetLoss, "SSD": SSDLoss}[name], ANCHOR_BOXES)
        return run, preds, 0
    if name == "FCOS":
        run, preds = of_anchors(FCOSLoss, POINT_BOXES, centres=True)
        return run, preds, 0
    cls = {"YOLOv3": YOLOv3Loss, "YOLOv4": YOLOv4Loss, "YOLOv5": YOLOv5Loss}[name.split("/")[0]]
    more = {"recipe": name.split("/")[1]} if "/" in name else {}
    return (
        (lambda backend, w: cls(ANCHORS, STRIDES, 3, backend=backend, class_weights=w, **more)(grids, ROWS)),
        grids,
        -3,
    )


SEEN = {"coord_prefill": 0}
WEIGHABLE = [
    "YOLOv1", "YOLOv2/region", "YOLOv2/lightnet", "YOLOv3", "YOLOv3/darknet", "YOLOv4", "YOLOv5", "YOLOX", "RetinaNet",
    "SSD", "FCOS",
]  # fmt: skip
CLASS_PARTS = ("cls", "classification")


def outcome(run, preds, backend, weights):
    out = run(backend, weights)
    part = next(name for name in out.parts if name in CLASS_PARTS)
    rest = [float(value) for name, value in out.parts.items() if name != part]
    return float(out.parts[part]), rest, torch.autograd.grad(out.total, preds)


@pytest.mark.parametrize("name", WEIGHABLE)
def test_class_weights_are_of_their_class_alone(name):
    run, preds, at = weighable(name)
    plain, rest, _ = outcome(run, preds, "torch", None)
    each = [outcome(run, preds, "torch", [float(c == k) for c in range(3)]) for k in range(3)]
    assert sum(one for one, _, _ in each) == pytest.approx(plain, rel=1e-12)
    weights = torch.tensor([0.5, 2.0, 3.0])
    value, same, weighed = outcome(run, preds, "torch", weights)
    assert value == pytest.approx(
        sum(w * one for w, (one, _, _) in zip(weights.tolist(), each, strict=True)), rel=1e-12
    )
    assert same == rest
    none = outcome(run, preds, "torch", [0.0, 0.0, 0.0])[2]
    for i, grad in enumerate(weighed):
        want = none[i] + sum(w * (one[2][i] - none[i]) for w, one in zip(weights.tolist(), each, strict=True))
        torch.testing.assert_close(grad, want, rtol=1e-9, atol=1e-12)
    if at is not None and name not in ("SSD", "YOLOv2/region", "YOLOv2/lightnet"):  # not of a softmax
        for k in range(3):
            classes = (each[k][2][0] - none[0])[..., -3:] if at < 0 else (each[k][2][0] - none[0])
            assert classes[..., k].any() or not plain
            assert not classes[..., [c for c in range(3) if c != k]].any()


@pytest.mark.parametrize("name", WEIGHABLE)
def test_class_weights_by_the_kernels(name):
    run, preds, _ = weighable(name)
    weights = [0.5, 0.0, 3.0]
    value, rest, grads = outcome(run, preds, "torch", weights)
    found, others, got = outcome(run, preds, "triton", weights)
    assert [found, *others] == pytest.approx([value, *rest], rel=1e-11)
    for a, b in zip(got, grads, strict=True):
        assert (a - b).abs().max() <= 1e-11 * max(b.abs().max().item(), 1e-3)


def test_class_weights_that_do_not_fit():
    for make in (
        lambda **o: YOLOv1Loss(3, **o),
        lambda **o: RetinaNetLoss(3, **o),
        lambda **o: v3(**o),
        lambda **o: YOLOXLoss(3, STRIDES, **o),
    ):
        with pytest.raises(ValueError, match=r"^class_weights: 2 numbers, want 3, one a class$"):
            make(class_weights=[1, 2])
        assert make(class_weights=torch.tensor([1.0, 2, 3])).bfloat16().class_weights.dtype == torch.float32
    with pytest.raises(ValueError, match=r"^class_weights: beside counters_per_class, want one of the two$"):
        v3(recipe="darknet", counters_per_class=[1, 2, 3], class_weights=[1, 2, 3])


# ------------------------------------------------------------------------------------------------------------ YOLOv1


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_boxes_of_a_cell_and_plain_sizes(backend):
    """The port of xiongzihua counts the other boxes of a cell with an object by themselves."""
    pred = leaf(2, 4, 4, 13)
    options = {"lambda_coord": 0, "lambda_class": 0}
    own, other, rest = (
        float(YOLOv1Loss(3, 4, backend=backend, **options, **gains)(pred, ROWS).parts["obj"])
        for gains in (
            {"lambda_obj": 1, "lambda_other": 0, "lambda_noobj": 0},
            {"lambda_obj": 0, "lambda_other": 1, "lambda_noobj": 0},
            {"lambda_obj": 0, "lambda_other": 0, "lambda_noobj": 1},
        )
    )
    taken = fusedyolo.assign(YOLOv1Loss(3, 4, backend="torch"), pred, ROWS).levels[0].row >= 0  # [B, n, S, S]
    held = taken.any(1, keepdim=True)
    confidence = pred.detach()[..., [4, 9]].permute(0, 3, 1, 2)
    assert other == pytest.approx(float(confidence[held & ~taken].square().sum()), rel=1e-12)
    assert rest == pytest.approx(float(confidence[~held.expand_as(taken)].square().sum()), rel=1e-12)
    loss = YOLOv1Loss(3, 4, backend=backend, lambda_obj=2, lambda_other=1, lambda_noobj=0.5, **options)
    out = loss(pred, ROWS)
    assert float(out.parts["obj"]) == pytest.approx(2 * own + other + 0.5 * rest, rel=1e-12)
    (grad,) = torch.autograd.grad(out.total, pred)
    want = confidence * torch.where(held, 1.0, 0.5) * 2
    torch.testing.assert_close(grad[..., [4, 9]].permute(0, 3, 1, 2)[~taken], want[~taken], rtol=1e-12, atol=0)
    plain, root = (YOLOv1Loss(3, 4, sqrt=kind, backend=backend) for kind in (0, 1))
    assert (plain.head.root, root.head.root) == (False, True)
    assert plain(pred, ROWS).parts["box"] != root(pred, ROWS).parts["box"]


# ------------------------------------------------------------------------------------------------------ EfficientDet


def efficientdet_matches(boxes, targets):
    """[B, N]: by IoU, and the best anchor of each object, of several objects the first."""
    found = []
    for objects in targets:
        overlaps = [[plain_iou(centred(anchor), centred(box)) for anchor in boxes] for box in objects["boxes"].tolist()]
        match = [-1] * len(boxes)
        for n in range(len(boxes)):
            best = max(range(len(overlaps)), key=lambda row: overlaps[row][n], default=-1)
            if best >= 0 and overlaps[best][n] >= 0.5:
                match[n] = best
        for row in reversed(range(len(overlaps))):
            match[overlaps[row].index(max(overlaps[row]))] = row
        found.append(match)
    return found


def centred(box):
    return [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2, box[2] - box[0], box[3] - box[1]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"gamma": 2.0, "delta": 0.5, "box_loss_weight": 10.0, "alpha": -1}])
def test_efficientdet(options, backend):
    preds, targets = anchored(3)
    one = targets[0]["boxes"][:1] + torch.tensor([[0.25, 0, 0.25, 0]], device=DEVICE)  # its best anchor is another's
    targets[0] = {
        "boxes": torch.cat((targets[0]["boxes"], one)),
        "labels": torch.cat((targets[0]["labels"], torch.tensor([2], device=DEVICE))),
    }
    matches = efficientdet_matches(ANCHOR_BOXES.tolist(), targets)
    count = sum(row >= 0 for match in matches for row in match) + 1
    alpha, gamma, delta = (
        options.get(name, usual) for name, usual in (("alpha", 0.25), ("gamma", 1.5), ("delta", 0.1))
    )
    logits, deltas = (pred.detach().cpu().requires_grad_() for pred in preds[:2])
    cls = box = torch.zeros((), dtype=torch.float64)
    for b, match in enumerate(matches):
        wanted = torch.zeros(len(match), 3, dtype=torch.float64)
        for n, row in enumerate(match):
            if row >= 0:
                wanted[n, int(targets[b]["labels"][row])] = 1
                a, g = centred(ANCHOR_BOXES[n].tolist()), centred(targets[b]["boxes"][row].tolist())
                true = [(g[0] - a[0]) / a[2], (g[1] - a[1]) / a[3], np.log(g[2] / a[2]), np.log(g[3] / a[3])]
                err = (deltas[b, n] - torch.tensor(true, dtype=torch.float64)).abs()
                near = err.clamp(max=f32(delta))
                box = box + (near**2 / 2 + f32(delta) * (err - near)).sum()
        cls = cls + label_term("focal", logits[b], wanted, (alpha, gamma)).sum()
    parts = {"classification": cls / count, "bbox_regression": options.get("box_loss_weight", 50.0) * box / (4 * count)}
    want = torch.autograd.grad(sum(parts.values()), (logits, deltas))
    out = EfficientDetLoss(3, backend=backend, **options)(preds, targets, ANCHOR_BOXES)
    assert out.num_pos == count - 1
    for name, value in parts.items():
        torch.testing.assert_close(out.parts[name].cpu(), value.detach(), rtol=1e-6, atol=0)
    for got, expected in zip(torch.autograd.grad(out.total, preds[:2]), want, strict=True):
        assert (got.cpu() - expected).abs().max() <= 1e-6 * expected.abs().max()
    found = fusedyolo.assign(EfficientDetLoss(3), preds, targets, anchors=ANCHOR_BOXES).row
    first = torch.tensor([0, len(targets[0]["boxes"]), len(targets[0]["boxes"]) + len(targets[1]["boxes"])])[:, None]
    assert torch.equal(torch.where(found.cpu() >= 0, found.cpu() - first, -1), torch.tensor(matches))


# ------------------------------------------------------------------------------------------------------ by the image

BY_IMAGE = {
    "YOLOv1": lambda **o: YOLOv1Loss(3, 4, **o),
    "YOLOv1/darknet": lambda **o: YOLOv1Loss(3, 4, recipe="darknet", class_weights=[0.5, 2.0, 1.0], **o),
    "YOLOv2/region": lambda **o: YOLOv2Loss([(1.5, 2.0), (4.0, 4.0)], 3, 8, **o),
    "YOLOv2/lightnet": lambda **o: YOLOv2Loss([(1.5, 2.0), (4.0, 4.0)], 3, 8, "lightnet", **o),  # with its warm-up
    "YOLOv3": lambda **o: YOLOv3Loss(ANCHORS, STRIDES, 3, **o),
    "YOLOv3/archive": lambda **o: YOLOv3Loss(ANCHORS, STRIDES, 3, "archive", **o),
    "YOLOv4/darknet": lambda **o: YOLOv4Loss(ANCHORS, STRIDES, 3, "darknet", **o),
    "YOLOv5": lambda **o: YOLOv5Loss(ANCHORS, STRIDES, 3, balance=(4, 1), **o),
    "YOLOX": lambda **o: YOLOXLoss(3, STRIDES, use_l1=True, **o),
    "YOLOv8": lambda **o: YOLOv8Loss(3, STRIDES, reg_max=4, **o),
    "E2E": lambda **o: E2ELoss(3, STRIDES, **o),
}
BY_IMAGE_OF_ANCHORS = {
    "RetinaNet": (RetinaNetLoss, {}),
    "RetinaNet/mmdet": (RetinaNetLoss, {"recipe": "mmdet", "class_weights": [0.5, 2.0, 1.0]}),
    "EfficientDet": (EfficientDetLoss, {}),
    "SSD": (SSDLoss, {}),
    "SSD/class weights": (SSDLoss, {"class_weights": [0.5, 2.0, 1.0]}),
    "FCOS": (FCOSLoss, {}),
    "FCOS/mmdet": (FCOSLoss, {"recipe": "mmdet"}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", ["rows", "maps"])
@pytest.mark.parametrize("name", BY_IMAGE_OF_ANCHORS)
def test_a_loss_of_each_image_over_anchors(name, way, backend):
    """Of three images, the last without an object; streams of class logits begin in one and end in the next."""
    cls, options = BY_IMAGE_OF_ANCHORS[name]
    centres = name.startswith("FCOS")
    boxes = POINT_BOXES if centres else ANCHOR_BOXES
    preds, targets = anchored(3, boxes, centres)
    leaves = [pred.detach().abs().requires_grad_() if centres and i == 1 else pred for i, pred in enumerate(preds)]
    each_cell = len(boxes) // sum(h * w for h, w in MAPS)
    sizes = [h * w * each_cell for h, w in MAPS]
    given = leaves
    if way == "maps":
        given = [
            [
                part.reshape(3, h, w, -1).permute(0, 3, 1, 2).contiguous()
                for part, (h, w) in zip(pred.split(sizes, 1), MAPS, strict=True)
            ]
            for pred in leaves
        ]
    more = {"num_anchors_per_level": sizes} if way == "rows" else {}
    made = (cls(3, backend=backend, **options, **o) for o in ({}, {"reduction": "none"}))
    whole, each = (loss(given, targets, anchors=boxes, **more) for loss in made)
    assert each.total.shape == (3,)
    assert each.num_pos == whole.num_pos > 0
    torch.testing.assert_close(each.total.sum(), whole.total, rtol=1e-12, atol=0)
    for part, value in each.parts.items():
        torch.testing.assert_close(value.sum(), whole.parts[part], rtol=1e-12, atol=0)
    assert float(each.parts["bbox_regression"][2]) == 0
    want = torch.autograd.grad(whole.total, leaves, retain_graph=True)
    weights = torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64, device=DEVICE)
    summed = torch.autograd.grad(each.total.sum(), leaves, retain_graph=True)
    weighed = torch.autograd.grad((weights * each.total).sum(), leaves)
    for a, b, w in zip(summed, want, weighed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(w, weights[:, None, None] * b, rtol=1e-12, atol=1e-15)


def predicted(name):
    """Leaves, and what the loss takes."""
    if name.startswith("YOLOv2"):
        pred = leaf(2, 2, 4, 6, 8)
        return [pred], pred
    if name.startswith("YOLOv1"):
        pred = leaf(2, 4, 4, 13)
        return [pred], pred
    if name in ("YOLOX", "YOLOv8"):
        maps = [leaf(2, 8 if name == "YOLOX" else 19, 32 // s, 48 // s) for s in STRIDES]
        return maps, maps
    if name == "E2E":
        maps = [leaf(2, 7, 32 // s, 48 // s, seed=seed) for seed in (0, 1) for s in STRIDES]
        return maps, {"one2many": maps[:2], "one2one": maps[2:]}
    grids = small_maps()
    return grids, grids


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BY_IMAGE)
def test_a_loss_of_each_image(name, backend):
    """Those of all add up to what the loss is, and each has the gradient of its own predictions alone."""
    preds, given = predicted(name)
    made = (BY_IMAGE[name](backend=backend, **options) for options in ({}, {"reduction": "none"}))
    whole, each = (loss(given, ROWS.to(DEVICE)) for loss in made)
    assert each.total.shape == (2,)
    assert each.num_pos == whole.num_pos > 0
    torch.testing.assert_close(each.total.sum(), whole.total, rtol=1e-12, atol=0)
    for part, value in each.parts.items():
        assert value.shape == (2,)
        torch.testing.assert_close(value.sum(), whole.parts[part], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(sum(each.parts.values()), each.total.detach(), rtol=1e-12, atol=0)
    want = torch.autograd.grad(whole.total, preds)
    summed = torch.autograd.grad(each.total.sum(), preds, retain_graph=True)
    weighed = torch.autograd.grad((torch.tensor([0.5, -2.0], device=DEVICE) * each.total).sum(), preds)
    for a, b, w in zip(summed, want, weighed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(w[0], 0.5 * b[0], rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(w[1], -2.0 * b[1], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_of_one_image_leaves_the_loss_of_the_other(backend):
    preds = [pred.detach().clone() for pred in small_maps()]
    preds[1][1, 0, 1, 1, 4] = float("nan")
    out = YOLOv5Loss(ANCHORS, STRIDES, 3, reduction="none", backend=backend)(preds, ROWS.to(DEVICE))
    assert out.total.isnan().tolist() == [False, True]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cls", [RetinaNetLoss, SSDLoss])
def test_a_nan_of_one_image_leaves_the_losses_of_the_others_over_anchors(cls, backend):
    """Of an image with objects, or without."""
    preds, targets = anchored(3)
    for image in (0, 2):
        own = [pred.detach().clone() for pred in preds]
        own[0][image, 1, 2] = float("nan")
        out = cls(3, reduction="none", backend=backend)(own, targets, anchors=ANCHOR_BOXES)
        assert out.total.isnan().tolist() == [i == image for i in range(3)]
        assert not out.parts["bbox_regression"].isnan().any()


def test_a_sum_over_nothing_is_where_there_are_no_images_to_tell_apart():
    with pytest.raises(ValueError, match=r"^reduction: 'sum', want one of 'mean', 'none'$"):
        YOLOv5Loss(ANCHORS, STRIDES, 3, reduction="sum")
    with pytest.raises(ValueError, match=r"^reduction: 'mean', want 'none', or nothing with recipe 'region'"):
        YOLOv2Loss([(1, 2)], 3, reduction="mean")
    assert YOLOv3Loss(ANCHORS, STRIDES, 3, "archive", reduction="none").head.mean_rows
    assert not YOLOv3Loss(ANCHORS, STRIDES, 3, reduction="none").head.mean_rows
