"""torch.ops.llmkern.attention and its companions: checks, backends, autograd.

Four operators: `attention` with its backward, and `attention_weights`, which makes the softmax itself from the
log-sum-exp that `attention` returns, with its backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmkern import check
from llmkern.attention import compiled, reference
from llmkern.attention.layout import empty_in_order
from llmkern.attention.mask import Mask
from llmkern.backend import Operator, reference_backend
from llmkern.operator import call_key, define, is_compiling, is_plain, refuse_forward_ad, short_autograd


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float, uniform_empty_rows: bool = False
) -> tuple[Tensor, Tensor]:
    """softmax(scale * query @ key^T, masked) @ value, and the log-sum-exp of each row of scores.

    query (B, H, Sq, D), key (B, Hkv, Sk, D), value (B, Hkv, Sk, Dv), all float32, bfloat16 or float16, Hkv a divisor
    of H; mask as llmkern.attention.mask.Mask describes it. Returns (B, H, Sq, Dv) in the memory order of query, and
    (B, H, Sq) float64, through which no gradient flows: rounded to float32 it would give every weight of a row the same
    error again in the backward. A row with every key masked is zeros or, with
    uniform_empty_rows, the average of all values.

    Raises TypeError for a wrong dtype, ValueError for a wrong shape or device.
    """
    args = (query, key, value, *mask.arguments(), scale, uniform_empty_rows)
    found = None if is_compiling() else call_key(*args)
    if found is not None:
        launch = _ATTENTION.short.get(found) or _ATTENTION.short_call(found, _Attention.apply, *args)
        return launch(*args)
    # Here and not in the operator alone: torch.func unwraps its tangents on the way there.
    refuse_forward_ad("attention", query, key, value, mask.dense)
    return torch.ops.llmkern.attention(*args)


def short_attention(found: bytes, *args: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """What runs the operator for calls of this key (llmkern.operator.call_key), once its arguments are checked."""
    return _Attention.apply if found[0] else _ATTENTION.plan(*args)


def attention_weights(
    query: Tensor, key: Tensor, logsumexp: Tensor, mask: Mask, scale: float, uniform_empty_rows: bool = False
) -> Tensor:
    """The attention weights, (B, H, Sq, Sk) in query's dtype, from the log-sum-exp that `attention` returned.

    Raises as `attention` does.
    """
    args = (query, key, logsumexp, *mask.arguments(), scale, uniform_empty_rows)
    found = None if is_compiling() else call_key(*args)
    if found is not None:
        launch = _WEIGHTS.short.get(found) or _WEIGHTS.short_call(found, _AttentionWeights.apply, *args)
        return launch(*args)
    return torch.ops.llmkern.attention_weights(*args)


def _check_query_key(
    query: Tensor, key: Tensor, mask: Tensor | None, key_lengths: Tensor | None, *rest: object
) -> None:
    check.dtype("query", query, check.FLOATS)
    check.rank("query", query, "(B, H, Sq, D)")
    check.same_dtype("key", key, "query", query)
    check.same_device("key", key, "query", query)
    check.rank("key", key, "(B, Hkv, Sk, D)")
    (batch, heads, queries, size), keys = query.shape, key.size(2)
    if key.size(0) != batch or key.size(3) != size:
        expected = f"(B, Hkv, Sk, D) with B = {batch} and D = {size} as in query"
        raise ValueError(f"key: expected {expected}, got shape {tuple(key.shape)}")
    if (heads and key.size(1) < 1) or heads % max(key.size(1), 1):
        expected = f"(B, Hkv, Sk, D) with Hkv a divisor of H = {heads}, the heads of query"
        raise ValueError(f"key: expected {expected}, got shape {tuple(key.shape)}")
    if mask is not None:
        if mask.dtype not in (torch.bool, torch.float32, query.dtype):
            expected = " or ".join(dict.fromkeys(["bool", "float32", check.short(query.dtype)]))
            raise TypeError(f"mask: expected dtype {expected}, got {check.short(mask.dtype)}")
        check.same_device("mask", mask, "query", query)
        check.rank("mask", mask, "(B, H, Sq, Sk)")
        check.broadcasts("mask", mask, "(B, H, Sq, Sk)", (batch, heads, queries, keys))
    if key_lengths is not None:
        check.dtype("key_lengths", key_lengths, (torch.int32, torch.int64))
        check.same_device("key_lengths", key_lengths, "query", query)
        check.shape("key_lengths", key_lengths, "(B,)", (batch,))


def _check_value(key: Tensor, value: Tensor) -> None:
    check.same_dtype("value", value, "key", key)
    check.same_device("value", value, "key", key)
    check.rank("value", value, "(B, Hkv, Sk, Dv)")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value: expected (B, Hkv, Sk, Dv) with {tuple(key.shape[:3])} as in key, "
                         f"got shape {tuple(value.shape)}")  # fmt: skip


def _check_logsumexp(query: Tensor, logsumexp: Tensor) -> None:
    check.dtype("logsumexp", logsumexp, (torch.float64,))
    check.same_device("logsumexp", logsumexp, "query", query)
    check.shape("logsumexp", logsumexp, "(B, H, Sq)", tuple(query.shape[:3]))


def _check_attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> None:
    _check_query_key(query, key, *rest)
    _check_value(key, value)


def _check_attention_backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor, *rest: Any
) -> None:
    _check_attention(query, key, value, *rest)
    _check_logsumexp(query, logsumexp)
    for name, t in (("grad_output", grad_output), ("output", output)):
        check.same_dtype(name, t, "query", query)
        check.same_device(name, t, "query", query)
        check.shape(name, t, "(B, H, Sq, Dv)", (*query.shape[:3], value.size(3)))


def _check_weights(query: Tensor, key: Tensor, logsumexp: Tensor, *rest: Any) -> None:
    _check_query_key(query, key, *rest)
    _check_logsumexp(query, logsumexp)


def _check_weights_backward(grad_weights: Tensor, query: Tensor, key: Tensor, logsumexp: Tensor, *rest: Any) -> None:
    _check_weights(query, key, logsumexp, *rest)
    check.same_dtype("grad_weights", grad_weights, "query", query)
    check.same_device("grad_weights", grad_weights, "query", query)
    check.shape("grad_weights", grad_weights, "(B, H, Sq, Sk)", (*query.shape[:3], key.size(2)))


_MASK = (None, None, True, False, 0.125, False)


def _example(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    x = torch.empty(1, 8, 128, 64, dtype=dtype, device=device)
    return x, x, x, *_MASK


def _example_backward(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    x = torch.empty(1, 8, 128, 64, dtype=dtype, device=device)
    return x, x, x, x, x, torch.empty(1, 8, 128, dtype=torch.float64, device=device), *_MASK, False


def _example_weights(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    x = torch.empty(1, 8, 128, 64, dtype=dtype, device=device)
    return x, x, torch.empty(1, 8, 128, dtype=torch.float64, device=device), *_MASK


def _example_weights_backward(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    return torch.empty(1, 8, 128, 128, dtype=dtype, device=device), *_example_weights(device, dtype), False


_ATTENTION = Operator(
    "attention",
    _check_attention,
    _example,
    cpu=[compiled.CPU_ATTENTION, reference_backend(reference.attention)],
    other=[reference_backend(reference.attention)],
)
_BACKWARD = Operator(
    "attention_backward",
    _check_attention_backward,
    _example_backward,
    cpu=[compiled.CPU_ATTENTION_BACKWARD, reference_backend(reference.attention_backward)],
    other=[reference_backend(reference.attention_backward)],
)
_WEIGHTS = Operator(
    "attention_weights",
    _check_weights,
    _example_weights,
    cpu=[compiled.CPU_ATTENTION_WEIGHTS, reference_backend(reference.attention_weights)],
    other=[reference_backend(reference.attention_weights)],
)
_WEIGHTS_BACKWARD = Operator(
    "attention_weights_backward",
    _check_weights_backward,
    _example_weights_backward,
    cpu=[compiled.CPU_ATTENTION_WEIGHTS_BACKWARD, reference_backend(reference.attention_weights_backward)],
    other=[reference_backend(reference.attention_weights_backward)],
)


def _fake_attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _check_attention(query, key, value, *rest)
    return empty_in_order(query, value.size(3)), query.new_empty(query.shape[:3], dtype=torch.float64)


def _fake_mask_grad(query: Tensor, mask: Tensor | None, mask_grad: bool) -> Tensor:
    return query.new_empty(mask.shape if mask_grad and mask is not None else 0, dtype=torch.float32)


def _fake_backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor,
    mask: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    _check_attention_backward(grad_output, query, key, value, output, logsumexp, mask, *rest)
    grads = (empty_in_order(t, t.size(3)) for t in (query, key, value))
    return *grads, _fake_mask_grad(query, mask, rest[-1])  # type: ignore[return-value]


def _fake_weights(query: Tensor, key: Tensor, logsumexp: Tensor, *rest: Any) -> Tensor:
    _check_weights(query, key, logsumexp, *rest)
    return query.new_empty((*query.shape[:3], key.size(2)))


def _fake_weights_backward(
    grad_weights: Tensor, query: Tensor, key: Tensor, logsumexp: Tensor, mask: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    _check_weights_backward(grad_weights, query, key, logsumexp, mask, *rest)
    grads = (empty_in_order(t, t.size(3)) for t in (query, key))
    return *grads, _fake_mask_grad(query, mask, rest[-1])  # type: ignore[return-value]


def _setup_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, mask, key_lengths, *ctx.rest = inputs
    ctx.save_for_backward(query, key, value, *output, mask, key_lengths)
    ctx.mark_non_differentiable(output[1])


def _backward_attention(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Any, ...]:
    query, key, value, output, logsumexp, mask, key_lengths = ctx.saved_tensors
    mask_grad = mask is not None and ctx.needs_input_grad[3]
    args = (grad_output, query, key, value, output, logsumexp, mask, key_lengths, *ctx.rest, mask_grad)
    short = is_plain(*args[:8]) and not torch.is_grad_enabled()
    grads = (_BACKWARD.run if short else torch.ops.llmkern.attention_backward)(*args)
    needed = [g if n else None for g, n in zip(grads[:3], ctx.needs_input_grad[:3], strict=True)]
    return *needed, (grads[3].to(mask.dtype) if mask_grad else None), None, None, None, None, None


def _setup_weights(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, logsumexp, mask, key_lengths, *ctx.rest = inputs
    ctx.save_for_backward(query, key, logsumexp, mask, key_lengths)


def _backward_weights(ctx: Any, grad_weights: Tensor) -> tuple[Any, ...]:
    query, key, logsumexp, mask, key_lengths = ctx.saved_tensors
    mask_grad = mask is not None and ctx.needs_input_grad[3]
    args = (grad_weights, query, key, logsumexp, mask, key_lengths, *ctx.rest, mask_grad)
    short = is_plain(*args[:6]) and not torch.is_grad_enabled()
    grads = (_WEIGHTS_BACKWARD.run if short else torch.ops.llmkern.attention_weights_backward)(*args)
    needed = [g if n else None for g, n in zip(grads[:2], ctx.needs_input_grad[:2], strict=True)]
    return *needed, None, (grads[2].to(mask.dtype) if mask_grad else None), None, None, None, None, None


def _no_double_backward(ctx: Any, *grads: Tensor) -> Any:
    raise NotImplementedError(
        "llmkern.attention: a gradient of a gradient is not supported: use llmkern.reference for it"
    )


_RULES = "Tensor? mask, Tensor? key_lengths, bool causal, bool bottom_right, float scale, bool uniform_empty_rows"
define(
    f"attention(Tensor query, Tensor key, Tensor value, {_RULES}) -> (Tensor, Tensor)",
    _ATTENTION.run, _fake_attention, setup_context=_setup_attention, backward=_backward_attention,
)  # fmt: skip
define(
    "attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, Tensor logsumexp, "
    f"{_RULES}, bool mask_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    _BACKWARD.run, _fake_backward, backward=_no_double_backward,
)  # fmt: skip
define(
    f"attention_weights(Tensor query, Tensor key, Tensor logsumexp, {_RULES}) -> Tensor",
    _WEIGHTS.run, _fake_weights, setup_context=_setup_weights, backward=_backward_weights,
)  # fmt: skip
define(
    f"attention_weights_backward(Tensor grad_weights, Tensor query, Tensor key, Tensor logsumexp, {_RULES}, "
    "bool mask_grad) -> (Tensor, Tensor, Tensor)",
    _WEIGHTS_BACKWARD.run, _fake_weights_backward, backward=_no_double_backward,
)  # fmt: skip

_Attention = short_autograd(_ATTENTION.run, _setup_attention, _backward_attention)
_AttentionWeights = short_autograd(_WEIGHTS.run, _setup_weights, _backward_weights)
