"""The driver of dense heads: anchors that each predict a box and the logits of all classes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, reference
from ..heads import DenseHead
from ..targets import without_spare
from . import shared
from .assignments import AnchorAssignment
from .protocol import LOGIT, POSITIVE, Driver, Frame, Known, Piece, Predictions

if TYPE_CHECKING:
    from ..ops import Launch

NAMES = ("cls_logits", "bbox_regression", "bbox_ctrness")


class DenseCall(NamedTuple):
    """The arguments of a call."""

    levels: list[list[Tensor]]  # class logits, boxes and, of some heads, centreness; of each a tensor a level
    channels: tuple[int, ...]
    anchors: Tensor  # [N, 4] float32, or float64 as the predictions
    rows: Tensor  # [M, 6]
    offsets: Tensor | None
    size: tuple[float, float] | None  # (height, width) of the images, if known
    corners: bool  # rows hold corners in pixels, not centre and size relative to the image
    ends: tuple[int, int]  # anchors of the first and the last level
    class_weights: Tensor | None  # [C] float32
    weights: Tensor | None = None  # [M], of the rows


class DenseDriver(Driver):
    """See :class:`~fusedyolo.drivers.protocol.Driver`."""

    head = DenseHead
    kind = "dense"
    layouts = ("rows", "nchw", "channels_last")

    # ---- a call of a loss

    def read(self, criterion: Any, preds: Any, targets: Any, **geometry: Any) -> DenseCall:
        if "anchors" not in geometry:
            checks.fail("anchors", None, "a tensor of shape (N, 4)")
        return criterion.read(preds, targets, **geometry)

    def reference_loss(
        self, head: DenseHead, call: DenseCall
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor, tuple[Tensor, Tensor | None]]:
        rows, spare = without_spare(call.rows, call.offsets)
        maps = [reference.flat_maps(each, width) for each, width in zip(call.levels, call.channels, strict=True)]
        centre = maps[2] if head.centreness else None
        terms, counts, divisors = reference.dense_loss(
            maps[0],
            maps[1],
            centre,
            call.anchors,
            rows,
            head,
            call.size,
            call.corners,
            call.ends,
            call.class_weights,
            call.weights,
        )
        return torch.stack(terms).sum(0), terms, shared.counts_without_spare(counts, spare), divisors

    def launches(self, head: DenseHead, call: DenseCall) -> dict[str, Launch]:
        from .. import ops

        preds, anchors = [pred for maps in call.levels for pred in maps], call.anchors.contiguous()
        height, width = (math.inf, math.inf) if call.size is None else call.size
        geometry = ops.Geometry((float(width), float(height)), call.corners, call.ends)
        outputs = ops.dense_outputs(preds, anchors, head, True)
        weights = call.class_weights, call.weights
        forward = ops.loss_launches(preds, anchors, call.rows, call.offsets, head, geometry, outputs, *weights)
        grads, one = [torch.empty_like(pred) for pred in preds], torch.ones((), device=anchors.device)
        ones, skip = (one, None, None, None), head.negatives == 0
        saved = (anchors, call.rows, outputs.match, outputs.found, outputs.ce, outputs.picks)
        backward = ops.grad_launch(preds, saved, head, geometry, grads, ones, skip, *weights)
        return {_LAUNCHES[launch.kernel.__name__]: launch for launch in forward} | {"grad": backward}

    def assign(self, head: DenseHead, call: DenseCall) -> AnchorAssignment:
        rows, _ = without_spare(call.rows, call.offsets)
        anchors, batch = call.anchors, len(call.levels[0][0])
        with torch.no_grad():
            read = reference.read_corners(rows, head, batch, call.size, call.corners, anchors.dtype, call.weights)
            match = reference.dense_match(anchors, read, head, batch, call.ends)
            has = match >= 0
            taken = torch.where(has, match, len(read.label))  # a row of nothing behind them
            true = torch.cat((read.boxes, read.boxes.new_zeros(1, 4)))[taken]
            shift, sides = reference.relative(anchors, read, match)
            encoded = reference.encode_anchors(anchors, shift, sides, head)
            target = reference.centreness(shift, sides) if head.centreness else torch.ones_like(sides[..., 0])
        return AnchorAssignment(
            torch.where(has, match, -1),
            torch.cat((read.label, read.label.new_full((1,), -1)))[taken],
            true,
            torch.where(has[..., None], encoded, 0.0),
            torch.where(has, target, 0.0),
            match == reference.IGNORED,
            rows,
            read.valid,
            read.boxes,
            anchors,
            call.weights,
        )

    # ---- predictions alone

    def view(self, criterion: Any, preds: Any, image_size: Any, anchors: Any) -> Predictions:
        widths = _widths(criterion.head)
        size = shared.image_size(criterion, image_size)
        levels, _ = checks.dense_predictions(preds, NAMES[: len(widths)], widths, anchors)
        flat = [reference.flat_maps(maps, width) for maps, width in zip(levels, widths, strict=True)]
        return Predictions(flat, size, anchors)

    def decode(self, head: DenseHead, seen: Predictions) -> tuple[Tensor, Tensor]:
        assert seen.anchors is not None
        cls, box, *rest = seen.preds
        centre = rest[0] if rest else None
        boxes, scores = reference.decode_anchors(cls, box, centre, seen.anchors.to(cls.dtype), head)
        if seen.size is not None:
            boxes = boxes.clamp(min=0).minimum(shared.corners_of(seen.size, boxes))
        return boxes, scores

    # ---- what a network with such a head looks like

    def pieces(self, head: DenseHead, frame: Frame) -> list[Piece]:
        N, C, levels = sum(frame.sizes), head.num_classes, range(len(frame.maps))
        low, rare = (None, range(0)) if head.background else ((2, 0, C), range(C))
        boxes = POSITIVE if head.decode == "ltrb" else LOGIT
        found = [
            Piece((frame.batch, N, C), C, levels, low=low, rare=rare),
            Piece((frame.batch, N, 4), 4, levels, boxes),
            Piece((frame.batch, N, 1), 1, levels),
        ]
        return found[: len(_widths(head))]

    def arrange(self, values: Tensor, piece: Piece, frame: Frame) -> list[Tensor]:
        """In one piece ``[B, N, channels]``, or as maps ``[B, anchors * channels, H, W]``, one a level."""
        if frame.layout == "rows":
            return [values]
        found = []
        for part, sides, count in zip(values.split(frame.sizes, dim=1), frame.maps, frame.cell, strict=True):
            maps = part.reshape(len(part), *sides, count * piece.width).permute(0, 3, 1, 2)
            found.append(maps.contiguous() if frame.layout == "nchw" else maps)
        return found

    def pack(self, preds: list[Tensor], frame: Frame) -> Any:
        if frame.layout == "rows":
            return tuple(preds)
        levels = len(frame.maps)
        return tuple(preds[i : i + levels] for i in range(0, len(preds), levels))

    # ---- what is measured

    def floor(self, head: DenseHead) -> float:
        """Write the gradient, read the class logits and centreness."""
        width = sum(_widths(head))
        return 1 + (width - 4) / width

    def candidates(self, head: DenseHead, layout: str) -> Iterable[dict[str, int]]:
        ranked = head.negatives > 0
        if ranked and layout == "rows":
            yield from shared.products(cells=(4, 8, 16), steps=(4, 8, 16), threads=(32, 64))
        elif ranked:
            yield from shared.products(cells=(8, 16, 32, 64), steps=(8, 16), threads=(128, 256, 512))
        elif layout == "rows":
            yield from shared.products(block=(1024, 2048, 4096), steps=(4, 8, 16), threads=(128, 256, 512))
            yield from shared.products(anchors=(128, 256))
        else:
            yield from shared.products(cells=(256, 512, 1024), planes=(2, 4, 8), threads=(128, 256, 512))
        yield from shared.products(match_threads=(64, 128, 512))
        if ranked:
            yield from shared.products(rank_threads=(64, 256))
        yield from shared.products(stages=(1, 2, 4))

    def kinds(self, kernel: str, programs: int, arguments: Mapping[str, Any]) -> Sequence[int]:
        if kernel == "dense_kernel":
            levels = arguments["levels"]
            streams = [shared.even(n) for n in (*levels.box_programs, *levels.class_programs)]
            return [stream for stream, count in enumerate(streams) for _ in range(count)]
        if kernel in _BY_BLOCK:
            blocks = _blocks(arguments)
            return [int(p % blocks == 0) for p in range(programs)]  # the last block, which begins
        if kernel in ("count_kernel", "rank_kernel"):  # the last reads what all leave, and later launches what it picks
            return range(programs)
        return super().kinds(kernel, programs, arguments)

    def efforts(
        self, kernel: str, kinds: Sequence[int], arguments: Mapping[str, Any], known: Known
    ) -> tuple[Sequence[Any], list[float]]:
        """By the rows of the image that a block of anchors is matched with; of boxes by the anchors that have a row."""
        if kernel in _BY_BLOCK:
            blocks = _blocks(arguments)
            return kinds, [float(known.rows[program // blocks]) for program in range(len(kinds))]
        if kernel != "dense_kernel" or not arguments["SPEC"].FLAT:
            return super().efforts(kernel, kinds, arguments, known)
        levels, spec = arguments["levels"], arguments["SPEC"]
        sizes = [shared.even(n) * shared.even(a) for n, a in zip(levels.cells, levels.anchors, strict=True)]
        has = known.assignment.row >= 0
        boxes = _programs_of(has, sizes, spec.ANCHORS, arguments["steps"] if spec.REPEATS else 1)
        classes = [0] * (len(kinds) - len(boxes))  # logits are read and stored whatever they are of
        if spec.RANKED and not spec.WITH_LOSS:  # but of anchors that do not count
            counted = _counted(arguments["ranked"].ce_ptr, has, known.head.negatives)
            classes = _programs_of(counted, sizes, spec.CELLS, arguments["steps"])
        counts = boxes + classes
        return [(kind, n > 0) for kind, n in zip(kinds, counts, strict=True)], [float(n) for n in counts]

    def adding(self, kernel: str, arguments: Mapping[str, Any]) -> int | None:
        """Of a ranked head those of boxes."""
        if kernel != "dense_kernel" or not arguments["SPEC"].RANKED:
            return None
        return sum(map(shared.even, arguments["levels"].box_programs))

    def complete(self, kernel: str, arguments: Mapping[str, Any], known: Known) -> None:
        """Ranges of rows; matches, the cross-entropies that are ranked, both of the reference, and the counters of the
        ranking.
        """
        found = known.assignment
        if kernel == "overlap_kernel":
            arguments["claims"].ranges_ptr.copy_(_ranges(found.rows[:, 0], len(known.rows)))
        if kernel == "match_kernel":
            ignored = torch.where(found.ignored, reference.IGNORED, -1)
            matched = arguments["matched"]
            matched.match_ptr.copy_(torch.where(found.row >= 0, found.row, ignored))
            counts = (found.row >= 0).sum(1)
            of_batch = reference.normaliser(counts, known.head)[:1] if known.head.mean != "image" else counts[:1]
            matched.found_ptr.copy_(torch.cat((counts, of_batch)))
            if matched.norm_ptr is not None:
                matched.norm_ptr.fill_(found.objectness.sum().clamp(min=1e-6))
            if arguments["picks_ptr"] is not None:
                arguments["picks_ptr"][:, 3] = 0  # programs of the ranking that have finished
        elif kernel == "dense_kernel" and arguments["SPEC"].RANKED and arguments["SPEC"].WITH_LOSS:
            cross_entropy = reference.LABEL_TERMS["softmax_ce"]
            label = found.label.clamp(min=0)  # 0 is the background
            for image, (logits, classes) in enumerate(zip(known.preds[0].float(), label, strict=True)):
                one_hot = torch.nn.functional.one_hot(classes, logits.shape[1]).float()
                arguments["ranked"].ce_ptr[image] = cross_entropy(logits, one_hot, ()).sum(1)


def _ranges(image: Tensor, batch: int) -> Tensor:
    """First and last row of each image, [B, 2], as ``image_rows`` of the kernels has them."""
    end = len(image)
    image = torch.nn.functional.pad(image, (0, 1), value=-1.0)  # of no image, so that there is one
    here, at = image == torch.arange(batch)[:, None], torch.arange(end + 1)
    return torch.stack((torch.where(here, at, end).amin(1), torch.where(here, at + 1, 0).amax(1)), 1)


DENSE = DenseDriver()

_LAUNCHES = {name + "_kernel": name for name in ("overlap", "match", "count", "rank")} | {"dense_kernel": "loss"}
_BY_BLOCK = ("overlap_kernel", "match_kernel")
"""Kernels whose programs are blocks of anchors, image by image."""


def _widths(head: DenseHead) -> tuple[int, ...]:
    """Class logits, numbers of a box and, of some heads, centreness, of an anchor."""
    return (head.num_classes, 4, 1)[: 3 if head.centreness else 2]


def _blocks(arguments: Mapping[str, Any]) -> int:
    """Programs of an image."""
    return -(-arguments["N"] // arguments["SPEC"].BLOCK)


def _programs_of(which: Tensor, sizes: Sequence[int], block: int, steps: int) -> list[int]:
    """How many of [B, N] are so in each program of so many blocks of anchors, level by level, image by image."""
    found = []
    for level in which.split(list(sizes), 1):
        tiles = [int(part.sum()) for image in level for part in image.split(block)]
        found += [sum(tiles[i : i + steps]) for i in range(0, len(tiles), steps)]
    return found


def _counted(cross_entropy: Tensor, has: Tensor, ratio: float) -> Tensor:
    """[B, N]: anchors with a row, and those hardest without one that count, of their cross-entropies."""
    hardest = cross_entropy.masked_fill(has, -math.inf).argsort(stable=True, dim=1, descending=True).argsort(1)
    return has | (hardest < (ratio * has.sum(1, keepdim=True)).ceil())
