"""Versions, GPU, which implementation runs, and which launch configurations are found."""

from __future__ import annotations

import argparse
import json
import os
import warnings
from importlib.util import find_spec
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .. import tuned
from .environment import environment, kernels_digest, version

VARIABLES = ("FUSEDYOLO_DISABLE", "FUSEDYOLO_CONFIG_DIR", "TRITON_INTERPRET", "TRITON_CACHE_DIR")
PEERS = ("torchvision", "ultralytics", "yolov5", "lightnet")


def report() -> dict[str, Any]:
    """Everything that a report of a fault should say."""
    from .. import backend  # loads Triton, and ``check`` must choose the interpreter before that

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, Any] = {name: value for name, value in environment().items() if name != "when"}
    found["cuda"], found["hip"] = torch.version.cuda, torch.version.hip
    if device.type == "cuda":
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        found["gpu memory"] = f"{torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB"
    chosen = backend.resolve("auto", device)
    interpreted = chosen == "triton" and device.type == "cpu"
    found["runs"] = f"{chosen} on {device.type}" + " (Triton's interpreter)" * interpreted + _why(chosen)
    gpu = tuned.gpu_name(device)
    for name, path in (("shipped configurations", tuned.SHIPPED), ("own configurations", tuned.folder())):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            entries = tuned.read(path / tuned.file_name(gpu), gpu).values()
        now = {"kernels": kernels_digest(), "triton": version("triton")}
        old = sum(any(entry.get("provenance", {}).get(key) != now[key] for key in now) for entry in entries)
        found[name] = f"{len(entries)} for {gpu}" + f", {old} of them measured with other versions" * (old > 0)
        found[name] += "".join(f"; {warning.message}" for warning in said)
    found["variables"] = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    found["peers"] = {name: version(name) for name in PEERS if version(name) != "?"}
    return found


def _why(chosen: str) -> str:
    if chosen == "triton":
        return ""
    if os.environ.get("FUSEDYOLO_DISABLE"):
        return ", because FUSEDYOLO_DISABLE is set"
    if find_spec("triton") is None:
        return ", because Triton is not installed"
    return ", because PyTorch sees no GPU"


def run(options: argparse.Namespace) -> int:
    """Print it."""
    found = report()
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    table = Table(show_header=False, box=None)
    for name, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {each}" for key, each in value.items()) or "none"
        table.add_row(name, "none" if value is None else str(value))
    Console(soft_wrap=True).print(table, highlight=False)
    return 0
