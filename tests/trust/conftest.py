"""What takes long here is left out unless it is asked for: ``--long``, and more of drawn cases with ``--cases``."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also run what takes long")
    parser.addoption("--cases", type=int, help="how many cases each test draws that draws any, others each time")
    parser.addoption("--steps", type=int, default=2000, help="how many steps the long runs take")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes minutes; runs with --long or --cases")
    cases = config.getoption("--cases", default=None)
    if cases is not None:
        every = list(HealthCheck)
        settings.register_profile(
            "long", max_examples=cases, deadline=None, print_blob=True, suppress_health_check=every
        )
        settings.load_profile("long")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--long", default=False) or config.getoption("--cases", default=None) is not None:
        return
    for item in items:
        if item.get_closest_marker("long") is not None:
            item.add_marker(pytest.mark.skip(reason="takes long: --long"))
