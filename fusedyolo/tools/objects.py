"""Objects from samplers, which need no data."""

from __future__ import annotations

import numpy as np
import torch

# Measured on the 5,000 images and 36,781 boxes of COCO val2017, images up to 640 px on a canvas of 640 x 640.
COCO_PERCENT = [0, 1, 12, 30, 40, 50, 60, 70, 80, 90, 95, 99, 100]  # of the images have at most as many objects as
COCO_COUNT = [0, 1, 1, 2, 3, 4, 6, 9, 12, 18, 23, 34, 63]
COCO_LOG_SIDE = -1.094, -0.556  # log(sqrt(w * h)) = -1.094 - 0.556 log(objects in the image) + noise
COCO_LOG_SIDE_STD = 0.531, 0.867  # of that noise: between images, and between the objects of one image
COCO_LOG_ASPECT = -0.132, 0.783  # mean and deviation of log(w / h)
COCO_PERSON = 0.30  # share of the most common class; the k-th of the others falls off as 1 / (k + 5)


def coco_like(batch: int, generator: torch.Generator, num_classes: int = 80) -> torch.Tensor:
    """Packed rows of ``batch`` images with objects distributed as in COCO val2017.

    Matched (measured there / drawn here): objects an image, mean 7.4 / 7.5, deviation 7.4 / 8.4, median 4 / 4, 95th
    percentile 23 / 23, most 63 / 63; box side in images, 10th, 50th and 90th percentiles 0.020, 0.088, 0.39 / 0.020,
    0.083, 0.36; objects below 32 px of 640, 32 % / 33 %, above 96 px, 34 % / 30 %; median side where an image has 1, 5
    and 20 objects 257, 110 and 36 px / 212, 85 and 41 px. Centres are uniform over the places where the box fits.
    """
    percent = 100 * torch.rand(batch, generator=generator).numpy()
    counts = torch.from_numpy(np.interp(percent, COCO_PERCENT, COCO_COUNT).round()).long()
    image = torch.repeat_interleave(torch.arange(batch), counts)

    intercept, slope = COCO_LOG_SIDE
    between, within = COCO_LOG_SIDE_STD
    shift = intercept + slope * counts.clamp(min=1).log() + between * torch.randn(batch, generator=generator)
    log_side = shift[image] + within * torch.randn(len(image), generator=generator)
    mean, std = COCO_LOG_ASPECT
    weights = torch.cat([torch.zeros(1), 1 / torch.arange(5.0, num_classes + 4)])
    weights = (1 - COCO_PERSON) * weights / weights.sum().clamp(min=1)
    weights[0] = COCO_PERSON
    return _rows(image, log_side, mean + std * torch.randn(len(image), generator=generator), weights, generator)


def crowded(batch: int, generator: torch.Generator, objects: int = 5000, num_classes: int = 80) -> torch.Tensor:
    """Packed rows of images with ``objects`` objects each, whose areas add up to about the image's."""
    image = torch.repeat_interleave(torch.arange(batch), objects)
    log_side = -0.5 * torch.tensor(float(objects)).log() + 0.3 * torch.randn(len(image), generator=generator)
    log_aspect = 0.3 * torch.randn(len(image), generator=generator)
    return _rows(image, log_side, log_aspect, torch.ones(num_classes), generator)


def _rows(image, log_side, log_aspect, weights, generator) -> torch.Tensor:
    """Boxes of the given sizes, placed where they fit, of classes drawn with the given weights."""
    wh = torch.stack([log_side + log_aspect / 2, log_side - log_aspect / 2], 1).exp().clamp(1 / 640, 1)
    centres = wh / 2 + torch.rand(wh.shape, generator=generator) * (1 - wh)
    classes = torch.rand(len(image), generator=generator)
    classes = torch.searchsorted(weights.cumsum(0) / weights.sum(), classes).clamp(max=len(weights) - 1)
    return torch.cat([torch.stack([image, classes], 1).float(), centres, wh], 1)
