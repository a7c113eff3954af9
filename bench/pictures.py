"""Images for `python -m bench train`: drawn when the user has none, loaded, cut into batches, and shown with boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor
from torch.nn import functional

from fusedyolo.tools.objects import Annotation, pack

SHAPES = ("circle", "square", "triangle")
SHAPE_COLOURS = ("#d1495b", "#2e86ab", "#edae49", "#66a182", "#8d5a97")
CLASS_COLOURS = ("#e63946", "#0077b6", "#7b2cbf", "#2a9d8f", "#f77f00", "#bc4b51", "#3a5a40", "#b5179e")
GREY = 114  # of what an image does not fill
REFERENCE, FUSED = "#1d3557", "#e76f51"
PHASE_COLOURS = ("#b8b8aa", "#8fb1cc", "#e76f51", "#45759c", "#1d3557")  # data, forward, loss, backward, optimiser


# -------------------------------------------------------------------------------------------------- making and loading


def generate(folder: Path, count: int, size: int, seed: int) -> None:
    """Write ``count`` images of coloured shapes, three classes of them, as a YOLO data set."""
    random = np.random.default_rng(seed)
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "classes.txt").write_text("\n".join(SHAPES) + "\n")
    for number in range(count):
        tint = random.uniform(150, 230) + random.uniform(-20, 20, 3)
        grain = random.normal(tint, 10, (size // 4, size // 4, 3)).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(grain).resize((size, size), Image.Resampling.BICUBIC)
        draw, placed, lines = ImageDraw.Draw(image), [], []
        for _ in range(random.integers(1, 10)):
            half = size * float(np.exp(random.uniform(math.log(0.04), math.log(0.2))))
            x, y = (float(v) for v in random.uniform(half, size - half, 2))
            if any(
                max(abs(x - other_x), abs(y - other_y)) < 0.8 * (half + other) for other_x, other_y, other in placed
            ):
                continue  # would hide it
            placed.append((x, y, half))
            label, colour = int(random.integers(len(SHAPES))), str(random.choice(SHAPE_COLOURS))
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

    def batch(self, step: int, size: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images [B, 3, S, S] on the device and packed rows of a step, augmented; a function of its arguments."""
        count = len(self.annotations)
        places = torch.arange(step * size, (step + 1) * size)
        orders = {e: torch.randperm(count, generator=_generator(seed, e)) for e in (places // count).unique().tolist()}
        picks = torch.stack([orders[int(p) // count][int(p) % count] for p in places])
        return augment(
            send(self.pixels[picks], device),
            pack([self.annotations[i] for i in picks.tolist()]),
            _generator(seed, -1 - step),
        )


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device; from page-locked memory, so that the host need not wait for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def augment(pixels: Tensor, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images scaled by 0.8 to 1.25, shifted by up to a sixth, half of them mirrored, and their rows."""
    count = len(pixels)
    zoom = torch.empty(count, 1).uniform_(0.8, 1.25, generator=generator)
    mirror = torch.where(torch.rand(count, 1, generator=generator) < 0.5, -1.0, 1.0)
    scale = zoom * torch.cat(
        [mirror, torch.ones(count, 1)], 1
    )  # place in the source = scale * place + shift, in -1 ... 1
    shift = torch.empty(count, 2).uniform_(-1 / 3, 1 / 3, generator=generator)
    theta = send(torch.cat([torch.diag_embed(scale), shift[:, :, None]], 2), pixels.device)
    places = functional.affine_grid(theta, pixels.shape, align_corners=False)
    images = functional.grid_sample(pixels.float() / 255 - GREY / 255, places, align_corners=False) + GREY / 255

    scale, shift = scale[rows[:, 0].long()], shift[rows[:, 0].long()]
    centre = ((2 * rows[:, 2:4] - 1 - shift) / scale + 1) / 2
    half = rows[:, 4:] / scale.abs() / 2
    low, high = (centre - half).clamp(0, 1), (centre + half).clamp(0, 1)
    seen = (high - low).prod(1) > 0.3 * (4 * half.prod(1))  # the rest lies mostly outside
    return images, torch.cat([rows[:, :2], (low + high) / 2, high - low], 1)[seen]


def load(annotations: Sequence[Annotation], size: int) -> Pictures:
    """Read the annotated images, fitted into squares of ``size`` pixels on grey."""
    pixels, moved = [], []
    for annotation in annotations:
        image = Image.open(annotation.image).convert("RGB")
        scale = size / max(image.size)
        fitted = image.resize([max(1, round(scale * side)) for side in image.size], Image.Resampling.BILINEAR)
        square = Image.new("RGB", (size, size), (GREY,) * 3)
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
    path: Path, pictures: Pictures, detections: Sequence[dict[str, Tensor]], names: Sequence[str], title: str
) -> None:
    """A grid of images with detections (``boxes``, ``scores``, ``labels``), and the true boxes dashed in white."""
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
        axes.set_title(f"{len(found['labels'])} found, {len(annotation.boxes)} annotated", fontsize=9)
        for cx, cy, w, h in (annotation.boxes * annotation.width * scale).tolist():
            corner = np.array([cx - w / 2, cy - h / 2]) - border
            axes.add_patch(Rectangle(corner, w, h, fill=False, edgecolor="white", linewidth=1.1, linestyle=(0, (3, 2))))
        for corners, score, label in zip(*(found[key].tolist() for key in ("boxes", "scores", "labels")), strict=True):
            colour = CLASS_COLOURS[label % len(CLASS_COLOURS)]
            low, high = np.array(corners[:2]) * scale - border, np.array(corners[2:]) * scale - border
            axes.add_patch(Rectangle(low, *(high - low), fill=False, edgecolor=colour, linewidth=1.6))
            text = f"{names[label]} {score:.2f}"
            box = {"facecolor": colour, "edgecolor": "none", "pad": 0.8}
            place = low[0], max(low[1], 0.03 * image.height)
            axes.text(*place, text, fontsize=6, color="white", va="bottom", bbox=box, clip_on=True)
        axes.set_xlim(0, image.width)
        axes.set_ylim(image.height, 0)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)


def draw_curves(
    path: Path, names: Sequence[str], runs: Sequence[Sequence[dict]], difference: Sequence[float], bound: float
) -> None:
    """Loss curves of both runs on one another, the fused loss last; its parts, and the relative difference of totals.

    A peer has no parts.
    """
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    grid = figure.add_gridspec(3, 3)
    steps, near = max(map(len, runs)), min(len(difference), 50)
    parts = [name for name in runs[-1][0] if name not in ("total", "positives")]
    column = grid[:, 2].subgridspec(len(parts), 1)
    panels = [("total", grid[:2, :2], "total", steps), (f"total, first {near} steps", grid[2, 0], "total", near)]
    panels += [(part, column[i], part, steps) for i, part in enumerate(parts)]
    for title, place, part, shown in panels:
        axes = _axes(figure.add_subplot(place), title)
        marker = "o" if min(shown, len(runs[-1])) <= 50 else ""
        dashed = {"linestyle": (0, (2, 2)), "marker": marker, "markersize": 4, "markerfacecolor": "none"}
        highest = 0.0
        for name, run, colour, style in zip(names, runs, (REFERENCE, FUSED), ({}, dashed), strict=True):
            if part in run[0]:
                values = [step[part] for step in run[:shown]]
                axes.plot(values, color=colour, linewidth=1, label=name, **style)
                highest = max(highest, *values)
        axes.set_xlim(-0.04 * shown, 1.04 * shown - 1)
        if shown > near and highest:
            axes.set_ylim(0, 1.08 * highest)
    figure.axes[0].legend(frameon=False)
    axes = _axes(figure.add_subplot(grid[2, 1]), f"relative difference (1e-9: none), bound {bound:g}")
    axes.semilogy([max(d, 1e-9) for d in difference], color=FUSED, linewidth=1, marker=".", markersize=4)
    axes.axhline(bound, color="grey", linewidth=0.8, linestyle=":")
    figure.savefig(path, dpi=110)


@dataclass
class Bar:
    """A step as it is drawn: seconds by phase, and what is written behind them."""

    name: str
    phases: dict[str, float]
    note: str
    untold: str = ""  # a phase whose time says nothing
    under: bool = False  # another clock of the bar above


def draw_steps(path: Path, title: str, bars: Sequence[Bar]) -> None:
    """Where a step goes: a bar for each clock of each run, stacked of its phases."""
    told = [sum(seconds for name, seconds in bar.phases.items() if name != bar.untold) for bar in bars]
    stub = 0.2 * max(told)  # instead of what says nothing
    span = max(total + stub * bool(bar.untold) for total, bar in zip(told, bars, strict=True))
    rows = np.cumsum([0.6 if bar.under else 1.0 for bar in bars])
    figure = Figure(figsize=(11, 1.4 + 0.55 * rows[-1]), layout="constrained")
    axes = _axes(figure.add_subplot(), "")
    for row, bar in zip(rows, bars, strict=True):
        left = _stack(axes, row, bar, stub, span)
        axes.text(left, row, f"  {bar.note}", va="center", fontsize=8 if bar.under else 9)
    axes.set_yticks(rows, [bar.name for bar in bars], fontsize=9)
    axes.set_ylim(rows[-1] + 0.5, 0.5)
    axes.set_xlim(0, 1.38 * span)
    axes.xaxis.set_major_locator(MaxNLocator(8))
    axes.xaxis.set_major_formatter(lambda seconds, _: f"{1e3 * seconds:g}")
    axes.set_xlabel("milliseconds of a step, median of each phase", fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")
    axes.set_axisbelow(True)
    keys = [Rectangle((0, 0), 1, 1, color=colour) for colour in PHASE_COLOURS]
    figure.legend(keys, list(bars[0].phases), loc="outside lower center", ncols=len(keys), frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)


def _stack(axes: Axes, row: float, bar: Bar, stub: float, span: float) -> float:
    """Draw the phases of a bar; where it ends."""
    left = 0.0
    for (name, seconds), colour in zip(bar.phases.items(), PHASE_COLOURS, strict=True):
        untold = name == bar.untold
        width, text = (stub, "?") if untold else (seconds, f"{1e3 * seconds:.3g}")
        style = {"hatch": "////", "alpha": 0.35} if untold else {"alpha": 0.75 if bar.under else 1.0}
        height = 0.36 if bar.under else 0.62
        axes.barh(row, width, height, left=left, color=colour, edgecolor="white", linewidth=0.8, **style)
        if width > 0.035 * span:
            style = {"fontsize": 7 if bar.under else 8.5, "color": "#222222" if untold else _ink(colour)}
            axes.text(left + width / 2, row, text, ha="center", va="center", **style)
        left += width
    return left


def _ink(colour: str) -> str:
    """Of a text on a colour."""
    red, green, blue = to_rgb(colour)
    return "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.6 else "#222222"


def _axes(axes: Axes, title: str) -> Axes:
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    return axes
