"""Random problems: the kernels equal the reference in float64, and the reference the rules written as loops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import loop_picks
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from loop_loss import loop_loss
from torch import Tensor
from trust import draws
from trust.cases import CASES, RECIPES, Problem, Result, step

from fusedyolo import reference
from fusedyolo.targets import Targets

LONG = settings.get_current_profile_name() == "long"
TOLERANCE = 1e-9  # of the largest entry, of predictions in float64
ROUNDED_GAINS = {"YOLOv8": 1e-7, "E2E": 1e-7}  # of the weights of branches a kernel takes what float32 holds


def drawn(few: int) -> Any:
    """So many cases, always the same; with ``--cases`` as many as that says, others each time."""
    if LONG:
        return settings()
    return settings(
        max_examples=few,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )


def criterion_or_none(problem: Problem, backend: str) -> Any:
    """The loss on a backend, None if it refuses its options."""
    try:
        return problem.bind(backend)
    except ValueError:
        return None


def compare(got: Result, want: Result, tolerance: float) -> None:
    """Counts, total and parts, and gradients relative to the largest entry of all."""
    assert got.counts == want.counts
    scale = max(1.0, float(want.total.abs()))
    for a, b in zip([got.total, *got.parts.values()], [want.total, *want.parts.values()], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * scale)
    largest = max(float(grad.abs().max()) for grad in want.grads)
    for a, b in zip(got.grads, want.grads, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * max(largest, 1e-30))


def told_apart(problem: Problem, targets: Tensor | Targets) -> bool:
    """Whether the best anchor of each row is the best in float32: SSD's kernels compare rows' IoUs as such, in float64
    predictions, too, and take the first of equals.
    """
    if problem.case.loss != "SSD":
        return True
    head, anchors = problem.criterion("torch").head, problem.geometry["anchors"].cpu().double()
    read = reference.read_corners(plain(targets), head, problem.batch, problem.size, False, torch.float64)
    boxes = read.boxes[read.valid, None]
    shared = (torch.minimum(boxes[..., 2:], anchors[:, 2:]) - torch.maximum(boxes[..., :2], anchors[:, :2])).clamp(
        min=0
    )
    own, true = (sides.prod(-1) for sides in (anchors[:, 2:] - anchors[:, :2], boxes[..., 2:] - boxes[..., :2]))
    overlap = shared.prod(-1) / (own + true - shared.prod(-1))
    first, second = overlap.topk(2, 1).values.unbind(1)
    return bool(((first == second) | (first > second * (1 + 1e-6))).all())


def well_posed(problem: Problem, targets: Tensor | Targets) -> bool:
    """Whether rounding in float64 cannot show: a root makes 1e-8 of a penalty of 0 that is rounded to 1e-16, and edges
    that lie 1e30 apart do not know where their middle is, of which SIoU's angle is made.
    """
    wide = problem.options.get("iou_loss") == "siou" and bool((plain(targets)[:, 4:] > 1e12).any())
    return problem.options.get("iou_alpha") != 0.5 and not wide


@RECIPES
def test_kernels_equal_the_reference(case):
    tolerance = ROUNDED_GAINS.get(case.loss, TOLERANCE)

    @drawn(2)
    @given(st.data())
    def check(data):
        problem = data.draw(draws.problems(case, LONG), label="problem")
        fused = criterion_or_none(problem, "triton")
        assume(fused is not None)
        preds = data.draw(draws.predictions(problem, torch.float64), label="predictions")
        targets = data.draw(draws.objects(problem, LONG), label="objects")
        assume(told_apart(problem, targets) and well_posed(problem, targets))
        compare(step(fused, preds, targets), step(problem.bind("torch"), preds, targets), tolerance)

    check()


def plain(targets: Tensor | Targets) -> Tensor:
    """Rows that there are."""
    if isinstance(targets, Tensor):
        return targets.cpu()
    return targets.rows[: int(targets.offsets[-1])].cpu()


def of_loops(problem: Problem, preds: list[Tensor], rows: Tensor) -> tuple[Tensor, int]:
    """Total and assigned predictions by the loops of ``loop_loss`` and ``loop_picks``."""
    criterion, case = problem.criterion("torch"), problem.case
    if case.driver.kind == "grid":
        head = criterion._head_of(problem.batch)[0]
        views = [
            pred.unflatten(1, (len(own), -1)).permute(0, 1, 3, 4, 2)
            for pred, own in zip(preds, head.levels, strict=True)
        ]
        weights = None if criterion.class_weights is None else criterion.class_weights.double()
        found = loop_loss(views, rows, head, weights)
        return found.total, found.assigned
    if case.loss == "YOLOX":
        boxes, obj, scores = preds
        sizes = [h * w for h, w in problem.maps]
        flat = torch.cat((boxes, obj, scores), 1).split(sizes, 2)
        maps = [part.unflatten(2, side) for part, side in zip(flat, problem.maps, strict=True)]
        rule, radius = criterion.rule, criterion.head.radius
        found = loop_picks.yolox(maps, rows, problem.strides, rule, criterion.use_l1, radius)
    else:
        found = loop_picks.yolov8(
            *preds, rows, problem.maps, problem.strides, reg_max=criterion.head.reg_max, topk=criterion.head.topk,
            topk2=criterion.head.topk2, alpha=criterion.head.alpha, beta=criterion.head.beta, taller=0.0,
            rule=criterion.rule, small=criterion.head.small,
        )  # fmt: skip
    return torch.stack(list(found.parts.values())).sum(), int((found.row >= 0).sum())


LOOPS = [case for case in CASES.values() if case.driver.kind == "grid" or case.loss in ("YOLOX", "YOLOv8")]
KNOWN = ("rule", "use_l1", "center_radius", "reg_max", "topk", "topk2", "alpha", "beta", "small")  # to loops of picks


@pytest.mark.parametrize("case", LOOPS, ids=lambda case: case.name)
def test_the_reference_equals_the_loops(case):
    """Of cells that are picked, objects that are none, or that end in the middle of a cell, are for other tests."""

    @drawn(2)
    @given(st.data())
    def check(data):
        problem = data.draw(draws.problems(case, LONG), label="problem")
        picks = case.driver.kind == "pick"
        if picks:
            options = {name: value for name, value in problem.options.items() if name in KNOWN}
            problem = replace(problem, options=options, layout="planes")
            targets = problem.rows(data.draw(st.integers(0, 12)), data.draw(draws.SEEDS))
        else:
            problem = replace(problem, layout="nchw", classes=min(problem.classes, 9), options=_of_few(problem))
            targets = data.draw(draws.objects(problem, LONG), label="objects")
        loss = criterion_or_none(problem, "torch")
        assume(loss is not None and len(plain(targets)) <= 40)
        assume(well_posed(problem, targets))
        preds = data.draw(draws.predictions(problem, torch.float64), label="predictions")
        got = step(loss, preds, targets)
        leaves = [pred.detach().cpu().requires_grad_() for pred in preds]
        total, assigned = of_loops(problem, leaves, plain(targets))
        if total.isnan():  # loops divide 0 by 0 where a box without sides is picked, which beta 0 allows
            assert problem.options.get("beta") == 0
            assert got.total.isfinite()
            return
        total = total + 0.0 * leaves[0].sum()  # which may know of none of them
        grads = torch.autograd.grad(total, leaves, materialize_grads=True)
        assert got.counts[0] == assigned
        torch.testing.assert_close(got.total.cpu(), total.detach(), rtol=1e-9, atol=1e-9)
        largest = max(float(grad.abs().max()) for grad in grads)
        for a, b in zip(got.grads, grads, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=0, atol=1e-9 * max(largest, 1e-30))

    check()


def _of_few(problem: Problem) -> dict[str, Any]:
    """The options for at most nine classes."""
    options = dict(problem.options)
    if "counters_per_class" in options:
        options["counters_per_class"] = options["counters_per_class"][:9]
    return options
