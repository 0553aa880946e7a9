"""Monitoring counts every call once, by operator and backend, and leaves nothing behind when it is off."""

from __future__ import annotations

import socket
import threading
import urllib.request
import warnings

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

import llmkern
from llmkern import backend, functional, monitoring
from llmkern.models import serve
from llmkern.norm.op import _NORM
from tests.evaluation import tiny


@pytest.fixture(autouse=True)
def off():
    yield
    monitoring.stop()


def counted(counts):
    return {(c.operator, c.backend): (c.calls, c.fallbacks) for c in counts.all()}


def norm(x):
    return functional.rms_norm(x, torch.ones(x.size(-1)))


def test_calls_by_operator_and_backend():
    x = torch.randn(3, 32)
    norm(x)  # with a plan made before
    with monitoring.watch() as counts:
        for _ in range(3):
            norm(x)
        norm(x.clone().requires_grad_()).sum().backward()
        torch.ops.llmkern.norm(x, None, torch.ones(32), None, 1e-5, 0.0, False)
    norm(x)
    assert counted(counts) == {("norm", "cpu"): (5, 0), ("norm_backward", "cpu"): (1, 0)}
    assert all(0 < c.seconds < 60 for c in counts.all())
    assert len(counts.table().splitlines()) == 3


def test_fallbacks_are_the_plain_version_that_nobody_asked_for():
    x = torch.randn(3, 32)
    with monitoring.watch() as counts, backend.use("reference"):
        norm(x)
    assert counted(counts) == {("norm", "reference"): (1, 0)}
    logits, targets = torch.randn(3, 8, dtype=torch.float64), torch.tensor([1, 2, 3])  # which no kernel takes
    with monitoring.watch() as counts, warnings.catch_warnings(record=True):
        functional.cross_entropy(logits, targets)
    assert counted(counts) == {("cross_entropy", "reference"): (1, 1)}


def test_off_a_plan_keeps_the_launcher_itself():
    x = torch.randn(3, 32)
    with monitoring.watch():
        norm(x)
        assert all(launch.__name__ == "counted" for launch in _NORM.short.values())
    assert not _NORM.short and not _NORM.plans
    norm(x)
    assert _NORM.short and all(launch.__name__ != "counted" for launch in _NORM.short.values())


def test_an_error_counts_and_comes_through():
    counts = monitoring.start()

    def fails():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        counts.counting("norm", "cpu", False, fails)()
    assert counted(counts) == {("norm", "cpu"): (1, 0)}


def test_threads_lose_no_count():
    counts = monitoring.Counts()
    call = counts.counting("norm", "cpu", True, lambda: None)
    threads = [threading.Thread(target=lambda: [call() for _ in range(2000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counted(counts) == {("norm", "cpu"): (8000, 8000)}


def test_a_block_within_another():
    x = torch.randn(3, 32)
    with monitoring.watch() as outer:
        norm(x)
        with monitoring.watch() as inner:
            norm(x)
        norm(x)
    assert counted(outer) == {("norm", "cpu"): (2, 0)} and counted(inner) == {("norm", "cpu"): (1, 0)}


@torch.no_grad()
def test_of_a_model_and_of_layers_in_one_call():
    model, ids = tiny.llama(), torch.randint(16, (1, 8))
    llmkern.kernelize(model)
    with monitoring.watch() as counts:
        model(ids)
    found = counted(counts)
    assert found["attention", "cpu"] == (2, 0) and found["norm", "cpu"][0] == 5
    llmkern.quantize_model(model, measure=False, progress=False)
    with monitoring.watch() as counts:
        model(ids)
    assert counted(counts)["decoder_layer", "cpu"] == (2, 0)


def test_ranges_of_the_profiler():
    x = torch.randn(3, 32)
    activities = [torch.profiler.ProfilerActivity.CPU]
    for ranges, wanted in ((True, 2), (False, 0)):
        with monitoring.watch(ranges=ranges), torch.profiler.profile(activities=activities) as profile:
            norm(x)
            norm(x)
        found = [e for e in profile.events() if e.name == "llmkern::norm (cpu)"]
        assert len(found) == wanted


def samples(text):
    families = text_string_to_metric_families(text)
    return {(s.name, s.labels["operator"], s.labels["backend"]): s.value for f in families for s in f.samples}


def test_prometheus_text():
    with monitoring.watch() as counts:
        norm(torch.randn(3, 32))
    found = samples(counts.exposition())
    assert found["llmkern_calls_total", "norm", "cpu"] == 1 and found["llmkern_fallbacks_total", "norm", "cpu"] == 0
    assert found["llmkern_seconds_total", "norm", "cpu"] == counts.all()[0].seconds


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_a_serving_process_answers_prometheus(capsys):
    port = free_port()
    rest = serve._with_metrics(["MODEL", "--metrics-port", str(port), "--port", "8000"])
    assert rest == ["MODEL", "--port", "8000"] and f"127.0.0.1:{port}/metrics" in capsys.readouterr().err
    norm(torch.randn(3, 32))
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        assert samples(answer.read().decode())["llmkern_calls_total", "norm", "cpu"] == 1
    with pytest.raises(SystemExit, match="--metrics-port: expected a free port"):
        serve._with_metrics(["MODEL", "--metrics-port", str(port)])


def test_a_server_stops():
    port = free_port()
    monitoring.start().serve(port)()
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5)


def test_without_the_option_nothing_is_counted():
    assert serve._with_metrics(["MODEL", "--port", "8000"]) == ["MODEL", "--port", "8000"]
    assert monitoring.current is None
    with pytest.raises(SystemExit, match="--metrics-port: expected 1 to 65535, got 0"):
        serve._with_metrics(["MODEL", "--metrics-port", "0"])
    with pytest.raises(TypeError, match="ranges: expected True or False, got 1"):
        monitoring.start(ranges=1)


@pytest.mark.parametrize(
    ("port", "error"), [("x", TypeError), (None, TypeError), (70000, ValueError), (-1, ValueError)]
)
def test_what_is_no_port_is_named(port, error):
    with monitoring.watch() as counts, pytest.raises(error, match="port: expected"):
        counts.serve(port)
