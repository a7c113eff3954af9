"""What was measured on this GPU: the user's own results first, then those this package ships, else the heuristic.

A result is looked up by what the compiled kernel and its launch depend on: the terms of the loss, the type and layout
of the predictions, and sizes rounded up to powers of two. A miss is no error, nor is a file that cannot be used.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .kernels.launch import Wishes, legal_wishes, power_of_two

FORMAT = 1
SHIPPED = Path(__file__).parent / "configs"

_trial: tuple[Wishes, set[str]] | None = None  # what launches get meanwhile, and the keys they asked for

version = 0
"""Another number whenever :func:`wishes` may say something else; whoever keeps what it said keeps this too."""


def folder() -> Path:
    """Where the user's own results are: ``FUSEDYOLO_CONFIG_DIR``, else the platform's folder for settings."""
    if chosen := os.environ.get("FUSEDYOLO_CONFIG_DIR"):
        return Path(chosen)
    from platformdirs import user_config_path

    return user_config_path("fusedyolo")


def file_name(gpu: str) -> str:
    """``NVIDIA H100 80GB HBM3`` as ``NVIDIA_H100_80GB_HBM3.json``."""
    return re.sub(r"[^\w.-]+", "_", gpu) + ".json"


def gpu_name(device: torch.device) -> str:
    """As the driver names it; ``cpu`` for what runs in Triton's interpreter."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def wishes(kind: str, terms: str, pred: Any, planes: bool, batch: int, cells: int, classes: int) -> Wishes:
    """What was found best for a launch, nothing where nothing was.

    Args:
        kind: of the driver, one of ``kernels.launch.KINDS``.
        terms: those of the loss.
        pred: predictions, or what a plan knows of them, for their device and type.
        planes: whether neighbouring cells are neighbours in memory, not neighbouring channels.
        batch: images.
        cells: of the largest map.
        classes: C.
    """
    sizes = [power_of_two(n) for n in (batch, cells, classes)]
    if _trial is None:
        return _wishes(kind, terms, pred.dtype, pred.device, planes, *sizes)
    forced, seen = _trial
    seen.add(key_of(kind, terms, pred.dtype, planes, *sizes))
    return forced


def key_of(kind: str, terms: str, dtype: torch.dtype, planes: bool, batch: int, cells: int, classes: int) -> str:
    """The key of a result in its file."""
    name, layout = str(dtype).removeprefix("torch."), "planes" if planes else "rows"
    return f"{kind} | {terms} | {name} {layout} | batch {batch} cells {cells} classes {classes}"


@lru_cache(maxsize=1024)
def _wishes(
    kind: str, terms: str, dtype: torch.dtype, device: torch.device, planes: bool, batch: int, cells: int, classes: int
) -> Wishes:
    entry = entries(gpu_name(device)).get(key_of(kind, terms, dtype, planes, batch, cells, classes))
    return () if entry is None else tuple(entry["config"].items())


@lru_cache(maxsize=16)
def entries(gpu: str) -> dict[str, dict[str, Any]]:
    """All results for a GPU by key; the user's hide those that are shipped. Read once a process."""
    return read(SHIPPED / file_name(gpu), gpu) | read(folder() / file_name(gpu), gpu)


def read(path: Path, gpu: str) -> dict[str, dict[str, Any]]:
    """The results in one file; none, and a warning, if it is damaged or not of this GPU."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        return _refuse(path, f"it cannot be read ({error})")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return _refuse(path, f"it is not of format {FORMAT}")
    if content.get("gpu") != gpu:
        return _refuse(path, f"it is of {content.get('gpu')!r}, not of {gpu!r}")
    found = content.get("entries")
    if not isinstance(found, dict):
        return _refuse(path, "it has no entries")
    good = {key: entry for key, entry in found.items() if _usable(key, entry)}
    if len(good) < len(found):
        bad = next(key for key in found if key not in good)
        warnings.warn(f"{path}: {len(found) - len(good)} entries cannot be used, the first is {bad!r}", stacklevel=2)
    return good


def _usable(key: str, entry: Any) -> bool:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("config"), dict):
        return False
    return legal_wishes(key.partition(" ")[0], entry["config"])


def _refuse(path: Path, why: str) -> dict[str, dict[str, Any]]:
    warnings.warn(f"{path}: {why}; launches are configured without it", stacklevel=3)
    return {}


def forget() -> None:
    """Read the files again at the next launch."""
    global version
    entries.cache_clear()
    _wishes.cache_clear()
    version += 1


@contextmanager
def forced(wishes: Wishes) -> Iterator[set[str]]:
    """Launches get these wishes and no others, for measuring them; the keys that were asked for are collected."""
    global _trial, version
    before, seen = _trial, set[str]()
    _trial = wishes, seen
    version += 1
    try:
        yield seen
    finally:
        _trial = before
        version += 1
