"""What a driver is: all that one way of predicting has of its own, in one object.

A driver belongs to a kind of head (:mod:`fusedyolo.heads`): the losses of its heads are computed by the same kernels on
predictions of the same form. Whoever has to treat heads differently asks the driver, see :func:`fusedyolo.drivers.of`;
nobody else knows which kinds there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor

from .assignments import AnchorAssignment, Assignment

if TYPE_CHECKING:
    from ..ops import Launch

LOGIT, UNIT, POSITIVE = "logit", "unit", "positive"
"""What predicted numbers may be: anything, in 0 ... 1, not negative."""


class Predictions(NamedTuple):
    """Checked predictions, and what their boxes depend on beside the head."""

    preds: list[Tensor]
    size: tuple[float, float] | None = None  # (height, width) of the image, where boxes are scaled or clipped to it
    anchors: Tensor | None = None  # [N, 4], of a head whose calls bring them


class Frame(NamedTuple):
    """What predictions lie on: so many images, (height, width) of each map, anchors of its cells; and their layout."""

    batch: int
    maps: tuple[tuple[int, int], ...]
    cell: tuple[int, ...]
    layout: str

    @property
    def sizes(self) -> list[int]:
        """Anchors of each map."""
        return [height * width * count for (height, width), count in zip(self.maps, self.cell, strict=True)]


class Piece(NamedTuple):
    """Predictions that are alike, of some levels.

    Attributes:
        shape: of all of them in one piece.
        width: numbers of an anchor, or of a cell where anchors share some.
        levels: those whose maps it holds, one after the other.
        values: :data:`LOGIT`, :data:`UNIT` or :data:`POSITIVE`.
        low: on which axis of ``shape`` lie logits that are low in a trained detector, the first of them, how many.
        rare: which of ``width`` numbers say whether there is what is rarely there; they begin low in training.
    """

    shape: tuple[int, ...]
    width: int
    levels: Sequence[int]
    values: str = LOGIT
    low: tuple[int, int, int] | None = None
    rare: Sequence[int] = ()


class Known:
    """What the reference knows of a step, where kernels do not run in full: the ``head``, ``rows`` of each image,
    ``preds`` as a list of tensors in the usual layout, and the ``assignment``.
    """

    def __init__(
        self, head: Any, preds: list[Tensor], rows: list[int], assign: Callable[[], Assignment | AnchorAssignment]
    ):
        self.head, self.preds, self.rows, self._assign = head, preds, rows, assign

    @cached_property
    def assignment(self) -> Any:
        """Of the kind that the driver returns."""
        return self._assign()


class Driver(Protocol):
    """One way of predicting. ``head`` is always one of its own kind, ``criterion`` a loss with such a head.

    What has a body here need not be written where it fits.
    """

    head: type
    """The kind of head that it is of."""
    kind: str
    """As configurations are filed, see :func:`fusedyolo.tuned.wishes`."""
    layouts: tuple[str, ...]
    """How predictions may lie in memory, the usual way first."""
    channels_last: bool = False
    """Whether a loss takes a map as [B, H, W, channels], else [B, channels, H, W]."""
    scans: bool = False
    """Whether ``select`` finds candidates by kernels that read the predictions themselves."""

    # ---- a call of a loss

    def read(self, criterion: Any, preds: Any, targets: Any, **geometry: Any) -> Any:
        """The arguments of a call, checked, in the form in which the methods below take it, a NamedTuple.

        Raises:
            ValueError: names the argument, what came and what was wanted.
        """

    def reference_loss(self, head: Any, call: Any) -> tuple[Tensor, Sequence[Tensor] | Tensor, Tensor, Any]:
        """The loss in eager PyTorch: total, parts, int32 counts of assigned predictions and invalid rows; and of some
        drivers what sums are divided by.
        """

    def launches(self, head: Any, call: Any) -> dict[str, Launch]:
        """The launches of a training step by name, in order, on memory that nothing has written."""

    def assign(self, head: Any, call: Any) -> Assignment | AnchorAssignment:
        """Which prediction answers for which row; waits for nothing."""

    # ---- predictions alone

    def view(self, criterion: Any, preds: Any, image_size: Any, anchors: Any) -> Predictions:
        """Predictions as they are decoded, checked.

        Raises:
            ValueError: names the argument, what came and what was wanted.
        """

    def decode(self, head: Any, seen: Predictions) -> tuple[Tensor, Tensor]:
        """Boxes [B, N, 4], x1, y1, x2, y2, and scores [B, N, C], in the dtype of the predictions."""

    # ---- what a network with such a head looks like

    def pieces(self, head: Any, frame: Frame) -> list[Piece]:
        """What is predicted, in order."""

    def arrange(self, values: Tensor, piece: Piece, frame: Frame) -> list[Tensor]:
        """Values of the shape of a piece as a network has them, in the layout of the frame."""

    def pack(self, preds: list[Tensor], frame: Frame) -> Any:
        """The predictions of all pieces as a loss takes them."""

    # ---- what is measured

    def floor(self, head: Any) -> float:
        """Bytes that no training step can do without, over those of the predictions."""

    def candidates(self, head: Any, layout: str) -> Iterable[dict[str, int]]:
        """Configurations worth timing."""

    def kinds(self, kernel: str, programs: int, arguments: Mapping[str, Any]) -> Sequence[int]:
        """What work each program of a launch has, a number for each: which stream or level it is of, how large its tile
        is; some programs of each are run. ``arguments`` are those of the launch; no other code of ours reads them.
        """
        return [0] * programs

    def efforts(
        self, kernel: str, kinds: Sequence[int], arguments: Mapping[str, Any], known: Known
    ) -> tuple[Sequence[Any], list[float]]:
        """Of each program a kind that is finer where it must be, and a number that grows with its instructions."""
        return kinds, [0.0] * len(kinds)

    def together(self, kernel: str, arguments: Mapping[str, Any]) -> int:
        """How many programs, one after the other, share a tile: all of these are run or none."""
        return 1

    def adding(self, kernel: str, arguments: Mapping[str, Any]) -> int | None:
        """How many programs, the first ones of a launch, leave sums for the last of them; all of them if None."""
        return None

    def complete(self, kernel: str, arguments: Mapping[str, Any], known: Known) -> None:
        """After a launch of which some programs did not run: put down what these would have left for later launches."""
        return
