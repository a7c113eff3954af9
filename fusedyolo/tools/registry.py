"""What is measured: a loss with its anchors (a case) on predictions and objects of some size (a workload)."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch

import fusedyolo

from ..targets import Targets
from . import objects as samplers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
FORMS = ("packed", "Targets")
LAYOUTS = ("nchw", "channels_last", "rows", "flat")
PYRAMID = (8, 16, 32, 64, 128)  # strides
WARMED_UP = 1 << 20  # images, after which YOLOv2 no longer draws boxes to their anchors


@dataclass(frozen=True)
class Case:
    """One loss under one recipe: ``cls`` is the class in ``fusedyolo``, anchors as it takes them, a tuple a level."""

    loss: str
    recipe: str | None
    cls: str
    anchors: tuple[tuple[tuple[float, float], ...], ...]
    strides: tuple[int, ...]

    layouts: ClassVar[tuple[str, ...]] = ("nchw", "channels_last")
    """How predictions may lie in memory, the usual way first."""

    @property
    def name(self) -> str:
        """As in ``--loss``: the loss, or the loss and its recipe."""
        return self.loss if self.recipe is None else f"{self.loss}/{self.recipe}"

    def shapes(self, work: Workload) -> list[tuple[int, ...]]:
        """Of the predictions, ``[B, A, 5 + C, H, W]`` a level."""
        sides = [work.size // stride for stride in self.strides]
        return [
            (work.batch, len(level), 5 + work.classes, side, side)
            for level, side in zip(self.anchors, sides, strict=True)
        ]

    def prediction_bytes(self, work: Workload) -> int:
        """P: what the predictions take in memory."""
        return sum(math.prod(shape) for shape in self.shapes(work)) * DTYPES[work.dtype].itemsize

    def floor(self, work: Workload) -> float:
        """Bytes in P that no step can do without: write the gradient, read objectness, and boxes for an ignore mask."""
        return 1 + (1 if self.cls in ("ScaledYOLOv4Loss", "YOLOv5Loss") else 5) / (5 + work.classes)

    def build(self, num_classes: int, backend: str) -> torch.nn.Module:
        """The loss module on one backend."""
        loss, options = self._class(), self._options(backend)
        if self.cls == "YOLOv2Loss":
            criterion = loss(self.anchors[0], num_classes, self.strides[0], **options)
            criterion.seen = WARMED_UP
            return criterion
        return loss(self.anchors, self.strides, num_classes, **options)

    def _class(self) -> Any:
        return getattr(fusedyolo, self.cls)

    def _options(self, backend: str) -> dict[str, str]:
        return {"backend": backend} if self.recipe is None else {"backend": backend, "recipe": self.recipe}

    def predictions(self, work: Workload, device: str = "cpu", empty: bool = False) -> list[torch.Tensor]:
        """Normal logits, objectness and classes low as in a trained detector, one leaf a level; or untouched memory."""
        generator = torch.Generator().manual_seed(work.seed)
        preds = []
        for shape in self.shapes(work):
            logits = torch.empty(shape, dtype=DTYPES[work.dtype], device=device)
            if not empty:
                logits.copy_(self.values(shape, generator))
            preds += self.arrange(logits, work)
        return [pred.detach().requires_grad_() for pred in preds]

    def layout(self, work: Workload) -> str:
        """Of the workload, or the usual one."""
        return work.layout if work.layout in self.layouts else self.layouts[0]

    def targets(self, work: Workload, device: str = "cpu") -> Any:
        """The objects, with classes as the loss counts them."""
        return work.targets(device)

    def geometry(self, work: Workload, device: str = "cpu") -> dict[str, Any]:
        """What a call takes beside predictions and targets."""
        return {}

    def bind(self, criterion: torch.nn.Module, work: Workload, device: str = "cpu") -> Callable[[Any, Any], Any]:
        """The loss as a function of predictions and targets alone."""
        geometry = self.geometry(work, device)
        return lambda preds, targets: criterion(preds if len(preds) > 1 else preds[0], targets, **geometry)

    def values(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """What predictions look like."""
        values = torch.randn(shape, generator=generator)
        values[:, :, 4:] -= 4.0
        return values

    def arrange(self, logits: torch.Tensor, work: Workload) -> list[torch.Tensor]:
        """As the loss takes them, in the layout asked for."""
        logits = logits.flatten(1, 2)
        if self.layout(work) == "channels_last":
            logits = logits.contiguous(memory_format=torch.channels_last)
        return [logits]


@dataclass(frozen=True)
class CellCase(Case):
    """YOLOv1: predictions in darknet's flat order, of a grid whose size is that of no image."""

    anchors: tuple = ()
    strides: tuple[int, ...] = (32,)

    layouts: ClassVar[tuple[str, ...]] = ("flat", "channels_last")

    def shapes(self, work: Workload) -> list[tuple[int, ...]]:
        """``[B, S * S * (5 n + C)]``, of 7 x 7 cells and 2 boxes."""
        return [(work.batch, 7 * 7 * (5 * 2 + work.classes))]

    def floor(self, work: Workload) -> float:
        """Write the gradient, read the confidences."""
        return 1 + 2 / (5 * 2 + work.classes)

    def build(self, num_classes: int, backend: str) -> torch.nn.Module:
        """The loss module on one backend."""
        return self._class()(num_classes, **self._options(backend))

    def values(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """Raw numbers in 0 ... 1, as probabilities, offsets and roots of sizes are."""
        return torch.rand(shape, generator=generator)

    def arrange(self, logits: torch.Tensor, work: Workload) -> list[torch.Tensor]:
        """As they are, or as ``[B, S, S, 5 n + C]``."""
        return [logits.view(len(logits), 7, 7, -1) if self.layout(work) == "channels_last" else logits]


@dataclass(frozen=True)
class DenseCase(Case):
    """A loss over anchors: predictions in one piece, ``anchors`` anchors a cell at each level."""

    anchors: tuple = ()
    strides: tuple[int, ...] = PYRAMID
    cell: tuple[int, ...] = ()  # anchors of a cell, one a level
    background: int = 0  # 1 if class 0 is no object

    layouts: ClassVar[tuple[str, ...]] = ("rows", "nchw", "channels_last")

    def maps(self, work: Workload) -> list[tuple[int, int]]:
        """(height, width) of each level."""
        return [(-(-work.size // stride),) * 2 for stride in self.strides]

    def sizes(self, work: Workload) -> list[int]:
        """Anchors of each level."""
        return [height * width * n for (height, width), n in zip(self.maps(work), self.cell, strict=True)]

    def shapes(self, work: Workload) -> list[tuple[int, ...]]:
        """``[B, N, C]``, ``[B, N, 4]`` and of FCOS ``[B, N, 1]``."""
        channels = (work.classes + self.background, 4, 1)[: 3 if self.cls == "FCOSLoss" else 2]
        return [(work.batch, sum(self.sizes(work)), c) for c in channels]

    def build(self, num_classes: int, backend: str) -> torch.nn.Module:
        """The loss module on one backend."""
        return self._class()(num_classes + self.background, **self._options(backend))

    def targets(self, work: Workload, device: str = "cpu") -> Any:
        """The objects, their classes counted from 1 where 0 is the background."""
        targets = work.targets(device)
        if self.background:
            (targets if isinstance(targets, torch.Tensor) else targets.rows)[:, 1] += 1
        return targets

    def floor(self, work: Workload) -> float:
        """Write the gradient, read the class logits and centreness."""
        channels = [shape[2] for shape in self.shapes(work)]
        return 1 + (sum(channels) - 4) / sum(channels)

    def anchor_boxes(self, work: Workload, device: str = "cpu") -> torch.Tensor:
        """``[N, 4]``, x1 y1 x2 y2 in pixels."""
        maps = self.maps(work)
        if self.cls == "SSDLoss":
            return fusedyolo.anchors.ssd_anchors(
                maps, work.size, [(2,) if n == 4 else (2, 3) for n in self.cell], device=device
            )
        make = fusedyolo.anchors.fcos_anchors if self.cls == "FCOSLoss" else fusedyolo.anchors.retinanet_anchors
        return make(maps, work.size, device=device)

    def geometry(self, work: Workload, device: str = "cpu") -> dict[str, Any]:
        """What a call takes beside predictions and targets."""
        return {
            "anchors": self.anchor_boxes(work, device),
            "num_anchors_per_level": self.sizes(work),
            "image_size": work.size,
        }

    def values(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """Normal numbers; class logits low, and distances not negative."""
        values = torch.randn(shape, generator=generator)
        if shape[2] == 4:
            return values.abs() if self.cls == "FCOSLoss" else values
        return values if shape[2] == 1 or self.background else values - 4.0

    def arrange(self, logits: torch.Tensor, work: Workload) -> list[torch.Tensor]:
        """In one piece ``[B, N, channels]``, or as maps ``[B, anchors * channels, H, W]``, one a level."""
        layout = self.layout(work)
        if layout == "rows":
            return [logits]
        preds = []
        pieces = logits.split(self.sizes(work), dim=1)
        for piece, (height, width), count in zip(pieces, self.maps(work), self.cell, strict=True):
            maps = piece.reshape(len(piece), height, width, count * piece.shape[2]).permute(0, 3, 1, 2)
            preds.append(maps.contiguous() if layout == "nchw" else maps)
        return preds

    def bind(self, criterion: torch.nn.Module, work: Workload, device: str = "cpu") -> Callable[[Any, Any], Any]:
        """The loss as a function of predictions and targets alone."""
        geometry, levels = self.geometry(work, device), len(self.strides)
        if self.layout(work) == "rows":
            return lambda preds, targets: criterion(tuple(preds), targets, **geometry)
        return lambda preds, targets: criterion(
            tuple(preds[i : i + levels] for i in range(0, len(preds), levels)), targets, **geometry
        )


@dataclass(frozen=True)
class Workload:
    """Sizes, type and objects: ``coco``, or ``crowded:N`` for N objects in each image."""

    batch: int = 16
    size: int = 640
    classes: int = 80
    dtype: str = "float32"
    objects: str = "coco"
    form: str = "packed"
    layout: str = ""  # a case's usual one
    seed: int = 18  # 118 COCO-like objects in 16 images, 7.4 each as in COCO itself

    def targets(self, device: str = "cpu") -> Any:
        """Packed rows [M, 6], or with the form ``Targets`` those made of them, as in ``collate_fn``."""
        generator = torch.Generator().manual_seed(self.seed)
        if self.objects == "coco":
            rows = samplers.coco_like(self.batch, generator, num_classes=self.classes)
        else:
            rows = samplers.crowded(self.batch, generator, int(self.objects[8:]), num_classes=self.classes)
        if self.form == "Targets":
            return Targets.from_packed(rows, self.batch).to(device)
        return rows.to(device)

    def small(self) -> Workload:
        """The same in small, for parity and for compiling."""
        objects = "crowded:64" if self.objects.startswith("crowded:") else self.objects
        return replace(self, batch=min(self.batch, 2), size=min(self.size, 128), objects=objects)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


_V3 = (
    ((10, 13), (16, 30), (33, 23)),
    ((30, 61), (62, 45), (59, 119)),
    ((116, 90), (156, 198), (373, 326)),
)
_V2 = (((1.3221, 1.73145), (3.19275, 4.00944), (5.05587, 8.09892), (9.47112, 4.84053), (11.2364, 10.0071)),)
_V4 = (
    ((12, 16), (19, 36), (40, 28)),
    ((36, 75), (76, 55), (72, 146)),
    ((142, 110), (192, 243), (459, 401)),
)
_STRIDES = (8, 16, 32)

CASES = {
    case.name: case
    for case in (
        CellCase("YOLOv1", "paper", "YOLOv1Loss"),
        CellCase("YOLOv1", "darknet", "YOLOv1Loss"),
        Case("YOLOv2", "region", "YOLOv2Loss", _V2, (32,)),
        Case("YOLOv2", "darknet", "YOLOv2Loss", _V2, (32,)),
        Case("YOLOv2", "lightnet", "YOLOv2Loss", _V2, (32,)),
        Case("YOLOv3", "paper", "YOLOv3Loss", _V3, _STRIDES),
        Case("YOLOv3", "darknet", "YOLOv3Loss", _V3, _STRIDES),
        Case("YOLOv4", "paper", "YOLOv4Loss", _V4, _STRIDES),
        Case("YOLOv4", "darknet", "YOLOv4Loss", _V4, _STRIDES),
        Case("ScaledYOLOv4", None, "ScaledYOLOv4Loss", _V4, _STRIDES),
        Case("YOLOv5", None, "YOLOv5Loss", _V3, _STRIDES),
        DenseCase("RetinaNet", None, "RetinaNetLoss", cell=(9,) * 5),
        DenseCase("SSD", None, "SSDLoss", strides=(*PYRAMID, 256), cell=(4, 6, 6, 6, 4, 4), background=1),
        DenseCase("FCOS", None, "FCOSLoss", cell=(1,) * 5),
    )
}


def select(names: list[str]) -> list[Case]:
    """Cases by ``loss`` or ``loss/recipe``, in any case of letters; all of them for no names."""
    chosen = []
    for name in names:
        found = [c for c in CASES.values() if name.lower() in (c.name.lower(), c.loss.lower())]
        if not found:
            raise ValueError(f"--loss: {name}, want one of {', '.join(CASES)}")
        chosen += [c for c in found if c not in chosen]
    return chosen or list(CASES.values())


def first_recipes() -> list[Case]:
    """Each loss in its default recipe."""
    return list({case.loss: case for case in reversed(CASES.values())}.values())[::-1]


def add_loss(parser: argparse.ArgumentParser, usual: str) -> None:
    """Give a command ``--loss``, names for :func:`select`; ``usual`` says what is meant by none."""
    names = f"one of {', '.join(CASES)}; repeat for more ({usual})"
    parser.add_argument("--loss", action="append", default=[], metavar="NAME", help=names)
