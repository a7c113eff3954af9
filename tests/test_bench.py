"""The bench: its counters on kernels and operators whose cost is known, its reports, and the whole of it in small."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import peers
import pytest
import torch

from bench import __main__ as entry
from bench import codegen, measure, registry, report

ROOT = Path(__file__).resolve().parent.parent
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
InterpretedFunction = pytest.importorskip("triton.runtime.interpreter").InterpretedFunction


def copy(x_ptr, y_ptr, n, stride, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    tl.store(y_ptr + at * stride, tl.load(x_ptr + at * stride, mask=mask, other=0.0), mask=mask)


def count_launch(kernel, grid, *args, **kwargs):
    return measure.count(lambda: InterpretedFunction(kernel)[(grid,)](*args, **kwargs))


# ------------------------------------------------------------------------------------------------------------- sectors


@pytest.mark.parametrize(
    ("offset", "n", "stride", "grid", "sectors"),
    [
        (0, 256, 1, 1, 32),  # aligned: 1024 bytes
        (1, 256, 1, 1, 33),  # the same, beginning 4 bytes into a sector
        (0, 256, 8, 1, 256),  # every lane has a sector of its own
        (0, 256, 4, 1, 128),  # two lanes share one
        (0, 10, 1, 1, 2),  # masked: 40 bytes
        (0, 0, 1, 1, 0),  # all lanes off
        (0, 1024, 1, 4, 128),  # four programs
        (0, 300, 1, 2, 38),  # the second program has 44 lanes, 176 bytes
    ],
)
def test_a_kernel_moves_the_sectors_its_active_lanes_touch(offset, n, stride, grid, sectors):
    x, y = torch.randn(4096), torch.zeros(4096)
    assert (x.data_ptr() | y.data_ptr()) % 32 == 0
    counts = count_launch(copy, grid, x[offset:], y[offset:], n, stride, BLOCK=256)
    assert (counts.bytes_loaded, counts.bytes_stored) == (32 * sectors, 32 * sectors)
    assert (counts.triton_launches, counts.other_launches, counts.syncs, counts.programs) == (1, 0, 0, grid)
    torch.testing.assert_close(y[offset:][: n * stride : stride], x[offset:][: n * stride : stride], rtol=0, atol=0)


def test_an_element_is_as_wide_as_its_type():
    x = torch.zeros(256, dtype=torch.bfloat16)
    counts = count_launch(copy, 1, x, x.clone(), 256, 1, BLOCK=256)
    assert counts.bytes_loaded == counts.bytes_stored == 512


def test_each_access_counts_in_whatever_order_its_lanes_are():
    def backwards(x_ptr, y_ptr, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        first = tl.load(x_ptr + (BLOCK - 1 - at))
        tl.store(y_ptr + at, first + tl.load(x_ptr + at) + tl.load(x_ptr + at // 64))

    counts = count_launch(backwards, 1, torch.randn(256), torch.zeros(256), BLOCK=256)
    assert counts.bytes_loaded == 32 * (32 + 32 + 1)
    assert counts.bytes_stored == 32 * 32


def test_a_scalar_is_a_sector_and_an_atomic_goes_both_ways():
    def bump(n_ptr, y_ptr):
        before = tl.atomic_add(n_ptr, 1)
        tl.store(y_ptr, tl.load(y_ptr) + before)

    counts = count_launch(bump, 3, torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
    assert (counts.bytes_loaded, counts.bytes_stored) == (3 * 64, 3 * 64)


def test_a_padded_block_has_no_sectors_where_the_mask_is_off():
    addresses = np.arange(64, dtype=np.uint64).reshape(8, 8) * 32
    assert measure.sectors(addresses) == 64
    assert measure.sectors(addresses, np.arange(8)[:, None] < 3) == 24
    assert measure.sectors(addresses[::-1]) == 64


def test_programs_are_reported_and_nothing_stays_patched():
    from triton.runtime import interpreter

    before = dict(vars(interpreter.InterpreterBuilder)), interpreter.GridExecutor.__call__, interpreter._patch_lang
    seen = []
    x = torch.zeros(512)
    kernel = InterpretedFunction(copy)

    def twice():
        kernel[(2,)](x, x, 512, 1, BLOCK=256)
        kernel[(1,)](x, x, 256, 1, BLOCK=256)

    counts = measure.count(twice, lambda *progress: seen.append(progress))
    assert seen == [(1, 1, 2), (1, 2, 2), (2, 1, 1)]
    assert counts.launches == 2
    after = dict(vars(interpreter.InterpreterBuilder)), interpreter.GridExecutor.__call__, interpreter._patch_lang
    assert after == before
    assert interpreter.interpreter_builder.options.sanitize_overflow


# ----------------------------------------------------------------------------------------------------------- operators

X = torch.arange(1.0, 1025.0)
TABLE = torch.zeros(64, 16)
ROWS = torch.tensor([3, 5, 5, 60])
MASK = X > 1000


@pytest.mark.parametrize(
    ("name", "fn"),
    [
        ("view", lambda: X.view(32, 32).t()[3:].unsqueeze(0).detach()),
        ("expand", lambda: X[:1].expand(100)),
        ("reshape that does not copy", lambda: X.reshape(32, 32)),
        ("contiguous already", lambda: X.contiguous()),
        ("cast to the same type", lambda: X.to(torch.float32)),
        ("allocation", lambda: (torch.empty(10), torch.empty_like(X), X.new_empty(3), X.new_empty_strided((2,), (1,)))),
        ("nothing to do", lambda: X[:0] + 1),
        ("shape", lambda: (X.size(), X.stride(), X.numel(), X.is_contiguous())),
        ("in-place view", lambda: X.view(1, -1).detach().squeeze_()),
    ],
)
def test_what_launches_nothing_counts_nothing(name, fn):
    counts = measure.count(fn)
    assert (counts.launches, counts.bytes, counts.syncs) == (0, 0, 0), counts


@pytest.mark.parametrize(
    ("name", "fn", "launches", "loaded", "stored"),
    [
        ("unary", lambda: X.exp(), 1, 4096, 4096),
        ("binary", lambda: X + X.new_empty(1024), 1, 8192, 4096),
        ("one tensor twice", lambda: X * X, 1, 4096, 4096),
        ("two views of one tensor", lambda: X[:512] * X[512:], 1, 4096, 2048),
        ("broadcast", lambda: X + X[:1], 1, 4100, 4096),
        ("expanded", lambda: X + X[:1].expand(1024), 1, 4100, 4096),
        ("compare", lambda: X > 0, 1, 4096, 1024),
        ("reduce", lambda: X.sum(), 1, 4096, 4),
        ("fill", lambda: X.new_zeros(10), 1, 0, 40),
        ("in place", lambda: X.clone().add_(1), 2, 8192, 8192),
        ("in place, overwritten", lambda: torch.empty(1024).zero_(), 1, 0, 4096),
        ("copy", lambda: torch.empty(1024).copy_(X), 1, 4096, 4096),
        ("cast", lambda: X.to(torch.float64), 1, 4096, 8192),
        ("gather", lambda: TABLE[ROWS], 1, 256 + 32, 256),
        ("gather few of many", lambda: TABLE.index_select(0, ROWS), 1, 256 + 32, 256),
        ("scatter", lambda: torch.empty(64, 16).index_put_((ROWS,), torch.empty(4, 16)), 1, 256 + 32, 256),
        ("matrix", lambda: X.view(32, 32) @ X.view(32, 32), 1, 4096, 4096),
        ("list", lambda: torch.cat([X, X + 1]), 2, 4096 + 8192, 4096 + 8192),
    ],
)
def test_an_operator_moves_its_distinct_inputs_and_outputs(name, fn, launches, loaded, stored):
    counts = measure.count(fn)
    assert (counts.triton_launches, counts.other_launches) == (0, launches), counts
    assert (counts.bytes_loaded, counts.bytes_stored, counts.syncs) == (loaded, stored, 0), counts


@pytest.mark.parametrize(
    ("name", "fn", "syncs"),
    [
        ("item", lambda: X[0].item(), 1),
        ("float", lambda: float(X[0]), 1),
        ("if", lambda: bool(X[0] > 0), 1),
        ("nonzero", lambda: torch.nonzero(X), 1),
        ("where with one argument", lambda: torch.where(X > 0), 1),
        ("where with three", lambda: torch.where(X > 0, X, 0.0), 0),
        ("masked_select", lambda: X.masked_select(MASK), 1),
        ("boolean index", lambda: X[MASK], 1),
        ("integer index", lambda: TABLE[ROWS], 0),
        ("boolean assignment", lambda: X.clone().index_put_((MASK,), X[1000:]), 1),
        ("boolean assignment of one number", lambda: X.clone().index_put_((MASK,), X[0]), 0),
        ("unique", lambda: torch.unique(X), 1),
        ("equal", lambda: torch.equal(X, X.clone()), 1),
        ("allclose", lambda: torch.allclose(X, X), 1),
        ("repeat_interleave", lambda: X[:4].repeat_interleave(ROWS), 1),
        ("the same with its size", lambda: X[:4].repeat_interleave(ROWS, output_size=73), 0),
        ("numbers to the device", lambda: torch.tensor([1.0, 2.0]), 1),
        ("tolist", lambda: X[:2].tolist(), 1),
    ],
)
def test_what_makes_the_host_wait(name, fn, syncs):
    assert measure.count(fn).syncs == syncs


def test_the_backward_pass_counts():
    x = torch.randn(1024, requires_grad=True)
    one = torch.ones(())
    counts = measure.count(lambda: (x * x).sum().backward(gradient=one))
    assert counts.ops == {"mul": 3, "sum": 1, "add": 1}
    assert counts.bytes_stored == 4096 + 4 + 2 * 4096 + 4096


def test_a_custom_operator_counts_by_what_its_body_launches():
    @torch.library.custom_op("fusedyolo_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        InterpretedFunction(copy)[(4,)](x, out, x.numel(), 1, BLOCK=256)
        return out.mul_(2)

    twice.register_autograd(lambda ctx, grad: grad * 2, setup_context=lambda ctx, inputs, output: None)
    x, one = torch.ones(1024, requires_grad=True), torch.ones(1024)
    counts = measure.count(lambda: twice(x).backward(gradient=one))
    assert (counts.triton_launches, counts.ops) == (1, {"zeros_like": 1, "mul_": 1, "mul": 1})
    assert x.grad.tolist() == [2.0] * 1024


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


def test_labels_that_the_classes_do_not_cover_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("7 0.5 0.5 0.1 0.1\n")
    rows = registry.Workload(batch=2, classes=8, objects=str(tmp_path)).targets()
    assert rows[:, :2].tolist() == [[0, 7], [1, 7]]
    with pytest.raises(ValueError, match="class 7, want fewer than --classes 7"):
        registry.Workload(batch=2, classes=7, objects=str(tmp_path)).targets()


# ------------------------------------------------------------------------------------------------------------- codegen


COPY = """
import json, sys
import torch, triton, triton.language as tl
from bench.codegen import compile_launch

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
    """
    found = codegen.read_sass("sm_90", usage, sass)
    assert (found.registers, found.stack, found.spills, found.shared, found.instructions) == (40, 16, 2, 64, 8)
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
    .group_segment_fixed_size: 128
    .private_segment_fixed_size: 8
    .sgpr_spill_count: 3
    .vgpr_count:     57
    .vgpr_spill_count: 1
"""
    found = codegen.read_amdgcn("gfx942", text)
    assert (found.registers, found.stack, found.spills, found.shared, found.scalar_spills) == (57, 8, 1, 128, 3)
    assert (found.loads, found.stores) == ({128: 1, 32: 1, 16: 1, 8: 1}, {64: 1})


# -------------------------------------------------------------------------------------------------------------- timing


def test_a_timed_step_gives_every_quantile(monkeypatch):
    calls = []
    monkeypatch.setattr(measure, "_milliseconds", lambda fn, leaves=None: calls.append(fn()) or (1.0, 2.0, 3.0))
    monkeypatch.setattr(measure, "_peak", lambda fn, leaves: calls.append(fn()) or 7.0)
    work = registry.Workload(batch=1, size=32, classes=2)
    found = measure.time_step(registry.CASES["YOLOv3/paper"], work, "eager", device="cpu")
    assert len(calls) == 5
    assert found.pop("host_us") > 0
    expected = {f"{mode}_ms_p{q}": v for mode in report.MODES for q, v in ((20, 1.0), (50, 2.0), (80, 3.0))}
    assert found == {**expected, "peak_bytes": 7.0}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("provider", ["eager", "compile", "fused"])
def test_a_step_is_timed_on_a_gpu(provider):
    found = measure.time_step(registry.CASES["YOLOv4/darknet"], registry.Workload(batch=2, size=320), provider)
    assert all(value > 0 for value in found.values())
    assert measure.copy_bandwidth(1 << 28) > 10


# ------------------------------------------------------------------------------------------------------------- reports

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


def fake_results(gpu=False):
    work, case = registry.Workload(batch=2, size=64), registry.CASES["YOLOv4/paper"]
    counts = {"triton_launches": 2, "other_launches": 0, "syncs": 0, "bytes_stored": 0}
    size = case.prediction_bytes(work)
    results = {
        entry.Task("parity", case.name, work): {"ok": True, "fused_loss_error": 1e-8, "positives": 3},
        entry.Task("count", case.name, work, "fused"): {**counts, "bytes_loaded": 2 * size},
        entry.Task("codegen", case.name, work, "sm_90"): {
            "grad": codegen.Resources("sm_90", 96, 0, 0, 0, 10, {128: 2}, {32: 1}).as_dict()
        },
    }
    if gpu:
        times = {f"{mode}_ms_p{q}": 0.5 for mode in report.MODES for q in (20, 50, 80)}
        timed = {**times, "host_us": 50.0, "peak_bytes": size}
        results[entry.Task("time", case.name, work, "fused", "cuda")] = timed
        results[entry.Task("bandwidth", "", work, device="cuda")] = 2000.0
    return results, work, case


def test_rows_are_keyed_and_what_was_not_measured_has_no_value():
    results, work, case = fake_results()
    found = report.rows(results, work, HOST)
    assert len({tuple(v for k, v in row.items() if k != "value") for row in found}) == len(found)
    values = report.index(found)
    assert values[case.name, "fused", "bytes_per_P"] == 2.0
    assert values[case.name, "fused", "sm_90.grad.loads"] == "2x128"
    for provider, metric in (("eager", "bytes_per_P"), ("fused", "full_ms_p50"), ("compile", "cpu_codegen_kernels")):
        assert values[case.name, provider, metric] is None


def test_a_gpu_gives_bandwidth_and_the_distance_from_the_floor():
    results, work, case = fake_results(gpu=True)
    values = report.index(report.rows(results, work, {**HOST, "gpu": "a GPU"}))
    rate = 2 * case.prediction_bytes(work) / 0.5e-3 / 1e9
    assert values[case.name, "fused", "gb_per_s"] == pytest.approx(rate)
    assert values[case.name, "fused", "time_over_floor"] == pytest.approx(2000 / rate)
    assert values[case.name, "fused", "peak_per_P"] == 1.0


def test_a_second_run_replaces_its_own_rows_and_keeps_others(tmp_path):
    results, work, case = fake_results()
    found = report.rows(results, work, HOST)
    for rows in (found, found, report.rows(results, work, {**HOST, "commit": "d"})):
        report.write(tmp_path, rows, HOST, [case])
    with (tmp_path / "bench.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * len(found)
    assert {line["value"] for line in lines if line["metric"] == "full_ms_p50"} == {"?"}
    assert json.loads((tmp_path / "bench.json").read_text())["rows"][0]["commit"] == "d"


def test_pictures_show_what_there_is(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for gpu, names in ((False, ["cost.png"]), (True, ["cost.png", "time.png"])):
        results, work, case = fake_results(gpu)
        paths = report.plot(tmp_path, report.rows(results, work, HOST), [case])
        assert [path.name for path in paths] == names
        for path in paths:
            colours = image.open(path).convert("RGB").getcolors(1 << 16)
            assert len(colours) > 10


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss", "YOLOv9"], "--loss: YOLOv9, want one of YOLOv1/paper"),
        (["--size", "100"], "--size: 100, want a multiple of 32"),
        (["--batch", "-1"], "--batch: -1, want at least 1"),
        (["--labels", "/does/not/exist"], "does not exist"),
        (["--labels", ".", "--crowded"], "not allowed with"),
    ],
)
def test_bad_arguments_say_what_is_wrong(arguments, message, capsys):
    with pytest.raises(SystemExit):
        entry.main(arguments)
    assert message in capsys.readouterr().err


def test_losses_are_chosen_by_name():
    assert [case.name for case in registry.select(["yolov4"])] == ["YOLOv4/paper", "YOLOv4/darknet"]
    assert [case.name for case in registry.select(["YOLOv3/darknet", "yolov3"])] == ["YOLOv3/darknet", "YOLOv3/paper"]
    assert len(registry.select([])) == len(registry.CASES)


def parity(ok):
    errors = {f"{who}_{what}_error": 0.5 for who in ("fused", "eager") for what in ("loss", "grad")}
    return {**errors, "positives": 3, "ok": ok}


@pytest.mark.parametrize("broken", [(parity(False), ""), (None, "RuntimeError: no")])
def test_nothing_is_measured_on_a_red_gate(broken, monkeypatch, tmp_path, capsys):
    kinds = []
    monkeypatch.setattr(entry, "run_task", lambda task, *rest: kinds.append(task.kind) or broken)
    assert entry.main(["--quick", "--loss", "yolov3", "--out", str(tmp_path)]) == 1
    assert kinds == ["parity", "parity"]
    assert "nothing else was measured" in capsys.readouterr().out


@pytest.mark.parametrize(("breaks", "status"), [("count", 1), ("codegen", 1), ("compile", 0)])
def test_what_breaks_is_shown_as_unknown_and_fails_the_run_if_it_is_ours(breaks, status, monkeypatch, tmp_path, capsys):
    results, _, _ = fake_results()
    answers = {task.kind: result for task, result in results.items()}
    answers |= {"parity": parity(True), "compile": {"cpu_codegen_kernels": 9, "graph_breaks": 0}}

    def run(task, threads, on_progress):
        return (None, "Traceback\nValueError: [red] no\nmore") if task.kind == breaks else (answers[task.kind], "")

    monkeypatch.setattr(entry, "run_task", run)
    assert entry.main(["--loss", "yolov4/paper", "--batch", "2", "--size", "64", "--out", str(tmp_path)]) == status
    assert "ValueError: [red] no" in capsys.readouterr().out
    assert "Traceback" in (tmp_path / "failed.txt").read_text()


def test_the_main_job_in_small(tmp_path, capsys):
    arguments = ["--quick", "--batch", "1", "--size", "64", "--classes", "4", "--loss", "yolov3/paper"]
    status = entry.main([*arguments, "--target", "sm_90", "--json", "--out", str(tmp_path)])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    values = report.index(json.loads(printed.out))
    fused = {metric: value for (_, provider, metric), value in values.items() if provider == "fused"}
    assert (fused["triton_launches"], fused["other_launches"], fused["syncs"]) == (2, 0, 0)
    assert fused["stores_per_P"] >= 1
    assert values["YOLOv3/paper", "eager", "other_launches"] > 20
    assert values["YOLOv3/paper", "eager", "bytes_per_P"] > fused["bytes_per_P"]
    for mode in ("loss", "grad"):
        assert fused[f"sm_90.{mode}.registers"] > 16
        assert fused[f"sm_90.{mode}.loads"] != "none"
    assert (fused["full_ms_p50"] is None) == (not torch.cuda.is_available())
    assert {"bench.json", "bench.csv", "cost.png"} <= {path.name for path in tmp_path.iterdir()}


# ----------------------------------------------------------------------------------------------------------- the README


def test_the_readme_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    preds = [torch.randn(2, 3 * 85, 64 // s, 64 // s, requires_grad=True) for s in (8, 16, 32)]
    weights = torch.nn.Parameter(torch.ones(()))
    names = {
        "model": lambda images: [p * weights for p in preds],
        "loader": [(torch.zeros(2, 3, 64, 64), torch.tensor([[0, 3, 0.5, 0.5, 0.2, 0.3], [1, 7, 0.2, 0.7, 0.1, 0.1]]))],
        "optimizer": torch.optim.SGD([weights], 1e-6),
        "detector": peers.torchvision().models.detection.ssdlite320_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=3
        ),
        "photos": [torch.rand(3, 64, 64)] * 2,
        "boxes": [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0]]), "labels": torch.tensor([1])}] * 2,
        "cls_logits": torch.zeros(2, 76725, 80, requires_grad=True),
        "bbox_regression": torch.zeros(2, 76725, 4, requires_grad=True),
    }
    monkeypatch.setenv("FUSEDYOLO_DISABLE", "1")  # of 640 pixels, which the interpreter takes minutes for
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert float(weights.detach()) != 1.0


def test_the_readme_names_the_commands_as_they_are():
    text = (ROOT / "README.md").read_text()
    assert 'pip install -c constraints.txt -e ".[bench]" && python -m bench\n' in text
    assert 'pip install -c constraints.txt -e ".[test]" && pytest\n' in text
    for target in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (ROOT / target).exists(), target
