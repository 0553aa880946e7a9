"""Whether int8 pays for a layer on this machine: a small model of it, measured once, on one thread.

A layer's time is taken to be a call's own cost, plus the longer of reading the weight and multiplying, plus what every
element of the input and the output costs. The four numbers of each way to compute a layer (torch in the layer's dtype,
and int8) come from timing a few layers of known size. `python -m llmkern` prints them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from llmkern import check, extension
from llmkern.int8.module import Int8Linear
from llmkern.int8.scheme import Int8Scheme

#: Rows of a call for which a layer must not get slower, unless the caller knows better: one token, a small batch, a
#: prompt.
ROWS = (1, 16, 128)
#: Where the model sees the two within this factor, the layer itself is timed.
DOUBT = 1.5
#: By how much int8 must be ahead: what is as quick as before gains nothing but an error.
GAIN = 1.03


@dataclass(frozen=True)
class Rates:
    """What one way to compute a linear layer costs here."""

    call: float  #: seconds
    weights: float  #: weight elements per second, where few rows leave reading them as the cost
    products: float  #: multiply-adds per second at many rows
    elements: float  #: seconds for each element of input and output

    def seconds(self, rows: int, depth: int, outputs: int) -> float:
        """The time of a call with x (rows, depth) and a weight (outputs, depth)."""
        size = depth * outputs
        return (
            self.call + max(size / self.weights, rows * size / self.products) + rows * (depth + outputs) * self.elements
        )

    def __str__(self) -> str:
        return (
            f"{self.call * 1e6:.1f} us a call, {self.weights / 1e9:.1f} G weights/s, "
            f"{self.products / 1e9:.0f} G multiply-adds/s, {self.elements * 1e12:.0f} ps an element in and out"
        )


@dataclass(frozen=True)
class Verdict:
    """The comparison for one layer: seconds by rows."""

    floating: dict[int, float]
    int8: dict[int, float]
    timed: bool  #: by timing this very size; else by the model

    @property
    def pays(self) -> bool:
        return all(GAIN * self.int8[rows] <= self.floating[rows] for rows in self.int8)

    def __str__(self) -> str:
        speedups = ", ".join(f"{self.floating[m] / self.int8[m]:.2f} at {m}" for m in self.int8)
        return f"int8 would be {speedups} rows times as fast ({'timed' if self.timed else 'by the model'})"


def layer_functions(
    rows: int, depth: int, outputs: int, dtype: torch.dtype, scheme: Int8Scheme
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Calls of an nn.Linear and of its int8 form on inputs and weights of these sizes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, depth, generator=generator).to(dtype)
    linear = nn.utils.skip_init(nn.Linear, depth, outputs, dtype=dtype)  # whose own values would use the user's seed
    for parameter in linear.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(depth, 1) ** 0.5)
    int8 = Int8Linear.from_linear(linear, scheme=scheme)
    return lambda: linear(x), lambda: int8(x)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Work shared among threads waits for the last of them, so that other programs on the machine would decide."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _time(functions: tuple[Callable[[], object], ...], rounds: int = 7, seconds: float = 0.002) -> list[float]:
    """The best time of each, in turn: what others do on the machine makes some rounds longer, and none shorter."""
    times: list[list[float]] = [[] for _ in functions]
    repeats = []
    for function in functions:
        function()
        start = time.perf_counter()
        function()
        repeats.append(max(1, min(200, int(seconds / max(time.perf_counter() - start, 1e-7)))))
    for _ in range(rounds):
        for function, repeat, found in zip(functions, repeats, times, strict=True):
            start = time.perf_counter()
            for _ in range(repeat):
                function()
            found.append((time.perf_counter() - start) / repeat)
    return [min(t) for t in times]


def rates(dtype: torch.dtype, scheme: Int8Scheme | None = None) -> tuple[Rates, Rates]:
    """Of torch's linear in this dtype and of int8's, measured at the first call with these settings of the machine."""
    isa = extension._C.active_isa() if extension._C else ""
    return _rates(dtype, scheme or Int8Scheme(), isa)


@lru_cache(maxsize=64)
def _rates(dtype: torch.dtype, scheme: Int8Scheme, isa: str) -> tuple[Rates, Rates]:
    with torch.inference_mode(False), torch.no_grad(), _one_thread():  # weights of inference are packed in every call
        tiny = _time(layer_functions(1, 32, 32, dtype, scheme))
        few = _time(layer_functions(1, 1024, 1024, dtype, scheme))
        many = _time(layer_functions(192, 768, 768, dtype, scheme))
        wide = _time(layer_functions(1536, 64, 64, dtype, scheme))
    found = []
    for i in range(2):
        call = tiny[i]
        weights = 1024 * 1024 / max(few[i] - call, 1e-7)
        products = 192 * 768 * 768 / max(many[i] - call, 1e-7)
        elements = max(wide[i] - call - 1536 * 64 * 64 / products, 0.0) / (1536 * 128)
        found.append(Rates(call, weights, products, elements))
    return found[0], found[1]


def compare(depth: int, outputs: int, dtype: torch.dtype, scheme: Int8Scheme, rows: tuple[int, ...] = ROWS) -> Verdict:
    """Whether a layer of this size gains, by the model; where that sees no clear winner, by timing it.

    Raises TypeError for a dtype that is not float32, bfloat16 or float16.
    """
    if dtype not in check.FLOATS:
        raise TypeError(f"dtype: expected {' or '.join(map(check.short, check.FLOATS))}, got {dtype}")
    floating, int8 = rates(dtype, scheme)
    found = Verdict(
        {m: floating.seconds(m, depth, outputs) for m in rows},
        {m: int8.seconds(m, depth, outputs) for m in rows},
        False,
    )
    ratios = [found.floating[m] / found.int8[m] for m in rows]
    if min(ratios) > DOUBT or min(ratios) < 1 / DOUBT:
        return found
    isa = extension._C.active_isa() if extension._C else ""
    return _timed(depth, outputs, dtype, scheme, rows, isa)


@lru_cache(maxsize=256)
def _timed(
    depth: int, outputs: int, dtype: torch.dtype, scheme: Int8Scheme, rows: tuple[int, ...], isa: str
) -> Verdict:
    floating, int8 = {}, {}
    with torch.inference_mode(False), torch.no_grad(), _one_thread():  # weights of inference are packed in every call
        for m in rows:
            floating[m], int8[m] = _time(layer_functions(m, depth, outputs, dtype, scheme))
    return Verdict(floating, int8, True)


__all__ = ["ROWS", "Rates", "Verdict", "compare", "rates"]
