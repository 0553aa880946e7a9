"""Times functions against each other.

The contestants alternate within one process: each round times every one of them once, in random order, so that whatever
slows the machine slows all alike, and the ratio of two contestants is formed within a round before the median is taken
over rounds. A sample repeats the call until it has lasted some 10 ms.

    result = measure({"torch": f, "llmkern": g}, baseline="torch")
    print(result.table())
    result.ratio("llmkern")  # Spread: the median speed-up over torch, with the 20th and 80th percentile
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch


def percentile(values: Iterable[float], share: float) -> float:
    """By linear interpolation between the sorted values; share: .95 for the 95th."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("values: expected at least one, got none")
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


class Spread(NamedTuple):
    """A median with the 20th and the 80th percentile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Percentiles by linear interpolation between the sorted values."""
        found = list(values)
        return cls(*(percentile(found, share) for share in (0.5, 0.2, 0.8)))


@dataclass
class Result:
    """Samples of one comparison. Every list has one entry per round, in the same order for all contestants."""

    baseline: str
    #: Seconds per call.
    samples: dict[str, list[float]]
    #: How many calls one sample repeated.
    calls: dict[str, int]
    #: Why a contestant could not run.
    failed: dict[str, str] = field(default_factory=dict)
    #: Seconds that no version beats on this machine, measured within each round; empty where not asked for.
    floor: list[float] = field(default_factory=list)
    #: Share of all cores that other processes used during each round; empty where the system does not tell.
    disturbance: list[float] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return list(self.samples)

    def time(self, name: str) -> Spread:
        """Seconds per call."""
        return Spread.of(self.samples[name])

    def ratio(self, name: str, over: str | None = None) -> Spread:
        """How many times as fast as the baseline (or `over`): the median of the ratios of each round."""
        pairs = zip(self.samples[over or self.baseline], self.samples[name], strict=True)
        return Spread.of(base / own for base, own in pairs)

    def share(self, name: str) -> Spread | None:
        """The share of the floor reached: floor / time, of each round; None without a floor."""
        if not self.floor:
            return None
        return Spread.of(floor / own for floor, own in zip(self.floor, self.samples[name], strict=True))

    def to_json(self) -> dict[str, Any]:
        contestants: dict[str, Any] = {}
        for name in self.samples:
            share = self.share(name)
            contestants[name] = {
                "seconds": self.time(name)._asdict(),
                "ratio": self.ratio(name)._asdict() if self.baseline in self.samples else None,
                "share_of_peak": share._asdict() if share else None,
                "calls_per_sample": self.calls[name],
                "samples": self.samples[name],
            }
        return {
            "baseline": self.baseline,
            "contestants": contestants,
            "failed": self.failed,
            "floor_seconds": Spread.of(self.floor)._asdict() if self.floor else None,
            "disturbance": Spread.of(self.disturbance).median if self.disturbance else None,
        }

    def cells(self, name: str) -> list[str]:
        """Of a table's line: name, time and its spread, speed-up and its spread."""
        t = self.time(name)
        cells = [name, seconds(t.median), f"{seconds(t.low)} to {seconds(t.high)}"]
        if self.baseline not in self.samples:
            return [*cells, "", ""]
        r = self.ratio(name)
        return [*cells, f"{r.median:.2f}", f"{r.low:.2f} to {r.high:.2f}"]

    def table(self) -> str:
        """A Markdown table: time, speed-up with its spread, share of the peak."""
        head = ["", "time", "20 to 80 %", f"times {self.baseline}", "20 to 80 %"]
        lines = [head + (["of the peak"] if self.floor else [])]
        for name in self.samples:
            share = self.share(name)
            lines.append(self.cells(name) + ([f"{share.median:.0%}"] if share else []))
        for name, reason in self.failed.items():
            lines.append([name, f"not run: {reason}", *[""] * (len(lines[0]) - 2)])
        return markdown(lines)


def measure(
    contestants: Mapping[str, Callable[[], Any]],
    *,
    baseline: str | None = None,
    rounds: int = 11,
    sample_seconds: float = 0.01,
    warmup: int = 2,
    floor: Callable[[], float] | None = None,
    seed: int = 0,
    progress: Callable[[], Any] | None = None,
) -> Result:
    """Times the contestants against each other.

    contestants: functions without arguments. One that raises in its warm-up is reported in `failed` and left out.
    baseline: the name that ratios refer to; the first one by default.
    rounds: samples per contestant. sample_seconds: the shortest sample. warmup: calls before anything is timed.
    floor: measures, once a round, the seconds that no version beats (roofline.floor).
    progress: called after every round.

    Raises ValueError for no contestants, an unknown baseline, or fewer than one round.
    """
    baseline = baseline or next(iter(contestants), "")
    if baseline not in contestants:
        raise ValueError(f"baseline: expected one of the contestants {list(contestants)}, got {baseline!r}")
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    result = Result(baseline, {}, {})
    for name, function in contestants.items():
        try:
            for _ in range(warmup):
                function()
            once = min(sample(function, 1) for _ in range(2))
        except Exception as error:  # whatever a peer raises is its result
            result.failed[name] = f"{type(error).__name__}: {error}".split("\n", 1)[0]
            continue
        result.samples[name] = []
        result.calls[name] = max(1, math.ceil(sample_seconds / once))
    order = list(result.samples)
    shuffle = random.Random(seed).shuffle
    for _ in range(rounds):
        shuffle(order)
        before, start = busy(), time.perf_counter()
        for name in order:
            result.samples[name].append(sample(contestants[name], result.calls[name]))
        if floor is not None:
            result.floor.append(floor())
        after = busy()
        if before and after:
            cores = torch.get_num_threads()
            others = (after[0] - before[0]) - (after[1] - before[1])
            result.disturbance.append(max(0.0, others) / (cores * (time.perf_counter() - start)))
        if progress is not None:
            progress()
    return result


def sample(function: Callable[[], Any], calls: int) -> float:
    """Seconds per call."""
    gpu = torch.cuda.is_available()
    collecting = gc.isenabled()
    gc.disable()  # a collection would land in some sample by chance
    try:
        if gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        if gpu:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls
    finally:
        if collecting:
            gc.enable()


def busy() -> tuple[float, float] | None:
    """Seconds of processor time spent so far by the whole machine and by this process; None where not told."""
    try:
        with open("/proc/stat") as f:
            ticks = [int(x) for x in f.readline().split()[1:9]]
    except (OSError, ValueError):
        return None
    user, nice, system, _, _, irq, softirq, steal = ticks
    return (user + nice + system + irq + softirq + steal) / 100, time.process_time()


def seconds(value: float) -> str:
    """A time with three digits and its unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 999.5 * size else f"{value / size:.0f} {unit}"
    return f"{value / 1e-9:.3g} ns"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first line the head, aligned also for those who read it as text."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *rows[1:]])
