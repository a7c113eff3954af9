"""What a step costs, counted at full size in the interpreter: launches, bytes, host waits."""

import pytest

from bench.measure import count_step
from fusedyolo.tools.registry import CASES, Workload

pytestmark = pytest.mark.interpreter("sectors are counted in the interpreter")


@pytest.mark.parametrize(
    ("name", "batch", "form", "limit"),
    [
        # boxes near a tile are five loads each, a sector a load, so that none waits for another; they lie in a cache
        ("YOLOv2/darknet", 16, "Targets", 1.13),
        ("YOLOv4/darknet", 2, "packed", 1.12),
        ("YOLOv5", 2, "packed", 1.15),
    ],
)
def test_a_step_is_two_launches_and_little_more_than_the_gradient(name, batch, form, limit):
    """640 pixels, 80 classes, COCO-like objects; forward and backward. Most of it grows as the batch does."""
    case, work = CASES[name], Workload(batch=batch, form=form)
    counts = count_step(case, work, "fused", exact=True)
    assert counts.triton_launches == 2
    assert counts.launches <= 2, counts.ops
    assert counts.syncs == 0, counts.sync_ops
    moved = (counts.bytes_loaded + counts.bytes_stored) / case.prediction_bytes(work)
    # the gradient, objectness twice, two bits a prediction twice; box logits where there is an ignore mask
    floor = 1 + 2 * 4 / (4 * 85) + 0.5 / (4 * 85) + (0 if name == "YOLOv5" else 4 * 4 / (4 * 85))
    assert floor < moved <= limit


@pytest.mark.parametrize(("name", "launches", "limit"), [("RetinaNet", 4, 2.15), ("SSD", 6, 3.3), ("FCOS", 4, 2.15)])
def test_a_step_over_anchors_reads_and_writes_class_logits_once(name, launches, limit):
    """80 classes; the gradient launch included."""
    case, work = CASES[name], Workload(batch=1, size=128 if name == "SSD" else 256)
    counts = count_step(case, work, "fused", exact=True)
    assert counts.launches <= launches, counts.ops
    assert counts.syncs == 0, counts.sync_ops
    moved = counts.bytes / case.prediction_bytes(work)
    assert 2 * 80 / 85 < moved <= limit
