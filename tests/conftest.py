"""Where kernels run: on a GPU, else in Triton's interpreter, or with ``--compiled`` emulated, as they are compiled."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedyolo.tools import interpreter

os.environ["FUSEDYOLO_CONFIG_DIR"] = str(Path(tempfile.gettempdir(), "fusedyolo-tests-have-none"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(1)  # pytest-xdist runs one process a core

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
