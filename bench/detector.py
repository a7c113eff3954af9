"""A small detector with the head that a loss wants, fit to the training boxes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fusedyolo.drivers.protocol import LOGIT, POSITIVE, UNIT
from fusedyolo.tools.registry import Case, Workload

COARSEST = 32  # stride of the last map that all heads share
WIDTHS = {8: 48, 16: 64}  # channels of the maps by stride; 64 beyond
PRIOR = 0.01  # probability, before training, of what is rarely there: an object, a class of a focal loss


def fit(case: Case, size: int, boxes: Tensor) -> Case:
    """The case for images of ``size`` pixels with boxes of these widths and heights [N, 2], relative to the image.

    Anchors that a loss is made with become those of the boxes, and a grid of any image that of the last map; anchors
    that calls bring stay those of their papers.
    """
    if case.grid:
        return replace(case, grid=size // COARSEST)
    if not case.anchors:
        return case
    anchors = fit_anchors(boxes * size, [len(level) for level in case.anchors])
    return replace(case, anchors=tuple(tuple((w / case.unit, h / case.unit) for w, h in level) for level in anchors))


def fit_anchors(sizes: Tensor, levels: Sequence[int]) -> list[list[tuple[float, float]]]:
    """So many anchors for each level, the smallest first: of widths and heights [N, 2], in pixels, ordered by area, the
    means of equal parts.
    """
    count = sum(levels)
    parts = sizes[sizes.prod(1).argsort()].double().repeat_interleave(count, 0).chunk(count)
    means = torch.stack([part.mean(0) for part in parts])
    ordered = iter([(round(w, 1), round(h, 1)) for w, h in means[means.prod(1).argsort()].tolist()])
    return [[next(ordered) for _ in range(level)] for level in levels]


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


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, group norm (the same at any batch size), SiLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.GroupNorm(8, outputs), nn.SiLU()
    )


class Detector(nn.Module):
    """Predictions as the loss of a case takes them, from images [B, 3, H, W] in 0 ... 1."""

    def __init__(self, case: Case, work: Workload):
        super().__init__()
        self.case, self.outputs = case, outputs(case, work)
        self.to_8 = nn.Sequential(conv(3, 16, stride=2), conv(16, 32, stride=2), conv(32, 48, stride=2), conv(48, 48))
        self.to_16 = nn.Sequential(conv(48, 64, stride=2), conv(64, 64))
        self.to_32 = nn.Sequential(conv(64, 64, stride=2), conv(64, 64))
        self.up = nn.Upsample(scale_factor=2)
        self.fuse_16 = conv(128, 64, kernel=1)
        self.fuse_8 = nn.Sequential(conv(112, 48, kernel=1), conv(48, 48))
        self.down_16, self.merge_16 = conv(48, 64, stride=2), conv(128, 64, kernel=1)
        self.down_32, self.merge_32 = conv(64, 64, stride=2), conv(128, 64, kernel=1)
        beyond = int(math.log2(max(case.strides) / COARSEST))
        self.beyond = nn.ModuleList(conv(64, 64, stride=2) for _ in range(beyond))
        self.heads = nn.ModuleList(nn.Conv2d(WIDTHS.get(o.stride, 64), o.channels, 1) for o in self.outputs)
        for head, output in zip(self.heads, self.outputs, strict=True):
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)
            head.bias.data[list(output.rare)] = -math.log(1 / PRIOR - 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        """The predictions, one map after another, as the loss takes them."""
        maps, heads = self.pyramid(images), zip(self.heads, self.outputs, strict=True)
        preds = [output.activation(head(maps[output.stride])) for head, output in heads]
        return [pred.permute(0, 2, 3, 1) for pred in preds] if self.case.driver.channels_last else preds

    def pyramid(self, images: Tensor) -> dict[int, Tensor]:
        """Maps by stride."""
        eighth = self.to_8(images - 0.5)
        sixteenth = self.to_16(eighth)
        top = self.to_32(sixteenth)
        middle = self.fuse_16(torch.cat([sixteenth, self.up(top)], 1))
        bottom = self.fuse_8(torch.cat([eighth, self.up(middle)], 1))
        middle = self.merge_16(torch.cat([middle, self.down_16(bottom)], 1))
        maps = {8: bottom, 16: middle, COARSEST: self.merge_32(torch.cat([top, self.down_32(middle)], 1))}
        for layer in self.beyond:
            stride = max(maps)
            maps[2 * stride] = layer(maps[stride])
        return maps
