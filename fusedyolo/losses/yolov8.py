"""YOLOv8 and what Ultralytics trains likewise; and two branches of it, YOLOv10 and YOLO26."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .. import checks
from ..drivers.picks import PickCall
from ..heads import PickHead
from ..terms import TERMS, find_term, term_names
from .base import box_arguments
from .output import Apart, LossOutput, detached
from .picks import AnyTargets, PickLoss, Predicted, Together, apart_of, compute_all, together
from .resumed import Resumed

RULES = {"ultralytics": "box", "libreyolo": "range"}
"""The region of cells that an object may have. The first is the default."""


class YOLOv8Loss(PickLoss):
    """Training loss of YOLOv8, and of Ultralytics' v3, v5, v6, v9, 11 and 12: ``batch size * (box + cls + dfl)``.

    Objects pick cells by task-aligned assignment: among those whose middle lies in its box the ``topk`` of the largest
    score^alpha * IoU^beta, the score the sigmoid of its class, the IoU a CIoU not below 0; cells of which that is 0 are
    never picked, even where there are no others. A cell that several picked goes to the object of the largest IoU. With
    ``topk2`` an object keeps only so many of the cells that it then has. The soft score of a cell is score^alpha *
    IoU^beta over the largest that its object has, times the largest IoU that it has. With T the sum of all soft scores,
    at least 1,

        box * sum over cells with an object of score * (1 - CIoU) / T
        + cls * sum over cells and classes of BCE(class, soft score or 0) / T
        + dfl * sum over cells with an object of score * mean over sides of
          cross-entropies of the two distances next to the true one / T

    or, with ``reg_max`` 1, in place of the last the mean difference of distances relative to the image. Scores are held
    constant, boxes are in cells.

    With ``rule="libreyolo"`` (LibreYOLO's YOLOv9, and MultimediaTechLab's, from whom it has it) the cells of an object
    are those in its box, or on its border, whose distributions reach all its sides, ``reg_max`` - 1.01 strides away at
    most; an object that would pick none picks one, that with the largest score^alpha * IoU^beta of all cells; a cell
    that several picked goes to one of these; and the loss is not multiplied by the batch size.

    The peer may pick cells of metric 0, by an order of equals that PyTorch leaves open, which in crowds moves others
    (totals by up to 0.6 %). In float16 under autocast it computes distances in float16, here in float32. Its CIoU adds
    1e-7 to heights, which here are taken as they are. Of equal metrics the first cell comes first, of equal IoUs the
    first object.

    Args:
        num_classes: C.
        strides: pixels per cell, one a level.
        reg_max: numbers that a distance is made of; 1 for distances as they are.
        box: gain of the box part. This and the next two are attributes, read at each call.
        cls: gain of the class part.
        dfl: gain of the distance part.
        topk: see above.
        topk2: see above; None for all.
        alpha: see above.
        beta: see above.
        class_weights: factors of the class part, one a class.
        rule: ``"ultralytics"`` or ``"libreyolo"``, see above.
        assign_iou: in place of CIoU where objects pick, 1 less the loss of this name: ``"iou"``.
        cls_loss: ``"bce"``, or another class term that takes soft targets, with its usual numbers: ``"varifocal"``,
            ``"qfl"``.
        reduction: ``"sum"``, as above; or ``"none"``, by which total and parts are ``[B]``, one of each image, and add
            up to these.
        small: pixels below which a side of an object counts as so many where it picks cells; the second stride, or the
            only one, unless given; 0 for never (Ultralytics before 8.4, and always with ``"libreyolo"``).
        iou_loss: ``"ciou"``, or another IoU loss, for the box part alone.
        iou_alpha: see :func:`fusedyolo.functional.box_iou_loss`.
        iou_gamma: likewise.
        image_size: (height, width) in pixels that targets are relative to; map sizes and strides say it otherwise.
        unit: of boxes in targets: ``"relative"`` to the image, or ``"pixel"``. Relative unless given; pixels in a list
            of dicts.
        boxes: in targets: ``"cxcywh"``, ``"xyxy"`` (corners) or ``"xywh"`` (left upper corner, width, height). Centre
            and sides unless given; corners in a list of dicts.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Shapes:
        - preds: ``{"boxes": [B, 4 * reg_max, N], "scores": [B, C, N], "feats": maps [B, ., H, W]}``, N counting levels,
          rows, columns, and of the maps nothing but their sizes; without ``"feats"`` the ``image_size`` says these. Or
          boxes and scores as lists of maps ``[B, 4 * reg_max, H, W]`` and ``[B, C, H, W]``, or a list of maps
          ``[B, 4 * reg_max + C, H, W]`` of both. Boxes are left, upper, right, lower, of each ``reg_max`` numbers. Any
          strides; float16, bfloat16, float32 or float64.
        - targets: ``[M, 6]`` of image, class and box, in any order; ``[B, G, 5]`` of class and box; or a list of
          ``[n, 5]``, one an image; boxes cx, cy, w, h relative to it unless ``unit`` and ``boxes`` say otherwise.
          Or a list of ``{"boxes", "labels"}``, boxes x1, y1, x2, y2 in pixels likewise; or :class:`~fusedyolo.Targets`.
          Rows may have weights, and be ignored regions, see there.
        - output: :class:`~fusedyolo.LossOutput` with the parts ``box``, ``cls`` and ``dfl``, or ``l1`` with ``reg_max``
          1, the factor of the batch size in them; ``num_pos`` is the number of cells with an object.

    Rows that cannot be (class or image out of range, not finite, no area, centre outside the image) are skipped and
    counted in ``num_invalid``.

    Raises:
        ValueError: an argument of the constructor or of a call does not fit; it says which, what came and what was
            wanted.

    Source: the behaviour of ``v8DetectionLoss`` of Ultralytics from 8.4.128 on, and Feng et al. (task-aligned
    assignment, arXiv 2108.07755), Li et al. (distribution focal loss, arXiv 2006.04388), Zheng et al. (CIoU, arXiv
    1911.08287).
    """

    def __init__(
        self,
        num_classes: int,
        strides: Sequence[float],
        reg_max: int = 16,
        box: float = 7.5,
        cls: float = 0.5,
        dfl: float = 1.5,
        topk: int = 10,
        topk2: int | None = None,
        alpha: float = 0.5,
        beta: float = 6.0,
        class_weights: Sequence[float] | Tensor | None = None,
        *,
        rule: str = "ultralytics",
        assign_iou: str = "ciou",
        cls_loss: str = "bce",
        reduction: str = "sum",
        small: float | None = None,
        iou_loss: str = "ciou",
        iou_alpha: float = 1.0,
        iou_gamma: float = 0.0,
        image_size: int | tuple[int, int] | None = None,
        unit: str | None = None,
        boxes: str | None = None,
        backend: str = "auto",
    ):
        each = checks.own_strides(strides)
        num_classes, reg_max = checks.count("num_classes", num_classes), checks.count("reg_max", reg_max)
        bins = reg_max > 1
        self.rule = checks.one_of("rule", rule, RULES)
        ranged = RULES[rule] == "range"
        if ranged and not bins:
            checks.fail("reg_max", reg_max, f"2 or more with rule={rule!r}")
        if ranged and small:
            checks.fail("small", small, f"0 or nothing with rule={rule!r}")
        label = find_term("cls_loss", cls_loss, "objectness", users=True)
        of_boxes = [name for name in term_names("iou", users=True) if not TERMS[name].needs_extent]
        usual = 0.0 if ranged else each[min(1, len(each) - 1)]
        head = PickHead(
            num_classes=num_classes,
            strides=each,
            decode="dfl" if bins else "distance",
            reg_max=reg_max,
            assigner="aligned",
            topk=checks.count("topk", topk),
            topk2=None if topk2 is None else checks.count("topk2", topk2),
            alpha=checks.number("alpha", alpha, 0),
            beta=checks.number("beta", beta, 0),
            small=usual if small is None else checks.number("small", small, 0),
            region=RULES[rule],
            overlap=checks.one_of("assign_iou", assign_iou, of_boxes),
            box=find_term("iou_loss", iou_loss, "iou", users=True).name,
            box_args=box_arguments((1e-7, 1e-7), iou_alpha, iou_gamma),
            distance="dfl" if bins else "image",
            label=label.name,
            label_args=tuple(label.numbers.values()),
            by_image=checks.one_of("reduction", reduction, ("sum", "none")) == "none",
        )
        self.box, self.cls, self.dfl = box, cls, dfl
        self.batch_factor = not ranged
        weights = checks.class_weights(class_weights, num_classes)
        super().__init__(head, image_size, backend, weights, checks.box_form(unit, boxes))

    def gains(self) -> tuple[float, ...]:
        """Of box, classes and distances."""
        return (
            checks.number("box", self.box, 0),
            checks.number("cls", self.cls, 0),
            checks.number("dfl", self.dfl, 0),
        )

    def extra_repr(self) -> str:
        """The arguments that tell one loss from another."""
        own = {"rule": self.rule, "assign_iou": self.head.overlap, "cls_loss": self.head.label}
        return super().extra_repr() + "".join(f", {name}={value!r}" for name, value in own.items())


BRANCHES = ("one2many", "one2one")
FIRST, LAST = 0.8, 0.1  # weight of the first branch of "yolo26" before and after training
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "yolo26": ({"topk": 10}, {"topk": 7, "topk2": 1}),
    "yolov10": ({"topk": 10}, {"topk": 1}),
}
"""What the branches of each recipe are given; the first is the default."""


class E2ELoss(Resumed):
    """Training loss of detectors with two branches, of which one learns to give each object a single box.

    Both are :class:`YOLOv8Loss`, attributes ``one2many`` and ``one2one``. Recipe ``"yolo26"``: objects pick 10 cells of
    the first branch, and 7 of the second, of which they keep one; the first is weighed with ``o2m``, 0.8 at first,
    falling with every :meth:`update` to 0.1 after ``epochs`` - 1 of them, the second with ``o2o``, 1 - ``o2m``. That is
    YOLO26, and with ``reg_max`` 16 YOLOv10 as Ultralytics 8.4 trains it. Recipe ``"yolov10"``: objects pick 10 cells
    and one cell, both branches count once (Wang et al. 2024, arXiv 2405.14458; Ultralytics up to 8.3).

    :func:`fusedyolo.assign`, :func:`fusedyolo.decode` and :func:`fusedyolo.select` take the branch ``one2one``, which
    is the one that detects; give them ``criterion.one2many`` and its predictions for the other.

    Args:
        num_classes: C.
        strides: pixels per cell, one a level.
        reg_max: as in :class:`YOLOv8Loss`.
        recipe: see above.
        epochs: an attribute, read at each :meth:`update`.
        **options: all others of :class:`YOLOv8Loss` but ``topk`` and ``topk2``, for both branches; its gains are
            attributes of the branches.

    Attributes:
        updates: calls of :meth:`update` so far; saved in ``state_dict`` where they change anything, and ``o2m`` and
            ``o2o`` with them. Set it to go on with a training run from elsewhere: the weights follow.

    Shapes:
        - preds: ``{"one2many": predictions, "one2one": predictions}``, each as :class:`YOLOv8Loss` takes them.
        - targets: as there.
        - output: :class:`~fusedyolo.LossOutput`; the parts are those of both branches, ``one2many_box`` and so on,
          their weights in them; ``num_pos`` counts the cells of both.

    Raises:
        ValueError: an argument of the constructor or of a call does not fit; it says which, what came and what was
            wanted.
    """

    _counter = "updates"
    _together: Together | None = None  # in a pickle of an older version, too

    def __init__(
        self,
        num_classes: int,
        strides: Sequence[float],
        reg_max: int = 1,
        recipe: str = "yolo26",
        epochs: int = 100,
        **options: Any,
    ):
        super().__init__()
        for name in options:
            if name in ("topk", "topk2"):
                checks.fail(name, checks.describe(options[name]), "none: the recipe says it")
        self.recipe = checks.one_of("recipe", recipe, RECIPES)
        many, one = RECIPES[recipe]
        self.one2many = YOLOv8Loss(num_classes, strides, reg_max, **many, **options)
        self.one2one = YOLOv8Loss(num_classes, strides, reg_max, **one, **options)
        self.one2one._watch = None  # it has the same targets
        self._together = together((self.one2many, self.one2one))
        self.epochs = checks.count("epochs", epochs)
        self.o2m, self.o2o = 1.0, 1.0
        self.updates = 0

    def extra_repr(self) -> str:
        """What is not of a branch."""
        return f"recipe={self.recipe!r}, epochs={self.epochs}"

    @property
    def _counting(self) -> bool:
        """Whether weight moves."""
        return self.recipe == "yolo26"

    @property
    def updates(self) -> int:
        """Epochs so far; see the class."""
        return self.__dict__["updates"]

    @updates.setter
    def updates(self, value: int) -> None:
        self.__dict__["updates"] = checks.count("updates", value, 0)
        if self._counting:
            left = max(1 - value / max(checks.count("epochs", self.epochs) - 1, 1), 0)
            self.o2m = left * (FIRST - LAST) + LAST
            self.o2o = max(1 - self.o2m, 0)

    def update(self) -> None:
        """Once after each epoch: weight moves to the second branch."""
        self.updates += 1

    def forward(self, preds: Mapping[str, Predicted], targets: AnyTargets) -> LossOutput:
        """The loss of one batch; see the class for arguments and errors."""
        total, terms, num_pos, num_invalid = self._compute(preds, targets, outputs=1)
        return LossOutput(total, detached(terms, terms.values()), num_pos, num_invalid)

    def terms(self, preds: Mapping[str, Predicted], targets: AnyTargets) -> dict[str, Tensor]:
        """The parts of the loss with a gradient each, to weigh them apart; arguments and errors of :meth:`forward`."""
        return self._compute(preds, targets)[1]

    def _compute(
        self, preds: Any, targets: Any, outputs: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
        """Total, parts, predictions with an object and invalid rows; ``outputs`` as of a branch."""
        prefixes, losses, calls = zip(*self._calls(preds, targets), strict=True)
        total, terms, (counts, others) = compute_all(self._together, losses, calls, outputs)
        names = [prefix + part for prefix, loss in zip(prefixes, losses, strict=True) for part in loss.head.parts]
        found, invalid = counts.unbind()
        return total, dict(zip(names, terms, strict=True)), found + others[0], invalid

    def _calls(self, preds: Any, targets: Any) -> list[tuple[str, YOLOv8Loss, PickCall]]:
        """Of each branch how the names of its parts begin, and its call."""
        many, one = _branch(preds, "one2many"), _branch(preds, "one2one")
        first = self.one2many.read(many, targets, self.o2m)
        second = self.one2one.read(one, targets, self.o2o, first)
        return [("one2many_", self.one2many, first), ("one2one_", self.one2one, second)]

    def apart(self, preds: Any, targets: Any) -> Apart:
        """The loss in pieces, each divided by numbers of its own; arguments and errors of :meth:`forward`."""
        return apart_of(self._calls(preds, targets))

    def read_both(self, preds: Any, targets: Any) -> PickCall:
        """A call of both branches, whose launches are those of a step."""
        (_, many, first), (_, _, second) = self._calls(preds, targets)
        return second._replace(beside=(many.head, first))

    # ---- of the branch that detects, what a driver asks

    @property
    def head(self) -> PickHead:
        """Its row."""
        return self.one2one.head

    @property
    def image_size(self) -> tuple[float, float] | None:
        """(height, width) in pixels, if it was given."""
        return self.one2one.image_size

    def own(self, preds: Any) -> Any:
        """Its predictions."""
        return _branch(preds, "one2one")

    def read(self, preds: Any, targets: Any) -> PickCall:
        """A call of it."""
        return self.one2one.read(self.own(preds), targets)


def _branch(preds: Any, name: str) -> Any:
    if not isinstance(preds, Mapping) or name not in preds:
        got = f"a dict with {list(preds)}" if isinstance(preds, Mapping) else checks.describe(preds)
        checks.fail("preds", got, "a dict with " + ", ".join(map(repr, BRANCHES)))
    return preds[name]
