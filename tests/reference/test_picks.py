"""Assignment by what is predicted, in the eager reference: contracts of its steps; gradients; crowds; NaN."""

from __future__ import annotations

import golden
import loop_picks as loops
import pytest
import torch
from golden import arrays
from torch import Tensor

import fusedyolo
from fusedyolo import YOLOv8Loss, YOLOXLoss, reference
from fusedyolo.drivers.picks import planes, views
from fusedyolo.heads import PickHead, pick_head_from_key
from fusedyolo.reference import pairs, pick_pairs, picks, points

MAPS, STRIDES = ((8, 12), (4, 6), (2, 3)), (8, 16, 32)
NONE = picks.NONE


@pytest.mark.parametrize("name", golden.names("torch", "ultra_tal_*"))
def test_the_assigner_of_ultralytics_alone(name):
    """With scores and boxes as they were recorded, in float64."""
    data = arrays(name)
    meta = data["meta"]
    points = reference.points_of([tuple(sides) for sides in meta["level_hw"]], meta["strides"], torch.device("cpu"))
    middle = data["anc_points"].double()
    assert torch.equal(points.middle, middle)
    boxes = data["pd_bboxes"].double() - middle.repeat(1, 2)
    cls = data["pd_scores"].double().logit().transpose(1, 2)
    seen = reference.Seen(boxes, cls, None, points)
    head = PickHead(
        meta["nc"], tuple(meta["strides"]), topk=meta["topk"], alpha=meta["alpha"], beta=meta["beta"],
        small=meta["stride_val"],
    )  # fmt: skip
    image, place = (data["mask_gt"][..., 0] > 0).nonzero().unbind(1)
    corners = data["gt_bboxes"][image, place].double()
    centre, sides = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
    label = data["gt_labels"][image, place, 0].long()
    nothing = torch.ones(1, 2).double()
    objects = reference.Objects(
        torch.ones(len(image), dtype=torch.bool), image, torch.cat((label, label.new_tensor([-1]))),
        torch.cat((centre, nothing)), torch.cat((sides, nothing)),
    )  # fmt: skip
    found = reference.pick(seen, objects, head)
    effective = data["fg_effective"]
    assert torch.equal(found.score > 0, effective)
    assert torch.equal(place[found.row[effective]], data["target_gt_idx"][effective].long())
    torch.testing.assert_close(found.score, data["target_scores"].sum(2), rtol=0, atol=1e-7)


def test_a_row_is_its_key():
    head = YOLOXLoss(3, STRIDES, rule="0.3.0", backend="torch").head
    assert pick_head_from_key(head.key) == head
    assert head.parts == ("box", "obj", "cls", "l1")
    head = YOLOv8Loss(3, STRIDES, topk2=4, backend="torch").head
    assert pick_head_from_key(head.key) == head
    assert head.parts == ("box", "cls", "dfl")
    assert head.widths == (64, 3)
    with pytest.raises(ValueError, match=r"^overlap: 'l1', want one of"):
        PickHead(3, (8.0,), overlap="l1")


# ---- steps


def _best(tiers: list[Tensor], k: int, every: bool) -> tuple[Tensor, Tensor]:
    """Which predictions rows want most, by what ``tiers`` [rows, N] say, and how much; of ``every`` pair, or of those
    alone that can be.
    """
    rows, can = slice(0, len(tiers[0])), torch.stack(tiers).amax(0) > NONE
    pairs = pick_pairs.all_pairs(rows, can) if every else pick_pairs.listed_pairs(rows, *can.nonzero(as_tuple=True), k)
    wish = picks.Wish(pairs, [tier[pairs.row, pairs.cell] for tier in tiers], (), torch.tensor([]))
    pair, worth = picks.best(wish, k)
    return pairs.cell[pair], worth


EVERY = pytest.mark.parametrize("every", [False, True])


def test_pairs_within_columns_and_lines():
    """Of levels of different sides, in the order of rows and cells; what lies in no row, or in all."""
    points = reference.points_of(MAPS, STRIDES, torch.device("cpu"))
    gen = torch.Generator().manual_seed(0)
    x = torch.rand(9, len(points.columns.stride), generator=gen) < 0.5
    y = torch.rand(9, len(points.lines.stride), generator=gen) < 0.3
    x[3], y[5], x[8], y[8] = False, False, True, True
    can = pick_pairs.cells(x, y, points)
    found = pick_pairs.pairs_within(slice(20, 29), x, y, points, 5)
    assert torch.equal(torch.stack((found.row - 20, found.cell), 1), can.nonzero())
    assert found.table.shape[1] == can.sum(1).max() == pick_pairs.widest(x, y, points)
    assert torch.equal(found.cell[found.table[8]], torch.arange(can.shape[1]))
    assert [row.tolist() for row in (found.table[3, :2], found.table[0, :2])] == [[-1, -1], [0, 1]]


@EVERY
def test_best_is_in_order_and_equals_by_index(every):
    first = torch.tensor([[1.0, 3.0, 3.0, NONE, 1.0, 3.0], [NONE] * 6, [2.0] * 6])
    index, worth = _best([first], 4, every)
    assert index[0].tolist() == [1, 2, 5, 0]
    assert worth[0].tolist() == [3.0, 3.0, 3.0, 1.0]
    assert (worth[1] == NONE).all()
    assert index[2].tolist() == [0, 1, 2, 3]
    next_tier = torch.tensor([[NONE, NONE, NONE, 9.0, NONE, NONE], [5.0, 7.0] + [NONE] * 4, [NONE] * 6])
    index, worth = _best([first, next_tier], 6, every)
    assert index[0].tolist() == [1, 2, 5, 0, 4, 3]  # however much the last is worth
    assert index[1, :2].tolist() == [1, 0]
    assert worth[1].tolist() == [7.0, 5.0] + [NONE] * 4


@EVERY
def test_the_last_place_of_equals_goes_to_the_first(every):
    """Where nothing else is equal."""
    gen = torch.Generator().manual_seed(0)
    worth = torch.rand(300, 40, generator=gen).double()
    order = worth.argsort(dim=1, descending=True)
    worth.scatter_(1, order[:, 9:10], worth.gather(1, order[:, 8:9]))
    index, _ = _best([worth], 9, every)
    assert torch.equal(index[:, 8], order[:, 8:10].amin(1))


@EVERY
@pytest.mark.parametrize("values", [12, 1 << 40], ids=["equals", "none equal"])
def test_best_against_a_sort(values, every):
    gen = torch.Generator().manual_seed(0)
    worth = torch.randint(0, values, (50, 40), generator=gen).double()
    worth[torch.rand(50, 40, generator=gen) < 0.4] = NONE
    worth[:5, 3:] = NONE  # fewer than are asked for
    index, values = _best([worth], 9, every)
    want = worth.sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, want.values[:, :9])
    found = values > NONE
    assert torch.equal(index[found], want.indices[:, :9][found])


def _criterion(kind: str):
    if kind == "aligned":
        return YOLOv8Loss(3, STRIDES, 1, topk=5, topk2=3, backend="torch")
    return YOLOXLoss(3, STRIDES, rule=kind, backend="torch")


def _predictions(kind: str, rows: Tensor, images: int = 2, seed: int = 0, maps=MAPS, strides=STRIDES) -> list[Tensor]:
    """Maps [B, width, H, W], one a level."""
    if kind != "aligned":
        return loops.yolox_predictions(rows, maps, strides, images, 3, seed)
    flat = torch.cat(loops.v8_predictions(rows, maps, strides, images, 3, 1, seed), 1)
    parts = flat.split([h * w for h, w in maps], 2)
    return [part.unflatten(2, sides) for part, sides in zip(parts, maps, strict=True)]


KINDS = pytest.mark.parametrize("kind", ["aligned", "main", "0.3.0"])


@KINDS
def test_chunks_of_rows_change_nothing(kind, monkeypatch):
    """One row at a time, or all of them; of objects that are there twice the first; in any order of images."""
    rows = loops.some_rows(3, 2, 30, 3, 0.05, 0.5)
    preds = _predictions(kind, rows)
    rows = torch.cat((rows, rows[:30]))
    criterion = _criterion(kind)

    def found() -> Tensor:
        return torch.cat([level.row.flatten(1) for level in fusedyolo.assign(criterion, preds, rows).levels], 1)

    want, row = criterion(preds, rows).total, found()
    assert 0 <= row.max() < 60
    for most in (1, 126 * 7):
        monkeypatch.setattr(pairs, "PAIRS_CHUNK", most)
        assert torch.equal(criterion(preds, rows).total, want)
        assert torch.equal(found(), row)
    by_image = rows[rows[:, 0].argsort(stable=True)]
    torch.testing.assert_close(criterion(preds, by_image).total, want, rtol=1e-12, atol=0)


@KINDS
def test_with_and_without_shapes_that_depend_on_data(kind, monkeypatch):
    """On a CPU pairs that cannot be are left out of the arithmetic; where that would wait they are not."""
    rows = loops.some_rows(3, 2, 30, 3, 0.05, 0.5)
    preds = _predictions(kind, rows)
    want = _criterion(kind)(preds, rows)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    out = _criterion(kind)(preds, rows)
    torch.testing.assert_close(out.total, want.total, rtol=1e-13, atol=0)
    assert int(out.num_pos) == int(want.num_pos)


@KINDS
def test_on_a_device_where_shapes_are_all_there_is(kind):
    rows = loops.some_rows(3, 2, 30, 3)
    preds = [pred.to("meta").requires_grad_() for pred in _predictions(kind, rows)]
    out = _criterion(kind)(preds, rows.to("meta"))
    out.total.backward()
    assert all(pred.grad.shape == pred.shape for pred in preds)


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Numbers of the largest tensor that an operator makes."""

    def __init__(self):
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, Tensor):
                self.found = max(self.found, each.numel())
        return out


@pytest.mark.parametrize("asked", [False, True], ids=["shapes", "values"])
@KINDS
def test_memory_does_not_grow_with_pairs(kind, asked, monkeypatch):
    """5,000 objects in an image, of which some are as large as that: no tensor of as many numbers as pairs, nor of a
    tenth of them, whether or not values are asked for.
    """
    maps = ((40, 40), (20, 20), (10, 10))
    rows = loops.some_rows(1, 1, 5000, 3, 0.01, 0.1)
    rows[::10, 2:] = torch.tensor((0.5, 0.5, 1.0, 1.0))
    preds = [pred.float() for pred in _predictions(kind, rows, images=1, maps=maps)]
    monkeypatch.setattr(pairs, "PAIRS_CHUNK", 1 << 16)
    for module in (pick_pairs, picks):
        monkeypatch.setattr(module, "at_hand", lambda values: asked)
    with _Largest() as largest:
        out = _criterion(kind)(preds, rows)
    assert largest.found < 5000 * 2100 // 10
    assert int(out.num_pos) > 500
    assert out.total.isfinite()


@KINDS
def test_gradients_are_those_of_the_loss(kind, monkeypatch):
    """In float64, by differences, targets held as they are; without CIoU, of which alpha is a constant."""
    rows = loops.some_rows(5, 1, 3, 3, 0.3, 0.7)
    maps, strides = ((4, 4), (2, 2)), (16, 32)
    preds = _predictions(kind, rows, images=1, maps=maps, strides=strides)
    if kind == "aligned":
        criterion = YOLOv8Loss(3, strides, 1, iou_loss="giou", backend="torch")
    else:
        criterion = YOLOXLoss(3, strides, True, kind, backend="torch")
    found: list[reference.Picked] = []

    def pick(*arguments):
        """Those of the first call."""
        found.append(found[0] if found else reference.pick(*arguments))
        return found[0]

    monkeypatch.setattr(points, "pick", pick)
    assert int(criterion(preds, rows).num_pos) > 0
    leaves = tuple(pred.requires_grad_() for pred in preds)
    assert torch.autograd.gradcheck(lambda *maps: criterion(maps, rows).total, leaves, atol=1e-7)
    assert len(found) > 50


# ---- what kernels are given


@pytest.mark.parametrize("form", ["maps", "apart", "planes"])
def test_parts_of_levels_are_views(form):
    head = YOLOXLoss(3, STRIDES, backend="torch").head
    whole = _predictions("main", loops.some_rows(0, 2, 2, 3))
    apart = [part.clone() for pred in whole for part in pred.split(head.widths, 1)]
    flat = [torch.cat([part.flatten(2) for part in apart[i::3]], 2) for i in range(3)]
    preds = {"maps": whole, "apart": apart, "planes": flat}[form]
    found = views(form, preds, head, MAPS)
    storages = {pred.untyped_storage().data_ptr() for pred in preds}
    for level, (parts, pred) in enumerate(zip(found, whole, strict=True)):
        assert [part.shape for part in parts] == [(2, width, *MAPS[level]) for width in head.widths]
        assert torch.equal(torch.cat(parts, 1), pred)
        assert all(part.untyped_storage().data_ptr() in storages for part in parts)
    one = planes(form, preds, head)
    assert torch.equal(torch.cat((one.box, one.obj, one.cls), 1), torch.cat([pred.flatten(2) for pred in whole], 2))


# ---- NaN


@KINDS
@pytest.mark.parametrize("channel", [0, 3, 4, 5, 6])
def test_a_nan_shows_and_touches_no_other_gradient(kind, channel):
    rows = loops.some_rows(3, 2, 4, 3, 0.2, 0.5)
    preds = _predictions(kind, rows)
    criterion = _criterion(kind)
    levels = reference.points_of(MAPS, STRIDES, rows.device)
    near = (levels.middle - rows[0, 2:4].double() * torch.tensor([96.0, 64.0])).abs().amax(1)[:96].argmin()
    image, y, x = int(rows[0, 0]), int(near) // 12, int(near) % 12
    preds[0] = preds[0].clone()
    preds[0][image, channel, y, x] = float("nan")  # of a cell in the middle of an object
    leaves = [pred.requires_grad_() for pred in preds]
    out = criterion(leaves, rows)
    assert out.total.isnan()
    assert int(out.num_pos) > 0
    out.total.backward()
    bad = torch.cat([leaf.grad.isnan().flatten(2) for leaf in leaves], 2).nonzero().tolist()
    assert all((b, n) == (image, 12 * y + x) for b, _, n in bad)


@KINDS
def test_extreme_logits_are_finite(kind):
    rows = loops.some_rows(3, 2, 4, 3, 0.2, 0.5)
    preds = _predictions(kind, rows)
    for value in (-120.0, 120.0):
        leaves = [torch.cat((p[:, :4], torch.full_like(p[:, 4:], value)), 1).float().requires_grad_() for p in preds]
        out = _criterion(kind)(leaves, rows)
        out.total.backward()
        assert out.total.isfinite()
        assert all(leaf.grad.isfinite().all() for leaf in leaves)
