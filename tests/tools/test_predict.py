"""Executed instructions as they are now, and the times that are predicted from them."""

from pathlib import Path
from typing import Any

import pytest
from conftest import PINNED_TRITON
from process import call

from bench import predict

ROOT = Path(__file__).parents[2]
CLOSE = 0.01

# Instructions of PTX that the warps of all programs execute, sm_90, as constraints.txt's Triton compiles them.
EXECUTED = {
    "YOLOv1/paper": {"cell_kernel": 20448, "cell_grad_kernel": 112},
    "YOLOv2/region": {"grid_kernel": 56832, "grid_grad_kernel": 13712},
    "SSD": {
        "overlap_kernel": 13118,
        "match_kernel": 2630,
        "dense_kernel": 138353,
        "count_kernel": 11952,
        "rank_kernel": 20512,
        "dense_kernel, backward": 111345,
    },
}


# Of a launch of which most programs have nothing to do, so that their median says little: its longest one.
LONGEST = {("RetinaNet", "match_kernel"): 775}


def executed(what: str) -> Any:
    """From a process without the interpreter."""
    return call("executed", "steps", what)


def by_launch(launches: list[dict[str, Any]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for one in launches:
        found[one["kernel"] + ", backward" * (one["kernel"] in found)] = one["instructions"]
    return found


@pytest.fixture(scope="module")
def small() -> Any:
    return executed("small")


@PINNED_TRITON
def test_kernels_execute_as_many_instructions_as_they_did(small):
    for name, launches in small.items():
        assert by_launch(launches) == pytest.approx(EXECUTED[name], rel=CLOSE), name
        assert all(one["programs_run"] == one["programs"] for one in launches)
    assert set(small) == set(EXECUTED)


def test_another_term_in_a_launch_is_seen():
    """A mutant of the test above: objectness is computed twice."""
    spoilt, known = by_launch(executed("spoilt")), EXECUTED["YOLOv2/region"]
    assert spoilt["grid_kernel"] > (1 + CLOSE) * known["grid_kernel"]


@PINNED_TRITON
def test_a_crowd_costs_what_its_overlaps_cost():
    """Twenty times as many objects, each of which every anchor once met: no more than four times the instructions."""
    for name, (few, many) in executed("crowds").items():
        usual, crowded = (sum(one["instructions"] for one in launches) for launches in (few, many))
        assert crowded < 4 * usual, (name, usual, crowded)
        for one in few:
            known = LONGEST.get((name, one["kernel"]))
            assert one["longest"] < (3 * one["median"] if known is None else (1 + CLOSE) * known), (name, one)


def test_a_part_of_the_programs_stands_for_a_launch():
    for name, (some, every) in executed("larger").items():
        assert sum(one["programs_run"] for one in some) < 0.7 * sum(one["programs"] for one in some), name
        assert by_launch(some) == pytest.approx(by_launch(every), rel=CLOSE), name
        longest = [[one["longest"] for one in launches] for launches in (some, every)]
        assert longest[0] == pytest.approx(longest[1], rel=0.1), name


# ------------------------------------------------------------------------------------------------------------ predicted

GPU = predict.Gpu("sm_90", multiprocessors=10, clock=1e9, bandwidth=1e12)
COUNTED = [{"name": "a_kernel", "programs": 40, "bytes": 2_000_000}, {"name": "b_kernel", "programs": 1, "bytes": 1000}]
RAN = [
    {"kernel": "a_kernel", "programs": 40, "instructions": 40_000, "longest": 3000, "median": 1000.0, "ptx": 100},
    {"kernel": "b_kernel", "programs": 1, "instructions": 8000, "longest": 8000, "median": 8000.0, "ptx": 50},
]
COMPILED = {"loss": {"instructions": 130, "called": 10}, "grad": {"instructions": 50, "called": 0}}


def test_the_longer_of_memory_and_issue_is_predicted():
    found = predict.predict(GPU, COUNTED, RAN, COMPILED)
    loss, grad, step = found["loss"], found["grad"], found["step"]
    assert loss["memory_us"] == pytest.approx(2.0)
    assert loss["instructions"] == pytest.approx(48_000)  # 1.2 of the GPU's for one of PTX; rare routines are left out
    assert loss["issue_us"] == pytest.approx(1.2)  # 40 a nanosecond
    assert loss["predicted_us"] == loss["memory_us"]
    assert (grad["issue_us"], grad["memory_us"]) == (pytest.approx(0.2), pytest.approx(0.001))
    assert grad["predicted_us"] == grad["issue_us"]
    assert grad["longest_us"] == pytest.approx(2.0)  # 4 a nanosecond
    assert (loss["longest_over_median"], step["longest_over_median"]) == (3.0, 3.0)
    assert step["predicted_us"] == pytest.approx(2.2)


@pytest.mark.parametrize(
    ("counted", "ran", "compiled"),
    [
        (COUNTED[:1], RAN, COMPILED),
        (COUNTED, RAN[::-1], COMPILED),
        (COUNTED, [RAN[0], {**RAN[1], "programs": 2}], COMPILED),
        (COUNTED, RAN, {"loss": COMPILED["loss"]}),
    ],
)
def test_launches_of_different_steps_are_refused(counted, ran, compiled):
    with pytest.raises(ValueError, match="counted: launches"):
        predict.predict(GPU, counted, ran, compiled)
