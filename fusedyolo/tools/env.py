"""The machine and the versions that a number was measured with; and the command that prints them, with which
implementation runs and which launch configurations are found. Nothing names a person or a folder.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import subprocess
import warnings
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .. import tuned

ROOT = Path(__file__).resolve().parents[2]
VARIABLES = ("FUSEDYOLO_DISABLE", "TRITON_INTERPRET")
FOLDERS = ("FUSEDYOLO_CONFIG_DIR", "TRITON_CACHE_DIR")
PEERS = ("torchvision", "ultralytics", "yolov5", "yolox", "libreyolo", "lightnet")


def environment() -> dict[str, Any]:
    """What every result is kept with; ``?`` where a thing is not installed."""
    return {
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "fusedyolo": version("fusedyolo"),
        "commit": commit(),
    }


def kernels_digest() -> str:
    """Of the kernels' sources: times of others say nothing of these."""
    from .. import kernels

    digest = hashlib.sha256()
    for path in sorted(path for folder in kernels.__path__ for path in Path(folder).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def version(package: str) -> str:
    """Of an installed package, else ``?``."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "?"


def commit() -> str:
    """Of the checkout this file lies in, with a ``+`` where tracked files differ; ``?`` for an installed package."""
    command = ("git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*")
    if not (ROOT / ".git").exists():
        return "?"
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "?"


def report() -> dict[str, Any]:
    """Everything that a report of a fault should say."""
    from .. import backend  # loads Triton, and ``check`` must choose the interpreter before that

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, Any] = {name: value for name, value in environment().items() if name != "when"}
    chosen, why = backend.resolve("auto", device), ""
    if chosen == "triton":
        why = " (Triton's interpreter)" * (device.type == "cpu")
    elif backend.is_on("FUSEDYOLO_DISABLE"):
        why = ", because FUSEDYOLO_DISABLE is set"
    else:
        why = ", because " + ("PyTorch sees no GPU" if find_spec("triton") else "Triton is not installed")
    found["runs"] = f"{chosen} on {device.type}{why}"
    gpu, now = tuned.gpu_name(device), {"kernels": kernels_digest(), "triton": version("triton")}
    for name, path in (("shipped configurations", tuned.SHIPPED), ("own configurations", tuned.folder())):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            entries = tuned.read(path / tuned.file_name(gpu), gpu).values()
        old = sum(any(entry.get("provenance", {}).get(key) != now[key] for key in now) for entry in entries)
        found[name] = f"{len(entries)} for {gpu}" + f", {old} of them measured with other versions" * (old > 0)
        found[name] += "".join(f"; {warning.message}".replace(f"{path}{os.sep}", "") for warning in said)
    found["variables"] = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    found["variables"] |= {name: "set" for name in FOLDERS if name in os.environ}
    found["peers"] = {name: version(name) for name in PEERS if version(name) != "?"}
    return found


def run(options: argparse.Namespace) -> int:
    """Print it."""
    found = report()
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    shown = Table(show_header=False, box=None)
    for name, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {each}" for key, each in value.items())
        shown.add_row(name, value or "none")
    Console(soft_wrap=True).print(shown, highlight=False)
    return 0
