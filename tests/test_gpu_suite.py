"""The suite for owners of a GPU, without one: what is done about parts that fail, and every part on a CPU."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as suite
from benchmarks.gpu import (
    calls,
    conduct,
    contestants,
    contract,
    device_rates,
    graphs,
    results,
    sanitizer,
    speed,
    steps,
    tiles,
    timing,
)
from benchmarks.gpu.steps import Setting, Skipped, Step

CPU = Setting("cpu", True)
ROOT = Path(__file__).resolve().parents[1]


def ran(part, tmp_path, setting=CPU, done=(), until=None):
    rows = tmp_path / "part.rows"
    status = steps.run_steps(part, setting, rows, set(done), time.time() + 600 if until is None else until)
    return status, [r for r in steps.read(rows) if r["status"] != "started"]


def named(make):
    """A part of the functions of a dictionary."""
    return lambda setting: (Step(name, run) for name, run in make.items())


def raises(error):
    def run():
        raise error

    return run


def test_steps_fail_by_themselves(tmp_path):
    status, rows = ran(
        named({
            "good": lambda: {"figure": 3}, "bad": raises(ValueError("first line\nsecond")),
            "no place": raises(Skipped("no such tool")), "full": raises(torch.OutOfMemoryError("20 GiB")),
            "measured": lambda: {"status": "measured"},
        }),
        tmp_path,
    )  # fmt: skip
    assert status == 0
    assert [r["status"] for r in rows] == ["passed", "failed", "skipped", "failed", "measured"]
    assert rows[0]["figure"] == 3 and rows[1]["reason"] == "ValueError: first line"
    assert "in run" in rows[1]["traceback"] and rows[2]["reason"] == "no such tool"
    assert rows[3]["reason"] == "out of memory: 20 GiB"


def test_steps_that_are_done_or_late_do_not_run(tmp_path):
    part = named({"done": raises(AssertionError()), "late": raises(AssertionError())})
    assert ran(part, tmp_path, done=["done"], until=0)[1] == [{"step": "late", "status": "not reached"}]


def test_a_lost_context_ends_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "context_lost", lambda error: True)
    status, rows = ran(named({"breaks": raises(RuntimeError("x")), "later": lambda: {}}), tmp_path)
    assert status == steps.CONTEXT_LOST and [r["step"] for r in rows] == ["breaks"]


# Parts that behave badly, for a process of their own.
FAKES = """
import json, os, sys, time
from pathlib import Path
from benchmarks.gpu import steps
from benchmarks.gpu.steps import Setting, Step, read, run_steps
name, rows, until = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
def crash(): os.abort()
def hang(): time.sleep(600)
def raises(): raise RuntimeError("of a kernel")
def fine(): return {"figure": 1}
parts = {
    "good": {"a": fine, "b": fine},
    "crashes": {"a": fine, "b": crash, "c": fine, "d": crash, "e": fine},
    "hangs": {"a": fine, "b": hang, "c": fine},
    "loses": {"a": raises, "b": fine},
    "slow": {f"{i}": lambda: time.sleep(0.5) or {} for i in range(12)},
}
if name == "broken": raise ImportError("no such module")
if name == "loses": steps.context_lost = lambda error: True
made = lambda setting: (Step(k, v) for k, v in parts[name].items())
sys.exit(run_steps(made, Setting("cpu", True), rows, {r["step"] for r in read(rows)}, until))
"""


@pytest.fixture(scope="module")
def conducted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    told: list[str] = []

    def command(part, rows, until):
        return [sys.executable, "-c", FAKES, part, str(rows), str(until)]

    weights = {"good": 6.0, "crashes": 8.0, "broken": 6.0, "hangs": 8.0, "loses": 6.0, "slow": 1.0}
    before, os.environ["PYTHONPATH"] = os.environ.get("PYTHONPATH"), str(ROOT)
    begin = time.time()
    try:
        rows = conduct.conduct(weights, command, folder, conduct.Limits(120.0, 12.0), told.append)
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    return rows, told, time.time() - begin


def statuses(rows):
    return [(r["step"], r["status"]) for r in rows]


def test_parts_survive_each_other(conducted):
    rows, told, took = conducted
    assert list(rows) == ["good", "crashes", "broken", "hangs", "loses", "slow"] and took < 150
    assert statuses(rows["good"]) == [("a", "passed"), ("b", "passed")]
    assert statuses(rows["loses"]) == [("a", "failed"), ("b", "passed")]
    assert rows["loses"][0]["reason"] == "RuntimeError: of a kernel"
    assert any(line.startswith("[1/6] good: at most") for line in told)


def test_a_crash_is_told_and_the_part_goes_on_behind_it(conducted):
    found = conducted[0]["crashes"]
    assert statuses(found) == [(n, "failed" if n in "bd" else "passed") for n in "abcde"]
    assert found[1]["reason"] == "it crashed with SIGABRT"


def test_a_part_that_does_not_begin_is_told_with_its_traceback(conducted):
    (row,) = conducted[0]["broken"]
    assert row["status"] == "failed" and row["reason"] == "it exited with status 1"
    assert "ImportError: no such module" in row["stderr"]


def test_what_hangs_is_ended(conducted):
    found = conducted[0]["hangs"]
    assert statuses(found) == [("a", "passed"), ("b", "failed"), ("c", "passed")]
    assert found[1]["reason"] == "ended: it hung for more than 12 s"


def test_time_left_over_goes_to_the_parts_behind(conducted):
    """Its own share, a 35th, would not do for its 12 steps of half a second."""
    found = conducted[0]["slow"]
    done = sum(r["status"] == "passed" for r in found)
    assert done == 12, statuses(found)


def test_the_table_and_the_plot(conducted, tmp_path):
    rows = {**conducted[0], "speed": [speed_row()]}
    text = results.table(rows)
    assert "crashes: b: FAILED, it crashed with SIGABRT" in text and "| llmkern cuda " in text
    assert "ImportError: no such module" in text and "| flash_attn " in text
    assert results.plot(rows, "a device", tmp_path / "gpu.png") in (None, "no plot: matplotlib is not installed")
    content = results.content(rows, {}, 1.0)
    assert content["counts"]["crashes"] == {"passed": 3, "failed": 2}


def speed_row():
    def clock(function, device):
        return function()

    found = timing.measure({"peer": lambda: 4e-3, "llmkern cuda": lambda: 2e-3}, "cpu", "peer", 3, 1e-3, clock)
    found.failed["flash_attn"] = "not installed"
    return {"step": "attention", "status": "measured", "line": contestants.line(found), **found.to_json()}


def test_speed_ups_and_shares():
    row = speed_row()
    assert row["line"] == "peer 4 ms; llmkern cuda 2 ms (2.00 times peer, 50% of the peak)"
    assert row["contestants"]["llmkern cuda"]["samples"] == [2e-3] * 3


def test_contestants_that_raise_are_left_out():
    found = timing.measure({"a": lambda: None, "b": raises(RuntimeError("no"))}, "cpu", "a", 2)
    assert found.names == ["a"] and found.failed == {"b": "RuntimeError: no"}


def first_of_each(part, count):
    """One step of each kind of a part: the first words of its name."""

    def few(setting):
        seen: dict[str, int] = {}
        for step in part(setting):
            kind = step.name.split(" 1,")[0].split(" 2,")[0].split(" 3,")[0].split(" 17,")[0]
            seen[kind] = seen.get(kind, 0) + 1
            if seen[kind] <= count:
                yield step

    return few


@pytest.mark.parametrize(
    ("part", "count", "expected"),
    [
        (device_rates.part, 1, {"passed", "measured"}),
        (contract.part, 1, {"passed", "skipped"}),  # attention_int8 has no kernel there
        (graphs.part, 1, {"passed", "skipped"}),
    ],
)
def test_parts_on_a_cpu(part, count, expected, tmp_path):
    status, rows = ran(first_of_each(part, count), tmp_path)
    assert status == 0 and {r["status"] for r in rows} <= expected and rows, rows


def test_speed_on_a_cpu(tmp_path, monkeypatch):
    """Without what torch.compile would take long over."""
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)
    status, rows = ran(speed.part, tmp_path)
    assert status == 0 and {r["status"] for r in rows} == {"measured"}, rows
    assert all(any(n.startswith("llmkern cpu") for n in r["contestants"]) for r in rows)


def test_a_wrong_kernel_is_neither_kept_nor_timed(monkeypatch):
    call = calls.rotary(CPU, (1, 2, 17, 64), torch.float32, False)
    wrong = calls.Call(lambda q, k: call.function(q * 1.001, k), call.plain, call.args)
    case = calls.Case("rotary", "wrong", lambda: wrong)
    with pytest.raises(AssertionError, match="max error"):
        contract.held(case, "cpu")
    assert "wrong, so not timed" in (contestants.held(wrong, "cpu") or "")
    assert contestants.held(call, "cpu") is None


def test_what_a_backend_cannot_serve_is_skipped(tmp_path):
    case = next(calls.cases(CPU, small=True))
    (row,) = ran(named({"x": lambda: contract.held(case, "cuda")}), tmp_path)[1]
    assert row["status"] == "skipped" and "the backend cuda was asked for by name" in row["reason"]


def test_a_graph_with_other_bits_is_told():
    with pytest.raises(AssertionError, match="result 0 of the graph is not the one without: largest difference 1"):
        graphs._equal([torch.ones(2)], [torch.zeros(2)], "of the graph")


def test_the_sanitizer(monkeypatch, tmp_path):
    assert "nothing found" in sanitizer.watched(CPU, "memcheck", "rotary", "cpu")["line"]
    with pytest.raises(Skipped, match="serves no small call"):
        sanitizer.watched(CPU, "memcheck", "rotary", "cuda")
    gpu = Setting("cuda", True)
    monkeypatch.setattr(sanitizer, "compute_sanitizer", lambda: None)
    with pytest.raises(Skipped, match="compute-sanitizer was not found"):
        sanitizer.watched(gpu, "memcheck", "rotary", "cuda")
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\necho Invalid __global__ read\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setattr(sanitizer, "compute_sanitizer", lambda: str(tool))
    with pytest.raises(AssertionError, match="memcheck exited with status 9"):
        sanitizer.watched(gpu, "memcheck", "rotary", "cuda")


def test_the_command(tmp_path, capsys):
    """One part by the whole way: process, rows, JSON, table."""
    assert suite.main(["--device", "cpu", "--only", "device", "--out", str(tmp_path), "--minutes", "1"]) == 0
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert list(content) == ["suite", "options", "machine", "rates", "seconds", "counts", "parts"]
    assert content["machine"]["torch"] == torch.__version__ and content["rates"]["copy"] > 0
    assert content["counts"] == {"device": {"passed": 2, "measured": 1}}
    assert "written: " in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    assert suite.main([]) == 2 and "sees no GPU" in capsys.readouterr().err
    assert tiles.main(["x.json"]) == 2 and "sees no GPU" in capsys.readouterr().err
