"""Variants of losses that many code bases use, against what these compute: recorded, or described here."""

from __future__ import annotations

import golden
import numpy as np
import pytest
import torch
from conftest import DEVICE
from formulas import box_term, label_term
from test_goldens import check_torch_golden, on_both_backends

from fusedyolo import ScaledYOLOv4Loss, YOLOv3Loss, YOLOv4Loss, YOLOv5Loss

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
