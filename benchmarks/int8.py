"""Int8 linear against torch's quantised linear and F.linear: `python -m benchmarks.int8`; --cold: weights from memory.

The peak counts 2 M K N operations at the rate of 8-bit multiply-adds, or reading the weight once at the rate at which
a block of its size is read again and again, whichever takes longer. "16bit" does twice these operations. With --cold
see benchmarks/int8_cold.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import family, peers
from benchmarks.family import Case, Options
from llmkern import functional
from llmkern.int8 import reference
from llmkern.verify.report import Report, Row, judge_row

LAYERS = [(768, 768), (768, 3072), (3072, 768), (4096, 4096), (4096, 11008)]  # (K, N)
SHAPES = [(m, k, n) for k, n in LAYERS for m in (1, 4, 16, 128, 512, 2048)]
QUICK = [(m, 768, 768) for m in (1, 16, 128)]
CHECKED = 64  #: rows that are held to float64, evenly spaced from the first to the last
SLOW = 1e9  #: operations above which qnnpack, made for phones, would take most of the time here


@dataclass(frozen=True)
class Way:
    """One way to ask llmkern."""

    inputs: str = "outliers"
    group: int = 0
    dtype: torch.dtype = torch.float32  #: of the activations
    into: bool = False  #: writes into a tensor that is given

    def call(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Callable[[], Tensor]:
        """x, weight and scale as `arguments` gives them."""
        out = x.new_empty(x.size(0), weight.size(0)) if self.into else None
        return lambda: functional.int8_linear(x, weight, scale, bias, inputs=self.inputs, group=self.group, out=out)

    def arguments(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """From x (M, K), weight (N, K) and bias (N,), float32."""
        return (x.to(self.dtype), *reference.quantize_weight(weight, self.group), bias)

    def judge(self, name: str, out: Tensor, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Row:
        """The result `out` held to the plain version: the same integers, everything behind them in float64."""
        rows = torch.linspace(0, len(x) - 1, min(len(x), CHECKED), dtype=torch.float64).round().long()
        single, truth = (
            reference.int8_linear(a, weight, scale, bias, inputs=self.inputs, group=self.group)
            for a in (x[rows], x[rows].double())
        )
        return judge_row(name, "output", out[rows], single, truth)


WAYS = {
    "llmkern": Way(),
    "llmkern, row": Way("row"),
    "llmkern, row, into out": Way("row", into=True),
    "llmkern, groups of 128": Way("symmetric", 128),
    "llmkern, 16bit": Way("16bit"),
    "llmkern, bf16 activations": Way(dtype=torch.bfloat16),
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--cold" in arguments:
        from benchmarks import int8_cold

        arguments.remove("--cold")
        return int8_cold.main(arguments)
    return family.main("int8", __doc__, cases, "M,K,N", arguments)


def cases(options: Options) -> Iterator[Case]:
    for shape in options.shapes or (QUICK if options.quick else SHAPES):
        yield case(shape)


def layer(shape: Sequence[int]) -> tuple[Tensor, nn.Linear]:
    """Normal inputs (M, K) and a layer from K to N, the same ones in every process."""
    m, k, n = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(m, k, generator=generator)
    linear = nn.Linear(k, n).eval().requires_grad_(False)
    for p in linear.parameters():
        p.copy_(torch.randn(p.shape, generator=generator) / k**0.5)
    return x, linear


def engines(operations: float) -> tuple[list[str], dict[str, str]]:
    """Those of torch's quantised engines that are timed, and by name why another is not."""
    found = peers.quantized_engines()
    if operations <= SLOW:
        return found, {}
    why = f"slow above {SLOW:.0e} operations"
    return [e for e in found if e != "qnnpack"], {quantised(e): why for e in found if e == "qnnpack"}


def quantised(engine: str) -> str:
    return f"torch quantised ({engine})"


def case(shape: Sequence[int]) -> Case:
    m, k, n = shape
    x, linear = layer(shape)
    operations = 2.0 * m * k * n
    made = {name: way.arguments(x, linear.weight, linear.bias) for name, way in WAYS.items()}
    ours = {name: way.call(*made[name]) for name, way in WAYS.items()}
    half = [t.bfloat16() for t in (x, linear.weight, linear.bias)]

    def check() -> Report:
        return Report(tuple(way.judge(name, ours[name](), *made[name]) for name, way in WAYS.items()))

    timed, skipped = engines(operations)
    found: dict[str, Callable[[], Any]] = {}
    for engine in timed:
        module = peers.quantized_linear(linear, engine)
        found[quantised(engine)] = partial(module, x)
    baseline = next(iter(found), "torch fp32")
    found |= {
        "torch fp32": lambda: F.linear(x, linear.weight, linear.bias),
        "torch bf16": lambda: F.linear(*half),
        **ours,
    }
    return Case(
        f"M={m} K={k} N={n}", found, baseline, check, operations, float(k * n), torch.int8, skipped
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
