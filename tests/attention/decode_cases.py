"""Calls of the attention on a cache, and their plain version, for the tests of every backend on a GPU."""

from __future__ import annotations

import torch

from llmkern import backend
from llmkern.attention import reference
from llmkern.functional import attention_with_kvcache
from llmkern.verify import verify

ONE_PIECE, PIECES = 0, 64  # processors: what they make of a small call

RULES = {
    "causal": {"causal": True},
    "window": {"window_size": (4, 1)},
    "cap": {"softcap": 1.5},
    "slopes": {"slopes": torch.tensor([0.5, 0.1]), "causal": True},
    "slopes of batches": {"slopes": torch.tensor([[0.5, 0.1], [0.2, 0.0], [1.0, 2.0]])},
    "sink": {"sink": torch.tensor([0.3, -2.0])},
}


def plain(q, k_cache, v_cache, lengths=None, table=None, k_scale=None, v_scale=None, slopes=None, sink=None, **options):
    left, right = options.get("window_size", (-1, -1))
    right = 0 if options.get("causal") else right
    return as_computed(q, *reference.attention_kvcache(
        q, k_cache, v_cache, None, None, None, None, lengths, table, k_scale, v_scale, slopes, sink, left, right,
        options.get("softcap", 0.0), max(q.size(3), 1) ** -0.5, True,
    ))  # fmt: skip


def ours(q, k_cache, v_cache, lengths=None, table=None, k_scale=None, v_scale=None, slopes=None, sink=None, **options):
    return as_computed(q, *attention_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=lengths, block_table=table, k_scale=k_scale, v_scale=v_scale,
        alibi_slopes=slopes, learnable_sink=sink, return_softmax_lse=True, **options,
    ))  # fmt: skip


def as_computed(q, output, logsumexp):
    """Of float32 the log-sum-exp, which comes in float64 so that no rounding is added to it, is held to float32."""
    return output, logsumexp.float() if q.dtype == torch.float32 else logsumexp


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


def on_the_gpu(name, tokens, dtype):
    """(output, the reference's, the caches, the reference's) of a backend on a GPU, with new tokens that it rotates."""
    q, k, v = (torch.randn(2, 2, h, 128, dtype=dtype, device="cuda") for h in (8, 2, 2))
    caches = [torch.randn(2, tokens, 2, 128, dtype=dtype, device="cuda") for _ in range(2)]
    lengths = torch.tensor([tokens - 2, 5], device="cuda")
    angle = torch.rand(tokens, 32, device="cuda")
    others = [c.clone() for c in caches]
    with backend.use(name):
        out = attention_with_kvcache(q, *caches, k, v, angle.cos(), angle.sin(), lengths, causal=True)
    expected = reference.attention_kvcache(
        q, *others, k, v, angle.cos(), angle.sin(), lengths, None, None, None, None, None, -1, 0, 0.0, 128**-0.5, True
    )[0]  # fmt: skip
    return out, expected, caches, others
