"""generate() on kernelized models: every kind of cache, padding on either side, assistants; compiled. As eager's."""

from __future__ import annotations

import copy

import pytest
import torch

import llmkern
from llmkern.verify import verify

transformers = pytest.importorskip("transformers", minversion="5")

from tests.models.test_kernelize_transformers import MODELS, PADDED, TOKENS, decoder, pair  # noqa: E402

RIGHT = PADDED.flip(1)
DECODERS = ("llama", "mistral", "gemma2", "gemma3", "qwen3", "phi3", "gpt2")


class Generated(torch.nn.Module):
    """The logits of each step of greedy generation, and the tokens, which are integers and must be equal."""

    def __init__(self, model, **options):
        super().__init__()
        self.model = model
        self.options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **options}

    def forward(self, tokens, mask):
        found = self.model.generate(
            tokens, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **copy.deepcopy(self.options)
        )
        self.cache = found.past_key_values
        return torch.stack(found.logits), found.sequences


def hold(plain, fast, tokens=TOKENS, mask=PADDED, **options):
    """Holds one model's generation to the other's; returns the kinds of layer of its cache."""
    ours = Generated(fast, **options)
    verify(ours, Generated(plain, **options), (tokens, mask), gradients=False).raise_if_failed()
    cache = ours.cache
    return {type(layer).__name__ for layer in getattr(cache, "self_attention_cache", cache).layers}


#: what a cache is made of, in models that see all and in those of which some layers have a window
LAYERS = {
    "dynamic": ("DynamicLayer", "DynamicSlidingWindowLayer"),
    "static": ("StaticLayer", "StaticSlidingWindowLayer"),
}


@pytest.mark.parametrize("name", [*DECODERS, "t5, gated", "bart"])
@pytest.mark.parametrize("cache", LAYERS)
def test_caches(cache, name):
    plain, fast, _ = pair(MODELS[name][0])
    kinds = hold(plain, fast, cache_implementation=cache)
    windows = {"mistral": {1}, "gemma2": {0, 1}}.get(name, {0})
    assert kinds == {LAYERS[cache][i] for i in ({1} if name == "gemma3" else windows)}


@pytest.mark.parametrize("name", ["t5, gated", "bart"])
def test_padding_on_the_right_in_an_encoder(name):
    plain, fast, _ = pair(MODELS[name][0])
    hold(plain, fast, mask=RIGHT)
    hold(plain, fast, mask=RIGHT, num_beams=2, length_penalty=0.5)


@pytest.mark.parametrize("name", [*DECODERS, "t5, gated", "bart", "bert"])
def test_padding_on_the_right(name):
    plain, fast, _ = pair(MODELS[name][0])
    given = {"input_ids": TOKENS, "attention_mask": RIGHT}
    more = {"decoder_input_ids": TOKENS} if plain.config.is_encoder_decoder else {}
    seen = slice(None) if more else RIGHT.bool()
    kept = [lambda m=m: m(**given, **more)[0][seen] for m in (fast, plain)]
    exact = copy.deepcopy(plain).double()
    verify(*kept, gradients=False, truth=lambda: exact(**given, **more)[0][seen]).raise_if_failed()


QUANTIZED = {
    "fp8": {},
    "quanto": {"nbits": 4, "q_group_size": 16, "axis_key": 0, "axis_value": 0, "residual_length": 4},
    "hqq": {"nbits": 8, "q_group_size": 16, "axis_key": 1, "axis_value": 1, "residual_length": 4},
}


@pytest.mark.parametrize("backend", QUANTIZED)
@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_quantised_caches(name, backend):
    if backend != "fp8":
        pytest.importorskip({"quanto": "optimum.quanto", "hqq": "hqq"}[backend])
    torch.manual_seed(1)
    # One layer: its keys and values are the same bits whatever the attention. Behind it, another rounding may be
    # another number of the cache.
    fast = decoder(name, head_dim=8).eval()
    fast.config.num_hidden_layers = 1
    del fast.model.layers[1:]
    llmkern.kernelize(fast)
    options = {"cache_implementation": "quantized", "cache_config": {"backend": backend, **QUANTIZED[backend]}}
    found = []
    for attention in ("eager", "llmkern"):
        fast.set_attn_implementation(attention)
        found.append(Generated(fast, **options)(TOKENS, PADDED))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "qwen3", "gpt2"])
@pytest.mark.parametrize("way", ["assistant", "prompt lookup"])
def test_assisted_decoding(name, way):
    plain, fast, _ = pair(MODELS[name][0])
    tokens = torch.cat((TOKENS[:1], TOKENS[:1]), 1)  # what is looked up is there
    options = {"prompt_lookup_num_tokens": 3}
    if way == "assistant":
        torch.manual_seed(5)
        assistant = MODELS[name][0]().eval()
        llmkern.kernelize(assistant)
        options = {"assistant_model": assistant}
    given = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = plain.generate(tokens, **given)
    assert torch.equal(fast.generate(tokens, **given, **options), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5, gated"])
def test_compiled_forward(name):
    plain, fast, _ = pair(MODELS[name][0])
    given = {"input_ids": TOKENS, "attention_mask": PADDED}
    more = {"decoder_input_ids": TOKENS[:, :5]} if plain.config.is_encoder_decoder else {}
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    seen = slice(None) if more else PADDED.bool()
    found, expected = (m(**given, **more)[0][seen] for m in (compiled, plain))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_compiled_generation(name):
    plain, fast, _ = pair(MODELS[name][0])
    torch._dynamo.reset()
    compiled = transformers.CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compiled._compile_all_devices = True
    given = {"attention_mask": PADDED, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    counts = torch._dynamo.utils.counters
    counts.clear()
    found = fast.generate(TOKENS, **given, cache_implementation="static", compile_config=compiled)
    assert counts["stats"]["calls_captured"] > 0
    assert torch.equal(found, plain.generate(TOKENS, **given))
