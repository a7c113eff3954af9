"""What the kernels compile to, for GPUs that need not be here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
COMPILE = """
import json, sys
from fusedyolo.tools.codegen import compile_step
from fusedyolo.tools.registry import CASES, Workload
work = Workload(batch=2, dtype=sys.argv[2], size=int(sys.argv[4]))
print(json.dumps(compile_step(CASES[sys.argv[1]], work, sys.argv[3])))
"""


def compiled(name: str, dtype: str, target: str, size: int = 640) -> dict[str, Any]:
    """Resources of each launch, none of them with spills; in a process of its own, without the interpreter."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, name, dtype, target, str(size)]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    for mode, resources in found.items():
        assert resources["stack"] == 0, (mode, resources)
        assert resources["spills"] == 0, (mode, resources)
    return found


@pytest.mark.parametrize(
    ("name", "dtype", "target", "planes"),
    [
        ("YOLOv4/darknet", "float32", "sm_80", 5),
        ("YOLOv5", "bfloat16", "gfx942", 1),
        ("YOLOv2/region", "float32", "sm_100", 5),
    ],
)
def test_no_spills_and_wide_accesses(name, dtype, target, planes):
    """The variants that have needed the most registers."""
    found = compiled(name, dtype, target)
    element = 32 if dtype == "float32" else 16
    # 16 bytes a thread, but for levels whose planes do not begin at multiples of that: another branch
    stores = {int(width): n for width, n in found["grad"]["stores"].items()}
    assert stores.keys() == {128, element}
    assert stores[element] == stores[128] * 128 // element
    loads = {int(width): n for width, n in found["loss"]["loads"].items()}
    assert loads[4 * element] >= planes  # that a tile reads, four cells a thread


def test_no_spills_of_small_maps():
    """Few cells are few threads, and what a program searches at a time must be as few."""
    compiled("YOLOv3/darknet", "float32", "sm_90", size=128)


@pytest.mark.parametrize(
    ("name", "dtype", "target"),
    [("RetinaNet", "float32", "sm_90"), ("FCOS", "bfloat16", "sm_100"), ("SSD", "float32", "gfx942")],
)
def test_class_logits_are_wide_streams(name, dtype, target):
    """All launches of heads over anchors: the stream of gradients is stored 16 bytes a thread."""
    found = compiled(name, dtype, target)
    assert set(found) >= {"match", "loss", "grad"}
    if name == "RetinaNet":  # boxes are four numbers an anchor, 16 bytes too
        assert set(found["grad"]["stores"]) == {"128"}
    assert "128" in found["grad"]["stores"]
    assert "128" in found["loss"]["loads"]


SPECIALISE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from fusedyolo import RetinaNetLoss, ops
backend, binders, seen = make_backend(GPUTarget("cuda", 90, 32)), {}, {}
head = RetinaNetLoss(80).head
for size in range(256, 961, 32):
    for batch, objects in ((1, 0), (2, 16), (16, 117)):
        maps = [-(-size // stride) for stride in (8, 16, 32)]
        n = sum(9 * side * side for side in maps)
        for preds in (
            [torch.empty(batch, n, c) for c in (80, 4)],
            [torch.empty(batch, 9 * c, side, side) for c in (80, 4) for side in maps],
        ):
            geometry, rows = ops.Geometry((size, size), False, (9, 9)), torch.empty(objects, 6)
            anchors = torch.empty(n, 4)
            outputs = ops.dense_outputs(preds, anchors, head, True)
            for launch in ops.loss_launches(preds, anchors, rows, None, head, geometry, outputs):
                kernel = launch.kernel
                if kernel not in binders:
                    binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, backend)
                _, key, _ = binders[kernel](**launch.arguments, **launch.options(True))
                seen.setdefault(f"{kernel.__name__} {len(preds)}", set()).add(str(key))
import json
print(json.dumps({name: len(keys) for name, keys in seen.items()}))
"""


def test_no_kernel_is_compiled_for_a_size():
    """Images of many sizes, batches and numbers of objects, in one piece and as maps: the same kernels."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", SPECIALISE], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert set(json.loads(run.stdout).values()) == {1}
