"""torch.ops.llmkern.attention and its backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmkern import second_order
from llmkern.attention import compiled, cuda, reference
from llmkern.attention.layout import empty_in_order
from llmkern.attention.mask import RULE_COUNT, RULES, Mask
from llmkern.attention.op import checks
from llmkern.attention.triton_launch import TRITON_ATTENTION, TRITON_ATTENTION_BACKWARD
from llmkern.backend import Operator, reference_backend
from llmkern.operator import call_key, define, dispatch, is_compiling, is_plain, refuse_forward_ad, short_autograd


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float, uniform_empty_rows: bool = False
) -> tuple[Tensor, Tensor]:
    """softmax(scale * query @ key^T, changed and masked) @ value, and the log-sum-exp of each row of scores.

    query (B, H, Sq, D), key (B, Hkv, Sk, D), value (B, Hkv, Sk, Dv), all float32, bfloat16 or float16, Hkv a divisor
    of H; mask as llmkern.attention.mask.Mask describes it. Returns (B, H, Sq, Dv) in the memory order of query, and
    (B, H, Sq) float64: rounded to float32 it would give every weight of a row the same error again in the backward.
    Gradients flow through both, to query, key, value, an additive mask and learnable_sink. A row with every key masked
    is zeros or, with uniform_empty_rows and without a sink, the average of all values.

    Raises TypeError for a wrong dtype, ValueError for a wrong shape, device or option.
    """
    args = (query, key, value, *mask.arguments(), scale, uniform_empty_rows)
    found = None if is_compiling() else call_key(*args)
    if found is not None:
        launch = _ATTENTION.short.get(found) or _ATTENTION.short_call(found, _Attention.apply, *args)
        return launch(*args)
    # Here and not in the operator alone: torch.func unwraps its tangents on the way there.
    refuse_forward_ad("attention", query, key, value, mask.dense, mask.learnable_sink)
    output, logsumexp = dispatch("attention", *args)
    return output, logsumexp


def short_attention(found: bytes, *args: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """What runs the operator for calls of this key (llmkern.operator.call_key), once its arguments are checked."""
    return _Attention.apply if found[0] else _ATTENTION.plan(*args)


def _check_attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> None:
    checks.query_key(query, key, *rest)
    checks.value(key, value)


def _check_backward(
    grad_output: Tensor, grad_logsumexp: Tensor | None, query: Tensor, key: Tensor, value: Tensor, output: Tensor,
    logsumexp: Tensor, *rest: Any,
) -> None:  # fmt: skip
    _check_attention(query, key, value, *rest)
    checks.per_row("logsumexp", query, logsumexp)
    if grad_logsumexp is not None:
        checks.per_row("grad_logsumexp", query, grad_logsumexp)
    for name, t in (("grad_output", grad_output), ("output", output)):
        checks.like_query(name, query, t, "(B, H, Sq, Dv)", (*query.shape[:3], value.size(3)))


#: The rules of a typical call.
CAUSAL = (*Mask(window_right=0).arguments(), 0.125, False)


def _example(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    x = torch.empty(1, 8, 128, 64, dtype=dtype, device=device)
    return x, x, x, *CAUSAL


def _example_backward(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    x = torch.empty(1, 8, 128, 64, dtype=dtype, device=device)
    return x, None, x, x, x, x, torch.empty(1, 8, 128, dtype=torch.float64, device=device), *CAUSAL, False


_ATTENTION = Operator(
    "attention",
    _check_attention,
    _example,
    cpu=[compiled.CPU_ATTENTION, reference_backend(reference.attention)],
    cuda=[cuda.CUDA_ATTENTION, TRITON_ATTENTION, reference_backend(reference.attention)],
    other=[reference_backend(reference.attention)],
)
_BACKWARD = Operator(
    "attention_backward",
    _check_backward,
    _example_backward,
    cpu=[compiled.CPU_ATTENTION_BACKWARD, reference_backend(reference.attention_backward)],
    cuda=[cuda.CUDA_ATTENTION_BACKWARD, TRITON_ATTENTION_BACKWARD, reference_backend(reference.attention_backward)],
    other=[reference_backend(reference.attention_backward)],
)


def _fake_attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _check_attention(query, key, value, *rest)
    return empty_in_order(query, value.size(3)), query.new_empty(query.shape[:3], dtype=torch.float64)


def fake_mask_grad(query: Tensor, mask: Tensor | None, mask_grad: bool) -> Tensor:
    return query.new_empty(mask.shape if mask_grad and mask is not None else 0, dtype=torch.float32)


def fake_sink_grad(query: Tensor, learnable_sink: Tensor | None) -> Tensor:
    return query.new_empty(0 if learnable_sink is None else learnable_sink.size(0), dtype=torch.float32)


def _fake_backward(
    grad_output: Tensor, grad_logsumexp: Tensor | None, query: Tensor, key: Tensor, value: Tensor, output: Tensor,
    logsumexp: Tensor, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    _check_backward(grad_output, grad_logsumexp, query, key, value, output, logsumexp, *rest)
    dquery, dkey, dvalue = (empty_in_order(t, t.size(3)) for t in (query, key, value))
    return dquery, dkey, dvalue, fake_mask_grad(query, rest[0], rest[-1]), fake_sink_grad(query, rest[3])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, mask, key_lengths, alibi_slopes, learnable_sink, dropout_seed, *ctx.rest = inputs
    checks.no_gradient_of_slopes(alibi_slopes, ctx.needs_input_grad[5])
    ctx.set_materialize_grads(False)  # so that nobody pays for the log-sum-exp's where it is not used
    ctx.save_for_backward(
        query, key, value, *output, mask, key_lengths, alibi_slopes, learnable_sink, dropout_seed
    )  # fmt: skip


def _backward(ctx: Any, grad_output: Tensor | None, grad_logsumexp: Tensor | None) -> tuple[Any, ...]:
    if grad_output is None and grad_logsumexp is None:
        return (None,) * (3 + RULE_COUNT)
    query, key, value, output, logsumexp, mask, *tensors = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    mask_grad = mask is not None and ctx.needs_input_grad[3]
    args = (
        grad_output, grad_logsumexp, query, key, value, output, logsumexp, mask, *tensors, *ctx.rest, mask_grad
    )  # fmt: skip
    short = not torch.is_grad_enabled() and is_plain(*args[:12])
    grads = (_BACKWARD.run if short else torch.ops.llmkern.attention_backward)(*args)
    needed = [g if n else None for g, n in zip(grads[:3], ctx.needs_input_grad[:3], strict=True)]
    grad_sink = grads[4].to(tensors[2].dtype) if ctx.needs_input_grad[6] else None
    grad_mask = grads[3].to(mask.dtype) if mask_grad else None
    return *needed, grad_mask, None, None, grad_sink, *(None,) * (RULE_COUNT - 4)


define(
    f"attention(Tensor query, Tensor key, Tensor value, {RULES}) -> (Tensor, Tensor)",
    _ATTENTION.run, _fake_attention, setup_context=_setup, backward=_backward,
)  # fmt: skip
define(
    "attention_backward(Tensor grad_output, Tensor? grad_logsumexp, Tensor query, Tensor key, Tensor value, "
    f"Tensor output, Tensor logsumexp, {RULES}, bool mask_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _BACKWARD.run, _fake_backward,
    setup_context=second_order.setup, backward=second_order.backward_of(reference.attention_backward),
)  # fmt: skip

_Attention = short_autograd(_ATTENTION.run, _setup, _backward)
