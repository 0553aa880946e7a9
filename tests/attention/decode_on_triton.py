"""The attention on a cache served by Triton's kernels, run by whatever runs a launch."""

from __future__ import annotations

from typing import Any

import torch

from llmkern import backend, triton
from llmkern.attention import reference, triton_decode_launch
from llmkern.functional import attention_with_kvcache
from llmkern.verify import verify

ONE_PIECE, PIECES = 0, 64  # processors: what they make of a small call


def serve(monkeypatch: Any, run: triton.Run, processors: int = ONE_PIECE, family: str = "sm_80") -> None:
    stands = backend.Backend(
        "triton", lambda *args: triton_decode_launch.decode(run, family, processors, *args), lambda *args: None
    )  # fmt: skip
    operator = backend.Operator.all["attention_kvcache"]
    monkeypatch.setattr(operator, "by_device", {**operator.by_device, "cpu": [stands]})
    backend.forget_plans()


def ours(q, k_cache, v_cache, lengths=None, table=None, k_scale=None, v_scale=None, slopes=None, sink=None, **options):
    return attention_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=lengths, block_table=table, k_scale=k_scale, v_scale=v_scale,
        alibi_slopes=slopes, learnable_sink=sink, return_softmax_lse=True, **options,
    )  # fmt: skip


def plain(q, k_cache, v_cache, lengths=None, table=None, k_scale=None, v_scale=None, slopes=None, sink=None, **options):
    left, right = options.get("window_size", (-1, -1))
    right = 0 if options.get("causal") else right
    return reference.attention_kvcache(
        q, k_cache, v_cache, None, None, None, None, lengths, table, k_scale, v_scale, slopes, sink, left, right,
        options.get("softcap", 0.0), max(q.size(3), 1) ** -0.5, True,
    )  # fmt: skip


def check(*inputs, **options):
    verify(ours, plain, inputs, options, gradients=False).raise_if_failed()


def inputs(batch, queries, heads, kv_heads, width, value_width, keys, dtype):
    torch.manual_seed(keys)
    shapes = (queries, heads, width), (keys, kv_heads, width), (keys, kv_heads, value_width)
    return [torch.randn(batch, *shape, dtype=dtype) for shape in shapes]


def in_pages(size, *caches):
    """The caches in pages of `size` tokens, in any order and among others, and the table."""
    batch, tokens = caches[0].shape[:2]
    pages = -(-tokens // size)
    table = torch.randperm(batch * pages + 2)[: batch * pages].view(batch, pages)
    pools = []
    for x in caches:
        pool = torch.full((batch * pages + 2, size, *x.shape[2:]), 99, dtype=x.dtype)
        for b in range(batch):
            for page in range(pages):
                part = x[b, page * size : (page + 1) * size]
                pool[table[b, page], : len(part)] = part
        pools.append(pool)
    return *pools, table
