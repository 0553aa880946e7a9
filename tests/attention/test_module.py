"""MultiHeadAttention as a drop-in: outputs, weights and gradients of the plain one, and its state_dict."""

from __future__ import annotations

import pytest
import torch

import llmkern
from llmkern import reference
from llmkern.verify import verify

MASKS = {
    "none": None,
    "integers": torch.tril(torch.ones(9, 9, dtype=torch.int64)),
    "floats": torch.tril(torch.ones(1, 9, 9)),
    "padding": (torch.arange(9) < torch.tensor([[9], [4], [0]]))[:, None, None, :],
    "empty rows": (torch.arange(81).view(1, 1, 9, 9) % 4 > 0) & (torch.arange(9) != 5)[:, None],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_outputs_weights_and_gradients(mask, dtype, isa):
    fast = llmkern.MultiHeadAttention(48, 4).to(dtype)
    x = torch.randn(3, 9, 48, dtype=dtype)
    verify(fast, None, (x, x, x, mask)).raise_if_failed()


def test_without_weights_and_other_lengths(isa):
    fast = llmkern.MultiHeadAttention(48, 4)
    plain = reference.MultiHeadAttention(48, 4)
    plain.load_state_dict(fast.state_dict())
    q, k, v = torch.randn(2, 5, 48), torch.randn(2, 11, 48), torch.randn(2, 11, 48)
    output, weights = fast(q, k, v, need_weights=False)
    assert weights is None
    assert torch.equal(output, fast(q, k, v)[0])
    lengths = torch.tensor([11, 4])
    mask = (torch.arange(11) < lengths[:, None])[:, None, None]
    torch.testing.assert_close(fast(q, k, v, key_lengths=lengths)[0], plain(q, k, v, mask)[0])
    x = torch.randn(2, 5, 48)
    torch.testing.assert_close(fast(x, x, x, is_causal=True)[1], plain(x, x, x, torch.ones(5, 5).tril())[1])


def test_state_dicts_load_both_ways():
    fast, plain = llmkern.MultiHeadAttention(16, 2), reference.MultiHeadAttention(16, 2)
    plain.load_state_dict(fast.state_dict(), strict=True)
    fast.load_state_dict(plain.state_dict(), strict=True)
