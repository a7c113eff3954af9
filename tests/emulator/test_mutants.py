"""The emulator tested: kernels broken one line at a time must be noticed, by a fault, a note or other numbers."""

import numpy as np
import pytest
from emulator.hand import HEAD
from emulator.mutants import KINDS
from process import call

from fusedyolo.emulator import Buffer, Fault, Pointer, run

GRID, COUNT = 4, 50
SUM = """
	setp.lt.u32 	%p1, %r1, 50;
	mov.b32 	%r3, 0;
	@%p1 ld.global.b32 	%r3, [%rd4];
	shfl.sync.bfly.b32 	%r20, %r3, 16, 31, -1;
	add.s32 	%r3, %r3, %r20;
	shfl.sync.bfly.b32 	%r20, %r3, 8, 31, -1;
	add.s32 	%r3, %r3, %r20;
	shfl.sync.bfly.b32 	%r20, %r3, 4, 31, -1;
	add.s32 	%r3, %r3, %r20;
	shfl.sync.bfly.b32 	%r20, %r3, 2, 31, -1;
	add.s32 	%r3, %r3, %r20;
	shfl.sync.bfly.b32 	%r20, %r3, 1, 31, -1;
	add.s32 	%r3, %r3, %r20;
	and.b32 	%r4, %r1, 31;
	setp.eq.b32 	%p2, %r4, 0;
	shr.u32 	%r5, %r1, 5;
	shl.b32 	%r6, %r5, 2;
	@%p2 st.shared.b32 	[%r6], %r3;
	bar.sync 	0;
	ld.shared.v2.b32 	{%r9, %r10}, [global_smem];
	add.s32 	%r11, %r9, %r10;
	setp.eq.b32 	%p3, %r1, 0;
	mul.wide.u32 	%rd6, %r2, 4;
	add.s64 	%rd7, %rd2, %rd6;
	add.s64 	%rd8, %rd7, 32;
	@%p3 st.global.b32 	[%rd8], %r11;
	mov.b32 	%r15, global_smem;
	add.s32 	%r16, %r15, 8;
	bar.sync 	0;
	@%p3 atom.global.gpu.acq_rel.add.u32 %r12, [%rd2], 1;
	@%p3 st.shared.b32 	[%r16], %r12;
	bar.sync 	0;
	ld.shared.b32 	%r13, [global_smem+8];
	setp.ne.b32 	%p4, %r13, 3;
	@%p4 bra 	$L__end;
	setp.lt.u32 	%p5, %r1, 4;
	add.s64 	%rd9, %rd5, 32;
	@%p5 ld.global.b32 	%r14, [%rd9];
	add.s64 	%rd10, %rd5, 16;
	@%p5 st.global.b32 	[%rd10], %r14;
$L__end:
	ret;
}
"""
TEXT = HEAD + SUM


def outcome(text: str, seed: int) -> set[str]:
    """What is noticed of a sum of 50 numbers by each of four programs, which the last one copies."""
    numbers, sums = np.arange(100, 100 + COUNT, dtype=np.int32), np.zeros(12, np.int32)
    buffers = [Buffer(each.view(np.uint8)) for each in (numbers, sums)]
    try:
        report = run(text, GRID, 2, 12, [Pointer(each) for each in buffers], seed=seed, limit=1000)
    except Fault as error:
        return {str(error)}
    total = int(numbers.sum())
    right = sums.tolist() == [GRID, 0, 0, 0] + [total] * GRID * 2
    return set(report.faults) | set(report.notes) | (set() if right else {"other numbers"})


def test_the_kernel_itself():
    for seed in range(5):
        assert outcome(TEXT, seed) == set()


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.sites(TEXT.splitlines())])
def test_a_broken_line_is_noticed(name):
    kind = KINDS[name]
    for site in kind.sites(TEXT.splitlines()):
        seeds = range(4 * kind.seeds)
        assert any(outcome(kind.broken(TEXT, site), seed) for seed in seeds), TEXT.splitlines()[site]


def test_every_kind_has_a_line():
    assert {name for name, kind in KINDS.items() if kind.sites(TEXT.splitlines())} == set(KINDS)


@pytest.mark.parametrize(
    ("problem", "kernel", "kinds"),
    [
        ("focal", "label_kernel", ["store dropped", "store shifted", "load mask"]),
        ("YOLOv2/region", "grid_kernel", ["barrier", "relaxed", "scope", "store mask"]),
        ("YOLOv2/region", "grid_grad_kernel", ["shared store shifted"]),
    ],
)
def test_a_broken_line_of_a_compiled_kernel_is_noticed(problem, kernel, kinds):
    found = call("emulator.compiled", "mutants", problem, kernel, kinds, 2)
    assert set(found) == set(kinds)
    for name, ways in found.items():
        assert ways, name
        assert all(ways), (name, ways)
