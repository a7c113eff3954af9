"""Triton's interpreter, where there is no GPU to run kernels on."""

from __future__ import annotations

import os
from functools import cache


@cache
def prepare() -> None:
    """Choose the interpreter, before any kernel is imported, let it compute as a GPU does, and make it faster.

    The larger and the smaller of two floats drop a NaN on a GPU, unless told to propagate it; the interpreter knows
    that of its reductions only. A fused product and sum is rounded once; there it is rounded twice. A float32 that is
    stored as bfloat16 is rounded to the nearest, of two the even one; there it is cut off. That of Triton 3.6 makes an
    integer of an array of one axis, which NumPy 2.5 no longer does. How it is made faster is in
    ``shortcuts.py``.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    from . import shortcuts

    def fma(self, x, y, z):
        wide = np.float64 if x.data.dtype == np.float32 else x.data.dtype  # in which a product of float32 is exact
        total = x.data.astype(wide) * y.data.astype(wide) + z.data.astype(wide)
        return interpreter.TensorHandle(total.astype(x.data.dtype), x.dtype.scalar)

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor_and_index
    cast = interpreter.InterpreterBuilder.cast_impl

    def trunc(self, src, dst_type):
        if dst_type.scalar is not tl.bfloat16 or src.data.dtype != np.float32:
            return cast(self, src, dst_type)
        bits = np.ascontiguousarray(src.data).view(np.uint32)
        nearest = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
        data = np.where(np.isnan(src.data), (bits >> 16) | 0x40, nearest).astype(np.uint16)
        return interpreter.TensorHandle(data, tl.bfloat16)

    builder = interpreter.InterpreterBuilder
    builder.create_fp_trunc = trunc
    builder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    builder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
    builder.create_fma = fma
    shortcuts.install()
