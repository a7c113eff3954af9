"""Custom operators: what the dispatcher, autograd and torch.compile see, and the launches behind them."""

from triton import knobs

from ..operator import call
from ..tools import interpreter
from .cells import (
    CellOutputs,
    cell_grad_launch,
    cell_launch,
    cell_loss,
    cell_loss_grad,
    cell_loss_rescale,
    cell_outputs,
)
from .dense import Geometry, dense_loss, dense_loss_grad, dense_loss_rescale, dense_outputs, grad_launch, loss_launches
from .grid import GridOutputs, grid_grad_launch, grid_launches, grid_loss, grid_loss_grad, grid_outputs
from .launch import Launch, accumulator, forget_plans, run_all, shared_zeros, workspace
from .picking import workspace_rows
from .picks import picked_loss, picked_loss_grad, picked_loss_rescale
from .pointwise import box_loss, box_loss_grad, label_loss, label_loss_grad

__all__ = [
    "CellOutputs",
    "Geometry",
    "GridOutputs",
    "Launch",
    "accumulator",
    "box_loss",
    "box_loss_grad",
    "call",
    "cell_grad_launch",
    "cell_launch",
    "cell_loss",
    "cell_loss_grad",
    "cell_loss_rescale",
    "cell_outputs",
    "dense_loss",
    "dense_loss_grad",
    "dense_loss_rescale",
    "dense_outputs",
    "forget_plans",
    "grad_launch",
    "grid_grad_launch",
    "grid_launches",
    "grid_loss",
    "grid_loss_grad",
    "grid_outputs",
    "label_loss",
    "label_loss_grad",
    "loss_launches",
    "picked_loss",
    "picked_loss_grad",
    "picked_loss_rescale",
    "run_all",
    "shared_zeros",
    "workspace",
    "workspace_rows",
]

if knobs.runtime.interpret:  # as it comes it rounds otherwise than a GPU, and takes some truth values for floats
    interpreter.prepare()
