"""Targets on the edge of a rule: kernels and the reference decide alike. Also run as compiled code, see test_compiled.

Each test holds many cases, an image each, so that few kernels are compiled.
"""

import pytest
import torch
from conftest import DEVICE
from fusedyolo.kernels.launch import grid_config

import fusedyolo
from fusedyolo import functional

IMAGE = 320.0


def rows_of(images):
    """Packed rows of images that each hold (class, cx, cy, w, h) in pixels."""
    rows = [(b, c, *(v / IMAGE for v in box)) for b, image in enumerate(images) for c, *box in image]
    return torch.tensor(rows, device=DEVICE)


def only(preds):
    return preds[0]


def agree(make, preds, targets, form=tuple, **call):
    """Total, parts, counts and gradients of kernels and reference, image by image; the loss takes ``form(preds)``."""
    found = {}
    for backend in ("torch", "triton"):
        leaves = [pred.to(DEVICE).clone().requires_grad_() for pred in preds]
        out = make(backend)(form(leaves), targets, **call)
        out.total.backward()
        found[backend] = out, [leaf.grad for leaf in leaves]
    (want, want_grads), (got, grads) = found["torch"], found["triton"]
    for name in ("num_pos", "num_invalid"):
        assert int(getattr(got, name)) == int(getattr(want, name)), name
    for a, b in ((got.total, want.total), *zip(got.parts.values(), want.parts.values(), strict=True)):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-5, atol=1e-6)
    for a, b in zip(grads, want_grads, strict=True):
        off = ((a - b).abs().flatten(1).amax(1) > 1e-5 * b.abs().max()).nonzero().flatten().tolist()
        assert not off, f"gradients of images {off}"
    return found


def centres_and_sides():
    """Of a head with anchors of 10 by 13 and 32 by 16 on cells of 16 pixels."""
    images = [
        [(1, 192.0, 100.3, 12.0, 12.0)],  # a centre on the border of two cells
        [(1, 216.0, 100.3, 12.0, 12.0), (2, 225.3, 101.0, 14.0, 10.0)],  # in the middle of one, another object next
        [(0, 160.0, 160.0, 10.0, 13.0)] * 2,  # on a corner of four cells, twice
        [(0, 168.0, 168.0, 10.0, 13.0), (2, 168.0, 168.0, 20.0, 26.0), (1, 168.0, 168.0, 10.0, 13.0)],  # one middle
        [(0, 319.99999, 319.99999, 10.0, 13.0), (1, 0.0, 0.0, 10.0, 13.0)],  # the first and the last cell
        [(0, 8.0, 16.0, 10.0, 13.0), (1, 312.0, 304.0, 10.0, 13.0)],  # half a cell and one cell from the border
        [(0, 100.5, 100.0, 40.0, 20.0)],  # a side of four anchors
        [(0, 100.5, 100.0, 2.5, 20.0)],  # a quarter of one
        [(0, 100.5, 100.0, 20.0, 52.0)],
        [(0, 100.5, 100.0, 39.999996, 51.999996)],  # a little less
        [(0, 40.0, 120.0, 64.0, 16.0)],  # twice an anchor in the middle of a cell: an IoU of a half
        [(0, 40.0, 120.0, 32.0, 32.0)],
        [],
    ]
    for step in range(3):  # whole and half pixels
        images.append([(k % 3, 37.0 + 20.5 * k + 0.5 * step, 300.0 - 16.5 * k - step, 12.0, 14.0) for k in range(5)])
    return images


def grid(kind, images, preds):
    options = {"YOLOv5Loss": {}, "YOLOv4Loss": {"iou_thresh": 0.5, "ignore_thresh": 0.5, "scale_x_y": 1.0}}[kind]

    def make(backend):
        return getattr(fusedyolo, kind)([[(10, 13), (32, 16)]], [16], 3, backend=backend, **options)

    agree(make, [preds], rows_of(images), list)


@pytest.mark.parametrize("kind", ["YOLOv5Loss", "YOLOv4Loss"])
def test_grid(kind):
    images = centres_and_sides()
    preds = torch.randn(len(images), 16, 20, 20, generator=torch.Generator().manual_seed(0))
    preds[10:12].view(2, 2, 8, 20, 20)[:, :, :4] = 0.0  # boxes are their anchors, in the middle of their cells
    grid(kind, images, preds)


@pytest.mark.parametrize(("kind", "cells"), [("YOLOv5Loss", 5), ("YOLOv4Loss", 1)])
def test_grid_of_a_block_of_candidates(kind, cells):
    """Images whose candidates, so many ``cells`` a row, are one block or a block for some of the cells of each row, and
    of a row more; whose rows are more than that; many rows on a cell, and none.
    """
    lanes = grid_config(20 * 20, True, 4).rows
    counts = [count + more for kinds in range(1, cells + 1) for count in (lanes // kinds,) for more in (0, 1)]
    images = []
    for count, apart in ((0, 1.0), *((count, apart) for count in counts for apart in (6.25, 0.5))):
        images.append([(k % 3, 20.0 + apart * (k % 40), 30.0 + 41.0 * (k // 40), 12.0, 14.0) for k in range(count)])
    grid(kind, images, torch.randn(len(images), 16, 20, 20, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("kind", ["YOLOv5Loss", "YOLOv4Loss"])
def test_thresholds(kind):
    """Quotients of sides that are a threshold, also where the plain quotient of a GPU is off by its two ulp."""
    images = centres_and_sides()[6:12]
    grid(kind, images, torch.randn(len(images), 16, 20, 20, generator=torch.Generator().manual_seed(0)))


def test_anchors_of_equal_overlap():
    """Of two anchors turned by a right angle a square takes the first; of two rows in a cell the last."""
    images = [[(0, 100.0, 100.0, 24.0, 24.0)], [(1, 50.5, 60.0, 12.0, 12.0), (2, 52.0, 62.5, 12.0, 12.0)], []]
    preds = torch.randn(3, 16, 10, 10, generator=torch.Generator().manual_seed(1))

    def make(backend):
        return fusedyolo.YOLOv2Loss([(0.5, 1.0), (1.0, 0.5)], 3, recipe="region", backend=backend)

    agree(make, [preds], rows_of(images), only)


def test_equal_boxes_of_a_cell():
    """YOLOv1: two boxes that are the same, that are mirrored, and whose IoU are all 0."""
    pred = 0.1 * torch.rand(4, 7, 7, 13, generator=torch.Generator().manual_seed(2))
    pred[0, 3, 3, :10] = torch.tensor([0.5, 0.5, 0.4, 0.4, 0.3] * 2)
    pred[1, 3, 3, :10] = torch.tensor([0.25, 0.5, 0.5, 0.5, 0.3, 0.75, 0.5, 0.5, 0.5, 0.4])
    pred[2, 3, 3, :10] = torch.tensor([0.25, 0.5, 1e-3, 1e-3, 0.3, 0.75, 0.5, 1e-3, 1e-3, 0.4])
    images = [[(1, 160.0, 160.0, 80.0, 80.0)], [(1, 160.0, 160.0, 64.0, 64.0)], [(0, 150.0, 150.0, 1.0, 1.0)] * 2, []]

    def make(backend):
        return fusedyolo.YOLOv1Loss(3, backend=backend)

    agree(make, [pred], rows_of(images), only)


def anchor_images():
    """Boxes, by corners in pixels, of images with anchors of 32 pixels that begin at multiples of 16."""
    return [
        [[32.0, 32.0, 64.0, 64.0]] * 2,  # an anchor, twice
        [[40.0, 40.0, 56.0, 56.0]],  # as near to four of them
        [[32.0, 32.0, 64.0, 48.0]],  # an IoU of a half
        [[32.0, 32.0, 64.0, 44.8]],  # of 0.4
        [[48.0, 48.0, 80.0, 80.0], [32.0, 32.0, 64.0, 64.0], [40.0, 32.0, 72.0, 64.0]],  # equal rows
        [[300.0, 300.0, 310.0, 310.0]],  # meets no anchor
        [],
    ]


@pytest.mark.parametrize("kind", ["RetinaNetLoss", "SSDLoss", "FCOSLoss"])
def test_anchors(kind):
    corner = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="xy"), -1).reshape(-1, 2) * 16
    anchors = torch.cat((corner, corner + 32), 1).to(DEVICE)
    targets = [
        {
            "boxes": torch.tensor(boxes, device=DEVICE).reshape(-1, 4),
            "labels": torch.ones(len(boxes), dtype=torch.int64, device=DEVICE),
        }
        for boxes in anchor_images()
    ]
    generator = torch.Generator().manual_seed(3)
    B, N = len(targets), len(anchors)
    preds = [torch.randn(B, N, 3, generator=generator), torch.rand(B, N, 4, generator=generator)]
    if kind == "SSDLoss":  # many negatives are as hard as each other
        preds[0] = preds[0].mul(2).round().div(2)
    if kind == "FCOSLoss":
        preds.append(torch.randn(B, N, 1, generator=generator))

    def make(backend):
        return getattr(fusedyolo, kind)(3, backend=backend)

    agree(make, preds, targets, anchors=anchors, num_anchors_per_level=[N], image_size=320)


def test_select():
    """Equal scores, boxes that are the same, and an IoU equal to the threshold, which does not suppress."""
    anchors = [[(16, 16), (16, 32)]]
    preds = torch.full((2, 14, 8, 8), -8.0)
    view = preds.view(2, 2, 7, 8, 8)
    view[:, :, :4] = 0.0
    view[0, :, 4:, 2, 3] = 3.0  # one centre, IoU 1 / 2
    view[0, 0, 4:, 5, 1:3] = 3.0
    view[1, 0, 4:, :4] = 2.0
    preds = preds.to(DEVICE)
    found = {}
    for backend in ("torch", "triton"):
        criterion = fusedyolo.YOLOv3Loss(anchors, [8], 2, backend=backend)
        found[backend] = fusedyolo.select(preds, criterion, conf=0.25, iou=0.5, max_det=20).images()
    for got, want in zip(found["triton"], found["torch"], strict=True):
        assert len(want["scores"])
        assert torch.equal(got["labels"], want["labels"])
        torch.testing.assert_close(got["boxes"], want["boxes"])
        torch.testing.assert_close(got["scores"], want["scores"])


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_functional(reduction):
    """Logits in their tails and at 0, and boxes that share edges, touch, or have no area."""
    x = torch.tensor([0.0, 17.0, 40.0, 88.75, 120.0, 1e4]).repeat_interleave(3)
    x, t = torch.cat((x, -x)).to(DEVICE), torch.tensor([0.0, 1.0, 0.3]).repeat(12).to(DEVICE)
    spans = [(0.0, 0.0), (0.0, 1.0), (0.0, 2.0), (1.0, 2.0), (2.0, 3.0)]
    boxes = 0.7 * torch.tensor([(x1, y1, x2, y2) for x1, x2 in spans for y1, y2 in spans], device=DEVICE)
    p, g = boxes.repeat_interleave(len(boxes), 0), boxes.repeat(len(boxes), 1)
    around = torch.maximum(p[:, 2:], g[:, 2:]) - torch.minimum(p[:, :2], g[:, :2])
    p, g = (box[(around > 0).all(1)] for box in (p, g))  # else eps is all that a rounding is divided by
    for name, first, second in (
        ("sigmoid_focal_loss", x, t),
        ("generalized_box_iou_loss", p, g),
        ("complete_box_iou_loss", p, g),
    ):
        found = {}
        for backend in ("torch", "triton"):
            leaf = first.clone().requires_grad_()
            value = getattr(functional, name)(leaf, second, reduction=reduction, backend=backend)
            value.sum().backward()
            found[backend] = value.detach(), leaf.grad
        for got, want in zip(found["triton"], found["torch"], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


OFFSETS = {
    "beyond the rows": [0, 2, 5_000_000, 5_000_000],
    "negative": [-7, 2, -3, 4],
    "not in order": [3, 1, 4, 4],
    "another image's": [0, 1, 4, 4],
    "capacity": [0, 2, 3, 3],
    "the largest": [2**31 - 1, 2**31 - 1, 2**31 - 1, 2**31 - 1],
    "the smallest": [-(2**31)] * 4,
}
WRONG = {"beyond the rows": 2, "negative": 2 + 2, "not in order": 1 + 2, "another image's": 1, "capacity": 0}


@pytest.mark.parametrize("kind", ["YOLOv5Loss", "YOLOv1Loss", "RetinaNetLoss"])
def test_offsets_that_are_wrong(kind):
    """They reach no memory that is not there; both backends use the same rows, and count the same."""
    rows = torch.tensor(
        [[0, 1, 0.3, 0.4, 0.1, 0.1], [0, 2, 0.6, 0.7, 0.2, 0.1], [1, 0, 0.2, 0.8, 0.1, 0.2], [1, 1, 0.7, 0.2, 0.1, 0.1]]
    ).to(DEVICE)
    generator = torch.Generator().manual_seed(5)
    call, form, counted = {}, tuple, {}
    if kind == "YOLOv5Loss":
        preds, form = [torch.randn(2, 16, 8, 8, generator=generator)], list
    elif kind == "YOLOv1Loss":
        preds, form = [torch.rand(2, 7, 7, 13, generator=generator)], only
    else:
        preds = [torch.randn(2, 64, 3, generator=generator), torch.randn(2, 64, 4, generator=generator)]
        corner = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="xy"), -1).reshape(-1, 2)
        call = {"anchors": torch.cat((8 * corner, 8 * corner + 8), 1).to(DEVICE), "image_size": 64}

    def make(backend):
        if kind == "YOLOv5Loss":
            return fusedyolo.YOLOv5Loss([[(10, 13), (6, 6)]], [8], 3, backend=backend)
        return getattr(fusedyolo, kind)(3, backend=backend)

    for name, offsets in OFFSETS.items():
        targets = fusedyolo.Targets(rows, torch.tensor(offsets, dtype=torch.int32, device=DEVICE), 2)
        counted[name] = int(agree(make, preds, targets, form, **call)["triton"][0].num_invalid)
    assert {name: counted[name] for name in WRONG} == WRONG
