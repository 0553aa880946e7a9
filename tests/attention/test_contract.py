"""Outputs and gradients against the plain version in float64: every shape, mask, dtype and instruction set."""

from __future__ import annotations

import pytest
import torch

from llmkern import backend, functional
from llmkern.attention import op
from llmkern.attention.mask import Mask
from llmkern.verify import verify
from tests.attention.cases import FEATURES, RULES, SHAPES, attend, rule, tensors

HALVES = [torch.bfloat16, torch.float16]
#: Shapes that the features beyond masks are tested at.
FEATURED = [s for s in SHAPES if s not in ("head 32", "around a block", "head 256", "no width", "no value width")]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", RULES)
def test_float32(name, shape, isa):
    masks = rule(name, shape)
    for uniform in (False, True) if name in ("rows", "lengths") else (False,):
        verify(attend(uniform), attend(uniform, plain=True), tensors(shape), masks).raise_if_failed()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", RULES)
def test_half_precision(name, dtype, isa):
    for shape in (SHAPES["primes"], SHAPES["grouped heads"], SHAPES["head 32"]):
        masks = rule(name, shape, dtype)
        verify(attend(), attend(plain=True), tensors(shape, dtype), masks).raise_if_failed()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("name", FEATURES)
def test_features(name, dtype, isa):
    """Outputs and log-sum-exps, and the gradients through both; then the weights."""
    for shape in FEATURED if dtype == torch.float32 else ("grouped heads",):
        masks = rule(name, SHAPES[shape], dtype)
        # A row without keys has the log-sum-exp -inf, and autograd's own gradient through it is NaN.
        sums = "sink" in masks or ("mask" not in masks and "key_lengths" not in masks and "no keys" not in shape)
        fast, plain = attend(logsumexp=sums), attend(plain=True, logsumexp=sums)
        verify(fast, plain, tensors(SHAPES[shape], dtype), masks).raise_if_failed()
    for kinds in ({}, {"gradients": False}):
        fast, plain = attend(weights=True), attend(plain=True, weights=True)
        verify(only(1, fast), only(1, plain), tensors(SHAPES[shape], dtype), masks, **kinds).raise_if_failed()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("shape", [(2, 64, 32, 9, 20, 8, 8), (1, 64, 32, 5, 200, 8, 8)], ids=str)
@pytest.mark.parametrize("name", ["sink", "sink, rows", "everything", "everything, additive"])
def test_gradient_of_the_sink(name, shape, dtype, isa):
    masks = rule(name, shape, dtype)
    kinds = {"logsumexp": dtype == torch.float32, "sink_grad": True}
    verify(attend(**kinds), attend(plain=True, **kinds), tensors(shape, dtype), masks).raise_if_failed()
    kinds = {"weights": True, "sink_grad": True}
    fast, plain = only(1, attend(**kinds)), only(1, attend(plain=True, **kinds))
    verify(fast, plain, tensors(shape, dtype), masks).raise_if_failed()


@pytest.mark.parametrize("name", ["logsumexp", "weights", "sums", "sequences"])
def test_no_gradient_is_left_to_the_reference(name):
    """Of the log-sum-exp, of the sink through the weights, of the sums of the weights."""
    q, k, v = (t.requires_grad_() for t in tensors((2, 4, 2, 9, 12, 8, 8)))
    sink, bounds = torch.randn(4, requires_grad=True), torch.tensor([0, 4, 9])
    output, sums = functional.scaled_dot_product_attention(
        q, k, v, enable_gqa=True, learnable_sink=sink, return_logsumexp=True
    )
    described = Mask(learnable_sink=sink)
    made = {
        "logsumexp": lambda: output.sum() + sums.sum(),
        "weights": lambda: op.attention_weights(q, k, sums.detach(), described, 8**-0.5).square().sum(),
        "sums": lambda: op.attention_column_sums(q, k, sums.detach(), described, 8**-0.5).square().sum(),
        "sequences": lambda: sum(
            t.sum()
            for t in functional.attention_varlen(
                q[0].transpose(0, 1), k[0, :, :9].transpose(0, 1), v[0, :, :9].transpose(0, 1), bounds, bounds,
                learnable_sink=sink, return_logsumexp=True,
            )
        ),
    }  # fmt: skip
    with backend.use("cpu"):  # which raises where a kernel cannot serve a call
        made[name]().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() and t.grad.any() for t in (q, k, sink))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_keys_and_values_whose_average_is_not_zero(dtype, isa):
    """As trained models have them: sums of values of one sign, and gradients that cancel up to a small rest."""
    for shape in ((1, 2, 2, 60, 700, 64, 64), (1, 2, 2, 1, 512, 64, 64), (1, 2, 1, 50, 300, 24, 40)):
        q, k, v = tensors(shape, dtype)
        for keys, values in ((k, v.abs()), (k + 3, v + 3), (k + 3, v + 10)):
            verify(attend(), attend(plain=True), (q, keys, values)).raise_if_failed()
    shape = (1, 64, 64, 30, 250, 16, 16)
    q, k, v = tensors(shape, dtype)
    kinds = {"sink_grad": True}
    sink = {"sink": rule("sink", shape, dtype)["sink"]}
    verify(attend(**kinds), attend(plain=True, **kinds), (q, k + 3, v + 3), sink).raise_if_failed()


def only(index, function):
    """One of the results of a function that takes what `attend` does."""

    def one(query, key, value, mask=None, sink=None, **rest):
        return function(query, key, value, mask, sink=sink, **rest)[index]

    return one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["all", "causal", "rows", "additive"])
def test_weights_and_their_gradient(name, dtype, isa):
    shape = SHAPES["grouped heads"]
    fast, plain = attend(True, weights=True), attend(True, plain=True, weights=True)
    verify(fast, plain, tensors(shape, dtype), rule(name, shape, dtype)).raise_if_failed()


@pytest.mark.parametrize("shape", [(1, 1, 1, 5, 5), (2, 1, 1, 33, 70), (2, 6, 1, 1, 70), (1, 1, 1, 33, 1)])
def test_gradient_of_an_additive_mask_that_broadcasts(shape, isa):
    size = SHAPES["grouped heads"] if len(shape) == 5 and shape[4] != 5 else (1, 2, 2, 5, 5, 8, 8)
    mask = torch.randn(shape[:4] if len(shape) == 4 else shape[0:1] + shape[1:2] + shape[3:5])
    verify(attend(), attend(plain=True), (*tensors(size), mask)).raise_if_failed()


@pytest.mark.parametrize("factor", [1e-3, 30.0, 1e4])
def test_small_and_large_scores(factor, isa):
    q, k, v = tensors(SHAPES["around a block"])
    verify(attend(), attend(plain=True), (q * factor, k, v), {"causal": True}).raise_if_failed()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_masked_cannot_leak(dtype, isa):
    """NaN and inf in masked keys and values change nothing, bit for bit, forward and backward."""
    shape = (2, 4, 2, 70, 150, 32, 32)
    q, k, v = tensors(shape, dtype)
    grad = torch.randn(2, 4, 70, 32, dtype=dtype)
    seen = torch.rand(1, 1, 70, 150) > 0.3
    masks = {
        "lengths": ({"key_lengths": torch.tensor([100, 7])}, torch.arange(150) >= torch.tensor([[100], [7]])),
        "padding": ({"mask": (torch.arange(150) < 90)[None, None, None]}, (torch.arange(150) >= 90).expand(2, 150)),
        "causal": ({"causal": True}, (torch.arange(150) >= 70).expand(2, 150)),
        "columns": ({"mask": seen & (torch.arange(150) % 5 > 0)}, (torch.arange(150) % 5 == 0).expand(2, 150)),
    }
    for name, (mask, hidden) in masks.items():
        results = []
        for value in (0.0, torch.nan, torch.inf):
            spoiled = [t.masked_fill(hidden[:, None, :, None], value).requires_grad_() for t in (k, v)]
            query = q.clone().requires_grad_()
            output = attend()(query, *spoiled, **mask)
            results.append([output.detach(), *torch.autograd.grad(output, [query, *spoiled], grad)])
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert torch.equal(a, b), name


def test_a_nan_that_is_seen_passes_through(isa):
    q, k, v = tensors((1, 2, 2, 9, 20, 16, 16))
    v[0, 1, 3, 2], k[0, 0, 5] = torch.nan, torch.nan
    verify(attend(), attend(plain=True), (q, k, v), gradients=False).raise_if_failed()


def test_a_row_depends_on_nothing_around_it(isa):
    """Bitwise the same for any number of threads, beside other rows, and with padding behind the keys."""
    q, k, v = tensors((3, 4, 4, 90, 120, 64, 64))
    whole = attend()(q, k, v)
    assert torch.equal(whole, attend()(q, k, v))
    assert torch.equal(whole[1:2], attend()(q[1:2], k[1:2], v[1:2]))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(whole, attend()(q, k, v))
    finally:
        torch.set_num_threads(threads)
    longer = [torch.cat([t, torch.randn(3, 4, 77, 64)], 2) for t in (k, v)]
    assert torch.equal(whole, attend()(q, *longer, key_lengths=torch.full((3,), 120)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [10, 700])
def test_many_threads_give_the_bits_of_one(queries, dtype, isa):
    """Outputs and gradients: the pieces of work grow smaller with the number of threads."""
    q, k, v = (t.requires_grad_() for t in tensors((1, 2, 1, queries, 1100, 24, 40), dtype))

    def results(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            output = attend()(q, k, v, causal=True, bottom_right=True)
            return output, *torch.autograd.grad(output.square().sum(), (q, k, v))
        finally:
            torch.set_num_threads(before)

    alone = results(1)
    for threads in (3, 64):
        assert all(torch.equal(a, b) for a, b in zip(alone, results(threads), strict=True)), threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widths", [(32, 48), (64, 64), (97, 96), (200, 128)])
def test_one_query_at_a_time_gives_the_bits_of_all_at_once(widths, dtype, isa):
    """Prefill, chunks of it and decoding, over several blocks of keys, with shared key heads."""
    q, k, v = tensors((1, 4, 2, 1300, 1300, *widths), dtype)
    whole = attend()(q, k, v, causal=True)
    for begin, end in ((0, 1), (1, 30), (500, 600), (1023, 1025), (1299, 1300)):
        part = attend()(q[:, :, begin:end], k[:, :, :end], v[:, :, :end], causal=True, bottom_right=True)
        assert torch.equal(part, whole[:, :, begin:end]), (begin, end)
    last = whole[:, :, 1299:]
    longer = [torch.cat([t, torch.full((1, 2, 900, t.size(3)), torch.nan, dtype=dtype)], 2) for t in (k, v)]
    assert torch.equal(attend()(q[:, :, 1299:], *longer, key_lengths=torch.tensor([1300])), last)
    assert torch.equal(attend()(q[:, 2:, 1299:], k[:, 1:], v[:, 1:]), last[:, 2:])
