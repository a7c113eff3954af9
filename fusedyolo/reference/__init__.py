"""Every formula once, in eager PyTorch: the truth (float64) that the kernels are tested against, and the CPU backend.

Plain differentiable operations, gradients by autograd. Shapes depend on shapes only, and no constant is copied from the
host, so nothing here waits for a device.
"""

from .candidates import Candidates, assign, level_anchors
from .cells import cell_assign, cell_loss, cell_views
from .dense import IGNORED, centreness, decode_anchors, dense_loss, dense_match, encode_anchors, normaliser, relative
from .dense import flat as flat_maps
from .grid import assigned, box_loss, grid_loss, grid_view, objectness_targets
from .pick_pairs import Points, points_of
from .picks import NONE, Objects, Picked, Seen, best, pick, read_objects, wishes
from .points import Planes, decode_predictions, encode_points, pick_loss, see
from .primitives import constants
from .rows import Rows, read_corners, read_rows
from .terms import BOX_TERMS, DECODE, ENCODE, LABEL_TERMS, OFFSET_TERMS

__all__ = [
    "BOX_TERMS",
    "DECODE",
    "ENCODE",
    "IGNORED",
    "LABEL_TERMS",
    "NONE",
    "OFFSET_TERMS",
    "Candidates",
    "Objects",
    "Picked",
    "Planes",
    "Points",
    "Rows",
    "Seen",
    "assign",
    "assigned",
    "best",
    "box_loss",
    "cell_assign",
    "cell_loss",
    "cell_views",
    "centreness",
    "constants",
    "decode_anchors",
    "decode_predictions",
    "dense_loss",
    "dense_match",
    "encode_anchors",
    "encode_points",
    "flat_maps",
    "grid_loss",
    "grid_view",
    "level_anchors",
    "normaliser",
    "objectness_targets",
    "pick",
    "pick_loss",
    "points_of",
    "read_corners",
    "read_objects",
    "read_rows",
    "relative",
    "see",
    "wishes",
]
