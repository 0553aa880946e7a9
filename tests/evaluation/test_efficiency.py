"""Sizes and FLOPs are those of a count by hand, before and after; every figure is there. No time is asserted."""

from __future__ import annotations

import pytest
import torch

import llmkern
from llmkern.evaluation import compare_efficiency, measure_efficiency, memory, timing
from tests.evaluation import tiny

BATCH, PROMPT, HEADS, HEAD, LAYERS = 2, 16, 4, 8, 2
# Of tiny.llama: queries, keys and values, output, the gated layer; then the head.
LINEAR = LAYERS * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48) + 32 * 16


def attention(queries: int, keys: int) -> int:
    """Two products for each head of each layer."""
    return LAYERS * 2 * 2 * BATCH * HEADS * queries * keys * HEAD


def run(models, **options):
    return measure_efficiency(
        models, batch_size=BATCH, prompt_tokens=PROMPT, **{"rounds": 2, "progress": False, **options}
    )


def test_before_and_after_by_hand():
    model = tiny.llama()
    model.model.norm.train()
    model.lm_head.weight.grad = kept = torch.ones_like(model.lm_head.weight)
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = compare_efficiency(model, batch_size=BATCH, prompt_tokens=PROMPT, rounds=2, progress=False)
    assert list(found) == ["before", "after"]
    for one in found.values():
        assert one.parameters == LINEAR + 16 * 32 + 5 * 32 and one.failed == {}
        assert one.weight_bytes == 4 * one.parameters + 4 * HEAD // 2 * 2  # rotary's frequencies, twice
        prefill, decode, training = (one.phases[name] for name in ("prefill", "decode", "training"))
        assert prefill.tokens == training.tokens == BATCH * PROMPT and decode.tokens == BATCH
        assert prefill.flops == 2 * BATCH * PROMPT * LINEAR + attention(PROMPT, PROMPT)
        assert decode.flops == 2 * BATCH * LINEAR + attention(1, PROMPT + 1)
        # The backward has two products for each of a linear layer's, and five for attention's two.
        assert training.flops == 3 * 2 * BATCH * PROMPT * LINEAR + attention(PROMPT, PROMPT) * 7 // 2
        for phase in one.phases.values():
            assert 0 < phase.latency_median <= phase.latency_p95
            assert phase.latency.low <= phase.latency.median == phase.latency_median <= phase.latency.high
            assert phase.disturbance is None or phase.disturbance >= 0
            assert phase.tokens_per_second == phase.tokens / phase.latency_median
            assert phase.peak_memory is None or phase.peak_memory >= 0
    assert all(phase.speedup == (1.0, 1.0, 1.0) for phase in found["before"].phases.values())
    # The user's model is as it was.
    assert not model.training and model.model.norm.training and model.lm_head.weight.grad is kept
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for name, p in model.named_parameters() if name != "lm_head.weight")


def test_of_int8():
    plain, model = tiny.llama(), tiny.llama()
    llmkern.quantize_model(model, skip=("lm_head",), measure=False)
    found = run({"fp32": plain, "int8": model}, phases=("prefill", "decode"))
    assert found["int8"].parameters == found["fp32"].parameters
    assert found["int8"].weight_bytes < found["fp32"].weight_bytes / 2
    for phase in ("prefill", "decode"):
        assert found["int8"].phases[phase].flops == found["fp32"].phases[phase].flops


def test_an_encoder_has_no_decode():
    found = run({"bert": tiny.bert()})["bert"]
    assert set(found.phases) == {"prefill", "training"} and "past_key_values" in found.failed["decode"]


def test_an_encoder_decoder_by_hand():
    model = tiny.t5()
    found = compare_efficiency(model, batch_size=BATCH, prompt_tokens=PROMPT, rounds=2, progress=False)
    projections, forward = 4 * 32 * 32, 2 * 32 * 48
    encoder = LAYERS * (projections + forward)
    # A token of the decoder: its own attention, that on the encoder (without its keys and values), the head.
    decoder = LAYERS * (projections + projections // 2 + forward) + 32 * 16
    for one in found.values():
        assert one.failed == {}
        prefill, decode, training = (one.phases[name] for name in ("prefill", "decode", "training"))
        assert prefill.tokens == training.tokens == BATCH * PROMPT and decode.tokens == BATCH
        crossed = 2 * BATCH * PROMPT * LAYERS * projections // 2
        first = 2 * BATCH * decoder + attention(1, 1) + attention(1, PROMPT)
        assert prefill.flops == 2 * BATCH * PROMPT * encoder + attention(PROMPT, PROMPT) + crossed + first
        assert decode.flops == 2 * BATCH * decoder + attention(1, 2) + attention(1, PROMPT)
        assert training.flops > 3 * prefill.flops
    assert all(phase.speedup == (1.0, 1.0, 1.0) for phase in found["before"].phases.values())


def test_an_encoder_decoder_of_the_trainer_has_no_cache():
    from llmkern.training import PretrainingConfig, build_model

    config = PretrainingConfig(
        objective="seq2seq", vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_seq_length=32, max_position_embeddings=32,
    )  # fmt: skip
    found = run({"a": build_model(config)}, rounds=1)["a"]
    assert set(found.phases) == {"prefill", "training"} and "past_key_values" in found.failed["decode"]


def test_a_model_without_a_loss_and_under_autocast():
    import transformers

    model = tiny.seeded(transformers.LlamaModel, tiny.llama().config)
    found = run({"body": model}, precision="bfloat16")["body"]
    assert found.failed == {}
    assert found.phases["prefill"].flops == 2 * BATCH * PROMPT * (LINEAR - 32 * 16) + attention(PROMPT, PROMPT)


def test_percentiles():
    assert timing.percentile(range(101), 0.95) == pytest.approx(95)
    assert timing.percentile([3.0, 1.0], 0.5) == 2.0


def test_peak_memory_is_that_of_the_call():
    found = memory.peak(lambda: torch.ones(2**24).sum(), torch.device("cpu"))
    if found is None:
        pytest.skip("this system does not tell")
    assert 0.95 * 2**26 < found < 1.25 * 2**26  # the system counts pages roughly


WRONG = {
    "no mapping": (lambda: run(tiny.llama()), TypeError, "models: expected a mapping of names to nn.Modules"),
    "no models": (lambda: run({}), ValueError, "models: expected at least one"),
    "no module": (lambda: run({"a": 3}), TypeError, "models: expected a mapping"),
    "a phase": (lambda: run({"a": tiny.llama()}, phases=("fill",)), ValueError, "phases: expected one of prefill, dec"),
    "one phase": (lambda: run({"a": tiny.llama()}, phases="decode"), TypeError, "phases: expected a tuple"),
    "no rounds": (lambda: run({"a": tiny.llama()}, rounds=0), ValueError, "rounds: expected a positive integer"),
    "no vocabulary": (lambda: run({"a": torch.nn.Linear(2, 2)}), ValueError, r"models\['a'\]: expected one with"),
    "no room": (lambda: run({"a": tiny.llama()}, rounds=43), ValueError, "prompt_tokens: expected at most 15"),
    "a name": (lambda: compare_efficiency("gpt2"), TypeError, "model: expected an nn.Module, got str"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
