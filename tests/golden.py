"""Outputs recorded from other libraries' own code, in ``tests/goldens``, as our inputs and their answers.

``darknet``: AlexeyAB darknet 59596d78, CPU. ``delta`` is minus the gradient of the loss; for the IoU kinds its box
entries are no gradient of any loss. ``torch``: torchvision 0.28.0, ultralytics/yolov5 5081342f, ScaledYOLOv4 67680036
and lightnet 4.0.0 in float64 on float32 values.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedyolo.heads import GridHead

ROOT = Path(__file__).parent / "goldens"
IOU_LOSS = ("iou", "giou", "bce_mse", "diou", "ciou")  # darknet's codes


@dataclass(frozen=True)
class YoloGolden:
    """One darknet yolo layer on one batch."""

    head: GridHead
    logits: Tensor  # [B, A (5 + C), H, W] float32
    rows: Tensor  # [M, 6] float32
    class_weights: Tensor | None  # [C] float32
    delta: Tensor  # as logits
    terms: dict[str, float]  # scalar losses by an independent float64 program: obj, cls, and for mse kinds xy, wh
    layer: dict[str, Any]


def names(kind: str, pattern: str) -> list[str]:
    """Files of ``kind`` (a folder) that match ``pattern``, without the ending; never none."""
    found = sorted(path.stem for path in (ROOT / kind).glob(pattern + ".npz"))
    if not found:
        raise FileNotFoundError(f"no golden {kind}/{pattern}.npz under {ROOT}")
    return found


def canonical(maps: Tensor, anchors: int) -> Tensor:
    """``[B, A (5 + C), H, W]`` as a view ``[B, A, H, W, 5 + C]``."""
    return maps.unflatten(1, (anchors, -1)).permute(0, 1, 3, 4, 2)


def arrays(name: str) -> dict[str, Any]:
    """Arrays of a file in ``torch`` as tensors, and its ``meta``."""
    with np.load(ROOT / "torch" / f"{name}.npz") as data:
        arrays: dict[str, Any] = {key: torch.from_numpy(data[key]) for key in data.files if key != "meta"}
        return arrays | {"meta": json.loads(str(data["meta"]))}


@lru_cache
def _terms() -> dict[str, dict[str, float]]:
    return json.loads((ROOT / "darknet" / "terms.json").read_text())


def yolo(name: str) -> YoloGolden:
    """A darknet file with the head that its layer is."""
    with np.load(ROOT / "darknet" / f"{name}.npz") as data:
        layer = json.loads(str(data["hyper"]))["layer"]
        logits, delta = torch.from_numpy(data["logits"]), torch.from_numpy(data["delta"])
        rows = _rows(data["truths"])
    box = IOU_LOSS[layer["iou_loss"]]
    pos, neg = 1.0 - layer["label_smooth_eps"] / 2, layer["label_smooth_eps"] / 2
    head = GridHead(
        num_classes=layer["classes"],
        anchors=tuple(zip(layer["anchors"][::2], layer["anchors"][1::2], strict=True)),
        levels=(tuple(layer["mask"]),),
        strides=(layer["net_w"] / layer["w"],),
        scale_x_y=(layer["scale_x_y"],),
        box=box,
        unit="pixel" if box == "bce_mse" else "image",
        class_gate=math.log(0.25 / 0.75),
        average_box=layer["iou_thresh"] < 1,
        ignore_thresh=layer["ignore_thresh"],
        iou_thresh=layer["iou_thresh"],
        box_gain=layer["iou_normalizer"],
        obj_gain=layer["obj_normalizer"],
        noobj_gain=layer["obj_normalizer"],
        area_weight=1.0 if box == "bce_mse" else 0.0,
        class_targets=(pos, neg),
        first_weight=layer["cls_normalizer"],
        box_args=() if box == "bce_mse" else (0.0, 1e-6),
    )
    weights = torch.tensor(layer["classes_multipliers"]) if layer["has_classes_multipliers"] else None
    return YoloGolden(head, logits, rows, weights, delta, _terms().get(name, {}), layer)


def _rows(truths: np.ndarray) -> Tensor:
    """darknet's ``[B, max_boxes, 6]`` of x, y, w, h, class, track, a list that ends at the first x == 0, as our rows.

    Classes outside the range stay as they are: they make invalid rows, which darknet skips too.
    """
    rows = []
    for image, truth in enumerate(truths):
        for x, y, w, h, label, _track in truth:
            if x == 0:
                break
            rows.append((image, label, x, y, w, h))
    return torch.from_numpy(np.array(rows, dtype=np.float32).reshape(-1, 6))


@dataclass(frozen=True)
class LayerGolden:
    """One darknet layer on one batch, for a loss that makes its head itself."""

    logits: Tensor  # [B, A (5 + C), H, W] float32
    rows: Tensor  # [M, 6] float32
    delta: Tensor  # as logits, and by them
    terms: dict[str, float]  # scalar losses by an independent float64 program
    layer: dict[str, Any]
    anchors: list[tuple[float, float]]  # all of them, in the layer's unit
    stride: float


def layer(name: str) -> LayerGolden:
    """A darknet file of a region layer, or of a yolo layer."""
    with np.load(ROOT / "darknet" / f"{name}.npz") as data:
        fields = json.loads(str(data["hyper"]))["layer"]
        logits, rows = torch.from_numpy(data["logits"]), _rows(data["truths"])
        # behind a logistic convolution, darknet's delta is by the activation
        delta = torch.from_numpy(data["delta_logits" if "delta_logits" in data.files else "delta"])
    anchors = list(zip(fields["anchors"][::2], fields["anchors"][1::2], strict=True))
    return LayerGolden(logits, rows, delta, _terms()[name], fields, anchors, fields["net_w"] / fields["w"])


@dataclass(frozen=True)
class DetectionGolden:
    """One darknet detection layer on one batch."""

    logits: Tensor  # [B, S * S * (5n + C)] float32, darknet's flat order
    rows: Tensor  # [M, 6] float32
    delta: Tensor  # as logits
    responsible: np.ndarray  # [B, S * S] the box that answers for each cell's object, -1 without one
    terms: dict[str, float]  # scalar losses by an independent float64 program: box, conf, cls
    layer: dict[str, Any]


def detection(name: str) -> DetectionGolden:
    """A darknet file of a detection layer (YOLOv1)."""
    with np.load(ROOT / "darknet" / f"{name}.npz") as data:
        layer = json.loads(str(data["hyper"]))["layer"]
        logits, delta = torch.from_numpy(data["logits"]), torch.from_numpy(data["delta"])
        truths = data["truths"].reshape(len(logits), -1, 5 + layer["classes"])
        responsible = data["responsible_ref"]
    side, rows = layer["side"], []
    for image, cell in np.argwhere(truths[..., 0] != 0):
        one_hot, (x, y, w, h) = truths[image, cell, 1:-4], truths[image, cell, -4:].astype(np.float64)
        rows.append((image, one_hot.argmax(), (cell % side + x) / side, (cell // side + y) / side, w, h))
    table = torch.from_numpy(np.array(rows, dtype=np.float32).reshape(-1, 6))
    return DetectionGolden(logits, table, delta, responsible, _terms()[name], layer)
