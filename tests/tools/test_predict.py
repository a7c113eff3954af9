"""Executed instructions as they are now, and the times that are predicted from them."""

from pathlib import Path
from typing import Any

import pytest
from conftest import PINNED_TRITON
from process import call

from bench import predict
from fusedyolo.emulator import Report

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
LONGEST = {("RetinaNet", "match_kernel"): 801}


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

GPU = predict.Gpu("sm_90", multiprocessors=10, clock=1e9, bandwidth=1e12, shared=100_000)
COUNTED = [{"name": "a_kernel", "programs": 40, "bytes": 2_000_000}, {"name": "b_kernel", "programs": 1, "bytes": 1000}]
RAN = [
    {"kernel": "a_kernel", "programs": 40, "instructions": 40_000, "longest": 3000, "median": 1000.0, "ptx": 100,
     "chain": 700, "chains": 20_000, "shared": 0},
    {"kernel": "b_kernel", "programs": 1, "instructions": 8000, "longest": 8000, "median": 8000.0, "ptx": 50,
     "chain": 9000, "chains": 9000, "shared": 0},
]  # fmt: skip
COMPILED = {
    "loss": {"instructions": 130, "called": 10, "threads": 128, "registers": 128},
    "grad": {"instructions": 50, "called": 0, "threads": 32, "registers": 32},
}


def test_the_longest_of_what_programs_share_and_their_chain_are_predicted():
    found = predict.predict(GPU, COUNTED, RAN, COMPILED)
    loss, grad, step = found["loss"], found["grad"], found["step"]
    assert loss["memory_us"] == pytest.approx(2.0)
    assert loss["instructions"] == pytest.approx(48_000)  # 1.2 of the GPU's for one of PTX; rare routines are left out
    assert loss["issue_us"] == pytest.approx(1.2)  # 40 a nanosecond
    assert loss["places_us"] == pytest.approx(0.5)  # four programs a multiprocessor
    assert loss["chain_us"] == pytest.approx(0.7)
    assert loss["predicted_us"] == pytest.approx(2.0 + 0.7 + 1)
    assert (grad["issue_us"], grad["memory_us"]) == (pytest.approx(0.2), pytest.approx(0.001))
    assert grad["predicted_us"] == pytest.approx(0.2 + 9 + 1)
    assert (loss["longest_over_median"], step["longest_over_median"]) == (3.0, 3.0)
    assert step["predicted_us"] == pytest.approx(3.7 + 10.2)


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "wanted"),
    [
        (32, 16, 0, 32),  # no more at once
        (256, 16, 0, 8),
        (128, 120, 0, 4),
        (128, 121, 0, 4),  # they come in eights
        (128, 129, 0, 3),
        (32, 32, 19_000, 4),
    ],
)
def test_places_are_what_runs_at_once(threads, registers, shared, wanted):
    assert GPU.places(threads, registers, shared) == 10 * wanted


def report(**chains: tuple[int, int]) -> Report:
    return Report(chains={int(name[1:]): each for name, each in chains.items()})


def test_a_chain_is_that_of_the_slowest_program_and_of_the_sum_after_it():
    assert predict.chain_of([report(p0=(500, 0), p2=(300, 0)), report(p1=(200, 0))]) == 500
    assert predict.chain_of([report(p0=(500, 450), p2=(300, 250)), report(p1=(400, 200))]) == 500 + 200
    assert predict.chain_of([report(p0=(100, 90), p2=(300, 250)), report(p1=(700, 350))]) == 700
    assert predict.chain_of([report(p0=(700, 350))]) == 700


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
