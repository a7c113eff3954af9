"""Targets in one form, from each form that data loaders make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks
from .kernels.launch import LARGEST_SIDE

SORT_ABOVE = 4096
"""Packed rows beyond this many are sorted by image, so that a kernel reads only those of its own image."""

Boxes = tuple[str, str]
"""The unit and the four numbers of a box, of :data:`~fusedyolo.checks.UNITS` and :data:`~fusedyolo.checks.BOXES`."""

RELATIVE: Boxes = ("relative", "cxcywh")
"""What boxes are in every form of targets but one, unless something else is said."""

CORNERS: Boxes = ("pixel", "xyxy")
"""And in that one: a torchvision list of dicts."""

REGION = -1.0
"""The weight of what a list of dicts says is to be ignored."""

Read = tuple[Tensor, Tensor | None, Tensor | None]
"""Rows, their offsets and their weights, None where there are none."""


class Targets:
    """The objects of a batch, sorted by image; made once, in ``collate_fn`` for example.

    Attributes:
        rows: float32 ``[M, 6]``: image, class, cx, cy, w, h, the box normalised to the image. Rows of one image keep
            the order in which they came.
        offsets: int32 ``[B + 2]``: the rows of image ``b`` are ``rows[offsets[b]:offsets[b + 1]]``. Rows that name no
            image of the batch follow (a loss counts them as invalid) and end at ``offsets[B + 1]``; what is beyond is
            capacity, and no row at all. An offset that is negative, beyond the rows or below the one before is cut to
            the rows and counted as invalid, like each row that lies outside the range of its image.
        batch_size: B, the number of images.
        weights: float32 ``[M]``, one a row, or None where all are 1.

    A weight of 0 or more multiplies every term of a loss that its row causes, the class weight with it, at the
    predictions that answer for it: box, objectness, centreness, and all class terms of such a prediction. Where several
    rows share a prediction, each has its own terms, and objectness is that of the row that trains it. With a weight of
    0 these predictions take no part (VOC's "difficult", a pseudo-label not to be trusted). What a loss divides by, and
    how many negatives count, is what it is without weights, so that all gradients are linear in them.

    A weight below 0 makes a row an *ignored region* (COCO's crowds): it is assigned to nothing, and predictions whose
    anchor point lies in its box, the left and upper edge included, are not background. Those that answer for an object
    are trained as ever. The anchor point is the middle of the cell, or of the anchor where a loss is over anchors. A
    weight that is not finite makes a row invalid.

    Code that casts a batch, as Lightning's ``precision="bf16-true"`` does, leaves these as they are: half precision
    holds no class above 256 or 2048, and moves centres.

    With a fixed ``capacity`` the tensors have the same shape in every batch, as a CUDA graph needs: copy them into the
    ones that were captured.

    Raises:
        ValueError: a tensor of another shape, dtype or device.
    """

    def __init__(self, rows: Tensor, offsets: Tensor, batch_size: int, weights: Tensor | None = None):
        checks.count("batch_size", batch_size, 0)
        checks.rows("rows", rows, 6, 2, "(M, 6)", dtypes=(torch.float32,))
        if not rows.is_contiguous():
            checks.fail("rows", "a strided view", "a contiguous tensor")
        if not isinstance(offsets, Tensor) or offsets.shape != (batch_size + 2,):
            checks.fail("offsets", checks.describe(offsets), f"a tensor of shape ({batch_size + 2},)")
        if offsets.dtype != torch.int32:
            checks.fail("offsets", f"dtype {offsets.dtype}", "torch.int32")
        if offsets.device != rows.device:
            checks.fail("offsets", f"device {offsets.device}", f"{rows.device} as rows")
        if weights is not None:
            checks.row_weights("weights", weights, rows)
            if weights.dtype != torch.float32 or not weights.is_contiguous():
                got = f"dtype {weights.dtype}" if weights.dtype != torch.float32 else "a strided view"
                checks.fail("weights", got, "a contiguous tensor of torch.float32")
        self.rows, self.offsets, self.batch_size = _constant(rows), offsets, batch_size
        self.weights = None if weights is None else _constant(weights)

    @classmethod
    def from_packed(
        cls,
        packed: Tensor,
        batch_size: int,
        capacity: int | None = None,
        *,
        unit: str = "relative",
        boxes: str = "cxcywh",
        image_size: int | Sequence[Any] | None = None,
    ) -> Targets:
        """From rows ``[M, 6]`` of image, class and a box, in any order; by default cx, cy, w, h relative to the image.
        A seventh column holds weights, see the class.

        Args:
            packed: the rows.
            batch_size: B.
            capacity: see the class.
            unit: ``"relative"`` (the default: the sides of the image are 1) or ``"pixel"``.
            boxes: ``"cxcywh"`` (the default), ``"xyxy"`` (corners) or ``"xywh"`` (left upper corner, width, height).
            image_size: (height, width) of the batch, for a ``unit`` of pixels.

        Raises:
            ValueError: another shape or dtype, pixels of an unknown size, or more rows than ``capacity``.
        """
        batch_size = checks.count("batch_size", batch_size, 0)
        checks.rows("packed", packed, 6, 2, "(M, 6)", weights=True)
        form = chosen(checks.box_form(unit, boxes), RELATIVE)
        rows, offsets = _sort(packed.detach().to(torch.float32), batch_size)
        rows, weights = _apart(rows)
        rows = relative(rows, form, _size_for(form, image_size))
        return cls(_fill("packed", rows, capacity), offsets, batch_size, _fill_weights(weights, capacity))

    @classmethod
    def from_torchvision(
        cls,
        targets: Sequence[dict[str, Tensor]],
        image_size: int | Sequence[Any] | None = None,
        capacity: int | None = None,
        *,
        unit: str = "pixel",
        boxes: str = "xyxy",
    ) -> Targets:
        """From one dict an image with ``"boxes"`` (``[N, 4]``) and ``"labels"`` (``[N]``); by default x1, y1, x2, y2 in
        pixels.

        Labels are taken as they are: class 0 is a class, not the background. An image may have ``"weights"`` (``[N]``,
        see the class), and ``"iscrowd"`` or ``"ignore"`` (``[N]``, true or 1 for an ignored region, whatever its
        weight).

        Args:
            targets: the dicts.
            image_size: (height, width) of the batch, or one pair for each image; not needed for relative boxes.
            capacity: see the class.
            unit: ``"pixel"`` (the default) or ``"relative"`` (the sides of the image are 1).
            boxes: ``"xyxy"`` (the default: corners), ``"xywh"`` (left upper corner, width, height) or ``"cxcywh"``.
                Torchvision's ``BoundingBoxes`` must be of that format.

        Raises:
            ValueError: another layout, pixels of an unknown size, or more boxes than ``capacity``.
        """
        if not isinstance(targets, list | tuple) or not targets:
            checks.fail("targets", checks.describe(targets), "a list of {'boxes', 'labels'}, one an image")
        form = chosen(checks.box_form(unit, boxes), CORNERS)
        rows, offsets, weights = corner_rows(targets, len(targets), order=form[1])
        if form[0] == "pixel":
            sizes = checks.image_sizes(image_size, len(targets))
            rows = relative(rows, form, _each(sizes, [len(item["boxes"]) for item in targets], rows))
        else:
            rows = relative(rows, form, None)
        return cls(_fill("targets", rows, capacity), offsets, len(targets), _fill_weights(weights, capacity))

    @classmethod
    def from_padded(
        cls,
        padded: Tensor,
        capacity: int | None = None,
        *,
        unit: str = "relative",
        boxes: str = "cxcywh",
        image_size: int | Sequence[Any] | None = None,
    ) -> Targets:
        """From ``[B, G, 5]`` of class and a box, by default cx, cy, w, h relative to the image; loaders of YOLOX have
        pixels: ``unit="pixel"``.

        A row of zeros and a row whose class is below 0 are padding, wherever they stand, and are not counted. A sixth
        column holds weights, see the class. Arguments are otherwise those of :meth:`from_packed`.

        Raises:
            ValueError: another shape or dtype, pixels of an unknown size, or a ``capacity`` below ``B * G``.
        """
        checks.rows("padded", padded, 5, 3, "(B, G, 5)", weights=True)
        form = chosen(checks.box_form(unit, boxes), RELATIVE)
        rows, offsets, weights = _from_padded(padded)
        rows = relative(rows, form, _size_for(form, image_size))
        return cls(_fill("padded", rows, capacity), offsets, padded.shape[0], _fill_weights(weights, capacity))

    def pin_memory(self) -> Targets:
        """A copy in page-locked memory; a ``DataLoader`` with ``pin_memory=True`` calls it."""
        weights = None if self.weights is None else self.weights.pin_memory()
        return Targets(self.rows.pin_memory(), self.offsets.pin_memory(), self.batch_size, weights)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Targets:
        """The same targets on ``device``."""
        rows = self.rows.to(device, non_blocking=non_blocking)
        offsets = self.offsets.to(device, non_blocking=non_blocking)
        weights = None if self.weights is None else self.weights.to(device, non_blocking=non_blocking)
        if rows is self.rows and offsets is self.offsets and weights is self.weights:
            return self
        return Targets(rows, offsets, self.batch_size, weights)

    def validate(self, num_classes: Any) -> Targets:
        """These targets, if every row is one that a loss would use as it is; free in ``collate_fn``, a host sync on a
        GPU.

        Args:
            num_classes: the number of classes, or the loss itself. Some take a centre on the right or the lower border
                of the image, 1, as their peers do (YOLOv5, YOLOv7, Scaled-YOLOv4, YOLOX, YOLOv8, end-to-end heads), and
                ``SSDLoss`` has no object of class 0; a number stands for a loss that does neither.

        Raises:
            ValueError: names the first row, by its place in ``rows``, that a loss would skip and count as invalid, or
                whose image or class is no whole number, of which a loss drops the fraction.
        """
        head = getattr(num_classes, "head", None)
        if head is None and hasattr(num_classes, "criterion"):  # a GlobalLoss
            checks.fail("num_classes", checks.describe(num_classes), "a number, or its .criterion")
        limit, first = getattr(head, "centre_limit", 1.0), int(getattr(head, "background", False))
        num_classes = checks.count("num_classes", num_classes if head is None else head.num_classes)
        below = "< 1" if limit == 1 else "<= 1"
        wrong = _wrong(self.offsets, len(self.rows)).nonzero().flatten().tolist()
        if wrong:
            got, want = (
                self.offsets[wrong[0]].item(),
                f"0 <= offset <= {len(self.rows)}, and no offset below the one before",
            )
            checks.fail(f"offsets[{wrong[0]}]", got, want)
        end = int(self.offsets[-1])
        rows = self.rows[:end].cpu()
        image, label, cx, cy, w, h = rows.unbind(1)
        emptied, _ = without_spare(rows, self.offsets.cpu())
        misplaced = (emptied == 0).all(1) & (rows != 0).any(1)
        weights = torch.ones(end, device="cpu") if self.weights is None else self.weights[:end].cpu()
        faults = (
            (~rows.isfinite().all(1), "not finite", "six finite numbers"),
            (~weights.isfinite(), "its weight is not finite", "a finite weight"),
            ((image < 0) | (image >= self.batch_size), "no such image", f"0 <= image < {self.batch_size}"),
            (misplaced, "not in the range of its image", "offsets[image] <= row < offsets[image + 1]"),
            ((label < first) | (label >= num_classes), "class out of range", f"{first} <= class < {num_classes}"),
            (image != image.floor(), "image between two", "a whole number"),
            (label != label.floor(), "class between two", "a whole number"),
            ((w <= 0) | (h <= 0), "zero area", "w > 0 and h > 0"),
            ((w >= LARGEST_SIDE) | (h >= LARGEST_SIDE), "too large", f"w < {LARGEST_SIDE:g} and h < {LARGEST_SIDE:g}"),
            (
                (cx < 0) | (cx >= limit) | (cy < 0) | (cy >= limit),
                "centre outside the image",
                f"0 <= cx {below} and 0 <= cy {below}",
            ),
        )
        for i in torch.stack([bad for bad, _, _ in faults]).any(0).nonzero().flatten().tolist():
            reason, want = next((reason, want) for bad, reason, want in faults if bad[i])
            row = ", ".join(f"{v:g}" for v in rows[i].tolist())
            checks.fail(f"targets row {i} [{row}] (image, class, cx, cy, w, h)", reason, want)
        return self

    def __repr__(self) -> str:
        weighed = "" if self.weights is None else ", weighed"
        return (
            f"Targets(rows={list(self.rows.shape)}, batch_size={self.batch_size}, device={self.rows.device}{weighed})"
        )


def as_targets(
    targets: Any,
    batch_size: int,
    image_size: tuple[float, float],
    device: torch.device | None = None,
    form: checks.BoxForm = None,
    as_they_are: bool = False,
) -> Read:
    """Rows ``[M, 6]`` of boxes relative to the image, their offsets where they are sorted, and their weights where they
    have some, from any form of targets a loss accepts.

    The forms: :class:`Targets`; packed ``[M, 6]``, which passes through untouched if it is contiguous float32 of up to
    ``SORT_ABOVE`` rows; padded ``[B, G, 5]``; a list of ``[n, 5]`` of class and box, one an image; each of these with a
    column of weights behind the others; a torchvision list of dicts. Boxes are what ``form``, of
    :func:`fusedyolo.checks.box_form`, says, else :data:`CORNERS` in dicts and :data:`RELATIVE` in all others; pixels
    are those of ``image_size`` (height, width). With ``as_they_are`` boxes stay what they are. :class:`Targets` have
    said it themselves. Nothing waits for the device.

    Raises:
        ValueError: none of these, or for another batch size, or on another device than ``device``.
    """
    if isinstance(targets, Targets):
        checks.same_device("targets", targets.rows, device)
        if targets.batch_size != batch_size:
            checks.fail("targets", f"Targets of {targets.batch_size} images", f"{batch_size} as preds")
        return targets.rows, targets.offsets, targets.weights
    usual, offsets, weights = RELATIVE, None, None
    if isinstance(targets, Tensor):
        checks.same_device("targets", targets, device)
        if targets.dim() == 3:
            checks.rows("targets", targets, 5, 3, "(M, 6) or (B, G, 5)", weights=True)
            if targets.shape[0] != batch_size:
                checks.fail(
                    "targets", f"shape {tuple(targets.shape)}", f"({batch_size}, G, 5), as many images as preds"
                )
            rows, offsets, weights = _from_padded(targets)
        else:
            checks.rows("targets", targets, 6, 2, "(M, 6) or (B, G, 5)", weights=True)
            packed = targets.detach() if targets.requires_grad else targets
            rows = packed if packed.dtype == torch.float32 else packed.to(torch.float32)
            if rows.shape[0] > SORT_ABOVE:
                rows, offsets = _sort(rows, batch_size)
            if rows.shape[1] > 6:
                rows, weights = _apart(rows)
            rows = rows.contiguous()
    elif isinstance(targets, list | tuple):
        if targets and isinstance(targets[0], Tensor):
            rows, offsets, weights = _tensor_rows(targets, batch_size, device)
        else:
            order = chosen(form, CORNERS)[1]
            usual, (rows, offsets, weights) = CORNERS, corner_rows(targets, batch_size, device, order)
    else:
        checks.fail(
            "targets",
            checks.describe(targets),
            "a tensor (M, 6) or (B, G, 5), a list of {'boxes', 'labels'} or of tensors (n, 5), or fusedyolo.Targets",
        )
    if as_they_are or (form is None and usual is RELATIVE):
        return rows, offsets, weights
    return relative(rows, chosen(form, usual), image_size), offsets, weights


def in_corners(targets: Any, form: checks.BoxForm) -> bool:
    """Whether boxes of targets, of which a loss was told ``form``, are corners in pixels."""
    if isinstance(targets, Targets):
        return False
    dicts = isinstance(targets, list | tuple) and bool(targets) and isinstance(targets[0], dict)
    return chosen(form, CORNERS if dicts else RELATIVE) == CORNERS


def chosen(form: checks.BoxForm, usual: Boxes) -> Boxes:
    """``usual``, with what ``form`` says in its place."""
    return usual if form is None else (form[0] or usual[0], form[1] or usual[1])


def relative(rows: Tensor, form: Boxes, size: tuple[Any, Any] | None) -> Tensor:
    """``rows``, whose last four columns are boxes of ``form``, with :data:`RELATIVE` ones of an image of ``size``.

    That is (height, width) in pixels, which relative boxes do not need: numbers, or of each row one.
    """
    unit, boxes = form
    if form == RELATIVE:
        return rows
    a, b = rows[:, 2:4], rows[:, 4:]
    sides = b - a if boxes == "xyxy" else b
    centre = {"xyxy": lambda: (a + b) * 0.5, "xywh": lambda: a + b * 0.5, "cxcywh": lambda: a}[boxes]()
    if unit == "pixel":
        assert size is not None
        # tensors, for a GPU multiplies by the reciprocal of a number, and a centre may leave its cell
        height, width = (side if isinstance(side, Tensor) else rows.new_full((), side) for side in size)
        image = torch.stack((width, height), -1)
        centre, sides = centre / image, sides / image
    return torch.cat((rows[:, :2], centre, sides), 1)


def _constant(given: Tensor) -> Tensor:
    """``given``, or where a gradient is asked for, which a loss has none of, the same numbers without."""
    return given.detach() if given.requires_grad else given


def without_spare(rows: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows and offsets of :func:`as_targets`, for code that knows no offsets: rows that these leave out are emptied.

    Empty are rows of capacity, and those that do not lie in the range of their own image. Also returns what the empty
    rows are too many among the invalid ones: the rows of capacity less the offsets that are wrong, which count as
    invalid (beyond the rows, or below the one before). That is a 0-dim int32 tensor; without offsets ``rows`` is
    untouched, and it is None. Nothing waits for the device.
    """
    if offsets is None:
        return rows, None
    place = torch.arange(rows.shape[0], device=rows.device)
    spare = place >= offsets[-1]
    image = rows[:, 0]
    known = (image >= 0) & (image < offsets.shape[0] - 2)  # a NaN is not
    image = torch.where(known, image, 0).long()
    outside = known & ((place < offsets[image]) | (place >= offsets[image + 1]))
    rows = rows.masked_fill((spare | outside)[:, None], 0.0)
    return rows, spare.sum(dtype=torch.int32) - _wrong(offsets, rows.shape[0]).sum(dtype=torch.int32)


def _wrong(offsets: Tensor, rows: int) -> Tensor:
    """[B + 2] bool: offsets beyond the rows, or below the one before."""
    before = torch.nn.functional.pad(offsets[:-1], (1, 0))
    return (offsets < 0) | (offsets > rows) | (offsets < before)


def _sort(packed: Tensor, batch_size: int, image: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows sorted stably by image, and where each image begins.

    ``image`` (int32 ``[M]``) overrides the column: ``batch_size`` for a row of no image, one more for no row at all.
    """
    if image is None:
        column = packed[:, 0]
        image = torch.where((column >= 0) & (column < batch_size), column, batch_size).to(torch.int32)
    key, order = torch.sort(image, stable=True)
    return packed.index_select(0, order), _offsets(key, batch_size)


def _offsets(key: Tensor, batch_size: int) -> Tensor:
    bounds = torch.arange(batch_size + 2, dtype=torch.int32, device=key.device)
    return torch.searchsorted(key, bounds, out_int32=True)


def _apart(rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Rows and their weights, of rows that may have a column of these."""
    return (rows, None) if rows.shape[1] == 6 else (rows[:, :6].contiguous(), rows[:, 6].contiguous())


def _from_padded(padded: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    batch_size, per_image, _ = padded.shape
    padded = padded.detach().to(torch.float32)
    image = torch.arange(batch_size, dtype=torch.float32, device=padded.device)[:, None, None]
    packed = torch.cat([image.expand(-1, per_image, -1), padded], 2).flatten(0, 1)
    absent = ((padded[..., 0] < 0) | (padded[..., :5] == 0).all(-1)).flatten()
    rows, offsets = _sort(packed, batch_size, torch.where(absent, batch_size + 1, packed[:, 0]).to(torch.int32))
    rows, weights = _apart(rows)
    return rows, offsets, weights


def corner_rows(
    targets: Sequence[Any], batch_size: int, device: torch.device | None = None, order: str = CORNERS[1]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`as_targets`, as they are, of a torchvision list of dicts; ``order`` is that of a box's four numbers.

    Raises:
        ValueError: no such list, or for another batch size, or on another device than ``device``.
    """
    if len(targets) != batch_size:
        kinds = "dicts" if targets and isinstance(targets[0], dict) else "dicts or tensors (n, 5)"
        checks.fail("targets", f"a list of {len(targets)}", f"{batch_size} {kinds}, one an image of preds")
    items = [(*checks.image_boxes(i, item, order), _weights_of(i, item)) for i, item in enumerate(targets)]
    return _listed(items, "targets[{}]['boxes']", device)


def _weights_of(i: int, item: dict[str, Any]) -> Tensor | None:
    """The weights of the ``i``-th image of a torchvision list that :func:`checks.image_boxes` has seen."""
    boxes = item["boxes"]
    found: Tensor | None = None
    if "weights" in item:
        found = checks.row_weights(f"targets[{i}]['weights']", item["weights"], boxes).detach().to(torch.float32)
    for key in ("iscrowd", "ignore"):
        if key in item:
            flags = checks.row_flags(f"targets[{i}]['{key}']", item[key], boxes)
            found = boxes.new_ones(len(boxes), dtype=torch.float32) if found is None else found
            found = found.masked_fill(flags != 0, REGION)
    return found


def _tensor_rows(
    targets: Sequence[Any], batch_size: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`as_targets`, as they are, of a list of tensors [n, 5], or [n, 6] with weights."""
    if len(targets) != batch_size:
        checks.fail("targets", f"a list of {len(targets)}", f"{batch_size} tensors (n, 5), one an image of preds")
    each = [checks.rows(f"targets[{i}]", item, 5, 2, "(n, 5)", weights=True) for i, item in enumerate(targets)]
    items = [(item[:, 1:5], item[:, 0], item[:, 5] if item.shape[1] > 5 else None) for item in each]
    return _listed(items, "targets[{}]", device)


def _listed(
    items: list[tuple[Tensor, Tensor, Tensor | None]], name: str, device: torch.device | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows, offsets and weights of boxes [n, 4], labels [n] and perhaps weights [n] of each image, which are 1 where
    only others have some; ``name`` is that of an image's tensors.
    """
    first = items[0][0].device
    for i, (boxes, _, _) in enumerate(items):
        if boxes.device != first:
            checks.fail(name.format(i), f"device {boxes.device}", f"{first} as targets[0]")
    checks.same_device("targets", items[0][0], device)
    boxes = torch.cat([boxes.detach().to(torch.float32) for boxes, _, _ in items])
    label = torch.cat([label.detach().to(torch.float32) for _, label, _ in items])
    image = torch.cat([boxes.new_full((len(label),), i) for i, (_, label, _) in enumerate(items)])
    weights = None
    if any([own is not None for *_, own in items]):
        weights = torch.cat(
            [boxes.new_ones(len(label)) if own is None else own.detach().to(torch.float32) for _, label, own in items]
        )
    rows = torch.cat((image[:, None], label[:, None], boxes), 1)
    return rows, _offsets(image.to(torch.int32), len(items)), weights


def _each(sizes: Sequence[tuple[float, float]], counts: Sequence[int], like: Tensor) -> tuple[Any, Any]:
    """The size of the image of each row, of a list of images with so many rows each; one pair if all are the same."""
    if all(size == sizes[0] for size in sizes):
        return sizes[0]
    height, width = (
        torch.cat([like.new_full((count,), side) for side, count in zip(sides, counts, strict=True)])
        for sides in zip(*sizes, strict=True)
    )
    return height, width


def _size_for(form: Boxes, image_size: Any) -> tuple[float, float] | None:
    """(height, width), where boxes of ``form`` need it."""
    if form[0] == "relative":
        return None
    if image_size is None:
        checks.fail("image_size", None, "(height, width) of the images, for targets in pixels")
    return checks.size("image_size", image_size)


def _fill(name: str, rows: Tensor, capacity: int | None) -> Tensor:
    """``rows`` and as many rows of zeros as make up the capacity."""
    if capacity is None:
        return rows
    spare = checks.count("capacity", capacity, 0) - rows.shape[0]
    if spare < 0:
        checks.fail(name, f"{rows.shape[0]} rows", f"at most {capacity}, the capacity")
    return torch.nn.functional.pad(rows, (0, 0, 0, spare))


def _fill_weights(weights: Tensor | None, capacity: int | None) -> Tensor | None:
    """The same of their weights."""
    if weights is None or capacity is None:
        return weights
    return torch.nn.functional.pad(weights, (0, capacity - weights.shape[0]))
