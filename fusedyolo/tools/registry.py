"""What is measured: a loss with its anchors (a case) on predictions and objects of some size (a workload)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch

import fusedyolo

from .. import anchors as makers
from .. import drivers
from ..drivers.protocol import POSITIVE, UNIT, Driver, Frame, Piece
from ..targets import Targets
from . import objects as samplers


class RefusedError(ValueError):
    """What a user asked for cannot be done; the message says why."""


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
FORMS = ("packed", "Targets")
LAYOUTS = ("nchw", "channels_last", "rows", "flat", "planes")
AXES = ("objects", "batch", "classes", "dtype", "layout")  # along which a workload may vary
PYRAMID = (8, 16, 32, 64, 128)  # strides
WARMED_UP = 1 << 20  # images, after which a loss that counts them is past its warm-up
LOW = 4.0  # how far logits of what is rarely there lie below the others


@dataclass(frozen=True)
class Case:
    """One loss under one recipe, a row of data. What follows from its head, the driver of that head knows.

    Attributes:
        loss: for people; the first half of :attr:`name`.
        recipe: None where the loss has none.
        cls: the class in ``fusedyolo``.
        anchors: as the class takes them, a tuple a level, in units of ``unit`` pixels.
        strides: of the maps.
        one_map: whether the class takes the anchors and the stride of its only map, not those of levels.
        cell: anchors of a cell, one a level, of a loss whose calls bring their anchors.
        boxes: makes these, ``[N, 4]``, of the maps, the side of the image and the device.
        grid: cells on a side of any image, in place of strides.
        background: 1 if class 0 is no object.
        branches: names of the sets of predictions of a loss that takes several.
        images: of a batch, so many that small launches have several programs.
    """

    loss: str
    recipe: str | None
    cls: str
    anchors: tuple[tuple[tuple[float, float], ...], ...] = ()
    strides: tuple[int, ...] = (32,)
    unit: int = 1
    one_map: bool = False
    cell: tuple[int, ...] = ()
    boxes: Callable[..., torch.Tensor] | None = None
    grid: int = 0
    background: int = 0
    branches: tuple[str, ...] = ()
    images: int = 2

    @property
    def name(self) -> str:
        """As in ``--loss``: the loss, or the loss and its recipe."""
        return self.loss if self.recipe is None else f"{self.loss}/{self.recipe}"

    def build(self, num_classes: int, backend: str, **options: Any) -> Any:
        """The loss module on one backend, past its warm-up; with more ``options`` of its constructor."""
        arguments: dict[str, Any] = {"num_classes": num_classes + self.background, "backend": backend, **options}
        if self.one_map:
            arguments |= {"anchors": self.anchors[0], "stride": self.strides[0]}
        elif self.anchors:
            arguments |= {"anchors": self.anchors, "strides": self.strides}
        elif self.grid:
            arguments["grid_size"] = self.grid
        elif self.boxes is None:
            arguments["strides"] = self.strides
        if self.recipe is not None:
            arguments["recipe"] = self.recipe
        criterion = getattr(fusedyolo, self.cls)(**arguments)
        if hasattr(criterion, "seen"):
            criterion.seen = WARMED_UP
        return criterion

    def head(self, num_classes: int) -> Any:
        """The row of the loss."""
        return _criterion(self, num_classes).head

    @property
    def driver(self) -> Driver:
        """That of the head."""
        return drivers.of(_criterion(self, 1))

    @property
    def layouts(self) -> tuple[str, ...]:
        """How predictions may lie in memory, the usual way first."""
        return self.driver.layouts

    def layout(self, work: Workload) -> str:
        """Of the workload, or the usual one."""
        return work.layout if work.layout in self.layouts else self.layouts[0]

    def maps(self, work: Workload) -> list[tuple[int, int]]:
        """(height, width) of each level."""
        sides = [self.grid] if self.grid else [-(-work.size // stride) for stride in self.strides]
        return [(side, side) for side in sides]

    def frame(self, work: Workload) -> Frame:
        """What predictions lie on."""
        cell = self.cell or tuple(map(len, self.anchors)) or (1,)
        return Frame(work.batch, tuple(self.maps(work)), cell, self.layout(work))

    def pieces(self, work: Workload) -> list[Piece]:
        """What is predicted, branch by branch."""
        return self.driver.pieces(self.head(work.classes), self.frame(work)) * max(1, len(self.branches))

    def prediction_bytes(self, work: Workload) -> int:
        """P: what the predictions take in memory."""
        return sum(math.prod(piece.shape) for piece in self.pieces(work)) * DTYPES[work.dtype].itemsize

    def floor(self, work: Workload) -> float:
        """Bytes in P that no step can do without."""
        return self.driver.floor(self.head(work.classes))

    def predictions(self, work: Workload, device: str = "cpu", empty: bool = False) -> list[torch.Tensor]:
        """Numbers as a trained detector might have them, one leaf a tensor of the loss; or untouched memory."""
        generator, frame = torch.Generator().manual_seed(work.seed), self.frame(work)
        preds: list[torch.Tensor] = []
        for piece in self.pieces(work):
            values = torch.empty(piece.shape, dtype=DTYPES[work.dtype], device=device)
            if not empty:
                values.copy_(_values(piece, generator))
            preds += self.driver.arrange(values, piece, frame)
        return [pred.detach().requires_grad_() for pred in preds]

    def pack(self, preds: list[torch.Tensor], work: Workload) -> Any:
        """These predictions as the loss takes them."""
        return self._packing(work)(preds)

    def _packing(self, work: Workload) -> Callable[[list[torch.Tensor]], Any]:
        pack, branches = partial(self.driver.pack, frame=self.frame(work)), self.branches

        def pack_branches(preds: list[torch.Tensor]) -> dict[str, Any]:
            each = len(preds) // len(branches)
            return {name: pack(preds[i * each : (i + 1) * each]) for i, name in enumerate(branches)}

        return pack_branches if branches else pack

    def targets(self, work: Workload, device: str = "cpu") -> Any:
        """The objects, their classes counted from 1 where 0 is the background."""
        targets = work.targets(device)
        (targets if isinstance(targets, torch.Tensor) else targets.rows)[:, 1] += self.background
        return targets

    def geometry(self, work: Workload, device: str = "cpu") -> dict[str, Any]:
        """What a call takes beside predictions and targets; anchors are ``[N, 4]``, x1 y1 x2 y2 in pixels."""
        if self.boxes is None:
            return {}
        boxes = self.boxes(self.maps(work), work.size, device=device)
        return {"anchors": boxes, "num_anchors_per_level": self.frame(work).sizes, "image_size": work.size}

    def bind(self, criterion: Any, work: Workload, device: str = "cpu") -> Callable[[Any, Any], Any]:
        """The loss as a function of predictions and targets alone."""
        geometry, pack = self.geometry(work, device), self._packing(work)
        return lambda preds, targets: criterion(pack(preds), targets, **geometry)


@lru_cache(maxsize=64)
def _criterion(case: Case, num_classes: int) -> Any:
    return case.build(num_classes, "torch")


def _values(piece: Piece, generator: torch.Generator) -> torch.Tensor:
    if piece.values == UNIT:
        return torch.rand(piece.shape, generator=generator)
    values = torch.randn(piece.shape, generator=generator)
    if piece.low is not None:
        values.narrow(*piece.low).sub_(LOW)
    return values.abs() if piece.values == POSITIVE else values


@dataclass(frozen=True)
class Workload:
    """Sizes, type and objects: ``coco``, ``crowded:N`` for N objects in each image, or with any other name ``rows``."""

    batch: int = 16
    size: int = 640
    classes: int = 80
    dtype: str = "float32"
    objects: str = "coco"
    form: str = "packed"
    layout: str = ""  # a case's usual one
    seed: int = 18  # 118 COCO-like objects in 16 images, 7.4 each as in COCO itself
    # image, class, cx, cy, w, h; those of images beyond the batch are left out
    rows: tuple[tuple[float, ...], ...] = ()

    def targets(self, device: str = "cpu") -> Any:
        """Packed rows [M, 6], or with the form ``Targets`` those made of them, as in ``collate_fn``."""
        generator = torch.Generator().manual_seed(self.seed)
        if self.objects == "coco":
            rows = samplers.coco_like(self.batch, generator, num_classes=self.classes)
        elif self.objects.startswith("crowded:"):
            rows = samplers.crowded(self.batch, generator, int(self.objects[8:]), num_classes=self.classes)
        else:
            rows = torch.tensor([row for row in self.rows if row[0] < self.batch]).reshape(-1, 6)
        if self.form == "Targets":
            return Targets.from_packed(rows, self.batch).to(device)
        return rows.to(device)

    def small(self) -> Workload:
        """The same in small, for parity and for compiling."""
        objects = "crowded:64" if self.objects.startswith("crowded:") else self.objects
        return replace(self, batch=min(self.batch, 2), size=min(self.size, 128), objects=objects)


_V3 = ((10, 13), (16, 30), (33, 23)), ((30, 61), (62, 45), (59, 119)), ((116, 90), (156, 198), (373, 326))
_V2 = (((1.3221, 1.73145), (3.19275, 4.00944), (5.05587, 8.09892), (9.47112, 4.84053), (11.2364, 10.0071)),)
_V4 = ((12, 16), (19, 36), (40, 28)), ((36, 75), (76, 55), (72, 146)), ((142, 110), (192, 243), (459, 401))
_STRIDES = (8, 16, 32)
_SSD = partial(makers.ssd_anchors, aspect_ratios=((2,), (2, 3), (2, 3), (2, 3), (2,), (2,)))
_CELLS = partial(Case, grid=7, images=12)
_POINTS = partial(Case, strides=_STRIDES, cell=(1,) * len(_STRIDES))
_ONE_MAP = partial(Case, anchors=_V2, unit=32, one_map=True)

CASES = {
    case.name: case
    for case in (
        _CELLS("YOLOv1", "paper", "YOLOv1Loss"),
        _CELLS("YOLOv1", "darknet", "YOLOv1Loss"),
        _ONE_MAP("YOLOv2", "region", "YOLOv2Loss"),
        _ONE_MAP("YOLOv2", "darknet", "YOLOv2Loss"),
        _ONE_MAP("YOLOv2", "lightnet", "YOLOv2Loss"),
        Case("YOLOv3", "paper", "YOLOv3Loss", _V3, _STRIDES),
        Case("YOLOv3", "darknet", "YOLOv3Loss", _V3, _STRIDES),
        Case("YOLOv4", "paper", "YOLOv4Loss", _V4, _STRIDES),
        Case("YOLOv4", "darknet", "YOLOv4Loss", _V4, _STRIDES),
        Case("ScaledYOLOv4", None, "ScaledYOLOv4Loss", _V4, _STRIDES),
        Case("YOLOv5", None, "YOLOv5Loss", _V3, _STRIDES),
        Case("YOLOv7", None, "YOLOv7Loss", _V4, _STRIDES),
        Case("RetinaNet", None, "RetinaNetLoss", strides=PYRAMID, cell=(9,) * 5, boxes=makers.retinanet_anchors),
        Case("EfficientDet", None, "EfficientDetLoss", strides=PYRAMID, cell=(9,) * 5, boxes=makers.retinanet_anchors),
        Case("SSD", None, "SSDLoss", strides=(*PYRAMID, 256), cell=(4, 6, 6, 6, 4, 4), boxes=_SSD, background=1),
        Case("FCOS", None, "FCOSLoss", strides=PYRAMID, cell=(1,) * 5, boxes=makers.fcos_anchors),
        _POINTS("YOLOX", None, "YOLOXLoss"),
        _POINTS("YOLOv8", None, "YOLOv8Loss"),
        _POINTS("E2E", "yolo26", "E2ELoss", branches=("one2many", "one2one")),
    )
}

SHOWN = [CASES[name] for name in ("YOLOv4/paper", "YOLOv5", "RetinaNet", "SSD", "FCOS", "YOLOX", "YOLOv8")]
"""What is enough to see how kernels do: of the two grids one ignores by overlap, one has several rows a prediction."""

Named = TypeVar("Named")


def choose(names: Sequence[str], known: Mapping[str, Named]) -> dict[str, Named]:
    """Those of these names, or of what comes before a slash in them, in any case of letters; all of them for no names.

    Raises:
        RefusedError: there is none of a name.
    """
    chosen: dict[str, Named] = {}
    for name in names:
        found = {k: v for k, v in known.items() if name.lower() in (k.lower(), k.partition("/")[0].lower())}
        if not found:
            raise RefusedError(f"--loss: {name}, want one of {', '.join(known)}")
        chosen |= {k: v for k, v in found.items() if k not in chosen}
    return chosen or dict(known)


def select(names: Sequence[str], usual: Iterable[Case] = CASES.values()) -> list[Case]:
    """Cases by ``loss`` or ``loss/recipe``, see :func:`choose`, or the ``usual`` ones for no names."""
    return list(choose(names, CASES).values() if names else usual)


def first_recipes() -> list[Case]:
    """Each loss in its default recipe."""
    return list({case.loss: case for case in reversed(CASES.values())}.values())[::-1]
