"""What is wrong with all targets of a data loader, found in the first batches of a loss without waiting for a GPU."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import checks

BATCHES = 3
"""Calls of a loss that are looked at."""

FEWEST = 8
"""Rows that must have come before anything is said of them."""

LONGEST = 32
"""Calls after which it ends, however few rows have come."""

SMALLEST = 16
"""Pixels of an image's side, from which on no data set has all its boxes in the first one."""

ALMOST = 1.001
"""A pixel, and what a sum of float32 may be too large."""


class _Seen(NamedTuple):
    """A call: its tensors, on the CPU, once ``event`` has passed."""

    rows: Tensor
    offsets: Tensor | None
    counts: Tensor
    size: tuple[float, float] | None
    corners: bool
    weights: Tensor | None
    event: Any


class Watch:
    """Looks at the targets of the first calls of a loss, and warns once of what makes it skip them, or learn nothing.

    There are more of these calls while too few rows have come to judge by.

    On a GPU what it looks at is copied on the stream of the loss, and read in a later call, when it has arrived. What
    is captured in a graph, or has no values, is not looked at; of what is compiled the caller leaves it out.

    Args:
        name: of the loss.
        labels: the classes that it knows.
        refuses: whether rows of the background's class are an error.
    """

    def __init__(self, name: str, labels: range, refuses: bool = False):
        self.name, self.labels, self.refuses = name, labels, refuses
        self.left, self.calls = BATCHES, 0
        self.pending: list[_Seen] = []
        self.known = np.zeros((0, 6), np.float32)
        self.rows = self.invalid = self.counting = 0

    def after(
        self,
        rows: Tensor,
        offsets: Tensor | None,
        counts: Tensor,
        size: tuple[float, float] | None = None,
        corners: bool = False,
        weights: Tensor | None = None,
    ) -> Watch | None:
        """Look at a call; what is to look at the next one, if anything is.

        Args:
            rows: those of the loss, relative to the image, or ``corners`` in pixels.
            offsets: theirs.
            counts: int32 ``[2]``, the second one the number of invalid rows.
            size: (height, width) of the image in pixels, if it is known.
            corners: see ``rows``.
            weights: of the rows, if they have some.

        Raises:
            ValueError: there are rows of the background's class, and it ``refuses`` them.
        """
        if not _plain(rows, counts):  # a capture is given up, too, if an earlier event is asked for meanwhile
            return self
        if self.left:
            self.left, self.calls = self.left - 1, self.calls + 1
            event = None
            if _on_gpu(rows):
                stream, event = torch.cuda.current_stream(rows.device), torch.cuda.Event()
                rows, counts = rows.to("cpu", non_blocking=True), counts.to("cpu", non_blocking=True)
                offsets, weights = (
                    None if each is None else each.to("cpu", non_blocking=True) for each in (offsets, weights)
                )
                event.record(stream)
            self.pending.append(_Seen(rows, offsets, counts, size, corners, weights, event))
        while self.pending and (self.pending[0].event is None or self.pending[0].event.query()):
            said = self._judge(self.pending.pop(0))
            if said:
                warnings.warn(f"{self.name}: {said}", stacklevel=5)
                return None
        return self if self.left or self.pending else None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"pending": []}  # events cannot be copied

    def _judge(self, seen: _Seen) -> str:
        """What is wrong with the rows of a call and those before, if anything is."""
        rows = seen.rows.numpy()
        if seen.offsets is not None:
            rows = rows[: max(int(seen.offsets.numpy()[-1]), 0)]
        self.invalid += int(seen.counts.numpy()[1])
        self.rows += len(rows)
        self.counting += len(rows) if seen.weights is None else int((seen.weights.numpy()[: len(rows)] > 0).sum())
        rows = rows[np.isfinite(rows).all(1)]
        self.known = known = np.concatenate((self.known, rows))
        first, last = self.labels.start, self.labels.stop - 1
        if self.refuses and (rows[:, 1] < first).any():
            checks.fail("labels", "0, the background", f"{first} to {last}")
        if len(known) < FEWEST:
            self.left = max(self.left, int(self.calls < LONGEST))
            return ""
        low, high = known[:, 1].min(), known[:, 1].max()
        if first == 0 and low == 1 and high == last + 1:
            return (
                f"classes of targets run from 1 to {last + 1}, want {first} to {last}: rows of the last one are "
                f"skipped. Subtract 1, or let num_classes be {last + 2}"
            )
        if first == 1 and low == 0:
            return f"rows of class 0, the background, are skipped, want {first} to {last}"
        if not self.counting:
            return (
                "no target row has a weight above 0, so no object is learnt. A weight multiplies what a row costs, "
                "below 0 the row is a region to be ignored"
            )
        if self.invalid * 2 > self.rows:
            return f"{self.invalid} of {self.rows} target rows were skipped as invalid. {_cure(known, seen.corners)}"
        if _in_a_pixel(rows, seen.size, seen.corners):
            return (
                "all boxes of the targets lie within the first pixel of their image. If they are relative to it, say "
                "so: unit='relative', of the loss or of Targets.from_torchvision"
            )
        return ""


def _cure(rows: Any, corners: bool) -> str:
    """What may be wrong with rows most of which are skipped."""
    sides = rows[:, 4:] - rows[:, 2:4] if corners else rows[:, 4:]
    if np.median(sides) <= 0:
        return "Sides are not above 0: if boxes are x, y, w, h, say so: boxes='xywh', of the loss or of Targets"
    centre = np.median(np.abs(rows[:, 2:4]).max(1))
    if not corners and centre > 1:
        return (
            f"Centres are about {centre:.4g}, and the sides of an image 1: if these are pixels, say so: unit='pixel', "
            "of the loss or of Targets.from_packed or from_padded"
        )
    return "Targets.validate() says which and why"


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _plain(rows: Tensor, counts: Tensor) -> bool:
    """Tensors that hold numbers, and may be read, or copied to be read later; and nobody looks at what a step does."""
    if _get_current_dispatch_mode() is not None:
        return False
    for each in (rows, counts):
        if type(each) is not Tensor or each.device.type not in ("cpu", "cuda"):
            return False
        if torch._C._functorch.is_functorch_wrapped_tensor(each):
            return False
    return not (_on_gpu(rows) and torch.cuda.is_current_stream_capturing())


def _in_a_pixel(rows: Any, size: tuple[float, float] | None, corners: bool) -> bool:
    """Whether all boxes lie within the first pixel of an image of ``size``."""
    if not len(rows) or (size is not None and min(size) < SMALLEST):
        return False
    if corners:
        return bool((np.abs(rows[:, 2:]) <= 1).all())
    if size is None:
        return False
    ends = (rows[:, 2:4] + rows[:, 4:] / 2) * np.array((size[1], size[0]), np.float32)
    return bool((ends <= ALMOST).all())
