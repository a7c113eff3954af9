"""Shortcuts through Triton's interpreter give what its long way gives: type, shape and bits."""

import os
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
import triton
import triton.language as tl
from triton.runtime import interpreter

shortcuts = pytest.importorskip("fusedyolo.tools.shortcuts")
pytestmark = [
    pytest.mark.interpreter("it is the interpreter that is shortened"),
    pytest.mark.skipif(triton.__version__.startswith("3.9."), reason="another sign of NaNs, wider integers"),
]


class Long(interpreter.TritonSemantic):
    """Triton's own rules."""

    broadcast_impl_value = shortcuts._broadcast_any


SEMANTIC = Long(interpreter.interpreter_builder)
LONG_WAY = {
    "add": lambda a, b: SEMANTIC.add(a, b, False),
    "sub": lambda a, b: SEMANTIC.sub(a, b, False),
    "mul": lambda a, b: SEMANTIC.mul(a, b, False),
    "truediv": SEMANTIC.truediv,
    "floordiv": SEMANTIC.floordiv,
    "mod": SEMANTIC.mod,
    "and": SEMANTIC.and_,
    "or": SEMANTIC.or_,
    "xor": SEMANTIC.xor_,
    "lt": lambda a, b: SEMANTIC.less_than(SEMANTIC.to_tensor(a), SEMANTIC.to_tensor(b)),
    "le": lambda a, b: SEMANTIC.less_equal(SEMANTIC.to_tensor(a), SEMANTIC.to_tensor(b)),
    "gt": lambda a, b: SEMANTIC.greater_than(SEMANTIC.to_tensor(a), SEMANTIC.to_tensor(b)),
    "ge": lambda a, b: SEMANTIC.greater_equal(SEMANTIC.to_tensor(a), SEMANTIC.to_tensor(b)),
    "eq": lambda a, b: SEMANTIC.equal(SEMANTIC.to_tensor(a), SEMANTIC.to_tensor(b)),
    "ne": lambda a, b: SEMANTIC.not_equal(SEMANTIC.to_tensor(a), SEMANTIC.to_tensor(b)),
}
TYPES = [tl.int1, tl.int32, tl.int64, tl.float32, tl.float64]
SHAPES = [(), (8,), (1, 4), (2, 1), (2, 4)]
NUMBERS = [0, 1, -3, 5, 2**40, 0.0, -0.0, 0.1, 1e-40, 1e300, float("inf"), float("nan"), True]
VALUES = np.array([7, -3, 0, 1, -1, 2, 11, -8, 5, 3])


def tensor(dtype: tl.dtype, shape: tuple[int, ...], first: int = 0) -> tl.tensor:
    """Integers; of floats also some that are none, an infinity and a NaN."""
    data = np.resize(np.roll(VALUES, first), shape or (1,)).astype(interpreter._get_np_dtype(dtype))
    if dtype.is_floating():
        data = data / 3
        data.flat[::5], data.flat[::7] = (np.nan, np.inf) if first else (np.inf, np.nan)
    handle = interpreter.TensorHandle(data.astype(interpreter._get_np_dtype(dtype)), dtype)
    return tl.tensor(handle, tl.block_type(dtype, [*shape]) if shape else dtype)


def outcome(run, *args) -> object:
    """The type, and the bits of what is true or a number; or what is raised."""
    try:
        with np.errstate(all="ignore"):
            found = run(*args)
    except (TypeError, ValueError, AttributeError, triton.language.semantic.IncompatibleTypeErrorImpl) as error:
        return type(error)
    data = found.handle.data
    data = np.broadcast_to(data != 0 if found.dtype is tl.int1 else data, tuple(map(int, found.shape)) or (1,))
    return str(found.type), data.dtype, data.shape, np.ascontiguousarray(data).tobytes(), found.numel.value


@pytest.mark.parametrize("name", LONG_WAY)
def test_operators(name):
    """Of tensors of any two types and shapes, and of a tensor and a number on either side."""
    long_way, short = LONG_WAY[name], getattr(tl.tensor, f"__{name}__")
    assert set(LONG_WAY) == set(shortcuts._OPERATORS)
    for left in (tensor(dtype, shape) for dtype in TYPES for shape in SHAPES):
        for right in [tensor(dtype, shape, 3) for dtype in TYPES for shape in SHAPES] + NUMBERS:
            assert outcome(short, left, right) == outcome(long_way, left, right), (left.type, right)
        for number in NUMBERS if name not in shortcuts._COMPARISONS else []:
            reflected = getattr(tl.tensor, f"__r{name}__")
            assert outcome(reflected, left, number) == outcome(long_way, number, left), (number, left.type)


def test_pointers():
    pointers = tl.tensor(
        interpreter.TensorHandle(np.arange(2, dtype=np.uint64).reshape(2, 1), tl.pointer_type(tl.float32)),
        tl.block_type(tl.pointer_type(tl.float32), [2, 1]),
    )
    one = tl.tensor(interpreter.TensorHandle(np.array([64], np.uint64), pointers.dtype), pointers.dtype)
    for pointer in (pointers, one):
        for offset in [tensor(dtype, shape) for dtype in TYPES for shape in ((), (1, 4))] + [3, 0.5]:
            assert outcome(tl.tensor.__add__, pointer, offset) == outcome(LONG_WAY["add"], pointer, offset)


@pytest.mark.parametrize("condition", SHAPES)
def test_where(condition):
    condition = tensor(tl.int1, condition)
    choices = [tensor(dtype, shape, 3) for dtype in TYPES for shape in SHAPES] + NUMBERS
    for x in choices:
        for y in choices:
            assert outcome(tl.where, condition, x, y) == outcome(SEMANTIC.where, condition, x, y), (x, y)


@pytest.mark.parametrize("name", ["maximum", "minimum"])
@pytest.mark.parametrize("nan", [tl.PropagateNan.NONE, tl.PropagateNan.ALL])
def test_larger_and_smaller(name, nan):
    short, long_way = getattr(tl, name), getattr(SEMANTIC, name)
    values = [tensor(dtype, shape, first) for dtype in TYPES for shape in SHAPES for first in (0, 3)]
    for x in values:
        for y in values:
            found = outcome(lambda *args: short(*args, nan, _semantic=interpreter.interpreter_semantic), x, y)
            assert found == outcome(long_way, x, y, nan), (x.type, y.type)


def test_sort(monkeypatch):
    monkeypatch.setattr(shortcuts, "_patched", set())  # outside of a launch the language is what the last one has left
    for x in (tensor(dtype, shape) for dtype in (tl.int32, tl.int64) for shape in ((8,), (2, 4))):
        for descending in (False, True):
            assert outcome(tl.sort, x, None, descending) == outcome(shortcuts._sort_any, x, None, descending)


class Unconvertible(np.ndarray):
    """As NumPy 2.5 has arrays of one axis: no number is made of them but by ``item``."""

    def __int__(self):
        raise TypeError("only 0-dimensional arrays can be converted")


def test_an_index_is_made_of_no_array():
    interpreter_of_ours = import_module("fusedyolo.tools.interpreter")
    assert interpreter._patch_lang_tensor.__module__ == interpreter_of_ours.__name__
    scope = interpreter._LangPatchScope()
    try:
        interpreter._patch_lang_tensor(tl.tensor, scope)
        found = tl.tensor(interpreter.TensorHandle(np.array([3], np.int32).view(Unconvertible), tl.int32), tl.int32)
        assert range(5)[found] == 3
    finally:
        scope.restore()


def test_the_variable_alone_chooses_an_interpreter_that_computes_as_a_gpu_does():
    """Nobody prepares it: gains of 0 multiply truth values that are scalars, which it takes for floats as it comes."""
    code = (
        "import torch, fusedyolo\n"
        "from triton.runtime.interpreter import InterpreterBuilder\n"
        "loss = fusedyolo.YOLOv5Loss([[(10, 13)]], [8], 1, backend='triton')\n"  # one class: classes are not trained
        "preds = torch.randn(1, 6, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()\n"
        "rows = torch.tensor([[0, 0, 0.4, 0.5, 0.2, 0.2]])\n"
        "loss([preds], rows).total.backward()\n"
        "print(preds.grad.abs().sum().item() > 0, InterpreterBuilder.create_fma.__module__)\n"
    )
    env = os.environ | {"TRITON_INTERPRET": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["True", "fusedyolo.tools.interpreter"]
