"""Kernels as they are compiled: the tests of edges, and a sample of the others, run again on the emulator.

In processes of their own, for here the kernels were imported for Triton's interpreter. Schedules are drawn from two
seeds; once products and sums are kept apart everywhere, once some that ptxas may fuse are fused. What is read where
targets are wrong, and where a NaN ends, is run once.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAST = ("seed=1,contraction=1",)
BOTH = ("seed=0,fusion=off", *LAST)
NOISY = ("seed=1,noise=on",)  # approximate instructions are off by what is documented
VARIANTS = "tests/losses/test_variants.py"
PARTS = {  # which tests, and how they are run
    "grids and offsets": (LAST, "tests/kernels/test_edges.py", "grid or anchors_of_equal or offsets"),
    "classes of grids": (LAST, "tests/kernels/test_grid.py", "class_counts and (3-last or 9-each or 300-each)"),
    "other edges": (BOTH, "tests/kernels/test_edges.py", "cell or test_anchors[ or select or functional"),
    "thresholds": (NOISY, "tests/kernels/test_edges.py", "thresholds"),
    "picks": (LAST, "tests/kernels/test_picks.py", "equals or half or crowd and three or counts_for_nothing"),
    "loss of picks": (LAST, "tests/kernels/test_picks_loss.py", "and_gradient and (v8/4 or x/l1) or types and dtype2"),
    "picked by cost": (LAST, "tests/losses/test_yolov7.py", "Targets-20 or (far_may or without) and triton or half"),
    "variants of grids": (LAST, VARIANTS, "(like_enough or each_image and YOLOv5) and triton or kernels and YOLOv5"),
    "variants of others": (LAST, VARIANTS, "fcos_iou-triton or EfficientDet-rows-triton or kernels and YOLOv1"),
    "ranks": (LAST, "tests/kernels/test_dense.py", "long_list or equal_losses"),
    "weights": (LAST, "tests/losses/test_weights.py", "kernels_equal and (v1 or v2 or FCOS or X)"),
    "weighed with 0": (
        LAST,
        "tests/trust/test_numbers.py",
        "some and (v1/paper or v2/region or RetinaNet or SSD or X)",
    ),
    "NaN": (LAST, "tests/kernels/test_nan.py", "YOLOv5/iou or RetinaNet/giou"),
}


@pytest.mark.parametrize("part", PARTS)
def test_compiled(part):
    env = {key: value for key, value in os.environ.items() if not key.startswith(("TRITON_INTERPRET", "PYTEST_"))}
    env["CUDA_VISIBLE_DEVICES"] = ""  # the emulator takes tensors of a CPU
    ways, file, chosen = PARTS[part]
    how = [argument for way in ways for argument in ("--compiled-as", way)]
    tests = [file, "-k", chosen]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "--compiled", *how, *tests],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert "passed" in run.stdout
