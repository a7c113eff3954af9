"""YOLOv5, with the loss of this package in place of that of its ``ComputeLoss``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import YOLOv5Loss, checks
from . import shared

_criteria: shared.Criteria[YOLOv5Loss] = shared.Criteria()


def patch(compute_loss: type | None = None) -> None:
    """Replace the loss of YOLOv5's ``ComputeLoss``; training stays what it was.

    The method ``__call__`` of the class is replaced, and nothing else; objects that are there already take part. It
    returns what it returned: the loss times the batch size, ``[1]``, and its three parts, ``[3]``, detached. Gains and
    ``anchor_t`` are read from ``hyp`` at each call, anchors once.

    Objects of derived classes keep their own loss, so does one with other class or objectness losses, weights of levels
    or methods than YOLOv5's own: then a warning says why. Nothing is stored in a model.

    Args:
        compute_loss: the class, which in a checkout of the repository is ``utils.loss.ComputeLoss``; if not given, that
            of the package ``yolov5``.

    Raises:
        ImportError: no class was given, and there is no such package.
        ValueError: the class computes something else than :class:`~fusedyolo.YOLOv5Loss`, which is found by trying it,
            or its ``sort_obj_iou`` is set, or it is no class; nothing is changed. An object made with
            ``autobalance=True`` raises it when it is called.
    """
    cls = _class(compute_loss)
    with shared.PATCHING:
        if not _method.stands(cls):
            _probe(cls)
            _method.put(cls)


def unpatch(compute_loss: type | None = None) -> None:
    """Give the class its own loss back; nothing happens if it does not have :func:`patch`'s. Arguments as there."""
    cls = _class(compute_loss)
    with shared.PATCHING:
        _method.take(cls)


def _class(given: type | None) -> Any:
    if given is None:
        return import_module("yolov5.utils.loss").ComputeLoss
    if not isinstance(given, type):
        checks.fail("compute_loss", f"a {type(given).__name__}", "the class, ComputeLoss")
    return given


def _call(self: Any, p: Sequence[Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
    """In place of ``ComputeLoss.__call__``."""
    criterion = _criterion(self, p)
    if criterion is None:
        return _method.own(type(self))(self, p, targets)
    return _losses(criterion, p, targets)


_method = shared.Method("__call__", _call)


def _losses(criterion: YOLOv5Loss, p: Sequence[Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
    out = criterion(list(p), targets)
    return out.total.view(1), torch.stack(tuple(out.parts.values())) / p[0].shape[0]


def _criterion(loss: Any, preds: Sequence[Tensor]) -> YOLOv5Loss | None:
    """What stands in for a ``ComputeLoss``, as this is now; None if it keeps its own."""
    if type(loss) not in _method.kept:
        return None
    for name in ("autobalance", "sort_obj_iou"):
        if getattr(loss, name, False):
            checks.fail(f"compute_loss.{name}", getattr(loss, name), "False, or unpatch() before")
    # what may be exchanged or set after it was made
    strides = tuple(preds[0].shape[2] / pred.shape[2] for pred in preds)
    hyp = (loss.hyp[name] for name in ("box", "obj", "cls", "anchor_t"))
    settings = [*hyp, *strides, *loss.balance, loss.nc, loss.nl, loss.gr, loss.cp, loss.cn, loss.anchors]
    terms = (loss.BCEcls, loss.BCEobj)
    settings += shared.versions(settings) + shared.methods(loss)
    settings += shared.state(*terms, *(getattr(term, "loss_fcn", None) for term in terms))
    return _criteria.find(loss, settings, lambda: _of(loss, strides))


def _of(loss: Any, strides: Sequence[float], backend: str = "auto") -> YOLOv5Loss:
    """The criterion with the settings of a ``ComputeLoss``, which knows no pixels: ``strides`` are in cells of the
    first level.

    Raises:
        ValueError: it computes something else.
    """
    shared.plain("compute_loss", loss, type(loss))
    balance = YOLOv5Loss.balances.get(loss.nl, ())
    if tuple(loss.balance[: loss.nl]) != balance:
        checks.fail("compute_loss.balance", loss.balance, list(balance))
    if loss.cp != 1 - loss.cn:
        checks.fail("compute_loss.cp", loss.cp, f"1 - cn, {1 - loss.cn}")
    (cls_pw, gamma), (obj_pw, obj_gamma) = (_bce(name, getattr(loss, name)) for name in ("BCEcls", "BCEobj"))
    if gamma != obj_gamma:
        checks.fail("compute_loss.BCEobj.gamma", obj_gamma, f"{gamma} as BCEcls")
    anchors = [[(w * s, h * s) for w, h in level] for level, s in zip(loss.anchors.tolist(), strides, strict=True)]
    hyp = {name: loss.hyp[name] for name in ("box", "obj", "cls", "anchor_t")}
    smoothing, gr = 2 * loss.cn, min(float(loss.gr), 1.0)
    more = {"cls_pw": cls_pw, "obj_pw": obj_pw, "fl_gamma": gamma, "label_smoothing": smoothing, "gr": gr}
    return YOLOv5Loss(anchors, strides, loss.nc, backend=backend, **hyp, **more)


def _bce(name: str, part: Any) -> tuple[float, float]:
    """The weight of positives and the gamma of a class or objectness loss, 0 where that is not focal."""
    name, gamma, reduction = f"compute_loss.{name}", 0.0, "mean"
    if type(part).__name__ == "FocalLoss":
        if part.alpha != 0.25 or part.reduction != "mean":
            checks.fail(name, f"with alpha {part.alpha} and reduction {part.reduction!r}", "0.25 and 'mean'")
        shared.plain(name, part, sys.modules[type(part).__module__].FocalLoss)
        name, part, gamma, reduction = f"{name}.loss_fcn", part.loss_fcn, part.gamma, "none"
    shared.bce(name, part, reduction, pos_weight=True)
    if part.pos_weight is None:
        return 1.0, gamma
    if part.pos_weight.numel() != 1:
        checks.fail(f"{name}.pos_weight", f"{part.pos_weight.numel()} numbers", "one, for all classes")
    return part.pos_weight.item(), gamma


# ---- does it compute what is expected?

CLASSES, STRIDES, SIDE = 3, (8, 16, 32), 64
ANCHORS = (((1.25, 1.625), (2, 3.75)), ((1.875, 3.8125), (3.875, 2.8125)), ((3.625, 2.8125), (4.875, 6.1875)))  # cells
HYP = {"box": 0.05, "obj": 1.0, "cls": 0.5, "cls_pw": 1.5, "obj_pw": 0.75, "anchor_t": 4.0, "label_smoothing": 0.1}
WANT = "the loss of YOLOv5 7.0"
OBJECTS = (
    (0, 1, 0.45, 0.52, 0.6, 0.7),
    (0, 2, 0.3, 0.7, 0.1, 0.15),
    (0, 2, 0.31, 0.69, 0.12, 0.15),
    (2, 0, 0.9, 0.97, 0.2, 0.05),
)  # image, class, cx, cy, w, h


def _probe(cls: Any) -> None:
    """It computes what we do, whatever its version: small predictions of few objects, with and without focal losses.

    Raises:
        ValueError: it does not; why, as far as that can be told.
    """
    if getattr(cls, "sort_obj_iou", False):
        checks.fail("ComputeLoss.sort_obj_iou", cls.sort_obj_iou, False)
    with shared.probing():
        targets, anchors = torch.tensor(OBJECTS), torch.tensor(ANCHORS)
        for gamma in (0.0, 1.5):
            shapes = [(3, 2, SIDE // stride, SIDE // stride, 5 + CLASSES) for stride in STRIDES]
            preds = [torch.randn(shape).requires_grad_() for shape in shapes]
            head = SimpleNamespace(nl=3, na=2, nc=CLASSES, stride=torch.tensor(STRIDES), anchors=anchors)
            model = SimpleNamespace(hyp={**HYP, "fl_gamma": gamma}, model=[head], parameters=lambda: iter([anchors]))
            try:
                loss = cls(model)
                found = loss(preds, targets)
            except Exception as error:  # whatever other code does with what it does not know
                _refuse(f"ComputeLoss stops at a call: {type(error).__name__}: {error}".splitlines()[0])
            shapes = [tuple(getattr(each, "shape", ())) for each in found] if isinstance(found, tuple) else []
            if shapes != [(1,), (3,)]:
                _refuse("ComputeLoss returns something else than a loss [1] and its parts [3]")
            own = _losses(_of(loss, (1, 2, 4), "torch"), preds, targets)
            theirs, ours = (
                [total.detach(), items, *torch.autograd.grad(total, preds, retain_graph=True)]
                for total, items in (found, own)
            )
            why = shared.apart(theirs, ours)
            if why:
                _refuse(f"ComputeLoss with fl_gamma {gamma} computes something else: {why}")


def _refuse(got: str) -> NoReturn:
    shared.refuse("yolov5", "ComputeLoss", got, WANT)
