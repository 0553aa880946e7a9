"""LlmkernInt8Config: quantised while loading, saved, and loaded again with the same bits; options and bad input."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import llmkern
from llmkern import Int8Linear, Int8Scheme

transformers = pytest.importorskip("transformers", minversion="5")

from llmkern.models.int8_config import METHOD, LlmkernInt8Config  # noqa: E402
from llmkern.models.transformers import register  # noqa: E402
from tests.models.test_kernelize_transformers import MODELS, PADDED, TOKENS, decoder, logits  # noqa: E402


def saved(model, folder):
    model.eval().save_pretrained(folder)
    return folder


def same_bits(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def kinds(model):
    return {name for name, m in model.named_modules() if isinstance(m, Int8Linear)}


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "t5, gated", "bart"])
def test_quantised_saved_and_loaded(name, tmp_path):
    torch.manual_seed(1)
    plain = MODELS[name][0]()
    path = saved(plain, tmp_path / "plain")
    config = LlmkernInt8Config()
    model = type(plain).from_pretrained(path, quantization_config=config)
    assert config.layers is None and model.is_quantized
    by_hand = llmkern.quantize_model(copy.deepcopy(plain), skip=["lm_head"] if name == "llama" else [])
    same_bits(model, by_hand)
    assert model.quantization_report.replaced == by_hand.quantization_report.replaced
    again = type(plain).from_pretrained(saved(model, tmp_path / "int8"))
    same_bits(again, model)
    assert torch.equal(logits(again), logits(model)) and kinds(again) == kinds(model)
    error = (logits(again) - logits(plain)).norm() / logits(plain).norm()
    assert 0 < error < 0.1
    third = type(plain).from_pretrained(saved(again, tmp_path / "again"))
    same_bits(third, model)


@pytest.mark.parametrize("scheme", ["row", "weight_only", "rotated", Int8Scheme("symmetric", group=32)])
def test_schemes(scheme, tmp_path):
    path = saved(decoder("Llama"), tmp_path / "plain")
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(path, quantization_config=LlmkernInt8Config(scheme))
    expected = scheme if isinstance(scheme, Int8Scheme) else llmkern.int8.scheme.named(scheme)
    again = load(saved(model, tmp_path / "int8"))
    for made in (model, again):
        assert {m.scheme for m in made.modules() if isinstance(m, Int8Linear)} == {expected}
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_skip(tmp_path):
    path = saved(decoder("Llama"), tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(path, quantization_config=LlmkernInt8Config(skip=["down_proj", "*layers.0.*"]))
    assert {n.split(".")[-1] for n in kinds(model) if "layers" in n}.isdisjoint({"down_proj"})
    assert isinstance(model.lm_head, Int8Linear) and not any("layers.0" in n for n in kinds(model))
    with pytest.raises(ValueError, match=r"skip: expected names of linear layers .* got 'nowhere'"):
        load(path, quantization_config=LlmkernInt8Config(skip=["nowhere"]))


@pytest.mark.measured
def test_layers_that_do_not_gain_are_left_and_all_may_be(tmp_path, monkeypatch):
    verdict = llmkern.int8.cost.Verdict({1: 1.0}, {1: 2.0}, False)
    monkeypatch.setattr(llmkern.int8.cost, "compare", lambda *args, **kwargs: verdict)
    plain = decoder("Llama")
    path = saved(plain, tmp_path / "plain")
    load = transformers.AutoModelForCausalLM.from_pretrained
    assert len(kinds(load(path, quantization_config=LlmkernInt8Config(measure=False)))) == 14
    model = load(path, quantization_config=LlmkernInt8Config())
    assert not kinds(model)
    same_bits(load(saved(model, tmp_path / "same")), plain)


def test_a_saved_model_with_and_without_its_head(tmp_path):
    path = saved(decoder("Llama"), tmp_path / "plain")
    whole = transformers.LlamaForCausalLM.from_pretrained(path, quantization_config=LlmkernInt8Config())
    body = transformers.LlamaModel.from_pretrained(saved(whole, tmp_path / "whole"))
    same_bits(body, whole.model)
    headed = transformers.LlamaForCausalLM.from_pretrained(saved(body, tmp_path / "body"))
    same_bits(headed.model, whole.model)
    assert type(headed.lm_head) is nn.Linear


def test_bfloat16(tmp_path):
    path = saved(decoder("Llama"), tmp_path / "plain")
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(path, quantization_config=LlmkernInt8Config(), dtype=torch.bfloat16)
    again = load(saved(model, tmp_path / "int8"))
    same_bits(again, model)
    assert again.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("scheme", ["static", "smooth"])
def test_what_calibration_made_is_saved_and_loaded(scheme, tmp_path):
    model = decoder("Llama").eval()
    data = [{"input_ids": TOKENS, "attention_mask": PADDED}]
    llmkern.quantize_model(model, scheme=scheme, calibration=data, progress=False)
    model.config.quantization_config = LlmkernInt8Config.of(model)
    again = transformers.AutoModelForCausalLM.from_pretrained(saved(model, tmp_path))
    same_bits(again, model)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_kernelized_and_in_training(tmp_path):
    path = saved(decoder("Llama"), tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(path, quantization_config=LlmkernInt8Config())
    model = copy.deepcopy(plain)
    told = llmkern.kernelize(model)
    assert {"FusedLlamaMLP", "FusedLlamaAttention"} <= {m.by for m in told.modules}
    assert (logits(model) - logits(plain)).norm() < 0.02 * logits(plain).norm()
    model.train()(TOKENS, labels=TOKENS).loss.backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0


def test_registered_once():
    register()
    register()
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    assert AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] is LlmkernInt8Config


BAD = [
    ({"scheme": "int4"}, ValueError, "scheme: expected an Int8Scheme or one of outliers, .*, got 'int4'"),
    ({"skip": "lm_head"}, TypeError, "skip: expected None or a sequence of names, got 'lm_head'"),
    ({"skip": [1]}, TypeError, r"skip: expected None or a sequence of names, got \[1\]"),
    ({"measure": 1}, TypeError, "measure: expected True or False, got 1"),
    ({"layers": {"a": "0 0"}}, ValueError, "scheme: expected the three numbers of a saved scheme"),
    ({"layers": {"a": "0 x 0"}}, ValueError, "layers: expected the numbers of a scheme in a string, .*, got '0 x 0'"),
    ({"quant_method": "gptq"}, ValueError, "quant_method: expected 'llmkern_int8', got 'gptq'"),
    ({"bits": 4}, TypeError, "unexpected keyword argument 'bits'"),
]


@pytest.mark.parametrize(("options", "error", "words"), BAD)
def test_bad_input(options, error, words):
    with pytest.raises(error, match=words):
        LlmkernInt8Config(**options)


def test_bad_models(tmp_path):
    model = decoder("Llama")
    with pytest.raises(ValueError, match=r"model: expected one with int8 layers, .* got none"):
        LlmkernInt8Config.of(model)
    path = saved(model, tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    with pytest.raises(ValueError, match="scheme: expected one without calibration data while a model loads, got"):
        load(path, quantization_config=LlmkernInt8Config("static"))
    file = path / "config.json"
    for layers, words in (
        (None, "layers: expected the int8 layers of the saved model in its config.json, got None"),
        ({"model.norm": "0 0 0"}, "layers: expected names of linear layers, got 'model.norm', a LlamaRMSNorm"),
    ):
        config = json.loads(file.read_text()) | {"quantization_config": {"quant_method": METHOD, "layers": layers}}
        file.write_text(json.dumps(config))
        with pytest.raises(ValueError, match=words):
            load(path)
