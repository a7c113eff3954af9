"""YOLOv7, and YOLOv7 with auxiliary heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import checks
from ..drivers.grid import GRID, GridCall
from ..heads import GridHead
from ..targets import Targets
from .base import of_repository
from .output import Apart, LossOutput
from .yolov5 import RatioLoss, YOLOv5Loss


class YOLOv7Loss(RatioLoss):
    """Training loss of YOLOv7 (Wang et al. 2022, arXiv 2207.02696): YOLOv5's, of predictions that objects pick by cost.

    An object does not take the predictions that :class:`YOLOv5Loss` gives it. It offers them to all objects of its
    image, and each of these picks those that cost it least (SimOTA, Ge et al. 2021, arXiv 2107.08430): with IoU that of
    the decoded box and the object, and q the square root of the probability of class times objectness,

        sum over classes of BCE(q, one-hot) - 3 ln(IoU + 1e-8)

    and as many as its ``topk`` largest IoUs add up to, rounded down, at least one. What several objects pick goes to
    the one of the image that it costs least, of equals the first. A prediction that several objects offer counts as
    many times: it may be picked, and trained, as often. Which prediction of equal cost is picked the peer leaves to a
    sort; here it is the first, by level, neighbour, anchor and row.

    As in the peer, objects are measured in heights of the image on both axes where costs are reckoned, not in the loss
    itself: in images that are not square the picks are those of boxes that are stretched. ``loss_ota=0`` gives each
    object its own predictions, as the peer's plain ``ComputeLoss``.

    Args:
        anchors: as of :class:`YOLOv5Loss`, like all that follow but ``**hyp``.
        **hyp: as there, with ``box=0.05``, ``obj=0.7``, ``cls=0.3``; and ``loss_ota=1``, or 0, and ``topk=10``.
            :meth:`from_hyp` takes the whole of the repository's ``hyp``.

    Shapes: as of :class:`YOLOv5Loss`.

    Raises:
        ValueError: an argument of the constructor or of a call does not fit; it says which, what came and what was
            wanted.

    Source: the published behaviour of ``ComputeLossOTA`` in WongKinYiu/yolov7, and the papers named.
    """

    gain = "box"
    defaults: ClassVar[dict[str, Any]] = {**YOLOv5Loss.defaults, "obj": 0.7, "cls": 0.3, "loss_ota": 1, "topk": 10}
    eps = YOLOv5Loss.eps
    balances = YOLOv5Loss.balances


TOPK, NEIGHBOURS, GAINS = 20, 4, ("box", "obj", "cls")


class YOLOv7AuxLoss(nn.Module):
    """Training loss of YOLOv7 with auxiliary heads (-W6, -E6, -D6, -E6E): that of the lead maps, and ``aux`` times that
    of the auxiliary ones, of which objects pick by what the *lead* maps cost them.

    Both are :class:`YOLOv7Loss`, attributes ``lead`` and ``aux``, in which an object's 20 largest IoUs add up. To the
    auxiliary head it offers its own cell and all four beside it, to the lead head its own and the two nearest. Their
    gains are those of the constructor, of ``aux`` multiplied by that number.

    :func:`fusedyolo.assign`, :func:`fusedyolo.decode` and :func:`fusedyolo.select` look at the lead maps, which are
    those that detect; they take all maps, or these alone.

    Args:
        anchors: as of :class:`YOLOv7Loss`, like all that follow but ``aux``.
        strides: as there.
        num_classes: C.
        aux: weight of the auxiliary heads.
        **options: all others of :class:`YOLOv7Loss` but ``loss_ota``, ``topk`` and ``neighbours``.

    Shapes:
        - preds: a list of the maps of all levels, lead maps first, then as many auxiliary ones of the same shapes, as
          :class:`YOLOv7Loss` takes them; or ``{"lead": maps, "aux": maps}``.
        - targets: as there.
        - output: :class:`~fusedyolo.LossOutput` with the parts of both, ``lead_box`` and so on, their weights in them;
          ``num_pos`` counts the predictions of both.

    Raises:
        ValueError: an argument of the constructor or of a call does not fit; it says which, what came and what was
            wanted.

    Source: the published behaviour of ``ComputeLossAuxOTA`` in WongKinYiu/yolov7.
    """

    def __init__(self, anchors: Any, strides: Sequence[float], num_classes: int, *, aux: float = 0.25, **options: Any):
        super().__init__()
        for name in ("loss_ota", "topk", "neighbours"):
            if name in options:
                checks.fail(name, checks.describe(options[name]), "none: the auxiliary heads say it")
        self.weight = checks.number("aux", aux, 0)
        self.lead = YOLOv7Loss(anchors, strides, num_classes, topk=TOPK, **options)
        gains = {name: self.weight * self.lead.hyp[name] for name in GAINS}
        self.aux = YOLOv7Loss(anchors, strides, num_classes, topk=TOPK, neighbours=NEIGHBOURS, **(options | gains))
        self.aux._watch = None  # it has the same targets
        self.unused: tuple[str, ...] = ()

    @classmethod
    def from_hyp(
        cls, hyp: Mapping[str, Any], anchors: Any, strides: Sequence[float], num_classes: int, **options: Any
    ) -> YOLOv7AuxLoss:
        """The loss of the repository's own hyper-parameters; see :meth:`YOLOv7Loss.from_hyp`, also for errors."""
        taken, unused = of_repository(hyp, YOLOv7Loss.defaults, cls.__name__)
        taken.pop("loss_ota", None)
        loss = cls(anchors, strides, num_classes, **(taken | options))
        loss.unused = unused
        return loss

    def extra_repr(self) -> str:
        """What is not of a head."""
        return f"weight={self.weight:g}"

    def forward(self, preds: Any, targets: Tensor | Sequence[dict[str, Tensor]] | Targets) -> LossOutput:
        """The loss of one batch; see the class for arguments and errors."""
        lead, aux = self._calls(preds, targets)
        batch = lead.preds[0].shape[0]
        first, second = self.lead.of_call(lead, batch), self.aux.of_call(aux, batch)
        parts = {f"lead_{name}": part for name, part in first.parts.items()}
        parts |= {f"aux_{name}": part for name, part in second.parts.items()}
        return LossOutput(first.total + second.total, parts, first.num_pos + second.num_pos, first.num_invalid)

    def apart(self, preds: Any, targets: Any) -> Apart:
        """The loss in pieces, each divided by numbers of its own; arguments and errors of :meth:`forward`."""
        lead, aux = self._calls(preds, targets)
        first, second = self.lead.levels_apart(lead), self.aux.levels_apart(aux)
        pieces, amounts = len(first.pieces), len(first.amounts)
        parts = {f"lead_{name}": (part, _behind(where, 0, pieces)) for name, (part, where) in first.parts.items()}
        parts |= {f"aux_{name}": (part, _behind(where, pieces, pieces)) for name, (part, where) in second.parts.items()}
        return Apart(
            torch.cat((first.pieces, second.pieces)),
            parts,
            torch.cat((first.amounts, second.amounts)),
            lambda given: torch.cat((first.shares(given[:amounts]), second.shares(given[amounts:]))),
            first.num_pos + second.num_pos,
            first.num_invalid,
        )

    def _calls(self, preds: Any, targets: Any) -> tuple[GridCall, GridCall]:
        """Of the lead heads and of the auxiliary ones, whose targets are the same."""
        lead, aux = self._split(preds)
        first = GRID.read(self.lead, lead, targets)
        first = first._replace(class_weights=self.lead._weights_for(first.preds[0]))
        maps, _, _ = GRID.maps_of(self.aux, aux)
        for i, (own, other) in enumerate(zip(maps, first.preds, strict=True)):
            if (own.shape, own.device) != (other.shape, other.device):
                got, want = (f"{tuple(each.shape)} on {each.device}" for each in (own, other))
                checks.fail(f"preds[{len(maps) + i}]", got, f"{want} as preds[{i}]")
        return first, first._replace(preds=maps, lead=first.preds)

    def _split(self, preds: Any) -> tuple[Any, Any]:
        """Lead maps and auxiliary ones."""
        if isinstance(preds, Mapping):
            if any(name not in preds for name in ("lead", "aux")):
                checks.fail("preds", f"a dict with {list(preds)}", "a dict with 'lead', 'aux'")
            return preds["lead"], preds["aux"]
        levels = len(self.head.levels)
        if not isinstance(preds, list | tuple) or len(preds) != 2 * levels:
            got = f"{len(preds)} maps" if isinstance(preds, list | tuple) else checks.describe(preds)
            checks.fail("preds", got, f"{2 * levels} maps, those of {levels} lead heads and of as many auxiliary ones")
        return preds[:levels], preds[levels:]

    # ---- of the heads that detect, what a driver asks

    @property
    def head(self) -> GridHead:
        """Their row."""
        return self.lead.head

    @property
    def image_size(self) -> tuple[float, float] | None:
        """(height, width) in pixels, if it was given."""
        return self.lead.image_size

    @property
    def form(self) -> checks.BoxForm:
        """What was said of boxes in targets."""
        return self.lead.form

    @property
    def class_weights(self) -> Tensor | None:
        """Those of the classes."""
        return self.lead.class_weights

    def own(self, preds: Any) -> Any:
        """Their maps; where there are no others, all."""
        if isinstance(preds, list | tuple) and len(preds) == len(self.head.levels):
            return preds
        return self._split(preds)[0]


def _behind(where: Any, others: int, count: int) -> slice:
    """Some of so many pieces, which come behind so many others."""
    start, stop, step = where.indices(count)
    return slice(others + start, others + stop, step)
