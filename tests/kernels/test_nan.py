"""A NaN among the predictions: it shows in the total where a loss reads it, and in no gradient but its prediction's.

Triton's interpreter and the emulator drop a NaN in ``tl.maximum`` and ``tl.minimum``, as GPUs do.
"""

import math

import pytest
import torch
from conftest import DEVICE

import fusedyolo

X, W, OBJ, CLASS = 0, 2, 4, 6  # channels of a prediction of a grid
ROWS = [[0, 1, 36 / 64, 36 / 64, 12 / 64, 12 / 64]]  # in cell (4, 4) of 8 by 8


def grid(kind, **options):
    """Predictions of one anchor on 8 by 8 cells; the second place has no object."""
    pred = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    places = {"object": (0, slice(None), 4, 4), "background": (0, slice(None), 1, 6)}

    def run(backend, preds):
        if kind == "YOLOv2Loss":
            loss = fusedyolo.YOLOv2Loss([(1.25, 1.6)], 3, 8, backend=backend, **options)
            return loss(preds[0], torch.tensor(ROWS, device=DEVICE))
        loss = getattr(fusedyolo, kind)([[(10, 13)]], [8], 3, backend=backend, **options)
        return loss(preds, torch.tensor(ROWS, device=DEVICE))

    return run, [pred], places


def anchors(kind, **options):
    """Predictions of 16 anchors, of which the sixth has an object."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="xy"), -1).reshape(-1, 2) * 8
    boxes = torch.cat((corner, corner + 16), 1).to(DEVICE)
    preds = [torch.randn(1, 16, 3, generator=generator), torch.rand(1, 16, 4, generator=generator)]
    if kind == "FCOSLoss":
        preds.append(torch.randn(1, 16, 1, generator=generator))

    def run(backend, preds):
        loss = getattr(fusedyolo, kind)(3, backend=backend, **options)
        targets = [{"boxes": boxes[5:6] + 1, "labels": torch.tensor([1], device=DEVICE)}]
        return loss(tuple(preds), targets, anchors=boxes, num_anchors_per_level=[16], image_size=48)

    return run, preds, {"object": (0, 5), "background": (0, 15)}


def cells():
    """YOLOv1: predictions of 7 by 7 cells with two boxes each."""
    pred = torch.rand(1, 7, 7, 13, generator=torch.Generator().manual_seed(0))

    def run(backend, preds):
        return fusedyolo.YOLOv1Loss(3, backend=backend)(preds[0], torch.tensor(ROWS, device=DEVICE))

    return run, [pred], {"object": (0, 3, 3), "background": (0, 1, 6)}


EVERYWHERE, OBJECT = ("object", "background"), ("object",)
CASES = {
    # what makes the predictions; of each tensor and channel the places where a NaN is read
    "YOLOv2/region": (grid("YOLOv2Loss", recipe="region"), {(0, X): EVERYWHERE, (0, OBJ): EVERYWHERE}),
    "YOLOv4": (grid("YOLOv4Loss"), {(0, X): EVERYWHERE, (0, W): EVERYWHERE, (0, OBJ): EVERYWHERE, (0, CLASS): OBJECT}),
    "YOLOv5": (grid("YOLOv5Loss"), {(0, X): OBJECT, (0, W): OBJECT, (0, OBJ): EVERYWHERE, (0, CLASS): OBJECT}),
    "YOLOv7": (grid("YOLOv7Loss"), {(0, X): OBJECT, (0, W): OBJECT}),  # with any other it is not picked
    "YOLOv5/giou": (grid("YOLOv5Loss", iou_loss="giou"), {(0, X): OBJECT, (0, W): OBJECT}),
    "YOLOv5/iou": (grid("YOLOv5Loss", iou_loss="iou"), {(0, X): OBJECT, (0, W): OBJECT}),
    "RetinaNet": (anchors("RetinaNetLoss"), {(0, 1): EVERYWHERE, (1, X): OBJECT, (1, W): OBJECT}),
    "RetinaNet/iou": (anchors("RetinaNetLoss", loss_type="iou"), {(1, X): OBJECT, (1, W): OBJECT}),
    "RetinaNet/giou": (anchors("RetinaNetLoss", loss_type="giou"), {(1, X): OBJECT, (1, W): OBJECT}),
    "RetinaNet/ciou": (anchors("RetinaNetLoss", loss_type="ciou"), {(1, X): OBJECT, (1, W): OBJECT}),
    "SSD": (anchors("SSDLoss"), {(0, 1): EVERYWHERE, (1, X): OBJECT, (1, W): OBJECT}),
    "FCOS": (anchors("FCOSLoss"), {(0, 1): EVERYWHERE, (1, X): OBJECT, (1, W): OBJECT, (2, 0): OBJECT}),
    "YOLOv1": (cells(), {(0, X): OBJECT, (0, 2): OBJECT, (0, 7): OBJECT, (0, 9): EVERYWHERE, (0, 11): OBJECT}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_nan_shows_where_it_is_read_and_stays_there(name):
    (run, clean, places), read = CASES[name]
    for (tensor, channel), where in read.items():
        for place, index in places.items():
            for backend in ("torch", "triton"):
                preds = [pred.clone() for pred in clean]
                preds[tensor][index][channel] = math.nan
                preds = [pred.to(DEVICE).requires_grad_() for pred in preds]
                out = run(backend, preds)
                out.total.backward()
                label = f"{backend}: NaN in channel {channel} of tensor {tensor} at the {place}"
                assert int(out.num_pos) > 0
                assert bool(out.total.isnan()) == (place in where), label
                for pred in preds:
                    others = pred.grad.clone()
                    others[index] = 0.0
                    assert others.isfinite().all(), label
