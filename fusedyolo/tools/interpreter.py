"""Triton's interpreter, where there is no GPU to run kernels on."""

from __future__ import annotations

import os


def prepare() -> None:
    """Choose the interpreter, before any kernel is imported, let it compute as a GPU does, and make it faster.

    The larger and the smaller of two floats drop a NaN on a GPU, unless told to propagate it; the interpreter knows
    that of its reductions only. A fused product and sum is rounded once; there it is rounded twice. And each of its
    calls between device functions searches all of ``triton.language`` for what to patch (half a millisecond); once for
    each module that defines such functions is enough, for these patches stay. Nor has the table of NumPy's types to be
    made anew for each operation.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    import numpy as np
    from triton.runtime import interpreter

    def fma(self, x, y, z):
        wide = np.float64 if x.data.dtype == np.float32 else x.data.dtype  # in which a product of float32 is exact
        total = x.data.astype(wide) * y.data.astype(wide) + z.data.astype(wide)
        return interpreter.TensorHandle(total.astype(x.data.dtype), x.dtype.scalar)

    builder = interpreter.InterpreterBuilder
    builder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    builder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
    builder.create_fma = fma

    find, types = interpreter._get_np_dtype, {}

    def np_dtype(dtype):
        name = dtype.scalar.name
        if name not in types:
            types[name] = find(dtype)
        return types[name]

    interpreter._get_np_dtype = np_dtype

    patched = set()

    def call(self, *args, **kwargs):
        if self.fn.__module__ not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
