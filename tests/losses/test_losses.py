"""YOLOv3Loss and YOLOv4Loss: recipes, hyper-parameters, and the numbers of papers and of darknet."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import subprocess
import sys
from collections import Counter

import golden
import numpy as np
import pytest
import torch
from conftest import DEVICE
from formulas import box_term, class_terms, label_term, plain_iou

import fusedyolo
from fusedyolo import LossOutput, Targets, YOLOv3Loss, YOLOv4Loss, backend, reference
from fusedyolo.losses import rounded
from fusedyolo.terms import term_names

BACKENDS = ["torch", "triton"]
ANCHORS = [[(10, 13), (16, 30), (33, 23)], [(30, 61), (62, 45), (59, 48)]]
FLAT = [*ANCHORS[0], *ANCHORS[1]]
STRIDES = (8, 16)
CLASSES = 4
HEIGHT, WIDTH = 48, 64
LOSSES = [YOLOv3Loss, YOLOv4Loss]


def f32(value):
    """A constant as the losses hold it."""
    return float(np.float32(value))


def maps(dtype=torch.float32, batch=2, seed=0, scale=1.0, device=DEVICE):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, 3 * (5 + CLASSES), HEIGHT // s, WIDTH // s) for s in STRIDES]
    preds = [torch.randn(shape, generator=generator) * scale for shape in shapes]
    return [pred.to(device, dtype).requires_grad_() for pred in preds]


def objects(seed=0, device=DEVICE):
    """Eleven objects on two images: two in one cell and of one shape, one of them twice, and a crowd."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(11, 6, generator=generator)
    rows[:, 0] = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0, 0, 0, 1])
    rows[:, 1] = torch.arange(11) % CLASSES
    rows[:, 2:4] = rows[:, 2:4] * 0.9 + 0.05
    rows[:, 4:] = 0.1 + 0.6 * rows[:, 4:]
    rows[7] = rows[5] + torch.tensor([0, 0, 1e-3, -1e-3, 1e-2, 0])
    rows[7, 1] = (rows[5, 1] + 1) % CLASSES
    rows[8] = rows[5]
    return rows.to(device)


def criterion(cls=YOLOv3Loss, **kwargs):
    return cls(**({"anchors": ANCHORS, "strides": STRIDES, "num_classes": CLASSES, "backend": "torch"} | kwargs))


# The papers, one object and one prediction at a time.


def bce(logit, target):
    return label_term("bce", logit, target, ())


def paper(preds, rows, box, scale, iou_thresh, ignore_thresh=0.5, lambda_coord=5.0, lambda_noobj=0.5, eps=0.0):
    """Loss parts of the papers, in the precision of ``preds``, and how often each case came up."""
    seen = Counter()
    parts = {"box": 0.0, "obj": 0.0, "cls": 0.0}
    size = torch.tensor([WIDTH, HEIGHT], dtype=torch.float64)
    truths = [(int(r[0]), int(r[1]), torch.cat([r[2:4] * size, r[4:] * size])) for r in rows.double()]

    owners = {}
    for image, label, truth in truths:
        shapes = []
        for w, h in FLAT:
            inter = min(w, truth[2].item()) * min(h, truth[3].item())
            shapes.append(inter / (w * h + truth[2].item() * truth[3].item() - inter))
        best = shapes.index(max(shapes))
        for k, shape in enumerate(shapes):
            if k == best or (iou_thresh < 1 and shape > iou_thresh):
                level, anchor = divmod(k, 3)
                x, y = int(truth[0] // STRIDES[level]), int(truth[1] // STRIDES[level])
                owners.setdefault((level, image, anchor, y, x), []).append((label, truth))
                seen["assigned" if k == best else "assigned too"] += 1

    for level, pred in enumerate(preds):
        s, stride = scale[level], STRIDES[level]
        for image, anchor, y, x in np.ndindex(pred.shape[0], 3, *pred.shape[2:]):
            v = pred[image, anchor * (5 + CLASSES) : (anchor + 1) * (5 + CLASSES), y, x]
            aw, ah = ANCHORS[level][anchor]
            sx, sy = (s * v[i].sigmoid() - (s - 1) / 2 for i in (0, 1))
            decoded = ((sx + x) * stride, (sy + y) * stride, aw * v[2].exp(), ah * v[3].exp())
            own = owners.get((level, image, anchor, y, x))
            if own is None:
                overlaps = [plain_iou(decoded, truth) for b, _, truth in truths if b == image]
                if max(overlaps, default=0.0) > ignore_thresh:
                    seen["ignored"] += 1
                else:
                    parts["obj"] += lambda_noobj * bce(v[4], 0.0)
                continue
            seen["shared"] += len(own) > 1
            parts["obj"] += bce(v[4], 1.0)
            for c in range(CLASSES):
                parts["cls"] += bce(v[5 + c], 1 - eps / 2 if c in [label for label, _ in own] else eps / 2)
            for _, truth in own:
                if box == "ciou":
                    parts["box"] += lambda_coord * box_term("ciou", decoded, truth, (0.0, f32(1e-7)))
                else:
                    target = (
                        truth[0] / stride - x,
                        truth[1] / stride - y,
                        (truth[2] / aw).log(),
                        (truth[3] / ah).log(),
                    )
                    errors = [p - t for p, t in zip((sx, sy, v[2], v[3]), target, strict=True)]
                    parts["box"] += lambda_coord * sum(error**2 for error in errors)
    return parts, seen, len(owners)


V4 = (f32(1.1), f32(0.213))
PAPERS = {
    "YOLOv3": (YOLOv3Loss, {}, {"box": "mse", "scale": (1, 1), "iou_thresh": 1}),
    "YOLOv4": (YOLOv4Loss, {}, {"box": "ciou", "scale": (V4[0],) * 2, "iou_thresh": V4[1]}),
    "YOLOv3 with everything set": (
        YOLOv3Loss,
        {
            "iou_loss": "ciou",
            "scale_x_y": (1.25, 2),
            "iou_thresh": 0.375,
            "ignore_thresh": 0.25,
            "lambda_coord": 2,
            "lambda_noobj": 0.75,
            "label_smooth_eps": 0.125,
        },
        {
            "box": "ciou",
            "scale": (1.25, 2),
            "iou_thresh": 0.375,
            "ignore_thresh": 0.25,
            "lambda_coord": 2,
            "lambda_noobj": 0.75,
            "eps": 0.125,
        },
    ),
    "YOLOv4 with squared errors": (
        YOLOv4Loss,
        {"iou_loss": "mse", "scale_x_y": 1.5},
        {"box": "mse", "scale": (1.5, 1.5), "iou_thresh": V4[1]},
    ),
}


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_formulas(name):
    cls, arguments, formula = PAPERS[name]
    rows = objects()
    exact = maps(torch.float64, device="cpu")
    parts, seen, num_pos = paper(exact, rows.cpu(), **formula)
    total = sum(parts.values())
    grads = torch.autograd.grad(total, exact)
    assert seen["ignored"] > 2
    assert seen["shared"] > 0
    assert seen["assigned"] == len(rows)
    assert (seen["assigned too"] > 2) == (formula["iou_thresh"] < 1)

    runs = (("torch", torch.float64, 1e-12), ("torch", torch.float32, 1e-5), ("triton", torch.float64, 1e-12))
    for which, dtype, tolerance in runs:
        preds = maps(dtype)
        out = criterion(cls, backend=which, **arguments)(preds, rows)
        assert (out.num_pos, out.num_invalid) == (num_pos, 0)
        assert out.total.dtype == dtype
        assert out.total.shape == ()
        torch.testing.assert_close(out.total.double().cpu(), total, rtol=tolerance, atol=0)
        for part, value in parts.items():
            assert not out.parts[part].requires_grad
            torch.testing.assert_close(out.parts[part].double().cpu(), value.detach(), rtol=tolerance, atol=0)
        for grad, want in zip(torch.autograd.grad(out.total, preds), grads, strict=True):
            assert (grad.cpu() - want).abs().max() <= tolerance * want.abs().max()


# What else there is to choose, on one small map, one prediction at a time.

SMALL = {"anchors": ANCHORS[1:], "strides": (16,)}


def best_anchor_owners(rows):
    """Rows of each prediction (image, anchor, y, x) of the small map, by the best anchor."""
    owners = {}
    for r, row in enumerate(rows.double().tolist()):
        w, h = row[4] * WIDTH, row[5] * HEIGHT
        inter = [min(w, aw) * min(h, ah) for aw, ah in ANCHORS[1]]
        shapes = [i / (w * h + aw * ah - i) for i, (aw, ah) in zip(inter, ANCHORS[1], strict=True)]
        place = (int(row[0]), shapes.index(max(shapes)), int(row[3] * HEIGHT / 16), int(row[2] * WIDTH / 16))
        owners.setdefault(place, []).append(r)
    return owners


def in_pixels(rows):
    return rows.double()[:, 2:] * torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])


def band_owners(rows, low, high, batch=2):
    """Rows, one each, of predictions whose anchor overlaps it by more than ``high``; those between ``low`` and that."""
    owners, between = {}, set()
    for image, anchor, y, x in np.ndindex(batch, 3, HEIGHT // 16, WIDTH // 16):
        box = torch.tensor([(x + 0.5) * 16, (y + 0.5) * 16, *ANCHORS[1][anchor]], dtype=torch.float64)
        overlaps = [
            plain_iou(box, truth) if row[0] == image else 0.0 for row, truth in zip(rows, in_pixels(rows), strict=True)
        ]
        if max(overlaps) > high:
            owners[image, anchor, y, x] = [overlaps.index(max(overlaps))]
        elif max(overlaps) >= low:
            between.add((image, anchor, y, x))
    return owners, between


CLASS_TERMS = {  # what the user says, and the numbers of the term
    "bce": ("bce", {}, ()),
    "focal": ("focal", {}, (-1.0, 2.0)),
    "focal with alpha": ("focal", {"focal_alpha": 0.25, "focal_gamma": 1.5}, (0.25, 1.5)),
    "softmax_ce": ("softmax_ce", {}, ()),
    "qfl": ("qfl", {}, (-1.0, 2.0)),
    "qfl with gamma": ("qfl", {"focal_gamma": 1.0}, (-1.0, 1.0)),
    "varifocal": ("varifocal", {}, (0.75, 2.0)),
    "varifocal with both": (
        "varifocal",
        {"focal_alpha": 0.5, "focal_gamma": 1.0, "label_smooth_eps": 0.25},
        (0.5, 1.0),
    ),
}


def direct(pred, rows, owners, between=(), box="mse", term=("bce", ()), powers=(1, 0), eps=0.0, gate=None, smooth=None):
    """Parts of the paper's loss on the small map for each way to assign, weigh and judge.

    ``smooth``: objectness of every prediction is trained towards its largest IoU if that is above this.
    """
    parts = {"box": 0.0, "obj": 0.0, "cls": 0.0}
    boxes, seen = in_pixels(rows), Counter()
    pred = pred.unflatten(1, (3, -1)).permute(0, 1, 3, 4, 2)
    for place in np.ndindex(*pred.shape[:4]):
        v, (image, anchor, y, x) = pred[place], place
        aw, ah = ANCHORS[1][anchor]
        sx, sy = v[0].sigmoid(), v[1].sigmoid()
        decoded = torch.stack(((sx + x) * 16, (sy + y) * 16, aw * v[2].exp(), ah * v[3].exp()))
        best = max((plain_iou(decoded, g) for row, g in zip(rows, boxes, strict=True) if row[0] == image), default=0)
        if gate is not None and not (v[5:].sigmoid() > gate).any():
            best = 0.0
        own = owners.get(place)
        if smooth is not None:
            parts["obj"] = parts["obj"] + bce(v[4], best if best > smooth else 0.0)
            seen["smooth"] += best > smooth
        elif own is not None:
            parts["obj"] = parts["obj"] + bce(v[4], 1.0)
        elif place in between:
            seen["between"] += 1
        elif best <= 0.5:
            parts["obj"] = parts["obj"] + 0.5 * bce(v[4], 0.0)
        if own is None:
            continue
        seen["shared"] += len(own) > 1
        labels = {int(rows[r, 1]) for r in own}
        t = torch.tensor([1 - eps / 2 if c in labels else eps / 2 for c in range(CLASSES)], dtype=torch.float64)
        parts["cls"] = parts["cls"] + class_terms(term[0], v[5:], t, term[1]).sum()
        for r in own:
            g = boxes[r]
            if box == "mse":
                wanted = (g[0] / 16 - x, g[1] / 16 - y, (g[2] / aw).log(), (g[3] / ah).log())
                loss = sum((p - t) ** 2 for p, t in zip((sx, sy, v[2], v[3]), wanted, strict=True))
            else:
                numbers = (0.0, f32(1e-7), *powers)
                loss = box_term(box, decoded.unbind(-1), g.unbind(-1), numbers, (WIDTH, HEIGHT))
            parts["box"] = parts["box"] + 5.0 * loss
    return parts, seen


def agrees_with(module_arguments, parts, exact, rows, num_pos):
    """Both backends, value and gradient, in float64."""
    want = torch.autograd.grad(sum(parts.values()), exact)[0]
    for which in BACKENDS:
        pred = exact.detach().to(DEVICE).requires_grad_()
        out = criterion(backend=which, **SMALL, **module_arguments)([pred], rows.to(DEVICE))
        assert (out.num_pos, out.num_invalid) == (num_pos, 0)
        for part, value in parts.items():
            torch.testing.assert_close(out.parts[part].cpu(), value.detach(), rtol=1e-11, atol=0)
        (grad,) = torch.autograd.grad(out.total, pred)
        assert (grad.cpu() - want).abs().max() <= 1e-11 * want.abs().max()


def small_map():
    return maps(torch.float64, device="cpu")[1]


@pytest.mark.parametrize("name", CLASS_TERMS)
def test_class_terms(name):
    kind, hyp, args = CLASS_TERMS[name]
    exact, rows = small_map(), objects(device="cpu")
    owners = best_anchor_owners(rows)
    parts, seen = direct(exact, rows, owners, term=(kind, args), eps=hyp.get("label_smooth_eps", 0.0))
    assert seen["shared"] > 0
    agrees_with({"cls_loss": kind, **hyp}, parts, exact, rows, len(owners))


@pytest.mark.parametrize("box", term_names("iou", users=True))
def test_box_terms(box):
    exact, rows = small_map(), objects(device="cpu")
    owners = best_anchor_owners(rows)
    parts, _ = direct(exact, rows, owners, box=box)
    agrees_with({"iou_loss": box}, parts, exact, rows, len(owners))


@pytest.mark.parametrize("powers", [(3.0, 0.0), (1.0, 0.5), (2.0, 1.0)])
def test_powers_of_the_iou(powers):
    exact, rows = small_map(), objects(device="cpu")
    owners = best_anchor_owners(rows)
    parts, _ = direct(exact, rows, owners, box="iou", powers=powers)
    agrees_with({"iou_loss": "iou", "iou_alpha": powers[0], "iou_gamma": powers[1]}, parts, exact, rows, len(owners))


@pytest.mark.parametrize("band", [None, (0.25, 0.375), (0.5, 0.5)])
def test_iou_band(band):
    exact, rows = small_map(), objects(device="cpu")
    rows[:3, 2:] = torch.tensor([0.375, 0.5, 60 / WIDTH, 45 / HEIGHT])  # the second anchor in the middle of a cell
    rows[2, 0] = 1
    owners, between = band_owners(rows, *((f32(0.3), f32(0.7)) if band is None else band))
    assert owners
    parts, seen = direct(exact, rows, owners, between)
    assert (seen["between"] > 0) == (band != (0.5, 0.5))
    arguments = {"assigner": "iou_band"} | ({} if band is None else {"iou_band": band})
    agrees_with(arguments, parts, exact, rows, len(owners))


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize(
    ("anchor", "band", "positive", "counts"),
    [
        ((8, 8), (0.3, 0.5), True, True),
        ((8, 8), (0.5, 1.0), False, False),
        ((8, 16), (0.3, 0.5), False, False),
        ((8, 16), (0.5, 0.7), False, False),
        ((8, 16), (0.3, 0.499), True, True),
        ((8, 16), (0.501, 0.7), False, True),
    ],
)
def test_edges_of_the_iou_band(anchor, band, positive, counts, which):
    """An IoU of 1 and of 1/2: that of the upper end is no object yet, that of the lower end no background any more."""
    pred = torch.zeros(1, 10, 1, 1, device=DEVICE)
    rows = torch.tensor([[0, 0, 0.5, 0.5, 0.5, 0.5]], device=DEVICE)
    arguments = {"assigner": "iou_band", "iou_band": band, "ignore_thresh": 1, "backend": which}
    out = YOLOv3Loss([[anchor]], (16,), 5, **arguments)([pred], rows)
    assert out.num_pos == positive
    assert (out.parts["obj"] != 0) == counts


def test_smooth_objectness():
    exact, rows = small_map(), objects(device="cpu")
    owners = best_anchor_owners(rows)
    parts, seen = direct(exact, rows, owners, gate=0.25, smooth=0.5)
    assert seen["smooth"] > 1
    want = torch.autograd.grad(parts["obj"], exact)[0].unflatten(1, (3, -1))[:, :, 4]
    for which in BACKENDS:
        pred = exact.detach().to(DEVICE).requires_grad_()
        arguments = {"recipe": "darknet", "objectness_smooth": 1, "ignore_thresh": 0.5, "backend": which}
        out = criterion(**SMALL, **arguments)([pred], rows.to(DEVICE))
        torch.testing.assert_close(out.parts["obj"].cpu(), parts["obj"].detach(), rtol=1e-11, atol=0)
        got = torch.autograd.grad(out.total, pred)[0].cpu().unflatten(1, (3, -1))[:, :, 4]
        assert (got - want).abs().max() <= 1e-11 * want.abs().max()


@pytest.mark.parametrize("which", BACKENDS)
def test_objectness_level_by_level(which):
    """A loss of two levels is the sum of those of one, each with its own numbers."""
    preds, rows = maps(torch.float64), objects()
    per_level = {"objectness_smooth": (0, 1), "obj_normalizer": (4.0, 0.5), "scale_x_y": (1.25, 1.0)}
    common = {"recipe": "darknet", "backend": which, "all_anchors": FLAT, "ignore_thresh": 0.25}
    both = criterion(**common, **per_level)(preds, rows)
    singles = [
        criterion(
            anchors=[ANCHORS[i]], strides=STRIDES[i : i + 1], **common, **{k: v[i] for k, v in per_level.items()}
        )(preds[i : i + 1], rows)
        for i in range(2)
    ]
    total = sum(single.total for single in singles)
    torch.testing.assert_close(both.total, total, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(both.total, preds), torch.autograd.grad(total, preds), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    plain = criterion(**{**common, "obj_normalizer": (4.0, 0.5), "scale_x_y": (1.25, 1.0)})(preds, rows)
    assert plain.parts["obj"] != both.parts["obj"]
    assert plain.parts["cls"] == both.parts["cls"]


@pytest.mark.parametrize("which", BACKENDS)
def test_new_coords_by_hand(which):
    """One cell, one object, logits of 0: sigmoids of 1/2, the box of the anchor in the middle of the cell."""
    arguments = {"recipe": "darknet", "new_coords": 1, "iou_loss": "iou", "obj_normalizer": 2, "iou_normalizer": 3}
    pred = torch.zeros(1, 7, 1, 1, dtype=torch.float64, device=DEVICE, requires_grad=True)
    rows = torch.tensor([[0, 1, 0.5, 0.5, 0.25, 0.5]], device=DEVICE)
    out = YOLOv4Loss([[(8, 8)]], (16,), 2, scale_x_y=2, backend=which, **arguments)([pred], rows)
    assert out.num_pos == 1
    values = [out.parts[part].item() for part in ("box", "obj", "cls")]
    assert values == pytest.approx([3 * 0.5, 2 * 0.5 * 0.25, 2 * 0.5 * 0.25], rel=1e-12)
    (grad,) = torch.autograd.grad(out.total, pred)
    # the true box (4, 8) in the predicted one (w, h): IoU = 32 / (w h), and dw / dlogit = 8 * 8 sigmoid^2 / 4 = w
    # in darknet's half squares (p - t) p (1 - p)
    want = [0, 0, 3 * 0.5, 0, 2 * -0.5 * 0.25, 0.5 * 0.25, -0.5 * 0.25]
    assert grad.flatten().tolist()[:3] == pytest.approx(want[:3], abs=1e-12)
    assert grad.flatten().tolist()[4:] == pytest.approx(want[4:], abs=1e-12)


# darknet.

SQUARED = [*golden.names("darknet", "yolov3_mse_*"), *golden.names("darknet", "yolov4_b_*_mse4")]
WEIGHTED = golden.names("darknet", "yolov4_b_*_mult")
COUNTS = [100, 50, 25, 10, 80, 33]  # what those files were made with


def darknet_module(name, **arguments):
    """A darknet layer as its user would write it."""
    case = golden.yolo(name)
    layer = case.layer
    pool = list(zip(layer["anchors"][::2], layer["anchors"][1::2], strict=True))
    cls = YOLOv3Loss if name.startswith("yolov3") else YOLOv4Loss
    keys = ("scale_x_y", "iou_thresh", "ignore_thresh", "iou_normalizer", "obj_normalizer", "cls_normalizer")
    module = cls(
        anchors=[[pool[k] for k in layer["mask"]]],
        strides=[layer["net_w"] / layer["w"]],
        num_classes=layer["classes"],
        recipe="darknet",
        all_anchors=pool,
        iou_loss=("iou", "giou", "mse", "diou", "ciou")[layer["iou_loss"]],
        label_smooth_eps=layer["label_smooth_eps"],
        **{key: layer[key] for key in keys},
        **arguments,
    )
    return module, case


def gradient(module, case, targets):
    pred = case.logits.to(DEVICE, copy=True).requires_grad_()
    out = module([pred], targets.to(DEVICE))
    return out, torch.autograd.grad(out.total, pred)[0].cpu()


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("name", SQUARED)
def test_every_delta_of_a_squared_error_layer_of_darknet(name, which):
    module, case = darknet_module(name, backend=which)
    assert module.head.levels == (tuple(case.layer["mask"]),)
    targets = Targets.from_packed(case.rows, case.logits.shape[0])
    out, grad = gradient(module, case, targets)
    assert (grad + case.delta).abs().max() <= 1e-4
    terms = case.terms
    assert out.parts["obj"].item() == pytest.approx(terms["obj"], rel=1e-4)
    assert out.parts["cls"].item() == pytest.approx(terms["cls"], rel=1e-4)


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("name", WEIGHTED)
def test_class_weights_of_darknet(name, which):
    module, case = darknet_module(name, counters_per_class=COUNTS, max_delta=5, backend=which)
    torch.testing.assert_close(module.class_weights, case.class_weights, rtol=1e-7, atol=0)
    _, grad = gradient(module, case, case.rows)
    channels = grad.unflatten(1, (len(case.layer["mask"]), -1))[:, :, 4:]
    want = case.delta.unflatten(1, (len(case.layer["mask"]), -1))[:, :, 4:]
    assert (channels + want).abs().max() <= 1e-4


def test_max_delta_limits_class_weights_alone():
    assert criterion(recipe="darknet", counters_per_class=[1, 100, 10, 50]).class_weights.tolist() == [100, 1, 10, 2]
    limited = criterion(YOLOv4Loss, recipe="darknet", counters_per_class=[1, 100, 10, 50])
    assert limited.class_weights.tolist() == [5, 1, 5, 2]
    preds, rows = maps(scale=4.0), objects()
    totals = [criterion(YOLOv4Loss, recipe="darknet", max_delta=value)(preds, rows).total for value in (5, 1e-3, None)]
    assert totals[0] == totals[1] == totals[2]


# Recipes and hyper-parameters.

HEADS = {
    ("YOLOv3Loss", "paper"): {
        "box": "mse",
        "area_weight": 0.0,
        "scale_x_y": (1.0, 1.0),
        "iou_thresh": 1.0,
        "ignore_thresh": 0.5,
        "box_gain": 5.0,
        "noobj_gain": 0.5,
        "class_gate": None,
        "unit": "pixel",
        "average_box": False,
        "box_args": (0.0, f32(1e-7)),
    },
    ("YOLOv4Loss", "paper"): {
        "box": "ciou",
        "scale_x_y": (f32(1.1),) * 2,
        "iou_thresh": f32(0.213),
        "ignore_thresh": 0.5,
        "box_gain": 5.0,
        "noobj_gain": 0.5,
        "class_gate": None,
        "unit": "pixel",
        "average_box": False,
        "box_args": (0.0, f32(1e-7)),
    },
    ("YOLOv3Loss", "darknet"): {
        "box": "bce_mse",
        "area_weight": 1.0,
        "scale_x_y": (1.0, 1.0),
        "iou_thresh": 1.0,
        "ignore_thresh": f32(0.7),
        "box_gain": 0.75,
        "noobj_gain": 1.0,
        "class_gate": f32(-math.log(3)),
        "unit": "image",
        "average_box": False,
        "box_args": (0.0, f32(1e-6)),
    },
    ("YOLOv4Loss", "darknet"): {
        "box": "ciou",
        "scale_x_y": (f32(1.1),) * 2,
        "iou_thresh": f32(0.213),
        "ignore_thresh": f32(0.7),
        "box_gain": f32(0.07),
        "noobj_gain": 1.0,
        "class_gate": f32(-math.log(3)),
        "unit": "image",
        "average_box": True,
        "box_args": (0.0, f32(1e-6)),
    },
}


@pytest.mark.parametrize(("detector", "recipe"), HEADS)
def test_defaults(detector, recipe):
    head = criterion(getattr(fusedyolo, detector), recipe=recipe).head
    for name, value in HEADS[detector, recipe].items():
        assert getattr(head, name) == value, name
    assert (head.obj_gain, head.cls_gain, head.first_weight) == (1, 1, 1)
    assert (head.decode, head.label, head.label_args, head.class_targets) == ("exp", "bce", (), (1, 0))
    assert head.anchors == tuple(FLAT)
    assert head.levels == ((0, 1, 2), (3, 4, 5))
    assert head.strides == STRIDES


def test_the_paper_is_the_default():
    for cls in LOSSES:
        assert criterion(cls).head == criterion(cls, recipe="paper").head
        assert cls.__doc__


@pytest.mark.parametrize("cls", LOSSES)
@pytest.mark.parametrize("recipe", ["paper", "darknet"])
@pytest.mark.parametrize("iou_loss", term_names("iou", "offset", users=True))
def test_every_box_loss_goes_with_every_recipe(cls, recipe, iou_loss):
    module = criterion(cls, recipe=recipe, iou_loss=iou_loss)
    preds = maps()
    out = module(preds, objects())
    assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(out.total, preds))
    assert out.parts["box"] > 0
    torch.testing.assert_close(out.total.detach(), sum(out.parts.values()), rtol=1e-6, atol=0)
    default = criterion(cls, recipe=recipe).head
    assert (module.head.box_args, module.head.area_weight) == (default.box_args, default.area_weight)


def test_several_anchors_average_boxes_in_darknet_alone():
    assert criterion(recipe="darknet", iou_thresh=0.3).head.average_box
    assert not criterion(YOLOv4Loss, recipe="darknet", iou_thresh=1).head.average_box
    assert not criterion(iou_thresh=0.3).head.average_box


@pytest.mark.parametrize(
    ("recipe", "name", "part"),
    [
        ("paper", "lambda_coord", "box"),
        ("darknet", "iou_normalizer", "box"),
        ("darknet", "obj_normalizer", "obj"),
    ],
)
def test_gains_scale_their_part(recipe, name, part):
    preds, rows = maps(), objects()
    one, three = (criterion(recipe=recipe, **{name: gain})(preds, rows).parts for gain in (1, 3))
    for key in one:
        assert three[key].item() == pytest.approx((3 if key == part else 1) * one[key].item(), rel=1e-6)


def test_cls_normalizer_acts_with_class_weights_only():
    preds, rows = maps(), objects()
    plain = [criterion(recipe="darknet", cls_normalizer=gain)(preds, rows).total for gain in (1, 3)]
    assert plain[0] == plain[1]
    weighted = [
        criterion(recipe="darknet", cls_normalizer=gain, counters_per_class=[1, 2, 3, 4])(preds, rows)
        for gain in (1, 3)
    ]
    assert weighted[1].parts["cls"] > weighted[0].parts["cls"]
    assert weighted[1].parts["obj"] == weighted[0].parts["obj"]


@pytest.mark.parametrize(
    ("hyp", "label", "args"),
    [
        ({}, "bce", ()),
        ({"focal_gamma": 0}, "bce", ()),
        ({"focal_gamma": 1.5}, "focal", (-1.0, 1.5)),
        ({"focal_alpha": 0.25}, "focal", (0.25, 0.0)),
        ({"focal_alpha": 0}, "focal", (0.0, 0.0)),
        ({"focal_alpha": 0.25, "focal_gamma": 2}, "focal", (0.25, 2.0)),
    ],
)
@pytest.mark.parametrize("recipe", ["paper", "darknet"])
def test_focal_classes(recipe, hyp, label, args):
    module = criterion(recipe=recipe, **hyp)
    assert (module.head.label, module.head.label_args) == (label, args)
    preds, rows = maps(), objects()
    out, plain = module(preds, rows), criterion(recipe=recipe)(preds, rows)
    assert out.parts["obj"] == plain.parts["obj"]
    assert (out.parts["cls"] < plain.parts["cls"]) == (label == "focal")


@pytest.mark.parametrize("recipe", ["paper", "darknet"])
def test_label_smoothing(recipe):
    assert criterion(recipe=recipe, label_smooth_eps=0.25).head.class_targets == (0.875, 0.125)


@pytest.mark.parametrize(("which", "batch"), [("torch", 1), ("torch", 2), ("torch", 3), ("triton", 2)])
def test_mean_is_the_sum_over_the_batch_size(which, batch):
    rows = objects()
    rows[:, 0] = rows[:, 0] % batch
    preds = maps(batch=batch)
    total = criterion()(preds, rows)
    mean = criterion(reduction="mean", backend=which)(preds, rows)
    torch.testing.assert_close(mean.total, total.total / batch, rtol=1e-5, atol=0)
    assert (mean.num_pos, mean.num_invalid) == (total.num_pos, total.num_invalid)
    for part in ("box", "obj", "cls"):
        torch.testing.assert_close(mean.parts[part], total.parts[part] / batch, rtol=1e-5, atol=0)
    got = torch.autograd.grad(mean.total, preds)
    for grad, want in zip(got, torch.autograd.grad(total.total, preds), strict=True):
        assert (grad - want / batch).abs().max() <= 1e-5 * grad.abs().max()


# Anchors.


@pytest.mark.parametrize(
    "anchors",
    [
        [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 48]],
        np.array(ANCHORS),
        torch.tensor(ANCHORS),
        tuple(tuple(level) for level in ANCHORS),
        [np.array(ANCHORS[0], dtype=np.float16), torch.tensor(ANCHORS[1]).flatten()],
    ],
)
def test_forms_of_anchors(anchors):
    assert criterion(anchors=anchors).head == criterion().head


@pytest.mark.parametrize(
    "anchors",
    [
        FLAT,
        ANCHORS,
        [side for pair in FLAT for side in pair],
        [[side for pair in level for side in pair] for level in ANCHORS],
        np.array(FLAT),
        np.array(ANCHORS),
        torch.tensor(FLAT).float(),
        torch.tensor(FLAT).flatten(),
    ],
)
def test_forms_of_all_anchors(anchors):
    assert criterion(all_anchors=anchors).head == criterion().head
    half = criterion(anchors=ANCHORS[1:], strides=(16,), all_anchors=anchors).head
    assert half.anchors == criterion().head.anchors
    assert half.levels == ((3, 4, 5),)


@pytest.mark.parametrize(
    ("pool", "levels", "places"),
    [
        ("abcdef", ("def", "abc"), ((3, 4, 5), (0, 1, 2))),
        ("aabb", ("ab", "ab"), ((1, 2), (0, 3))),  # the run first, then what is left
        ("abab", ("ab", "ab"), ((0, 1), (2, 3))),
        ("aab", ("ab", "a"), ((1, 2), (0,))),
        ("abcabd", ("abd", "ab"), ((3, 4, 5), (0, 1))),
        ("cba", ("abc",), ((2, 1, 0),)),
    ],
)
def test_a_level_is_a_run_of_all_anchors_if_it_can_be(pool, levels, places):
    sizes = {letter: (10 + i, 20 + i) for i, letter in enumerate("abcdef")}
    module = criterion(
        anchors=[[sizes[x] for x in level] for level in levels],
        strides=(8,) * len(levels),
        all_anchors=[sizes[x] for x in pool],
    )
    assert module.head.levels == places


def test_an_object_of_a_level_not_given_is_not_learnt():
    rows = torch.tensor([[0, 1, 0.3, 0.3, 13 / WIDTH, 15 / HEIGHT]], device=DEVICE)
    preds = maps()
    alone = criterion(anchors=ANCHORS[1:], strides=(16,))(preds[1:], rows)
    among = criterion(anchors=ANCHORS[1:], strides=(16,), all_anchors=FLAT)(preds[1:], rows)
    assert (alone.num_pos, among.num_pos) == (1, 0)
    assert (among.num_invalid, among.parts["box"]) == (0, 0)


def test_strides_and_scales_may_come_from_a_tensor():
    head = criterion(strides=torch.tensor([8.0, 16.0]), scale_x_y=np.array([1.1, 1.2])).head
    assert head.strides == (8, 16)
    assert head.scale_x_y == (f32(1.1), f32(1.2))


def test_every_number_is_one_of_float32():
    module = criterion(YOLOv4Loss, anchors=[[10.1, 13.3], [30.7, 61.9]], lambda_coord=0.1, label_smooth_eps=0.1)
    assert rounded(module.head) == module.head
    assert module.head.anchors[0] == (f32(10.1), f32(13.3))
    assert module.head.class_targets == (f32(0.95), f32(0.05))
    assert module.head.box_gain == f32(0.1)


# The module.


@pytest.mark.parametrize("which", BACKENDS)
def test_both_layouts_and_every_form_of_targets_agree(which):
    module, rows = criterion(YOLOv4Loss, backend=which), objects()
    preds = maps()
    want = criterion(YOLOv4Loss)(preds, rows)
    order = rows[:, 0].sort(stable=True).indices
    padded = torch.zeros(2, 8, 5, device=DEVICE)
    images = []
    for b in range(2):
        own = rows[rows[:, 0] == b]
        padded[b, 1 : 1 + len(own)] = own[:, 1:]
        size = torch.tensor([WIDTH, HEIGHT], device=DEVICE)
        corners = torch.cat([(own[:, 2:4] - own[:, 4:] / 2) * size, (own[:, 2:4] + own[:, 4:] / 2) * size], 1)
        images.append({"boxes": corners, "labels": own[:, 1].long()})
    capacious = Targets.from_packed(rows, 2, capacity=30)
    views = [pred.unflatten(1, (3, 5 + CLASSES)).permute(0, 1, 3, 4, 2) for pred in preds]
    last = tuple(pred.contiguous(memory_format=torch.channels_last) for pred in preds)
    cases = [(views, capacious), (last, padded)]
    if which == "torch":  # the interpreter is slow, and the conversions are the same
        cases += [
            (views, rows),
            (last, rows),
            (preds, capacious),
            (preds, padded),
            (preds, images),
            (preds, rows[order]),
        ]
        cases += [(preds, Targets.from_packed(rows, 2))]
    for inputs, targets in cases:
        out = module(inputs, targets)
        torch.testing.assert_close(out.total, want.total, rtol=1e-5, atol=0)
        assert (out.num_pos, out.num_invalid) == (want.num_pos, 0)


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("cls", LOSSES)
def test_no_objects(cls, which):
    module = criterion(cls, backend=which)
    preds = maps()
    with torch.device(DEVICE):
        empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
        forms = [torch.zeros(0, 6), torch.zeros(2, 0, 5), torch.zeros(2, 3, 5), [empty] * 2]
        forms += [Targets.from_packed(torch.zeros(0, 6), 2, capacity=c) for c in (None, 0, 4)]
    want = 0.5 * sum(torch.nn.functional.softplus(pred.unflatten(1, (3, 5 + CLASSES))[:, :, 4]).sum() for pred in preds)
    for targets in forms:
        out = module(preds, targets)
        torch.testing.assert_close(out.total, want, rtol=1e-6, atol=0)
        assert out.parts["box"] == out.parts["cls"] == out.num_pos == out.num_invalid == 0
        assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(out.total, preds))


def test_what_is_returned_stands_for_its_total():
    preds = maps()
    out = criterion()(preds, objects())
    assert float(out) == out.total.item()
    out.backward(torch.tensor(2.0, device=DEVICE), retain_graph=True)
    twice = [pred.grad.clone() for pred in preds]
    for pred in preds:
        pred.grad = None
    out.backward()
    assert all(torch.equal(2 * pred.grad, grad) for pred, grad in zip(preds, twice, strict=True))


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_predictions_have_a_float32_loss(dtype, which):
    module, rows = criterion(YOLOv4Loss, backend=which), objects()
    preds = maps(dtype)
    out = module(preds, rows)
    want = criterion(YOLOv4Loss)([pred.detach().float() for pred in preds], rows)
    assert out.total.dtype == out.parts["box"].dtype == torch.float32
    torch.testing.assert_close(out.total.detach(), want.total, rtol=1e-5, atol=0)
    assert [grad.dtype for grad in torch.autograd.grad(out.total, preds)] == [dtype] * 2


@pytest.mark.parametrize("use", [
    lambda out: out * 2, lambda out: 0.5 * out, lambda out: out / 2, lambda out: out + out, lambda out: sum([out]),
])  # fmt: skip
def test_output_is_no_number(use):
    """And no tuple to be made longer."""
    with pytest.raises(TypeError, match=r"^a LossOutput is a tuple, no number: take its \.total"):
        use(criterion()(maps(), objects()))


def test_output():
    out = criterion()(maps(), objects())
    assert isinstance(out, LossOutput)
    assert out._fields == ("total", "parts", "num_pos", "num_invalid")
    assert list(out.parts) == ["box", "obj", "cls"]
    assert out.num_pos.shape == out.num_invalid.shape == ()
    assert not out.num_pos.is_floating_point()


def test_no_gradient_is_needed():
    module, rows = criterion(), objects()
    with torch.no_grad():
        out = module(maps(), rows)
    assert not out.total.requires_grad
    assert not module([pred.detach() for pred in maps()], rows).total.requires_grad


WEIGHTS = {"recipe": "darknet", "counters_per_class": [1, 2, 3, 4]}


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize("arguments", [{}, WEIGHTS, {"reduction": "mean"}])
def test_copies(clone, arguments):
    module = criterion(YOLOv4Loss, **arguments)
    preds, rows = maps(), objects()
    assert module(preds, rows).total == clone(module)(preds, rows).total
    assert clone(module).head == module.head


def test_a_checkpoint_holds_nothing_of_the_loss():
    module = criterion(**WEIGHTS)
    assert dict(module.state_dict()) == {}
    assert list(module.parameters()) == []
    assert module.load_state_dict({}) == ([], [])


def test_class_weights_stay_float32_and_follow_the_predictions():
    module = criterion(YOLOv4Loss, recipe="darknet", counters_per_class=[3, 7, 11, 1])
    preds, rows = maps(), objects()
    want = module(preds, rows).total
    weights = module.class_weights.clone()
    assert not torch.equal(weights, weights.half().float())
    for moved in (module.half(), module.double(), module.to("meta")):
        assert moved(preds, rows).total == want
        assert torch.equal(moved.class_weights, weights)


@pytest.mark.parametrize("place", ["built", "moved", "called"])
@pytest.mark.parametrize("which", BACKENDS)
def test_class_weights_of_inference_mode_can_be_trained_with(which, place):
    """As of a validation before the training, in which the loss first meets the device of its predictions."""
    options = {"recipe": "darknet", "counters_per_class": [3, 7, 11, 1], "backend": which}
    preds, rows = maps(), objects()
    want = criterion(YOLOv4Loss, **options)(preds, rows).total
    module = criterion(YOLOv4Loss, **options)
    with torch.inference_mode():
        if place == "built":
            module = criterion(YOLOv4Loss, **options)
        elif place == "moved":
            module.to(DEVICE)
        else:
            module.to("meta")([pred.detach() for pred in preds], rows)
    assert not module.class_weights.is_inference()
    total = module(preds, rows).total
    total.backward()
    assert total == want


def test_class_weights_survive_deferred_initialisation():
    with torch.device("meta"):
        module = criterion(YOLOv4Loss, recipe="darknet", counters_per_class=[3, 7, 11, 1])
    assert module.class_weights.is_meta
    want = criterion(YOLOv4Loss, recipe="darknet", counters_per_class=[3, 7, 11, 1]).class_weights
    assert torch.equal(module.to_empty(device="cpu").class_weights, want)
    assert torch.equal(module.half().class_weights, want)


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("recipe", ["paper", "darknet"])
def test_a_box_beyond_the_image_is_pulled_not_pushed(recipe, which):
    module = YOLOv3Loss([[(10, 13)]], (8,), 2, recipe=recipe, backend=which)
    pred = torch.zeros(1, 7, 4, 4, device=DEVICE, requires_grad=True)
    out = module([pred], torch.tensor([[0, 1, 0.5, 0.5, 2.0, 2.0]], device=DEVICE))
    assert out.parts["box"] > 0
    out.backward()
    assert pred.grad[0, 2:4, 2, 2].max() < 0  # wider and higher


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_one_graph_whatever_the_number_of_objects_and_the_image(reduction, which):
    """Nothing breaks the graph; after the sizes have been seen to vary, nothing compiles again."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    module = YOLOv4Loss([[(10, 13)]], (8,), 2, reduction=reduction, backend=which)
    compiled = torch.compile(module, fullgraph=True, backend=count)
    generator = torch.Generator().manual_seed(0)
    counts = []
    sizes = ((2, 3), (3, 4), (4, 7), (3, 9))
    for side, objects in sizes if which == "triton" else sizes[:2]:  # the reference compiles for each size
        pred = torch.randn(2, 7, side, side, generator=generator).to(DEVICE).requires_grad_()
        rows = torch.rand(objects, 6, generator=generator).to(DEVICE)
        got, want = compiled([pred], rows), module([pred], rows)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
        grads = [torch.autograd.grad(out.total, pred)[0] for out in (got, want)]
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-9)
        counts.append(len(graphs))
    assert counts == ([1, 2, 2, 2] if which == "triton" else [1, 2])


def test_repr():
    text = repr(criterion(YOLOv4Loss, recipe="darknet", obj_normalizer=0.5, reduction="mean"))
    assert text == (
        "YOLOv4Loss(strides=(8, 16), num_classes=4, backend='torch', obj_normalizer=0.5, recipe='darknet', "
        "iou_loss='ciou', reduction='mean')"
    )


def test_arguments_have_the_documented_names():
    for cls in LOSSES:
        parameters = inspect.signature(cls).parameters
        names = "anchors strides num_classes recipe all_anchors assigner iou_loss scale_x_y iou_thresh ignore_thresh"
        names += " class_weights"
        assert list(parameters) == [*names.split(), "reduction", "image_size", "unit", "boxes", "backend", "hyp"]
        assert [p.name for p in parameters.values() if p.kind == p.KEYWORD_ONLY] == list(parameters)[4:-1]


# Which backend runs.


@pytest.fixture
def variables(monkeypatch):
    for name in ("TRITON_INTERPRET", "FUSEDYOLO_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_auto_takes_triton_where_it_runs(variables):
    assert backend.resolve("auto", CUDA) == "triton"
    assert backend.resolve("auto", CPU) == "torch"
    assert backend.resolve("auto", torch.device("mps")) == "torch"
    variables.setenv("TRITON_INTERPRET", "1")
    assert backend.resolve("auto", CPU) == "triton"
    assert backend.resolve("triton", CPU) == "triton"
    assert backend.resolve("torch", CUDA) == "torch"
    variables.setenv("TRITON_INTERPRET", "0")
    assert backend.resolve("auto", CPU) == "torch"


def test_auto_without_triton(variables):
    variables.setenv("TRITON_INTERPRET", "1")
    variables.setattr(backend, "_has_triton", lambda: False)
    assert backend.resolve("auto", CUDA) == backend.resolve("auto", CPU) == "torch"


@pytest.mark.parametrize("name", ["auto", "triton", "torch"])
def test_the_switch_disables_the_kernels(variables, name):
    variables.setenv("FUSEDYOLO_DISABLE", "1")
    assert backend.resolve(name, CUDA) == backend.resolve(name, CPU) == "torch"
    calls = []
    original = reference.grid_loss
    variables.setattr(reference, "grid_loss", lambda *args: calls.append(args) or original(*args))
    criterion(backend=name)(maps(), objects())
    assert len(calls) == 1


IMPORTS = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(name)

{block}
import fusedyolo
assert fusedyolo.__version__ == "0.1.0"
assert {{"YOLOv3Loss", "Targets", "functional"}} < set(dir(fusedyolo))
assert "torch" not in sys.modules and "triton" not in sys.modules
import torch
loss = fusedyolo.YOLOv3Loss([[(10, 13)]], (8,), 2)
preds = [torch.zeros(1, 7, 4, 4, requires_grad=True)]
out = loss(preds, fusedyolo.Targets.from_packed(torch.tensor([[0, 1, 0.5, 0.5, 0.2, 0.2]]), 1))
out.total.backward()
assert out.num_pos == 1 and preds[0].grad.isfinite().all()
box = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
assert fusedyolo.functional.generalized_box_iou_loss(box, box, "sum") < 1e-6
assert isinstance(fusedyolo.YOLOv4Loss, type) and fusedyolo.LossOutput is type(out)
assert "fusedyolo.ops" not in sys.modules
try:
    fusedyolo.YOLOv9Loss
except AttributeError:
    print("done")
"""


@pytest.mark.parametrize("block", ["sys.meta_path.insert(0, Block())", ""])
def test_import_needs_no_triton(variables, block):
    result = subprocess.run([sys.executable, "-c", IMPORTS.format(block=block)], capture_output=True, text=True)
    assert result.stdout == "done\n", result.stderr
