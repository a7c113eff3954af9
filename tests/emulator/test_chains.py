"""Cycles until the last instruction of a program, where instructions wait for one another."""

import numpy as np
import pytest
from emulator.hand import HEAD_LENGTH, launch

from fusedyolo.emulator import chains
from fusedyolo.emulator.chains import ARITHMETIC, BARRIER, CACHED, FENCE, GLOBAL, SHARED, SPECIAL, WARP_WIDE

ADD = "\tadd.s32 \t%r{}, %r{}, 1;\n"
LOAD = "\tld.global.b32 \t%r{}, [%rd4];\n"


def cycles(body, grid=1, **options):
    """Of each program, without what surrounds the body, whose first instruction waits for the threads' addresses."""
    report = launch(body, grid=grid, chains=True, lockstep=1.0, checks=(), **options)[1]
    surroundings = launch("", chains=True)[1].chains[0][0]
    return [end - surroundings for end, _ in report.chains.values()]


def waits(body, before="", **options):
    """Of the only program; of a body that follows another the cycles more."""
    (end,) = cycles(before + body, **options)
    return end - (cycles(before, **options)[0] if before else 0)


def test_chains_are_not_counted_unless_asked_for():
    assert launch("")[1].chains == {}


def test_what_nobody_waits_for_takes_a_cycle_each():
    independent = "".join(ADD.format(10 + i, 1) for i in range(8))
    dependent = "".join(ADD.format(10 + i, 9 + i) for i in range(1, 9))
    assert waits(independent) == 8
    assert waits(dependent, ADD.format(10, 1)) == ARITHMETIC + 7 * ARITHMETIC
    (end,) = (end for end, _ in launch("", chains=True)[1].chains.values())
    assert end >= HEAD_LENGTH


@pytest.mark.parametrize(
    ("line", "latency"),
    [
        ("\tex2.approx.ftz.f32 \t%r3, %r1;\n", SPECIAL),
        ("\tshfl.sync.bfly.b32 \t%r3, %r1, 1, 31, -1;\n", WARP_WIDE),
        ("\tld.shared.b32 \t%r3, [%rd6];\n", SHARED),
        ("\tdiv.full.f32 \t%r3, %r1, %r1;\n", chains.DIVISION),
        ("\tdiv.s32 \t%r3, %r1, 7;\n", chains.INTEGER_DIVISION),
        ("\tatom.global.gpu.relaxed.add.u32 \t%r3, [%rd2], 1;\n", GLOBAL),
        ("\tatom.global.gpu.acq_rel.add.u32 \t%r3, [%rd2], 1;\n", FENCE),
    ],
)
def test_a_result_is_waited_for(line, latency):
    begin = "\tmov.u64 \t%rd6, global_smem;\n\tst.shared.b32 \t[%rd6], 1;\n"
    assert waits(line + ADD.format(4, 3), begin) - waits(line + ADD.format(4, 1), begin) == latency - 1


def test_loads_are_under_way_together_unless_one_needs_another():
    first, second = LOAD.format(3), LOAD.format(4).replace("%rd4", "%rd5")
    both = "\tadd.s32 \t%r5, %r3, %r4;\n"
    assert waits(first + second + both) == waits(first + both.replace("%r4", "%r1")) + 1
    after = "\tmul.wide.u32 \t%rd6, %r3, 0;\n\tadd.s64 \t%rd7, %rd5, %rd6;\n" + second.replace("%rd5", "%rd7")
    assert waits(first + after + both) > 2 * GLOBAL


def test_an_instruction_behind_one_that_waits_waits_too():
    use, other = ADD.format(4, 3), LOAD.format(5).replace("%rd4", "%rd5") + ADD.format(6, 5)
    assert waits(LOAD.format(3) + use + other) > 2 * GLOBAL
    assert waits(LOAD.format(3) + other + use) < GLOBAL + 20


def test_what_a_program_has_loaded_it_has_at_hand():
    again = LOAD.format(5) + ADD.format(6, 5)
    first = LOAD.format(3) + ADD.format(4, 3)
    assert waits(again, first) < CACHED + 10
    assert waits(again.replace("global", "global.cg"), first) > GLOBAL
    assert waits(again.replace("%rd4", "%rd4+256"), first) > GLOBAL  # elsewhere


def test_a_load_that_no_thread_of_a_warp_makes_takes_no_time():
    body = "\tsetp.eq.s32 \t%p1, %r1, {};\n\t@%p1 ld.global.b32 \t%r3, [%rd4];\n" + ADD.format(4, 3)
    assert waits(body.format(1000)) < 20
    assert waits(body.format(40)) > GLOBAL  # of the second warp


def test_a_barrier_waits_for_the_slowest_warp():
    slow = "\tsetp.eq.s32 \t%p1, %r1, 40;\n\t@%p1 ld.global.b32 \t%r3, [%rd4];\n" + ADD.format(4, 3)
    fast = ADD.format(6, 5) * 4
    meet = "\tbar.sync \t0;\n"
    assert waits(slow + meet + fast) == pytest.approx(GLOBAL + BARRIER, abs=30)
    assert waits(meet * 5) == pytest.approx(5 * BARRIER, abs=10)


def test_stores_are_not_waited_for():
    assert waits("\tst.global.b32 \t[%rd5], %r1;\n" + ADD.format(3, 1)) < ARITHMETIC + 3


def test_each_program_begins_anew():
    body = LOAD.format(3) + ADD.format(4, 3)
    for resident in (1, 3):
        found = cycles(body, grid=5, resident=resident)
        assert len(found) == 5
        assert len(set(found)) == 1


def test_when_accesses_were_ordered_is_known():
    ordered = "\tatom.global.gpu.acq_rel.add.u32 \t%r3, [%rd2], 1;\n"
    report = launch(LOAD.format(5) + ADD.format(6, 5) + ordered + ADD.format(4, 3), chains=True)[1]
    end, met = report.chains[0]
    assert GLOBAL < met < end - FENCE + 10
    assert launch(LOAD.format(5), np.zeros(64, np.int32), chains=True)[1].chains[0][1] == 0
