"""What the kernels compile to, for GPUs that need not be here."""

from typing import Any

import pytest
from conftest import PINNED_TRITON
from process import call


def compiled(name: str, dtype: str, target: str, size: int = 640) -> dict[str, Any]:
    """Resources of each launch, none of them with spills; in a process without the interpreter."""
    return spills_nothing(call("compiles", "step", name, dtype, target, size))


def spills_nothing(found: dict[str, Any]) -> dict[str, Any]:
    for mode, resources in found.items():
        assert resources["stack"] == 0, (mode, resources)
        assert resources["spills"] == 0, (mode, resources)
    return found


@PINNED_TRITON
@pytest.mark.parametrize(
    ("name", "dtype", "target", "planes"),
    [
        ("YOLOv4/darknet", "float32", "sm_80", 5),
        ("YOLOv5", "bfloat16", "gfx942", 1),
        ("YOLOv2/region", "float32", "sm_100", 5),
    ],
)
def test_no_spills_and_wide_accesses(name, dtype, target, planes):
    """The variants that have needed the most registers."""
    found = compiled(name, dtype, target)
    element = 32 if dtype == "float32" else 16
    # 16 bytes a thread, but for levels whose planes do not begin at multiples of that: another branch
    stores = {int(width): n for width, n in found["grad"]["stores"].items()}
    assert stores.keys() == {128, element}
    assert stores[element] == stores[128] * 128 // element
    loads = {int(width): n for width, n in found["loss"]["loads"].items()}
    assert loads[4 * element] >= planes  # that a tile reads, four cells a thread


@PINNED_TRITON
@pytest.mark.parametrize(
    ("name", "dtype"), [("YOLOv4/darknet", "float32"), ("FCOS", "float32"), ("EfficientDet", "bfloat16")]
)
def test_no_spills_on_newer_gpus(name, dtype):
    """These would with as few registers as older ones make do with."""
    compiled(name, dtype, "sm_100")


def test_no_spills_of_small_maps():
    """Few cells are few threads, and what a program searches at a time must be as few."""
    compiled("YOLOv3/darknet", "float32", "sm_90", size=128)


def test_no_spills_of_costs_in_float64():
    compiled("YOLOX", "float64", "sm_80")


@PINNED_TRITON
@pytest.mark.parametrize(
    ("name", "dtype", "target"),
    [
        ("YOLOv5", "float32", "sm_90"),
        ("YOLOv4/darknet", "bfloat16", "sm_100"),
        ("RetinaNet", "bfloat16", "sm_80"),
        ("FCOS", "float32", "sm_100"),
        ("YOLOv8", "bfloat16", "sm_80"),
    ],
)
def test_no_spills_with_weights(name, dtype, target):
    """The variants that would spill with as few registers as those without weights."""
    spills_nothing(call("compiles", "weighed", name, dtype, target))


@PINNED_TRITON
@pytest.mark.parametrize(
    ("name", "dtype", "target"),
    [("RetinaNet", "float32", "sm_90"), ("FCOS", "bfloat16", "sm_100"), ("SSD", "float32", "gfx942")],
)
def test_class_logits_are_wide_streams(name, dtype, target):
    """All launches of heads over anchors: the stream of gradients is stored 16 bytes a thread."""
    found = compiled(name, dtype, target)
    assert set(found) >= {"match", "loss", "grad"}
    if name == "RetinaNet":  # boxes are four numbers an anchor, 16 bytes too
        assert set(found["grad"]["stores"]) == {"128"}
    assert "128" in found["grad"]["stores"]
    assert "128" in found["loss"]["loads"]


def test_no_kernel_is_compiled_for_a_size():
    """Images of many sizes, batches and numbers of objects, in one piece and as maps: the same kernels."""
    assert set(call("compiles", "variants_by_size").values()) == {1}
