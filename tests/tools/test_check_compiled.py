"""``fusedyolo check --compiled``: what it prints, and that it fails when compiled kernels are wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedyolo.__main__ import main
from fusedyolo.emulator.compare import Settings, decided
from fusedyolo.tools import compiled
from fusedyolo.tools.compiled import BEGIN, END

ROOT = Path(__file__).parents[2]
BROKEN = """
import re
from fusedyolo.__main__ import main
from fusedyolo.emulator import Device, compare

def dropped_store(name, ptx):
    return re.sub(r"\\n[^\\n]*st\\.global[^\\n]*", "", ptx, count=1) if name == "grid_grad_kernel" else ptx

def half(name, ptx):
    return ptx.replace("0f3F800000", "0f3F000000") if name == "grid_grad_kernel" else ptx

def relaxed(name, ptx):
    return ptx.replace(".acq_rel.", ".relaxed.")

BROKEN = {
    "dropped store": lambda seed: {"change": dropped_store},
    "half for 1": lambda seed: {"change": half},
    "relaxed atomic": lambda seed: {"change": relaxed},
    "rounds by seed": lambda seed: {"noise": seed == 1},
}
for name, options in BROKEN.items():
    compare.Device = lambda arch=90, seed=0, **usual: Device(arch, seed, **{**usual, **options(seed)})
    print("==", name, "==", main(["check", "--compiled", "--loss", "YOLOv2/region"]))
"""
SAID = {
    "dropped store": "seed 0: 16 bytes of gradient 0 of 1.0 are not written",
    "half for 1": "seed 1: gradient 0 of 0.75 is off by",
    "relaxed atomic": "x grid_kernel: global race between programs",
    "rounds by seed": "seed 1: other bits than seed 0 in",
}


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, without the interpreter."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"COLUMNS": "200"} | variables
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)


def test_cases_pass_and_are_tabled(tmp_path):
    path = tmp_path / "notes.md"
    path.write_text(f"# Before\n{BEGIN}\nold\n{END}\nafter\n")
    names = ("--loss", "yolov2/region", "--loss", "YOLOv2/lightnet", "--fusion", "both")
    found = run("-m", "fusedyolo", "check", "--compiled", "--markdown", str(path), *names)
    assert found.returncode == 0, found.stdout + found.stderr
    rows = [line.split() for line in found.stdout.splitlines() if line.lstrip().startswith("YOLOv2/")]
    assert [row[0] for row in rows] == ["YOLOv2/region", "YOLOv2/lightnet"]
    for _, dtype, arch, error, eager, bits, faults, unwritten, programs, instructions, verdict in rows:
        assert (dtype, arch, bits, faults, unwritten, verdict) == ("float32", "sm_90", "same", "0", "0", "passes")
        assert 0 < float(error) < 1e-6
        assert 0 < float(eager) < 1e-6
        assert int(programs) > 10
        assert int(instructions.replace(",", "")) > 100 * int(programs)
    text = path.read_text()
    assert text.startswith(f"# Before\n{BEGIN}\n2 of 2 pass. sm_90; 2 seeds, fusion both.")
    assert text.endswith(f" |\n{END}\nafter\n")
    assert "| YOLOv2/lightnet | float32 | " in text
    assert "old" not in text


def test_broken_kernels_fail():
    found = run("-c", BROKEN)
    assert found.returncode == 0, found.stderr
    rest = found.stdout
    for name, wanted in SAID.items():
        said, end, rest = rest.partition(f"== {name} == 1\n")
        assert end, f"{name} passes: {rest}"
        row = next(line for line in said.splitlines() if line.lstrip().startswith("YOLOv2/region "))
        assert row.split()[-1] == "FAILS", name
        assert wanted in said, name
        why = [line for line in said.splitlines() if line.startswith("    ") and line.strip()]
        assert name not in ("relaxed atomic", "rounds by seed") or all(wanted in line for line in why), why


def test_decisions_may_not_depend_on_fusion():
    truth = {"num_pos": torch.tensor(3), "total": torch.tensor(2.0), "gradient 0": torch.tensor([1.0, 0.0, 1e-9])}
    rounded = truth | {"total": torch.tensor(2.0 + 1e-5)}

    def wrong(**changes: torch.Tensor) -> list[str]:
        runs = {("as shipped", 0): truth, ("off", 0): rounded | {k.replace("_0", " 0"): v for k, v in changes.items()}}
        return decided(runs, truth, Settings(1e-5))

    assert wrong() == []
    assert wrong(num_pos=torch.tensor(4)) == ["fusion off, seed 0: num_pos differs by 3.3e-01"]
    assert wrong(total=torch.tensor(2.0 + 1e-4)) == ["fusion off, seed 0: total differs by 5.0e-05"]
    assert wrong(gradient_0=torch.tensor([1.0, 0.0, 0.0])) == ["fusion off, seed 0: gradient 0 is 0 at other places"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--compiled", "--loss", "none"], "--loss: none, want one of"),
        (["--compiled", "--markdown", "README.md"], "README.md has no line"),
        (["--compiled", "--markdown", "no.md"], "--markdown: [Errno 2] No such file or directory: 'no.md'"),
        (["--compiled", "--markdown", "docs"], "--markdown: [Errno 21] Is a directory: 'docs'"),
        (["--seeds", "3"], "--seeds: wants --compiled"),
    ],
)
def test_arguments_are_checked(arguments, said, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["check", *arguments]) == 2
    assert said in capsys.readouterr().out


def test_a_file_that_cannot_be_written_is_found_before_the_work(tmp_path, monkeypatch, capsys):
    path = tmp_path / "table.md"
    path.write_text(f"{BEGIN}\n{END}\n")
    monkeypatch.setattr(compiled, "compare", lambda *arguments: pytest.fail("work has begun"))
    through = Path.open

    def read_only(self, mode="r", *arguments, **named):
        if self == path and mode != "r":
            raise PermissionError(13, "Permission denied", str(self))
        return through(self, mode, *arguments, **named)

    monkeypatch.setattr(Path, "open", read_only)
    assert main(["check", "--compiled", "--markdown", str(path)]) == 2
    assert "--markdown: [Errno 13] Permission denied" in capsys.readouterr().out


def test_interpreted_kernels_cannot_be_compiled():
    found = run("-m", "fusedyolo", "check", "--compiled", TRITON_INTERPRET="1")
    assert found.returncode == 2
    assert "--compiled: kernels were imported with TRITON_INTERPRET set" in found.stdout


def test_the_interpreter_can_still_be_chosen():
    """Whoever imports Triton before it is chosen cannot run kernels in it."""
    assert run("-c", "import sys, fusedyolo.tools.check; sys.exit('triton' in sys.modules)").returncode == 0
