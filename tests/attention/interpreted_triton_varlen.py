"""Triton's attention of sequences end to end in its interpreter; test_triton_varlen.py runs this file, in a process for
it."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl

from llmkern import backend
from llmkern.attention import triton_packed
from llmkern.attention.mask import Mask
from llmkern.attention.triton_configurations import Configuration
from llmkern.verify import verify
from tests.attention.on_triton import serve
from tests.attention.varlen_cases import LENGTHS, RULES, attend, packed, rule, same_bits_as_alone
from tests.emulation.triton_interpreter import interpret, round_as_hardware

round_as_hardware()
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
TILE = Configuration(32, 32, 4, 1)


@pytest.fixture(autouse=True)
def served(monkeypatch):
    serve(monkeypatch, interpret, tile=TILE)
    yield
    backend.forget_plans()


def compare(lengths, dtype, name, **options):
    tensors, bounds = packed(lengths, dtype, **options)
    mask = rule(name, tensors[0].size(1), len(lengths[0]), dtype)
    # Autograd's own gradient through a log-sum-exp of -inf, of a row without keys, is NaN.
    sums = all(lengths[1]) and name not in ("window", "everything", "bottom right")
    functions = (attend(bounds, mask, plain, sums) for plain in (False, True))
    verify(*functions, tensors).raise_if_failed()


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_shapes(lengths):
    compare(lengths, torch.float32, "causal")


@pytest.mark.parametrize("name", ["bottom right", "window", "slopes", "sink", "dropout"])
def test_rules(name):
    """Outputs, log-sum-exps and gradients: each rule in one of the dtypes, and heads in groups."""
    heads = (4, 2) if name == "dropout" else (2, 2) if name == "slopes" else (2, 1)
    compare(([9, 33], [20, 3]), FLOATS[RULES.index(name) % 3], name, heads=heads, widths=(12, 20))


@pytest.mark.parametrize("dtype", FLOATS)
def test_all_rules_together(dtype):
    compare(([19, 30], [41, 17]), dtype, "everything", widths=(12, 20))


@pytest.mark.parametrize("name", ["all", "causal", "softcap"])
def test_bits_do_not_depend_on_neighbours(name):
    """Nor do the gradients', which take another way to delta where there are few keys or queries."""
    lengths = LENGTHS["long beside short" if name == "causal" else "around tiles"]
    tensors, bounds = packed(lengths, torch.float32 if name == "all" else torch.bfloat16)
    same_bits_as_alone(tensors, bounds, rule(name, 2, len(lengths[0])))


@pytest.mark.parametrize("count", [4, 9])
def test_more_sequences_than_are_looked_at_together(count, monkeypatch):
    monkeypatch.setattr(triton_packed, "_AT_ONCE", tl.constexpr(4))
    compare(([n % 3 for n in range(count)], [(n * 5) % 7 for n in range(count)]), torch.float32, "all", heads=(1, 1))


def test_tokens_behind_the_last_sequence_are_zeros():
    """Tokens that fill up a batch of fixed size, as CUDA graphs have it; their gradients are zeros as well."""
    tensors, _ = packed(([20, 45], [20, 45]))
    shorter = [torch.tensor([0, 9, 13], dtype=torch.int32)] * 2
    leaves = [t.clone().requires_grad_() for t in tensors]
    output = attend(shorter, Mask())(*leaves)
    found = torch.autograd.grad(output, leaves, torch.ones_like(output))
    cut = [t[:13].clone().requires_grad_() for t in tensors]
    expected = attend(shorter, Mask())(*cut)
    of_cut = torch.autograd.grad(expected, cut, torch.ones_like(expected))
    for a, b in zip((output, *found), (expected, *of_cut), strict=True):
        assert torch.equal(a[:13], b) and not a[13:].any()


def test_strides_and_kinds_of_bounds():
    fused = torch.randn(20, 3, 2, 24)
    bounds = (torch.tensor([0, 7, 20]), torch.tensor([0, 12, 20], dtype=torch.int32))
    leaves = [t.contiguous().requires_grad_() for t in fused.unbind(1)]
    expected = attend(bounds, Mask(window_right=0))(*leaves)
    grad = torch.randn_like(expected)
    of_expected = torch.autograd.grad(expected, leaves, grad)
    apart = torch.stack([bounds[0], torch.full_like(bounds[0], 99)], 1)[:, 0]
    layouts = {
        "fused": (lambda t: t, bounds),
        "heads first": (lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), (bounds[0].int(), bounds[1].long())),
        "last dimension apart": (lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), (apart, bounds[1])),
    }
    for name, (layout, of_bounds) in layouts.items():
        inputs = [layout(t).detach().requires_grad_() for t in fused.unbind(1)]
        output = attend(of_bounds, Mask(window_right=0))(*inputs)
        assert torch.equal(output, expected) and output.is_contiguous(), name
        for a, b in zip(torch.autograd.grad(output, inputs, layout(grad)), of_expected, strict=True):
            assert torch.equal(a, b) and a.is_contiguous(), name


def test_what_is_masked_or_a_neighbours_has_no_part():
    """NaN and infinities in keys behind the diagonal, and in another sequence, reach no result and no gradient."""
    (q, k, v), bounds = packed(([9, 5], [20, 6]))
    results = []
    for of_keys, of_values in ((0.0, 0.0), (torch.nan, torch.inf)):
        spoiled = []
        for t, x in ((k, of_keys), (v, of_values)):
            t = t.clone()
            t[9:20], t[20:] = x, x
            spoiled.append(t)
        inputs = [t.clone().requires_grad_() for t in (q, *spoiled)]
        output = attend(bounds, Mask(window_right=0))(*inputs)[:9]
        results.append([output.detach(), *(g[:9] for g in torch.autograd.grad(output.sum(), inputs))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=2e-5, atol=2e-6)
