"""Launches of Triton's, compiled and emulated."""

import subprocess
import sys

import pytest
from conftest import DEVICE
from process import call

from fusedyolo.emulator import Device


@pytest.fixture(scope="module")
def everything():
    return call("emulator.compiled", "everything")


@pytest.fixture
def found(everything):
    return everything["launches"]


def test_a_kernel_of_a_test_is_compiled_and_run(found):
    assert found["right"]
    assert found["record"] == ["scale_kernel", 4, 2, ["BLOCK", "factor", "n", "out_ptr", "x_ptr"], True]
    assert found["by_program"] == [0, 1, 2, 3]


def test_memory_that_nothing_writes_is_poisoned_and_counted(found):
    assert found["missing"] == [0, 4 * 400]
    assert found["poisoned"] == [3 * 599 + 1, True]


def test_some_programs_of_a_grid(found):
    assert found["sampled"] == [1000 - 3 * 256, 4, [3]]


def test_faults_are_listed(found):
    none, faults, message = found["faults"]
    assert none == 0
    assert faults
    assert all(fault.startswith("scale_kernel: global access out of bounds at `") for fault in faults)
    assert "out of bounds" in message
    assert message.startswith("Fault: ")


def test_the_kernels_are_chosen_on_a_cpu(found):
    assert found["backends"] == ["torch", "triton", "torch", "torch"]


def test_grids_of_more_dimensions_are_refused(found):
    assert found["grids"].startswith("NotImplementedError: grid_of_two_kernel: a grid of (2, 2)")


def test_everything_is_as_before(found):
    assert found["restored"] == [True, True]


def test_fusion(everything):
    found = everything["rounding"]
    assert [fusion for fusion, _ in found["as asked"]] == [True, False]
    assert [fusion for fusion, _ in found["off"]] == [False, False]
    assert found["on"] == found["as asked"]
    (_, fused), (_, apart) = found["as asked"]
    assert fused > 0
    assert apart == 0


def test_memory_of_our_operators_is_known(everything):
    found = everything["operators"]
    assert found["kept"] == [0, True, 1]
    missing, sound, _ = found["drop"]
    assert missing > 0
    assert not sound


def test_memory_that_launches_share_is_left_at_zero(everything):
    assert everything["unclean"] == ["memory that launches share is not left at 0", "Fault"]


@pytest.mark.skipif(DEVICE != "cpu", reason="kernels are interpreted on a CPU only")
def test_interpreted_kernels_are_refused():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), Device():
        pass


def test_importing_it_imports_no_triton():
    code = "import sys, fusedyolo; assert 'fusedyolo.emulator' not in sys.modules\nimport fusedyolo.emulator\n"
    subprocess.run([sys.executable, "-c", code + "assert 'triton' not in sys.modules"], check=True)
