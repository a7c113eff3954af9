"""README and the pages: every Python block runs, tables are what they are made from, links lead somewhere."""

from __future__ import annotations

import ast
import os
import re
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import peers
import pytest
import torch
from PIL import Image
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser
from torch import nn

import fusedyolo
from bench import __main__ as bench
from fusedyolo import __main__ as tool
from fusedyolo.terms import TERMS, Term

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
FOREIGN = (
    "ultralytics",
    "yolox",
    "yolov5",
    "libreyolo",
)  # not installed everywhere; tests/losses/test_swap_*.py try more
NEEDED = {"yolov5": "yolov5.utils.loss", "yolox": "yolox.models", "libreyolo": "libreyolo.models.yolox.nn"}
ELSEWHERE = ("fusedyolo.emulator",)  # in a process without Triton's interpreter
WIDE = re.compile(r"```python\n(.*?)```", re.DOTALL)


@cache
def blocks(page):
    """What is Python on a page, hidden checks as well, and what of others it imports: '' for none."""
    found = list(Document.parse(str(page), PythonCodeBlockParser()).examples())
    return [(example, _imported(str(example.parsed))) for example in found]


def _imported(code):
    found = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    modules = {node.module for node in found} | {name.name for node in found for name in node.names}
    return next((name for name in FOREIGN + ELSEWHERE if name in modules), "")


def pages_with(names):
    return [(page, name) for page in PAGES for name in names if name in [of for _, of in blocks(page)]]


def run(page, names, of=""):
    for example, imported in blocks(page):
        if imported == of:
            example.namespace.clear()
            example.namespace.update(names)
            example.evaluate()
            names.update(example.namespace)


ANCHORS = [[(10, 13), (16, 30), (33, 23)], [(30, 61), (62, 45), (59, 119)], [(116, 90), (156, 198), (373, 326)]]
STRIDES = (8, 16, 32)
ROWS = ((0, 3, 0.5, 0.5, 0.2, 0.3), (1, 7, 0.2, 0.7, 0.1, 0.1))


def stand_ins():
    """What the pages take for granted: a batch of two images of 64 pixels, and a detector of each kind."""
    generator = torch.Generator().manual_seed(0)
    preds = [torch.randn(2, 3 * 85, 64 // s, 64 // s, generator=generator).requires_grad_() for s in STRIDES]
    weights, targets = nn.Parameter(torch.ones(())), torch.tensor(ROWS)
    anchors, strides = torch.tensor(ANCHORS) / torch.tensor(STRIDES).view(3, 1, 1), torch.tensor(STRIDES)
    hyp = {"box": 0.05, "obj": 0.7, "cls": 0.3, "cls_pw": 1.0, "obj_pw": 1.0, "anchor_t": 4.0, "fl_gamma": 0.0}
    head = SimpleNamespace(anchors=anchors, stride=strides, nc=80, nl=3, na=3)
    layers = [
        SimpleNamespace(anchors=torch.tensor(a), stride=s, num_classes=80)
        for a, s in zip(ANCHORS, STRIDES, strict=True)
    ]
    grids = [pred.unflatten(1, (3, 85)).permute(0, 1, 3, 4, 2) for pred in preds]
    criterion = fusedyolo.YOLOv5Loss(ANCHORS, STRIDES, 80)
    return {
        "fusedyolo": fusedyolo,
        "torch": torch,
        "preds": preds,
        "grids": grids,
        "targets": targets,
        "images": torch.zeros(2, 3, 64, 64),
        "criterion": criterion,
        "your_loss": lambda preds, targets: fusedyolo.YOLOv5Loss(ANCHORS, STRIDES, 80)(preds, targets.flip(0)).total,
        "model": lambda images: [pred * weights for pred in preds],
        "loader": [(torch.zeros(2, 3, 64, 64), targets)],
        "optimizer": torch.optim.SGD([weights], 1e-6),
        "weights": weights,
        "photos": [torch.rand(3, 64, 64, generator=generator)] * 2,
        "boxes": [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0]]), "labels": torch.tensor([1])}] * 2,
        "yolov7": SimpleNamespace(model=[head], hyp=hyp | {"lr0": 0.01}, gr=1.0),
        "darknet": SimpleNamespace(yolo_layers=layers),
        "yolov5_model": SimpleNamespace(model=[head], hyp=hyp, parameters=lambda: iter([weights])),
        "Term": Term,
        "TERMS": TERMS,
    }


@pytest.fixture
def names(tmp_path, monkeypatch):
    """Of a page; what it writes is written to a folder of its own."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    ssd = peers.torchvision().models.detection.ssdlite320_mobilenet_v3_large
    detector = ssd(weights=None, weights_backbone=None, num_classes=3)
    return stand_ins() | {"detector": detector, "monkeypatch": monkeypatch}


@pytest.mark.parametrize("page", [page for page in PAGES if "" in [of for _, of in blocks(page)]], ids=lambda p: p.name)
def test_the_blocks_of_a_page_run(page, names, monkeypatch):
    if page.name != "extend.md":  # which is about kernels
        monkeypatch.setenv("FUSEDYOLO_DISABLE", "1")  # at 320 pixels the interpreter takes minutes
    run(page, names)
    if page.name == "README.md":
        assert float(names["weights"].detach()) != 1.0


@pytest.mark.parametrize(("page", "package"), pages_with(FOREIGN), ids=lambda value: getattr(value, "name", value))
def test_the_blocks_that_swap_a_loss_run(page, package, names, monkeypatch):
    peers.module(NEEDED.get(package, package))
    monkeypatch.setenv("FUSEDYOLO_DISABLE", "1")
    globals()[f"_{package}"](names, monkeypatch)
    run(page, names, package)


def _ultralytics(names, monkeypatch):
    """A data set of four images and one epoch of it, in place of the page's own; on the CPU, in this process."""
    for part in ("images", "labels"):
        Path(part).mkdir()
    for i in range(4):
        Image.new("RGB", (64, 64), (40 * i, 80, 90)).save(f"images/{i}.png")
        Path(f"labels/{i}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    Path("data.yaml").write_text(f"path: {Path.cwd()}\ntrain: images\nval: images\nnames: [thing]\n")
    small = {
        **{"epochs": 1, "imgsz": 64, "batch": 4, "workers": 0, "device": "cpu", "amp": False, "plots": False},
        **{"optimizer": "SGD", "pretrained": False, "project": "runs", "verbose": False, "val": False, "save": False},
    }
    model = peers.module("ultralytics").YOLO
    train = model.train
    monkeypatch.setattr(model, "train", lambda self, **settings: train(self, **settings | small))
    # its compiled part may not be there
    monkeypatch.setattr(peers.torchvision().ops, "nms", lambda boxes, scores, iou: scores.argsort(descending=True))


def _yolov5(names, monkeypatch):
    names["preds"] = names["grids"]


def _yolox(names, monkeypatch):
    models = peers.module("yolox.models")
    head = models.YOLOXHead(80, 0.25, depthwise=True)
    names["yolox_model"] = models.YOLOX(models.YOLOPAFPN(0.33, 0.25, depthwise=True), head).train()
    names["labels"] = _in_pixels()


def _libreyolo(names, monkeypatch):
    names["libre_model"] = peers.module(NEEDED["libreyolo"]).LibreYOLOXModel("n", 80).train()
    names["labels"] = _in_pixels()


def _in_pixels():
    return torch.tensor(ROWS)[:, 1:].view(2, 1, 5) * torch.tensor([1.0, 64, 64, 64, 64])


EMULATED = """
import torch, fusedyolo
criterion = fusedyolo.YOLOv1Loss(num_classes=3, grid_size=2, num_boxes=1)
preds = torch.randn(1, 2, 2, 8).requires_grad_()
targets = torch.tensor([[0, 1, 0.5, 0.5, 0.2, 0.3]])
"""


@pytest.mark.parametrize("page", [page for page, _ in pages_with(ELSEWHERE)], ids=lambda page: page.name)
def test_the_blocks_that_emulate_run(page):
    code = [str(example.parsed) for example, of in blocks(page) if of in ELSEWHERE]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "\n".join([EMULATED, *code])],
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.match(r"\[\('\w+_kernel', \d+, \d+\)", done.stdout), done.stdout


def test_no_block_is_left_out():
    for page in PAGES:
        seen = [str(example.parsed).strip() for example, _ in blocks(page)]
        assert [code for code in WIDE.findall(page.read_text()) if code.strip() not in seen] == [], page.name
    assert {of for page in PAGES for _, of in blocks(page)} == {"", *FOREIGN, *ELSEWHERE}


def test_the_matrix_is_made_from_the_registry_and_from_what_was_counted():
    made = runpy.run_path(str(DOCS / "matrix.py"))
    text = (DOCS / "matrix.md").read_text()
    assert made["page"](text) == text, "python docs/matrix.py writes it"
    number = re.search(r"~1\.\d+", text)
    assert made["page"](text.replace(number[0], "~0.900")) == text


def test_what_was_predicted_stands_beside_what_was_measured():
    made = runpy.run_path(str(DOCS / "predicted.py"))
    text, found = (DOCS / "measured.md").read_text(), made["launches"]()
    assert made["page"](text) == text, "python docs/predicted.py writes it"
    near, nearer = (sum(1 / f < one.predicted / one.measured < f for one in found) for f in (1.5, 1.2))
    said = f"Of {len(found)} launches {near} are within a factor of 1.5, {nearer} within 1.2; all are off by"
    assert f"{said} {made['apart'](found):.2f}" in text
    assert all(one.measured == pytest.approx(one.predicted, rel=2) for one in found), "launches go with others' times"


def test_every_loss_is_listed_and_every_name_has_its_reference():
    losses = [name for name in fusedyolo.__all__ if name.endswith("Loss")]
    listed = re.findall(r"^\|.*?\| `(\w+Loss)\(", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(losses)
    reference = "".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    documented = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", reference, re.MULTILINE)}
    assert {name for name in fusedyolo.__all__ if not name.startswith("__")} <= documented


def test_the_commands_are_as_they_are():
    text = (ROOT / "README.md").read_text()
    assert 'pip install -c constraints.txt -e ".[bench]" && python -m bench\n' in text
    assert 'pip install -c constraints.txt -e ".[test]" && pytest\n' in text


COMMAND = re.compile(r"(?:^|&& |\| `)(python -m bench|fusedyolo(?= (?:env|check|tune)))([^`\n#|]*)", re.MULTILINE)
PLACEHOLDERS = {"NAME": "YOLOv5", "B": "2", "S": "64", "C": "3"}


def test_commands_of_the_pages_have_such_options(tmp_path, monkeypatch):
    """In blocks and tables. DIR and PATH, which a page leaves to its reader, are folders that exist."""
    monkeypatch.chdir(tmp_path)
    for name in ("DIR", "PATH"):
        Path(name).mkdir()
    seen = set()
    for page in PAGES:
        for program, rest in COMMAND.findall(page.read_text().replace("\\\n", " ")):
            arguments = [PLACEHOLDERS.get(word, word) for word in rest.split()]
            parse = bench.parser().parse_args if program == "python -m bench" else tool.parse
            assert parse(arguments), (page.name, program, rest)  # else it exits
            seen.add((program, *arguments[:1]))
    assert {("fusedyolo", "env"), ("fusedyolo", "check"), ("fusedyolo", "tune"), ("python -m bench",)} <= seen


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([\w./-]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target
