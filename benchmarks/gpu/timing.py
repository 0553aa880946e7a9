"""Times contestants on a device: alternated in one process, CUDA events around each call, the second-level cache
overwritten before it. On a CPU by the clock, so that the script can be tried.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch

from benchmarks.gpu.steps import context_lost
from llmkern.evaluation.timing import Result

#: Calls of a contestant in one round; the median over them is the round's sample.
CALLS = 5
WARMUP = 3


@lru_cache(maxsize=1)
def _flush_buffer() -> torch.Tensor:
    size = torch.cuda.get_device_properties(0).L2_cache_size if torch.cuda.is_available() else 0
    return torch.empty(max(2 * size, 1 << 26), dtype=torch.int8, device="cuda")


def once(function: Callable[[], Any], device: str) -> float:
    """Seconds of one call, the cache cold."""
    if device == "cpu":
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flush_buffer().zero_()
    # The device is kept busy until the call is queued, so that what is timed is not Python.
    torch.cuda._sleep(400_000)
    start.record()
    function()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3


def measure(
    contestants: Mapping[str, Callable[[], Any]],
    device: str,
    baseline: str,
    rounds: int,
    floor: float = 0.0,
    clock: Callable[[Callable[[], Any], str], float] = once,
) -> Result:
    """As llmkern.evaluation.timing.measure; floor: seconds that no version beats."""
    result = Result(baseline, {}, {})
    for name, function in contestants.items():
        try:
            for _ in range(WARMUP):
                function()
            if device == "cuda":
                torch.cuda.synchronize()
        except Exception as error:  # whatever a peer raises is its result
            if context_lost(error):
                raise
            result.failed[name] = f"{type(error).__name__}: {error}".split("\n", 1)[0]
            continue
        result.samples[name], result.calls[name] = [], CALLS
    order = list(result.samples)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            taken = sorted(clock(contestants[name], device) for _ in range(CALLS))
            result.samples[name].append(taken[CALLS // 2])
        if floor:
            result.floor.append(floor)
    return result
