"""For tests/tools/test_predict.py, in a process without Triton's interpreter: kernels are what the compiler takes."""

from unittest import mock

import triton
from fusedyolo.kernels.terms.label import bce

from bench.predict import execute_step
from fusedyolo.ops.launch import Launch
from fusedyolo.tools.registry import CASES, Workload

SMALL = {
    "YOLOv1/paper": Workload(batch=2, classes=20),
    "YOLOv2/region": Workload(batch=4, size=96, classes=20),
    "SSD": Workload(batch=2, size=96, classes=20),
}
LARGER = {
    "YOLOv2/region": Workload(batch=24, size=160, classes=20),
    "SSD": Workload(batch=4, size=128, classes=20),
}
CROWDS = ("RetinaNet", "FCOS")


def crowds():
    """Steps of one image with as many objects as in COCO, and with many more."""
    works = [Workload(batch=1, size=160, classes=20, objects=objects) for objects in ("coco", "crowded:150")]
    return {name: [execute_step(CASES[name], work, "sm_90", exact=True) for work in works] for name in CROWDS}


@triton.jit
def bce_twice(x, t, args):
    """A term as it is, and once more the other way round."""
    loss, d = bce(x, t, args)
    again, d_again = bce(1.0 - x, 1.0 - t, args)
    return loss + again, d - d_again


def spoilt():
    """The grid of ``SMALL`` whose launch has another term for objectness."""
    run = Launch.run

    def run_spoilt(self):
        if "terms" in self.arguments:
            self.arguments["terms"] = self.arguments["terms"]._replace(objectness=bce_twice)
        run(self)

    with mock.patch.object(Launch, "run", run_spoilt):
        return execute_step(CASES["YOLOv2/region"], SMALL["YOLOv2/region"], "sm_90", exact=True)


def steps(what):
    """What is asked for, by case."""
    if what == "small":
        return {name: execute_step(CASES[name], work, "sm_90", exact=True) for name, work in SMALL.items()}
    if what == "spoilt":
        return spoilt()
    if what == "crowds":
        return crowds()
    return {
        name: [execute_step(CASES[name], work, "sm_90", exact) for exact in (False, True)]
        for name, work in LARGER.items()
    }
