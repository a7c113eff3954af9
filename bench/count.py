"""Counting launches, bytes and host waits on a CPU.

Counting is deterministic. Triton's kernels run in its interpreter, where every access of every program is seen: it
moves 32 bytes for each distinct 32-byte sector that its active lanes touch. Of a launch of many programs a part may
stand for the rest. Everything else is seen as ATen operators: one that computes or copies is one launch and moves its
distinct inputs and outputs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
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


Patch = tuple[Any, str, Any]
"""An object, the name of an attribute of it, and what that is replaced by meanwhile."""


def _kernel_patches(counts: Counts, planned: Planned | None) -> list[Patch]:
    """Methods of Triton's interpreter: each program's accesses are counted, and of a launch those planned are run."""
    from triton.runtime import interpreter

    executors, builders = interpreter.GridExecutor, interpreter.InterpreterBuilder
    launch, place, span = executors.__call__, builders.set_grid_idx, builders.set_grid_dim
    grid: tuple[int, ...] = ()  # of the launch under way
    plan: Plan | None = None  # of its programs, if not all are run
    moved: list[list[int]] = []  # what each has loaded and stored

    def launched(executor: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal grid, plan, moved
        name, grid, moved = executor.fn.__name__, executor.grid, []
        plan = planned(name, grid[0], kwargs) if planned else None
        if plan is not None:
            executor.grid = (len(plan.chosen),)
        with _disable_current_modes():  # the interpreter's own tensor work is not the package's
            launch(executor, *args, **kwargs)
        executor.grid = grid
        columns = np.array(moved).T
        if plan is not None:
            columns = np.array([plan.estimate(dict(zip(plan.chosen, each, strict=True))) for each in columns])
        read, written = (round(total) for total in columns.sum(1).tolist())
        counts.triton_launches += 1
        counts.programs_run += len(moved)
        counts.programs += columns.shape[1]
        counts.bytes_loaded += read
        counts.bytes_stored += written
        counts.kernels.append(KernelLaunch(name, columns.shape[1], read + written))

    def spanned(builder: Any, *dims: int) -> Any:
        return span(builder, *(dims if plan is None else (*grid, 1, 1)))

    def placed(builder: Any, *index: int) -> Any:
        if plan is not None:
            if len(moved) == len(plan.chosen) - 1:
                pretend_others_finished(sum(p < plan.adding for p in plan.chosen[:-1]), plan.adding)
            index = (plan.chosen[index[0]], 0, 0)
        moved.append([0, 0])
        return place(builder, *index)

    def counted(access: Callable, pointers: int, mask: int | None, loads: bool, stores: bool) -> Callable:
        def accessed(builder: Any, *args: Any) -> Any:
            touched = SECTOR * sectors(args[pointers].data, None if mask is None else args[mask].data)
            moved[-1][0] += touched * loads
            moved[-1][1] += touched * stores
            return access(builder, *args)

        return accessed

    return [
        # it checks integers for overflow with arithmetic of its own, which kernels on a GPU do not
        (interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(sanitize_overflow=False)),
        (executors, "__call__", launched),
        (builders, "set_grid_dim", spanned),
        (builders, "set_grid_idx", placed),
        *((builders, name, counted(getattr(builders, name), *how)) for name, how in _ACCESSES.items()),
    ]


def _tensor_patches(operators: _CountOperators) -> list[Patch]:
    """Methods that copy to the host, which a tensor on a CPU does without an operator (``to("cpu")`` goes unseen); and
    assignments, because of what they make of a number.
    """
    assign = torch.Tensor.__setitem__

    def waiting(name: str) -> Patch:
        original = getattr(torch.Tensor, name)

        def method(self, *args, **kwargs):
            operators.counts.wait(name)
            return original(self, *args, **kwargs)

        return torch.Tensor, name, method

    def watched_assign(self, *args):
        operators.assigning += 1
        try:
            return assign(self, *args)
        finally:
            operators.assigning -= 1

    return [*map(waiting, ("tolist", "numpy", "cpu")), (torch.Tensor, "__setitem__", watched_assign)]


class _CountOperators(TorchDispatchMode):
    """Counts the operators that would launch work on a GPU, looking into custom operators."""

    def __init__(self, counts: Counts):
        super().__init__()
        self.counts = counts
        self.assigning = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace not in ("aten", "prim", "prims") and (body := _body_of(func)):
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
            loaded = min(_bytes(read[:1]), stored) + _bytes(read[1:])
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
        sides = zip(t.shape, t.stride(), strict=True)
        elements = math.prod(size if stride else min(size, 1) for size, stride in sides)
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
