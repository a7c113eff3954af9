"""Selection of detections: launches of the scan over prediction maps and of NMS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import checks
from ..heads import GridHead
from ..kernels import select as kernels
from ..kernels.launch import power_of_two
from ..kernels.levels import Strides
from ..reference import grid_view
from ..reference.select import LOWEST_BIN, SCORE_BINS
from ..terms import TERMS
from .launch import Launch, float_parts, odd, run_all
from .strides import map_strides

MOST_PAIRS = 2**31 - 1  # indices are int32
SCAN_THREADS = NMS_THREADS = 256
COUNT_REGISTERS, MAX_REGISTERS = 128, 192  # left alone, ptxas stops at 64 or 128 and keeps a few words on the stack
NMS_BLOCK, NMS_CHUNK = 64, 16


@dataclass(frozen=True)
class Candidates:
    """Pairs that may become detections, K slots an image: scores [B, K] (0: none), boxes [B, K, 4], indices [B, K].

    Scores and boxes are float64, indices (prediction * C + class) int32.
    """

    scores: Tensor
    boxes: Tensor
    index: Tensor


def scan_launches(preds: Sequence[Tensor], head: GridHead, conf: float, limit: int) -> tuple[Candidates, list[Launch]]:
    """The launches that fill the candidates of an anchor-grid head, the best ``limit`` pairs of each image."""
    C = head.num_classes
    views = [grid_view(pred, len(own)) for pred, own in zip(preds, head.levels, strict=True)]
    strides = [map_strides(pred, 5 + C) for pred in preds]
    widths, cells = [view.shape[3] for view in views], [view.shape[2] * view.shape[3] for view in views]
    anchors = [len(own) for own in head.levels]
    batch = views[0].shape[0]
    pairs = C * sum(a * n for a, n in zip(anchors, cells, strict=True))
    if pairs > MOST_PAIRS:
        checks.fail("preds", f"{pairs} pairs of a prediction and a class", f"at most {MOST_PAIRS} an image")
    K = min(limit, pairs)
    block, classes = _tile(max(cells), C, all(by.column == 1 for by in strides))
    tiles = sum(a * -(-n // block) for a, n in zip(anchors, cells, strict=True))

    device = views[0].device
    # one fill for both; like the counts below they begin at multiples of 16 bytes, whatever the sizes: one variant
    zeros = torch.zeros(batch * (SCORE_BINS + 2 * K), dtype=torch.int32, device=device)
    histogram, scores = zeros[: batch * SCORE_BINS], zeros[batch * SCORE_BINS :].view(torch.float64).view(batch, K)
    boxes = torch.empty((batch, K, 4), dtype=torch.float64, device=device)
    index = torch.empty((batch, K), dtype=torch.int32, device=device)
    counts = torch.empty((3, -(-batch * tiles // 4) * 4), dtype=torch.int32, device=device)
    arguments = {
        "levels": kernels.Levels(
            raw_ptrs=tuple(preds),
            by=odd(tuple(strides)),
            Ws=odd(tuple(widths)),
            HWs=odd(tuple(cells)),
            anchors=tuple(tuple(side for t in own for side in head.anchors[t]) for own in head.levels),
            strides=head.strides,
            scales=head.scale_x_y,
        ),
        "bound": kernels.Bound(float_parts(conf), _below(conf), -1),
        "C": C,
        "T": tiles,
        "K": K,
        "counts": kernels.Counts(histogram, *counts, torch.empty(batch, dtype=torch.int32, device=device)),
        "slots": kernels.Slots(scores, boxes, index),
        "AXIS": TERMS[head.decode].kernel,
    }
    spec = kernels.ScanSpec(
        MODE="count",
        SOFTMAX=not TERMS[head.label].elementwise,
        NEAR=_near(strides, widths),
        CELLS=block,
        CLASSES=classes,
        LOWEST=LOWEST_BIN,
        BINS=SCORE_BINS,
        BLOCK=128,
    )
    modes = (("count", COUNT_REGISTERS), ("recount", COUNT_REGISTERS), ("write", MAX_REGISTERS))
    return Candidates(scores, boxes, index), [
        Launch(
            kernels.scan_kernel,
            (batch * tiles,),
            {**arguments, "SPEC": spec._replace(MODE=mode)},
            SCAN_THREADS,
            registers,
            exact=True,
        )
        for mode, registers in modes
    ]


def _near(strides: Sequence[Strides], widths: Sequence[int]) -> str | None:
    """Which neighbours lie next to each other in memory: all cells of a plane, the channels of a cell, or neither."""
    if all((by.row, by.column) == (width, 1) for by, width in zip(strides, widths, strict=True)):
        return "cells"
    return "channels" if all(by.channel == 1 for by in strides) else None


def _tile(largest_map: int, num_classes: int, cells_contiguous: bool) -> tuple[int, int]:
    """Cells and classes of a tile: wide along the axis in which neighbours are neighbours in memory."""
    if not cells_contiguous:
        return 32, min(32, power_of_two(num_classes))
    cells = 256
    while cells > 32 and cells >= 2 * largest_map:
        cells //= 2
    return cells, min(4, power_of_two(num_classes))


def _below(conf: float) -> float:
    """A bound in float32: any score above ``conf`` comes out above it when computed in float32 from rounded logits."""
    return conf * (1 - 1e-4) if conf > 1e-30 else 0.0


def nms_launch(
    found: Candidates,
    order: Tensor,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
    num_classes: int,
    iou: float,
    class_agnostic: bool,
) -> Launch:
    """NMS of candidates whose scores are in descending order and whose boxes and indices are in slots ``order``."""
    boxes, scores, labels, count = outputs
    batch, max_det = scores.shape
    arguments = {
        "slots": kernels.Slots(found.scores, found.boxes, found.index),
        "order_ptr": order,
        "kept_ptr": torch.empty((batch, max_det), dtype=torch.int32, device=scores.device),
        "found": kernels.Detections(boxes, scores, labels, count),
        "C": num_classes,
        "K": found.scores.shape[1],
        "max_det": max_det,
        "limit": float_parts(iou),
        "SPEC": kernels.NmsSpec(class_agnostic, NMS_BLOCK, NMS_CHUNK),
    }
    # exact: an IoU of 1 must not come out above 1
    return Launch(kernels.nms_kernel, (batch,), arguments, NMS_THREADS, MAX_REGISTERS, exact=True)


def scan(preds: Sequence[Tensor], head: GridHead, conf: float, limit: int) -> tuple[Candidates, Tensor]:
    """Candidates of an anchor-grid head with their scores in descending order, and the slots these come from."""
    found, launches = scan_launches(preds, head, conf, limit)
    run_all(launches, found.scores.device)
    scores, order = found.scores.sort(dim=1, descending=True, stable=True)
    return replace(found, scores=scores), order
