"""What properties are asked of: each loss and recipe of the registry on a problem of any geometry, and small ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from conftest import DEVICE
from torch import Tensor

import fusedyolo
from fusedyolo import anchors as makers
from fusedyolo.drivers.protocol import POSITIVE, UNIT, Frame
from fusedyolo.tools.registry import CASES, Case

ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
ONCE = {"YOLOv1/paper", "YOLOv2/region", "YOLOv5", "YOLOv7", "RetinaNet", "SSD", "FCOS", "YOLOX", "YOLOv8"}
RECIPES = pytest.mark.parametrize(  # one of each structure that kernels have; with --long all others, too
    "case",
    [pytest.param(case, marks=() if name in ONCE else pytest.mark.long) for name, case in CASES.items()],
    ids=CASES,
)
BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])
OF_EACH_DRIVER = [CASES[name] for name in ("YOLOv1/paper", "YOLOv5", "RetinaNet", "YOLOv8")]
FEWEST_LEVELS = {"ScaledYOLOv4": 3}
ANCHORS_OF_A_CELL = {"RetinaNet": 3, "EfficientDet": 3, "SSD": 4, "FCOS": 1}


@dataclass(frozen=True)
class Problem:
    """A loss, and what its predictions lie on; small unless something else is said.

    ``maps`` are (height, width) of each level, ``strides`` pixels per cell; of YOLOv1 the first map's height is the
    grid. ``anchors`` of a cell are the first ones of the case. ``options`` are of the constructor.
    """

    case: Case
    batch: int = 2
    maps: tuple[tuple[int, int], ...] = ()
    strides: tuple[int, ...] = ()
    classes: int = 3
    anchors: int = 1
    layout: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        case = self.case
        levels = FEWEST_LEVELS.get(case.loss, 1)
        if not self.maps:
            set_field = partial(object.__setattr__, self)
            set_field("maps", ((4, 4),) if case.grid else tuple((2 << i, 2 << i) for i in reversed(range(levels))))
            set_field("strides", tuple(16 >> i for i in reversed(range(levels))))

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the images, in pixels."""
        return self.maps[0][0] * self.strides[0], self.maps[0][1] * self.strides[0]

    @property
    def labels(self) -> tuple[int, int]:
        """The first class that an object may have, and the one behind the last."""
        return self.case.background, self.classes + self.case.background

    def criterion(self, backend: str) -> Any:
        """The loss, past its warm-up, and silent."""
        case, levels = self.case, len(self.maps)
        given: dict[str, Any] = {"num_classes": self.labels[1], "backend": backend, **self.options}
        if case.grid:
            given["grid_size"] = self.maps[0][0]
        elif case.anchors:
            own = [tuple((w * case.unit, h * case.unit) for w, h in level[: self.anchors]) for level in case.anchors]
            own = (own * levels)[:levels]  # pixels; the same again where there are more levels
            own = own if case.one_map else _ascending(own)
            given |= {"anchors": own, "strides": self.strides}
            if case.one_map:
                stride = given.pop("strides")[0]
                given |= {"anchors": [(w / case.unit, h / case.unit) for w, h in own[0]], "stride": stride}
        elif case.boxes is None:
            given["strides"] = self.strides
        if case.recipe is not None:
            given.setdefault("recipe", case.recipe)
        criterion = getattr(fusedyolo, case.cls)(**given)
        if hasattr(criterion, "seen"):
            criterion.seen = 1 << 20
        for module in criterion.modules():
            if hasattr(module, "_watch"):
                module._watch = None
        return criterion

    @property
    def frame(self) -> Frame:
        """Of the predictions."""
        cell = 1
        if self.case.anchors:
            cell = min(self.anchors, len(self.case.anchors[0]))
        elif self.case.boxes is not None:
            cell = ANCHORS_OF_A_CELL[self.case.loss]
        return Frame(self.batch, self.maps, (cell,) * len(self.maps), self.layout or self.case.layouts[0])

    def predictions(self, dtype: torch.dtype = torch.float32, seed: int = 0, far: float = 1.0) -> list[Tensor]:
        """Leaves, normal numbers times ``far``."""
        generator, driver, frame = torch.Generator().manual_seed(seed), self.case.driver, self.frame
        head = self.criterion("torch").head
        found: list[Tensor] = []
        for piece in driver.pieces(head, frame) * max(1, len(self.case.branches)):
            values = torch.randn(piece.shape, generator=generator, dtype=torch.float64) * far
            if piece.values == UNIT:
                values = values.abs() % 1
            elif piece.values == POSITIVE:
                values = values.abs()
            found += driver.arrange(values.to(dtype), piece, frame)
        return [pred.detach().to(DEVICE).requires_grad_() for pred in found]

    def pack(self, preds: list[Tensor]) -> Any:
        """As the loss takes them."""
        names, each = self.case.branches, len(preds) // max(1, len(self.case.branches))
        if self.case.anchors and not self.case.one_map:
            return preds
        packed = [self.case.driver.pack(preds[i : i + each], self.frame) for i in range(0, len(preds), each)]
        return dict(zip(names, packed, strict=True)) if names else packed[0]

    @property
    def geometry(self) -> dict[str, Any]:
        """What a call takes beside predictions and targets."""
        if self.case.boxes is None:
            return {}
        maps, size = list(self.maps), self.size
        if self.case.loss == "SSD":
            boxes = makers.ssd_anchors(maps, size, [(2,)] * len(maps), device=DEVICE)
        elif self.case.loss == "FCOS":
            boxes = makers.fcos_anchors(maps, size, [2 * stride for stride in self.strides], device=DEVICE)
        else:
            boxes = makers.retinanet_anchors(maps, size, [2 * stride for stride in self.strides], device=DEVICE)
        return {"anchors": boxes, "num_anchors_per_level": self.frame.sizes, "image_size": size}

    def rows(self, count: int, seed: int = 0) -> Tensor:
        """So many objects [count, 6] in all images, in any order."""
        generator = torch.Generator().manual_seed(seed)
        image = torch.randint(self.batch, (count, 1), generator=generator)
        label = torch.randint(*self.labels, (count, 1), generator=generator)
        centre, sides = torch.rand(2, count, 2, generator=generator).unbind(0)
        return torch.cat((image, label, centre, sides * 0.6 + 0.05), 1).float().to(DEVICE)

    def bind(self, backend: str) -> Callable[[list[Tensor], Any], Any]:
        """The loss as a function of predictions and targets alone."""
        criterion, geometry = self.criterion(backend), self.geometry
        return lambda preds, targets: criterion(self.pack(preds), targets, **geometry)


def _ascending(levels: list[Any]) -> list[Any]:
    """Anchors larger than those of the level before."""
    return [tuple((w * (1 + 0.5 * i), h * (1 + 0.5 * i)) for w, h in level) for i, level in enumerate(levels)]


@dataclass
class Result:
    """Numbers of a step, detached; ``counts`` are assigned predictions and invalid rows."""

    total: Tensor
    parts: dict[str, Tensor]
    counts: tuple[int, int]
    grads: list[Tensor]

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [self.total, *self.parts.values(), *self.grads]


def step(loss: Callable[[list[Tensor], Any], Any], preds: list[Tensor], targets: Any, scale: float = 1.0) -> Result:
    """Forward and backward, the total times ``scale``."""
    leaves = [pred.detach().requires_grad_() for pred in preds]
    out = loss(leaves, targets)
    grads = torch.autograd.grad(out.total * scale, leaves)
    return Result(out.total.detach(), dict(out.parts), (int(out.num_pos), int(out.num_invalid)), list(grads))


def same_bits(first: Result, second: Result) -> bool:
    """Whether two steps gave the same numbers."""
    pairs = zip(first.tensors, second.tensors, strict=True)
    return first.counts == second.counts and all(torch.equal(a, b) for a, b in pairs)
