"""Compiled kernels go through Triton's own launcher, as on a GPU; what executes them does nothing."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("cc") or shutil.which("gcc")
HEADERS = Path(sysconfig.get_path("include"), "Python.h").exists()
LAUNCHES = {"YOLOv5": 2, "YOLOX": 6}


@pytest.mark.interpreter("a GPU launches")
@pytest.mark.skipif(not (COMPILER and HEADERS), reason="Triton builds its launcher with a C compiler")
@pytest.mark.parametrize("name", LAUNCHES)
def test_later_steps_launch_what_the_first_did(name, tmp_path):
    """The first goes through Triton's binder; others know what it has found; hooks are told of each launch."""
    library = tmp_path / "libcuda.so.1"
    built = (COMPILER, "-shared", "-fPIC", "-w", "-o", str(library), str(ROOT / "tests" / "no_driver.c"))
    subprocess.run(built, check=True)
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = os.pathsep.join(filter(None, [str(tmp_path), env.get("LD_LIBRARY_PATH")]))
    env |= {"LD_LIBRARY_PATH": paths, "TRITON_LIBCUDA_PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = (sys.executable, "-W", "ignore", str(ROOT / "tests" / "launched.py"), name, str(library))
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    steps, bound, told = json.loads(done.stdout.splitlines()[-1])
    assert len(steps[0]) == bound == told == LAUNCHES[name]
    assert steps == [steps[0]] * len(steps)
    assert all(threads >= 32 and function for *_grid, threads, function, _stream in steps[0])
