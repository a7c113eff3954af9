"""Several processes: their mean is the loss of the whole batch; a process without objects neither waits nor counts."""

from __future__ import annotations

import io
import multiprocessing
import tempfile
import threading
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import DEVICE
from torch import Tensor, nn
from trust.cases import ALL, BACKENDS, CASES, Problem, step

import fusedyolo
from fusedyolo.distributed import GlobalLoss

PARTS = {2: (1, 3), 4: (1, 1, 1, 1)}  # images of each process
WHOLE = {case.name: Problem(case, batch=4) for case in CASES.values()}
OTHERS = {  # that divide otherwise
    "YOLOv3 level by level": ("YOLOv3/paper", {"reduction": "level"}),
    "YOLOv4 of images": ("YOLOv4/paper", {"reduction": "mean"}),
    "RetinaNet of mmdet": ("RetinaNet", {"recipe": "mmdet"}),
    "RetinaNet of the batch": ("RetinaNet", {"normalizer": "batch"}),
    "FCOS of mmdet": ("FCOS", {"recipe": "mmdet"}),
    "E2E of v10": ("E2E/yolo26", {"recipe": "yolov10", "reg_max": 4}),
}

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="gloo and forks, of a CPU")
WHOLE |= {name: Problem(CASES[case], batch=4, options=options) for name, (case, options) in OTHERS.items()}


def objects(problem: Problem) -> Tensor:
    """Of all images but the first, which one process has for itself."""
    rows = problem.rows(9, seed=2)
    rows[:, 0] = 1 + rows[:, 0] % 3
    return rows


def own_part(name: str, rank: int, size: int) -> tuple[Problem, list[Tensor], Tensor, slice]:
    """What a process has of the batch."""
    whole = WHOLE[name]
    first = sum(PARTS[size][:rank])
    images = slice(first, first + PARTS[size][rank])
    rows = objects(whole)
    rows = rows[(rows[:, 0] >= images.start) & (rows[:, 0] < images.stop)]
    rows[:, 0] -= first
    preds = [pred.detach()[images].requires_grad_() for pred in whole.predictions()]
    return replace(whole, batch=images.stop - images.start), preds, rows, images


def losses(backend: str, rank: int, size: int) -> dict[str, Any]:
    """Of each loss the total and the gradients by what the process has."""
    found = {}
    for name in WHOLE:
        problem, preds, rows, _ = own_part(name, rank, size)
        criterion = GlobalLoss(problem.criterion(backend))
        result = step(lambda p, t: criterion(problem.pack(p), t, **problem.geometry), preds, rows)  # noqa: B023
        found[name] = (result.total, list(result.parts.values()), result.grads, result.counts)
    return found


def wrapped(rank: int, size: int) -> dict[str, Any]:
    """A step of a network that DistributedDataParallel, or fully_shard, has around it: all of its gradients."""
    from torch.distributed.fsdp import fully_shard

    name = "FCOS"
    found = {}
    for wrap in (nn.parallel.DistributedDataParallel, fully_shard):
        network, (problem, preds, rows, _) = network_of(name), own_part(name, rank, size)
        model, criterion = wrap(network), GlobalLoss(problem.criterion("torch"))
        criterion(model(preds), rows, **problem.geometry).total.backward()
        grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
        found[wrap.__name__] = grads
    return found


class Scaled(nn.Module):
    """A network: each prediction times a parameter for each channel."""

    def __init__(self, preds: list[Tensor]):
        super().__init__()
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(pred.shape[-1])) for pred in preds)

    def forward(self, preds: list[Tensor]) -> list[Tensor]:
        return [pred.detach() * scale for pred, scale in zip(preds, self.scales, strict=True)]


def network_of(name: str) -> Scaled:
    return Scaled(WHOLE[name].predictions())


def _work(rank: int, size: int, where: str, connection: Any, work: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{where}", rank=rank, world_size=size)
    try:
        stored = io.BytesIO()
        torch.save(work(rank, size), stored)  # a tensor that is sent as such lives no longer than its process
        connection.send_bytes(stored.getvalue())
    finally:
        dist.destroy_process_group()


def run(size: int, work: Any) -> list[dict[str, Any]]:
    """What ``work`` returns in each of so many processes, copies of this one."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pairs = [context.Pipe(duplex=False) for _ in range(size)]
        processes = [
            context.Process(target=_work, args=(rank, size, f"{folder}/store", pairs[rank][1], work))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        try:
            found = []
            for receive, _ in pairs:
                assert receive.poll(120), "a process hangs"
                found.append(torch.load(io.BytesIO(receive.recv_bytes())))
        finally:
            for process in processes:
                process.join(5)
                process.kill()
    return found


RUNS = [(size, backend) for size in PARTS for backend in ("torch", "triton")]


@pytest.fixture(scope="module", params=RUNS, ids=lambda run: f"{run[0]}-{run[1]}")
def results(request):
    """Of each process."""
    size, backend = request.param
    return run(size, partial(losses, backend))


@pytest.mark.parametrize("name", WHOLE)
def test_the_mean_over_processes_is_the_loss_of_the_batch(name, results):
    size, whole = len(results), WHOLE[name]
    want = step(whole.bind("torch"), whole.predictions(), objects(whole))
    totals, parts, _, counts = zip(*(found[name] for found in results), strict=True)
    torch.testing.assert_close(sum(totals) / size, want.total, rtol=1e-5, atol=0)
    for each, part in zip(zip(*parts, strict=True), want.parts.values(), strict=True):
        torch.testing.assert_close(sum(each) / size, part, rtol=1e-5, atol=1e-6)
    assert counts[0][0] == 0  # of this process's images none has an object
    assert sum(positives for positives, _ in counts) == want.counts[0] > 0
    for rank, found in enumerate(results):
        images = own_part(name, rank, size)[-1]
        for got, grad in zip(found[name][2], want.grads, strict=True):
            torch.testing.assert_close(got / size, grad[images], rtol=1e-4, atol=1e-7)


@BACKENDS
@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("count", [0, 2])
def test_amounts_add_up(count, name, backend):
    """Even where the objects of a process, or their soft scores, are too few to be divided by."""
    whole = WHOLE[name]
    rows, preds = whole.rows(count, seed=2), [pred.detach() for pred in whole.predictions()]
    criterion = whole.criterion(backend)
    every = criterion.apart(whole.pack(preds), rows, **whole.geometry)
    amounts, pieces = 0.0, 0.0
    for image in range(4):
        own = replace(whole, batch=1)
        mine = rows[rows[:, 0] == image].clone()
        mine[:, 0] = 0
        found = criterion.apart(own.pack([pred[image : image + 1] for pred in preds]), mine, **own.geometry)
        amounts, pieces = amounts + found.amounts, pieces + found.pieces / found.shares(found.amounts)
    torch.testing.assert_close(amounts, every.amounts, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close((pieces * every.shares(amounts)).float(), every.pieces, rtol=1e-5, atol=1e-6)


def test_networks_in_wrappers_have_the_gradient_of_the_batch():
    """DistributedDataParallel and FSDP, which average over processes."""
    whole, network = WHOLE["FCOS"], network_of("FCOS")
    loss = whole.bind("torch")
    loss(network(whole.predictions()), objects(whole)).total.backward()
    for found in run(2, wrapped):
        assert set(found) == {"DistributedDataParallel", "fully_shard"}
        for grads in found.values():
            for got, parameter in zip(grads, network.parameters(), strict=True):
                torch.testing.assert_close(got, parameter.grad, rtol=1e-5, atol=1e-7)


def test_what_is_no_loss_of_a_batch_is_refused():
    with pytest.raises(ValueError, match=r"^criterion: FCOSLoss with reduction='none', want a loss of the whole batch"):
        GlobalLoss(fusedyolo.FCOSLoss(3, reduction="none"))
    with pytest.raises(ValueError, match=r"^criterion: .*Linear.*, want a loss of fusedyolo"):
        GlobalLoss(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"^criterion: .*, want a loss of fusedyolo"):
        GlobalLoss(fusedyolo.FCOSLoss)


def test_what_takes_a_loss_says_that_it_is_inside():
    criterion = GlobalLoss(fusedyolo.FCOSLoss(3))
    for call in (fusedyolo.decode, fusedyolo.select):
        with pytest.raises(ValueError, match=r"^criterion: a GlobalLoss, want its \.criterion$"):
            call([], criterion)
    with pytest.raises(ValueError, match=r"^criterion: a GlobalLoss, want its \.criterion$"):
        fusedyolo.assign(criterion, [], [])
    with pytest.raises(ValueError, match=r"^num_classes: a GlobalLoss, want a number, or its \.criterion$"):
        fusedyolo.Targets.from_packed(torch.zeros(0, 6), 1).validate(criterion)


@pytest.mark.parametrize("name", CASES)
def test_without_processes_a_loss_is_itself(name):
    problem = Problem(CASES[name])
    criterion = GlobalLoss(problem.criterion("torch"))
    preds, rows = problem.predictions(), problem.rows(5)
    got = step(lambda p, t: criterion(problem.pack(p), t, **problem.geometry), preds, rows)
    assert torch.equal(got.total, step(problem.bind("torch"), preds, rows).total)


@ALL
def test_threads_share_nothing(case):
    """As those of DataParallel: one module, called by several at a time."""
    problem = Problem(case)
    loss, rows = problem.bind("torch"), problem.rows(5)
    want = step(loss, problem.predictions(), rows)
    found: list[Any] = [None] * 4

    def work(i: int) -> None:
        found[i] = step(loss, problem.predictions(), rows)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got in found:
        assert all(map(torch.equal, got.tensors, want.tensors))
