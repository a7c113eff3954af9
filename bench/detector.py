"""A small detector with the head that a loss wants."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fusedyolo.drivers.protocol import LOGIT, POSITIVE, UNIT
from fusedyolo.tools.registry import Case, Workload

FINEST = 8  # stride of the first map
WIDTH = 64  # channels of each map
PRIOR = 0.01  # probability, before training, of what is rarely there: an object, a class of a focal loss


class Output(NamedTuple):
    """One map of predictions."""

    stride: int
    channels: int
    rare: Sequence[int]  # channels that hold logits of what is rarely there
    activation: Callable[[Tensor], Tensor]


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    LOGIT: lambda raw: raw,
    UNIT: torch.sigmoid,
    POSITIVE: functional.softplus,
}


def outputs(case: Case, work: Workload) -> list[Output]:
    """The maps that a loss takes, in its order."""
    found, counts = [], case.frame(work).cell
    for piece in case.pieces(work):
        for level in piece.levels:
            channels = counts[level] * piece.width
            rare = [first + each for first in range(0, channels, piece.width) for each in piece.rare]
            found.append(Output(case.strides[level], channels, rare, ACTIVATIONS[piece.values]))
    return found


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Convolution, group norm (the same at any batch size), SiLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.GroupNorm(8, outputs), nn.SiLU())


class Detector(nn.Module):
    """Predictions as the loss of a case takes them, from images [B, 3, H, W] in 0 ... 1: a feature pyramid (Lin et al.,
    2017) and a head of one convolution for each map of predictions.
    """

    def __init__(self, case: Case, work: Workload):
        super().__init__()
        self.case, self.outputs = case, outputs(case, work)
        levels = range(int(math.log2(max(case.strides) / FINEST)))
        self.stem = nn.Sequential(conv(3, WIDTH // 4, 2), conv(WIDTH // 4, WIDTH // 2, 2), conv(WIDTH // 2, WIDTH, 2))
        self.down = nn.ModuleList(nn.Sequential(conv(WIDTH, WIDTH, 2), conv(WIDTH, WIDTH)) for _ in levels)
        self.merge = nn.ModuleList(conv(WIDTH, WIDTH) for _ in levels)
        self.heads = nn.ModuleList(nn.Conv2d(WIDTH, output.channels, 1) for output in self.outputs)
        for head, output in zip(self.heads, self.outputs, strict=True):
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)
            head.bias.data[list(output.rare)] = -math.log(1 / PRIOR - 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        """The predictions, one map after another, as the loss takes them."""
        maps = [self.stem(images - 0.5)]
        for down in self.down:
            maps.append(down(maps[-1]))
        for i, merge in reversed(list(enumerate(self.merge))):
            maps[i] = merge(maps[i] + functional.interpolate(maps[i + 1], maps[i].shape[2:]))
        of = {FINEST << i: level for i, level in enumerate(maps)}
        heads = zip(self.heads, self.outputs, strict=True)
        preds = [output.activation(head(of[output.stride])) for head, output in heads]
        return [pred.permute(0, 2, 3, 1) for pred in preds] if self.case.driver.channels_last else preds
