"""Where kernels run: on a GPU, else in Triton's interpreter, or with ``--compiled`` emulated, as they are compiled."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from fusedyolo.tools import interpreter

os.environ["FUSEDYOLO_CONFIG_DIR"] = str(Path(tempfile.gettempdir(), "fusedyolo-tests-have-none"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(1)  # pytest-xdist runs one process a core

PINNED_TRITON = pytest.mark.skipif(
    not version("triton").startswith("3.7."), reason="resources and counts are those of the Triton of constraints.txt"
)

_COMPILED = pytest.StashKey[list[dict[str, Any]]]()
_SETTINGS = {
    "arch": int,
    "seed": int,
    "fusion": lambda text: {"on": None, "off": False}[text],
    "contraction": int,
    "noise": lambda text: {"on": True, "off": False}[text],
    "fine": lambda text: {"on": True, "off": False}[text],
    "lockstep": float,
}


def pytest_addoption(parser):
    parser.addoption("--compiled", action="store_true", help="run kernels on the emulator, as they are compiled")
    parser.addoption(
        "--compiled-as",
        action="append",
        default=[],
        metavar="SETTINGS",
        help=f"with --compiled: NAME=VALUE,... of {', '.join(_SETTINGS)} (seed=0); repeat to run each test each way",
    )


def pytest_configure(config):
    """Triton's interpreter must be chosen before any kernel is imported."""
    config.addinivalue_line("markers", "interpreter(reason): needs the interpreter, where a kernel can be looked into")
    config.stash[_COMPILED] = [_settings(text) for text in config.getoption("--compiled-as") or ["seed=0"]]
    if config.getoption("--compiled"):
        if DEVICE != "cpu":
            raise pytest.UsageError("--compiled: the emulator takes CPU tensors; hide the GPU: CUDA_VISIBLE_DEVICES=")
    elif DEVICE == "cpu":
        interpreter.prepare()


def _settings(text: str) -> dict[str, Any]:
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {name: _SETTINGS[name](value) for name, value in pairs}
    except (KeyError, ValueError):
        raise pytest.UsageError(f"--compiled-as: {text!r}, want NAME=VALUE,... of {', '.join(_SETTINGS)}") from None


def pytest_collection_modifyitems(config, items):
    if DEVICE == "cpu" and not config.getoption("--compiled"):
        return  # the interpreter runs
    for item in items:
        mark = item.get_closest_marker("interpreter")
        if mark is not None:
            item.add_marker(pytest.mark.skip(reason=mark.args[0]))


def pytest_generate_tests(metafunc):
    if metafunc.config.getoption("--compiled"):
        ways = metafunc.config.stash[_COMPILED]
        metafunc.parametrize("_compiled", ways, indirect=True, ids=metafunc.config.getoption("--compiled-as") or None)


def _poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``torch.empty`` and its kin, whose memory is NaN, or of integers 0x7f..., where operators of ours ask for it."""

    def make_poisoned(*args, **kwargs):
        tensor = make(*args, **kwargs)
        own = sys._getframe(1).f_globals.get("__name__", "").startswith("fusedyolo.")
        if own and type(tensor) is torch.Tensor and tensor.device.type in ("cpu", "cuda"):
            with _disable_current_modes():  # not to be counted
                tensor.fill_(float("nan") if tensor.is_floating_point() else int("7f" * tensor.element_size(), 16))
        return tensor

    return torch.compiler.allow_in_graph(make_poisoned)


@cache
def _poisoned_factories() -> list[tuple[Any, str, Callable[..., torch.Tensor]]]:
    """Not before the interpreter is chosen: tracers import Triton."""
    names = (torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")
    return [(owner, name, _poisoned(getattr(owner, name))) for owner, name in names]


@pytest.fixture(autouse=True)
def _poison(request, monkeypatch):
    """Memory that kernels are to write shows where they have not; the emulator knows that without."""
    if not request.config.getoption("--compiled"):
        for owner, name, poisoned in _poisoned_factories():
            monkeypatch.setattr(owner, name, poisoned)


def _not_traced(*args, **kwargs):
    pytest.skip("a tracer takes the emulator, a dispatch mode, for part of what it traces")


@pytest.fixture(autouse=True)
def _compiled(request, monkeypatch):
    """With ``--compiled``: every launch of the test is emulated, ``torch.empty`` is poison, and no fault is found."""
    if not request.config.getoption("--compiled"):
        yield
        return
    from fusedyolo.emulator import Device

    for module, name in ((torch, "compile"), (torch.library, "opcheck"), (torch.export, "export")):
        monkeypatch.setattr(module, name, _not_traced)
    with Device(**request.param) as device:
        yield
    device.check()
