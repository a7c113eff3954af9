"""Triton's interpreter, where there is no GPU to run kernels on."""

from __future__ import annotations

import os


def prepare() -> None:
    """Choose the interpreter, before any kernel is imported, and make its calls between device functions cheap.

    Each such call searches all of ``triton.language`` for what to patch (half a millisecond); once for each module
    that defines device functions is enough, for these patches stay.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    patched = set()

    def call(self, *args, **kwargs):
        if self.fn.__module__ not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
