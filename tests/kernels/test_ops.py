"""What PyTorch expects of an operator: opcheck, torch.compile, autograd's corners."""

from __future__ import annotations

from dataclasses import replace

import pytest
import test_grid
import torch
import torch._dynamo.testing
from conftest import DEVICE
from test_grid import make_preds, make_rows, sort_rows

import fusedyolo
from fusedyolo import ops
from fusedyolo.ops.grid import GridOutputs

ANCHORS = [[(10, 13)], [(30, 61)]]
HEAD, DARKNET = (replace(head, levels=((0,), (3,))) for head in (test_grid.HEAD, test_grid.DARKNET))
SMOOTH = replace(HEAD, smooth=(True, False))


def small_preds(**kw):
    return [p[:, : p.shape[1] // 3] for p in make_preds(size=(32, 32), batch=1, **kw)]  # an anchor a level


def make_criterion(**kw):
    return fusedyolo.YOLOv4Loss(ANCHORS, (8, 16), 3, backend="triton", **kw)


def make_v5(**kw):
    return fusedyolo.YOLOv5Loss([[(12, 16)], [(30, 40)]], (8, 16), 3, backend="triton", **kw)


@pytest.fixture
def cleared(monkeypatch):
    """Memory comes as zeros: a launch leaves alone what the gradient will not read, and opcheck compares it all."""
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)


def test_opcheck_loss(cleared):
    preds = [p.requires_grad_() for p in small_preds()]
    rows = make_rows(batch=1, n=3)
    torch.library.opcheck(ops.grid_loss, (preds, rows, None, None, HEAD.key, True, []))
    sorted_rows, offsets = sort_rows(rows, 1)
    weights = torch.ones(3, device=DEVICE)
    torch.library.opcheck(ops.grid_loss, (preds, sorted_rows, offsets, weights, DARKNET.key, True, []))
    torch.library.opcheck(ops.grid_loss, (preds, rows, None, None, SMOOTH.key, True, []))
    torch.library.opcheck(ops.grid_loss, (small_preds(), rows, None, None, HEAD.key, False, []))


@pytest.mark.parametrize("make", [lambda: make_v5(), lambda: fusedyolo.YOLOv2Loss([(1, 2)], 3, 8)])
def test_opcheck_of_losses_with_means(make, cleared):
    """Of a row whose gradient takes the means from the loss launch."""
    head = make().head
    preds = [p.requires_grad_() for p in small_preds()[: len(head.levels)]]
    rows = make_rows(batch=1, n=2, invalid=1)
    torch.library.opcheck(ops.grid_loss, (preds, rows, None, None, head.key, True, []))


def test_opcheck_gradient():
    preds = small_preds()
    rows = make_rows(batch=1, n=3)
    one = torch.ones((), device=DEVICE)
    for key in (HEAD.key, SMOOTH.key):
        outputs = GridOutputs(*ops.grid_loss(preds, rows, None, None, key, True, []))
        saved = (outputs.parts, outputs.state, outputs.kept, outputs.true_obj)
        torch.library.opcheck(ops.grid_loss_grad, (one, preds, *saved, key))


def test_opcheck_pointwise():
    x = torch.randn(7, 3, device=DEVICE, requires_grad=True)
    t = torch.rand(7, 3, device=DEVICE)
    boxes = torch.rand(2, 9, 2, 2, device=DEVICE).sort(2).values.flatten(2)
    p, g = (b.clone().requires_grad_() for b in boxes)
    for reduction in ("none", "mean"):
        torch.library.opcheck(ops.label_loss, (x, t, "focal", [0.25, 2.0], reduction))
        torch.library.opcheck(ops.box_loss, (p, g, "ciou", [1e-7, 1e-7], reduction))


@pytest.mark.parametrize("make", [make_criterion, make_v5])
def test_compiled_is_eager_and_object_counts_do_not_recompile(make):
    criterion = make()

    def step(preds, targets):
        out = criterion(preds, targets)
        return out.total, out.parts["box"], out.num_pos

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for n in (3, 5, 0, 9) if make is make_criterion else (2, 3, 0, 4):
        packed = make_rows(batch=1, n=n, invalid=1)
        targets = fusedyolo.Targets.from_packed(packed, batch_size=1, capacity=32)
        mine = [p.requires_grad_() for p in small_preds()]
        theirs = [p.requires_grad_() for p in small_preds()]
        got = compiled(mine, targets)
        want = step(theirs, targets)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
        got[0].backward()
        want[0].backward()
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a.grad, b.grad)
    assert counter.frame_count == 1


@pytest.mark.parametrize("make", [make_criterion, make_v5])
def test_packed_rows_become_dynamic_after_one_recompile(make):
    """The places that are allocated, min(predictions, rows times so many), are a symbol then."""
    criterion = make()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda preds, rows: criterion(preds, rows).total, fullgraph=True, backend=counter)
    for n in (3, 5, 1, 9) if make is make_criterion else (2, 3, 5):
        rows = make_rows(batch=1, n=n, invalid=1)
        mine, theirs = ([p.requires_grad_() for p in small_preds()] for _ in range(2))
        got, want = compiled(mine, rows), criterion(theirs, rows).total
        assert torch.equal(got, want)
        for a, b in zip(torch.autograd.grad(got, mine), torch.autograd.grad(want, theirs), strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("make", [make_criterion, make_v5])
def test_double_backward_says_what_to_do(make):
    preds = [p.requires_grad_() for p in small_preds()]
    total = make()(preds, make_rows(batch=1, n=3)).total
    grads = torch.autograd.grad(total, preds, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"double backward is not supported; use backend='torch'"):
        grads[0].sum().backward()


def test_a_map_without_grad_is_allowed():
    first, second = small_preds()
    second.requires_grad_()
    out = make_criterion()([first, second], make_rows(batch=1, n=3))
    out.total.backward()
    assert first.grad is None
    assert second.grad.abs().sum() > 0


def test_changing_a_prediction_before_backward_is_caught():
    preds = [p.requires_grad_() for p in small_preds()]
    inner = [p * 1 for p in preds]
    total = make_criterion()(inner, make_rows(batch=1, n=3)).total
    inner[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_grad_scaler_under_autocast_sees_finite_gradients():
    """fp16 predictions, loss scaled by 2^16: the scale reaches the gradient inside the kernel, before rounding."""
    scale = 2.0**16
    rows = make_rows(batch=1, n=3)
    half = [(p * 4).to(torch.float16).requires_grad_() for p in small_preds()]
    full = [p.detach().double().requires_grad_() for p in half]
    with torch.autocast(DEVICE, dtype=torch.float16 if DEVICE == "cuda" else torch.bfloat16):
        out = make_criterion(reduction="mean")(half, rows)
    assert out.total.dtype == torch.float32
    (out.total * scale).backward()
    make_criterion(reduction="mean")(full, rows).total.mul(scale).backward()
    for a, b in zip(half, full, strict=True):
        kept = b.grad.abs() < torch.finfo(torch.float16).max
        torch.testing.assert_close(a.grad[kept].double(), b.grad[kept], rtol=1e-3, atol=6e-8)


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_cuda_graph():
    criterion = make_criterion()
    preds = [p.requires_grad_() for p in small_preds()]
    packed = make_rows(batch=1, n=3)
    targets = fusedyolo.Targets.from_packed(packed, batch_size=1, capacity=32)
    want = criterion(preds, targets).total
    wanted = torch.autograd.grad(want, preds)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = criterion(preds, targets).total
        grads = torch.autograd.grad(total, preds)
    for _ in range(3):
        graph.replay()
        assert torch.equal(total, want)
        for a, b in zip(grads, wanted, strict=True):
            assert torch.equal(a, b)
