"""attn_implementation="llmkern" in transformers, against its own attentions, on small seeded models with padding."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

from llmkern.models.transformers import (  # noqa: E402
    attention_forward,
    attention_mask_for,
    register,
    with_padding,
    without_padding,
)
from llmkern.verify import verify  # noqa: E402

VOCABULARY = 60
COMMON = {"vocab_size": VOCABULARY, "attn_implementation": "eager"}


def bert():
    config = transformers.BertConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, **COMMON
    )
    return transformers.BertModel(config).eval()


def llama():
    config = transformers.LlamaConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=64,
        pad_token_id=0,
        **COMMON,
    )
    return transformers.LlamaForCausalLM(config).eval()


def gpt2():
    config = transformers.GPT2Config(n_embd=48, n_layer=2, n_head=4, n_positions=64, **COMMON)
    return transformers.GPT2LMHeadModel(config).eval()


def t5():
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, **COMMON)
    return transformers.T5EncoderModel(config).eval()


def mistral():
    config = transformers.MistralConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        sliding_window=4,
        **COMMON,
    )
    return transformers.MistralForCausalLM(config).eval()


@pytest.fixture(autouse=True)
def registered():
    register()


def batch(left: bool = False):
    ids = torch.randint(1, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row, length in enumerate((11, 7, 2)):
        mask[row, : 11 - length] = 0 if left else 1
        mask[row, length:] = mask[row, length:] if left else 0
    return ids, mask


def outputs(model, implementation, ids, mask):
    """The first output at the tokens that are there: at padding, implementations differ rightly."""
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask)[0][mask.bool()]


def gemma2():
    config = transformers.Gemma2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, sliding_window=4, attn_logit_softcapping=0.5, query_pre_attn_scalar=1, pad_token_id=0,
        **COMMON,
    )  # fmt: skip
    return transformers.Gemma2Model(config).eval()


def gpt_oss():
    config = transformers.GptOssConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=16, num_local_experts=2, num_experts_per_tok=1, sliding_window=4, pad_token_id=0, **COMMON,
    )  # fmt: skip
    return transformers.GptOssModel(config).eval()


@pytest.mark.parametrize("make", [gemma2, gpt_oss])
@pytest.mark.parametrize("left", [False, True])
def test_soft_caps_and_sinks(make, left):
    model, (ids, mask) = make(), batch(left)
    torch.testing.assert_close(
        outputs(model, "llmkern", ids, mask), outputs(model, "eager", ids, mask), rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize("make", [mistral, gemma2])
def test_sentences_end_to_end_under_a_window(make):
    model, (ids, mask) = make(), batch()
    model.set_attn_implementation("llmkern")
    with torch.no_grad():
        found = model(**dict(without_padding(ids, mask), use_cache=False))[0]
    expected = outputs(model, "eager", ids, mask)
    torch.testing.assert_close(found[0], expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("make", [bert, llama, gpt2, t5, mistral])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("peer", ["eager", "sdpa"])
def test_same_outputs(make, left, peer):
    model, (ids, mask) = make(), batch(left)
    torch.testing.assert_close(
        outputs(model, "llmkern", ids, mask), outputs(model, peer, ids, mask), rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize("make", [bert, llama, gpt2])
def test_contract_with_gradients(make):
    plain = make()
    fused = make()
    fused.load_state_dict(plain.state_dict())
    fused.set_attn_implementation("llmkern")
    ids, mask = batch()

    class Seen(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids, mask):
            return self.model(input_ids=ids, attention_mask=mask)[0][mask.bool()]

    report = verify(Seen(fused), Seen(plain), (ids, mask))
    # The gradient of a key's bias is zero but for rounding: it shifts all scores of a row alike.
    failed = [r for r in report.rows if not r.passed and not r.name.endswith(("key.bias", "c_attn.bias"))]
    assert not failed, str(report)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_generate_with_a_cache(make):
    model, (ids, mask) = make(), batch(left=True)
    tokens = {}
    for implementation in ("eager", "llmkern"):
        model.set_attn_implementation(implementation)
        tokens[implementation] = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0
        )
    assert torch.equal(tokens["eager"], tokens["llmkern"])


def test_the_mask_function_is_needed_and_present():
    assert transformers.AttentionMaskInterface()["llmkern"] is attention_mask_for
    assert transformers.AttentionInterface()["llmkern"] is attention_forward
    # Under a name without one, transformers gives no mask: the padding takes part, and the outputs are wrong.
    transformers.AttentionInterface.register("without_mask", attention_forward)
    model, (ids, mask) = llama(), batch(left=True)
    right, wrong = (outputs(model, name, ids, mask) for name in ("eager", "without_mask"))
    assert (right - wrong).abs().max() > 1e-3


def masks_given(make, mask):
    """The masks that reach the attention function."""
    seen = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        seen.append(attention_mask)
        return attention_forward(module, query, key, value, attention_mask, **kwargs)

    transformers.AttentionInterface.register("spy", spy)
    transformers.AttentionMaskInterface.register("spy", attention_mask_for)
    outputs(make(), "spy", torch.ones(mask.shape, dtype=torch.int64), mask)
    return seen


def test_an_encoder_gets_the_compact_mask():
    _, mask = batch()
    for given in masks_given(bert, mask):
        assert given.dtype == torch.bool and given.shape == (3, 1, 1, 11)
        assert torch.equal(given[:, 0, 0], mask.bool())


def test_no_padding_no_mask():
    mask = torch.ones(3, 11, dtype=torch.int64)
    assert masks_given(bert, mask) == [None, None]
    assert masks_given(llama, mask) == [None, None]  # the causal flag says it all


def test_a_decoder_with_padding_gets_four_dimensions():
    _, mask = batch()
    for given in masks_given(llama, mask):
        expected = torch.ones(11, 11, dtype=torch.bool).tril() & mask.bool()[:, None, None]
        assert torch.equal(given, expected)


def test_what_is_not_known_raises():
    x = torch.zeros(1, 1, 2, 8)
    with pytest.raises(ValueError, match="cache: expected None"):
        attention_forward(torch.nn.Identity(), x, x, x, None, cache=object())


def test_register_without_transformers(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ImportError, match="expected transformers >= 5"):
        register()


def test_the_padding_left_out_gives_the_same_outputs_and_gradients():
    plain, model, (ids, mask) = bert(), bert(), batch()
    model.load_state_dict(plain.state_dict())
    model.set_attn_implementation("llmkern")
    hidden = with_padding(model(**without_padding(ids, mask)).last_hidden_state, mask)
    expected = plain(input_ids=ids, attention_mask=mask).last_hidden_state
    assert hidden.shape == expected.shape and not hidden[mask == 0].any()
    torch.testing.assert_close(hidden[mask.bool()], expected[mask.bool()], rtol=2e-5, atol=2e-5)
    (hidden[mask.bool()] ** 3).sum().backward()
    (expected[mask.bool()] ** 3).sum().backward()
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None and "pooler" not in name:
            other = model.get_parameter(name).grad
            torch.testing.assert_close(
                other, parameter.grad, rtol=1e-3, atol=1e-3 * (1 + float(parameter.grad.abs().max()))
            )


def test_sentences_end_to_end_in_a_decoder():
    model, (ids, mask) = llama(), batch()
    logits = model(**dict(without_padding(ids, mask), use_cache=False)).logits
    model.set_attn_implementation("llmkern")
    found = model(**dict(without_padding(ids, mask), use_cache=False)).logits
    torch.testing.assert_close(found, logits, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(with_padding(found, mask)[0], model(input_ids=ids[:1]).logits[0], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_each_sentence_attends_to_itself_alone(causal):
    q, k, v = (torch.randn(1, heads, 9, 8) for heads in (4, 2, 2))
    module = torch.nn.Identity()
    module.is_causal = causal
    seen = (torch.arange(9)[:, None] - torch.arange(9)).abs() < 3
    for asked, same in (
        ({}, {}),
        ({"softcap": 0.7, "s_aux": torch.randn(4)}, None),
        ({"sliding_window": 3}, {"attention_mask": seen.tril() if causal else seen}),
    ):
        bounds = {"cu_seq_lens_q": torch.tensor([0, 5, 6, 9]), "max_length_q": 5}
        found, _ = attention_forward(module, q, k, v, None, **bounds, **asked)
        for start, end in ((0, 5), (5, 6), (6, 9)):
            options = dict(asked) if same is None else dict(same)
            mask = options.pop("attention_mask", None)
            mask = mask if mask is None else mask[: end - start, : end - start]
            alone, _ = attention_forward(module, *(t[:, :, start:end] for t in (q, k, v)), mask, **options)
            torch.testing.assert_close(found[:, start:end], alone)


def test_bad_bounds_raise():
    x, bounds = torch.zeros(1, 1, 4, 8), torch.tensor([0, 4])
    with pytest.raises(ValueError, match="cu_seqlens_k: expected bounds that rise from 0 to the number of tokens, 4"):
        attention_forward(torch.nn.Identity(), x, x, x, None, cu_seq_lens_q=bounds, cu_seq_lens_k=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="cu_seqlens_k: expected"):
        attention_forward(torch.nn.Identity(), x, x[:, :, :3], x[:, :, :3], None, cu_seq_lens_q=bounds)
    with pytest.raises(ValueError, match=r"query: expected \(1, H, T, D\)"):
        attention_forward(torch.nn.Identity(), *[x.expand(2, -1, -1, -1)] * 3, None, cu_seq_lens_q=bounds)
    with pytest.raises(ValueError, match="a row of padding alone"):
        without_padding(torch.ones(2, 3), torch.tensor([[1, 1, 0], [0, 0, 0]]))
    with pytest.raises(ValueError, match="attention_mask: expected"):
        without_padding(torch.ones(2, 3), torch.ones(3))
