"""Predictions and anchors in every order of axes that people's code has them in, read where they lie."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fusedyolo
from fusedyolo import checks

ANCHORS, STRIDES, C = [[(10, 13), (16, 30)], [(30, 61), (60, 45)]], (8, 16), 3
ROWS = torch.tensor(((0, 1, 0.4, 0.3, 0.2, 0.3), (1, 2, 0.6, 0.7, 0.4, 0.5)))
LAYOUTS = {
    "(B, A, H, W, 5 + C)": (0, 1, 3, 4, 2),
    "(B, A, 5 + C, H, W)": (0, 1, 2, 3, 4),
    "(B, H, W, A, 5 + C)": (0, 3, 4, 1, 2),
}
"""Of [B, A, 5 + C, H, W], the axes of each."""


def maps(height=32, width=48):
    torch.manual_seed(0)
    return [torch.randn(2, 2 * (5 + C), height // s, width // s) for s in STRIDES]


def arranged(preds, axes):
    """In memory as a network that has them in this order leaves them."""
    return [pred.unflatten(1, (2, 5 + C)).permute(axes).contiguous().requires_grad_() for pred in preds]


LOSSES = {
    "v3": lambda backend: fusedyolo.YOLOv3Loss(ANCHORS, STRIDES, C, backend=backend),
    "v5": lambda backend: fusedyolo.YOLOv5Loss(ANCHORS, STRIDES, C, backend=backend),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_orders_of_axes(name, layout, backend):
    loss, flat = LOSSES[name](backend), [pred.requires_grad_() for pred in maps()]
    wanted = loss(flat, ROWS)
    wanted.total.backward()
    preds = arranged(maps(), LAYOUTS[layout])
    found = loss(preds, ROWS)
    found.total.backward()
    assert wanted.num_pos > 0
    assert torch.equal(found.num_pos, wanted.num_pos)
    torch.testing.assert_close(found.total, wanted.total, rtol=1e-6, atol=0)
    for mine, theirs in zip(preds, flat, strict=True):
        grad = theirs.grad.unflatten(1, (2, 5 + C)).permute(LAYOUTS[layout])
        torch.testing.assert_close(mine.grad, grad, rtol=1e-5, atol=1e-7)


def test_they_are_views():
    for axes in LAYOUTS.values():
        preds = arranged(maps(), axes)
        for view, pred in zip(checks.grid_views(preds, (2, 2), C), preds, strict=True):
            assert view.shape == (2, 2, *view.shape[2:4], 5 + C)
            assert view.data_ptr() == pred.data_ptr()
            assert sorted(view.stride()) == sorted(pred.stride())


def test_levels_decide_together():
    """A map of 5 + C by 5 + C cells says nothing by itself; the others do."""
    loss = LOSSES["v5"]("torch")
    for axes in LAYOUTS.values():
        assert loss(arranged(maps(64, 64), axes), ROWS).total == loss(maps(64, 64), ROWS).total


def test_one_level_that_can_be_told():
    loss = fusedyolo.YOLOv2Loss([(1, 2), (3, 1)], C, backend="torch")
    pred = torch.randn(2, 2 * (5 + C), 3, 4)
    for axes in LAYOUTS.values():
        given = pred.unflatten(1, (2, 5 + C)).permute(axes).contiguous()
        torch.testing.assert_close(loss(given, ROWS).total, loss(pred, ROWS).total)


def test_five_axes_among_four():
    preds, usual = maps(48, 48), arranged(maps(48, 48), LAYOUTS["(B, A, H, W, 5 + C)"])
    loss = LOSSES["v5"]("torch")
    for mixed in ([preds[0], usual[1]], [usual[0], preds[1]]):
        torch.testing.assert_close(loss(mixed, ROWS).total, loss(preds, ROWS).total)
    other = arranged(maps(48, 48), LAYOUTS["(B, H, W, A, 5 + C)"])
    with pytest.raises(ValueError, match=r"preds\[1\]: shape \(2, 3, 3, 2, 8\), want"):
        loss([preds[0], other[1]], ROWS)


def test_compiled():
    loss = LOSSES["v5"]("torch")
    for axes in LAYOUTS.values():
        torch._dynamo.reset()
        preds = arranged(maps(), axes)
        compiled = torch.compile(loss, fullgraph=True, backend="eager")
        assert compiled(preds, ROWS).total == loss(preds, ROWS).total


# ---- anchors


def test_anchors_with_an_axis_for_images():
    torch.manual_seed(0)
    anchors = fusedyolo.anchors.fcos_anchors([(8, 8)], 64, [16])
    preds = torch.randn(2, 64, C), torch.randn(2, 64, 4)
    loss = fusedyolo.RetinaNetLoss(C, image_size=64, backend="torch")
    assert loss(preds, ROWS, anchors[None]).total == loss(preds, ROWS, anchors).total
    with pytest.raises(ValueError, match=r"anchors: a tensor of shape \(2, 64, 4\), want a tensor of shape \(N, 4\)"):
        loss(preds, ROWS, anchors.expand(2, 64, 4))


# ---- targets


class Copies(TorchDispatchMode):
    """Copies from the host."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_lists_of_rows():
    loss = LOSSES["v5"]("torch")
    each = [ROWS[ROWS[:, 0] == b, 1:] for b in range(2)]
    assert loss(maps(), each).total == loss(maps(), ROWS).total
    assert loss(maps(), [each[0], torch.zeros(0, 5)]).num_invalid == 0
    with Copies() as copies:
        loss(maps(), each)
    assert "_local_scalar_dense" not in copies.names
    told = fusedyolo.YOLOv5Loss(ANCHORS, STRIDES, C, unit="pixel", backend="torch")
    pixels = [torch.cat((rows[:, :1], rows[:, 1:] * torch.tensor((48.0, 32.0, 48.0, 32.0))), 1) for rows in each]
    torch.testing.assert_close(told(maps(), pixels).total, loss(maps(), ROWS).total)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([torch.zeros(2, 5)], "targets: a list of 1, want 2 tensors (n, 5), one an image of preds"),
        ([torch.zeros(2, 5), torch.zeros(2, 7)], "targets[1]: shape (2, 7), want (n, 5), or a column more, of weights"),
        ([torch.zeros(2, 5), {}], "targets[1]: {}, want a tensor of shape (n, 5)"),
        (
            [torch.zeros(2, 5), torch.zeros(2, 5).long()],
            "targets[1]: dtype torch.int64, want torch.float32 or torch.float64",
        ),
        ([torch.zeros(2, 5), torch.zeros(2, 5, device="meta")], "targets[1]: device meta, want cpu as targets[0]"),
    ],
)
def test_lists_of_rows_that_are_none(targets, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        LOSSES["v5"]("torch")(maps(), targets)
    assert str(error.value) == message
