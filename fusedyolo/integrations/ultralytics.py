"""Ultralytics' detectors, with the loss of this package in place of ``v8DetectionLoss``'s own."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
import ultralytics
from torch import Tensor
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils.loss import BboxLoss, DFLoss, E2ELoss, v8DetectionLoss
from ultralytics.utils.tal import TaskAlignedAssigner

from .. import YOLOv8Loss, checks
from ..drivers.picks import PickCall
from ..losses.picks import Together, compute_all, together
from . import shared

EPS = 1e-9  # of the assigner
RULE = ("topk", "topk2", "num_classes", "alpha", "beta", "stride_val", "eps")  # of it, too

_criteria: shared.Criteria[YOLOv8Loss] = shared.Criteria()
_pairs: WeakKeyDictionary[Any, tuple[YOLOv8Loss, YOLOv8Loss, Together | None]] = WeakKeyDictionary()


def patch() -> None:
    """Replace the loss of every detector of Ultralytics that trains by ``v8DetectionLoss``; training stays what it was.

    These are v3, v5, v6, v8, v9, 11 and 12, and, by the two of its ``E2ELoss``, v10 and 26. The method ``loss`` of the
    class is replaced, and the call of ``E2ELoss``, whose branches one set of launches computes; nothing else, and
    models that are there already take part. They return what they returned: the three parts times the batch size, with
    their gradient, and a dictionary of them, detached. Gains are read from the model's ``args`` at each call, class
    weights once.

    Losses of derived classes (segmentation, pose, oriented boxes) stay as they are, so does one whose assigner, box
    loss or cross-entropy is not Ultralytics' own: then a warning says why. Nothing is stored in a model, so that a
    checkpoint loads where this package is not installed.

    Processes that Ultralytics starts for several GPUs know nothing of this call; train with :class:`Trainer` there.

    Raises:
        ValueError: the installed Ultralytics computes something else than :class:`~fusedyolo.YOLOv8Loss`, as before
            8.4.128; this is found by trying it. Nothing is changed.
    """
    with shared.PATCHING:
        if _method.stands(v8DetectionLoss):
            return
        _probe()
        pair = _is_known_pair()
        _method.put(v8DetectionLoss)
        if pair:
            _method_of_pair.put(E2ELoss)


def unpatch() -> None:
    """Give ``v8DetectionLoss`` and ``E2ELoss`` their own back; nothing happens to what is not :func:`patch`'s."""
    with shared.PATCHING:
        _method.take(v8DetectionLoss)
        _method_of_pair.take(E2ELoss)


class Trainer(DetectionTrainer):
    """Ultralytics' trainer of detectors, patched while it trains: ``YOLO("yolo26n.yaml").train(trainer=Trainer, ...)``.

    In training on several GPUs every process makes its own trainer, and so is patched.
    """

    def train(self) -> Any:
        """Train; see :func:`patch` for what is raised."""
        before = _method.stands(v8DetectionLoss)
        patch()
        try:
            return super().train()
        finally:
            if not before:
                unpatch()


def _loss(self: Any, preds: dict[str, Any], batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """In place of ``v8DetectionLoss.loss``."""
    criterion = _criterion(self)
    if criterion is None:
        return _method.own(v8DetectionLoss)(self, preds, batch)
    return _call(criterion, self.loss_names, preds, batch)


def _both(self: Any, preds: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """In place of the call of ``E2ELoss``."""
    pair = None if torch.compiler.is_compiling() else _pair(self)
    if pair is None:
        return _method_of_pair.own(E2ELoss)(self, preds, batch)
    return _call_both(self, pair, self.one2many.parse_output(preds), batch)


_method, _method_of_pair = shared.Method("loss", _loss), shared.Method("__call__", _both)


def _call_both(
    loss: Any, pair: tuple[YOLOv8Loss, YOLOv8Loss, Together | None], preds: dict[str, Any], batch: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    *criteria, known = pair
    many, one = preds["one2many"], preds["one2one"]
    parts = _parts(known, criteria, (many, one), batch)
    first, second = parts.tensor_split(2)
    items = second.detach() / len(one["boxes"])
    return first * loss.o2m + second * loss.o2o, dict(zip(loss.one2one.loss_names, items, strict=True))


def _call(
    criterion: YOLOv8Loss, names: tuple[str, ...], preds: dict[str, Any], batch: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    parts = _parts(None, [criterion], [preds], batch)
    return parts, dict(zip(names, parts.detach() / len(preds["boxes"]), strict=True))


def _parts(
    known: Together | None, criteria: Sequence[YOLOv8Loss], preds: Sequence[dict[str, Any]], batch: dict[str, Any]
) -> Tensor:
    """Those of each criterion on predictions of its own, one after the other."""
    rows = torch.cat((batch["batch_idx"].view(-1, 1), batch["cls"].view(-1, 1), batch["bboxes"]), 1)
    rows, calls = rows.to(preds[0]["boxes"].device), list[PickCall]()
    for criterion, own in zip(criteria, preds, strict=True):
        boxes, scores = own["boxes"], own["scores"]
        dtype = torch.promote_types(boxes.dtype, scores.dtype)  # text heads have float32 scores under autocast
        planes = {"boxes": boxes.to(dtype), "scores": scores.to(dtype), "feats": own["feats"]}
        calls.append(criterion.read(planes, rows, 1.0, calls[0] if calls else None))
    _, terms, _ = compute_all(known, criteria, calls)
    return torch.stack(terms)


def _pair(loss: Any) -> tuple[YOLOv8Loss, YOLOv8Loss, Together | None] | None:
    """What stands in for the two losses of an ``E2ELoss``; None where one of them, or both, are to be called."""
    branches = loss.one2many, loss.one2one
    if type(loss) is not E2ELoss or not _method.stands(v8DetectionLoss):
        return None
    if any("loss" in vars(each) for each in branches):
        return None
    many, one = (_criterion(each, above=2) for each in branches)
    if many is None or one is None:
        return None
    found = _pairs.get(loss)
    if found is None or found[0] is not many or found[1] is not one:
        found = _pairs[loss] = many, one, together((many, one))
    return found


def _criterion(loss: Any, above: int = 0) -> YOLOv8Loss | None:
    """What stands in for a loss of Ultralytics, as this is now, gains too; None if it keeps its own. ``above`` as of
    :meth:`.shared.Criteria.find`.
    """
    if type(loss) is not v8DetectionLoss:
        return None
    # what may be exchanged or set after it was made
    settings = [loss.nc, loss.reg_max, loss.class_weights, loss.stride]
    settings += shared.versions(settings) + shared.methods(loss, loss.assigner)
    settings += [getattr(loss.assigner, name, None) for name in RULE]
    settings += shared.state(loss.bce, loss.bbox_loss, getattr(loss.bbox_loss, "dfl_loss", None))
    found = _criteria.find(loss, settings, lambda: _of(loss), above)
    if found is not None:
        hyp: Any = loss.hyp
        found.box, found.cls, found.dfl = hyp.box, hyp.cls, hyp.dfl
    return found


def _of(loss: Any, backend: str = "auto") -> YOLOv8Loss:
    """The criterion with the settings of a loss of Ultralytics.

    Raises:
        ValueError: it computes something else.
    """
    assigner, box = loss.assigner, loss.bbox_loss
    shared.plain("loss", loss, v8DetectionLoss)
    shared.plain("loss.assigner", assigner, TaskAlignedAssigner)
    shared.plain("loss.bbox_loss", box, BboxLoss)
    shared.bce("loss.bce", loss.bce, "none")
    if loss.reg_max > 1:
        shared.plain("loss.bbox_loss.dfl_loss", box.dfl_loss, DFLoss)
        if box.dfl_loss.reg_max != loss.reg_max:
            checks.fail("loss.bbox_loss.dfl_loss.reg_max", box.dfl_loss.reg_max, loss.reg_max)
    elif box.dfl_loss is not None:
        checks.fail("loss.bbox_loss.dfl_loss", f"a {type(box.dfl_loss).__name__}", "None, for reg_max is 1")
    if assigner.num_classes != loss.nc:
        checks.fail("loss.assigner.num_classes", assigner.num_classes, loss.nc)
    if assigner.eps != EPS:
        checks.fail("loss.assigner.eps", assigner.eps, EPS)
    weights = loss.class_weights
    return YOLOv8Loss(
        loss.nc,
        loss.stride.tolist(),
        loss.reg_max,
        topk=assigner.topk,
        topk2=None if assigner.topk2 == assigner.topk else assigner.topk2,
        alpha=assigner.alpha,
        beta=assigner.beta,
        class_weights=None if weights is None else weights.flatten().tolist(),
        small=getattr(assigner, "stride_val", None),  # older ones have none
        backend=backend,
    )


# ---- does it compute what is expected?

CLASSES, STRIDES, SIDE = 3, (8.0, 16.0, 32.0), 64
WANT = "the loss of Ultralytics 8.4.128 or later"
LARGE = (0, 1, 0.45, 0.5, 0.6, 0.7), (2, 0, 0.5, 0.4, 0.9, 0.5)  # image, class, cx, cy, w, h
SMALL = (
    (2, 2, 23 / 64, 47 / 64, 5 / 64, 5 / 64),  # holds the middle of a cell only if it counts for 8 pixels or more
    (2, 0, 38 / 64, 18 / 64, 11 / 64, 11 / 64),  # of more than one only if for 16
)


def _probe() -> None:
    """Ultralytics computes what we do, whatever its version says: two losses, of small predictions and few objects.

    Raises:
        ValueError: it does not; why, as far as that can be told.
    """
    with shared.probing():
        for reg_max, topk, topk2 in ((16, 10, None), (1, 7, 1)):
            preds = _predictions(reg_max)
            try:
                loss = v8DetectionLoss(_model(reg_max), tal_topk=topk, tal_topk2=topk2)
                found, of_large = (loss.loss(dict(preds), _batch(rows)) for rows in (LARGE + SMALL, LARGE))
            except Exception as error:  # whatever other code does with what it does not know
                _refuse(f"v8DetectionLoss stops at a call: {type(error).__name__}: {error}".splitlines()[0])
            total = found[0] if isinstance(found, tuple) and len(found) == 2 else None
            if not isinstance(total, Tensor) or total.shape != (3,) or not isinstance(found[1], dict):
                _refuse("v8DetectionLoss.loss returns something else than three parts and a dictionary")
            criterion = _of(loss, "torch")
            why = _differs(of_large, criterion, loss.loss_names, preds, _batch(LARGE))
            if why:
                _refuse(f"v8DetectionLoss with reg_max {reg_max} computes something else: {why}")
            if _differs(found, criterion, loss.loss_names, preds, _batch(LARGE + SMALL)):
                _refuse("its assigner does otherwise with objects smaller than its second stride")


def _is_known_pair() -> bool:
    """Whether ``E2ELoss`` does with its two losses what it is known to do; else it goes on calling them."""
    with shared.probing():
        preds, batch = {"one2many": _predictions(1), "one2one": _predictions(1)}, _batch(LARGE)
        try:
            loss = E2ELoss(_model(1))
            loss.o2m, loss.o2o = 0.7, 0.4
            found = loss((None, dict(preds)), batch)
            many, one = (_of(each, "torch") for each in (loss.one2many, loss.one2one))
            own = _call_both(loss, (many, one, None), loss.one2many.parse_output((None, preds)), batch)
            inputs = [branch[name] for branch in preds.values() for name in ("boxes", "scores")]
            theirs, ours = (_numbers(each, inputs) for each in (found, own))
            return list(found[1]) == list(own[1]) and not shared.apart(theirs, ours)
        except Exception:  # whatever other code does with what it does not know
            return False


def _differs(found: Any, criterion: YOLOv8Loss, names: Any, preds: Any, batch: Any) -> str:
    """How what Ultralytics returned differs from ours, with the gradients of its predictions."""
    own = _call(criterion, names, preds, batch)
    if list(found[1]) != list(own[1]):
        return f"its items are {list(found[1])}, ours {list(own[1])}"
    inputs = preds["boxes"], preds["scores"]
    theirs, ours = (_numbers(each, inputs) for each in (found, own))
    return shared.apart(theirs, ours)


def _numbers(found: tuple[Tensor, dict[str, Tensor]], inputs: Sequence[Tensor]) -> list[Tensor]:
    """What is compared of what a loss returned."""
    total, items = found
    weights = torch.tensor((1.0, 0.75, 1.25))  # else errors may cancel
    grads = torch.autograd.grad((total * weights).sum(), inputs, retain_graph=True)
    return [total.detach(), *items.values(), *grads]


def _model(reg_max: int) -> Any:
    """What ``v8DetectionLoss`` looks at of a model."""
    head = SimpleNamespace(stride=torch.tensor(STRIDES), nc=CLASSES, reg_max=reg_max, no=CLASSES + 4 * reg_max)
    return SimpleNamespace(
        args=SimpleNamespace(box=7.5, cls=0.5, dfl=1.5),  # as we have them
        model=[head],
        class_weights=torch.tensor((1.0, 0.5, 2.0)),
        parameters=lambda: iter([torch.zeros(1)]),
    )


def _predictions(reg_max: int) -> dict[str, Any]:
    """Of three images of :data:`SIDE` pixels; boxes of a cell or two, so that every object finds some."""
    maps = [(SIDE // int(stride),) * 2 for stride in STRIDES]
    cells = sum(height * width for height, width in maps)
    boxes = 0.3 + torch.rand(3, 4, cells)
    if reg_max > 1:
        boxes = (torch.randn(3, 4, reg_max, cells) - torch.arange(reg_max)[:, None]).flatten(1, 2)
    scores = torch.randn(3, CLASSES, cells)
    feats = [torch.zeros(3, 1, *each) for each in maps]
    return {"boxes": boxes.requires_grad_(), "scores": scores.requires_grad_(), "feats": feats}


def _batch(objects: tuple[tuple[float, ...], ...]) -> dict[str, Tensor]:
    rows = torch.tensor(objects)
    return {"batch_idx": rows[:, 0], "cls": rows[:, 1:2], "bboxes": rows[:, 2:]}


def _refuse(got: str) -> NoReturn:
    shared.refuse("ultralytics", ultralytics.__version__, got, WANT)
