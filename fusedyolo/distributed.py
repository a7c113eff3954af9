"""A loss of the batch of all processes of a distributed training, of which each has a part."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from . import checks
from .losses import LossOutput


class GlobalLoss(nn.Module):
    """``criterion`` with what it divides by counted over all processes: their mean is the loss of the whole batch.

    ``DistributedDataParallel`` averages gradients over processes. Where a loss divides by the objects that it has
    found, that is no mean over the batch: a process with few objects counts as much as one with many. Here each process
    multiplies its loss by (its own divisor) / (that of all) * (number of processes), so that the averaged gradient is
    the one that a single process would have for all images; where a loss is divided by several numbers (level by level,
    branch by branch), each piece of it by its own. Processes may have different numbers of images, and no objects at
    all. Sums over the batch are multiplied by the number of processes.

    Divisors stay on the device: one ``all_reduce`` of a few numbers a call, in every process, whatever it has found. Of
    kernels, the gradient is scaled by the launch that scales it for a ``GradScaler``. Without a process group the
    loss is that of the criterion.

    Args:
        criterion: any of the losses, but one of each image (``reduction="none"``).
        group: the process group; the default one without it.

    Shapes:
        - arguments are those of ``criterion``.
        - output: its :class:`~fusedyolo.LossOutput`, total and parts multiplied; ``num_pos`` and ``num_invalid`` are
          those of this process.

    Raises:
        ValueError: ``criterion`` is no loss of this package, or one of each image.
    """

    def __init__(self, criterion: Any, group: Any = None):
        super().__init__()
        if isinstance(criterion, type) or not hasattr(criterion, "apart"):
            checks.fail("criterion", checks.describe(criterion), "a loss of fusedyolo, such as YOLOv4Loss")
        if criterion.head.by_image:
            checks.fail("criterion", f"{type(criterion).__name__} with reduction='none'", "a loss of the whole batch")
        self.criterion = criterion
        self.group = group

    def forward(self, preds: Any, *arguments: Any, **geometry: Any) -> LossOutput:
        """The loss of this process's part of the batch, so that the mean over processes is that of all."""
        if not dist.is_initialized():
            out: LossOutput = self.criterion(preds, *arguments, **geometry)
            return out
        own = self.criterion.apart(preds, *arguments, **geometry)
        every = own.amounts.clone()
        dist.all_reduce(every, group=self.group)
        size = dist.get_world_size(self.group)
        factors = (size * own.shares(every) / own.shares(own.amounts)).to(own.pieces.dtype)
        parts = {name: (part * factors[where]).sum() for name, (part, where) in own.parts.items()}
        return LossOutput((own.pieces * factors).sum(), parts, own.num_pos, own.num_invalid)
