"""What tests compile in a process without Triton's interpreter; results are as JSON has them."""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

import fusedyolo
from fusedyolo import detections, ops
from fusedyolo.ops import select
from fusedyolo.tools.codegen import compile_launch, compile_step, options_of
from fusedyolo.tools.registry import CASES, Workload


def step(name: str, dtype: str, target: str, size: int) -> dict[str, Any]:
    """Resources of each launch of a training step."""
    return compile_step(CASES[name], Workload(batch=2, dtype=dtype, size=size), target)


def weighed(name: str, dtype: str, target: str) -> dict[str, Any]:
    """Those of a step with weights of rows and of classes."""
    case, work = CASES[name], Workload(batch=2, dtype=dtype, size=640)
    rows = case.targets(work)
    criterion = case.build(work.classes, "auto", class_weights=[1.0] * (work.classes + case.background))
    targets = torch.cat((rows, torch.ones(len(rows), 1)), 1)
    call = case.driver.read(
        criterion, case.pack(case.predictions(work, empty=True), work), targets, **case.geometry(work)
    )
    launches = case.driver.launches(criterion.head, call)
    return {name: _resources(launch, target) for name, launch in launches.items()}


def selection(form: str, dtype: str, target: str) -> list[list[Any]]:
    """Names, stacks and spills of the launches that select detections."""
    if form == "softmax":
        criterion, sizes = fusedyolo.YOLOv2Loss([(1, 1)] * 5, 20), [(5 * 25, 13)]
    else:
        anchors = [[(10, 13), (16, 30), (33, 23)]] * 3
        criterion, sizes = fusedyolo.YOLOv5Loss(anchors, (8, 16, 32), 80), [(255, 80), (255, 40), (255, 20)]
    preds = [torch.empty(2, channels, side, side, dtype=getattr(torch, dtype)) for channels, side in sizes]
    found, launches = select.scan_launches(preds, criterion.head, 0.25, 16384)
    order, outputs = torch.empty(found.scores.shape, dtype=torch.int64), detections._outputs(preds[0], 300)
    launches.append(select.nms_launch(found, order, outputs, criterion.head.num_classes, 0.45, False))
    compiled = [(launch.kernel.__name__, _resources(launch, target)) for launch in launches]
    return [[name, resources["stack"], resources["spills"]] for name, resources in compiled]


def cells(dtype: str, target: str) -> dict[str, Any]:
    """Resources of the launches over grids of cells, in both layouts, with the gradient at once and without."""
    key = fusedyolo.YOLOv1Loss(20, recipe="darknet").head.key
    found = {}
    for layout, shape in (("flat", (16, 1470)), ("grid", (16, 7, 7, 30))):
        pred, rows = torch.empty(shape, dtype=getattr(torch, dtype)), torch.empty(118, 6)
        offsets = torch.empty(18, dtype=torch.int32)
        left = ops.cell_outputs(pred, key, True)
        if layout == "flat":
            found["both"] = ops.cell_launch(pred, rows, offsets, key, left, True)
            found["rescale"] = ops.cell_grad_launch(pred, rows, left.taken, key, left.grad, left.total, True)
        else:
            found["loss"] = ops.cell_launch(pred, rows, None, key, left, False)
            found["grad"] = ops.cell_grad_launch(pred, rows, left.taken, key, left.grad, left.total)
    return {mode: _resources(launch, target) for mode, launch in found.items()}


def _resources(launch: Any, target: str) -> dict[str, Any]:
    made = compile_launch(launch.kernel, launch.arguments, options_of(launch, target), target)
    return made.as_dict() | {"threads": launch.threads}


def variants_by_size() -> dict[str, int]:
    """How many kernels RetinaNet's launches are compiled to, for images of many sizes, batches and objects."""
    backend, binders, seen = make_backend(GPUTarget("cuda", 90, 32)), {}, {}
    head = fusedyolo.RetinaNetLoss(80).head
    for size in range(256, 961, 32):
        for batch, objects in ((1, 0), (2, 16), (16, 117)):
            maps = [-(-size // stride) for stride in (8, 16, 32)]
            n = sum(9 * side * side for side in maps)
            for preds in (
                [torch.empty(batch, n, c) for c in (80, 4)],
                [torch.empty(batch, 9 * c, side, side) for c in (80, 4) for side in maps],
            ):
                geometry, rows = ops.Geometry((size, size), False, (9, 9)), torch.empty(objects, 6)
                anchors = torch.empty(n, 4)
                outputs = ops.dense_outputs(preds, anchors, head, True)
                for launch in ops.loss_launches(preds, anchors, rows, None, head, geometry, outputs):
                    kernel = launch.kernel
                    if kernel not in binders:
                        binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, backend)
                    _, key, _ = binders[kernel](**launch.arguments, **launch.options(True))
                    seen.setdefault(f"{kernel.__name__} {len(preds)}", set()).add(str(key))
    return {name: len(keys) for name, keys in seen.items()}
