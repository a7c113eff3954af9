"""The table of terms: a row each, and every list of names derives from it.

A row and two functions of its name make a term: one in ``kernels/terms/ROOM.py``, and its twin in
``fusedyolo/reference/terms/ROOM.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from . import checks


@dataclass(frozen=True)
class Term:
    """A term, and what is to be known of it outside its formula.

    Roles: ``"iou"``, of decoded boxes, and the similarity that objectness is trained towards; ``"boxes"``, of decoded
    boxes and no similarity; ``"offset"``, of a grid's logits; ``"delta"``, of the raw outputs of an anchor that has a
    place; ``"class"`` and ``"objectness"``, of logits; ``"grid"`` and ``"anchor"``, decoding. ``source`` is where the
    formula is from.

    ``numbers`` are those that it takes, in their order, with usual values; ``optional`` those that may follow, all or
    none, with values that change nothing. An offset term and a decoding take one number, whether they read it or not.

    ``users`` may ask for it, else it is there for parity with a peer. ``needs_extent``: it reads the sides of the
    image. ``elementwise``: it judges each logit by itself.
    """

    name: str
    room: str
    roles: tuple[str, ...]
    source: str
    numbers: dict[str, float] = field(default_factory=dict)
    optional: dict[str, float] = field(default_factory=dict)
    users: bool = True
    needs_extent: bool = False
    elementwise: bool = True

    @property
    def kernel(self) -> Any:
        """The function that kernels call."""
        return getattr(import_module(f"fusedyolo.kernels.terms.{self.room}"), self.name)

    def kernel_args(self, args: Sequence[float]) -> tuple[Any, ...]:
        """The numbers ``args`` as that function takes them: a label term's gamma with what raises to it."""
        if self.room != "label":
            return tuple(args)
        from .kernels.terms.label import power

        names = (*self.numbers, *self.optional)
        return tuple(power(value) if name == "gamma" else value for name, value in zip(names, args, strict=False))

    @property
    def is_offset(self) -> bool:
        """Whether it takes raw outputs, not decoded boxes."""
        return self.room == "offset"


def _iou(name: str, source: str, **more: Any) -> Term:
    """An IoU term, which has an alpha and a focal form unless ``more`` says otherwise."""
    more = {"optional": {"alpha": 1.0, "gamma": 0.0}, **more}
    return Term(name, "box", ("iou",), source, {"eps": 1e-7, "eps_alpha": 1e-7}, **more)


def _offset(name: str, role: str, source: str, **more: Any) -> Term:
    return Term(name, "offset", (role,), source, **more)


def _label(name: str, source: str, elementwise: bool = True, **more: Any) -> Term:
    roles = ("class", "objectness") if elementwise else ("class",)
    return Term(name, "label", roles, source, elementwise=elementwise, **more)


def _decode(name: str, role: str, source: str, **more: Any) -> Term:
    return Term(name, "decode", (role,), source, **more)


_ROWS = (
    _iou("iou", "Rezatofighi et al. 2019, arXiv 1902.09630"),
    _iou("giou", "Rezatofighi et al. 2019, arXiv 1902.09630"),
    _iou("diou", "Zheng et al. 2019, arXiv 1911.08287"),
    _iou("ciou", "Zheng et al. 2019, arXiv 1911.08287"),
    _iou("eiou", "Zhang et al. 2021, arXiv 2101.08158"),
    _iou("siou", "Gevorgyan 2022, arXiv 2205.12740"),
    _iou("mpdiou", "Ma & Xu 2023, arXiv 2307.07662", needs_extent=True),
    _iou("ciou_whole", "bubbliiiing/yolov4-pytorch", users=False),
    _iou("ciou_plus", "lightnet 4.0", optional={}, users=False),
    Term("iou_log", "box", ("boxes",), "Yu et al. 2016, arXiv 1608.01471", {"floor": 1e-6}),
    _offset("mse", "offset", "Redmon & Farhadi 2018, arXiv 1804.02767", numbers={"sensitivity": 1.0}),
    _offset("bce_mse", "offset", "AlexeyAB/darknet", numbers={"sensitivity": 1.0}, users=False),
    _offset("l1", "delta", "torchvision"),
    _offset("smooth_l1", "delta", "Girshick 2015, arXiv 1504.08083", numbers={"beta": 1.0}),
    _label("bce", "PyTorch", optional={"pos_weight": 1.0}),
    _label(
        "focal",
        "Lin et al. 2017, arXiv 1708.02002",
        numbers={"alpha": 0.25, "gamma": 2.0},
        optional={"pos_weight": 1.0},
    ),
    _label("softmax_ce", "PyTorch", elementwise=False),
    _label("qfl", "Li et al. 2020, arXiv 2006.04388", numbers={"alpha": -1.0, "gamma": 2.0}),
    _label("varifocal", "Zhang et al. 2021, arXiv 2008.13367", numbers={"alpha": 0.75, "gamma": 2.0}),
    _label("sse", "AlexeyAB/darknet, new_coords", users=False),
    _decode("exp", "grid", "Redmon & Farhadi 2016, arXiv 1612.08242", numbers={"sensitivity": 1.0}),
    _decode("sigmoid_square", "grid", "Wang et al. 2020, arXiv 2011.08036", numbers={"sensitivity": 2.0}),
    _decode("delta", "anchor", "Ren et al. 2015, arXiv 1506.01497", numbers={"scale": 1.0}),
    _decode("ltrb", "anchor", "Tian et al. 2019, arXiv 1904.01355"),
)
TERMS = {term.name: term for term in _ROWS}


def term_names(*roles: str, users: bool = False) -> tuple[str, ...]:
    """The terms of ``roles``, or those of them for users, role by role in the order of the table."""
    return tuple(t.name for role in roles for t in TERMS.values() if role in t.roles and (t.users or not users))


def find_term(argument: str, name: Any, *roles: str, users: bool = False) -> Term:
    """The term of one of ``roles`` that ``argument`` names.

    Raises:
        ValueError: there is none of that name, or none for ``users``.
    """
    return TERMS[checks.one_of(argument, name, term_names(*roles, users=users))]


def check_term(argument: str, name: str, args: Sequence[float], *roles: str) -> None:
    """Raises:
    ValueError: ``argument`` names no term of ``roles``, or one that takes another number of ``args``.
    """
    term = find_term(argument, name, *roles)
    plain, full = len(term.numbers), len(term.numbers) + len(term.optional)
    if not term.is_offset and len(args) not in (plain, full):
        want = f"{plain} for {name!r}: ({', '.join(term.numbers)})"
        if term.optional:
            want += f", or {full}: with ({', '.join(term.optional)})"
        checks.fail(f"arguments of {argument}", f"{len(args)} numbers", want)
