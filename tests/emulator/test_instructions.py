"""What single instructions compute."""

import numpy as np
import pytest
from emulator.hand import compute, compute_wide, faults, launch

from fusedyolo.emulator import Fault, Program

NAN, INF = np.nan, np.inf
S32, U32 = np.int32, np.uint32


@pytest.mark.parametrize(
    ("line", "values", "dtype", "wanted"),
    [
        ("bfe.u32 \t%r4, %r3, 4, 2;", [0x30, 0x1F], U32, [3, 1]),
        ("bfe.s32 \t%r4, %r3, 4, 1;", [0x10, 0x0F], U32, [2**32 - 1, 0]),
        ("bfe.u32 \t%r4, %r3, 0, 32;", [2**32 - 1, 5], U32, [2**32 - 1, 5]),
        ("bfi.b32 \t%r4, %r3, -1, 8, 4;", [0, 0x25], U32, [0xFFFFF0FF, 0xFFFFF5FF]),
        ("shr.s32 \t%r4, %r3, 31;", [-5, 5], S32, [-1, 0]),
        ("shr.s32 \t%r4, %r3, 40;", [-5, 5], S32, [-1, 0]),
        ("shr.u32 \t%r4, %r3, 40;", [2**32 - 5, 5], U32, [0, 0]),
        ("shl.b32 \t%r4, %r3, 32;", [1, 5], U32, [0, 0]),
        ("shf.l.wrap.b32 \t%r4, %r3, %r3, 8;", [0x12345678], U32, [0x34567812]),
        ("shf.r.clamp.b32 \t%r4, %r3, 0, 32;", [0x12345678], U32, [0]),
        ("mul.hi.s32 \t%r4, %r3, 1717986919;", [10, -10], S32, [4, -5]),
        ("cvt.u16.u32 \t%rs1, %r3;\n\tmul.hi.s16 \t%rs2, %rs1, 21846;\n\tcvt.s32.s16 \t%r4, %rs2;", [9, -9], S32,
         [3, -4]),
        ("div.s32 \t%r4, %r3, 3;", [7, -7], S32, [2, -2]),
        ("div.u32 \t%r4, %r3, 0;", [7], U32, [2**32 - 1]),
        ("rem.s32 \t%r4, %r3, 3;", [7, -7], S32, [1, -1]),
        ("add.s32 \t%r4, %r3, 1;", [2**31 - 1], S32, [-(2**31)]),
        ("popc.b32 \t%r4, %r3;", [0, 0xF0F0F0F1], U32, [0, 17]),
        ("clz.b32 \t%r4, %r3;", [0, 1, 0x80000000, 0x00FFFFFF], U32, [32, 31, 0, 8]),
        ("brev.b32 \t%r4, %r3;", [1, 0xF], U32, [0x80000000, 0xF0000000]),
        ("prmt.b32 \t%r4, %r3, 0, 0x0123U;", [0x11223344], U32, [0x44332211]),
        ("prmt.b32 \t%r4, %r3, 0, 0x8888U;", [0x80, 0x7F], U32, [2**32 - 1, 0]),
        ("lop3.b32 \t%r4, %r3, 12, 10, 0xE8;", [6], U32, [14]),  # the majority of three
        ("mad.lo.s32 \t%r4, %r3, 3, 4;", [5], S32, [19]),
        ("min.relu.s32 \t%r4, %r3, 7;", [-5, 5, 9], S32, [0, 5, 7]),
    ],
)  # fmt: skip
def test_integers(line, values, dtype, wanted):
    assert compute(line, values, dtype).tolist() == wanted


def test_wide_integers():
    line = "mul.hi.s64 \t%rd11, %rd10, 6148914691236517206;"
    values = [9, -9, 2**62, -(2**62)]
    assert compute_wide(line, values, np.int64).tolist() == [v * 6148914691236517206 >> 64 for v in values]
    line = "mul.hi.u64 \t%rd11, %rd10, -6148914691236517206;"
    wanted = [2**64 - 1, 12345678901234567890]
    assert compute_wide(line, wanted, np.uint64).tolist() == [v * (2**64 - 6148914691236517206) >> 64 for v in wanted]
    assert compute_wide("clz.b64 \t%r9, %rd10;\n\tcvt.u64.u32 \t%rd11, %r9;", [1, 0, 2**40], np.uint64).tolist() == [
        63, 64, 23,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "values", "wanted"),
    [
        ("min.f32 \t%r4, %r3, 0f3F800000;", [NAN, 2, -INF], [1, 1, -INF]),
        ("max.f32 \t%r4, %r3, 0f3F800000;", [NAN, 2, -INF], [1, 2, 1]),
        ("add.sat.f32 \t%r4, %r3, 0f00000000;", [NAN, 2, -1, 0.5], [0, 1, 0, 0.5]),
        ("mul.ftz.f32 \t%r4, %r3, 0f3F800000;", [1e-40, 1e-30], [0, np.float32(1e-30)]),
        ("mul.f32 \t%r4, %r3, 0f3F800000;", [1e-40], [np.float32(1e-40)]),
        ("copysign.f32 \t%r4, %r3, 0f3F800000;", [-2, 2], [-1, 1]),
        ("cvt.rmi.f32.f32 \t%r4, %r3;", [-1.5, 2.5], [-2, 2]),
        ("cvt.rni.f32.f32 \t%r4, %r3;", [-1.5, 2.5], [-2, 2]),
        ("cvt.rn.bf16.f32 \t%rs1, %r3;\n\tcvt.f32.bf16 \t%r4, %rs1;", [1 + 2**-8, 1 + 3 * 2**-8], [1, 1 + 2**-6]),
        ("cvt.rn.f16.f32 \t%rs1, %r3;\n\tcvt.f32.f16 \t%r4, %rs1;", [1 + 2**-11, 1e6], [1, INF]),
        ("ex2.approx.f32 \t%r4, %r3;", [3, -1, -INF], [8, 0.5, 0]),
        ("div.full.f32 \t%r4, %r3, 0f40000000;", [3], [1.5]),
        ("sqrt.approx.f32 \t%r4, %r3;", [9], [3]),
    ],
)
def test_floats(line, values, wanted):
    assert compute(line, values).tolist() == wanted


def test_not_a_number():
    assert np.isnan(compute("max.NaN.f32 \t%r4, %r3, 0f3F800000;", [NAN]))[0]
    assert compute("sub.f32 \t%r4, %r3, %r3;", [INF], out=U32)[0] == 0x7FFFFFFF  # the NaN of a GPU, not of a CPU
    tests = {
        "ne": [0, 1, 0], "neu": [0, 1, 1], "eq": [1, 0, 0], "equ": [1, 0, 1], "geu": [1, 1, 1], "ltu": [0, 0, 1],
        "nan": [0, 0, 1], "num": [1, 1, 0],
    }  # fmt: skip
    for compare, wanted in tests.items():
        lines = f"setp.{compare}.f32 \t%p1, %r3, 0f3F800000;\n\tselp.b32 \t%r4, 1, 0, %p1;"
        assert compute(lines, [1, 2, NAN], out=S32).tolist() == wanted, compare


def test_signed_zeros():
    assert np.signbit(compute("min.f32 \t%r4, %r3, 0f00000000;", [-0.0]))[0]
    assert not np.signbit(compute("max.f32 \t%r4, %r3, 0f80000000;", [0.0]))[0]


def test_conversions_to_integers():
    wanted = [1, -1, 2**31 - 1, -(2**31), 0]
    assert compute("cvt.rzi.s32.f32 \t%r4, %r3;", [1.9, -1.9, 3e9, -3e9, NAN], out=S32).tolist() == wanted


def test_fma_rounds_once():
    assert compute("fma.rn.f32 \t%r4, %r3, %r3, 0fBF800000;", [1 + 2**-12])[0] == np.float32(2**-11 + 2**-24)
    lines = "fma.rn.f64 \t%rd11, %rd10, %rd10, 0dBFF0000000000000;"
    assert compute_wide(lines, [1 + 2**-30], np.float64)[0] == 2**-29 + 2**-60


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
def test_pairs(kind):
    lines = f"""cvt.rn.{kind}.f32 	%r5, %r3, 0f40400000;
	fma.rn.{kind} 	%r6, %r5, %r5, %r5;
	mov.b32 	{{%rs1, %rs2}}, %r6;
	cvt.f32.{kind[:-2]} 	%r4, %rs"""
    assert compute(lines + "2;", [0.5, -2]).tolist() == [0.75, 2]  # the first operand is the upper half
    assert compute(lines + "1;", [0.5, -2]).tolist() == [12, 12]


def test_pairs_of_integers():
    assert compute("max.s16x2 \t%r4, %r3, 0;", [0xFFFF0005, 0x7FFF8000], U32).tolist() == [5, 0x7FFF0000]
    assert compute("add.u16x2 \t%r4, %r3, %r3;", [0x8001FFFF], U32).tolist() == [0x0002FFFE]


def test_half_arithmetic():
    lines = "cvt.rn.f16.f32 \t%rs1, %r3;\n\tadd.f16 \t%rs2, %rs1, %rs1;\n\tcvt.f32.f16 \t%r4, %rs2;"
    assert compute(lines, [1.5, 40000]).tolist() == [3, INF]
    lines = "cvt.rn.bf16.f32 \t%rs1, %r3;\n\tmul.bf16 \t%rs2, %rs1, %rs1;\n\tcvt.f32.bf16 \t%r4, %rs2;"
    assert compute(lines, [1.5, 1 + 2**-7]).tolist() == [2.25, 1 + 2**-6]


def test_warps():
    lanes = np.arange(64)
    assert compute("shfl.sync.up.b32 \t%r4, %r3, 2, 0, -1;", lanes, S32)[:5].tolist() == [0, 1, 0, 1, 2]
    assert compute("shfl.sync.down.b32 \t%r4, %r3, 2, 31, -1;", lanes, S32)[28:34].tolist() == [30, 31, 30, 31, 34, 35]
    assert compute("shfl.sync.bfly.b32 \t%r4, %r3, 1, 31, -1;", lanes, S32)[:4].tolist() == [1, 0, 3, 2]
    assert compute("shfl.sync.idx.b32 \t%r4, %r3, 3, 31, -1;", lanes, S32)[[0, 31, 32]].tolist() == [3, 3, 35]
    assert compute("redux.sync.add.s32 \t%r4, %r3, -1;", np.ones(64), S32)[40] == 32
    lines = "setp.lt.s32 \t%p1, %r3, 34;\n\tvote.sync.{}.{} \t{}, %p1, -1;{}"
    assert compute(lines.format("ballot", "b32", "%r4", ""), lanes, U32)[[0, 32]].tolist() == [2**32 - 1, 3]
    select = "\n\tselp.b32 \t%r4, 1, 0, %p2;"
    assert compute(lines.format("any", "pred", "%p2", select), lanes, S32)[[0, 32]].tolist() == [1, 1]
    assert compute(lines.format("all", "pred", "%p2", select), lanes, S32)[[0, 32]].tolist() == [1, 0]


def test_predicates_keep_what_was_there():
    lines = "mov.b32 \t%r4, 7;\n\tsetp.gt.s32 \t%p1, %r3, 1;\n\t@!%p1 add.s32 \t%r4, %r3, 0;"
    assert compute(lines, [1, 2], S32).tolist() == [1, 7]


def test_noise_is_within_what_is_documented():
    body = "\tld.global.b32 \t%r3, [%rd4];\n\t{} \t%r4, %r3;\n\tst.global.b32 \t[%rd5], %r4;\n"
    values = np.linspace(0.1, 3, 64, dtype=np.float32)
    exact = launch(body.format("ex2.approx.f32"), values)[0][:256].view(S32)
    off = [
        launch(body.format("ex2.approx.f32"), values, noise=True, seed=s)[0][:256].view(S32) - exact for s in range(4)
    ]
    assert {int(abs(o).max()) for o in off} == {2}
    same = launch(body.format("sqrt.rn.f32"), values, noise=True)[0]
    assert (same == launch(body.format("sqrt.rn.f32"), values)[0]).all()


@pytest.mark.parametrize(
    "line",
    ["tex.1d.v4.f32.s32 \t{%r4, %r5, %r6, %r7}, [%rd1, {%r3}];", "call.uni \tfoo, ();", "add.rz.f32 \t%r4, %r3, %r3;",
     "bar.sync \t1, 32;", "mov.u32 \t%r4, %smid;", "shfl.sync.bfly.b32 \t%r4, %r3, 1, 31, 255;",
     "add.e4m3 \t%rs1, %rs1, %rs1;"],
)  # fmt: skip
def test_what_is_not_emulated_is_refused(line):
    with pytest.raises(Fault, match="not"):
        launch(f"\t{line}\n")


def test_programs_are_read_once_and_refused_without_a_kernel():
    with pytest.raises(Fault, match="without a kernel"):
        Program(".version 8.4")
    assert faults("\tmov.u32 \t%r4, %nctaid.x;\n", grid=2) == set()


def moved(body: str, way: str) -> tuple[np.ndarray, np.ndarray]:
    """What a warp makes of 8 x 8 numbers, and what it should: them, or where the ``way`` says so their transpose."""
    matrix = np.arange(64, dtype=np.uint16).reshape(8, 8)
    data, report = launch(body, matrix, warps=1)
    assert not report.faults
    return data[:128].view(np.uint16).reshape(8, 8), matrix.T if way else matrix


@pytest.mark.parametrize("way", ["", ".trans"])
def test_a_matrix_is_stored_by_rows_or_by_columns(way):
    """Of 8 x 8 numbers each thread has two of a row."""
    body = f"""
	mov.b32 	%r10, global_smem;
	and.b32 	%r11, %r1, 7;
	shl.b32 	%r12, %r11, 4;
	add.s32 	%r13, %r10, %r12;
	ld.global.b32 	%r3, [%rd4];
	stmatrix.sync.aligned.m8n8.x1{way}.shared.b16 	[%r13], {{%r3}};
	bar.sync 	0;
	shl.b32 	%r14, %r1, 2;
	add.s32 	%r15, %r10, %r14;
	ld.shared.b32 	%r4, [%r15];
	st.global.b32 	[%rd5], %r4;
"""
    assert np.array_equal(*moved(body, way))


@pytest.mark.parametrize("way", ["", ".trans"])
def test_a_matrix_is_loaded_by_rows_or_by_columns(way):
    """Each thread gets two numbers of a row, or of a column."""
    body = f"""
	mov.b32 	%r10, global_smem;
	shl.b32 	%r14, %r1, 2;
	add.s32 	%r15, %r10, %r14;
	ld.global.b32 	%r3, [%rd4];
	st.shared.b32 	[%r15], %r3;
	bar.sync 	0;
	and.b32 	%r11, %r1, 7;
	shl.b32 	%r12, %r11, 4;
	add.s32 	%r13, %r10, %r12;
	ldmatrix.sync.aligned.m8n8.x1{way}.shared.b16 	{{%r4}}, [%r13];
	st.global.b32 	[%rd5], %r4;
"""
    assert np.array_equal(*moved(body, way))
