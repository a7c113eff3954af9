"""Objects of label files: a YOLO txt folder, a COCO json, a VOC xml folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch

from fusedyolo.tools.registry import Workload

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
OTHER_TEXT = re.compile(r"(classes|train|val|test|trainval|readme.*)\.txt", re.I)  # beside labels, but not labels

Find = Callable[[Path], "Path | None"]


class Annotation(NamedTuple):
    """The objects of one image, whose file may not be at hand: ``boxes`` float32 [G, 4] cx, cy, w, h relative to the
    image, ``classes`` int64 [G].
    """

    image: Path | None
    boxes: torch.Tensor
    classes: torch.Tensor


Labels = tuple[list[Annotation], list[str]]
"""Of each image, and the names of the classes."""


def given(work: Workload, rows: torch.Tensor) -> Workload:
    """The workload with these packed rows in place of its objects.

    Raises:
        ValueError: it has fewer classes than they name.
    """
    if len(rows) and rows[:, 1].max() >= work.classes:
        raise ValueError(f"labels: class {int(rows[:, 1].max())}, want fewer than --classes {work.classes}")
    return replace(work, objects="labels", rows=tuple(map(tuple, rows.tolist())))


def pack(annotations: Sequence[Annotation]) -> torch.Tensor:
    """Packed rows [M, 6] (image, class, cx, cy, w, h) of a batch of annotations."""
    image = torch.repeat_interleave(torch.tensor([len(a.boxes) for a in annotations]))
    classes = torch.cat([a.classes for a in annotations])
    return torch.cat([torch.stack([image, classes], 1).float(), torch.cat([a.boxes for a in annotations])], 1)


def sample_labels(annotations: Sequence[Annotation], batch: int, seed: int) -> torch.Tensor:
    """Packed rows of ``batch`` images drawn from real annotations, with replacement."""
    picks = torch.randint(len(annotations), (batch,), generator=torch.Generator().manual_seed(seed))
    return pack([annotations[i] for i in picks.tolist()])


def load_labels(path: Path, images: Path | None = None) -> Labels:
    """Read a COCO json, a VOC folder or a YOLO folder: the annotation of each image, and the names of the classes.

    ``images`` is the folder searched for image files, by default the one the labels lie in. Boxes are clipped to the
    image; those without area, and COCO's crowd regions, are left out.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they cannot be read.
    """
    if not path.exists():
        raise FileNotFoundError(f"labels: {path} does not exist")
    home = path if path.is_dir() else path.parent
    find = _image_finder(images or (home.parent if home.name in ("Annotations", "annotations", "labels") else home))
    if path.is_file():
        return _coco(path, find)
    if files := sorted(path.rglob("*.xml")):
        return _voc(files, find)
    beside = path.parent / "labels" if path.name == "images" else path / "labels"
    folder = beside if beside.is_dir() else path
    if files := sorted(f for f in folder.rglob("*.txt") if not OTHER_TEXT.fullmatch(f.name)):
        return _yolo(folder, files, find)
    raise FileNotFoundError(f"labels: nothing in {path}; looked for *.xml (VOC) and *.txt (YOLO)")


def _coco(path: Path, find: Find) -> Labels:
    data = json.loads(path.read_text())
    if not isinstance(data, dict) or not {"images", "annotations", "categories"} <= data.keys():
        raise ValueError(f"labels: {path} is no COCO file, it has no images, annotations and categories")
    categories = sorted(data["categories"], key=lambda category: category["id"])
    index = {category["id"]: i for i, category in enumerate(categories)}
    objects: dict[Any, list[Any]] = {image["id"]: [] for image in data["images"]}
    for entry in data["annotations"]:
        if not entry.get("iscrowd", 0):
            x, y, w, h = entry["bbox"]
            objects[entry["image_id"]].append((index[entry["category_id"]], x, y, x + w, y + h))
    annotations = [
        _annotation(find(Path(image["file_name"])), objects[image["id"]], image["width"], image["height"])
        for image in data["images"]
    ]
    return annotations, [category["name"] for category in categories]


def _voc(files: Sequence[Path], find: Find) -> Labels:
    roots = [ElementTree.parse(file).getroot() for file in files]
    names = sorted({found.findtext("name", "") for root in roots for found in root.iter("object")})
    corners = [f"bndbox/{corner}" for corner in ("xmin", "ymin", "xmax", "ymax")]
    annotations = []
    for file, root in zip(files, roots, strict=True):
        width, height = (int(root.findtext(f"size/{side}", "0")) for side in ("width", "height"))
        if width <= 0 or height <= 0:
            raise ValueError(f"labels: {file} has no image size")
        objects = [
            (names.index(found.findtext("name", "")), *(float(found.findtext(each, "nan")) for each in corners))
            for found in root.iter("object")
        ]
        annotations.append(_annotation(find(Path(root.findtext("filename") or file)), objects, width, height))
    return annotations, names


def _yolo(folder: Path, files: Sequence[Path], find: Find) -> Labels:
    annotations = []
    for file in files:
        objects = []
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if line.strip():
                try:
                    label, cx, cy, w, h = map(float, line.split())
                except ValueError:
                    raise ValueError(f"labels: {file}:{number}: {line[:60]!r}, want class cx cy w h") from None
                objects.append((label, cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2))
        annotations.append(_annotation(find(file.relative_to(folder)), objects))
    listed = next((each for each in (folder / "classes.txt", folder.parent / "classes.txt") if each.is_file()), None)
    names = listed.read_text().splitlines() if listed else []
    most = max((int(a.classes.max()) for a in annotations if len(a.classes)), default=0)
    return annotations, names + [f"class {i}" for i in range(len(names), most + 1)]


def _annotation(image: Path | None, objects: Sequence[Any], width: int = 1, height: int = 1) -> Annotation:
    """From (class, x1, y1, x2, y2) of each object of an image of this size."""
    rows = torch.tensor(objects, dtype=torch.float64).reshape(-1, 5)
    low, high = (rows[:, 1:] / torch.tensor([width, height, width, height])).clamp(0, 1).split(2, dim=1)
    keep = (high > low).all(1)  # false for NaN too
    boxes = torch.cat([(low + high) / 2, high - low], 1)[keep].float()
    return Annotation(image, boxes, rows[keep, 0].long())


def _image_finder(folder: Path) -> Find:
    """A function from a file's path to the image of the same name below ``folder``, or None."""
    known: dict[tuple[str, ...], Path] = {}
    if not folder.is_dir():
        raise FileNotFoundError(f"images: {folder} is not a folder")
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in IMAGE_SUFFIXES:
            parts = file.relative_to(folder).with_suffix("").parts
            for depth in range(len(parts)):  # a/b/c is found as c, b/c and a/b/c
                known.setdefault(parts[depth:], file)
    return lambda name: known.get(name.with_suffix("").parts) or known.get((name.stem,))
