"""Operators of our own: what ``torch.library.custom_op`` offers, registered one step below it.

A step of a loss is two operators, and on a GPU their host is what a small batch waits for. ``custom_op`` walks through
all arguments as trees, five times a step where there are lists of tensors among them, and compares all memory with all
other; that is two thirds of its time. Here arguments are flattened by the schema, in one pass.

    @operator
    def loss(preds: list[Tensor], rows: Tensor) -> tuple[Tensor, Tensor]: ...

    @fake(loss)
    def _(preds, rows): ...

    differentiable(loss, formula, save)

An operator is an ``OpOverload``, as ``torch.ops.fusedyolo.loss.default``: ``torch.compile``, ``torch.export`` and
``torch.library.opcheck`` know it. It must not return what it was given; those that change an argument say so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

_NAMESPACE = "fusedyolo"
_LIBRARY = torch.library.Library(_NAMESPACE, "FRAGMENT")

FUNCTIONS: dict[OpOverload, Callable[..., Any]] = {}
"""What each operator runs, tensors in hand."""


def operator(function: Callable[..., Any], *, mutates: Sequence[str] = ()) -> OpOverload:
    """The operator that runs ``function``, of its name and with the schema that its annotations spell; ``mutates`` are
    the tensors, or lists of tensors, that it changes.
    """
    name = function.__name__
    schema = torch.library.infer_schema(function, mutates_args=mutates)
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    found: OpOverload = getattr(getattr(torch.ops, _NAMESPACE), name).default
    changed = [i for i, argument in enumerate(found._schema.arguments) if argument.name in mutates]
    _LIBRARY.impl(name, _eager(function, changed), "CompositeExplicitAutograd")
    FUNCTIONS[found] = function
    return found


def _eager(function: Callable[..., Any], changed: list[int]) -> Callable[..., Any]:
    """``function``, which Dynamo does not look into where it meets it outside of a graph."""
    untraced: list[Callable[..., Any]] = []  # made when it is first wanted: it takes an import of a second

    def run(*arguments: Any) -> Any:
        if not untraced:
            untraced.append(torch.compiler.disable(function))
        for i in changed:
            torch.autograd.graph.increment_version(arguments[i])
        return untraced[0](*arguments)

    return run


def fake(op: OpOverload) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates what makes an operator's outputs, empty, of tensors that hold nothing and of sizes that are symbols."""
    return torch.library.register_fake(op, lib=_LIBRARY)


class _Call:
    """One call on its way through autograd: its arguments, then how many tensors each output that is a list has."""

    __slots__ = ("arguments", "counts")

    def __init__(self, arguments: tuple[Any, ...]):
        self.arguments = arguments
        self.counts: list[int | None] = []


def differentiable(op: OpOverload, formula: Callable[..., Any], save: Callable[..., None] | None = None) -> None:
    """Give an operator its gradient.

    Args:
        op: the operator.
        formula: ``formula(ctx, *grads)``, one for each output, a list for a list; returns the gradient of the first
            argument, or those of the first ones, a list for a list. The others have none.
        save: ``save(ctx, inputs, output)`` keeps what the formula needs; ``inputs`` are all arguments, in order.
    """
    arguments, returns = op._schema.arguments, op._schema.returns
    defaults = tuple(argument.default_value for argument in arguments)
    lists, alone = any(_is_list(item) for item in returns), len(returns) == 1

    class Gradient(torch.autograd.Function):
        """The operator below autograd, and its backward."""

        @staticmethod
        def forward(ctx: Any, call: _Call, *_flat: Any) -> Any:
            given = call.arguments
            with torch._C._AutoDispatchBelowAutograd():
                outputs = op(*given)
            if save is not None:
                save(ctx, given + defaults[len(given) :], outputs)
            if not lists:
                return outputs
            every = (outputs,) if alone else outputs
            ctx.counts = call.counts = [len(item) if isinstance(item, list) else None for item in every]
            return tuple(_flat_list(every))

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            found = formula(ctx, *(_nested(grads, ctx.counts) if lists else grads))
            flat = _flat_list(found if isinstance(found, tuple) else (found,))
            return None, *flat, *(None,) * (len(ctx.needs_input_grad) - 1 - len(flat))

    Gradient.__name__ = Gradient.__qualname__ = f"Gradient of {op}"

    def autograd(*given: Any) -> Any:
        if torch.is_grad_enabled():
            flat = _flat_list(given)
            if any([item.requires_grad for item in flat if isinstance(item, Tensor)]):
                call = _Call(given)
                outputs = Gradient.apply(call, *flat)
                if not lists:
                    return outputs
                every = _nested(outputs, call.counts)
                return every[0] if alone else tuple(every)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*given)

    _LIBRARY.impl(op._opname, autograd, "Autograd")


def _is_list(item: Any) -> bool:
    return item.type.kind() == "ListType"


def _flat_list(items: Sequence[Any]) -> list[Any]:
    """Items, and the items of lists among them."""
    flat: list[Any] = []
    for item in items:
        if isinstance(item, list):
            flat += item
        else:
            flat.append(item)
    return flat


def _nested(flat: Sequence[Any], counts: list[int | None]) -> list[Any]:
    """The other way round: a list of so many items, or an item alone for None."""
    items, at = [], 0
    for count in counts:
        if count is None:
            items.append(flat[at])
        else:
            items.append(list(flat[at : at + count]))
        at += 1 if count is None else count
    return items
