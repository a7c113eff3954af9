"""Images for `python -m bench train`: drawn when the user has none, loaded, cut into batches, and shown with boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from bench.objects import Annotation, pack

SHAPES = ("circle", "square", "triangle")
SHAPE_COLOURS = ("#d1495b", "#2e86ab", "#edae49", "#66a182", "#8d5a97")
CLASS_COLOURS = ("#e63946", "#0077b6", "#7b2cbf", "#2a9d8f", "#f77f00", "#bc4b51", "#3a5a40", "#b5179e")
REFERENCE, FUSED = "#1d3557", "#e76f51"


# -------------------------------------------------------------------------------------------------- making and loading


def generate(folder: Path, count: int, size: int, seed: int) -> None:
    """Write ``count`` images of coloured shapes, three classes of them, as a YOLO data set."""
    random = np.random.default_rng(seed)
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "classes.txt").write_text("\n".join(SHAPES) + "\n")
    for number in range(count):
        grain = random.normal(random.uniform(90, 220, 3), 12, (size // 4, size // 4, 3)).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(grain).resize((size, size), Image.Resampling.BICUBIC)
        draw, lines = ImageDraw.Draw(image), []
        for _ in range(random.integers(1, 8)):
            label = int(random.integers(len(SHAPES)))
            half = size * float(np.exp(random.uniform(math.log(0.04), math.log(0.2))))
            x, y = (float(v) for v in random.uniform(half, size - half, 2))
            colour = str(random.choice(SHAPE_COLOURS))
            if label == 0:
                draw.ellipse([x - half, y - half, x + half, y + half], fill=colour, outline="#222222")
            elif label == 1:
                draw.rectangle([x - half, y - half, x + half, y + half], fill=colour, outline="#222222")
            else:
                draw.polygon(
                    [(x, y - half), (x - half, y + half), (x + half, y + half)], fill=colour, outline="#222222"
                )
            lines.append(f"{label} {x / size:.6f} {y / size:.6f} {2 * half / size:.6f} {2 * half / size:.6f}\n")
        image.filter(ImageFilter.GaussianBlur(0.5)).save(folder / f"images/{number:04d}.jpg", quality=90)
        (folder / f"labels/{number:04d}.txt").write_text("".join(lines))


@dataclass
class Pictures:
    """Letterboxed images, uint8 [N, 3, S, S], and their annotations, whose boxes are relative to the square."""

    pixels: Tensor
    annotations: list[Annotation]

    def batch(self, step: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Images [B, 3, S, S] and packed rows of a step; half the images are mirrored. A function of its arguments."""
        count = len(self.annotations)
        places = torch.arange(step * size, (step + 1) * size)
        orders = {e: torch.randperm(count, generator=_generator(seed, e)) for e in (places // count).unique().tolist()}
        picks = torch.stack([orders[int(p) // count][int(p) % count] for p in places])
        mirrored = torch.rand(size, generator=_generator(seed, -1 - step)) < 0.5
        pixels, rows = self.pixels[picks], pack([self.annotations[i] for i in picks.tolist()])
        pixels[mirrored] = pixels[mirrored].flip(3)
        rows[:, 2] = torch.where(mirrored[rows[:, 0].long()], 1 - rows[:, 2], rows[:, 2])
        return pixels, rows


def load(annotations: Sequence[Annotation], size: int) -> Pictures:
    """Read the annotated images, fitted into squares of ``size`` pixels on grey."""
    pixels, moved = [], []
    for annotation in annotations:
        image = Image.open(annotation.image).convert("RGB")
        scale = size / max(image.size)
        fitted = image.resize([max(1, round(scale * side)) for side in image.size], Image.Resampling.BILINEAR)
        square = Image.new("RGB", (size, size), (114, 114, 114))
        square.paste(fitted, [(size - side) // 2 for side in fitted.size])
        pixels.append(torch.from_numpy(np.array(square)).permute(2, 0, 1))
        fraction = torch.tensor(fitted.size).repeat(2) / size
        border = torch.tensor([(size - side) // 2 for side in fitted.size] + [0, 0]) / size
        boxes = annotation.boxes * fraction + border
        moved.append(Annotation(annotation.image, size, size, boxes, annotation.classes))
    return Pictures(torch.stack(pixels), moved)


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + number)


# ----------------------------------------------------------------------------------------------------------- showing


def draw_predictions(
    path: Path, pictures: Pictures, detections: Sequence[list], names: Sequence[str], title: str
) -> None:
    """A grid of images with detections (class, score, corners in pixels), and the true boxes dashed in white."""
    columns = min(3, len(detections))
    rows = math.ceil(len(detections) / columns)
    figure = Figure(figsize=(5.2 * columns, 4.2 * rows + 0.5), layout="constrained")
    for place, (annotation, found) in enumerate(zip(pictures.annotations, detections, strict=False)):
        image = Image.open(annotation.image).convert("RGB")
        scale = max(image.size) / annotation.width  # from the square back to the file
        border = np.array([(max(image.size) - side) / 2 for side in image.size])
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.imshow(image)
        axes.axis("off")
        axes.set_title(f"{len(found)} found, {len(annotation.boxes)} annotated", fontsize=9)
        for cx, cy, w, h in (annotation.boxes * annotation.width * scale).tolist():
            corner = np.array([cx - w / 2, cy - h / 2]) - border
            axes.add_patch(Rectangle(corner, w, h, fill=False, edgecolor="white", linewidth=1.1, linestyle=(0, (3, 2))))
        for label, score, corners in found:
            colour = CLASS_COLOURS[label % len(CLASS_COLOURS)]
            low, high = np.array(corners[:2]) * scale - border, np.array(corners[2:]) * scale - border
            axes.add_patch(Rectangle(low, *(high - low), fill=False, edgecolor=colour, linewidth=1.6))
            text = f"{names[label]} {score:.2f}"
            box = {"facecolor": colour, "edgecolor": "none", "pad": 0.8}
            axes.text(*low, text, fontsize=6, color="white", va="bottom", bbox=box, clip_on=True)
        axes.set_xlim(0, image.width)
        axes.set_ylim(image.height, 0)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)


def draw_curves(path: Path, reference: list[dict], fused: list[dict], difference: list[float], bound: float) -> None:
    """Loss curves of both backends on one another, their parts, and the relative difference of the totals."""
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    grid = figure.add_gridspec(3, 3)
    panels = {"total": figure.add_subplot(grid[:2, :2]), "difference": figure.add_subplot(grid[2, :2])}
    panels |= {part: figure.add_subplot(grid[k, 2]) for k, part in enumerate(("box", "obj", "cls"))}
    for part in ("total", "box", "obj", "cls"):
        axes = panels[part]
        axes.plot([step[part] for step in reference], color=REFERENCE, linewidth=1, label="eager reference")
        marks = {"marker": "o", "markersize": 3, "markerfacecolor": "none", "markeredgewidth": 0.8}
        marks = marks if len(fused) <= 100 else {}
        axes.plot(
            [step[part] for step in fused], color=FUSED, linewidth=1, linestyle=(0, (2, 2)), label="fused", **marks
        )
        axes.set_yscale("log")
        axes.set_title("loss an image" if part == "total" else part, fontsize=9)
    panels["total"].legend(frameon=False)
    panels["difference"].semilogy(difference, color=FUSED, linewidth=1, marker=".", markersize=4)
    panels["difference"].axhline(bound, color="grey", linewidth=0.8, linestyle=":")
    panels["difference"].set_title(f"relative difference of the totals, and its bound {bound:g}", fontsize=9)
    panels["difference"].set_xlabel("step")
    for axes in panels.values():
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
