"""What a machine can do, measured here or published: the roof under which a model's time is estimated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmkern import check, extension
from llmkern.evaluation import memory, timing
from llmkern.evaluation.machine import processor
from llmkern.int8.module import Int8Linear

#: Ways to hold a model's linear weights, the most accurate first, and the bytes of a weight.
SCHEMES = {"float32": 4, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class Rates:
    """What linear layers of one scheme cost.

    flops: FLOP per second (a multiply-add counts 2), where many rows make arithmetic the cost. bytes: bytes of weights
    per second, where one row leaves reading them as the cost. Besides, in seconds: output, for each output of a pass,
    whatever its rows; input, for each element of its input; call, for each layer.
    """

    flops: float
    bytes: float
    output: float = 0.0
    input: float = 0.0
    call: float = 0.0


@dataclass(frozen=True)
class Machine:
    """A machine as `llmkern.recommend` sees it.

    device: "cpu" or "cuda". rates: of each scheme that it has, by name. elements: that a norm, a sum or an
    activation between two products passes over in a second. call: seconds that one operator costs the
    host, but for linear layers. memory: bytes for weights and caches.
    capability: a GPU's, None for CPUs and for GPUs of AMD. error: the factor within which estimates have been found to
    lie of what was measured (docs/evaluation.md); None where nobody has measured.

    Raises TypeError and ValueError where a figure is no number in its bounds, or a scheme is unknown.
    """

    name: str
    device: str
    rates: Mapping[str, Rates]
    elements: float
    call: float
    memory: float
    capability: tuple[int, int] | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        check.one_of("device", self.device, ("cpu", "cuda"))
        if not self.rates:
            raise ValueError("rates: expected those of at least one scheme, got none")
        for name in ("elements", "call", "memory"):
            check.above_zero(name, getattr(self, name))
        for scheme, rates in self.rates.items():
            check.one_of("rates", scheme, tuple(SCHEMES))
            for name in ("flops", "bytes"):
                check.above_zero(f"rates[{scheme!r}].{name}", getattr(rates, name))
            for name in ("output", "input", "call"):
                check.at_least(f"rates[{scheme!r}].{name}", getattr(rates, name), 0)
        if self.error is not None:
            check.finite("error", self.error)
            if self.error < 1:
                raise ValueError(f"error: expected None or a factor of at least 1, got {self.error}")

    @classmethod
    def here(cls, device: str | torch.device | None = None) -> Machine:
        """This machine, measured now with layers as models have them; it takes some seconds, and once per process for
        each device, instruction set and number of threads.

        device: "cpu" or "cuda", by default the GPU where torch sees one. No estimate has been compared with a GPU yet,
        so its error is None.
        """
        given = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
        check.one_of("device", given.type, ("cpu", "cuda"))
        isa = extension._C.active_isa() if extension._C else ""
        return _measured(given, torch.get_num_threads(), isa)

    @classmethod
    def published(cls, name: str) -> Machine:
        """A GPU by its vendor's figures, of which models are taken to reach `SHARE_OF_FLOPS` and `SHARE_OF_BYTES`: what
        is estimated from them has not been measured. name: one of PUBLISHED; ValueError for another."""
        check.one_of("name", name, tuple(PUBLISHED))
        capability, memory_gb, bandwidth_tb, float32, bfloat16, int8 = PUBLISHED[name]
        reached = bandwidth_tb * 1e12 * SHARE_OF_BYTES
        peaks = {"float32": float32, "bfloat16": bfloat16, "int8": int8}
        rates = {scheme: Rates(peak * 1e12 * SHARE_OF_FLOPS, reached, call=LAUNCH) for scheme, peak in peaks.items()}
        return cls(name, "cuda", rates, reached / 8, LAUNCH, memory_gb * 1e9, capability)


#: Of the vendor's peaks, where nothing was measured: what models in common use reach on GPUs, by order of magnitude.
SHARE_OF_FLOPS, SHARE_OF_BYTES = 0.5, 0.8
#: Seconds that the host needs to launch a kernel on a GPU, by order of magnitude.
LAUNCH = 5e-6
#: Layers of 4.2 M weights that are read in turn: 269 MB in float32, 67 MB in int8.
_COUNT = 16
#: Capability, memory in GB, TB/s, dense TFLOP/s in float32 without tensor cores, in bfloat16, TOP/s in int8, as the
#: vendors' data sheets have them.
PUBLISHED: dict[str, tuple[tuple[int, int] | None, float, float, float, float, float]] = {
    "A100-80GB": ((8, 0), 80, 2.039, 19.5, 312, 624),
    "L4": ((8, 9), 24, 0.300, 30.3, 121, 242),
    "L40S": ((8, 9), 48, 0.864, 91.6, 362, 733),
    "RTX-4090": ((8, 9), 24, 1.008, 82.6, 165.2, 660.6),
    "H100-SXM": ((9, 0), 80, 3.35, 67, 989, 1979),
    "H200-SXM": ((9, 0), 141, 4.8, 67, 989, 1979),
    "B200": ((10, 0), 180, 7.7, 75, 2250, 4500),
    "MI300X": (None, 192, 5.3, 163.4, 1307, 2615),
}
#: Estimates from rates measured here are at most so many times too short or too long: benchmarks/recommend.py compares
#: them with whole models, docs/evaluation.md has the table.
ERROR = 2.0


@lru_cache(maxsize=8)
def _measured(device: torch.device, threads: int, isa: str) -> Machine:
    with torch.inference_mode(False), torch.no_grad():
        rates = {scheme: _rates(scheme, device) for scheme in SCHEMES if scheme != "int8" or extension._C is not None}
        x, weight = torch.ones(256, 768, device=device), torch.ones(768, device=device)
        between = [lambda: x + x, lambda: F.gelu(x), lambda: F.layer_norm(x, (768,), weight, weight)]
        elements = len(between) * x.numel() / sum(_best(function, 10) for function in between)
        module, small = nn.SiLU(), torch.ones(1, 32, device=device)
        call = _best(lambda: module(small), 200)
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else f"{processor()}, {threads} threads, {isa or 'no library'}"
    size = torch.cuda.get_device_properties(device).total_memory if on_gpu else memory.installed()
    capability = torch.cuda.get_device_capability(device) if on_gpu and torch.version.hip is None else None
    return Machine(name, device.type, rates, elements, call, size, capability, None if on_gpu else ERROR)


def _rates(scheme: str, device: torch.device) -> Rates:
    """Of weights beyond every usual cache, read for one row: deep ones and wide ones, since what an output costs is all
    that tells these apart; and of 256 rows."""
    dtype = torch.bfloat16 if scheme == "bfloat16" else torch.float32

    def rows(count: int, depth: int) -> Tensor:
        return torch.ones(count, depth, device=device, dtype=dtype)

    def layers(depth: int, outputs: int, count: int) -> list[nn.Module]:
        made = [nn.utils.skip_init(nn.Linear, depth, outputs, bias=False) for _ in range(count)]
        for linear in made:
            linear.weight.fill_(1 / depth)
        made = [linear.to(device, dtype) for linear in made]
        return [Int8Linear.from_linear(linear) for linear in made] if scheme == "int8" else made

    def each(made: list[nn.Module], x: Tensor) -> float:
        return _best(lambda: [layer(x) for layer in made]) / len(made)

    # Widths of models, no powers of two, for which some libraries have a way of their own.
    (depth, few), (shallow, many), (narrow, least) = (3456, 1216), (576, 7296), (384, 192)
    deep, wide, small = layers(depth, few, _COUNT), layers(shallow, many, _COUNT), layers(narrow, least, 4 * _COUNT)
    call, size = each(small, rows(1, narrow)), SCHEMES[scheme]
    reading = max(each(deep, rows(1, depth)) - call, 1e-7)
    output = max(0.0, (each(wide, rows(1, shallow)) - call - reading) / (many - few))
    rate = depth * few * size / max(reading - few * output, reading / 2)
    products = max(each(deep[:1], rows(256, depth)) - call - reading, 1e-7)
    call = max(call - narrow * least * size / rate - least * output, 1e-7)
    flops = 2 * 256 * depth * few / products
    filled = each(small, rows(256, narrow)) - 2 * 256 * narrow * least / flops - narrow * least * size / rate
    return Rates(flops, rate, output, max(0.0, filled - least * output - call) / (256 * narrow), call)


def _best(function: Callable[[], object], calls: int = 1) -> float:
    """Seconds of a call, the best of some: what others do on the machine makes some longer, and none shorter."""
    timing.sample(function, calls)
    return min(timing.sample(function, calls) for _ in range(7))
