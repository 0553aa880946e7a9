"""PretrainingConfig: the reference's fields and defaults, both ways through files, and what it refuses."""

from __future__ import annotations

import pytest

from llmkern.training import PretrainingConfig

REFERENCE = dict(
    model_type="transformer", hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
    max_position_embeddings=512, max_seq_length=512, batch_size=32, learning_rate=5e-5, num_epochs=10,
    optimizer="adamw", weight_decay=0.01, adam_beta1=0.9, adam_beta2=0.999, lr_scheduler="cosine", warmup_steps=1000,
    dropout=0.1, layer_norm_eps=1e-12,
)  # fmt: skip


def test_names_order_and_defaults_are_those_of_the_reference():
    made = PretrainingConfig().to_dict()
    assert dict(list(made.items())[: len(REFERENCE)]) == REFERENCE
    assert list(made)[: len(REFERENCE)] == list(REFERENCE)


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_files_give_back_what_was_written(kind, tmp_path):
    config = PretrainingConfig(
        hidden_size=96, learning_rate=3e-7, objective="clm", output_dir="somewhere", max_steps=7, fused=False
    )
    path = tmp_path / f"run.{kind}"
    getattr(config, f"to_{kind}")(path)
    assert getattr(PretrainingConfig, f"from_{kind}")(path) == config


def test_a_number_in_yaml_may_be_written_as_people_write_it(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-4\nhidden_size: 96\nlayer_norm_eps: 1e-12\n")
    assert PretrainingConfig.from_yaml(path) == PretrainingConfig(hidden_size=96, learning_rate=1e-4)


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_an_unknown_key_is_refused_with_the_nearest_known_one(kind, tmp_path):
    path = tmp_path / f"run.{kind}"
    path.write_text('{"num_hiden_layers": 3}')
    with pytest.raises(ValueError, match=r"num_hiden_layers: expected a field .* nearest is num_hidden_layers"):
        getattr(PretrainingConfig, f"from_{kind}")(path)


@pytest.mark.parametrize(
    ("kind", "text"),
    [("yaml", "seed: 1\nhidden_size: 96\nseed: 2\n"), ("json", '{"seed": 1, "hidden_size": 96, "seed": 2}')],
)
def test_a_key_that_is_given_twice_is_refused(kind, text, tmp_path):
    path = tmp_path / f"run.{kind}"
    path.write_text(text)
    with pytest.raises(ValueError, match="seed: expected one value, got more than one"):
        getattr(PretrainingConfig, f"from_{kind}")(path)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        (dict(hidden_size=0), ValueError, "hidden_size: expected a positive integer, got 0"),
        (dict(hidden_size=7.5), TypeError, "hidden_size: expected an integer, got 7.5"),
        (dict(hidden_size=True), TypeError, "hidden_size: expected an integer, got True"),
        (dict(max_steps=0), ValueError, "max_steps: expected a positive integer, got 0"),
        (dict(learning_rate="fast"), TypeError, "learning_rate: expected a number, got 'fast'"),
        (dict(learning_rate=float("nan")), ValueError, "learning_rate: expected a finite number, got nan"),
        (dict(weight_decay=-0.1), ValueError, "weight_decay: expected 0 or more, got -0.1"),
        (dict(dropout=1.5), ValueError, r"dropout: expected a probability in \[0, 1\], got 1.5"),
        (dict(adam_beta2=1.0), ValueError, r"adam_beta2: expected a number in \[0, 1\), got 1.0"),
        (dict(fused=1), TypeError, "fused: expected True or False, got 1"),
        (dict(output_dir=3), TypeError, "output_dir: expected a string, got 3"),
        (dict(seed=None), TypeError, "seed: expected an integer, got None"),
        (dict(lr_scheduler="step"), ValueError, "lr_scheduler: expected one of cosine, linear, constant, got 'step'"),
        (dict(optimizer="sgd"), ValueError, "optimizer: expected one of adamw"),
        (dict(objective="rtd"), ValueError, "objective: expected one of mlm, mlm_nsp, clm, seq2seq"),
        (dict(num_attention_heads=7), ValueError, "num_attention_heads: expected a divisor of hidden_size = 768"),
        (dict(hidden_size=36, objective="clm"), ValueError, "num_attention_heads: expected heads of an even width"),
        (dict(max_seq_length=513), ValueError, "max_seq_length: expected at most max_position_embeddings = 512"),
        (dict(pad_token_id=50, vocab_size=50), ValueError, "pad_token_id: expected one below vocab_size = 50, got 50"),
        (dict(type_vocab_size=1, objective="mlm_nsp"), ValueError, "type_vocab_size: expected 2 or more with mlm_nsp"),
        (dict(output_dir=""), ValueError, "output_dir: expected a folder or None, got ''"),
        (dict(seed=2**60), ValueError, r"seed: expected one in \[0, 2\*\*32\), got 1152921504606846976"),
        (dict(tensor_parallel_size=5), ValueError, "tensor_parallel_size: expected a divisor of num_attention_heads"),
    ],
)
def test_bad_values_are_refused_by_name(fields, error, words):
    with pytest.raises(error, match=words):
        PretrainingConfig(**fields)
