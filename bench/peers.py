"""The losses of other libraries, where those are installed, on the predictions and the objects of a case.

Each is called as its own training calls it, on objects in the form that its own data loader makes. That form is made
once, before anything is measured; what a loss does to predictions in another layout than its own is part of its cost.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from operator import attrgetter
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from fusedyolo import Targets
from fusedyolo.tools.parity import Loss
from fusedyolo.tools.registry import DTYPES, WARMED_UP, Case, Workload

Bound = Callable[[list[Tensor]], Tensor]
"""From predictions to the total, of shape ()."""


@dataclass(frozen=True)
class Peer:
    """A library, by the name that it is installed as, and what it computes."""

    name: str
    module: str  # that has the losses
    cases: tuple[str, ...]
    bind: Callable[[Any, Workload, str], Bound]
    note: str = ""  # what a count of it on a CPU does not say
    needs: str = ""  # what its module has in the version whose loss this is

    def missing(self) -> str:
        """Why it cannot be used, in a line; empty if it can."""
        return _why_not(self.name, self.module, self.needs)

    def loss(self, case: Case, work: Workload, device: str = "cpu") -> Loss:
        """Its loss of one of its cases, bound to a workload, whose predictions and targets it is later called with.

        Predictions of half precision are taken under autocast, as in its training.
        """
        bound, dtype, kind = self.bind(case, work, device), DTYPES[work.dtype], torch.device(device).type

        def loss(preds: list[Tensor], targets: Any) -> SimpleNamespace:
            with torch.autocast(kind, dtype) if dtype.itemsize == 2 else nullcontext():
                return SimpleNamespace(total=bound(preds))

        return loss


def of(case: Case) -> list[Peer]:
    """The installed peers that compute a case."""
    return [peer for peer in PEERS.values() if case.name in peer.cases and not peer.missing()]


# --------------------------------------------------------------------------------------------------------------- import


@lru_cache
def torchvision() -> ModuleType:
    """The module.

    Wheels for a GPU do not load their compiled operators beside a CPU build of PyTorch, and even importing them fails
    then, for it describes an operator that is not there. Two declarations are enough for all that is Python in it.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # what the first attempt has left
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return import_module("torchvision")


def _load(name: str) -> ModuleType:
    """A module of a peer; all of them need torchvision. It is to install nothing, nor to ask the network."""
    quiet = mock.patch.dict(os.environ, YOLO_AUTOINSTALL="false", YOLO_OFFLINE="true")  # undoes their changes, too
    with quiet, redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchvision()
        return import_module(name)


@lru_cache
def _why_not(package: str, module: str, needs: str) -> str:
    try:
        if find_spec(module.partition(".")[0]) is None:
            return f"{package} is not installed"
        attrgetter(needs or "__name__")(_load(module))
    except (Exception, SystemExit) as error:  # whatever a package does when something it wants is not there
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


# -------------------------------------------------------------------------------------------------------------- objects


def _rows(case: Case, work: Workload) -> Tensor:
    """The objects as packed rows, sorted by image."""
    targets = case.targets(work)
    rows = targets.rows if isinstance(targets, Targets) else targets
    return rows[rows[:, 0].argsort(stable=True)]


def _by_image(case: Case, work: Workload) -> list[Tensor]:
    """Rows of class, cx, cy, w, h for each image."""
    rows = _rows(case, work)
    return [rows[rows[:, 0] == image, 1:] for image in range(work.batch)]


class _Detector(nn.Module):
    """What a loss looks at of the model that it is made for: settings, those of the last layer, and the device."""

    def __init__(self, device: str, settings: dict[str, Any], **layer: Any):
        super().__init__()
        self.anything = nn.Parameter(torch.zeros((), device=device))
        self.model = [SimpleNamespace(**layer)]
        self.__dict__ |= settings


# ------------------------------------------------------------------------------------------------------------ libraries


def _torchvision(case: Case, work: Workload, device: str) -> Bound:
    classes, geometry = work.classes + case.background, case.geometry(work, device)
    anchors, sizes = [geometry["anchors"]] * work.batch, geometry["num_anchors_per_level"]
    targets = []
    for rows in _by_image(case, work):
        centre, half = rows[:, 1:3], rows[:, 3:] * 0.5
        # Rounded as our losses read such rows: anchors that hold an object whole have the same overlap with it, and
        # which of them takes it is up to the last bit.
        corners = torch.cat((centre - half, centre + half), 1) * work.size
        targets.append({"boxes": corners.to(device), "labels": rows[:, 0].long().to(device)})
    levels, rows_already = len(case.strides), case.layout(work) == "rows"
    names = ("cls_logits", "bbox_regression", "bbox_ctrness")
    compute = _compute(case, work.size, classes)

    def total(preds: list[Tensor]) -> Tensor:
        if not rows_already:
            preds = [_to_rows(preds[i : i + levels], sizes) for i in range(0, len(preds), levels)]
        return sum(compute(targets, dict(zip(names, preds, strict=False)), anchors, sizes).values())

    return total


def _compute(case: Case, size: int, classes: int) -> Callable[..., dict[str, Tensor]]:
    """The losses of a model that has no backbone: of targets, outputs, anchors, and how many of these a level has."""
    detection, channels = _load("torchvision.models.detection"), SimpleNamespace(out_channels=32)
    if case.name == "RetinaNet":
        retinanet = detection.RetinaNet(channels, classes)
        return lambda targets, outputs, anchors, sizes: retinanet.compute_loss(targets, outputs, anchors)
    if case.name == "FCOS":
        return detection.FCOS(channels, classes).compute_loss
    box_iou, channels.out_channels = _load("torchvision.ops").box_iou, [32] * len(case.cell)
    default_boxes = detection.anchor_utils.DefaultBoxGenerator([[2] if n == 4 else [2, 3] for n in case.cell])
    ssd = detection.ssd.SSD(channels, default_boxes, (size, size), classes)

    def compute(targets: list[dict], outputs: dict, anchors: list[Tensor], sizes: list[int]) -> dict[str, Tensor]:
        matched = []  # which its forward does
        for image, boxes in zip(targets, anchors, strict=True):
            if len(image["boxes"]):
                found = ssd.proposal_matcher(box_iou(image["boxes"], boxes))
            else:
                found = torch.full((len(boxes),), -1, dtype=torch.int64, device=boxes.device)
            matched.append(found)
        return ssd.compute_loss(targets, outputs, anchors, matched)

    return compute


def _to_rows(maps: list[Tensor], sizes: list[int]) -> Tensor:
    """Maps ``[B, anchors * channels, H, W]`` in one piece ``[B, N, channels]``, as a head does."""
    pieces = [level.permute(0, 2, 3, 1).reshape(len(level), size, -1) for level, size in zip(maps, sizes, strict=True)]
    return torch.cat(pieces, dim=1)


def _yolov5(case: Case, work: Workload, device: str) -> Bound:
    classes, anchors = work.classes, torch.tensor(case.anchors, device=device)
    stride = torch.tensor(case.strides, device=device)
    detector = _Detector(
        device,
        {"hyp": dict(case.build(classes, "torch").hyp)},
        nc=classes,
        na=anchors.shape[1],
        nl=len(anchors),
        stride=stride,
        anchors=anchors / stride.view(-1, 1, 1),
    )
    criterion = _load("yolov5.utils.loss").ComputeLoss(detector)
    rows = _rows(case, work).to(device)

    def total(preds: list[Tensor]) -> Tensor:
        maps = [p.unflatten(1, (-1, 5 + classes)).permute(0, 1, 3, 4, 2).contiguous() for p in preds]  # as its head
        return criterion(maps, rows)[0].reshape(())

    return total


def _lightnet(case: Case, work: Workload, device: str) -> Bound:
    anchors = _load("lightnet.util").Anchors.from_output(case.strides[0], case.anchors[0])
    region = _load("lightnet.network.loss").RegionLoss
    hyp = case.build(work.classes, "torch").hyp
    criterion = region(work.classes, anchors, case.strides[0], seen=WARMED_UP, **hyp)
    # on the host, where it looks for them
    padded = nn.utils.rnn.pad_sequence(_by_image(case, work), batch_first=True, padding_value=-1)
    match = criterion.build_targets

    def on_host(*args: Any) -> Any:
        with _disable_current_modes():  # it launches nothing, so there is nothing to count
            return match(*args)

    criterion.build_targets = on_host
    return lambda preds: criterion(preds[0].contiguous(), padded)  # it knows no other layout


def _ultralytics(case: Case, work: Workload, device: str) -> Bound:
    losses = _load("ultralytics.utils.loss")
    detector = _Detector(
        device,
        {"args": _load("ultralytics.utils").DEFAULT_CFG},
        nc=work.classes,
        reg_max=case.head(work.classes).reg_max,
        stride=torch.tensor(case.strides, dtype=torch.float32, device=device),
    )
    criterion = losses.E2ELoss(detector) if case.branches else losses.v8DetectionLoss(detector)
    image, label, boxes = _rows(case, work).to(device).split((1, 1, 4), dim=1)
    objects = {"batch_idx": image.flatten(), "cls": label, "bboxes": boxes}
    nothing = torch.zeros((), dtype=DTYPES[work.dtype], device=device)  # of features the loss asks for their size alone
    features = [nothing.expand(work.batch, 1, *size) for size in case.maps(work)]

    def branch(own: dict[str, Any]) -> dict[str, Any]:
        """As its head makes it: in one piece ``[B, C, N]`` of maps ``[B, C, H, W]``."""
        found: dict[str, Any] = {"feats": features}
        for name in ("boxes", "scores"):
            maps = own[name]
            found[name] = maps if isinstance(maps, Tensor) else torch.cat([each.flatten(2) for each in maps], 2)
        return found

    def total(preds: list[Tensor]) -> Tensor:
        packed = case.pack(preds, work)
        found = {name: branch(own) for name, own in packed.items()} if case.branches else branch(packed)
        return criterion(found, objects)[0].sum()

    return total


def _yolox(case: Case, work: Workload, device: str) -> Bound:
    head = _load("yolox.models").YOLOXHead(work.classes, 1 / 32, in_channels=[256] * len(case.strides)).to(device)
    pixels = torch.tensor([1.0] + [work.size] * 4)  # labels, and boxes
    images = [rows * pixels for rows in _by_image(case, work)]
    labels, maps = nn.utils.rnn.pad_sequence(images, batch_first=True).to(device), case.maps(work)
    areas = [height * width for height, width in maps]

    def by_level(values: Any) -> list[Tensor]:
        if not isinstance(values, Tensor):
            return values
        return [part.unflatten(2, sides) for part, sides in zip(values.split(areas, 2), maps, strict=True)]

    def total(preds: list[Tensor]) -> Tensor:
        outputs, grids, strides = [], [], []
        packed = case.pack(preds, work)
        parts_of = [by_level(packed[name]) for name in ("boxes", "objectness", "scores")]
        levels = zip(*parts_of, case.strides, strict=True)
        for level, (*parts, stride) in enumerate(levels):
            output, grid = head.get_output_and_grid(torch.cat(parts, 1), level, stride, parts[0].type())
            outputs.append(output)
            grids.append(grid)
            strides.append(torch.full((1, grid.shape[1]), stride).type_as(output))
        x, y = ([grid[..., axis] for grid in grids] for axis in (0, 1))
        return head.get_losses(None, x, y, strides, labels, torch.cat(outputs, 1), [], dtype=outputs[0].dtype)[0]

    return total


HOST = "matches on the host; copies to it and back are no launches and no waits in a count on a CPU"
PEERS = {
    peer.name: peer
    for peer in (
        Peer("torchvision", "torchvision.models.detection", ("RetinaNet", "SSD", "FCOS"), _torchvision),
        Peer("lightnet", "lightnet.network.loss", ("YOLOv2/lightnet",), _lightnet, HOST),
        Peer("yolov5", "yolov5.utils.loss", ("YOLOv5",), _yolov5),
        Peer("ultralytics", "ultralytics.utils.loss", ("YOLOv8", "E2E/yolo26"), _ultralytics),
        Peer("yolox", "yolox.models", ("YOLOX",), _yolox, needs="YOLOXHead.get_geometry_constraint"),
    )
}
"""Other libraries by name, installed or not."""
