"""A report loads the class that a configuration names, with all its weights, or says why not."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file

from llmkern.evaluation.report import ReportSettings, load, make_report
from llmkern.evaluation.report.loading import kind_of
from tests.evaluation import tiny
from tests.evaluation.conftest import write

PAIRED = {
    "vocab_size": 16, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
T5 = {"vocab_size": 16, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
ELECTRA = {**tiny.SHAPE, "embedding_size": 32, "intermediate_size": 48}


def saved(model, folder):
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


SERVED = {
    "MarianMTModel": (lambda: T.MarianMTModel(T.MarianConfig(**PAIRED)), "encoder_decoder"),
    "T5EncoderModel": (lambda: T.T5EncoderModel(T.T5Config(**T5)), "encoder"),
    "BartForCausalLM": (lambda: T.BartForCausalLM(T.BartConfig(**PAIRED)), "decoder"),
    "GPT2ForSequenceClassification": (
        lambda: T.GPT2ForSequenceClassification(T.GPT2Config(vocab_size=16, n_embd=32, n_layer=1, n_head=4)),
        "classifier",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SERVED)
def test_the_class_is_the_one_that_is_named(name, tmp_path):
    build, kind = SERVED[name]
    loaded = load(str(saved(build(), tmp_path)))
    assert type(loaded.model).__name__ == name and kind_of(loaded.model) == kind
    assert f"transformers.{name}.from_pretrained" in loaded.code


def test_of_heads_for_pretraining_the_language_models(tmp_path):
    model = tiny.bert("BertForPreTraining")
    loaded = load(str(saved(model, tmp_path)))
    assert type(loaded.model).__name__ == "BertForMaskedLM" and "BertForPreTraining" in loaded.note
    ids = torch.tensor([[1, 4, 6, 9]])
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, model(ids).prediction_logits)


REFUSED = {
    "a discriminator": (
        lambda: T.ElectraForPreTraining(T.ElectraConfig(**ELECTRA)),
        "all weights of ElectraForMaskedLM, got files without generator_",
    ),
    "tokens' classes": (lambda: tiny.bert("BertForTokenClassification"), "got BertForTokenClassification"),
    "answers": (lambda: tiny.bert("BertForQuestionAnswering"), "got BertForQuestionAnswering"),
    "a classifier of pairs": (
        lambda: T.BartForSequenceClassification(T.BartConfig(**PAIRED, num_labels=3)),
        "an encoder or a decoder, got BartForSequenceClassification",
    ),
    "no head of pairs": (lambda: T.BartModel(T.BartConfig(**PAIRED)), "head, got BartModel, without one"),
    "a regression": (lambda: tiny.bert("BertForSequenceClassification", num_labels=1), "with num_labels = 1"),
    "several classes": (
        lambda: tiny.bert("BertForSequenceClassification", num_labels=3, problem_type="multi_label_classification"),
        "problem_type = 'multi_label_classification'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_report_has_no_measure_for(name, tmp_path):
    build, words = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(words)):
        load(str(saved(build(), tmp_path)))


def test_in_python_too(tmp_path):
    model = tiny.bert("BertForSequenceClassification", num_labels=1)
    with pytest.raises(ValueError, match="a classifier of one class for each text"):
        make_report(model, tiny.tokenizer(), write(tmp_path, "labels"))


def test_weights_that_are_not_there_are_named(tmp_path):
    path = saved(tiny.llama(), tmp_path) / "model.safetensors"
    weights = {name: t for name, t in load_file(path).items() if "layers.1." not in name}
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"all weights of LlamaForCausalLM, got files without model\.layers\.1\..* more"
    ):
        load(str(tmp_path))


def test_weights_that_are_others_anyway_may_lack(tmp_path):
    folder = saved(tiny.llama(tie_word_embeddings=True), tmp_path / "tied")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert load(str(folder)).name == "tied"
    folder = saved(tiny.bert("BertModel", add_pooling_layer=False), tmp_path / "unpooled")
    path = folder / "model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if "pooler" not in n}, path, metadata={"format": "pt"})
    assert type(load(str(folder)).model).__name__ == "BertModel"


def _config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGED = {
    "half": lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:100]),
    "no weights": lambda f: (f / "model.safetensors").write_bytes(b"hello world this is not"),
    "another shape": lambda f: _config(f, intermediate_size=64),
    "no configuration": lambda f: (f / "config.json").write_text("{nope"),
    "a deep one": lambda f: (f / "config.json").write_text("[" * 200000),
    "a class of others": lambda f: _config(f, architectures=["OurForCausalLM"]),
    "no tokenizer": lambda f: (f / "tokenizer.json").write_text("{}"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files(name, tmp_path):
    DAMAGED[name](saved(tiny.llama(), tmp_path))
    words = "^model: expected .* of its configuration" if name == "another shape" else "^model: expected "
    with pytest.raises(ValueError, match=words):
        load(str(tmp_path))


def test_gguf_files(tmp_path, monkeypatch):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUFjunk")
    for package in ("gguf", "accelerate"):
        with monkeypatch.context() as patch, pytest.raises(ImportError, match=f"expected {package}, which pip install"):
            patch.setitem(sys.modules, "gguf", sys)  # whether it is installed or not
            patch.setitem(sys.modules, package, None)
            load(str(path))
    monkeypatch.setitem(sys.modules, "accelerate", sys)
    with pytest.raises((ValueError, ImportError), match="expected"):
        load(str(path))


def test_an_encoder_of_pairs_is_reported(tmp_path):
    loaded = load(str(saved(tiny.seeded(T.T5EncoderModel, T.T5Config(**T5)), tmp_path)))
    settings = ReportSettings(rounds=1, prompt_tokens=8, schemes=())
    made = make_report(loaded.model, loaded.tokenizer, write(tmp_path, "text"), settings, progress=False).content
    assert made["equivalence"]["passed"] and set(made["quality"]["models"]) == {"published", "kernelized"}
    assert set(made["speed"]["phases"]) == {"prefill"}, made["speed"]
