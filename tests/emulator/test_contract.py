"""Products and sums fused by a seed."""

import re

import numpy as np
from emulator.hand import HEAD, launch

from fusedyolo.emulator.contract import contract

LOAD, STORE = "\tld.global.b32 \t%r3, [%rd4];\n", "\tst.global.b32 \t[%rd5], %r9;\n"
VALUES = np.full(64, 1 + 2**-12, np.float32)
MINUS_ONE = "0fBF800000"


def value(body):
    """On every thread the same."""
    data, report = launch(LOAD + body + STORE, VALUES)
    assert not report.faults
    return data[:4].view(np.float32)[0]


def both(body):
    """As written, and all fused."""
    return value(body), value(contract(body, 0, 1.0))


def test_each_kind_of_sum():
    square = "\tmul.f32 \t%r8, %r3, %r3;\n"
    apart, fused = both(square + f"\tadd.f32 \t%r9, %r8, {MINUS_ONE};\n")
    assert (apart, fused) == (np.float32(2**-11), np.float32(2**-11 + 2**-24))
    assert both(square + f"\tadd.f32 \t%r9, {MINUS_ONE}, %r8;\n") == (apart, fused)
    assert both(square + "\tmov.b32 \t%r7, 0f3F800000;\n\tsub.f32 \t%r9, %r8, %r7;\n") == (apart, fused)
    assert both(square + "\tmov.b32 \t%r7, 0f3F800000;\n\tsub.f32 \t%r9, %r7, %r8;\n") == (-apart, -fused)


def test_only_products_that_still_hold():
    square = "\tmul.f32 \t%r8, %r3, %r3;\n"
    total = f"\tadd.f32 \t%r9, %r8, {MINUS_ONE};\n"
    for between in ("\tmov.b32 \t%r3, 0;\n", "\tmov.b32 \t%r8, 0;\n", "$L__a:\n", "\t@%p1 bra \t$L__a;\n"):
        assert contract(square + between + total, 0, 1.0) == square + between + total
    rounded = "\tmul.rn.f32 \t%r8, %r3, %r3;\n"
    assert "fma" not in contract(rounded + total, 0, 1.0)
    assert "fma" not in contract(square + total.replace("add.f32", "add.rn.f32"), 0, 1.0)
    own = "\tmul.f32 \t%r3, %r3, %r3;\n\tadd.f32 \t%r9, %r3, %r2;\n"
    assert "fma" not in contract(own, 0, 1.0)


def test_by_seed():
    pair = "\tmul.f32 \t%r{0}, %r1, %r2;\n\tadd.f32 \t%r{1}, %r{0}, %r3;\n"
    text = "".join(pair.format(2 * i + 10, 2 * i + 11) for i in range(40))
    counts = [contract(text, seed).count("fma") for seed in range(4)]
    assert contract(text, 1) == contract(text, 1) != contract(text, 2)
    assert all(8 < count < 32 for count in counts)
    assert contract(text, 0, 0.0) == text


def test_registers_are_declared():
    text = HEAD.replace("{\n", "{\n\t.reg .b32 \t%r<10>;\n", 1)
    text += "\tmul.f32 \t%r8, %r3, %r3;\n\tsub.f32 \t%r9, %r7, %r8;\n"
    out = contract(text, 0, 1.0)
    declared = int(re.search(r"%r<(\d+)>", out)[1])
    assert max(int(n) for n in re.findall(r"%r(\d+)", out)) < declared
