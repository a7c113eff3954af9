"""Custom operators: what the dispatcher, autograd and torch.compile see, and the launches behind them."""

from .grid import grid_launch, grid_loss, grid_loss_grad, grid_outputs
from .launch import Launch, accumulator
from .pointwise import box_loss, box_loss_grad, label_loss, label_loss_grad

__all__ = [
    "Launch",
    "accumulator",
    "box_loss",
    "box_loss_grad",
    "grid_launch",
    "grid_loss",
    "grid_loss_grad",
    "grid_outputs",
    "label_loss",
    "label_loss_grad",
]
