"""The driver of cells that predict a box each, of which every object picks a few: YOLOX, YOLOv8 and their kin."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, reference
from ..heads import PickHead
from ..targets import without_spare
from . import shared
from .assignments import Assignment, LevelAssignment
from .protocol import LOGIT, POSITIVE, Driver, Frame, Known, Piece, Predictions

if TYPE_CHECKING:
    from ..ops import Launch

Maps = tuple[tuple[int, int], ...]


class PickCall(NamedTuple):
    """The arguments of a call."""

    form: str  # of the predictions: "maps", "apart" or "planes", see checks.point_predictions
    preds: list[Tensor]  # as they came, level by level; one gradient each
    maps: Maps  # (height, width), one a level
    rows: Tensor  # [M, 6]
    offsets: Tensor | None
    size: tuple[float, float]  # (height, width) of the image
    gains: tuple[float, ...]  # of head.parts, the factor of the batch in them
    class_weights: Tensor | None  # [C] float32
    weights: Tensor | None = None  # [M], of the rows
    beside: tuple[PickHead, PickCall] | None = None  # of a branch before it, that ``launches`` computes, too


class PickDriver(Driver):
    """See :class:`~fusedyolo.drivers.protocol.Driver`."""

    head = PickHead
    kind = "pick"
    layouts = ("planes", "nchw", "channels_last")

    # ---- a call of a loss

    def read(self, criterion: Any, preds: Any, targets: Any, **geometry: Any) -> PickCall:
        shared.refuse(geometry)
        return criterion.read(preds, targets)

    def reference_loss(self, head: PickHead, call: PickCall) -> tuple[Tensor, tuple[Tensor, ...], Tensor, Tensor]:
        rows, spare = without_spare(call.rows, call.offsets)
        parts, counts, weights = reference.pick_loss(
            planes(call.form, call.preds, head),
            rows,
            head,
            call.gains,
            call.maps,
            call.size,
            call.class_weights,
            call.weights,
        )
        return torch.stack(parts).sum(0), parts, shared.counts_without_spare(counts, spare), weights

    def launches(self, head: PickHead, call: PickCall) -> dict[str, Launch]:
        from ..ops import picks as ops

        heads, preds, gains = [head], call.preds, call.gains
        weights = [] if call.class_weights is None else [call.class_weights]
        if call.beside is not None:
            other, first = call.beside
            heads, preds, gains = [other, head], first.preds + preds, first.gains + gains
            weights = [] if first.class_weights is None else [first.class_weights, *weights]
        geometry = ops.Geometry(call.form, call.maps, call.size)
        forward, found = ops.loss_launches(
            preds, call.rows, call.offsets, weights, heads, geometry, gains, True, call.weights
        )
        grads, one = [torch.empty_like(pred) for pred in preds], torch.ones((), device=call.rows.device)
        ones = (one, *(None,) * len(gains))
        assigned = ops.Assignment(found.row, found.score, found.norm, None)
        backward = ops.head_launch(
            preds, call.rows, weights, heads, geometry, gains, assigned, None, grads, ones, True, call.weights
        )
        return {_LAUNCHES[launch.kernel.__name__]: launch for launch in forward} | {"grad": backward}

    def assign(self, head: PickHead, call: PickCall) -> Assignment:
        rows, _ = without_spare(call.rows, call.offsets)
        with torch.no_grad():
            dtype = shared.wide(call.preds[0].dtype)
            seen_planes = planes(call.form, [pred.detach() for pred in call.preds], head).to(dtype)
            points = reference.points_of(call.maps, head.strides, rows.device)
            objects = reference.read_objects(rows, head, len(seen_planes.cls), call.size, dtype, call.weights)
            picked = reference.pick(reference.see(seen_planes, points, head), objects, head)
            has, centre, sides = picked.row >= 0, objects.centre[picked.row], objects.sides[picked.row]
            boxes = torch.cat((centre - sides / 2, centre + sides / 2), -1).to(dtype)
            stride = points.stride[:, None]
            encoded = reference.encode_points(((centre - points.middle) / stride).to(dtype), sides / stride, head)
            fields = (
                picked.row,
                objects.label[picked.row],
                torch.where(has[..., None], boxes, 0.0),
                torch.where(has[..., None], encoded.to(dtype), 0.0),
                has.to(dtype) if head.objectness else picked.score,
                picked.score,
                torch.zeros_like(has) if picked.hidden is None else picked.hidden,
            )
            areas = [height * width for height, width in call.maps]
            levels = tuple(map(_level, zip(*(field.split(areas, 1) for field in fields), strict=True), call.maps))
        cells = tuple(((stride, stride),) for stride in head.strides)
        return Assignment(levels, rows, objects.valid, head.strides, cells, call.weights)

    # ---- predictions alone

    def view(self, criterion: Any, preds: Any, image_size: Any, anchors: Any) -> Predictions:
        head = criterion.head
        given = shared.image_size(criterion, image_size)
        shared.own_anchors(anchors)
        form, tensors, _, size = check(head, criterion.own(preds), given)
        return Predictions([plane for plane in planes(form, tensors, head) if plane is not None], size)

    def decode(self, head: PickHead, seen: Predictions) -> tuple[Tensor, Tensor]:
        assert seen.size is not None
        box, cls, *obj = seen.preds
        height, width = seen.size
        maps = [(int(-(-height // stride)), int(-(-width // stride))) for stride in head.strides]
        return reference.decode_predictions(reference.Planes(box, cls, obj[0] if obj else None), maps, head)

    # ---- what a network with such a head looks like

    def pieces(self, head: PickHead, frame: Frame) -> list[Piece]:
        N, levels = sum(frame.sizes), range(len(frame.maps))
        found = []
        for name, width in zip(names(head), head.widths, strict=True):
            low, rare = (None, range(0)) if name == "boxes" else ((1, 0, width), range(width))
            values = POSITIVE if name == "boxes" and head.decode == "distance" else LOGIT
            found.append(Piece((frame.batch, width, N), width, levels, values, low, rare))
        return found

    def arrange(self, values: Tensor, piece: Piece, frame: Frame) -> list[Tensor]:
        """In one piece ``[B, width, N]``, or as maps ``[B, width, H, W]``, one a level."""
        if frame.layout == "planes":
            return [values]
        order = torch.channels_last if frame.layout == "channels_last" else torch.contiguous_format
        parts = zip(values.split(frame.sizes, dim=2), frame.maps, strict=True)
        return [part.unflatten(2, sides).contiguous(memory_format=order) for part, sides in parts]

    def pack(self, preds: list[Tensor], frame: Frame) -> Any:
        if frame.layout == "planes":
            feats = [preds[0].new_empty(()).expand(frame.batch, 1, *sides) for sides in frame.maps]
            return dict(zip(_NAMES[len(preds)], preds, strict=True)) | {"feats": feats}
        levels = len(frame.maps)
        parts = [preds[i : i + levels] for i in range(0, len(preds), levels)]
        return dict(zip(_NAMES[len(parts)], parts, strict=True))

    # ---- what is measured

    def floor(self, head: PickHead) -> float:
        """Write the gradient; read boxes, which objects compare, and objectness, or else all classes."""
        box, *obj, classes = head.widths
        return 1 + (box + sum(obj) if head.objectness else box + classes) / sum(head.widths)

    def candidates(self, head: PickHead, layout: str) -> Iterable[dict[str, int]]:
        if layout == "channels_last":
            yield from shared.products(cells=(64, 128), planes=(8, 16), threads=(64, 128, 256))
        else:
            yield from shared.products(cells=(128, 256, 512), planes=(2, 4, 8), threads=(64, 128, 256))
        yield from shared.products(picks=(16, 32, 64))
        yield from shared.products(region=(32, 128))

    def kinds(self, kernel: str, programs: int, arguments: Mapping[str, Any]) -> Sequence[int]:
        """Of boxes, of classes and of what is left of these the kinds of tiles; where later launches need what each has
        left, each is of its own.
        """
        branches = len(arguments["branches"])
        if kernel == "pick_loss_kernel":
            spec = arguments["SPEC"]
            tiles = _kinds_of_tiles(arguments["levels"], arguments["B"], spec.CELLS)
            count = 1 + max(tiles)
            groups = [0] + [1] * (spec.C // spec.GROUP) + [2] * (spec.C % spec.GROUP > 0)
            return [kind + count * group for group in groups for kind in tiles] * branches
        if arguments["SPECS"][0].ASSIGNER == "aligned":
            problem = arguments["branches"][0].problem
            if kernel == "decode_kernel":
                tiles = _kinds_of_tiles(problem.levels, shared.even(problem.frame.batch), arguments["CELLS"])
                return tiles * branches
            if kernel == "pick_kernel":
                return [0] * programs
        return range(programs)

    def efforts(
        self, kernel: str, kinds: Sequence[int], arguments: Mapping[str, Any], known: Known
    ) -> tuple[Sequence[Any], list[float]]:
        """Of a loss by the cells of a tile that have a row, which launches before have left; of a row that looks at the
        cells in its box by their number, of which its programs have a share each, or none.
        """
        branches = arguments["branches"]
        if kernel == "pick_loss_kernel":
            block, areas = arguments["SPEC"].CELLS, [height * width for height, width in _maps(arguments["levels"])]
            counts: list[int] = []
            for branch in branches:
                rows = branch.task.assigned.row_ptr.flatten()  # the first one's tensor holds those of all
                has = (rows[: arguments["B"] * sum(areas)] != arguments["M"]).view(-1, sum(areas))
                own = [int(part.sum()) for level in has.split(areas, 1) for each in level for part in each.split(block)]
                counts += own * (len(kinds) // len(branches) // len(own))
            return [(kind, n > 0) for kind, n in zip(kinds, counts, strict=True)], [float(n) for n in counts]
        if kernel == "pick_kernel" and arguments["SPECS"][0].ASSIGNER == "aligned":
            shares = _shares(arguments)
            used = (shares > 0).sum(1, keepdim=True).expand_as(shares)
            finer = [
                (bool(share > 0), bool(several > 1))
                for share, several in zip(shares.flatten(), used.flatten(), strict=True)
            ]
            efforts = [float(share) for share in shares.flatten()]
            return finer * len(branches) or kinds, efforts * len(branches) or [0.0] * len(kinds)
        return super().efforts(kernel, kinds, arguments, known)

    def complete(self, kernel: str, arguments: Mapping[str, Any], known: Known) -> None:
        """By the reference: boxes, and what rows pick."""
        if kernel not in ("decode_kernel", "pick_kernel") or arguments["SPECS"][0].ASSIGNER != "aligned":
            return
        for branch, spec in zip(arguments["branches"], arguments["SPECS"], strict=True):
            if kernel == "pick_kernel":
                _complete_picks(replace(known.head, topk=spec.TOPK), branch, arguments)
                continue
            decoded = branch.decoded
            decoded.boxes_ptr.copy_(_seen(known.head, branch).boxes)
            decoded.picker_ptr.fill_(arguments["M"])
            decoded.row_ptr.fill_(arguments["M"])
            decoded.done_ptr.zero_()
            decoded.claim_ptr.zero_()
            decoded.score_ptr.zero_()


PICKS = PickDriver()

_LAUNCHES = {
    "decode_kernel": "decode",
    "cost_kernel": "cost",
    "pick_kernel": "pick",
    "settle_kernel": "settle",
    "pick_loss_kernel": "loss",
}

_NAMES = {2: ("boxes", "scores"), 3: ("boxes", "objectness", "scores")}


def _maps(levels: Any) -> list[tuple[int, int]]:
    """(height, width) of each level of a launch."""
    return [(shared.even(h), shared.even(w)) for h, w in zip(levels.heights, levels.widths, strict=True)]


def _shares(arguments: Mapping[str, Any]) -> Tensor:
    """``[M, programs of a row]``: about how many cells each of a launch that picks them goes through, as its kernel has
    it; of a row that is not to reach any, one."""
    block, programs = arguments["BLOCK"], 1 << arguments["shift"]
    N = sum(height * width for height, width in _maps(arguments["branches"][0].problem.levels))
    areas = arguments["targets"].ptr[:, 4:].nan_to_num(0.0).clamp(0, 1).prod(1, keepdim=True)
    own = (areas * N).ceil().clamp(min=1)
    each = (own / block / programs).ceil() * block
    return (own - torch.arange(programs, device=own.device) * each).clamp(min=0).minimum(each)


def _in_one_piece(part: Any, width: int, maps: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    """``[B, width, N]`` of a part of a launch's predictions, see :class:`fusedyolo.kernels.picks.records.Part`."""
    levels = []
    for ptr, start, by, sides in zip(part.ptrs, part.starts, part.by, maps, strict=True):
        image, row, column, _, channel = map(shared.even, by)
        shape, strides = (len(like), width, *sides), (image, channel, row, column)
        levels.append(ptr.detach().as_strided(shape, strides, ptr.storage_offset() + shared.even(start)).flatten(2))
    return torch.cat(levels, 2).to(like.dtype)


def _seen(head: PickHead, branch: Any) -> reference.Seen:
    """What the reference sees of the predictions of a branch of a launch, without objectness."""
    predictions, maps, like = branch.problem.predictions, _maps(branch.problem.levels), branch.decoded.boxes_ptr
    parts = zip((predictions.box, predictions.cls), head.widths, strict=True)
    box, cls = (_in_one_piece(part, width, maps, like) for part, width in parts)
    points = reference.points_of(maps, head.strides, like.device)
    return reference.see(reference.Planes(box, cls, None), points, head)


def _complete_picks(head: PickHead, branch: Any, arguments: Mapping[str, Any]) -> None:
    """What a launch of all rows leaves of task-aligned ones of a branch, see ``kernels/picks/records.py``."""
    from ..kernels.picks.wish import LAST, NONE

    (problem, decoded, picked, tally, _), M = branch, arguments["M"]
    seen = _seen(head, branch)
    (B, N), size = seen.boxes.shape[:2], (problem.frame.height, problem.frame.width)
    objects = reference.read_objects(arguments["targets"].ptr, head, B, size, decoded.boxes_ptr.dtype)
    picks, claims = decoded.picker_ptr.new_zeros(B * N + 1), decoded.claim_ptr.zero_().view(B, N)
    decoded.picker_ptr.fill_(M)
    picked.index_ptr.fill_(-1)
    for wish in reference.wishes(seen, objects, head):
        (overlap,), (first, row, cell, *_) = wish.claim, wish.pairs
        pair, worth = reference.best(wish, min(head.topk, N))
        chosen, count, at = worth > reference.NONE, pair.shape[1], objects.image[row] * N + cell
        now = slice(first, first + len(pair))
        place = torch.where(chosen, at[pair], B * N)
        picks.scatter_add_(0, place.flatten(), torch.ones_like(place, dtype=picks.dtype).flatten())
        decoded.picker_ptr.view(-1)[place[chosen]] = row[pair][chosen].to(torch.int32)
        picked.index_ptr[now, :count] = torch.where(chosen, place, -1).to(torch.int32)
        picked.overlap_ptr[now, :count] = torch.where(chosen, overlap[pair], reference.NONE)
        picked.worth_ptr[now, :count] = worth
        strength = overlap.float().view(torch.int32).to(torch.int64)
        claim = torch.where(overlap > reference.NONE, ((strength - NONE.value) << 31) | (LAST.value - row), 0)
        claims.view(-1).scatter_reduce_(0, at, claim, "amax")
    several = (picks[:-1] > 1).view(B, N)
    decoded.picker_ptr[several] = -1
    tally.found_ptr[2 : 2 + B].copy_(several.sum(1))
    cells = several.sort(dim=1, descending=True, stable=True).indices  # and after these all others
    picked.clash_ptr.view(B, N).copy_(cells + N * torch.arange(B, device=cells.device)[:, None])


def _kinds_of_tiles(levels: Any, batch: int, cells: int) -> list[int]:
    """Of each tile of so many cells, of all images, its level and whether it is a whole one, as a number."""
    found: list[int] = []
    for level, (height, width) in enumerate(_maps(levels)):
        whole, left = divmod(height * width, cells)
        found += batch * ([2 * level] * whole + [2 * level + 1] * (left > 0))
    return found


def names(head: PickHead) -> tuple[str, ...]:
    """What is predicted, in the order of ``head.widths``."""
    return _NAMES[len(head.widths)]


def check(head: PickHead, preds: Any, size: tuple[float, float] | None) -> tuple[str, list[Tensor], Maps, Any]:
    """What :func:`fusedyolo.checks.point_predictions` says of predictions in any form."""
    return checks.point_predictions(preds, names(head), head.widths, head.pixels, size)


def views(form: str, preds: Sequence[Tensor], head: PickHead, maps: Maps) -> list[tuple[Tensor, ...]]:
    """Of each level what is predicted, in the order of ``head.widths``, as views ``[B, width, H, W]``."""
    if form == "maps":
        return [pred.split(head.widths, 1) for pred in preds]
    if form == "apart":
        count = len(head.widths)
        return [tuple(preds[i : i + count]) for i in range(0, len(preds), count)]
    areas = [height * width for height, width in maps]
    levels = zip(*(plane.split(areas, 2) for plane in preds), strict=True)
    return [tuple(part.unflatten(2, sides) for part in parts) for parts, sides in zip(levels, maps, strict=True)]


def planes(form: str, preds: Sequence[Tensor], head: PickHead) -> reference.Planes:
    """Predictions in one piece, as the reference takes them."""
    if form != "planes":
        levels = views(form, preds, head, ())
        preds = [torch.cat([part.flatten(2) for part in parts], 2) for parts in zip(*levels, strict=True)]
    box, *obj, cls = preds
    return reference.Planes(box, cls, obj[0] if obj else None)


def _level(fields: Sequence[Tensor], sides: tuple[int, int]) -> LevelAssignment:
    """Of one level, fields ``[B, H * W, ...]``."""
    row, label, boxes, encoded, objectness, score, ignored = (field.unflatten(1, (1, *sides)) for field in fields)
    has = (row >= 0).flatten()
    place = torch.where(has, torch.arange(row.numel(), device=row.device), row.numel())
    pairs = torch.stack((row.flatten().clamp(min=0), place))
    return LevelAssignment(row, label, boxes, encoded, objectness, ignored, pairs, score)
