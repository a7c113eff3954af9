"""The counters, on kernels and operators whose cost is known, and on losses that do what a fused one must not."""

import numpy as np
import pytest
import torch

from bench import count, measure, sampling
from fusedyolo.drivers.protocol import Known
from fusedyolo.ops.launch import shared_zeros
from fusedyolo.tools import codegen
from fusedyolo.tools.parity import step
from fusedyolo.tools.registry import CASES, Workload

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
InterpretedFunction = pytest.importorskip("triton.runtime.interpreter").InterpretedFunction


def copy(x_ptr, y_ptr, n, stride, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    tl.store(y_ptr + at * stride, tl.load(x_ptr + at * stride, mask=mask, other=0.0), mask=mask)


def count_launch(kernel, grid, *args, **kwargs):
    return count.count(lambda: InterpretedFunction(kernel)[(grid,)](*args, **kwargs))


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
    assert count.sectors(addresses) == 64
    assert count.sectors(addresses, np.arange(8)[:, None] < 3) == 24
    assert count.sectors(addresses[::-1]) == 64


def test_launches_are_reported_and_nothing_stays_patched():
    from triton.runtime import interpreter

    def patchable():
        builder = interpreter.interpreter_builder
        return dict(vars(type(builder))), builder.options, interpreter.GridExecutor.__call__, interpreter._patch_lang

    before = patchable()
    x = torch.zeros(512)
    kernel = InterpretedFunction(copy)

    def twice():
        kernel[(2,)](x, x, 512, 1, BLOCK=256)
        kernel[(1,)](x, x, 256, 1, BLOCK=256)

    counts = count.count(twice)
    assert counts.launches == 2
    assert [(one.name, one.programs, one.bytes) for one in counts.kernels] == [("copy", 2, 4096), ("copy", 1, 2048)]
    assert patchable() == before


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
    counts = count.count(fn)
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
    counts = count.count(fn)
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
        ("boolean assignment of a Python number", lambda: X.clone().__setitem__(MASK, 2.0), 0),
        ("a Python number to the device", lambda: torch.tensor(2.0), 1),
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
    assert count.count(fn).syncs == syncs


def test_the_backward_pass_counts():
    x = torch.randn(1024, requires_grad=True)
    one = torch.ones(())
    counts = count.count(lambda: (x * x).sum().backward(gradient=one))
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
    counts = count.count(lambda: twice(x).backward(gradient=one))
    assert (counts.triton_launches, counts.ops) == (1, {"zeros_like": 1, "mul_": 1, "mul": 1})
    assert x.grad.tolist() == [2.0] * 1024


# --------------------------------------------------------------------------------------------------- programs left out


LEAST = 2


@pytest.mark.parametrize("most", [0, 8, 1000])
def test_first_last_longest_and_some_of_each_kind_are_run(most):
    kinds = [p % 2 for p in range(100)]
    effort = [float(p * 37 % 100) for p in range(100)]
    plan = sampling.Plan(kinds, effort, most, LEAST)
    assert plan.chosen == sorted(set(plan.chosen))
    assert {0, 99} <= set(plan.chosen)
    assert len(plan.chosen) == 100 if most == 1000 else len(plan.chosen) <= max(most, 4) + 4
    for kind in (0, 1):
        own = [p for p in range(1, 99) if kinds[p] == kind]
        assert max(own, key=lambda p: effort[p]) in plan.chosen
        assert len(set(own) & set(plan.chosen)) >= LEAST


def test_between_two_efforts_instructions_are_interpolated():
    effort = [float(p) for p in range(50)]
    plan = sampling.Plan([0] * 50, effort, 8, LEAST)
    work = [1000 + 7 * p for p in range(50)]
    work[0], work[-1] = 50_000, 90_000  # these stand for themselves
    found = plan.estimate({p: work[p] for p in plan.chosen})
    first = min(p for p in plan.chosen if p)
    assert found[[0, *range(first, 50)]] == pytest.approx(np.array(work)[[0, *range(first, 50)]])
    assert found[1:first] == pytest.approx(work[first])


def test_programs_that_share_a_tile_are_run_together():
    """And the same tiles as of a launch with one program each: those whose leavings are there."""
    kinds = [tile % 3 for tile in range(60)]
    effort = [float(tile * 7 % 60) for tile in range(60)]
    alone = sampling.Plan(kinds, effort, 10, LEAST)
    plan = sampling.Plan([2 * k + p for k in kinds for p in (0, 1)], [e for e in effort for _ in (0, 1)], 10, LEAST, 2)
    assert plan.chosen == [2 * tile + part for tile in alone.chosen for part in (0, 1)]
    moved = [100 + 9 * part + kind for kind in kinds for part in (0, 1)]
    assert plan.estimate({p: moved[p] for p in plan.chosen}).sum() == sum(moved)


def test_one_program_is_the_first_and_the_last():
    plan = sampling.Plan([0], [0.0], 8, LEAST)
    assert plan.chosen == [0]
    assert plan.estimate({0: 7}).tolist() == [7.0]


def test_programs_of_one_kind_stand_for_one_another():
    kinds = [0] * 50 + [1] * 50
    plan = sampling.Plan(kinds, [0.0] * 100, 10, 4)
    moved = [100 if kind == 0 else 7 for kind in kinds]
    moved[0], moved[-1] = 5000, 9000  # these stand for themselves
    assert len(plan.chosen) == 12
    assert plan.estimate({p: moved[p] for p in plan.chosen}).sum() == sum(moved)


def test_a_sampled_launch_is_counted_as_a_whole_one():
    x, y = torch.randn(4096), torch.zeros(4096)

    def planned(kernel, programs, arguments):
        return sampling.Plan([0] * programs, [0.0] * programs, 4, 4)

    counts = count.count(lambda: InterpretedFunction(copy)[(32,)](x, y, 4096, 1, BLOCK=128), planned=planned)
    assert (counts.programs, counts.programs_run, counts.triton_launches) == (32, 6, 1)
    assert counts.kernels == [count.KernelLaunch("copy", 32, 8 * 4096)]
    assert counts.bytes_loaded == counts.bytes_stored == 4 * 4096
    assert 0 < y.count_nonzero() <= 6 * 128


@pytest.mark.interpreter("sectors are counted in the interpreter")
@pytest.mark.parametrize(
    ("name", "batch", "size"), [("YOLOv3/paper", 4, 96), ("FCOS", 4, 192), ("SSD", 3, 96), ("YOLOv8", 3, 128)]
)
def test_what_stands_for_a_launch_is_close_to_all_of_it(name, batch, size, monkeypatch):
    """Also: what is left out must not be missed by the launches after it."""
    monkeypatch.setattr(measure, "MOST", 8)
    case, work = CASES[name], Workload(batch=batch, size=size, classes=20)
    exact = measure.count_step(case, work, "fused", exact=True)
    sampled = measure.count_step(case, work, "fused")
    assert sampled.programs_run < sampled.programs == exact.programs
    assert (sampled.launches, sampled.syncs) == (exact.launches, 0)
    assert sampled.bytes == pytest.approx(exact.bytes, rel=0.03)
    assert sum(one.bytes for one in exact.kernels) == exact.bytes
    assert [(one.name, one.programs) for one in sampled.kernels] == [(one.name, one.programs) for one in exact.kernels]


def _by_cell(picked):
    """What rows picked, in the order of cells, and what goes with it."""
    cells, order = picked.index_ptr.sort(1)
    return cells, *[each.gather(1, order)[cells >= 0] for each in (picked.overlap_ptr, picked.worth_ptr)]


@pytest.mark.interpreter("launches are run one by one")
def test_picks_that_are_put_down_are_those_of_the_launch():
    case, work = CASES["YOLOv8"], Workload(batch=2, size=96, classes=3, objects="crowded:12")
    criterion, preds = case.build(work.classes, "triton"), [p.detach() for p in case.predictions(work)]
    call = case.driver.read(criterion, case.pack(preds, work), case.targets(work))
    decode, pick, settle, *_ = case.driver.launches(criterion.head, call).values()
    known = Known(criterion.head, preds, [12, 12], lambda: None)
    with torch.no_grad():
        decode.run()
        pick.run()
        (_, decoded, picked, tally, _), *_ = pick.arguments["branches"]
        marks = decoded.picker_ptr, tally.found_ptr, decoded.claim_ptr
        run, by_launch = [each.clone() for each in marks], _by_cell(picked)
        case.driver.complete("pick_kernel", pick.arguments, known)
        assert (decoded.picker_ptr == -1).any()
        assert all(map(torch.equal, marks[:2], run[:2]))
        assert torch.equal(decoded.claim_ptr & 0x7FFFFFFF, run[2] & 0x7FFFFFFF)  # the rows
        last_digits = ((decoded.claim_ptr >> 31) - (run[2] >> 31)).abs()  # of overlaps
        assert last_digits.max() < 200
        for value, each in zip(_by_cell(picked), by_launch, strict=True):
            torch.testing.assert_close(value, each)
        settle.run()  # which leaves counters as they were


def test_a_ranking_counts_from_zero_where_matches_are_sampled():
    """Which the first program of each image sees to, where all are run."""
    case, work = CASES["SSD"], Workload(batch=2, size=128, classes=2)
    arguments = codegen.launches(case, work)["match"].arguments
    arguments["picks_ptr"].fill_(7)
    sample = sampling.Sample(case, work, case.targets(work), 0, 1)
    case.driver.complete("match_kernel", arguments, sample.known)
    assert arguments["picks_ptr"][:, 3].tolist() == [0, 0]


@pytest.mark.interpreter("sectors are counted in the interpreter")
def test_a_ranking_costs_the_same_however_few_programs_are_run(monkeypatch):
    """Two parts an image, the last of which reads what the others leave."""
    case, work, found = CASES["SSD"], Workload(batch=2, size=128, classes=2), []
    for most, least in ((0, 1), (16, 4)):
        monkeypatch.setattr(measure, "MOST", most)
        monkeypatch.setattr(measure, "LEAST", least)
        counts = measure.count_step(case, work, "fused")
        found.append([(one.programs, one.bytes) for one in counts.kernels if one.name == "rank_kernel"])
        assert not any(kept.any() for kept in shared_zeros())  # each image had a last program, and so had all of them
    assert found[0] == found[1]
    assert found[0][0][0] == 4


@pytest.mark.parametrize("name", ["YOLOv1/paper", "YOLOv2/region", "YOLOv5", "SSD"])
def test_the_reference_costs_the_same_where_there_is_no_data(name):
    case, work, one = CASES[name], Workload(batch=2, size=64, classes=4), torch.ones(())
    loss = measure.provide(case, "eager", work)
    preds, targets = case.predictions(work), case.targets(work)
    step(loss, preds, targets, one)
    for pred in preds:
        pred.grad = None
    counts = count.count(lambda: step(loss, preds, targets, one))
    assert measure.count_step(case, work, "eager") == counts


def test_what_the_compiler_schedules_is_counted_and_not_run():
    case, work = CASES["YOLOv1/paper"], Workload(batch=2, classes=4)
    counts = measure.count_compiled(case, work)
    eager = measure.count_step(case, work, "eager")
    assert 5 < counts["kernels"] < eager.launches / 2
    assert case.prediction_bytes(work) < counts["bytes"] < eager.bytes
    assert counts["graph_breaks"] == 0


# -------------------------------------------------------------------------------------- what a fused loss must not do


class Total:
    def __init__(self, total):
        self.total = total


def spoil_nothing(out, pred):
    return out.total


def spoil_by_a_term_of_its_own(out, pred):
    return out.total + torch.nn.functional.binary_cross_entropy_with_logits(pred, torch.zeros_like(pred))


def spoil_by_waiting(out, pred):
    return out.total if float(out.total.detach()) >= 0 else out.total * 0


def spoil_by_copying(out, pred):
    return out.total + 0 * pred.permute(0, 2, 3, 1).contiguous()[0, 0, 0, 0]


@pytest.mark.interpreter("sectors are counted in the interpreter")
def test_an_unfused_term_a_wait_and_a_copy_are_caught(monkeypatch):
    case, work = CASES["YOLOv2/darknet"], Workload(batch=1, size=64, classes=4)
    size = case.prediction_bytes(work)

    def counted(spoil):
        def provide(*arguments):
            loss = case.bind(case.build(work.classes, "triton"), work)
            return lambda preds, targets: Total(spoil(loss(preds, targets), preds[0]))

        monkeypatch.setattr(measure, "provide", provide)
        return measure.count_step(case, work, "fused")

    clean = counted(spoil_nothing)
    assert (clean.triton_launches, clean.other_launches, clean.syncs) == (2, 0, 0)
    term, wait, copied = map(counted, (spoil_by_a_term_of_its_own, spoil_by_waiting, spoil_by_copying))
    assert term.other_launches >= 4
    assert term.bytes >= clean.bytes + 4 * size
    assert (wait.syncs, wait.sync_ops) == (1, {"_local_scalar_dense": 1})
    assert copied.ops["clone"] >= 1
    assert copied.bytes >= clean.bytes + 2 * size
    assert all(spoilt.triton_launches == 2 for spoilt in (term, wait, copied))
