"""Who is assigned to what, as it is compiled: decided at one place, of numbers that are rounded one by one."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from conftest import PINNED_TRITON
from process import call

pytestmark = PINNED_TRITON  # another names other lines

# Functions that decide, and the losses whose launches hold them. A row's validity (row_valid) is none: it compares
# numbers as they were loaded, so that it may be asked for anywhere.
DECIDE = {
    "YOLOv1/paper": {"cells._first_rows", "cells._responsible"},
    "iou_band": {"assign._nearest_rows"},
    "YOLOv4/darknet": {"assign.row_cell", "assign.best_anchor", "assign._candidates", "ignore.ignored"},
    "YOLOv5": {"assign.row_cell", "assign.ratio", "assign._candidates"},
    "YOLOv7": {"assign.row_cell", "assign.ratio", "offer._list_offers", "choose._best_offered", "choose._pick"},
    "RetinaNet": {"by_iou.most_overlap", "by_iou.claimed"},
    "FCOS": {"by_centre.smallest_around"},
    "YOLOv8": {"wish.in_region", "wish.overlap_of", "pick._best_reached"},
}


@cache
def compiled(what: str) -> list[dict[str, Any]]:
    """Of each launch what tests/inlined.py finds, in a process without the interpreter."""
    return call("inlined", "launches_of", what)


@pytest.mark.parametrize("name", DECIDE)
def test_decided_once_and_without_contraction(name):
    """A decision is compiled at one place of one launch, in which no product runs into a sum."""
    for function in DECIDE[name]:
        holding = [launch for launch in compiled(name) if function in launch["functions"]]
        assert len(holding) == 1, function
        (launch,) = holding
        sites = launch["functions"][function]["sites"]
        assert len(sites) == 1, (function, sites)
        assert launch["fusion"] is False  # ptxas is told so, too
        assert {name: found["fused"] for name, found in launch["functions"].items() if found["fused"]} == {}


def test_a_broken_rule_is_seen():
    """A comparison at two places, fused or not; a product and a sum that a line asks to fuse are not reported."""
    fused, exact = (launch["functions"]["inlined.decides"] for launch in compiled("toy"))
    assert len(fused["sites"]) == len(exact["sites"]) == 2
    assert fused["fused"]
    assert exact["fused"] == []
