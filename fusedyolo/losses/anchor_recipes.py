"""The recipes of YOLOv3 and YOLOv4: what is usual in each, and the fields of a head that its hyper-parameters make."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from .. import checks
from ..terms import TERMS, Term, find_term, term_names
from .base import box_arguments, class_targets, focal_bce

Fields = dict[str, Any]


class Given(NamedTuple):
    """What a recipe knows beside its hyper-parameters."""

    box: Term
    num_classes: int
    strides: tuple[float, ...]
    iou_thresh: float
    image_size: tuple[float, float] | None


@dataclass(frozen=True)
class Recipe:
    """The defaults of one variant of a detector.

    ``hyp`` are the hyper-parameters that it takes beside the named arguments, ``make(hyp, given)`` turns them into
    fields of the head. ``offset`` is the box term that ``iou_loss="mse"`` stands for. ``fixed`` are fields that nothing
    changes. ``ignore_thresh`` None: nothing is ignored.
    """

    iou_loss: str
    scale_x_y: float
    iou_thresh: float
    ignore_thresh: float | None
    hyp: Fields
    make: Callable[[Fields, Given], Fields]
    offset: str
    assigner: str = "best_anchor"
    reduction: str = "sum"
    fixed: Fields = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------- what they share


def _label(hyp: Fields, names: tuple[str, str, str], role: str) -> tuple[str, tuple[float, ...]]:
    """A label term and its arguments, by the names of hyper-parameters that say its kind, alpha and gamma."""
    kind, alpha, gamma = (hyp[name] for name in names)
    if gamma is None:
        gamma = 0.0 if kind is None else 2.0
    gamma = checks.number(names[2], gamma, 0)
    if kind is None:
        kind = "bce" if alpha is None and gamma == 0 else "focal"
    usual = find_term(names[0], kind, role, users=True).numbers
    if "alpha" not in usual:
        return kind, tuple({**usual, "gamma": gamma}[name] for name in usual)
    if alpha is None:
        alpha = -1.0 if kind == "focal" else usual["alpha"]
    if alpha != -1.0:
        alpha = checks.number(names[1], alpha, 0, 1)
    return kind, tuple({**usual, "alpha": alpha, "gamma": gamma}[name] for name in usual)


def _gains(hyp: Fields, **names: str) -> Fields:
    """Fields that are hyper-parameters, numbers of 0 or more."""
    return {own: checks.number(name, hyp[name], 0) for own, name in names.items()}


def _quality(hyp: Fields, box: Term, eps: tuple[float, float]) -> Fields:
    """Objectness is trained towards the IoU, or whatever similarity boxes are trained by, as far as ``gr`` says."""
    ratio = checks.number("gr", hyp["gr"], 0, 1)
    if ratio == 0:
        return {}
    return {"quality": "iou" if box.is_offset else box.name, "quality_ratio": ratio, "quality_args": eps}


def _balance(hyp: Fields, given: Given, usual: tuple[float, ...] = ()) -> Fields:
    """The weight of each level's objectness."""
    if hyp["balance"] is None:
        return {"obj_balance": usual}
    return {"obj_balance": checks.per_level("balance", hyp["balance"], len(given.strides), open_low=False)}


def _mean_of_classes(gain: float, num_classes: int) -> float:
    """A gain of the mean over classes; of a single class there is no term."""
    return gain / num_classes if num_classes > 1 else 0.0


# --------------------------------------------------------------------------------------------- paper, and darknet

_COMMON: Fields = {
    "label_smooth_eps": 0.0,
    "smoothing": "binary",
    "cls_loss": None,
    "focal_alpha": None,
    "focal_gamma": None,
    "iou_alpha": 1.0,
    "iou_gamma": 0.0,
    "iou_band": (0.3, 0.7),
    "anchor_t": 4.0,
    "neighbours": 0,
}


def _common(hyp: Fields, given: Given, eps: tuple[float, float]) -> Fields:
    """Of what the recipes of the papers and of darknet take."""
    label, label_args = _label(hyp, ("cls_loss", "focal_alpha", "focal_gamma"), "class")
    return {
        "label": label,
        "label_args": label_args,
        "class_targets": class_targets(hyp, "label_smooth_eps", given.num_classes),
        "box_args": box_arguments(eps, hyp["iou_alpha"], hyp["iou_gamma"]),
        "area_cap": 1.0,  # beyond an image there is no box in darknet; a weight below 0 would push it away
    }


def _paper(hyp: Fields, given: Given) -> Fields:
    eps = (0.0, 1e-7)
    objectness, obj_args = _label(hyp, ("obj_loss", "obj_alpha", "obj_gamma"), "objectness")
    gains = _gains(
        hyp, box_gain="lambda_coord", obj_gain="lambda_obj", noobj_gain="lambda_noobj", cls_gain="lambda_class"
    )
    shared = checks.one_of("shared", hyp["shared"], ("sum", "last", "each", "merge"))
    own = {"objectness": objectness, "obj_args": obj_args, "shared": shared}
    return gains | own | _quality(hyp, given.box, eps) | _balance(hyp, given) | _common(hyp, given, eps)


def _darknet(hyp: Fields, given: Given) -> Fields:
    levels = len(given.strides)
    smooth = checks.flags("objectness_smooth", hyp["objectness_smooth"], levels)
    fields = _common(hyp, given, (0.0, 1e-6)) | _gains(hyp, box_gain="iou_normalizer", first_weight="cls_normalizer")
    fields |= {
        "unit": "image",
        "class_gate": math.log(0.25 / 0.75),  # the logit of a probability of .25
        "average_box": given.iou_thresh < 1,
        "area_weight": 1.0,
        "smooth": smooth if any(smooth) else (),
        "obj_balance": checks.per_level("obj_normalizer", hyp["obj_normalizer"], levels, open_low=False),
    }
    (new_coords,) = checks.flags("new_coords", hyp["new_coords"], 1)
    return fields | _new_coords(fields, given) if new_coords else fields


def _new_coords(fields: Fields, given: Given) -> Fields:
    """darknet's ``new_coords``."""
    if given.box.is_offset:
        ious = term_names("iou", users=True)
        checks.fail("iou_loss", "'mse' with new_coords", "one of " + ", ".join(map(repr, ious)))
    if fields["label"] != "bce":
        checks.fail("new_coords", "a class term of its own", "no cls_loss, focal_alpha or focal_gamma beside it")
    # the derivative of half a squared error
    halves = {"obj_gain": 0.5, "noobj_gain": 0.5, "cls_gain": 0.5}
    return {"decode": "sigmoid_square", "objectness": "sse", "label": "sse", **halves}


# --------------------------------------------------------------------------------------------------- repositories


def _archive(hyp: Fields, given: Given) -> Fields:
    return _of_repository(hyp, given, (1e-16, 1e-16), "giou") | _gains(hyp, iou_thresh="iou_t")


def _eriklindernoren(hyp: Fields, given: Given) -> Fields:
    return _of_repository(hyp, given, (1e-9, 1e-9), "box")


def _of_repository(hyp: Fields, given: Given, eps: tuple[float, float], gain: str) -> Fields:
    gamma = checks.number("fl_gamma", hyp["fl_gamma"], 0)
    label, label_args = focal_bce(checks.number("cls_pw", hyp["cls_pw"], 0, open_low=True), gamma)
    _, obj_args = focal_bce(checks.number("obj_pw", hyp["obj_pw"], 0, open_low=True), gamma)
    terms = {"label": label, "label_args": label_args, "objectness": label, "obj_args": obj_args}
    gains = _gains(hyp, box_gain=gain, obj_gain="obj", noobj_gain="obj", cls_gain="cls")
    gains["cls_gain"] = _mean_of_classes(gains["cls_gain"], given.num_classes)
    targets = {"class_targets": class_targets(hyp, "label_smoothing", given.num_classes)}
    own = terms | gains | targets | {"box_args": box_arguments(eps, hyp["iou_alpha"], hyp["iou_gamma"])}
    return own | _quality(hyp, given.box, eps) | _balance(hyp, given)


def _bubbliiiing(hyp: Fields, given: Given) -> Fields:
    classes, obj = given.num_classes, hyp["obj_ratio"]
    if obj is None:
        if given.image_size is None:
            checks.fail("obj_ratio", None, "a number, or image_size: of H x W pixels it is 5 H W / 416^2")
        obj = 5 * given.image_size[0] * given.image_size[1] / 416**2
    obj = checks.number("obj_ratio", obj, 0)
    cls = checks.number("cls_ratio", classes / 80 if hyp["cls_ratio"] is None else hyp["cls_ratio"], 0)
    fields: Fields = {"box_gain": checks.number("box_ratio", hyp["box_ratio"], 0), "cls_gain": cls / classes}
    if checks.flag("focal_loss", hyp["focal_loss"]):
        args = (checks.number("alpha", hyp["alpha"], 0, 1), checks.number("gamma", hyp["gamma"], 0))
        fields |= {"objectness": "focal", "obj_args": args}
        obj *= 10
    coarse_first = sorted(given.strides, reverse=True)
    usual = tuple((0.4, 1.0, 4.0)[min(coarse_first.index(stride), 2)] for stride in given.strides)
    box_args = {"box_args": box_arguments((0.0, 0.0), hyp["iou_alpha"], hyp["iou_gamma"])}
    return fields | {"obj_gain": obj, "noobj_gain": obj} | box_args | _balance(hyp, given, usual)


# ----------------------------------------------------------------------------------------------------------- rows

_POWERS: Fields = {"iou_alpha": 1.0, "iou_gamma": 0.0, "iou_band": (0.3, 0.7), "anchor_t": 4.0, "neighbours": 0}
_OF_REPOSITORY: Fields = {
    "cls_pw": 1.0,
    "obj_pw": 1.0,
    "fl_gamma": 0.0,
    "label_smoothing": 0.0,
    "smoothing": "binary",
    "gr": 1.0,
    "balance": None,
    **_POWERS,
}
_BY_LEVEL: Fields = {"shared": "each", "unit": "cell", "edge": True}

_V3_PAPER = Recipe(
    iou_loss="mse",
    scale_x_y=1.0,
    iou_thresh=1.0,
    ignore_thresh=0.5,
    hyp={
        "lambda_coord": 5.0,
        "lambda_noobj": 0.5,
        "lambda_obj": 1.0,
        "lambda_class": 1.0,
        "obj_loss": None,
        "obj_alpha": None,
        "obj_gamma": None,
        "gr": 0.0,
        "balance": None,
        "shared": "sum",
        **_COMMON,
    },
    make=_paper,
    offset="mse",
)
_V3_DARKNET = Recipe(
    iou_loss="mse",
    scale_x_y=1.0,
    iou_thresh=1.0,
    ignore_thresh=0.7,
    hyp={
        "iou_normalizer": 0.75,
        "obj_normalizer": 1.0,
        "cls_normalizer": 1.0,
        "counters_per_class": None,
        "max_delta": None,
        "objectness_smooth": 0,
        "new_coords": 0,
        **_COMMON,
    },
    make=_darknet,
    offset="bce_mse",
)
_V3_ARCHIVE = Recipe(
    iou_loss="giou",
    scale_x_y=1.0,
    iou_thresh=0.2,
    ignore_thresh=None,
    hyp={"giou": 3.54, "obj": 64.3, "cls": 37.4, "iou_t": 0.2, **_OF_REPOSITORY},
    make=_archive,
    offset="mse",
    assigner="shape_iou",
    reduction="level",
    fixed=_BY_LEVEL,
)
_V3_ERIKLINDERNOREN = Recipe(
    iou_loss="ciou",
    scale_x_y=1.0,
    iou_thresh=1.0,
    ignore_thresh=None,
    hyp={"box": 0.05, "obj": 1.0, "cls": 0.5, **_OF_REPOSITORY},
    make=_eriklindernoren,
    offset="mse",
    assigner="ratio",
    reduction="level",
    fixed=_BY_LEVEL,
)
_V3_BUBBLIIIING = Recipe(
    iou_loss="giou",
    scale_x_y=1.0,
    iou_thresh=1.0,
    ignore_thresh=0.5,
    hyp={
        "box_ratio": 0.05,
        "obj_ratio": None,
        "cls_ratio": None,
        "balance": None,
        "focal_loss": 0,
        "alpha": 0.25,
        "gamma": 2.0,
        **_POWERS,
    },
    make=_bubbliiiing,
    offset="mse",
    reduction="level",
    fixed={"shared": "merge", "unit": "cell"},
)
_V4: Fields = {"iou_loss": "ciou", "scale_x_y": 1.1, "iou_thresh": 0.213}

RECIPES = {
    ("YOLOv3Loss", "paper"): _V3_PAPER,
    ("YOLOv3Loss", "darknet"): _V3_DARKNET,
    ("YOLOv3Loss", "archive"): _V3_ARCHIVE,
    ("YOLOv3Loss", "eriklindernoren"): _V3_ERIKLINDERNOREN,
    ("YOLOv3Loss", "bubbliiiing"): _V3_BUBBLIIIING,
    ("YOLOv4Loss", "paper"): replace(_V3_PAPER, **_V4),
    ("YOLOv4Loss", "darknet"): replace(
        _V3_DARKNET, **_V4, hyp={**_V3_DARKNET.hyp, "iou_normalizer": 0.07, "max_delta": 5.0}
    ),
    ("YOLOv4Loss", "bubbliiiing"): replace(_V3_BUBBLIIIING, iou_loss="ciou_whole"),
}
"""A row for each detector and recipe; the first recipe of a detector is its default."""


def counted_weights(hyp: Fields, num_classes: int) -> tuple[float, ...] | None:
    """darknet's weights of rows, of how many objects each class has; None for none."""
    if hyp.get("max_delta") is not None:
        limit = checks.number("max_delta", hyp["max_delta"], 0, open_low=True)
    else:
        limit = math.inf
    if hyp.get("counters_per_class") is None:
        return None
    if hyp["cls_loss"] is not None and not TERMS[hyp["cls_loss"]].elementwise:
        checks.fail(
            "cls_loss", f"{hyp['cls_loss']!r} with counters_per_class", "a term that judges each class by itself"
        )
    counts = checks.class_counts(hyp["counters_per_class"], num_classes)
    return tuple(min(max(counts) / count, limit) for count in counts)
