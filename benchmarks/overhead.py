"""What one call costs on tensors so small that the arithmetic is nothing: `python -m benchmarks.overhead`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional as F

from benchmarks import family, int8, peers
from benchmarks.family import Case, Options
from llmkern import functional
from llmkern.verify import verify


def main(argv: Sequence[str] | None = None) -> int:
    return family.main("overhead", __doc__, cases, "B,H,S,D", argv)


def cases(options: Options) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 2, 16, generator=generator) for _ in range(3))
    sdpa = functional.scaled_dot_product_attention
    yield Case(
        "attention 1,1,2,16",
        {"torch sdpa": lambda: F.scaled_dot_product_attention(q, k, v), "llmkern": lambda: sdpa(q, k, v)},
        "torch sdpa",
        lambda: verify(sdpa, peers.attention_eager, (q, k, v), gradients=False),
    )
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    yield Case(
        "attention 1,1,2,16, gradients on",
        {"torch sdpa": lambda: F.scaled_dot_product_attention(*leaves), "llmkern": lambda: sdpa(*leaves)},
        "torch sdpa",
        lambda: verify(sdpa, peers.attention_eager, (q, k, v)),
    )
    cos, sin = torch.ones(2, 8), torch.zeros(2, 8)
    yield Case(
        "rotary 1,1,2,16",
        {
            "torch eager": lambda: peers.rotary_eager(q, k, cos, sin),
            "llmkern": lambda: functional.rotary(q, k, cos, sin),
        },
        "torch eager",
        lambda: verify(functional.rotary, peers.rotary_eager, (q, k, cos, sin), gradients=False),
    )
    x, pe = torch.randn(2, 1, 16, generator=generator), torch.randn(2, 1, 16, generator=generator)
    yield Case(
        "sinusoidal 2,1,16",
        {
            "torch eager": lambda: peers.sinusoidal_eager(x, pe),
            "llmkern": lambda: functional.sinusoidal_add(x, pe),
            "llmkern, as torch.ops": lambda: torch.ops.llmkern.sinusoidal_add(x, pe, None, 1.0, 0.0),
        },
        "torch eager",
        lambda: verify(functional.sinusoidal_add, peers.sinusoidal_eager, (x, pe), gradients=False),
    )
    small = int8.case((1, 16, 16))
    small.name, small.flops, small.bytes = "int8 linear M=1 K=16 N=16", 0.0, 0.0
    yield small


if __name__ == "__main__":
    sys.exit(main())
