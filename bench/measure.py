"""Counting launches, bytes and host waits on a CPU, comparing with float64, and timing on a GPU.

Counting is deterministic. Triton's kernels run in its interpreter, where every access of every program is seen: it
moves 32 bytes for each distinct 32-byte sector that its active lanes touch. Everything else is seen as ATen operators:
one that computes or copies is one launch and moves its distinct inputs and outputs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from .registry import Case, Workload

SECTOR = 32

# Memory is reserved, nothing is launched. No operator tag says so.
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
# Look at the shape of their argument alone.
_FACTORIES = {"new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"}
# Write their first argument without reading it.
_OVERWRITES = {"copy_", "fill_", "zero_"}
# Read or write no more of their first argument than they return or are handed.
_GATHERS = {"index", "_unsafe_index", "index_select", "gather", "take", "embedding"}
_SCATTERS = {"index_put_", "_index_put_impl_", "scatter_", "scatter_add_", "index_add_", "index_copy_", "index_fill_"}


@dataclass
class Counts:
    """What a piece of work asks of a GPU.

    ``bytes_loaded`` and ``bytes_stored`` add the kernels' sectors and the tensors of the other operators; ``ops`` are
    the other launches by operator, ``sync_ops`` the operators that make the host wait.
    """

    triton_launches: int = 0
    other_launches: int = 0
    bytes_loaded: int = 0
    bytes_stored: int = 0
    syncs: int = 0
    programs: int = 0
    ops: dict[str, int] = field(default_factory=dict)
    sync_ops: dict[str, int] = field(default_factory=dict)

    @property
    def launches(self) -> int:
        """Triton's and all others."""
        return self.triton_launches + self.other_launches

    @property
    def bytes(self) -> int:
        """Loaded and stored."""
        return self.bytes_loaded + self.bytes_stored

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


OnProgram = Callable[[int, int, int], None]


def count(fn: Callable[[], Any], on_program: OnProgram | None = None) -> Counts:
    """Run ``fn`` once on CPU tensors and count.

    ``on_program`` is called for every program with the number of its launch, its own number and how many the launch
    has. For kernels to be counted, Triton's interpreter must have been on (``TRITON_INTERPRET=1``) when they were
    imported.
    """
    counts = Counts()
    with _count_kernels(counts, on_program), _count_host_copies(counts), _CountOperators(counts):
        fn()
    return counts


def sectors(addresses: np.ndarray, mask: np.ndarray | None = None) -> int:
    """The distinct 32-byte sectors under the active ones of ``addresses``."""
    active = addresses.ravel() if mask is None else addresses[np.broadcast_to(mask, addresses.shape)]
    if active.size == 0:
        return 0
    index = active.astype(np.uint64, copy=False) // np.uint64(SECTOR)
    if (index[1:] >= index[:-1]).all():  # the usual case, and faster than sorting
        return 1 + int(np.count_nonzero(index[1:] != index[:-1]))
    return len(np.unique(index))


@contextmanager
def _count_kernels(counts: Counts, on_program: OnProgram | None) -> Iterator[None]:
    try:
        from triton.runtime import interpreter
    except ImportError:  # no Triton here, so no kernel can run
        yield
        return
    GridExecutor, InterpreterBuilder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    launch, place = GridExecutor.__call__, InterpreterBuilder.set_grid_idx
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    rmw, cas = InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.create_atomic_cas

    before = 0

    def counted_launch(self, *args, **kwargs):
        nonlocal before
        before = counts.programs
        counts.triton_launches += 1
        with _disable_current_modes():  # the interpreter's own tensor work is not the package's
            return launch(self, *args, **kwargs)

    def counted_place(self, *index):
        counts.programs += 1
        if on_program is not None:
            on_program(counts.triton_launches, counts.programs - before, math.prod(self.grid_dim))
        return place(self, *index)

    # plain loads and stores go through the masked ones
    def counted_load(self, ptrs, mask, *args):
        counts.bytes_loaded += SECTOR * sectors(ptrs.data, mask.data)
        return load(self, ptrs, mask, *args)

    def counted_store(self, ptrs, value, mask, *args):
        counts.bytes_stored += SECTOR * sectors(ptrs.data, mask.data)
        return store(self, ptrs, value, mask, *args)

    def counted_rmw(self, op, ptr, val, mask, *args):
        moved = SECTOR * sectors(ptr.data, mask.data)
        counts.bytes_loaded += moved
        counts.bytes_stored += moved
        return rmw(self, op, ptr, val, mask, *args)

    def counted_cas(self, ptr, *args):
        moved = SECTOR * sectors(ptr.data)
        counts.bytes_loaded += moved
        counts.bytes_stored += moved
        return cas(self, ptr, *args)

    # Two shortcuts that halve the time. The interpreter patches triton.language again for every call of a device
    # function, and checks integers for overflow with arithmetic of its own, which kernels on a GPU do not.
    patch_language = interpreter._patch_lang
    language = (interpreter.tl, interpreter.tl.core)

    def patch_language_once(fn):
        modules = [value for value in fn.__globals__.values() if any(value is module for module in language)]
        if all(not interpreter.tl.core.is_builtin(module.load) for module in modules):
            return interpreter._LangPatchScope()
        return patch_language(fn)

    with ExitStack() as stack:
        for owner, name, replacement in (
            (interpreter, "_patch_lang", patch_language_once),
            (interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(sanitize_overflow=False)),
            (GridExecutor, "__call__", counted_launch),
            (InterpreterBuilder, "set_grid_idx", counted_place),
            (InterpreterBuilder, "create_masked_load", counted_load),
            (InterpreterBuilder, "create_masked_store", counted_store),
            (InterpreterBuilder, "create_atomic_rmw", counted_rmw),
            (InterpreterBuilder, "create_atomic_cas", counted_cas),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


@contextmanager
def _count_host_copies(counts: Counts) -> Iterator[None]:
    """Methods that copy to the host, which a tensor on a CPU does without an operator. ``to("cpu")`` goes unseen."""

    def counted(name: str, original: Callable) -> Callable:
        def method(self, *args, **kwargs):
            counts.syncs += 1
            counts.sync_ops[name] = counts.sync_ops.get(name, 0) + 1
            return original(self, *args, **kwargs)

        return method

    with ExitStack() as stack:
        for name in ("tolist", "numpy", "cpu"):
            replacement = counted(name, getattr(torch.Tensor, name))
            stack.enter_context(mock.patch.object(torch.Tensor, name, replacement))
        yield


class _CountOperators(TorchDispatchMode):
    """Counts the operators that would launch work on a GPU, looking into custom operators."""

    def __init__(self, counts: Counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace not in ("aten", "prim", "prims"):
            body = _body_of(func)
            if body is not None:
                with self:
                    return body(*args, **kwargs)
        out = func(*args, **kwargs)
        self._tally(func, args, kwargs, out)
        return out

    def _tally(self, func, args, kwargs, out) -> None:
        name = func._schema.name.partition("::")[2]
        if _waits(func, name, args, kwargs):
            self.counts.syncs += 1
            self.counts.sync_ops[name] = self.counts.sync_ops.get(name, 0) + 1
        if name in _ALLOCATIONS:
            return
        written, read = _written_and_read(func, args, kwargs)
        returned = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        if name == "lift_fresh":  # a tensor made of Python numbers: one copy to the device
            written = returned
        elif not written:
            owned = {t.untyped_storage()._cdata for t in read}
            written = [t for t in returned if t.untyped_storage()._cdata not in owned]  # the others are views
            if not written and not (returned == [] and torch.Tag.data_dependent_output in func.tags):
                return
        elif torch.Tag.inplace_view in func.tags:
            return
        elif name not in _OVERWRITES:
            read = read + written
        if returned and not any(t.numel() for t in written):
            return
        loaded, stored = 0 if name in _FACTORIES else _bytes(read), _bytes(written)
        if name in _GATHERS:
            source, rest = _bytes(read[:1]), _bytes(read[1:])
            loaded = min(source, stored) + rest
        elif name in _SCATTERS:
            stored = min(stored, _scattered(name, args, kwargs))
            loaded = _bytes([t for t in read if t is not args[0]])
        self.counts.other_launches += 1
        self.counts.ops[name] = self.counts.ops.get(name, 0) + 1
        self.counts.bytes_loaded += loaded
        self.counts.bytes_stored += stored


def _body_of(func) -> Callable | None:
    """The Python function of a custom operator: what it launches itself counts."""
    from torch._library.custom_ops import OPDEFS

    definition = OPDEFS.get(func._schema.name)
    return None if definition is None else definition._init_fn


def _written_and_read(func, args, kwargs) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    written, read = [], []
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        tensors = [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]
        changed = argument.alias_info is not None and argument.alias_info.is_write
        (written if changed else read).extend(tensors)
    return written, read


def _bytes(tensors: list[torch.Tensor]) -> int:
    """Of distinct memory: a broadcast dimension is read once, a tensor handed in twice is one tensor."""
    seen = {}
    for t in tensors:
        elements = 1
        for size, stride in zip(t.shape, t.stride(), strict=True):
            elements *= size if stride else min(size, 1)
        seen[t.data_ptr(), t.shape, t.stride()] = elements * t.element_size()
    return sum(seen.values())


def _scattered(name: str, args, kwargs) -> int:
    """Bytes of its first argument that an in-place scatter writes."""
    target = args[0]
    if "index_put" in name:
        indices = [i for i in args[1] if i is not None]
        shapes = [(int(i.count_nonzero()),) if i.dtype == torch.bool else i.shape for i in indices]
        dims = sum(i.dim() if i.dtype == torch.bool else 1 for i in indices)
        rest = target.numel() // max(1, int(np.prod(target.shape[:dims])))
        return int(np.prod(torch.broadcast_shapes(*shapes))) * rest * target.element_size()
    index = args[2] if len(args) > 2 else kwargs["index"]
    if name.startswith("index_"):
        return target.numel() // max(1, target.shape[args[1]]) * index.numel() * target.element_size()
    return index.numel() * target.element_size()


def _waits(func, name: str, args, kwargs) -> bool:
    """Whether the host has to wait for the GPU: it needs a number or a shape that depends on data, or copies memory."""
    if name == "lift_fresh":
        return True
    if name in ("_to_copy", "copy_"):
        source = args[1] if name == "copy_" else args[0]
        device = args[0].device if name == "copy_" else kwargs.get("device") or source.device
        blocking = not (args[2] if name == "copy_" and len(args) > 2 else kwargs.get("non_blocking"))
        return blocking and torch.device(device).type != source.device.type
    if name in ("index", "_unsafe_index"):
        return _has_mask(args[1])
    if "index_put" in name:
        return _has_mask(args[1]) and args[2].numel() != 1  # one value becomes masked_fill
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def _has_mask(indices) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


# ------------------------------------------------------------------------------------------------ one loss, one backend


Loss = Callable[[Any, Any], Any]


def step(loss: Loss, preds: list[torch.Tensor], targets: Any, one: torch.Tensor) -> Any:
    """Forward and backward of a bound loss; ``one`` is the gradient of the total, made beforehand."""
    out = loss(preds, targets)
    out.total.backward(gradient=one)
    return out


def parity(case: Case, work: Workload, device: str = "cpu") -> dict[str, Any]:
    """The kernels and the eager reference, both against the reference in float64 on the same predictions.

    The loss error is the largest of total and parts, relative to the total; the gradient error is the largest of all
    entries, relative to the largest entry. The kernels pass at 1e-5 beyond the eager reference's own error.
    """
    work = work.small()
    targets = case.targets(work, device)
    outputs = {}
    for name, backend, dtype in (
        ("fused", "triton", None),
        ("eager", "torch", None),
        ("truth", "torch", torch.float64),
    ):
        preds = [p.detach().to(dtype or p.dtype).requires_grad_() for p in case.predictions(work, device)]
        loss = case.bind(case.build(work.classes, backend), work, device)
        out = step(loss, preds, targets, torch.ones((), device=device))
        losses = torch.stack([out.total.detach(), *out.parts.values()]).double()
        outputs[name] = losses, torch.cat([p.grad.double().flatten() for p in preds]), int(out.num_pos)
    losses, grads, positives = outputs["truth"]
    result: dict[str, Any] = {"positives": positives, "ok": outputs["fused"][2] == positives}
    for name in ("fused", "eager"):
        result[f"{name}_loss_error"] = float((outputs[name][0] - losses).abs().max() / losses[0].abs())
        result[f"{name}_grad_error"] = float((outputs[name][1] - grads).abs().max() / grads.abs().max())
    for metric in ("loss_error", "grad_error"):  # a NaN fails
        result["ok"] = result["ok"] and result[f"fused_{metric}"] <= result[f"eager_{metric}"] + 1e-5
    return result


def count_step(case: Case, work: Workload, backend: str, on_program: OnProgram | None = None) -> Counts:
    """Counts of forward and backward on CPU tensors, of a call that is not the first."""
    criterion, one = case.build(work.classes, backend), torch.ones(())
    tiny = replace(work.small(), batch=1, size=max(case.strides))
    step(case.bind(criterion, tiny), case.predictions(tiny), case.targets(tiny), one)
    loss, preds, targets = case.bind(criterion, work), case.predictions(work), case.targets(work)
    return count(lambda: step(loss, preds, targets, one), on_program)


def count_compiled(case: Case, work: Workload) -> dict[str, int]:
    """Kernels and graph breaks of ``torch.compile`` of the eager reference, by Inductor's own count, on this CPU."""
    import torch._inductor.metrics as metrics
    from torch._dynamo.utils import counters

    work = work.small()
    compiled = torch.compile(case.build(work.classes, "torch"))
    torch._dynamo.reset()
    metrics.reset()
    counters.clear()
    step(case.bind(compiled, work), case.predictions(work), case.targets(work), torch.ones(()))
    return {
        "cpu_codegen_kernels": metrics.generated_kernel_count,
        "graph_breaks": sum(counters["graph_break"].values()),
    }


# ---------------------------------------------------------------------------------------------------------------- a GPU

QUANTILES = (0.2, 0.5, 0.8)


def copy_bandwidth(bytes_moved: int = 1 << 30) -> float:
    """GB/s of a device-to-device copy, reads and writes: the ceiling of everything here."""
    source = torch.empty(bytes_moved // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return bytes_moved / _milliseconds(lambda: target.copy_(source))[1] / 1e6


def time_step(case: Case, work: Workload, provider: str, device: str = "cuda") -> dict[str, float]:
    """Milliseconds at p20, p50, p80 with a cold cache, memory and host time; ``eager``, ``compile`` or ``fused``."""
    criterion = case.build(work.classes, "triton" if provider == "fused" else "torch")
    if provider == "compile":
        import torch._functorch.config as functorch_config

        functorch_config.donated_buffer = False  # so that one forward serves many backwards
        criterion = torch.compile(criterion)
    loss, one = case.bind(criterion, work, device), torch.ones((), device=device)
    preds, targets = case.predictions(work, device), case.targets(work, device)
    step(loss, preds, targets, one)
    result = {}
    kept = [loss(preds, targets).total]

    def no_grad():
        with torch.no_grad():
            loss(preds, targets)

    for mode, fn in (
        ("no_grad", no_grad),
        ("forward", lambda: loss(preds, targets)),
        ("backward", lambda: kept[0].backward(gradient=one, retain_graph=True)),
        ("full", lambda: step(loss, preds, targets, one)),
    ):
        for quantile, value in zip(QUANTILES, _milliseconds(fn, preds), strict=True):
            result[f"{mode}_ms_p{quantile * 100:.0f}"] = value
    kept.clear()
    result["peak_bytes"] = _peak(lambda: step(loss, preds, targets, one), preds)
    result["host_us"] = _host_microseconds(criterion, case, work, device)
    return result


def _milliseconds(fn: Callable[[], Any], leaves: list[torch.Tensor] | None = None) -> tuple[float, ...]:
    from triton.testing import do_bench

    return tuple(do_bench(fn, warmup=100, rep=500, grad_to_none=leaves, quantiles=list(QUANTILES)))


def _peak(fn: Callable[[], Any], leaves: list[torch.Tensor]) -> float:
    """Most memory in use at a time beyond what was before, gradients included."""
    for leaf in leaves:
        leaf.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fn()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before)


def _host_microseconds(criterion: torch.nn.Module, case: Case, work: Workload, device: str, calls: int = 50) -> float:
    """Median time of forward and backward on predictions so small that the host is what takes time."""
    work = replace(work.small(), batch=1, size=max(case.strides))
    loss, one = case.bind(criterion, work, device), torch.ones((), device=device)
    preds, targets = case.predictions(work, device), case.targets(work, device)
    step(loss, preds, targets, one)
    times = []
    for _ in range(calls):
        for pred in preds:
            pred.grad = None
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        step(loss, preds, targets, one)
        times.append(time.perf_counter() - start)
    return 1e6 * sorted(times)[calls // 2]
