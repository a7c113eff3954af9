"""A small detector with the head that a loss wants."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional

from fusedyolo.drivers.protocol import LOGIT, POSITIVE, UNIT
from fusedyolo.tools.registry import Case, Workload

FINEST = 8  # stride of the first map
WIDTH = 64  # channels of each map
PRIOR = 0.01  # probability, before training, of what is rarely there: an object, a class of a focal loss
ACTIVATIONS = {LOGIT: nn.Identity, UNIT: nn.Sigmoid, POSITIVE: nn.Softplus}


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Convolution, group norm (the same at any batch size), SiLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.GroupNorm(8, outputs), nn.SiLU())


class Detector(nn.Module):
    """Predictions as the loss of a case takes them, from images [B, 3, H, W] in 0 ... 1: a feature pyramid (Lin et al.,
    2017) and a head of one convolution for each map of predictions.
    """

    def __init__(self, case: Case, work: Workload):
        super().__init__()
        levels = range(int(math.log2(max(case.strides) / FINEST)))
        self.stem = nn.Sequential(conv(3, WIDTH // 4, 2), conv(WIDTH // 4, WIDTH // 2, 2), conv(WIDTH // 2, WIDTH, 2))
        self.down = nn.ModuleList(nn.Sequential(conv(WIDTH, WIDTH, 2), conv(WIDTH, WIDTH)) for _ in levels)
        self.merge = nn.ModuleList(conv(WIDTH, WIDTH) for _ in levels)
        self.heads, self.strides = nn.ModuleList(), []  # one a map of predictions
        self.channels_last = case.driver.channels_last
        for piece in case.pieces(work):
            for level in piece.levels:
                anchors = case.frame(work).cell[level]
                head = nn.Conv2d(WIDTH, anchors * piece.width, 1)
                nn.init.normal_(head.weight, std=0.01)
                nn.init.zeros_(head.bias)
                head.bias.data.view(anchors, piece.width)[:, list(piece.rare)] = -math.log(1 / PRIOR - 1)
                self.heads.append(nn.Sequential(head, ACTIVATIONS[piece.values]()))
                self.strides.append(case.strides[level])

    def forward(self, images: Tensor) -> list[Tensor]:
        """The predictions, one map after another, as the loss takes them."""
        maps = [self.stem(images - 0.5)]
        for down in self.down:
            maps.append(down(maps[-1]))
        for i, merge in reversed(list(enumerate(self.merge))):
            maps[i] = merge(maps[i] + functional.interpolate(maps[i + 1], maps[i].shape[2:]))
        of = {FINEST << i: level for i, level in enumerate(maps)}
        preds = [head(of[stride]) for head, stride in zip(self.heads, self.strides, strict=True)]
        return [pred.permute(0, 2, 3, 1) for pred in preds] if self.channels_last else preds
