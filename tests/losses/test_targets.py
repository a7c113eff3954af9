"""Targets: every accepted form becomes the same sorted rows, without waiting for a device."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import fusedyolo
from fusedyolo import Targets
from fusedyolo.targets import SORT_ABOVE, as_targets

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
            ValueError, match=f"{name}: dtype {dtype}, want torch.float32: halves hold no class above 256"
        ):
            call()


def test_labels_of_an_empty_image_may_have_a_column():
    targets = Targets.from_torchvision([{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, 1)}], 64)
    assert targets.rows.shape == (0, 6)


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


def test_torchvision_lists_of_images_of_several_sizes():
    sizes = [(128, 256), (64, 64), (512, 128)]
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
    edge = torch.tensor([[0, 0, 0, 0, 1e-6, 4.0], [0, 3.9, 0.999, 0.999, 1, 1]])
    Targets.from_packed(edge, 1).validate(4)


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        (0, -1, "no such image, want 0 <= image < 3"),
        (0, 3, "no such image, want 0 <= image < 3"),
        (0, NAN, "not finite, want six finite numbers"),
        (1, -1, "class out of range, want 0 <= class < 4"),
        (1, 4, "class out of range, want 0 <= class < 4"),
        (1, INF, "not finite, want six finite numbers"),
        (2, 1, "centre outside the image, want 0 <= cx < 1 and 0 <= cy < 1"),
        (2, -0.01, "centre outside the image, want 0 <= cx < 1 and 0 <= cy < 1"),
        (3, 1.5, "centre outside the image, want 0 <= cx < 1 and 0 <= cy < 1"),
        (3, -1, "centre outside the image, want 0 <= cx < 1 and 0 <= cy < 1"),
        (4, 0, "zero area, want w > 0 and h > 0"),
        (4, -0.5, "zero area, want w > 0 and h > 0"),
        (5, 0, "zero area, want w > 0 and h > 0"),
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
        rows, offsets = as_targets(PACKED, 3, (64, 64))
    assert ran.names == []
    assert rows is PACKED
    assert offsets is None


def test_targets_pass_through_without_any_work():
    targets = Targets.from_packed(PACKED, 3)
    with Operators() as ran:
        rows, offsets = as_targets(targets, 3, (64, 64), torch.device("cpu"))
    assert ran.names == []
    assert rows is targets.rows
    assert offsets is targets.offsets


def test_packed_rows_of_another_kind_are_converted():
    rows, offsets = as_targets(PACKED.double().t().contiguous().t().requires_grad_(), 3, (64, 64))
    assert rows.dtype == torch.float32
    assert rows.is_contiguous()
    assert not rows.requires_grad
    assert offsets is None
    assert torch.equal(rows, PACKED)


@pytest.mark.parametrize("extra", [0, 1])
def test_many_packed_rows_are_sorted(extra):
    packed = torch.rand(SORT_ABOVE + extra, 6)
    packed[:, 0] = torch.arange(len(packed)) % 3
    rows, offsets = as_targets(packed, 3, (64, 64))
    if extra:
        assert offsets is not None
        assert torch.equal(rows, packed[packed[:, 0].sort(stable=True).indices])
        assert offsets.diff().sum() == len(packed)
    else:
        assert rows is packed
        assert offsets is None


def test_padded_rows_and_lists_become_the_same_rows():
    for form in (padded(), as_list(PACKED, 3, 64, 96), tuple(as_list(PACKED, 3, 64, 96))):
        rows, offsets = as_targets(form, 3, (64, 96))
        assert offsets is not None
        assert offsets.tolist() == [0, 3, 3, 5, 5]
        torch.testing.assert_close(rows[:5], SORTED, rtol=1e-6, atol=0)


def test_nothing_waits_for_the_device():
    """Fake tensors hold no data: an operation that needs some, and so would stall a GPU, raises."""
    with FakeTensorMode():
        packed = torch.rand(7, 6)
        images = [{"boxes": torch.rand(n, 4), "labels": torch.zeros(n, dtype=torch.long)} for n in (2, 0, 3)]
        for form in (packed, torch.rand(SORT_ABOVE + 1, 6), torch.rand(3, 4, 5), images):
            rows, _ = as_targets(form, 3, (64, 64), packed.device)
            assert rows.shape[1] == 6
        assert Targets.from_packed(packed, 3, capacity=9).rows.shape == (9, 6)
        assert Targets.from_torchvision(images, [(64, 64)] * 3, capacity=9).offsets.shape == (5,)
        assert Targets.from_padded(torch.rand(3, 4, 5)).rows.shape == (12, 6)
        with pytest.raises(DynamicOutputShapeException):
            torch.rand(3).nonzero().tolist()  # what this test relies on
