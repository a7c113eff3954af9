"""Bad arguments raise a ValueError that names them; bad target rows are skipped, counted and touch nothing."""

from __future__ import annotations

import re
import warnings
from enum import Enum

import numpy as np
import pytest
import torch
from conftest import DEVICE
from torch.autograd import forward_ad

from fusedyolo import (
    ScaledYOLOv4Loss,
    Targets,
    YOLOv1Loss,
    YOLOv2Loss,
    YOLOv4Loss,
    YOLOv5Loss,
    YOLOv8Loss,
    backend,
    checks,
    functional,
)
from fusedyolo.targets import as_targets
from fusedyolo.terms import term_names
from fusedyolo.tools.registry import CASES, Workload

ANCHORS = [[(10, 13), (16, 30)], [(30, 61)]]
NAN, INF = float("nan"), float("inf")
BACKENDS = ["torch", "triton"]


def loss(**kwargs):
    arguments = {"anchors": ANCHORS, "strides": (8, 16), "num_classes": 3, "backend": "torch"} | kwargs
    return YOLOv4Loss(**arguments)


def maps(*, batch=2, height=32, width=48, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((16, height // 8, width // 8), (8, height // 16, width // 16))
    return [torch.randn(batch, *size, generator=generator).to(device).requires_grad_() for size in sizes]


def raises(message):
    return pytest.raises(ValueError, match="^" + re.escape(message) + "$")


# The constructor.

KINDS, CLASS_TERMS = (", ".join(map(repr, term_names(role, users=True))) for role in ("iou", "class"))
POWERS = "iou_alpha, iou_gamma, iou_band, anchor_t, neighbours"
COMMON = f"label_smooth_eps, smoothing, cls_loss, focal_alpha, focal_gamma, {POWERS}"
PAPER = (
    "lambda_coord, lambda_noobj, lambda_obj, lambda_class, obj_loss, obj_alpha, obj_gamma, gr, balance, shared, "
    f"{COMMON}"
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "tiny"}, "recipe: 'tiny', want one of 'paper', 'darknet', 'bubbliiiing'"),
        ({"recipe": None}, "recipe: None, want one of 'paper', 'darknet', 'bubbliiiing'"),
        ({"backend": "cuda"}, "backend: 'cuda', want one of 'auto', 'triton', 'torch'"),
        ({"reduction": "batch"}, "reduction: 'batch', want one of 'sum', 'mean', 'level', 'none'"),
        ({"iou_loss": "l2"}, f"iou_loss: 'l2', want one of {KINDS}, 'mse'"),
        ({"num_classes": 0}, "num_classes: 0, want an integer >= 1"),
        ({"num_classes": 2.0}, "num_classes: 2.0, want an integer >= 1"),
        ({"num_classes": True}, "num_classes: True, want an integer >= 1"),
        (
            {"anchors": [(1, 2), (3, 4), (5, 6), (7, 8)]},
            "strides: 2 numbers, want 4, one for each level of anchors: anchors are a list of its (width, height) "
            "pairs for each level",
        ),
        ({"strides": (8,)}, "strides: 1 numbers, want 2, one for each level of anchors"),
        ({"strides": 8}, "strides: 8, want a sequence of numbers, one a level"),
        ({"strides": (8, 0)}, "strides[1]: 0, want a finite number > 0"),
        ({"strides": (8, -16)}, "strides[1]: -16, want a finite number > 0"),
        ({"strides": (8, "16")}, "strides[1]: '16', want a finite number > 0"),
        ({"strides": (8, INF)}, "strides[1]: inf, want a finite number > 0"),
        ({"scale_x_y": 0}, "scale_x_y: 0, want a finite number > 0"),
        ({"scale_x_y": (1.1,)}, "scale_x_y: 1 numbers, want one for each of 2 levels"),
        ({"scale_x_y": (1.1, -1)}, "scale_x_y[1]: -1, want a finite number > 0"),
        ({"scale_x_y": "1.1"}, "scale_x_y: '1.1', want a number or one number for each of 2 levels"),
        ({"iou_thresh": 1.5}, "iou_thresh: 1.5, want a finite number in [0, 1]"),
        ({"iou_thresh": -0.1}, "iou_thresh: -0.1, want a finite number in [0, 1]"),
        ({"ignore_thresh": 2}, "ignore_thresh: 2, want a finite number in [0, 1]"),
        ({"ignore_thresh": NAN}, "ignore_thresh: nan, want a finite number in [0, 1]"),
        ({"image_size": (64,)}, "image_size: (64,), want (height, width)"),
        ({"image_size": "64"}, "image_size: '64', want (height, width)"),
        ({"image_size": (64, 0)}, "image_size: 0, want a finite number > 0"),
        (
            {"image_size": ((64, 64), (32, 64))},
            "image_size: ((64, 64), (32, 64)), want one (height, width), that of the batch",
        ),
        ({"image_size": -64}, "image_size: -64, want a finite number > 0"),
        ({"label_smooth_eps": 1.1}, "label_smooth_eps: 1.1, want a finite number in [0, 1]"),
        ({"focal_gamma": -1}, "focal_gamma: -1, want a finite number >= 0"),
        ({"focal_alpha": 1.5}, "focal_alpha: 1.5, want a finite number in [0, 1]"),
        ({"lambda_coord": -1}, "lambda_coord: -1, want a finite number >= 0"),
        ({"lambda_noobj": None}, "lambda_noobj: None, want a finite number >= 0"),
        (
            {"iou_normalizer": 0.07},
            f"iou_normalizer: no hyper-parameter of recipe 'paper', want one of {PAPER}",
        ),
        (
            {"recipe": "darknet", "lambda_coord": 5},
            "lambda_coord: no hyper-parameter of recipe 'darknet', want one of iou_normalizer, obj_normalizer, "
            f"cls_normalizer, counters_per_class, max_delta, objectness_smooth, new_coords, {COMMON}",
        ),
        ({"recipe": "darknet", "iou_normalizer": INF}, "iou_normalizer: inf, want a finite number >= 0"),
        ({"recipe": "darknet", "obj_normalizer": -1}, "obj_normalizer: -1, want a finite number >= 0"),
        ({"recipe": "darknet", "cls_normalizer": "1"}, "cls_normalizer: '1', want a finite number >= 0"),
        ({"recipe": "darknet", "max_delta": 0}, "max_delta: 0, want a finite number > 0"),
        ({"recipe": "darknet", "counters_per_class": [1, 2]}, "counters_per_class: 2 numbers, want 3, one a class"),
        ({"recipe": "darknet", "counters_per_class": 5}, "counters_per_class: 5, want 3 positive numbers, one a class"),
        (
            {"recipe": "darknet", "counters_per_class": [1, 0, 2]},
            "counters_per_class[1]: 0, want a finite number > 0",
        ),
        ({"assigner": "tal"}, "assigner: 'tal', want one of 'best_anchor', 'shape_iou', 'ratio', 'iou_band'"),
        ({"assigner": "ratio", "neighbours": 1}, "neighbours: 1, want 0, 2 or 4"),
        ({"smoothing": True}, "smoothing: True, want one of 'binary', 'uniform'"),
        ({"shared": "all"}, "shared: 'all', want one of 'sum', 'last', 'each', 'merge'"),
        ({"iou_band": 0.5}, "iou_band: 0.5, want (low, high), 0 <= low <= high <= 1"),
        ({"iou_band": (0.5,)}, "iou_band: (0.5,), want (low, high), 0 <= low <= high <= 1"),
        ({"iou_band": (0.7, 0.3)}, "iou_band: (0.7, 0.3), want (low, high), 0 <= low <= high <= 1"),
        ({"iou_band": (0.3, 1.5)}, "iou_band[1]: 1.5, want a finite number in [0, 1]"),
        ({"iou_band": (NAN, 0.5)}, "iou_band[0]: nan, want a finite number in [0, 1]"),
        ({"iou_alpha": 0}, "iou_alpha: 0, want a finite number > 0"),
        ({"iou_gamma": -0.5}, "iou_gamma: -0.5, want a finite number >= 0"),
        ({"cls_loss": "l2"}, f"cls_loss: 'l2', want one of {CLASS_TERMS}"),
        ({"cls_loss": 1}, f"cls_loss: 1, want one of {CLASS_TERMS}"),
        ({"cls_loss": "varifocal", "focal_alpha": -1.5}, "focal_alpha: -1.5, want a finite number in [0, 1]"),
        ({"cls_loss": "qfl", "focal_gamma": INF}, "focal_gamma: inf, want a finite number >= 0"),
        ({"objectness_smooth": 1}, f"objectness_smooth: no hyper-parameter of recipe 'paper', want one of {PAPER}"),
        (
            {"recipe": "darknet", "obj_normalizer": (1, 2, 3)},
            "obj_normalizer: 3 numbers, want one for each of 2 levels",
        ),
        ({"recipe": "darknet", "obj_normalizer": (1, INF)}, "obj_normalizer[1]: inf, want a finite number >= 0"),
        ({"recipe": "darknet", "objectness_smooth": 2}, "objectness_smooth: 2, want 0 or 1"),
        ({"recipe": "darknet", "objectness_smooth": 0.5}, "objectness_smooth: 0.5, want 0 or 1, or one a level of 2"),
        (
            {"recipe": "darknet", "objectness_smooth": (0, 1, 1)},
            "objectness_smooth: 3 flags, want one for each of 2 levels",
        ),
        ({"recipe": "darknet", "objectness_smooth": (0, -1)}, "objectness_smooth: -1, want 0 or 1"),
        ({"recipe": "darknet", "new_coords": 2}, "new_coords: 2, want 0 or 1"),
        (
            {"recipe": "darknet", "new_coords": 1, "iou_loss": "mse"},
            f"iou_loss: 'mse' with new_coords, want one of {KINDS}",
        ),
        (
            {"recipe": "darknet", "new_coords": 1, "cls_loss": "qfl"},
            "new_coords: a class term of its own, want no cls_loss, focal_alpha or focal_gamma beside it",
        ),
        (
            {"recipe": "darknet", "new_coords": 1, "focal_gamma": 2},
            "new_coords: a class term of its own, want no cls_loss, focal_alpha or focal_gamma beside it",
        ),
        ({"balance": np.array([4.0, 1.0, 0.4])}, "balance: 3 numbers, want one for each of 2 levels"),
        ({"balance": torch.tensor([4.0, -1.0])}, "balance[1]: -1.0, want a finite number >= 0"),
        ({"lambda_coord": np.array([0.5, 0.25])}, "lambda_coord: [0.5, 0.25], want a finite number >= 0"),
        (
            {"recipe": "darknet", "counters_per_class": np.array([1, 2])},
            "counters_per_class: 2 numbers, want 3, one a class",
        ),
        (
            {"lambda_coord": torch.ones((), requires_grad=True)},
            "lambda_coord: a tensor that requires a gradient, want numbers",
        ),
        (
            {"recipe": "darknet", "cls_loss": "softmax_ce", "counters_per_class": [1, 2, 3]},
            "cls_loss: 'softmax_ce' with counters_per_class, want a term that judges each class by itself",
        ),
    ],
)
def test_constructor(arguments, message):
    with raises(message):
        loss(**arguments)


@pytest.mark.parametrize("make", [np.array, torch.tensor], ids=["array", "tensor"])
@pytest.mark.parametrize(
    ("recipe", "name", "numbers"),
    [
        ("paper", "balance", [4.0, 1.0]),
        ("paper", "iou_band", [0.25, 0.5]),
        ("paper", "lambda_coord", 2.0),
        ("darknet", "obj_normalizer", [4.0, 1.0]),
        ("darknet", "counters_per_class", [5, 1, 2]),
        ("darknet", "objectness_smooth", [1, 0]),
    ],
)
def test_arrays_and_tensors_are_their_numbers(recipe, name, numbers, make):
    more = {"assigner": "iou_band"} if name == "iou_band" else {}
    got, want = (loss(recipe=recipe, **more, **{name: value}) for value in (make(numbers), numbers))
    assert got.head == want.head
    assert repr(got) == repr(want)
    assert (got.class_weights is None) == (want.class_weights is None)
    assert want.class_weights is None or torch.equal(got.class_weights, want.class_weights)


def test_gains_do_not_train():
    """They are read at each call; a tensor whose gradient would be lost is refused."""
    criterion = YOLOv8Loss(3, (8,), reg_max=1, backend="torch")
    preds, rows = [torch.zeros(1, 7, 4, 4)], torch.tensor([[0, 1, 0.5, 0.5, 0.4, 0.4]])
    want = criterion(preds, rows).total
    criterion.box = torch.tensor(7.5)
    assert criterion(preds, rows).total == want
    criterion.box.requires_grad_()
    with raises("box: a tensor that requires a gradient, want a finite number >= 0"):
        criterion(preds, rows)


@pytest.mark.parametrize("counts", [[1, 2, 3], None])
@pytest.mark.parametrize("kind", ["bce", "focal", "qfl", "varifocal"])
def test_other_class_terms_go_with_class_weights(kind, counts):
    assert loss(recipe="darknet", cls_loss=kind, counters_per_class=counts).head.label == kind


def v2(**kwargs):
    return YOLOv2Loss(**{"anchors": [(1, 2), (3, 1)], "num_classes": 3, "backend": "torch"} | kwargs)


SEVERAL = {"anchors": [[(1, 2)], [(3, 1)]], "stride": (8, 16), "recipe": "lightnet"}
DARKNET_V2 = "coord_scale, object_scale, noobject_scale, class_scale"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "paper"}, "recipe: 'paper', want one of 'region', 'darknet', 'lightnet'"),
        ({"backend": "cuda"}, "backend: 'cuda', want one of 'auto', 'triton', 'torch'"),
        ({"num_classes": 0}, "num_classes: 0, want an integer >= 1"),
        ({"anchors": [(1, 2), (3, 0)]}, "anchors[0]: [(1, 2), (3, 0)], want positive, finite widths and heights"),
        ({"anchors": [1, 2, 3]}, "anchors[0]: [1, 2, 3], want (width, height) pairs, or a flat list of even length"),
        ({"stride": 0}, "strides[0]: 0, want a finite number > 0"),
        ({"stride": (8, 16)}, "stride: (8, 16), want a number with recipe 'region'"),
        ({"stride": None}, "stride: None, want a number with recipe 'region'"),
        ({**SEVERAL, "stride": (8,)}, "strides: 1 numbers, want 2, one for each level of anchors"),
        ({**SEVERAL, "stride": (8,), "anchors": [[(1, 2)]]}, "stride: (8,), want a number, or at least two"),
        ({**SEVERAL, "stride": (8, -1)}, "strides[1]: -1, want a finite number > 0"),
        ({"reduction": "mean"}, "reduction: 'mean', want 'none', or nothing with recipe 'region', which has its own"),
        ({"recipe": "darknet", "reduction": "max"}, "reduction: 'max', want one of 'sum', 'mean', 'none'"),
        ({"image_size": 0}, "image_size: 0, want a finite number > 0"),
        (
            {"coord_scale": 1},
            "coord_scale: no hyper-parameter of recipe 'region', "
            "want one of lambda_coord, lambda_obj, lambda_noobj, lambda_class, thresh",
        ),
        (
            {"recipe": "darknet", "lambda_obj": 1},
            "lambda_obj: no hyper-parameter of recipe 'darknet', want one of "
            f"{DARKNET_V2}, thresh, rescore, coord_prefill",
        ),
        (
            {"recipe": "lightnet", "thresh": 1},
            f"thresh: no hyper-parameter of recipe 'lightnet', want one of {DARKNET_V2}, iou_ignore_thresh, "
            "coord_regression, coord_grid_sensitivity, class_smoothing, coord_prefill",
        ),
        ({"lambda_coord": -1}, "lambda_coord: -1, want a finite number >= 0"),
        ({"lambda_class": NAN}, "lambda_class: nan, want a finite number >= 0"),
        ({"thresh": 1.5}, "thresh: 1.5, want a finite number in (0, 1]"),
        ({"recipe": "darknet", "rescore": 2}, "rescore: 2, want 0 or 1"),
        ({"recipe": "darknet", "object_scale": -1}, "object_scale: -1, want a finite number >= 0"),
        ({"recipe": "darknet", "coord_prefill": 1.5}, "coord_prefill: 1.5, want an integer >= 0"),
        ({"recipe": "darknet", "coord_prefill": -1}, "coord_prefill: -1, want an integer >= 0"),
        ({"recipe": "lightnet", "coord_scale": 0}, "coord_scale: 0, want a finite number > 0"),
        ({"recipe": "lightnet", "coord_regression": "giou"}, "coord_regression: 'giou', want one of 'mse', 'ciou'"),
        ({"recipe": "lightnet", "coord_grid_sensitivity": 0}, "coord_grid_sensitivity: 0, want a finite number > 0"),
        ({"recipe": "lightnet", "class_smoothing": 2}, "class_smoothing: 2, want a finite number in [0, 1]"),
        ({"recipe": "lightnet", "iou_ignore_thresh": -1}, "iou_ignore_thresh: -1, want a finite number in [0, 1]"),
    ],
)
def test_constructor_of_v2(arguments, message):
    with raises(message):
        v2(**arguments)


@pytest.mark.parametrize(
    ("arguments", "change", "message"),
    [
        ({}, lambda p: [p], "pred: a list, want a tensor"),
        ({}, lambda p: None, "pred: None, want a tensor"),
        ({}, lambda p: p[:, :15], "preds[0]: shape (2, 15, 4, 6), want (B, 2 * (5 + 3), H, W) or (B, 2, H, W, 5 + 3)"),
        (
            {"image_size": 64},
            lambda p: p,
            "preds: maps of an image of (128, 192) (height, width), want image_size (64, 64)",
        ),
        (SEVERAL, lambda p: [p], "preds: 1 levels, want 2, one for each level of anchors"),
    ],
)
def test_predictions_of_v2(arguments, change, message):
    with raises(message):
        v2(**arguments)(change(maps()[0].detach().repeat(1, 4, 1, 1)[:, :16]), torch.zeros(0, 6))


def v5(**kwargs):
    arguments = {"anchors": ANCHORS, "strides": (8, 16), "num_classes": 3, "backend": "torch"}
    return YOLOv5Loss(**arguments | kwargs)


def scaled(**kwargs):
    arguments = {"anchors": [*ANCHORS, [(100, 90)]], "strides": (8, 16, 32), "num_classes": 3, "backend": "torch"}
    return ScaledYOLOv4Loss(**arguments | kwargs)


RATIO = "obj, cls, cls_pw, obj_pw, anchor_t, neighbours, fl_gamma, gr, iou_alpha, iou_gamma"


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (v5, {"anchors": [ANCHORS[0]] * 6}, "anchors: 6 levels, want one of [1, 2, 3, 4, 5], or a balance"),
        (scaled, {"anchors": ANCHORS}, "anchors: 2 levels, want one of [3, 4, 5], or a balance"),
        (
            v5,
            {"giou": 1},
            f"giou: no hyper-parameter of YOLOv5Loss, want one of box, {RATIO}, label_smoothing, smoothing",
        ),
        (scaled, {"box": 1}, f"box: no hyper-parameter of ScaledYOLOv4Loss, want one of giou, {RATIO}"),
        (
            scaled,
            {"label_smoothing": 0.1},
            f"label_smoothing: no hyper-parameter of ScaledYOLOv4Loss, want one of giou, {RATIO}",
        ),
        *((make, {"num_classes": 0}, "num_classes: 0, want an integer >= 1") for make in (v5, scaled)),
        (v5, {"strides": (8,)}, "strides: 1 numbers, want 2, one for each level of anchors"),
        (v5, {"iou_loss": "mse"}, f"iou_loss: 'mse', want one of {KINDS}"),
        (v5, {"iou_loss": "ciou_plus"}, f"iou_loss: 'ciou_plus', want one of {KINDS}"),
        (v5, {"backend": "cpu"}, "backend: 'cpu', want one of 'auto', 'triton', 'torch'"),
        (v5, {"image_size": "64"}, "image_size: '64', want (height, width)"),
        (v5, {"box": -1}, "box: -1, want a finite number >= 0"),
        (scaled, {"giou": -1}, "giou: -1, want a finite number >= 0"),
        (v5, {"obj": None}, "obj: None, want a finite number >= 0"),
        (v5, {"cls": INF}, "cls: inf, want a finite number >= 0"),
        (v5, {"cls_pw": 0}, "cls_pw: 0, want a finite number > 0"),
        (v5, {"obj_pw": -1}, "obj_pw: -1, want a finite number > 0"),
        (v5, {"anchor_t": 0.5}, "anchor_t: 0.5, want a finite number >= 1"),
        (v5, {"fl_gamma": -1}, "fl_gamma: -1, want a finite number >= 0"),
        (v5, {"gr": 1.5}, "gr: 1.5, want a finite number in [0, 1]"),
        (v5, {"label_smoothing": 2}, "label_smoothing: 2, want a finite number in [0, 1]"),
        (v5, {"iou_alpha": 0}, "iou_alpha: 0, want a finite number > 0"),
        (v5, {"iou_gamma": -1}, "iou_gamma: -1, want a finite number >= 0"),
    ],
)
def test_constructor_of_v5_and_scaled_v4(make, arguments, message):
    with raises(message):
        make(**arguments)


def test_calls_of_v5():
    with raises("preds: a tensor of shape (2, 16, 4, 6), want a list of 2 tensors, one a level"):
        v5()(maps()[0], torch.zeros(0, 6))
    with raises("targets: shape (3, 5), want (M, 6) or (B, G, 5), or a column more, of weights"):
        v5()(maps(), torch.zeros(3, 5))


PAIRS = "(width, height) pairs, or a flat list of even length"
POSITIVE = "positive, finite widths and heights"
ALL = "(width, height) pairs, flat or one list a level"


@pytest.mark.parametrize(
    ("anchors", "message"),
    [
        (None, "anchors: None, want for each level its (width, height) pairs"),
        (5, "anchors: 5, want for each level its (width, height) pairs"),
        ([], "anchors: [], want for each level its (width, height) pairs"),
        ("10,13", "anchors: '10,13', want for each level its (width, height) pairs"),
        ({0: ANCHORS[0]}, "anchors: {0: [(10, 13), (16, 30)]}, want for each level its (width, height) pairs"),
        (torch.tensor(5.0), "anchors: a tensor of shape (), want for each level its (width, height) pairs"),
        ([10, 13, 16], f"anchors[0]: 10, want {PAIRS}"),
        ([[10, 13], [30]], f"anchors[1]: [30], want {PAIRS}"),
        ([[10, 13], []], f"anchors[1]: [], want {PAIRS}"),
        ([[10, 13], [(1, 2), (3,)]], f"anchors[1]: [(1, 2), (3,)], want {PAIRS}"),
        ([[10, 13], ["a", "b"]], f"anchors[1]: ['a', 'b'], want {PAIRS}"),
        ([[10, 13], torch.ones(2, 3)], f"anchors[1]: a tensor of shape (2, 3), want {PAIRS}"),
        ([[10, 13], [(0, 5)]], f"anchors[1]: [(0, 5)], want {POSITIVE}"),
        ([[10, 13], [(5, -1)]], f"anchors[1]: [(5, -1)], want {POSITIVE}"),
        ([[10, 13], [(5, NAN)]], f"anchors[1]: [(5, nan)], want {POSITIVE}"),
        ([[10, 13], [(5, 1e39)]], f"anchors[1]: [(5, 1e+39)], want {POSITIVE}"),
    ],
)
def test_anchors(anchors, message):
    with raises(message):
        loss(anchors=anchors)


@pytest.mark.parametrize(
    ("anchors", "message"),
    [
        (7, f"all_anchors: 7, want {ALL}"),
        ([], f"all_anchors: [], want {ALL}"),
        ([10, 13, 16], f"all_anchors: [10.0, 13.0, 16.0], want {ALL}"),
        ([10, 13, (16, 30)], f"all_anchors: [10, 13, (16, 30)], want {ALL}"),
        ([(10, 13, 16)], f"all_anchors: (10, 13, 16), want {ALL}"),
        ([(10, 13), (0, 30)], f"all_anchors: (0, 30), want {POSITIVE}"),
        (
            [(10, 13), (30, 61)],
            "all_anchors: 2 anchors of which none is left for anchors[0][1] = (16.0, 30.0), "
            "want every anchor of every level among them",
        ),
    ],
)
def test_all_anchors(anchors, message):
    with raises(message):
        loss(all_anchors=anchors)


def test_an_anchor_is_found_only_once():
    with pytest.raises(ValueError, match=re.escape("none is left for anchors[1][0] = (10.0, 13.0)")):
        loss(anchors=[[(10, 13)], [(10, 13)]], all_anchors=[(10, 13), (16, 30)])


@pytest.mark.parametrize("make", [loss, v5, scaled])
def test_anchors_against_the_order_of_strides(make):
    several = [[(10, 13), (16, 30)], [(30, 61)], [(100, 90)]][: len(make().head.levels)]
    strides = (8, 16, 32)[: len(several)]
    with pytest.warns(UserWarning, match="anchors: from large to small, with strides .8.0, 16.0") as caught:
        make(anchors=several[::-1], strides=strides)
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="anchors: from small to large, with strides .*16.0, 8.0"):
        make(anchors=several, strides=strides[::-1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(anchors=several, strides=strides)
        make(anchors=several[::-1], strides=strides[::-1])
        make(anchors=[[(20, 13)]] * len(several), strides=strides)


@pytest.mark.parametrize("make", [loss, v5, scaled])
def test_anchors_in_cells(make):
    """As the checkpoints of YOLOv5 have them, each in cells of its level, and as YOLOv2's files."""
    pixels = [[(10, 13), (16, 30)], [(30, 61), (62, 45)], [(116, 90), (373, 326)]][: len(make().head.levels)]
    strides = (8, 16, 32)[: len(pixels)]
    for anchors in (
        [[(w / stride, h / stride) for w, h in level] for level, stride in zip(pixels, strides, strict=True)],
        [[(0.57, 0.68)], [(3.3, 5.5)], [(7.9, 3.5)]][: len(pixels)],
    ):
        with pytest.warns(UserWarning, match=f"^anchors: no side reaches {strides[-1] / 2:g} pixels, half a cell"):
            make(anchors=anchors, strides=strides)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(anchors=pixels, strides=strides)
        YOLOv2Loss([(0.57, 0.68), (1.9, 2.1)], 3)


@pytest.mark.parametrize(
    ("anchors", "stride", "recipe"),
    [
        ([(42, 55), (102, 128), (359, 320)], 32, "region"),
        ([[(10, 13)], [(30, 61)], [(116, 90), (373, 326)]], (8, 16, 32), "lightnet"),
    ],
)
def test_anchors_in_pixels(anchors, stride, recipe):
    """Which YOLOv2, unlike all others, takes in cells."""
    with pytest.warns(UserWarning, match="^anchors: a side of 3.. cells of stride 32 is 1.... pixels. If they are in"):
        YOLOv2Loss(anchors, 3, stride, recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        YOLOv2Loss([(1.3221, 1.73145), (11.2364, 10.0071)], 3)


SPARSE = "a tensor of layout torch.sparse_coo, not torch.strided"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: loss()(maps(), x), f"targets: {SPARSE}, want a tensor of shape (M, 6) or (B, G, 5)"),
        (
            lambda x: loss()(maps(), [{"boxes": x, "labels": torch.zeros(2)}] * 2),
            f"targets[0]['boxes']: {SPARSE}, want a tensor of shape (N, 4)",
        ),
        (lambda x: Targets.from_packed(x, 2), f"packed: {SPARSE}, want a tensor of shape (M, 6)"),
        (lambda x: YOLOv1Loss(3)(x, torch.zeros(0, 6)), f"pred: {SPARSE}, want a tensor"),
        (lambda x: functional.sigmoid_focal_loss(x, x), f"inputs: {SPARSE}, want a tensor"),
        (lambda x: functional.complete_box_iou_loss(x.to_dense(), x), f"boxes2: {SPARSE}, want a tensor"),
    ],
)
def test_sparse_tensors(call, message):
    with raises(message):
        call(torch.ones(2, 6).to_sparse())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_reference_is_mapped(case):
    work = Workload(batch=2, size=64, classes=3)
    bound = case.bind(case.build(3, "torch"), work)
    preds, rows = [pred.detach() for pred in case.predictions(work)], case.targets(work)
    found = torch.func.vmap(lambda *each: bound(list(each), rows).total)(*(torch.stack((p, p / 2)) for p in preds))
    assert torch.allclose(found, torch.stack([bound(each, rows).total for each in (preds, [p / 2 for p in preds])]))


def forward_mode(f, x):
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(f(forward_ad.make_dual(x, x))).tangent is not None


TRANSFORMS = {
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack((x, x))),
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "dual": forward_mode,
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_kernels_know_nothing_of_transforms(name):
    """Of a vmap there is no rule, and a jvp would have had a gradient of 0, silently. The reference has all of them."""
    first, second = [pred.detach() for pred in maps(device=DEVICE)]
    rows = torch.zeros(0, 6, device=DEVICE)
    calls = {
        "loss": lambda backend: lambda pred: loss(backend=backend)([pred, second], rows).total,
        "function": lambda backend: lambda x: functional.sigmoid_focal_loss(x, x * 0, backend=backend).sum(),
    }
    for call in calls.values():
        TRANSFORMS[name](call("torch"), first)
        with raises(
            "backend: 'triton', kernels, in torch.func.vmap, grad or jvp, or in forward_ad, want 'torch', the reference"
        ):
            TRANSFORMS[name](call("triton"), first)


# Predictions.

SHAPES = {
    0: "want (B, 2 * (5 + 3), H, W) or (B, 2, H, W, 5 + 3)",
    1: "want (B, 1 * (5 + 3), H, W) or (B, 1, H, W, 5 + 3)",
}
FIVE = "want (B, 1 * (5 + 3), H, W) or (B, 1, H, W, 5 + 3) or (B, 1, 5 + 3, H, W) or (B, H, W, 1, 5 + 3)"
SPLIT = ": boxes, objectness and classes of a level in one, by torch.cat"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p[0], "preds: a tensor of shape (2, 16, 4, 6), want a list of 2 tensors, one a level"),
        (lambda p: None, "preds: None, want a list of 2 tensors, one a level"),
        (lambda p: p[:1], "preds: 1 levels, want 2, one for each level of anchors"),
        (lambda p: [*p, p[1]], "preds: 3 levels, want 2, one for each level of anchors"),
        (lambda p: [p[0], 1], "preds[1]: 1, want a tensor"),
        (lambda p: [p[0], p[1].detach().numpy()], "preds[1]: a ndarray, want a tensor"),
        (lambda p: [p[0][0], p[1]], f"preds[0]: shape (16, 4, 6), {SHAPES[0]}"),
        (lambda p: [p[0], p[1][:, :7]], f"preds[1]: shape (2, 7, 2, 3), {SHAPES[1]}"),
        (lambda p: [p[0], p[1].permute(0, 2, 3, 1)], f"preds[1]: shape (2, 2, 3, 8), {SHAPES[1]}"),
        (lambda p: [p[0].unflatten(1, (2, 8)), p[1]], f"preds[0]: shape (2, 2, 8, 4, 6), {SHAPES[0]}"),
        (lambda p: [p[0].unflatten(1, (2, 8)), p[1][:, None, :7]], f"preds[1]: shape (2, 1, 7, 2, 3), {FIVE}"),
        (lambda p: {"boxes": p, "scores": p}, f"preds: a dict, want a list of 2 tensors, one a level{SPLIT}"),
        (lambda p: [p, p], f"preds[0]: a list, want a tensor{SPLIT}"),
        (
            lambda p: [p[0].to_sparse(), p[1]],
            "preds[0]: a tensor of layout torch.sparse_coo, not torch.strided, want a tensor",
        ),
        (lambda p: [p[1], p[0]], f"preds[0]: shape (2, 8, 2, 3), {SHAPES[0]}"),
        (lambda p: [p[0], p[1][:, :, :0]], "preds[1]: shape (2, 8, 0, 3), want no empty dimension"),
        (lambda p: [v[:0] for v in p], "preds[0]: shape (0, 16, 4, 6), want no empty dimension"),
        (
            lambda p: [v.long() for v in p],
            "preds[0]: dtype torch.int64, want one of torch.float16, torch.bfloat16, torch.float32, torch.float64",
        ),
        (lambda p: [p[0], p[1].double()], "preds[1]: dtype torch.float64, want torch.float32 as preds[0]"),
        (lambda p: [p[0], p[1].to("meta")], "preds[1]: device meta, want cpu as preds[0]"),
        (lambda p: [p[0], p[1][:1]], "preds[1]: batch size 1, want 2 as preds[0]"),
        (
            lambda p: [p[0][..., :5], p[1]],
            "preds[1]: a map of 2 x 3 cells of 16 pixels, an image of (32, 48) (height, width), want (32, 40) as "
            "preds[0]: maps in the order of strides, of an image whose sides all strides divide",
        ),
        (
            lambda p: [p[0], p[1][:, :, :1]],
            "preds[1]: a map of 1 x 3 cells of 16 pixels, an image of (16, 48) (height, width), want (32, 48) as "
            "preds[0]: maps in the order of strides, of an image whose sides all strides divide",
        ),
    ],
)
def test_predictions(change, message):
    with raises(message):
        loss()(change(maps()), torch.zeros(0, 6))


def test_maps_of_another_image():
    assert loss(image_size=(32, 48))(maps(), torch.zeros(0, 6)).num_pos == 0
    with raises("preds: maps of an image of (32, 48) (height, width), want image_size (48, 48)"):
        loss(image_size=48)(maps(), torch.zeros(0, 6))


# Targets.

FORMS = "a tensor (M, 6) or (B, G, 5), a list of {'boxes', 'labels'} or of tensors (n, 5), or fusedyolo.Targets"


def image(n=2):
    return {"boxes": torch.rand(n, 4), "labels": torch.zeros(n, dtype=torch.long)}


def torchvision_boxes(name):
    """As its ``BoundingBoxes`` are, tensors with a format."""
    boxes = torch.rand(2, 4).as_subclass(type("BoundingBoxes", (torch.Tensor,), {}))
    boxes.format = Enum("BoundingBoxFormat", ["XYXY", "XYWH", "CXCYWH"])[name]
    return boxes


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (None, f"targets: None, want {FORMS}"),
        (np.zeros((2, 6)), f"targets: a ndarray, want {FORMS}"),
        (torch.zeros(6), "targets: shape (6,), want (M, 6) or (B, G, 5), or a column more, of weights"),
        (torch.zeros(3, 5), "targets: shape (3, 5), want (M, 6) or (B, G, 5), or a column more, of weights"),
        (torch.zeros(2, 3, 7), "targets: shape (2, 3, 7), want (M, 6) or (B, G, 5), or a column more, of weights"),
        (torch.zeros(3, 6, dtype=torch.long), "targets: dtype torch.int64, want torch.float32 or torch.float64"),
        (torch.zeros(2, 3, 5, dtype=torch.int32), "targets: dtype torch.int32, want torch.float32 or torch.float64"),
        (torch.zeros(3, 6, device="meta"), "targets: device meta, want cpu as preds"),
        (torch.zeros(2, 3, 5, device="meta"), "targets: device meta, want cpu as preds"),
        (torch.zeros(3, 4, 5), "targets: shape (3, 4, 5), want (2, G, 5), as many images as preds"),
        (Targets.from_packed(torch.zeros(0, 6), 3), "targets: Targets of 3 images, want 2 as preds"),
        (Targets.from_packed(torch.zeros(0, 6), 2).to("meta"), "targets: device meta, want cpu as preds"),
        ([], "targets: a list of 0, want 2 dicts or tensors (n, 5), one an image of preds"),
        ([image()], "targets: a list of 1, want 2 dicts, one an image of preds"),
        (
            [[[1, 0.5, 0.5, 0.2]], []],
            "targets[0]: [[1, 0.5, 0.5, 0.2]], want a dict with 'boxes' and 'labels', or of each image a tensor (n, 5)",
        ),
        ([image(), torch.zeros(2, 6)], "targets[1]: a tensor of shape (2, 6), want a dict with 'boxes' and 'labels'"),
        ([image(), {"boxes": torch.zeros(0, 4)}], "targets[1]: keys ['boxes'], want 'boxes' and 'labels'"),
        (
            [image(), {**image(), "boxes": torch.zeros(4)}],
            "targets[1]['boxes']: a tensor of shape (4,), want a tensor of shape (N, 4)",
        ),
        (
            [{**image(), "boxes": [[0, 0, 1, 1]]}, image()],
            "targets[0]['boxes']: [[0, 0, 1, 1]], want a tensor of shape (N, 4)",
        ),
        (
            [image(), {**image(), "labels": torch.zeros(3)}],
            "targets[1]['labels']: a tensor of shape (3,), want a tensor of shape (2,), one a box",
        ),
        (
            [image(), {**image(), "boxes": torchvision_boxes("CXCYWH")}],
            "targets[1]['boxes']: of format CXCYWH, want XYXY, or boxes='cxcywh'",
        ),
        (
            [image(), {**image(), "boxes": torch.zeros(2, 4, dtype=torch.bool)}],
            "targets[1]['boxes']: dtype torch.bool, want a real number type",
        ),
        (
            [image(), {**image(), "labels": torch.zeros(2, dtype=torch.complex64)}],
            "targets[1]['labels']: dtype torch.complex64, want a real number type",
        ),
        (
            [image(), {**image(), "boxes": torch.zeros(2, 4, dtype=torch.bfloat16)}],
            "targets[1]['boxes']: dtype torch.bfloat16, want torch.float32: halves hold no class above 256 or "
            "2048, and move centres; keep targets out of casts",
        ),
        (
            [{**image(), "labels": torch.zeros(2, dtype=torch.float16)}, image()],
            "targets[0]['labels']: dtype torch.float16, want torch.float32: halves hold no class above 256 or "
            "2048, and move centres; keep targets out of casts",
        ),
        (
            [image(), {**image(), "labels": torch.zeros(2, device="meta")}],
            "targets[1]['labels']: device meta, want cpu as the boxes",
        ),
        (
            [image(), {key: value.to("meta") for key, value in image().items()}],
            "targets[1]['boxes']: device meta, want cpu as targets[0]",
        ),
        (
            [{key: value.to("meta") for key, value in image().items()}] * 2,
            "targets: device meta, want cpu as preds",
        ),
    ],
)
def test_targets(targets, message):
    with raises(message):
        loss()(maps(), targets)


@pytest.mark.parametrize("name", ["XYXY", "XYWH", "CXCYWH"])
def test_boxes_may_say_what_they_are(name):
    item = {**image(), "boxes": torchvision_boxes(name)}
    plain = {**item, "boxes": item["boxes"].as_subclass(torch.Tensor)}
    found, want = (Targets.from_torchvision([each], 64, boxes=name.lower()).rows for each in (item, plain))
    assert torch.equal(found, want)
    criterion = loss(boxes=name.lower())
    assert criterion(maps(), [item] * 2).num_pos == criterion(maps(), [plain] * 2).num_pos


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Targets.from_packed([[0.0] * 6], 1),
            "packed: [[0.0, 0.0, 0.0, 0.0, 0.0, 0.0]], want a tensor of shape (M, 6)",
        ),
        (
            lambda: Targets.from_packed(torch.zeros(3, 5), 1),
            "packed: shape (3, 5), want (M, 6), or a column more, of weights",
        ),
        (
            lambda: Targets.from_packed(torch.zeros(3, 6).long(), 1),
            "packed: dtype torch.int64, want torch.float32 or torch.float64",
        ),
        (lambda: Targets.from_packed(torch.zeros(3, 6), -1), "batch_size: -1, want an integer >= 0"),
        (lambda: Targets.from_packed(torch.zeros(3, 6), 1.5), "batch_size: 1.5, want an integer >= 0"),
        (lambda: Targets.from_packed(torch.zeros(3, 6), 1, capacity=2), "packed: 3 rows, want at most 2, the capacity"),
        (lambda: Targets.from_packed(torch.zeros(3, 6), 1, capacity=-1), "capacity: -1, want an integer >= 0"),
        (
            lambda: Targets.from_padded(torch.zeros(2, 3, 7)),
            "padded: shape (2, 3, 7), want (B, G, 5), or a column more, of weights",
        ),
        (lambda: Targets.from_padded(torch.zeros(2, 3, 5), capacity=5), "padded: 6 rows, want at most 5, the capacity"),
        (lambda: Targets.from_torchvision([], 64), "targets: [], want a list of {'boxes', 'labels'}, one an image"),
        (
            lambda: Targets.from_torchvision(image(), 64),
            "targets: a dict, want a list of {'boxes', 'labels'}, one an image",
        ),
        (lambda: Targets.from_torchvision([image()], None), "image_size: None, want (height, width)"),
        (lambda: Targets.from_torchvision([image()], (64, -1)), "image_size: -1, want a finite number > 0"),
        (
            lambda: Targets.from_torchvision([image()] * 2, [(64, 64), (64,)]),
            "image_size[1]: (64,), want (height, width)",
        ),
        (
            lambda: Targets.from_torchvision([image()], [(64, 64)] * 2),
            "image_size: 2 pairs, want (height, width), or one pair for each of 1 images",
        ),
        (lambda: Targets.from_torchvision([image(3)], 64, capacity=2), "targets: 3 rows, want at most 2, the capacity"),
        (lambda: Targets(torch.zeros(3, 5), torch.zeros(3).int(), 1), "rows: shape (3, 5), want (M, 6)"),
        (
            lambda: Targets(torch.zeros(3, 6).half(), torch.zeros(3).int(), 1),
            "rows: dtype torch.float16, want torch.float32: halves hold no class above 256 or 2048, and move centres; "
            "keep targets out of casts",
        ),
        (
            lambda: Targets(torch.zeros(3, 6).double(), torch.zeros(3).int(), 1),
            "rows: dtype torch.float64, want torch.float32",
        ),
        (
            lambda: Targets(torch.zeros(6, 3).t(), torch.zeros(3).int(), 1),
            "rows: a strided view, want a contiguous tensor",
        ),
        (
            lambda: Targets(torch.zeros(3, 6), torch.zeros(4).int(), 1),
            "offsets: a tensor of shape (4,), want a tensor of shape (3,)",
        ),
        (lambda: Targets(torch.zeros(3, 6), torch.zeros(3), 1), "offsets: dtype torch.float32, want torch.int32"),
        (
            lambda: Targets(torch.zeros(3, 6), torch.zeros(3, device="meta").int(), 1),
            "offsets: device meta, want cpu as rows",
        ),
        (lambda: Targets.from_packed(torch.zeros(0, 6), 1).validate(0), "num_classes: 0, want an integer >= 1"),
    ],
)
def test_making_targets(make, message):
    with raises(message):
        make()


# Backends.


@pytest.fixture
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_triton_on_a_cpu_needs_the_interpreter(no_interpreter):
    with raises(
        "backend: 'triton' on a CPU, want tensors on a GPU, or TRITON_INTERPRET=1 set before Triton is imported, "
        "or backend='auto' or 'torch'"
    ):
        loss(backend="triton")(maps(), torch.zeros(0, 6))


def test_triton_on_other_devices():
    with raises("backend: 'triton' on a device of type mps, want a CUDA or HIP GPU, or backend='auto'"):
        backend.resolve("triton", torch.device("mps"))


def test_triton_not_installed(monkeypatch):
    monkeypatch.setattr(backend, "_has_triton", lambda: False)
    with raises("backend: 'triton', but Triton is not installed, want backend='auto' or 'torch', or Triton installed"):
        backend.resolve("triton", torch.device("cuda"))


# Functions.

BOXES = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
BOX_FUNCTIONS = [
    functional.generalized_box_iou_loss,
    functional.distance_box_iou_loss,
    functional.complete_box_iou_loss,
    functional.box_iou_loss,
]


@pytest.mark.parametrize("function", BOX_FUNCTIONS)
@pytest.mark.parametrize(
    ("boxes1", "boxes2", "arguments", "message"),
    [
        ([0, 0, 1, 1], BOXES, {}, "boxes1: [0, 0, 1, 1], want a tensor"),
        (BOXES, None, {}, "boxes2: None, want a tensor"),
        (BOXES[:, :3], BOXES, {}, "boxes1: shape (1, 3), want (..., 4)"),
        (BOXES, torch.tensor(1.0), {}, "boxes2: shape (), want (..., 4)"),
        (
            BOXES.expand(2, 4),
            BOXES.expand(3, 4),
            {},
            "boxes2: shape (3, 4), want one that broadcasts with (2, 4) of boxes1",
        ),
        (BOXES.bool(), BOXES, {}, "boxes1: dtype torch.bool, want a real number type"),
        (BOXES, BOXES.to(torch.complex64), {}, "boxes2: dtype torch.complex64, want a real number type"),
        (BOXES, BOXES.to("meta"), {}, "boxes2: device meta, want cpu as boxes1"),
        (BOXES, BOXES, {"reduction": "max"}, "reduction: 'max', want one of 'none', 'mean', 'sum'"),
        (BOXES, BOXES, {"reduction": None}, "reduction: None, want one of 'none', 'mean', 'sum'"),
        (BOXES, BOXES, {"eps": -1e-7}, "eps: -1e-07, want a finite number >= 0"),
        (BOXES, BOXES, {"backend": "cpu"}, "backend: 'cpu', want one of 'auto', 'triton', 'torch'"),
    ],
)
def test_box_functions(function, boxes1, boxes2, arguments, message):
    with raises(message):
        function(boxes1, boxes2, **arguments)


def test_kind():
    for kind in ("ciou_plus", "mse"):  # of a peer, and of logits
        with raises(f"kind: {kind!r}, want one of {KINDS}"):
            functional.box_iou_loss(BOXES, BOXES, kind=kind)


@pytest.mark.parametrize(
    ("inputs", "targets", "arguments", "message"),
    [
        (1.0, BOXES, {}, "inputs: 1.0, want a tensor"),
        (BOXES, BOXES[0], {}, "targets: shape (4,), want (1, 4) as inputs"),
        (BOXES, BOXES.bool(), {}, "targets: dtype torch.bool, want a real number type"),
        (BOXES, BOXES.to("meta"), {}, "targets: device meta, want cpu as inputs"),
        (BOXES, BOXES, {"alpha": 1.5}, "alpha: 1.5, want a number in [0, 1], or -1 for none"),
        (BOXES, BOXES, {"alpha": -0.5}, "alpha: -0.5, want a number in [0, 1], or -1 for none"),
        (BOXES, BOXES, {"alpha": None}, "alpha: None, want a number in [0, 1], or -1 for none"),
        (BOXES, BOXES, {"alpha": "a"}, "alpha: 'a', want a number in [0, 1], or -1 for none"),
        (BOXES, BOXES, {"alpha": [0.2, 0.8]}, "alpha: [0.2, 0.8], want a number in [0, 1], or -1 for none"),
        (BOXES, BOXES, {"alpha": NAN}, "alpha: nan, want a number in [0, 1], or -1 for none"),
        (BOXES, BOXES, {"gamma": -1}, "gamma: -1, want a finite number >= 0"),
        (BOXES, BOXES, {"reduction": "max"}, "reduction: 'max', want one of 'none', 'mean', 'sum'"),
        (BOXES, BOXES, {"backend": "cpu"}, "backend: 'cpu', want one of 'auto', 'triton', 'torch'"),
    ],
)
def test_focal(inputs, targets, arguments, message):
    with raises(message):
        functional.sigmoid_focal_loss(inputs, targets, **arguments)


def test_every_failure_goes_through_one_function():
    """Its form is name, what came, what was wanted."""
    with raises("name: got, want this"):
        checks.fail("name", "got", "this")
    assert len(checks.describe("x" * 100)) < 20


# Rows that cannot be.

GOOD = torch.tensor([[0, 1, 0.3, 0.4, 0.2, 0.5], [1, 2, 0.6, 0.1, 0.5, 0.2], [1, 0, 0.9, 0.8, 0.3, 0.3]]).to(DEVICE)
BAD = [
    (0, -1.0),
    (0, 2.0),
    (0, NAN),
    (0, 1e30),
    (1, -1.0),
    (1, 3.0),
    (1, INF),
    (1, 1e30),
    (2, 1.0),
    (2, -1e-3),
    (3, 1.0),
    (3, NAN),
    (4, 0.0),
    (4, -0.2),
    (4, INF),
    (5, 0.0),
    (5, NAN),
]


def with_bad_rows():
    rows = []
    for i, (column, value) in enumerate(BAD):
        bad = GOOD[i % 3].clone()
        bad[column] = value
        rows += [bad] if i >= len(GOOD) else [bad, GOOD[i]]
    return torch.stack(rows)


def run(criterion, targets):
    preds = maps(device=DEVICE)
    out = criterion(preds, targets)
    return out, torch.autograd.grad(out.total, preds)


FORMS_OF_TARGETS = {
    "packed": lambda rows: rows,
    "Targets": lambda rows: Targets.from_packed(rows, 2),
    "with capacity": lambda rows: Targets.from_packed(rows, 2, capacity=64),
}


@pytest.mark.parametrize("form", FORMS_OF_TARGETS)
@pytest.mark.parametrize(("name", "recipe"), [("torch", "paper"), ("torch", "darknet"), ("triton", "darknet")])
def test_bad_rows_are_counted_and_touch_nothing(form, name, recipe):
    criterion = loss(recipe=recipe, backend=name)
    want, want_grads = run(criterion, GOOD)
    got, grads = run(criterion, FORMS_OF_TARGETS[form](with_bad_rows()))
    assert (want.num_invalid, got.num_invalid) == (0, len(BAD))
    assert want.num_pos == got.num_pos > 0
    assert torch.isfinite(got.total)
    torch.testing.assert_close(got.total, want.total, rtol=1e-6, atol=0)
    for grad, want_grad in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(grad, want_grad, rtol=1e-6, atol=1e-7)


# of a loss, how to make it, and whether a centre on the far border belongs to the last cell
OTHERS = {
    "v2": (lambda **kw: v2(anchors=[(1, 2), (3, 1)], stride=8, **kw), False),
    "v2 of darknet": (lambda **kw: v2(stride=8, recipe="darknet", **kw), False),
    "v2 of lightnet": (lambda **kw: v2(stride=8, recipe="lightnet", **kw), True),
    "v3 by an IoU band": (lambda **kw: loss(assigner="iou_band", iou_band=(0.1, 0.2), **kw), False),
    "v5": (v5, True),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OTHERS)
def test_bad_rows_leave_no_trace(name, backend):
    """The kernels' bits, and the reference's numbers, are those of the good rows alone."""
    make, edge = OTHERS[name]
    criterion = make(backend=backend).eval()
    bad = with_bad_rows()
    if edge:
        bad[:, 2:4] = torch.where(bad[:, 2:4] == 1, 1 + 2**-23, bad[:, 2:4])
    preds = maps(height=16, width=32, device=DEVICE)
    preds = preds[:1] if name.startswith("v2") else preds

    def evaluate(rows):
        out = criterion(preds[0] if name.startswith("v2") else preds, rows)
        return out, torch.autograd.grad(out.total, preds)

    (want, want_grads), (got, grads) = evaluate(GOOD), evaluate(bad)
    assert (want.num_invalid, got.num_invalid) == (0, len(BAD))
    assert want.num_pos == got.num_pos > 0
    tolerance = {"rtol": 0, "atol": 0} if backend == "triton" else {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close((got.total, *grads), (want.total, *want_grads), **tolerance)
    if edge:
        at_the_border = torch.cat([GOOD, GOOD[:1]])
        at_the_border[3, 2:4] = 1.0
        out, _ = evaluate(at_the_border)
        assert out.num_invalid == 0
        assert out.num_pos > want.num_pos


@pytest.mark.parametrize("name", BACKENDS)
def test_bad_padded_rows_and_boxes_are_counted(name):
    criterion = loss(backend=name)
    padded = torch.zeros(2, 5, 5, device=DEVICE)
    padded[0, 0], padded[1, 0], padded[1, 2] = GOOD[:, 1:]
    padded[0, 2] = torch.tensor([3, 0.5, 0.5, 0.1, 0.1])
    padded[1, 4] = torch.tensor([NAN, 0.5, 0.5, 0.1, 0.1])
    want, want_grads = run(criterion, GOOD)
    got, grads = run(criterion, padded)
    assert got.num_invalid == 2
    torch.testing.assert_close(got.total, want.total, rtol=1e-6, atol=0)
    torch.testing.assert_close(grads, want_grads, rtol=1e-6, atol=1e-7)

    with torch.device(DEVICE):
        outside = {"boxes": torch.tensor([[40.0, 0, 80, 20], [5, 5, 5, 9]]), "labels": torch.tensor([0, 1])}
        nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    got, _ = run(criterion, [outside, nothing])
    assert (got.num_invalid, got.num_pos) == (2, 0)


@pytest.mark.parametrize("name", BACKENDS)
def test_stale_rows_beyond_the_capacity_in_use_are_no_rows(name):
    """A CUDA graph copies each batch's rows into the same tensor; what an earlier batch left must not count."""
    criterion = loss(backend=name)
    stale = Targets.from_packed(torch.cat([GOOD, GOOD]), 2, capacity=8)
    fresh = Targets.from_packed(GOOD[:2], 2)
    stale.rows[:2] = fresh.rows
    stale.offsets.copy_(fresh.offsets)
    want, want_grads = run(criterion, GOOD[:2])
    got, grads = run(criterion, stale)
    assert (got.num_invalid, got.num_pos) == (0, want.num_pos)
    torch.testing.assert_close(got.total, want.total, rtol=1e-6, atol=0)
    torch.testing.assert_close(grads, want_grads, rtol=1e-6, atol=1e-7)


def test_checks_survive_compilation():
    """Bad input raises the same error under torch.compile, and good input meets no graph break."""

    def check(preds, targets):
        batch, size = checks.grid_predictions(preds, (2, 1), (8, 16), 3, None)
        return as_targets(targets, batch, size, preds[0].device)[0] + 0

    compiled = torch.compile(check, fullgraph=True, backend="eager")
    preds = [pred.detach() for pred in maps()]
    rows = GOOD.cpu()
    assert torch.equal(compiled(preds, rows), rows)
    sizes = [(32, 48), (64, 96), (96, 96)]
    for height, width in sizes:
        assert torch.equal(compiled([pred.detach() for pred in maps(height=height, width=width)], rows), rows)
    with pytest.raises(Exception, match=re.escape("preds[1]: batch size 1, want 2 as preds[0]")):
        compiled([preds[0], preds[1][:1]], rows)
