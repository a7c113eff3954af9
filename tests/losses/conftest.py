"""What the files of this room share."""

import pytest
import torch


@pytest.fixture
def wide():
    """Float64 for what a peer makes itself."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
