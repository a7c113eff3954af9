"""Decoding and selection against plain NumPy in float64: values, order, ties, layouts, bad values, launches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from conftest import DEVICE
from fusedyolo.kernels import select as kernels
from fusedyolo.kernels.overlap import intersection, iou
from fusedyolo.kernels.primitives import safe_div
from fusedyolo.kernels.select import area
from process import call
from torch import Tensor, nn

import fusedyolo
from bench.count import count
from fusedyolo import detections
from fusedyolo.heads import GridHead
from fusedyolo.ops import select as ops

ROOT = Path(__file__).parents[2]
BACKENDS = ("triton", "torch")
LAYOUTS = ("flat", "five", "channels_last", "strided")
DTYPES = (torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64)
ANCHORS = ((16.0, 16.0), (24.0, 16.0), (40.0, 64.0), (16.0, 16.0), (64.0, 48.0), (9.0, 50.0))


class Criterion(nn.Module):
    """All that decoding needs of a loss."""

    def __init__(self, head: GridHead):
        super().__init__()
        self.head, self.image_size = head, None

    def own(self, preds):
        return preds


# ---- the truth: loops and plain formulas in float64


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def truth(preds: list[Tensor], head: GridHead) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [B, N, 4] and scores [B, N, C], predictions in the order level, anchor, y, x."""
    boxes, scores = [], []
    for pred, own, stride, scale in zip(preds, head.levels, head.strides, head.scale_x_y, strict=True):
        raw = pred.detach().cpu().double().numpy()
        if raw.ndim == 4:
            raw = raw.reshape(raw.shape[0], len(own), -1, *raw.shape[2:]).transpose(0, 1, 3, 4, 2)
        _B, A, H, W, _K = raw.shape
        for a in range(A):
            w, h = head.anchors[own[a]]
            for y in range(H):
                for x in range(W):
                    p = raw[:, a, y, x]
                    cx = (x + scale * sigmoid(p[:, 0]) - (scale - 1) / 2) * stride
                    cy = (y + scale * sigmoid(p[:, 1]) - (scale - 1) / 2) * stride
                    if head.decode == "exp":
                        bw, bh = (s * np.exp(np.clip(p[:, k], -60, 60)) for s, k in ((w, 2), (h, 3)))
                    else:
                        bw, bh = (s * (2 * sigmoid(p[:, k])) ** 2 for s, k in ((w, 2), (h, 3)))
                    boxes.append(np.stack((cx - bw / 2, cy - bh / 2, cx + bw / 2, cy + bh / 2), -1))
                    z = p[:, 5:]
                    if head.label == "softmax_ce":
                        e = np.exp(z - z.max(1, keepdims=True))
                        classes = e / e.sum(1, keepdims=True)
                    else:
                        classes = sigmoid(z)
                    scores.append(sigmoid(p[:, 4:5]) * classes)
    return np.stack(boxes, 1), np.stack(scores, 1)


def overlaps(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of a box [4] with others [M, 4]; 0 where they do not meet."""
    w = np.minimum(box[2], others[:, 2]) - np.maximum(box[0], others[:, 0])
    h = np.minimum(box[3], others[:, 3]) - np.maximum(box[1], others[:, 1])
    inter = np.where((w > 0) & (h > 0), w * h, 0.0)
    area = (others[:, 2] - others[:, 0]) * (others[:, 3] - others[:, 1])
    union = (box[2] - box[0]) * (box[3] - box[1]) + area - inter
    return inter / np.where(inter > 0, union, 1.0)


def greedy(boxes, scores, conf=0.25, iou=0.45, max_det=300, class_agnostic=False, candidates=16384) -> list[tuple]:
    """(prediction, class) of the detections of one image, boxes [N, 4] and scores [N, C], best first."""
    real = np.isfinite(boxes).all(1)
    pairs = [(n, c) for n, c in np.argwhere(scores > conf).tolist() if real[n]]
    if len(pairs) > candidates:  # scores by the upper half of their float32, with ties by index
        upper = {pair: int(np.float32(scores[pair]).view(np.int32)) >> 16 for pair in pairs}
        pairs = sorted(sorted(pairs, key=lambda pair: -upper[pair])[:candidates])
    kept = []
    for pair in sorted(pairs, key=lambda pair: -scores[pair]):
        rivals = [n for n, c in kept if class_agnostic or c == pair[1]]
        if not (overlaps(boxes[pair[0]], boxes[rivals]) > iou).any():
            kept.append(pair)
            if len(kept) == max_det:
                break
    return kept


def check(preds, criterion, backends=BACKENDS, **options) -> list[int]:
    """Detections of both backends against the truth; how many there are."""
    with np.errstate(all="ignore"):
        boxes, scores = truth(preds, criterion.head)
        want = [greedy(b, s, **options) for b, s in zip(boxes, scores, strict=True)]
    tolerance = 1e-12 if preds[0].dtype == torch.float64 else 1e-6
    for backend in backends:
        found = fusedyolo.select([p.to(DEVICE) for p in preds], criterion, backend=backend, **options)
        assert found.count.tolist() == [len(kept) for kept in want]
        for image, kept, b, s in zip(found.images(), want, boxes, scores, strict=True):
            assert image["labels"].tolist() == [c for _, c in kept]
            rows = np.array(kept, dtype=int).reshape(-1, 2)
            exact = torch.from_numpy(s[rows[:, 0], rows[:, 1]])
            torch.testing.assert_close(image["scores"].cpu().double(), exact, rtol=tolerance, atol=0)
            exact = torch.from_numpy(b[rows[:, 0]])
            size = float(exact.abs().max()) if len(kept) else 1.0
            torch.testing.assert_close(image["boxes"].cpu().double(), exact, rtol=tolerance, atol=1e-14 * size)
    return [len(kept) for kept in want]


# ---- random batches


def stored(pred: Tensor, layout: str) -> Tensor:
    """[B, A, H, W, 5 + C] in one of the layouts that predictions come in."""
    if layout == "five":
        return pred.contiguous()
    flat = pred.permute(0, 1, 4, 2, 3).flatten(1, 2)
    if layout == "channels_last":
        return flat.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        wide = flat.new_full((*flat.shape[:2], flat.shape[2] + 1, 2 * flat.shape[3] + 3), float("nan"))
        wide[:, :, 1:, 2 : 2 * flat.shape[3] + 2 : 2] = flat
        return wide[:, :, 1:, 2 : 2 * flat.shape[3] + 2 : 2]
    return flat.contiguous()


KINDS = ("plain", "crowded", "duplicates", "lattice", "no_area", "empty", "everything", "saturated", "cut", "nan")


def random_case(seed: int) -> tuple[list[Tensor], Criterion, dict]:
    """Predictions, criterion and options of ``select``; the kind follows the seed, all else is drawn."""
    gen = torch.Generator().manual_seed(seed)

    def draw(*items):
        return items[int(torch.randint(len(items), (), generator=gen))]

    kind = KINDS[seed % len(KINDS)]
    strides = draw((8,), (16,), (8, 24), (8, 16), (6, 9, 18))
    unit = {(8,): 8, (16,): 16, (8, 24): 24, (8, 16): 16, (6, 9, 18): 18}[strides]
    height, width = (unit * int(torch.randint(1, 6 if len(strides) == 1 else 4, (), generator=gen)) for _ in range(2))
    C = draw(1, 2, 3, 7, 21) if kind not in ("everything", "cut") else draw(5, 33)
    counts = [draw(1, 2, 3) for _ in strides]
    order = torch.randperm(len(ANCHORS), generator=gen).tolist()
    if kind in ("duplicates", "lattice"):
        order = [0, 3, 1, 2, 4, 5] if draw(True, False) else [0, 3] * 3  # two equal anchors on a level
    levels = tuple(tuple((order * 2)[sum(counts[:i]) : sum(counts[: i + 1])]) for i in range(len(counts)))
    head = GridHead(
        num_classes=C,
        anchors=ANCHORS,
        levels=levels,
        strides=tuple(map(float, strides)),
        scale_x_y=tuple(draw(1.0, 1.125, 2.0) for _ in strides),
        decode="sigmoid_square" if kind == "no_area" else draw("exp", "sigmoid_square"),
        label="bce"
        if kind == "lattice"
        else draw("bce", "bce", "softmax_ce"),  # sums in another order are no exact ties
    )
    batch, dtype = draw(1, 2), draw(*DTYPES)
    options = {
        "conf": draw(0.05, 0.1, 0.25),
        "iou": draw(0.3, 0.45, 0.6),
        "max_det": draw(3, 20, 80),
        "class_agnostic": draw(False, False, True),
    }
    preds = []
    for own, stride in zip(head.levels, strides, strict=True):
        shape = batch, len(own), height // stride, width // stride, 5 + C
        raw = torch.randn(shape, generator=gen, dtype=torch.float64)
        if kind in ("crowded", "duplicates", "saturated", "cut"):
            raw[..., 2:4] = 0.3 * raw[..., 2:4] + draw(0.5, 1.5)
            raw[..., 4] += 1.0
        if kind == "duplicates":
            raw = raw[:, :1, :1].expand(shape).clone()
        if kind == "lattice":
            raw = raw.round()
            raw[..., :4] = 0.0
            options["iou"] = draw(1 / 3, 1 / 2, 1 / 7, 0.0, 1.0)
            options["conf"] = draw(0.0, 0.25)
        if kind == "no_area":
            raw[..., 2:4] = torch.where(raw[..., 2:4] < 0.5, -1000.0, raw[..., 2:4])
        if kind == "empty":
            raw[:1, ..., 4] = -20.0
        if kind in ("everything", "cut"):
            options["conf"] = draw(0.0, 1e-9) if kind == "everything" else 0.01
        if kind == "saturated":
            raw[..., 4:] = 60.0
            options["conf"] = draw(0.01, 0.03)
            options["candidates"] = draw(7, 40, 200)
        if kind == "cut":
            options["candidates"] = draw(17, 100, 500)
        if kind == "nan":
            bad = torch.rand(shape, generator=gen)
            raw = torch.where(bad < 0.04, float("nan"), torch.where(bad > 0.97, float("inf") * raw.sign(), raw))
        preds.append(stored(raw.to(dtype), draw(*LAYOUTS)))
    return preds, Criterion(head), options


@pytest.mark.parametrize("seed", range(40))
def test_equals_greedy_nms_in_float64(seed):
    preds, criterion, options = random_case(seed)
    found = check(preds, criterion, **options)
    if KINDS[seed % len(KINDS)] in ("everything", "saturated"):
        assert sum(found) > 0


def torchvision_nms():
    """``torchvision.ops.batched_nms``, where torchvision is installed and its compiled operators load."""
    try:
        from torchvision.ops import batched_nms

        batched_nms(torch.zeros(1, 4), torch.zeros(1), torch.zeros(1, dtype=torch.int64), 0.5)
    except (ImportError, RuntimeError, NotImplementedError) as error:
        pytest.skip(f"torchvision.ops.nms does not run here: {error}")
    return batched_nms


@pytest.mark.parametrize("seed", range(1000, 1020))
def test_equals_torchvision(seed):
    batched_nms = torchvision_nms()
    preds, criterion, options = random_case(seed)
    preds = [p.nan_to_num(0.0, 5.0, -5.0) for p in preds]
    options.pop("candidates", None)
    boxes, scores = fusedyolo.decode([p.double() for p in preds], criterion)
    for image, b, s in zip(fusedyolo.select(preds, criterion, **options).images(), boxes, scores, strict=True):
        n, c = (s > options["conf"]).nonzero().unbind(1)
        groups = torch.zeros_like(c) if options["class_agnostic"] else c
        kept = batched_nms(b[n], s[n, c], groups, options["iou"]).sort().values
        kept = kept[s[n, c][kept].argsort(descending=True, stable=True)]  # torchvision leaves the order of ties open
        kept = kept[: options["max_det"]]
        assert image["labels"].tolist() == c[kept].tolist()
        torch.testing.assert_close(image["scores"].double(), s[n, c][kept], rtol=1e-6, atol=0)
        torch.testing.assert_close(image["boxes"].double(), b[n][kept], rtol=1e-6, atol=1e-6)


# ---- one rule at a time


def one_map(C=2, size=(2, 4), label="bce", anchors=((16.0, 16.0),), **kw) -> tuple[Tensor, Criterion]:
    """A map of stride 8 without a detection, [1, A, H, W, 5 + C], whose boxes are centred anchors."""
    pool = tuple(range(len(anchors)))
    head = GridHead(num_classes=C, anchors=anchors, levels=(pool,), strides=(8.0,), scale_x_y=(1.0,), label=label, **kw)
    raw = torch.zeros(1, len(anchors), *size, 5 + C, device=DEVICE)
    raw[..., 4:] = -20.0
    return raw, Criterion(head)


@pytest.mark.parametrize("backend", BACKENDS)
def test_thresholds_are_strict(backend):
    raw, criterion = one_map()
    raw[0, 0, 0, 0, 4:6] = 0.0  # a score of 1/4
    raw[0, 0, 0, 1, 4:6] = torch.tensor([0.0, 0.1])  # 8 pixels to the right: IoU 1/3
    options = {"backend": backend, "iou": 1 / 3}
    assert fusedyolo.select(raw, criterion, conf=0.25, **options).count.tolist() == [1]
    assert fusedyolo.select(raw, criterion, conf=float(np.nextafter(0.25, 0)), **options).count.tolist() == [2]
    options = {"backend": backend, "conf": 0.2}
    assert fusedyolo.select(raw, criterion, iou=float(np.nextafter(1 / 3, 0)), **options).count.tolist() == [1]
    assert fusedyolo.select(raw, criterion, iou=1 / 3, **options).count.tolist() == [2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_classes_and_agnostic(backend):
    raw, criterion = one_map()
    raw[0, 0, 0, 0, 4:] = torch.tensor([9.0, 1.0, 2.0])  # one prediction, two classes
    raw[0, 0, 0, 1, 4:] = torch.tensor([9.0, 3.0, -9.0])
    found = fusedyolo.select(raw, criterion, iou=0.2, backend=backend).images()[0]
    assert found["labels"].tolist() == [0, 1]  # the first of class 0 is suppressed by the neighbour's
    assert found["boxes"].tolist() == [[4, -4, 20, 12], [-4, -4, 12, 12]]
    found = fusedyolo.select(raw, criterion, iou=0.2, class_agnostic=True, backend=backend).images()[0]
    assert found["labels"].tolist() == [0]
    found = fusedyolo.select(raw, criterion, iou=0.5, class_agnostic=True, backend=backend).images()[0]
    assert found["labels"].tolist() == [0, 1]  # of one prediction's classes the better one stays


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_and_images(backend):
    raw, criterion = one_map()
    raw = raw.repeat(2, 1, 1, 1, 1)
    raw[1, 0, 0, 0, 4:6] = 9.0
    found = fusedyolo.select(raw, criterion, max_det=100, backend=backend)
    assert [tuple(value.shape) for value in found] == [(2, 100, 4), (2, 100), (2, 100), (2,)]
    assert [value.dtype for value in found] == [torch.float32, torch.float32, torch.int64, torch.int32]
    assert found.count.tolist() == [0, 1]
    assert repr(found) == f"Detections(images=2, max_det=100, device={raw.device})"
    assert (found.labels == -1).sum() == 199
    assert found.boxes[0].count_nonzero() + found.boxes[1, 1:].count_nonzero() + found.scores.count_nonzero() == 1
    first, second = found.images()
    assert [tuple(value.shape) for value in first.values()] == [(0, 4), (0,), (0,)]
    assert second["boxes"].tolist() == [[-4, -4, 12, 12]]
    assert fusedyolo.select(raw.double(), criterion, backend=backend).boxes.dtype == torch.float64


def test_chains_longer_than_a_block():
    """Boxes in a row, each suppressing the next: kept and suppressed alternate, which takes the most rounds."""
    raw, criterion = one_map(C=1, size=(1, 150))
    raw[..., 4] = torch.linspace(4.0, 1.0, 150, device=DEVICE)
    raw[..., 5] = 5.0
    assert check([raw], criterion, iou=0.3) == [75]
    raw = raw.flip(3)
    assert check([raw], criterion, iou=0.3, max_det=70) == [70]


def test_candidates_keep_the_best():
    """More candidates than may compete: the best ones do, across tiles, classes and images."""
    gen = torch.Generator().manual_seed(5)
    raw, criterion = one_map(C=6, size=(3, 40))
    raw = raw.repeat(2, 1, 1, 1, 1)
    raw[0, ..., 4:] = 2 * torch.randn(raw[0, ..., 4:].shape, generator=gen)
    raw[1, ..., 4:6] = 5.0  # all equal: the first ones compete
    for candidates in (1, 50, 120):
        check([raw], criterion, conf=0.01, iou=0.5, candidates=candidates)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("label", ["bce", "softmax_ce"])
def test_nan_and_infinite_logits(backend, label):
    raw, criterion = one_map(C=3, size=(2, 8), label=label)
    nan, inf = float("nan"), float("inf")
    raw[0, 0, 0, :, 4] = raw[0, 0, 0, :, 6] = 9.0
    raw[0, 0, 0, 0, 0] = nan
    raw[0, 0, 0, 1, 3] = nan
    raw[0, 0, 0, 2, 4] = nan
    raw[0, 0, 0, 3, 6] = nan
    raw[0, 0, 0, 4, 5] = -inf
    raw[0, 0, 0, 5, 2] = -inf  # e^-60 wide
    raw[0, 0, 0, 6, 0] = inf
    raw[0, 0, 0, 7, 5:] = -inf
    found = fusedyolo.select(raw, criterion, iou=0.9, backend=backend)
    assert found.count.tolist() == [3]
    assert found.labels[0, :4].tolist() == [1, 1, 1, -1]
    assert found.boxes.isfinite().all()
    assert found.scores.isfinite().all()
    raw[..., :] = nan
    assert fusedyolo.select(raw, criterion, conf=0, backend=backend).count.tolist() == [0]


def test_same_bits_every_time():
    gen = torch.Generator().manual_seed(3)
    raw, criterion = one_map(C=3, size=(4, 5), anchors=ANCHORS[:2])
    raw = raw.repeat(2, 1, 1, 1, 1)
    raw[..., 2:] = (torch.randn(raw[..., 2:].shape, generator=gen) + 1).round()  # crowded, with ties
    first = fusedyolo.select(raw, criterion, conf=0.1, candidates=50, max_det=40, backend="triton")
    assert first.count.min() > 5
    for _ in range(20):
        again = fusedyolo.select(raw, criterion, conf=0.1, candidates=50, max_det=40, backend="triton")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# ---- decoding


@pytest.mark.parametrize("scale", [1.0, 1.125, 2.0])
@pytest.mark.parametrize("kind", ["exp", "sigmoid_square"])
def test_decode_inverts_the_encoding(kind, scale):
    gen = torch.Generator().manual_seed(0)
    head = GridHead(
        num_classes=2,
        anchors=ANCHORS,
        levels=((0, 1), (2, 4, 5)),
        strides=(8.0, 16.0),
        scale_x_y=(scale, scale),
        decode=kind,
    )
    preds, want = [], []
    for own, stride in zip(head.levels, head.strides, strict=True):
        H, W = (int(side / stride) for side in (48, 80))
        shape = 2, len(own), H, W, 2
        origin = torch.stack(torch.meshgrid(torch.arange(W), torch.arange(H), indexing="xy"), -1)
        centre = (origin + torch.rand(shape, generator=gen, dtype=torch.float64)) * stride
        anchors = torch.tensor([head.anchors[t] for t in own], dtype=torch.float64)[:, None, None]
        size = anchors * (0.1 + 3 * torch.rand(shape, generator=gen, dtype=torch.float64))
        a = ((centre / stride - origin + (scale - 1) / 2) / scale).logit()
        b = (size / anchors).log() if kind == "exp" else ((size / anchors).sqrt() / 2).logit()
        rest = torch.randn(*shape[:-1], 3, generator=gen, dtype=torch.float64)
        preds.append(torch.cat((a, b, rest), -1))
        want.append(torch.cat((centre - size / 2, centre + size / 2), -1).flatten(1, 3))
    boxes, scores = fusedyolo.decode(preds, Criterion(head))
    torch.testing.assert_close(boxes, torch.cat(want, 1), rtol=1e-12, atol=1e-9)
    obj, classes = torch.cat([p.flatten(1, 3) for p in preds], 1)[..., 4:].sigmoid().split((1, 2), -1)
    torch.testing.assert_close(scores, obj * classes)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_decode_of_any_layout(layout, dtype):
    preds, criterion, _ = random_case(20)
    preds = [stored(p if p.ndim == 5 else p.unflatten(1, (-1, 5 + criterion.head.num_classes)).movedim(2, -1), layout)
             for p in preds]  # fmt: skip
    preds = [p.to(dtype) for p in preds]
    want_boxes, want_scores = truth(preds, criterion.head)
    boxes, scores = fusedyolo.decode(preds, criterion)
    assert boxes.dtype == scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(boxes.double(), torch.from_numpy(want_boxes), rtol=tolerance, atol=100 * tolerance)
    torch.testing.assert_close(scores.double(), torch.from_numpy(want_scores), rtol=tolerance, atol=tolerance)


LOSSES = {
    "YOLOv2Loss": lambda **kw: fusedyolo.YOLOv2Loss([(1, 1), (2, 3)], 3, stride=16, **kw),
    "YOLOv3Loss": lambda **kw: fusedyolo.YOLOv3Loss([[(10, 13)], [(30, 61)]], (8, 16), 3, **kw),
    "YOLOv4Loss": lambda **kw: fusedyolo.YOLOv4Loss([[(10, 13)], [(30, 61)]], (8, 16), 3, **kw),
    "ScaledYOLOv4Loss": lambda **kw: fusedyolo.ScaledYOLOv4Loss([[(9, 13)]] * 3, (8, 16, 32), 3, **kw),
    "YOLOv5Loss": lambda **kw: fusedyolo.YOLOv5Loss([[(10, 13), (16, 30)], [(30, 61)]], (8, 16), 3, **kw),
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss(name):
    """The head of each loss has what decoding needs, and its predictions are accepted in the form the loss takes."""
    gen = torch.Generator().manual_seed(1)
    criterion = LOSSES[name](backend="torch")
    head = criterion.head
    preds = [torch.randn(2, len(own) * 8, 64 // int(s), 96 // int(s), generator=gen)
             for own, s in zip(head.levels, head.strides, strict=True)]  # fmt: skip
    found = check(preds, criterion, conf=0.2, max_det=20)
    assert min(found) > 3
    if len(preds) == 1:
        assert torch.equal(fusedyolo.decode(preds[0], criterion)[0], fusedyolo.decode(preds, criterion)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_maps_of_several_types(backend):
    """As autocast leaves them where one map is scaled in float32."""
    gen = torch.Generator().manual_seed(1)
    criterion = LOSSES["YOLOv4Loss"](backend="torch")
    preds = [torch.randn(2, 8, 8, 12, generator=gen).half(), torch.randn(2, 8, 4, 6, generator=gen)]
    assert min(check(preds, criterion, (backend,), conf=0.2, max_det=20)) > 3


def test_yolov1():
    gen = torch.Generator().manual_seed(2)
    criterion = fusedyolo.YOLOv1Loss(3, grid_size=5, num_boxes=2)
    pred = torch.rand(2, 5, 5, 13, generator=gen)
    per_box, classes = pred[..., :10].unflatten(-1, (2, 5)), pred[..., 10:]
    flat = torch.cat([part.flatten(1) for part in (classes, per_box[..., 4], per_box[..., :4])], 1)
    boxes, scores = fusedyolo.decode(pred, criterion)
    assert (boxes.shape, scores.shape) == ((2, 50, 4), (2, 50, 3))
    for n in range(50):
        y, x, k = n // 10, n // 2 % 5, n % 2
        bx, by, a, b, confidence = per_box[1, y, x, k].tolist()
        cx, cy = (x + bx) / 5, (y + by) / 5
        want = [cx - a * a / 2, cy - b * b / 2, cx + a * a / 2, cy + b * b / 2]
        torch.testing.assert_close(boxes[1, n], torch.tensor(want))
        torch.testing.assert_close(scores[1, n], confidence * classes[1, y, x])
    assert all(torch.equal(a, b) for a, b in zip(fusedyolo.decode(flat, criterion), (boxes, scores), strict=True))
    pixels = torch.tensor([640.0, 480.0, 640.0, 480.0])
    torch.testing.assert_close(fusedyolo.decode(pred, criterion, image_size=(480, 640))[0], boxes * pixels)
    own_size = fusedyolo.YOLOv1Loss(3, grid_size=5, num_boxes=2, image_size=(480, 640))
    torch.testing.assert_close(fusedyolo.decode(pred, own_size)[0], boxes * pixels)

    exact_boxes, exact_scores = (value.numpy() for value in fusedyolo.decode(pred.double(), criterion))
    for p in (pred, flat):
        for backend in BACKENDS:
            options = {"conf": 0.3, "iou": 0.3, "image_size": (480, 640), "backend": backend}
            found = fusedyolo.select(p.to(DEVICE), criterion, **options).images()
            for image, b, s in zip(found, exact_boxes, exact_scores, strict=True):
                kept = greedy(b, s, conf=0.3, iou=0.3)
                assert len(kept) > 10
                assert image["labels"].tolist() == [c for _, c in kept]
                want = torch.from_numpy(b[[n for n, _ in kept]]) * pixels
                torch.testing.assert_close(image["boxes"].cpu().double(), want, rtol=1e-5, atol=1e-4)


# ---- bad arguments


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"conf": -0.1}, r"conf: -0.1, want a finite number in \[0, 1\]"),
        ({"conf": float("nan")}, "conf: nan"),
        ({"iou": 1.5}, r"iou: 1.5, want a finite number in \[0, 1\]"),
        ({"iou": "0.5"}, "iou: '0.5'"),
        ({"max_det": 0}, "max_det: 0, want an integer >= 1"),
        ({"max_det": 10.0}, "max_det: 10.0"),
        ({"candidates": 0}, "candidates: 0, want an integer >= 1"),
        ({"class_agnostic": "no"}, "class_agnostic: 'no', want 0 or 1"),
        ({"backend": "gpu"}, "backend: 'gpu'"),
        ({"criterion": nn.Linear(1, 1)}, "criterion: .*, want a loss of fusedyolo"),
        ({"preds": torch.zeros(1, 7, 2, 4, 7)}, r"preds\[0\]: shape"),
        ({"preds": [torch.zeros(1, 1, 2, 4, 7)] * 2}, "preds: 2 levels, want 1"),
        ({"preds": [torch.zeros(1, 1, 2, 4, 7, dtype=torch.int32)]}, r"preds\[0\]: dtype torch.int32"),
        ({"image_size": (16, 16)}, "image_size"),
        ({"image_size": 0}, "image_size: 0"),
    ],
)
def test_bad_arguments(change, error):
    raw, criterion = one_map()
    arguments = {"preds": raw, "criterion": criterion, **change}
    with pytest.raises(ValueError, match=error):
        fusedyolo.select(**arguments)
    if set(change) <= {"preds", "criterion", "image_size"}:
        with pytest.raises(ValueError, match=error):
            fusedyolo.decode(**arguments)


def test_indices_beyond_int32(monkeypatch):
    raw, criterion = one_map()
    monkeypatch.setattr(ops, "MOST_PAIRS", 15)
    with pytest.raises(ValueError, match="preds: 16 pairs of a prediction and a class"):
        fusedyolo.select(raw, criterion, backend="triton")


# ---- an operator


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    raw, criterion = one_map()
    raw[0, 0, 0, :2, 4:] = 3.0
    settings = (0.25, 0.45, 5, False, 100)
    if backend == "triton":
        torch.library.opcheck(torch.ops.fusedyolo.select_maps, ([raw], criterion.head.key, *settings))
    decoded = fusedyolo.decode([raw.double()], criterion)
    torch.library.opcheck(torch.ops.fusedyolo.select_decoded, (*decoded, *settings, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_break(backend):
    torch._dynamo.reset()
    criterion = LOSSES["YOLOv4Loss"]()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def found(preds):
        return fusedyolo.select(preds, criterion, conf=0.2, max_det=10, backend=backend)

    gen = torch.Generator().manual_seed(0)
    for batch in (1, 2):
        preds = [torch.randn(batch, 8, side, side, generator=gen).to(DEVICE) for side in (4, 2)]
        got = found(preds)
        want = fusedyolo.select(preds, criterion, conf=0.2, max_det=10, backend=backend)
        assert isinstance(got, detections.Detections)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.interpreter("counts in Triton's interpreter")
def test_launches_bytes_and_no_host_waits():
    criterion = LOSSES["YOLOv4Loss"]()
    gen = torch.Generator().manual_seed(0)
    preds = [torch.randn(2, 8, 16, 16, generator=gen), torch.randn(2, 8, 8, 8, generator=gen)]
    counts = count(lambda: fusedyolo.select(preds, criterion, backend="triton"))
    assert (counts.syncs, counts.triton_launches) == (0, 4)
    assert counts.ops == {"zeros": 1, "sort": 1}
    assert count(lambda: fusedyolo.select(preds, criterion, backend="torch")).syncs == 0
    assert count(lambda: fusedyolo.decode(preds, criterion)).syncs == 0
    found = fusedyolo.select(preds, criterion)
    assert count(found.images).syncs == 1

    # where no objectness exceeds conf, nothing but objectness is read, and once
    for pred in preds:
        pred.view(2, 1, 8, *pred.shape[2:])[:, :, 4] = -20.0
    _, launches = ops.scan_launches(preds, criterion.head, 0.25, 16384)
    plane = sum(p[:, 4].numel() * 4 for p in preds)
    counts = count(lambda: [launch.run() for launch in launches])
    assert plane <= counts.bytes_loaded <= plane + 1000


@pytest.mark.parametrize(
    ("form", "dtype", "target"),
    [
        ("flat", "float32", "gfx942"),
        ("softmax", "float32", "sm_90"),
    ],
)
def test_compiles_without_spills(form, dtype, target):
    """Compiled in a process without the interpreter."""
    found = call("compiles", "selection", form, dtype, target)
    assert [name for name, *_ in found] == ["scan_kernel"] * 3 + ["nms_kernel"]
    assert all(spills == 0 for _, _, spills in found), found
    assert all(stack <= 8 for _, stack, _ in found), found  # a word that calls of a division reserve and nothing uses


# ---- the tests tested: broken kernel functions must be caught


@triton.jit
def suppresses_at_equality(box, other, limit, AGNOSTIC: tl.constexpr):
    over = iou(box.corners, other.corners, area(box.corners), area(other.corners), safe_div) >= limit
    if not AGNOSTIC:
        over = over & (box.label == other.label)
    return over


@triton.jit
def suppresses_other_classes(box, other, limit, AGNOSTIC: tl.constexpr):
    over = iou(box.corners, other.corners, area(box.corners), area(other.corners), safe_div) > limit
    if not AGNOSTIC:
        over = over & (box.label != other.label)
    return over


@triton.jit
def suppresses_of_smaller_area(box, other, limit, AGNOSTIC: tl.constexpr):
    smaller = tl.minimum(area(box.corners), area(other.corners))
    over = safe_div(intersection(box.corners, other.corners), smaller) > limit
    if not AGNOSTIC:
        over = over & (box.label == other.label)
    return over


@triton.jit
def conf_in_float32(parts):
    return tl.cast(parts[0], tl.float64)


@triton.jit
def cut_one_bin_higher(histogram_ptr, total, K, BINS: tl.constexpr):
    bins = tl.arange(0, BINS)
    above = total - tl.cumsum(tl.load(histogram_ptr + bins), axis=0)
    return tl.min(tl.where(above <= K, bins, BINS), axis=0) + 1


def check_strict():
    test_thresholds_are_strict("triton")


def check_classes():
    test_classes_and_agnostic("triton")


@pytest.mark.interpreter("compiled kernels keep the functions they were compiled with")
@pytest.mark.parametrize(
    ("name", "broken", "check_it"),
    [
        ("suppresses", suppresses_at_equality, check_strict),
        ("suppresses", suppresses_other_classes, check_classes),
        ("suppresses", suppresses_of_smaller_area, check_strict),
        ("exact", conf_in_float32, check_strict),
        ("_cut", cut_one_bin_higher, test_candidates_keep_the_best),
    ],
)
def test_a_broken_function_is_caught(name, broken, check_it, monkeypatch):
    monkeypatch.setattr(kernels, name, broken)
    with pytest.raises(AssertionError):
        check_it()
