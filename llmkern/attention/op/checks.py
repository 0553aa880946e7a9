"""What every operator of the family checks of its arguments, from metadata alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from llmkern import check
from llmkern.attention.mask import ALIGNMENTS, WIDEST
from llmkern.operator import is_compiling
from llmkern.random import check_dropout


def scores(causal_alignment: str, scale: float, softcap: float, scale_name: str = "scale") -> None:
    """Options of the public functions that their operators would not name, or not see."""
    check.one_of("causal_alignment", causal_alignment, ALIGNMENTS)
    check.finite(scale_name, scale)
    check.number("softcap", softcap)


def default_scale(name: str, query: Tensor, dimensions: str) -> float:
    """1 / sqrt(D), once there is a D."""
    check.rank(name, query, dimensions)
    return 1.0 / math.sqrt(max(query.size(-1), 1))


def is_mask(name: str, mask: Tensor, query: Tensor) -> None:
    """All of a mask but its shape."""
    check.dtype(name, mask, tuple(dict.fromkeys((torch.bool, torch.float32, query.dtype))))
    check.same_device(name, mask, "query", query)
    if not is_compiling():
        check.has_memory(name, mask)


def query_key(query: Tensor, key: Tensor, mask: Tensor | None, key_lengths: Tensor | None, *rest: Any) -> None:
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
        is_mask("mask", mask, query)
        check.rank("mask", mask, "(B, H, Sq, Sk)")
        check.broadcasts("mask", mask, "(B, H, Sq, Sk)", (batch, heads, queries, keys))
    if key_lengths is not None:
        check.dtype("key_lengths", key_lengths, (torch.int32, torch.int64))
        check.same_device("key_lengths", key_lengths, "query", query)
        check.shape("key_lengths", key_lengths, "(B,)", (batch,))
    score_rules(query, batch, heads, *rest[:8])


def score_rules(
    query: Tensor, batch: int, heads: int, alibi_slopes: Tensor | None, learnable_sink: Tensor | None,
    dropout_seed: Tensor | None, window_left: int, window_right: int, bottom_right: bool, softcap: float,
    dropout_p: float,
) -> None:  # fmt: skip
    """The rules that do not depend on where the keys lie."""
    if alibi_slopes is not None:
        check.dtype("alibi_slopes", alibi_slopes, (torch.float32,))
        check.same_device("alibi_slopes", alibi_slopes, "query", query)
        if tuple(alibi_slopes.shape) not in ((heads,), (batch, heads)):
            raise ValueError(
                f"alibi_slopes: expected (H,) = {(heads,)} or (B, H) = {(batch, heads)}, "
                f"got shape {tuple(alibi_slopes.shape)}"
            )
    if learnable_sink is not None:
        check.dtype("learnable_sink", learnable_sink, tuple(dict.fromkeys((torch.float32, query.dtype))))
        check.same_device("learnable_sink", learnable_sink, "query", query)
        check.shape("learnable_sink", learnable_sink, "(H,)", (heads,))
    if not (-1 <= window_left <= WIDEST and -1 <= window_right <= WIDEST):
        expected = "(left, right), integers of at least -1 (unlimited) and at most 2**62"
        raise ValueError(f"window_size: expected {expected}, got {(window_left, window_right)}")
    check.number("softcap", softcap)
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"softcap: expected a finite number of at least 0 (none), got {softcap}")
    check_dropout("dropout_seed", dropout_seed, dropout_p)


def no_gradient_of_slopes(alibi_slopes: Tensor | None, needs_grad: bool) -> None:
    """For an operator's setup_context: no gradient is better refused than left out."""
    if alibi_slopes is not None and needs_grad:
        raise ValueError(
            "alibi_slopes: expected a tensor that requires no gradient, got one that does; "
            "an additive mask made of them has a gradient"
        )


def value(key: Tensor, value: Tensor) -> None:
    check.same_dtype("value", value, "key", key)
    check.same_device("value", value, "key", key)
    check.rank("value", value, "(B, Hkv, Sk, Dv)")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value: expected (B, Hkv, Sk, Dv) with {tuple(key.shape[:3])} as in key, "
                         f"got shape {tuple(value.shape)}")  # fmt: skip


def per_row(name: str, query: Tensor, t: Tensor) -> None:
    """The log-sum-exp or its gradient."""
    check.dtype(name, t, (torch.float64,))
    check.same_device(name, t, "query", query)
    check.shape(name, t, "(B, H, Sq)", tuple(query.shape[:3]))


def like_query(name: str, query: Tensor, t: Tensor, dimensions: str, shape: tuple[int, ...]) -> None:
    check.same_dtype(name, t, "query", query)
    check.same_device(name, t, "query", query)
    check.shape(name, t, dimensions, shape)
