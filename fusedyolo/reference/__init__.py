"""Every formula once, in eager PyTorch: the truth (float64) that the kernels are tested against, and the CPU backend.

Plain differentiable operations, gradients by autograd. Shapes depend on shapes only, and no constant is copied from the
host, so nothing here waits for a device.
"""

from .grid import Match, assign, grid_loss, grid_view
from .terms import BOX_TERMS, DECODE, LABEL_TERMS, OFFSET_TERMS

__all__ = ["BOX_TERMS", "DECODE", "LABEL_TERMS", "OFFSET_TERMS", "Match", "assign", "grid_loss", "grid_view"]
