"""One query against a cache, against torch's SDPA: `python -m benchmarks.decode`.

The floor is reading the cache once, at the rate at which this machine reads a block of that size again and again. Where
key heads are shared, torch is also asked in the form that suits it: queries of a key head as the rows of one matrix.
Paged and int8 caches are compared with torch after what it needs first: gathering the pages, widening the numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import family, peers
from benchmarks.attention import DTYPES, title
from benchmarks.family import Case, Options
from llmkern import functional
from llmkern.verify import verify

SHAPES = [
    (1, 12, 12, 512, 64),
    (1, 12, 12, 4096, 64),
    (1, 32, 8, 512, 128),
    (1, 32, 8, 4096, 128),
    (1, 8, 8, 32768, 128),
]
QUICK = [(1, 12, 12, 512, 64), (1, 32, 8, 4096, 128)]
PAGE = 64


def main(argv: Sequence[str] | None = None) -> int:
    return family.main("decode", __doc__, cases, "B,H,Hkv,S,D", argv)


def cases(options: Options) -> Iterator[Case]:
    for shape in options.shapes or (QUICK if options.quick else SHAPES):
        for short in DTYPES:
            yield static(shape, short)
        yield paged(shape, "bf16")
        yield int8(shape, "bf16")


def inputs(shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    b, h, hkv, s, d = shape
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(b, n, length, d, generator=generator).to(dtype) for n, length in ((h, 1), (hkv, s), (hkv, s))
    )
    return q, k, v


def operations(shape: Sequence[int]) -> float:
    b, h, _, s, d = shape
    return 4.0 * b * h * s * d


def in_torch(gqa: bool) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Ways to ask torch for the same."""

    def as_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = q.view(q.size(0), k.size(1), -1, q.size(3))
        return peers.attention_sdpa(rows, k, v).view(q.shape)

    def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = q.view(q.size(0), k.size(1), -1, q.size(3))
        return (torch.softmax(rows @ k.transpose(2, 3) * q.size(3) ** -0.5, -1) @ v).view(q.shape)

    found = {"torch sdpa": lambda q, k, v: peers.attention_sdpa(q, k, v, gqa=gqa), "torch products": products}
    return {**found, "torch sdpa, heads as rows": as_rows} if gqa else found


def static(shape: Sequence[int], short: str) -> Case:
    args, gqa = inputs(shape, DTYPES[short]), shape[1] != shape[2]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)

    found: dict[str, Callable[[], Any]] = {n: (lambda f=f: f(*args)) for n, f in in_torch(gqa).items()}
    found["llmkern"] = lambda: ours(*args)
    return Case(
        title(shape, short), found, "torch sdpa",
        lambda: verify(ours, lambda q, k, v: peers.attention_eager(q, k, v, gqa=gqa), args, gradients=False),
        operations(shape), sum(t.nbytes for t in args[1:]), DTYPES[short],
    )  # fmt: skip


def paged(shape: Sequence[int], short: str) -> Case:
    b, h, hkv, s, d = shape
    q, k, v = inputs(shape, DTYPES[short])
    pages = -(-s // PAGE)
    table = torch.randperm(b * pages, generator=torch.Generator().manual_seed(1)).view(b, pages).int()
    pools = []
    for t in (k, v):
        pool = t.new_zeros(b * pages, PAGE, hkv, d)
        rows = torch.nn.functional.pad(t.transpose(1, 2), (0, 0, 0, 0, 0, pages * PAGE - s))
        pool[table.long()] = rows.view(b, pages, PAGE, hkv, d)
        pools.append(pool)
    lengths = torch.full((b,), s, dtype=torch.int32)

    def ours(q: Tensor) -> Tensor:
        return functional.attention_with_kvcache(q.transpose(1, 2), *pools, cache_seqlens=lengths, block_table=table)

    def gathered(q: Tensor) -> Tensor:
        rows = [p[table.long()].flatten(1, 2)[:, :s].transpose(1, 2).to(q.dtype) for p in pools]
        return peers.attention_eager(q, *rows, gqa=h != hkv).transpose(1, 2)

    def torch_gathers(function: Callable[..., Tensor]) -> Callable[[], Any]:
        return lambda: function(q, *(p[table.long()].flatten(1, 2)[:, :s].transpose(1, 2) for p in pools))

    found = {n: torch_gathers(f) for n, f in in_torch(h != hkv).items()}
    found["llmkern"] = lambda: ours(q)
    return Case(
        title(shape, short, f"pages of {PAGE}"), found, "torch sdpa",
        lambda: verify(ours, gathered, (q,), gradients=False), operations(shape), float(k.nbytes + v.nbytes), q.dtype,
    )  # fmt: skip


def int8(shape: Sequence[int], short: str) -> Case:
    b, h, hkv, s, _ = shape
    q, k, v = inputs(shape, DTYPES[short])
    caches, scales = [], []
    for t in (k, v):
        rows = t.transpose(1, 2).float()
        scale = rows.abs().amax(-1) / 127
        caches.append((rows / scale[..., None]).round().to(torch.int8))
        scales.append(scale)
    lengths = torch.full((b,), s, dtype=torch.int32)

    def ours(q: Tensor) -> Tensor:
        return functional.attention_with_kvcache(
            q.transpose(1, 2), *caches, cache_seqlens=lengths, k_scale=scales[0], v_scale=scales[1]
        )

    def widened(dtype: torch.dtype) -> list[Tensor]:
        return [(c * x[..., None]).to(q.dtype).to(dtype).transpose(1, 2) for c, x in zip(caches, scales, strict=True)]

    found: dict[str, Callable[[], Any]] = {
        n: (lambda f=f: f(q, *widened(q.dtype))) for n, f in in_torch(h != hkv).items()
    }
    found["llmkern"] = lambda: ours(q)
    return Case(
        title(shape, short, "int8 cache"), found, "torch sdpa",
        lambda: verify(
            ours, lambda q: peers.attention_eager(q, *widened(q.dtype), gqa=h != hkv).transpose(1, 2), (q,),
            gradients=False,
        ),
        operations(shape), float(sum(t.nbytes for t in (*caches, *scales))), q.dtype,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
