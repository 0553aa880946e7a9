"""FLOP counts of every operator against counts by hand, through the public functions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import llmkern
from llmkern.functional import (
    attention_column_sums,
    attention_varlen,
    attention_with_kvcache,
    int8_linear,
    scaled_dot_product_attention,
)

B, H, HKV, SQ, SK, D, DV = 2, 4, 2, 5, 7, 16, 12


def count(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def inputs(gradients: bool = False):
    shapes = (B, H, SQ, D), (B, HKV, SK, D), (B, HKV, SK, DV)
    return [torch.randn(s, requires_grad=gradients) for s in shapes]


def test_attention_forward_and_backward():
    assert count(lambda: scaled_dot_product_attention(*inputs(), enable_gqa=True)) == 2 * B * H * SQ * SK * (D + DV)
    both = count(lambda: scaled_dot_product_attention(*inputs(True), enable_gqa=True).sum().backward())
    assert both == 2 * B * H * SQ * SK * (D + DV) + 2 * B * H * SQ * SK * (3 * D + 2 * DV)


def test_as_torch_counts_its_own():
    q, k, v = (torch.randn(2, 4, 6, 16) for _ in range(3))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = count(lambda: F.scaled_dot_product_attention(q, k, v))
    assert count(lambda: scaled_dot_product_attention(q, k, v)) == expected > 0


def test_weights_and_their_sums():
    module, x = llmkern.MultiHeadAttention(16, 4), torch.randn(2, 5, 16)
    without = count(lambda: module(x, x, x, need_weights=False))
    assert count(lambda: module(x, x, x)) - without == 2 * 2 * 4 * 5 * 5 * 4
    q, k, v = inputs()
    lse = scaled_dot_product_attention(q, k, v, enable_gqa=True, return_logsumexp=True)[1]
    assert count(lambda: attention_column_sums(q, k, lse)) == 2 * B * H * SQ * SK * D


def test_sequences_end_to_end():
    q, k, v = torch.randn(10, 4, 16), torch.randn(14, 2, 16), torch.randn(14, 2, 12)
    bounds = torch.tensor([0, 5, 10]), torch.tensor([0, 7, 14])
    assert count(lambda: attention_varlen(q, k, v, *bounds)) == 2 * 2 * 4 * 5 * 7 * (16 + 12)


def test_a_cache():
    q, k, v = torch.randn(2, 1, 4, 16), torch.randn(2, 9, 2, 16), torch.randn(2, 9, 2, 12)
    assert count(lambda: attention_with_kvcache(q, k, v)) == 2 * 2 * 4 * 1 * 9 * (16 + 12)


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8)])
def test_int8(shape):
    x, weight, scale = torch.randn(shape), torch.ones(6, 8, dtype=torch.int8), torch.rand(6)
    assert count(lambda: int8_linear(x, weight, scale)) == 2 * x.numel() * 6
