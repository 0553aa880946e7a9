"""torch.ops.llmkern.attention_weights with its backward, and attention_column_sums.

Both make the softmax again from the log-sum-exp that `attention` returned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern import second_order
from llmkern.attention import compiled, reference
from llmkern.attention.layout import empty_in_order
from llmkern.attention.mask import RULE_COUNT, RULES, Mask
from llmkern.attention.op import checks
from llmkern.attention.op.dense import CAUSAL, fake_mask_grad, fake_sink_grad
from llmkern.attention.triton_weights_launch import TRITON_COLUMN_SUMS, TRITON_WEIGHTS, TRITON_WEIGHTS_BACKWARD
from llmkern.backend import Operator, reference_backend
from llmkern.operator import call_key, define, dispatch, is_compiling, is_plain, refuse_forward_ad, short_autograd


def attention_weights(
    query: Tensor, key: Tensor, logsumexp: Tensor, mask: Mask, scale: float, uniform_empty_rows: bool = False
) -> Tensor:
    """The attention weights, (B, H, Sq, Sk) in query's dtype, from the log-sum-exp that `attention` returned.

    They are those before dropout. Raises as `attention` does.
    """
    args = (query, key, logsumexp, *mask.arguments(), scale, uniform_empty_rows)
    found = None if is_compiling() else call_key(*args)
    if found is not None:
        launch = _WEIGHTS.short.get(found) or _WEIGHTS.short_call(found, _AttentionWeights.apply, *args)
        return launch(*args)
    refuse_forward_ad("attention_weights", query, key, mask.dense, mask.learnable_sink)
    weights: Tensor = dispatch("attention_weights", *args)
    return weights


def attention_column_sums(
    query: Tensor, key: Tensor, logsumexp: Tensor, mask: Mask, scale: float, uniform_empty_rows: bool = False
) -> Tensor:
    """The sums over the queries of `attention_weights`, (B, H, Sk) float32. Raises as `attention` does."""
    args = (query, key, logsumexp, *mask.arguments(), scale, uniform_empty_rows)
    refuse_forward_ad("attention_column_sums", query, key, mask.dense, mask.learnable_sink)
    sums: Tensor = dispatch("attention_column_sums", *args)
    return sums


def _check_weights(query: Tensor, key: Tensor, logsumexp: Tensor, *rest: Any) -> None:
    checks.query_key(query, key, *rest)
    checks.per_row("logsumexp", query, logsumexp)


def _check_weights_backward(grad_weights: Tensor, query: Tensor, key: Tensor, logsumexp: Tensor, *rest: Any) -> None:
    _check_weights(query, key, logsumexp, *rest)
    checks.like_query("grad_weights", query, grad_weights, "(B, H, Sq, Sk)", (*query.shape[:3], key.size(2)))


def _example(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    x = torch.empty(1, 8, 128, 64, dtype=dtype, device=device)
    return x, x, torch.empty(1, 8, 128, dtype=torch.float64, device=device), *CAUSAL


def _example_backward(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    return torch.empty(1, 8, 128, 128, dtype=dtype, device=device), *_example(device, dtype), False


_WEIGHTS = Operator(
    "attention_weights",
    _check_weights,
    _example,
    cpu=[compiled.CPU_ATTENTION_WEIGHTS, reference_backend(reference.attention_weights)],
    cuda=[TRITON_WEIGHTS, reference_backend(reference.attention_weights)],
    other=[reference_backend(reference.attention_weights)],
)
_BACKWARD = Operator(
    "attention_weights_backward",
    _check_weights_backward,
    _example_backward,
    cpu=[compiled.CPU_ATTENTION_WEIGHTS_BACKWARD, reference_backend(reference.attention_weights_backward)],
    cuda=[TRITON_WEIGHTS_BACKWARD, reference_backend(reference.attention_weights_backward)],
    other=[reference_backend(reference.attention_weights_backward)],
)
_COLUMN_SUMS = Operator(
    "attention_column_sums",
    _check_weights,
    _example,
    cpu=[compiled.CPU_COLUMN_SUMS, reference_backend(reference.attention_column_sums)],
    cuda=[TRITON_COLUMN_SUMS, reference_backend(reference.attention_column_sums)],
    other=[reference_backend(reference.attention_column_sums)],
)


def _fake_weights(query: Tensor, key: Tensor, logsumexp: Tensor, *rest: Any) -> Tensor:
    _check_weights(query, key, logsumexp, *rest)
    return query.new_empty((*query.shape[:3], key.size(2)))


def _fake_backward(
    grad_weights: Tensor, query: Tensor, key: Tensor, logsumexp: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_weights_backward(grad_weights, query, key, logsumexp, *rest)
    dquery, dkey = (empty_in_order(t, t.size(3)) for t in (query, key))
    return dquery, dkey, fake_mask_grad(query, rest[0], rest[-1]), fake_sink_grad(query, rest[3])


def _fake_column_sums(query: Tensor, key: Tensor, logsumexp: Tensor, *rest: Any) -> Tensor:
    _check_weights(query, key, logsumexp, *rest)
    return query.new_empty((*query.shape[:2], key.size(2)), dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, logsumexp, mask, key_lengths, alibi_slopes, learnable_sink, dropout_seed, *ctx.rest = inputs
    checks.no_gradient_of_slopes(alibi_slopes, ctx.needs_input_grad[5])
    ctx.save_for_backward(query, key, logsumexp, mask, key_lengths, alibi_slopes, learnable_sink, dropout_seed)


def _backward(ctx: Any, grad_weights: Tensor) -> tuple[Any, ...]:
    query, key, logsumexp, mask, *tensors = ctx.saved_tensors
    mask_grad = mask is not None and ctx.needs_input_grad[3]
    args = (grad_weights, query, key, logsumexp, mask, *tensors, *ctx.rest, mask_grad)
    short = not torch.is_grad_enabled() and is_plain(*args[:9])
    grads = (_BACKWARD.run if short else torch.ops.llmkern.attention_weights_backward)(*args)
    needed = [g if n else None for g, n in zip(grads[:2], ctx.needs_input_grad[:2], strict=True)]
    grad_sink = grads[3].to(tensors[2].dtype) if ctx.needs_input_grad[6] else None
    grad_mask = grads[2].to(mask.dtype) if mask_grad else None
    return *needed, None, grad_mask, None, None, grad_sink, *(None,) * (RULE_COUNT - 4)


def _backward_column_sums(ctx: Any, grad_sums: Tensor) -> tuple[Any, ...]:
    """Each weight of a column has the column's gradient: the same tensor for all rows, without a copy."""
    query = ctx.saved_tensors[0]
    return _backward(ctx, grad_sums.to(query.dtype).unsqueeze(2).expand(-1, -1, query.size(2), -1))


define(
    f"attention_weights(Tensor query, Tensor key, Tensor logsumexp, {RULES}) -> Tensor",
    _WEIGHTS.run, _fake_weights, setup_context=_setup, backward=_backward,
)  # fmt: skip
define(
    f"attention_weights_backward(Tensor grad_weights, Tensor query, Tensor key, Tensor logsumexp, {RULES}, "
    "bool mask_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    _BACKWARD.run, _fake_backward,
    setup_context=second_order.setup, backward=second_order.backward_of(reference.attention_weights_backward),
)  # fmt: skip
define(
    f"attention_column_sums(Tensor query, Tensor key, Tensor logsumexp, {RULES}) -> Tensor",
    _COLUMN_SUMS.run, _fake_column_sums, setup_context=_setup, backward=_backward_column_sums,
)  # fmt: skip

_AttentionWeights = short_autograd(_WEIGHTS.run, _setup, _backward)
