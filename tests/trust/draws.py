"""What hypothesis draws: problems of any geometry and options, objects on every border, predictions of any layout."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import torch
from conftest import DEVICE
from torch import Tensor
from trust.cases import FEWEST_LEVELS, Problem

from fusedyolo.targets import Targets
from fusedyolo.terms import term_names
from fusedyolo.tools.registry import Case

IOUS, CLASSES = term_names("iou", users=True), term_names("class", users=True)
SEEDS = st.integers(0, 2**31 - 1)
SIDES = (1.0, 2.0, 0.5, 1e-6, 1e-3, 0.25, 1.5, 4.0)  # of objects, in images or in anchors


def _some(**options: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Any of these options, and any values of them."""
    return st.fixed_dictionaries({}, optional=options)


def _rarely(may: bool, usual: st.SearchStrategy[int], large: st.SearchStrategy[int]) -> st.SearchStrategy[int]:
    """Once in twelve a large number, which takes the interpreter longer, if it ``may`` be so."""
    return st.integers(0, 11).flatmap(lambda die: large if may and die == 7 else usual)


def _numbers(*values: float) -> st.SearchStrategy[float]:
    return st.sampled_from(values)


def _iou(*more: str, name: str = "iou_loss") -> dict[str, st.SearchStrategy[Any]]:
    return {name: st.sampled_from((*IOUS, *more))}


_POWERS = {"iou_alpha": _numbers(0.5, 2, 3), "iou_gamma": _numbers(0.5, 1)}
_V3 = {
    **_iou("mse"),
    **_POWERS,
    "assigner": st.just("iou_band"),
    "iou_band": st.sampled_from([(0.1, 0.2), (0.3, 0.3), (0.0, 0.5)]),
    "scale_x_y": _numbers(1.2, 2.0),
    "iou_thresh": _numbers(0.0, 0.2, 0.6, 1.0),
    "ignore_thresh": _numbers(0.0, 0.3, 0.9, 1.0),
    "reduction": st.just("mean"),
    "label_smooth_eps": _numbers(0.1),
    "cls_loss": st.sampled_from(CLASSES),
    "focal_gamma": _numbers(0, 1, 1.5, 2),
}
_DARKNET = {
    "weighted": st.just(True),  # counters_per_class, of as many classes as there are
    "max_delta": _numbers(2.0),
    "objectness_smooth": st.just(1),
    "new_coords": st.just(1),
    "obj_normalizer": _numbers(0.4),
}
_RATIO = {
    **_iou(),
    **_POWERS,
    "anchor_t": _numbers(1.0, 2.0, 10.0),
    "fl_gamma": _numbers(1.0, 1.5),
    "cls_pw": _numbers(0.5, 2.0),
    "gr": _numbers(0.0, 0.5),
}
_FOCAL = {"alpha": _numbers(-1, 0, 0.5), "gamma": _numbers(0, 1, 1.5)}
_DELTA = {"loss_type": st.sampled_from((*IOUS, "l1", "smooth_l1")), "beta": _numbers(0, 0.1, 1)}
_OPTIONS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "YOLOv1": {"num_boxes": st.integers(1, 3)},
    "YOLOv1/darknet": {"sqrt": st.just(0), "rescore": st.just(0), "reduction": st.just("mean")},
    "YOLOv2/region": {"thresh": _numbers(0.1, 0.3, 1.0), "lambda_noobj": _numbers(0.0)},
    "YOLOv2/darknet": {"thresh": _numbers(0.0, 0.3), "rescore": st.just(0), "reduction": st.just("mean")},
    "YOLOv2/lightnet": {"coord_regression": st.just("ciou"), "class_smoothing": _numbers(0.1)},
    "YOLOv3/paper": _V3,
    "YOLOv4/paper": _V3,
    "YOLOv3/darknet": _V3 | _DARKNET,
    "YOLOv4/darknet": _V3 | _DARKNET,
    "ScaledYOLOv4": _RATIO,
    "YOLOv5": _RATIO | {"label_smoothing": _numbers(0.1)},
    "YOLOv7": _RATIO | {"label_smoothing": _numbers(0.1), "loss_ota": _numbers(0)},
    "RetinaNet": _FOCAL | _DELTA | {"fg_iou_thresh": _numbers(0.4, 0.9), "allow_low_quality_matches": st.just(False)},
    "EfficientDet": {"match_threshold": _numbers(0.3, 0.9), "gamma": _numbers(0, 2.0), "delta": _numbers(0.5)},
    "SSD": _DELTA | {"iou_thresh": _numbers(0.0, 0.3, 0.9), "neg_to_pos_ratio": _numbers(0.5, 1, 100)},
    "FCOS": _FOCAL | _iou(name="loss_type") | {"center_sampling_radius": _numbers(0.5, 5)},
    "YOLOX": _iou() | _POWERS | {"rule": st.just("0.3.0"), "use_l1": st.just(True), "center_radius": _numbers(0.5, 4)},
    "YOLOv8": _iou()
    | _POWERS
    | {"reg_max": st.sampled_from([1, 5]), "topk": _numbers(1, 3), "topk2": _numbers(1, 2), "alpha": _numbers(0, 1)}
    | {"beta": _numbers(0, 1), "small": _numbers(0, 20), "weighted": st.just(True), "rule": st.just("libreyolo")},
    "E2E": _iou() | {"reg_max": st.sampled_from([4, 16])},
}


@st.composite
def problems(draw: st.DrawFn, case: Case, large: bool) -> Problem:
    """A loss with some options, on images of up to a few cells of the coarsest map; of one map unless ``large``."""
    fewest = FEWEST_LEVELS.get(case.loss, 1)
    one = case.grid or case.one_map
    levels = 1 if one else draw(st.integers(fewest, 3 if large else fewest), label="levels")
    first = draw(st.sampled_from([8, 3, 16]), label="stride")
    height, width = draw(st.integers(1, 3), label="height"), draw(st.integers(1, 4), label="width")
    side = draw(st.integers(1, 7), label="grid")
    maps = ((side, side),) if case.grid else tuple((height << i, width << i) for i in reversed(range(levels)))
    options = dict(draw(_some(**(_OPTIONS.get(case.name) or _OPTIONS[case.loss])), label="options"))
    classes = draw(_rarely(large, st.integers(1, 9), st.sampled_from([80, 129, 400])), label="classes")
    if options.pop("weighted", False):
        counts = [1 + i % 7 for i in range(classes)]
        options |= {"counters_per_class": counts} if case.recipe == "darknet" else {"class_weights": counts}
    return Problem(
        case,
        batch=draw(st.integers(1, 3 if large else 2), label="images"),
        maps=maps,
        strides=tuple(first << i for i in range(levels)),
        classes=classes,
        anchors=draw(st.integers(1, 3 if large else 1), label="anchors"),
        layout=draw(st.sampled_from(case.layouts), label="layout"),
        options=options,
    )


@st.composite
def objects(draw: st.DrawFn, problem: Problem, large: bool) -> Tensor | Targets:
    """Rows that are no neighbours of each other's decisions by chance, but for what is drawn to be exactly so: on
    borders of cells, of an anchor's size, the same again; some are none; packed in any order, or sorted with room.
    """
    count = draw(_rarely(large, st.integers(0, 8), st.sampled_from([40, 40, 150, 500])), label="objects")
    generator = torch.Generator().manual_seed(draw(SEEDS, label="objects' seed"))
    rows = problem.rows(count, int(torch.randint(2**31, (), generator=generator))).cpu()
    kind = torch.rand(6, count, generator=generator)
    H, W = problem.maps[0]
    cells = torch.tensor([W, H], dtype=torch.float32)
    on_border = (rows[:, 2:4] * cells).round() / cells
    rows[:, 2:4] = torch.where((kind[0] < 0.3)[:, None], on_border, rows[:, 2:4])
    rows[:, 2:4] = torch.where((kind[0] > 0.95)[:, None], torch.tensor([1.0, 1 - 2**-24]), rows[:, 2:4])
    sides = torch.tensor(SIDES)[torch.randint(len(SIDES), (count, 2), generator=generator)]
    rows[:, 4:] = torch.where((kind[1] < 0.2)[:, None], sides, rows[:, 4:])
    if problem.case.anchors:  # times 4 and a quarter, where a rule of ratios ends
        own = torch.tensor(problem.case.anchors[0][0]) * problem.case.unit / torch.tensor(problem.size[::-1])
        rows[:, 4:] = torch.where((kind[2] < 0.2)[:, None], own * sides, rows[:, 4:])
    again = kind[3] < 0.2
    if count > 1 and draw(st.booleans(), label="twice"):
        rows[again] = rows[torch.randint(count, (int(again.sum()),), generator=generator)]
    if draw(st.booleans(), label="faulty rows"):
        column = torch.randint(6, (count,), generator=generator)
        wrong = torch.tensor([-1.0, float("nan"), float("inf"), 1e30])[torch.randint(4, (count,), generator=generator)]
        at = (kind[4] < 0.2).nonzero().flatten()
        rows[at, column[at]] = wrong[at]
    rows = rows.to(DEVICE)
    if draw(st.booleans(), label="sorted"):
        return Targets.from_packed(rows, problem.batch, capacity=count + draw(st.integers(0, 3), label="room"))
    return rows


@st.composite
def predictions(draw: st.DrawFn, problem: Problem, dtype: torch.dtype) -> list[Tensor]:
    """Of any numbers up to some size, that lie in memory in any way."""
    # of SimOTA, cells that predict the same cost the same but for rounding, on which it then hangs who is picked
    alike = [] if problem.case.loss == "YOLOX" else [0.0]
    far = draw(st.sampled_from([1.0, *alike, 0.1, 3.0]), label="how large")
    found = [pred.detach() for pred in problem.predictions(dtype, draw(SEEDS, label="predictions' seed"), far)]
    way = draw(st.sampled_from(["as they are", "moved", "apart", "turned", "one for all"]), label="memory")
    return [_laid(pred, way).requires_grad_() for pred in found]


def _laid(pred: Tensor, way: str) -> Tensor:
    """The same numbers, elsewhere; or with ``one for all`` those of the first image in every one."""
    if way == "moved":  # begins three numbers later
        room = pred.new_empty(_extent(pred) + 3)
        return room.as_strided(pred.shape, pred.stride(), 3).copy_(pred)
    if way == "apart":  # every other number
        return pred.new_empty((*pred.shape, 2))[..., 0].copy_(pred)
    if way == "turned":
        order = list(reversed(range(pred.dim())))
        return pred.permute(order).contiguous().permute(order)
    if way == "one for all":
        return pred[:1].expand_as(pred)
    return pred


def _extent(pred: Tensor) -> int:
    """Numbers from the first of a tensor to its last."""
    return 1 + sum((n - 1) * s for n, s in zip(pred.shape, pred.stride(), strict=True))
