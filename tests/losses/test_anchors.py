"""Anchors: torchvision's own generators and its recorded anchors, bit by bit."""

from __future__ import annotations

import golden
import pytest
import torch
from peers import torchvision

from fusedyolo import anchors

NAN = float("nan")
MAPS = [(13, 21), (7, 11), (4, 6), (2, 3), (1, 2)]
IMAGES = [(104, 168), (100, 167), (97, 161)]  # the last two are no multiple of any map


def generated(generator, maps, image):
    """What a generator of torchvision makes of maps and an image."""
    images = torchvision().models.detection.image_list.ImageList(torch.zeros(1, 3, *image), [image])
    (found,) = generator(images, [torch.zeros(1, 1, *size) for size in maps])
    return found


def utils():
    return torchvision().models.detection.anchor_utils


@pytest.mark.parametrize("image", IMAGES)
def test_retinanet_is_that_of_torchvision(image):
    detection = torchvision().models.detection
    expected = generated(detection.retinanet._default_anchorgen(), MAPS, image)
    found = anchors.retinanet_anchors(MAPS, image)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("sizes", [((5, 7.5), (9, 45)), ((7,), (6, 18, 31, 33))])
@pytest.mark.parametrize("ratios", [(0.3, 1, 3), (1 / 9, 0.25, 2.25, 16), (0.36, 1.44, 3.24, 4.84)])
def test_retinanet_rounds_halves_to_even_as_torchvision(sizes, ratios):
    expected = generated(utils().AnchorGenerator(sizes, (ratios, ratios)), MAPS[:2], IMAGES[1])
    assert torch.equal(anchors.retinanet_anchors(MAPS[:2], IMAGES[1], sizes, ratios), expected)
    assert torch.equal(anchors.retinanet_anchors(MAPS[:2], IMAGES[1], sizes, (ratios, ratios)), expected)


def test_retinanet_takes_other_ratios_at_each_level():
    sizes, ratios = ((16,), (32, 40)), ((1.0,), (0.5, 2.0))
    expected = generated(utils().AnchorGenerator(sizes, ratios), MAPS[:2], IMAGES[0])
    assert torch.equal(anchors.retinanet_anchors(MAPS[:2], IMAGES[0], (16, (32, 40)), ratios), expected)


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("sizes", [anchors.FCOS_SIZES, (5, 7, 9.5, 21, 33)])
def test_fcos_is_that_of_torchvision(image, sizes):
    generator = utils().AnchorGenerator(tuple((s,) for s in sizes), ((1.0,),) * len(sizes))
    assert torch.equal(anchors.fcos_anchors(MAPS, image, sizes), generated(generator, MAPS, image))


SSD = [
    {"aspect_ratios": [[2], [2, 3], []]},
    {"aspect_ratios": [[2], [2, 3], [5]], "min_ratio": 0.2, "max_ratio": 0.95},
    {"aspect_ratios": [[2]], "min_ratio": 0.3, "max_ratio": 0.7},
    {"aspect_ratios": [[2, 3]] * 2, "scales": [0.07, 0.9, 1.05]},
    {"aspect_ratios": [[2, 3]] * 2, "scales": [0.07, 0.9, 1.05], "clip": False},
    {"aspect_ratios": [[2], [3]], "scales": [0.07, 0.33, 1.05], "steps": [8, 15]},
]


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("settings", SSD)
def test_ssd_is_that_of_torchvision(image, settings):
    maps = MAPS[: len(settings["aspect_ratios"])]
    expected = generated(utils().DefaultBoxGenerator(**settings), maps, image)
    found = anchors.ssd_anchors(maps, image, **settings)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_ssd300_is_that_of_torchvision():
    maps = [(38, 38), (19, 19), (10, 10), (5, 5), (3, 3), (1, 1)]
    ratios = [[2], [2, 3], [2, 3], [2, 3], [2], [2]]
    scales, steps = [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05], [8, 16, 32, 64, 100, 300]
    expected = generated(utils().DefaultBoxGenerator(ratios, scales=scales, steps=steps), maps, (300, 300))
    assert expected.shape == (8732, 4)
    assert torch.equal(anchors.ssd_anchors(maps, 300, **anchors.SSD300), expected)


@pytest.mark.parametrize("name", [*golden.names("torch", "tv_retinanet*"), *golden.names("torch", "tv_fcos*")])
def test_recorded_anchors(name):
    data = golden.arrays(name)
    meta = data["meta"]
    if "fcos" in name:
        found = anchors.fcos_anchors(meta["level_hw"], meta["image_hw"], meta["anchor_sizes"])
    else:
        settings = meta["anchor_sizes"], meta["aspect_ratios"]
        found = anchors.retinanet_anchors(meta["level_hw"], meta["image_hw"], *settings)
    assert torch.equal(found, data["anchors"])


@pytest.mark.parametrize("name", golden.names("torch", "tv_ssd*"))
def test_recorded_default_boxes(name):
    data = golden.arrays(name)
    meta = data["meta"]
    settings = {key: meta[key] for key in ("aspect_ratios", "scales", "steps", "clip")}
    assert torch.equal(anchors.ssd_anchors(meta["level_hw"], meta["image_hw"], **settings), data["anchors"])


def test_they_are_made_once():
    anchors._retinanet.cache_clear()
    anchors._ssd.cache_clear()
    anchors.retinanet_anchors(MAPS, IMAGES[0])
    anchors.retinanet_anchors([list(size) for size in MAPS], torch.Size(IMAGES[0]), device="cpu")
    anchors.retinanet_anchors(MAPS, IMAGES[1])
    anchors.ssd_anchors(MAPS[:1], 64, [[2]])
    anchors.ssd_anchors(MAPS[:1], (64, 64), ((2.0,),), clip=True)
    anchors.ssd_anchors(MAPS[:1], 64, [[2]], clip=False)
    assert [kept.cache_info()[:2] for kept in (anchors._retinanet, anchors._ssd)] == [(1, 2), (1, 2)]


def test_what_is_written_to_them_is_not_kept():
    found = anchors.fcos_anchors(MAPS, IMAGES[0])
    before = found.clone()
    found.clamp_(0, 1)
    assert torch.equal(anchors.fcos_anchors(MAPS, IMAGES[0]), before)


def test_they_lie_on_the_device_asked_for():
    assert anchors.fcos_anchors(MAPS, IMAGES[0], device="meta").device.type == "meta"
    assert anchors.fcos_anchors(MAPS, IMAGES[0]).device.type == "cpu"
    with torch.device("meta"):
        assert anchors.retinanet_anchors([(3, 2)], 30, (9,)).device.type == "cpu"
        assert anchors.ssd_anchors([(3, 2)], 30, [[2]], (0.3, 0.6)).device.type == "cpu"


def test_those_first_made_in_inference_mode_can_be_trained_with():
    with torch.inference_mode():
        made = [anchors.fcos_anchors([(2, 5)], 77, (8,)), anchors.ssd_anchors([(2, 5)], 77, [[2]])]
    for found in made:
        assert not found.is_inference()
        scale = torch.ones(4, requires_grad=True)
        (found * scale).sum().backward()
        assert torch.equal(scale.grad, found.sum(0))


def test_a_default_dtype_changes_nothing():
    before = torch.get_default_dtype()
    kept = anchors.ssd_anchors([(3, 7)], 50, [[3]]), anchors.retinanet_anchors([(3, 7)], 50, (9,))
    anchors._ssd.cache_clear()
    anchors._retinanet.cache_clear()
    try:
        torch.set_default_dtype(torch.float64)
        again = anchors.ssd_anchors([(3, 7)], 50, [[3]]), anchors.retinanet_anchors([(3, 7)], 50, (9,))
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(kept, again, strict=True))


BAD = [
    ("map_sizes", {"map_sizes": []}),
    ("map_sizes", {"map_sizes": 13}),
    ("map_sizes", {"map_sizes": "13"}),
    (r"map_sizes\[0\]", {"map_sizes": [13, 7]}),
    (r"map_sizes\[1\]", {"map_sizes": [(13, 7), (0, 2)]}),
    (r"map_sizes\[1\]", {"map_sizes": [(13, 7), (3, 2.5)]}),
    (r"map_sizes\[1\]", {"map_sizes": [(13, 7), (3, 2, 1)]}),
    ("image_size", {"image_size": None}),
    ("image_size", {"image_size": (64, 0)}),
    ("image_size", {"image_size": 64.5}),
    ("device", {"device": "a toaster"}),
    ("device", {"device": 1.5}),
]


@pytest.mark.parametrize(("name", "change"), BAD)
def test_bad_maps_images_and_devices(name, change):
    good = {"map_sizes": [(13, 7), (3, 2)], "image_size": 64}
    for make, more in (
        (anchors.retinanet_anchors, {"sizes": (8, 16)}),
        (anchors.fcos_anchors, {"sizes": (8, 16)}),
        (anchors.ssd_anchors, {"aspect_ratios": ((2,), (2,))}),
    ):
        assert make(**good, **more).shape[1] == 4
        with pytest.raises(ValueError, match=f"^{name}: .*, want "):
            make(**{**good, **more, **change})


BAD_SETTINGS = [
    (anchors.retinanet_anchors, "sizes", {"sizes": (8, 16, 32)}),
    (anchors.retinanet_anchors, "sizes", {"sizes": 8}),
    (anchors.retinanet_anchors, r"sizes\[1\]", {"sizes": (8, ())}),
    (anchors.retinanet_anchors, r"sizes\[1\]\[0\]", {"sizes": (8, (0,))}),
    (anchors.retinanet_anchors, r"sizes\[1\]", {"sizes": (8, "16")}),
    (anchors.retinanet_anchors, "aspect_ratios", {"sizes": (8, 16), "aspect_ratios": ()}),
    (anchors.retinanet_anchors, "aspect_ratios", {"sizes": (8, 16), "aspect_ratios": 1.0}),
    (anchors.retinanet_anchors, "aspect_ratios", {"sizes": (8, 16), "aspect_ratios": ((1,),)}),
    (anchors.retinanet_anchors, r"aspect_ratios\[1\]", {"sizes": (8, 16), "aspect_ratios": (1, -2)}),
    (anchors.retinanet_anchors, r"aspect_ratios\[0\]\[1\]", {"sizes": (8, 16), "aspect_ratios": ((1, NAN), (1,))}),
    (anchors.fcos_anchors, "sizes", {}),
    (anchors.fcos_anchors, "sizes", {"sizes": 8}),
    (anchors.fcos_anchors, r"sizes\[1\]", {"sizes": (8, (16,))}),
    (anchors.ssd_anchors, "aspect_ratios", {"aspect_ratios": ((2,),)}),
    (anchors.ssd_anchors, r"aspect_ratios\[1\]\[0\]", {"aspect_ratios": ((2,), (0,))}),
    (anchors.ssd_anchors, "scales", {"aspect_ratios": ((2,), (2,)), "scales": (0.1, 0.2)}),
    (anchors.ssd_anchors, "scales", {"aspect_ratios": ((2,), (2,)), "scales": 0.1}),
    (anchors.ssd_anchors, r"scales\[2\]", {"aspect_ratios": ((2,), (2,)), "scales": (0.1, 0.2, -1)}),
    (anchors.ssd_anchors, "steps", {"aspect_ratios": ((2,), (2,)), "steps": (8,)}),
    (anchors.ssd_anchors, "steps", {"aspect_ratios": ((2,), (2,)), "steps": 8}),
    (anchors.ssd_anchors, r"steps\[0\]", {"aspect_ratios": ((2,), (2,)), "steps": (0, 8)}),
    (anchors.ssd_anchors, "clip", {"aspect_ratios": ((2,), (2,)), "clip": 2}),
    (anchors.ssd_anchors, "min_ratio", {"aspect_ratios": ((2,), (2,)), "min_ratio": 0}),
    (anchors.ssd_anchors, "max_ratio", {"aspect_ratios": ((2,), (2,)), "max_ratio": "much"}),
]


@pytest.mark.parametrize(("make", "name", "settings"), BAD_SETTINGS)
def test_bad_settings(make, name, settings):
    with pytest.raises(ValueError, match=f"^{name}: .*, want "):
        make([(13, 7), (3, 2)], 64, **settings)


def test_anchors_without_an_area_are_refused():
    """What rounds to no side, of which no box could be told."""
    for sizes in ((0.9, 0.2), (8, 0.5)):
        with pytest.raises(ValueError, match=r"^sizes: \(.*\), want larger ones: "):
            anchors.retinanet_anchors([(2, 2), (1, 1)], 32, sizes=sizes)
