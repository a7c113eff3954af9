"""Which bytes of tensors nothing has written, from ``torch.empty`` on."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from .memory import POISON

_EMPTY = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


@dataclass
class _Allocation:
    storage: StorageWeakRef
    written: np.ndarray | None  # of each byte, or not known


def bytes_of(storage: torch.UntypedStorage) -> np.ndarray:
    """Memory of a storage on the CPU, not copied; valid as long as the storage is."""
    if not storage.nbytes():
        return np.empty(0, np.uint8)
    memory: Any = (ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())
    return np.frombuffer(memory, np.uint8)


class Allocations(TorchDispatchMode):
    """While it is entered, what ``torch.empty`` and its kin give on the CPU is poisoned, and known as unwritten.

    An operator of PyTorch that writes into a part of a tensor counts as having written all of its memory. With
    ``tracks`` off memory is poisoned only.
    """

    def __init__(self, tracks: bool):
        super().__init__()
        self._tracks = tracks
        self._known: dict[int, _Allocation] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace not in ("aten", "prim", "prims"):
            return self._inside(func, args, kwargs)
        out = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if name in _EMPTY and isinstance(out, Tensor) and out.device.type == "cpu":
            self._allocated(out)
        elif self._known:
            for tensor in _mutated(func._schema, args, kwargs):
                self._known.pop(_key(tensor), None)
        return out

    def _inside(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A custom operator: this mode is off while it is called, and on again for the operators inside it."""
        tensors = [each for each in _tensors([*args, *kwargs.values()])]
        if not tensors or any(tensor.device.type != "cpu" for tensor in tensors):
            return func(*args, **kwargs)
        with self:
            return func.redispatch(_CPU, *args, **kwargs)

    def _allocated(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        bytes_of(storage)[:] = POISON
        self._known = {key: each for key, each in self._known.items() if not each.storage.expired()}
        written = np.zeros(storage.nbytes(), bool) if self._tracks else None
        self._known[_key(tensor)] = _Allocation(StorageWeakRef(storage), written)

    def written(self, tensor: Tensor) -> np.ndarray | None:
        """Which bytes of a tensor's storage have been written, to be kept up to date; ``None`` if all."""
        found = self._known.get(_key(tensor))
        return None if found is None else found.written

    def is_new(self, tensor: Tensor) -> bool:
        """Whether this mode has seen ``torch.empty`` give its memory, and nothing of PyTorch write to it."""
        return _key(tensor) in self._known

    def missing(self, tensor: Tensor) -> int:
        """Bytes of a tensor that nothing has written."""
        written = self.written(tensor)
        if written is None:
            return 0
        size = tensor.element_size()
        with torch.utils._python_dispatch._disable_current_modes():
            lacking = torch.from_numpy((~written).reshape(-1, size).sum(1))
            return int(lacking.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).sum())


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _mutated(schema: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors([args[index] if index < len(args) else kwargs.get(argument.name)])


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors among values, and in lists among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
