"""Every Triton term against its eager twin."""

import pytest
import torch
from oracle import check_box_term, check_label_term

from fusedyolo.heads import IOU_KINDS

DTYPES = (torch.float64, torch.float32)
LABELS = [("bce", []), *(("focal", [alpha, gamma]) for alpha in (0.25, -1.0, 0.0) for gamma in (0.0, 0.5, 1.0, 2.0))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", IOU_KINDS)
def test_box_term(kind, dtype):
    check_box_term(kind, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "args"), LABELS)
def test_label_term(kind, args, dtype):
    check_label_term(kind, args, dtype)
