"""An assignment drawn over its image. Needs matplotlib, which ``fusedyolo[bench]`` installs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import checks
from .assignment import AnchorAssignment, Assignment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#e63946", "#0077b6", "#2a9d8f", "#f77f00", "#7b2cbf", "#bc4b51", "#3a5a40", "#b5179e")
IGNORED = "#6c757d"


def draw_assignment(
    image: Any, assignment: Assignment | AnchorAssignment, index: int = 0, names: Sequence[str] | None = None
) -> Figure:
    """True boxes, positive cells and their anchors over an image, a panel for each prediction map.

    An object has one colour everywhere: its box (thick), the cells whose predictions answer for it (filled), and their
    anchors (thin, around the middle of the cell). Cells with a prediction that is ignored are crossed. Of a loss over
    anchors there is one panel, with boxes, positive anchors (thin) and the centres of those (dots) and of ignored ones
    (crosses).

    Args:
        image: what matplotlib shows: a PIL image, an array ``[H, W, 3]``, or a tensor ``[3, H, W]``, uint8 or in
            0 ... 1. For a loss over anchors, of the size that the anchors were made for.
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
    batch = len(assignment.row if isinstance(assignment, AnchorAssignment) else assignment.levels[0].row)
    if not 0 <= index < batch:
        checks.fail("index", index, f"0 <= index < {batch}, the images of the batch")
    pixels = _pixels(image)
    height = 5.4 * pixels.shape[0] / pixels.shape[1] + 0.6
    if isinstance(assignment, AnchorAssignment):
        figure = Figure(figsize=(8.1, 1.5 * height), layout="constrained")
        axes = figure.add_subplot()
        axes.imshow(pixels, extent=(0, pixels.shape[1], pixels.shape[0], 0), alpha=0.75)
        axes.axis("off")
        axes.set_title(f"{_draw_anchors(axes, assignment, index, names)} positive", fontsize=9)
        axes.set_xlim(0, pixels.shape[1])
        axes.set_ylim(pixels.shape[0], 0)
        return figure
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
    for g in _rows_of(assignment, index):
        _, label, cx, cy, w, h = assignment.rows[g].tolist()
        corner = (cx - w / 2) * width, (cy - h / 2) * height
        _draw_box(axes, g, corner, w * width, h * height, None if names is None else names[int(label)])
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    return int((found.row[index] >= 0).sum())


def _draw_anchors(axes: Any, found: AnchorAssignment, index: int, names: Sequence[str] | None) -> int:
    """The boxes of an image, and the anchors that take one; their number."""
    from matplotlib.patches import Rectangle

    centres = (found.anchors[:, :2] + found.anchors[:, 2:]) / 2
    for x, y in centres[found.ignored[index]].tolist():
        axes.plot(x, y, "x", color=IGNORED, markersize=3, markeredgewidth=0.6)
    positive = (found.row[index] >= 0).nonzero().flatten()
    for n in positive.tolist():
        colour = COLOURS[int(found.row[index, n]) % len(COLOURS)]
        x1, y1, x2, y2 = found.anchors[n].tolist()
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=0.6, alpha=0.4))
        axes.plot(*centres[n].tolist(), ".", color=colour, markersize=4)
    for g in _rows_of(found, index):
        x1, y1, x2, y2 = found.true_boxes[g].tolist()
        name = None if names is None else names[int(found.rows[g, 1])]
        _draw_box(axes, g, (x1, y1), x2 - x1, y2 - y1, name)
    return len(positive)


def _rows_of(assignment: Assignment | AnchorAssignment, index: int) -> list[int]:
    """The valid rows of an image."""
    own = assignment.valid & (assignment.rows[:, 0].nan_to_num(-1).to(torch.int64) == index)
    return own.nonzero().flatten().tolist()


def _draw_box(axes: Any, g: int, corner: tuple[float, float], w: float, h: float, name: str | None) -> None:
    """A true box with its centre, in the colour of its row."""
    from matplotlib.patches import Rectangle

    colour = COLOURS[g % len(COLOURS)]
    axes.add_patch(Rectangle(corner, w, h, fill=False, edgecolor=colour, linewidth=2))
    axes.plot(corner[0] + w / 2, corner[1] + h / 2, "o", color=colour, markersize=3)
    if name is not None:
        style = {"facecolor": colour, "edgecolor": "none", "pad": 0.8}
        axes.text(*corner, name, fontsize=6, color="white", va="bottom", bbox=style, clip_on=True)
