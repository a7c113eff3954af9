"""Which predictions a target row is assigned to. On loaded values, scalars or blocks of rows; nothing is differentiated."""

import triton
import triton.language as tl


@triton.jit
def row_valid(image, label, cx, cy, w, h, batch, classes):
    """All six finite, image and class in range, positive area, centre inside the image. NaN compares false."""
    inside = (cx >= 0) & (cx < 1) & (cy >= 0) & (cy < 1)
    area = (w > 0) & (w < float("inf")) & (h > 0) & (h < float("inf"))
    return inside & area & (image >= 0) & (image < batch) & (label >= 0) & (label < classes)


@triton.jit
def row_cell(cx, cy, W, H):
    """Flat index of the cell that holds the centre, multiplied in float32 as the peers do."""
    i = (cx.to(tl.float32) * W).to(tl.int32)
    j = (cy.to(tl.float32) * H).to(tl.int32)
    return j * W + i


@triton.jit
def shape_iou(w, h, aw, ah):
    """IoU of two boxes with one centre."""
    inter = tl.minimum(w, aw) * tl.minimum(h, ah)
    return inter / (w * h + aw * ah - inter)


@triton.jit
def anchor_assigned(w, h, own, anchors, iou_thresh):
    """Whether the row takes anchor ``own``: its best (the first of equals, IoU above 0), or one above iou_thresh.

    w and h in pixels, as ``anchors`` = (w0, h0, w1, h1, ...). An iou_thresh of 1 is never exceeded.
    """
    best = w * 0.0
    best_index = own * 0 - 1
    own_iou = best
    for t in tl.static_range(len(anchors) // 2):
        value = shape_iou(w, h, anchors[2 * t], anchors[2 * t + 1])
        best_index = tl.where(value > best, t, best_index)
        best = tl.maximum(best, value)
        own_iou = tl.where(own == t, value, own_iou)
    return (best_index == own) | (own_iou > iou_thresh)
