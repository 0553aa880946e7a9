"""Decoder layers as one call: the same bits as the layer's own forward, with caches that anybody may change."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch

import llmkern
from llmkern.int8.scheme import Int8Scheme
from llmkern.models import decoder_call

transformers = pytest.importorskip("transformers", minversion="5")

from tests.models.test_kernelize_transformers import MODELS, PADDED, TOKENS, decoder  # noqa: E402

SERVED = ("llama", "mistral", "qwen2")


@pytest.fixture
def calls(monkeypatch):
    """How often a layer was one call and how often it was not; `off()` turns the one call off."""

    class Calls:
        served = left = 0
        on = True

    counted, real = Calls(), decoder_call.call

    def call(*args):
        made = real(*args) if counted.on else None
        if made is None:
            counted.left += 1
        else:
            counted.served += 1
        return made

    monkeypatch.setattr(decoder_call, "call", call)
    return counted


def quantized(make, dtype=torch.float32, scheme="outliers"):
    """A seeded model on the kernels whose linear layers are int8, the head too."""
    torch.manual_seed(3)
    model = make().eval()
    with torch.no_grad():
        for p in model.parameters():  # norms begin with ones, biases with zeros, in which much hides
            p.add_(0.05 * torch.randn_like(p))
    model.to(dtype)
    llmkern.kernelize(model)
    return llmkern.quantize_model(model, scheme=scheme, measure=False, progress=False)


@torch.no_grad()
def both(calls, run):
    """What a call gives with layers as one call, and what with their own forwards."""
    calls.on, calls.served, calls.left = True, 0, 0
    one = run()
    served = calls.served
    assert served and not calls.left
    calls.on = False
    own = run()
    calls.on = True
    return one, own


@pytest.mark.parametrize("name", MODELS)
def test_which_models_have_such_layers(name, calls):
    model = quantized(MODELS[name][0])
    fused = [m for m in model.modules() if hasattr(m, "_llmkern_kept")]
    assert len(fused) == (2 if name in SERVED else 0)
    if name in SERVED:
        one, own = both(calls, lambda: model(TOKENS[:, :4], use_cache=False).logits)
        assert torch.equal(one, own)


def test_every_instruction_set_gives_the_same_bits(isa, calls):
    model = quantized(MODELS["llama"][0])
    one, own = both(calls, lambda: model(TOKENS, use_cache=False).logits)
    assert torch.equal(one, own)


SCHEMES = ("row", "symmetric", "weight_only", Int8Scheme("row", group=32), Int8Scheme("symmetric", group=32))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_scheme_gives_the_same_bits(scheme, calls):
    model = quantized(MODELS["qwen2"][0], scheme=scheme)
    one, own = both(calls, lambda: model(TOKENS, use_cache=False).logits)
    assert torch.equal(one, own)


@pytest.mark.parametrize("mask", [None, PADDED, PADDED.flip(1)], ids=["whole", "left", "right"])
def test_a_prompt_and_tokens_behind_it(mask, calls):
    model = quantized(MODELS["qwen2"][0])

    def run():
        cache = transformers.DynamicCache(config=model.config)
        given = torch.ones_like(TOKENS) if mask is None else mask
        logits = [model(TOKENS, attention_mask=mask, past_key_values=cache).logits]
        for step in range(70):  # past the first room
            given = torch.cat((given, torch.ones(2, 1, dtype=torch.long)), 1)
            token = (TOKENS[:, :1] + step) % 60
            logits.append(model(token, attention_mask=given, past_key_values=cache).logits)
        return torch.cat(logits, 1), cache.layers[1].keys, cache.layers[1].values

    one, own = both(calls, run)
    assert all(torch.equal(a, b) for a, b in zip(one, own, strict=True))


WAYS = {
    "beams": {"num_beams": 3}, "lookup": {"prompt_lookup_num_tokens": 3}, "static": {"cache_implementation": "static"}
}  # fmt: skip


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_generation(options, calls):
    model = quantized(MODELS["llama"][0])
    tokens = TOKENS[:1].repeat(1, 2) if "prompt_lookup_num_tokens" in options else TOKENS

    def run():
        return model.generate(tokens, max_new_tokens=12, do_sample=False, pad_token_id=0, **options)

    one = run()
    assert bool(calls.served) == (options != {"cache_implementation": "static"})
    calls.on = False
    assert torch.equal(one, run())


def test_what_holds_a_part_of_the_cache_keeps_it(calls):
    model = quantized(MODELS["llama"][0])

    @torch.no_grad()
    def run():
        cache = transformers.DynamicCache(config=model.config)
        model(TOKENS, past_key_values=cache)
        layer = cache.layers[0]
        held = [layer.keys, layer.keys.clone()]
        model(TOKENS[:, :1], past_key_values=cache)
        copied = copy.deepcopy(cache)
        cache.crop(-3)
        held += [layer.keys, layer.keys.clone(), copied.layers[0].keys, copied.layers[0].keys.clone()]
        first = model(TOKENS[:, 1:2], past_key_values=cache).logits
        second = model(TOKENS[:, 2:3], past_key_values=copied).logits
        cache.batch_select_indices(torch.tensor([1, 1]))
        third = model(TOKENS[:, 3:4], past_key_values=cache).logits
        for was, then in zip(held[::2], held[1::2], strict=True):
            assert torch.equal(was, then)
        assert cache.get_seq_length() == 11 and copied.get_seq_length() == 13
        return torch.stack((first, second, third))

    one, own = both(calls, run)
    assert torch.equal(one, own)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_it_is_as_near_to_float32(dtype, calls):
    model = quantized(MODELS["llama"][0], dtype)
    one, own = both(calls, lambda: model.model(TOKENS, use_cache=False).last_hidden_state)
    with torch.no_grad():
        truth = copy.deepcopy(model).float().model(TOKENS, use_cache=False).last_hidden_state
    error, allowed = ((x.float() - truth).abs().max() for x in (one, own))
    assert error <= 2 * allowed + torch.finfo(dtype).eps * truth.abs().max()


def test_changed_layers_are_seen(calls):
    model = quantized(MODELS["llama"][0])
    layer = model.model.layers[0]

    def check(served=True):
        calls.on, calls.served = True, 0
        with torch.no_grad():
            one = model(TOKENS, use_cache=False).logits
            assert calls.served == (2 if served else 1)
            calls.on = False
            assert torch.equal(one, model(TOKENS, use_cache=False).logits)
        return one

    results = [check()]
    layer.self_attn.k_proj.weight.neg_()
    results.append(check())
    layer.mlp.up_proj.weight_scale.mul_(2)
    results.append(check())
    layer.mlp.down_proj.weight.data.neg_()  # past torch's count
    layer.mlp.down_proj.repack()
    results.append(check())
    layer.self_attn.o_proj = llmkern.Int8Linear.from_linear(torch.nn.Linear(48, 48, bias=False))
    results.append(check())
    handle = layer.self_attn.v_proj.register_forward_hook(lambda module, args, output: -output)
    results.append(check(served=False))
    handle.remove()
    results.append(check())
    layer.mlp.forward = torch.neg  # put on the object
    results.append(check(served=False))
    del layer.mlp.forward
    results.append(check())
    layer.mlp.gate_proj = torch.nn.Linear(48, 64, bias=False)
    results.append(check(served=False))
    layer.mlp.gate_proj = llmkern.Int8Linear.from_linear(torch.nn.Linear(48, 64, bias=False))
    results.append(check())
    layer.mlp = torch.nn.Identity()  # without its parts
    results.append(check(served=False))
    for a, b in itertools.pairwise(results):
        assert not torch.equal(a, b)


def test_what_is_not_one_call(calls):
    model = quantized(MODELS["llama"][0])
    model(TOKENS)  # gradients
    torch.compile(model, backend="eager", fullgraph=True)(TOKENS)
    with torch.no_grad():
        model.train()(TOKENS)
        model.eval()
        with torch.autocast("cpu", torch.bfloat16):
            model(TOKENS)
        model.set_attn_implementation("sdpa")
        model(TOKENS)
        assert not calls.served
        model.set_attn_implementation("llmkern")
    with torch.inference_mode():
        model(TOKENS, tokenizer=object())  # which a server's generate passes on to every layer
        assert calls.served == 2
        served = calls.served
        assert len(model(TOKENS, output_attentions=True, output_hidden_states=True).hidden_states) == 3
        assert calls.served == served  # transformers' hooks took what they are for


def test_copies_pickles_and_the_way_back(calls):
    model = quantized(MODELS["llama"][0])
    with torch.no_grad():
        expected = model(TOKENS).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            calls.served = 0
            assert torch.equal(other(TOKENS).logits, expected) and calls.served == 2
        keys = list(model.state_dict())
        llmkern.restore(model)
        assert type(model.model.layers[0]).__name__ == "LlamaDecoderLayer" and list(model.state_dict()) == keys
        assert not [n for n in vars(model.model.layers[0]) if n.startswith("_llmkern")]


def test_more_rows_than_memory_is_kept_for(calls):
    model = quantized(lambda: decoder("Llama"))
    tokens = TOKENS[:1].repeat(2200, 1)
    one, own = both(calls, lambda: model.model(tokens, use_cache=False).last_hidden_state)
    assert torch.equal(one, own)


def test_a_model_that_tells_its_layer_more_is_left():
    class Capped(transformers.models.llama.modeling_llama.LlamaAttention):
        def forward(self, hidden_states, **named):
            return super().forward(hidden_states, softcap=50.0, **named)

    model = decoder("Llama").eval()
    for layer in model.model.layers:
        layer.self_attn.__class__ = Capped
    llmkern.kernelize(model)
    assert not any(hasattr(m, "_llmkern_kept") for m in model.modules())
