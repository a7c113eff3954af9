"""What the losses of anchor-grid detectors share: the call, from predictions and targets to a loss."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Container, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import backend as backends
from .. import checks, reference
from ..counts import Last
from ..drivers.grid import GRID, GridCall
from ..heads import GridHead, head_from_key
from ..targets import Targets, as_targets
from ..watch import Watch
from .output import Apart, LossOutput, apart_by_images, rounded

PARTS = ("box", "obj", "cls")

OF_TRAINING = {
    "lr0",
    "lrf",
    "momentum",
    "weight_decay",
    "warmup_epochs",
    "warmup_momentum",
    "warmup_bias_lr",
    "anchors",
    "iou_t",
    "hsv_h",
    "hsv_s",
    "hsv_v",
    "degrees",
    "translate",
    "scale",
    "shear",
    "perspective",
    "flipud",
    "fliplr",
    "mosaic",
    "mixup",
    "copy_paste",
    "paste_in",
}
"""What files of the peers' hyper-parameters say beside that, none of which their losses read."""


class WeightedLoss(nn.Module):
    """A module with class weights, or none, that follow the predictions to their device and stay in float32."""

    class_weights: Tensor | None
    _watch: Watch | None

    def __init__(self, class_weights: tuple[float, ...] | None):
        super().__init__()
        self._last = Last()
        self._weights = class_weights
        self.register_buffer("class_weights", None if class_weights is None else self._made(), persistent=False)

    @torch.inference_mode(False)  # whose tensors no later training step could use
    def _made(self, device: torch.device | None = None) -> Tensor:
        """The class weights, on that device."""
        return torch.tensor(self._weights, dtype=torch.float32, device=device)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Whatever casts or empties a module leaves the weights what they are."""
        super()._apply(fn, recurse)
        if self._weights is not None and self.class_weights is not None and not self.class_weights.is_meta:
            self.class_weights = self._made(self.class_weights.device)
        return self

    def _weights_for(self, pred: Tensor) -> Tensor | None:
        """The class weights on the device of ``pred`` in float32, whatever the module itself was cast or moved to."""
        weights, device = self.class_weights, pred.device
        if weights is None or (weights.device == device and weights.dtype == torch.float32):
            return weights
        if torch.compiler.is_compiling():  # what a graph allocates is not to be kept in a module
            return reference.constants(self._weights or (), pred.new_empty(0, dtype=torch.float32))
        self.class_weights = self._made(device)
        return self.class_weights


class GridLoss(WeightedLoss):
    """A module around a :class:`~fusedyolo.heads.GridHead`; a subclass makes the head of its arguments.

    ``batch_power`` says by what power of the batch size the gains in ``batch_gains`` are multiplied: -1 for a mean over
    images, 0 for a sum.
    """

    head: GridHead
    unused: tuple[str, ...] = ()  # of what from_hyp was given
    batch_gains: tuple[str, ...] = ("box_gain", "obj_gain", "noobj_gain", "cls_gain", "prior_gain")

    def __init__(
        self,
        head: GridHead,
        hyp: dict[str, Any],
        defaults: dict[str, Any],
        image_size: int | tuple[int, int] | None,
        backend: str,
        batch_power: int = 0,
        class_weights: tuple[float, ...] | None = None,
        form: checks.BoxForm = None,
    ):
        super().__init__(class_weights)
        levels = [[head.anchors[i] for i in level] for level in head.levels]
        checks.ascending(levels, head.strides)
        checks.in_pixels(levels, head.strides)
        self.head = rounded(head)
        self.form = form
        self._watch = Watch(type(self).__name__, range(head.num_classes))
        self.hyp = hyp
        self._changed = {name: value for name, value in hyp.items() if value != defaults[name]}
        self.backend = checks.one_of("backend", backend, backends.BACKENDS)
        self.image_size = None if image_size is None else checks.size("image_size", image_size)
        self.batch_power = batch_power
        # What a call needs, in the form in which it needs it: sizes as integers, and the heads of each batch size.
        self._anchors = tuple(map(len, self.head.levels))
        self._strides = tuple(int(s) if s.is_integer() else s for s in self.head.strides)
        self._key = self.head.key

    def forward(self, preds: Sequence[Tensor], targets: Tensor | Sequence[dict[str, Tensor]] | Targets) -> LossOutput:
        """The loss of one batch.

        Args:
            preds: raw outputs, one tensor a level in the order of ``anchors``: ``[B, A * (5 + C), H, W]`` with channels
                anchor by anchor, or ``[B, A, H, W, 5 + C]``, ``[B, A, 5 + C, H, W]``, ``[B, H, W, A, 5 + C]``; each as
                x, y, w, h, objectness, classes. Of five axes whose sizes fit several orders the first is meant. Any
                strides; float16, bfloat16, float32 or float64.
            targets: packed ``[M, 6]``, padded ``[B, G, 5]``, a list of tensors ``[n, 5]``, of boxes relative to the
                image unless the constructor was told otherwise; a torchvision list of dicts, in pixels likewise; or
                :class:`Targets`.

        Raises:
            ValueError: names the argument, what came and what was wanted.
        """
        batch, size = checks.grid_predictions(
            preds, self._anchors, self._strides, self.head.num_classes, self.image_size, True
        )
        if preds[0].dim() == 5 == preds[-1].dim():
            preds = checks.grid_views(preds, self._anchors, self.head.num_classes)
        rows, offsets, weights = as_targets(targets, batch, size, preds[0].device, self.form)
        return self.of_call(GridCall(preds, rows, offsets, size, self._weights_for(preds[0]), weights), batch)

    def own(self, preds: Any) -> Any:
        """Those of the predictions that ``head`` is of."""
        return preds

    def of_call(self, call: GridCall, batch: int) -> LossOutput:
        """The loss of so many images, their arguments checked."""
        head, key = self._head_of(batch)
        total, parts, counts = self._compute(call, head, key)
        if head.by_image:
            parts = parts.flatten()[: 3 * len(range(batch))].view(3, -1)
        terms = dict(zip(PARTS, parts[:3].unbind(), strict=True))
        num_pos, num_invalid = counts.unbind()
        return LossOutput(total, terms, num_pos, num_invalid)

    def apart(self, preds: Any, targets: Any) -> Apart:
        """The loss in pieces, each divided by numbers of its own; arguments and errors of :meth:`forward`."""
        if not self.head.mean_rows:
            out = self(preds, targets)
            return apart_by_images(out, (preds if isinstance(preds, Tensor) else preds[0]).shape[0], self.batch_power)
        call = GRID.read(self, preds, targets)
        return self.levels_apart(call._replace(class_weights=self._weights_for(call.preds[0])))

    def levels_apart(self, call: GridCall) -> Apart:
        """The loss of a call level by level, where box and classes are divided by the rows of each."""
        images = call.preds[0].shape[0]
        total, table, counts = self._compute(call, *_level_head(self._head_of(images)[1]))
        places = (slice(0, None, 2), slice(1, None, 2), slice(0, None, 2))  # of levels, box and classes are one piece
        terms = {name: (term, where) for name, term, where in zip(PARTS, table[:, :3].unbind(1), places, strict=True)}
        amounts = torch.cat((table.new_full((1,), images), table[:, 4], table[:, 5])).double()
        of_rows, of_obj = (self.batch_power * (gain in self.batch_gains) for gain in ("box_gain", "obj_gain"))
        shares = partial(_shares_of_levels, (of_rows, of_obj))
        return Apart(total.flatten(), terms, amounts, shares, *counts.unbind())

    def _compute(self, call: GridCall, head: GridHead, key: str) -> tuple[Tensor, Tensor, Tensor]:
        """Total, parts, of heads ``by_level`` the sums of each level [L, ...], and counts."""
        preds = call.preds
        if backends.resolve(self.backend, preds[0].device) == "triton":
            from .. import ops

            with_state = torch.is_grad_enabled() and any([pred.requires_grad for pred in preds])
            own, lead = ops.workspace(preds[0].device), checks.of_one_type(call.lead) if call.lead else []
            for pred in preds:  # a call is not worth it
                if pred.dtype != preds[0].dtype:
                    preds = checks.of_one_type(preds)
                    break
            given = list(preds), call.rows, call.offsets, call.class_weights, key, with_state, lead, own, call.weights
            total, parts, counts, *_ = ops.call(ops.grid_loss, *given)
            if head.by_level:
                parts = parts[3 + 2 * len(head.levels) :].view(len(head.levels), -1)
        else:
            total, parts, counts, _ = GRID.reference_loss(head, call)
        if not torch.compiler.is_compiling():
            self._last.counts = counts
            if self._watch is not None:
                self._watch = self._watch.after(call.rows, call.offsets, counts, call.size, weights=call.weights)
        return total, parts, counts

    def _head_of(self, batch: int) -> tuple[GridHead, str]:
        """The head for a call with this many images, and its key."""
        return self._for_batch(self.head, self._key, batch)

    def _for_batch(self, head: GridHead, key: str, batch: int) -> tuple[GridHead, str]:
        """``head`` as a mean, or a sum, over this many images, and its key."""
        if self.batch_power == 0:
            return head, key
        images = len(range(batch))  # of a symbolic size, range makes a number
        return _batch_head(key, float(images) ** self.batch_power, self.batch_gains)

    def extra_repr(self) -> str:
        """The arguments that tell one loss from another."""
        hyp = "".join(f", {name}={value!r}" for name, value in self._changed.items())
        return f"strides={self._strides}, num_classes={self.head.num_classes}, backend={self.backend!r}{hyp}"


def of_repository(hyp: Mapping[str, Any], known: Container[str], of: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Of a repository's hyper-parameters what a loss knows; and the names of all others, with a warning where some of
    these are not of training or augmentation.

    Raises:
        ValueError: they are no mapping.
    """
    if not isinstance(hyp, Mapping):
        checks.fail("hyp", checks.describe(hyp), "a mapping of names to numbers")
    unused = tuple(name for name in hyp if name not in known)
    strange = [str(name) for name in unused if name not in OF_TRAINING]
    if strange:
        warnings.warn(f"{of}.from_hyp takes no notice of {', '.join(strange)}", stacklevel=3)
    return {name: value for name, value in hyp.items() if name in known}, unused


def hyper_parameters(given: dict[str, Any], defaults: dict[str, Any], of: str) -> dict[str, Any]:
    """``defaults`` overridden by what was given, arrays and tensors by their numbers.

    Raises:
        ValueError: a name that ``of`` does not have, or a tensor that would be trained.
    """
    for name in given:
        if name not in defaults:
            checks.fail(name, f"no hyper-parameter of {of}", "one of " + ", ".join(defaults))
    return {**defaults, **{name: checks.plain(name, value) for name, value in given.items()}}


def box_arguments(eps: tuple[float, float], alpha: Any, gamma: Any) -> tuple[float, ...]:
    """What an IoU term takes: eps, and ``iou_alpha`` and ``iou_gamma`` where they change anything."""
    alpha = checks.number("iou_alpha", alpha, 0, open_low=True)
    gamma = checks.number("iou_gamma", gamma, 0)
    return eps if (alpha, gamma) == (1.0, 0.0) else (*eps, alpha, gamma)


def class_targets(hyp: dict[str, Any], name: str, num_classes: int) -> tuple[float, float]:
    """The targets of a class that is there and of one that is not, smoothed by ``hyp[name]`` as ``smoothing`` says."""
    eps = checks.number(name, hyp.get(name, 0.0), 0, 1)
    kind = checks.one_of("smoothing", hyp.get("smoothing", "binary"), ("binary", "uniform"))
    among = 2 if kind == "binary" else num_classes
    return 1.0 - eps + eps / among, eps / among


def focal_bce(positive_weight: float, gamma: float) -> tuple[str, tuple[float, ...]]:
    """Binary cross-entropy with a weight of positives, or the focal loss made of it with alpha 0.25; its arguments."""
    return ("bce", (positive_weight,)) if gamma == 0 else ("focal", (0.25, gamma, positive_weight))


def _shares_of_levels(powers: tuple[int, int], amounts: Tensor) -> Tensor:
    """Of the numbers of images, of rows on each level, and of predictions whose objectness is in use (0 where it is not
    divided by that): what box and classes, and objectness, of each level are multiplied by.
    """
    images, divisors = amounts[:1], amounts[1:].clamp(min=1).view(2, -1)
    return torch.stack([images**power / own for power, own in zip(powers, divisors, strict=True)], 1).flatten()


@torch.compiler.assume_constant_result
def _level_head(key: str) -> tuple[GridHead, str]:
    """The head with a loss of each level, and its key."""
    head = dataclasses.replace(head_from_key(key), by_level=True)
    return head, head.key


@torch.compiler.assume_constant_result
def _batch_head(key: str, factor: float, gains: tuple[str, ...]) -> tuple[GridHead, str]:
    """The head with these gains times a factor, and its key: a mean or a sum over images costs no launch."""
    return _scaled_head(key, factor, gains)


@lru_cache(maxsize=256)
def _scaled_head(key: str, factor: float, gains: tuple[str, ...]) -> tuple[GridHead, str]:
    head = head_from_key(key)
    head = rounded(dataclasses.replace(head, **{gain: getattr(head, gain) * factor for gain in gains}))
    return head, head.key
