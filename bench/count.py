"""Counting launches, bytes and host waits on a CPU.

Counting is deterministic. Triton's kernels run in its interpreter, where every access of every program is seen: it
moves 32 bytes for each distinct 32-byte sector that its active lanes touch. Of a launch of many programs a part may
stand for the rest. Everything else is seen as ATen operators: one that computes or copies is one launch and moves its
distinct inputs and outputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from .sampling import Plan, pretend_others_finished

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
class KernelLaunch:
    """One launch of a kernel: how many programs it has, and the bytes they load and store."""

    name: str
    programs: int
    bytes: int


@dataclass
class Counts:
    """What a piece of work asks of a GPU.

    ``bytes_loaded`` and ``bytes_stored`` add the kernels' sectors and the tensors of the other operators; ``ops`` are
    the other launches by operator, ``sync_ops`` the operators that make the host wait, ``kernels`` the launches of
    Triton's in order. Where fewer programs were run than the launches have, the kernels' bytes are an estimate.
    """

    triton_launches: int = 0
    other_launches: int = 0
    bytes_loaded: int = 0
    bytes_stored: int = 0
    syncs: int = 0
    programs: int = 0
    programs_run: int = 0
    ops: Counter[str] = field(default_factory=Counter)
    sync_ops: Counter[str] = field(default_factory=Counter)
    kernels: list[KernelLaunch] = field(default_factory=list)

    @property
    def launches(self) -> int:
        """Triton's and all others."""
        return self.triton_launches + self.other_launches

    @property
    def bytes(self) -> int:
        """Loaded and stored."""
        return self.bytes_loaded + self.bytes_stored

    def wait(self, name: str) -> None:
        """The host waits in an operator of this name."""
        self.syncs += 1
        self.sync_ops[name] += 1


Planned = Callable[[str, int, Mapping[str, Any]], Plan]
"""The plan of a launch on a one-dimensional grid: of the name of a kernel, how many programs it has, its arguments."""


def count(fn: Callable[[], Any], planned: Planned | None = None) -> Counts:
    """Run ``fn`` once on CPU tensors and count; of launches all programs, or those ``planned``.

    For kernels to be counted, Triton's interpreter must have been on (``TRITON_INTERPRET=1``) when they were imported.
    """
    counts = Counts()
    operators = _CountOperators(counts)
    with ExitStack() as stack:
        for owner, name, replacement in (*_kernel_patches(counts, planned), *_tensor_patches(operators)):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        stack.enter_context(operators)
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


# Of the calls of Triton's interpreter that touch memory: where the pointers and the mask are among their arguments (if
# they have one), whether they load and store. Plain loads and stores go through the masked ones.
_ACCESSES = {
    "create_masked_load": (0, 1, True, False),
    "create_masked_store": (0, 2, False, True),
    "create_atomic_rmw": (1, 3, True, True),
    "create_atomic_cas": (0, None, True, True),
}


class _CountKernels:
    """In place of methods of Triton's interpreter: counts the accesses of each program, and runs those planned."""

    def __init__(self, counts: Counts, planned: Planned | None, interpreter: Any):
        self.counts, self.planned = counts, planned
        self.launch, builder = interpreter.GridExecutor.__call__, interpreter.InterpreterBuilder
        self.place, self.span = builder.set_grid_idx, builder.set_grid_dim
        self.grid: tuple[int, ...] = ()  # of the launch under way
        self.chosen: Sequence[int] | None = None  # its programs to run, if not all
        self.moved: list[list[int]] = []  # what each has loaded and stored

    def launched(self, executor: Any, *args: Any, **kwargs: Any) -> None:
        self.grid, plan = executor.grid, None
        if self.planned is not None:
            plan = self.planned(executor.fn.__name__, self.grid[0], kwargs)
            executor.grid = (len(plan.chosen),)
        self.chosen, self.moved = plan and plan.chosen, []
        self.adding = plan.adding if plan else 0
        with _disable_current_modes():  # the interpreter's own tensor work is not the package's
            self.launch(executor, *args, **kwargs)
        executor.grid = self.grid
        loaded, stored = np.array(self.moved).T.tolist()
        programs, read, written = len(loaded), sum(loaded), sum(stored)
        if plan is not None:
            programs = self.grid[0]
            read, written = (
                round(plan.estimate(dict(zip(plan.chosen, each, strict=True))).sum()) for each in (loaded, stored)
            )
        self.counts.triton_launches += 1
        self.counts.programs_run += len(loaded)
        self.counts.programs += programs
        self.counts.bytes_loaded += read
        self.counts.bytes_stored += written
        self.counts.kernels.append(KernelLaunch(executor.fn.__name__, programs, read + written))

    def spanned(self, builder: Any, *dims: int) -> Any:
        return self.span(builder, *(dims if self.chosen is None else (*self.grid, 1, 1)))

    def placed(self, builder: Any, *index: int) -> Any:
        if self.chosen is not None:
            if len(self.moved) == len(self.chosen) - 1:
                pretend_others_finished(sum(p < self.adding for p in self.chosen[:-1]), self.adding)
            index = (self.chosen[index[0]], 0, 0)
        self.moved.append([0, 0])
        return self.place(builder, *index)

    def accessed(self, access: Callable, pointers: int, mask: int | None, loads: bool, stores: bool) -> Callable:
        def counted(builder, *args):
            moved = SECTOR * sectors(args[pointers].data, None if mask is None else args[mask].data)
            self.moved[-1][0] += moved * loads
            self.moved[-1][1] += moved * stores
            return access(builder, *args)

        return counted


Patch = tuple[Any, str, Any]
"""An object, the name of an attribute of it, and what that is replaced by meanwhile."""


def _kernel_patches(counts: Counts, planned: Planned | None) -> list[Patch]:
    from triton.runtime import interpreter

    counting, builder = _CountKernels(counts, planned, interpreter), interpreter.InterpreterBuilder
    return [
        # it checks integers for overflow with arithmetic of its own, which kernels on a GPU do not
        (interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(sanitize_overflow=False)),
        (interpreter.GridExecutor, "__call__", lambda *args, **kwargs: counting.launched(*args, **kwargs)),
        (builder, "set_grid_dim", lambda *args: counting.spanned(*args)),
        (builder, "set_grid_idx", lambda *args: counting.placed(*args)),
        *((builder, name, counting.accessed(getattr(builder, name), *how)) for name, how in _ACCESSES.items()),
    ]


def _tensor_patches(operators: _CountOperators) -> list[Patch]:
    """Methods that copy to the host, which a tensor on a CPU does without an operator (``to("cpu")`` goes unseen); and
    assignments, because of what they make of a number.
    """
    assign = torch.Tensor.__setitem__

    def counted(name: str) -> Callable:
        original = getattr(torch.Tensor, name)

        def method(self, *args, **kwargs):
            operators.counts.wait(name)
            return original(self, *args, **kwargs)

        return method

    def watched_assign(self, *args):
        operators.assigning += 1
        try:
            return assign(self, *args)
        finally:
            operators.assigning -= 1

    methods = {name: counted(name) for name in ("tolist", "numpy", "cpu")} | {"__setitem__": watched_assign}
    return [(torch.Tensor, name, method) for name, method in methods.items()]


class _CountOperators(TorchDispatchMode):
    """Counts the operators that would launch work on a GPU, looking into custom operators."""

    def __init__(self, counts: Counts):
        super().__init__()
        self.counts = counts
        self.assigning = 0

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
        # On a GPU ``x[i] = number`` fills a tensor there, on a CPU it looks like a number that is copied to the device.
        filled = name == "lift_fresh" and self.assigning and args[0].dim() == 0
        if not filled and _waits(func, name, args, kwargs):
            self.counts.wait(name)
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
        self.counts.ops[name] += 1
        self.counts.bytes_loaded += loaded
        self.counts.bytes_stored += stored


def _body_of(func) -> Callable | None:
    """The Python function of a custom operator: what it launches itself counts."""
    from torch._library.custom_ops import OPDEFS

    from fusedyolo.operator import FUNCTIONS

    definition = OPDEFS.get(func._schema.name)
    return FUNCTIONS.get(func) if definition is None else definition._init_fn


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
        where = t.untyped_storage()._cdata, t.storage_offset()  # on the meta device no tensor has an address
        seen[where, t.shape, t.stride()] = elements * t.element_size()
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
