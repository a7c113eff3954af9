"""Images for ``bench train`` and ``bench assign``: drawn when the user has none, fitted into squares, in batches."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from fusedyolo.tools.registry import RefusedError
from fusedyolo.tools.terminal import asked

from .labels import Annotation, load_labels, pack

COLOURS = ("#d1495b", "#2e86ab", "#edae49", "#66a182", "#8d5a97")
SHAPES = ("circle", "square", "triangle")
GREY = (114, 114, 114)  # of what an image does not fill


def generate(folder: Path, count: int, size: int) -> None:
    """Write ``count`` images of coloured shapes, three classes of them, as a YOLO data set."""
    random = np.random.default_rng(0)
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "classes.txt").write_text("\n".join(SHAPES))
    for number in range(count):
        grain = random.integers(150, 230, (size // 4, size // 4, 3), dtype=np.uint8)
        image = Image.fromarray(grain).resize((size, size))
        draw, placed, lines = ImageDraw.Draw(image), [], []
        for _ in range(random.integers(1, 10)):
            half = size * math.exp(random.uniform(math.log(0.04), math.log(0.2)))
            x, y = random.uniform(half, size - half, 2).tolist()
            if any(max(abs(x - a), abs(y - b)) < 0.8 * (half + other) for a, b, other in placed):
                continue  # would hide it
            placed.append((x, y, half))
            label, colour = int(random.integers(len(SHAPES))), str(random.choice(COLOURS))
            box = x - half, y - half, x + half, y + half
            if SHAPES[label] == "circle":
                draw.ellipse(box, colour)
            elif SHAPES[label] == "square":
                draw.rectangle(box, colour)
            else:
                draw.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], colour)
            lines.append(f"{label} {x / size:.6f} {y / size:.6f} {2 * half / size:.6f} {2 * half / size:.6f}\n")
        image.save(folder / f"images/{number:04d}.jpg", quality=90)
        (folder / f"labels/{number:04d}.txt").write_text("".join(lines))


def annotated(options: argparse.Namespace, drawn: Path, count: int, size: int) -> tuple[list[Annotation], list[str]]:
    """What is annotated of a command's ``--images`` by its ``--labels``, and the names of the classes; of ``count``
    images drawn in the folder ``drawn`` where there are none.

    Raises:
        RefusedError: labels without images, labels that cannot be read, or no box in any image.
    """
    if options.labels and options.images is None:
        raise RefusedError("--images: missing, want the folder of the images that --labels are of")
    images = options.images or drawn
    with asked():
        if options.images is None:
            generate(images, count, size)
        annotations, names = load_labels(options.labels or images, images)
    found = [annotation for annotation in annotations if annotation.image]
    if not any(len(annotation.boxes) for annotation in found):
        raise RefusedError(f"images: {len(found)} of {len(annotations)} annotated ones are in {images}, with no boxes")
    return found, names


@dataclass
class Pictures:
    """Images fitted into squares, uint8 [N, 3, S, S], and their annotations, whose boxes are relative to the square."""

    pixels: torch.Tensor
    annotations: list[Annotation]

    def batch(self, step: int, size: int, seed: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Images [B, 3, S, S] in 0 ... 1 on the device, and packed rows, of a step: a function of its arguments."""
        generator = torch.Generator().manual_seed(seed + 7919 * step)
        picks = torch.randint(len(self.annotations), (size,), generator=generator)
        rows = pack([self.annotations[i] for i in picks.tolist()])
        return send(self.pixels[picks], device).float() / 255, rows


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device; from page-locked memory, so that the host need not wait for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def load(annotations: Sequence[Annotation], size: int) -> Pictures:
    """Read the annotated images, fitted into squares of ``size`` pixels on grey.

    Raises:
        RefusedError: one cannot be read.
    """
    pixels, moved = [], []
    for annotation in annotations:
        try:  # upright, as EXIF says and as labels are
            image = ImageOps.exif_transpose(Image.open(annotation.image)).convert("RGB")
        except (ImportError, OSError, SyntaxError, ValueError) as error:  # Ultralytics asks for another reader first
            raise RefusedError(f"images: {annotation.image}: {error}") from error
        pixels.append(torch.from_numpy(np.array(ImageOps.pad(image, (size, size), color=GREY))).permute(2, 0, 1))
        share = torch.tensor(image.size) / max(image.size)
        boxes = annotation.boxes * share.repeat(2)
        boxes[:, :2] += (1 - share) / 2
        moved.append(annotation._replace(boxes=boxes))
    return Pictures(torch.stack(pixels), moved)
