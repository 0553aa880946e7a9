"""The Transformer drop-in: state, outputs and gradients of the plain one, under every mask that torch's layers take."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import llmkern
from llmkern import reference
from llmkern.verify import verify

# Wide enough that the largest error of a row is no matter of luck.
D_MODEL = 128
CAUSAL = nn.Transformer.generate_square_subsequent_mask(7)
PADDING = torch.arange(9).expand(3, 9) >= torch.tensor([[9], [4], [1]])
MASKS = {
    "none": {},
    "causal target": {"tgt_mask": CAUSAL},
    "causal target, as a hint": {"tgt_mask": CAUSAL, "tgt_is_causal": True},
    "boolean causal target": {"tgt_mask": CAUSAL < 0},
    "padding": {"src_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING},
    "causal and padding": {"tgt_mask": CAUSAL, "tgt_key_padding_mask": PADDING[:, :7]},
    "floating padding": {"src_key_padding_mask": torch.zeros(3, 9).masked_fill(PADDING, -torch.inf)},
    "one mask for each head": {"src_mask": (torch.arange(12 * 81) % 5 == 4).view(12, 9, 9)},
    "memory mask": {"memory_mask": torch.linspace(-2, 1, 63).view(7, 9)},
}


def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    plain = reference.Transformer(D_MODEL, 4, 2).eval()
    torch.manual_seed(1)
    fast = llmkern.Transformer(D_MODEL, 4, 2).eval()
    return plain, fast


def test_the_same_seed_gives_the_same_state():
    plain, fast = (module.state_dict() for module in pair())
    assert list(plain) == list(fast)
    assert all(torch.equal(plain[name], fast[name]) for name in plain)


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_outputs_and_gradients(masks, isa):
    plain, fast = pair()
    src, tgt = torch.randn(9, 3, D_MODEL), torch.randn(7, 3, D_MODEL)
    verify(fast, plain, (src, tgt), masks).raise_if_failed()


def test_without_a_batch(isa):
    plain, fast = pair()
    verify(fast, plain, (torch.randn(9, D_MODEL), torch.randn(7, D_MODEL))).raise_if_failed()


def test_training_with_dropout_is_that_of_torch():
    plain, fast = (module.train() for module in pair())
    src, tgt = torch.randn(9, 3, D_MODEL), torch.randn(7, 3, D_MODEL)
    torch.manual_seed(2)
    expected = plain(src, tgt)
    torch.manual_seed(2)
    assert torch.equal(fast(src, tgt), expected)


@pytest.mark.parametrize("module", [reference.Transformer, llmkern.Transformer])
def test_bad_input_is_named(module):
    with pytest.raises(ValueError, match="nhead: expected a divisor of d_model = 32, got 5"):
        module(32, 5, 1)
    model = module(32, 4, 1)
    with pytest.raises(ValueError, match=r"src: expected .* d_model = 32, got shape \(9, 3, 31\)"):
        model(torch.randn(9, 3, 31), torch.randn(7, 3, 32))
    with pytest.raises(ValueError, match=r"tgt: expected the batch of src"):
        model(torch.randn(9, 3, 32), torch.randn(7, 2, 32))
