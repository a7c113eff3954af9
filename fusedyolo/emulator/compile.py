"""A launch as PTX, on a machine without a GPU: Triton's own binder and compiler, up to where ptxas would begin."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
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
    from triton.compiler.compiler import ASTSource

    options = dict(kwargs)
    if fusion is False:
        options["enable_fp_fusion"] = False
    gpu, backend = _target(arch)
    bound, specialization, rest = _binder(kernel, arch)(*args, **options)
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, rest)
    source = ASTSource(kernel, signature, constants, attributes)
    key = source.hash(), parsed.hash(), arch
    if key not in _compiled:
        _compiled[key] = _compile(source, gpu, parsed)
    passed = [each for name, kind in signature.items() for each in _flat(kind, bound[name])]
    return Call(_compiled[key], dict(bound), passed)


@lru_cache
def _target(arch: int) -> tuple[Any, Any]:
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    gpu = GPUTarget("cuda", arch, 32)
    return gpu, make_backend(gpu)


@lru_cache
def _binder(kernel: Any, arch: int) -> Any:
    from triton.runtime.jit import create_function_from_signature

    return create_function_from_signature(kernel.signature, kernel.params, _target(arch)[1])


def _compile(source: Any, gpu: Any, parsed: Any) -> Compiled:
    import triton

    with _no_ptxas():
        made = triton.compile(source, target=gpu, options=parsed.__dict__)
    if getattr(made.metadata, "global_scratch_size", 0):
        raise NotImplementedError(f"{source.name}: scratch memory of the compiler is not emulated")
    return Compiled(
        source.name, made.asm["ptx"], made.metadata.shared, made.metadata.num_warps, bool(parsed.enable_fp_fusion)
    )


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
