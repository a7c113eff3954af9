"""Writes the tables of docs/trust.md: every loss under every property, and the test that holds it to it.

python docs/trust.py
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from fusedyolo.tools.registry import CASES, Case

PAGE = Path(__file__).parents[1] / "docs" / "trust.md"
PLACE = re.compile(r"(<!-- written by docs/trust.py: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
OF_EACH_DRIVER = {"cell": "YOLOv1/paper", "grid": "YOLOv5", "dense": "RetinaNet", "pick": "YOLOv8"}
ONCE = {"YOLOv1/paper", "YOLOv2/region", "YOLOv5", "YOLOv7", "RetinaNet", "SSD", "FCOS", "YOLOX", "YOLOv8"}


class Property(NamedTuple):
    """What is asked of a loss.

    ``test`` names the test, with ``{case}`` for the loss, ``{driver}`` for the one that stands for all of its driver;
    or ``own`` does, by loss or by driver. ``when`` says where it runs, if not everywhere: ``long`` with ``--long``,
    ``once`` likewise but of one loss of each structure that kernels have, ``gpu`` on a GPU.
    """

    title: str
    test: str = ""
    own: dict[str, str] = {}  # noqa: RUF012
    when: str = ""


ROOM = "tests/trust/test_"
COMPILED = "tests/kernels/test_compiled.py::test_compiled"
NANS = "tests/kernels/test_nan.py::test_a_nan_shows_where_it_is_read_and_stays_there"
MEAN = ROOM + "processes.py::test_the_mean_over_processes_is_the_loss_of_the_batch"

GROUPS: dict[str, list[Property]] = {
    "graphs": [
        Property(
            "compiled is eager, one graph for all sizes",
            ROOM + "graph.py::test_compiled_equals_eager_and_compiles_once[{case}]",
            when="once",
        ),
        Property(
            "sizes become symbols", ROOM + "graph.py::test_sizes_become_symbols_when_they_change[{case}]", when="long"
        ),
        Property("the reference compiled", ROOM + "graph.py::test_the_reference_compiles_once[{case}]", when="once"),
        Property("Inductor", ROOM + "graph.py::test_inductor[{driver}-triton]", when="long"),
        Property("exported", ROOM + "graph.py::test_exports[{driver}]"),
        Property("opcheck", ROOM + "graph.py::test_opcheck[{case}]", when="once"),
        Property("CUDA graphs", ROOM + "graph.py::test_reduce_overhead[{case}]", when="gpu"),
        Property("waits for nothing: kernels", ROOM + "graph.py::test_nothing_waits[{case}-triton]"),
        Property("waits for nothing: reference", ROOM + "graph.py::test_nothing_waits[{case}-torch]"),
        Property(
            "nothing allocated by data, nothing kept",
            ROOM + "graph.py::test_nothing_is_allocated_by_data_or_lives_on[{case}]",
        ),
    ],
    "numbers": [
        Property(
            "float16, autocast, scale 2^16",
            ROOM + "numbers.py::test_float16_under_autocast_and_a_scaler[{case}]",
            when="once",
        ),
        Property("bfloat16", ROOM + "numbers.py::test_bfloat16[{case}]", when="once"),
        Property(
            "finite gradients of finite numbers",
            ROOM + "numbers.py::test_finite_predictions_have_finite_gradients[triton-float32-0.6-{case}]",
            when="once",
        ),
        Property(
            "finite gradients of finite numbers: reference",
            ROOM + "numbers.py::test_finite_predictions_have_finite_gradients[torch-float32-0.6-{case}]",
            when="once",
        ),
        Property(
            "infinite terms of weight 0",
            ROOM + "numbers.py::test_kernels_weigh_nothing_infinite_with_0[{case}-some]",
        ),
        Property("boxes of any side", ROOM + "numbers.py::test_boxes_of_any_side[{case}-triton]"),
        Property(
            "NaN predictions",
            own={
                "cell": NANS + "[YOLOv1]",
                "YOLOv2/region": NANS + "[YOLOv2/region]",
                "grid": NANS + "[YOLOv4]",
                "ScaledYOLOv4": NANS + "[YOLOv5]",
                "YOLOv5": NANS + "[YOLOv5]",
                "YOLOv7": NANS + "[YOLOv7]",
                "RetinaNet": NANS + "[RetinaNet]",
                "EfficientDet": NANS + "[RetinaNet]",
                "SSD": NANS + "[SSD]",
                "FCOS": NANS + "[FCOS]",
                "YOLOX": "tests/kernels/test_picks_loss.py::test_nan[x]",
                "YOLOv8": "tests/kernels/test_picks_loss.py::test_nan[v8/4]",
                "E2E/yolo26": "tests/kernels/test_picks_loss.py::test_nan[v8/1]",
            },
        ),
        Property("faulty rows", ROOM + "bits.py::test_faulty_rows_touch_nothing[{case}]", when="once"),
        Property("faulty rows: reference", ROOM + "bits.py::test_faulty_rows_touch_nothing_in_the_reference[{case}]"),
        Property("wrong offsets", ROOM + "bits.py::test_offsets_that_are_wrong[{driver}]"),
        Property("addresses beyond 2^31", ROOM + "bits.py::test_images_that_lie_2_to_the_31_numbers_apart[{driver}]"),
        Property("random problems", ROOM + "random.py::test_kernels_equal_the_reference[{case}]", when="once"),
        Property(
            "the rules written as loops",
            ROOM + "random.py::test_the_reference_equals_the_loops[{case}]",
            own={
                "YOLOv1/paper": "tests/losses/test_yolov1.py::test_the_formula[plain-paper]",
                "YOLOv1/darknet": "tests/losses/test_yolov1.py::test_the_formula[plain-darknet]",
                "RetinaNet": "tests/losses/test_torchvision.py::test_random_cases_in_float64[retinanet-0]",
                "EfficientDet": "tests/losses/test_variants.py::test_efficientdet[options0-triton]",
                "SSD": "tests/losses/test_torchvision.py::test_random_cases_in_float64[ssd-0]",
                "FCOS": "tests/losses/test_torchvision.py::test_random_cases_in_float64[fcos-0]",
                "E2E/yolo26": ROOM + "random.py::test_the_reference_equals_the_loops[YOLOv8]",
            },
        ),
    ],
    "runs": [
        Property("the same bits", ROOM + "bits.py::test_runs_are_bit_identical[{case}]", when="once"),
        Property("the same bits: reference", ROOM + "bits.py::test_runs_of_the_reference_are_bit_identical[{case}]"),
        Property(
            "any schedule, compiled code",
            own={
                "cell": COMPILED + "[other edges]",
                "grid": COMPILED + "[grids and offsets]",
                "YOLOv7": COMPILED + "[picked by cost]",
                "dense": COMPILED + "[other edges]",
                "pick": COMPILED + "[loss of picks]",
            },
        ),
        Property(
            "permuted batches", ROOM + "bits.py::test_permuted_batches_have_permuted_gradients[{case}]", when="once"
        ),
        Property("permuted batches: reference", ROOM + "bits.py::test_permuted_batches_of_the_reference[{case}]"),
        Property("2 processes", MEAN + "[2-triton-{case}]"),
        Property("2 processes: reference", MEAN + "[2-torch-{case}]"),
        Property("4 processes, one without objects", MEAN + "[4-triton-{case}]"),
        Property("4 processes: reference", MEAN + "[4-torch-{case}]"),
        Property("threads: reference", ROOM + "processes.py::test_threads_share_nothing[{case}]"),
        Property("nothing grows in 60 steps", ROOM + "long_run.py::test_nothing_grows[{driver}]"),
        Property(
            "weights stay together: 2,000 steps",
            ROOM + "long_run.py::test_weights_stay_together_in_a_long_run[{case}]",
            when="long",
        ),
        Property(
            "5,000 objects", ROOM + "long_run.py::test_crowds_take_memory_of_the_predictions[{case}]", when="once"
        ),
    ],
}


def test_of(wanted: Property, case: Case) -> str:
    """The id of the test that holds this loss to it."""
    kind = case.driver.kind
    test = wanted.own.get(case.name) or wanted.own.get(kind) or wanted.test
    return test.format(case=case.name, driver=OF_EACH_DRIVER[kind])


def mark(wanted: Property, case: Case) -> str:
    """A cell: where that test runs."""
    if wanted.when == "once":
        return "yes" if case.name in ONCE else "long"
    return {"": "yes", "long": "long", "gpu": "GPU"}[wanted.when]


def table(group: list[Property]) -> str:
    """Losses down, properties across."""
    rows = [("", *(wanted.title for wanted in group)), ("---",) * (1 + len(group))]
    rows += [(case.name, *(mark(wanted, case) for wanted in group)) for case in CASES.values()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def names() -> str:
    """Of each property its tests."""
    lines = []
    for wanted in (each for group in GROUPS.values() for each in group):
        found = dict.fromkeys(test_of(wanted, case).partition("[")[0] for case in CASES.values())
        lines.append(f"| {wanted.title} | {', '.join(f'`{name}`' for name in found)} |\n")
    return "| property | tests |\n| --- | --- |\n" + "".join(lines)


def page(text: str) -> str:
    """The page with the tables as they are to be."""
    made = {name: table(group) for name, group in GROUPS.items()} | {"names": names()}
    return PLACE.sub(lambda place: f"{place[1]}\n{made[place[2]]}\n{place[3]}", text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
