"""Where objects come from: label files on disk in three formats, and samplers that need no data."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
OTHER_TEXT = re.compile(r"(classes|train|val|test|trainval|readme.*)\.txt", re.I)  # beside labels, but not labels

YAML_NAMES = re.compile(r"^names:[ \t]*(\[[^\]]*\]|(?:\n[ \t]*(?:-|\d+[ \t]*:).*)+)", re.M)  # a list or a map of names


@dataclass
class Annotation:
    """The objects of one image: ``boxes`` float32 [G, 4] cx, cy, w, h relative to the image, ``classes`` int64 [G].

    ``image`` is None where the file is not at hand; width and height are then 0 if the labels do not name them.
    """

    image: Path | None
    width: int
    height: int
    boxes: torch.Tensor
    classes: torch.Tensor


class Labels(NamedTuple):
    """What :func:`load_labels` returns."""

    annotations: list[Annotation]
    names: list[str]


def load_labels(path: str | Path, images: str | Path | None = None) -> Labels:
    """Read a YOLO txt folder, a COCO or LVIS json, or a VOC xml folder, whichever ``path`` is.

    ``images`` is the folder searched for image files, by default the one the labels lie in. Boxes are clipped to the
    image; those without area, and COCO's crowd regions, are left out.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"labels: {path} does not exist")
    if path.is_file():
        return _coco(path, images)
    if files := sorted(path.rglob("*.xml")):
        return _voc(path, files, images)
    if files := sorted(path.glob("*.json")) or sorted(path.glob("annotations/*.json")):
        if len(files) > 1:
            raise ValueError(f"labels: {path} holds {len(files)} json files, name one of {[f.name for f in files]}")
        return _coco(files[0], images)
    if not list(path.rglob("*.txt")) and path.name == "images":
        path = path.parent
    folder = path / "labels" if (path / "labels").is_dir() else path
    if files := sorted(f for f in folder.rglob("*.txt") if not OTHER_TEXT.fullmatch(f.name)):
        return _yolo(folder, files, images)
    raise FileNotFoundError(f"labels: nothing in {path}; looked for *.xml (VOC), *.json (COCO) and *.txt (YOLO)")


def pack(annotations: Sequence[Annotation]) -> torch.Tensor:
    """Packed rows [M, 6] (image, class, cx, cy, w, h) of a batch of annotations."""
    counts = torch.tensor([len(a.boxes) for a in annotations])
    image = torch.repeat_interleave(torch.arange(len(annotations)), counts)
    classes = torch.cat([a.classes for a in annotations])
    boxes = torch.cat([a.boxes for a in annotations])
    return torch.cat([torch.stack([image, classes], 1).float(), boxes], 1)


# --------------------------------------------------------------------------------------------------------- samplers


def sample_labels(annotations: Sequence[Annotation], batch: int, generator: torch.Generator) -> torch.Tensor:
    """Packed rows of ``batch`` images drawn from real annotations, with replacement."""
    picks = torch.randint(len(annotations), (batch,), generator=generator)
    return pack([annotations[i] for i in picks.tolist()])


# Measured on the 5,000 images and 36,781 boxes of COCO val2017, images up to 640 px on a canvas of 640 x 640.
COCO_PERCENT = [0, 1, 12, 30, 40, 50, 60, 70, 80, 90, 95, 99, 100]  # of the images have at most as many objects as
COCO_COUNT = [0, 1, 1, 2, 3, 4, 6, 9, 12, 18, 23, 34, 63]
COCO_LOG_SIDE = -1.094, -0.556  # log(sqrt(w * h)) = -1.094 - 0.556 log(objects in the image) + noise
COCO_LOG_SIDE_STD = 0.531, 0.867  # of that noise: between images, and between the objects of one image
COCO_LOG_ASPECT = -0.132, 0.783  # mean and deviation of log(w / h)
COCO_PERSON = 0.30  # share of the most common class; the k-th of the others falls off as 1 / (k + 5)


def coco_like(batch: int, generator: torch.Generator, num_classes: int = 80) -> torch.Tensor:
    """Packed rows of ``batch`` images with objects distributed as in COCO val2017.

    Matched (measured there / drawn here): objects an image, mean 7.4 / 7.5, deviation 7.4 / 8.4, median 4 / 4, 95th
    percentile 23 / 23, most 63 / 63; box side in images, 10th, 50th and 90th percentiles 0.020, 0.088, 0.39 / 0.020,
    0.083, 0.36; objects below 32 px of 640, 32 % / 33 %, above 96 px, 34 % / 30 %; median side where an image has 1, 5
    and 20 objects 257, 110 and 36 px / 212, 85 and 41 px. Centres are uniform over the places where the box fits.
    """
    percent = 100 * torch.rand(batch, generator=generator).numpy()
    counts = torch.from_numpy(np.interp(percent, COCO_PERCENT, COCO_COUNT).round()).long()
    image = torch.repeat_interleave(torch.arange(batch), counts)

    intercept, slope = COCO_LOG_SIDE
    between, within = COCO_LOG_SIDE_STD
    shift = intercept + slope * counts.clamp(min=1).log() + between * torch.randn(batch, generator=generator)
    log_side = shift[image] + within * torch.randn(len(image), generator=generator)
    mean, std = COCO_LOG_ASPECT
    weights = torch.cat([torch.zeros(1), 1 / torch.arange(5.0, num_classes + 4)])
    weights = (1 - COCO_PERSON) * weights / weights.sum().clamp(min=1)
    weights[0] = COCO_PERSON
    return _rows(image, log_side, mean + std * torch.randn(len(image), generator=generator), weights, generator)


def crowded(batch: int, generator: torch.Generator, objects: int = 5000, num_classes: int = 80) -> torch.Tensor:
    """Packed rows of images with ``objects`` objects each, whose areas add up to about the image's."""
    image = torch.repeat_interleave(torch.arange(batch), objects)
    log_side = -0.5 * torch.tensor(float(objects)).log() + 0.3 * torch.randn(len(image), generator=generator)
    log_aspect = 0.3 * torch.randn(len(image), generator=generator)
    return _rows(image, log_side, log_aspect, torch.ones(num_classes), generator)


def _rows(image, log_side, log_aspect, weights, generator) -> torch.Tensor:
    """Boxes of the given sizes, placed where they fit, of classes drawn with the given weights."""
    wh = torch.stack([log_side + log_aspect / 2, log_side - log_aspect / 2], 1).exp().clamp(1 / 640, 1)
    centres = wh / 2 + torch.rand(wh.shape, generator=generator) * (1 - wh)
    classes = torch.rand(len(image), generator=generator)
    classes = torch.searchsorted(weights.cumsum(0) / weights.sum(), classes).clamp(max=len(weights) - 1)
    return torch.cat([torch.stack([image, classes], 1).float(), centres, wh], 1)


# ---------------------------------------------------------------------------------------------------------- readers


def _coco(path: Path, images: str | Path | None) -> Labels:
    data = json.loads(path.read_text())
    if not isinstance(data, dict) or not {"images", "annotations", "categories"} <= data.keys():
        raise ValueError(f"labels: {path} is no COCO file, it has no images, annotations and categories")
    find = _image_finder(images or (path.parent.parent if path.parent.name == "annotations" else path.parent))
    categories = sorted(data["categories"], key=lambda category: category["id"])
    index = {category["id"]: i for i, category in enumerate(categories)}
    objects: dict[Any, list[Any]] = {image["id"]: [] for image in data["images"]}
    for entry in data["annotations"]:
        if not entry.get("iscrowd", 0):
            x, y, w, h = entry["bbox"]
            objects[entry["image_id"]].append((index[entry["category_id"]], x, y, x + w, y + h))
    annotations = []
    for image in data["images"]:
        name = Path(image.get("file_name") or image["coco_url"])  # LVIS 1.0 only has the address
        annotations.append(_annotation(find(name), image["width"], image["height"], objects[image["id"]]))
    return Labels(annotations, [category["name"] for category in categories])


def _voc(path: Path, files: list[Path], images: str | Path | None) -> Labels:
    find = _image_finder(images or (path.parent if path.name == "Annotations" else path))
    read: list[Any] = []
    for file in files:
        root = ElementTree.parse(file).getroot()
        width, height = (int(root.findtext(f"size/{side}", "0")) for side in ("width", "height"))
        if width <= 0 or height <= 0:
            raise ValueError(f"labels: {file} has no image size")
        corners = ("xmin", "ymin", "xmax", "ymax")
        objects = [
            (o.findtext("name", ""), *(float(o.findtext(f"bndbox/{corner}", "nan")) for corner in corners))
            for o in root.iter("object")
        ]
        read.append((find(Path(root.findtext("filename") or file.stem)) or find(file), width, height, objects))
    names: list[str] = sorted({name for *_, objects in read for name, *_ in objects})
    return Labels(
        [_annotation(i, w, h, [(names.index(name), *box) for name, *box in objects]) for i, w, h, objects in read],
        names,
    )


def _yolo(folder: Path, files: list[Path], images: str | Path | None) -> Labels:
    root = folder.parent if folder.name == "labels" else folder
    find = _image_finder(images or root)
    from PIL import Image

    annotations = []
    for file in files:
        image = find(file.relative_to(folder))
        width, height = Image.open(image).size if image else (0, 0)
        lines = enumerate(file.read_text().splitlines(), 1)
        rows = [_yolo_row(line, f"{file}:{number}") for number, line in lines if line.strip()]
        annotations.append(_annotation(image, width, height, rows, relative=True))
    names = _yolo_names([root, folder, root.parent])
    most = max((int(a.classes.max()) for a in annotations if len(a.classes)), default=0)
    return Labels(annotations, names + [f"class {i}" for i in range(len(names), most + 1)])


def _yolo_row(line: str, where: str) -> tuple[float, ...]:
    """Class and corners of one line, a box (class cx cy w h) or a polygon (class x1 y1 x2 y2 ...)."""
    try:
        label, *values = map(float, line.split())
    except ValueError:
        raise ValueError(f"labels: {where} is no YOLO label: {line[:60]!r}") from None
    if len(values) == 4:
        cx, cy, w, h = values
        return label, cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
    if len(values) < 6 or len(values) % 2:
        raise ValueError(f"labels: {where} has {len(values) + 1} numbers, want class cx cy w h, or class and a polygon")
    xs, ys = values[::2], values[1::2]
    return label, min(xs), min(ys), max(xs), max(ys)


def _yolo_names(folders: Iterable[Path]) -> list[str]:
    """Class names from classes.txt, *.names, or the ``names`` of a data set's yaml, the first there is."""
    for folder in folders:
        for file in [folder / "classes.txt", *sorted(folder.glob("*.names"))]:
            if file.is_file():
                return [line.strip() for line in file.read_text().splitlines() if line.strip()]
        for file in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
            if found := YAML_NAMES.search(file.read_text()):
                parts = found[1].strip("[]").split(",") if found[1].startswith("[") else found[1].strip().splitlines()
                return [re.sub(r"^(-|\d+\s*:)", "", part.strip()).strip(" '\"") for part in parts]
    return []


def _annotation(image, width, height, objects, relative=False) -> Annotation:
    """Annotation from (class, x1, y1, x2, y2) in pixels, or relative to the image."""
    rows = torch.tensor(objects, dtype=torch.float64).reshape(-1, 5)
    scale = 1 if relative else torch.tensor([width, height, width, height])
    low, high = (rows[:, 1:] / scale).clamp(0, 1).split(2, dim=1)
    keep = (high > low).all(1)  # false for NaN too
    boxes = torch.cat([(low + high) / 2, high - low], 1)[keep].float()
    return Annotation(image, width, height, boxes, rows[keep, 0].long())


def _image_finder(folder: str | Path):
    """A function from a file's relative path to the image of the same name below ``folder``, or None."""
    folder = Path(folder)
    known: dict[Any, Any] = {}
    if not folder.is_dir():
        raise FileNotFoundError(f"images: {folder} is not a folder")
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in IMAGE_SUFFIXES:
            parts = file.relative_to(folder).with_suffix("").parts
            for depth in range(len(parts)):  # a/b/c is found as c, b/c and a/b/c
                known.setdefault(parts[depth:], file)
    return lambda name: known.get(name.with_suffix("").parts) or known.get((name.stem,))
