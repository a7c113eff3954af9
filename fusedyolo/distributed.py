"""A loss of the batch of all processes of a distributed training, of which each has a part."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from . import checks
from .drivers import of
from .losses import LossOutput


class GlobalLoss(nn.Module):
    """``criterion`` with what it divides by counted over all processes: their mean is the loss of the whole batch.

    ``DistributedDataParallel`` averages gradients over processes. Where a loss divides by the objects that it has
    found, that is no mean over the batch: a process with few objects counts as much as one with many. Here each process
    multiplies its loss by (its own divisor) / (that of all) * (number of processes), so that the averaged gradient is
    the one that a single process would have for all images. Processes may have different numbers of images, and no
    objects at all. Sums over the batch are multiplied by the number of processes.

    Divisors stay on the device: one ``all_reduce`` of a number a call, in every process, whatever it has found. Of
    kernels, the gradient is scaled by the launch that scales it for a ``GradScaler``. Without a process group the
    loss is that of the criterion.

    Args:
        criterion: a loss that divides by one number: one of YOLOv1, YOLOv3 and YOLOv4, YOLOv2's ``"darknet"`` and
            ``"lightnet"``, RetinaNet, SSD, FCOS or YOLOX, of which some recipes divide otherwise.
        group: the process group; the default one without it.

    Shapes:
        - arguments are those of ``criterion``.
        - output: its :class:`~fusedyolo.LossOutput`, total and parts multiplied; ``num_pos`` and ``num_invalid`` are
          those of this process.

    Raises:
        ValueError: ``criterion`` divides by several numbers (YOLOv5, Scaled-YOLOv4 and YOLOv2's ``"region"``, level by
            level), by one more than the objects (EfficientDet), or by a number that it does not tell (YOLOv8 and what
            it stands for: the sum of soft scores); or it is one of each image (``reduction="none"``).
    """

    def __init__(self, criterion: Any, group: Any = None):
        super().__init__()
        divides = None if criterion.head.by_image else of(criterion).divisor(criterion)
        if divides is None:
            want = "a loss that divides by one number, of images or of objects"
            checks.fail("criterion", type(criterion).__name__, want)
        self._divides = divides
        self.criterion = criterion
        self.group = group

    def forward(self, preds: Any, *arguments: Any, **geometry: Any) -> LossOutput:
        """The loss of this process's part of the batch, so that the mean over processes is that of all."""
        out: LossOutput = self.criterion(preds, *arguments, **geometry)
        if not dist.is_initialized():
            return out
        factor = self._factor(out, _images(preds))
        parts = {name: part * factor for name, part in out.parts.items()}
        return LossOutput(out.total * factor, parts, out.num_pos, out.num_invalid)

    def _factor(self, out: LossOutput, images: int) -> Tensor:
        """0-dim, of the type of the total."""
        size = dist.get_world_size(self.group)
        if self._divides == "nothing":
            return out.total.new_full((), size)
        own = out.num_pos.double() if self._divides == "objects" else out.total.new_full((), images).double()
        every = own.detach().clone()
        dist.all_reduce(every, group=self.group)
        return (size * own.clamp(min=1) / every.clamp(min=1)).to(out.total.dtype)


def _images(preds: Any) -> int:
    """How many a batch has: the first axis of every form of predictions."""
    while not isinstance(preds, Tensor):
        preds = next(iter(preds.values())) if isinstance(preds, dict) else preds[0]
    return preds.shape[0]
