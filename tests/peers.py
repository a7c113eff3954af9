"""Other libraries that tests compare with, where they are installed."""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib import import_module
from types import ModuleType

import pytest
import torch


def torchvision() -> ModuleType:
    """The module, or the test (or the module of tests that asks for it) is skipped.

    Wheels for a GPU do not load their compiled operators beside a CPU build of PyTorch, and even importing them fails
    then, for it describes an operator that is not there. Two declarations are enough for all that is Python in it.
    """
    found = _torchvision()
    if found is None:
        pytest.skip("torchvision is not installed", allow_module_level=True)
    return found


@lru_cache
def _torchvision() -> ModuleType | None:
    try:
        return import_module("torchvision")
    except ModuleNotFoundError:
        return None
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # what the first attempt has left
    library = _library()
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return import_module("torchvision")


@lru_cache
def _library() -> torch.library.Library:
    """What the declarations live as long as."""
    return torch.library.Library("torchvision", "DEF")
