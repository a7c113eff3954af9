"""Targets, and the tensors of :mod:`fusedyolo.functional`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .values import describe, fail, one_of

UNITS = ("relative", "pixel")
BOXES = ("cxcywh", "xyxy", "xywh")
BoxForm = tuple[str | None, str | None] | None
"""What was said of boxes in targets: their unit and their four numbers, None for what is usual."""


_HALVES = (torch.float16, torch.bfloat16)
_HALVED = ": halves hold no class above 256 or 2048, and move centres; keep targets out of casts"


def box_form(unit: Any, boxes: Any) -> BoxForm:
    """The unit of boxes in targets and their four numbers, as far as they are given; None where neither is."""
    if unit is None and boxes is None:
        return None
    return (
        None if unit is None else one_of("unit", unit, UNITS),
        None if boxes is None else one_of("boxes", boxes, BOXES),
    )


def target_size(image_size: tuple[float, float] | None, targets: Any, form: BoxForm = None) -> tuple[float, float]:
    """``image_size``, which targets in pixels cannot do without, as lists of dicts are and others that ``form``, of
    :func:`box_form`, says it of; others make do with (1, 1).
    """
    if image_size is None and isinstance(targets, list | tuple | Tensor):
        dicts = not isinstance(targets, Tensor) and bool(targets) and isinstance(targets[0], dict)
        unit = form[0] if form is not None and form[0] else ("pixel" if dicts else "relative")
        if unit == "pixel":
            fail("image_size", None, "(height, width) of the images, for targets in pixels")
    return image_size or (1, 1)


def same_device(name: str, value: Tensor, device: torch.device | None) -> None:
    """``value`` lies on ``device``, where the predictions are; anything will do without one."""
    if device is not None and value.device != device:
        fail(name, f"device {value.device}", f"{device} as preds")


def rows(
    name: str,
    value: Any,
    columns: int,
    ndim: int,
    layout: str,
    weights: bool = False,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64),
) -> Tensor:
    """``value``, a tensor of one of ``dtypes``, of ``ndim`` dimensions and ``columns`` columns, or with ``weights`` one
    more.
    """
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        fail(name, describe(value), f"a tensor of shape {layout}")
    if value.dim() != ndim or value.shape[-1] not in (columns, columns + weights):
        fail(name, f"shape {tuple(value.shape)}", layout + ", or a column more, of weights" * weights)
    if value.dtype not in dtypes:
        fail(name, f"dtype {value.dtype}", " or ".join(map(str, dtypes)) + _HALVED * (value.dtype in _HALVES))
    return value


def image_boxes(i: int, item: Any, order: str = "xyxy") -> tuple[Tensor, Tensor]:
    """The boxes ``[N, 4]`` and labels ``[N]`` of the ``i``-th image of a torchvision target list; torchvision's
    ``BoundingBoxes`` say themselves which numbers they are, and must agree with ``order``, one of :data:`BOXES`.
    """
    name = f"targets[{i}]"
    if not isinstance(item, dict):
        fail(name, describe(item), "a dict with 'boxes' and 'labels'" + ", or of each image a tensor (n, 5)" * (i == 0))
    if "boxes" not in item or "labels" not in item:
        fail(name, f"keys {list(item)}", "'boxes' and 'labels'")
    boxes, labels = item["boxes"], item["labels"]
    if not isinstance(boxes, Tensor) or boxes.layout is not torch.strided or boxes.dim() != 2 or boxes.shape[1] != 4:
        fail(f"{name}['boxes']", describe(boxes), "a tensor of shape (N, 4)")
    said = getattr(getattr(boxes, "format", None), "name", "").lower()
    if said not in ("", order):
        fail(f"{name}['boxes']", f"of format {said.upper()}", f"{order.upper()}, or boxes={said!r}")
    if isinstance(labels, Tensor) and labels.numel() == 0 == boxes.shape[0]:
        labels = labels.reshape(0)  # as some loaders leave an empty image
    if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.shape[0] != boxes.shape[0]:
        fail(f"{name}['labels']", describe(labels), f"a tensor of shape ({boxes.shape[0]},), one a box")
    for key, value in (("boxes", boxes), ("labels", labels)):
        if value.is_complex() or value.dtype == torch.bool:
            fail(f"{name}['{key}']", f"dtype {value.dtype}", "a real number type")
        if value.dtype in _HALVES:
            fail(f"{name}['{key}']", f"dtype {value.dtype}", f"torch.float32{_HALVED}")
    if labels.device != boxes.device:
        fail(f"{name}['labels']", f"device {labels.device}", f"{boxes.device} as the boxes")
    return boxes, labels


def row_weights(name: str, value: Any, of: Tensor) -> Tensor:
    """``value``, a real number for each of the rows, or boxes, ``of``, on their device."""
    row_flags(name, value, of)
    if value.dtype == torch.bool:
        fail(name, "dtype torch.bool", "a real number type")
    return value


def row_flags(name: str, value: Any, of: Tensor) -> Tensor:
    """``value``, a bool, or a number that is 0 or not, for each of the rows, or boxes, ``of``, on their device."""
    count = of.shape[0]
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.shape != (count,):
        fail(name, describe(value), f"a tensor of shape ({count},), one a row")
    if value.is_complex():
        fail(name, f"dtype {value.dtype}", "a real number type")
    if value.device != of.device:
        fail(name, f"device {value.device}", f"{of.device} as the rows")
    return value


def pair(name1: str, value1: Any, name2: str, value2: Any) -> None:
    """Two tensors of real numbers on one device."""
    for name, value in ((name1, value1), (name2, value2)):
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            fail(name, describe(value), "a tensor")
        if value.is_complex() or value.dtype == torch.bool:
            fail(name, f"dtype {value.dtype}", "a real number type")
    if value1.device != value2.device:
        fail(name2, f"device {value2.device}", f"{value1.device} as {name1}")
