"""Label files, samplers, and a small training run of ``python -m bench train``."""

import gzip
import json

import pytest
import torch
from PIL import Image

from bench import train
from bench.detector import fit_anchors, hits
from bench.objects import Annotation, coco_like, crowded, load_labels, pack, sample_labels
from bench.pictures import augment, load

BOX = (0.5, 0.25, 0.5, 0.5)  # the box that each file below holds, beside others


def image(path, width=40, height=20):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height)).save(path)
    return path


def coco(path, file_name=True):
    images = [
        {"id": 7, "width": 40, "height": 20, "file_name": "sub/a.jpg"},
        {"id": 9, "width": 10, "height": 10, "coco_url": "http://host/val2017/b.jpg"},
    ]
    boxes = [
        {"image_id": 7, "category_id": 5, "bbox": [10, 0, 20, 10]},
        {"image_id": 7, "category_id": 2, "bbox": [0, 0, 4, 4], "iscrowd": 1},
        {"image_id": 9, "category_id": 2, "bbox": [8, 8, 4, 4], "iscrowd": 0},
        {"image_id": 9, "category_id": 2, "bbox": [1, 1, 0, 4]},
    ]
    categories = [{"id": 5, "name": "dog"}, {"id": 2, "name": "cat"}]
    path.write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    return path


VOC = """<annotation><filename>a.jpg</filename><size><width>40</width><height>20</height></size>
<object><name>RBC</name><bndbox><xmin>10</xmin><ymin>0</ymin><xmax>30</xmax><ymax>10</ymax></bndbox></object>
<object><name>Platelets</name><bndbox><xmin>4</xmin><ymin>9</ymin><xmax>4</xmax><ymax>12</ymax></bndbox></object>
<object><name>Platelets</name><bndbox><xmin>0</xmin><ymin>10</ymin><xmax>4</xmax><ymax>20</ymax></bndbox></object>
</annotation>"""


# ------------------------------------------------------------------------------------------------------------- readers


def test_coco_json(tmp_path):
    path = coco(tmp_path / "instances.json")
    here = image(tmp_path / "val/sub/a.jpg")
    (first, second), names = load_labels(path)
    assert names == ["cat", "dog"]
    assert (first.image, second.image) == (here, None)
    assert (first.width, first.height) == (40, 20)
    assert first.classes.tolist() == [1]  # the crowd is left out
    assert first.boxes.tolist() == [list(BOX)]
    torch.testing.assert_close(second.boxes, torch.tensor([[0.9, 0.9, 0.2, 0.2]]))  # clipped, and one has no area
    assert second.classes.dtype == torch.int64
    assert load_labels(tmp_path).names == names  # the folder will do


def test_voc_folder(tmp_path):
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations/a.xml").write_text(VOC)
    here = image(tmp_path / "JPEGImages/a.jpg")
    for path in (tmp_path, tmp_path / "Annotations"):
        (only,), names = load_labels(path)
        assert names == ["Platelets", "RBC"]
        assert only.image == here
        assert only.classes.tolist() == [1, 0]
        assert only.boxes[0].tolist() == list(BOX)


@pytest.mark.parametrize("split", ["", "train/"])
def test_yolo_folder(tmp_path, split):
    labels = tmp_path / f"labels/{split}a.txt"
    labels.parent.mkdir(parents=True)
    labels.write_text("1 0.5 0.25 0.5 0.5\n\n3 0.1 0.2 0.3 0.2 0.3 0.6 0.1 0.6\n")
    here = image(tmp_path / f"images/{split}a.png")
    (tmp_path / "data.yaml").write_text("nc: 3\nnames:\n  0: cat\n  1: 'dog'\n")
    for path in (tmp_path, tmp_path / "labels", tmp_path / "images"):
        (only,), names = load_labels(path)
        assert names == ["cat", "dog", "class 2", "class 3"]
        assert (only.image, only.width, only.height) == (here, 40, 20)
        assert only.classes.tolist() == [1, 3]
        torch.testing.assert_close(only.boxes, torch.tensor([BOX, (0.2, 0.4, 0.2, 0.4)]))  # the second is a polygon


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("classes.txt", "cat\ndog\n"),
        ("coco.names", "cat\n\ndog\n"),
        ("data.yaml", "train: x\nnames: ['cat', \"dog\"]\nnc: 2\n"),
        ("data.yml", "names:\n- cat\n- dog\nroboflow:\n  version: 1\n"),
    ],
)
def test_yolo_labels_without_images(tmp_path, name, text):
    (tmp_path / "a.txt").write_text("0 0.5 0.25 0.5 0.5\n")
    (tmp_path / name).write_text(text)
    (only,), names = load_labels(tmp_path)
    assert names == ["cat", "dog"]
    assert (only.image, only.width) == (None, 0)
    assert only.boxes.tolist() == [list(BOX)]


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ({}, r"nothing in .*; looked for \*.xml \(VOC\), \*.json \(COCO\) and \*.txt \(YOLO\)"),
        ({"a.json": "[1]"}, r"a.json is no COCO file"),
        ({"a.json": "{}", "b.json": "{}"}, r"holds 2 json files, name one of \['a.json', 'b.json'\]"),
        ({"a.txt": "0 0.5 0.5\n"}, r"a.txt:1 has 3 numbers, want class cx cy w h"),
        ({"a.txt": "0 0.5 0.5 0.1 0.1\nhello\n"}, r"a.txt:2 is no YOLO label: 'hello'"),
        ({"a.xml": "<annotation/>"}, r"a.xml has no image size"),
    ],
)
def test_labels_that_cannot_be_read(tmp_path, files, error):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        load_labels(tmp_path)


def test_missing_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_labels(tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------------------------ samplers


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def check_rows(rows, batch, num_classes):
    assert rows.dtype == torch.float32
    assert rows[:, 0].min() >= 0
    assert rows[:, 0].max() < batch
    assert rows[:, 1].min() >= 0
    assert rows[:, 1].max() < num_classes
    assert rows[:, 4:].min() > 0
    low, high = rows[:, 2:4] - rows[:, 4:] / 2, rows[:, 2:4] + rows[:, 4:] / 2
    assert low.min() > -1e-6
    assert high.max() < 1 + 1e-6
    assert rows[:, 2:4].max() < 1


def test_coco_like_has_the_statistics_of_coco():
    rows = coco_like(20_000, generator())
    check_rows(rows, 20_000, 80)
    counts = torch.bincount(rows[:, 0].long(), minlength=20_000).float()
    assert 7.1 < counts.mean() < 7.9
    assert 3.5 <= counts.median() <= 4.5
    assert 60 <= counts.max() <= 63
    sides = rows[:, 4:].prod(1).sqrt()
    assert 0.075 < sides.median() < 0.095
    assert 0.30 < (sides < 32 / 640).float().mean() < 0.35
    assert 0.28 < (sides > 96 / 640).float().mean() < 0.36
    assert 0.29 < (rows[:, 1] == 0).float().mean() < 0.31


def test_coco_like_of_one_class():
    rows = coco_like(50, generator(), num_classes=1)
    check_rows(rows, 50, 1)


def test_crowded():
    rows = crowded(3, generator(), objects=5000)
    check_rows(rows, 3, 80)
    assert torch.bincount(rows[:, 0].long()).tolist() == [5000] * 3
    assert 1.0 < rows[:, 4:].prod(1).sum() / 3 < 1.4


@pytest.mark.parametrize("sampler", [coco_like, crowded])
def test_samplers_follow_the_generator(sampler):
    assert torch.equal(sampler(4, generator(1)), sampler(4, generator(1)))
    assert not torch.equal(sampler(4, generator(1))[:5], sampler(4, generator(2))[:5])


def test_sample_labels():
    boxes = torch.tensor([BOX])
    one = Annotation(None, 40, 20, boxes, torch.tensor([3]))
    none = Annotation(None, 40, 20, boxes[:0], torch.tensor([], dtype=torch.int64))
    assert pack([none, one]).tolist() == [[1, 3, *BOX]]
    rows = sample_labels([one, none], 64, generator())
    assert 16 < len(rows) < 48
    assert len(rows[:, 0].unique()) == len(rows)
    assert torch.equal(rows, sample_labels([one, none], 64, generator()))
    assert sample_labels([none], 4, generator()).shape == (0, 6)


# --------------------------------------------------------------------------------------------------- pictures, detector


def test_pixels_and_boxes_move_together(tmp_path):
    """A white block in a black picture stays within its box, through letterboxing and augmentation."""
    picture = Image.new("RGB", (80, 40))
    picture.paste((255, 255, 255), (20, 10, 60, 30))
    picture.save(tmp_path / "a.png")
    annotation = Annotation(tmp_path / "a.png", 80, 40, torch.tensor([[0.5, 0.5, 0.5, 0.5]]), torch.tensor([0]))
    pictures = load([annotation], 64)
    assert pictures.pixels.shape == (1, 3, 64, 64)
    assert pictures.annotations[0].boxes.tolist() == [[0.5, 0.5, 0.5, 0.25]]

    images, rows = augment(pictures.pixels.expand(16, -1, -1, -1), pack(pictures.annotations * 16), generator())
    assert len(rows) == 16
    for white, (_, _, cx, cy, w, h) in zip(images[:, 0] > 0.75, (rows * 64).tolist(), strict=True):
        ys, xs = white.nonzero().unbind(1)
        found = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], dtype=torch.float32)
        box = torch.tensor([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
        torch.testing.assert_close(found, box, atol=1.5, rtol=0)


def test_anchors_are_sorted_by_area():
    levels = fit_anchors(torch.rand(500, 2, generator=generator()) * 100 + 2)
    areas = [w * h for level in levels for w, h in level]
    assert [len(level) for level in levels] == [3, 3, 3]
    assert areas == sorted(areas)
    assert fit_anchors(torch.tensor([[8.0, 9.0]])) == [[(8.0, 9.0)] * 3] * 3


def test_hits():
    found = {
        "boxes": torch.tensor([[1, 0, 11, 10], [30, 30, 40, 41], [30, 30, 40, 40]], dtype=torch.float32),
        "scores": torch.tensor([0.9, 0.8, 0.7]),
        "labels": torch.tensor([0, 0, 1]),
    }
    truth = torch.tensor([[0.05, 0.05, 0.1, 0.1], [0.35, 0.35, 0.1, 0.1]])
    assert hits(found, Annotation(None, 100, 100, truth, torch.tensor([0, 1]))) == 2
    assert hits(found, Annotation(None, 100, 100, truth, torch.tensor([1, 1]))) == 1
    none = {key: value[:0] for key, value in found.items()}
    assert hits(none, Annotation(None, 100, 100, truth, torch.tensor([1, 1]))) == 0


# ------------------------------------------------------------------------------------------------------------ training

SMALL = ["--size", "64", "--batch", "1", "--generate", "10", "--loss", "yolov3"]


def test_train_end_to_end(tmp_path):
    """Losses and pictures of a run on drawn images; the curves of both backends coincide."""
    argv = [*SMALL, "--steps", "120", "--fused-steps", "3", "--out", str(tmp_path)]
    assert train.main(argv) == 0
    result = json.loads((tmp_path / "train.json").read_text())
    reference, fused = (result["runs"][backend]["steps"] for backend in ("torch", "triton"))
    assert (len(reference), len(fused)) == (120, 3)
    assert max(result["difference"]) < 1e-5
    for a, b in zip(reference, fused, strict=False):
        assert a["positives"] == b["positives"] > 0
        for part in ("total", "box", "obj", "cls"):
            assert a[part] == pytest.approx(b[part], rel=1e-5)
        assert a["box"] + a["obj"] + a["cls"] == pytest.approx(a["total"], rel=1e-5)
    for run in result["runs"].values():
        assert 0 < run["loss_share"] < 1
        assert run["images_per_second"] > 0
    for name in ("curves.png", "predictions.png"):
        assert Image.open(tmp_path / name).width > 300
    for backend, name in train.NAMES.items():
        events = json.loads(gzip.decompress((tmp_path / f"trace_{backend}.json.gz").read_bytes()))["traceEvents"]
        assert {f"{name}: loss", f"{name}: forward"} <= {event.get("name") for event in events}


def test_curves_that_part_are_a_fault():
    steps = [{"total": 3.0}, {"total": 2.0}, {"total": 2.0}, {"total": 1.0}]
    result = {"config": {"steps": 4}, "runs": {"torch": {"steps": steps}, "triton": {"steps": steps[:2]}}}
    assert train.faults({**result, "difference": [0.0, 1e-6]}) == []
    assert "differ by 1.0e-03" in train.faults({**result, "difference": [0.0, 1e-3]})[0]
    assert "differ by nan" in train.faults({**result, "difference": [float("nan")]})[0]
    result["runs"]["torch"]["steps"] = steps[::-1]
    assert train.faults({**result, "difference": [0.0]}) == ["The loss of the eager reference run did not fall."]


def test_nothing_to_train_on(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("0 0.5 0.25 0.5 0.5\n")
    assert train.main(["--images", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "0 of 1 annotated images" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        train.main(["--size", "100"])
    assert "--size: 100, want a multiple of 32" in capsys.readouterr().err
