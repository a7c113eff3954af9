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

ROOT = Path(__file__).parents[1]
WAYS = ("seed=0,fusion=off", "seed=1,contraction=1")
PARTS = {
    "grids": ["tests/test_edges.py", "-k", "grid or anchors_of_equal"],
    "cells and anchors": ["tests/test_edges.py", "-k", "cell or test_anchors["],
    "select and functional": ["tests/test_edges.py", "-k", "select or functional"],
    "offsets": ["tests/test_edges.py", "-k", "offsets"],
    "NaN": ["tests/test_nan.py", "-k", "YOLOv5/iou or RetinaNet/giou"],
}
ONCE = ("offsets", "NaN")


@pytest.mark.parametrize("part", PARTS)
def test_compiled(part):
    env = {key: value for key, value in os.environ.items() if not key.startswith(("TRITON_INTERPRET", "PYTEST_"))}
    chosen = WAYS[1:] if part in ONCE else WAYS
    ways = [argument for way in chosen for argument in ("--compiled-as", way)]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "--compiled", *ways, *PARTS[part]],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert "passed" in run.stdout
