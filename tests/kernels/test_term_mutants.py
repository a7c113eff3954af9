"""Of every term of the table each output made a little wrong: its check must see that."""

import pytest
import triton
import triton.language as tl  # noqa: F401 (the interpreter looks for it)
from fusedyolo.kernels.terms import box, decode, label, offset
from fusedyolo.kernels.terms.records import Jacobian, Span
from oracle import check_box_term, check_label_term, check_row_term, label_numbers
from test_tails import check_decoded, check_offset
from torch import float64

from fusedyolo.terms import TERMS

pytestmark = pytest.mark.interpreter("compiled kernels keep the functions they were compiled with")

# of this module, for the functions below: the real term, and what its outputs are multiplied by
REAL = None
FACTORS = [1.0] * 5


@triton.jit
def wrong_box(x, y, args, extent):
    loss, by_x, by_y = REAL(x, y, args, extent)
    by_x = Span(by_x.centre * FACTORS[1], by_x.size * FACTORS[2])
    return loss * FACTORS[0], by_x, Span(by_y.centre * FACTORS[3], by_y.size * FACTORS[4])


@triton.jit
def wrong_label(x, t, args):
    loss, d_x = REAL(x, t, args)
    return loss * FACTORS[0], d_x * FACTORS[1]


@triton.jit
def wrong_offset(a, b, true_a, true_b, scale):
    loss, d_a, d_b = REAL(a, b, true_a, true_b, scale)
    return loss * FACTORS[0], d_a * FACTORS[1], d_b * FACTORS[2]


@triton.jit
def wrong_decode(a, b, anchor, stride, scale):
    span, by = REAL(a, b, anchor, stride, scale)
    jacobian = Jacobian(
        by.centre_by_a * FACTORS[2], by.centre_by_b * FACTORS[3], by.size_by_a * FACTORS[2], by.size_by_b * FACTORS[3]
    )
    return Span(span.centre * FACTORS[0], span.size * FACTORS[1]), jacobian


def check_labels(kind):
    check_label_term(kind, label_numbers(kind)[0])


ROOMS = {
    "box": (box, wrong_box, 5, check_box_term),
    "label": (label, wrong_label, 2, check_labels),
    "offset": (offset, wrong_offset, 3, lambda kind: check_offset(kind, float64)),
    "decode": (decode, wrong_decode, 4, lambda axis: check_decoded("ciou", axis, float64)),
}
OUTPUTS = [(name, output) for name, term in TERMS.items() for output in range(ROOMS[term.room][2])]


@pytest.mark.parametrize(("name", "output"), OUTPUTS)
def test_a_wrong_output_is_caught(name, output, monkeypatch):
    term = TERMS[name]
    module, wrong, outputs, check = ROOMS[term.room]
    if not term.elementwise:
        check = check_row_term
    monkeypatch.setitem(globals(), "REAL", term.kernel)
    monkeypatch.setattr(module, name, wrong)
    check(name)
    monkeypatch.setitem(globals(), "FACTORS", [1.001 if i == output else 1.0 for i in range(outputs)])
    with pytest.raises(AssertionError):
        check(name)
