"""Kernelized models through torch.compile(fullgraph=True) and torch.export: the same results as eager.

A package of AOTInductor is made, loaded and compared in tests/test_examples.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import llmkern
from tests.inductor import QUICK

transformers = pytest.importorskip("transformers", minversion="5")

TOKENS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
PADDED = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
HIDDEN = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))


class First(nn.Module):
    """A model whose first output alone counts."""

    def __init__(self, model: nn.Module, **options: object) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, **kwargs: torch.Tensor) -> torch.Tensor:
        return self.model(**kwargs, **self.options)[0]


def transformer():
    model = nn.Transformer(32, 4, 1, 1, 48, dropout=0.0, batch_first=True)
    causal = nn.Transformer.generate_square_subsequent_mask(7)
    return model, {
        "src": HIDDEN, "tgt": HIDDEN.flip(0), "tgt_mask": causal, "tgt_is_causal": True,
        "src_key_padding_mask": PADDED == 0, "memory_key_padding_mask": PADDED == 0,
    }  # fmt: skip


def llama():
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=48, num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    model = First(transformers.LlamaForCausalLM(config), use_cache=False)
    return model, {"input_ids": TOKENS, "attention_mask": PADDED}


def t5():
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=60, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0,
    )  # fmt: skip
    model = First(transformers.T5ForConditionalGeneration(config), use_cache=False)
    return model, {"input_ids": TOKENS, "attention_mask": PADDED, "decoder_input_ids": TOKENS[:, :5]}


def kernelized(make):
    torch.manual_seed(1)
    torch._dynamo.reset()  # which counts the models that came before
    model, inputs = make()
    assert llmkern.kernelize(model).replaced
    return model, inputs


def step(model: nn.Module, inputs: dict[str, torch.Tensor], call) -> list[torch.Tensor]:
    """The output and the gradients of a training step."""
    model.zero_grad()
    output = call(**inputs)
    output.square().mean().backward()
    return [output.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("make", [transformer, llama, t5])
def test_compiled_in_one_graph_forward_and_training_are_the_same(make):
    model, inputs = kernelized(make)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled.eval()(**inputs), model(**inputs))
    expected = step(model.train(), inputs, model)
    found = step(model, inputs, compiled)
    assert len(found) == len(expected) > 10
    assert all(map(torch.equal, found, expected))


class Block(nn.Module):
    """Little for the compiler to do around our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(32), llmkern.reference.MultiHeadAttention(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return self.attention(x, x, x)[0]


def test_inductor_trains_it_in_one_graph():
    model, inputs = kernelized(lambda: (Block(), {"x": HIDDEN}))
    expected = step(model, inputs, model)
    found = step(model, inputs, torch.compile(model, fullgraph=True, options=QUICK))
    assert len(found) == len(expected) == 11
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("scheme", [None, "outliers", "groups"])
def test_exported_in_int8(scheme):
    model, inputs = kernelized(llama)
    if scheme is not None:
        llmkern.quantize_model(model.eval(), scheme=scheme, skip=("lm_head",))
    exported = torch.export.export(model.eval(), (), inputs)
    assert any("int8_linear" in str(node.target) for node in exported.graph.nodes) == (scheme is not None)
    with torch.no_grad():
        assert torch.equal(exported.module()(**inputs), model(**inputs))


@pytest.mark.parametrize("make", [transformer, llama, t5])
def test_exported_it_is_one_graph_of_our_operators(make):
    model, inputs = kernelized(make)
    exported = torch.export.export(model.eval(), (), inputs)
    called = {str(node.target).split(".")[1] for node in exported.graph.nodes if "llmkern." in str(node.target)}
    assert called
    with torch.no_grad():
        assert torch.equal(exported.module()(**inputs), model(**inputs))


def test_exported_with_sizes_left_open():
    model, inputs = kernelized(llama)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=512)
    sizes = {name: {0: batch, 1: length} for name in inputs}
    model, fixed = model.model.eval(), {"use_cache": False}
    exported = torch.export.export(
        model, (), inputs | fixed, dynamic_shapes=sizes | dict.fromkeys(fixed), strict=False
    ).module()
    for rows, columns in ((2, 7), (3, 12)):
        more = {"input_ids": torch.randint(3, 60, (rows, columns)), "attention_mask": torch.ones(rows, columns).long()}
        more["attention_mask"][0, :2] = 0
        with torch.no_grad():
            torch.testing.assert_close(exported(**more, **fixed).logits, model(**more, **fixed).logits)
