"""torch.ops.llmkern.attention_int8: the scores from products of integers; for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern import check
from llmkern.attention import reference
from llmkern.attention.layout import empty_in_order
from llmkern.attention.mask import Mask
from llmkern.attention.op import checks
from llmkern.attention.reference.int8 import described
from llmkern.attention.triton_int8_launch import TRITON_INT8
from llmkern.backend import Operator, reference_backend
from llmkern.operator import check_types, define, dispatch, is_plain, needs_grad, refuse_forward_ad


def attention_int8(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float, smooth_keys: bool
) -> tuple[Tensor, Tensor]:
    """The output (B, H, Sq, Dv) and the log-sum-exp (B, H, Sq) float64 of `attention`, of quantised queries and keys.

    As `attention` takes them; mask without dropout. Raises as it does, and RuntimeError where a gradient is asked for.
    """
    args: tuple[Any, ...] = (
        query, key, value, mask.dense, mask.key_lengths, mask.alibi_slopes, mask.learnable_sink, mask.window_left,
        mask.window_right, mask.bottom_right, mask.softcap, scale, smooth_keys,
    )  # fmt: skip
    output, logsumexp = _run(*args) if is_plain(*args) else dispatch("attention_int8", *args)
    return output, logsumexp


def _check(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> None:
    check_types("attention_int8", (query, key, value, *rest))
    mask, scale, _ = described(rest)
    checks.query_key(query, key, *mask.arguments())
    checks.value(key, value)
    check.finite("scale", scale)


def _example(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    x = torch.empty(1, 8, 128, 64, dtype=dtype, device=device)
    return x, x, x, None, None, None, None, -1, 0, False, 0.0, 0.125, True


_INT8 = Operator(
    "attention_int8",
    _check,
    _example,
    cpu=[reference_backend(reference.attention_int8)],
    cuda=[TRITON_INT8, reference_backend(reference.attention_int8)],
    other=[reference_backend(reference.attention_int8)],
)


def _run(*args: Any) -> tuple[Tensor, Tensor]:
    tensors = [t for t in args if isinstance(t, Tensor)]
    if needs_grad(*tensors):
        raise RuntimeError(
            "llmkern.attention_int8 has no gradient: call it under torch.no_grad(), or scaled_dot_product_attention"
        )
    refuse_forward_ad("attention_int8", *tensors)
    output, logsumexp = _INT8.run(*args)
    return output, logsumexp


def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _check(query, key, value, *rest)
    return empty_in_order(query, value.size(3)), query.new_empty(query.shape[:3], dtype=torch.float64)


define(
    "attention_int8(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? key_lengths, Tensor? alibi_slopes, "
    "Tensor? learnable_sink, int window_left, int window_right, bool bottom_right, float softcap, float scale, "
    "bool smooth_keys) -> (Tensor, Tensor)",
    _run, _fake,
)  # fmt: skip
