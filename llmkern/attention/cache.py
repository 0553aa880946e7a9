"""The keys and values of a cache: where a sequence's tokens lie, written, rotated, quantised, and read.

A cache is (B, Sc, Hkv, D), a row for each sequence, or (pages, page size, Hkv, D) with block_table (B, most pages of a
sequence), whose token t lies on page block_table[b, t // page size]. An int8 cache has a float32 scale for each token
and head, of its shape without D.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmkern import overlap
from llmkern.attention.mask import Mask
from llmkern.rotation import rotate

#: A scale below the smallest normal number has no float32 inverse.
_SMALLEST = torch.finfo(torch.float32).tiny


def capacity(k_cache: Tensor, block_table: Tensor | None) -> int:
    """How many tokens a sequence can have."""
    return k_cache.size(1) * (1 if block_table is None else block_table.size(1))


def check_within(k_cache: Tensor, v_cache: Tensor) -> None:
    """Raises where elements of a cache that is written to share memory, from sizes and strides."""
    for name, t in (("k_cache", k_cache), ("v_cache", v_cache)):
        if overlap.within(t.shape, t.stride()):
            expected = "a cache whose elements have memory of their own, to be written to"
            raise ValueError(f"{name}: expected {expected}, got shape {tuple(t.shape)} with strides {t.stride()}")


def check_apart(k_cache: Tensor, v_cache: Tensor) -> None:
    """Raises where a new key would be written over a value; each cache is known to have none twice."""
    if overlap.between(k_cache, v_cache):
        raise ValueError("v_cache: expected memory apart from k_cache's, since both are written to; they overlap")


def attend(
    attention: Callable[..., tuple[Tensor, Tensor]], query: Tensor, k_cache: Tensor, v_cache: Tensor,
    key: Tensor | None, value: Tensor | None, rotary_cos: Tensor | None, rotary_sin: Tensor | None,
    cache_seqlens: Tensor | None, block_table: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None,
    alibi_slopes: Tensor | None, learnable_sink: Tensor | None, window_left: int, window_right: int, softcap: float,
    scale: float, rotary_interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The whole operator around `attention`, which takes what torch.ops.llmkern.attention takes."""
    batch, queries = query.shape[:2]
    if cache_seqlens is None:
        lengths = torch.full((batch,), capacity(k_cache, block_table), device=query.device)
    else:
        lengths = cache_seqlens.long()
    before, lengths = lengths, lengths if key is None else lengths + key.size(1)
    _check_lengths(k_cache, block_table, before, lengths)
    if rotary_cos is not None and rotary_sin is not None and key is not None:
        # Without an order among the queries, all of them stand where the cache ended.
        ordered = window_left >= 0 or window_right >= 0
        _check_positions(before, max(key.size(1), queries if ordered else 1), rotary_cos)
        steps = torch.arange(queries, device=query.device) * int(ordered)
        query = _rotated(query, before, steps, rotary_cos, rotary_sin, rotary_interleaved)
        steps = torch.arange(key.size(1), device=key.device)
        key = _rotated(key, before, steps, rotary_cos, rotary_sin, rotary_interleaved)
    if key is not None and value is not None:
        check_within(k_cache, v_cache)
        check_apart(k_cache, v_cache)
        _write(k_cache, k_scale, block_table, before, key)
        _write(v_cache, v_scale, block_table, before, value)
    used = int(lengths.max()) if lengths.numel() and lengths.device.type == "cpu" else capacity(k_cache, block_table)
    keys = _read(k_cache, k_scale, block_table, used, query.dtype)
    values = _read(v_cache, v_scale, block_table, used, query.dtype)
    mask = Mask(
        None, lengths, alibi_slopes, learnable_sink, window_left=window_left, window_right=window_right,
        bottom_right=True, softcap=softcap,
    )  # fmt: skip
    output, logsumexp = attention(query.transpose(1, 2), keys, values, *mask.arguments(), scale, False)
    return output.transpose(1, 2), logsumexp


def _check_lengths(k_cache: Tensor, block_table: Tensor | None, before: Tensor, lengths: Tensor) -> None:
    """Raises where tokens would lie outside the cache. On a GPU nothing is: it would wait for the numbers."""
    if before.device.type != "cpu" or not before.numel():
        return
    most, added = capacity(k_cache, block_table), int(lengths[0] - before[0])
    low, high = (int(x) for x in before.aminmax())
    if low < 0 or high + added > most:
        expected = f"lengths in [0, {most - added}], so that {added} more fit into {most} places"
        raise ValueError(f"cache_seqlens: expected {expected}, got {low if low < 0 else high}")
    if block_table is not None and block_table.numel():
        used = torch.arange(block_table.size(1)) * k_cache.size(1) < lengths.unsqueeze(1)
        named = block_table[used]
        if named.numel() and (int(named.min()) < 0 or int(named.max()) >= k_cache.size(0)):
            wrong = int(named.min()) if int(named.min()) < 0 else int(named.max())
            expected = f"pages in [0, {k_cache.size(0)}) wherever a sequence has tokens"
            raise ValueError(f"block_table: expected {expected}, got {wrong}")


def _check_positions(before: Tensor, steps: int, cos: Tensor) -> None:
    if before.device.type == "cpu" and before.numel() and int(before.max()) + steps > cos.size(0):
        expected = f"(length, R/2) with a row for position {int(before.max()) + steps - 1}"
        raise ValueError(f"rotary_cos: expected {expected}, got shape {tuple(cos.shape)}")


def _rotated(x: Tensor, before: Tensor, steps: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (B, S, H, D) turned by the angles of the positions before + steps."""
    position = before.unsqueeze(1) + steps
    return rotate(x, cos[position].unsqueeze(2), sin[position].unsqueeze(2), interleaved)


def _write(cache: Tensor, scales: Tensor | None, block_table: Tensor | None, before: Tensor, x: Tensor) -> None:
    """Puts x (B, S, Hkv, D) behind the first `before` tokens of each sequence."""
    token = before.unsqueeze(1) + torch.arange(x.size(1), device=x.device)
    row = torch.arange(x.size(0), device=x.device).unsqueeze(1)
    if block_table is not None:
        row, token = block_table.long().gather(1, token // cache.size(1)), token % cache.size(1)
    if scales is None:
        cache[row, token] = x.to(cache.dtype)
        return
    largest = x.float().abs().amax(-1) if x.size(-1) else x.new_zeros(x.shape[:-1], dtype=torch.float32)
    scale = largest / 127
    scale = torch.where(scale < _SMALLEST, torch.ones_like(scale), scale)
    scale = torch.where(scale.isfinite(), scale, torch.full_like(scale, torch.nan))
    cache[row, token] = torch.round(x.float() / scale.unsqueeze(-1)).clamp(-127, 127).nan_to_num(0.0).to(torch.int8)
    scales[row, token] = scale


def _read(cache: Tensor, scales: Tensor | None, block_table: Tensor | None, used: int, dtype: torch.dtype) -> Tensor:
    """The first `used` tokens of each sequence, (B, Hkv, used, D): a view where the cache is neither paged nor int8."""

    def tokens(x: Tensor) -> Any:
        if block_table is None:
            return x[:, :used]
        pages = block_table[:, : -(-used // x.size(1))].long().clamp(0, max(x.size(0) - 1, 0))
        return x[pages].flatten(1, 2)[:, :used]

    found = tokens(cache)
    if scales is not None:
        found = (found.float() * tokens(scales).unsqueeze(-1)).to(dtype)
    return found.transpose(1, 2)
