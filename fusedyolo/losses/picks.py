"""What the losses over cells that predict a box each share: the call, from predictions and targets to a loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backend as backends
from .. import checks
from ..drivers.picks import PICKS, PickCall, check
from ..heads import PickHead, key_of_branches
from ..targets import Targets, as_targets
from ..watch import Watch
from .base import WeightedLoss
from .output import Apart, LossOutput, detached, rounded

Predicted = Sequence[Tensor] | Mapping[str, Any]
AnyTargets = Tensor | Sequence[dict[str, Tensor]] | Targets
Computed = tuple[Tensor, tuple[Tensor, ...], Tensor, Tensor]


def apart_of(branches: Sequence[tuple[str, PickLoss, PickCall]]) -> Apart:
    """The loss of one or several branches, a piece each; the names of their parts begin as is said."""
    images = len(range(branches[0][2].preds[0].shape[0]))
    pieces, counts, amounts = [], [], []
    parts: dict[str, tuple[Tensor, Any]] = {}
    for i, (prefix, branch, call) in enumerate(branches):
        total, terms, found, weights = branch.compute(call, outputs=1)
        parts |= {prefix + name: (term, i) for name, term in detached(branch.head.parts, terms).items()}
        pieces.append(total)
        counts.append(found)
        amounts.append(weights[-1])
    shares = partial(_shares, int(branches[0][1].batch_factor))
    of_all = torch.stack([pieces[0].new_full((), images), *amounts]).double()
    return Apart(torch.stack(pieces), parts, of_all, shares, torch.stack(counts)[:, 0].sum(), counts[0][1])


def _shares(power: int, amounts: Tensor) -> Tensor:
    """What the pieces are multiplied by, of the number of images, and of each piece the sum of weights."""
    return amounts[:1] ** power / amounts[1:].clamp(min=1)


class Together(NamedTuple):
    """The heads of losses that differ only in how many cells objects pick, and their key: one set of launches computes
    all of these.
    """

    heads: tuple[PickHead, ...]
    key: str


def together(losses: Sequence[PickLoss]) -> Together | None:
    """Of some losses, if they are such."""
    heads = tuple([loss.head for loss in losses])
    alike = {replace(head, topk=heads[0].topk, topk2=heads[0].topk2) for head in heads}
    return Together(heads, key_of_branches(heads)) if len(alike) == 1 else None


def compute_all(
    known: Together | None, losses: Sequence[PickLoss], calls: Sequence[PickCall], outputs: int | None = None
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Total of several losses, their parts one after the other, and counts of each; ``outputs`` as of
    :meth:`PickLoss.compute`. At once where they are ``known`` for it, and predictions lie on the same maps in the same
    form; else one by one.
    """
    if known is not None and _are_alike(known, losses, calls):
        total, terms, all_counts, _ = by_kernels(known.key, calls, outputs)
        counts = all_counts.split(2)
        for loss, call, own in zip(losses, calls, counts, strict=True):
            loss.note(call, own)
        return total, terms, counts
    found = [loss.compute(call, outputs) for loss, call in zip(losses, calls, strict=True)]
    totals, terms_of, counts_of, _ = zip(*found, strict=True)
    total = totals[0]
    for more in totals[1:]:
        total = total + more
    return total, tuple([term for terms in terms_of for term in terms]), counts_of


def _are_alike(known: Together, losses: Sequence[PickLoss], calls: Sequence[PickCall]) -> bool:
    """Whether one set of launches can compute calls, and what it computes is what they are each for itself: on the same
    images and rows, of the same types, with a gradient for both or for neither.
    """
    first, device = calls[0], calls[0].preds[0].device
    for loss, head, call in zip(losses, known.heads, calls, strict=True):
        if (
            (loss.head is not head and loss.head != head)
            or call.form != first.form
            or call.maps != first.maps
            or call.size != first.size
            or call.rows is not first.rows
            or call.preds[0].shape[0] != first.preds[0].shape[0]
            or (call.class_weights is None) != (first.class_weights is None)
            or backends.resolve(loss.backend, device) != "triton"
        ):
            return False
        for own, other in zip(call.preds, first.preds, strict=True):
            if own.dtype != other.dtype or own.requires_grad != other.requires_grad:
                return False
    return True


def by_kernels(key: str, calls: Sequence[PickCall], outputs: int | None = None) -> Computed:
    """What :meth:`PickLoss.compute` returns, of one call or of those of several branches, on the same rows and of the
    same form and maps: the total of all, the others branch by branch; ``key`` is that of their heads.
    """
    from .. import ops

    first, count = calls[0], len(calls)
    pred, preds, gains = first.preds[0], first.preds, list(first.gains)
    class_weights = [] if first.class_weights is None else [first.class_weights]
    for call in calls[1:]:
        preds = preds + call.preds
        gains += call.gains
        class_weights += [] if call.class_weights is None else [call.class_weights]
    # The first backward changes the gradient that the loss leaves: a compiled graph is better off without. In float16
    # small gradients would be lost before a GradScaler's factor reaches them.
    own = ops.workspace(pred.device, ops.workspace_rows(pred.shape[0], count))
    for each in preds:
        if each.dtype != pred.dtype:
            preds = checks.of_one_type(preds)
            break
    asked = torch.is_grad_enabled() and any([p.requires_grad for p in preds])
    with_grad = asked and preds[0].dtype != torch.float16 and own is None
    total, parts, counts, _, _, weights, _ = ops.call(
        ops.picked_loss,
        preds,
        first.rows,
        first.offsets,
        class_weights,
        key,
        first.form,
        [side for sides in first.maps for side in sides],
        list(first.size),
        gains,
        with_grad,
        own,
        first.weights,
        outputs=outputs,
    )
    return total, tuple(parts), counts, weights


class PickLoss(WeightedLoss):
    """A module around a :class:`~fusedyolo.heads.PickHead`; a subclass makes the head of its arguments.

    Gains are attributes of the subclass, read at each call, so that they may change. ``batch_factor``: the loss is
    multiplied by the number of images.
    """

    head: PickHead
    batch_factor: bool = False

    def __init__(
        self,
        head: PickHead,
        image_size: int | tuple[int, int] | None,
        backend: str,
        class_weights: tuple[float, ...] | None = None,
        form: checks.BoxForm = None,
    ):
        super().__init__(class_weights)
        self.head = rounded(head)
        self.form = form
        self._watch = Watch(type(self).__name__, range(head.num_classes))
        self._key = self.head.key
        self.backend = checks.one_of("backend", backend, backends.BACKENDS)
        self.image_size = None if image_size is None else checks.size("image_size", image_size)
        self.gains()

    def gains(self) -> tuple[float, ...]:
        """Those of ``head.parts``, as the attributes stand.

        Raises:
            ValueError: one of them is no number of 0 or more.
        """
        raise NotImplementedError

    def forward(self, preds: Predicted, targets: AnyTargets) -> LossOutput:
        """The loss of one batch.

        Args:
            preds: what the network predicts, as the class says, of any strides; float16, bfloat16, float32 or float64.
            targets: packed ``[M, 6]``, padded ``[B, G, 5]``, a list of tensors ``[n, 5]``, of boxes relative to the
                image unless the constructor was told otherwise; a torchvision list of dicts, in pixels likewise; or
                :class:`Targets`.

        Raises:
            ValueError: names the argument, what came and what was wanted.
        """
        total, terms, counts, _ = self.compute(self.read(preds, targets), outputs=1)
        parts = detached(self.head.parts, terms)
        num_pos, num_invalid = counts.unbind()
        return LossOutput(total, parts, num_pos, num_invalid)

    def terms(self, preds: Predicted, targets: AnyTargets) -> dict[str, Tensor]:
        """The parts of the loss with a gradient each, to weigh them apart; arguments and errors of :meth:`forward`."""
        _, terms, _, _ = self.compute(self.read(preds, targets))
        return dict(zip(self.head.parts, terms, strict=True))

    def apart(self, preds: Any, targets: Any) -> Apart:
        """The loss in pieces, each divided by numbers of its own; arguments and errors of :meth:`forward`."""
        return apart_of([("", self, self.read(preds, targets))])

    def own(self, preds: Any) -> Any:
        """Those of the predictions that ``head`` is of."""
        return preds

    def read(self, preds: Any, targets: Any, weight: float = 1.0, other: PickCall | None = None) -> PickCall:
        """The arguments of :meth:`forward`, checked, in the form in which they are used; gains times ``weight``.

        Targets that an ``other`` call has read, on the same images, are not read again.
        """
        form, tensors, maps, size = check(self.head, preds, self.image_size)
        pred = tensors[0]
        images = pred.shape[0], size, pred.device
        if other is not None and images == (other.preds[0].shape[0], other.size, other.preds[0].device):
            rows, offsets, weights = other.rows, other.offsets, other.weights
        else:
            rows, offsets, weights = as_targets(targets, pred.shape[0], size, pred.device, self.form)
        factor = weight * len(range(pred.shape[0])) if self.batch_factor else weight  # range: a number of a symbol
        gains = tuple([gain * factor for gain in self.gains()])
        class_weights = None if self._weights is None else self._weights_for(pred)
        return PickCall(form, tensors, maps, rows, offsets, size, gains, class_weights, weights)

    def compute(self, call: PickCall, outputs: int | None = None) -> Computed:
        """Total, parts, counts and what ends in the sum of weights, see :func:`.reference.pick_loss`; with ``outputs``
        1 the parts need have no gradient.
        """
        if backends.resolve(self.backend, call.preds[0].device) == "triton":
            found = by_kernels(self._key, [call], outputs)
        else:
            found = PICKS.reference_loss(self.head, call)
        self.note(call, found[2])
        return found

    def note(self, call: PickCall, counts: Tensor) -> None:
        """What a call has left, for who asks, and for the look at the first batches."""
        if not torch.compiler.is_compiling():
            self._last.counts = counts
            if self._watch is not None:
                self._watch = self._watch.after(call.rows, call.offsets, counts, call.size, weights=call.weights)

    def extra_repr(self) -> str:
        """The arguments that tell one loss from another."""
        strides = tuple(int(s) if s.is_integer() else s for s in self.head.strides)
        gains = "".join(f", {name}={gain:g}" for name, gain in zip(self.head.parts, self.gains(), strict=True))
        return f"num_classes={self.head.num_classes}, strides={strides}, backend={self.backend!r}{gains}"
