"""The tests tested: each broken kernel function must fail a check that the real one passes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from fusedyolo.kernels import assign, primitives, rows
from fusedyolo.kernels.dense import blocks, by_centre, by_iou, classes, place, rank, ranked, taken
from fusedyolo.kernels.dense import box as dense_box
from fusedyolo.kernels.grid import assign as listing
from fusedyolo.kernels.grid import box as grid_box
from fusedyolo.kernels.grid import choose, ignore, offer, positives
from fusedyolo.kernels.grid import loss as grid_loss
from fusedyolo.kernels.terms import box, decode, label, offset
from fusedyolo.kernels.terms.records import Jacobian, Span
from oracle import check_box_term, check_grid, check_label_term, check_row_term
from test_dense import check as check_loss
from test_dense import make_anchors as dense_anchors
from test_dense import make_preds as dense_preds
from test_dense import make_targets as dense_targets
from test_grid import DARKNET, HEAD, HEADS, LIGHTNET, RATIO, make_preds, make_rows

from fusedyolo import ops
from fusedyolo.ops import dense_plan
from fusedyolo.ops import grid as grid_ops

pytestmark = pytest.mark.interpreter("compiled kernels keep the functions they were compiled with")


def check_small_grid() -> None:
    """Darknet's rules, with IoU boxes and with offsets: every line of the driver."""
    weights = torch.tensor([1.0, 2.5, 0.75])
    rows = make_rows(n=6, invalid=11)
    preds = make_preds(torch.float64, size=(32, 48))
    preds[0][0, 4, 0, :2] = torch.tensor([120.0, -120.0])
    for kind in ("ciou", "mse", "bce_mse"):
        head = replace(DARKNET, box=kind, area_weight=1.0)
        check_grid(preds, rows, head, weights, tolerance=1e-11)


def check_ratio_grid() -> None:
    """The ratio rule on one anchor of 8 x 4 cells, with centres and sides on every one of its limits."""
    head = replace(
        RATIO, anchors=((16.0, 16.0),), levels=((0,),), strides=(8.0,), scale_x_y=(2.0,), obj_balance=(), anchor_t=2.0
    )
    rows = torch.tensor(
        [
            [0, 0, 1.5 / 8, 1.5 / 4, 0.25, 0.375], [0, 1, 0.4 / 8, 0.3 / 4, 0.3, 0.6], [0, 2, 1.0, 1.0, 0.25, 0.5],
            [0, 1, 0.25, 0.5, 0.5, 0.5], [0, 0, 5.25 / 8, 2.25 / 4, 0.3, 0.5], [0, 2, 4.75 / 8, 2.3 / 4, 0.25, 0.45],
            [0, 1, 0.7, 0.3, 0.1, 0.5],
        ]
    )  # fmt: skip
    pred = make_preds(torch.float64, batch=1, size=(32, 64))[0][:, :8]
    pred[0, 2:4, 0, 0] = torch.tensor([-6.0, 4.0])  # a similarity below 0
    check_grid([pred], rows, head, tolerance=1e-11)


def check_picking() -> None:
    """Rows that pick by cost: copies, several that pick one prediction, an image that is wider than high."""
    rows = torch.cat((make_rows(n=7, invalid=3), make_rows(n=7, invalid=0)))
    preds = make_preds(torch.float64, size=(32, 48))
    check_grid(preds, rows, replace(RATIO, by_cost=True), tolerance=1e-11)


def check_strips() -> None:
    """A map of several tiles, each of a few rows of cells: boxes that reach from one into the next, far from others."""
    head = replace(DARKNET, ignore_thresh=0.125)
    rows = torch.tensor([[0, 1, (5 * y % 12 + 0.5) / 12, (y + 0.5) / 12, 0.25, 0.25] for y in range(12)])
    preds = make_preds(torch.float64, batch=1, size=(256, 512))
    check_grid(preds, rows, head, torch.tensor([1.0, 2.5, 0.75]), tolerance=1e-11)


def check_crowd() -> None:
    """Many small objects: several on a prediction, more than are looked at at a time, each of a reach of few cells."""
    gen = torch.Generator().manual_seed(1)
    size = torch.tensor([10.0, 13.0]) / torch.tensor([96.0, 64.0]) * (0.8 + 0.4 * torch.rand(90, 2, generator=gen))
    label = torch.arange(90.0)[:, None] % 3
    rows = torch.cat((torch.zeros(90, 1), label, 0.5 + 0.4 * torch.rand(90, 2, generator=gen), size), 1)
    preds = make_preds(torch.float64, batch=1)
    soft = replace(RATIO, class_targets=(0.875, 0.125))
    along = replace(soft, label="softmax_ce", label_args=())
    for head in (HEAD, RATIO, soft, along):
        check_grid(preds, rows, head, tolerance=1e-11)


def check_prior_grid() -> None:
    """One object among predictions that are drawn to their cell's middle."""
    pred = make_preds(torch.float64, batch=1, size=(16, 24))[0][:, :8]
    head = replace(LIGHTNET, levels=((0,),), strides=(8.0,), scale_x_y=(1.25,))
    check_grid([pred], torch.tensor([[0, 1, 0.5, 0.5, 0.5, 0.75]]), head, tolerance=1e-11)


def check_focal_grid() -> None:
    """Exponents for which no general power is taken, of classes and of objectness."""
    rows, pred = make_rows(n=6), make_preds(torch.float64, batch=1, size=(16, 24))[0][:, :8]
    one = replace(RATIO, anchors=((16.0, 16.0),), levels=((0,),), strides=(8.0,), scale_x_y=(2.0,), obj_balance=())
    for label_gamma, obj_gamma in ((2.0, 0.0), (0.0, 1.0), (1.0, 2.0), (1.5, 0.5)):
        terms = {"label": "focal", "label_args": (0.25, label_gamma), "objectness": "focal"}
        check_grid([pred], rows, replace(one, **terms, obj_args=(-1.0, obj_gamma)), tolerance=1e-11)


def check_shape_grid() -> None:
    """Shapes half as large as their anchor, and a little larger."""
    pred = make_preds(torch.float64, batch=1, size=(32, 64))[0][:, :8]
    shapes = {"anchors": ((16.0, 16.0),), "levels": ((0,),), "strides": (8.0,), "scale_x_y": (1.0,), "obj_balance": ()}
    rows = torch.tensor([[0, 0, 0.3, 0.3, 8 / 64, 16 / 32], [0, 1, 0.6, 0.6, 9 / 64, 16 / 32]])
    check_grid([pred], rows, replace(HEADS["shape iou"], **shapes, iou_thresh=0.5), tolerance=1e-11)


def check_weighed_grid() -> None:
    pred = make_preds(torch.float64, batch=1, size=(32, 48))[0][:, :8]
    head = replace(HEADS["each, class weights"], levels=((1,),), strides=(8.0,), scale_x_y=(2.0,), obj_balance=())
    rows = torch.tensor([[0, 0, 0.5, 0.5, 0.25, 0.5], [0, 2, 0.25, 0.25, 0.375, 0.5]])
    check_grid([pred], rows, head, torch.tensor([1.0, 2.5, 0.75]), tolerance=1e-11)


def check_band_grid() -> None:
    rows = torch.tensor([[0, 0, 0.5, 0.5, 0.25, 0.5], [0, 1, 0.55, 0.5, 0.25, 0.5], [0, 2, 0.25, 0.25, 0.375, 0.5]])
    pred = make_preds(torch.float64, batch=1, size=(32, 48))[0][:, :8]
    head = replace(HEADS["band"], levels=((1,),), strides=(8.0,), scale_x_y=(1.0,))
    check_grid([pred], rows, head, tolerance=1e-11)


def check_retinanet() -> None:
    """Objects on anchors, between them, where no anchor is, and large deltas, on both kinds of box loss."""
    targets = dense_targets("retinanet", 2, n=6)
    boxes = dense_anchors("retinanet")[[40, 41]].round()
    targets[0]["boxes"] = torch.cat((targets[0]["boxes"], boxes, boxes.mean(0, keepdim=True), boxes[:1] - 200.0))
    targets[0]["labels"] = torch.cat((targets[0]["labels"], torch.tensor([1, 2, 1, 2])))
    preds = dense_preds("retinanet", 2, torch.float64)
    check_loss("retinanet", preds, dense_targets("retinanet", 2, n=6), 1e-11)
    check_loss("retinanet", preds, targets, 1e-11, loss_type="smooth_l1", beta=0.5)
    with torch.no_grad():
        preds[1][:, ::2, 2:] += 5
    check_loss("retinanet", preds, targets, 1e-11, loss_type="giou")


def check_ssd() -> None:
    preds, targets = dense_preds("ssd", 3, torch.float64), dense_targets("ssd", 3)
    targets[0]["boxes"] = torch.cat((targets[0]["boxes"], targets[0]["boxes"][:1]))
    targets[0]["labels"] = torch.cat((targets[0]["labels"], 3 - targets[0]["labels"][:1]))
    for ratio in (3.0, 0.6, 60.0):
        check_loss("ssd", preds, targets, 1e-11, neg_to_pos_ratio=ratio, loss_type="l1")


def check_blocks() -> None:
    """Few anchors a program, so that most rows do not meet a block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense_plan, "MATCH_BLOCK", 16)
        for kind in ("retinanet", "fcos"):
            check_loss(kind, dense_preds(kind, 1, torch.float64), dense_targets(kind, 1, n=12), 1e-11)


def check_ssd_classes() -> None:
    """An object of the background is none."""
    targets = dense_targets("ssd", 1)
    targets[0]["labels"][0] = 0
    check_loss("ssd", dense_preds("ssd", 1, torch.float64), targets, 1e-11)


def check_far_object() -> None:
    """An object that meets no anchor takes the first one."""
    targets = [{"boxes": torch.tensor([[500.0, 500, 510, 510]]), "labels": torch.tensor([1])}]
    check_loss("ssd", dense_preds("ssd", 1, torch.float64), targets, 1e-11)


def check_fcos() -> None:
    preds, targets = dense_preds("fcos", 3, torch.float64), dense_targets("fcos", 3, n=12, side=60.0)
    check_loss("fcos", preds, targets, 1e-11)


def check_weighed_fcos() -> None:
    preds, targets = dense_preds("fcos", 2, torch.float64), dense_targets("fcos", 2, n=6, side=60.0)
    check_loss("fcos", preds, targets, 1e-11, box_weight="centreness")


def check_boxes() -> None:
    for kind in ("iou", "giou", "diou", "ciou"):
        check_box_term(kind)


def check_labels() -> None:
    check_label_term("bce", [])
    check_label_term("focal", [-1.0, 0.0])
    for gamma in (0.5, 1.0, 1.25, 1.5, 2.0):
        check_label_term("focal", [0.25, gamma])
    check_label_term("bce", [], torch.float32)


def check_longer_boxes() -> None:
    for kind in ("eiou", "siou", "mpdiou", "ciou_plus"):
        check_box_term(kind)


def check_powers() -> None:
    check_box_term("giou", shape=(1.0, 0.5))
    check_box_term("eiou", shape=(3.0, 1.0))
    check_box_term("diou", shape=(0.75, 0.0))


def check_qualities() -> None:
    check_label_term("bce", [2.5])
    check_label_term("focal", [0.25, 1.5, 2.5])
    for kind in ("qfl", "varifocal"):
        check_label_term(kind, [0.25, 0.5])
        check_label_term(kind, [-1.0, 2.0])
    check_label_term("sse", [])


# ---- broken functions: the same signatures, one thing wrong

# their modules' names are those that are replaced
mpdiou, softmax_ce, real_side_share = box.mpdiou, label.softmax_ce, box._side_share
real_best_anchor, real_row_cell = assign.best_anchor, assign.row_cell
real_box_term, real_iou, real_picked = grid_box.box_term, listing.iou, positives._picked
real_rank, real_in_order, real_add_up = listing._rank, positives._in_order, positives._add_up
real_label_of_each, real_column_weights = positives._label_of_each, positives._column_weights
real_height, real_dynamic_k, real_cost = choose._height, choose.dynamic_k, choose.cost
real_prediction_at, real_class_costs = choose.prediction_at, offer.class_costs
real_window, real_meet_in_windows = ignore._window, ignore._meet_in_windows


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
def power_999(q, exponent):
    return 0.999 * primitives.pow_pos(q, exponent)


@triton.jit
def overlap_clamped(x):
    return tl.maximum(x.size + tl.minimum(x.before, 0.0) + tl.minimum(x.behind, 0.0), 1e-3)


@triton.jit
def enclose_of_first(x):
    return x.size + tl.maximum(x.before, 0.0)


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
def valid_anywhere(row, first_image, last_image, classes, limit):
    image, label_, cx, cy, w, h = row
    known = (image >= first_image) & (image < last_image) & (label_ >= 0) & (label_ < classes)
    return known & (w > 0) & (h > 0) & (cx >= 0) & (cx <= 1) & (cy >= 0) & (cy < limit) & (w < float("inf"))


@triton.jit
def best_anchor_only(w, h, site, thresh, PER_LEVEL: tl.constexpr):
    return real_best_anchor(w, h, site, 1.0, PER_LEVEL)


@triton.jit
def ratio_inclusive(w, h, site, thresh, PER_LEVEL: tl.constexpr):
    rw = w / site.own_w
    rh = h / site.own_h
    return tl.maximum(tl.maximum(rw, 1.0 / rw), tl.maximum(rh, 1.0 / rh)) <= thresh


@triton.jit
def ratio_of_larger_rows(w, h, site, thresh, PER_LEVEL: tl.constexpr):
    return tl.maximum(w / site.own_w, h / site.own_h) < thresh


@triton.jit
def _neighbour(cx, cy, valid, kind, W, H, NEIGHBOURS, AT_MOST_HALF, NEXT_TO_BORDER, CLAMPED):
    """``assign.row_cell`` with three switches."""
    gx = tl.where(valid, cx, 0.0) * W
    gy = tl.where(valid, cy, 0.0) * H
    if NEIGHBOURS:
        along = tl.where((kind == 1) | (kind == 3), gx, gy)
        along = tl.where(kind >= 3, tl.where(kind == 3, W - gx, H - gy), along)
        near = along - tl.floor(along) < 0.5
        if AT_MOST_HALF:
            near = near | (along - tl.floor(along) == 0.5)
        if not NEXT_TO_BORDER:
            near = near & (along > 1.0)
        valid = valid & ((kind == 0) | near)
        gx -= tl.where(kind == 1, 0.5, tl.where(kind == 3, -0.5, 0.0))
        gy -= tl.where(kind == 2, 0.5, tl.where(kind == 4, -0.5, 0.0))
    i = gx.to(tl.int32)
    j = gy.to(tl.int32)
    if CLAMPED:
        i = tl.minimum(i, W - 1)
        j = tl.minimum(j, H - 1)
    return tl.where(valid, j * W + i, -1)


@triton.jit
def cell_at_most_half_away(cx, cy, valid, kind, W, H, NEIGHBOURS: tl.constexpr):
    return _neighbour(cx, cy, valid, kind, W, H, NEIGHBOURS, True, False, True)


@triton.jit
def cell_beyond_the_border(cx, cy, valid, kind, W, H, NEIGHBOURS: tl.constexpr):
    return _neighbour(cx, cy, valid, kind, W, H, NEIGHBOURS, False, True, True)


@triton.jit
def cell_not_clamped(cx, cy, valid, kind, W, H, NEIGHBOURS: tl.constexpr):
    return _neighbour(cx, cy, valid, kind, W, H, NEIGHBOURS, False, False, False)


@triton.jit
def cell_of_no_neighbour(cx, cy, valid, kind, W, H, NEIGHBOURS: tl.constexpr):
    return tl.where(kind == 0, real_row_cell(cx, cy, valid, 0, W, H, False), -1)


@triton.jit
def picked_with_one_row(slot, found, lists, site, SPEC: tl.constexpr):
    cell, first, count = real_picked(slot, found, lists, site, SPEC)
    return cell, first, tl.minimum(count, 1)


@triton.jit
def picked_with_the_next_ones_row(slot, found, lists, site, SPEC: tl.constexpr):
    cell, first, count = real_picked(slot, found, lists, site, SPEC)
    return cell, first, tl.where(slot + 1 < found.picks, count + 1, count)


@triton.jit
def ordered_backwards(local, taken, SPEC: tl.constexpr):
    """Of a cell's rows in a block the first one becomes the last to count."""
    lane = tl.arange(0, SPEC.ROWS)
    cell = tl.where(taken, local, -1)
    same = (cell[:, None] == local[None, :]) & (lane[:, None] > lane[None, :])
    return tl.sum(same.to(tl.int32), axis=0)


@triton.jit
def ranked_backwards(lists, start, count, place, most):
    return count - 1 - real_rank(lists, start, count, place, most)


@triton.jit
def first_row_trains_objectness(r, slots, found, lists, SPEC: tl.constexpr):
    cell, slot, opens, closes, slots = real_in_order(r, slots, found, lists, SPEC)
    return cell, slot, closes, opens, slots


@triton.jit
def each_class_once(z, times, is_class, count, rows, k, head, terms, SPEC: tl.constexpr):
    return real_label_of_each(z, tl.minimum(times, 1.0), is_class, count, rows, k, head, terms, SPEC=SPEC)


@triton.jit
def weights_of_the_class_before(rows, k, is_class, ACC):
    return real_column_weights(rows, tl.maximum(k - 1, 5), is_class, ACC)


@triton.jit
def shape_just_like_enough(w, h, site, thresh, PER_LEVEL):
    inter = tl.minimum(w, site.own_w) * tl.minimum(h, site.own_h)
    return inter / (w * h + site.own_w * site.own_h - inter) >= thresh


@triton.jit
def summed_without_the_first(found, lists, kept_ptr, site, head, SPEC: tl.constexpr):
    real_add_up(found, lists._replace(spread_ptr=lists.spread_ptr + 4), kept_ptr, site, head, SPEC)


@triton.jit
def window_without_reach(row, true, site, head, SPEC: tl.constexpr):
    """As if centres could not be apart."""
    return real_window(row, true, site, head._replace(reach=0.0), SPEC)


@triton.jit
def windows_of_a_quarter(true, area, window, most, lists, site, head, SPEC: tl.constexpr):
    real_meet_in_windows(true, area, window, most // 4, lists, site, head, SPEC)


@triton.jit
def windows_of_one_line(true, area, window, most, lists, site, head, SPEC: tl.constexpr):
    wide = ignore.Window(window.first, window.width * 0 + SPEC.CELLS, window.cells)
    real_meet_in_windows(true, area, wide, most, lists, site, head, SPEC)


@triton.jit
def prior_of_nobody(logits, site, head, terms, SPEC: tl.constexpr):
    none = 0.0 * logits[0]
    return none, (none, none, none, none)


@triton.jit
def similarity_below_zero(logits, true, site, head, terms, QUALITY: tl.constexpr, SPEC: tl.constexpr):
    loss, d, _similarity = real_box_term(logits, true, site, head, terms, QUALITY, SPEC)
    return loss, d, 1.0 - loss


@triton.jit
def iou_half(p, q, p_area, q_area, QUOTIENT: tl.constexpr):
    return 0.5 * real_iou(p, q, p_area, q_area, QUOTIENT)


@triton.jit
def sign_of_zero(d):
    return tl.where(d >= 0, 1.0, -1.0)


@triton.jit
def share_without_eps(d, c, eps):
    r = primitives.safe_div(d, c)
    return r * r, primitives.safe_div(2.0 * r, c), primitives.safe_div(-2.0 * r * r, c)


@triton.jit
def share_of_a_constant(d, c, eps):
    r = primitives.safe_div(d, c)
    k = 1.0 / (1.0 + primitives.safe_div(primitives.safe_div(eps, c), c))
    return r * r * k, primitives.safe_div(2.0 * r * k, c), 0.0 * r


@triton.jit
def share_999(d, c, eps):
    r = primitives.safe_div(d, c)
    k = 1.0 / (1.0 + primitives.safe_div(primitives.safe_div(eps, c), c))
    q = r * r * k
    return q, primitives.safe_div(2.0 * r * k, c) * 0.999, primitives.safe_div(-2.0 * q * k, c)


@triton.jit
def misfit_squared(p, g):
    longer = tl.maximum(p, g)
    w = primitives.safe_div(tl.abs(p - g), longer)
    c = 1.0 - tl.exp(-w)
    s = primitives.sign(p - g) - w * primitives.step(p - g)
    return c * c, 2.0 * c * tl.exp(-w) * primitives.safe_div(s, longer)


@triton.jit
def misfit_over_a_constant(p, g):
    longer = tl.maximum(p, g)
    c = 1.0 - tl.exp(-primitives.safe_div(tl.abs(p - g), longer))
    return c * c * c * c, 4.0 * c * c * c * (1.0 - c) * primitives.safe_div(primitives.sign(p - g), longer)


@triton.jit
def side_share_twice(x, eps, inv):
    q, ends, by_size = real_side_share(x, eps, inv)
    return 2.0 * q, box._Ends(2.0 * ends.first, 2.0 * ends.last), 2.0 * by_size


@triton.jit
def side_share_signed(x, eps, inv):
    q, ends, by_size = real_side_share(x, eps, inv)
    return q, ends, -by_size


@triton.jit
def aspect_of_the_other_sign(w, h, turn, alpha):
    side = tl.maximum(tl.abs(w), tl.abs(h))
    a = primitives.safe_div(w, side)
    b = primitives.safe_div(h, side)
    k = primitives.safe_div(tl.abs(alpha) * 0.8105694691387022 * turn, (a * a + b * b) * side)
    return tl.abs(alpha) * (0.4052847345693511 * turn * turn), -(k * b), k * a


@triton.jit
def siou_without_angle(x, y, args, extent):
    numbers = box._Numbers(*args)
    x, y, inv = box._normalise(x, y)
    eps = box._scaled_eps(numbers.eps, inv)
    rx, rx_d, rx_c = box._share(0.5 * (x.before - x.behind), box._enclose(x), eps)
    ry, ry_d, ry_c = box._share(0.5 * (y.before - y.behind), box._enclose(y), eps)
    tx = tl.exp(-2.0 * rx)
    ty = tl.exp(-2.0 * ry)
    w, dw = box._misfit(x.size, x.true_size)
    h, dh = box._misfit(y.size, y.true_size)
    step = primitives.step
    by_x = box._Ends(tx * (0.5 * rx_d - rx_c * step(-x.before)), tx * (0.5 * rx_d + rx_c * step(-x.behind)))
    by_y = box._Ends(ty * (0.5 * ry_d - ry_c * step(-y.before)), ty * (0.5 * ry_d + ry_c * step(-y.behind)))
    penalty = box._Penalty(0.5 * (2.0 - tx - ty + w + h), by_x, by_y, 0.5 * dw * inv, 0.5 * dh * inv)
    return box._compose(box._overlap(x, y, eps), (penalty,), 1, inv, numbers)


@triton.jit
def mpdiou_of_a_square(x, y, args, extent):
    return mpdiou(x, y, args, (extent[0], extent[0]))


@triton.jit
def mpdiou_999(x, y, args, extent):
    loss, by_x, by_y = mpdiou(x, y, args, extent)
    return loss, Span(by_x.centre * 0.999, by_x.size), by_y


@triton.jit
def power_of_value_only(q, numbers):
    if numbers.alpha is not None:
        raised = primitives.pow_pos(q, numbers.alpha)
    else:
        raised = q
    return raised, 1.0


@triton.jit
def power_without_first(q, numbers):
    if numbers.alpha is not None:
        raised = primitives.pow_pos(q, numbers.alpha)
        slope = numbers.alpha * primitives.safe_div(raised, q)
    else:
        raised = q
        slope = 1.0
    return raised, slope


@triton.jit
def width_too(levels, ACC):
    return real_height(levels, ACC) * 1.5


@triton.jit
def picked_by_the_first(g, chosen, entry, M, offers):
    tl.atomic_min(offers.row_ptr + entry, g, mask=chosen, sem="relaxed")


@triton.jit
def one_each(most, none, COUNT, ACC):
    return real_dynamic_k(most, none, COUNT, ACC) * 0 + 1


@triton.jit
def best_of_all(key, n, count, none):
    return key > none


@triton.jit
def cost_of_classes_alone(shared, cls, obj, overlap):
    return real_cost(shared, cls, obj, overlap * 0.0 + 1.0)


@triton.jit
def anchor_of_the_first(maps, levels, image, level, anchor, x, y):
    return real_prediction_at(maps, levels, image, level, anchor * 0, x, y)


@triton.jit
def class_costs_forgotten(at, obj, mask, step, C, ACROSS, ACC):
    return real_class_costs(at, obj, mask, step, C, ACROSS, ACC) * 0.0


@triton.jit
def pow_zero_at_zero(q, g):
    return tl.where(q > 0, tl.exp(g * tl.log(tl.where(q > 0, q, 1.0))), 0.0)


@triton.jit
def pow_of_twice(q, g):
    return tl.where(q > 0, tl.exp(2.0 * g * tl.log(tl.where(q > 0, q, 1.0))), tl.where(g == 0, 1.0, 0.0))


@triton.jit
def bce_weight_on_all(x, t, args):
    p, q, e = primitives.logistic(x)
    loss = tl.maximum(x, 0.0) - x * t + primitives.log1p_of_share(e)
    d_x = p * (1.0 - t) - q * t
    if len(args) == 1:
        loss = loss * args[0]
        d_x = d_x * args[0]
    return loss, d_x


@triton.jit
def focal_weight_forgotten(x, t, args):
    return label.bce(x, t, ())


@triton.jit
def balance_swapped(t, alpha):
    return tl.where(alpha >= 0, (1.0 - alpha) * t + alpha * (1.0 - t), 1.0)


@triton.jit
def qfl_held(x, t, args):
    ce, miss = label.bce(x, t, ())
    w = label._balance(t, args[0]) * label._raised(tl.abs(miss), args[1])
    return w * ce, w * miss


@triton.jit
def qfl_unsigned(x, t, args):
    ce, miss = label.bce(x, t, ())
    p, r, _e = primitives.logistic(x)
    w = label._balance(t, args[0]) * label._raised(tl.abs(miss), args[1])
    return w * ce, w * miss + args[1].exponent * primitives.safe_div(w, tl.abs(miss)) * (p * r) * ce


@triton.jit
def varifocal_held(x, t, args):
    ce, d_ce = label.bce(x, t, ())
    p, _r, _e = primitives.logistic(x)
    w = tl.where(t > 0, t, tl.where(args[0] >= 0, args[0], 1.0) * label._raised(p, args[1]))
    return w * ce, w * d_ce


@triton.jit
def varifocal_of_all(x, t, args):
    ce, d_ce = label.bce(x, t, ())
    p, r, _e = primitives.logistic(x)
    w = tl.where(args[0] >= 0, args[0], 1.0) * label._raised(p, args[1])
    return w * ce, w * d_ce + args[1].exponent * w * r * ce


@triton.jit
def sse_half(x, t, args):
    p, q, _e = primitives.logistic(x)
    miss = p * (1.0 - t) - q * t
    return 0.5 * miss * miss, miss * (p * q)


@triton.jit
def sse_naive(x, t, args):
    p = tl.sigmoid(x)
    return (p - t) * (p - t), 2.0 * (p - t) * p * (1.0 - p)


@triton.jit
def softmax_naive(x, t, args):
    z = x - tl.max(x, axis=-1, keep_dims=True)
    p = tl.exp(z) / tl.sum(tl.exp(z), axis=-1, keep_dims=True)
    return -t * tl.log(tl.maximum(p, 1e-30)), p * tl.sum(t, axis=-1, keep_dims=True) - t


@triton.jit
def softmax_of_one_target(x, t, args):
    loss, d_x = softmax_ce(x, t, args)
    p = tl.exp(x - tl.max(x, axis=-1, keep_dims=True))
    p = p / tl.sum(p, axis=-1, keep_dims=True)
    return loss, d_x + p * (1.0 - tl.sum(t, axis=-1, keep_dims=True))


@triton.jit
def softmax_of_all_rows(x, t, args):
    z = x - tl.max(x)
    e = tl.exp(z)
    s = tl.sum(e)
    return -t * (z - tl.log(s)), e / s * tl.sum(t) - t


@triton.jit
def iou_of_areas_off(p, q, p_area, q_area, QUOTIENT):
    return real_match_iou(p, q, p_area, q_area, QUOTIENT) * 0.5


@triton.jit
def first_key_of_nobody(key):
    return tl.where(key == 0, -1, by_iou.LOWEST.value - (key & 0xFFFFFFFF)).to(tl.int32)


@triton.jit
def corners_of_any_class(row, first_image, last_image, classes, size, CORNERS, ACC):
    return real_row_corners(row, first_image, last_image, (0, 100), size, CORNERS, ACC)


@triton.jit
def centreness_squared(anchor, true):
    c = real_centreness(anchor, true)
    return c * c


@triton.jit
def share_of_the_batch(found_ptr, b, B, BY_IMAGE, ACC):
    return real_share(found_ptr, b, B, False, ACC)


@triton.jit
def share_of_the_image(found_ptr, b, B, BY_IMAGE, ACC):
    return real_share(found_ptr, b, B, True, ACC)


@triton.jit
def weight_never_twice(ce, taken, position, picks_ptr):
    return tl.minimum(real_ranked_weight(ce, taken, position, picks_ptr), 1)


@triton.jit
def weight_of_positives(ce, taken, position, picks_ptr):
    return tl.where(taken >= 0, 1, 0)


@triton.jit
def cut_one_lower(own_bin, own_list, SPEC):
    return real_cut(rank.Bin(own_bin.number, own_bin.left + 1, own_bin.earlier, own_bin.all), own_list, SPEC)


@triton.jit
def bin_of_the_largest(counts, left):
    return real_bin_reached(counts, 1)


@triton.jit
def meets_inside(row, around):
    return (row.x1 > around.x1) & (row.x2 < around.x2) & (row.y1 > around.y1) & (row.y2 < around.y2)


@triton.jit
def reached_by_less(row, around_x, around_y, reach, low, high):
    return real_reached(row, around_x, around_y, 0.25 * reach, low, high)


@triton.jit
def delta_unclipped(a, b, anchor, stride, scale):
    w = anchor * tl.exp(b * scale)
    return Span(a * stride, w), Jacobian(stride, 0.0, 0.0, scale * w)


@triton.jit
def delta_slope_beyond_the_clip(a, b, anchor, stride, scale):
    span, _slopes = real_delta(a, b, anchor, stride, scale)
    return span, Jacobian(stride, 0.0, 0.0, scale * span.size)


@triton.jit
def ltrb_swapped(a, b, anchor, stride, scale):
    return real_ltrb(b, a, anchor, stride, scale)


@triton.jit
def smooth_without_its_bend(d, beta):
    return tl.abs(d) - 0.5 * beta, primitives.sign(d)


@triton.jit
def l1_of_the_centre(a, b, ta, tb, scale):
    return tl.abs(a - ta), primitives.sign(a - ta), primitives.sign(b - b)


real_match_iou, real_row_corners, real_centreness = by_iou.iou, rows.row_corners, place.centreness
real_share, real_ranked_weight, real_cut = taken.share, ranked._ranked_weight, rank._cut
real_bin_reached, real_reached = rank._reached, by_centre._reached
real_delta, real_ltrb = decode.delta, decode.ltrb


MUTANTS = [
    (choose, "_height", width_too, check_picking),
    (choose, "_pick", picked_by_the_first, check_picking),
    (choose, "dynamic_k", one_each, check_picking),
    (choose, "best_of", best_of_all, check_picking),
    (choose, "cost", cost_of_classes_alone, check_picking),
    (choose, "prediction_at", anchor_of_the_first, check_picking),
    (offer, "class_costs", class_costs_forgotten, check_picking),
    (by_iou, "iou", iou_of_areas_off, check_retinanet),
    (by_iou, "_meets", meets_inside, check_blocks),
    (by_centre, "_reached", reached_by_less, check_blocks),
    (blocks, "row_corners", corners_of_any_class, check_ssd_classes),
    (by_iou, "best_anchor_of", first_key_of_nobody, check_far_object),
    (classes, "share", share_of_the_batch, check_retinanet),
    (classes, "share", share_of_the_image, check_fcos),
    (dense_box, "share", share_of_the_batch, check_retinanet),
    (dense_box, "share", share_of_the_image, check_fcos),
    (dense_box, "centreness", centreness_squared, check_fcos),
    (by_centre, "centreness", centreness_squared, check_weighed_fcos),
    (ranked, "_ranked_weight", weight_never_twice, check_ssd),
    (ranked, "_ranked_weight", weight_of_positives, check_ssd),
    (rank, "_cut", cut_one_lower, check_ssd),
    (rank, "_reached", bin_of_the_largest, check_ssd),
    (decode, "delta", delta_unclipped, check_retinanet),
    (decode, "delta", delta_slope_beyond_the_clip, check_retinanet),
    (decode, "ltrb", ltrb_swapped, check_fcos),
    (offset, "_smooth", smooth_without_its_bend, check_retinanet),
    (offset, "l1", l1_of_the_centre, check_ssd),
    (box, "step", step_inclusive, check_boxes),
    (box, "step", step_zero_at_tie, check_boxes),
    (box, "angle", angle_of_first_octant, check_boxes),
    (box, "safe_div", safe_div_off, check_boxes),
    (box, "_shared", overlap_clamped, check_boxes),
    (box, "_enclose", enclose_of_first, check_boxes),
    (box, "_scaled_eps", no_scaled_eps, check_boxes),
    (label, "log1p_of_share", log1p_naive, check_labels),
    (label, "pow_pos", pow_of_twice, check_labels),
    (label, "bce", bce_sign, check_labels),
    (label, "bce", bce_sign, check_small_grid),
    (label, "bce", bce_999, check_small_grid),
    (label, "bce", bce_naive_log, check_small_grid),
    (decode, "scaled_sigmoid", sensitive_without_shift, check_small_grid),
    (decode, "scaled_sigmoid", sensitive_without_scaled_slope, check_small_grid),
    (offset, "scaled_sigmoid", sensitive_without_shift, check_small_grid),
    (offset, "bce", bce_999, check_small_grid),
    (listing, "row_valid", valid_anywhere, check_small_grid),
    (assign, "best_anchor", best_anchor_only, check_small_grid),
    (positives, "_picked", picked_with_one_row, check_small_grid),
    (positives, "_picked", picked_with_the_next_ones_row, check_small_grid),
    (ignore, "_window", window_without_reach, check_strips),
    (ignore, "_window", window_without_reach, check_crowd),
    (ignore, "_meet_in_windows", windows_of_a_quarter, check_crowd),
    (ignore, "_meet_in_windows", windows_of_one_line, check_crowd),
    (listing, "row_cell", cell_at_most_half_away, check_ratio_grid),
    (listing, "row_cell", cell_beyond_the_border, check_ratio_grid),
    (listing, "row_cell", cell_not_clamped, check_ratio_grid),
    (listing, "row_cell", cell_of_no_neighbour, check_ratio_grid),
    (assign, "shape_iou", shape_just_like_enough, check_shape_grid),
    (positives, "_column_weights", weights_of_the_class_before, check_weighed_grid),
    (assign, "ratio", ratio_inclusive, check_ratio_grid),
    (assign, "ratio", ratio_of_larger_rows, check_ratio_grid),
    (listing, "_before", ordered_backwards, check_ratio_grid),
    (listing, "_rank", ranked_backwards, check_crowd),
    (positives, "_in_order", first_row_trains_objectness, check_ratio_grid),
    (positives, "_label_of_each", each_class_once, check_crowd),
    (positives, "_add_up", summed_without_the_first, check_ratio_grid),
    (positives, "box_term", similarity_below_zero, check_ratio_grid),
    (grid_loss, "prior_term", prior_of_nobody, check_prior_grid),
    (listing, "iou", iou_half, check_band_grid),
    (primitives, "safe_div", safe_div_off, check_boxes),
    (box, "step", step_inclusive, check_longer_boxes),
    (box, "step", step_zero_at_tie, check_longer_boxes),
    (box, "sign", sign_of_zero, check_longer_boxes),
    (box, "_share", share_without_eps, check_longer_boxes),
    (box, "_share", share_of_a_constant, check_longer_boxes),
    (box, "_share", share_999, check_longer_boxes),
    (box, "_misfit", misfit_squared, check_longer_boxes),
    (box, "_misfit", misfit_over_a_constant, check_longer_boxes),
    (box, "_side_share", side_share_twice, check_longer_boxes),
    (box, "_side_share", side_share_signed, check_longer_boxes),
    (box, "_aspect", aspect_of_the_other_sign, check_longer_boxes),
    (box, "siou", siou_without_angle, check_longer_boxes),
    (box, "mpdiou", mpdiou_of_a_square, check_longer_boxes),
    (box, "mpdiou", mpdiou_999, check_longer_boxes),
    (box, "_power", power_of_value_only, check_powers),
    (box, "_power", power_without_first, check_powers),
    (box, "pow_pos", pow_zero_at_zero, check_powers),
    (box, "pow_pos", pow_of_twice, check_powers),
    (label, "bce", bce_weight_on_all, check_qualities),
    (label, "_weighted_bce", focal_weight_forgotten, check_qualities),
    (label, "_balance", balance_swapped, check_qualities),
    (label, "qfl", qfl_held, check_qualities),
    (label, "qfl", qfl_unsigned, check_qualities),
    (label, "varifocal", varifocal_held, check_qualities),
    (label, "varifocal", varifocal_of_all, check_qualities),
    (label, "sse", sse_half, check_qualities),
    (label, "sse", sse_naive, check_qualities),
    (label, "softmax_ce", softmax_naive, check_row_term),
    (label, "softmax_ce", softmax_of_one_target, check_row_term),
    (label, "softmax_ce", softmax_of_all_rows, check_row_term),
    (label, "log1p", log1p_naive, check_row_term),
]


CHECKS = [
    check_boxes, check_labels, check_small_grid, check_longer_boxes, check_powers, check_qualities, check_row_term,
    check_ratio_grid, check_strips, check_crowd, check_prior_grid, check_focal_grid, check_band_grid, check_retinanet,
    check_ssd, check_ssd_classes, check_far_object, check_fcos, check_blocks, check_picking,
]  # fmt: skip


def forget() -> None:
    ops.forget_plans()
    for constants in (grid_ops._parts, dense_plan._row):
        constants.cache_clear()


@pytest.fixture
def fresh_constants():
    """Launches look their functions up anew, and leave no broken one behind."""
    forget()
    yield
    forget()


@pytest.mark.parametrize("check", CHECKS)
def test_the_real_functions_pass(check):
    check()


@pytest.mark.parametrize(
    ("module", "name", "broken", "check"),
    MUTANTS,
    ids=[f"{m.__name__.split('.')[-1]}-{b.__name__}" for m, _, b, _ in MUTANTS],
)
def test_a_broken_function_is_caught(module, name, broken, check, monkeypatch, fresh_constants):
    monkeypatch.setattr(module, name, broken)
    if name in grid_ops._MATCH:
        monkeypatch.setitem(grid_ops._MATCH, name, broken)
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("exponent", label._POWERS)
@pytest.mark.parametrize("check", [check_labels, check_focal_grid])
def test_a_wrong_power_is_caught(exponent, check, monkeypatch, fresh_constants):
    monkeypatch.setitem(label._POWERS, exponent, power_999)
    with pytest.raises(AssertionError):
        check()


def test_dense_heads_take_no_general_power(monkeypatch, fresh_constants):
    monkeypatch.setitem(label._POWERS, 2.0, power_999)
    with pytest.raises(AssertionError):
        check_retinanet()
