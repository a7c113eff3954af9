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

``call(loss, preds, rows)`` is ``loss(preds, rows)`` without the dispatcher, where nothing would become of the call on
its way: a list of tensors takes it longer than a launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

_NAMESPACE = "fusedyolo"
_LIBRARY = torch.library.Library(_NAMESPACE, "FRAGMENT")

FUNCTIONS: dict[OpOverload, Callable[..., Any]] = {}
"""What each operator runs, tensors in hand."""


@dataclass(slots=True)
class _Route:
    """Past the dispatcher: what an operator runs, the places of the arguments that it changes, and the
    ``torch.autograd.Function`` of one that has a gradient, of so many ``outputs``.
    """

    run: Callable[..., Any]
    changed: list[int]
    gradient: Any = None
    outputs: int = 0


_ROUTES: dict[OpOverload, _Route] = {}


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
    FUNCTIONS[found], _ROUTES[found] = function, _Route(function, changed)
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
    """One call on its way through autograd: what is run, its arguments, and of how many of its first outputs a gradient
    is wanted; then all outputs, and how many tensors each of those is that is a list.
    """

    __slots__ = ("arguments", "counts", "every", "run", "wanted")

    def __init__(self, run: Callable[..., Any], arguments: tuple[Any, ...], wanted: int):
        self.run, self.arguments, self.wanted = run, arguments, wanted
        self.every: tuple[Any, ...] = ()
        self.counts: list[int | None] = []


def differentiable(
    op: OpOverload, formula: Callable[..., Any], save: Callable[..., None] | None = None, outputs: int | None = None
) -> None:
    """Give an operator its gradient.

    Args:
        op: the operator.
        formula: ``formula(ctx, *grads)``, one for each of the first ``outputs``, or fewer where a :func:`call` wants
            fewer, a list for a list; returns the gradient of the first argument, or those of the first ones, a list for
            a list. The others have none.
        save: ``save(ctx, inputs, output)`` keeps what the formula needs; ``inputs`` are all arguments, in order.
        outputs: how many have a gradient, all of them if None.
    """
    arguments, returns = op._schema.arguments, op._schema.returns
    defaults = tuple(argument.default_value for argument in arguments)
    wanted, alone = len(returns) if outputs is None else outputs, len(returns) == 1

    class Gradient(torch.autograd.Function):
        """The operator below autograd, and its backward."""

        @staticmethod
        def forward(ctx: Any, call: _Call, *_tensors: Any) -> Any:
            given = call.arguments
            with torch._C._AutoDispatchBelowAutograd():
                found = call.run(*given)
            if save is not None:
                save(ctx, given + defaults[len(given) :], found)
            call.every = (found,) if alone else tuple(found)
            first = call.every[: call.wanted]
            ctx.counts = call.counts = [len(item) if isinstance(item, list) else None for item in first]
            return tuple(_flat_list(first))

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            found = formula(ctx, *_nested(grads, ctx.counts))
            flat = _flat_list(found if isinstance(found, tuple) else (found,))
            return None, *flat, *(None,) * (len(ctx.needs_input_grad) - 1 - len(flat))

    Gradient.__name__ = Gradient.__qualname__ = f"Gradient of {op}"

    def autograd(*given: Any) -> Any:
        return _below(Gradient, op, given, _tensors(given), wanted)

    _ROUTES[op].gradient, _ROUTES[op].outputs = Gradient, wanted
    _LIBRARY.impl(op._opname, autograd, "Autograd")


def _below(gradient: Any, run: Callable[..., Any], given: tuple[Any, ...], tensors: list[Tensor], wanted: int) -> Any:
    """``run(*given)`` below autograd, which is told of it where one of the ``tensors`` among them wants to know."""
    if torch.is_grad_enabled() and any([item.requires_grad for item in tensors]):
        flat = gradient.apply(call := _Call(run, given, wanted), *tensors)
        first = _nested(flat, call.counts)
        return first[0] if len(call.every) == 1 else (*first, *call.every[wanted:])
    with torch._C._AutoDispatchBelowAutograd():
        return run(*given)


def call(op: OpOverload, *given: Any, outputs: int | None = None) -> Any:
    """``op(*given)``: past the dispatcher where the arguments are plain tensors and nobody waits for the call there, no
    tracer, no mode, no transform and no profiler.

    Outputs beyond the first ``outputs`` need not have a gradient, which saves their way through autograd.
    """
    if torch.compiler.is_compiling() or _is_watched():
        return op(*given)
    tensors = _tensors(given)
    if not _PLAIN.issuperset(map(type, tensors)):
        return op(*given)
    route = _ROUTES[op]
    if route.gradient is not None:
        return _below(route.gradient, route.run, given, tensors, outputs or route.outputs)
    for i in route.changed:
        torch.autograd.graph.increment_version(given[i])
    with torch._C._AutoDispatchBelowAutograd():
        return route.run(*given)


_PLAIN = {Tensor, torch.nn.Parameter}


def _is_watched() -> bool:
    """Whether somebody looks at what the dispatcher is given, or at our frames."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )


def _is_list(item: Any) -> bool:
    return item.type.kind() == "ListType"


def _tensors(items: Sequence[Any]) -> list[Tensor]:
    """Tensors among items, and in lists among these."""
    found: list[Tensor] = []
    for item in items:
        kind = type(item)
        if kind is list:
            if item and isinstance(item[0], Tensor):
                found += item
        elif kind is Tensor or (kind not in _NO_TENSORS and isinstance(item, Tensor)):
            found.append(item)
    return found


_NO_TENSORS = {type(None), bool, int, float, str}


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
