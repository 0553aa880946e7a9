"""The harness counts right, the peaks are plausible, and every family's script runs and writes what it says."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch

from benchmarks import attention_contestants, attention_peers, family, harness, isa, machine, roofline, run
from benchmarks.attention_contestants import Problem
from benchmarks.family import Case
from benchmarks.harness import Result, Spread, markdown, measure, seconds
from llmkern import extension
from llmkern.verify import verify


class Clock:
    """time.perf_counter for functions that say how long they take."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(harness.time, "perf_counter", lambda: self.now)

    def lasting(self, *durations):
        """A function that lasts these, one after another, again and again."""
        calls = []

        def function():
            self.now += durations[len(calls) % len(durations)]
            calls.append(None)

        return function


def test_spread_interpolates():
    assert Spread.of([3.0, 1.0, 2.0]) == (2.0, 1.4, 2.6)
    assert Spread.of([5.0]) == (5.0, 5.0, 5.0)
    with pytest.raises(ValueError, match="values: expected at least one"):
        Spread.of([])


def test_the_ratio_is_formed_within_a_round(monkeypatch):
    """A machine that slows down fourfold between rounds leaves the ratios as they are."""
    clock = Clock(monkeypatch)
    slow, fast = (clock.lasting(*(factor * d for d in (1, 1, 1, 1, 1, 4, 2, 8))) for factor in (0.3, 0.1))
    result = measure({"slow": slow, "fast": fast}, rounds=4, warmup=2, sample_seconds=0)
    assert result.samples["fast"] == pytest.approx([0.1, 0.4, 0.2, 0.8])
    assert result.ratio("fast") == pytest.approx((3.0, 3.0, 3.0))
    assert result.ratio("slow", over="fast").median == pytest.approx(1 / 3)
    assert result.time("slow").median == pytest.approx(0.9)


def test_short_calls_are_repeated(monkeypatch):
    result = measure({"short": Clock(monkeypatch).lasting(0.003)}, rounds=2, sample_seconds=0.01)
    assert result.calls == {"short": 4} and result.samples["short"] == pytest.approx([0.003, 0.003])


def test_contestants_alternate(monkeypatch):
    clock, order = Clock(monkeypatch), []

    def named(name):
        tick = clock.lasting(1.0)
        return lambda: (order.append(name), tick())

    measure({n: named(n) for n in "abc"}, rounds=6, warmup=0, sample_seconds=0)
    timed = order[6:]
    rounds = [tuple(timed[i : i + 3]) for i in range(0, len(timed), 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds) and len(set(rounds)) > 1


def test_one_that_fails_is_reported_and_left_out():
    def broken():
        raise RuntimeError("no such kernel\nand more")

    result = measure({"works": lambda: None, "broken": broken}, rounds=1)
    assert result.names == ["works"] and result.failed == {"broken": "RuntimeError: no such kernel"}
    assert "not run: RuntimeError: no such kernel" in result.table()


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"baseline: expected one of the contestants \['a'\], got 'b'"):
        measure({"a": lambda: None}, baseline="b")
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        measure({"a": lambda: None}, rounds=0)


def test_the_share_of_the_floor():
    result = Result("a", {"a": [2.0, 4.0]}, {"a": 1}, floor=[1.0, 1.0])
    assert result.share("a").median == pytest.approx(0.375)
    assert result.to_json()["contestants"]["a"]["share_of_peak"]["median"] == pytest.approx(0.375)


@pytest.mark.parametrize(
    ("value", "text"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (9.996e-4, "1000 us"), (4e-7, "400 ns")]
)
def test_times_are_written_with_a_unit(value, text):
    assert seconds(value) == text


def test_tables_are_markdown():
    assert markdown([["a", "bb"], ["ccc", "d"]]).splitlines() == ["| a   | bb |", "|-----|----|", "| ccc | d  |"]


@pytest.mark.skipif(extension._C is None, reason="the peaks are measured by the compiled library")
def test_peaks():
    peaks = roofline.peaks(1, 0.001)
    assert min(peaks.to_json().values()) > 0
    assert peaks.bfloat16 >= peaks.float32
    assert roofline.floor(2e6, torch.float32)() > 0


def test_the_machine_is_named():
    described = machine.describe()
    assert {"processor", "threads", "instruction_set", "torch", "commit", "date"} <= set(described)
    assert described["processor"] in machine.line(described)


def fake_cases(error):
    def reference(x):
        return x * 2

    def ours(x):
        return x * 2 + error

    def cases(options):
        x = torch.randn(64)
        yield Case(
            "double",
            {"torch": lambda: reference(x), "llmkern": lambda: ours(x)},
            "torch",
            lambda: verify(ours, reference, x),
            bytes=512.0,
        )

    return cases


@pytest.mark.skipif(extension._C is None, reason="the peaks are measured by the compiled library")
def test_a_family_writes_its_results(tmp_path, capsys):
    arguments = ["--quick", "--rounds", "2", "--sample-seconds", "0", "--output", str(tmp_path)]
    assert family.main("fake", "Doubling.", fake_cases(0.0), "N", arguments) == 0
    (path,) = tmp_path.glob("fake-*.json")
    content = json.loads(path.read_text())
    assert content["machine"]["torch"] == torch.__version__ and content["wrong"] == {}
    case = content["cases"]["double"]
    assert case["best_peer"] == "torch" and len(case["contestants"]["llmkern"]["samples"]) == 2
    printed = capsys.readouterr().out
    assert "| double" in printed and "(torch)" in printed
    assert path.with_suffix(".png").stat().st_size > 1000


@pytest.mark.skipif(extension._C is None, reason="the peaks are measured by the compiled library")
def test_a_wrong_result_gets_no_figure(tmp_path, capsys):
    arguments = ["--quick", "--rounds", "1", "--output", str(tmp_path)]
    assert family.main("fake", "Doubling.", fake_cases(1.0), "N", arguments) == 1
    assert "WRONG, so not timed" in capsys.readouterr().out
    (path,) = tmp_path.glob("fake-*.json")
    assert json.loads(path.read_text())["cases"] == {}


def test_a_wrong_shape_is_refused(capsys):
    with pytest.raises(SystemExit):
        family.main("fake", "Doubling.", fake_cases(0.0), "M,K,N", ["--shapes", "1,2"])
    assert "expected M,K,N, got '1,2'" in capsys.readouterr().err


SHAPE = {
    "attention": "1,2,33,16",
    "decode": "2,4,2,67,16",
    "int8": "3,40,24",
    "overhead": "1,1,1,1",
    "positional": "1,2,9,16",
}


@pytest.mark.skipif(extension._C is None, reason="the peaks are measured by the compiled library")
@pytest.mark.parametrize("name", run.FAMILIES)
def test_every_family_runs(name, tmp_path, capsys):
    script = importlib.import_module(f"benchmarks.{name}")
    quick = ["--quick", "--rounds", "1", "--sample-seconds", "0"]
    assert script.main([*quick, "--shapes", SHAPE[name], "--output", str(tmp_path)]) == 0, capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    assert content["cases"]
    for title, case in content["cases"].items():
        failed = {k: v for k, v in case["failed"].items() if k.startswith("llmkern") or "sdpa" in k or "eager" in k}
        assert not failed and any(n.startswith("llmkern") for n in case["contestants"]), title


def test_run_passes_the_arguments_on(monkeypatch):
    called = []

    class Done:
        returncode = 0

    monkeypatch.setattr(run.subprocess, "run", lambda command: called.append(command) or Done)
    assert run.main(["--quick"]) == 0
    assert [c[2] for c in called] == [f"benchmarks.{name}" for name in run.FAMILIES]
    assert all(c[-1] == "--quick" for c in called)


def test_the_roofline_waits_for_work_not_for_threads():
    """Where each run waits 4 ms for a thread, the repeats are those whose work lasts as long as was asked."""

    def once(repeats):
        return repeats * 1000.0, 0.004 + repeats * 1e-6

    assert 1000 <= roofline._long_enough(once, 0.002) <= 4000


@pytest.mark.skipif(extension._C is None, reason="the peaks are measured by the compiled library")
def test_an_instruction_set_is_forced_on_both_in_a_process_of_its_own(monkeypatch, tmp_path):
    called = []

    class Done:
        returncode = 7

    worst = isa.choices()[-1]
    for name in isa.settings(worst):
        monkeypatch.delenv(name, raising=False)
    arguments = ["--quick", "--rounds", "1", "--isa", worst, "--output", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(isa.subprocess, "run", lambda command, env: called.append((command, env)) or Done)
        assert family.main("fake", "Doubling.", fake_cases(0.0), "N", arguments) == 7
    ((command, env),) = called
    assert command[1:] == ["-m", "benchmarks.fake", *arguments]
    assert env["LLMKERN_ISA"] == worst and env["ATEN_CPU_CAPABILITY"] == isa.TORCH[worst]["ATEN_CPU_CAPABILITY"]
    for name, value in isa.settings(worst).items():  # the process that was started goes on itself
        monkeypatch.setenv(name, value)
    assert family.main("fake", "Doubling.", fake_cases(0.0), "N", arguments) == 0
    (path,) = tmp_path.glob(f"fake-*-{worst}.json")
    assert json.loads(path.read_text())["isa_forced"] == worst


def test_an_instruction_set_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"isa: expected one of .*, got 'mmx'"):
        isa.settings("mmx")


@pytest.mark.skipif(extension._C is None, reason="the peaks are measured by the compiled library")
def test_contestants_in_processes_of_their_own(monkeypatch, tmp_path, capsys):
    """Two that run, one that is not installed: all three are reported."""
    version = attention_contestants.version
    monkeypatch.setattr(attention_contestants, "version", lambda p: None if p == "openvino" else version(p))
    for name in ("zentorch", "ONNX Runtime"):
        monkeypatch.delitem(attention_contestants.CONTESTANTS, name)
    small = ["--rounds", "1", "--samples", "1", "--sample-seconds", "0", "--shapes", "1,2,33,16"]
    assert attention_peers.main([*small, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert '- OpenVINO: not installed: openvino; pip install -e ".[bench]" (all)' in printed
    (path,) = tmp_path.glob("attention_peers-*.json")
    cases = json.loads(path.read_text())["cases"]
    assert list(cases) == [f"1,2,33,16 {case}" for case in ("fp32", "fp32 causal", "bf16", "bf16 causal")]
    for name, case in cases.items():
        assert case["llmkern"]["share_of_peak"]["median"] > 0 and case["torch sdpa"]["llmkern_over_it"], name
        assert case["OpenVINO"]["share_of_peak"] is None
    assert path.with_suffix(".md").read_text().count("1,2,33,16 bf16 causal") == 2
    assert path.with_suffix(".png").stat().st_size > 1000


DYING = """
import json, os, sys
job = json.load(sys.stdin)
with open(job["report"], "a") as file:
    for entry in job["problems"]:
        s = entry["shape"][2]
        file.write(json.dumps({"event": "start", "problem": f"1,1,{s},8 fp32"}) + "\\n")
        if s == 2:
            file.flush()
            os.abort()
        file.write(json.dumps({"event": "figure", "problem": f"1,1,{s},8 fp32", "share": 0.5, "seconds": 1.0}) + "\\n")
"""


def test_a_process_that_dies_costs_one_problem(monkeypatch):
    monkeypatch.setattr(attention_peers, "CHILD", [sys.executable, "-c", DYING])
    wanted = [Problem((1, 1, s, 8), "fp32") for s in (1, 2, 3)]
    result = attention_peers.Comparison(wanted, ["llmkern"], 1)
    attention_peers.one_round(result, "llmkern", 0, 1, 0.0)
    names = [p.name for p in wanted]
    assert result.failed[names[1]] == {"llmkern": "its process died of SIGABRT"}
    assert [result.values(n, "llmkern") is None for n in names] == [False, True, False]
    assert "- llmkern: its process died of SIGABRT (1,1,2,8 fp32)" in result.tables()


def test_the_ratio_of_shares_is_formed_within_a_round():
    result = attention_peers.Comparison([Problem((1, 1, 1, 8), "fp32")], ["llmkern", "peer"], 3)
    for name, shares in (("llmkern", (0.8, 0.4, None)), ("peer", (0.4, 0.2, 0.5))):
        result.figures["1,1,1,8 fp32"][name] = [s and {"share": s} for s in shares]
    assert result.ratio("1,1,1,8 fp32", "peer") == pytest.approx((2.0, 2.0, 2.0))


@pytest.mark.parametrize("causal", [False, True])
def test_a_wrong_result_of_a_contestant_is_not_timed(causal):
    p = Problem((1, 2, 33, 16), "fp32", causal)
    right = attention_contestants.sdpa(p, 1)
    assert attention_contestants.error(p, right["torch sdpa"].call()) < 1e-6
    other = attention_contestants.sdpa(Problem(p.shape, "fp32", not causal), 1)
    with pytest.raises(ArithmeticError, match="wrong, so not timed"):
        attention_contestants.figure(other, p, 1, 0.0)
    with pytest.raises(ValueError, match=r"result: expected the shape \[1, 2, 33, 16\], got \[1, 2, 33, 8\]"):
        attention_contestants.error(p, torch.zeros(1, 2, 33, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "1,2"], "--shapes: expected B,H,S,D, got '1,2'"),
        (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
        (["--match", "nothing"], "--match: expected a part of some problem's name, got 'nothing'"),
    ],
)
def test_bad_arguments_of_the_peers(arguments, message, capsys):
    with pytest.raises(SystemExit):
        attention_peers.main(arguments)
    assert message in capsys.readouterr().err
