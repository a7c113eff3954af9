"""Label files, samplers, and a small training run of ``python -m bench train``."""

import gzip
import io
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
import torch
from PIL import ExifTags, Image
from rich.console import Console

from bench import __main__ as entry
from bench import outcome, peers, phases, train
from bench.labels import Annotation, load_labels, pack, sample_labels
from bench.measure import EAGER, FUSED
from bench.pictures import Pictures, generate, load
from fusedyolo.tools.env import ROOT
from fusedyolo.tools.objects import coco_like, crowded
from fusedyolo.tools.registry import CASES, RefusedError, Workload

BOX = (0.5, 0.25, 0.5, 0.5)  # the box that each file below holds, beside others


def image(path, width=40, height=20):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height)).save(path)
    return path


def coco(path):
    images = [
        {"id": 7, "width": 40, "height": 20, "file_name": "sub/a.jpg"},
        {"id": 9, "width": 10, "height": 10, "file_name": "b.jpg"},
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
    assert first.classes.tolist() == [1]  # the crowd is left out
    assert first.boxes.tolist() == [list(BOX)]
    torch.testing.assert_close(second.boxes, torch.tensor([[0.9, 0.9, 0.2, 0.2]]))  # clipped, and one has no area
    assert second.classes.dtype == torch.int64


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
    labels.write_text("1 0.5 0.25 0.5 0.5\n\n3 0.2 0.4 0.2 0.4\n")
    here = image(tmp_path / f"images/{split}a.png")
    (tmp_path / "classes.txt").write_text("cat\ntraffic light\n")
    for path in (tmp_path, tmp_path / "labels", tmp_path / "images"):
        (only,), names = load_labels(path)
        assert names == ["cat", "traffic light", "class 2", "class 3"]
        assert only.image == here
        assert only.classes.tolist() == [1, 3]
        torch.testing.assert_close(only.boxes, torch.tensor([BOX, (0.2, 0.4, 0.2, 0.4)]))


def test_yolo_labels_without_images(tmp_path):
    (tmp_path / "a.txt").write_text("0 0.5 0.25 0.5 0.5\n")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    (only,), names = load_labels(tmp_path)
    assert names == ["cat", "dog"]
    assert only.image is None
    assert only.boxes.tolist() == [list(BOX)]


COCO = {
    "images": [{"id": 1, "file_name": "a.jpg", "width": 4, "height": 4}],
    "annotations": [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1]}],
    "categories": [{"id": 1, "name": "cat"}],
}


def coco_with(part, **change):
    """COCO's JSON with a change of the first of its images, annotations or categories; None leaves an entry out."""
    entry = COCO[part][0] | change
    return json.dumps(COCO | {part: [{key: value for key, value in entry.items() if value is not None}]})


VOC_SIZE = "<annotation><size><width>20.0</width><height>4</height></size>"


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ({}, r"nothing in .*; looked for \*.xml \(VOC\) and \*.txt \(YOLO\)"),
        ({"a.json": "[1]"}, r"a.json: TypeError: .*; want COCO's images"),
        ({"a.json": ""}, r"a.json: JSONDecodeError: .*; want COCO's images"),
        ({"a.json": "{}"}, r"a.json: KeyError: 'categories'; want COCO's images"),
        ({"a.json": json.dumps(COCO | {"images": None})}, r"a.json: TypeError: .*; want COCO's images"),
        ({"a.json": json.dumps(COCO | {"images": []})}, r"a.json: no images"),
        ({"a.json": coco_with("images", width=None)}, r"a.json: KeyError: 'width'; want COCO's images"),
        ({"a.json": coco_with("images", width=[4])}, r"a.json: TypeError: .*; want COCO's images"),
        ({"a.json": coco_with("images", width=10**400)}, r"a.json: OverflowError: .*; want COCO's images"),
        ({"a.json": coco_with("images", width=0)}, r"a.json: image size 0 x 4, want more than 0"),
        ({"a.json": coco_with("categories", name=None)}, r"a.json: KeyError: 'name'; want COCO's images"),
        ({"a.json": coco_with("annotations", bbox=None)}, r"a.json: KeyError: 'bbox'; want COCO's images"),
        ({"a.json": coco_with("annotations", bbox=[])}, r"a.json: not enough values to unpack"),
        ({"a.json": coco_with("annotations", bbox=list("abcd"))}, r"a.json: could not convert string .* 'a'"),
        ({"a.json": coco_with("annotations", image_id=2)}, r"a.json: an annotation of image 2, want one of its"),
        ({"a.json": coco_with("annotations", category_id=7)}, r"a.json: an annotation of category 7, want one of its"),
        ({"a.txt": "0 0.5 0.5\n"}, r"a.txt:1: '0 0.5 0.5', want class cx cy w h"),
        ({"a.txt": "0 0.5 0.5 0.1 0.1\nhello\n"}, r"a.txt:2: 'hello', want class cx cy w h"),
        ({"a.txt": "0 0.1 0.2 0.3 0.2 0.3 0.6\n"}, r"a.txt:1: .*, want class cx cy w h"),
        *(
            ({"a.txt": f"{label} .5 .5 .3 .3\n"}, rf"a.txt:1: '{label} .*, the class in 0 ... 65535")
            for label in ("-1", "0.5", "nan", "inf", "1000000000000")
        ),
        ({"a.txt": b"\xff\xfe0 .5 .5 .3 .3"}, r"a.txt: UnicodeDecodeError: .*; want text in UTF-8"),
        ({"a.xml": "<annotation/>"}, r"a.xml: image size 0 x 0, want more than 0"),
        ({"a.xml": "<annotation>"}, r"a.xml: ParseError: no element found"),
        ({"a.xml": VOC_SIZE.replace("20.0", "") + "</annotation>"}, r"a.xml: could not convert string to float: ''"),
        (
            {"a.xml": f"{VOC_SIZE}<object><bndbox><xmin>1,0</xmin></bndbox></object></annotation>"},
            r"a.xml: could not convert string to float: '1,0'",
        ),
    ],
)
def test_labels_that_cannot_be_read(tmp_path, files, error):
    for name, text in files.items():
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        load_labels(tmp_path / "a.json" if "a.json" in files else tmp_path)


def test_labels_of_other_writers(tmp_path):
    """A byte order mark, a class and a size with a point."""
    (tmp_path / "a.json").write_text(json.dumps(COCO), "utf-8-sig")
    (tmp_path / "yolo").mkdir()
    (tmp_path / "yolo/a.txt").write_text("0.0 0.125 0.125 0.25 0.25\n", "utf-8-sig")
    (tmp_path / "voc").mkdir()
    (tmp_path / "voc/a.xml").write_text(VOC.replace(">40<", ">40.0<"))
    for path, box in (("a.json", (0.125, 0.125, 0.25, 0.25)), ("yolo", (0.125, 0.125, 0.25, 0.25)), ("voc", BOX)):
        (only,), _ = load_labels(tmp_path / path)
        assert tuple(only.boxes[0].tolist()) == box


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
    one = Annotation(None, boxes, torch.tensor([3]))
    none = Annotation(None, boxes[:0], torch.tensor([], dtype=torch.int64))
    assert pack([none, one]).tolist() == [[1, 3, *BOX]]
    rows = sample_labels([one, none], 64, 0)
    assert 16 < len(rows) < 48
    assert len(rows[:, 0].unique()) == len(rows)
    assert torch.equal(rows, sample_labels([one, none], 64, 0))
    assert sample_labels([none], 4, 0).shape == (0, 6)


# --------------------------------------------------------------------------------------------------- pictures, detector


def test_pixels_and_boxes_move_together(tmp_path):
    """A white block in a black picture stays within its box, in the middle of the square."""
    picture = Image.new("RGB", (80, 40))
    picture.paste((255, 255, 255), (20, 10, 60, 30))
    picture.save(tmp_path / "a.png")
    annotation = Annotation(tmp_path / "a.png", torch.tensor([[0.5, 0.5, 0.5, 0.5]]), torch.tensor([0]))
    pictures = load([annotation], 64)
    assert pictures.annotations[0].boxes.tolist() == [[0.5, 0.5, 0.5, 0.25]]
    images, rows = pictures.batch(3, 2, 0, torch.device("cpu"))
    assert images.shape == (2, 3, 64, 64)
    assert rows.tolist() == [[image, 0, 0.5, 0.5, 0.5, 0.25] for image in (0, 1)]
    ys, xs = (images[1, 0] > 0.75).nonzero().unbind(1)
    assert (xs.min(), xs.max(), ys.min(), ys.max()) == pytest.approx((16, 47, 24, 39), abs=1)


def test_a_picture_is_upright_as_its_labels_are(tmp_path):
    picture = Image.new("RGB", (80, 40))
    exif = picture.getexif()
    exif[ExifTags.Base.Orientation] = 6  # lies on its side
    picture.save(tmp_path / "a.jpg", exif=exif)
    shown = load([Annotation(tmp_path / "a.jpg", torch.tensor([[0.5, 0.5, 1.0, 1.0]]), torch.tensor([0]))], 64)
    assert shown.annotations[0].boxes.tolist() == [[0.5, 0.5, 0.5, 1.0]]
    assert (shown.pixels[0, 0] == 0).sum(0).count_nonzero() == 32


def test_a_picture_that_cannot_be_read_is_refused(tmp_path):
    whole = image(tmp_path / "a.png", 80, 40).read_bytes()
    for part in (b"", whole[: len(whole) // 2]):
        (tmp_path / "a.png").write_bytes(part)
        with pytest.raises(RefusedError, match=r"^images: .*a\.png: "):
            load([Annotation(tmp_path / "a.png", torch.zeros(0, 4), torch.zeros(0))], 64)


def test_a_grid_of_any_image_is_that_of_the_map():
    assert train.fit(CASES["YOLOv1/paper"], 96).build(3, "torch").head.grid_size == 3
    assert train.fit(CASES["SSD"], 96) is CASES["SSD"]


# ------------------------------------------------------------------------------------------------------------- phases


def test_runs_take_turns():
    order = phases.turns(66, 66)
    assert [run for run, _ in order] == [0, 1, 1, 0, 0, 1, 1, 0, 0, 1]
    for run in range(2):
        own = [block for who, block in order if who == run]
        assert [step for block in own for step in block] == list(range(66))
        assert [len(block) for block in own] == [20, 20, 20, 4, phases.TRACED]


@pytest.mark.parametrize(("steps", "lengths"), [(1, [1]), (2, [2]), (3, [1, 2]), (6, [4, 2])])
def test_short_runs(steps, lengths):
    order = phases.turns(9, steps)
    assert {run for run, _ in order} == {0, 1}
    own = [block for run, block in order if run == 1]
    assert [len(block) for block in own] == lengths
    assert [step for block in own for step in block] == list(range(steps))


def test_times_are_those_of_timed_steps():
    def times(seconds):
        return {**dict.fromkeys(phases.PHASES, seconds), "step": 5 * seconds}

    steps = [times(seconds) for seconds in (100.0, 9.0, 2.0, 3.0, 50.0, 60.0)]
    assert phases.summarise(steps) == times(3.0)
    assert phases.summarise(steps[:1])["loss"] == 100.0


def test_clock_tells_phases_apart():
    clock = phases.Clock(torch.device("cpu"), "eager")
    for _ in range(2):
        for name in phases.PHASES:
            with clock.phase(name):
                time.sleep(0.02 if name == "loss" else 0.0)
    clock.settle()
    assert len(clock.steps) == 2
    for seconds in clock.steps:
        assert seconds["step"] >= seconds["loss"] >= 0.02 > seconds["forward"]


# ------------------------------------------------------------------------------------------------------------ training

SIZE, CLASSES = 64, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Drawn images."""
    path = tmp_path_factory.mktemp("drawn")
    generate(path, 10, 2 * SIZE)
    return path


@pytest.fixture(scope="module")
def pictures(folder):
    return load(load_labels(folder)[0], SIZE)


def run_of(name, provider=EAGER):
    work = Workload(2, SIZE, CLASSES, layout="nchw")
    return train.Run(provider, train.fit(CASES[name], SIZE), work, 0, torch.device("cpu"))


@dataclass
class Still:
    """One batch again and again, which every loss can learn."""

    pictures: Pictures

    def batch(self, step, size, seed, device):
        return self.pictures.batch(0, size, seed, device)


@pytest.mark.parametrize("name", CASES)
def test_every_loss_trains(name, pictures):
    run = run_of(name)
    run.take(range(4), Still(pictures))
    totals = [step["total"] for step in run.curve]
    assert all(math.isfinite(total) for total in totals)
    # where its target is the IoU of the predicted box, objectness has more to learn the better the boxes are
    learnt = [step["total"] - step.get("obj", 0.0) for step in run.curve]
    assert learnt[-1] < learnt[0]
    assert totals[-1] < totals[0] or name in ("ScaledYOLOv4", "YOLOv5")
    assert run.curve[0]["positives"] > 0
    parts = [value for part, value in run.curve[0].items() if part not in ("total", "positives")]
    assert sum(parts) == pytest.approx(totals[0], rel=1e-5)
    assert len(run.clock.steps) == 4


def test_a_peer_trains_on_the_objects_of_each_batch(pictures):
    """It starts from the same network, so that its losses are those of the reference."""
    case = CASES["FCOS"]
    if not peers.of(case):
        pytest.skip("no peer is installed")
    runs = [run_of("FCOS", provider) for provider in (peers.of(case)[0].name, EAGER)]
    for run in runs:
        run.take(range(3), pictures)
    theirs, ours = ([step["total"] for step in run.curve] for run in runs)
    assert theirs == pytest.approx(ours, rel=1e-5)
    assert len(set(ours)) == 3


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["--size", "100"], "--size: 100, want a multiple of 32"),
        (["--steps", "0"], "--steps: 0, want at least 1"),
        (["--images", "/does/not/exist"], "--images: /does/not/exist does not exist"),
    ],
)
def test_bad_arguments(argv, error, capsys):
    with pytest.raises(SystemExit):
        entry.main(["train", *argv])
    assert error in " ".join(capsys.readouterr().err.split())


def test_a_peer_must_compute_the_loss(tmp_path, capsys):
    assert entry.main(["train", "--loss", "yolov3", "--peer", "torchvision", "--out", str(tmp_path)]) == 2
    assert "--peer: torchvision, want one of eager for YOLOv3/paper" in " ".join(capsys.readouterr().out.split())


def in_this_process(argv):
    return entry.main(["train", *argv])


def on_the_command_line(argv):
    """Where nothing may have imported Triton before the interpreter is chosen."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", "bench", "train", *argv], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE
    )
    print(done.stdout)
    return done.returncode


@pytest.mark.parametrize(
    ("name", "parts", "command"),
    [
        ("YOLOv3/paper", ("box", "obj", "cls"), on_the_command_line),
        ("FCOS", ("classification", "bbox_regression", "bbox_ctrness"), in_this_process),
    ],
)
def test_train_end_to_end(tmp_path, folder, capsys, name, parts, command):
    """Numbers and pictures of a run; the curves of both losses coincide."""
    argv = ["--size", str(SIZE), "--batch", "1", "--steps", "60", "--out", str(tmp_path)]
    assert command([*argv, "--images", str(folder / "images"), "--loss", name, "--peer", EAGER]) == 0
    result = json.loads((tmp_path / "train.json").read_text())
    assert list(result["runs"]) == [EAGER, FUSED]
    curves = [run["steps"] for run in result["runs"].values()]
    assert [len(curve) for curve in curves] == [60, 3]
    assert max(result["difference"]) < 1e-5
    for a, b in zip(*curves, strict=False):
        assert a["positives"] == b["positives"] > 0
        for part in ("total", *parts):
            assert a[part] == pytest.approx(b[part], rel=1e-5)
        assert sum(a[part] for part in parts) == pytest.approx(a["total"], rel=1e-5)
    for run in result["runs"].values():
        assert set(run["seconds"]) == {*phases.PHASES, "step"}
    for picture in ("curves.png", "predictions.png"):
        image = Image.open(tmp_path / picture)
        assert image.width > 300
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50
    for provider in (EAGER, FUSED):
        events = json.loads(gzip.decompress((tmp_path / f"trace_{provider}.json.gz").read_bytes()))["traceEvents"]
        assert {f"{provider}: {phase}" for phase in phases.PHASES} <= {event.get("name") for event in events}
    assert "largest difference, 3 steps" in capsys.readouterr().out


def test_curves_that_part_are_a_fault():
    assert outcome.fault({"difference": [0.0, 1e-6]}) == ""
    assert "differ by 1.0e-03" in outcome.fault({"difference": [0.0, 1e-3]})
    assert "differ by nan" in outcome.fault({"difference": [float("nan")]})
    assert outcome.fault({"difference": [0.0] * outcome.COMPARED + [1.0]}) == ""  # one flipped assignment is enough


@pytest.mark.parametrize("gpu", [True, False])
def test_what_a_run_shows(gpu):
    """A table of made-up times, as only a GPU gives all of them."""
    seconds = dict(zip(phases.PHASES, (0.0009, 0.0042, 0.0121, 0.0078, 0.0012), strict=True))
    run = {"seconds": {**seconds, "step": 0.0262}, "steps": [{"total": 1.0}] * 100}
    result = {
        "config": {"loss": "RetinaNet", "batch": 8, "size": 192, "steps": 100},
        "runs": {"torchvision": run, FUSED: run},
        "interpreted": not gpu,
        "difference": [0.0],
    }
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(outcome.table(result))
    text = console.export_text()
    assert text.count("12.10  46.2%") == text.count("305.3") == 1 + gpu
    assert text.count("4.20  16.0%") == 1 + gpu
    assert text.count("4.20  ?") == 1 - gpu
    assert text.count("?  ?") == 2 * (1 - gpu)  # the loss, and the step


def test_losses_are_shown_of_a_step_that_both_took():
    """Without a GPU the fused run is the shorter one."""
    seconds = dict.fromkeys((*phases.PHASES, "step"), 0.01)
    steps = [{"total": 7.0 - i} for i in range(6)]
    result = {
        "config": {"loss": "YOLOv8", "batch": 8, "size": 192, "steps": 6},
        "runs": {"ultralytics": {"seconds": seconds, "steps": steps}, FUSED: {"seconds": seconds, "steps": steps[:3]}},
        "interpreted": True,
        "difference": [0.0] * 3,
    }
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(outcome.table(result))
    (line,) = (line for line in console.export_text().splitlines() if "loss at step 3" in line)
    assert line.split()[-2:] == ["5.0000", "5.0000"]


def test_nothing_to_train_on(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("0 0.5 0.25 0.5 0.5\n")
    assert entry.main(["train", "--images", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "0 of 1 annotated ones" in " ".join(capsys.readouterr().out.split())
