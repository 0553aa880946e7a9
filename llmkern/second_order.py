"""Gradients of gradients, composed: the plain formulas of a backward, through torch's own operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def composed(
    function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Any, ...], needed: tuple[bool, ...], grads: Any
) -> tuple[Tensor | None, ...]:
    """The gradients of function(*inputs), a tuple of tensors, for the inputs that are `needed`.

    grads: those of the function's results, None for those that have none. Whatever calls this with gradients enabled
    can differentiate the result again.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # A tensor that is given twice counts for each place by itself: each place gets a view of its own.
        fed = [t.view_as(t) if n else t for t, n in zip(inputs, needed, strict=True)]
        leaves = [t for t, n in zip(fed, needed, strict=True) if n]
        pairs = [(o, g) for o, g in zip(function(*fed), grads, strict=True) if g is not None and o.requires_grad]
        if not pairs or not leaves:
            return tuple(None for _ in inputs)
        found = torch.autograd.grad(
            [o for o, _ in pairs], leaves, [g.to(o.dtype) for o, g in pairs], create_graph=again, allow_unused=True
        )
    each = iter(found)
    return tuple(next(each) if n else None for n in needed)


def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """setup_context of an operator whose backward is `backward_of` a function."""
    ctx.set_materialize_grads(False)
    ctx.places = [i for i, t in enumerate(inputs) if isinstance(t, Tensor)]
    ctx.others = [None if isinstance(t, Tensor) else t for t in inputs]
    ctx.save_for_backward(*(inputs[i] for i in ctx.places))


def backward_of(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """The backward, for `define`, of an operator that computes what the plain function does."""

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = list(ctx.others)
        for i, t in zip(ctx.places, ctx.saved_tensors, strict=True):
            inputs[i] = t
        return composed(function, tuple(inputs), tuple(ctx.needs_input_grad[: len(inputs)]), grads)

    return backward
