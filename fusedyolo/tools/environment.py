"""The machine and the versions that a number was measured with; nothing that names a person or a path."""

from __future__ import annotations

import datetime
import hashlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


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
