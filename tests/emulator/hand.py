"""Small kernels written by hand in PTX, and running them: no compiler, no Triton."""

import re

import numpy as np

from fusedyolo.emulator import Buffer, Pointer, run

HEAD = """
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k(
	.param .u64 .ptr .global .align 1 k_param_0,
	.param .u64 .ptr .global .align 1 k_param_1
)
{
	ld.param.b64 	%rd1, [k_param_0];
	ld.param.b64 	%rd2, [k_param_1];
	mov.u32 	%r1, %tid.x;
	mov.u32 	%r2, %ctaid.x;
	mul.wide.u32 	%rd3, %r1, 4;
	add.s64 	%rd4, %rd1, %rd3;
	add.s64 	%rd5, %rd2, %rd3;
"""
HEAD_LENGTH = 7
"""Instructions of it."""


def buffer(content=None):
    """1024 bytes, of zeros or of an array."""
    data = np.zeros(1024, np.uint8)
    if content is not None:
        data[: content.nbytes] = np.frombuffer(content.tobytes(), np.uint8)
    return Buffer(data)


def launch(body, first=None, second=None, grid=1, warps=2, **options):
    """What a body leaves in its second buffer, and the report. %rd4 and %rd5 are the thread's words of the buffers."""
    one, two = buffer(first), buffer(second)
    report = run(HEAD + body + "\tret;\n}\n", grid, warps, 1024, [Pointer(one), Pointer(two)], **options)
    return two.data, report


def faults(*args, seeds=4, **options):
    """What is found in any of some schedules, without the place."""
    found = (fault for seed in range(seeds) for fault in launch(*args, seed=seed, **options)[1].faults)
    return {re.sub(r" at `.*", "", fault) for fault in found}


def compute(lines, values, dtype=np.float32, out=None):
    """Instructions from %r3 to %r4 on 64 threads."""
    full = np.resize(np.asarray(values, dtype), 64)
    data, report = launch(f"\tld.global.b32 \t%r3, [%rd4];\n\t{lines}\n\tst.global.b32 \t[%rd5], %r4;\n", full)
    assert not report.faults
    return data[:256].view(out or dtype)[: len(values)]


def compute_wide(lines, values, dtype):
    """Instructions from %rd10 to %rd11 on 64 threads of 8 bytes each."""
    body = f"""
	add.s64 	%rd6, %rd4, %rd3;
	add.s64 	%rd7, %rd5, %rd3;
	ld.global.b64 	%rd10, [%rd6];
	{lines}
	st.global.b64 	[%rd7], %rd11;
"""
    data, report = launch(body, np.resize(np.asarray(values, dtype), 64))
    assert not report.faults
    return data[:512].view(dtype)[: len(values)]
