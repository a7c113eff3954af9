"""Triton's interpreter, where there is no GPU to run kernels on."""

from __future__ import annotations

import os


def prepare() -> None:
    """Choose the interpreter, before any kernel is imported, let it treat NaN as a GPU does, and make it faster.

    The larger and the smaller of two floats drop a NaN on a GPU, unless told to keep it; the interpreter knows that
    of its reductions only. And each of its calls between device functions searches all of ``triton.language`` for what
    to patch (half a millisecond); once for each module that has some is enough, for these patches stay.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    import numpy as np
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    builder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    builder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)

    patched = set()

    def call(self, *args, **kwargs):
        if self.fn.__module__ not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
