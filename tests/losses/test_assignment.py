"""fusedyolo.assign against what the losses themselves do, and its picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import DEVICE
from PIL import Image

import fusedyolo
from bench import __main__ as entry
from fusedyolo.tools.registry import CASES, Workload

GRIDS = ["YOLOv2/region", "YOLOv3/paper", "YOLOv4/darknet", "ScaledYOLOv4", "YOLOv5"]
WORK = Workload(batch=2, size=256, classes=3)


def case_of(name: str, **options):
    case = CASES[name]
    preds = [p.detach() for p in case.predictions(WORK, DEVICE)]
    return case.build(3, "torch"), preds if len(preds) > 1 else preds[0], WORK.targets(DEVICE)


@pytest.mark.parametrize("name", GRIDS)
def test_encoded_targets_decode_to_the_true_boxes(name):
    """What is assigned is what the loss counts, and decoding what is encoded gives the boxes back."""
    criterion, preds, rows = case_of(name)
    found = fusedyolo.assign(criterion, preds, rows)
    assert sum(int((level.row >= 0).sum()) for level in found.levels) == int(criterion(preds, rows).num_pos) > 0
    maps = [preds] if isinstance(preds, torch.Tensor) else preds
    for pred, level in zip(maps, found.levels, strict=True):
        view = pred.unflatten(1, (level.row.shape[1], -1)).permute(0, 1, 3, 4, 2)
        view[..., :4] = torch.where((level.row >= 0)[..., None], level.encoded, view[..., :4])
    boxes, _ = fusedyolo.decode(preds, criterion)
    on = torch.cat([level.row.flatten(1) >= 0 for level in found.levels], 1)
    true = torch.cat([level.boxes.flatten(1, 3) for level in found.levels], 1)
    torch.testing.assert_close(boxes[on], true[on], rtol=1e-5, atol=1e-3)
    rows_of = torch.cat([level.row.flatten(1) for level in found.levels], 1)[on]
    size = torch.tensor([256.0, 256.0] * 2, device=DEVICE)
    centre, sides = (rows[rows_of, 2:] * size).split(2, 1)
    torch.testing.assert_close(true[on], torch.cat((centre - sides / 2, centre + sides / 2), 1), rtol=1e-6, atol=1e-3)
    labels = torch.cat([level.label.flatten(1) for level in found.levels], 1)
    assert torch.equal(labels[on], rows[rows_of, 1].long())
    assert (labels[~on] == -1).all()


def test_objectness_is_what_the_loss_trains():
    """A prediction that already gives its target leaves the objectness part at its least."""
    criterion, preds, rows = case_of("YOLOv5")
    found = fusedyolo.assign(criterion, preds, rows)
    for pred, level in zip(preds, found.levels, strict=True):
        view = pred.unflatten(1, (level.row.shape[1], -1)).permute(0, 1, 3, 4, 2)
        assert 0 <= level.objectness.min() <= level.objectness.max() <= 1
        assert (level.objectness[level.row < 0] == 0).all()
        view[..., 4] = level.objectness.clamp(1e-4, 1 - 1e-4).logit()
    leaves = [pred.requires_grad_() for pred in preds]
    criterion(leaves, rows).total.backward()
    for leaf in leaves:
        slope = leaf.grad.unflatten(1, (3, -1))[:, :, 4]
        assert slope.abs().max() < 1e-5  # of a mean over predictions


def test_ignored_predictions_have_no_objectness_gradient():
    criterion, preds, rows = case_of("YOLOv3/paper")
    found = fusedyolo.assign(criterion, preds, rows)
    leaves = [pred.requires_grad_() for pred in preds]
    criterion(leaves, rows).total.backward()
    assert sum(int(level.ignored.sum()) for level in found.levels) > 0
    for leaf, level in zip(leaves, found.levels, strict=True):
        assert torch.equal(leaf.grad.unflatten(1, (3, -1))[:, :, 4] == 0, level.ignored)


def test_pairs_hold_every_assignment_in_order():
    """Two objects on one prediction: the last one is the match, both are pairs."""
    criterion = fusedyolo.YOLOv3Loss([[(16, 16)]], [8], 2, backend="torch")
    rows = torch.tensor([[0, 0, 0.3, 0.3, 0.25, 0.25], [0, 1, 0.31, 0.31, 0.25, 0.25]], device=DEVICE)
    (level,) = fusedyolo.assign(criterion, [torch.zeros(1, 7, 8, 8, device=DEVICE)], rows).levels
    assert level.pairs.tolist() == [[0, 1], [2 * 8 + 2] * 2]
    assert level.row.flatten()[2 * 8 + 2] == 1
    assert (level.row >= 0).sum() == 1


@pytest.mark.parametrize("recipe", ["paper", "darknet"])
def test_cells(recipe):
    criterion = fusedyolo.YOLOv1Loss(3, grid_size=4, recipe=recipe, image_size=(64, 128), backend="torch")
    pred = torch.rand(2, 4, 4, 13, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    rows = torch.tensor([[1, 2, 0.3, 0.6, 0.5, 0.25], [1, 0, 0.31, 0.61, 0.5, 0.5], [0, 5, 0.1, 0.1, 0.1, 0.1]])
    found = fusedyolo.assign(criterion, pred, rows.to(DEVICE))
    (level,) = found.levels
    assert found.valid.tolist() == [True, True, False]
    ((b, k, y, x),) = (level.row >= 0).nonzero().tolist()
    assert (b, y, x, int(level.row[b, k, y, x]), int(level.label[b, k, y, x])) == (1, 2, 1, 0, 2)
    want = torch.tensor([0.3 * 128 - 32, 0.6 * 64 - 8, 0.3 * 128 + 32, 0.6 * 64 + 8], device=DEVICE)
    torch.testing.assert_close(level.boxes[b, k, y, x], want)
    pred[b, y, x, 5 * k : 5 * k + 4] = level.encoded[b, k, y, x]
    boxes, _ = fusedyolo.decode(pred, criterion)
    assert torch.isclose(boxes[b], want, rtol=1e-5).all(-1).any()
    leaf = pred.requires_grad_()
    criterion(leaf, rows.to(DEVICE)).total.backward()
    assert leaf.grad[b, y, x, 5 * k : 5 * k + 4].abs().max() < 1e-5  # the box is where it should be


def test_forms_of_targets_agree():
    criterion, preds, rows = case_of("YOLOv5")
    want = fusedyolo.assign(criterion, preds, rows)
    targets = fusedyolo.Targets.from_packed(rows.cpu(), 2, capacity=200).to(DEVICE)
    got = fusedyolo.assign(criterion, preds, targets)
    assert int(got.valid.sum()) == int(want.valid.sum())
    for a, b in zip(got.levels, want.levels, strict=True):
        assert torch.equal(a.boxes, b.boxes)
        assert torch.equal(a.objectness, b.objectness)


def test_wrong_arguments_are_named():
    criterion, preds, rows = case_of("YOLOv5")
    with pytest.raises(ValueError, match=r"^criterion: a Linear, want a loss"):
        fusedyolo.assign(torch.nn.Linear(1, 1), preds, rows)
    with pytest.raises(ValueError, match=r"^preds: 2 levels"):
        fusedyolo.assign(criterion, preds[:2], rows)
    found = fusedyolo.assign(criterion, preds, rows)
    with pytest.raises(ValueError, match=r"^index: 2, want 0 <= index < 2"):
        fusedyolo.draw_assignment(torch.zeros(3, 8, 8), found, index=2)
    with pytest.raises(ValueError, match=r"^assignment: a tensor of shape \(3, 8, 8\), want what fusedyolo.assign"):
        fusedyolo.draw_assignment(found, torch.zeros(3, 8, 8))
    for index in ("0", None, 1.0):
        with pytest.raises(ValueError, match=rf"^index: '?{index}'?, want 0 <= index < 2"):
            fusedyolo.draw_assignment(torch.zeros(3, 8, 8), found, index)
    pictures = np.zeros((3, 8, 8)), np.zeros((8, 8, 2)), np.zeros((8, 8, 3), complex), 255 * np.ones((8, 8, 3))
    for image in (None, torch.zeros(8), torch.zeros(2, 3, 8, 8), torch.zeros(8, 8, 3), *pictures):
        with pytest.raises(ValueError, match=r"^image: .*, want a PIL image, an array \[H, W, 3\] or a tensor"):
            fusedyolo.draw_assignment(image, found)
    with pytest.raises(ValueError, match=r"^image: a tensor of shape \(3, 0, 0\), want at least one pixel"):
        fusedyolo.draw_assignment(torch.zeros(3, 0, 0), found)


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (8, 8, 3), (8, 8, 4)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float16, bool])
def test_pictures_of_any_kind_and_classes_without_a_name(shape, dtype, tmp_path):
    criterion, preds, rows = case_of("YOLOv1/paper")
    found = fusedyolo.assign(criterion, preds, rows)
    for names in (["a"], {0: "a"}):
        figure = fusedyolo.draw_assignment(np.ones(shape, dtype), found, np.int64(1), names)
        said = {text.get_text() for text in figure.axes[0].texts}
        assert said == {"a" if label == 0 else str(label) for label in rows[rows[:, 0] == 1, 1].int().tolist()}
    figure.savefig(tmp_path / "a.png")


def test_the_picture_shows_boxes_cells_and_anchors(tmp_path):
    criterion, preds, rows = case_of("YOLOv5")
    found = fusedyolo.assign(criterion, preds, rows)
    figure = fusedyolo.draw_assignment(torch.zeros(3, 128, 128), found, 1, names=["a", "b", "c"])
    assert len(figure.axes) == 3
    objects = int((rows[:, 0] == 1).sum())
    for axes, level in zip(figure.axes, found.levels, strict=True):
        positive = int((level.row[1] >= 0).sum())
        assert axes.get_title().endswith(f"{positive} positive")
        cells = sum(patch.get_fill() for patch in axes.patches)
        assert len(axes.patches) - cells == positive + objects  # anchors and boxes
        assert len(axes.texts) == objects
    figure.savefig(tmp_path / "a.png")


def test_command_line(tmp_path):
    out = tmp_path / "pictures" / "a.png"
    assert entry.main(["assign", "--size", "96", "--loss", "YOLOv3/paper", "--out", str(out)]) == 0
    assert Image.open(out).width > 500
