"""Other libraries' own losses against the eager reference, on what the bench gives both of them."""

import os
import sys
from dataclasses import replace

import pytest
import torch
from conftest import DEVICE

from bench import measure, peers
from fusedyolo.tools.parity import step
from fusedyolo.tools.registry import CASES, Workload

WORK = Workload(batch=3, size=128, classes=5)
EMPTY = 3  # the seed of a batch whose first image has no objects
COMPUTED = [(peer.name, name) for peer in peers.PEERS.values() for name in peer.cases]


def peer_of(name):
    """The peer, or the test is skipped."""
    peer = peers.PEERS[name]
    if peer.missing():
        pytest.skip(peer.missing())
    return peer


def run(loss, case, work):
    """The total, and the gradient of each prediction."""
    preds = case.predictions(work, DEVICE)
    out = step(loss, preds, case.targets(work, DEVICE), torch.ones((), device=DEVICE))
    assert out.total.shape == ()
    return out.total.detach(), [pred.grad for pred in preds]


def assert_same(found, expected, rtol):
    torch.testing.assert_close(found[0], expected[0], rtol=rtol, atol=0)
    largest = max(grad.abs().max().item() for grad in expected[1])
    for a, b in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=rtol * largest)


@pytest.mark.parametrize(("size", "seed"), [(128, 18), (128, EMPTY), (128, 5), (256, 1)])
@pytest.mark.parametrize(("name", "case"), COMPUTED)
def test_a_peer_computes_what_the_reference_computes(name, case, size, seed):
    peer, case, work = peer_of(name), CASES[case], replace(WORK, size=size, seed=seed)
    expected = run(case.bind(case.build(work.classes, "torch"), work, DEVICE), case, work)
    assert_same(run(peer.loss(case, work, DEVICE), case, work), expected, 1e-5)


def test_an_object_within_several_anchors_goes_to_the_same_one():
    peer, case, work = peer_of("torchvision"), CASES["SSD"], replace(WORK, batch=16, size=640, classes=1)
    expected = run(case.bind(case.build(work.classes, "torch"), work, DEVICE), case, work)
    assert_same(run(peer.loss(case, work, DEVICE), case, work), expected, 1e-5)


def test_there_is_an_image_without_objects():
    assert replace(WORK, seed=EMPTY).targets()[:, 0].unique().tolist() == [1, 2]


@pytest.mark.parametrize(("name", "case"), COMPUTED)
def test_layouts_forms_and_precisions_are_of_one_loss(name, case):
    peer, case = peer_of(name), CASES[case]
    expected = run(peer.loss(case, WORK, DEVICE), case, WORK)[0]
    for layout in case.layouts:
        for form in ("packed", "Targets"):
            work = replace(WORK, layout=layout, form=form)
            torch.testing.assert_close(run(peer.loss(case, work, DEVICE), case, work)[0], expected, rtol=1e-6, atol=0)
    half = replace(WORK, dtype="bfloat16")
    found, grads = run(peer.loss(case, half, DEVICE), case, half)
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=0)
    assert all(grad.dtype == torch.bfloat16 and grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize(("name", "case"), COMPUTED)
def test_without_any_object(name, case, monkeypatch):
    peer, case = peer_of(name), CASES[case]
    monkeypatch.setattr(Workload, "targets", lambda self, device="cpu": torch.zeros(0, 6, device=device))
    found = run(peer.loss(case, WORK, DEVICE), case, WORK)
    assert found[0].isfinite()
    assert_same(found, run(case.bind(case.build(5, "torch"), WORK, DEVICE), case, WORK), 1e-5)


@pytest.mark.parametrize(("name", "case"), COMPUTED)
def test_a_step_of_a_peer_is_counted(name, case):
    counts = measure.count_step(CASES[case], replace(WORK, batch=2), peer_of(name).name)
    assert counts.triton_launches == 0
    assert counts.launches > 50
    assert counts.syncs > 0
    assert counts.bytes > 2 * CASES[case].prediction_bytes(replace(WORK, batch=2))


# ------------------------------------------------------------------------------------------------ what is not installed


def absent(name, module):
    return peers.Peer(name, module, ("YOLOv5",), None)


def test_a_package_that_is_not_installed_says_so():
    assert absent("not-there", "not_there.loss").missing() == "not-there is not installed"


@pytest.mark.parametrize(
    ("name", "source", "reason"),
    [
        ("lacking", "import not_there_either", "ModuleNotFoundError: No module named 'not_there_either'"),
        ("broken", "raise RuntimeError('a library\\nand more')", "RuntimeError: a library"),
        ("leaving", "raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_a_package_that_breaks_says_why(name, source, reason, tmp_path, monkeypatch):
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(peers, "torchvision", lambda: None)
    assert absent(name, name).missing() == reason


def test_importing_a_package_changes_no_environment_and_prints_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "loud.py").write_text("import os\nprint(os.environ['YOLO_OFFLINE'])\nos.environ['LOUD'] = '1'\n")
    monkeypatch.delenv("YOLO_OFFLINE", raising=False)  # other tests may have set it
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(peers, "torchvision", lambda: None)
    assert absent("loud", "loud").missing() == ""
    assert "LOUD" not in os.environ
    assert "YOLO_OFFLINE" not in os.environ
    assert capsys.readouterr() == ("", "true\n")
    del sys.modules["loud"]


def test_peers_of_a_case_are_the_installed_ones(monkeypatch):
    monkeypatch.setattr(peers, "_why_not", lambda package, *_: "" if package == "yolov5" else "no")
    assert [peer.name for peer in peers.of(CASES["YOLOv5"])] == ["yolov5"]
    assert peers.of(CASES["RetinaNet"]) == peers.of(CASES["YOLOv1/paper"]) == []


def test_every_case_of_a_peer_exists():
    assert all(CASES[name].name == name for _, name in COMPUTED)
