"""The tests tested: each broken kernel function must fail a check that the real one passes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from conftest import DEVICE
from fusedyolo.kernels import assign, grid, primitives
from fusedyolo.kernels.terms import box, decode, label, offset
from oracle import check_box_term, check_grid, check_label_term
from test_grid import DARKNET, make_preds, make_rows

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="compiled kernels keep the functions they were compiled with")


def check_small_grid() -> None:
    """Darknet's rules, with IoU boxes and with offsets: every line of the driver."""
    weights = torch.tensor([1.0, 2.5, 0.75])
    rows = make_rows(n=6, invalid=11)
    preds = make_preds(torch.float64, size=(32, 48))
    preds[0][0, 4, 0, :2] = torch.tensor([120.0, -120.0])
    for kind in ("ciou", "mse", "bce_mse"):
        head = replace(DARKNET, box=kind, area_weight=1.0)
        check_grid(preds, rows, head, weights, tolerance=1e-11)


def check_boxes() -> None:
    for kind in ("iou", "giou", "diou", "ciou"):
        check_box_term(kind)


def check_labels() -> None:
    check_label_term("bce", [])
    check_label_term("focal", [0.25, 1.5])
    check_label_term("focal", [-1.0, 0.0])
    check_label_term("bce", [], torch.float32)


# ---- broken functions: the same signatures, one thing wrong


@triton.jit
def step_inclusive(d):
    return tl.where(d >= 0, 1.0, 0.0)


@triton.jit
def step_zero_at_tie(d):
    return tl.where(d > 0, 1.0, 0.0)


@triton.jit
def log1p_naive(e):
    return tl.log(1.0 + e)


@triton.jit
def angle_of_first_octant(w, h):
    q = tl.abs(w) / tl.maximum(tl.abs(h), 1e-30)
    return q - q * q * q / 3.0


@triton.jit
def safe_div_off(a, b):
    return tl.where(b != 0, a / tl.where(b != 0, b, 1.0), 0.0) * 0.999


@triton.jit
def bce_sign(x, t, args):
    p = tl.sigmoid(x)
    return tl.maximum(x, 0.0) - x * t + tl.log(1.0 + tl.exp(-tl.abs(x))), t - p


@triton.jit
def bce_999(x, t, args):
    p = tl.sigmoid(x)
    return tl.maximum(x, 0.0) - x * t + tl.log(1.0 + tl.exp(-tl.abs(x))), 0.999 * (p - t)


@triton.jit
def bce_naive_log(x, t, args):
    p = tl.sigmoid(x)
    return -(t * tl.log(p) + (1.0 - t) * tl.log(1.0 - p)), p - t


@triton.jit
def pow_without_zero(q, g):
    return tl.exp(g * tl.log(q))


@triton.jit
def overlap_clamped(x):
    return tl.maximum(x[0] + tl.minimum(x[2], 0.0) + tl.minimum(x[3], 0.0), 1e-3)


@triton.jit
def enclose_of_first(x):
    return x[0] + tl.maximum(x[2], 0.0)


@triton.jit
def no_scaled_eps(eps, inv):
    return eps


@triton.jit
def sensitive_without_shift(a, scale):
    p = tl.sigmoid(a)
    return scale * p, scale * p * (1.0 - p)


@triton.jit
def sensitive_without_scaled_slope(a, scale):
    p = tl.sigmoid(a)
    return scale * p - 0.5 * (scale - 1.0), p * (1.0 - p)


@triton.jit
def valid_anywhere(row, first_image, last_image, classes):
    image, label_, cx, cy, w, h = row
    known = (image >= first_image) & (image < last_image) & (label_ >= 0) & (label_ < classes)
    return known & (w > 0) & (h > 0) & (cx >= 0) & (cx <= 1) & (cy >= 0) & (cy < 1) & (w < float("inf"))


@triton.jit
def best_anchor_only(w, h, own, anchors, iou_thresh):
    best = w * 0.0
    best_index = own * 0 - 1
    for t in tl.static_range(len(anchors) // 2):
        inter = tl.minimum(w, anchors[2 * t]) * tl.minimum(h, anchors[2 * t + 1])
        value = inter / (w * h + anchors[2 * t] * anchors[2 * t + 1] - inter)
        best_index = tl.where(value > best, t, best_index)
        best = tl.maximum(best, value)
    return best_index == own


@triton.jit
def next_row_never(rows_ptr, after, last, cell, site, rule, BLOCK_G: tl.constexpr, ACC: tl.constexpr):
    return last


@triton.jit
def next_row_any(rows_ptr, after, last, cell, site, rule, BLOCK_G: tl.constexpr, ACC: tl.constexpr):
    return after + 1


MUTANTS = [
    (box, "step", step_inclusive, check_boxes),
    (box, "step", step_zero_at_tie, check_boxes),
    (box, "angle", angle_of_first_octant, check_boxes),
    (box, "safe_div", safe_div_off, check_boxes),
    (box, "_overlap", overlap_clamped, check_boxes),
    (box, "_enclose", enclose_of_first, check_boxes),
    (box, "_scaled_eps", no_scaled_eps, check_boxes),
    (label, "log1p", log1p_naive, check_labels),
    (label, "pow_pos", pow_without_zero, check_labels),
    (label, "bce", bce_sign, check_labels),
    (grid, "bce", bce_sign, check_small_grid),
    (grid, "bce", bce_999, check_small_grid),
    (grid, "bce", bce_naive_log, check_small_grid),
    (decode, "scaled_sigmoid", sensitive_without_shift, check_small_grid),
    (decode, "scaled_sigmoid", sensitive_without_scaled_slope, check_small_grid),
    (offset, "scaled_sigmoid", sensitive_without_shift, check_small_grid),
    (offset, "bce", bce_999, check_small_grid),
    (assign, "row_valid", valid_anywhere, check_small_grid),
    (grid, "anchor_assigned", best_anchor_only, check_small_grid),
    (grid, "_next_row", next_row_never, check_small_grid),
    (grid, "_next_row", next_row_any, check_small_grid),
    (primitives, "safe_div", safe_div_off, check_boxes),
]


@pytest.mark.parametrize("check", [check_boxes, check_labels, check_small_grid])
def test_the_real_functions_pass(check):
    check()


@pytest.mark.parametrize(
    ("module", "name", "broken", "check"),
    MUTANTS,
    ids=[f"{m.__name__.split('.')[-1]}-{b.__name__}" for m, _, b, _ in MUTANTS],
)
def test_a_broken_function_is_caught(module, name, broken, check, monkeypatch):
    monkeypatch.setattr(module, name, broken)
    with pytest.raises(AssertionError):
        check()
