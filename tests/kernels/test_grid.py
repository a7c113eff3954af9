"""The anchor-grid driver against the float64 reference: values, layouts, modes, determinism, bad values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from conftest import DEVICE
from oracle import check_grid
from torch import Tensor

from fusedyolo import ops, reference, tuned
from fusedyolo.heads import GridHead
from fusedyolo.reference import grid_view as canonical
from fusedyolo.terms import term_names

ANCHORS = ((10.0, 13.0), (16.0, 30.0), (33.0, 23.0), (30.0, 61.0), (62.0, 45.0), (59.0, 110.0))
HEAD = GridHead(
    num_classes=3,
    anchors=ANCHORS,
    levels=((0, 1, 2), (3, 4, 5)),
    strides=(8.0, 16.0),
    scale_x_y=(1.125, 1.0),
    box_args=(0.0, 2.0**-20),
    ignore_thresh=0.375,
    iou_thresh=0.25,
    noobj_gain=0.5,
    box_gain=5.0,
)
DARKNET = replace(HEAD, unit="image", class_gate=-1.0, average_box=True, class_targets=(0.875, 0.125), first_weight=0.5)


def make_preds(dtype=torch.float32, batch=2, classes=3, size=(64, 96), seed=0) -> list[Tensor]:
    gen = torch.Generator().manual_seed(seed)
    height, width = size
    shapes = [(batch, 3 * (5 + classes), height // s, width // s) for s in (8, 16)]
    return [torch.randn(shape, generator=gen, dtype=torch.float64).to(DEVICE, dtype) for shape in shapes]


def make_rows(batch=2, n=8, classes=3, seed=0, invalid=3) -> Tensor:
    """Objects of the anchors' sizes, some of them twice, unsorted, with invalid rows between."""
    gen = torch.Generator().manual_seed(seed)
    size = torch.tensor(ANCHORS)[torch.randint(len(ANCHORS), (n,), generator=gen)] / torch.tensor([96.0, 64.0])
    size = size * (0.7 + 0.6 * torch.rand(n, 2, generator=gen))
    image = torch.randint(batch, (n, 1), generator=gen)
    label = torch.randint(classes, (n, 1), generator=gen)
    rows = torch.cat((image, label, torch.rand(n, 2, generator=gen), size), 1)
    again = rows[: n // 4].clone()
    again[::2, 1] = (again[::2, 1] + 1) % classes
    nan, inf = float("nan"), float("inf")
    bad = torch.tensor(
        [
            [0, classes, 0.5, 0.5, 0.2, 0.2], [0, -1, 0.5, 0.5, 0.2, 0.2], [batch, 0, 0.5, 0.5, 0.2, 0.2],
            [-1, 0, 0.5, 0.5, 0.2, 0.2], [0, 0, nan, 0.5, 0.2, 0.2], [0, 0, 0.5, 0.5, inf, 0.2],
            [0, 0, 0.5, 0.5, 0.0, 0.2], [0, 0, 0.5, 0.5, 0.2, -0.1], [0, 0, 1.0, 0.5, 0.2, 0.2],
            [0, 0, 0.5, -0.1, 0.2, 0.2], [1e9, 1e9, 1e9, 1e9, 1e9, 1e9],
        ]
    )  # fmt: skip
    rows = torch.cat((rows, again, bad[torch.randperm(len(bad), generator=gen)[:invalid]]))
    return rows[torch.randperm(len(rows), generator=gen)].to(DEVICE)


@pytest.mark.parametrize(
    ("box", "dtype"),
    [*((box, torch.float64) for box in term_names("iou", "offset")), ("ciou", torch.float32), ("siou", torch.float32)],
)
def test_every_box_term(box, dtype):
    check_grid(make_preds(dtype, size=(32, 48)), make_rows(), replace(HEAD, box=box))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("box", ["ciou", "bce_mse"])
def test_darknet_rules(box, dtype):
    weights = torch.tensor([1.0, 2.5, 0.75], device=DEVICE)
    check_grid(make_preds(dtype), make_rows(), replace(DARKNET, box=box, area_weight=1.0), weights)


RATIO = replace(
    HEAD, unit="cell", assigner="ratio", anchor_t=2.5, shared="each", edge=True, decode="sigmoid_square",
    scale_x_y=(2.0, 2.0), quality="ciou", quality_args=HEAD.box_args, ignore_thresh=None, noobj_gain=1.0,
    mean_rows=True, obj_mean="cells", obj_balance=(4.0, 0.5), label_args=(1.75,), obj_args=(0.5,),
)  # fmt: skip
REGION = replace(
    HEAD, per_level=True, shared="last", iou_thresh=1.0, scale_x_y=(1.0, 1.0), box="mse", label="softmax_ce",
    objectness="sse", quality="iou", quality_args=(0.0, 0.0), mean_rows=True, obj_mean="used",
)  # fmt: skip
LIGHTNET = replace(
    REGION, unit="cell", edge=True, scale_x_y=(1.25, 1.25), area_weight=1.0, area_cap=0.25, prior_gain=0.125,
    mean_rows=False, obj_mean=None, quality_args=(2.0**-53, 0.0), class_targets=(0.9375, 0.03125),
)  # fmt: skip
NEW_COORDS = replace(
    DARKNET, decode="sigmoid_square", label="sse", objectness="sse", smooth=(False, True), obj_balance=(4.0, 0.5)
)
BAND = replace(HEAD, assigner="iou_band", band=(0.125, 0.375), quality="giou", quality_args=(0.0, 0.0))
HEADS = {
    "yolov5": RATIO,
    "ratio, similarity of another kind": replace(RATIO, quality="diou", quality_ratio=0.75, obj_mean=None),
    "ratio, last": replace(RATIO, shared="last", box="giou", quality="giou", label="softmax_ce", label_args=()),
    "ratio, ignoring": replace(RATIO, ignore_thresh=0.25, class_gate=-1.0, prior_gain=0.125, shared="sum"),
    "scaled": replace(
        RATIO, label="focal", label_args=(0.25, 1.5, 0.75), objectness="focal", obj_args=(0.25, 1.5, 1.25),
        box_args=(2.0**-53, 2.0**-53), quality_args=(2.0**-53, 2.0**-53),
    ),
    "picked by cost": replace(RATIO, by_cost=True),
    "picked by cost, of one cell": replace(HEAD, assigner="shape_iou", by_cost=True, shared="last", ignore_thresh=None),
    "region": REGION,
    "lightnet": LIGHTNET,
    "lightnet, ciou": replace(LIGHTNET, box="ciou_plus", box_args=(2.0**-53, 0.0), prior_gain=0.0),
    "prior of an iou": replace(LIGHTNET, box="ciou", prior_gain=0.125),
    "new coords": NEW_COORDS,
    "band": BAND,
    "band, smooth": replace(BAND, smooth=(True, False), objectness="qfl", obj_args=(-1.0, 2.0), class_gate=0.5),
    "band, means": replace(BAND, ignore_thresh=None, mean_rows=True, obj_mean="used", box="mse", shared="last"),
    "shape iou": replace(
        RATIO, assigner="shape_iou", iou_thresh=0.25, decode="exp", scale_x_y=(1.0, 1.0), box="giou", quality="giou",
    ),
    "own cell": replace(RATIO, neighbours=0, obj_mean="used"),
    "all neighbours": replace(RATIO, neighbours=4),
    "merge": replace(HEAD, shared="merge", mean_rows=True, obj_mean="used", obj_balance=(4.0, 0.5)),
    "merge, class weights": replace(HEAD, shared="merge", weigh_classes=True, class_targets=(0.875, 0.125)),
    "each, class weights": replace(RATIO, weigh_classes=True),
    "softmax, class weights": replace(LIGHTNET, weigh_classes=True),
    "softmax of each, class weights": replace(RATIO, weigh_classes=True, label="softmax_ce", label_args=()),
    "per level": replace(DARKNET, per_level=True, shared="last", label="varifocal", label_args=(0.75, 2.0)),
}  # fmt: skip


def bordering_rows() -> Tensor:
    """Centres on borders and middles of cells, and of the image, on levels of 6 x 4 and 3 x 2 cells; some coincide.

    Sizes are dyadic, so that anchors overlap some rows alike.
    """
    rows = [
        (0, 0, 0.0, 0.0, 0.25, 0.5), (0, 1, 0.25, 0.5, 0.625, 0.75), (1, 2, 0.5, 0.5, 0.375, 0.875),
        (0, 0, 0.5, 0.5, 0.375, 0.875), (0, 0, 0.5, 0.5, 0.375, 0.875), (0, 1, 0.75, 0.125, 1.5, 2.0),
        (1, 2, 1.0, 1.0, 0.25, 0.5), (0, 0, 0.375, 1.0, 0.625, 0.75), (0, 1, 0.5, 0.5, 0.375, 0.875),
        (1, 0, 1.0000001, 0.5, 0.2, 0.2),
    ]  # fmt: skip
    return torch.tensor(rows, device=DEVICE)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float64) for name in HEADS), ("new coords", torch.float32), ("band", torch.float32)],
)
def test_every_kind_of_head(name, dtype):
    head = HEADS[name]
    weighed = head.weigh_classes or name in ("new coords", "per level")
    weights = torch.tensor([1.0, 2.5, 0.75], device=DEVICE) if weighed else None
    rows = torch.cat((bordering_rows(), make_rows(n=3, invalid=1)))
    check_grid(make_preds(dtype, size=(32, 48)), rows, head, weights)


@pytest.mark.parametrize("name", ["yolov5", "region", "band"])
@pytest.mark.parametrize("case", ["no rows", "one class", "tails", "small"])
def test_corners_of_every_kind_of_head(case, name):
    head, preds, rows = HEADS[name], make_preds(size=(32, 48)), bordering_rows()
    if case == "no rows":
        rows = rows[:0]
    if case == "one class":
        head = replace(head, num_classes=1)
        preds = make_preds(classes=1, size=(32, 48))
    if case == "tails":
        gen = torch.Generator().manual_seed(1)
        preds = [torch.where(torch.rand(p.shape, generator=gen).to(p) < 0.2, 40 * p.sign(), p) for p in preds]
    if case == "small":
        preds = make_preds(batch=1, size=(16, 16))
    check_grid(preds, rows, head)


def test_the_ratio_rule_without_and_with_offsets_gives_the_same_bits():
    preds, rows = make_preds(size=(16, 48)), bordering_rows()
    sorted_rows, offsets = sort_rows(rows, 2, 16)
    found = []
    for r, o in ((rows, None), (sorted_rows, offsets)):
        leaves = [p.clone().requires_grad_() for p in preds]
        total, parts, counts, *_ = ops.grid_loss(leaves, r, o, None, RATIO.key, True, [])
        found.append((total.detach(), parts, counts, *torch.autograd.grad(total, leaves)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("decode", ["exp", "sigmoid_square"])
def test_focal_and_decodes(decode):
    head = replace(HEAD, decode=decode, label="focal", label_args=(0.25, 1.5), class_targets=(0.9375, 0.0625))
    check_grid(make_preds(torch.float64), make_rows(), head, tolerance=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_good_as_eager(dtype):
    """Error against float64 on the same values: no more than the eager reference's own, and one rounding."""
    preds, rows = make_preds(dtype), make_rows()
    truth = [p.double().requires_grad_() for p in preds]
    eager = [p.clone().requires_grad_() for p in preds]
    fused = [p.clone().requires_grad_() for p in preds]
    want = torch.autograd.grad(_reference(truth, rows, HEAD)[0], truth)
    theirs = torch.autograd.grad(_reference(eager, rows, HEAD)[0], eager)
    ours = torch.autograd.grad(ops.grid_loss(fused, rows, None, None, HEAD.key, True, [])[0], fused)
    for t, e, o in zip(want, theirs, ours, strict=True):
        assert o.dtype == dtype
        rounding = torch.finfo(dtype).eps * t.abs() + torch.finfo(dtype).smallest_normal
        assert ((o.double() - t).abs() <= (e.double() - t).abs() + rounding).all()


def _reference(preds, rows, head):
    views = [canonical(p, len(level)) for p, level in zip(preds, head.levels, strict=True)]
    return reference.grid_loss(views, rows, head)


def _layouts(preds: list[Tensor]) -> dict[str, list[Tensor]]:
    five = [canonical(p, 3) for p in preds]
    return {
        "channels_last": [p.to(memory_format=torch.channels_last) for p in preds],
        "five": [p.contiguous() for p in five],
        "five as a view": five,
        "rows apart": [torch.nn.functional.pad(p, (0, 3))[..., :-3] for p in preds],
        "columns apart": [torch.stack((p, p + 9), -1)[..., 0] for p in preds],
        "transposed": [p.transpose(2, 3).contiguous().transpose(2, 3) for p in preds],
        "mixed": [preds[0], preds[1].to(memory_format=torch.channels_last)],
        "images apart": [torch.cat((p, p + 9), 1)[:, : p.shape[1]] for p in preds],
    }


def _step(preds: list[Tensor], rows: Tensor, head: GridHead) -> tuple[tuple[Tensor, ...], Sequence[Tensor]]:
    """What a loss leaves, and gradients."""
    preds = [p.requires_grad_() for p in preds]
    outputs = ops.grid_loss(preds, rows, None, None, head.key, True, [])
    return outputs, torch.autograd.grad(outputs[0], preds)


@cache
def contiguous(name: str) -> tuple[tuple[Tensor, ...], Sequence[Tensor]]:
    """A step that several tests compare with."""
    if name == "layouts":
        return _step(make_preds(size=(32, 48)), make_rows(n=6), DARKNET)
    return _step(make_preds(batch=1), make_rows(batch=1), HEAD)


@pytest.mark.parametrize("layout", list(_layouts(make_preds())))
def test_layouts_give_the_same_bits(layout):
    """Any strides: no copy, and the very gradient of the contiguous maps."""
    (total, parts, counts, *_), want = contiguous("layouts")
    views = [p.detach().requires_grad_() for p in _layouts(make_preds(size=(32, 48)))[layout]]
    got_total, got_parts, got_counts, *_ = ops.grid_loss(views, make_rows(n=6), None, None, DARKNET.key, True, [])
    got = torch.autograd.grad(got_total, views)
    torch.testing.assert_close(got_total, total, rtol=1e-6, atol=0)
    torch.testing.assert_close(got_parts, parts, rtol=1e-6, atol=0)
    assert torch.equal(got_counts, counts)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(canonical(a, 3), canonical(b, 3))


@pytest.mark.parametrize("size", [(32, 32), (16, 48), (16, 16), (112, 80)])
@pytest.mark.parametrize("batch", [1, 3])
def test_odd_sizes(batch, size):
    check_grid(make_preds(batch=batch, size=size), make_rows(batch=batch), HEAD)


@pytest.mark.parametrize("shared", ["last", "each"])
@pytest.mark.parametrize("classes", [1, 2, 3, 8, 9, 13, 20, 91, 300])
def test_class_counts(classes, shared):
    """Where one lane has all classes of a prediction, where several have, and where one prediction takes all lanes."""
    check_grid(
        make_preds(classes=classes), make_rows(classes=classes), replace(HEAD, num_classes=classes, shared=shared)
    )


def test_levels_with_unlike_numbers_of_anchors():
    head = replace(HEAD, levels=((2,), (5, 0, 3, 1)))  # anchor 4 competes but belongs to no level
    preds = [p[:, :n] for p, n in zip(make_preds(classes=27), (8, 32), strict=True)]
    check_grid(preds, make_rows(), head)


def test_no_rows():
    check_grid(make_preds(), torch.zeros(0, 6, device=DEVICE), HEAD)


def test_all_rows_invalid():
    rows = make_rows()
    rows[:, 4] = 0
    check_grid(make_preds(), rows, HEAD)


def test_tails():
    gen = torch.Generator().manual_seed(1)
    preds = make_preds()
    far = [torch.tensor([17.0, 40.0, 120.0])[torch.randint(3, p.shape, generator=gen)].to(p) for p in preds]
    some = [(torch.rand(p.shape, generator=gen) < 0.3).to(DEVICE) for p in preds]
    preds = [torch.where(s, f * p.sign(), p) for s, f, p in zip(some, far, preds, strict=True)]
    check_grid(preds, make_rows(), HEAD)


def sort_rows(rows: Tensor, batch: int, capacity: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows by image, strangers last, and where each image's rows start."""
    image = torch.where((rows[:, 0] >= 0) & (rows[:, 0] < batch), rows[:, 0], batch)
    order = image.sort(stable=True)
    starts = torch.searchsorted(order.values, torch.arange(batch + 1, device=rows.device).float())
    offsets = torch.cat((starts, torch.tensor([len(rows)], device=rows.device))).int()
    rows = rows[order.indices]
    if capacity is not None:
        rows = torch.cat((rows, torch.full((capacity - len(rows), 6), 0.5, device=rows.device)))
    return rows, offsets


@pytest.mark.parametrize("capacity", [None, 64])
def test_offsets_give_the_same_bits(capacity):
    preds, rows = make_preds(size=(16, 48)), make_rows(invalid=11)
    sorted_rows, offsets = sort_rows(rows, 2, capacity)
    found = []
    for r, o in ((rows, None), (sorted_rows, offsets)):
        leaves = [p.clone().requires_grad_() for p in preds]
        total, parts, counts, *_ = ops.grid_loss(leaves, r, o, None, DARKNET.key, True, [])
        found.append((total.detach(), parts, counts, *torch.autograd.grad(total, leaves)))
    assert found[0][2].tolist()[1] == 11
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_crowded_cells():
    """50 objects on 2 x 4 and 1 x 2 cells: predictions have several rows. test_crowds.py repeats such runs."""
    check_grid(make_preds(size=(16, 32)), make_rows(n=40, seed=3), HEAD)


def states(packed: Tensor, shape: torch.Size) -> Tensor:
    """Those of the first map [B, A, H, W], two bits each, sixteen in an integer."""
    cells = shape[2] * shape[3]
    words = packed[: shape[0] * shape[1] * -(-cells // 16)].view(*shape[:2], -1, 1)
    return ((words >> (2 * torch.arange(16, device=packed.device))) & 3).flatten(2)[..., :cells].view(shape)


@pytest.mark.parametrize(("cells", "channels"), [(64, 16), (1024, 4)])
def test_gradient_is_the_same_for_every_tile(cells, channels):
    preds, rows = make_preds(batch=1), make_rows(batch=1)
    found = []
    for tile in ((), (("cells", cells), ("channels", channels), ("rows", 16))):
        grads = [torch.full_like(p, float("nan")) for p in preds]
        with tuned.forced(tile):
            outputs = ops.grid_outputs(preds, rows, HEAD, True)
            ops.grid_launches(preds, rows, None, None, HEAD, outputs, True)["loss"].run()
            ops.grid_grad_launch(preds, grads, torch.ones((), device=DEVICE), HEAD, outputs).run()
        found.append((outputs, grads))
    torch.testing.assert_close(found[0][0].total, found[1][0].total, rtol=1e-6, atol=0)
    assert torch.equal(found[0][0].counts, found[1][0].counts)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(a, b)


def test_every_output_is_written(monkeypatch):
    """No result depends on what memory held: buffers come filled with NaN."""
    empty_like, new_empty = torch.empty_like, Tensor.new_empty

    def poison(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty_like", lambda *args, **kw: poison(empty_like(*args, **kw)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kw: poison(new_empty(*args, **kw)))
    check_grid(make_preds(), make_rows(), DARKNET)


@pytest.mark.parametrize("place", ["background box", "background objectness", "assigned box", "assigned class"])
def test_a_nan_stays_with_its_prediction(place):
    preds, rows = make_preds(batch=1), make_rows(batch=1)
    (_, _, _, state, *_), want = contiguous("nan")
    wanted = 2 if place.startswith("assigned") else 0
    where = (states(state, canonical(preds[0], 3).shape[:4]) == wanted).nonzero()[0].tolist()
    channel = {"background box": 2, "background objectness": 4, "assigned box": 1, "assigned class": 6}[place]
    dirty = [p.clone() for p in preds]
    canonical(dirty[0], 3)[(*where, channel)] = float("nan")
    dirty = [p.requires_grad_() for p in dirty]
    total, _, _, *_ = ops.grid_loss(dirty, rows, None, None, HEAD.key, True, [])
    assert total.isnan()
    got = torch.autograd.grad(total, dirty)
    for level, (a, b) in enumerate(zip(got, want, strict=True)):
        same = a == b
        if level == 0:
            canonical(same, 3)[tuple(where)] = True
        assert same.all()


def test_without_grad_no_state_is_kept():
    preds = make_preds()
    assert ops.grid_loss(preds, make_rows(), None, None, HEAD.key, False, [])[3].numel() == 0


def test_backward_twice_and_scaled():
    leaves = [p.requires_grad_() for p in make_preds(torch.float64)]
    total = ops.grid_loss(leaves, make_rows(), None, None, HEAD.key, True, [])[0]
    once = torch.autograd.grad(total, leaves, retain_graph=True)
    scaled = torch.autograd.grad(total * 3, leaves, retain_graph=True)
    again = torch.autograd.grad(total, leaves)
    for a, b, c in zip(once, scaled, again, strict=True):
        assert torch.equal(a, c)
        torch.testing.assert_close(b, 3 * a, rtol=1e-12, atol=0)


@pytest.mark.parametrize("head", [HEAD, replace(DARKNET, box="bce_mse")])
def test_gradcheck(head):
    """Two cells of one anchor, one of them with two objects."""
    head = replace(head, levels=((1,),), strides=(8.0,), scale_x_y=(1.125,))
    pred = make_preds(torch.float64)[0][:1, :8, :1, :2].contiguous().requires_grad_()
    rows = torch.tensor([[0, 0, 0.3, 0.5, 0.9, 3.0], [0, 2, 0.2, 0.4, 1.0, 3.5]], device=DEVICE)
    assert torch.autograd.gradcheck(
        lambda p: ops.grid_loss([p], rows, None, None, head.key, True, [])[0], pred, atol=1e-6, fast_mode=True
    )


def test_maps_beyond_2_to_the_31_elements_are_addressed():
    """Strides that only fit 64 bits: the second image lies 2^31 elements behind the first."""
    if DEVICE == "cpu" and not _can_reserve():
        pytest.skip("cannot reserve 9 GB of address space")
    head = replace(HEAD, levels=((0,),), strides=(8.0,), scale_x_y=(1.0,))
    small = make_preds()[0][:, :8, :2, :2].contiguous()
    far = torch.empty(2**31 + small[0].numel(), device=DEVICE).as_strided(small.shape, (2**31, *small.stride()[1:]))
    far.copy_(small)
    rows = torch.tensor([[1, 0, 0.5, 0.5, 0.7, 0.9]], device=DEVICE)
    near = ops.grid_loss([small], rows, None, None, head.key, False, [])
    assert torch.equal(ops.grid_loss([far], rows, None, None, head.key, False, [])[0], near[0])


def _can_reserve() -> bool:
    try:
        torch.empty(2**31 + 64)
    except RuntimeError:
        return False
    return True
