"""YOLOv2Loss: the formula of its "region" recipe, written here; the warm-up; several scales; compilation."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from conftest import DEVICE
from formulas import plain_iou

from fusedyolo import Targets, YOLOv2Loss

BACKENDS = ["torch", "triton"]
ANCHORS = [(1.25, 1.0), (2.5, 3.0), (0.5, 2.0)]  # in cells
HEIGHT, WIDTH, CLASSES = 3, 4, 3


def f32(value):
    """A constant as the losses hold it."""
    return float(np.float32(value))


def make_pred(batch=2, classes=CLASSES, seed=0, dtype=torch.float64, size=(HEIGHT, WIDTH), scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, len(ANCHORS), *size, 5 + classes)
    pred = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    return pred.to(DEVICE, dtype).requires_grad_()


def make_rows(n=7, batch=2, classes=CLASSES, seed=0):
    """Objects, the last two of them on the prediction of the first, the one before the last of its very shape."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(n, 6, generator=generator)
    rows[:, 0] = torch.arange(n) % batch
    rows[:, 1] = torch.randint(classes, (n,), generator=generator)
    rows[:, 2:4] = 0.02 + 0.96 * rows[:, 2:4]
    sides = torch.tensor(ANCHORS)[torch.randint(3, (n,), generator=generator)] / torch.tensor([WIDTH, HEIGHT])
    rows[:, 4:] = sides * (0.8 + 0.4 * rows[:, 4:])
    if n > 2:
        rows[-2:] = rows[0]
        rows[-2:, 1] = (rows[0, 1] + torch.tensor([1.0, 2.0])) % classes
        rows[-1, 4:] *= 1.05
    return rows.to(DEVICE)


# The formula, in float64.


def region(pred, rows, lambda_coord=5.0, lambda_obj=1.0, lambda_noobj=0.5, lambda_class=1.0, thresh=0.6):
    """Parts of the formula for pred [B, A, H, W, 5 + C], the predictions with an object, and how many are left out."""
    batch, _, height, width, _ = pred.shape
    owner = {}
    truths = {b: [] for b in range(batch)}
    for row in rows.cpu().double():
        image, label, g = int(row[0]), int(row[1]), row[2:] * torch.tensor([width, height, width, height])
        shapes = []
        for w, h in ANCHORS:
            inter = min(w, g[2].item()) * min(h, g[3].item())
            shapes.append(inter / (w * h + g[2].item() * g[3].item() - inter))
        truths[image].append(g)
        owner[image, shapes.index(max(shapes)), int(g[1]), int(g[0])] = (label, g)
    coord = cls = with_object = without = torch.zeros((), dtype=torch.float64)
    counted = 0
    for place in np.ndindex(*pred.shape[:4]):
        raw, (image, anchor, y, x) = pred[place], place
        w, h = ANCHORS[anchor]
        box = (raw[0].sigmoid() + x, raw[1].sigmoid() + y, w * raw[2].exp(), h * raw[3].exp())
        confidence = raw[4].sigmoid()
        if place in owner:
            label, g = owner[place]
            errors = (raw[0].sigmoid() - (g[0] - x), raw[1].sigmoid() - (g[1] - y))
            errors += (raw[2] - (g[2] / w).log(), raw[3] - (g[3] / h).log())
            coord = coord + sum(error**2 for error in errors)
            cls = cls - raw[5:].log_softmax(0)[label]
            with_object = with_object + (plain_iou(box, g) - confidence) ** 2
        elif max((plain_iou(box, g) for g in truths[image]), default=0.0) < thresh:
            without = without + confidence**2
            counted += 1
    n_obj, n_conf = max(len(owner), 1), max(len(owner) + counted, 1)
    parts = {
        "box": lambda_coord * coord / n_obj,
        "obj": (lambda_obj * with_object + lambda_noobj * without) / n_conf,
        "cls": lambda_class * cls / n_obj,
    }
    return parts, len(owner), pred[..., 0].numel() - len(owner) - counted


CASES = {
    "defaults": (CLASSES, 7, {}),
    "all but one left out": (CLASSES, 7, {"thresh": 0.125}),
    "one class": (1, 7, {"lambda_coord": 2.0}),
    "everything set": (
        CLASSES,
        7,
        {"lambda_coord": 0.5, "lambda_obj": 3.0, "lambda_noobj": 0.75, "lambda_class": 2.5, "thresh": 0.25},
    ),
    "no rows": (CLASSES, 0, {}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_the_formula(name, backend):
    classes, n, hyp = CASES[name]
    rows = make_rows(n, classes=classes)
    exact = make_pred(classes=classes, scale=0.5).detach().cpu().requires_grad_()
    parts, positives, left_out = region(exact, rows, **hyp)
    (want,) = torch.autograd.grad(sum(parts.values()), exact)
    assert positives == max(n - 2, 0)
    assert (left_out > 2) == ("thresh" in hyp)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        pred = exact.detach().to(DEVICE, dtype).requires_grad_()
        out = YOLOv2Loss(ANCHORS, classes, backend=backend, **hyp)(pred, rows)
        assert (out.num_pos, out.num_invalid) == (positives, 0)
        for part, value in parts.items():
            torch.testing.assert_close(out.parts[part].double().cpu(), value.detach(), rtol=tolerance, atol=0)
        torch.testing.assert_close(out.total.double().cpu(), sum(parts.values()), rtol=tolerance, atol=0)
        (grad,) = torch.autograd.grad(out.total, pred)
        assert (grad.double().cpu() - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_overlap_of_thresh_itself_is_left_out(dtype, backend):
    """The object is the second anchor; the first, of twice its area, overlaps it by one half."""
    pred = torch.zeros(1, 2, 1, 1, 6, dtype=dtype, device=DEVICE, requires_grad=True)
    rows = torch.tensor([[0, 0, 0.5, 0.5, 0.5, 0.5]], device=DEVICE)
    anchors = [(1.0, 0.5), (0.5, 0.5)]
    above = float(np.nextafter(np.float32(0.5), np.float32(1)))
    for thresh, n_conf in ((0.5, 1), (above, 2)):
        out = YOLOv2Loss(anchors, 1, 32, thresh=thresh, backend=backend)(pred, rows)
        (grad,) = torch.autograd.grad(out.total, pred)
        assert (grad[0, 0, 0, 0, 4] != 0) == (n_conf == 2)
        # both confidences are one half, the IoU of the second prediction is 1
        wanted = (0.25 + 0.5 * 0.25 * (n_conf - 1)) / n_conf
        torch.testing.assert_close(out.parts["obj"].item(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_of_several_objects_stays(backend):
    """What the earlier ones leave is that of rows that are not there, but for the mask of the no-object term."""
    criterion = YOLOv2Loss(ANCHORS, CLASSES, recipe="darknet", thresh=1.0, backend=backend)
    pred, rows = make_pred(batch=1), make_rows(3, batch=1)
    for order in ((0, 1, 2), (2, 1, 0)):
        both, alone = (criterion(pred, rows[list(pick)]) for pick in (order, order[2:]))
        assert both.num_pos == alone.num_pos == 1
        torch.testing.assert_close(both.total, alone.total, rtol=1e-12, atol=0)
        grads = [torch.autograd.grad(out.total, pred)[0] for out in (both, alone)]
        assert torch.equal(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_form_of_targets_and_both_layouts(backend):
    criterion = YOLOv2Loss(ANCHORS, CLASSES, backend=backend)
    pred, rows = make_pred(dtype=torch.float32), make_rows(6)
    want = criterion(pred, rows)
    padded = torch.zeros(2, 5, 5, device=DEVICE)
    for b in range(2):
        own = rows[rows[:, 0] == b]
        padded[b, 1 : 1 + len(own)] = own[:, 1:]
    flat = pred.detach().permute(0, 1, 4, 2, 3).flatten(1, 2)
    inputs = [
        (flat.contiguous(), padded),
        (flat.contiguous(memory_format=torch.channels_last), Targets.from_packed(rows, 2, 9)),
    ]
    for other, targets in inputs:
        out = criterion(other, targets)
        torch.testing.assert_close(out.total, want.total, rtol=1e-6, atol=0)
        assert (out.num_pos, out.num_invalid) == (want.num_pos, 0)


# The other recipes: warm-up, reduction, scales.

SCALES = [[(1.0, 1.5), (2.0, 1.0)], [(1.5, 1.5), (3.0, 2.0)], [(0.5, 0.5)]]


def prior(pred):
    """Of every prediction: squares of what keeps it from the middle of its cell and its anchor's size."""
    return (pred[..., :2].sigmoid() - 0.5).square().sum(-1) + pred[..., 2:4].square().sum(-1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("recipe", ["darknet", "lightnet"])
def test_warm_up(recipe, backend):
    criterion = YOLOv2Loss(ANCHORS, CLASSES, recipe=recipe, backend=backend, coord_prefill=7, coord_scale=0.5)
    pred, rows = make_pred(), make_rows()
    criterion.eval()
    plain = criterion(pred, rows)
    assert criterion.seen == 0
    criterion.train()
    _, places, _ = region(pred.detach().cpu(), rows)
    taken = torch.autograd.grad(plain.total, pred, retain_graph=True)[0][..., 0] != 0
    assert plain.num_pos == taken.sum() == places
    free = prior(pred)[~taken].sum()
    weight = 0.5 * f32(0.01) if recipe == "darknet" else 0.25 * (0.01 / 0.5) ** 0.5 / len(pred)
    warm = plain.total + weight * free
    outs = []
    for step in range(1, 6):
        outs.append(criterion(pred, rows))
        assert criterion.seen == 2 * step
    for seen, out in zip((2, 4, 6, 8, 10), outs, strict=True):
        want = warm if seen < 7 else plain.total
        torch.testing.assert_close(out.total, want, rtol=1e-7, atol=0)
        grads = [torch.autograd.grad(value, pred, retain_graph=True)[0] for value in (out.total, want)]
        torch.testing.assert_close(*grads, rtol=0, atol=1e-7 * grads[1].abs().max().item())
    assert torch.equal(outs[3].total, plain.total)


@pytest.mark.parametrize("backend", BACKENDS)
def test_warm_up_towards_the_ciou_of_lightnet(backend):
    """Every prediction without an object is drawn to a box without size; the mask's value is no weight there."""
    arguments = {"recipe": "lightnet", "coord_regression": "ciou", "coord_prefill": 100, "coord_scale": 0.5}
    criterion = YOLOv2Loss(ANCHORS, CLASSES, backend=backend, **arguments)
    pred = make_pred(batch=1)
    raw = pred.detach()
    sides = torch.tensor(ANCHORS, dtype=torch.float64, device=DEVICE)[:, None, None] * raw[..., 2:4].exp()
    rho = (raw[..., :2].sigmoid() - 0.5).square().sum(-1)
    edges = (raw[..., :2].sigmoid() - 0.5).abs()
    hull = torch.maximum(edges + sides / 2, torch.zeros_like(sides)) + torch.maximum(sides / 2 - edges, 0 * sides)
    spread = rho / hull.square().sum(-1)
    # atan(0 / eps) is 0, the IoU is 0
    v = 4 / torch.pi**2 * torch.atan(sides[..., 0] / sides[..., 1]) ** 2
    want = 0.5 * (1 - torch.clamp(-spread + v * v / (1 + v), -1, 1)).sum()
    torch.testing.assert_close(criterion(pred, torch.zeros(0, 6, device=DEVICE)).parts["box"], want, rtol=1e-6, atol=0)


def test_a_model_with_a_loss_loads_strictly():
    """Images seen are saved where they count, and a checkpoint without them, of a model without the loss, is whole."""
    layer, warm = torch.nn.Linear(2, 2), YOLOv2Loss(ANCHORS, CLASSES, recipe="darknet")
    loss = YOLOv2Loss(ANCHORS, CLASSES)
    assert not loss.state_dict()
    for criterion in (loss, warm):
        model = torch.nn.ModuleDict({"layer": layer, "loss": criterion})
        assert model.load_state_dict({f"layer.{name}": value for name, value in layer.state_dict().items()}) == ([], [])
        with pytest.raises(RuntimeError, match=r"layer\.weight"):
            model.load_state_dict({})


@pytest.mark.parametrize("recipe", ["darknet", "lightnet"])
def test_images_seen_are_saved(recipe):
    def fresh(**changes):
        return YOLOv2Loss(ANCHORS, CLASSES, recipe=recipe, backend="torch", **changes)

    criterion, pred, rows = fresh(), make_pred(), make_rows()
    assert criterion.seen == 0
    for _ in range(3):
        criterion(pred, rows)
    other = fresh()
    other.load_state_dict(criterion.state_dict())
    assert other.seen == criterion.seen == 6
    whole = torch.nn.ModuleDict({"loss": fresh()})
    whole.load_state_dict(torch.nn.ModuleDict({"loss": criterion}).state_dict())
    assert whole["loss"].seen == 6
    assert copy.deepcopy(criterion).seen == 6
    (state,) = criterion.state_dict().values()  # which averages of weights ask for a type and a shape
    assert (state.dtype, state.shape, int(state)) == (torch.int64, (), 6)
    other.load_state_dict({"_extra_state": {"seen": 8}})  # of an earlier checkpoint
    assert other.seen == 8
    assert "seen=6" in repr(criterion)
    # darknet counts the batch before it begins: 12798 + 2 is past the warm-up
    totals = {}
    for seen in (0, 12797, 12798, 12800):
        criterion.seen = seen
        totals[seen] = criterion(pred, rows).total.item()
        assert criterion.seen == seen + 2
    assert totals[0] == totals[12797] > totals[12798] == totals[12800]


def test_the_region_recipe_has_no_warm_up():
    criterion, pred, rows = YOLOv2Loss(ANCHORS, CLASSES, backend="torch"), make_pred(), make_rows()
    assert criterion(pred, rows).total == criterion.eval()(pred, rows).total


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("warm", [False, True])
def test_several_scales_are_single_ones_over_their_number_less_one(warm, backend):
    strides, arguments = (8, 16, 32), {"recipe": "lightnet", "backend": backend, "coord_prefill": 4 * warm}
    generator = torch.Generator().manual_seed(0)
    preds = [
        torch.randn(1, len(own) * (5 + CLASSES), 32 // s, 64 // s, generator=generator, dtype=torch.float64)
        for s, own in zip(strides, SCALES, strict=True)
    ]
    preds = [pred.to(DEVICE).requires_grad_() for pred in preds]
    rows = make_rows(3, batch=1)
    criterion = YOLOv2Loss(SCALES, CLASSES, strides, **arguments)
    out = criterion(preds, rows)
    assert criterion.seen == int(warm)  # a batch counts once, where there is a warm-up
    singles = [
        YOLOv2Loss(own, CLASSES, s, **arguments)(pred, rows)
        for s, own, pred in zip(strides, SCALES, preds, strict=True)
    ]
    total = sum(single.total for single in singles) / 2
    torch.testing.assert_close(out.total, total, rtol=1e-7, atol=0)
    assert out.num_pos == sum(single.num_pos for single in singles)
    for part in ("box", "obj", "cls"):
        want = sum(single.parts[part] for single in singles) / 2
        torch.testing.assert_close(out.parts[part], want, rtol=1e-7, atol=0)
    for a, b in zip(torch.autograd.grad(out.total, preds), torch.autograd.grad(total, preds), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7 * b.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_reduction_of_darknet(backend):
    pred, rows = make_pred(), make_rows()
    arguments = {"recipe": "darknet", "backend": backend}
    one, two = (YOLOv2Loss(ANCHORS, CLASSES, reduction=name, **arguments)(pred, rows) for name in ("sum", "mean"))
    assert one.total == YOLOv2Loss(ANCHORS, CLASSES, **arguments)(pred, rows).total
    torch.testing.assert_close(two.total, one.total / 2, rtol=1e-7, atol=0)
    for part in ("box", "obj", "cls"):
        torch.testing.assert_close(two.parts[part], one.parts[part] / 2, rtol=1e-7, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("recipe", ["region", "darknet", "lightnet"])
def test_a_single_class_has_no_class_loss(recipe, backend):
    """The softmax of one logit is 1."""
    criterion = YOLOv2Loss(ANCHORS, 1, recipe=recipe, backend=backend)
    pred = make_pred(classes=1)
    out = criterion(pred, make_rows(classes=1))
    assert out.parts["cls"] == 0
    assert (torch.autograd.grad(out.total, pred)[0][..., 5] == 0).all()


@pytest.mark.parametrize("rescore", [0, 1])
def test_both_backends_agree(rescore):
    rows = make_rows()
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        pred = make_pred(dtype=dtype)
        outs = [
            YOLOv2Loss(ANCHORS, CLASSES, recipe="darknet", rescore=rescore, thresh=0.3, backend=backend)(pred, rows)
            for backend in BACKENDS
        ]
        torch.testing.assert_close(outs[0].total, outs[1].total, rtol=tolerance, atol=0)
        grads = [torch.autograd.grad(out.total, pred)[0] for out in outs]
        assert (grads[0] - grads[1]).abs().max() <= tolerance * grads[0].abs().max()


# Compilation.


def compiled_and_not(recipe, steps):
    """Runs a loss compiled and as it is; yields after each step what was compiled so far."""
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    criterion = YOLOv2Loss([(1.0, 1.0)], 2, recipe=recipe, backend="triton")
    twin = copy.deepcopy(criterion)
    compiled = torch.compile(criterion, fullgraph=True, backend=counter)
    pred = torch.randn(1, 7, 1, 2, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
    rows = torch.tensor([[0, 1, 0.3, 0.3, 0.5, 0.5], [0, 0, 0.6, 0.6, 0.5, 0.7]], device=DEVICE)
    for seen, training in steps:
        for module in (criterion, twin):
            module.train(training)
            module.seen = module.seen if seen is None else seen
        assert torch.equal(compiled(pred, rows).total, twin(pred, rows).total)
        assert criterion.seen == twin.seen
    return counter.frame_count, criterion.seen


def test_training_compiles_a_few_times():
    """``seen`` changes at each step; torch.compile must be told not to take integers of modules for constants."""
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True):
        frames, seen = compiled_and_not("darknet", [(None, True)] * 10 + [(20000, True), (None, True)])
    assert seen == 20002
    assert frames <= 3  # a number, a symbol, and past the warm-up


def test_without_a_warm_up_training_compiles_once():
    assert compiled_and_not("region", [(None, True)] * 10) == (1, 0)


def test_evaluation_compiles_once():
    frames, seen = compiled_and_not("darknet", [(None, False)] * 10)
    assert (frames, seen) == (1, 0)
