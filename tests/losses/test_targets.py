"""Targets: every accepted form becomes the same sorted rows, without waiting for a device."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass

import pytest
import torch
from conftest import DEVICE
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import fusedyolo
from fusedyolo import Targets
from fusedyolo.targets import SORT_ABOVE, as_targets
from fusedyolo.tools.registry import CASES, Workload

NAN, INF = float("nan"), float("inf")
PACKED = torch.tensor(
    [
        [2, 0, 0.5, 0.5, 0.25, 0.5],
        [0, 1, 0.125, 0.25, 0.125, 0.25],
        [2, 3, 0.75, 0.25, 0.5, 0.125],
        [0, 2, 0.5, 0.75, 0.25, 0.25],
        [0, 0, 0.25, 0.5, 0.5, 0.0625],
    ]
)
SORTED = PACKED[[1, 3, 4, 0, 2]]


class Operators(TorchDispatchMode):
    """The ATen operators that run, views and allocations apart."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_packed_rows_are_sorted_by_image_and_keep_their_order():
    targets = Targets.from_packed(PACKED, 3)
    assert torch.equal(targets.rows, SORTED)
    assert targets.offsets.tolist() == [0, 3, 3, 5, 5]
    assert targets.offsets.dtype == torch.int32
    assert targets.batch_size == 3


@pytest.mark.parametrize("image", [-1.0, -0.5, 3.0, 1e9, NAN, INF, -INF])
def test_rows_of_no_image_come_last_and_still_exist(image):
    packed = PACKED.clone()
    packed[1, 0] = image
    targets = Targets.from_packed(packed, 3)
    assert targets.offsets.tolist() == [0, 2, 2, 4, 5]
    torch.testing.assert_close(targets.rows, packed[[3, 4, 0, 2, 1]], rtol=0, atol=0, equal_nan=True)


def test_a_faulty_box_stays_with_its_image():
    packed = PACKED.clone()
    packed[1, 4] = NAN
    assert Targets.from_packed(packed, 3).offsets.tolist() == [0, 3, 3, 5, 5]


def test_no_rows():
    targets = Targets.from_packed(torch.zeros(0, 6), 2)
    assert targets.rows.shape == (0, 6)
    assert targets.offsets.tolist() == [0, 0, 0, 0]
    targets = Targets.from_packed(torch.zeros(0, 6), 2, capacity=3)
    assert targets.rows.shape == (3, 6)
    assert targets.offsets.tolist() == [0, 0, 0, 0]


def test_rows_are_float32_contiguous_and_carry_no_gradient():
    packed = PACKED.double().t().contiguous().t().requires_grad_()
    targets = Targets.from_packed(packed, 3)
    assert targets.rows.dtype == torch.float32
    assert targets.rows.is_contiguous()
    assert not targets.rows.requires_grad
    assert torch.equal(targets.rows, SORTED)  # the values are dyadic


@pytest.mark.parametrize("of", ["rows", "weights"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_targets_that_require_a_gradient_are_constants(of, backend):
    """They have none, and a loss that looks at its first batches reads them."""
    made = Targets.from_packed(PACKED, 3)
    rows, weights = made.rows.clone(), torch.ones(5)
    (rows if of == "rows" else weights).requires_grad_()
    targets = Targets(rows, made.offsets, 3, weights)
    preds = [torch.zeros(3, 9, 4, 4, device=DEVICE, requires_grad=True)]
    total = fusedyolo.YOLOv5Loss([[(16, 16)]], (8,), 4, backend=backend)(preds, targets.to(DEVICE)).total
    total.backward()
    assert not targets.rows.requires_grad
    assert rows.grad is weights.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_refused(dtype):
    """They hold no class 257."""
    half = PACKED.to(dtype)
    loss = fusedyolo.YOLOv8Loss(3, (8,), reg_max=1)
    calls = {
        "packed": lambda: Targets.from_packed(half, 3),
        "padded": lambda: Targets.from_padded(half[None, :, 1:]),
        "rows": lambda: Targets(half, torch.zeros(5, dtype=torch.int32), 3),
        "targets": lambda: loss([torch.zeros(3, 7, 2, 2)], half),
    }
    for name, call in calls.items():
        with pytest.raises(
            ValueError, match=f"{name}: dtype {dtype}, want torch.float32( or torch.float64)?: halves hold"
        ):
            call()


@pytest.mark.parametrize("shape", [(0, 1), (1, 0)])
@pytest.mark.parametrize("sizes", [64, [(64, 64), (64, 32)]])
def test_labels_of_an_empty_image_may_be_of_two_dimensions(sizes, shape):
    image = {"boxes": torch.tensor([[8.0, 8.0, 24.0, 24.0]]), "labels": torch.tensor([1])}
    targets = Targets.from_torchvision([image, {"boxes": torch.zeros(0, 4), "labels": torch.zeros(shape)}], sizes)
    assert targets.rows.tolist() == [[0, 1, 0.25, 0.25, 0.25, 0.25]]


def test_a_cast_of_a_batch_leaves_them_alone():
    """What Lightning does for ``precision="bf16-true"``: it walks through sequences, mappings and dataclasses."""
    assert not is_dataclass(Targets)
    assert not isinstance(Targets.from_packed(PACKED, 3), Sequence | Mapping)


@pytest.mark.parametrize("capacity", [5, 9])
def test_capacity_fixes_the_shape(capacity):
    targets = Targets.from_packed(PACKED, 3, capacity=capacity)
    assert targets.rows.shape == (capacity, 6)
    assert torch.equal(targets.rows[:5], SORTED)
    assert not targets.rows[5:].any()
    assert targets.offsets.tolist() == [0, 3, 3, 5, 5]


def as_list(packed, batch_size, height, width):
    """The same objects as torchvision has them, in pixels."""
    out = []
    for b in range(batch_size):
        _, label, cx, cy, w, h = packed[packed[:, 0] == b].unbind(1)
        corners = ((cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height)
        out.append({"boxes": torch.stack(corners, 1), "labels": label.long()})
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.int32])
def test_torchvision_lists(dtype):
    height, width = 128, 256
    images = as_list(PACKED, 3, height, width)
    assert images[1]["boxes"].shape == (0, 4)
    images = [{**image, "boxes": image["boxes"].to(dtype)} for image in images]
    targets = Targets.from_torchvision(images, (height, width))
    assert torch.equal(targets.rows, SORTED)  # everything is dyadic
    assert targets.offsets.tolist() == [0, 3, 3, 5, 5]
    assert Targets.from_torchvision(images, (height, width), capacity=8).rows.shape == (8, 6)


@pytest.mark.parametrize(
    "sizes",
    [
        [(128, 256), (64, 64), (512, 128)],
        [(128, 256), (128, 64), (128, 128)],
        [(128, 256), (64, 256), (32, 256)],
        [(128, 256)] * 3,
    ],
)
def test_torchvision_lists_of_images_of_several_sizes(sizes):
    images = [as_list(PACKED, 3, *size)[b] for b, size in enumerate(sizes)]
    assert torch.equal(Targets.from_torchvision(images, sizes).rows, SORTED)


def test_one_number_is_a_square_image():
    images = as_list(PACKED, 3, 128, 128)
    assert torch.equal(Targets.from_torchvision(images, 128).rows, SORTED)


def padded():
    out = torch.zeros(3, 4, 5)
    out[0, 0], out[0, 1], out[0, 3] = PACKED[1, 1:], PACKED[3, 1:], PACKED[4, 1:]
    out[0, 2] = torch.tensor([-1, 0.5, 0.5, 0.5, 0.5])
    out[1] = -1
    out[2, 1], out[2, 2] = PACKED[0, 1:], PACKED[2, 1:]
    return out


def test_padding_is_no_row_wherever_it_stands():
    targets = Targets.from_padded(padded())
    assert targets.offsets.tolist() == [0, 3, 3, 5, 5]
    assert targets.rows.shape == (12, 6)
    assert torch.equal(targets.rows[:5], SORTED)
    assert Targets.from_padded(padded(), capacity=20).rows.shape == (20, 6)


@pytest.mark.parametrize("row", [[NAN, 0.5, 0.5, 0.5, 0.5], [0, 0.5, 0.5, 0, 0], [7, 0, 0, 0, 0], [0, 0, 0, 0, NAN]])
def test_a_faulty_padded_row_is_a_row(row):
    values = padded()
    values[1, 0] = torch.tensor(row)
    assert Targets.from_padded(values).offsets.tolist() == [0, 3, 4, 6, 6]


def test_padded_without_room_or_images():
    assert Targets.from_padded(torch.zeros(2, 0, 5)).offsets.tolist() == [0, 0, 0, 0]
    assert Targets.from_padded(torch.zeros(0, 3, 5)).offsets.tolist() == [0, 0]


def test_pin_memory_pins_both_tensors(monkeypatch):
    pinned = []
    if not torch.cuda.is_available():  # nothing to pin for: see that both tensors are asked
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self.clone())
    targets = Targets.from_packed(PACKED, 3)
    copied = targets.pin_memory()
    assert torch.equal(copied.rows, targets.rows)
    assert torch.equal(copied.offsets, targets.offsets)
    assert copied.batch_size == 3
    if torch.cuda.is_available():
        assert copied.rows.is_pinned()
        assert copied.offsets.is_pinned()
    else:
        assert [t.data_ptr() for t in pinned] == [targets.rows.data_ptr(), targets.offsets.data_ptr()]


def test_to_moves_both_tensors():
    targets = Targets.from_packed(PACKED, 3)
    assert targets.to("cpu", non_blocking=True) is targets
    moved = targets.to("meta")
    assert moved.rows.device.type == moved.offsets.device.type == "meta"
    assert moved.batch_size == 3


def test_data_loader_makes_them_in_collate_fn():
    def collate(samples):
        packed = torch.cat([torch.cat([torch.full((len(s), 1), i), s], 1) for i, s in enumerate(samples)])
        return Targets.from_packed(packed, len(samples), capacity=16).validate(4)

    data = [PACKED[:2, 1:], PACKED[2:3, 1:], PACKED[3:, 1:]]
    for targets in DataLoader(data, batch_size=3, collate_fn=collate, num_workers=1):
        assert targets.offsets.tolist() == [0, 2, 3, 5, 5]
        assert torch.equal(targets.rows[:5, 1:], PACKED[:, 1:])


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_copies(clone):
    targets = clone(Targets.from_packed(PACKED, 3, capacity=7))
    assert torch.equal(targets.rows[:5], SORTED)
    assert targets.offsets.tolist() == [0, 3, 3, 5, 5]


def test_repr_shows_no_values():
    assert repr(Targets.from_packed(PACKED, 3)) == "Targets(rows=[5, 6], batch_size=3, device=cpu)"


def test_valid_targets_validate_to_themselves():
    targets = Targets.from_packed(PACKED, 3, capacity=9)
    assert targets.validate(4) is targets
    assert Targets.from_padded(padded()).validate(4).batch_size == 3
    edge = torch.tensor([[0, 0, 0, 0, 1e-6, 4.0], [0, 3, 0.999, 0.999, 1, 1]])
    targets = Targets.from_packed(edge, 1)
    with torch.device("meta"):  # or another that they are not on
        targets.validate(4)


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        (0, -1, "no such image, want 0 <= image < 3"),
        (0, 3, "no such image, want 0 <= image < 3"),
        (0, NAN, "not finite, want six finite numbers"),
        (1, -1, "class out of range, want 0 <= class < 4"),
        (1, 4, "class out of range, want 0 <= class < 4"),
        (1, INF, "not finite, want six finite numbers"),
        (0, 1.5, "image between two, want a whole number"),
        (1, 2.5, "class between two, want a whole number"),
        (1, 3.9, "class between two, want a whole number"),
        (2, 1, "centre outside the image, want 0 <= cx < 1 and 0 <= cy < 1"),
        (2, -0.01, "centre outside the image, want 0 <= cx < 1 and 0 <= cy < 1"),
        (3, 1.5, "centre outside the image, want 0 <= cx < 1 and 0 <= cy < 1"),
        (3, -1, "centre outside the image, want 0 <= cx < 1 and 0 <= cy < 1"),
        (4, 0, "zero area, want w > 0 and h > 0"),
        (4, -0.5, "zero area, want w > 0 and h > 0"),
        (5, 0, "zero area, want w > 0 and h > 0"),
        (4, 1e38, r"too large, want w < 1.26765e\+30 and h < 1.26765e\+30"),
        (5, -INF, "not finite, want six finite numbers"),
    ],
)
def test_validate_names_the_row_and_the_reason(column, value, reason):
    packed = PACKED.clone()
    packed[4, column] = value
    targets = Targets.from_packed(packed, 3, capacity=9)
    place = int((targets.rows[:, 5] == packed[4, 5]).nonzero()) if column != 5 else 2
    with pytest.raises(ValueError, match=rf"^targets row {place} \[.*\] \(image, class, cx, cy, w, h\): {reason}$"):
        targets.validate(4)


BORDER = torch.tensor([[0, 0, 1.0, 0.5, 0.2, 0.2]])  # its centre, of class 0


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_validate_agrees_with_the_loss(case):
    """Of rows on the border, and of class 0, which the first class of SSD is not."""
    work = Workload(batch=1, size=64, classes=5)
    criterion = case.build(5, "torch")
    out = case.bind(criterion, work)(case.predictions(work), BORDER)
    targets = Targets.from_packed(BORDER, 1)
    if int(out.num_invalid):
        with pytest.raises(ValueError, match=r"^targets row 0 "):
            targets.validate(criterion)
    else:
        assert targets.validate(criterion) is targets


def test_validate_names_the_first_fault():
    packed = PACKED.clone()
    packed[0, 1], packed[3, 4] = 9, -1
    message = (
        r"^targets row 1 \[0, 2, 0.5, 0.75, -1, 0.25\] \(image, class, cx, cy, w, h\): zero area, want w > 0 and h > 0$"
    )
    with pytest.raises(ValueError, match=message):
        Targets.from_packed(packed, 3).validate(4)


# What a loss does with each form.


def test_packed_rows_pass_through_without_any_work():
    with Operators() as ran:
        rows, offsets, _ = as_targets(PACKED, 3, (64, 64))
    assert ran.names == []
    assert rows is PACKED
    assert offsets is None


def test_targets_pass_through_without_any_work():
    targets = Targets.from_packed(PACKED, 3)
    with Operators() as ran:
        rows, offsets, _ = as_targets(targets, 3, (64, 64), torch.device("cpu"))
    assert ran.names == []
    assert rows is targets.rows
    assert offsets is targets.offsets


def test_packed_rows_of_another_kind_are_converted():
    rows, offsets, _ = as_targets(PACKED.double().t().contiguous().t().requires_grad_(), 3, (64, 64))
    assert rows.dtype == torch.float32
    assert rows.is_contiguous()
    assert not rows.requires_grad
    assert offsets is None
    assert torch.equal(rows, PACKED)


@pytest.mark.parametrize("extra", [0, 1])
def test_many_packed_rows_are_sorted(extra):
    packed = torch.rand(SORT_ABOVE + extra, 6)
    packed[:, 0] = torch.arange(len(packed)) % 3
    rows, offsets, _ = as_targets(packed, 3, (64, 64))
    if extra:
        assert offsets is not None
        assert torch.equal(rows, packed[packed[:, 0].sort(stable=True).indices])
        assert offsets.diff().sum() == len(packed)
    else:
        assert rows is packed
        assert offsets is None


def test_padded_rows_and_lists_become_the_same_rows():
    for form in (padded(), as_list(PACKED, 3, 64, 96), tuple(as_list(PACKED, 3, 64, 96))):
        rows, offsets, _ = as_targets(form, 3, (64, 96))
        assert offsets is not None
        assert offsets.tolist() == [0, 3, 3, 5, 5]
        torch.testing.assert_close(rows[:5], SORTED, rtol=1e-6, atol=0)


def test_nothing_waits_for_the_device():
    """Fake tensors hold no data: an operation that needs some, and so would stall a GPU, raises."""
    with FakeTensorMode():
        packed = torch.rand(7, 6)
        images = [{"boxes": torch.rand(n, 4), "labels": torch.zeros(n, dtype=torch.long)} for n in (2, 0, 3)]
        for form in (packed, torch.rand(SORT_ABOVE + 1, 6), torch.rand(3, 4, 5), images):
            rows, *_ = as_targets(form, 3, (64, 64), packed.device)
            assert rows.shape[1] == 6
        assert Targets.from_packed(packed, 3, capacity=9).rows.shape == (9, 6)
        for sizes in ([(64, 64)] * 3, [(64, 64), (64, 32), (64, 96)]):
            assert Targets.from_torchvision(images, sizes, capacity=9).offsets.shape == (5,)
        assert Targets.from_padded(torch.rand(3, 4, 5)).rows.shape == (12, 6)
        with pytest.raises(DynamicOutputShapeException):
            torch.rand(3).nonzero().tolist()  # what this test relies on


# What boxes are: SORTED and its like, of an image of 128 x 256, in every unit and by every four numbers.

SIZE = (128, 256)
UNITS, BOXES = ("relative", "pixel"), ("cxcywh", "xyxy", "xywh")


def said(rows, unit, boxes, size=SIZE):
    """Rows [..., 4 or more] of relative centres and sides as another loader has them; dyadic, so exact."""
    front, centre, sides = rows[..., :-4], rows[..., -4:-2], rows[..., -2:]
    first = centre if boxes == "cxcywh" else centre - sides / 2
    second = centre + sides / 2 if boxes == "xyxy" else sides
    pixels = torch.tensor((size[1], size[0])) if unit == "pixel" else 1
    return torch.cat((front, first * pixels, second * pixels), -1)


def padded_rows(rows):
    """[3, 4, 5] of PACKED, of which some are padding."""
    padded = torch.zeros(3, 4, 5)
    for b in range(3):
        own = rows[PACKED[:, 0] == b, 1:]
        padded[b, : len(own)] = own
    padded[0, 3, 0] = -1
    return padded


@pytest.mark.parametrize("boxes", BOXES)
@pytest.mark.parametrize("unit", UNITS)
def test_units_and_boxes_of_targets(unit, boxes):
    rows, told = said(PACKED, unit, boxes), {"unit": unit, "boxes": boxes, "image_size": SIZE}
    dicts = [{"boxes": rows[PACKED[:, 0] == b, 2:], "labels": PACKED[PACKED[:, 0] == b, 1]} for b in range(3)]
    assert torch.equal(Targets.from_packed(rows, 3, **told).rows, SORTED)
    padded = Targets.from_padded(padded_rows(rows), **told)
    assert torch.equal(padded.rows[: len(SORTED)], SORTED)
    assert padded.offsets.tolist() == [0, 3, 3, 5, 5]
    for size in (SIZE, [SIZE] * 3):
        assert torch.equal(Targets.from_torchvision(dicts, **(told | {"image_size": size})).rows, SORTED)
    packed = Targets.from_packed(rows, 3, 7, **told)
    assert not packed.rows[5:].any()  # what is added stays nothing
    if unit == "relative":
        assert torch.equal(Targets.from_packed(rows, 3, unit=unit, boxes=boxes).rows, SORTED)
        assert torch.equal(Targets.from_torchvision(dicts, unit=unit, boxes=boxes).rows, SORTED)


@pytest.mark.parametrize("form", ["packed", "many", "padded", "tensors", "dicts"])
@pytest.mark.parametrize("boxes", BOXES)
@pytest.mark.parametrize("unit", UNITS)
def test_a_loss_is_told_units_and_boxes(form, unit, boxes):
    rows = said(PACKED, unit, boxes)
    given = {
        "packed": rows,
        "many": torch.cat((rows, torch.full((SORT_ABOVE, 6), -1.0))),
        "padded": padded_rows(rows),
        "tensors": [rows[PACKED[:, 0] == b, 1:] for b in range(3)],
        "dicts": [{"boxes": rows[PACKED[:, 0] == b, 2:], "labels": PACKED[PACKED[:, 0] == b, 1]} for b in range(3)],
    }[form]
    found, *_ = as_targets(given, 3, SIZE, form=(unit, boxes))
    assert torch.equal(found[: len(PACKED)], PACKED if form == "packed" else SORTED)


def test_targets_have_said_it_themselves():
    targets = Targets.from_packed(PACKED, 3)
    assert as_targets(targets, 3, SIZE, form=("pixel", "xyxy"))[0] is targets.rows


def test_what_is_usual():
    """Relative centres and sides; in dicts corners in pixels. A half of what is said leaves the other half as it is."""
    rows = said(PACKED, "pixel", "xyxy")
    dicts = [{"boxes": rows[PACKED[:, 0] == b, 2:], "labels": PACKED[PACKED[:, 0] == b, 1]} for b in range(3)]
    for form in (None, ("pixel", None), (None, "xyxy")):
        assert torch.equal(as_targets(dicts, 3, SIZE, form=form)[0], SORTED)
    assert torch.equal(as_targets(said(PACKED, "pixel", "cxcywh"), 3, SIZE, form=("pixel", None))[0], PACKED)
    assert torch.equal(as_targets(said(PACKED, "relative", "xyxy"), 3, SIZE, form=(None, "xyxy"))[0], PACKED)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Targets.from_packed(PACKED, 3, unit="pixels"), "unit: 'pixels', want one of 'relative', 'pixel'"),
        (lambda: Targets.from_padded(PACKED[None, :, 1:], boxes="ltrb"), "boxes: 'ltrb', want one of 'cxcywh', "),
        (lambda: Targets.from_packed(PACKED, 3, unit="pixel"), r"image_size: None, want \(height, width\)"),
        (lambda: Targets.from_padded(PACKED[None, :, 1:], unit="pixel"), r"image_size: None, want \(height, width\)"),
        (lambda: Targets.from_torchvision(as_list(PACKED, 3, 8, 8)), r"image_size: None, want \(height, width\)"),
        (lambda: fusedyolo.YOLOXLoss(3, (8,), unit="px"), "unit: 'px', want one of 'relative', 'pixel'"),
        (lambda: fusedyolo.SSDLoss(3, boxes="yxyx"), "boxes: 'yxyx', want one of 'cxcywh', 'xyxy', 'xywh'"),
    ],
)
def test_units_and_boxes_that_are_none(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_gpu_divides_pixels_as_a_cpu_does():
    """By a tensor: PyTorch multiplies by the reciprocal of a number there, and a centre on a border leaves its cell."""
    with Operators() as operators:
        as_targets(said(PACKED, "pixel", "cxcywh"), 3, SIZE, form=("pixel", None))
    assert operators.names.count("div") == 2
    assert "reciprocal" not in operators.names


def yolox(**options):
    return fusedyolo.YOLOXLoss(4, (8, 16), backend="torch", **options)


def test_padded_pixels_of_yolox():
    """One word makes of its loader's labels what relative ones are."""
    preds = [torch.rand(3, 9, 16, 32), torch.rand(3, 9, 8, 16)]
    labels = padded_rows(said(PACKED, "pixel", "cxcywh"))
    wanted = yolox()(preds, PACKED)
    for found in (
        yolox(unit="pixel")(preds, labels),
        yolox()(preds, Targets.from_padded(labels, unit="pixel", image_size=SIZE)),
    ):
        torch.testing.assert_close(found.total, wanted.total)
        assert found.num_invalid == wanted.num_invalid == 0
    assert yolox()(preds, labels).num_invalid == 5


ANCHORED = {"RetinaNet": fusedyolo.RetinaNetLoss, "FCOS": fusedyolo.FCOSLoss}


@pytest.mark.parametrize("name", ANCHORED)
@pytest.mark.parametrize("boxes", BOXES)
@pytest.mark.parametrize("unit", UNITS)
def test_losses_over_anchors_are_told_too(name, unit, boxes):
    torch.manual_seed(0)
    anchors = fusedyolo.anchors.fcos_anchors([(16, 32)], SIZE, [32])
    preds = tuple(torch.rand(3, 512, n) for n in ((4, 4, 1) if name == "FCOS" else (4, 4)))
    levels = {"num_anchors_per_level": [512]}
    rows = said(PACKED, unit, boxes)
    dicts = [{"boxes": rows[PACKED[:, 0] == b, 2:], "labels": PACKED[PACKED[:, 0] == b, 1]} for b in range(3)]
    wanted = ANCHORED[name](4, backend="torch")(preds, as_list(PACKED, 3, *SIZE), anchors, **levels)
    assert wanted.num_pos > 0
    loss = ANCHORED[name](4, image_size=SIZE, unit=unit, boxes=boxes, backend="torch")
    for targets in (rows, dicts, [rows[PACKED[:, 0] == b, 1:] for b in range(3)], Targets.from_packed(PACKED, 3)):
        found = loss(preds, targets, anchors, **levels)
        torch.testing.assert_close(found.total, wanted.total)
        assert found.num_pos == wanted.num_pos
    if (unit, boxes) == ("pixel", "xyxy"):  # corners in pixels are taken as they are, of an image of any size
        loss = ANCHORED[name](4, unit=unit, boxes=boxes, backend="torch")
        assert loss(preds, rows, anchors, **levels).total == wanted.total


def test_yolov1_needs_a_size_for_pixels_alone():
    pred, dicts = torch.rand(3, 7, 7, 14), as_list(PACKED, 3, *SIZE)
    loss = fusedyolo.YOLOv1Loss(4, backend="torch")
    wanted = loss(pred, PACKED)
    assert loss(pred, [PACKED[PACKED[:, 0] == b, 1:] for b in range(3)]).total == wanted.total
    with pytest.raises(ValueError, match="image_size: None"):
        loss(pred, dicts)
    told = fusedyolo.YOLOv1Loss(4, unit="pixel", backend="torch")
    with pytest.raises(ValueError, match="image_size: None"):
        told(pred, said(PACKED, "pixel", "cxcywh"))
    told(pred, Targets.from_packed(PACKED, 3))
    told = fusedyolo.YOLOv1Loss(4, unit="pixel", image_size=SIZE, backend="torch")
    assert told(pred, said(PACKED, "pixel", "cxcywh")).total == wanted.total
