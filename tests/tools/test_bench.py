"""The bench: workloads, compiled resources, reports, and the whole of it in small."""

import csv
import io
import json
import os
import pickle
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench import __main__ as entry
from bench import compare, labels, measure, plots, qualify, report, rows, session, sweep
from fusedyolo.tools import codegen, processes, registry, terminal, timing
from fusedyolo.tools.parity import parity as parity_of

ROOT = Path(__file__).parents[2]
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
InterpretedFunction = pytest.importorskip("triton.runtime.interpreter").InterpretedFunction


# ----------------------------------------------------------------------------------------------------------- workloads


def test_predictions_and_targets_depend_on_the_seed_alone():
    case, work = registry.CASES["YOLOv3/paper"], registry.Workload(batch=3, size=64, classes=4)
    preds, again = case.predictions(work), case.predictions(work)
    assert [tuple(p.shape) for p in preds] == [(3, 27, 8, 8), (3, 27, 4, 4), (3, 27, 2, 2)]
    assert all(torch.equal(a, b) and a.is_leaf and a.requires_grad for a, b in zip(preds, again, strict=True))
    assert sum(p.nbytes for p in preds) == case.prediction_bytes(work)
    assert torch.equal(work.targets(), work.targets())
    crowd = registry.Workload(batch=2, classes=4, objects="crowded:70")
    assert crowd.targets().shape == (140, 6)
    assert crowd.small().targets().shape == (128, 6)
    assert registry.Workload(batch=2, form="Targets").targets().batch_size == 2


def test_objects_of_label_files(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("7 0.5 0.5 0.1 0.1\n")
    arguments = ["--labels", str(tmp_path), "--batch", "3", "--size", "64", "--out", str(tmp_path)]
    load = compare.workload(entry.parser().parse_args([*arguments, "--classes", "8"]))
    assert load.objects == "labels"
    assert load.targets()[:, :2].tolist() == [[0, 7], [1, 7], [2, 7]]
    assert load.small().targets()[:, 0].tolist() == [0, 1]
    assert pickle.loads(pickle.dumps(load)) == load
    assert labels.given(replace(load, form="Targets"), load.targets()).targets().batch_size == 3
    assert entry.main([*arguments, "--classes", "7"]) == 2
    assert "class 7, want fewer than --classes 7" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- codegen


COPY = """
import json, sys
import torch, triton, triton.language as tl
from fusedyolo.tools.codegen import compile_launch

@triton.jit
def copy_planes(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * n + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at))

arguments = {"x_ptr": torch.empty(4096), "y_ptr": torch.empty(4096), "n": int(sys.argv[1]), "BLOCK": 1024}
print(json.dumps(compile_launch(copy_planes, arguments, {"num_warps": 4}, sys.argv[2]).as_dict()))
"""


@pytest.mark.parametrize(("n", "target", "width"), [(4096, "sm_90", 128), (4095, "sm_90", 32), (4096, "gfx942", 128)])
def test_a_kernel_compiles_as_its_arguments_allow(n, target, width, tmp_path):
    """In a process of its own: the interpreter leaves ``triton.language`` patched."""
    script = tmp_path / "copy_planes.py"
    script.write_text(COPY)
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, script, str(n), target], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    assert set(found["stores"]) == {str(width)}
    assert found["stack"] == found["spills"] == 0
    assert 0 < found["registers"] < 64


def copy(x_ptr, y_ptr, n, stride, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    tl.store(y_ptr + at * stride, tl.load(x_ptr + at * stride, mask=mask, other=0.0), mask=mask)


def test_an_interpreted_kernel_is_refused():
    with pytest.raises(ValueError, match="kernel: InterpretedFunction, want a JITFunction"):
        codegen.compile_launch(InterpretedFunction(copy), {}, {}, "sm_90")


def test_sass_is_read():
    usage = " Function kernel:\n  REG:40 STACK:16 SHARED:64 LOCAL:0 CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0\n"
    sass = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 LDG.E.U8.CONSTANT R4, desc[UR4][R2.64] ;
        /*0030*/              @UP1 LDG.E R5, desc[UR4][R2.64+0x4] ;
        /*0040*/                   STL [R1], R4 ;
        /*0050*/                   LDL.LU R4, [R1] ;
        /*0060*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*0070*/                   STG.E.U16 desc[UR4][R2.64], R4 ;
        /*0080*/                   NOP ;
$__internal_0_$__cuda_sm3x_div_rn_noftz_f32_slowpath:
        /*0090*/                   STL [R1], R5 ;
        /*00a0*/                   RET.REL.NODEC R52 `(kernel) ;
        /*00b0*/                   NOP ;
    """
    found = codegen.read_sass("sm_90", usage, sass)
    assert (found.registers, found.stack, found.spills, found.instructions) == (40, 16, 3, 10)
    assert found.called == 2
    assert (found.loads, found.stores) == ({128: 1, 8: 1, 32: 1}, {64: 1, 16: 1})
    assert codegen.widths(found.loads) == "1x128 1x32 1x8"
    assert codegen.widths({}) == "none"


def test_amd_assembly_is_read():
    text = """
	global_load_dwordx4 v[2:5], v0, s[2:3]
	buffer_load_dword v1, v2, s[4:7], 0 offen
	global_load_short_d16_hi v1, v0, s[2:3]
	global_load_ubyte v1, v0, s[2:3]
	scratch_store_dword off, v1, s32
	global_store_dwordx2 v0, v[1:2], s[2:3]
	s_endpgm
    .private_segment_fixed_size: 8
    .sgpr_spill_count: 3
    .vgpr_count:     57
    .vgpr_spill_count: 1
"""
    found = codegen.read_amdgcn("gfx942", text)
    assert (found.registers, found.stack, found.spills, found.scalar_spills) == (57, 8, 1, 3)
    assert (found.loads, found.stores) == ({128: 1, 32: 1, 16: 1, 8: 1}, {64: 1})


# -------------------------------------------------------------------------------------------------------------- timing


@pytest.mark.parametrize("provider", ["eager", "fused"])
def test_a_timed_step_gives_every_quantile(provider, monkeypatch):
    calls = []
    monkeypatch.setattr(timing, "by_events", lambda fn, leaves=None: calls.append(fn()) or (1.0, 2.0, 3.0))
    monkeypatch.setattr(timing, "peak_memory", lambda fn, leaves: calls.append(fn()) or 7)
    monkeypatch.setattr(timing, "by_replay", lambda fn, leaves=None: calls.append(fn()) or (0.1, 0.2, 0.3))
    monkeypatch.setattr(timing, "busy", lambda fn, leaves: calls.append(fn()) or 0.05)
    monkeypatch.setattr(timing, "by_launch", lambda fn, leaves: {"grid_kernel": 8.0})
    fused = provider == "fused"
    if fused:  # which takes minutes in the interpreter
        monkeypatch.setattr(timing, "host_microseconds", lambda fn, leaves, device: 9.0)
    case = registry.CASES["YOLOv3/paper"]
    found = measure.time_step(case, registry.Workload(batch=1, size=32, classes=2), provider, device="cpu")
    assert len(calls) == 4 + fused
    assert found.pop("host_us") > 0
    times = {"full_ms_p20": 1.0, "full_ms_p50": 2.0, "full_ms_p80": 3.0, "forward_ms_p50": 2.0, "peak_bytes": 7}
    times["busy_ms"] = 0.05
    assert found == times | ({"graph_ms_p50": 0.2, "grid_kernel.p50_us": 8.0} if fused else {})


def test_launches_have_medians_by_name():
    seen = []
    for x in (5.0, 1.0, 2.0):
        seen += [("void at::native::fill<unsigned char>(...)", 90.0), ("a_kernel", x), ("Memset (Device)", 1.0)]
        seen += [("b_kernel", 2 * x), ("a_kernel", 3 * x)]
    assert timing.by_name(seen, 3) == {"a_kernel.1": 2.0, "b_kernel": 4.0, "a_kernel.2": 6.0}
    swapped = [*seen[:-2], seen[-1], seen[-2]]
    for other in (seen[:-1], swapped):
        with pytest.raises(ValueError, match="want the same ones each time"):
            timing.by_name(other, 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("provider", ["eager", "compile", "fused"])
def test_a_step_is_timed_on_a_gpu(provider):
    found = measure.time_step(registry.CASES["YOLOv4/darknet"], registry.Workload(batch=2, size=320), provider)
    assert all(value > 0 for value in found.values())
    assert (provider == "fused") == ("graph_ms_p50" in found)
    assert timing.copy_bandwidth(1 << 28) > 10


# ------------------------------------------------------------------------------------------------------------- reports


def session_of(out):
    """One that says nothing."""
    own = session.Session(Namespace(out=out, jobs=1), "bench")
    own.console = Console(quiet=True)
    return own


HOST = {
    "when": "2020-01-01",
    "gpu": None,
    "system": "s",
    "python": "3",
    "torch": "2",
    "triton": "3",
    "fusedyolo": "0",
    "commit": "c",
}


class Twice:
    def __init__(self, total):
        self.total = total


def executed(kernel, programs, instructions):
    of_one = {"longest": instructions, "median": instructions / 4}
    waits = {"chain": 3510, "chains": 0, "shared": 0}  # 2 us of an H100
    return {"kernel": kernel, "programs": programs, "instructions": instructions, **of_one, "ptx": 10, **waits}


def parity(ok):
    errors = {"eager": (0.5, 0.5), "fused": (0.5, 0.5)}
    return {"errors": errors, "positives": 3, "failed": [] if ok else ["fused"], "broken": {}}


def fake_results(gpu=False):
    load, case = registry.Workload(batch=2, size=64), registry.CASES["YOLOv4/paper"]
    counts = {
        "triton_launches": 2,
        "other_launches": 0,
        "syncs": 0,
        "bytes_stored": 0,
        "programs": 9,
        "programs_run": 3,
        "kernels": [
            {"name": "grid_kernel", "programs": 6, "bytes": 3_000_000},
            {"name": "grid_grad_kernel", "programs": 3, "bytes": 30_000_000},
        ],
    }
    size = case.prediction_bytes(load)
    results = {
        session.Task("parity", case.name, load): parity(True),
        session.Task("count", case.name, load, "fused"): {**counts, "bytes_loaded": 2 * size},
        session.Task("codegen", case.name, load, "sm_90"): {
            "loss": codegen.Resources("sm_90", 96, 0, 0, 25, {128: 2}, {32: 1}, called=5).as_dict() | {"threads": 64},
            "grad": codegen.Resources("sm_90", 96, 0, 0, 10, {128: 2}, {32: 1}).as_dict() | {"threads": 64},
        },
        session.Task("execute", case.name, load, "sm_90"): [
            executed("grid_kernel", 6, 18_532_800),
            executed("grid_grad_kernel", 3, 926_640),
        ],
    }
    if gpu:
        timed = {
            **dict.fromkeys(measure.FULL, 0.5),
            "forward_ms_p50": 0.3,
            "graph_ms_p50": 0.4,
            "host_us": 50.0,
            "busy_ms": 0.1,
            "peak_bytes": size,
        }
        results[session.Task("time", case.name, load, "fused", "cuda")] = timed
        results[session.Task("bandwidth", "", load, device="cuda")] = 2000.0
    return results, load, case


def test_rows_are_keyed_and_what_was_not_measured_is_unknown():
    results, _, case = fake_results()
    found = rows.rows(results, HOST)
    assert len({tuple(v for k, v in row.items() if k != "value") for row in found}) == len(found)
    values = rows.index(found)[case.name]
    assert list(values) == ["eager", "fused"]
    assert values["eager"] == {"loss_error": 0.5, "grad_error": 0.5}
    assert values["fused"]["bytes_per_P"] == 2.0
    assert values["fused"]["programs_run"] == 1 / 3
    assert values["fused"]["sm_90.grad.loads"] == "2x128"
    assert "full_ms_p50" not in values["fused"]
    console = Console(record=True, width=140, file=io.StringIO())
    report.print_tables(console, found, [case], "H100")
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["YOLOv4/paper", "eager", *"????????"] in lines  # of the cost
    assert ["fused", *"???????????"] in lines  # of the time


def test_what_is_predicted_says_so_and_for_which_gpu():
    results, _, case = fake_results()
    found = rows.rows(results, HOST)
    values = {row["metric"]: row["value"] for row in found if "_us" in row["metric"]}
    assert all(name.startswith("predicted.H100.") for name in values)
    assert values["predicted.H100.loss.memory_us"] == pytest.approx(1.0)
    assert values["predicted.H100.loss.issue_us"] == pytest.approx(40.0)  # two of the GPU's for one of PTX
    assert values["predicted.H100.grad.memory_us"] == pytest.approx(10.0)
    assert values["predicted.H100.grad.chain_us"] == pytest.approx(2.0)
    assert values["predicted.H100.grad.predicted_us"] == pytest.approx(10.0 + 2.0 + 1)
    assert values["predicted.H100.step.predicted_us"] == pytest.approx(40.0 + 2.0 + 1 + 13.0)
    console = Console(record=True, width=140, file=io.StringIO())
    report.print_tables(console, found, [case], "H100")
    text = console.export_text()
    assert "Predicted for H100, not measured" in text
    (step,) = [line for line in text.splitlines() if " step " in line]
    assert step.split()[1:7] == ["step", "9", "11.0", "41.0", "0.0", "4.0"]
    for gpu, target in (("H200", "sm_90"), ("A100", "sm_80")):  # of another target nothing was executed
        of_another = [row for row in rows.rows(results, HOST, gpu) if row["metric"].startswith("predicted.")]
        assert bool(of_another) == (target == "sm_90")
        assert all(row["metric"].startswith(f"predicted.{gpu}.") for row in of_another)


def test_a_gpu_gives_bandwidth_and_the_distance_from_the_floor():
    results, load, case = fake_results(gpu=True)
    found = rows.rows(results, {**HOST, "gpu": "a GPU"})
    fused = rows.index(found)[case.name]["fused"]
    rate = 2 * case.prediction_bytes(load) / 0.5e-3 / 1e9
    assert fused["gb_per_s"] == pytest.approx(rate)
    assert fused["time_over_floor"] == pytest.approx(2 / case.floor(load) * 2000 / rate)
    assert fused["peak_per_P"] == 1.0
    console = Console(record=True, width=140, file=io.StringIO())
    report.print_tables(console, found, [case], "H100")
    times = f"0.500 0.500 0.500 0.300 0.100 0.400 {rate:.0f} 2000 {fused['time_over_floor']:.2f} 1.00 50".split()
    assert ["fused", *times] in [line.split() for line in console.export_text().splitlines()]


def test_a_run_is_kept_with_its_versions(tmp_path):
    results, *_ = fake_results()
    found = rows.rows(results, HOST)
    own = session_of(tmp_path)
    own.failures.append("what broke")
    own.write(found)
    with (tmp_path / "bench.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["metric"] for line in lines] == [row["metric"] for row in found]
    assert {(line["torch"], line["triton"], line["commit"]) for line in lines} == {("2", "3", "c")}
    assert json.loads((tmp_path / "bench.json").read_text()) == {"environment": own.host, "rows": found}
    assert (tmp_path / "failed.txt").read_text() == "what broke"


def test_pictures_show_what_there_is(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for gpu, names in ((False, ["cost.png", "issue_time.png"]), (True, ["cost.png", "time.png", "issue_time.png"])):
        results, _, case = fake_results(gpu)
        paths = plots.plot(tmp_path, rows.rows(results, HOST), [case])
        assert [path.name for path in paths] == names
        for path in paths:
            colours = image.open(path).convert("RGB").getcolors(1 << 16)
            assert len(colours) > 10


def test_a_picture_has_keys_of_what_it_shows(tmp_path, monkeypatch):
    keys = []
    monkeypatch.setattr(plots, "_save", lambda figure, path, title, of: keys.append([each.get_label() for each in of]))
    results, _, case = fake_results()
    found = rows.rows(results, HOST)
    plots.plot(tmp_path, found, [case])
    plots.plot(
        tmp_path, [*found, *({**row, "provider": "a peer"} for row in found if row["provider"] == "eager")], [case]
    )
    assert keys[0] == ["eager PyTorch reference", "fusedyolo"]
    assert keys[2] == ["the loss that it replaces", "eager PyTorch reference", "fusedyolo"]


def test_the_command_says_whose_losses_are_there():
    assert report.beside(["torchvision", "torchvision", "ultralytics"]) == "beside torchvision, ultralytics"
    assert report.beside([]).startswith("beside the reference alone")


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "100"], "--size: 100, want a multiple of 32"),
        (["--batch", "-1"], "--batch: -1, want at least 1"),
        (["--labels", "/does/not/exist"], "does not exist"),
        (["--times", "--predict"], "not allowed with"),
        (["--gpu", "RTX"], "invalid choice: 'RTX'"),
        (["assign", "--images", "nowhere"], "argument --images: nowhere does not exist"),
        (["train", "--images", __file__], f"argument --images: {__file__} is a file, want a folder"),
        (["assign", "--index", "-1"], "argument --index: -1, want at least 0"),
        (["assign", "--steps", "-5"], "argument --steps: -5, want at least 0"),
        (["assign", "--out", "/tmp"], "argument --out: /tmp is a folder, want a file"),
    ],
)
def test_bad_arguments_say_what_is_wrong(arguments, message, capsys):
    with pytest.raises(SystemExit):
        entry.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--times", "--loss", "YOLOv1"], "--times: there is no GPU to time on"),
        (["--loss", "YOLOv9"], "--loss: YOLOv9, want one of YOLOv1/paper"),
        (["sweep", "--loss", "YOLOv9"], "--loss: YOLOv9, want one of YOLOv1/paper"),
        (["qualify"], "no GPU: there is nothing to qualify"),
        (["assign", "--loss", "YOLOv5", "--loss", "YOLOv8"], "--loss: YOLOv5, YOLOv8, want one"),
        (["train", "--loss", "YOLOv5", "--loss", "YOLOv8"], "--loss: YOLOv5, YOLOv8, want one"),
        (["assign", "--labels", "."], "--images: missing, want the folder of the images that --labels are of"),
        (["assign", "--out", "runs/a"], "--out: runs/a, want a name that ends in one of"),
        (["assign", "--out", "runs/a.xyz"], "--out: runs/a.xyz, want a name that ends in one of"),
        (["assign", "--index", "100000", "--size", "32"], "--index: 100000, want less than 240"),
    ],
)
def test_what_cannot_be_done_is_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert entry.main(arguments) == 2
    assert message in capsys.readouterr().out


@pytest.mark.parametrize("command", [[], ["sweep"], ["train"], ["assign"], ["qualify"]])
def test_what_cannot_be_written_is_found_before_the_work(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(terminal, "import_module", lambda *arguments: pytest.fail("work has begun"))
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="2"):
        entry.main([*command, "--out", str(tmp_path / "file" / "picture.png")])
    assert "argument --out: nothing can be written to" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (ModuleNotFoundError("", name="PIL.Image"), 2, "PIL is not installed: pip install 'fusedyolo[bench]'"),
    ],
)
def test_what_ends_a_command_is_one_line(error, status, message, tmp_path, monkeypatch, capsys):
    def ends(*arguments):
        raise error

    monkeypatch.setattr(terminal, "import_module", ends)
    assert entry.main(["assign", "--out", str(tmp_path / "a.png")]) == status
    assert "".join(capsys.readouterr()) == f"{message}\n"


@pytest.mark.parametrize("terminal_there", ["", "1"])
def test_a_table_is_not_cut_off(terminal_there, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", terminal_there)
    monkeypatch.setenv("COLUMNS", "80")
    assert terminal.console().width == terminal.WIDTH
    monkeypatch.setenv("COLUMNS", "200")
    assert terminal.console().width == 200


def test_a_module_of_ours_that_is_not_there_is_no_package_to_install(monkeypatch, tmp_path):
    def ends(*arguments):
        raise ModuleNotFoundError("No module named 'bench.nothing'", name="bench.nothing")

    monkeypatch.setattr(terminal, "import_module", ends)
    with pytest.raises(ModuleNotFoundError, match=r"bench\.nothing"):
        entry.main(["--out", str(tmp_path)])


def test_a_package_that_is_not_installed_is_named(tmp_path):
    code = "import sys, runpy; sys.modules['matplotlib'] = None; runpy.run_module('bench', run_name='__main__')"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stderr) == (2, "")
    assert ran.stdout == "matplotlib is not installed: pip install 'fusedyolo[bench]'\n"


def test_losses_are_chosen_by_name():
    assert [case.name for case in registry.select(["yolov4"])] == ["YOLOv4/paper", "YOLOv4/darknet"]
    assert [case.name for case in registry.select(["YOLOv3/darknet", "yolov3"])] == ["YOLOv3/darknet", "YOLOv3/paper"]
    assert len(registry.select([])) == len(registry.CASES)
    assert [case.loss for case in registry.first_recipes()] == list(
        dict.fromkeys(c.loss for c in registry.CASES.values())
    )
    assert [case.name for case in registry.select(["YOLOV4"], ())] == ["YOLOv4/paper", "YOLOv4/darknet"]
    assert registry.select([], registry.SHOWN) == registry.SHOWN


def answer(monkeypatch, given):
    """In place of processes: what is ``given`` for a kind of task; the tasks there are."""
    tasks = []

    def run_all(calls, jobs):
        for task in calls:
            tasks.append(task)
            yield task, given[task.kind]

    monkeypatch.setattr(processes, "run_all", run_all)
    return tasks


@pytest.mark.parametrize("broken", [parity(False), processes.Failed("RuntimeError: no")])
def test_nothing_is_measured_on_a_red_gate(broken, monkeypatch, tmp_path, capsys):
    tasks = answer(monkeypatch, {"parity": broken})
    (tmp_path / "bench.csv").write_text("rows of another run")
    assert entry.main(["--quick", "--loss", "yolov3", "--out", str(tmp_path)]) == 1
    assert [task.kind for task in tasks] == ["parity", "parity"]
    assert "nothing else was measured" in capsys.readouterr().out
    assert not (tmp_path / "bench.csv").exists()


@pytest.mark.parametrize(("breaks", "status"), [("count", 1), ("codegen", 1), ("execute", 1), ("compile", 0)])
def test_what_breaks_is_shown_as_unknown_and_fails_the_run_if_it_is_ours(breaks, status, monkeypatch, tmp_path, capsys):
    results, _, _ = fake_results()
    answers = {task.kind: result for task, result in results.items()}
    answers |= {"parity": parity(True), "compile": {"kernels": 9, "bytes": 99, "graph_breaks": 0}}
    answer(monkeypatch, answers | {breaks: processes.Failed("Traceback\nValueError: [red] no\nmore")})
    assert entry.main(["--loss", "yolov4/paper", "--batch", "2", "--size", "64", "--out", str(tmp_path)]) == status
    assert "ValueError: [red] no" in capsys.readouterr().out
    assert "Traceback" in (tmp_path / "failed.txt").read_text()


def test_times_are_taken_once_everything_is_compiled_and_kept_as_they_come(monkeypatch, tmp_path, capsys):
    results, _, _ = fake_results(gpu=True)
    answers = {task.kind: result for task, result in results.items()} | {"parity": parity(True), "warm": None}
    tasks, written = answer(monkeypatch, answers), []
    monkeypatch.setattr(session, "environment", lambda: {**HOST, "gpu": "a GPU"})
    monkeypatch.setattr(session.Session, "write", lambda self, found: written.append(len(found)) or [])
    arguments = ["--times", "--quick", "--batch", "2", "--size", "64", "--loss", "yolov4", "--out", str(tmp_path)]
    assert entry.main(arguments) == 0
    done = [(task.kind, task.case, task.provider) for task in tasks]
    names = "YOLOv4/paper", "YOLOv4/darknet"
    assert done[:4] == [("parity", name, "") for name in names] + [("warm", name, "fused") for name in names]
    assert done[4:] == [("bandwidth", "", ""), *(("time", name, who) for name in names for who in ("eager", "fused"))]
    assert written == sorted(written)
    assert len(written) == 6  # a result each, and all of them
    assert "gb/s" in capsys.readouterr().out


def test_the_main_job_in_small(tmp_path, capsys):
    arguments = ["--quick", "--batch", "1", "--size", "64", "--classes", "4", "--loss", "yolov3/paper"]
    assert entry.main([*arguments, "--target", "sm_90", "--out", str(tmp_path)]) == 0
    assert "YOLOv3/paper" in capsys.readouterr().out
    values = rows.index(json.loads((tmp_path / "bench.json").read_text())["rows"])["YOLOv3/paper"]
    fused = values["fused"]
    assert (fused["triton_launches"], fused["other_launches"], fused["syncs"]) == (2, 0, 0)
    assert fused["stores_per_P"] >= 1
    assert values["eager"]["other_launches"] > 20
    assert values["eager"]["bytes_per_P"] > fused["bytes_per_P"]
    for mode in ("loss", "grad"):
        assert fused[f"sm_90.{mode}.registers"] > 16
        assert fused[f"sm_90.{mode}.loads"] != "none"
    assert ("full_ms_p50" in fused) == torch.cuda.is_available()
    assert {"bench.json", "bench.csv", "cost.png"} <= {path.name for path in tmp_path.iterdir()}


def test_predicting_alone_counts_compiles_and_executes_ours(monkeypatch, tmp_path, capsys):
    results, _, _ = fake_results()
    tasks = answer(monkeypatch, {task.kind: result for task, result in results.items()} | {"parity": parity(True)})
    arguments = ["--predict", "--gpu", "A100", "--loss", "yolov4/paper", "--out", str(tmp_path)]
    assert entry.main([*arguments, "--batch", "2", "--size", "64"]) == 0
    assert {(task.kind, task.provider) for task in tasks} == {
        ("parity", ""),
        ("count", "fused"),
        ("execute", "sm_80"),
        ("codegen", "sm_80"),
    }
    assert "Predicted for A100, not measured" in capsys.readouterr().out
    assert (tmp_path / "issue_time.png").exists()


def test_work_is_done_in_processes_that_may_die(tmp_path):
    """Each of its kind; what broke has said why, and what was not broken goes on in another process."""
    load = registry.Workload(batch=1, classes=2)
    counted, unknown = (session.Task("count", name, load, "eager") for name in ("YOLOv1/paper", "YOLOv99"))
    own = session_of(tmp_path)
    found = own.run([unknown, counted], "counting")
    assert found[counted]["other_launches"] > 50
    assert unknown not in found
    assert "KeyError: 'YOLOv99'" in own.failures[0]
    calls = {
        "dies": processes.Call(partial(os._exit, 3)),
        "plain": processes.Call(partial(os.getenv, "TRITON_INTERPRET")),
        "interpreted": processes.Call(partial(os.getenv, "TRITON_INTERPRET"), interpreted=True),
        "again": processes.Call(os.getpid),
        "once more": processes.Call(os.getpid),
    }
    results = dict(processes.run_all(calls, 1))
    assert results["dies"] == processes.Failed("the process died")
    assert (results["plain"], results["interpreted"]) == (None, "1")
    assert results["again"] == results["once more"]


# ------------------------------------------------------------------------------------------------------ sweep, qualify


@pytest.mark.parametrize("gpu", [False, True])
def test_an_axis_varies_one_thing(gpu):
    case, base = registry.CASES["RetinaNet"], sweep.BASE[gpu]
    for axis in sweep.AXES:
        found = sweep.workloads(case, axis, gpu)
        assert len(found) >= 3
        for each in found.values():
            changed = [name for name, value in vars(each).items() if value != getattr(base, name)]
            assert changed in ([], [axis])


def test_a_sweep_counts_and_draws(monkeypatch, tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    results, _, _ = fake_results()
    answers = {task.kind: result for task, result in results.items()} | {"parity": parity(True)}
    answer(monkeypatch, answers)
    assert entry.main(["sweep", "--loss", "yolov5", "--axis", "batch", "--axis", "dtype", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "sweep.json").read_text())["rows"]
    assert {row["batch"] for row in found} >= {1, 4, 16}
    assert {row["dtype"] for row in found} == {"float32", "bfloat16", "float16"}
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == ["sweep_bytes.png", "sweep_launches.png"]
    assert all(len(image.open(tmp_path / name).convert("RGB").getcolors(1 << 16)) > 10 for name in pictures)
    answers["parity"] = parity(False)
    assert entry.main(["sweep", "--loss", "yolov5", "--axis", "batch", "--out", str(tmp_path)]) == 1
    assert "nothing else was measured" in capsys.readouterr().out


def test_every_step_of_qualifying_has_its_time_and_its_end(tmp_path, monkeypatch):
    steps = [
        qualify.Step("fine", 10, ("true",)),
        qualify.Step("wrong", 10, (sys.executable, "-c", "print('last words'); raise SystemExit(3)")),
        qualify.Step("long", 0.2, ("sleep", "60")),
        qualify.Step("absent", 10, ("no-such-program",)),
    ]
    console = Console(quiet=True)
    found = {each.name: each for each in qualify.qualify(steps, tmp_path, 1, console)}
    assert {name: each.verdict for name, each in found.items()} == {
        "fine": "passed", "wrong": "failed", "long": "cut", "absent": "left out",
    }  # fmt: skip
    assert found["wrong"].said == "last words"
    assert found["long"].seconds < 10
    late = qualify.qualify(steps[:1], tmp_path, 0, console)
    assert [each.verdict for each in late] == ["left out"]


def test_a_gpu_is_qualified_only_by_what_passed():
    passed = [qualify.Outcome(name, "passed", 1.0, "") for name in sorted(qualify.REQUIRED)]
    assert qualify.verdict(passed) == 0
    assert qualify.verdict([*passed, qualify.Outcome("sweep", "cut", 1.0, "")]) == 0
    assert qualify.verdict([*passed, qualify.Outcome("sweep", "failed", 1.0, "")]) == 1
    assert qualify.verdict(passed[1:]) == 1
    assert qualify.verdict([qualify.Outcome(each.name, "cut", 1.0, "") for each in passed]) == 1


def test_qualifying_fits_its_minutes(tmp_path):
    steps = qualify.plan(tmp_path)
    assert sum(step.seconds for step in steps) < 60 * qualify.MINUTES
    assert qualify.MINUTES < 8
    assert [step.name for step in steps][:3] == ["environment", "check", "tests"]
    assert {"memcheck", "tune", "bench", "sweep", "profile"} <= {step.name for step in steps}


def test_where_another_is_faster_is_said():
    results, load, case = fake_results(gpu=True)
    results[session.Task("time", case.name, load, "compile", "cuda")] = {"full_ms_p50": 0.4, "peak_bytes": 1}
    results[session.Task("time", case.name, load, "torchvision", "cuda")] = {"full_ms_p50": 0.3, "peak_bytes": 1}
    found = rows.slower(rows.index(rows.rows(results, {**HOST, "gpu": "a GPU"})), [case])
    assert sorted(found) == [
        "YOLOv4/paper: 0.500 ms, compile 0.400 ms",
        "YOLOv4/paper: 0.500 ms, torchvision 0.300 ms",
    ]


def test_a_peer_that_breaks_or_differs_is_told_and_not_timed(monkeypatch, tmp_path):
    def breaks(load, device):
        raise AttributeError("no such thing in this version")

    case, load = registry.CASES["YOLOv1/paper"], registry.Workload(classes=3)

    def twice(load, device):
        loss = case.bind(case.build(load.classes, "torch"), load)
        return lambda preds, targets: Twice(2 * loss(preds, targets).total)

    same = {"same": lambda load, device: case.bind(case.build(load.classes, "torch"), load)}
    found = parity_of(case, load, others={"broken": breaks, "twice": twice, **same})
    assert found["failed"] == ["broken", "twice"]
    assert found["broken"] == {"broken": "AttributeError: no such thing in this version"}
    answer(monkeypatch, {"parity": found})
    task = session.Task("parity", case.name, load)
    passed, unlike = session_of(tmp_path).gate([task])
    assert passed == {task: found}
    assert unlike == {(case.name, "broken"), (case.name, "twice")}
