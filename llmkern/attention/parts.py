"""Results over parts of the keys merged into one, the weights themselves, and what each key receives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmkern import autocast, check
from llmkern.attention import op
from llmkern.attention.mask import Mask, window
from llmkern.attention.op import checks


def merge_attention(outputs: Sequence[Tensor], logsumexps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The attention over all keys, from the attentions of the same queries over parts of them.

    outputs: floating tensors of one shape (..., Sq, D) and dtype; logsumexps: (..., Sq), float32 or float64, as
    scaled_dot_product_attention gives them with return_logsumexp. No key may be in two parts, and a learnable_sink only
    in one. Returns the output in the outputs' dtype, and the log-sum-exp of all in float64. A query that sees no key of
    a part has there the log-sum-exp -inf and takes nothing from it; one that sees none at all gets zeros and -inf.
    Parts are added in the order given. Gradients flow through both.

    Raises TypeError for what are no sequences of tensors of such dtypes, ValueError for no parts or other shapes and
    devices. Source: Dao 2023, "FlashAttention-2", section 3.1 (the rescaling of partial results).
    """
    for name, parts in (("outputs", outputs), ("logsumexps", logsumexps)):
        if not isinstance(parts, Sequence):
            raise TypeError(f"{name}: expected a sequence of tensors, one for each part, got {type(parts).__name__}")
    if len(outputs) != len(logsumexps) or not outputs:
        expected = f"as many as outputs, {len(outputs)}, at least one"
        raise ValueError(f"logsumexps: expected {expected}, got {len(logsumexps)}")
    for i, (output, sums) in enumerate(zip(outputs, logsumexps, strict=True)):
        check.dtype(f"outputs[{i}]", output, (*check.FLOATS, torch.float64))
        check.same_dtype(f"outputs[{i}]", output, "outputs[0]", outputs[0])
        check.same_device(f"outputs[{i}]", output, "outputs[0]", outputs[0])
        check.shape(f"outputs[{i}]", output, "the shape of outputs[0]", tuple(outputs[0].shape))
        check.dtype(f"logsumexps[{i}]", sums, (torch.float32, torch.float64))
        check.same_device(f"logsumexps[{i}]", sums, "outputs[0]", outputs[0])
        check.shape(f"logsumexps[{i}]", sums, "(..., Sq)", tuple(outputs[0].shape[:-1]))
    sums = torch.stack([s.double() for s in logsumexps])
    # The result does not depend on what is subtracted, so that no gradient flows through the maximum.
    largest = sums.detach().amax(0)
    largest = torch.where(largest == -torch.inf, torch.zeros_like(largest), largest)
    shares = (sums - largest).exp().unbind(0)
    total = shares[0]
    for share in shares[1:]:
        total = total + share
    nothing = total == 0.0
    total = torch.where(nothing, torch.ones_like(total), total)
    wide = torch.promote_types(outputs[0].dtype, torch.float32)
    merged = torch.zeros_like(outputs[0], dtype=wide)
    for output, share in zip(outputs, shares, strict=True):
        part = output.to(wide) * (share / total).to(wide).unsqueeze(-1)
        merged = merged + part.masked_fill((share == 0.0).unsqueeze(-1), 0.0)  # be it NaN
    together = torch.where(nothing, torch.full_like(total, -torch.inf), largest + total.log())
    return merged.to(outputs[0].dtype), together


def attention_weights(
    query: Tensor,
    key: Tensor,
    logsumexp: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    key_lengths: Tensor | None = None,
    causal_alignment: str = "top_left",
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    learnable_sink: Tensor | None = None,
) -> Tensor:
    """The attention weights of all queries, from the log-sum-exp that the attention itself left.

    query (B, H, Sq, D), key (B, Hkv, Sk, D), Hkv a divisor of H, all float32, bfloat16 or float16, under autocast in
    autocast's; logsumexp (B, H, Sq) float64: what scaled_dot_product_attention returned for them with return_logsumexp.
    attn_mask broadcasts against (B, H, Sq, Sk); the other arguments must be the same as there. Returns
    (B, H, Sq, Sk) in query's dtype: the weights before dropout, zeros where masked. Gradients flow to query, key, a
    floating attn_mask and learnable_sink, from the weights as functions of these alone (not through logsumexp).

    Raises TypeError for a wrong type or dtype, ValueError for wrong shapes, devices or options. Source: Dao et al.
    2022, "FlashAttention", section 3.1 (the weights made again from the statistics of the softmax).
    """
    query, key, mask, scale = _arguments(
        query, key, logsumexp, attn_mask, is_causal, scale, key_lengths, causal_alignment, window_size, softcap,
        alibi_slopes, learnable_sink,
    )  # fmt: skip
    return op.attention_weights(query, key, logsumexp, mask, scale)


def attention_column_sums(
    query: Tensor,
    key: Tensor,
    logsumexp: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    key_lengths: Tensor | None = None,
    causal_alignment: str = "top_left",
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    learnable_sink: Tensor | None = None,
) -> Tensor:
    """What each key receives: the sum over the queries of its attention weights, without the matrix of the weights.

    query (B, H, Sq, D), key (B, Hkv, Sk, D), Hkv a divisor of H, all float32, bfloat16 or float16, under autocast in
    autocast's; logsumexp (B, H, Sq) float64: what scaled_dot_product_attention returned for them with return_logsumexp.
    attn_mask broadcasts against (B, H, Sq, Sk); the other arguments must be the same as there. Returns (B, H, Sk)
    float32. Gradients flow to query, key, a floating attn_mask and learnable_sink, from the weights as functions of
    these alone (not through logsumexp); on the CPU they too need no matrix of the weights.

    Raises TypeError for a wrong type or dtype, ValueError for wrong shapes, devices or options. Source: Zhang et al.
    2023, "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", section 4 (the sums,
    accumulated over the queries, as the score of a key).
    """
    query, key, mask, scale = _arguments(
        query, key, logsumexp, attn_mask, is_causal, scale, key_lengths, causal_alignment, window_size, softcap,
        alibi_slopes, learnable_sink,
    )  # fmt: skip
    return op.attention_column_sums(query, key, logsumexp, mask, scale)


def _arguments(
    query: Tensor, key: Tensor, logsumexp: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None,
    key_lengths: Tensor | None, causal_alignment: str, window_size: tuple[int, int], softcap: float,
    alibi_slopes: Tensor | None, learnable_sink: Tensor | None,
) -> tuple[Tensor, Tensor, Mask, float]:  # fmt: skip
    """Query, key, rules and scale as the operators take them; raises on what these would not name, or not see."""
    for name, t in (("query", query), ("key", key), ("logsumexp", logsumexp)):
        check.is_tensor(name, t)
    query, key = autocast.cast(query, key)
    check.rank("query", query, "(B, H, Sq, D)")
    check.rank("key", key, "(B, Hkv, Sk, D)")
    left, right = window(window_size, is_causal)
    if attn_mask is not None:
        checks.is_mask("attn_mask", attn_mask, query)
        if is_causal:
            raise ValueError("attn_mask: expected None with is_causal=True, got a mask")
        check.broadcasts("attn_mask", attn_mask, "(B, H, Sq, Sk)", (*query.shape[:3], key.size(2)))
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    if scale is None:
        scale = checks.default_scale("query", query, "(B, H, Sq, D)")
    checks.scores(causal_alignment, scale, softcap)
    rules = (left, right, causal_alignment == "bottom_right", softcap)
    return query, key, Mask(attn_mask, key_lengths, alibi_slopes, learnable_sink, None, *rules), scale
