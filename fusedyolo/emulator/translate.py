"""A segment as a Python function: every instruction becomes a line of numpy on all threads that run it."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from . import arithmetic
from .operands import Operands, code_of
from .ptx import Instruction, Program, Segment, register_class, width

_NEEDS_PLACE = re.compile(r"E\.(load|store|atom|matrix_|shuffle|reduce|barrier|warp_barrier|branch)")
_SIMPLE = {
    "add": "({0} + {1})", "sub": "({0} - {1})", "fma": "fma({0}, {1}, {2})", "neg": "(-{0})", "abs": "np.abs({0})",
    "copysign": "np.copysign({1}, {0})",
}  # fmt: skip
_BITWISE = {"not": "(~{0})", "and": "({0} & {1})", "or": "({0} | {1})", "xor": "({0} ^ {1})"}
_CURVES = {  # with the units in the last place that the approximate ones may be off
    "ex2": ("np.exp2({0})", 2), "lg2": ("np.log2({0})", 2), "sqrt": ("np.sqrt({0})", 1), "rcp": ("1 / {0}", 1),
    "rsqrt": ("1 / np.sqrt({0})", 2), "sin": ("np.sin({0})", 2), "cos": ("np.cos({0})", 2), "tanh": ("np.tanh({0})", 2),
}  # fmt: skip
_ORDER = {
    "eq": "==", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip
_OPPOSITE = {"ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}
_LOGIC = {"and": "&", "or": "|", "xor": "^"}
_PAIRS = ("bf16x2", "f16x2", "s16x2", "u16x2")
_ROUNDINGS = ("rzi", "rni", "rmi", "rpi")
_KNOWN = {"rn", "ftz", "full", "approx", "lo", "NaN", "sat", "relu"}


def translate(program: Program, segment: Segment) -> Callable[..., None]:
    """``run(engine, registers, parameters, threads)`` of a segment.

    Raises:
        Fault: an instruction that is not emulated.
    """
    return _Translator(program, segment).function()


class _Translator(Operands):
    def __init__(self, program: Program, segment: Segment):
        super().__init__(program)
        self.segment = segment
        self.after = segment.number + 1

    def function(self) -> Callable[..., None]:
        sources: list[Instruction] = []
        ended = False
        for one in self.segment.code:
            self.one = one
            try:
                ended = self._instruction()
            except KeyError as unknown:  # a type
                raise self.refuse() from unknown
            sources += [self.one] * (len(self.lines) - len(sources))
        if not ended:
            self.leave()
            self.lines.append(f"E.pc[L] = {self.after}")
        body: list[str] = []
        for index, line in enumerate(self.lines):
            if _NEEDS_PLACE.search(line):
                body.append(f"    E.findings.at = {self.constant(sources[index])}")
            body.append("    " + line)
        text = "def run(E, R, P, L):\n" + "\n".join(body)
        space = {**vars(arithmetic), **self.constants}
        exec(compile(text, f"<segment {self.segment.number} of {self.program.name}>", "exec"), space)
        return space["run"]

    def _instruction(self) -> bool:
        """Write the current instruction; true if it ends the segment."""
        name = self.one.op[0]
        if name in _SIMPLE:
            return self._arithmetic(_SIMPLE[name].format)
        if name in _BITWISE:
            return self._bitwise(_BITWISE[name])
        if name in _CURVES:
            return self._curve(*_CURVES[name])
        handler = getattr(self, "_op_" + name, None)
        if handler is None:
            raise self.refuse()
        return bool(handler(self.one.op, self.one.operands))

    # -- control

    def _op_bra(self, op: list[str], args: list[str]) -> bool:
        self.leave()
        target = self.program.labels[args[0]]
        if self.one.predicate is None:
            self.lines.append(f"E.pc[L] = {target}")
        else:
            self.lines.append(f"E.branch(L, {self.mask()}, {target}, {self.after})")
        return True

    def _op_ret(self, op: list[str], args: list[str]) -> bool:
        self.leave()
        self.lines.append(f"E.leave(L, {self.mask()}, {self.after})")
        return True

    _op_exit = _op_ret

    def _op_bar(self, op: list[str], args: list[str]) -> bool:
        if "warp" in op:
            self.lines.append("E.warp_barrier(L)")
            return False
        if op != ["bar", "sync"] or args != ["0"] or self.one.predicate is not None:
            raise self.refuse()
        self.leave()
        self.lines.append(f"E.barrier(L, {self.after})")
        return True

    def _op_barrier(self, op: list[str], args: list[str]) -> bool:
        if op != ["barrier", "sync"]:
            raise self.refuse()
        return self._op_bar(["bar", "sync"], args)

    # -- moving

    def _op_mov(self, op: list[str], args: list[str]) -> None:
        kind, (to, source) = op[1], args
        if to.startswith("{"):
            self._split(self.several(to), source, kind)
        elif source.startswith("{"):
            self._join(to, self.several(source), kind)
        else:
            self.put(to, self.get(source, kind), kind)

    def _split(self, parts: list[str], source: str, kind: str) -> None:
        value = self.get(source, kind)
        bits = 8 * width(kind) // len(parts)
        for index, part in enumerate(parts):
            by = self.constant(arithmetic.TYPES[kind](bits * index))
            self.put(part, f"np.asarray({value} >> {by}).astype('u{bits // 8}')", f"b{bits}")

    def _join(self, to: str, parts: list[str], kind: str) -> None:
        bits = 8 * width(kind) // len(parts)
        terms = [
            f"(np.asarray({self.get(part, f'b{bits}')}).astype('{code_of(kind)}')"
            f" << {self.constant(arithmetic.TYPES[kind](bits * index))})"
            for index, part in enumerate(parts)
        ]
        self.put(to, " | ".join(terms), kind)

    def _op_selp(self, op: list[str], args: list[str]) -> None:
        kind = op[-1]
        a, b = self.get(args[1], kind), self.get(args[2], kind)
        self.put(args[0], f"np.where({self.get(args[3], 'pred')}, {a}, {b})", kind)

    # -- memory

    def _place(self, text: str, space: str) -> str:
        return self.address(text, "u32" if space == "shared" else "u64")

    def _space(self, op: list[str]) -> str:
        found = [part.partition("::")[0] for part in op if part.partition("::")[0] in ("global", "shared", "param")]
        if len(found) != 1:
            raise self.refuse()
        return found[0]

    def _op_ld(self, op: list[str], args: list[str]) -> None:
        space, kind = self._space(op), op[-1]
        if space == "param":
            self._parameter(args[0], args[1], kind)
            return
        targets, size = self.several(args[0]), width(kind)
        place = self._place(args[1], space)
        mask = self.mask()
        self.lines.append(f"out = E.load(L, '{space}', {place}, {size}, {len(targets)}, {mask}, {self.one.used})")
        sign, letter = ("i", "s") if kind[0] == "s" else ("u", "b")
        for index, target in enumerate(targets):
            self.put(target, f"out[{index}].view('{sign}{size}')", f"{letter}{8 * size}")

    def _parameter(self, to: str, address: str, kind: str) -> None:
        name = address.strip()[1:-1]
        if name in self.program.parameters:
            self.put(to, f"P[{self.program.parameters[name].number}]", kind)
        else:  # chosen at run time
            place = self.address(address, f"u{width(register_class(name.partition('+')[0].strip())[0]) * 8}")
            self.put(to, f"E.parameter({place}, '{code_of(kind)}')", kind)

    def _op_st(self, op: list[str], args: list[str]) -> None:
        space, size = self._space(op), width(op[-1])
        place = self._place(args[0], space)
        values = ", ".join(self.get(value, f"b{8 * size}") for value in self.several(args[1]))
        mask = self.mask()
        self.lines.append(f"E.store(L, '{space}', {place}, {size}, ({values},), {mask})")

    def _op_atom(self, op: list[str], args: list[str]) -> None:
        kind, space = op[-1], self._space(op)
        names = [part for part in op[1:] if part in arithmetic.ATOMICS]
        if len(names) != 1 or "x2" in kind or kind == "bf16":
            raise self.refuse()
        sem = next((part for part in op if part in ("relaxed", "acquire", "release", "acq_rel")), "relaxed")
        scope = next((part for part in op if part in ("cta", "gpu", "sys", "cluster")), "gpu")
        place = self._place(args[1], space)
        values = ", ".join(self.get(value, kind) for value in args[2:])
        mask = self.mask()
        self.lines.append(f"out = E.atom(L, '{space}', {place}, '{names[0]}', ({values},), '{sem}', '{scope}', {mask})")
        self.put(args[0], "out", kind)

    def _op_red(self, op: list[str], args: list[str]) -> None:
        self._op_atom(op, ["_", *args])

    # -- warps

    def _op_shfl(self, op: list[str], args: list[str]) -> None:
        to, _, there = (part.strip() for part in args[0].partition("|"))
        value, by, clamp, member = (self.get(text, "b32") for text in args[1:5])
        self.lines.append(f"out, ok = E.shuffle(L, '{op[2]}', {value}, {by}, {clamp}, {member})")
        self.put(to, "out", "b32")
        if there:
            self.put(there, "ok", "pred")

    def _op_redux(self, op: list[str], args: list[str]) -> None:
        value, member = self.get(args[1], op[-1]), self.get(args[2], "b32")
        self.lines.append(f"out = E.reduce(L, '{op[2]}', {value}, {member})")
        self.put(args[0], "out", op[-1])

    def _op_vote(self, op: list[str], args: list[str]) -> None:
        value, member = self.get(args[1], "pred"), self.get(args[2], "b32")
        self.lines.append(f"out = E.reduce(L, '{op[2]}', {value}, {member})")
        self.put(args[0], "out", "b32" if op[2] == "ballot" else "pred")

    def _op_stmatrix(self, op: list[str], args: list[str]) -> None:
        values = ", ".join(self.get(value, "b32") for value in self.several(args[1]))
        self.lines.append(f"E.matrix_store(L, {self.address(args[0], 'u32')}, ({values},), {'trans' in op})")

    def _op_ldmatrix(self, op: list[str], args: list[str]) -> None:
        targets = self.several(args[0])
        address, by_columns = self.address(args[1], "u32"), "trans" in op
        self.lines.append(f"out = E.matrix_load(L, {address}, {len(targets)}, {by_columns})")
        for index, target in enumerate(targets):
            self.put(target, f"out[{index}]", "b32")

    # -- comparisons and conversions

    def _op_setp(self, op: list[str], args: list[str]) -> None:
        compare, kind = op[1], op[-1]
        to, _, also = (part.strip() for part in args[0].partition("|"))
        a, b = (self.get(text, kind) for text in args[1:3])
        if kind in _PAIRS:
            self.lines.append(f"(a_low, a_high), (b_low, b_high) = unpack({a}, '{kind}'), unpack({b}, '{kind}')")
            self.put(to, _test(compare, "a_low", "b_low", "f" in kind), "pred")
            self.put(also, _test(compare, "a_high", "b_high", "f" in kind), "pred")
            return
        if kind == "bf16":
            a, b = f"from_bf16({a})", f"from_bf16({b})"
        value = _test(compare, a, b, "f" in kind)
        joined = [part for part in op[2:-1] if part in _LOGIC]
        if joined:
            other = args[3]
            term = f"~{self.get(other[1:], 'pred')}" if other.startswith("!") else self.get(other, "pred")
            value = f"({value} {_LOGIC[joined[0]]} {term})"
        if also:
            raise self.refuse()
        self.put(to, value, "pred")

    def _op_testp(self, op: list[str], args: list[str]) -> None:
        tests = {"infinite": "np.isinf({0})", "finite": "np.isfinite({0})", "notanumber": "np.isnan({0})"}
        if op[1] not in tests:
            raise self.refuse()
        self.put(args[0], tests[op[1]].format(self.get(args[1], op[-1])), "pred")

    def _op_cvt(self, op: list[str], args: list[str]) -> None:
        to, source, modifiers = op[-2], op[-1], set(op[1:-2])
        if modifiers - {"rn", "ftz", "sat", *_ROUNDINGS}:
            raise self.refuse()
        if to in _PAIRS:
            high, low = self.get(args[1], source), self.get(args[2], source)
            self.put(args[0], f"pack({low}, {high}, '{to}')", "b32")
            return
        value = self.get(args[1], source)
        if source == "bf16":
            value, source = f"from_bf16({value})", "f32"
        from_float, to_float = "f" in source, "f" in to
        rounding = next((part for part in _ROUNDINGS if part in modifiers), None)
        if "sat" in modifiers and not to_float:
            raise self.refuse()
        if from_float and not to_float:
            value = f"to_int({value}, np.{np.dtype(arithmetic.TYPES[to]).name}, '{rounding}')"
        elif rounding:
            value = f"round_to({f'flush({value})' if 'ftz' in modifiers else value}, '{rounding}')"
        elif to == "bf16":
            value = f"to_bf16(np.asarray({value}).astype('f4'))"
        else:
            value = f"np.asarray({value}).astype('{code_of(to)}')"
            value = f"flush({value})" if "ftz" in modifiers and to == "f32" else value
        if "sat" in modifiers:
            value = f"saturate({value})"
        self.put(args[0], value, "b16" if to == "bf16" else to)

    # -- arithmetic

    def _arithmetic(self, expression: Callable[..., str], count: int | None = None) -> bool:
        """``expression`` of the first ``count`` operands, or of all, in their type and with its modifiers."""
        op, args = self.one.op, self.one.operands
        kind = op[-1]
        if set(op[1:-1]) - _KNOWN or ("sat" in op and kind[0] != "f") or ("relu" in op and kind != "s32"):
            raise self.refuse()
        values = [self.get(text, kind) for text in args[1:][:count]]
        if kind in _PAIRS:
            return self._pairs(expression, values)
        if kind == "bf16":
            values = [f"from_bf16({value})" for value in values]
        if "ftz" in op:
            values = [f"flush({value})" for value in values]
        value = expression(*values)
        value = f"flush({value})" if "ftz" in op else value
        value = f"saturate({value})" if "sat" in op else value
        value = f"np.maximum({value}, np.int32(0))" if "relu" in op else value
        self.put(args[0], f"to_bf16({value})" if kind == "bf16" else value, kind)
        return False

    def _pairs(self, expression: Callable[..., str], values: list[str]) -> bool:
        kind = self.one.op[-1]
        names = [f"x{index}" for index in range(len(values))]
        for name, value in zip(names, values, strict=True):
            self.lines.append(f"{name}_low, {name}_high = unpack({value}, '{kind}')")
        low, high = (expression(*(f"{name}_{side}" for name in names)) for side in ("low", "high"))
        self.put(self.one.operands[0], f"pack({low}, {high}, '{kind}')", "b32")
        return False

    def _bitwise(self, expression: str) -> bool:
        kind = self.one.op[-1]
        self.put(
            self.one.operands[0], expression.format(*(self.get(text, kind) for text in self.one.operands[1:])), kind
        )
        return False

    def _curve(self, inside: str, ulps: int) -> bool:
        op = self.one.op
        if op[-1] not in ("f32", "f64"):
            raise self.refuse()
        big = "np.longdouble" if op[-1] == "f64" else "F64"

        def write(a: str) -> str:
            value = f"({inside.format(f'np.asarray({a}).astype({big})')}).astype('{code_of(op[-1])}')"
            return value if "rn" in op or op[-1] == "f64" else f"E.approximate({value}, {ulps})"

        return self._arithmetic(write)

    def _double(self, texts: list[str], kind: str) -> tuple[list[str], str]:
        """Operands twice as wide, and the kind they are then."""
        twice = f"{kind[0]}{2 * int(kind[1:])}"
        return [f"np.asarray({self.get(text, kind)}).astype('{code_of(twice)}')" for text in texts], twice

    def _op_mul(self, op: list[str], args: list[str]) -> bool:
        if "wide" in op:
            (a, b), twice = self._double(args[1:], op[-1])
            self.put(args[0], f"{a} * {b}", twice)
            return False
        if "hi" in op:
            self.put(args[0], f"mul_hi({self.get(args[1], op[-1])}, {self.get(args[2], op[-1])})", op[-1])
            return False
        return self._arithmetic("({0} * {1})".format)

    def _op_mad(self, op: list[str], args: list[str]) -> bool:
        if "wide" in op:
            (a, b), twice = self._double(args[1:3], op[-1])
            self.put(args[0], f"{a} * {b} + {self.get(args[3], twice)}", twice)
            return False
        return self._arithmetic("({0} * {1} + {2})".format)

    def _op_div(self, op: list[str], args: list[str]) -> bool:
        if op[-1][0] != "f":
            return self._arithmetic("divide({0}, {1}, False)".format)
        exact = "rn" in op
        return self._arithmetic(("({0} / {1})" if exact else "E.approximate({0} / {1}, 2)").format)

    def _op_rem(self, op: list[str], args: list[str]) -> bool:
        return self._arithmetic("divide({0}, {1}, True)".format)

    def _op_min(self, op: list[str], args: list[str]) -> bool:
        return self._bound(op, "minimum", "fmin")

    def _op_max(self, op: list[str], args: list[str]) -> bool:
        return self._bound(op, "maximum", "fmax")

    def _bound(self, op: list[str], nan_wins: str, nan_loses: str) -> bool:
        name = f"np.{nan_wins}" if "f" not in op[-1] else nan_wins if "NaN" in op else nan_loses
        return self._arithmetic((name + "({0}, {1})").format)

    def _shift(self, op: list[str], args: list[str], sign: str, general: str) -> None:
        value, by = self.get(args[1], op[-1]), args[2]
        if by.startswith("%") or int(by, 0) >= int(op[-1][1:]):
            self.put(args[0], f"{general}({value}, {self.get(by, 'u32')})", op[-1])
        else:
            self.put(args[0], f"({value} {sign} {self.get(by, op[-1])})", op[-1])

    def _op_shl(self, op: list[str], args: list[str]) -> None:
        self._shift(op, args, "<<", "shift_left")

    def _op_shr(self, op: list[str], args: list[str]) -> None:
        self._shift(op, args, ">>", "shift_right")

    def _op_shf(self, op: list[str], args: list[str]) -> None:
        low, high, by = (self.get(text, "b32") for text in args[1:])
        self.put(args[0], f"funnel({low}, {high}, {by}, {op[1] == 'l'}, {op[2] == 'clamp'})", "b32")

    def _op_bfe(self, op: list[str], args: list[str]) -> None:
        at, count = self.get(args[2], "u32"), self.get(args[3], "u32")
        self.put(args[0], f"extract({self.get(args[1], op[-1])}, {at}, {count})", op[-1])

    def _op_bfi(self, op: list[str], args: list[str]) -> None:
        at, count = self.get(args[3], "u32"), self.get(args[4], "u32")
        a, b = self.get(args[1], op[-1]), self.get(args[2], op[-1])
        self.put(args[0], f"insert({a}, {b}, {at}, {count})", op[-1])

    def _op_prmt(self, op: list[str], args: list[str]) -> None:
        if op != ["prmt", "b32"]:
            raise self.refuse()
        self.put(args[0], f"permute({', '.join(self.get(text, 'b32') for text in args[1:])})", "b32")

    def _op_lop3(self, op: list[str], args: list[str]) -> None:
        a, b, c = (self.get(text, "b32") for text in args[1:4])
        self.put(args[0], f"logic({a}, {b}, {c}, {int(args[4], 0)})", "b32")

    def _op_brev(self, op: list[str], args: list[str]) -> None:
        self.put(args[0], f"reverse({self.get(args[1], op[-1])})", op[-1])

    def _op_popc(self, op: list[str], args: list[str]) -> None:
        self.put(args[0], f"ones({self.get(args[1], op[-1])})", "b32")

    def _op_clz(self, op: list[str], args: list[str]) -> None:
        self.put(args[0], f"leading_zeros({self.get(args[1], op[-1])})", "b32")


def _test(compare: str, a: str, b: str, floats: bool) -> str:
    """setp: of floats, a comparison with a NaN is false, but true with one that ends in u; ``ne`` needs numbers."""
    if compare in ("nan", "num"):
        nan = f"(({a} != {a}) | ({b} != {b}))"
        return nan if compare == "nan" else f"~{nan}"
    if not floats:
        return f"({a} != {b})" if compare == "ne" else f"({a} {_ORDER[compare]} {b})"
    if compare in ("ne", "equ"):
        apart = f"(({a} < {b}) | ({a} > {b}))"
        return apart if compare == "ne" else f"~{apart}"
    if compare == "neu":
        return f"({a} != {b})"
    if compare in _OPPOSITE:
        return f"~({a} {_OPPOSITE[compare]} {b})"
    return f"({a} {_ORDER[compare]} {b})"
