"""An assignment drawn over its image. Needs matplotlib, which ``fusedyolo[bench]`` installs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import checks
from .assignment import Assignment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#e63946", "#0077b6", "#2a9d8f", "#f77f00", "#7b2cbf", "#bc4b51", "#3a5a40", "#b5179e")
IGNORED = "#6c757d"


def draw_assignment(image: Any, assignment: Assignment, index: int = 0, names: Sequence[str] | None = None) -> Figure:
    """True boxes, positive cells and their anchors over an image, a panel for each prediction map.

    An object has one colour everywhere: its box (thick), the cells whose predictions answer for it (filled), and their
    anchors (thin, around the middle of the cell). Cells with a prediction that is ignored are crossed.

    Args:
        image: what matplotlib shows: a PIL image, an array ``[H, W, 3]``, or a tensor ``[3, H, W]``, uint8 or in
            0 ... 1.
        assignment: of :func:`fusedyolo.assign`, on this image among others.
        index: which image of the batch it is.
        names: of the classes, for captions.

    Returns:
        A matplotlib figure; ``figure.savefig("assignment.png")`` writes it.

    Raises:
        ValueError: there is no such image in the batch.
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("draw_assignment needs matplotlib: pip install 'fusedyolo[bench]'") from error
    batch = assignment.levels[0].row.shape[0]
    if not 0 <= index < batch:
        checks.fail("index", index, f"0 <= index < {batch}, the images of the batch")
    pixels = _pixels(image)
    height = 5.4 * pixels.shape[0] / pixels.shape[1] + 0.6
    figure = Figure(figsize=(5.4 * len(assignment.levels), height), layout="constrained")
    for level, stride in enumerate(assignment.strides):
        axes = figure.add_subplot(1, len(assignment.levels), level + 1)
        axes.imshow(pixels, extent=_extent(assignment, level), alpha=0.75)
        axes.axis("off")
        positive = _draw_level(axes, assignment, level, index, names)
        axes.set_title(f"stride {stride:g}: {positive} positive", fontsize=9)
    return figure


def _pixels(image: Any) -> np.ndarray:
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = image.float().numpy() if image.is_floating_point() else image.numpy()
        return np.moveaxis(image, 0, -1)
    return np.asarray(image)


def _extent(assignment: Assignment, level: int) -> tuple[float, float, float, float]:
    """The image in the pixels of the predictions, whatever its own size."""
    height, width = (side * assignment.strides[level] for side in assignment.levels[level].row.shape[2:])
    return 0, width, height, 0


def _draw_level(axes: Any, assignment: Assignment, level: int, index: int, names: Sequence[str] | None) -> int:
    """The boxes of an image, and what a level makes of them; the number of its positive predictions."""
    from matplotlib.patches import Rectangle

    found, stride, anchors = assignment.levels[level], assignment.strides[level], assignment.anchors[level]
    _, width, height, _ = _extent(assignment, level)
    for y, x in found.ignored[index].any(0).nonzero().tolist():
        axes.plot((x + 0.5) * stride, (y + 0.5) * stride, "x", color=IGNORED, markersize=3, markeredgewidth=0.6)
    cells = set()
    for a, y, x in (found.row[index] >= 0).nonzero().tolist():
        colour = COLOURS[int(found.row[index, a, y, x]) % len(COLOURS)]
        w, h = anchors[a]
        corner = (x + 0.5) * stride - w / 2, (y + 0.5) * stride - h / 2
        axes.add_patch(Rectangle(corner, w, h, fill=False, edgecolor=colour, linewidth=0.6, alpha=0.4))
        if (y, x, colour) not in cells:
            axes.add_patch(Rectangle((x * stride, y * stride), stride, stride, facecolor=colour, alpha=0.45))
        cells.add((y, x, colour))
    own = assignment.valid & (assignment.rows[:, 0].nan_to_num(-1).to(torch.int64) == index)
    for g in own.nonzero().flatten().tolist():
        _, label, cx, cy, w, h = assignment.rows[g].tolist()
        colour = COLOURS[g % len(COLOURS)]
        corner = (cx - w / 2) * width, (cy - h / 2) * height
        axes.add_patch(Rectangle(corner, w * width, h * height, fill=False, edgecolor=colour, linewidth=2))
        axes.plot(cx * width, cy * height, "o", color=colour, markersize=3)
        if names is not None:
            style = {"facecolor": colour, "edgecolor": "none", "pad": 0.8}
            axes.text(*corner, names[int(label)], fontsize=6, color="white", va="bottom", bbox=style, clip_on=True)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    return int((found.row[index] >= 0).sum())
