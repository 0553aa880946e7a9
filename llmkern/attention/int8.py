"""Attention whose scores come of products of integers, asked for by name, and the error that it makes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from llmkern import autocast, check
from llmkern.attention import op, reference
from llmkern.attention.arrange import arranged
from llmkern.attention.mask import Mask, window
from llmkern.attention.op import attention
from llmkern.attention.sdpa import checked_scale


def attention_int8(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_lengths: Tensor | None = None,
    causal_alignment: str = "top_left",
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    smooth_keys: bool = True,
    return_logsumexp: bool = False,
) -> Any:
    """scaled_dot_product_attention for inference, with queries and keys rounded to 8 bits before they are multiplied.

    query (..., H, Sq, D), key (..., Hkv, Sk, D), value (..., Hkv, Sk, Dv), all bfloat16, float16 or float32; Triton's
    kernels take the first two. Each query and each key is rounded by itself, to 127 steps of its largest element on
    either side of zero; weights are float32, and are rounded to value's dtype where they meet the values. smooth_keys:
    the average of the keys that exist is taken off them first, which changes no weight, and the rounding much where
    some channels are alike in all keys. So a row depends through that average, by a fraction of the rounding, on keys
    that it does not see. What this costs for given tensors tells attention_int8_error.

    All other arguments, and the results, are those of scaled_dot_product_attention; there is no dropout and no
    gradient. A query or a key that holds an infinity or NaN gives NaN to the rows that see it. Without a kernel, as on
    CPUs, the plain PyTorch version serves the call, which has the matrix of all scores in memory.

    Raises TypeError for a wrong type or dtype, ValueError for wrong shapes, devices or options, RuntimeError where a
    gradient is asked for. Sources: Zhang et al. 2024, "SageAttention: Accurate 8-Bit Attention for Plug-and-Play
    Inference Acceleration", section 4 (8-bit scores, keys less their average, values in 16 bits); Zhang et al. 2024,
    "SageAttention2", section 3 (scales finer than a block). That one scale belongs to one row is ours.
    """
    check.flag("smooth_keys", smooth_keys)
    check.flag("return_logsumexp", return_logsumexp)
    (query, key, value), mask, scale, shape = _arguments(
        query, key, value, attn_mask, is_causal, scale, enable_gqa, key_lengths, causal_alignment, window_size, softcap,
        alibi_slopes, learnable_sink,
    )  # fmt: skip
    output, logsumexp = op.attention_int8(query, key, value, mask, scale, smooth_keys)
    if len(shape) != 4:
        output, logsumexp = output.reshape(*shape[:-1], value.size(3)), logsumexp.reshape(shape[:-1])
    return (output, logsumexp) if return_logsumexp else output


@dataclass(frozen=True)
class Int8AttentionError:
    """How far a result is from attention in float64, over all elements that are finite there.

    largest: the largest difference. relative_rms: the root of the mean square of the differences, over that of the
    truth. cosine: of the angle between result and truth as vectors. exact_rms: relative_rms of
    scaled_dot_product_attention in the same dtype, which rounds nothing to 8 bits. Where a result is infinite or not a
    number and the truth is neither, its error is infinite, and cosine 0.
    """

    largest: float
    relative_rms: float
    cosine: float
    exact_rms: float

    def __str__(self) -> str:
        return (
            f"largest error {self.largest:.2e}, relative RMS {self.relative_rms:.2e} (in the inputs' dtype alone "
            f"{self.exact_rms:.2e}), cosine {self.cosine:.6f}"
        )


@torch.no_grad()
def attention_int8_error(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    smooth_keys: bool = True,
    **options: Any,
) -> Int8AttentionError:
    """The error of attention_int8 with these arguments, against attention in float64.

    options: all other arguments of attention_int8 but return_logsumexp. Raises as it does. The truth is computed one
    head at a time, with the matrix of its scores in memory.
    """
    if "return_logsumexp" in options:
        raise TypeError("return_logsumexp: expected no such argument, since the error is that of the output")
    found = attention_int8(query, key, value, attn_mask, smooth_keys=smooth_keys, **options)
    (q, k, v), mask, scale, _ = _arguments(query, key, value, attn_mask, **options)
    found, exact = found.reshape(*q.shape[:3], v.size(3)), attention(q, k, v, mask, scale)[0]
    # Sums over all heads: of squares of the truth, of both results' differences, of the result, and of the product.
    sums, largest, group = torch.zeros(5, dtype=torch.float64), 0.0, q.size(1) // max(k.size(1), 1)
    for b, h in product(range(q.size(0)), range(q.size(1))):
        of_keys = (slice(b, b + 1), slice(h // group, h // group + 1))
        one = q[b : b + 1, h : h + 1].double(), k[of_keys].double(), v[of_keys].double()
        true = reference.attention(*one, *_of_head(mask, b, h).arguments(), scale, False)[0][0, 0]
        ours, plain = found[b, h].double(), exact[b, h].double()
        finite = true.isfinite()
        true, ours, plain = true[finite], ours[finite], plain[finite]
        off, plain_off = ((t - true).abs().nan_to_num(math.inf, math.inf) for t in (ours, plain))
        terms = (true * true, off.square(), plain_off.square(), ours * ours, ours * true)
        sums += torch.stack([t.sum() for t in terms]).cpu()
        largest = max(largest, float(off.max())) if true.numel() else largest
    of_truth, of_ours, of_plain, length, together = sums.tolist()
    if of_truth == 0.0:
        return Int8AttentionError(largest, float(of_ours > 0.0), float(of_ours < math.inf), float(of_plain > 0.0))
    cosine = together / math.sqrt(of_truth * length) if 0.0 < length < math.inf else 0.0
    return Int8AttentionError(largest, math.sqrt(of_ours / of_truth), cosine, math.sqrt(of_plain / of_truth))


def _of_head(mask: Mask, b: int, h: int) -> Mask:
    """The rules of one head of one batch."""

    def part(t: Tensor | None, *places: int) -> Tensor | None:
        if t is None:
            return None
        for dim, place in enumerate(places):
            t = t if t.size(dim) == 1 else t.narrow(dim, place, 1)
        return t

    slopes = mask.alibi_slopes
    return replace(
        mask, dense=part(mask.dense, b, h), key_lengths=part(mask.key_lengths, b),
        alibi_slopes=part(slopes, *((b, h) if slopes is not None and slopes.dim() == 2 else (h,))),
        learnable_sink=part(mask.learnable_sink, h),
    )  # fmt: skip


def _arguments(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False, key_lengths: Tensor | None = None,
    causal_alignment: str = "top_left", window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, learnable_sink: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor], Mask, float, tuple[int, ...]]:  # fmt: skip
    """(query, key, value), rules and scale as the operators take them, and the shape of query before; raises on what
    these would not name, or not see."""
    for name, t in (("query", query), ("key", key), ("value", value)):
        check.is_tensor(name, t)
    query, key, value = autocast.cast(query, key, value)
    scale = checked_scale(
        query, key, value, attn_mask, is_causal, scale, enable_gqa, key_lengths, causal_alignment, softcap,
        alibi_slopes, learnable_sink,
    )  # fmt: skip
    left, right = window(window_size, is_causal)
    query, key, value, attn_mask, shape = arranged(query, key, value, attn_mask, key_lengths is not None)
    rules = (left, right, causal_alignment == "bottom_right", softcap)
    return (query, key, value), Mask(attn_mask, key_lengths, alibi_slopes, learnable_sink, None, *rules), scale, shape
