"""Gradients that a forward makes already, for an upstream gradient of 1: autograd multiplies them by what comes.

A loss is where a backward begins, so its upstream gradient is one number. A second backward after the first has taken
the gradients runs the forward again, so that it gives the same bits; for second derivatives they are made from the
inputs by what can be differentiated.

The operators served: arguments (hidden, weight, bias, ..., needs), needs saying which of the first three's gradients
are wanted; results (loss, ..., gradient of hidden, of weight, of bias). The loss of rows, not reduced to a number, has
none that are made already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmkern import autocast
from llmkern.operator import call_key, check_types, dispatch, is_compiling

#: The gradients of hidden, weight and bias made again, of the operator's arguments, its results between the loss and
#: the gradients, the loss's gradient, and which of the three are needed.
Again = Callable[[Sequence[Any], Sequence[Tensor], Tensor, tuple[bool, ...]], Sequence[Tensor | None]]


def loss(
    name: str, function: type[torch.autograd.Function], run: Callable[..., tuple[Tensor, ...]], args: tuple[Any, ...]
) -> Tensor:
    """The loss of an operator's arguments but the last: by its Function of eager calls where they are plain tensors, by
    the dispatcher else. Under autocast its floating tensors are cast first, as torch casts those of a linear layer."""
    device = args[0].device
    if autocast.is_on(device):
        args = tuple(autocast.cast(t)[0] if isinstance(t, Tensor) else t for t in args)
        with torch.autocast(device.type, enabled=False):
            return loss(name, function, run, args)
    enabled = torch.is_grad_enabled()
    needs = [enabled and isinstance(t, Tensor) and t.requires_grad for t in args[:3]]
    if is_compiling() or call_key(*(t for t in args if isinstance(t, Tensor))) is None:
        result: Tensor = dispatch(name, *args, needs)[0]
        return result
    check_types(name, (*args, needs))
    return function.apply(*args, needs) if any(needs) else run(*args, needs)[0]


def rules(again: Again) -> tuple[Callable[..., None], Callable[..., Any]]:
    """setup_context and backward of the operator, for `define`."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.arguments = len(inputs)
        _save(ctx, (*inputs, *output[1:]))

    def backward(ctx: Any, grad: Tensor | None, *others: Any) -> tuple[Tensor | None, ...]:
        every = _saved(ctx)
        inputs, results = every[: ctx.arguments], every[ctx.arguments :]
        found = _gradients(ctx, again, inputs, results[:-3], results[-3:], grad, _times)
        return *found, *(None,) * (len(inputs) - 3)

    return setup, backward


def function(run: Callable[..., tuple[Tensor, ...]], again: Again) -> type[torch.autograd.Function]:
    """The autograd.Function of eager calls on plain tensors; it gives the loss alone.

    It owns the gradients and hands them out at the first backward. They are no saved tensors, which autograd would copy
    when it accumulates them.
    """

    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            loss, *results = run(*args)
            ctx.kept = results[-3:]
            ctx.set_materialize_grads(False)
            ctx.arguments = len(args)
            _save(ctx, (*args, *results[:-3]))
            return loss

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None) -> Any:
            every = _saved(ctx)
            inputs, results = every[: ctx.arguments], every[ctx.arguments :]
            kept = ctx.kept
            if kept is None and grad is not None and grad.dim() == 0 and not torch.is_grad_enabled():
                kept = run(*inputs)[-3:]
            # Of several upstream gradients at once (vmap), one tensor would have to hold all results.
            several = grad is not None and _is_batched(grad)
            if grad is not None and not several and not torch.is_grad_enabled():
                ctx.kept = None
            found = _gradients(ctx, again, inputs, results, kept, grad, _times if several else _taken)
            return *found, *(None,) * (len(inputs) - 3)

    return Kept


def without_autocast(run: Callable[..., Any]) -> Callable[..., Any]:
    """The function with autocast off for its own products: its tensors have their dtype already."""

    def plain(x: Tensor, *rest: Any) -> Any:
        if not autocast.is_on(x.device):
            return run(x, *rest)
        with torch.autocast(x.device.type, enabled=False):
            return run(x, *rest)

    return plain


def _gradients(
    ctx: Any, again: Again, inputs: Sequence[Any], results: Sequence[Tensor], kept: Sequence[Tensor] | None,
    grad: Tensor | None, scale: Callable[[Tensor, Tensor, torch.dtype], Tensor],
) -> list[Tensor | None]:  # fmt: skip
    if grad is None:
        return [None, None, None]
    needed = tuple(ctx.needs_input_grad[:3])
    made = kept is not None and grad.dim() == 0 and all(m or not n for m, n in zip(inputs[-1], needed, strict=True))
    if kept is None or not made or torch.is_grad_enabled():
        return [g if n else None for g, n in zip(again(inputs, results, grad, needed), needed, strict=True)]
    return [
        scale(k, grad, t.dtype) if n and t is not None else None
        for k, t, n in zip(kept, inputs[:3], needed, strict=True)
    ]


def _times(kept: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return (kept * factor).to(dtype)


def _taken(kept: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`_times` without a copy. The number of a GPU is not waited for."""
    if factor.device.type != "cpu" or factor.item() != 1.0:
        kept.mul_(factor)
    return kept.to(dtype)


def _is_batched(grad: Tensor) -> bool:
    """Of torch.func's vmap, or of autograd's own, which is_grads_batched uses."""
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(grad) or functorch.is_legacy_batchedtensor(grad)


def _save(ctx: Any, values: tuple[Any, ...]) -> None:
    ctx.places = [i for i, t in enumerate(values) if isinstance(t, Tensor)]
    ctx.others = [None if isinstance(t, Tensor) else t for t in values]
    ctx.save_for_backward(*(values[i] for i in ctx.places))


def _saved(ctx: Any) -> list[Any]:
    values = list(ctx.others)
    for i, t in zip(ctx.places, ctx.saved_tensors, strict=True):
        values[i] = t
    return values
