"""The page of properties has no blank: each loss under each is held to it by a test that there is."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

import pytest
from trust.cases import CASES, OF_EACH_DRIVER, ONCE

ROOT = Path(__file__).parents[2]
MADE = runpy.run_path(str(ROOT / "docs" / "trust.py"))
IDS = {
    (wanted.title, case.name): MADE["test_of"](wanted, case)
    for group in MADE["GROUPS"].values()
    for wanted in group
    for case in CASES.values()
}


def test_the_page_is_made_from_its_table():
    text = (ROOT / "docs" / "trust.md").read_text()
    assert MADE["page"](text) == text, "python docs/trust.py writes it"


def test_every_cell_names_a_test():
    """A function that there is; and of files that this run has collected whole, a test of this very name."""
    functions = {
        file: {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}
        for file in {test.partition("::")[0] for test in IDS.values()}
    }
    for where, test in IDS.items():
        file, _, name = test.partition("::")
        assert name.partition("[")[0] in functions[file], where


def test_every_named_test_is_collected(request):
    config = request.config
    if config.option.keyword or config.option.markexpr or any("::" in argument for argument in config.args):
        pytest.skip("some tests are left out")
    collected = {item.nodeid.replace(" (_compiled)", "") for item in request.session.items}
    files = {test.partition("::")[0] for test in collected}
    for where, test in IDS.items():
        assert test in collected or test.partition("::")[0] not in files, (where, test)


def test_drivers_are_those_of_the_tests():
    assert MADE["ONCE"] == ONCE
    assert {case.driver.kind: case.name for case in OF_EACH_DRIVER} == MADE["OF_EACH_DRIVER"]
