"""A small anchor-grid detector: network, anchors from the training boxes, and how many objects it finds."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .objects import Annotation

STRIDES = (8, 16, 32)
ANCHORS_PER_LEVEL = 3
PRIOR = 0.01  # objectness of an untrained prediction


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, group norm (the same at any batch size), SiLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.GroupNorm(8, outputs), nn.SiLU()
    )


class Detector(nn.Module):
    """Three prediction maps [B, 3 (5 + C), H / s, W / s], s = 8, 16, 32, from images [B, 3, H, W] in 0 ... 1."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.to_8 = nn.Sequential(conv(3, 16, stride=2), conv(16, 32, stride=2), conv(32, 48, stride=2), conv(48, 48))
        self.to_16 = nn.Sequential(conv(48, 64, stride=2), conv(64, 64))
        self.to_32 = nn.Sequential(conv(64, 64, stride=2), conv(64, 64))
        self.up = nn.Upsample(scale_factor=2)
        self.fuse_16 = conv(128, 64, kernel=1)
        self.fuse_8 = nn.Sequential(conv(112, 48, kernel=1), conv(48, 48))
        self.down_16, self.merge_16 = conv(48, 64, stride=2), conv(128, 64, kernel=1)
        self.down_32, self.merge_32 = conv(64, 64, stride=2), conv(128, 64, kernel=1)
        self.heads = nn.ModuleList(nn.Conv2d(width, ANCHORS_PER_LEVEL * (5 + num_classes), 1) for width in (48, 64, 64))
        for head in self.heads:
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)
            nn.init.constant_(head.bias.view(ANCHORS_PER_LEVEL, -1)[:, 4], -math.log(1 / PRIOR - 1))

    def forward(self, images: Tensor) -> list[Tensor]:
        """The raw predictions at strides 8, 16 and 32."""
        eighth = self.to_8(images - 0.5)
        sixteenth = self.to_16(eighth)
        top = self.to_32(sixteenth)
        middle = self.fuse_16(torch.cat([sixteenth, self.up(top)], 1))
        bottom = self.fuse_8(torch.cat([eighth, self.up(middle)], 1))
        middle = self.merge_16(torch.cat([middle, self.down_16(bottom)], 1))
        top = self.merge_32(torch.cat([top, self.down_32(middle)], 1))
        return [head(x) for head, x in zip(self.heads, (bottom, middle, top), strict=True)]


def fit_anchors(sizes: Tensor, rounds: int = 30) -> list[list[tuple[float, float]]]:
    """Anchors of each level, in pixels: k-means by IoU over widths and heights [N, 2], from quantiles of the area."""
    count = ANCHORS_PER_LEVEL * len(STRIDES)
    sizes = sizes[sizes.prod(1).argsort()].double()
    anchors = sizes[torch.linspace(0, len(sizes) - 1, 2 * count + 1).long()[1::2]]
    for _ in range(rounds):
        overlap = torch.minimum(sizes[:, None], anchors).prod(2)
        nearest = (overlap / (sizes.prod(1)[:, None] + anchors.prod(1) - overlap)).argmax(1)
        members = [sizes[nearest == k] for k in range(count)]
        anchors = torch.stack([own.mean(0) if len(own) else old for own, old in zip(members, anchors, strict=True)])
    anchors = [(round(w, 1), round(h, 1)) for w, h in anchors[anchors.prod(1).argsort()].tolist()]
    return [anchors[k : k + ANCHORS_PER_LEVEL] for k in range(0, count, ANCHORS_PER_LEVEL)]


def overlaps(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU [N, M] of boxes [N, 4] and others [M, 4], as corners."""
    low = torch.maximum(boxes[:, None, :2], others[:, :2])
    high = torch.minimum(boxes[:, None, 2:], others[:, 2:])
    shared = (high - low).clamp(min=0).prod(2)
    return shared / ((boxes[:, 2:] - boxes[:, :2]).prod(1)[:, None] + (others[:, 2:] - others[:, :2]).prod(1) - shared)


def hits(found: dict[str, Tensor], annotation: Annotation, iou: float = 0.5) -> int:
    """How many annotated boxes are found: a detection of their class with an IoU above ``iou``, each used once.

    ``found`` is of one image, on the CPU, as ``fusedyolo.Detections.images`` returns it.
    """
    size = torch.tensor([annotation.width, annotation.height])
    centre, half = (annotation.boxes * size.repeat(2)).split(2, dim=1)
    half = half / 2
    match = overlaps(found["boxes"], torch.cat([centre - half, centre + half], 1))
    match *= found["labels"][:, None] == annotation.classes
    count = 0
    for _ in range(min(match.shape)):
        best = int(match.argmax())
        row, column = divmod(best, match.shape[1])
        count += bool(match[row, column] > iou)
        match[row], match[:, column] = 0, 0
    return count
