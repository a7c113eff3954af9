"""Other libraries that tests compare with, where they are installed."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import warnings
from functools import cache
from importlib import import_module
from types import ModuleType

import pytest

from bench import peers


def torchvision() -> ModuleType:
    """The module, or the test (or the module of tests that asks for it) is skipped."""
    try:
        return peers.torchvision()
    except ModuleNotFoundError:
        pytest.skip("torchvision is not installed", allow_module_level=True)


def module(name: str) -> ModuleType:
    """A module of a package that needs torchvision, likewise; Ultralytics is to ask nobody and to settle elsewhere."""
    torchvision()
    os.environ.update(YOLO_CONFIG_DIR=_folder(), YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false", YOLO_VERBOSE="false")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module(name)
    except (ImportError, SystemExit) as error:  # of what else a package wants, too
        pytest.skip(f"{name} cannot be imported: {error}", allow_module_level=True)


@cache
def _folder() -> str:
    """A new one, of this process, which goes with it."""
    folder = tempfile.mkdtemp(prefix="fusedyolo-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
