"""Attention against torch's SDPA, eager and torch.compile: `python -m benchmarks.attention`.

The peak counts the multiply-adds that the mask leaves: 4 B H S S D operations, half of it for causal, 2.5 times as much
for the backward. Padding is given to torch as a boolean mask, to llmkern as lengths.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import family, peers
from benchmarks.family import DTYPES, Case, Options
from llmkern import functional
from llmkern.verify import Report, verify

SHAPES = [(1, 12, 512, 64), (1, 12, 2048, 64), (4, 8, 1024, 64), (1, 32, 2048, 128)]
QUICK = [(1, 12, 512, 64), (1, 12, 2048, 64)]


def main(argv: Sequence[str] | None = None) -> int:
    return family.main("attention", __doc__, cases, "B,H,S,D", argv)


def cases(options: Options) -> Iterator[Case]:
    for shape in options.shapes or (QUICK if options.quick else SHAPES):
        for short in DTYPES:
            for causal in (False, True):
                yield forward(shape, short, causal, options)
                if not options.quick:
                    yield backward(shape, short, causal)
    if options.shapes:
        return
    for short in DTYPES:
        yield padded((32, 12, 128, 32), between(32, 128), short, "padded", options)
        if not options.quick:
            yield padded((8, 12, 512, 64), torch.full((8,), 256), short, "half of it padding", options)
            yield grouped((1, 32, 512, 128), 8, short)
            yield grouped((1, 32, 2048, 128), 8, short)


def inputs(shape: Sequence[int], dtype: torch.dtype, kv_heads: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    b, h, s, d = shape
    generator = torch.Generator().manual_seed(0)
    heads = (h, kv_heads or h, kv_heads or h)
    q, k, v = (torch.randn(b, s, n, d, generator=generator).transpose(1, 2).to(dtype) for n in heads)
    return q, k, v


def operations(shape: Sequence[int], causal: bool) -> float:
    b, h, s, d = shape
    return 4.0 * b * h * d * (s * (s + 1) / 2 if causal else s * s)


def title(shape: Sequence[int], short: str, *words: str) -> str:
    return " ".join([",".join(map(str, shape)), short, *(w for w in words if w)])


def contestants(
    ours: Callable[..., Any], args: tuple[Tensor, ...], compile: bool, **peer: Any
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    found: dict[str, Callable[[], Any]] = {
        "torch sdpa": lambda: peers.attention_sdpa(*args, **peer),
        "torch eager": lambda: peers.attention_eager(*args, **peer),
        "llmkern": lambda: ours(*args),
    }
    return found, peers.with_compiled(found, peers.attention_eager, args, compile, **peer)


def forward(shape: Sequence[int], short: str, causal: bool, options: Options) -> Case:
    args = inputs(shape, DTYPES[short])

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    found, skipped = contestants(ours, args, options.compile, causal=causal)
    return Case(
        title(shape, short, "causal" if causal else ""), found, "torch sdpa",
        lambda: verify(ours, lambda q, k, v: peers.attention_eager(q, k, v, causal=causal), args, gradients=False),
        operations(shape, causal), sum(t.nbytes for t in args), DTYPES[short], skipped,
    )  # fmt: skip


def backward(shape: Sequence[int], short: str, causal: bool) -> Case:
    args = inputs(shape, DTYPES[short])

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def of(function: Callable[..., Tensor]) -> Callable[[], Any]:
        leaves = [t.detach().requires_grad_() for t in args]
        out = function(*leaves)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)

    return Case(
        title(shape, short, "causal" if causal else "", "backward"),
        {
            "torch sdpa": of(lambda *a: peers.attention_sdpa(*a, causal=causal)),
            "torch eager": of(lambda *a: peers.attention_eager(*a, causal=causal)),
            "llmkern": of(ours),
        },
        "torch sdpa",
        lambda: verify(ours, lambda q, k, v: peers.attention_eager(q, k, v, causal=causal), args),
        2.5 * operations(shape, causal), 2.0 * sum(t.nbytes for t in args), DTYPES[short],
    )  # fmt: skip


def between(batch: int, longest: int) -> Tensor:
    """Lengths of a batch of differing sentences, a quarter to all of the longest."""
    return torch.linspace(max(1, longest // 4), longest, batch).round().long()


def padded(shape: Sequence[int], lengths: Tensor, short: str, words: str, options: Options) -> Case:
    """Keys behind the lengths are padding. Queries are not: all of them are computed by every contestant."""
    args = inputs(shape, DTYPES[short])
    _, h, s, d = shape
    mask = (torch.arange(s) < lengths[:, None])[:, None, None, :]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, key_lengths=lengths)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, mask)

    def check() -> Report:
        first = verify(ours, lambda q, k, v: peers.attention_eager(q, k, v, mask), args, gradients=False)
        second = verify(masked, lambda q, k, v: peers.attention_eager(q, k, v, mask), args, gradients=False)
        return Report(first.rows + second.rows, first.note)

    found, skipped = contestants(ours, args, options.compile, mask=mask)
    found["llmkern, boolean mask"] = lambda: masked(*args)
    flops = 4.0 * h * s * d * float(lengths.sum())
    return Case(
        title(shape, short, words), found, "torch sdpa", check,
        flops, sum(t.nbytes for t in args), DTYPES[short], skipped,
    )  # fmt: skip


def grouped(shape: Sequence[int], kv_heads: int, short: str) -> Case:
    args = inputs(shape, DTYPES[short], kv_heads)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    found, _ = contestants(ours, args, False, causal=True, gqa=True)
    reference = lambda q, k, v: peers.attention_eager(q, k, v, causal=True, gqa=True)  # noqa: E731
    return Case(
        title(shape, short, f"causal, {kv_heads} key heads"), found, "torch sdpa",
        lambda: verify(ours, reference, args, gradients=False),
        operations(shape, True), sum(t.nbytes for t in args), DTYPES[short],
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
