"""A launch as PTX, on a machine without a GPU: Triton's own binder and compiler, up to where ptxas would begin."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock


@dataclass(frozen=True)
class Compiled:
    """A kernel as PTX, with the shared memory and the warps of a program, and whether sums of products may be fused."""

    name: str
    ptx: str
    shared: int
    warps: int
    fusion: bool


@dataclass(frozen=True)
class Call:
    """A launch: its compiled kernel, its arguments by name, and those that the driver would pass, in order."""

    compiled: Compiled
    arguments: dict[str, Any]
    passed: list[Any]


_compiled: dict[tuple[str, str, int], Compiled] = {}


def folder() -> Path:
    """Where PTX is kept: ``FUSEDYOLO_EMULATOR_CACHE``, else the platform's folder for caches.

    It is not Triton's own, for a launch on a GPU must not find a kernel that ptxas has never seen.
    """
    if chosen := os.environ.get("FUSEDYOLO_EMULATOR_CACHE"):
        return Path(chosen)
    from platformdirs import user_cache_path

    return user_cache_path("fusedyolo-emulator")


def bind(kernel: Any, args: Sequence[Any], kwargs: Mapping[str, Any], arch: int, fusion: bool | None) -> Call:
    """Compile ``kernel[grid](*args, **kwargs)`` for ``sm_<arch>``.

    Args:
        kernel: a ``JITFunction`` of Triton.
        args, kwargs: of the launch; compiler options are among the latter.
        arch: 90 for sm_90.
        fusion: ``False`` to compile with ``enable_fp_fusion=False`` whatever the launch asks for.
    """
    options = dict(kwargs)
    if fusion is False:
        options["enable_fp_fusion"] = False
    made, bound = specialise(kernel, args, options, ("cuda", arch, 32))
    key = made.source.hash(), made.options.hash(), arch
    if key not in _compiled:
        _compiled[key] = _compile(made)
    passed = [each for name, kind in made.source.signature.items() for each in _flat(kind, bound[name])]
    return Call(_compiled[key], bound, passed)


class Specialised(NamedTuple):
    """What Triton compiles: the ``source`` of a kernel for the arguments of a launch, for a GPU, with options."""

    source: Any
    gpu: Any
    options: Any

    def compile(self) -> Any:
        """As Triton does."""
        import triton

        return triton.compile(self.source, target=self.gpu, options=self.options.__dict__)


def specialise(
    kernel: Any, args: Sequence[Any], kwargs: Mapping[str, Any], target: tuple[str, int | str, int]
) -> tuple[Specialised, dict[str, Any]]:
    """What a launch ``kernel[grid](*args, **kwargs)`` compiles for ``target``: backend, architecture, threads of a
    warp; and its arguments by name.
    """
    from triton.compiler.compiler import ASTSource

    gpu, backend = _target(target)
    bound, specialization, rest = _binder(kernel, target)(*args, **kwargs)
    parsed, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, rest)
    return Specialised(ASTSource(kernel, signature, constants, attributes), gpu, parsed), dict(bound)


@lru_cache
def _target(target: tuple[str, int | str, int]) -> tuple[Any, Any]:
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    gpu = GPUTarget(*target)
    return gpu, make_backend(gpu)


@lru_cache
def _binder(kernel: Any, target: tuple[str, int | str, int]) -> Any:
    from triton.runtime.jit import create_function_from_signature

    return create_function_from_signature(kernel.signature, kernel.params, _target(target)[1])


def _compile(what: Specialised) -> Compiled:
    with _no_ptxas():
        made = what.compile()
    name, metadata = what.source.name, made.metadata
    if getattr(metadata, "global_scratch_size", 0):
        raise NotImplementedError(f"{name}: scratch memory of the compiler is not emulated")
    return Compiled(name, made.asm["ptx"], metadata.shared, metadata.num_warps, bool(what.options.enable_fp_fusion))


@contextmanager
def _no_ptxas() -> Iterator[None]:
    """Meanwhile compiling ends with PTX, and is kept in :func:`folder`."""
    from triton import knobs
    from triton.backends.nvidia.compiler import CUDABackend

    with knobs.cache.scope(), mock.patch.object(CUDABackend, "make_cubin", return_value=b""):
        knobs.cache.dir = str(folder())
        yield


def _flat(signature: Any, value: Any) -> Iterator[Any]:
    """The values of an argument that are passed at run time; a tuple passes its elements."""
    if isinstance(signature, tuple):
        for part, each in zip(signature, value, strict=True):
            yield from _flat(part, each)
    elif signature != "constexpr":
        yield value
