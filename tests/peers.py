"""Other libraries that tests compare with, where they are installed."""

from __future__ import annotations

from types import ModuleType

import pytest

from bench import peers


def torchvision() -> ModuleType:
    """The module, or the test (or the module of tests that asks for it) is skipped."""
    try:
        return peers.torchvision()
    except ModuleNotFoundError:
        pytest.skip("torchvision is not installed", allow_module_level=True)
