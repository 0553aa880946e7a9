"""Which kernels serve a program: calls, fallbacks and time of each operator and backend, for Prometheus, and as ranges
of torch's profiler and NVTX.

    with llmkern.monitoring.watch() as counts:
        model(**batch)
    print(counts.table())

Off, it costs nothing: a call runs the launcher that its plan keeps (llmkern/backend.py), and only plans made while it
is on keep one that counts.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from llmkern import check


@dataclass
class Count:
    """Calls of an operator that a backend served. fallbacks: those of the plain PyTorch version that nobody had asked
    for. seconds: on the host, which a GPU's kernel outlasts."""

    operator: str
    backend: str
    calls: int = 0
    fallbacks: int = 0
    seconds: float = 0.0


class Counts:
    """Counts since they were made, in the whole process; safe to read and write from several threads."""

    def __init__(self, ranges: bool = False) -> None:
        self.ranges = ranges
        self._lock = threading.Lock()
        self._found: dict[tuple[str, str], Count] = {}

    def all(self) -> list[Count]:
        """A copy of each, by operator and backend."""
        with self._lock:
            return [Count(**vars(self._found[key])) for key in sorted(self._found)]

    def table(self) -> str:
        """A line for each, those that took most time first."""
        lines = [f"{'operator':<32}{'backend':<12}{'calls':>10}{'fallbacks':>11}{'seconds':>10}"]
        for c in sorted(self.all(), key=lambda c: -c.seconds):
            lines.append(f"{c.operator:<32}{c.backend:<12}{c.calls:>10}{c.fallbacks:>11}{c.seconds:>10.3f}")
        return "\n".join(lines)

    def counting(self, operator: str, backend: str, fallback: bool, launch: Callable[..., Any]) -> Callable[..., Any]:
        """The launcher with its calls counted."""
        with self._lock:
            count = self._found.setdefault((operator, backend), Count(operator, backend))
        lock, clock, label = self._lock, time.perf_counter, f"llmkern::{operator} ({backend})"

        def counted(*args: Any) -> Any:
            start = clock()
            try:
                if not self.ranges:
                    return launch(*args)
                with _range(label):
                    return launch(*args)
            finally:
                took = clock() - start
                with lock:
                    count.calls += 1
                    count.fallbacks += fallback
                    count.seconds += took

        return counted

    def exposition(self) -> str:
        """Prometheus' text format: llmkern_calls_total, llmkern_fallbacks_total and llmkern_seconds_total by operator
        and backend. Raises ImportError without prometheus-client."""
        from prometheus_client import generate_latest

        return generate_latest(self._registry()).decode()

    def serve(self, port: int, address: str = "127.0.0.1") -> Callable[[], None]:
        """Answers Prometheus at http://address:port/metrics from a thread; what is returned stops it.

        Raises TypeError and ValueError for what is no port, 0 to 65535 (0: one that is free), OSError where it is taken
        or there is no such address, ImportError without prometheus-client.
        """
        check.integer("port", port)
        if not 0 <= port < 65536:
            raise ValueError(f"port: expected 0 to 65535, got {port}")
        check.text("address", address)
        from prometheus_client import start_http_server

        server, thread = start_http_server(port, address, self._registry())

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return stop

    def _registry(self) -> Any:
        from prometheus_client import CollectorRegistry

        registry: Any = CollectorRegistry()  # takes whatever has collect()
        registry.register(_Collector(self))
        return registry


class _Collector:
    """What prometheus-client asks at every scrape."""

    def __init__(self, counts: Counts) -> None:
        self.counts = counts

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily

        found = self.counts.all()
        for name, about in (
            ("calls", "Calls of an operator that a backend served"),
            ("fallbacks", "Calls that the plain PyTorch version served because no kernel could"),
            ("seconds", "Seconds on the host within these calls"),
        ):
            family = CounterMetricFamily(f"llmkern_{name}", about, labels=("operator", "backend"))
            for count in found:
                family.add_metric((count.operator, count.backend), getattr(count, name))
            yield family


@contextlib.contextmanager
def _range(label: str) -> Iterator[None]:
    """One of torch's profiler, and of NVTX where there is a GPU."""
    with torch.profiler.record_function(label):
        if not torch.cuda.is_available():
            yield
            return
        with torch.cuda.nvtx.range(label):
            yield


#: The counts that plans made now are to keep; None: nothing is counted.
current: Counts | None = None


def start(*, ranges: bool = False) -> Counts:
    """Counts from here on, in the whole process, until `stop`; counts that ran before end.

    ranges: every call also as a range "llmkern::operator (backend)" of torch's profiler, and of NVTX on a GPU. Calls of
    compiled models count as they run; those within a CUDA graph once, when it is captured.
    """
    check.flag("ranges", ranges)
    found = Counts(ranges)
    _change(found)
    return found


def stop() -> None:
    """Counts no longer; what was counted stays in the Counts that `start` returned."""
    _change(None)


@contextlib.contextmanager
def watch(*, ranges: bool = False) -> Iterator[Counts]:
    """Counts within the block, as `start` does; what was counted before goes on behind it."""
    before = current
    try:
        yield start(ranges=ranges)
    finally:
        _change(before)


def _change(counts: Counts | None) -> None:
    from llmkern import backend

    global current
    current = counts
    backend.forget_plans()
