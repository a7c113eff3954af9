"""Draws docs/data_flow.png: what goes from targets and predictions to a loss and its gradient, and through which code.

python docs/data_flow.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

DATA, CODE, LAUNCH = "#e8eef7", "#f4f4f4", "#fde9d0"
BOXES = {  # name: column, row, text, colour
    "targets": (0, 3, "targets\npacked, padded, list, Targets", DATA),
    "preds": (0, 1, "predictions\nany strides, never copied", DATA),
    "head": (0, 2, "head\na row of data: terms, numbers", DATA),
    "rows": (1, 3, "rows\n[M, 6] and offsets [B + 2], targets.py", DATA),
    "loss": (1, 2, "loss, driver\nlosses/, drivers/", CODE),
    "plan": (1, 1, "plan\nlaunches but for their tensors, ops/", CODE),
    "assign": (2, 3, "assignment\ndecided once: grid/assign, match, cells", LAUNCH),
    "forward": (2, 2, "loss\nof all, then of what is listed, in blocks", LAUNCH),
    "backward": (2, 1, "gradient\nevery entry stored once", LAUNCH),
    "lists": (3, 3, "lists\nprediction, row, order; only read", DATA),
    "output": (3, 2, "LossOutput\ntotal, parts, num_pos, num_invalid", DATA),
    "grads": (3, 1, "gradients\nof the predictions, times grad_output", DATA),
}
ARROWS = [
    ("targets", "rows", ""), ("head", "loss", ""), ("preds", "plan", "shapes,\nstrides"), ("loss", "plan", ""),
    ("rows", "assign", ""), ("assign", "lists", ""), ("lists", "forward", "read"), ("plan", "forward", "predictions"),
    ("forward", "output", "last program\nsums"), ("forward", "backward", "state, kept gradients"),
    ("backward", "grads", ""), ("output", "grads", "backward()"),
]  # fmt: skip
WIDTH, HEIGHT, STEP_X, STEP_Y = 3.3, 0.72, 4.6, 1.35


def corner(name: str) -> tuple[float, float]:
    """The lower left corner of a box."""
    column, row, _, _ = BOXES[name]
    return column * STEP_X, row * STEP_Y


def ends(start: str, end: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """Where an arrow leaves one box and meets the other."""
    (x0, y0), (x1, y1) = corner(start), corner(end)
    if x0 < x1:
        return (x0 + WIDTH, y0 + HEIGHT / 2), (x1, y1 + HEIGHT / 2)
    if x0 > x1:
        return (x0, y0 + HEIGHT / 4), (x1 + WIDTH, y1 + 3 * HEIGHT / 4)
    return (x0 + WIDTH / 2, y0), (x1 + WIDTH / 2, y1 + HEIGHT)


def main() -> None:
    """Draw it."""
    figure, axes = plt.subplots(figsize=(14.2, 4.7))
    for name, (_, _, text, colour) in BOXES.items():
        x, y = corner(name)
        style = "round,pad=0.06,rounding_size=0.1"
        axes.add_patch(FancyBboxPatch((x, y), WIDTH, HEIGHT, boxstyle=style, facecolor=colour, edgecolor="#555"))
        title, _, detail = text.partition("\n")
        axes.text(x + WIDTH / 2, y + 0.48, title, ha="center", va="center", fontsize=9.5, weight="bold")
        axes.text(x + WIDTH / 2, y + 0.2, detail, ha="center", va="center", fontsize=8)
    for start, end, text in ARROWS:
        a, b = ends(start, end)
        axes.add_patch(FancyArrowPatch(a, b, arrowstyle="-|>", mutation_scale=12, color="#333", shrinkA=4, shrinkB=4))
        if text:
            x, y = (a[0] + b[0]) / 2, (a[1] + b[1]) / 2 + 0.06
            upright = a[0] == b[0]
            axes.text(
                x + 0.08 * upright,
                y + 0.14 * (not upright),
                text,
                fontsize=7.5,
                va="center",
                ha="left" if upright else "center",
            )
    for colour, text, x in ((DATA, "data", 0), (CODE, "Python", 1.1), (LAUNCH, "kernels", 2.4)):
        axes.add_patch(
            FancyBboxPatch((x, 5.1), 0.25, 0.16, boxstyle="round,pad=0.02", facecolor=colour, edgecolor="#555")
        )
        axes.text(x + 0.38, 5.18, text, fontsize=8.5, va="center")
    axes.set_xlim(-0.2, 3 * STEP_X + WIDTH + 0.2)
    axes.set_ylim(1.1, 5.45)
    axes.axis("off")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
