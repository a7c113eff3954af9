"""Losses of cells that hold one object each: operators, autograd, launches."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..heads import cell_head_from_key
from ..kernels import cells
from ..kernels.launch import GridConfig, cell_config
from ..operator import differentiable, fake, operator
from ..reference import cell_views
from ..tuned import wishes
from .launch import Launch, Layout, accumulator, done_counter, layout, planned, refuse_double_backward, run_all


class CellOutputs(NamedTuple):
    """What a loss launch leaves."""

    total: Tensor  # 0-dim
    parts: Tensor  # [3]: box, confidence, class
    counts: Tensor  # int32 [2]: cells with an object, invalid rows
    taken: Tensor  # int32 [B * S * S]: of each cell its row times N and the box that answers for it, or -1
    grad: Tensor  # as the predictions, for a total multiplied by 1; empty unless asked for


@lru_cache(maxsize=256)
def _family(key: str) -> str:
    """The terms of a row: losses of the same ones share what tuning found."""
    head = cell_head_from_key(key)
    return f"{head.num_boxes} boxes" + " root" * head.root + " nearest" * head.nearest + " rescore" * head.rescore


def _places(key: str, at: Layout) -> cells.Places:
    """Where predictions lie."""
    boxes, confidences, scores = cell_views(at.meta(), cell_head_from_key(key))
    each = [(view.storage_offset(), *view.stride()[1:]) for view in (boxes, confidences, scores)]
    return cells.Places(boxes.stride(0), cells.Part(*each[0]), cells.Part(*each[1], 0), cells.Part(*each[2], 0))


def _config(key: str, pred: Layout) -> GridConfig:
    """The tile of a launch."""
    head, batch = cell_head_from_key(key), pred.shape[0]
    tuned = wishes("cell", _family(key), pred, len(pred.shape) == 2, batch, head.grid_size**2, head.num_classes)
    size = accumulator(pred.dtype)[1].itemsize
    return cell_config(batch * head.grid_size**2, head.channels, 5 * head.num_boxes, size, tuned)


@planned
def _plan(key: str, pred: Layout, grad: Layout | None, skip_one: bool | None) -> Launch:
    """A launch but for its tensors: of the loss, or of a gradient alone where ``skip_one`` says anything."""
    head, config, batch = cell_head_from_key(key), _config(key, pred), pred.shape[0]
    arguments = {
        "pred_at": _places(key, pred),
        "grad_at": None if grad is None or grad.stride == pred.stride else _places(key, grad),
        "gains": cells.Gains(head.box_gain, head.obj_gain, head.noobj_gain, head.cls_gain),
        "B": batch,
        "SPEC": cells.Spec(
            S=head.grid_size,
            N=head.num_boxes,
            C=head.num_classes,
            ROOT=head.root,
            NEAREST=head.nearest,
            RESCORE=head.rescore,
            ACC=accumulator(pred.dtype)[0],
            CELLS=config.cells,
            CHANNELS=config.channels,
            BLOCK_G=config.rows,
        ),
    }
    grid = (-(-batch * head.grid_size**2 // config.cells),)
    settings = config.threads, config.max_registers
    if skip_one is None:  # the one launch that decides
        return Launch(cells.cell_kernel, grid, arguments, *settings, exact=True, stages=config.stages)
    arguments["SKIP_ONE"] = skip_one
    return Launch(cells.cell_grad_kernel, grid, arguments, *settings, stages=config.stages)


def cell_launch(
    pred: Tensor,
    rows: Tensor,
    offsets: Tensor | None,
    key: str,
    outputs: CellOutputs,
    with_grad: bool,
    workspace: Tensor | None = None,
) -> Launch:
    """The launch that leaves the loss, and ``with_grad`` the gradient."""
    grad = outputs.grad if with_grad else None
    plan = _plan(key, layout(pred), None if grad is None else layout(grad), None)
    total, parts, counts, taken, _ = outputs
    sums = total.new_empty(plan.grid[0] * cells.N_PARTS.value)
    return plan.filled(
        {
            "pred_ptr": pred,
            "grad_ptr": grad,
            "targets": cells.Targets(rows, offsets),
            "outputs": cells.Outputs(total, parts, counts, taken, sums, done_counter(pred.device, workspace)),
            "M": rows.shape[0],
        }
    )


def cell_grad_launch(
    pred: Tensor, rows: Tensor, taken: Tensor, key: str, grad: Tensor, grad_total: Tensor, skip_one: bool = False
) -> Launch:
    """The launch that leaves the gradient times ``grad_total``, of what a loss launch has decided (``taken``).

    If ``skip_one``, ``grad`` is left as it is where that is 1.
    """
    plan = _plan(key, layout(pred), layout(grad), skip_one)
    return plan.filled(
        {"pred_ptr": pred, "grad_ptr": grad, "rows_ptr": rows, "taken_ptr": taken, "grad_out_ptr": grad_total}
    )


def cell_outputs(pred: Tensor, key: str, with_grad: bool) -> CellOutputs:
    """Memory for what a loss launch leaves."""
    acc, cells_an_image = accumulator(pred.dtype)[1], cell_head_from_key(key).grid_size ** 2
    return CellOutputs(
        pred.new_empty((), dtype=acc),
        pred.new_empty(3, dtype=acc),
        pred.new_empty(2, dtype=torch.int32),
        pred.new_empty(pred.shape[0] * cells_an_image, dtype=torch.int32),
        torch.empty_like(pred) if with_grad else pred.new_empty(0),
    )


@operator
def cell_loss(
    pred: Tensor, rows: Tensor, offsets: Tensor | None, key: str, with_grad: bool, workspace: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss of a head of cells in one launch; returns :class:`CellOutputs`.

    The gradient is that of the total by ``pred``, which the first backward takes. A compiled graph brings its
    ``workspace``.
    """
    outputs = cell_outputs(pred, key, with_grad)
    run_all([cell_launch(pred, rows, offsets, key, outputs, with_grad, workspace)], pred.device)
    return tuple(outputs)  # type: ignore[return-value]


@fake(cell_loss)
def _(pred, rows, offsets, key, with_grad, workspace=None):
    return tuple(cell_outputs(pred, key, with_grad))


@operator
def cell_loss_grad(grad_total: Tensor, pred: Tensor, rows: Tensor, taken: Tensor, key: str) -> Tensor:
    """Gradient of :func:`cell_loss`'s total by ``pred``, times ``grad_total`` (0-dim), in one launch."""
    grad = torch.empty_like(pred)
    run_all([cell_grad_launch(pred, rows, taken, key, grad, grad_total)], pred.device)
    return grad


@fake(cell_loss_grad)
def _(grad_total, pred, rows, taken, key):
    return torch.empty_like(pred)


@partial(operator, mutates=("grad",))
def cell_loss_rescale(grad: Tensor, grad_total: Tensor, pred: Tensor, rows: Tensor, taken: Tensor, key: str) -> None:
    """Turns ``grad``, the gradient for a ``grad_total`` of 1, into that for this one: a launch that is over at once if
    it is 1, which only the device knows.
    """
    run_all([cell_grad_launch(pred, rows, taken, key, grad, grad_total, skip_one=True)], pred.device)


@fake(cell_loss_rescale)
def _(grad, grad_total, pred, rows, taken, key):
    return None


def _save(ctx, inputs, output):
    pred, rows, _offsets, ctx.key, with_grad, _workspace = inputs
    outputs = CellOutputs(*output)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*outputs[1:])
    ctx.save_for_backward(pred, rows, outputs.taken)
    # Not among the saved tensors, which must not change: the first backward changes it and gives it away. A tensor of
    # another type belongs to a tracer, and a traced graph must not change what its forward returns.
    ctx.stored = outputs.grad if with_grad and type(outputs.grad) is Tensor else None


def _backward(ctx, grad_total, *_others):
    if grad_total is None:
        return None
    saved = ctx.saved_tensors
    grad, ctx.stored = ctx.stored, None
    if grad is None or torch.is_grad_enabled():  # with create_graph, the gradient is to know that it has none itself
        return cell_loss_grad(grad_total, *saved, ctx.key)
    cell_loss_rescale(grad, grad_total, *saved, ctx.key)
    return grad


differentiable(cell_loss, _backward, _save)
differentiable(cell_loss_grad, refuse_double_backward(cell_loss_grad))
