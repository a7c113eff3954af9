"""Objects of label files: a YOLO txt folder, a COCO json, a VOC xml folder."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import torch

from fusedyolo.tools.registry import Workload

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
CLASSES = 1 << 16  # of YOLO labels: a name is made for each up to the largest
COCO = "images (id, file_name, width, height), categories (id, name), annotations (image_id, category_id, bbox)"
OTHER_TEXT = re.compile(r"(classes|train|val|test|trainval|readme.*)\.txt", re.I)  # beside labels, but not labels


class Annotation(NamedTuple):
    """The objects of one image, whose file may not be at hand: ``boxes`` float32 [G, 4] cx, cy, w, h relative to the
    image, ``classes`` int64 [G].
    """

    image: Path | None
    boxes: torch.Tensor
    classes: torch.Tensor


class File(NamedTuple):
    """What a label file says of an image: its name, its width and height, and class, x1, y1, x2, y2 of each object."""

    name: Path
    size: tuple[float, float]
    objects: list[tuple[float, ...]]


Read = tuple[list[File], list[str]]
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


def load_labels(path: Path, images: Path | None = None) -> tuple[list[Annotation], list[str]]:
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
    beside = path.parent / "labels" if path.name == "images" else path / "labels"
    folder = beside if beside.is_dir() else path
    if path.is_file():
        files, names = _coco(path)
    elif found := sorted(path.rglob("*.xml")):
        files, names = _voc(found)
    elif found := sorted(file for file in folder.rglob("*.txt") if not OTHER_TEXT.fullmatch(file.name)):
        files, names = _yolo(folder, found)
    else:
        raise FileNotFoundError(f"labels: nothing in {path}; looked for *.xml (VOC) and *.txt (YOLO)")
    known = _images(images or (home.parent if home.name in ("Annotations", "annotations", "labels") else home))
    return [_annotation(file, known) for file in files], names


@contextmanager
def _reading(path: Path, want: str) -> Iterator[None]:
    """Whatever a label file lacks, or has in place of what is wanted, is a ValueError that names the file."""
    try:
        yield
    except (ArithmeticError, LookupError, RuntimeError, SyntaxError, TypeError, ValueError) as error:
        kind = type(error).__name__
        why = str(error) if kind == "ValueError" else f"{kind}: {error}; want {want}"
        raise ValueError(f"labels: {path}: {why}") from error


def _coco(path: Path) -> Read:
    with _reading(path, f"COCO's {COCO}"):
        data = json.loads(path.read_bytes())
        names = {each["id"]: each["name"] for each in sorted(data["categories"], key=lambda each: each["id"])}
        classes, files = {key: index for index, key in enumerate(names)}, {}
        for each in data["images"]:
            files[each["id"]] = File(Path(each["file_name"]), _size(each["width"], each["height"]), [])
        if not files:
            raise ValueError("no images")
        for entry in data["annotations"]:
            if entry["image_id"] not in files:
                raise ValueError(f"an annotation of image {entry['image_id']}, want one of its images")
            if entry["category_id"] not in classes:
                raise ValueError(f"an annotation of category {entry['category_id']}, want one of its categories")
            if not entry.get("iscrowd", 0):
                x, y, w, h = map(float, entry["bbox"])
                files[entry["image_id"]].objects.append((classes[entry["category_id"]], x, y, x + w, y + h))
    return list(files.values()), list(names.values())


def _voc(paths: Sequence[Path]) -> Read:
    roots = [_root(path) for path in paths]
    names = sorted({found.findtext("name", "") for root in roots for found in root.iter("object")})
    files = []
    for path, root in zip(paths, roots, strict=True):
        with _reading(path, "VOC's XML"):
            size = _size(*(root.findtext(f"size/{side}", "0") for side in ("width", "height")))
            files.append(File(Path(root.findtext("filename") or path), size, []))
            for found in root.iter("object"):
                corners = (float(found.findtext(f"bndbox/{each}", "nan")) for each in ("xmin", "ymin", "xmax", "ymax"))
                files[-1].objects.append((names.index(found.findtext("name", "")), *corners))
    return files, names


def _root(path: Path) -> ElementTree.Element:
    with _reading(path, "VOC's XML"):
        return ElementTree.parse(path).getroot()


def _size(width: str | float, height: str | float) -> tuple[float, float]:
    size = float(width), float(height)
    if not all(0 < side < math.inf for side in size):
        raise ValueError(f"image size {width} x {height}, want more than 0")
    return size


def _yolo(folder: Path, paths: Sequence[Path]) -> Read:
    files = []
    for path in paths:
        files.append(File(path.relative_to(folder), (1, 1), []))
        for number, line in enumerate(_lines(path), 1):
            if line.strip():
                try:
                    label, cx, cy, w, h = map(float, line.split())
                    valid = 0 <= label < CLASSES and label.is_integer()
                except ValueError:
                    valid = False
                if not valid:
                    want = f"class cx cy w h, the class in 0 ... {CLASSES - 1}"
                    raise ValueError(f"labels: {path}:{number}: {line[:60]!r}, want {want}")
                files[-1].objects.append((label, cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2))
    listed = next((each for each in (folder / "classes.txt", folder.parent / "classes.txt") if each.is_file()), None)
    names = _lines(listed) if listed else []
    most = max((int(label) for file in files for label, *_ in file.objects), default=0)
    return files, names + [f"class {i}" for i in range(len(names), most + 1)]


def _lines(path: Path) -> list[str]:
    with _reading(path, "text in UTF-8"):
        return path.read_text("utf-8-sig").splitlines()


def _annotation(file: File, images: dict[tuple[str, ...], Path]) -> Annotation:
    rows = torch.tensor(file.objects, dtype=torch.float64).reshape(-1, 5)
    low, high = (rows[:, 1:] / torch.tensor([*file.size, *file.size])).clamp(0, 1).split(2, dim=1)
    keep = (high > low).all(1)  # false for NaN too
    boxes = torch.cat([(low + high) / 2, high - low], 1)[keep].float()
    image = images.get(file.name.with_suffix("").parts) or images.get((file.name.stem,))
    return Annotation(image, boxes, rows[keep, 0].long())


def _images(folder: Path) -> dict[tuple[str, ...], Path]:
    """The image files below a folder; a/b/c is found as c, b/c and a/b/c."""
    if not folder.is_dir():
        raise FileNotFoundError(f"images: {folder} is not a folder")
    known: dict[tuple[str, ...], Path] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in IMAGE_SUFFIXES:
            parts = file.relative_to(folder).with_suffix("").parts
            known |= {parts[depth:]: file for depth in range(len(parts)) if parts[depth:] not in known}
    return known
