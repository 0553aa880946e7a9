"""What recommend estimates, against what was measured, against sums by hand, and what it makes of it."""

from __future__ import annotations

import json
from itertools import combinations, groupby, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import llmkern
from llmkern.evaluation import machines
from llmkern.evaluation.machines import PUBLISHED, Machine, Rates
from llmkern.evaluation.recommend import CALLS, PASS_CALLS, PYTHON, Shape, estimate


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The passes in a file of benchmarks/recommend.py, each with what is told of its run."""
    runs = json.loads(path.read_text())["runs"]
    return [{**run, **row} for run in runs for row in run["passes"]]


#: Rates of a machine and what whole models then took on it.
MEASURED = rows_of(Path(__file__).parent / "measured.json")


def recorded(row: dict[str, Any]) -> float:
    """The seconds that are estimated now from a row's rates."""
    rates = {scheme: Rates(**values) for scheme, values in row["machine"]["rates"].items()}
    machine, shape = Machine(**{**row["machine"], "rates": rates}), Shape(**row["shape"])
    found = estimate(row["scheme"], shape, machine, row["batch"], row["prompt"], row["new"])
    part = found.prompt if row["pass"] == "prompt" else found.token
    assert part is not None
    return part.seconds


def row_name(row: dict[str, Any]) -> str:
    return f"{row['model']}-{row['prompt']}-{row['pass']}-{row['scheme']}"


@pytest.mark.parametrize("row", MEASURED, ids=row_name)
def test_estimates_are_within_the_stated_error_of_what_was_measured(row):
    ratio = recorded(row) / row["measured"]
    assert 1 / machines.ERROR <= ratio <= machines.ERROR


def test_what_was_measured_covers_every_task_scheme_and_pass():
    assert {(r["shape"]["task"], r["scheme"], r["pass"]) for r in MEASURED} == {
        (task, scheme, part)
        for task in ("encoder", "decoder", "encoder-decoder")
        for scheme in machines.SCHEMES
        for part in ("prompt", "token")
        if (task, part) != ("encoder", "token")
    }


def test_the_order_of_schemes_is_the_measured_one():
    """Where the measured times are apart by more than a quarter."""
    compared = 0
    for _, rows in groupby(MEASURED, key=lambda r: (r["model"], r["prompt"])):
        for one, other in combinations(list(rows), 2):
            apart = one["measured"] / other["measured"]
            if one["pass"] == other["pass"] and not 0.8 < apart < 1.25:
                assert (recorded(one) > recorded(other)) == (apart > 1), f"{row_name(one)}, {row_name(other)}"
                compared += 1
    assert compared > 30


def test_the_sum_by_hand():
    """A decoder of one layer on a machine of round numbers."""
    machine = Machine("round", "cpu", {"float32": Rates(1e9, 1e8, 1e-6, 1e-7, 1e-3)}, 1e6, 1e-4, 1e9)
    shape = Shape("decoder", 1, 10, 40, 2, 1, 100)
    found = estimate("float32", shape, machine, 2, 8, 4)
    weights = 10 * 10 + 2 * 10 * 5 + 10 * 10 + 2 * 10 * 40  # q; k and v, of one head; o; up and down
    outputs, inputs, calls = 10 + 5 + 5 + 10 + 40 + 10, 5 * 10 + 40, 6
    elements = 4 * 10 + 40

    def expected(tokens: int, seen: float) -> float:
        attention = 4 * tokens * seen * 10
        return (
            (2 * tokens * weights + 2 * 2 * 1000 + attention) / 1e9  # the output's matrix for the last token of each
            + 4 * (weights + 1000) / 1e8
            + (outputs + 100) * 1e-6
            + (tokens * inputs + 2 * 10) * 1e-7
            + tokens * elements / 1e6
            + (calls + 1) * 1e-3
            + (CALLS["decoder", "float"] + PASS_CALLS) * PYTHON * 1e-4
        )

    assert found.prompt.seconds == pytest.approx(expected(16, 4))
    assert found.token is not None
    cache = 2 * 2 * (8 + 2) * 5 * 4
    assert found.token.seconds == pytest.approx(expected(2, 10 + 0.5) + cache / 1e8)
    assert found.latency == pytest.approx(found.prompt.seconds + 3 * found.token.seconds)
    assert found.memory == (weights + 1000) * 4 + 2 * 2 * 12 * 5 * 4


def test_a_gpu_reads_and_multiplies_at_once_and_the_host_runs_ahead():
    fast = Machine("gpu", "cuda", {"bfloat16": Rates(1e15, 1e9)}, 1e12, 1e-9, 1e12, (9, 0))
    slow = Machine("gpu", "cuda", {"bfloat16": Rates(1e15, 1e9)}, 1e12, 1.0, 1e12, (9, 0))
    shape = Shape.from_parameters(110_000_000, "encoder")
    found = estimate("bfloat16", shape, fast, 1, 1, 0).prompt
    assert found.bound == "weights" and found.of["calls"] == 0
    assert found.seconds == pytest.approx(2 * shape.layers * shape.layer().weights / 1e9, rel=1e-3)
    assert estimate("bfloat16", shape, slow, 1, 1, 0).prompt.bound == "calls"


def configurations() -> list[tuple[Any, Any, str]]:
    import transformers as t

    vocab = {"vocab_size": 99}
    one = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, **vocab}
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 96))
    }
    grouped = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    return [
        (t.BertModel, t.BertConfig(num_attention_heads=2, **one), "encoder"),
        (t.Qwen3ForCausalLM, t.Qwen3Config(head_dim=24, **grouped, **one), "decoder"),
        (
            t.GemmaForCausalLM,
            t.GemmaConfig(num_attention_heads=2, num_key_value_heads=1, head_dim=16, **one),
            "decoder",
        ),
        (t.LlamaForCausalLM, t.LlamaConfig(**grouped, **one), "decoder"),
        (t.GPT2LMHeadModel, t.GPT2Config(n_embd=64, n_layer=2, n_head=2, **vocab), "decoder"),
        (
            t.T5ForConditionalGeneration,
            t.T5Config(d_model=64, num_layers=2, num_heads=2, d_kv=32, d_ff=96, **vocab),
            "encoder-decoder",
        ),
        (t.BartForConditionalGeneration, t.BartConfig(d_model=64, **sides, **vocab), "encoder-decoder"),
    ]


@pytest.mark.parametrize("number", range(7))
def test_a_shape_counts_the_matrices_of_a_real_model(number):
    kind, config, task = configurations()[number]
    model, places = kind(config), ("position", "wpe", "token_type", "pooler", "relative_attention")
    held = [p.numel() for n, p in model.named_parameters() if p.dim() == 2 and not any(word in n for word in places)]
    assert Shape.of(config, task).parameters == sum(held)


def test_sizes_that_do_not_make_their_model_are_refused():
    import transformers as t

    small = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96, vocab_size=99)
    wrong = [
        (t.MixtralConfig(num_local_experts=4, num_key_value_heads=2, **small), "decoder"),
        (t.AlbertConfig(embedding_size=16, **small), "encoder"),
        (t.BartConfig(encoder_layers=4, decoder_layers=1), "encoder-decoder"),
    ]
    for config, task in wrong:
        with pytest.raises(
            ValueError, match=r"config: expected one whose sizes make its matrices, got .*: give a Shape"
        ):
            Shape.of(config, task)
    with pytest.raises(ValueError, match="config: expected that of an encoder-decoder in transformers, got BertConfig"):
        Shape.of(t.BertConfig(), "encoder-decoder")


def test_int8_is_not_proposed_for_what_it_does_not_replace():
    import transformers as t

    shape = Shape.of(t.GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=99), "decoder")
    found = llmkern.recommend(None, "decoder", 1e-9, machine(), shape=shape)
    assert not shape.linear and [e.scheme for e in found.estimates] == ["float32", "bfloat16"]
    assert found.reasons[-1].startswith("Int8 is left out")


@pytest.mark.parametrize("task", ["encoder", "decoder", "encoder-decoder"])
def test_more_parameters_never_take_less_time(task):
    times = [
        llmkern.recommend(int(2e7 * 1.1**n), task, 1.0, machine(), prompt_tokens=128, new_tokens=8).estimates[0].latency
        for n in range(90)
    ]
    assert all(later > 0.99 * sooner for sooner, later in pairwise(times))


@pytest.mark.parametrize("task", ["encoder", "decoder", "encoder-decoder"])
@pytest.mark.parametrize("parameters", [22e6, 110e6, 1e9, 7e9, 70e9])
def test_a_usual_shape_has_about_the_parameters(parameters, task):
    assert Shape.from_parameters(int(parameters), task).parameters == pytest.approx(parameters, rel=1e-3)


def machine(error: float | None = 1.5, memory: float = 1e12) -> Machine:
    rates = {s: Rates(f * 1e9, f * 1e9) for s, f in (("float32", 1), ("bfloat16", 2), ("int8", 4))}
    return Machine("three", "cpu", rates, 1e15, 1e-12, memory, None, error)


def test_the_most_accurate_scheme_that_meets_the_bound():
    plain = llmkern.recommend(110_000_000, "encoder", 1e9, machine())
    assert (plain.scheme, plain.meets, plain.backend) == ("float32", "yes", "torch")
    times = [e.latency for e in plain.estimates]
    assert times == sorted(times, reverse=True)

    def chosen(bound: float, **options: Any) -> tuple[str, str]:
        found = llmkern.recommend(110_000_000, "encoder", bound, machine(**options))
        assert found.low <= found.latency <= found.high and found.chosen.latency == found.latency
        return found.scheme, found.meets

    assert chosen(times[0] * 1.51) == ("float32", "yes")
    assert chosen(times[0] * 1.49) == ("float32", "perhaps")
    assert chosen(times[0] * 0.99) == ("bfloat16", "yes")
    assert chosen(times[2] * 1.49) == ("int8", "perhaps")
    assert chosen(times[2] * 0.99) == ("int8", "no")
    looser = [chosen(times[2] * 1.1**n)[0] for n in range(40)]
    assert looser == sorted(looser, key=["int8", "bfloat16", "float32"].index)  # never a less accurate one
    found = llmkern.recommend(110_000_000, "encoder", times[0] * 1.2, machine())
    assert found.reasons[-1].startswith("bfloat16, at about") and "would meet it even then" in found.reasons[-1]
    assert chosen(times[1] * 1.01, error=None) == ("bfloat16", "perhaps")
    held = [e.memory for e in plain.estimates]
    assert chosen(1e9, memory=held[0] - 1) == ("bfloat16", "yes")
    with pytest.raises(ValueError, match="machine: expected memory of at least"):
        chosen(1e9, memory=held[2] - 1)


def test_it_says_how_it_came_to_it():
    found = llmkern.recommend(None, "decoder", 1e-9, machine(), shape=Shape("decoder", 2, 64, 96, 2, 1, 99, True))
    text = str(found)
    assert "Nothing that fits meets the bound" in text and "int8" in text and found.table() in text
    assert "decoder, 0 M parameters in 2 layers of width 64" in text
    assert json.loads(json.dumps(found.to_dict()))["meets"] == "no"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_machines_are_said_not_to_be_measured(name):
    found = llmkern.recommend(7_000_000_000, "decoder", 60.0, name)
    assert found.meets == "perhaps" and "has not been measured" in found.reasons[-1]
    assert found.low == found.latency == found.high
    assert all(set(e.backends.values()) <= {"cuda", "triton"} for e in found.estimates)


def test_this_machine_is_measured_once():
    here = Machine.here("cpu")
    assert Machine.here("cpu") is here and set(here.rates) == set(machines.SCHEMES)
    assert here.memory > 1e8 and here.error == machines.ERROR
    found = llmkern.recommend(22_000_000, "encoder", 10.0, here)
    assert found.backend in ("torch", "cpu") and found.machine is here


def test_measuring_leaves_random_numbers_and_modes_alone():
    machines._measured.cache_clear()
    state = torch.get_rng_state()
    with torch.inference_mode():
        Machine.here("cpu")
    assert torch.equal(torch.get_rng_state(), state)


OF_ENCODER, OF_DECODER = (Shape(task, 1, 64, 64, 1, 1, 9) for task in ("encoder", "decoder"))
BAD = [
    (dict(parameters=0), ValueError, "parameters: expected a positive integer, got 0"),
    (dict(parameters=1000), ValueError, "parameters: expected at least 4 M for a usual shape"),
    (dict(parameters=1e9), TypeError, "parameters: expected a positive integer"),
    (dict(task="vision"), ValueError, "task: expected one of encoder, decoder, encoder-decoder, got 'vision'"),
    (dict(latency=0), ValueError, "latency: expected seconds above 0, got 0"),
    (dict(latency="fast"), TypeError, "latency: expected a number"),
    (dict(machine="abacus"), ValueError, "name: expected one of A100-80GB"),
    (dict(machine=3), TypeError, "machine: expected None, a name or a Machine, got int"),
    (dict(batch_size=0), ValueError, "batch_size: expected a positive integer"),
    (dict(parameters=None), ValueError, "parameters: expected a number or a shape, got neither"),
    (dict(shape=OF_ENCODER), ValueError, "parameters: expected a number or a shape, got both"),
    (dict(parameters=None, shape=3), TypeError, "shape: expected a Shape, got int"),
    (dict(parameters=None, shape=OF_DECODER), ValueError, "shape: expected that of an encoder"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "words"), BAD, ids=[str(n) for n in range(len(BAD))])
def test_bad_arguments_are_named(change, error, words):
    given = dict(parameters=110_000_000, task="encoder", latency=1.0, machine=machine()) | change
    with pytest.raises(error, match=words):
        llmkern.recommend(
            given.pop("parameters"), given.pop("task"), given.pop("latency"), given.pop("machine"), **given
        )


def test_nonsense_in_a_machine_is_named():
    with pytest.raises(ValueError, match=r"rates\['int8'\].flops: expected a number above 0, got 0"):
        Machine("m", "cpu", {"int8": Rates(0, 1)}, 1, 1, 1)
    with pytest.raises(ValueError, match="rates: expected those of at least one scheme"):
        Machine("m", "cpu", {}, 1, 1, 1)
    with pytest.raises(ValueError, match=r"rates\['int8'\].output: expected a number of at least 0, got -1"):
        Machine("m", "cpu", {"int8": Rates(1, 1, -1)}, 1, 1, 1)
    with pytest.raises(ValueError, match=r"error: expected None or a factor of at least 1, got 0\.5"):
        Machine("m", "cpu", {"int8": Rates(1, 1)}, 1, 1, 1, None, 0.5)
    with pytest.raises(ValueError, match="memory: expected a number above 0"):
        Machine("m", "cpu", {"int8": Rates(1, 1)}, 1, 1, -1)
    with pytest.raises(ValueError, match="config: expected one with hidden_size or d_model or n_embd, got int"):
        Shape.of(3, "encoder")


def test_the_benchmark(tmp_path, capsys):
    from benchmarks import recommend

    assert recommend.main(["--quick", "--output", str(tmp_path)]) == 0
    rows = rows_of(next(tmp_path.glob("recommend-*.json")))
    assert len(rows) == 2 * len(machines.SCHEMES)
    for row in rows:
        assert recorded(row) == pytest.approx(row["estimated"])
    assert "Estimated over measured: median" in capsys.readouterr().out
