"""scaled_dot_product_attention with torch's signature."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from llmkern import autocast, check
from llmkern.attention.arrange import arranged
from llmkern.attention.mask import Mask, window
from llmkern.attention.op import attention, checks, short_attention
from llmkern.backend import Plans
from llmkern.operator import call_key, is_compiling
from llmkern.random import seed_tensor


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_lengths: Tensor | None = None,
    causal_alignment: str = "top_left",
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    dropout_seed: Tensor | int | None = None,
    deterministic: bool = False,
    return_logsumexp: bool = False,
) -> Any:
    """torch.nn.functional.scaled_dot_product_attention, fused.

    query (..., H, Sq, D), key (..., Hkv, Sk, D), value (..., Hkv, Sk, Dv), all float32, bfloat16 or float16; with
    enable_gqa Hkv may be a divisor of H. attn_mask broadcasts against (..., H, Sq, Sk): boolean, True takes part, or
    floating, added to the scaled scores. scale: 1 / sqrt(D) by default. key_lengths (B,) int32 or int64: in batch b
    only the first key_lengths[b] keys exist; here and below B is the product of all leading dimensions. Returns
    (..., H, Sq, Dv) in query's dtype, under autocast in autocast's, to which query, key and value are cast as torch
    casts them; a row with every key masked is zeros.

    The place of query i among the keys is p = i, or with causal_alignment "bottom_right" p = i + Sk - Sq (with
    key_lengths, their number in place of Sk). is_causal: it sees the keys j <= p. window_size (left, right): it sees
    p - left <= j <= p + right; -1 leaves a side unlimited. alibi_slopes (H,) or (B, H) float32, without gradient: its
    score with key j gets -slope * |p - j|. softcap: a scaled score s becomes softcap * tanh(s / softcap), before
    slopes and masks; 0 leaves it. learnable_sink (H,), float32 or query's dtype: one more logit in the denominator of
    every row, whose weight goes to no value.

    dropout_p: the probability, in [0, 1], with which a weight becomes 0; the others are multiplied by
    1 / (1 - dropout_p). The mask is a function of dropout_seed and of the weight's place alone (Philox4x32-10, Salmon
    et al. 2011), the same on every backend, and is made anew in the backward. dropout_seed: an integer or a CPU int64
    tensor (); without one it is drawn from torch's CPU generator.

    deterministic: has no effect, results are the same from run to run either way. return_logsumexp: returns also the
    log-sum-exp of each row's scores and sink, (..., H, Sq) float64, through which gradients flow; -inf where there is
    nothing to sum.

    Raises TypeError for a wrong type or dtype, ValueError for wrong shapes, devices or options. Sources: Dao 2023,
    "FlashAttention-2", section 3; Press et al. 2022, "Train Short, Test Long", section 3 (the slopes); Gemma Team 2024,
    "Gemma 2", section 2 (the cap); Xiao et al. 2024, "Efficient Streaming Language Models with Attention Sinks",
    section 3.
    """
    try:
        seed = None if dropout_p == 0.0 else seed_tensor("dropout_seed", dropout_seed)
    except RuntimeError:  # of a tensor that is neither true nor false
        check.probability("dropout_p", dropout_p)
        raise
    try:
        left, right = window_size
    except (TypeError, ValueError):
        left, right = window(window_size, is_causal)  # which says what was expected
    found = None
    if not is_compiling():
        found = call_key(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, key_lengths, causal_alignment, left,
            right, softcap, alibi_slopes, learnable_sink, seed, return_logsumexp, deterministic,
        )  # fmt: skip
    if found is not None:
        launch = _SHORT.get(found)
        if launch is not None:
            return launch(query, key, value, attn_mask, key_lengths, alibi_slopes, learnable_sink, seed)
    for name, t in (("query", query), ("key", key), ("value", value)):
        check.is_tensor(name, t)
    query, key, value = autocast.cast(query, key, value)
    if isinstance(attn_mask, Tensor) and autocast.is_on(query.device) and attn_mask.dtype in check.FLOATS:
        attn_mask = attn_mask.float()  # which kernels take with any query: no bit of the mask is lost
    check.flag("deterministic", deterministic)
    check.flag("return_logsumexp", return_logsumexp)
    scale = checked_scale(
        query, key, value, attn_mask, is_causal, scale, enable_gqa, key_lengths, causal_alignment, softcap,
        alibi_slopes, learnable_sink,
    )  # fmt: skip
    check.probability("dropout_p", dropout_p)
    rules = (*window(window_size, is_causal), causal_alignment == "bottom_right", softcap, dropout_p)
    as_they_are = query.dim() == 4 and query.size(0) == key.size(0) == value.size(0) and key.size(1) == value.size(1)
    if (
        found is not None
        and as_they_are
        and query.size(1) >= key.size(1)
        and (attn_mask is None or attn_mask.dim() == 4)
    ):
        # Nothing is to be arranged: calls like this one go straight to the operator from now on.
        if attn_mask is not None:  # which the operator calls by another name
            check.broadcasts("attn_mask", attn_mask, "(B, H, Sq, Sk)", (*query.shape[:3], key.size(2)))
        tensors = (query, key, value, attn_mask, key_lengths, alibi_slopes, learnable_sink, seed)
        return _SHORT.keep(found, _launcher(found, tensors, (*rules, scale, False), return_logsumexp))(*tensors)
    query, key, value, attn_mask, shape = arranged(query, key, value, attn_mask, key_lengths is not None)
    mask = Mask(attn_mask, key_lengths, alibi_slopes, learnable_sink, seed, *rules)
    output, logsumexp = attention(query, key, value, mask, scale)
    if len(shape) != 4:
        output, logsumexp = output.reshape(*shape[:-1], value.size(3)), logsumexp.reshape(shape[:-1])
    return (output, logsumexp) if return_logsumexp else output


def checked_scale(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None,
    enable_gqa: bool, key_lengths: Tensor | None, causal_alignment: str, softcap: float, alibi_slopes: Tensor | None,
    learnable_sink: Tensor | None,
) -> float:  # fmt: skip
    """The scale, 1 / sqrt(D) by default; raises on what the operator would name by its own arguments' names, or not
    see."""
    check.flag("is_causal", is_causal)
    check.flag("enable_gqa", enable_gqa)
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() < 2 or t.dim() != query.dim():
            raise ValueError(
                f"{name}: expected (..., H, S, D), the same rank for all three, got shape {tuple(t.shape)}"
            )
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask: expected None with is_causal=True, got a mask; put the causal rule into the mask")
    for name, t in (("key", key), ("value", value)):
        heads = (t.size(-3), query.size(-3)) if query.dim() > 2 else (1, 1)
        if not enable_gqa and heads[0] != heads[1] and 1 not in heads:
            expected = f"{heads[1]} heads as in query (fewer only with enable_gqa=True)"
            raise ValueError(f"{name}: expected {expected}, got shape {tuple(t.shape)}")
    if attn_mask is not None:
        checks.is_mask("attn_mask", attn_mask, query)
    for name, given in (
        ("key_lengths", key_lengths), ("alibi_slopes", alibi_slopes), ("learnable_sink", learnable_sink),
    ):  # fmt: skip
        if given is not None:
            check.is_tensor(name, given)
    if scale is None:
        scale = 1.0 / math.sqrt(max(query.size(-1), 1))
    checks.scores(causal_alignment, scale, softcap)
    return scale


#: Launchers of calls that need no arranging.
_SHORT = Plans()


def _launcher(
    found: bytes, tensors: tuple[Any, ...], rules: tuple[Any, ...], return_logsumexp: bool
) -> Callable[..., Any]:
    """What serves calls of this key, given their tensors."""
    run = short_attention(found, *tensors, *rules)
    if return_logsumexp:
        return lambda *tensors: run(*tensors, *rules)
    return lambda *tensors: run(*tensors, *rules)[0]
