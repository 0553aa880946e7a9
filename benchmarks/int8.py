"""Int8 linear against torch's dynamically quantised linear and F.linear: `python -m benchmarks.int8`.

The peak counts 2 M K N operations at the rate of 8-bit multiply-adds, or reading the weight once, whichever takes
longer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import family, peers
from benchmarks.family import Case, Options
from llmkern import functional
from llmkern.verify.report import Report, judge_row

LAYERS = [(768, 768), (768, 3072), (384, 1536)]  # (K, N)
SHAPES = [(m, k, n) for k, n in LAYERS for m in (1, 4, 16, 128, 512)]
QUICK = [(m, 768, 768) for m in (1, 16, 128)]


def main(argv: Sequence[str] | None = None) -> int:
    return family.main("int8", __doc__, cases, "M,K,N", argv)


def cases(options: Options) -> Iterator[Case]:
    for shape in options.shapes or (QUICK if options.quick else SHAPES):
        yield case(shape)


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric per output channel."""
    scale = weight.abs().amax(1) / 127
    scale = torch.where(scale == 0, 1.0, scale)
    return (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def exact(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, result: torch.dtype) -> Tensor:
    """Quantised activations times quantised weights; everything behind the quantisation in the dtype `result`."""
    x = x.float()
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    step = (high - low) / 255
    step = torch.where(step == 0, 1.0, step)
    inverse = 1 / step
    zero = (-low * inverse).round().clamp(0, 255)
    q = ((x * inverse).round() + zero).clamp(0, 255) - zero
    total = q.double() @ weight.double().t()  # integers below 2^53: exact
    if result == torch.float64:
        return total * (step.double() * scale.double()) + bias.double()
    return total.float() * (step * scale) + bias


def case(shape: Sequence[int]) -> Case:
    m, k, n = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(m, k, generator=generator)
    linear = nn.Linear(k, n).eval().requires_grad_(False)
    for p in linear.parameters():
        p.copy_(torch.randn(p.shape, generator=generator) / k**0.5)
    weight, scale = quantized(linear.weight.detach())
    bias = linear.bias.detach()
    half = [t.bfloat16() for t in (x, linear.weight.detach(), bias)]

    def check() -> Report:
        rows = []
        for name, a in (("fp32", x), ("bf16", half[0])):
            out = functional.int8_linear(a, weight, scale, bias)
            single, truth = (exact(a, weight, scale, bias, d) for d in (torch.float32, torch.float64))
            rows.append(judge_row(name, "output", out, single.to(a.dtype), truth))
        return Report(tuple(rows))

    found: dict[str, Callable[[], Any]] = {}
    for engine in peers.quantized_engines():
        module = peers.quantized_linear(linear, engine)
        found[f"torch quantised ({engine})"] = lambda module=module: module(x)
    baseline = next(iter(found), "torch fp32")
    found |= {
        "torch fp32": lambda: F.linear(x, linear.weight, linear.bias),
        "torch bf16": lambda: F.linear(*half),
        "llmkern": lambda: functional.int8_linear(x, weight, scale, bias),
        "llmkern, bf16 activations": lambda: functional.int8_linear(half[0], weight, scale, bias),
    }
    return Case(
        f"M={m} K={k} N={n}", found, baseline, check, 2.0 * m * k * n, float(weight.nbytes), torch.int8
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
