"""What must be found: races, accesses out of bounds, memory that nothing has written, barriers that not all reach."""

import numpy as np
import pytest
from emulator.hand import HEAD, buffer, faults, launch

from fusedyolo.emulator import Buffer, Pointer, run

EXCHANGE = """
	mov.b32 	%r5, global_smem;
	shl.b32 	%r6, %r1, 2;
	add.s32 	%r7, %r5, %r6;
	st.shared.b32 	[%r7], %r1;
	{barrier}
	xor.b32 	%r8, %r6, {other};
	ld.shared.b32 	%r9, [%r8];
	st.global.b32 	[%rd5], %r9;
"""


def test_barriers_order_a_program_and_a_warp():
    data, report = launch(EXCHANGE.format(barrier="bar.sync \t0;", other=128))
    assert not report.faults
    assert data[:4].view(np.int32) == 32
    assert any("shared race" in f for f in faults(EXCHANGE.format(barrier="", other=128)))
    assert any("shared race" in f for f in faults(EXCHANGE.format(barrier="bar.warp.sync \t-1;", other=128)))
    assert any("shared race" in f for f in faults(EXCHANGE.format(barrier="", other=4)))  # in a warp, too
    assert not faults(EXCHANGE.format(barrier="bar.warp.sync \t-1;", other=4))


def test_a_write_after_a_read_is_a_race():
    body = EXCHANGE.format(barrier="bar.sync \t0;", other=128) + "\t{}\n\tst.shared.b32 \t[%r7], %r9;\n"
    assert any("write after read" in f for f in faults(body.format("")))
    assert not faults(body.format("bar.sync \t0;"))


def test_shared_memory():
    assert faults("\tld.shared.b32 \t%r9, [global_smem];\n") == {"shared memory is read that nothing has written"}
    assert faults("\tst.shared.b32 \t[global_smem+1024], %r1;\n") == {"shared access out of bounds"}
    wide = "\tst.shared.b32 \t[global_smem], 0;\n\tbar.sync \t0;\n\tld.shared.v2.b32 \t{%r8, %r9}, [global_smem];\n"
    assert faults(wide) == {"shared memory is read that nothing has written"}
    needed = wide.replace("\tld.sh", '\t.pragma "used_bytes_mask 0xf";\n\tld.sh')  # the compiler widened it
    assert not faults(needed)


def test_global_memory():
    assert not faults("\tst.global.b32 \t[%rd5], %r1;\n")
    assert faults("\tst.global.b32 \t[%rd5+1024], %r1;\n") == {"global access out of bounds"}
    assert faults("\tst.global.b32 \t[%rd5+-4], %r1;\n") == {"global access out of bounds"}
    assert faults("\tld.global.b32 \t%r5, [%rd3];\n") == {"global access out of bounds"}  # an offset is no address
    assert faults("\tst.global.b32 \t[%rd5+2], %r1;\n") == {"misaligned global access of 4 bytes"}
    one = "\tst.global.b32 \t[%rd5], %r2;\n"
    assert any("global race between programs: write after write" in f for f in faults(one, grid=3))
    assert not faults("\tst.global.b32 \t[%rd5], %r1;\n", grid=3)  # one value: noted only
    assert any("different values" in f for f in faults("\tst.global.b32 \t[%rd2], %r1;\n"))


def test_memory_that_nothing_has_written():
    first, second = buffer(), Buffer(np.full(1024, 0xFB, np.uint8), 4, np.zeros(1024, bool))
    body = "\tld.global.b32 \t%r3, [%rd5];\n\tst.global.b32 \t[%rd5], %r1;\n\tret;\n}\n"
    report = run(HEAD + body, 1, 2, 0, [Pointer(first), Pointer(second)])
    assert [fault.partition(" at ")[0] for fault in report.faults] == ["global memory is read that nothing has written"]
    assert second.init is not None
    assert second.init.sum() == 256  # 64 threads have stored
    masked = "\tsetp.lt.u32 \t%p1, %r1, 64;\n" + body.replace("ld.global", "@!%p1 ld.global")
    assert not run(
        HEAD + masked, 1, 2, 0, [Pointer(first), Pointer(Buffer(second.data, 4, np.zeros(1024, bool)))]
    ).faults


LAST = """
	shl.b32 	%r10, %r2, 2;
	cvt.u64.u32 	%rd6, %r10;
	add.s64 	%rd7, %rd1, %rd6;
	setp.eq.b32 	%p1, %r1, 0;
	@%p1 st.global.b32 	[%rd7+64], %r2;
	{barrier}
	mov.b32 	%r11, 1;
	@%p1 atom.global.{sem}.add.u32 %r12, [ %rd1 + 0 ], %r11;
	@%p1 st.shared.b32 	[global_smem], %r12;
	bar.sync 	0;
	ld.shared.b32 	%r13, [global_smem];
	setp.ne.b32 	%p2, %r13, 3;
	@%p2 bra 	$L__end;
	setp.lt.s32 	%p3, %r1, 4;
	@%p3 ld.global.b32 	%r14, [%rd4+64];
	@%p3 st.global.b32 	[%rd5], %r14;
$L__end:
"""


def test_the_last_program_sees_what_all_have_written():
    good = LAST.format(barrier="bar.sync \t0;", sem="gpu.acq_rel")
    assert not faults(good, grid=4)
    for seed in range(5):
        assert launch(good, grid=4, seed=seed, resident=2)[0][:16].view(np.int32).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("sem", ["gpu.relaxed", "cta.acq_rel", "gpu.release", "gpu.acquire"])
def test_weaker_atomics_order_nothing(sem):
    assert any("race" in f for f in faults(LAST.format(barrier="bar.sync \t0;", sem=sem), grid=4))


def test_a_barrier_before_a_release_is_needed():
    """Another thread than the one that stores counts."""
    body = LAST.replace("%p1 st.global", "%p4 st.global").replace("{barrier}", "{barrier}\n")
    body = body.replace("\tsetp.eq.b32 	%p1", "\tsetp.eq.b32 	%p4, %r1, 40;\n\tsetp.eq.b32 	%p1")
    assert not faults(body.format(barrier="bar.sync \t0;", sem="gpu.acq_rel"), grid=4)
    assert any("race" in f for f in faults(body.format(barrier="", sem="gpu.acq_rel"), grid=4))


@pytest.mark.parametrize("bound", [1, 32])
def test_parted_barriers(bound):
    body = f"\tsetp.lt.u32 \t%p1, %r1, {bound};\n\t@%p1 bra \t$L__end;\n\tbar.sync \t0;\n$L__end:\n"
    assert any("barrier" in f for f in faults(body))


def test_different_barriers():
    body = (
        "\tsetp.lt.u32 \t%p1, %r1, 32;\n\t@%p1 bra \t$L__a;\n\tbar.sync \t0;\n\tbra \t$L__b;\n$L__a:\n\tbar.sync \t0;\n"
    )
    assert faults(body + "$L__b:\n") == {"barrier: threads of a program meet at different bar.sync"}


def test_a_shuffle_that_some_threads_do_not_reach():
    body = (
        "\tsetp.lt.u32 \t%p1, %r1, 3;\n\t@%p1 bra \t$L__end;\n\tshfl.sync.bfly.b32 \t%r4, %r1, 1, 31, -1;\n$L__end:\n"
    )
    assert faults(body) == {"a warp-wide instruction that some threads of the warp do not reach"}
