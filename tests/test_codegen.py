"""What the kernels compile to, for GPUs that need not be here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILE = """
import json, sys
from bench.codegen import compile_launch, launches
from bench.registry import CASES, Workload
case, work, target = CASES[sys.argv[1]], Workload(batch=2, dtype=sys.argv[2]), sys.argv[3]
found = {
    mode: compile_launch(
        launch.kernel, launch.arguments, launch.options(target != "gfx942"), target
    ).as_dict()
    for mode, launch in launches(case, work).items()
}
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("name", "dtype", "target"),
    [
        *(("YOLOv4/darknet", "float32", target) for target in ("sm_80", "sm_90", "sm_100", "gfx942")),
        *(("YOLOv4/darknet", "bfloat16", target) for target in ("sm_80", "sm_90", "sm_100", "gfx942")),
        ("YOLOv4/darknet", "float16", "sm_90"),
        ("YOLOv4/paper", "float32", "sm_80"),
        ("YOLOv3/paper", "float32", "sm_100"),
    ],
)
def test_no_spills_and_wide_accesses(name, dtype, target):
    """Compiled in a process of its own, without the interpreter; the variants that have needed the most registers."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, name, dtype, target], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    for mode, resources in found.items():
        assert resources["stack"] == 0, (mode, resources)
        assert resources["spills"] == 0, (mode, resources)
    stores = {int(width): n for width, n in found["grad"]["stores"].items()}
    element = 32 if dtype == "float32" else 16
    assert stores.pop(128) >= 3  # the gradient of each level's tiles, 16 bytes a thread
    assert set(stores) == {element}  # single entries, of assigned predictions
    loads = {int(width): n for width, n in found["loss"]["loads"].items()}
    assert loads[4 * element] >= 15  # five planes of each level, four cells a thread
