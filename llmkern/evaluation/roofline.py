"""What this processor can do at most, measured: multiply-adds per second by dtype, and the rate of reading.

    python -m llmkern.evaluation.roofline

The kernels' shares of the peak refer to these rates, measured in the same round as the kernel (`floor`): a machine that
others slow down, or that heats up, slows both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch

from llmkern import extension

KINDS = {"float32": 0, "bfloat16": 1, "int8": 2, "read": 3}  # enum Roofline in csrc/common/roofline.h
MEMORY_BYTES = 1 << 28  # larger than the caches


@dataclass(frozen=True)
class Peaks:
    """Operations (a multiply-add counts 2) and bytes per second, of all threads that torch uses."""

    float32: float
    bfloat16: float
    int8: float
    memory: float  #: reading from memory
    cache: float  #: reading 256 KiB again and again

    def to_json(self) -> dict[str, float]:
        return asdict(self)

    def __str__(self) -> str:
        g = {k: v / 1e9 for k, v in asdict(self).items()}
        return (
            f"peaks measured here: fp32 {g['float32']:.0f} GFLOP/s, bf16 {g['bfloat16']:.0f} GFLOP/s, "
            f"int8 {g['int8']:.0f} GOP/s, reading memory {g['memory']:.0f} GB/s, cache {g['cache']:.0f} GB/s"
        )


#: How often the loop of `rate` is repeated, by what it measures: found once, on a machine that may be busy just then.
_repeats: dict[tuple[str, int, float, int, str], int] = {}


@lru_cache(maxsize=4)
def _block(size: int) -> torch.Tensor:
    return torch.ones(size // 4)


def rate(kind: str, size: int = 0, seconds: float = 0.002) -> float:
    """Operations per second of `kind` (float32, bfloat16, int8); for "read", bytes per second of a block of that size.

    Measured now, for about `seconds`. Raises RuntimeError without the compiled library.
    """
    if extension._C is None:
        raise RuntimeError(str(extension.MISSING))
    code, address = KINDS[kind], 0
    if kind == "read":
        size = max(4096, min(size, MEMORY_BYTES) // 512 * 512)
        address = _block(size).data_ptr()

    def once(repeats: int) -> tuple[float, float]:
        start = time.perf_counter()
        work: float = extension._C.roofline(code, address, size, repeats, torch.get_num_threads())
        return work, time.perf_counter() - start

    setting = (kind, size, seconds, torch.get_num_threads(), extension._C.active_isa())
    if setting not in _repeats:
        _repeats[setting] = _long_enough(once, seconds)
    once(1)  # threads may have to start first
    # Twice, the quicker one counts: where others are at work, a thread that had to wait makes a short run long.
    return max(work / took for work, took in (once(_repeats[setting]) for _ in range(2)))


def _long_enough(once: Callable[[int], tuple[float, float]], seconds: float) -> int:
    """How many repeats last about `seconds`, also where others are at work meanwhile.

    There a single repeat, of less than a microsecond, can take as long as that, waiting for a thread. What was waiting
    shows when another number of repeats has a higher rate; the highest rate tells how many are enough.
    """
    repeats, best = 1, 0.0
    while True:
        work, took = min(once(repeats), once(repeats), key=lambda run: run[1])
        rate, before = work / took, best
        best = max(best, rate)
        if took >= seconds / 2 and (before / 2 < rate < 2 * before or took > 20 * seconds):
            return math.ceil(repeats * seconds * best / work)
        repeats *= math.ceil(max(8.0, min(1000.0, 0.6 * seconds / max(took, 1e-7))))


def peaks(samples: int = 9, seconds: float = 0.01) -> Peaks:
    """The best of some samples each: what slows one down is no property of the machine."""

    def best(kind: str, size: int = 0) -> float:
        return max(rate(kind, size, seconds) for _ in range(samples))

    fp32 = best("float32")
    bf16 = max(best("bfloat16"), fp32)  # without a bf16 instruction, widening once and computing in fp32 is faster
    return Peaks(fp32, bf16, best("int8"), best("read", MEMORY_BYTES), best("read", 1 << 18))


def floor(flops: float, dtype: torch.dtype, bytes: float = 0.0, seconds: float = 0.002) -> Callable[[], float]:
    """A function that measures, when called, the seconds that no version beats.

    flops: operations of the call (a multiply-add counts 2), done at the rate of `dtype` (float16 at float32's: it is
    widened). bytes: the fewest that must be moved, at the rate of reading a block of that size again and again, so from
    the cache where they fit there. The longer of the two counts, since both can go on at once. seconds: about how long
    each rate is measured.
    """
    kind = {torch.bfloat16: "bfloat16", torch.int8: "int8", torch.uint8: "int8"}.get(dtype, "float32")

    def measure() -> float:
        arithmetic = 0.0
        if flops:
            kinds = [kind, "float32"] if kind == "bfloat16" else [kind]  # without the instruction, fp32 is faster
            fastest = max(rate(k, 0, seconds) for k in kinds)
            arithmetic = flops / fastest
        return max(arithmetic, bytes / rate("read", int(bytes), seconds) if bytes else 0.0)

    return measure


if __name__ == "__main__":
    for name in extension._C.supported_isas() if extension._C else []:
        extension._C.force_isa(name)
        print(f"{name}: {peaks()}")
