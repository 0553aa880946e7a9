"""torch.ops.llmkern.attention_kvcache: attention to a cache, into which the new keys and values are written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern import check
from llmkern.attention import compiled, reference
from llmkern.attention.cuda_decode import CUDA_KVCACHE
from llmkern.attention.mask import window
from llmkern.attention.op import checks
from llmkern.attention.triton_decode_launch import TRITON_KVCACHE
from llmkern.backend import Operator, reference_backend
from llmkern.operator import check_types, define, is_compiling, is_plain, needs_grad, refuse_forward_ad


def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | int | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention of new queries to a cache of keys and values, which takes up the new ones in the same call.

    q (B, Sq, H, D), float32, bfloat16 or float16. k_cache (B, Sc, Hkv, D), v_cache (B, Sc, Hkv, Dv), Hkv a divisor of
    H; with block_table (B, P) int32 or int64, (pages, page size, Hkv, D): token t of sequence b lies on page
    block_table[b, t // page size]. cache_seqlens, (B,) int32 or int64 or one integer: the tokens that the cache holds;
    all of it without. k (B, Sn, Hkv, D) and v (B, Sn, Hkv, Dv): written in place behind those, and seen by the queries.
    Returns (B, Sq, H, Dv), zeros for a query that sees no key, and with return_softmax_lse also the log-sum-exp
    (B, H, Sq) float64.

    The last query stands at the last key (the corner at the bottom right): causal, window_size (left, right) and
    alibi_slopes (H,) or (B, H) float32 count from there. softcap, learnable_sink (H,): as in
    scaled_dot_product_attention. softmax_scale: 1 / sqrt(D) by default.

    rotary_cos, rotary_sin (length, R/2), float32 or q's dtype, R <= D: k is rotated before it is written, at the
    positions from cache_seqlens on, and q likewise where causal or a window orders the queries; else every query is
    rotated at position cache_seqlens. rotary_interleaved: pairs are (2 j, 2 j + 1) instead of (j, j + R/2).

    An int8 cache: k_cache and v_cache int8, with k_scale and v_scale float32, a scale for each token and head, of the
    caches' shapes without the last dimension. New tokens are quantised, symmetrically, and their scales written.

    There is no gradient. Raises TypeError for a wrong type or dtype; ValueError for wrong shapes, devices or options
    and, on the CPU, for tokens, pages or positions outside cache, pages or tables; RuntimeError where a gradient is
    asked for.
    Names and layouts are those of flash-attention's flash_attn_with_kvcache (Dao 2023); pages: Kwon et al. 2023,
    "Efficient Memory Management for Large Language Model Serving with PagedAttention", section 4.
    """
    check.is_tensor("q", q)
    if isinstance(cache_seqlens, int):
        check.integer("cache_seqlens", cache_seqlens)
        check.rank("q", q, "(B, Sq, H, D)")
        cache_seqlens = torch.full((q.size(0),), cache_seqlens, dtype=torch.int64, device=q.device)
    if softmax_scale is None:
        softmax_scale = checks.default_scale("q", q, "(B, Sq, H, D)")
    if return_softmax_lse is not False:
        check.flag("return_softmax_lse", return_softmax_lse)
    args: tuple[Any, ...] = (
        q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, block_table, k_scale, v_scale, alibi_slopes,
        learnable_sink, *window(window_size, causal, "causal"), softcap, softmax_scale, rotary_interleaved,
    )  # fmt: skip
    if is_plain(*args):
        output, logsumexp = _run(*args)
    else:
        if not is_compiling():
            _check_types(*args)
        output, logsumexp = torch.ops.llmkern.attention_kvcache(*args)
    return (output, logsumexp) if return_softmax_lse else output


def _check_types(*args: Any) -> None:
    check_types("attention_kvcache", args, _PUBLIC)
    check.finite("softmax_scale", args[16])


#: What `attention_with_kvcache` calls arguments of the operator.
_PUBLIC = {"query": "q", "key": "k", "value": "v", "scale": "softmax_scale"}


def _check(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, key: Tensor | None, value: Tensor | None,
    rotary_cos: Tensor | None, rotary_sin: Tensor | None, cache_seqlens: Tensor | None, block_table: Tensor | None,
    k_scale: Tensor | None, v_scale: Tensor | None, alibi_slopes: Tensor | None, learnable_sink: Tensor | None,
    window_left: int, window_right: int, softcap: float, scale: float, rotary_interleaved: bool,
) -> None:  # fmt: skip
    _check_types(
        query, k_cache, v_cache, key, value, rotary_cos, rotary_sin, cache_seqlens, block_table, k_scale, v_scale,
        alibi_slopes, learnable_sink, window_left, window_right, softcap, scale, rotary_interleaved,
    )  # fmt: skip
    check.dtype("q", query, check.FLOATS)
    check.rank("q", query, "(B, Sq, H, D)")
    batch, _, heads, width = query.shape
    _check_pair("k_scale", k_scale, "v_scale", v_scale)
    shapes = "(B, Sc, Hkv, D)" if block_table is None else "(pages, page size, Hkv, D)"
    for name, t in (("k_cache", k_cache), ("v_cache", v_cache)):
        check.dtype(name, t, (query.dtype,) if k_scale is None and v_scale is None else (torch.int8,))
        check.same_device(name, t, "q", query)
        check.rank(name, t, shapes)
    kv_heads = k_cache.size(2)
    if k_cache.size(3) != width or (block_table is None and k_cache.size(0) != batch):
        with_batch = f"B = {batch} and " if block_table is None else ""
        raise ValueError(f"k_cache: expected {shapes} with {with_batch}D = {width} as in q, "
                         f"got shape {tuple(k_cache.shape)}")  # fmt: skip
    if (heads and kv_heads < 1) or heads % max(kv_heads, 1):
        expected = f"{shapes} with Hkv a divisor of H = {heads}, the heads of q"
        raise ValueError(f"k_cache: expected {expected}, got shape {tuple(k_cache.shape)}")
    if v_cache.shape[:3] != k_cache.shape[:3]:
        expected = f"{shapes.replace('D', 'Dv')} with {tuple(k_cache.shape[:3])} as in k_cache"
        raise ValueError(f"v_cache: expected {expected}, got shape {tuple(v_cache.shape)}")
    if block_table is not None:
        check.dtype("block_table", block_table, (torch.int32, torch.int64))
        check.same_device("block_table", block_table, "q", query)
        check.rank("block_table", block_table, "(B, P)")
        check.shape("block_table", block_table, "(B, P)", (batch, block_table.size(1)))
    if cache_seqlens is not None:
        check.dtype("cache_seqlens", cache_seqlens, (torch.int32, torch.int64))
        check.same_device("cache_seqlens", cache_seqlens, "q", query)
        check.shape("cache_seqlens", cache_seqlens, "(B,)", (batch,))
    _check_scales(query, k_cache, k_scale, v_scale)
    _check_new(query, k_cache, v_cache, key, value, cache_seqlens)
    _check_tables(query, key, rotary_cos, rotary_sin)
    checks.score_rules(
        query, batch, heads, alibi_slopes, learnable_sink, None, window_left, window_right, True, softcap, 0.0
    )  # fmt: skip


def _check_new(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, key: Tensor | None, value: Tensor | None,
    cache_seqlens: Tensor | None,
) -> None:  # fmt: skip
    _check_pair("k", key, "v", value)
    if key is None or value is None:
        return
    if cache_seqlens is None:
        raise ValueError("cache_seqlens: expected the lengths behind which k and v are written, got None")
    for name, t, of in (("k", key, k_cache), ("v", value, v_cache)):
        check.same_dtype(name, t, "q", query)
        check.same_device(name, t, "q", query)
        dimensions = "(B, Sn, Hkv, D)" if name == "k" else "(B, Sn, Hkv, Dv)"
        check.rank(name, t, dimensions)
        check.shape(name, t, dimensions, (query.size(0), key.size(1), of.size(2), of.size(3)))


def _check_pair(name: str, t: Tensor | None, other_name: str, other: Tensor | None) -> None:
    if (t is None) != (other is None):
        given, missing = (name, other_name) if other is None else (other_name, name)
        raise ValueError(f"{missing}: expected a tensor, since {given} is given, got None")


def _check_scales(query: Tensor, k_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    for name, t in (("k_scale", k_scale), ("v_scale", v_scale)):
        if t is not None:
            check.dtype(name, t, (torch.float32,))
            check.same_device(name, t, "q", query)
            check.shape(name, t, "the shape of the cache without D", tuple(k_cache.shape[:3]))


def _check_tables(query: Tensor, key: Tensor | None, cos: Tensor | None, sin: Tensor | None) -> None:
    _check_pair("rotary_cos", cos, "rotary_sin", sin)
    if cos is None or sin is None:
        return
    if key is None:
        raise ValueError("rotary_cos: expected None without k, got a tensor; the cache holds rotated keys already")
    for name, t in (("rotary_cos", cos), ("rotary_sin", sin)):
        check.dtype(name, t, tuple(dict.fromkeys((torch.float32, query.dtype))))
        check.same_device(name, t, "q", query)
        check.rank(name, t, "(length, R/2)")
        check.shape(name, t, "(length, R/2)", tuple(cos.shape))
    if 2 * cos.size(1) > query.size(3):
        expected = f"(length, R/2) with R <= D = {query.size(3)} of q"
        raise ValueError(f"rotary_cos: expected {expected}, got shape {tuple(cos.shape)}")


def _example(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    q, kv = (torch.empty(1, length, 8, 64, dtype=dtype, device=device) for length in (1, 128))
    lengths = torch.empty(1, dtype=torch.int32, device=device)
    return q, kv, kv, q, q, None, None, lengths, *(None,) * 5, -1, 0, 0.0, 0.125, True


_KVCACHE = Operator(
    "attention_kvcache",
    _check,
    _example,
    cpu=[compiled.CPU_KVCACHE, reference_backend(reference.attention_kvcache)],
    cuda=[CUDA_KVCACHE, TRITON_KVCACHE, reference_backend(reference.attention_kvcache)],
    other=[reference_backend(reference.attention_kvcache)],
)


def _run(*args: Any) -> tuple[Tensor, Tensor]:
    tensors = [t for t in args if isinstance(t, Tensor)]
    if needs_grad(*tensors):
        raise RuntimeError(
            "llmkern.attention_with_kvcache has no gradient: call it under torch.no_grad(), or "
            "scaled_dot_product_attention with key_lengths"
        )
    refuse_forward_ad("attention_kvcache", *tensors)
    output, logsumexp = _KVCACHE.run(*args)
    return output, logsumexp


def _fake(query: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _check(query, k_cache, v_cache, *rest)
    batch, queries, heads, _ = query.shape
    output = query.new_empty((batch, queries, heads, v_cache.size(3)))
    return output, query.new_empty((batch, heads, queries), dtype=torch.float64)


define(
    "attention_kvcache(Tensor query, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? key, Tensor? value, "
    "Tensor? rotary_cos, Tensor? rotary_sin, Tensor? cache_seqlens, Tensor? block_table, Tensor(c!)? k_scale, "
    "Tensor(d!)? v_scale, Tensor? alibi_slopes, Tensor? learnable_sink, int window_left, int window_right, "
    "float softcap, float scale, bool rotary_interleaved) -> (Tensor, Tensor)",
    _run, _fake,
)  # fmt: skip
