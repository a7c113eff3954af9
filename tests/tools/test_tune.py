"""Tuning without a GPU: the compiler's report and the timer are made up, gradients come from Triton's interpreter."""

import json
import os
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fusedyolo.kernels.launch import dense_config, grid_config, legal_wishes

from fusedyolo import ops, tuned
from fusedyolo.__main__ import main, parse
from fusedyolo.ops.launch import forget_zeros
from fusedyolo.tools import codegen, tune
from fusedyolo.tools.registry import CASES, RefusedError, Workload

pytestmark = pytest.mark.interpreter("the timer is made up")

WORK = Workload(batch=1, size=64, classes=2)
POINT = tune.Point(CASES["YOLOv3/paper"], WORK, "cpu")
FEW = [(), (("cells", 64), ("threads", 64)), (("cells", 128), ("threads", 64)), (("channels", 4),), (("stages", 2),)]
USUAL = {
    "spills": 0,
    "stack": 0,
    "registers": 64,
    "stores": {128: 4},
    "threads": 128,
    "grid": (4,),
    "code": "usual",
    "target": "sm_90",
}
PROVENANCE = {"gpu": "cpu", "kernels": "abc", "when": "now"}


GRADIENTS = tune.gradients


def same_gradients(point, wishes):
    """In place of a step in the interpreter, for tests of what is done with the times."""
    return [torch.zeros(1, dtype=torch.int32)]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "gradients", same_gradients)
    monkeypatch.setenv("FUSEDYOLO_CONFIG_DIR", str(tmp_path / "own"))
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "shipped")
    tuned.forget()
    yield
    tuned.forget()


def reports(tried, **changed):
    """Each configuration has code of its own; ``changed`` replaces fields by position: ``_1={"spills": 8}``."""
    return {
        wishes: {"loss": USUAL | {"code": str(wishes)} | changed.get(f"_{i}", {})} for i, wishes in enumerate(tried)
    }


class Stub:
    """A timer with a time for each configuration, which remembers what it was asked for."""

    def __init__(self, times):
        self.times, self.asked, self.calls = times, [], 0

    def __call__(self, point, wishes):
        self.calls += 1
        self.asked += [wishes] * (wishes not in self.asked)
        return self.times[wishes]


def tune_few(tmp_path, times, tried=FEW, provenance=PROVENANCE, point=POINT, **changed):
    stub = Stub(dict(zip(tried, times, strict=True)))
    records = tune.Records(tmp_path / "own", "cpu", provenance)
    return tune.tune_point(point, reports(tried, **changed), records, stub), stub, records


# ----------------------------------------------------------------------------------------------------------- candidates


@pytest.mark.parametrize("name", ["YOLOv1/paper", "YOLOv4/paper", "RetinaNet", "SSD", "FCOS"])
def test_candidates_are_the_heuristic_first_and_legal(name):
    case = CASES[name]
    for layout in case.layouts:
        found = tune.candidates(tune.Point(case, replace(WORK, layout=layout)))
        assert found[0] == ()
        assert len(found) == len(set(found)) >= 10
        assert all(legal_wishes(case.driver.kind, dict(wishes)) for wishes in found)


@pytest.mark.parametrize(
    ("name", "layout", "tried"),
    [
        ("YOLOv4/paper", "nchw", [(("cells", 64), ("threads", 64), ("channels", 16))]),
        ("YOLOv2/darknet", "channels_last", [(("cells", 64), ("channels", 16)), (("cells", 256), ("channels", 64))]),
        ("YOLOv1/paper", "flat", [(("cells", 16), ("threads", 128)), (("cells", 64),)]),
        ("RetinaNet", "rows", [(("block", 1024), ("steps", 4)), (("match_threads", 64),)]),
        ("FCOS", "nchw", [(("cells", 256), ("planes", 8))]),
        ("SSD", "rows", [(("cells", 4), ("steps", 16), ("rank_threads", 256))]),
    ],
)
def test_gradients_are_the_same_bits_in_every_configuration(name, layout, tried):
    """Which is what lets a configuration be chosen by its time alone."""
    forget_zeros()  # what tests that stop launches half way have left
    ops.forget_plans()
    size = 64 if name == "SSD" else 128
    point = tune.Point(CASES[name], Workload(batch=1, size=size, classes=3, layout=layout), "cpu")
    usual = GRADIENTS(point, ())
    assert any(bool(grad.any()) for grad in usual)
    for wishes in tried:
        assert all(map(torch.equal, GRADIENTS(point, wishes), usual)), wishes


def test_wishes_reach_the_launch_as_far_as_it_can_take_them():
    case = CASES["YOLOv3/paper"]
    work = Workload(batch=1, size=320, classes=2)
    usual = codegen.launches(case, work)["loss"]
    with tuned.forced((("cells", 256), ("threads", 128), ("stages", 4), ("max_registers", 96))):
        other = codegen.launches(case, work)["loss"]
    assert usual.arguments["SPEC"].CELLS == 512
    assert (other.arguments["SPEC"].CELLS, other.threads, other.max_registers) == (256, 128, 96)
    assert other.grid[0] > usual.grid[0]
    rest = {"num_stages": 4, "enable_fp_fusion": not other.exact}
    assert other.options(True) == {"num_warps": 4, "maxnreg": 96, **rest}
    assert other.options(True, 10) == {"num_warps": 4, "maxnreg": 120, **rest}
    assert other.options(False) == {"num_warps": 2, **rest}
    assert grid_config(100, True, 4, (("cells", 2048),)).cells == 128  # no wider than the largest map asks for
    cut = dense_config(3000, 64, 10**8, 80, 4, False, True, "offset", (("block", 8192), ("steps", 64)))
    assert cut.block * cut.steps <= 3000


# -------------------------------------------------------------------------------------------------------------- pruning


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"spills": 8}, "spills"),
        ({"stack": 8}, "spills"),
        ({"registers": 255, "threads": 512}, "registers"),
        ({"stores": {64: 8}}, "narrower stores"),
        ({"code": "()"}, "same code as another"),
    ],
)
def test_what_the_compiler_says_prunes_before_anything_is_timed(tmp_path, change, why):
    result, stub, _ = tune_few(tmp_path, [5.0, 1.0, 4.0, 4.5, 4.6], _1=change)
    assert FEW[1] not in stub.asked
    assert result.pruned == {why: 1}
    assert (result.wishes, result.best, result.timed) == (FEW[2], 4.0, 4)


def test_the_compiler_reports_in_processes_of_its_own(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    point, tried, done = tune.Point(CASES["YOLOv1/paper"], WORK), [(), (("threads", 256),), (("cells", 16),)], []
    found = tune.inspect_all(point, tried, "sm_90", 1, lambda: done.append(1))
    assert len(done) == 3
    assert found[()]["loss"]["threads"] == 512
    assert found[tried[1]]["loss"]["threads"] == 256
    assert all(0 < each["registers"] < 256 for report in found.values() for each in report.values())
    assert tune.prune(found) == {}  # of 49 cells, 16 a program is not the heuristic's tile


def test_the_same_code_on_another_grid_is_timed(tmp_path):
    result, stub, _ = tune_few(tmp_path, [5.0, 1.0, 4.0, 4.5, 4.6], _1={"code": "()", "grid": (8,)})
    assert FEW[1] in stub.asked
    assert result.best == 1.0


def test_what_does_not_compile_is_pruned_and_the_heuristic_never_is():
    found = tune.prune({**reports(FEW, _0={"spills": 64, "stack": 64}), FEW[3]: "does not compile: OutOfResources"})
    assert found == {FEW[3]: "does not compile: OutOfResources"}


def test_a_configuration_with_another_gradient_is_never_chosen(tmp_path, monkeypatch):
    def wrong_in_one(point, wishes):
        return [grad + (wishes == FEW[1]) for grad in GRADIENTS(point, wishes)]

    monkeypatch.setattr(tune, "gradients", wrong_in_one)
    result, stub, _ = tune_few(tmp_path, [5.0, 1.0, 4.0, 4.5, 4.6])
    assert FEW[1] not in stub.asked
    assert result.pruned == {"gradient differs": 1}
    assert result.wishes == FEW[2]


def test_a_configuration_that_cannot_be_launched_is_left_and_the_rest_is_timed(tmp_path):
    class Fails(Stub):
        def __call__(self, point, wishes):
            if wishes == FEW[1]:
                raise RuntimeError("out of resource: shared memory")
            return super().__call__(point, wishes)

    records = tune.Records(tmp_path / "own", "cpu", PROVENANCE)
    for _ in range(2):  # and is not tried again
        stub = Fails(dict(zip(FEW, [5.0, 1.0, 4.0, 4.5, 4.6], strict=True)))
        result = tune.tune_point(POINT, reports(FEW), records, stub)
        assert (result.wishes, result.pruned) == (FEW[2], {"fails: RuntimeError": 1})
    assert stub.calls == 0
    with pytest.raises(RuntimeError, match="CUDA error"):
        tune.tune_point(replace(POINT, work=replace(WORK, batch=2)), reports(FEW), records, broken_gpu)


def broken_gpu(point, wishes):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_time_that_was_luck_keeps_the_heuristic(tmp_path):
    class Lucky(Stub):
        def __call__(self, point, wishes):
            first = wishes not in self.asked
            return super().__call__(point, wishes) if first else 5.0

    stub = Lucky(dict(zip(FEW, [5.0, 1.0, 4.0, 4.5, 4.6], strict=True)))
    result = tune.tune_point(POINT, reports(FEW), tune.Records(tmp_path / "own", "cpu", PROVENANCE), stub)
    assert result.wishes == ()
    assert result.heuristic == result.best == 5.0


def test_each_size_and_loss_has_measurements_of_its_own(tmp_path):
    """Though launches look them up by the same key."""
    other = replace(POINT, work=replace(WORK, classes=1, batch=1))
    same = replace(POINT, case=CASES["YOLOv3/darknet"])
    assert tune.key_of(replace(POINT, work=replace(WORK, batch=3))) == tune.key_of(
        replace(POINT, work=replace(WORK, batch=4))
    )
    for point in (POINT, other, same):
        _, stub, _ = tune_few(tmp_path, [5.0, 1.0, 4.0, 4.5, 4.6], point=point)
        assert stub.asked == FEW


def test_what_shares_a_key_is_tuned_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tune, "candidates", lambda point: FEW[:2])
    arguments = parse(["tune", "--loss", "YOLOv3/paper", "--batch", "3", "4", "--size", "64", "--classes", "2"])
    stub = Stub({(): 5.0, FEW[1]: 4.0})
    assert tune.run(arguments, "cpu", stub, lambda point, tried, done: reports(tried)) == 0
    assert "batch 4, 64 px, 2 classes: launched as" in capsys.readouterr().out
    assert stub.calls == 2 + 2 * tune.TURNS


def test_a_gain_within_the_noise_keeps_the_heuristic(tmp_path):
    result, _, records = tune_few(tmp_path, [5.0, 4.95, 5.1, 5.2, 5.3])
    assert result.wishes == ()
    (entry,) = tuned.read(records.path, "cpu").values()
    assert (entry["config"], entry["heuristic_ms"]) == ({}, 5.0)


# --------------------------------------------------------------------------------------------------- resuming, sharing

SCRIPT = """
import json, os, sys, time
from pathlib import Path
from fusedyolo.tools import interpreter
interpreter.prepare()
import test_tune
from fusedyolo.tools import tune
from dataclasses import replace

tune.gradients = test_tune.same_gradients
folder, log, kill_after = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
asked = 0

def timer(point, wishes):
    global asked
    asked += 1
    if asked > kill_after:
        os.kill(os.getpid(), 9)
    with open(log, "a") as file:
        file.write(json.dumps([point.case.name, point.work.batch, wishes]) + "\\n")
    time.sleep(0.1)
    return 10.0 - len(str(wishes)) / 10

records = tune.Records(folder, "cpu", test_tune.PROVENANCE)
for batch in (1, 2):
    point = tune.Point(test_tune.POINT.case, replace(test_tune.WORK, batch=batch), "cpu")
    tune.tune_point(point, test_tune.reports(test_tune.FEW), records, timer)
"""


def start(tmp_path, kill_after):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).resolve().parent
    env = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root.parents[1]}", "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, script, tmp_path / "own", tmp_path / "log", str(kill_after)]
    return subprocess.Popen(arguments, env=env, stderr=subprocess.PIPE, text=True)


def logged(tmp_path):
    return [tuple(map(str, json.loads(line))) for line in (tmp_path / "log").read_text().splitlines()]


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    process = start(tmp_path, kill_after=3)
    assert process.wait() == -signal.SIGKILL
    assert len(logged(tmp_path)) == 3
    result, stub, _ = tune_few(tmp_path, [10.0] * 5)
    assert stub.asked == [*FEW[3:], (), FEW[2]]  # the first three are known; the best one has its turns
    assert result.timed == 5


def test_two_processes_share_what_they_measure(tmp_path):
    both = [start(tmp_path, kill_after=99), start(tmp_path, kill_after=99)]
    for process in both:
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-2000:]
    timed = logged(tmp_path)
    assert len(set(timed)) == 2 * len(FEW)
    assert len(timed) == 2 * (len(FEW) + 2 * tune.TURNS)  # everything once, and the turns at the end once
    found = tuned.read(tmp_path / "own" / "cpu.json", "cpu")
    assert len(found) == 2
    assert all(entry["config"] == dict(FEW[2]) for entry in found.values())


def test_other_versions_measure_anew(tmp_path):
    tune_few(tmp_path, [5.0, 1.0, 4.0, 4.5, 4.6])
    _, stub, _ = tune_few(tmp_path, [5.0, 1.0, 4.0, 4.5, 4.6])
    assert stub.calls == 0
    _, stub, _ = tune_few(tmp_path, [5.0, 1.0, 4.0, 4.5, 4.6], provenance={**PROVENANCE, "when": "later"})
    assert stub.asked == []
    _, stub, _ = tune_few(tmp_path, [5.0, 1.0, 4.0, 4.5, 4.6], provenance={**PROVENANCE, "kernels": "other"})
    assert stub.asked == FEW


# ------------------------------------------------------------------------------------------------------------- look-up


def cells_of_a_launch():
    return codegen.launches(POINT.case, WORK)["loss"].arguments["SPEC"].CELLS


def put(folder, **changed):
    entry = {"config": {"cells": 64}, "ms": 1.0}
    content = {"format": 1, "gpu": "cpu", "entries": {tune.key_of(POINT): entry}} | changed
    folder.mkdir(exist_ok=True)
    (folder / "cpu.json").write_text(json.dumps(content))
    tuned.forget()


def test_the_users_own_come_first_then_the_shipped_then_the_heuristic(tmp_path):
    usual = cells_of_a_launch()
    big = CASES["YOLOv3/paper"], Workload(batch=1, size=320, classes=2)
    key = tune.key_of(tune.Point(*big))

    def cells():
        return codegen.launches(*big)["loss"].arguments["SPEC"].CELLS

    assert cells() == 512
    put(tmp_path / "shipped", entries={key: {"config": {"cells": 1024}}})
    assert cells() == 1024
    put(tmp_path / "own", entries={key: {"config": {"cells": 256}}})
    assert cells() == 256
    (tmp_path / "own" / "cpu.json").unlink()
    tuned.forget()
    assert cells() == 1024
    assert cells_of_a_launch() == usual  # of another size: a miss


def test_what_tuning_found_is_what_launches_take(tmp_path):
    tune_few(tmp_path, [5.0, 1.0, 4.0, 4.5, 4.6])
    tuned.forget()
    launch = codegen.launches(POINT.case, WORK)["loss"]
    assert (launch.arguments["SPEC"].CELLS, launch.threads) == (64, 64)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"format": 1, "gpu": "cpu", "entr', "cannot be read"),
        ("", "cannot be read"),
        ("\x00\xff", "cannot be read"),
        ("[]", "not of format 1"),
        ('{"format": 2, "gpu": "cpu", "entries": {}}', "not of format 1"),
        ('{"format": 1, "gpu": "NVIDIA T4", "entries": {}}', "it is of 'NVIDIA T4', not of 'cpu'"),
        ('{"format": 1, "gpu": "cpu", "entries": []}', "it has no entries"),
    ],
)
def test_a_damaged_or_foreign_file_is_left_aside_with_a_warning(tmp_path, text, said):
    usual = cells_of_a_launch()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "cpu.json").write_bytes(text.encode("latin-1"))
    tuned.forget()
    with pytest.warns(UserWarning, match=said):
        assert cells_of_a_launch() == usual
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert cells_of_a_launch() == usual


@pytest.mark.parametrize(
    "config",
    [
        {"cells": 63},
        {"cells": 1 << 20},
        {"cells": "64"},
        {"cells": True},
        {"threads": 0},
        {"stages": 0},
        {"max_registers": 1000},
        {"nonsense": 64},
        [],
        None,
    ],
)
def test_an_entry_that_no_launch_could_take_is_left_aside(tmp_path, config):
    usual = cells_of_a_launch()
    put(tmp_path / "own", entries={tune.key_of(POINT): {"config": config}, "else": {"config": {}}})
    with pytest.warns(UserWarning, match="2 entries cannot be used"):
        assert cells_of_a_launch() == usual


def test_keeping_a_result_leaves_the_others_and_replaces_a_damaged_file(tmp_path):
    records = tune.Records(tmp_path / "own", "cpu", PROVENANCE)
    records.path.write_text("damaged")
    with pytest.warns(UserWarning, match="cannot be read"):
        records.keep("grid | a", {"config": {"cells": 64}})
    records.keep("grid | b", {"config": {}})
    found = tuned.read(records.path, "cpu")
    assert {key: entry["config"] for key, entry in found.items()} == {"grid | a": {"cells": 64}, "grid | b": {}}
    assert found["grid | a"]["provenance"] == PROVENANCE


# --------------------------------------------------------------------------------------------------------- command line


def test_the_command_tunes_prints_and_says_where_from(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "candidates", lambda point: FEW)

    def inspector(point, tried, done):
        for _ in tried:
            done()
        return reports(tried, _1={"spills": 4})

    arguments = ["tune", "--loss", "yolov3/paper", "--batch", "1", "2", "--size", "64", "--classes", "2"]
    status = tune.run(parse(arguments), "cpu", Stub(dict(zip(FEW, [5, 1, 4, 4.5, 4.6], strict=True))), inspector)
    said = capsys.readouterr().out
    assert status == 0
    for text in ("20.0%", "1 spills", "cells=128"):
        assert text in said
    found = json.loads((tmp_path / "own" / "cpu.json").read_text())
    assert len(found["entries"]) == 2
    for entry in found["entries"].values():
        assert entry["loss"].startswith("YOLOv3/paper float32 nchw, batch ")
        assert {"gpu", "arch", "torch", "triton", "fusedyolo", "commit", "kernels", "when"} <= set(entry["provenance"])


def test_without_a_gpu_there_is_nothing_to_tune(capsys):
    assert main(["tune"]) == 2
    assert "no GPU" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_found_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "candidates", lambda point: pytest.fail("work has begun"))
    (tmp_path / "own").write_text("")
    with pytest.raises(RefusedError, match=r"^nothing can be written to .*own: .*; --out names another folder$"):
        tune.run(parse(["tune", "--loss", "YOLOv5"]), "cpu")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--size", "100"], "--size: 100, want a multiple of 32"),
        (["--loss", "YOLOv99"], "YOLOv99, want one of"),
        (["--batch", "0"], "--batch: 0, want at least 1"),
    ],
)
def test_arguments_of_tune_are_checked(arguments, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        raise SystemExit(main(["tune", *arguments]))
    printed = capsys.readouterr()
    assert said in printed.out + printed.err


def test_environment_says_which_implementation_runs(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    put(tmp_path / "own")
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == "triton on cpu (Triton's interpreter)"
    assert found["own configurations"] == "1 for cpu, 1 of them measured with other versions"
    assert found["variables"]["TRITON_INTERPRET"] == "1"
    monkeypatch.setenv("FUSEDYOLO_DISABLE", "1")
    assert main(["env"]) == 0
    assert "because FUSEDYOLO_DISABLE is set" in capsys.readouterr().out
    monkeypatch.setenv("FUSEDYOLO_DISABLE", "0")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    (tmp_path / "own" / "cpu.json").write_text("{")
    assert main(["env"]) == 0
    said = capsys.readouterr().out
    assert "torch on cpu, because PyTorch sees no GPU" in said
    assert "0 for cpu; cpu.json: it cannot be read" in said
    assert "FUSEDYOLO_CONFIG_DIR set" in said
    assert str(tmp_path) not in said


def test_check_tells_by_its_exit_status(monkeypatch, capsys):
    from fusedyolo.tools import parity

    assert main(["check", "--loss", "YOLOv1/paper"]) == 0
    assert "passes" in capsys.readouterr().out
    monkeypatch.setattr(parity, "TOLERANCE", -1.0)
    assert main(["check", "--loss", "YOLOv1/paper"]) == 1
    assert "1 of 1 differ" in capsys.readouterr().out
    assert main(["check", "--loss", "none"]) == 2
    monkeypatch.setenv("FUSEDYOLO_DISABLE", "1")
    assert main(["check", "--loss", "YOLOv1/paper"]) == 2
    assert "FUSEDYOLO_DISABLE is set: no kernel would be launched" in capsys.readouterr().out
