"""The operands of a segment as Python: registers become local variables, each seen as the types it is used as."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from .arithmetic import F32, F64, TYPES, U32, U64
from .ptx import Fault, Instruction, Program, is_register, register_class, width

_BY_THREAD = {"%tid.x": "E.tid[L]", "%ctaid.x": "E.ctaid[L]", "%laneid": "(E.tid[L] % U32(32))"}
_BY_LAUNCH = {"%nctaid.x": "E.grid_size", "%ntid.x": "E.program_size"}
_ALWAYS = {
    "%tid.y": 0, "%tid.z": 0, "%ctaid.y": 0, "%ctaid.z": 0, "%ntid.y": 1, "%ntid.z": 1, "%nctaid.y": 1, "%nctaid.z": 1,
}  # fmt: skip


def code_of(kind: str) -> str:
    """The type of a kind as numpy spells it in a string."""
    return np.dtype(TYPES[kind]).str


class Operands:
    """Lines of a function being written, and which variables hold which register.

    In these lines ``E`` is the engine, ``R`` the registers by name, ``P`` the parameters, ``L`` the threads that run.
    """

    def __init__(self, program: Program):
        self.program = program
        self.lines: list[str] = []
        self.constants: dict[str, Any] = {}
        self.one: Instruction
        self._views: dict[str, dict[str, str]] = {}  # of a register: variables by type
        self._written: set[str] = set()
        self._count = 0

    def refuse(self) -> Fault:
        """The error about the current instruction."""
        return Fault(f"not emulated: {self.one.text}")

    def constant(self, value: Any) -> str:
        """A name for a value."""
        name = f"C{len(self.constants)}"
        self.constants[name] = value
        return name

    def _variable(self, stem: str) -> str:
        self._count += 1
        return f"{stem}_{self._count}"

    def get(self, text: str, kind: str) -> str:
        """An expression for an operand as ``kind``."""
        text = text.strip()
        if is_register(text):
            return self._view(text, code_of(kind))
        if text.startswith("%"):
            return self._special(text, kind)
        return self.constant(self._literal(text, kind))

    def _special(self, text: str, kind: str) -> str:
        if text in _ALWAYS:
            return self.constant(TYPES[kind](_ALWAYS[text]))
        if text not in _BY_THREAD and text not in _BY_LAUNCH:
            raise self.refuse()
        return {**_BY_THREAD, **_BY_LAUNCH}[text]

    def _literal(self, text: str, kind: str) -> Any:
        dtype = TYPES[kind]
        if text.startswith("global_smem"):  # all shared memory, which begins at 0
            return dtype(0)
        if text in self.program.parameters:
            return dtype(self.program.parameters[text].place)
        for prefix, bits_type, float_type in (("0f", U32, F32), ("0d", U64, F64)):
            if re.fullmatch(prefix + r"[\dA-Fa-f]+", text):
                bits = bits_type(int(text[2:], 16))
                return bits if dtype is bits_type else dtype(bits.view(float_type))
        try:
            number = int(text.removesuffix("U"), 0)
        except ValueError:
            raise self.refuse() from None
        if kind == "pred":
            return np.bool_(number != 0)
        size = np.dtype(dtype).itemsize
        return np.array([number & (2 ** (8 * size) - 1)], f"u{size}").view(dtype)[0]

    def _view(self, register: str, code: str) -> str:
        if register not in self._views:
            base = self._variable("v" + register[1:])
            self.lines.append(f"{base} = R['{register}'][L]")
            self._views[register] = {np.dtype(register_class(register)[1]).str: base}
        views = self._views[register]
        if code not in views:
            have, source = next(iter(views.items()))
            views[code] = self._variable("v" + register[1:])
            self.lines.append(f"{views[code]} = {self._converted(source, np.dtype(have), np.dtype(code))}")
        return views[code]

    def _converted(self, source: str, have: np.dtype, want: np.dtype) -> str:
        if want.itemsize < have.itemsize:  # the lower bits
            bits = f"canonical({source})" if have.kind == "f" else f"np.asarray({source})"
            return f"{bits}.astype('u{want.itemsize}').view('{want.str}')"
        if want.itemsize > have.itemsize:
            raise self.refuse()
        return f"canonical({source}).view('{want.str}')" if have.kind == "f" else f"{source}.view('{want.str}')"

    def put(self, text: str, expression: str, kind: str) -> None:
        """Assign an expression of ``kind`` to a register, under the predicate of the instruction."""
        text = text.strip()
        if text == "_":
            return
        base_kind, base = register_class(text)
        if kind != "pred" and width(kind) < np.dtype(base).itemsize:  # by its sign
            size = np.dtype(base).itemsize
            wide = f"i{size}" if np.dtype(TYPES[kind]).kind == "i" else f"u{size}"
            narrow = (
                f"canonical({expression})" if kind in ("f16", "f32") else f"np.asarray({expression}, '{code_of(kind)}')"
            )
            expression, kind = f"{narrow}.astype('{wide}').view('{np.dtype(base).str}')", base_kind
        if self.one.predicate is not None:
            expression = f"np.where({self.mask()}, {expression}, {self.get(text, kind)})"
        name = self._variable("v" + text[1:])
        self.lines.append(f"{name} = {expression}")
        self._views[text] = {code_of(kind): name}
        self._written.add(text)

    def mask(self) -> str:
        """Which threads the current instruction is for, ``None`` if for all."""
        if self.one.predicate is None:
            return "None"
        value = self.get(self.one.predicate, "pred")
        return value if self.one.sense else f"~{value}"

    def leave(self) -> None:
        """Put back into the registers what other segments read."""
        for register in sorted(self._written & self.program.carried):
            self.lines.append(f"R['{register}'][L] = {self.get(register, register_class(register)[0])}")

    def address(self, text: str, kind: str) -> str:
        """``[base + offset]`` as a sum."""
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        value = self.get(base, kind)
        return value if offset in ("", "0") else f"({value} + {self.get(offset, kind)})"

    def several(self, text: str) -> list[str]:
        """The operands in braces, or the one without."""
        return [part.strip() for part in text.strip("{} ").split(",")]
