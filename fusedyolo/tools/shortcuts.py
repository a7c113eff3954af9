"""Shortcuts through Triton's interpreter, which takes a hundred times longer to find out how to add two tensors than to
add them.

Imported once the interpreter is chosen. Each gives what the interpreter gives, bit by bit, by the same methods of its
builder; what is not of one of the few types that kernels compute in goes the long way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_BUILDER, _SEMANTIC = interpreter.interpreter_builder, interpreter.interpreter_semantic
_OPERATORS = {
    "add": ("create_fadd", "create_add", None),
    "sub": ("create_fsub", "create_sub", None),
    "mul": ("create_fmul", "create_mul", None),
    "truediv": ("create_fdiv", None, None),
    "floordiv": (None, "create_sdiv", None),
    "mod": ("create_frem", "create_srem", None),
    "and": (None, "create_and", "create_and"),
    "or": (None, "create_or", "create_or"),
    "xor": (None, "create_xor", "create_xor"),
    "lt": ("create_fcmpOLT", "create_icmpSLT", None),
    "le": ("create_fcmpOLE", "create_icmpSLE", None),
    "gt": ("create_fcmpOGT", "create_icmpSGT", None),
    "ge": ("create_fcmpOGE", "create_icmpSGE", None),
    "eq": ("create_fcmpOEQ", "create_icmpEQ", "create_icmpEQ"),
    "ne": ("create_fcmpUNE", "create_icmpNE", "create_icmpNE"),
}  # of tensors, and the builder's methods for floats, for integers and for booleans
_TYPES = {dtype.name: dtype for dtype in (tl.float32, tl.float64, tl.int32, tl.int64, tl.int1)}
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")


@cache
def install() -> None:
    """Take them all, for as long as the process lives."""
    # a sum of integers is checked for overflow by arithmetic whose result, outside of Triton's debug mode, nobody reads
    _BUILDER.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter._get_np_dtype = _np_dtype
    interpreter.InterpretedFunction.__call__ = _call
    tl.block_type.__new__, tl.block_type.__init__ = _new_block_type, lambda self, element_ty, shape: None
    tl.tensor.__init__ = _init_tensor
    interpreter.TritonSemantic.broadcast_impl_value = _broadcast
    tl.where, tl.sort = _where, _sort
    for name in _OPERATORS:
        setattr(tl.tensor, f"__{name}__", _operator(name))
        if name not in _COMPARISONS:
            setattr(tl.tensor, f"__r{name}__", _operator(name, reflected=True))


# ---- what is looked up again and again

_find_np_dtype = interpreter._get_np_dtype
_init_any_block_type = tl.block_type.__init__
_where_any, _sort_any = tl.where, tl.sort
_broadcast_any = interpreter.TritonSemantic.broadcast_impl_value
_np_dtypes: dict[str, np.dtype] = {}
_block_types: dict[tuple[str, tuple[int, ...]], tl.block_type] = {}
_patched: set[str] = set()


def _np_dtype(dtype: tl.dtype) -> np.dtype:
    name = dtype.scalar.name
    if name not in _np_dtypes:
        _np_dtypes[name] = _find_np_dtype(dtype)
    return _np_dtypes[name]


def _call(self, *args, **kwargs):
    """A device function. What Triton patches for one (it searches all of its language for that) stays patched, so once
    for each module that defines such functions is enough.
    """
    if self.fn.__module__ not in _patched:
        interpreter._patch_lang(self.fn)
        _patched.add(self.fn.__module__)
    return self.rewrite()(*args, **kwargs)


def _new_block_type(cls, element_ty: tl.dtype, shape: Any) -> tl.block_type:
    """One object for each element type and shape."""
    key = element_ty.name, tuple([size.value if size.__class__ is tl.constexpr else size for size in shape])
    known = _block_types.get(key)
    if known is None:
        known = _block_types[key] = object.__new__(cls)
        _init_any_block_type(known, element_ty, shape)
    return known


def _block_type(element_ty: tl.dtype, shape: tuple[int, ...]) -> tl.block_type:
    return _block_types.get((element_ty.name, shape)) or tl.block_type(element_ty, [*shape])


def _init_tensor(self, handle: interpreter.TensorHandle, type: tl.dtype) -> None:
    """With the shape, and the number of elements, that every tensor of a type has."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    known = vars(type)
    if "tensor_shape" not in known:
        shape = type.shape if type.is_block() else ()
        type.tensor_shape = tl.tuple([tl.constexpr(size) for size in shape])
        type.tensor_numel = tl.constexpr(math.prod(shape))
    self.shape, self.numel = known["tensor_shape"], known["tensor_numel"]


# ---- operators


@cache
def _constant(value: float, kind: type, name: str, compared: bool) -> interpreter.TensorHandle | None:
    """A number (its class tells 1 from True) beside a tensor of the type of a name, if the result is of that type."""
    dtype = _TYPES[name]
    scalar = tl.tensor(_BUILDER.get_null_value(dtype), dtype)
    try:
        scalar, number = _SEMANTIC.binary_op_type_checking_impl(
            scalar, _SEMANTIC.to_tensor(value) if compared else value
        )
    except (TypeError, ValueError):
        return None  # and Triton will say why
    return number.handle if scalar.dtype is dtype else None


def _operator(name: str, reflected: bool = False) -> Callable:
    """A method of tensors. Of two tensors of one type, or a tensor and a number, nothing is to be found out, and NumPy
    broadcasts by itself.
    """
    member = getattr(tl.tensor, f"__{'r' * reflected}{name}__")
    floats, integers, bools = _OPERATORS[name]
    methods = {"fp32": floats, "fp64": floats, "int32": integers, "int64": integers, "int1": bools}
    compared, adds = name in _COMPARISONS, name == "add"
    tensor, block_type, pointer_type, constexpr, int1 = tl.tensor, tl.block_type, tl.pointer_type, tl.constexpr, tl.int1

    def operate(self, other, _semantic=None):
        if other.__class__ is constexpr:
            other = other.value
        dtype, left, right = self.dtype, self.handle, None
        is_block = self.type.__class__ is block_type
        method, kind = methods.get(dtype.name), other.__class__
        if kind is tensor:
            other_block, other_dtype = other.type.__class__ is block_type, other.dtype
            if adds and dtype.__class__ is pointer_type and other_dtype.name in ("int32", "int64"):
                method = "create_addptr"
            elif other_dtype is not dtype:
                method = None
            if is_block is not other_block or left.data.ndim == other.handle.data.ndim:
                right, is_block = other.handle, is_block or other_block
        elif method is not None and (kind is int or kind is float):
            right = _constant(other, kind, dtype.name, compared)
        if method is None or right is None:
            return member(self, other, _semantic=_SEMANTIC)
        if left.data.ndim != right.data.ndim:
            left, right = _splat(left, right)
        handle = getattr(_BUILDER, method)(right, left) if reflected else getattr(_BUILDER, method)(left, right)
        element = int1 if compared else dtype
        return tensor(handle, _block_type(element, handle.data.shape) if is_block else element)

    return operate


def _where(condition, x, y, _semantic=None):
    """``tl.where``, likewise."""
    x, y = (value.value if value.__class__ is tl.constexpr else value for value in (x, y))
    dtype = getattr(x, "dtype", None) or getattr(y, "dtype", None)
    if dtype is not None and dtype.name in _TYPES and getattr(condition, "dtype", None) is tl.int1:
        handles = [condition.handle, _handle(x, dtype), _handle(y, dtype)]
        values = [value for value in (condition, x, y) if value.__class__ is tl.tensor]
        ranks = {value.handle.data.ndim for value in values if value.type.__class__ is tl.block_type}
        if None not in handles and len(ranks) < 2:
            handle = _BUILDER.create_select(*_splat(*handles))
            return tl.tensor(handle, _block_type(dtype, handle.data.shape) if ranks else dtype)
    return _where_any(condition, x, y, _semantic=_SEMANTIC)


def _handle(value: Any, dtype: tl.dtype) -> interpreter.TensorHandle | None:
    """Of a tensor or a number that needs no conversion to a type."""
    if value.__class__ is tl.tensor:
        return value.handle if value.dtype is dtype else None
    kind: Any = value.__class__
    return _constant(value, kind, dtype.name, False) if kind is int or kind is float else None


def _splat(*handles: interpreter.TensorHandle) -> list[interpreter.TensorHandle]:
    """Scalars beside blocks of several axes as such blocks: the layout of what NumPy computes follows that of all
    operands, and the order in which it adds up floats follows the layout.
    """
    shape = max((handle.data.shape for handle in handles), key=len)
    if len(shape) == 1:
        return [*handles]
    full = np.broadcast_shapes(*(handle.data.shape for handle in handles if handle.data.ndim == len(shape)))
    return [
        handle
        if handle.data.ndim == len(shape)
        else interpreter.TensorHandle(np.full(full, handle.data, dtype=handle.data.dtype), handle.dtype)
        for handle in handles
    ]


def _sort(x, dim=None, descending=False):
    """``tl.sort``, whose network of comparisons gives integers the one order that they have."""
    if dim is None and not descending and x.dtype in (tl.int32, tl.int64):
        return tl.tensor(interpreter.TensorHandle(np.sort(x.handle.data, axis=-1), x.dtype), x.type)
    return _sort_any(x, dim, descending)


def _broadcast(self, lhs, rhs):
    """What is of one shape is left as it is."""
    blocks = (lhs.type.__class__ is tl.block_type) + (rhs.type.__class__ is tl.block_type)
    if blocks == 0 or (blocks == 2 and lhs.handle.data.shape == rhs.handle.data.shape):
        return lhs, rhs
    return _broadcast_any(self, lhs, rhs)
