"""What the kernels compile to, with no GPU: registers, stack, spills and the widths of global accesses.

A kernel is specialised on the arguments of its launch, so it is compiled from a real launch: Triton's own binder
derives the signature, and the tools in Triton's wheel (``ptxas``, ``cuobjdump``, ``nvdisasm``) read the result.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from ..emulator.compile import specialise
from .registry import Case, Workload

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
"""What is compiled for without a GPU of it."""


@dataclass
class Resources:
    """Of one compiled kernel; access widths are in bits, each with its number of instructions.

    ``stack`` is bytes of local memory a thread, ``spills`` the instructions that touch it. ``scalar_spills``, of AMD
    only, are scalar registers kept in lanes of vector registers: no memory is touched. ``called``, of NVIDIA only, are
    those of the instructions that routines for rare numbers hold, as divisions call them. ``code`` is a digest of the
    instructions: kernels with the same are the same.
    """

    target: str
    registers: int
    stack: int
    spills: int
    instructions: int
    loads: dict[int, int] = field(default_factory=dict)
    stores: dict[int, int] = field(default_factory=dict)
    scalar_spills: int = 0
    called: int = 0
    code: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def widths(counts: Mapping[int, int]) -> str:
    """``{128: 90, 8: 1}`` as ``90x128 1x8``, the widest first."""
    return " ".join(f"{number}x{width}" for width, number in sorted(counts.items(), reverse=True)) or "none"


def launches(case: Case, work: Workload) -> dict[str, Any]:
    """The launches of a training step by name, on memory that is never touched."""
    criterion, driver, geometry = case.build(work.classes, "auto"), case.driver, case.geometry(work)
    read = criterion.read_both if case.branches else partial(driver.read, criterion)
    call = read(case.pack(case.predictions(work, empty=True), work), case.targets(work), **geometry)
    found: dict[str, Any] = driver.launches(criterion.head, call)
    return found


def target_of(name: str) -> tuple[str, int | str, int]:
    """Backend, architecture and threads of a warp, of one of ``TARGETS`` or another ``sm_...`` or ``gfx...``."""
    if name.startswith("sm_"):
        return "cuda", int(name.removeprefix("sm_")), 32
    return "hip", name, 32 if name.startswith(("gfx10", "gfx11", "gfx12")) else 64


def options_of(launch: Any, target: str) -> dict[str, int]:
    """The compiler options of a launch for a name as in ``TARGETS``."""
    backend, arch, _ = target_of(target)
    return launch.options(True, int(arch) // 10) if backend == "cuda" else launch.options(False)


def compile_step(case: Case, work: Workload, target: str) -> dict[str, dict[str, Any]]:
    """What each launch of a training step compiles to, by name: :class:`Resources`, its ``threads`` and ``grid``."""
    found = {}
    for name, launch in launches(case, work).items():
        compiled = compile_launch(launch.kernel, launch.arguments, options_of(launch, target), target)
        found[name] = compiled.as_dict() | {"threads": launch.threads, "grid": launch.grid}
    return found


def compile_launch(kernel, arguments: Mapping[str, Any], options: Mapping[str, int], target: str) -> Resources:
    """Compile ``kernel[grid](**arguments, **options)`` for ``target``, a name as in ``TARGETS``.

    ``kernel`` must be a real ``JITFunction``: it must have been imported without ``TRITON_INTERPRET``. Tensors count as
    aligned as they are.
    """
    from triton import knobs
    from triton.runtime.jit import JITFunction

    if not isinstance(kernel, JITFunction):
        raise ValueError(f"kernel: {type(kernel).__name__}, want a JITFunction; is TRITON_INTERPRET set?")
    made, _ = specialise(kernel, (), {**arguments, **options}, target_of(target))
    text = made.compile().asm
    if "amdgcn" in text:
        return read_amdgcn(target, text["amdgcn"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(text["cubin"])
        file.flush()
        commands = (knobs.nvidia.cuobjdump.path, "-res-usage", file.name), (knobs.nvidia.nvdisasm.path, "-c", file.name)
        usage, sass = (subprocess.check_output(command, text=True) for command in commands)
    return read_sass(target, usage, sass)


def read_sass(target: str, usage: str, sass: str) -> Resources:
    """From the texts of ``cuobjdump -res-usage`` and ``nvdisasm -c``."""
    kernel, _, routines = sass.partition("\n$__internal_")
    names, called = _sass_names(kernel), _sass_names(routines)
    sizes = {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    loads, stores, spills = Counter[int](), Counter[int](), 0
    for name in names + called:
        head = name.partition(".")[0]
        if head in ("LDG", "STG"):
            width = re.search(r"\.[US]?(8|16|64|128|256)\b", name)
            (loads if head == "LDG" else stores)[int(width[1]) if width else 32] += 1
        spills += head in ("LDL", "STL")
    words = sizes["REG"], sizes["STACK"], spills, len(names + called)
    return Resources(target, *words, dict(loads), dict(stores), called=len(called), code=_digest(sass))


def _sass_names(sass: str) -> list[str]:
    names = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE)
    return [name for name in names if name != "NOP"]  # padding


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


_AMD_WIDTHS = {"byte": 8, "ubyte": 8, "sbyte": 8, "short": 16, "ushort": 16, "sshort": 16, "dword": 32}


def read_amdgcn(target: str, text: str) -> Resources:
    """From AMD assembly. Registers are the vector ones."""
    sizes = {name: int(value) for name, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    names = re.findall(r"^\s+([svbgf](?:_|uffer_|lobal_|lat_|cratch_)\w+)", text, re.MULTILINE)
    loads, stores = Counter[int](), Counter[int]()
    for name in names:
        match = re.match(r"(?:global|buffer|flat)_(load|store)_(u?s?(?:byte|short|dword))(?:_d16\w*|x(\d))?", name)
        if match:
            width = _AMD_WIDTHS[match[2]] * int(match[3] or 1)
            (loads if match[1] == "load" else stores)[width] += 1
    spills, stack = sum(name.startswith("scratch_") for name in names), sizes["private_segment_fixed_size"]
    words = sizes["vgpr_count"], stack, spills, len(names)
    return Resources(target, *words, dict(loads), dict(stores), sizes["sgpr_spill_count"], code=_digest(text))
