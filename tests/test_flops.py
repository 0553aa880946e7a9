"""FlopCounterMode counts the operators' matrix products: by hand here, through the public functions and modules."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import llmkern
from llmkern import functional as LF

B, H, SQ, SK, D, DV = 2, 4, 5, 7, 8, 16


def counted(function, *args, **kwargs) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*args, **kwargs)
    return counter.get_total_flops()


def dense(dv=DV, grad=False):
    q, k, v = torch.randn(B, H, SQ, D), torch.randn(B, 2, SK, D), torch.randn(B, 2, SK, dv)
    return [t.requires_grad_(grad) for t in (q, k, v)]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_attention(grad, causal):
    q, k, v = dense(grad=grad)
    run = lambda: LF.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)  # noqa: E731
    forward = 2 * B * H * SQ * SK * (D + DV)
    assert counted(run) == forward
    if grad:
        assert counted(lambda: run().sum().backward()) == forward * 7 // 2


def test_attention_counts_what_torchs_own_formula_does():
    """Torch has no formula for its kernel on the CPU; that of its other kernels takes the same shapes."""
    q, k, v = (torch.randn(B, H, s, D, requires_grad=True) for s in (SQ, SK, SK))
    torchs = sdpa_flop_count(q.shape, k.shape, v.shape)
    torchs += sdpa_backward_flop_count((B, H, SQ, D), q.shape, k.shape, v.shape)
    assert counted(lambda: LF.scaled_dot_product_attention(q, k, v).sum().backward()) == torchs


def test_weights():
    q, k, _ = dense(grad=True)
    lse = torch.zeros(B, H, SQ, dtype=torch.float64)
    rules = (None, None, None, None, None, -1, -1, False, 0.0, 0.0, 0.5, False)
    product = 2 * B * H * SQ * SK * D
    for name in ("attention_weights", "attention_column_sums"):
        run = getattr(torch.ops.llmkern, name)
        assert counted(run, q, k, lse, *rules) == product
        assert counted(lambda run=run: run(q, k, lse, *rules).sum().backward()) == 4 * product


def test_module():
    module, x = llmkern.MultiHeadAttention(16, 4), torch.randn(B, SQ, 16)
    expected = 4 * 2 * B * SQ * 16 * 16 + 4 * B * SQ * SQ * 16
    assert counted(module, x, x, x, need_weights=False) == expected


@pytest.mark.parametrize("longest", [(None, None), (4, 5)])
def test_varlen(longest):
    q, k, v = torch.randn(7, H, D), torch.randn(7, 2, D), torch.randn(7, 2, DV)
    ends_q, ends_k = torch.tensor([0, 3, 7]), torch.tensor([0, 5, 7])
    q.requires_grad_()
    forward = 2 * H * (3 * 5 + 4 * 2) * (D + DV)
    run = lambda: LF.attention_varlen(q, k, v, ends_q, ends_k, max_seqlen_q=longest[0], max_seqlen_k=longest[1])  # noqa: E731
    assert counted(run) == forward
    assert counted(lambda: run().sum().backward()) == forward * 7 // 2


@pytest.mark.parametrize(("longest", "pairs"), [((None, None), 7 * 7), ((4, 5), 2 * 4 * 5)])
def test_varlen_by_shapes_alone(longest, pairs):
    with FakeTensorMode():
        q, k, v, ends = torch.randn(7, H, D), torch.randn(7, 2, D), torch.randn(7, 2, DV), torch.zeros(3).int()
        assert counted(
            LF.attention_varlen, q, k, v, ends, ends, max_seqlen_q=longest[0], max_seqlen_k=longest[1]
        ) == 2 * H * pairs * (D + DV)


def test_kvcache():
    q, k, v = torch.randn(B, 3, H, D), torch.randn(B, 3, 2, D), torch.randn(B, 3, 2, DV)
    caches = torch.zeros(B, 12, 2, D), torch.zeros(B, 12, 2, DV)
    held = torch.tensor([4, 9])
    assert counted(LF.attention_with_kvcache, q, *caches, k, v, cache_seqlens=held) == 2 * H * 3 * 19 * (D + DV)
    assert counted(LF.attention_with_kvcache, q, *caches, cache_seqlens=held) == 2 * H * 3 * 13 * (D + DV)
    assert counted(LF.attention_with_kvcache, q, *caches) == 2 * H * 3 * 24 * (D + DV)
    table, paged = torch.arange(6).view(2, 3).int(), [c.view(6, 4, 2, -1) for c in caches]
    assert counted(LF.attention_with_kvcache, q, *paged, block_table=table) == 2 * H * 3 * 24 * (D + DV)


def test_int8_linear():
    layer, x = llmkern.Int8Linear(16, 5), torch.randn(2, 3, 16, requires_grad=True)
    assert counted(layer, x) == 2 * 6 * 16 * 5
    assert counted(lambda: layer(x).sum().backward()) == 2 * 2 * 6 * 16 * 5


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_losses_of_hidden_states(reduction):
    """As torch counts the linear layer and its gradients, whenever they are made; for "none" the logits twice."""
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(20, 8)
    targets, product = torch.randint(20, (6,)), 2 * 6 * 8 * 20
    with torch.no_grad():
        assert counted(LF.linear_cross_entropy, hidden, weight, targets, reduction=reduction) == product
    for needs in (False, True):
        weight.requires_grad_(needs)
        run = lambda: LF.linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum().backward()  # noqa: E731
        assert counted(run) == product * (2 + needs + (reduction == "none"))
    taught = torch.randn(6, 5), torch.randn(20, 5)
    assert counted(LF.linear_distillation, hidden, weight, *taught, targets) == 3 * product + 2 * 6 * 5 * 20
    assert counted(LF.cross_entropy, hidden, torch.zeros(6).long()) == 0


def test_the_formulas_are_told_whenever_the_counter_is_loaded():
    """Also where its module was looked for before, and where it is loaded anew."""
    script = """
import importlib, importlib.util, torch, llmkern
assert importlib.util.find_spec("torch.utils.flop_counter")
import torch.utils.flop_counter as counter
importlib.reload(counter)
with counter.FlopCounterMode(display=False) as mode:
    llmkern.Int8Linear(4, 3)(torch.ones(2, 4))
assert mode.get_total_flops() == 2 * 2 * 4 * 3
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


def test_elementwise_operators_count_nothing():
    assert counted(llmkern.RotaryEmbedding(8), torch.randn(1, 2, 3, 8)) == 0
    assert counted(llmkern.PositionalEncoding(8), torch.randn(3, 2, 8)) == 0
