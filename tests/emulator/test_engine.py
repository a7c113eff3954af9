"""Schedules by seed, counts, and parts of a launch."""

import numpy as np
import pytest
from emulator.hand import HEAD, HEAD_LENGTH, buffer, launch

from fusedyolo.emulator import Fault, Pointer, Program, run
from fusedyolo.emulator.engine import Engine, Options

COUNT = "\tatom.global.gpu.relaxed.add.u32 %r12, [ %rd1 + 0 ], 1;\n\tst.global.b32 \t[%rd5], %r12;\n"


def test_seeds_repeat():
    assert (launch(COUNT, seed=3)[0] == launch(COUNT, seed=3)[0]).all()
    assert (launch(COUNT, seed=3)[0] != launch(COUNT, seed=4)[0]).any()


def test_atomics():
    values = np.arange(64, dtype=np.int32)[::-1].copy()
    for name, kind, wanted in (("max", "s32", 63), ("min", "s32", -1), ("add", "s32", 2015), ("exch", "b32", None)):
        body = f"\tld.global.b32 \t%r3, [%rd4];\n\tatom.global.gpu.relaxed.{name}.{kind} \t%r4, [%rd2], %r3;\n"
        first = launch(body, values, np.full(1, -1, np.int32))[0][:4].view(np.int32)[0]
        assert first == wanted if wanted is not None else 0 <= first < 64
    body = "\tatom.global.gpu.relaxed.cas.b32 \t%r4, [%rd2], 5, %r1;\n"
    assert launch(body, None, np.full(1, 6, np.int32))[0][:4].view(np.int32)[0] == 6
    swap = body.replace("%r1;", "9;")
    assert launch(swap, None, np.full(1, 5, np.int32))[0][:4].view(np.int32)[0] == 9


def test_instructions_are_counted_once_a_warp():
    rest = HEAD_LENGTH + 1  # and ret
    assert launch("", grid=3)[1].by_program == {0: 2 * rest, 1: 2 * rest, 2: 2 * rest}
    masked = "\tsetp.eq.b32 \t%p1, %r1, 5;\n\t@%p1 st.global.b32 \t[%rd5], %r1;\n"
    assert launch(masked)[1].instructions == 2 * (rest + 2)
    parted = "\tsetp.lt.u32 \t%p1, %r1, {};\n\t@%p1 bra \t$L__end;\n\tadd.s32 \t%r5, %r1, 1;\n$L__end:\n"
    for bound, warps in ((64, 0), (40, 1), (32, 1), (8, 2), (0, 2)):  # that go through the middle
        for seed in range(3):
            found = launch(parted.format(bound), seed=seed, lockstep=1.0)[1]
            together = 2 * (rest + 2) + warps
            assert together <= found.instructions <= together + (bound % 32 > 0), bound  # the last part, at most twice
    assert launch("", grid=5)[1].programs == 5


def test_programs_of_one_number_only():
    body = """
	mov.u32 	%r3, %nctaid.x;
	mul.wide.u32 	%rd6, %r2, 4;
	add.s64 	%rd7, %rd2, %rd6;
	st.global.b32 	[%rd7], %r3;
"""
    data, report = launch(body, grid=100, programs=[3, 70])
    assert set(report.by_program) == {3, 70}
    assert np.flatnonzero(data[:400].view(np.int32)).tolist() == [3, 70]
    assert data[12:16].view(np.int32) == 100
    with pytest.raises(ValueError, match="programs"):
        launch(body, grid=100, programs=[100])


def test_without_checks_nothing_is_remembered():
    text = Program(HEAD + COUNT + "\tret;\n}\n")
    engine = Engine(text, 4000, 2, 1024, [Pointer(buffer()), Pointer(buffer())], Options(checks=(), programs=(7,)))
    assert engine.run().instructions == 2 * (HEAD_LENGTH + 3)
    assert engine.memory.unwritten is None
    assert engine.shared.unwritten is None
    assert not engine._histories
    assert engine._clocks is None
    with pytest.raises(ValueError, match="checks"):
        launch(COUNT, checks=("rice",))


def test_an_endless_loop_ends():
    with pytest.raises(Fault, match="not at its end"):
        launch("$L__again:\n\tbra \t$L__again;\n", limit=100)


def test_stop_raises_the_first_fault():
    with pytest.raises(Fault, match=r"out of bounds at `st.global"):
        launch("\tst.global.b32 \t[%rd5+1024], %r1;\n", stop=True)


def test_fine_lets_others_in_before_every_access():
    """Two programs store to one place and read it back, one warp at a time."""
    body = """
	mul.wide.u32 	%rd6, %r2, 128;
	add.s64 	%rd7, %rd5, %rd6;
	st.global.b32 	[%rd1], %r2;
	ld.global.b32 	%r3, [%rd1];
	st.global.b32 	[%rd7], %r3;
"""

    def seen(fine):
        runs = (launch(body, grid=2, warps=1, seed=seed, lockstep=-1, checks=(), fine=fine)[0] for seed in range(20))
        return {tuple(data[[0, 128]].tolist()) for data in runs}

    assert seen(False) == {(0, 1)}  # each its own
    assert seen(True) > {(0, 1)}


def test_arguments():
    text = HEAD + "\tret;\n}\n"
    with pytest.raises(Fault, match="1 arguments, the kernel takes 2"):
        run(text, 1, 1, 0, [Pointer(buffer())])
    numbers = text.replace(".param .u64 .ptr .global .align 1 k_param_1", ".param .f32 k_param_1").replace(
        "ld.param.b64 	%rd2, [k_param_1]", "ld.param.b32 	%r9, [k_param_1]"
    )
    stored = buffer()
    numbers = numbers.replace("\tret;", "\tst.global.b32 \t[%rd4], %r9;\n\tret;")
    run(numbers, 1, 1, 0, [Pointer(stored, 128), 1.5])
    assert stored.data[128:256].view(np.float32).tolist() == [1.5] * 32
    assert not stored.data[:128].any()
