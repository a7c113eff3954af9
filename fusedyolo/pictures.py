"""An assignment drawn over its image. Needs matplotlib, which ``fusedyolo[bench]`` installs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from . import checks
from .drivers.assignments import AnchorAssignment, Assignment, Panel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#e63946", "#0077b6", "#2a9d8f", "#f77f00", "#7b2cbf", "#bc4b51", "#3a5a40", "#b5179e")
IGNORED = "#6c757d"
PICTURE = "a PIL image, an array [H, W, 3] or a tensor [3, H, W], uint8 or in 0 ... 1"
BRIGHTEST = 2.0  # of numbers that are clipped to 0 ... 1: beyond they are meant to be something else


def draw_assignment(
    image: Any,
    assignment: Assignment | AnchorAssignment,
    index: int = 0,
    names: Sequence[str] | Mapping[int, str] | None = None,
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
        names: of the classes, for captions; a class without one has its number.

    Returns:
        A matplotlib figure; ``figure.savefig("assignment.png")`` writes it.

    Raises:
        ValueError: no picture, no assignment, or no such image in its batch.
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("draw_assignment needs matplotlib: pip install 'fusedyolo[bench]'") from error
    if not isinstance(assignment, Assignment | AnchorAssignment):
        checks.fail("assignment", checks.describe(assignment), "what fusedyolo.assign returns")
    if not isinstance(index, Integral) or not 0 <= index < assignment.batch:
        checks.fail("index", checks.describe(index), f"0 <= index < {assignment.batch}, the images of the batch")
    pixels, panels = _pixels(image), assignment.panels(int(index))
    zoom = 1.5 if len(panels) == 1 else 1.0
    size = 5.4 * zoom * len(panels), zoom * (5.4 * pixels.shape[0] / pixels.shape[1] + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    for number, panel in enumerate(panels, 1):
        _draw(figure.add_subplot(1, len(panels), number), pixels, panel, names)
    return figure


def _pixels(image: Any) -> np.ndarray:
    """What matplotlib shows.

    Raises:
        ValueError: it would not.
    """
    pixels = image
    if isinstance(image, Tensor):
        pixels = image.detach().cpu()
        pixels = np.moveaxis((pixels.float() if pixels.is_floating_point() else pixels).numpy(), 0, -1)
    pixels = np.asarray(pixels)
    if pixels.dtype in (np.bool_, np.float16):  # of which matplotlib takes no colours
        pixels = pixels.astype(np.float32)
    if pixels.dtype.kind not in "uif" or pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (1,), (3,), (4,)):
        checks.fail("image", _described(image), PICTURE)
    if not pixels.size:
        checks.fail("image", _described(image), "at least one pixel")
    if pixels.shape[2:] > (1,) and pixels.dtype.kind == "f" and pixels.max() > BRIGHTEST:
        checks.fail("image", f"numbers up to {pixels.max():g}", PICTURE)
    return pixels


def _described(image: Any) -> str:
    return f"an array of shape {image.shape}" if isinstance(image, np.ndarray) else checks.describe(image)


def _name(names: Sequence[str] | Mapping[int, str], label: int) -> str:
    try:
        return names[label]
    except LookupError:
        return str(label)


def _draw(axes: Any, pixels: np.ndarray, panel: Panel, names: Sequence[str] | Mapping[int, str] | None) -> None:
    """One panel: the image in the pixels of the predictions, whatever its own size, and what there is to be seen."""
    from matplotlib.patches import Rectangle

    width, height = panel.size or (pixels.shape[1], pixels.shape[0])
    axes.imshow(pixels, extent=(0, width, height, 0), alpha=0.75)
    axes.axis("off")
    axes.set_title(f"{panel.title}{len(panel.positive)} positive", fontsize=9)
    for x, y in panel.ignored:
        axes.plot(x, y, "x", color=IGNORED, markersize=3, markeredgewidth=0.6)
    cells = set()
    for row, x, y, w, h in panel.positive:
        colour, side = COLOURS[row % len(COLOURS)], panel.cell
        corner = x - w / 2, y - h / 2
        axes.add_patch(Rectangle(corner, w, h, fill=False, edgecolor=colour, linewidth=0.6, alpha=0.4))
        if not side:
            axes.plot(x, y, ".", color=colour, markersize=4)
        elif (x, y, colour) not in cells:
            axes.add_patch(Rectangle((x - side / 2, y - side / 2), side, side, facecolor=colour, alpha=0.45))
        cells.add((x, y, colour))
    for row, label, x, y, w, h in panel.boxes:
        colour = COLOURS[row % len(COLOURS)]
        axes.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor=colour, linewidth=2))
        axes.plot(x + w / 2, y + h / 2, "o", color=colour, markersize=3)
        if names is not None:
            style = {"facecolor": colour, "edgecolor": "none", "pad": 0.8}
            axes.text(x, y, _name(names, label), fontsize=6, color="white", va="bottom", bbox=style, clip_on=True)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
