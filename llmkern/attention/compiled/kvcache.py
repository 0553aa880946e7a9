"""The compiled attention on a cache as a backend: one kernel writes what is new, another attends to all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmkern import extension, overlap
from llmkern.attention import cache
from llmkern.attention.compiled.params import as_sink, params, plain, through_copies, unsupported
from llmkern.attention.mask import Mask
from llmkern.backend import Backend


def kvcache_launcher(
    append_kernel: Callable[..., None], attend_kernel: Callable[..., None], query: Tensor, k_cache: Tensor,
    v_cache: Tensor, key: Tensor | None, value: Tensor | None, rotary_cos: Tensor | None, rotary_sin: Tensor | None,
    cache_seqlens: Tensor | None, block_table: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None,
    slopes: Tensor | None, sink: Tensor | None, left: int, right: int, softcap: float, scale: float, interleaved: bool,
) -> Callable[..., tuple[Tensor, Tensor]]:  # fmt: skip
    """Two kernels on the cache as it lies: one writes what is new, the other attends to all.

    append_kernel(plan, lengths, block_table, k_scale, v_scale, cos, sin, query, rotated, key, value, k_cache, v_cache);
    attend_kernel(plan, block_table, k_scale, v_scale, lengths, logsumexp, slopes, sink, query, k_cache, v_cache,
    output).
    """
    copied = (query, key, value, rotary_cos, rotary_sin, block_table)
    if any(t is not None and plain(t) is not t for t in copied):
        # The caches, which are written to, are plain: see _unsupported_kvcache.
        return through_copies(partial(kvcache_launcher, append_kernel, attend_kernel), 9)
    rotates = rotary_cos is not None and rotary_cos.shape[1] > 0
    batch, queries, heads, width = query.shape
    kv_heads, value_width, device = k_cache.shape[2], v_cache.shape[3], query.device
    capacity, added = cache.capacity(k_cache, block_table), 0 if key is None else key.shape[1]
    rules = Mask(
        None, cache_seqlens, slopes, sink, window_left=left, window_right=right, bottom_right=True, softcap=softcap
    ).arguments()  # fmt: skip
    by_token = (queries * heads * value_width, value_width, heads * value_width, 1)
    rotated_by_token = (queries * heads * width, width, heads * width, 1)
    plan = params(
        [batch, heads, kv_heads, queries, capacity, width, value_width], query.dtype, (*rules, scale, False),
        query=rotated_by_token if rotates else query.transpose(1, 2), key=k_cache.transpose(1, 2),
        value=v_cache.transpose(1, 2), output=by_token,
    )  # fmt: skip
    if key is not None:
        cache.check_within(k_cache, v_cache)
    reach = max(overlap.extent(k_cache), overlap.extent(v_cache))
    append = _append(
        query, k_cache, v_cache, key, value, rotary_cos, rotary_sin, cache_seqlens, block_table, k_scale, v_scale, left,
        right, interleaved,
    )  # fmt: skip
    if cache_seqlens is not None:
        plan.lengths(cache_seqlens.dtype == torch.int64, cache_seqlens.stride(0), added)
    _describe_cache(plan, k_cache, block_table, k_scale, v_scale)

    def launch(
        query: Tensor, k_cache: Tensor, v_cache: Tensor, key: Tensor | None, value: Tensor | None,
        rotary_cos: Tensor | None, rotary_sin: Tensor | None, cache_seqlens: Tensor | None,
        block_table: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None, slopes: Tensor | None,
        sink: Tensor | None, *rest: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if append is not None:
            if abs(k_cache.data_ptr() - v_cache.data_ptr()) < reach:
                cache.check_apart(k_cache, v_cache)
            rotated = torch.empty(query.shape, dtype=query.dtype, device=device) if rotates else query
            tables = (cache_seqlens, block_table, k_scale, v_scale, rotary_cos, rotary_sin)
            append_kernel(append, *tables, query, rotated, key, value, k_cache, v_cache)
            query = rotated
        output = torch.empty((batch, queries, heads, value_width), dtype=query.dtype, device=device)
        logsumexp = torch.empty((batch, heads, queries), dtype=torch.float64, device=device)
        attend_kernel(
            plan, block_table, k_scale, v_scale, cache_seqlens, logsumexp, slopes, as_sink(sink), query, k_cache,
            v_cache, output,
        )  # fmt: skip
        return output, logsumexp

    return launch


def _kvcache(*args: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    append, attend, threads = extension._C.cache_append, extension._C.attention_cached, extension.threads

    def append_kernel(plan: Any, *tensors: Tensor | None) -> None:
        append(plan, threads(), *tensors)

    def attend_kernel(
        plan: Any, block_table: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None, lengths: Tensor | None,
        logsumexp: Tensor, slopes: Tensor | None, sink: Tensor | None, *tensors: Tensor,
    ) -> None:  # fmt: skip
        attend(
            plan, threads(), block_table, k_scale, v_scale, None, lengths, logsumexp, slopes, sink, None, *tensors
        )  # fmt: skip

    return kvcache_launcher(append_kernel, attend_kernel, *args)


def _append(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, key: Tensor | None, value: Tensor | None, cos: Tensor | None,
    sin: Tensor | None, lengths: Tensor | None, table: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None,
    left: int, right: int, interleaved: bool,
) -> Any:  # fmt: skip
    """What stays the same from call to call of what writes new keys and values; None where there are none."""
    if key is None or value is None or lengths is None:
        return None
    batch, queries, heads, width = query.shape
    sizes = [batch, heads, k_cache.shape[2], queries, key.shape[1], cache.capacity(k_cache, table), width]
    code = extension.DTYPE_CODES[query.dtype]
    angles = code if cos is None else extension.DTYPE_CODES[cos.dtype]
    made = extension._C.CacheParams([*sizes, v_cache.shape[3]], code, angles, left >= 0 or right >= 0)
    made.lengths(lengths.dtype == torch.int64, lengths.stride(0))
    tensors = {"query": query, "key": key, "value": value, "key_cache": k_cache, "value_cache": v_cache}
    for name, t in tensors.items():
        getattr(made, name)(*_steps(t))
    made.rotated(queries * heads * width, width, heads * width)
    if cos is not None and sin is not None:
        made.rotation(cos.shape[0], 2 * cos.shape[1], cos.stride(0), sin.stride(0), interleaved)
    _describe_cache(made, k_cache, table, k_scale, v_scale)
    return made


def _describe_cache(
    plan: Any, k_cache: Tensor, table: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None
) -> None:
    if table is not None:
        plan.pages(table.dtype == torch.int64, table.stride(0), max(k_cache.shape[1], 1), k_cache.shape[0])
    if k_scale is not None and v_scale is not None:
        plan.scales(_steps(k_scale), _steps(v_scale))


def _steps(t: Tensor) -> list[int]:
    """Strides of sequence, head and row of a tensor whose heads come after the rows."""
    return [t.stride(0), t.stride(2), t.stride(1)]


def _unsupported_kvcache(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, key: Tensor | None, value: Tensor | None, *rest: Any
) -> str | None:
    *_, slopes, sink, left, right, softcap, _, _ = rest
    if extension.MISSING is None and any(plain(t) is not t for t in (k_cache, v_cache)):
        return "its kernels write into caches whose last dimension is contiguous alone"
    mask = Mask(None, None, slopes, sink, None, left, right, True, softcap)
    return unsupported(query, v_cache, rules=mask.arguments())


CPU_KVCACHE = Backend("cpu", _kvcache, _unsupported_kvcache)
