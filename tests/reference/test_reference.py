"""The eager reference against other libraries' recorded outputs, and against the contract written as Python loops."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace

import golden
import pytest
import torch
from formulas import box_term, label_term, offset_term
from loop_loss import loop_loss
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusedyolo.heads import GridHead
from fusedyolo.reference import BOX_TERMS, DECODE, LABEL_TERMS, OFFSET_TERMS, assign, grid_loss, read_rows
from fusedyolo.terms import TERMS, term_names

F64 = torch.float64


def close(got: Tensor, want: Tensor, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


def leaf(values, dtype=F64) -> Tensor:
    return torch.as_tensor(values, dtype=dtype).detach().clone().requires_grad_()


# ---- against recorded outputs

MSE = golden.names("darknet", "yolov3_mse_*") + golden.names("darknet", "yolov4_b_*_mse4")
IOU = [name for name in golden.names("darknet", "yolov4_*") if not name.endswith("_mse4")]
AREAS = {0: "box", 1: "obj", 2: "cls"}


def run_golden(g: golden.YoloGolden, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient and darknet's delta, [B, A, H, W, 5 + C], and the parts."""
    logits = leaf(g.logits, dtype)
    anchors = len(g.head.levels[0])
    total, parts, _ = grid_loss([golden.canonical(logits, anchors)], g.rows, g.head, g.class_weights)
    total.backward()
    close(parts.sum(), total.detach(), rtol=1e-6)
    return golden.canonical(logits.grad, anchors), golden.canonical(g.delta.to(dtype), anchors), parts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", MSE)
def test_darknet_mse_delta_is_the_gradient(name, dtype):
    grad, delta, _ = run_golden(golden.yolo(name), dtype)
    assert delta[..., :4].any()
    close(-grad, delta, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", IOU)
def test_darknet_objectness_and_class_delta_is_the_gradient(name, dtype):
    grad, delta, _ = run_golden(golden.yolo(name), dtype)
    close(-grad[..., 4:], delta[..., 4:], rtol=0, atol=1e-4)
    # no gradient of any loss, but on the same predictions; darknet's iou moves disjoint boxes as well
    boxes, theirs = grad[..., :4].any(-1), delta[..., :4].any(-1)
    assert boxes.any()
    assert torch.equal(boxes, theirs & boxes if name.endswith("_iou") else theirs)


@pytest.mark.parametrize("name", [name for name in MSE + IOU if golden.yolo(name).terms])
def test_darknet_scalar_losses(name):
    g = golden.yolo(name)
    _, _, parts = run_golden(g, F64)
    close(parts[1], parts.new_tensor(g.terms["obj"]))
    close(parts[2], parts.new_tensor(g.terms["cls"]))
    if "xy" in g.terms:
        close(parts[0], parts.new_tensor(g.terms["xy"] + g.terms["wh"]), rtol=1e-6)  # their targets are float32


def test_darknet_scalar_losses_are_recorded_for_all_but_class_weights():
    assert {name for name in MSE + IOU if not golden.yolo(name).terms} == set(golden.names("darknet", "yolov4_*_mult"))


@pytest.mark.parametrize("name", [n for n in IOU if n.endswith(("_iou", "_giou"))])
def test_darknet_iou_delta_is_the_gradient_up_to_its_jacobian(name):
    """Where one object overlaps its prediction: darknet leaves scale * sigmoid'(x) / W out, and has e^w for half of
    anchor / image * e^w."""
    g = golden.yolo(name)
    grad, delta, _ = run_golden(g, F64)
    overlapping, _, _ = run_golden(golden.yolo(name.replace("_giou", "_iou")), F64)
    (own,) = g.head.levels
    B, A, H, W, _ = grad.shape
    stride = g.head.strides[0]
    found = assign(read_rows(g.rows, g.head, B), g.head, 0, [(H, W)], B, F64)
    owners = torch.bincount(found.slot, minlength=B * A * H * W + 1)[:-1].view(B, A, H, W)
    chosen = (owners == 1) & overlapping[..., :4].any(-1) & (delta[..., :4].abs() < g.layer["max_delta"]).all(-1)
    assert chosen.sum() >= 2
    slope = torch.sigmoid(golden.canonical(g.logits.double(), A)[..., :2])
    xy = g.head.scale_x_y[0] * slope * (1 - slope) / torch.tensor([W, H])
    wh = torch.tensor([g.head.anchors[t] for t in own], dtype=F64) / torch.tensor([W, H]) / stride
    close((-grad[..., :2] / xy)[chosen], delta[..., :2][chosen], rtol=0, atol=1e-4)
    close((-2 * grad[..., 2:4] / wh[:, None, None])[chosen], delta[..., 2:4][chosen], rtol=0, atol=1e-4)


def compare_finite(got: Tensor, want: Tensor, unit: Tensor | float = 1.0) -> None:
    finite = want.isfinite()
    assert finite.any()
    close((got / unit)[finite], (want / unit)[finite])


@pytest.mark.parametrize("kind", ["giou", "diou", "ciou"])
@pytest.mark.parametrize("name", golden.names("torch", "tv_boxloss*"))
def test_torchvision_box_losses(name, kind):
    data = golden.arrays(name)
    p, g = leaf(data["boxes1"]), leaf(data["boxes2"])
    eps = data["meta"]["eps"]
    loss = BOX_TERMS[kind](p, g, (1e-7, eps))
    loss.sum().backward()
    compare_finite(loss.detach(), data[f"{kind}_none"])
    for box, want in ((p, data[f"{kind}_none_grad1"]), (g, data[f"{kind}_none_grad2"])):
        side = (box[:, 2:] - box[:, :2]).detach().repeat(1, 2)
        side = torch.where(side > 0, side, 1.0)  # a gradient by the logarithm of a side is of order one
        compare_finite(box.grad, want, 1 / side)
    assert loss.isfinite().all()
    assert p.grad.isfinite().all()
    assert g.grad.isfinite().all()


@pytest.mark.parametrize("name", golden.names("torch", "tv_focal*"))
def test_torchvision_focal_loss(name):
    data = golden.arrays(name)
    for key, alpha, gamma in data["meta"]["cases"]:
        x, t = leaf(data["logits"]), data["targets"].double()
        loss = LABEL_TERMS["focal"](x, t, (alpha, gamma))
        loss.sum().backward()
        compare_finite(loss.detach(), data[f"none_{key}"])
        compare_finite(x.grad, data[f"grad_sum_{key}"])
        assert x.grad.isfinite().all()


# ---- terms

EXTENT = (3.0, 2.0)
IOU_KINDS = term_names("iou", users=True)
BOUNDED = [kind for kind in IOU_KINDS if not TERMS[kind].needs_extent]  # such a one grows with the distance


@pytest.mark.parametrize("args", [(0.0, 0.0), (1e-7, 1e-7), (0.0, 1e-6)])
@pytest.mark.parametrize("kind", IOU_KINDS)
def test_box_term_on_a_lattice(kind, args):
    """All pairs of boxes on a 3 x 3 lattice: edges that coincide, touch, nest and miss."""
    spans = list(itertools.combinations(range(3), 2))
    boxes = [(x1, y1, x2, y2) for x1, x2 in spans for y1, y2 in spans]
    pairs = list(itertools.product(boxes, boxes))
    p, g = leaf([a for a, _ in pairs]), leaf([b for _, b in pairs])
    BOX_TERMS[kind](p, g, args, torch.tensor(EXTENT)).sum().backward()
    p2, g2 = leaf(p), leaf(g)
    total = torch.zeros((), dtype=F64)
    for a, b in zip(p2.unbind(), g2.unbind(), strict=True):
        sides = [((v[0] + v[2]) / 2, (v[1] + v[3]) / 2, v[2] - v[0], v[3] - v[1]) for v in (a.unbind(), b.unbind())]
        total = total + box_term(kind, *sides, args, EXTENT)
    total.backward()
    close(p.grad, p2.grad)
    close(g.grad, g2.grad)
    close(BOX_TERMS[kind](p, g, args, torch.tensor(EXTENT)).sum(), total)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("args", [(0.0, 0.0), (1e-7, 1e-7)])
@pytest.mark.parametrize("kind", BOUNDED)
def test_box_term_is_finite(kind, args, dtype):
    """Points, segments, and sides from 1e-25 to 1e28: neither 0 / 0 nor an area beyond float32."""
    sides = (0.0, 1e-25, 1.0, 1e28)
    boxes = [(-w / 2, -h / 2, w / 2, h / 2) for w in sides for h in sides]
    boxes += [(3.0, 4.0, 3.0 + w, 4.0 + h) for w in (0.0, 1.0) for h in (0.0, 1.0)]
    pairs = list(itertools.product(boxes, boxes))
    p, g = leaf([a for a, _ in pairs], dtype), leaf([b for _, b in pairs], dtype)
    loss = BOX_TERMS[kind](p, g, args)
    # a box's gradient is applied to the logarithm of its size, so it may itself be as large as 1 / size
    loss.sum().backward()
    assert loss.isfinite().all()
    assert p.grad.isfinite().all()
    assert g.grad.isfinite().all()


@pytest.mark.parametrize("kind", BOUNDED)
def test_box_term_of_far_scales_keeps_its_value(kind):
    """A box of 1e28 pixels around one of 16 x 8: IoU 0, no area to spare, aspect as ever."""
    p = torch.tensor([[-5e27, -5e27, 5e27, 5e27]])
    g = torch.tensor([[0.0, 0.0, 16.0, 8.0]])
    got = BOX_TERMS[kind](p, g, (0.0, 0.0))
    want = {"eiou": 3.0, "siou": 1 + (1 - math.exp(-1.0)) ** 4}.get(kind, 1.0)
    if kind == "ciou":
        v = 4 / math.pi**2 * (math.atan(2.0) - math.pi / 4) ** 2
        want += v * v / (1 + v)
    close(got, torch.tensor([want]), rtol=1e-6)


def test_ciou_alpha_is_constant():
    p, g = leaf([[0.0, 0.0, 3.0, 2.0]]), leaf([[0.5, 0.25, 2.0, 3.0]])
    (extra,) = torch.autograd.grad((BOX_TERMS["ciou"](p, g, (0.0, 0.0)) - BOX_TERMS["diou"](p, g, (0.0, 0.0))).sum(), p)
    turn = math.atan(1.5 / 2.75) - math.atan(1.5)
    v = 4 / math.pi**2 * turn**2
    inter = 1.5 * 1.75
    alpha = v / (1 - inter / (6 + 1.5 * 2.75 - inter) + v)
    # paper: dv/dw = -8/pi^2 turn h / (w^2 + h^2), dv/dh = 8/pi^2 turn w / (w^2 + h^2)
    dw, dh = (-8 / math.pi**2 * turn * 2 / 13, 8 / math.pi**2 * turn * 3 / 13)
    close(extra, alpha * torch.tensor([[-dw, -dh, dw, dh]], dtype=F64))


def test_ciou_of_inverted_boxes_keeps_the_sign_of_the_aspect():
    p = leaf([[0.0, 0.0, 3.0, 1.0], [0.0, 0.0, 1.0, 3.0]])
    g = leaf([[3.0, 0.0, 0.0, 2.0], [2.0, 3.0, 0.0, 0.0]])
    extra = BOX_TERMS["ciou"](p, g, (0.0, 0.0)) - BOX_TERMS["diou"](p, g, (0.0, 0.0))
    turns = (math.atan(-3 / 2) - math.atan(3), math.atan(-2 / -3) - math.atan(1 / 3))
    vs = [4 / math.pi**2 * turn**2 for turn in turns]
    close(extra, torch.tensor([v * v / (1 + v) for v in vs], dtype=F64))  # no IoU


TAILS = [0.0, -0.0, 0.5, 17.0, 40.0, 88.0, 100.0, 120.0, 745.0, 1e4]


@pytest.mark.parametrize(
    ("kind", "args"),
    [
        ("bce", ()),
        *(("focal", args) for args in ((-1.0, 0.0), (0.25, 0.5), (0.6, 1.0), (0.0, 1.5), (1.0, 2.0), (0.25, 0.01))),
    ],
)
def test_label_term_in_the_tails(kind, args):
    values = [sign * value for value in TAILS for sign in (1, -1)]
    for t in (0.0, 0.05, 0.5, 0.95, 1.0):
        x, y = leaf(values), leaf(values)
        got = LABEL_TERMS[kind](x, torch.full_like(x, t), args)
        got.sum().backward()
        want = torch.stack([label_term(kind, v, t, args) for v in y.unbind()])
        want.sum().backward()
        close(got, want)
        close(x.grad, y.grad.nan_to_num(0.0, posinf=math.inf, neginf=-math.inf))
        small = leaf(values, torch.float32)
        single = LABEL_TERMS[kind](small, torch.full_like(small, t), args)
        single.sum().backward()
        close(single, want.float(), rtol=2e-6, atol=1e-30)
        assert small.grad.isfinite().all()
        close(small.grad, x.grad.float(), rtol=1e-5, atol=1e-7)


def test_bce_slope_at_zero():
    x = leaf([0.0, -0.0, 0.0, 0.0])
    t = torch.tensor([0.0, 1.0, 0.5, 0.3], dtype=F64)
    LABEL_TERMS["bce"](x, t, ()).sum().backward()
    close(x.grad, 0.5 - t, rtol=0, atol=1e-16)


@pytest.mark.parametrize("scale", [1.0, 1.05, 2.0])
@pytest.mark.parametrize("kind", term_names("offset"))
def test_offset_term(kind, scale):
    a, b = leaf([0.0, 1.5, -120.0, 120.0, 17.0]), leaf([0.0, -2.0, 120.0, -120.0, 0.5])
    ta, tb = torch.tensor([0.5, 0.0, 0.99, 0.25, 1.0]).double(), torch.tensor([0.0, 1.0, -3.0, 0.5, 0.5]).double()
    got = OFFSET_TERMS[kind](a, b, ta, tb, scale)
    got.sum().backward()
    a2, b2 = leaf(a), leaf(b)
    cases = zip(a2.unbind(), b2.unbind(), ta.tolist(), tb.tolist(), strict=True)
    want = torch.stack([offset_term(kind, *case, scale) for case in cases])
    want.sum().backward()
    close(got, want)
    close(a.grad, a2.grad)
    close(b.grad, b2.grad)


def test_decode_exp():
    a = leaf([0.0, 2.0, -120.0, 120.0, 0.0, 0.0, 0.0])
    b = leaf([0.0, 1.0, 59.0, -120.0, 1e9, math.inf, -math.inf])
    centre, size = DECODE["exp"](a, b, torch.tensor(3.0).double(), 8.0, 1.2)
    centre.sum().backward(retain_graph=True)
    sigmoid = torch.tensor([0.5, 1 / (1 + math.exp(-2)), 0.0, 1.0, 0.5, 0.5, 0.5], dtype=F64)
    close(centre, (1.2 * sigmoid - 0.1) * 8)
    close(a.grad, 1.2 * 8 * sigmoid * (1 - sigmoid))
    want = 3 * torch.tensor([0.0, 1.0, 59.0, -60.0, 60.0, 60.0, -60.0], dtype=F64).exp()
    close(size, want, atol=0)
    size.sum().backward()
    close(b.grad[:5], want[:5], atol=0)  # as if not clamped
    assert b.grad.isfinite().all()
    assert DECODE["exp"](a, b * math.nan, torch.tensor(3.0).double(), 8.0, 1.2)[1].isnan().all()


def test_decode_sigmoid_square():
    a, b = leaf([0.0, 120.0]), leaf([0.0, -1.0])
    centre, size = DECODE["sigmoid_square"](a, b, torch.tensor(3.0).double(), 8.0, 2.0)
    close(centre, torch.tensor([4.0, 12.0], dtype=F64))
    s = 1 / (1 + math.e)
    close(size, torch.tensor([3.0, 12 * s * s], dtype=F64))
    size.sum().backward()
    close(b.grad, torch.tensor([3.0, 24 * s * s * (1 - s)], dtype=F64))


# ---- assignment


def head_of(**changes) -> GridHead:
    """Two levels of two anchors and one anchor of no level, three classes."""
    base = GridHead(
        num_classes=3,
        anchors=((8.0, 8.0), (16.0, 16.0), (24.0, 10.0), (40.0, 40.0), (30.0, 70.0)),
        levels=((0, 1), (2, 3)),
        strides=(8.0, 16.0),
        scale_x_y=(1.2, 1.05),
        box_args=(1e-7, 1e-7),
    )
    if "label" in changes:
        changes = {"label_args": tuple(TERMS[changes["label"]].numbers.values()), **changes}
    return replace(base, **changes)


MAPS = [(4, 6), (2, 3)]  # 48 x 32 pixels


def places(
    rows: list[tuple[float, ...]], head: GridHead, maps: list[tuple[int, int]] = MAPS, batch: int = 2,
    dtype: torch.dtype = F64,
) -> list[list[tuple[int, ...]]]:  # fmt: skip
    """Of each row the predictions (level, image, anchor of the level, y, x) that it is assigned to, in order."""
    read = read_rows(torch.tensor(rows), head, batch)
    found: list[list[tuple[int, ...]]] = [[] for _ in rows]
    for level, (own, (H, W)) in enumerate(zip(head.levels, maps, strict=True)):
        candidates = assign(read, head, level, maps, batch, dtype)
        for row, slot in zip(candidates.row.tolist(), candidates.slot.tolist(), strict=True):
            assert 0 <= slot <= batch * len(own) * H * W
            if slot < batch * len(own) * H * W:
                a, cell = divmod(slot, H * W)
                assert a // len(own) == read.image[row]
                found[row].append((level, a // len(own), a % len(own), *divmod(cell, W)))
    return found


def taken(rows: list[tuple[float, ...]], head: GridHead, dtype: torch.dtype = F64) -> list[list[int]]:
    """The same as one number, counted through the levels of ``MAPS`` by image, anchor, y, x; two anchors a level."""

    def number(level: int, b: int, a: int, y: int, x: int) -> int:
        H, W = MAPS[level]
        return level * 2 * 2 * 24 + ((b * 2 + a) * H + y) * W + x

    return [[number(*place) for place in own] for own in places(rows, head, dtype=dtype)]


def test_assign_by_hand():
    rows = [
        (0, 0, 0.5, 0.5, 8 / 48, 8 / 32),  # anchor 0 of level 0: image 0, anchor 0, y 2, x 3
        (1, 2, 0.99, 0.01, 15 / 48, 15 / 32),  # anchor 1: image 1, y 0, x 5
        (1, 1, 0.0, 0.99, 24 / 48, 10 / 32),  # anchor 2 of level 1: image 1, y 1, x 0
        (0, 1, 0.4, 0.3, 30 / 48, 70 / 32),  # best is the anchor of no level
    ]
    level1 = 2 * 2 * 24
    assert taken(rows, head_of()) == [[2 * 6 + 3], [(2 + 1) * 24 + 5], [level1 + 2 * 6 + 3], []]


def test_assign_takes_other_anchors_strictly_above_the_threshold():
    rows = [(0, 0, 0.0, 0.0, 12 / 48, 8 / 32)]
    head = head_of(anchors=((6.0, 8.0), (12.0, 16.0), (12.0, 10.0), (40.0, 40.0), (30.0, 70.0)))  # IoU .5, .5, .8
    best = 2 * 2 * 24
    assert taken(rows, replace(head, iou_thresh=0.5)) == [[best]]
    assert taken(rows, replace(head, iou_thresh=math.nextafter(0.5, 0))) == [[0, 24, best]]
    assert taken(rows, replace(head, iou_thresh=1.0)) == [[best]]


def test_assign_takes_the_first_of_equal_anchors():
    head = head_of(anchors=((8.0, 8.0), (10.0, 10.0), (10.0, 10.0), (40.0, 40.0), (30.0, 70.0)))
    rows = [(0, 0, 0.0, 0.0, 10 / 48, 10 / 32)]
    assert taken(rows, head) == [[24]]
    assert taken(rows, replace(head, iou_thresh=0.9)) == [[24, 96]]


def test_assign_takes_no_anchor_of_iou_zero():
    rows = [(0, 0, 0.0, 0.0, 1e-38, 1e-38)]  # an area below float32
    assert taken(rows, head_of(), dtype=torch.float32) == [[]]
    assert taken(rows, head_of()) == [[0]]


def test_assign_multiplies_the_cell_in_float32():
    centre = torch.tensor(0.7).item()  # 6.9999998 of 10 cells, which float32 rounds to 7
    assert int(centre * 10) == 6
    head = head_of(levels=((0,), (1,)), iou_thresh=0.0)
    found = places([(0, 0, centre, centre, 0.1, 0.1)], head, [(10, 10), (5, 5)], 1)
    assert found == [[(0, 0, 0, 7, 7), (1, 0, 0, 3, 3)]]


@pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 129, 1000, 4095, 4097])
def test_assign_stays_on_the_map(size):
    below = 1 - 2.0**-24
    head = head_of(levels=((0,), (1,)), strides=(8.0, 8.0), iou_thresh=0.0)
    for centre, edge in ((below, False), (1.0, True)):
        found = places([(0, 0, centre, centre, 1.0, 1.0)], replace(head, edge=edge), [(size, size)] * 2, 1)
        assert found == [[(level, 0, 0, size - 1, size - 1) for level in (0, 1)]]


INVALID = [
    (-1, 0, 0.5, 0.5, 0.2, 0.2),
    (2, 0, 0.5, 0.5, 0.2, 0.2),
    (-0.5, 0, 0.5, 0.5, 0.2, 0.2),
    (0, -1, 0.5, 0.5, 0.2, 0.2),
    (0, 3, 0.5, 0.5, 0.2, 0.2),
    (0, 0, 1.0, 0.5, 0.2, 0.2),
    (0, 0, 0.5, 1.0, 0.2, 0.2),
    (0, 0, -0.01, 0.5, 0.2, 0.2),
    (0, 0, 0.5, -0.01, 0.2, 0.2),
    (0, 0, 0.5, 0.5, 0.0, 0.2),
    (0, 0, 0.5, 0.5, 0.2, -0.1),
    (0, 0, 0.5, 0.5, math.inf, 0.2),
    (1e30, 0, 0.5, 0.5, 0.2, 0.2),
    (0, -math.inf, 0.5, 0.5, 0.2, 0.2),
    *[tuple(math.nan if i == k else 0.2 for i in range(6)) for k in range(6)],
]


def test_assign_rejects_invalid_rows_only():
    valid = [(1.9, 2.9, 0.999, 0.0, 1.5, 1e-3), (0, 0, 0.0, 0.999, 1e-3, 7.0)]
    head = head_of(iou_thresh=0.01)
    read = read_rows(torch.tensor(valid + INVALID), head, 2)
    assert read.valid.tolist() == [True] * 2 + [False] * len(INVALID)
    assert read.image[:2].tolist() == [1, 0]
    assert read.label[:2].tolist() == [2, 0]
    for assigner in ("best_anchor", "ratio", "iou_band"):
        generous = replace(head, assigner=assigner, anchor_t=1e9, band=(0.0, 1e-9))
        found = places(valid + INVALID, generous)
        assert not any(found[2:])
        assert all(found[:2])


# ---- the whole loss against loops


def random_head(gen: torch.Generator, anchors: list[tuple[float, float]], own: list[list[int]]) -> GridHead:
    """Every field by itself, but for what no loss combines; strides and scales are the caller's."""

    def pick(*values):
        return values[int(torch.randint(len(values), (), generator=gen))]

    levels = len(own)
    box = pick(*term_names("iou", "offset"))
    is_offset = TERMS[box].is_offset
    assigner = pick("best_anchor", "ratio", "iou_band")
    smooth = pick(True, False, False)
    shared = pick("sum", "last", *(() if smooth else ("each",)))
    mean_rows, obj_mean = not smooth and pick(True, False), None if smooth else pick(None, "cells", "used")
    label, objectness = pick(*term_names("class")), pick(*term_names("objectness"))
    eps = pick((0.0, 1e-6), (1e-7, 1e-7), (1e-16, 1e-16))
    quality = pick(None, "box", *IOU_KINDS)
    if quality == "box":
        quality = "iou" if is_offset else box
    quality_args = eps if quality == box else pick((0.0, 1e-6), (1e-3, 1e-7))
    soften = pick(0.0, 0.2)

    def label_args(kind: str) -> tuple[float, ...]:
        some = {"alpha": (-1.0, 0.25), "gamma": (0.0, 1.5, 2.0), "pos_weight": (1.75,)}
        term = TERMS[kind]
        taken = {**term.numbers, **pick({}, term.optional)}
        return tuple(pick(*some.get(name, (usual,))) for name, usual in taken.items())

    return GridHead(
        num_classes=pick(1, 3, 5),
        anchors=tuple(anchors),
        levels=tuple(map(tuple, own)),
        strides=(1.0,) * levels,
        scale_x_y=tuple((1.0 + torch.rand(levels, generator=gen)).tolist()),
        unit=pick("image", "pixel", "cell"),
        assigner=assigner,
        iou_thresh=pick(1.0, 0.2, 0.45),
        anchor_t=pick(1.5, 2.0, 4.0),
        band=pick((0.2, 0.4), (0.3, 0.3), (0.0, 0.5)),
        per_level=pick(True, False),
        shared=shared,
        edge=pick(True, False),
        decode="exp" if is_offset else pick(*term_names("grid")),
        box=box,
        label=label,
        objectness=objectness,
        quality=quality,
        quality_ratio=pick(1.0, 0.75),
        ignore_thresh=pick(0.3, 0.5) if smooth else pick(None, 0.3, 0.5),
        class_gate=pick(None, -1.0, 1.0),
        smooth=tuple(pick(True, False) for _ in own) if smooth else (),
        average_box=shared != "each" and pick(True, True, False),
        mean_rows=mean_rows,
        obj_mean=obj_mean,
        box_gain=0.07,
        obj_gain=1.3,
        noobj_gain=0.6,
        cls_gain=0.9,
        prior_gain=pick(0.0, 0.0, 0.02),
        obj_balance=pick((), tuple((0.5 + torch.rand(levels, generator=gen)).tolist())),
        area_weight=pick(0.0, 1.0),
        area_cap=pick(3.0e38, 0.25),
        class_targets=(1 - soften / 2, soften / 2),
        first_weight=0.5,
        box_args=(*eps, *pick((), (), (2.0, 0.5))) if TERMS[box].optional else eps,
        label_args=label_args(label),
        obj_args=label_args(objectness),
        quality_args=quality_args,
    )


def random_case(
    seed: int, levels: int, tails: bool, dyadic: bool = False
) -> tuple[list[Tensor], Tensor, GridHead, Tensor | None]:
    """Crowded images that are not square, with objects where predictions are, and invalid rows.

    Dyadic: centres on the borders and middles of cells and of the image, and sizes whose overlaps tie exactly.
    """
    gen = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (), generator=gen))]

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=gen)

    counts = [pick(1, 2, 3) for _ in range(levels)]
    factors = [max(1, 4 >> level) for level in range(levels)]
    coarse = 16.0 if dyadic else 14.6
    strides = [coarse / factor for factor in factors]
    anchors: list[tuple[float, float]] = []
    for stride, count in zip(strides, counts, strict=True):
        sides = stride * uniform(1.0, 3.0, count, 2)
        anchors += map(tuple, (sides.round() if dyadic else sides).tolist())
    anchors += [(7.0, 50.0), anchors[0]]  # one of no level, one twice
    order = torch.randperm(len(anchors), generator=gen).tolist()
    anchors = [anchors[i] for i in order]
    own = iter(order.index(i) for i in range(sum(counts)))
    head = random_head(gen, anchors, [[next(own) for _ in range(count)] for count in counts])
    head = replace(head, strides=tuple(strides))
    classes = head.num_classes
    batch = pick(1, 2)
    base_h, base_w = pick((1, 2), (2, 1), (2, 3))
    preds = []
    for factor, count in zip(factors, counts, strict=True):
        shape = (batch, count, base_h * factor, base_w * factor, 5 + classes)
        pred = torch.randn(shape, generator=gen, dtype=F64)
        pred[..., :4] *= 0.5
        if tails:
            far = torch.rand(shape, generator=gen) < 0.2
            pred = torch.where(far, 120 * pred.sign(), pred)
        preds.append(pred.requires_grad_())

    n = 14
    side = coarse * torch.tensor([base_w, base_h])
    size = torch.tensor(anchors)[torch.randint(len(anchors), (n,), generator=gen)] * uniform(0.7, 1.4, n, 2) / side
    centre = uniform(0, 1, n, 2)
    if dyadic:
        size = (16 * size).round().clamp(min=1) / 16
        centre = (16 * centre).round() / 16
        centre[: n // 2 : 3, 0] = 1.0  # out of the image, but for head.edge
    rows = torch.cat(
        (
            torch.randint(batch, (n, 1), generator=gen),
            torch.randint(classes, (n, 1), generator=gen),
            centre,
            size,
        ),
        1,
    )
    rows[n // 2 : n - 2, 2:] = rows[: n // 2 - 2, 2:]  # the same places and sizes again, partly with the same class
    rows[n // 2 : n - 2, 0] = rows[: n // 2 - 2, 0]
    rows[n - 2 :] = rows[:2]
    rows[n - 3, 4:] = 2.5  # an object larger than the image
    rows = torch.cat((rows, torch.tensor(INVALID)[torch.randperm(len(INVALID), generator=gen)[:4]]))
    rows = rows[torch.randperm(len(rows), generator=gen)]
    weighted = head.shared != "each" and head.label != "softmax_ce" and pick(True, False)
    return preds, rows, head, uniform(0.2, 4.0, classes) if weighted else None


CASES = [(seed, 1 + seed % 3 if seed % 8 else 5, seed % 4 == 2, seed % 2 == 1) for seed in range(80)]


def compare_with_loop(preds: list[Tensor], rows: Tensor, head: GridHead, weights: Tensor | None = None) -> None:
    total, parts, counts = grid_loss(preds, rows, head, weights)
    grads = torch.autograd.grad(total, preds)
    want = loop_loss(preds, rows, head, weights)
    close(parts, torch.stack([want.box, want.obj, want.cls]).detach())
    close(total, want.total)
    assert counts.dtype == torch.int32
    assert counts.tolist() == [want.assigned, want.invalid]
    # a map of which nothing counts has no part in the loops' graph
    for got, expected in zip(grads, torch.autograd.grad(want.total, preds, materialize_grads=True), strict=True):
        close(got, expected)


@pytest.mark.parametrize(("seed", "levels", "tails", "dyadic"), CASES)
def test_grid_loss_is_the_loop(seed, levels, tails, dyadic):
    compare_with_loop(*random_case(seed, levels, tails, dyadic))


def variant(head: GridHead, seed: int) -> GridHead:
    """Rules that most losses do not have."""
    changes = [
        {"assigner": "shape_iou", "iou_thresh": (0.2, 0.45)[seed % 2]},
        {"assigner": "ratio", "anchor_t": 4.0, "neighbours": (0, 4)[seed % 2]},
        {"shared": "merge"},
        {"weigh_classes": True},
    ]
    if head.assigner == "iou_band":
        head = replace(head, assigner="best_anchor")
    for i in (seed % 4, (seed // 4 + 2) % 4):
        head = replace(head, **changes[i])
    return replace(head, average_box=False, smooth=()) if head.shared == "each" else head


@pytest.mark.parametrize(("seed", "levels", "tails", "dyadic"), CASES[::3])
def test_variants_are_the_loop(seed, levels, tails, dyadic):
    preds, rows, head, weights = random_case(seed, levels, tails, dyadic)
    head = variant(head, seed)
    if head.weigh_classes:
        weights = torch.linspace(0.5, 2.0, head.num_classes, dtype=F64)
    compare_with_loop(preds, rows, head, weights)


def by_cost_case(seed: int) -> tuple[list[Tensor], Tensor, GridHead, Tensor | None]:
    """Rows that pick by cost among what they offer: of YOLOv5's cells, or what two other rules give them."""
    preds, rows, head, weights = random_case(seed, 1 + seed % 3, False, seed % 2 == 1)
    rules = ({"assigner": "ratio", "neighbours": 2}, {"assigner": "ratio", "neighbours": 4}, {"assigner": "shape_iou"})
    shared = {"shared": ("each", "each", "sum", "last")[seed % 4], "average_box": False, "smooth": ()}
    head = replace(head, by_cost=True, anchor_t=4.0, iou_thresh=0.2, **rules[seed % 3], **shared)
    return preds, rows, head, None if head.shared == "each" else weights


@pytest.mark.parametrize("seed", range(36))
def test_picking_by_cost_is_the_loop(seed):
    compare_with_loop(*by_cost_case(seed))


def test_picking_by_cost_meets_every_situation():
    seen = sum((loop_loss(*by_cost_case(seed)).seen for seed in range(0, 36, 3)), Counter())
    assert min(seen[name] for name in ("several picks", "picked by several", "picked of another", "shared")) >= 5


def test_the_cases_meet_every_situation():
    seen = Counter()
    for seed, levels, tails, dyadic in CASES:
        if levels == 1:
            seen += loop_loss(*random_case(seed, levels, tails, dyadic)).seen
    situations = (
        "ignored", "kept by the gate", "shared", "repeated class", "several classes", "averaged", "neighbour",
        "border of the image", "left out by the band", "equal overlaps", "prior", "smooth", "similarity below 0",
    )  # fmt: skip
    assert {name: seen[name] for name in situations if seen[name] < 5} == {}


def small_case(dtype: torch.dtype = F64, **changes) -> tuple[list[Tensor], Tensor, GridHead]:
    head = head_of(**{"ignore_thresh": 0.4, "class_gate": -1.0, "iou_thresh": 0.3, "average_box": True} | changes)
    gen = torch.Generator().manual_seed(3)
    preds = [torch.randn(2, 2, H, W, 8, generator=gen).to(dtype).requires_grad_() for H, W in MAPS]
    rows = [
        (0, 0, 0.5, 0.5, 8 / 48, 8 / 32),
        (0, 2, 0.51, 0.51, 9 / 48, 8 / 32),
        (1, 1, 0.9, 0.2, 24 / 48, 12 / 32),
        (0, 1, 0.1, 0.9, 14 / 48, 14 / 32),
    ]
    return preds, torch.tensor(rows), head


def loss_and_grads(preds: list[Tensor], rows: Tensor, head: GridHead, *args) -> tuple[Tensor, list[Tensor], Tensor]:
    total, _, counts = grid_loss(preds, rows, head, *args)
    return total.detach(), list(torch.autograd.grad(total, preds)), counts


def states(preds: list[Tensor], rows: Tensor, head: GridHead, level: int) -> tuple[Tensor, Tensor]:
    """Which predictions [B, A, H, W] of a level are assigned, and which are background: they alone have gradients."""
    _, grads, _ = loss_and_grads(preds, rows, head)
    return grads[level][..., 5:].any(-1), grads[level][..., 4] > 0


@pytest.mark.parametrize(("box", "level"), [("ciou", 0), ("mse", 1)])
@pytest.mark.parametrize("where", ["assigned", "background", "ignored"])
def test_nan_box_logit_shows_in_the_total_only(where, level, box):
    preds, rows, head = small_case(box=box)
    if where == "ignored":
        head = replace(head, ignore_thresh=0.05)
    assigned, background = states(preds, rows, head, level)
    chosen = {"assigned": assigned, "background": background, "ignored": ~assigned & ~background}[where]
    at = tuple(chosen.nonzero()[0].tolist())
    _, clean, _ = loss_and_grads(preds, rows, head)
    for channel in range(4):
        bad = [pred.detach().clone() for pred in preds]
        bad[level][(*at, channel)] = math.nan
        total, grads, counts = loss_and_grads([pred.requires_grad_() for pred in bad], rows, head)
        assert total.isnan()
        assert counts.tolist() == grid_loss(preds, rows, head)[2].tolist()
        for got, want, here in zip(grads, clean, range(2), strict=True):
            same = torch.ones(got.shape[:-1], dtype=torch.bool)
            if here == level:
                same[at] = False
                assert got[at].isnan().any() == (where == "assigned")
            assert torch.equal(got[same], want[same])


@pytest.mark.parametrize("label", term_names("class"))
def test_nan_that_is_not_needed_is_not_read(label):
    preds, rows, head = small_case(label=label, ignore_thresh=0.05)
    want = loss_and_grads(preds, rows, head)
    assigned, background = states(preds, rows, head, 0)
    ignored = ~assigned & ~background
    assert ignored.any()
    assert background.any()
    bad = [pred.detach().clone() for pred in preds]
    bad[0][..., 5][background] = math.nan
    total, grads, _ = loss_and_grads([pred.requires_grad_() for pred in bad], rows, head)
    assert torch.equal(total, want[0])
    assert all(torch.equal(got, expected) for got, expected in zip(grads, want[1], strict=True))
    bad[0].detach()[..., 4][ignored] = math.nan  # read to tell that it is none: it shows, and has no gradient
    total, grads, _ = loss_and_grads(bad, rows, head)
    assert total.isnan()
    assert all(torch.equal(got, expected) for got, expected in zip(grads, want[1], strict=True))


@pytest.mark.parametrize("box", ["ciou", "mse"])
def test_nan_beside_an_assigned_prediction_is_not_read(box):
    """A row meets all anchors of its cell before it is known which ones it takes."""
    preds, rows, head = small_case(box=box, iou_thresh=1.0, class_gate=100.0)
    assert states(preds, rows, head, 0)[0][0, :, 2, 3].tolist() == [True, False]
    want = loss_and_grads(preds, rows, head)
    bad = [pred.detach().clone() for pred in preds]
    bad[0][0, 1, 2, 3, 5:] = math.nan
    total, grads, _ = loss_and_grads([pred.requires_grad_() for pred in bad], rows, head)
    assert torch.equal(total, want[0])
    assert all(torch.equal(got, expected) for got, expected in zip(grads, want[1], strict=True))
    bad[0].detach()[0, 1, 2, 3, :4] = math.nan
    total, grads, _ = loss_and_grads(bad, rows, head)
    assert total.isnan()
    assert all(torch.equal(got, expected) for got, expected in zip(grads, want[1], strict=True))


@pytest.mark.parametrize("channel", [4, 6])
def test_nan_that_is_needed_stays_in_its_prediction(channel):
    preds, rows, head = small_case()
    _, clean, _ = loss_and_grads(preds, rows, head)
    at = tuple(states(preds, rows, head, 0)[0].nonzero()[0].tolist())
    bad = [pred.detach().clone() for pred in preds]
    bad[0][(*at, channel)] = math.nan
    total, grads, _ = loss_and_grads([pred.requires_grad_() for pred in bad], rows, head)
    assert total.isnan()
    assert grads[0][(*at, channel)].isnan()
    grads[0][at] = clean[0][at]
    assert all(torch.equal(got, want) for got, want in zip(grads, clean, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("box", ["ciou", "mse"])
@pytest.mark.parametrize("kind", ["no rows", "all invalid", "no row of this level"])
def test_nothing_to_assign(kind, box, dtype):
    preds, rows, head = small_case(dtype, box=box)
    head = replace(head, iou_thresh=1.0)
    preds = [pred.detach()[:1].requires_grad_() for pred in preds]
    rows = {"no rows": rows[:0], "all invalid": torch.tensor(INVALID), "no row of this level": rows[:1]}[kind]
    if kind == "no row of this level":
        head = replace(head, levels=((2, 3), (0, 1)), class_gate=100.0)  # the gate lets nothing be ignored
        preds[1] = preds[1].detach()[..., :5].requires_grad_()
        preds[1] = torch.cat((preds[1].detach(), preds[0].new_zeros(*preds[1].shape[:-1], 3)), -1).requires_grad_()
    total, grads, counts = loss_and_grads(preds, rows, head)
    assert counts.tolist() == [int(kind == "no row of this level"), len(INVALID) if kind == "all invalid" else 0]
    levels = preds[:1] if kind == "no row of this level" else preds
    for pred, grad in zip(levels, grads, strict=False):
        assert not grad[..., :4].any()
        assert not grad[..., 5:].any()
        close(grad[..., 4], pred.detach()[..., 4].sigmoid(), rtol=1e-6, atol=1e-7)
    assert total.isfinite()


@pytest.mark.parametrize("assigner", ["best_anchor", "ratio", "iou_band"])
def test_no_rows_at_all(assigner):
    """An image without objects is background everywhere, and so is a batch without a single row."""
    preds, rows, head = small_case(assigner=assigner)
    total, grads, counts = loss_and_grads(preds, rows[:0], head)
    assert counts.tolist() == [0, 0]
    close(total, sum(torch.nn.functional.softplus(pred.detach()[..., 4]).sum() for pred in preds))
    for pred, grad in zip(preds, grads, strict=True):
        close(grad[..., 4], pred.detach()[..., 4].sigmoid())
        assert not grad[..., :4].any()
        assert not grad[..., 5:].any()


@pytest.mark.parametrize("unit", ["pixel", "cell", "image"])
@pytest.mark.parametrize("box", term_names("iou", "offset"))
def test_prior_of_predictions_without_an_object(box, unit):
    """An IoU term sees a true box without size there; lightnet's eps makes the slope of its aspect 1e16."""
    preds, rows, head = small_case(box=box, unit=unit, prior_gain=0.5, average_box=False, box_args=(1e-16, 0.0))
    compare_with_loop(preds, rows, head)


def test_ratio_by_hand():
    """Its own cell and the neighbours nearest to the centre; a side at the limit does not fit."""
    head = head_of(
        assigner="ratio", anchor_t=2.0, anchors=((16.0, 8.0), (64.0, 64.0)), levels=((0, 1),), strides=(8.0,)
    )
    head = replace(head, scale_x_y=(1.0,), edge=True)

    def cells(x: float, y: float, w: float = 20.0, h: float = 8.0) -> list[tuple[int, ...]]:
        """(x, y) of the cells, for a centre in cells of an 8 x 4 map and a size in pixels."""
        (found,) = places([(0, 0, x / 8, y / 4, w / 64, h / 32)], head, [(4, 8)], 1)
        assert all(place[:3] == (0, 0, 0) for place in found)
        return [(x, y) for *_, y, x in found]

    assert cells(2.25, 1.75) == [(2, 1), (1, 1), (2, 2)]  # own, left, lower
    assert cells(2.5, 1.5) == [(2, 1)]  # in the middle of a cell
    assert cells(2.0, 1.0) == [(2, 1), (1, 1), (2, 1), (2, 1)]  # at a corner: right and lower are its own cell again
    assert cells(0.25, 0.25) == [(0, 0)]  # nothing beyond the border
    assert cells(1.0, 3.0) == [(1, 3), (1, 2), (1, 3)]  # 1 from the border is not more than 1
    assert cells(7.75, 3.75) == [(7, 3)]
    assert cells(8.0, 4.0) == [(7, 3), (7, 3), (7, 3)]  # own, left and upper, all held on the map
    assert cells(2.5, 1.5, w=32.0) == cells(2.5, 1.5, w=8.0) == cells(2.5, 1.5, h=16.0) == cells(2.5, 1.5, h=4.0) == []
    assert cells(2.5, 1.5, w=31.0, h=4.25) == [(2, 1)]


def test_band_by_hand():
    """Anchors of 16 x 16 on cells of 16: objects of 16 x 8, of 16 x 16 between two cells, and one twice."""
    head = head_of(assigner="iou_band", anchors=((16.0, 16.0),), levels=((0,),), strides=(16.0,), scale_x_y=(1.0,))
    rows = [(0, 0, 0.125, 0.5, 0.25, 0.5), (0, 1, 0.5, 0.5, 0.25, 1.0), (0, 2, 0.125, 0.5, 0.25, 0.5)]
    third = 1 / 3  # of each of the two cells that the second object covers by half

    def found(low: float, high: float) -> tuple[list[list[int]], list[int]]:
        banded = replace(head, band=(low, high))
        (ignored,) = assign(read_rows(torch.tensor(rows), banded, 1), banded, 0, [(1, 4)], 1, F64).ignored.view(1, -1)
        own = places(rows, banded, [(1, 4)], 1)
        return [[x for *_, x in places_] for places_ in own], ignored.nonzero()[:, 0].tolist()

    assert found(third, 0.5) == ([[], [], []], [0, 1, 2])  # an IoU at an end is in the band
    assert found(math.nextafter(third, 1), math.nextafter(0.5, 0)) == ([[0], [], []], [])  # of equals the first
    assert found(0.1, math.nextafter(third, 0)) == ([[0], [1, 2], []], [])


def test_ignored_strictly_above_the_threshold():
    """Logits 0 are the anchor at the cell's centre; here its IoU with the object is exactly 1/2."""
    head = head_of(anchors=((8.0, 8.0), (1.0, 1.0), (8.0, 16.0), (1.0, 2.0), (2.0, 1.0)), scale_x_y=(1.0, 1.0))
    preds = [torch.zeros(1, 2, 4, 4, 8, dtype=F64), torch.zeros(1, 2, 2, 2, 8, dtype=F64)]
    rows = torch.tensor([[0, 0, 12 / 32, 12 / 32, 8 / 32, 16 / 32]])  # assigned to anchor 2, of the other level
    loss = []
    for thresh in (0.5, math.nextafter(0.5, 0)):
        _, parts, counts = grid_loss(preds, rows, replace(head, ignore_thresh=thresh))
        assert counts.tolist() == [1, 0]
        loss.append(parts[1])
    close(loss[0] - loss[1], torch.tensor(math.log(2)).double(), rtol=1e-6)


@pytest.mark.parametrize("box", IOU_KINDS)
def test_a_box_far_below_the_grid_keeps_its_sides(box):
    preds, rows, head = small_case(box=box)
    for pred in preds:
        pred.detach()[..., 2] = -30.0
        pred.detach()[..., 3] = -31.5
    compare_with_loop(preds, rows, head)


def test_average_counts_classes_that_are_pushed_up():
    """Two rows of two classes on one prediction."""
    preds, rows, head = small_case(iou_thresh=1.0)
    preds = [torch.zeros_like(pred) for pred in preds]
    single = replace(head, average_box=False)
    half = grid_loss(preds, rows[:2], head)[1][0] / grid_loss(preds, rows[:2], single)[1][0]
    close(half, torch.tensor(0.5).double())
    for logit, want in ((50.0, 1.0), (-50.0, 0.5)):  # sigmoid(50) is 1, as the target: none is pushed up
        preds[0][..., 5:] = logit
        ratio = grid_loss(preds, rows[:2], head)[1][0] / grid_loss(preds, rows[:2], single)[1][0]
        close(ratio, torch.tensor(want).double())


def test_gate_is_strict_and_of_any_class():
    preds, rows, head = small_case(F64, ignore_thresh=0.05, iou_thresh=1.0)
    preds = [torch.full_like(pred, 0.25) for pred in preds]
    everywhere = grid_loss(preds, rows, replace(head, class_gate=None))[1]
    shut = grid_loss(preds, rows, replace(head, class_gate=0.25))[1]
    assert shut[1] > everywhere[1]
    for pred in preds:
        pred[..., 6] = math.nextafter(0.25, 1)
    close(grid_loss(preds, rows, replace(head, class_gate=0.25))[1][1], everywhere[1])


# ---- form


@pytest.mark.parametrize("box", ["iou", "giou", "diou", "mse", "bce_mse"])
@pytest.mark.parametrize("decode", ["exp", "sigmoid_square"])
def test_gradient_is_the_slope(box, decode):
    """By finite differences; not for ciou, whose alpha is held constant."""
    preds, rows, head = small_case(box=box, decode=decode, label="focal")
    weights = torch.tensor([0.5, 1.0, 3.0])
    assert torch.autograd.gradcheck(lambda *p: grid_loss(p, rows, head, weights)[0], preds, fast_mode=True)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("box", ["ciou", "mse"])
def test_no_nan_is_hidden_in_the_backward(box):
    preds, rows, head = small_case(box=box)
    with torch.autograd.detect_anomaly(check_nan=True):
        grid_loss(preds, torch.cat((rows, torch.tensor(INVALID))), head)[0].backward()


def test_weights_get_no_gradient():
    preds, rows, head = small_case()
    weights = leaf([0.5, 1.0, 3.0])
    total, parts, counts = grid_loss(preds, rows, head, weights)
    total.backward()
    assert weights.grad is None
    assert total.shape == ()
    assert parts.shape == (3,)
    assert not parts.requires_grad
    assert not counts.requires_grad
    close(parts.sum(), total.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_float32(dtype):
    preds, rows, head = small_case(dtype)
    total, grads, _ = loss_and_grads(preds, rows, head)
    wide = [pred.detach().float().requires_grad_() for pred in preds]
    want, wide_grads, _ = loss_and_grads(wide, rows, head)
    assert total.dtype == torch.float32
    assert torch.equal(total, want)
    for got, expected in zip(grads, wide_grads, strict=True):
        assert got.dtype == dtype
        assert torch.equal(got, expected.to(dtype))


def test_float32_is_close_to_float64():
    preds, rows, head = small_case()
    want, want_grads, _ = loss_and_grads(preds, rows, head)
    total, grads, _ = loss_and_grads([pred.detach().float().requires_grad_() for pred in preds], rows, head)
    assert total.dtype == torch.float32
    close(total.double(), want, rtol=1e-6)
    for got, expected in zip(grads, want_grads, strict=True):
        close(got.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("box", [*BOUNDED, *term_names("offset")])
def test_float32_is_finite_in_the_tails(box):
    for seed in range(5):
        preds, rows, head, weights = random_case(seed, 2, tails=True)
        head = replace(head, box=box, decode="exp")
        total, grads, _ = loss_and_grads(
            [pred.detach().float().requires_grad_() for pred in preds], rows, head, weights
        )
        assert total.isfinite()
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (0, 1, 4, 2, 3), (4, 3, 2, 1, 0)])
def test_any_strides(order):
    preds, rows, head = small_case()
    total, grads, _ = loss_and_grads(preds, rows, head)
    back = [order.index(axis) for axis in range(5)]
    views = [pred.detach().permute(order).contiguous().permute(back).requires_grad_() for pred in preds]
    got, got_grads, _ = loss_and_grads(views, rows, head)
    close(got, total)
    for a, b in zip(got_grads, grads, strict=True):
        close(a, b)


class Watch(TorchDispatchMode):
    """The largest number of elements that an operation returned, and the devices that tensors were on."""

    def __init__(self):
        super().__init__()
        self.numel = 0
        self.devices = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, out)):
            if isinstance(value, Tensor):
                self.devices.add(value.device.type)
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return out


def test_ignore_test_in_chunks(monkeypatch):
    preds, rows, head = small_case(ignore_thresh=0.1)
    rows = torch.cat([rows + 0.01 * i * (torch.arange(6) > 1) for i in range(40)])
    with Watch():  # a mode: nothing is left out by its values, which would add up others
        want, want_grads, counts = loss_and_grads(preds, rows, head)
    assert counts[1] > 0
    for size in (1, 100, 1000):
        monkeypatch.setattr("fusedyolo.reference.pairs.PAIRS_CHUNK", size)
        with Watch() as watch:
            total, grads, _ = loss_and_grads(preds, rows, head)
        # [rows of a chunk, predictions of an image, 2], [M, A, 5 + C], the maps
        assert watch.numel <= max(2 * max(size, 48), 160 * 5 * 6, 2 * 2 * 24 * 8)
        assert torch.equal(total, want)
        assert all(torch.equal(a, b) for a, b in zip(grads, want_grads, strict=True))


@pytest.mark.parametrize("box", ["ciou", "bce_mse"])
def test_nothing_waits_for_the_device(box, monkeypatch):
    """Meta tensors have no values: to read one, or to let a shape depend on one, is an error. No constant is copied."""
    preds, rows, head = small_case(torch.float16, box=box, label="focal")
    preds = [torch.empty_like(pred, device="meta", requires_grad=True) for pred in preds]
    rows, weights = rows.to("meta"), torch.ones(3, device="meta")
    for name in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.delattr(torch, name)
    with Watch() as watch:
        total, parts, counts = grid_loss(preds, rows, head, weights)
        total.backward()
    assert preds[0].grad.shape == preds[0].shape
    assert (parts.shape, counts.shape) == ((3,), (2,))
    assert watch.devices == {"meta"}
