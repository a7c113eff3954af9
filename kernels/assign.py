"""Which predictions a target row is assigned to: on loaded values, scalars or blocks; nothing is differentiated."""

import triton
import triton.language as tl


@triton.jit
def row_valid(row, first_image, last_image, classes):
    """All six finite, image and class in range, positive area, centre inside the image. NaN compares false.

    ``row`` is image, class, cx, cy, w, h; the image must lie in [first_image, last_image), the class in [0, classes).
    """
    image, label, cx, cy, w, h = row
    known = (image >= first_image) & (image < last_image) & (label >= 0) & (label < classes)
    area = (w > 0) & (w < float("inf")) & (h > 0) & (h < float("inf"))
    return known & area & (cx >= 0) & (cx < 1) & (cy >= 0) & (cy < 1)


@triton.jit
def row_cell(row, image, W, H, classes):
    """Flat index of the cell that holds the centre of a valid row of this image, -1 for any other row.

    Centres are multiplied in float32 as the peers do, whatever the compute type.
    """
    valid = row_valid(row, image, image + 1, classes)
    i = (tl.where(valid, row[2], 0.0) * W).to(tl.int32)
    j = (tl.where(valid, row[3], 0.0) * H).to(tl.int32)
    return tl.where(valid, j * W + i, -1)


@triton.jit
def anchor_assigned(w, h, own, anchors, iou_thresh):
    """Whether the row takes anchor ``own``: its best (the first of equals, IoU above 0), or one above iou_thresh.

    The IoU is that of two boxes with one centre; w and h in pixels, as ``anchors`` = (w0, h0, w1, h1, ...). An
    iou_thresh of 1 is never exceeded.
    """
    best = w * 0.0
    best_index = own * 0 - 1
    own_iou = best
    for t in tl.static_range(len(anchors) // 2):
        inter = tl.minimum(w, anchors[2 * t]) * tl.minimum(h, anchors[2 * t + 1])
        value = inter / (w * h + anchors[2 * t] * anchors[2 * t + 1] - inter)
        best_index = tl.where(value > best, t, best_index)
        best = tl.maximum(best, value)
        own_iou = tl.where(own == t, value, own_iou)
    return (best_index == own) | (own_iou > iou_thresh)
