"""YOLOv5Loss and ScaledYOLOv4Loss against their description, written here with explicit lists of assignments."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from conftest import DEVICE
from formulas import box_term, label_term

from fusedyolo import ScaledYOLOv4Loss, Targets, YOLOv5Loss, reference
from fusedyolo.terms import term_names

BACKENDS = ["torch", "triton"]
STRIDES = (8, 16, 32, 64, 128)


def f32(value):
    """A constant as the losses hold it."""
    return float(np.float32(value))


# The description, in float64.


def modulated(hyp, weight, logits, targets):
    """Cross-entropy with a positive weight, focal with fl_gamma."""
    if hyp["fl_gamma"] == 0:
        return "bce", logits, targets, (hyp[weight],)
    return "focal", logits, targets, (0.25, hyp["fl_gamma"], hyp[weight])


def emitted(rows, width, height, anchors, anchor_t):
    """Assignments of one level in the order in which they count: (image, anchor, y, x, row); centres in float32."""
    found = []
    for kind in ("own", "left", "up", "right", "down"):
        for k, (aw, ah) in enumerate(anchors):
            for r, row in enumerate(rows):
                ratios = (float(row[4]) * width / aw, float(row[5]) * height / ah)
                if max(*ratios, *(1 / ratio for ratio in ratios)) >= anchor_t:
                    continue
                gx, gy = row[2] * np.float32(width), row[3] * np.float32(height)
                from_right, from_below = np.float32(width) - gx, np.float32(height) - gy
                near = {"own": None, "left": gx, "up": gy, "right": from_right, "down": from_below}[kind]
                if near is not None and not (near % 1 < 0.5 and near > 1):
                    continue
                ox, oy = {"left": (0.5, 0), "up": (0, 0.5), "right": (-0.5, 0), "down": (0, -0.5)}.get(kind, (0, 0))
                x, y = int(gx - np.float32(ox)), int(gy - np.float32(oy))
                found.append((int(row[0]), k, min(max(y, 0), height - 1), min(max(x, 0), width - 1), r))
    return found


V5 = {
    "gain": "box", "eps": f32(1e-7), "scales": lambda n: (1, 1, 1),
    "balance": lambda n: (4, 1, 0.4) if n == 3 else (4, 1, 0.25, 0.06, 0.02)[:n],
}  # fmt: skip
SCALED = {
    "gain": "giou", "eps": f32(1e-16), "scales": lambda n: (3 / n, 3 / n * (1.4 if n >= 4 else 1), 3 / n),
    "balance": lambda n: {3: (4, 1, 0.4), 4: (4, 1, 0.4, 0.1), 5: (4, 1, 0.5, 0.4, 0.1)}[n],
}  # fmt: skip
DEFAULTS = {
    "obj": 1, "cls": 0.5, "cls_pw": 1, "obj_pw": 1, "anchor_t": 4, "fl_gamma": 0, "gr": 1, "label_smoothing": 0,
    "iou_alpha": 1, "iou_gamma": 0,
}  # fmt: skip
PEERS = {YOLOv5Loss: V5, ScaledYOLOv4Loss: SCALED}


def described(detector, preds, rows, anchors, classes, iou_loss="ciou", **hyp):
    """Parts of the description for float64 maps [B, A, H, W, 5 + C], the places with an object, and what was met."""
    peer = PEERS[detector]
    hyp = {**DEFAULTS, peer["gain"]: 0.05} | hyp
    hyp = {name: f32(value) for name, value in hyp.items()}
    levels, batch = len(preds), preds[0].shape[0]
    box = obj = cls_part = torch.zeros((), dtype=torch.float64)
    positives, met = 0, {"rows": 0, "rewritten": 0, "empty levels": 0}
    table = rows.cpu().numpy()
    for level, pred in enumerate(preds):
        _, _, height, width, _ = pred.shape
        cells = [(w / STRIDES[level], h / STRIDES[level]) for w, h in anchors[level]]
        found = emitted(table, width, height, cells, hyp["anchor_t"])
        target = torch.zeros(pred.shape[:4], dtype=torch.float64)
        met["rows"] += len(found)
        met["empty levels"] += not found
        if found:
            image, anchor, y, x, r = torch.tensor(found).unbind(1)
            raw, truth = pred[image, anchor, y, x], rows.cpu().double()[r]
            size = torch.tensor([width, height], dtype=torch.float64)
            cell = torch.stack((x, y), 1)
            sides = torch.tensor(cells, dtype=torch.float64)[anchor]
            p = torch.cat((2 * raw[:, :2].sigmoid() - 0.5, (2 * raw[:, 2:4].sigmoid()) ** 2 * sides), 1)
            g = torch.cat((truth[:, 2:4] * size - cell, truth[:, 4:] * size), 1)
            boxes, eps = (p.unbind(-1), g.unbind(-1)), (peer["eps"], peer["eps"])
            value = 1 - box_term(iou_loss, *boxes, eps, size)
            box = box + box_term(iou_loss, *boxes, (*eps, hyp["iou_alpha"], hyp["iou_gamma"]), size).mean()
            if classes > 1:
                wanted = torch.full((len(found), classes), hyp["label_smoothing"] / 2, dtype=torch.float64)
                for i, k in enumerate(r.tolist()):
                    wanted[i, int(table[k, 1])] = 1 - hyp["label_smoothing"] / 2
                cls_part = cls_part + label_term(*modulated(hyp, "cls_pw", raw[:, 5:], wanted)).mean()
            places = set()
            for i, place in enumerate(zip(*(v.tolist() for v in (image, anchor, y, x)), strict=True)):
                met["rewritten"] += place in places
                places.add(place)
                target[place] = (1 - hyp["gr"]) + hyp["gr"] * value[i].detach().clamp(min=0)
            positives += len(places)
        term = label_term(*modulated(hyp, "obj_pw", pred[..., 4], target))
        obj = obj + f32(peer["balance"](levels)[level]) * term.mean()
    s = peer["scales"](levels)
    parts = (hyp[peer["gain"]] * s[0] * box, hyp["obj"] * s[1] * obj, hyp["cls"] * s[2] * cls_part)
    return dict(zip(("box", "obj", "cls"), (batch * part for part in parts), strict=True)), positives, met


# Cases.


def make_anchors(levels, na):
    shapes = [(1.2, 1.6), (3.0, 2.0), (1.5, 4.0), (4.5, 5.5)][:na]
    return [[(w * stride, h * stride) for w, h in shapes] for stride in STRIDES[:levels]]


def make_maps(levels, na, classes, batch=2, cells=(2, 3), scale=1.0, seed=0, dtype=torch.float64):
    """Maps [B, A, H, W, 5 + C]; ``cells`` is the height and width of the coarsest one."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for level in range(levels):
        height, width = (side << (levels - 1 - level) for side in cells)
        found.append(
            scale * torch.randn(batch, na, height, width, 5 + classes, generator=generator, dtype=torch.float64)
        )
    return [pred.to(DEVICE, dtype).requires_grad_() for pred in found]


def make_rows(pred, n, classes, seed=0, skip_image=None):
    """Objects in any order: on cell borders and middles of a map, in its corners, twice the same, and anywhere."""
    batch, _, height, width, _ = pred.shape
    generator = torch.Generator().manual_seed(seed + 100)
    rows = torch.rand(n, 6, generator=generator)
    rows[:, 0] = torch.randint(batch, (n,), generator=generator)
    rows[:, 1] = torch.randint(classes, (n,), generator=generator)
    rows[:, 4:] = torch.exp(rows[:, 4:] * 3.5 - 3.5)
    for i in range(0, n, 3):
        halves = (
            torch.randint(2 * width + 1, (1,), generator=generator),
            torch.randint(2 * height, (1,), generator=generator),
        )
        rows[i, 2], rows[i, 3] = halves[0].item() / (2 * width), halves[1].item() / (2 * height)
    if n > 4:
        rows[1, 2] = 1.0
        rows[2, 2:4] = torch.tensor([0.0, 1.0])
        rows[3, 4:] = 0.3
        rows[4] = rows[3]
        rows[4, 1] = (rows[3, 1] + 1) % classes
        rows[n - 1, [0, 2, 3]] = rows[3, [0, 2, 3]]
    if skip_image is not None:
        rows = rows[rows[:, 0] != skip_image]
    return rows.to(DEVICE)


ALL = {
    "obj": 0.75, "cls": 0.25, "cls_pw": 0.5, "obj_pw": 1.5, "anchor_t": 3.0, "fl_gamma": 1.5, "gr": 0.75,
}  # fmt: skip
# class, levels, anchors a level, classes, rows, other arguments
CASES = {
    "v5": (YOLOv5Loss, 3, 3, 4, 8, {}),
    "v5, one class": (YOLOv5Loss, 2, 2, 1, 7, {"box": 0.5}),
    "v5, one level": (YOLOv5Loss, 1, 4, 3, 8, {"label_smoothing": 0.125, "cls_pw": 2.0}),
    "v5, four levels": (YOLOv5Loss, 4, 1, 2, 6, {"obj_pw": 0.25}),
    "v5, five levels": (YOLOv5Loss, 5, 1, 2, 5, {"fl_gamma": 2.0}),
    "v5, everything set": (YOLOv5Loss, 2, 2, 3, 8, {"box": 0.125, "label_smoothing": 0.25, **ALL}),
    "v5, no rows": (YOLOv5Loss, 2, 2, 2, 0, {}),
    "scaled": (ScaledYOLOv4Loss, 3, 2, 3, 8, {}),
    "scaled, four levels": (ScaledYOLOv4Loss, 4, 1, 2, 6, {"giou": 0.25}),
    "scaled, five levels": (ScaledYOLOv4Loss, 5, 1, 1, 5, {"fl_gamma": 0.5}),
    "scaled, everything set": (ScaledYOLOv4Loss, 3, 1, 2, 7, {"giou": 0.125, **ALL}),
    "scaled, no rows": (ScaledYOLOv4Loss, 3, 1, 2, 0, {}),
}


def make_criterion(detector, levels, na, classes, backend="torch", **arguments):
    return detector(make_anchors(levels, na), STRIDES[:levels], classes, backend=backend, **arguments)


def compare(out, preds, parts, positives, tolerance=3e-7):
    """``out`` and its gradient against the description's; constants are rounded to float32."""
    total = sum(parts.values())
    assert (out.num_pos, out.num_invalid) == (positives, 0)
    for name, value in parts.items():
        assert not out.parts[name].requires_grad
        torch.testing.assert_close(out.parts[name].double().cpu(), value.detach(), rtol=tolerance, atol=0)
    torch.testing.assert_close(out.total.detach().double().cpu(), total.detach(), rtol=tolerance, atol=0)
    torch.testing.assert_close(sum(out.parts.values()), out.total.detach(), rtol=1e-6, atol=0)
    return torch.autograd.grad(out.total, preds)


def check(
    detector, case, backend, seed=0, dtype=torch.float64, tolerance=3e-7, batch=2, skip_image=None, iou_loss="ciou"
):
    _, levels, na, classes, n, hyp = case
    exact = [
        p.detach().cpu().double().requires_grad_()
        for p in make_maps(levels, na, classes, batch, seed=seed, dtype=dtype)
    ]
    rows = make_rows(exact[0], n, classes, seed, skip_image)
    parts, positives, met = described(detector, exact, rows, make_anchors(levels, na), classes, iou_loss, **hyp)
    want = torch.autograd.grad(sum(parts.values()), exact)
    preds = [p.detach().to(DEVICE, dtype).requires_grad_() for p in exact]
    out = make_criterion(detector, levels, na, classes, backend, iou_loss=iou_loss, **hyp)(preds, rows)
    assert out.total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    got = compare(out, preds, parts, positives, tolerance)
    largest = max(w.abs().max() for w in want)
    for a, b in zip(got, want, strict=True):
        assert (a.cpu().double() - b).abs().max() <= tolerance * largest
    return met


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", CASES)
def test_the_description(name, seed):
    met = check(CASES[name][0], CASES[name], "torch", seed, batch=1 + seed % 3, skip_image=0 if seed == 4 else None)
    if seed == 1:
        assert met["rewritten"] > 0 or not CASES[name][4]


@pytest.mark.parametrize("name", [name for name in CASES if "four" not in name])
def test_the_description_by_the_kernels(name):
    detector, levels, na, classes, n, hyp = CASES[name]
    case = (detector, levels, min(na, 2), classes, min(n, 5), hyp)  # the interpreter takes its time
    met = check(detector, case, "triton", 1, batch=1 if levels > 2 else 2)
    assert met["rewritten"] > 0 or not n


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32(backend):
    check(YOLOv5Loss, CASES["v5, everything set"], backend, 2, torch.float32, 1e-5)
    check(ScaledYOLOv4Loss, CASES["scaled"], backend, 3, torch.float32, 1e-5, skip_image=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("iou_loss", term_names("iou", users=True))
def test_every_iou_loss(iou_loss, backend):
    check(YOLOv5Loss, (None, 1, 2, 2, 6 if backend == "torch" else 3, {}), backend, 1, iou_loss=iou_loss)


@pytest.mark.parametrize("backend", BACKENDS)
def test_powers_of_the_iou_loss_leave_the_objectness_target(backend):
    hyp = {"iou_alpha": 3.0, "iou_gamma": 0.5}
    check(YOLOv5Loss, (None, 1, 2, 2, 3, hyp), backend, 1, iou_loss="iou")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cls", [YOLOv5Loss, ScaledYOLOv4Loss])
def test_where_neighbours_begin(cls, backend):
    """One object a map of 4 x 4 cells: the cells that it takes, by hand."""
    for (gx, gy), want in {
        (1.5, 1.5): {(1, 1)},  # the middle: no neighbour
        (2.0, 1.5): {(2, 1), (1, 1), (2, 1)},  # on a border: left, and right, which is the cell itself
        (1.25, 2.75): {(1, 2), (0, 2), (1, 3)},
        (0.75, 0.25): {(0, 0), (1, 0)},  # nothing above the first row
        (1.0, 2.5): {(1, 2)},  # left of 1 is none, since 1 > 1 is false; right of it is the cell itself
        (3.75, 3.25): {(3, 3), (3, 2)},
        (4.0, 4.0): {(3, 3)},
        (0.0, 4.0): {(0, 3)},
        (3.0, 3.0): {(3, 3), (2, 3), (3, 2)},
    }.items():
        levels = 1 if cls is YOLOv5Loss else 3
        criterion = cls([[(8, 8)]] + [[(1e4, 1e4)]] * (levels - 1), (8, 16, 32)[:levels], 1, backend=backend)
        preds = [torch.full((1, 1, n, n, 6), 0.25, device=DEVICE, requires_grad=True) for n in (4, 2, 1)[:levels]]
        rows = torch.tensor([[0, 0, gx / 4, gy / 4, 0.25, 0.25]], device=DEVICE)
        out = criterion(preds, rows)
        (grad,) = torch.autograd.grad(out.total, preds[:1])
        taken = {(x, y) for _, _, y, x in (grad[..., :4] != 0).any(-1).nonzero().tolist()}
        assert taken == want, (gx, gy)
        assert out.num_pos == len(want)
        assert out.num_invalid == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_anchor_t_is_strict(backend):
    criterion = YOLOv5Loss([[(8, 8)]], (8,), 1, anchor_t=4, backend=backend)
    preds = [torch.zeros(1, 1, 4, 4, 6, device=DEVICE)]
    for size, want in ((1.0, 0), (1 - 2**-20, 1), (2**-4, 0), (2**-4 * 1.001, 1)):
        rows = torch.tensor([[0, 0, 0.375, 0.375, size, 0.25]], device=DEVICE)
        assert criterion(preds, rows).num_pos == want


# Layouts, targets.


def layouts(five):
    """Predictions in every form in which they come."""
    flat = [p.permute(0, 1, 4, 2, 3).flatten(1, 2).contiguous() for p in five]
    return {
        "flat": flat,
        "channels last": [p.contiguous(memory_format=torch.channels_last) for p in flat],
        "a view of flat": [p.unflatten(1, (2, -1)).permute(0, 1, 3, 4, 2) for p in flat],
        "anchors last": [p.permute(0, 2, 3, 1, 4).contiguous().permute(0, 3, 1, 2, 4) for p in five],
        "apart": [torch.stack((p, p + 9), -1)[..., 0] for p in five],
        "mixed": [five[0], flat[1]],
    }


LAYOUTS = [("torch", name) for name in layouts(make_maps(2, 2, 3))]
LAYOUTS += [("triton", name) for name in ("channels last", "a view of flat", "mixed")]


@pytest.mark.parametrize(("backend", "layout"), LAYOUTS)
def test_layouts(layout, backend):
    five = make_maps(2, 2, 3, batch=1, dtype=torch.float32)
    rows = make_rows(five[0], 3, 3)
    criterion = make_criterion(YOLOv5Loss, 2, 2, 3, backend)
    plain = criterion(five, rows)
    want = torch.autograd.grad(plain.total, five)
    views = [p.detach().requires_grad_() for p in layouts([p.detach() for p in five])[layout]]
    out = criterion(views, rows)
    torch.testing.assert_close(out.total, plain.total, rtol=1e-6, atol=0)
    assert out.num_pos == plain.num_pos > 0
    for a, b in zip(torch.autograd.grad(out.total, views), want, strict=True):
        torch.testing.assert_close(reference.grid_view(a, 2), b, rtol=1e-6, atol=1e-9)


def dyadic_rows(seed=0, n=6, batch=3, classes=3):
    """Rows that pixels of an image of 64 x 64 say exactly; image 1 has none."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(1, 32, (n, 6), generator=generator) / 64
    rows[:, 2:4] += 0.25
    rows[:, 0] = 2 * torch.randint(2, (n,), generator=generator)
    rows[:, 1] = torch.arange(n) % classes
    rows[n - 1, 2:] = rows[0, 2:]
    rows[n - 1, 0] = rows[0, 0]
    return rows.to(DEVICE)


def outcome(criterion, preds, targets):
    out = criterion(preds, targets)
    return out, torch.autograd.grad(out.total, preds)


@pytest.mark.parametrize(
    ("cls", "backend"), [(YOLOv5Loss, "torch"), (ScaledYOLOv4Loss, "torch"), (YOLOv5Loss, "triton")]
)
def test_every_form_of_targets_gives_the_same_bits(cls, backend):
    levels = 1 if cls is YOLOv5Loss else 3
    preds = make_maps(levels, 1, 3, batch=3, cells=(8 >> (levels - 1),) * 2, dtype=torch.float32)
    rows = dyadic_rows()
    criterion = make_criterion(cls, levels, 1, 3, backend)
    want, want_grads = outcome(criterion, preds, rows)
    assert want.num_pos > 0
    padded, images = torch.zeros(3, 7, 5, device=DEVICE), []
    for b in range(3):
        own = rows[rows[:, 0] == b]
        padded[b, 1 : 1 + len(own)] = own[:, 1:]
        corners = torch.cat((own[:, 2:4] - own[:, 4:] / 2, own[:, 2:4] + own[:, 4:] / 2), 1) * 64
        images.append({"boxes": corners, "labels": own[:, 1].long()})
    # images interleaved, rows of each image in their order
    mine = [rows[rows[:, 0] == b] for b in (2, 0)]
    mixed = [image[i : i + 1] for i in range(len(rows)) for image in mine if i < len(image)]
    forms = {
        "Targets": Targets.from_packed(rows, 3),
        "capacity": Targets.from_packed(rows, 3, capacity=11),
        "padded": padded,
        "torchvision": images,
        "interleaved": torch.cat(mixed),
        "sorted": rows[rows[:, 0].sort(stable=True).indices],
    }
    if backend == "triton":  # the interpreter is slow, and the conversions are the same
        forms = {name: forms[name] for name in ("capacity", "padded", "interleaved")}
    for name, targets in forms.items():
        out, grads = outcome(criterion, preds, targets)
        assert (out.num_pos, out.num_invalid) == (want.num_pos, 0), name
        torch.testing.assert_close(out.total, want.total, rtol=1e-6, atol=0)
        for a, b in zip(grads, want_grads, strict=True):
            assert torch.equal(a[..., 4], b[..., 4]), name  # the objectness target is that of the same row
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)
            if backend == "triton":  # the rows of an image in their order are all that a kernel sees
                assert torch.equal(out.total, want.total)
                assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_of_several_rows_says_the_objectness(backend):
    """Three rows on the same places; the objectness gradient is that of the last one alone."""
    criterion = YOLOv5Loss([[(12, 12)]], (8,), 2, backend=backend)
    pred = make_maps(1, 1, 2, batch=1, cells=(4, 4))[0]
    rows = torch.tensor([[0, 0, 0.4, 0.4, 0.3, 0.3], [0, 1, 0.4, 0.4, 0.2, 0.4], [0, 0, 0.4, 0.4, 0.5, 0.25]])
    rows = rows.to(DEVICE)
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        all_of_them, alone = (outcome(criterion, [pred], rows[list(pick)]) for pick in (order, order[2:]))
        assert all_of_them[0].num_pos == alone[0].num_pos == 3
        torch.testing.assert_close(all_of_them[1][0][..., 4], alone[1][0][..., 4], rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_later_kind_of_cell_overrules_a_later_row(backend):
    """The right neighbour of one row is written after the own cell of another, whichever row comes first."""
    criterion = YOLOv5Loss([[(8, 8)]], (8,), 2, backend=backend)
    pred = make_maps(1, 1, 2, batch=1, cells=(4, 4))[0]
    own = [0, 1, 2.5 / 4, 1.5 / 4, 0.3, 0.2]
    right = [0, 0, 1.75 / 4, 1.5 / 4, 0.2, 0.3]  # of cell 1: its right neighbour is the cell of the other row
    wanted = outcome(criterion, [pred], torch.tensor([right], device=DEVICE))[1][0][0, 0, 1, 2, 4]
    for rows in ([own, right], [right, own]):
        out, (grad,) = outcome(criterion, [pred], torch.tensor(rows, device=DEVICE))
        assert out.num_pos == 2
        torch.testing.assert_close(grad[0, 0, 1, 2, 4], wanted, rtol=1e-12, atol=0)


# Autograd.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cls", [YOLOv5Loss, ScaledYOLOv4Loss])
def test_backward_twice_and_scaled(cls, backend):
    preds = make_maps(3, 1, 2, batch=1, cells=(1, 1))
    rows = make_rows(preds[0], 3, 2)
    criterion = make_criterion(cls, 3, 1, 2, backend)
    out = criterion(preds, rows)
    once = torch.autograd.grad(out.total, preds, retain_graph=True)
    copies = [grad.clone() for grad in once]
    scaled = torch.autograd.grad(-3 * out.total, preds, retain_graph=True)
    again = torch.autograd.grad(out.total, preds)
    for a, kept, b, c in zip(once, copies, scaled, again, strict=True):
        assert torch.equal(a, kept)
        assert torch.equal(a, c)
        torch.testing.assert_close(b, -3 * a, rtol=1e-12, atol=0)
    with torch.no_grad():
        silent = criterion(preds, rows)
    assert not silent.total.requires_grad
    assert torch.equal(silent.total, out.total)
    assert not criterion([p.detach() for p in preds], rows).total.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cls", [YOLOv5Loss, ScaledYOLOv4Loss])
def test_half_precision_is_as_good_as_eager(cls, dtype):
    preds = make_maps(3, 1, 3, batch=1, dtype=dtype)
    rows = make_rows(preds[0], 5, 3)
    truth = [p.detach().double().requires_grad_() for p in preds]
    criteria = [make_criterion(cls, 3, 1, 3, backend) for backend in BACKENDS]
    want, want_grads = outcome(criteria[0], truth, rows)
    (theirs, their_grads), (ours, our_grads) = (outcome(criterion, preds, rows) for criterion in criteria)
    for out in (theirs, ours):
        assert out.total.dtype == torch.float32
        torch.testing.assert_close(out.total.double(), want.total, rtol=1e-5, atol=0)
    for t, e, o in zip(want_grads, their_grads, our_grads, strict=True):
        assert o.dtype == dtype
        rounding = torch.finfo(dtype).eps * t.abs() + torch.finfo(dtype).smallest_normal
        assert ((o.double() - t).abs() <= (e.double() - t).abs() + rounding).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("size", [30.0, 120.0])
def test_far_logits_have_finite_gradients(size, dtype, backend):
    generator = torch.Generator().manual_seed(0)
    cases = [(YOLOv5Loss, 0.0), (ScaledYOLOv4Loss, 1.5), (YOLOv5Loss, 0.5), (ScaledYOLOv4Loss, 0.0)]
    for cls, gamma in cases if backend == "torch" else cases[:2]:
        levels = 1 if cls is YOLOv5Loss else 3
        maps = make_maps(levels, 1, 2, batch=1, cells=(1, 1) if levels == 3 else (4, 4))
        signs = [torch.randint(2, p.shape, generator=generator) * 2.0 - 1 for p in maps]
        preds = [(size * sign).to(DEVICE, dtype).requires_grad_() for sign in signs]
        criterion = make_criterion(cls, levels, 1, 2, backend, fl_gamma=gamma)
        out, grads = outcome(criterion, preds, make_rows(maps[0], 3, 2))
        assert out.num_pos > 0
        assert out.total.isfinite()
        assert all(value.isfinite() for value in out.parts.values())
        assert all(grad.isfinite().all() for grad in grads)


# The module.


def test_defaults():
    head = make_criterion(YOLOv5Loss, 3, 3, 80).head
    assert (head.box_gain, head.obj_gain, head.noobj_gain, head.cls_gain) == (f32(0.05), 1, 1, f32(0.5 / 80))
    assert (head.box, head.label, head.objectness, head.quality_ratio, head.anchor_t) == ("ciou", "bce", "bce", 1, 4)
    assert (head.class_targets, head.label_args, head.obj_args) == ((1, 0), (1,), (1,))
    assert make_criterion(YOLOv5Loss, 3, 3, 80).hyp == {"box": 0.05, "neighbours": 2, "smoothing": "binary"} | DEFAULTS
    assert make_criterion(ScaledYOLOv4Loss, 3, 3, 80).hyp == {"giou": 0.05, "neighbours": 2} | {
        name: value for name, value in DEFAULTS.items() if name != "label_smoothing"
    }
    assert make_criterion(YOLOv5Loss, 1, 1, 1).head.cls_gain == 0


def test_repr():
    assert repr(make_criterion(YOLOv5Loss, 2, 1, 3, cls_pw=2.0)) == (
        "YOLOv5Loss(strides=(8, 16), num_classes=3, backend='torch', cls_pw=2.0)"
    )


def test_a_checkpoint_holds_nothing():
    assert dict(make_criterion(YOLOv5Loss, 2, 1, 3).state_dict()) == {}


# ---- a repository's own hyper-parameters

OWN = [[(10, 13)], [(30, 61)], [(116, 90)]]
FILE = {
    "lr0": 0.01, "momentum": 0.937, "hsv_h": 0.015, "mosaic": 1.0, "anchors": 3, "iou_t": 0.2,
    "obj": 0.7, "cls": 0.3, "cls_pw": 1.5, "obj_pw": 0.75, "anchor_t": 3.0, "fl_gamma": 1.5,
}  # fmt: skip


@pytest.mark.parametrize(("kind", "gain"), [(YOLOv5Loss, "box"), (ScaledYOLOv4Loss, "giou")])
def test_a_file_of_hyper_parameters(kind, gain):
    of_loss = {"obj": 0.7, "cls": 0.3, "cls_pw": 1.5, "obj_pw": 0.75, "anchor_t": 3.0, "fl_gamma": 1.5, gain: 0.04}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = kind.from_hyp({**FILE, gain: 0.04}, OWN, (8, 16, 32), 4, backend="torch")
        assert found.head == kind(OWN, (8, 16, 32), 4, **of_loss).head
    assert found.backend == "torch"
    assert found.unused == ("lr0", "momentum", "hsv_h", "mosaic", "anchors", "iou_t")
    assert kind(OWN, (8, 16, 32), 4).unused == ()


def test_what_may_be_of_the_loss_and_is_not_taken_is_told():
    file = {**FILE, "giou": 0.05, "loss_ota": 1}
    with pytest.warns(UserWarning, match=r"YOLOv5Loss\.from_hyp takes no notice of giou, loss_ota$") as caught:
        found = YOLOv5Loss.from_hyp(file, OWN, (8, 16, 32), 4, label_smoothing=0.1, obj=2.0)
    assert caught[0].filename == __file__
    assert found.unused[-2:] == ("giou", "loss_ota")
    assert (found.hyp["obj"], found.hyp["label_smoothing"]) == (2.0, 0.1)  # what is said beside it comes first


def test_a_file_that_is_none():
    with pytest.raises(ValueError, match=r"hyp: 'hyp.yaml', want a mapping of names to numbers"):
        YOLOv5Loss.from_hyp("hyp.yaml", OWN, (8, 16, 32), 4)
    with pytest.raises(ValueError, match=r"anchor_t: 0.5, want a finite number >= 1"):
        YOLOv5Loss.from_hyp({"anchor_t": 0.5}, OWN, (8, 16, 32), 4)
