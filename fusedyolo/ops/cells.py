"""Losses of cells that hold one object each: operators, autograd, launches."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..heads import cell_head_from_key
from ..kernels import cells
from ..kernels.launch import GridConfig, cell_config
from ..operator import call, differentiable, fake, operator
from ..reference import cell_views
from ..tuned import wishes
from .launch import Launch, Layout, accumulator, done_counter, layout, planned, refuse_double_backward
from .steps import Outline, Steps


class CellOutputs(NamedTuple):
    """What a loss launch leaves."""

    total: Tensor  # 0-dim, or [B] of each image
    parts: Tensor  # [3], or of images [3 B]: box, confidence, class
    counts: Tensor  # int32 [2]: cells with an object, invalid rows
    taken: Tensor  # int32 [B * S * S]: of each cell its row times N and the box that answers for it, or -1; or hidden
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
def _plan(key: str, pred: Layout, grad: Layout | None, skip_one: bool | None) -> Steps:
    """A launch but for what calls bring: of the loss, or of a gradient alone where ``skip_one`` says anything."""
    head, config, batch, own = cell_head_from_key(key), _config(key, pred), pred.shape[0], Outline()
    rows = own.tensor("rows")
    arguments = {
        "pred_ptr": own.tensor("pred"),
        "grad_ptr": None if grad is None else own.tensor("grad"),
        "pred_at": _places(key, pred),
        "grad_at": None if grad is None or grad.stride == pred.stride else _places(key, grad),
        "gains": cells.Gains(
            head.box_gain,
            head.obj_gain,
            head.other_gain,
            head.noobj_gain,
            head.cls_gain,
            own.tensor("class_weights"),
        ),
        "B": batch,
        "SPEC": cells.Spec(
            S=head.grid_size,
            N=head.num_boxes,
            C=head.num_classes,
            ROOT=head.root,
            NEAREST=head.nearest,
            RESCORE=head.rescore,
            ZEROS=0 in (head.box_gain, head.obj_gain, head.other_gain, head.noobj_gain, head.cls_gain),
            BY_IMAGE=head.by_image,
            ACC=accumulator(pred.dtype)[0],
            CELLS=config.cells,
            CHANNELS=config.channels,
            BLOCK_G=config.rows,
        ),
    }
    grid = (-(-batch * head.grid_size**2 // config.cells),)
    settings = config.threads, config.max_registers
    if skip_one is not None:
        ends = {"rows_ptr": rows, "taken_ptr": own.tensor("taken"), "grad_out_ptr": own.tensor("grad_total")}
        ends["row_weights_ptr"] = own.tensor("weights")
        arguments |= ends | {"SKIP_ONE": skip_one}
        return own.steps(Launch(cells.cell_grad_kernel, grid, arguments, *settings, stages=config.stages))
    sums = own.scratch(accumulator(pred.dtype)[1], (grid[0] * cells.N_PARTS.value,))
    left = [own.tensor(name) for name in ("total", "parts", "counts", "taken")]
    each = own.scratch(accumulator(pred.dtype)[1], (3 * batch * head.grid_size**2,)) if head.by_image else None
    arguments |= {
        "targets": cells.Targets(rows, own.tensor("offsets"), own.tensor("weights")),
        "outputs": cells.Outputs(*left, each, sums, own.tensor("done")),
        "M": own.M,
    }
    # the one launch that decides
    return own.steps(Launch(cells.cell_kernel, grid, arguments, *settings, exact=True, stages=config.stages))


def _loss_steps(
    pred: Tensor,
    rows: Tensor,
    offsets: Tensor | None,
    key: str,
    outputs: CellOutputs,
    with_grad: bool,
    workspace: Tensor | None = None,
    class_weights: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Steps, dict[str, Any]]:
    """The plan of a loss, and of the gradient, and what a call brings to it; ``weights`` are those of the rows."""
    plan = _plan(key, layout(pred), layout(outputs.grad) if with_grad else None, None)
    given = {"pred": pred, "rows": rows, "offsets": offsets, "class_weights": class_weights, "weights": weights}
    return plan, given | {"done": done_counter(pred.device, workspace)} | outputs._asdict()


def cell_launch(
    pred: Tensor,
    rows: Tensor,
    offsets: Tensor | None,
    key: str,
    outputs: CellOutputs,
    with_grad: bool,
    class_weights: Tensor | None = None,
    weights: Tensor | None = None,
) -> Launch:
    """The launch that leaves the loss, and ``with_grad`` the gradient."""
    plan, given = _loss_steps(pred, rows, offsets, key, outputs, with_grad, None, class_weights, weights)
    return plan.launches(pred.device, rows.shape[0], **given)[0]


def _grad_steps(
    pred: Tensor,
    rows: Tensor,
    taken: Tensor,
    key: str,
    grad: Tensor,
    grad_total: Tensor,
    skip_one: bool,
    class_weights: Tensor | None,
    weights: Tensor | None,
) -> tuple[Steps, dict[str, Any]]:
    given: dict[str, Any] = {"pred": pred, "rows": rows, "taken": taken, "grad": grad, "grad_total": grad_total}
    given |= {"class_weights": class_weights, "weights": weights}
    return _plan(key, layout(pred), layout(grad), skip_one), given


def cell_grad_launch(
    pred: Tensor,
    rows: Tensor,
    taken: Tensor,
    key: str,
    grad: Tensor,
    grad_total: Tensor,
    skip_one: bool = False,
    class_weights: Tensor | None = None,
    weights: Tensor | None = None,
) -> Launch:
    """The launch that leaves the gradient times ``grad_total``, of what a loss launch has decided (``taken``).

    If ``skip_one``, ``grad`` is left as it is where that is 1.
    """
    plan, given = _grad_steps(pred, rows, taken, key, grad, grad_total, skip_one, class_weights, weights)
    return plan.launches(pred.device, rows.shape[0], **given)[0]


def cell_outputs(pred: Tensor, key: str, with_grad: bool) -> CellOutputs:
    """Memory for what a loss launch leaves."""
    head, acc = cell_head_from_key(key), accumulator(pred.dtype)[1]
    cells_an_image, images = head.grid_size**2, pred.shape[0] if head.by_image else 1
    return CellOutputs(
        pred.new_empty((images,) if head.by_image else (), dtype=acc),
        pred.new_empty(3 * images, dtype=acc),
        pred.new_empty(2, dtype=torch.int32),
        pred.new_empty(pred.shape[0] * cells_an_image, dtype=torch.int32),
        torch.empty_like(pred) if with_grad else pred.new_empty(0),
    )


@operator
def cell_loss(
    pred: Tensor,
    rows: Tensor,
    offsets: Tensor | None,
    key: str,
    with_grad: bool,
    workspace: Tensor | None = None,
    class_weights: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss of a head of cells in one launch; returns :class:`CellOutputs`.

    The gradient is that of the total by ``pred``, which the first backward takes. A compiled graph brings its
    ``workspace``; ``weights`` are those of the rows.
    """
    outputs = cell_outputs(pred, key, with_grad)
    plan, given = _loss_steps(pred, rows, offsets, key, outputs, with_grad, workspace, class_weights, weights)
    plan.run(pred.device, rows.shape[0], **given)
    return tuple(outputs)  # type: ignore[return-value]


@fake(cell_loss)
def _(pred, rows, offsets, key, with_grad, workspace=None, class_weights=None, weights=None):
    return tuple(cell_outputs(pred, key, with_grad))


@operator
def cell_loss_grad(
    grad_total: Tensor,
    pred: Tensor,
    rows: Tensor,
    taken: Tensor,
    key: str,
    class_weights: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Gradient of :func:`cell_loss`'s total by ``pred``, times ``grad_total`` (0-dim), in one launch."""
    grad = torch.empty_like(pred)
    plan, given = _grad_steps(pred, rows, taken, key, grad, grad_total, False, class_weights, weights)
    plan.run(pred.device, rows.shape[0], **given)
    return grad


@fake(cell_loss_grad)
def _(grad_total, pred, rows, taken, key, class_weights=None, weights=None):
    return torch.empty_like(pred)


@partial(operator, mutates=("grad",))
def cell_loss_rescale(
    grad: Tensor,
    grad_total: Tensor,
    pred: Tensor,
    rows: Tensor,
    taken: Tensor,
    key: str,
    class_weights: Tensor | None = None,
    weights: Tensor | None = None,
) -> None:
    """Turns ``grad``, the gradient for a ``grad_total`` of 1, into that for this one: a launch that is over at once if
    it is 1, which only the device knows.
    """
    plan, given = _grad_steps(pred, rows, taken, key, grad, grad_total, True, class_weights, weights)
    plan.run(pred.device, rows.shape[0], **given)


@fake(cell_loss_rescale)
def _(grad, grad_total, pred, rows, taken, key, class_weights=None, weights=None):
    return None


def _save(ctx, inputs, output):
    pred, rows, _offsets, ctx.key, with_grad, _workspace, class_weights, weights = inputs
    outputs = CellOutputs(*output)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(pred, rows, outputs.taken, class_weights, weights)
    # Not among the saved tensors, which must not change: the first backward changes it and gives it away. A tensor of
    # another type belongs to a tracer, and a traced graph must not change what its forward returns.
    ctx.stored = outputs.grad if with_grad and type(outputs.grad) is Tensor else None


def _backward(ctx, grad_total):
    if grad_total is None:
        return None
    if grad_total.dim():  # that of a sum is one number many times
        grad_total = grad_total.contiguous()
    *saved, class_weights, weights = ctx.saved_tensors
    grad, ctx.stored = ctx.stored, None
    if grad is None or torch.is_grad_enabled():  # with create_graph, the gradient is to know that it has none itself
        return call(cell_loss_grad, grad_total, *saved, ctx.key, class_weights, weights)
    call(cell_loss_rescale, grad, grad_total, *saved, ctx.key, class_weights, weights)
    return grad


differentiable(cell_loss, _backward, _save, outputs=1)
differentiable(cell_loss_grad, refuse_double_backward(cell_loss_grad))
