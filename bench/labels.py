"""Objects of label files: a YOLO txt folder, a COCO or LVIS json, a VOC xml folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch

from fusedyolo.tools.registry import Workload

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
OTHER_TEXT = re.compile(r"(classes|train|val|test|trainval|readme.*)\.txt", re.I)  # beside labels, but not labels
YAML_NAMES = re.compile(r"^names:[ \t]*(\[[^\]]*\]|(?:\n[ \t]*(?:-|\d+[ \t]*:).*)+)", re.M)  # a list or a map of names

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
    """Read labels, whichever of the three ``path`` is: the annotation of each image, and the names of the classes.

    ``images`` is the folder searched for image files, by default the one the labels lie in. Boxes are clipped to the
    image; those without area, and COCO's crowd regions, are left out.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they cannot be read.
    """
    if not path.exists():
        raise FileNotFoundError(f"labels: {path} does not exist")
    if path.is_file():
        return _coco(path, images)
    if files := sorted(path.rglob("*.xml")):
        return _voc(files, images or (path.parent if path.name == "Annotations" else path))
    if files := sorted(path.glob("*.json")) or sorted(path.glob("annotations/*.json")):
        if len(files) > 1:
            raise ValueError(f"labels: {path} holds {len(files)} json files, name one of {[f.name for f in files]}")
        return _coco(files[0], images)
    if path.name == "images" and not list(path.rglob("*.txt")):
        path = path.parent
    folder = path / "labels" if (path / "labels").is_dir() else path
    if files := sorted(f for f in folder.rglob("*.txt") if not OTHER_TEXT.fullmatch(f.name)):
        return _yolo(folder, files, images)
    raise FileNotFoundError(f"labels: nothing in {path}; looked for *.xml (VOC), *.json (COCO) and *.txt (YOLO)")


def _coco(path: Path, images: Path | None) -> Labels:
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
        annotations.append(_annotation(find(name), objects[image["id"]], image["width"], image["height"]))
    return annotations, [category["name"] for category in categories]


def _voc(files: Sequence[Path], images: Path) -> Labels:
    find, read = _image_finder(images), []
    for file in files:
        root = ElementTree.parse(file).getroot()
        width, height = (int(root.findtext(f"size/{side}", "0")) for side in ("width", "height"))
        if width <= 0 or height <= 0:
            raise ValueError(f"labels: {file} has no image size")
        corners = [f"bndbox/{corner}" for corner in ("xmin", "ymin", "xmax", "ymax")]
        objects = [
            (o.findtext("name", ""), *(float(o.findtext(corner, "nan")) for corner in corners))
            for o in root.iter("object")
        ]
        read.append((find(Path(root.findtext("filename") or file.stem)) or find(file), objects, width, height))
    names = sorted({name for _, objects, *_ in read for name, *_ in objects})
    rows = [[(names.index(name), *box) for name, *box in objects] for _, objects, *_ in read]
    return [_annotation(image, own, *size) for own, (image, _, *size) in zip(rows, read, strict=True)], names


def _yolo(folder: Path, files: Sequence[Path], images: Path | None) -> Labels:
    root = folder.parent if folder.name == "labels" else folder
    find, annotations = _image_finder(images or root), []
    for file in files:
        lines = enumerate(file.read_text().splitlines(), 1)
        rows = [_yolo_row(line, f"{file}:{number}") for number, line in lines if line.strip()]
        annotations.append(_annotation(find(file.relative_to(folder)), rows))
    names = _yolo_names([root, folder, root.parent])
    most = max((int(a.classes.max()) for a in annotations if len(a.classes)), default=0)
    return annotations, names + [f"class {i}" for i in range(len(names), most + 1)]


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


def _annotation(image: Path | None, objects: Sequence[Any], width: int = 1, height: int = 1) -> Annotation:
    """From (class, x1, y1, x2, y2) of each object of an image of this size."""
    rows = torch.tensor(objects, dtype=torch.float64).reshape(-1, 5)
    low, high = (rows[:, 1:] / torch.tensor([width, height, width, height])).clamp(0, 1).split(2, dim=1)
    keep = (high > low).all(1)  # false for NaN too
    boxes = torch.cat([(low + high) / 2, high - low], 1)[keep].float()
    return Annotation(image, boxes, rows[keep, 0].long())


def _image_finder(folder: Path) -> Find:
    """A function from a file's relative path to the image of the same name below ``folder``, or None."""
    known: dict[tuple[str, ...], Path] = {}
    if not folder.is_dir():
        raise FileNotFoundError(f"images: {folder} is not a folder")
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in IMAGE_SUFFIXES:
            parts = file.relative_to(folder).with_suffix("").parts
            for depth in range(len(parts)):  # a/b/c is found as c, b/c and a/b/c
                known.setdefault(parts[depth:], file)
    return lambda name: known.get(name.with_suffix("").parts) or known.get((name.stem,))
