"""The losses, as modules, on both backends, against what the peers' own code computed."""

from __future__ import annotations

from typing import Any

import golden
import numpy as np
import pytest
import torch
from conftest import DEVICE
from torch import Tensor

from fusedyolo import ScaledYOLOv4Loss, YOLOv2Loss, YOLOv4Loss, YOLOv5Loss, YOLOv7Loss, reference
from fusedyolo.losses.base import GridLoss

RATIO = [name for of in ("yolov5_*", "yolov7_ota_*", "scaledyolov4_*") for name in golden.names("torch", of)]
PEERS = {"ComputeLoss": YOLOv5Loss, "ComputeLossOTA": YOLOv7Loss}
LIGHTNET = golden.names("torch", "lightnet_*")
REGION = golden.names("darknet", "region_v2_*")
CSP = golden.names("darknet", "yolov4csp_newcoords_*")
IOU_LOSS = ("iou", "giou", "mse", "diou", "ciou")  # darknet's codes

in_both_precisions = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
# the reference in the precision of the recordings, the kernels in the one they are for (test_grid.py has both)
on_both_backends = pytest.mark.parametrize(("backend", "dtype"), [("torch", torch.float64), ("triton", torch.float32)])


def ratio_loss(meta: dict[str, Any], backend: str = "torch") -> GridLoss:
    loss = PEERS.get(meta["loss"], ScaledYOLOv4Loss)
    hyp = {name: value for name, value in meta["hyp"].items() if name != "iou_t"}  # which no peer reads
    return loss(meta["anchors_px"], meta["strides"], meta["nc"], backend=backend, gr=meta["gr"], **hyp)


def lightnet_loss(meta: dict[str, Any], backend: str = "torch") -> GridLoss:
    hyp = {name: value for name, value in meta["params"].items() if name not in ("seen", "iou_merge_thresh")}
    several = meta["loss"] == "MultiScaleRegionLoss"
    anchors, strides = (
        (meta["anchors_out"], meta["strides"]) if several else (meta["anchors_out"][0], meta["strides"][0])
    )
    return YOLOv2Loss(anchors, meta["nc"], strides, recipe="lightnet", backend=backend, **hyp)


def region_loss(case: golden.LayerGolden, backend: str = "torch") -> GridLoss:
    names = ("coord_scale", "object_scale", "noobject_scale", "class_scale", "thresh", "rescore")
    hyp = {name: case.layer[name] for name in names}
    loss = YOLOv2Loss(case.anchors, case.layer["classes"], case.stride, recipe="darknet", backend=backend, **hyp)
    loss.seen = case.layer["seen"] - len(case.logits)  # darknet counts a batch before it looks at it, and so do we
    return loss


def csp_loss(case: golden.LayerGolden, backend: str = "torch") -> GridLoss:
    layer = case.layer
    names = (
        "scale_x_y", "iou_thresh", "ignore_thresh", "iou_normalizer", "obj_normalizer", "cls_normalizer", "max_delta",
        "label_smooth_eps", "new_coords",
    )  # fmt: skip
    return YOLOv4Loss(
        [[case.anchors[t] for t in layer["mask"]]],
        [case.stride],
        layer["classes"],
        recipe="darknet",
        all_anchors=case.anchors,
        iou_loss=IOU_LOSS[layer["iou_loss"]],
        objectness_smooth=int(layer["objectness_smooth"]),
        backend=backend,
        **{name: layer[name] for name in names},
    )


def close(got: Tensor, want: Tensor, unit: float) -> None:
    torch.testing.assert_close(got.detach().cpu().double(), want.double(), rtol=0, atol=1e-5 * unit)


def check_torch_golden(loss: GridLoss, data: dict[str, Any], dtype: torch.dtype, parts: dict[str, Tensor]) -> int:
    """Total, parts and gradients; returns how many predictions were assigned."""
    levels = range(len(data["meta"]["strides"]))
    preds = [data[f"pred_{i}"].to(DEVICE, dtype).requires_grad_() for i in levels]
    several = len(preds) > 1 or not isinstance(loss, YOLOv2Loss)
    out = loss(preds if several else preds[0], data["targets"].to(DEVICE))
    grads = torch.autograd.grad(out.total, preds)
    total = data["total"].item()
    close(out.total, data["total"], total)
    for name, want in parts.items():
        close(out.parts[name], want, total)
    largest = max(data[f"grad_{i}"].abs().max().item() for i in levels)
    for i, grad in zip(levels, grads, strict=True):
        close(grad, data[f"grad_{i}"], largest)
    assert int(out.num_invalid) == 0
    return int(out.num_pos)


@on_both_backends
@pytest.mark.parametrize("name", RATIO)
def test_yolov5_and_scaled_yolov4(name, dtype, backend):
    data = golden.arrays(name)
    batch = len(data["pred_0"])
    parts = {part: batch * data[f"loss_{part}"] for part in ("box", "obj", "cls")}
    found = check_torch_golden(ratio_loss(data["meta"], backend), data, dtype, parts)
    matches = [data[f"match_{i}_image_anchor_y_x_class"][:, :4] for i in range(len(data["meta"]["strides"]))]
    assert found == sum(len(match.unique(dim=0)) for match in matches)


@on_both_backends
@pytest.mark.parametrize("name", LIGHTNET)
def test_lightnet(name, dtype, backend):
    data = golden.arrays(name)
    parts = {"box": data["loss_coord"], "obj": data["loss_conf"], "cls": data["loss_class"]}
    loss = lightnet_loss(data["meta"], backend)
    found = check_torch_golden(loss, data, dtype, parts)
    assert found == sum(int(data[f"cls_mask_{i}"].sum()) for i in range(len(data["meta"]["strides"])))


def darknet_gradient(loss: GridLoss, case: golden.LayerGolden, dtype: torch.dtype) -> tuple[Tensor, dict[str, float]]:
    """The gradient, and the parts."""
    logits = case.logits.to(DEVICE, dtype).requires_grad_()
    out = loss(logits if isinstance(loss, YOLOv2Loss) else [logits], case.rows.to(DEVICE))
    (grad,) = torch.autograd.grad(out.total, logits)
    return grad.cpu().double(), {name: float(part) for name, part in out.parts.items()}


@on_both_backends
@pytest.mark.parametrize("name", REGION)
def test_darknet_region(name, dtype, backend):
    case = golden.layer(name)
    loss = region_loss(case, backend)
    grad, parts = darknet_gradient(loss, case, dtype)
    assert loss.seen == case.layer["seen"]
    torch.testing.assert_close(-grad, case.delta.double(), rtol=0, atol=1e-4)
    want = {"box": case.terms["xy"] + case.terms["wh"], "obj": case.terms["obj"], "cls": case.terms["cls"]}
    assert parts == pytest.approx(want, rel=1e-6)


@on_both_backends
@pytest.mark.parametrize("name", CSP)
def test_darknet_new_coords(name, dtype, backend):
    case = golden.layer(name)
    grad, parts = darknet_gradient(csp_loss(case, backend), case, dtype)
    anchors = len(case.layer["mask"])
    got, want = golden.canonical(grad, anchors), golden.canonical(case.delta.double(), anchors)
    assert want[..., 5:].any()
    torch.testing.assert_close(-got[..., 4:], want[..., 4:], rtol=0, atol=1e-4)
    # of no loss the gradient, but on the same predictions; darknet's ciou moves disjoint boxes as well
    assert torch.equal(got[..., :4].any(-1), want[..., :4].any(-1))
    assert (parts["obj"], parts["cls"]) == pytest.approx((case.terms["obj"], case.terms["cls"]), rel=1e-6)


# ---- assignment


def decoded(slot: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[R, 4]: image, anchor, y, x."""
    return torch.from_numpy(np.stack(np.unravel_index(slot.numpy(), shape), 1))


@in_both_precisions
@pytest.mark.parametrize("name", RATIO)
def test_ratio_candidates_are_the_matches_in_their_order(name, dtype):
    data = golden.arrays(name)
    head, batch = ratio_loss(data["meta"]).head, len(data["pred_0"])
    rows = reference.read_rows(data["targets"], head, batch)
    maps = [tuple(size) for size in data["meta"]["level_hw"]]
    preds = [data[f"pred_{level}"].to(dtype) for level in range(len(maps))]
    for level, found in enumerate(reference.assigned(preds, rows, head)):
        (H, W), anchors = maps[level], len(head.levels[level])
        image = rows.image[found.row]
        # the peer's OTA goes through images one by one
        order = image.argsort(stable=True) if head.by_cost else torch.arange(len(image))
        order = order[found.slot[order] < batch * anchors * H * W]
        place = decoded(found.slot[order], (batch, anchors, H, W))
        row = found.row[order]
        got = torch.cat((place, rows.label[row, None]), 1)
        assert torch.equal(got, data[f"match_{level}_image_anchor_y_x_class"].long())
        if head.by_cost:
            assert torch.equal(rows.boxes[row].double(), data[f"match_{level}_box"])
            continue
        box = rows.boxes[row].double() * torch.tensor([W, H, W, H])
        box[:, :2] -= place[:, [3, 2]]
        torch.testing.assert_close(box, data[f"match_{level}_tbox"], rtol=0, atol=1e-6)


@in_both_precisions
@pytest.mark.parametrize("name", LIGHTNET)
def test_lightnet_masks(name, dtype):
    data = golden.arrays(name)
    head, batch = lightnet_loss(data["meta"]).head, len(data["pred_0"])
    rows = reference.read_rows(data["targets"], head, batch)
    maps = [tuple(size) for size in data["meta"]["level_hw"]]
    for level, (H, W) in enumerate(maps):
        found = reference.assign(rows, head, level, maps, batch, dtype)
        anchors = len(head.levels[level])
        owner = {slot: row for slot, row in zip(found.slot.tolist(), found.row.tolist(), strict=True)}  # the last one
        owner.pop(batch * anchors * H * W, None)
        slots = torch.tensor(sorted(owner))
        row = torch.tensor([owner[slot] for slot in sorted(owner)])
        mask = data[f"cls_mask_{level}"].flatten()
        assert torch.equal(mask.nonzero()[:, 0], slots)
        assert torch.equal(data[f"tcls_{level}"].flatten()[mask].long(), rows.label[row])
        box = rows.boxes[row].double() * torch.tensor([W, H, W, H])
        box[:, :2] -= decoded(slots, (batch, anchors, H, W))[:, [3, 2]]
        stored = data[f"tcoord_{level}"].transpose(2, 3).flatten(0, 2)[mask]
        torch.testing.assert_close(box, stored.double(), rtol=0, atol=1e-5)
        area = (rows.boxes[row, 2] * rows.boxes[row, 3]).clamp(max=head.area_cap)
        torch.testing.assert_close(2 - area, data[f"coord_mask_{level}"].flatten()[mask], rtol=1e-6, atol=0)
        # what is neither assigned nor negative has no gradient by its objectness
        conf = data[f"conf_mask_{level}"].flatten()
        grad = golden.canonical(data[f"grad_{level}"], anchors)[..., 4].flatten()
        assert torch.equal(conf == 0, grad == 0)
        assert (conf[mask] == data["meta"]["params"]["object_scale"]).all()
