"""torchvision's RetinaNet, SSD and FCOS, with the losses of this package in place of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection._utils import BoxCoder, BoxLinearCoder, Matcher, SSDMatcher
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import (
    RetinaNetClassificationHead,
    RetinaNetHead,
    RetinaNetRegressionHead,
)
from torchvision.models.detection.ssd import SSD
from torchvision.ops.boxes import box_iou

from .. import FCOSLoss, RetinaNetLoss, SSDLoss, checks
from ..anchors import KEPT
from ..watch import Watch
from . import shared

MODELS = (RetinaNet, SSD, FCOS)
BOX_LOSSES = ("l1", "smooth_l1", "ciou", "diou", "giou")
MODULE = frozenset(vars(nn.Module()))  # what each module has
LARGEST = math.log(1000 / 16)
"""What torchvision clamps the logarithm of a decoded side to."""


def patch(model: nn.Module) -> nn.Module:
    """Replace the loss of a detector of torchvision; its training stays what it was.

    ``model(images, targets)`` returns the same dictionary of losses as before, each with its gradient. Anchors are made
    once for the same sizes of image and maps, and SSD does not match boxes before its loss. State, predictions and
    whatever else the model does stay as they are, and a patched model can be copied and saved.

    Thresholds, weights and the kind of box loss are read now: :func:`unpatch` and patch anew after a change to them.
    The number of classes is that of the logits. Boxes that torchvision stops at because of their label are skipped. An
    object of SSD with the label 0, the background, whose box torchvision trains, raises a ``ValueError``; on a GPU,
    where labels are not waited for, a step or two later, and of the first steps alone. Of targets boxes and labels are
    read, as torchvision does: no weights, and nothing of crowds.

    Args:
        model: a ``RetinaNet``, ``SSD`` (also SSDlite) or ``FCOS`` of ``torchvision.models.detection``, or of a class
            derived from one of them. If it is patched already, nothing happens.

    Returns:
        ``model`` itself, changed.

    Raises:
        ValueError: another model, one with a part of its own that takes part in the loss, or a torchvision whose loss
            computes something else, as where a function or a method of it was replaced, which is found by trying it;
            the model is as it was.
    """
    detector: Any = _checked(model)
    if isinstance(vars(detector).get("compute_loss"), _Loss):
        return model
    loss: _Loss
    unmatched = False
    if isinstance(detector, RetinaNet):
        loss = _RetinaNetLoss(RetinaNetLoss, _retinanet_settings(detector))
    elif isinstance(detector, SSD):
        loss = _SSDLoss(SSDLoss, _ssd_settings(detector))
        unmatched = getattr(detector.forward, "__func__", None) is SSD.forward
    else:
        loss = _FCOSLoss(FCOSLoss, _fcos_settings(detector))
    _probe(detector, loss)
    detector.anchor_generator = CachedAnchors(_generator(detector), detector if unmatched else None)
    detector.compute_loss = loss
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Give a patched model its own loss and its own generator of anchors back; any other is left alone.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: not a model that :func:`patch` takes.
    """
    detector: Any = _checked(model)
    if isinstance(vars(detector).get("compute_loss"), _Loss):
        del detector.compute_loss
        if isinstance(detector.anchor_generator, CachedAnchors):  # unless it was replaced since
            detector.anchor_generator = detector.anchor_generator.original
    return model


# What a patched model holds: objects of these classes and no closures, so that it can be pickled.


class _Loss:
    """Stands in for ``compute_loss``: a criterion for each number of classes that has come."""

    outputs: tuple[str, ...] = ("cls_logits", "bbox_regression")

    def __init__(self, kind: Callable[..., nn.Module], settings: dict[str, Any]):
        kind(2, **settings)  # a setting that it does not take is better found here than in the first step
        self.kind, self.settings = kind, settings
        self.criteria: dict[int, Any] = {}

    def tried(self) -> Any:
        """Of the same settings, computed by the reference."""
        return type(self)(self.kind, self.settings | {"backend": "torch"})

    def made(self, classes: int) -> Any:
        """The criterion of so many classes."""
        return self.kind(classes, **self.settings)

    def terms(
        self, targets: list[dict[str, Tensor]], head_outputs: dict[str, Tensor], anchors: list[Tensor], **more: Any
    ) -> dict[str, Tensor]:
        """The losses of a batch all of whose images have the same anchors."""
        preds = tuple(head_outputs[name] for name in self.outputs)
        targets = [{"boxes": _widened(item["boxes"]), "labels": item["labels"]} for item in targets]
        classes = preds[0].shape[-1]
        if classes not in self.criteria:
            self.criteria[classes] = self.made(classes)
        return self.criteria[classes].terms(preds, targets, anchors=anchors[0], **more)


def _widened(boxes: Tensor) -> Tensor:
    """In float32 where they are halves, as torchvision takes them; a loss refuses halves, which hold few classes."""
    return boxes.float() if boxes.dtype in (torch.float16, torch.bfloat16) else boxes


class _RetinaNetLoss(_Loss):
    def __call__(
        self, targets: list[dict[str, Tensor]], head_outputs: dict[str, Tensor], anchors: list[Tensor]
    ) -> dict[str, Tensor]:
        return self.terms(targets, head_outputs, anchors)


class _SSDLoss(_Loss):
    def made(self, classes: int) -> Any:
        found = super().made(classes)
        found._watch = Watch("SSDLoss", range(1, classes), refuses=True)
        return found

    def __call__(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        for i, item in enumerate(targets):
            if item["labels"].device.type == "cpu" and (item["labels"] == 0).any():
                classes = head_outputs["cls_logits"].shape[-1]
                checks.fail(f"targets[{i}]['labels']", "0, the background", f"1 to {classes - 1}")
        terms = self.terms(targets, head_outputs, anchors)
        return {name: terms[name] for name in ("bbox_regression", "classification")}  # in torchvision's order


class _FCOSLoss(_Loss):
    outputs = ("cls_logits", "bbox_regression", "bbox_ctrness")

    def __call__(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        num_anchors_per_level: list[int],
    ) -> dict[str, Tensor]:
        return self.terms(targets, head_outputs, anchors, num_anchors_per_level=num_anchors_per_level)


class _Unmatched(list):
    """Anchors of each image that a loop over them does not see; see :class:`CachedAnchors`."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(())


class CachedAnchors(nn.Module):
    """A generator of anchors that keeps what it has made, for maps and images of the same sizes.

    In training, ``SSD.forward`` goes through ``zip(anchors, targets)`` and matches the boxes of each image, which the
    loss does itself, and then hands the anchors on. So where ``unmatched`` is a model in training, what it gets is a
    list that holds the anchors and that such a loop finds empty. In evaluation it is an ordinary one.

    Args:
        original: torchvision's generator; attributes that this module lacks are looked up and set there. What was made
            before a change of them is made anew.
        unmatched: the model that is to be spared its own matching.
    """

    OWN = ("original", "unmatched", "kept", "seen")

    def __init__(self, original: nn.Module, unmatched: nn.Module | None = None):
        super().__init__()
        self.original = original
        self.unmatched = (unmatched,)  # in a tuple, as this model's parent is not to be its child
        self.kept: dict[Any, Tensor] = {}
        self.seen: list[Any] = []  # of the original, when it last made some

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """The anchors of each image, one and the same tensor ``[N, 4]`` for all of them."""
        if not (torch.compiler.is_compiling() or shared.same(self._state(), self.seen)):
            self.kept.clear()
        first, size = feature_maps[0], tuple(image_list.tensors.shape[-2:])
        key = tuple(tuple(item.shape[-2:]) for item in feature_maps), size, first.dtype, first.device
        found = self.kept.get(key)
        if found is None:
            with torch.inference_mode(False):  # whose tensors no later training step could use
                (found,) = self.original(ImageList(image_list.tensors, image_list.image_sizes[:1]), feature_maps)
            if len(self.kept) >= KEPT:
                del self.kept[next(iter(self.kept))]
            self.kept[key] = found
            if not torch.compiler.is_compiling():
                self.seen = self._state()
        anchors = [found] * len(image_list.image_sizes)
        (model,) = self.unmatched
        return _Unmatched(anchors) if model is not None and model.training else anchors

    def _state(self) -> list[Any]:
        """What anchors are made of; torchvision's generators put it into lists, and into others at each call."""
        found = list[Any]()
        for name, value in vars(self.original).items():
            if isinstance(value, list):
                found += value
                found += shared.versions(value)
            elif name not in MODULE:
                found.append(value)
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.OWN or name in MODULE or hasattr(type(self), name):
            super().__setattr__(name, value)
        else:
            setattr(self.original, name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "original":  # not there yet, as in unpickling
                raise
            return getattr(self.original, name)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"kept": {}, "seen": []}


# What the losses need to know of a model, or why they cannot stand in for its own.


def _checked(model: Any) -> Any:
    if isinstance(model, DataParallel | DistributedDataParallel):
        checks.fail("model", f"a {type(model).__name__}", "the model in it, model.module")
    if hasattr(model, "_orig_mod"):  # an OptimizedModule, which takes an import of seconds to name
        checks.fail("model", "a compiled model", "the model before torch.compile, or model._orig_mod")
    if not isinstance(model, MODELS):
        checks.fail("model", f"a {type(model).__name__}", "a RetinaNet, SSD or FCOS of torchvision.models.detection")
    return model


def _retinanet_settings(model: RetinaNet) -> dict[str, Any]:
    head = model.head
    _untouched("model", model, RetinaNet)
    _untouched("model.head", head, RetinaNetHead)
    _untouched("model.head.classification_head", head.classification_head, RetinaNetClassificationHead)
    boxes, name = head.regression_head, "model.head.regression_head"
    _untouched(name, boxes, RetinaNetRegressionHead)
    matcher = _exactly("model.proposal_matcher", model.proposal_matcher, Matcher)
    return {
        "fg_iou_thresh": matcher.high_threshold,
        "bg_iou_thresh": matcher.low_threshold,
        "allow_low_quality_matches": matcher.allow_low_quality_matches,
        "loss_type": checks.one_of(
            "model.head.regression_head._loss_type", head.regression_head._loss_type, BOX_LOSSES
        ),
        "weights": _weights("model.head.regression_head.box_coder", head.regression_head.box_coder),
    }


def _ssd_settings(model: SSD) -> dict[str, Any]:
    _untouched("model", model, SSD)
    matcher = _exactly("model.proposal_matcher", model.proposal_matcher, SSDMatcher)
    return {
        "iou_thresh": matcher.high_threshold,
        "neg_to_pos_ratio": model.neg_to_pos_ratio,
        "weights": _weights("model.box_coder", model.box_coder),
    }


def _fcos_settings(model: FCOS) -> dict[str, Any]:
    _untouched("model", model, FCOS)
    _untouched("model.head", model.head, FCOSHead)
    coder = _exactly("model.head.box_coder", model.head.box_coder, BoxLinearCoder)
    if not coder.normalize_by_size:
        checks.fail("model.head.box_coder.normalize_by_size", coder.normalize_by_size, True)
    return {"center_sampling_radius": model.center_sampling_radius}


def _generator(model: Any) -> nn.Module:
    """The model's generator of anchors, if what it makes depends on nothing but sizes."""
    generator = model.anchor_generator
    own = DefaultBoxGenerator if isinstance(generator, DefaultBoxGenerator) else AnchorGenerator
    if getattr(getattr(generator, "forward", None), "__func__", None) is not own.forward:
        checks.fail(
            "model.anchor_generator",
            f"a {type(generator).__name__} with its own forward",
            "torchvision's AnchorGenerator or DefaultBoxGenerator",
        )
    if generator.state_dict():
        checks.fail("model.anchor_generator", f"a {type(generator).__name__} with a state", "one without")
    return generator


def _untouched(name: str, part: Any, kind: Any) -> None:
    """``part`` computes its loss as ``kind`` does."""
    if getattr(getattr(part, "compute_loss", None), "__func__", None) is not kind.compute_loss:
        checks.fail(f"{name}.compute_loss", f"one of its own in a {type(part).__name__}", f"that of {kind.__name__}")


def _exactly(name: str, part: Any, kind: type) -> Any:
    if type(part) is not kind:
        checks.fail(name, f"a {type(part).__name__}", f"a {kind.__name__} of torchvision, and no class derived from it")
    return part


def _weights(name: str, part: Any) -> tuple[float, ...]:
    coder = _exactly(name, part, BoxCoder)
    if coder.bbox_xform_clip != LARGEST:
        checks.fail(f"{name}.bbox_xform_clip", coder.bbox_xform_clip, f"{LARGEST}, log(1000 / 16)")
    return tuple(map(float, coder.weights))


# ---- does torchvision compute what is expected?

WANT = "the losses of torchvision 0.28"
CLASSES, SIDE = 3, 64
TARGETS = (
    (((17, 18, 31, 30), 1), ((33, 1, 62, 29), 2), ((3, 34, 29, 63), 1)),
    (),
    (((1, 2, 61, 63), 2), ((41, 42, 47, 48), 1), ((16, 1, 47, 16), 1)),
)  # of three images: boxes and labels; the last box has one anchor at its best, and another between thresholds


def _probe(model: Any, loss: _Loss) -> None:
    """The model's loss is ours, on small predictions and anchors of two levels.

    Raises:
        ValueError: it is not; how.
    """
    kind = next(each for each in MODELS if isinstance(model, each)).__name__
    with shared.probing():
        levels = [_anchors(stride) for stride in (8, 16)]
        anchors = [torch.cat(levels)] * len(TARGETS)
        preds = [torch.randn(3, len(anchors[0]), channels) for channels in (CLASSES, 4, 1)]
        preds[1] = preds[1].abs()  # FCOS's distances
        outputs = dict(zip(_FCOSLoss.outputs, [each.requires_grad_() for each in preds], strict=True))
        targets = [
            {
                "boxes": torch.tensor([box for box, _ in each]).reshape(-1, 4).to(preds[0].dtype),
                "labels": torch.tensor([label for _, label in each], dtype=torch.int64),
            }
            for each in TARGETS
        ]
        try:
            more: list[Any] = []
            if isinstance(model, FCOS):
                more = [[len(each) for each in levels]]
            elif isinstance(model, SSD):
                more = [[_matched(model, each["boxes"], anchors[0]) for each in targets]]
            theirs, ours = (each(targets, outputs, anchors, *more) for each in (model.compute_loss, loss.tried()))
            names = sorted(ours)
            inputs = [outputs[name] for name in loss.outputs]
            if sorted(theirs) == names:
                numbers = [[found[name].detach() for name in names] + _grads(found, inputs) for found in (theirs, ours)]
                why = shared.apart(*numbers)
                why = f"{kind}'s loss computes something else: {why}" if why else ""
            else:
                why = f"{kind}'s loss returns {', '.join(theirs)}"
        except Exception as error:  # whatever other code does with what it does not know
            why = f"{kind}'s loss stops: {type(error).__name__}: {error}".splitlines()[0]
    if why:
        shared.refuse("torchvision", torchvision.__version__, why, WANT)


def _anchors(stride: int) -> Tensor:
    """Squares [N, 4] of the side of a cell."""
    y, x = torch.meshgrid(*[torch.arange(SIDE // stride) * float(stride)] * 2, indexing="ij")
    corner = torch.stack((x, y), 2).reshape(-1, 2)
    return torch.cat((corner, corner + stride), 1)


def _matched(model: Any, boxes: Tensor, anchors: Tensor) -> Tensor:
    """Which box each anchor has, -1 where none; SSD's ``forward`` does this before its loss."""
    if not len(boxes):
        return torch.full((len(anchors),), -1)
    return model.proposal_matcher(box_iou(boxes, anchors))


def _grads(found: dict[str, Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Of the sum of losses none of which counts as another, else errors may cancel."""
    weighed = [weight * found[name] for name, weight in zip(sorted(found), (1.0, 0.75, 1.25), strict=False)]
    return list(torch.autograd.grad(weighed, inputs))
