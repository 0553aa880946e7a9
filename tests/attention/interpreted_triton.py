"""Triton's attention kernels in its interpreter; test_triton.py runs this file, in a process for it.

The interpreter is slow: tiles are small, and so are the shapes, which have all the tails that larger ones have.
"""

from __future__ import annotations

import pytest
import torch

from llmkern import backend, triton
from llmkern.attention import op, reference, triton_launch
from llmkern.attention.mask import Mask
from llmkern.attention.triton_configurations import Configuration
from llmkern.verify import verify
from tests.attention.cases import FEATURES, RULES, attend, rule, tensors
from tests.attention.on_triton import serve
from tests.emulation.triton_interpreter import interpret, round_as_hardware

round_as_hardware()
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
TILE = Configuration(32, 16, 4, 1)
# (B, H, Hkv, Sq, Sk, D, Dv)
SHAPES = {
    "one of everything": (1, 1, 1, 1, 1, 1, 1),
    "around tiles": (1, 1, 1, 33, 48, 16, 16),
    "grouped heads, primes": (1, 6, 2, 13, 29, 17, 23),
    "one query, many keys": (1, 2, 1, 1, 70, 32, 8),
    "wider value": (1, 1, 1, 20, 21, 8, 48),
    "no keys": (1, 2, 2, 3, 0, 16, 16),
    "no queries": (1, 2, 2, 0, 5, 16, 16),
    "no heads": (2, 0, 0, 3, 5, 16, 16),
    "no width": (1, 2, 1, 5, 20, 0, 16),
    "no value width": (1, 2, 1, 5, 20, 16, 0),
}


@pytest.fixture(autouse=True)
def served(monkeypatch):
    serve(monkeypatch, interpret, tile=TILE)
    yield
    backend.forget_plans()


def compare(shape, dtype, rules, uniform=False, **options):
    functions = (attend(uniform, plain, **options) for plain in (False, True))
    verify(*functions, tensors(shape, dtype), rules).raise_if_failed()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape):
    compare(shape, torch.float32, {"causal": True} if shape[4] else {})


NAMES = [*RULES, *FEATURES]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(n, d) for i, n in enumerate(NAMES) for d in FLOATS if FLOATS[i % 3] == d or n == "everything, additive"],
)
def test_rules(name, dtype):
    """Outputs, log-sum-exps and gradients; each rule in one of the dtypes, and all together in each."""
    at = NAMES.index(name)
    shape = (2, 2, 1, 37, 50, 24, 12) if at % 2 else (2, 2, 2, 41, 19, 12, 24)  # and rows that stay empty
    rules = rule(name, shape, dtype)
    # A row without keys has the log-sum-exp -inf, and autograd's own gradient through it is NaN.
    sums = "sink" in rules or ("mask" not in rules and "key_lengths" not in rules and "window" not in rules)
    uniform = "dropout_p" not in rules and at // 2 % 2 == 0
    compare(shape, dtype, rules, uniform, logsumexp=sums)


DESCRIBED = ["all", "causal", "lengths, bottom right", "window, bottom right", "window to the right", "sink"]


@pytest.mark.parametrize("name", DESCRIBED)
def test_through_descriptors(name, monkeypatch):
    """As sm_90 reads what goes by; the gradients have loops of their own for tiles at the edge and within."""
    described = serve_described(monkeypatch)
    at = DESCRIBED.index(name)
    dtype = (torch.bfloat16, torch.float16)[at % 2]
    shape = (2, 2, 1, 71, 70, 24, 40) if at % 3 else (2, 4, 2, 97, 50, 40, 16)
    compare(shape, dtype, rule(name, shape, dtype), "sink" not in name)
    assert described == {"attention_forward_kernel", "attention_backward_query_kernel", "attention_backward_key_kernel"}


def serve_described(monkeypatch):
    """The kernels that were given descriptors."""
    described: set[str] = set()

    def run(launch):
        described.update([launch.kernel] * any(isinstance(x, triton.Descriptor) for x in launch.arguments))
        interpret(launch)

    serve(monkeypatch, run, "sm_90", TILE)
    return described


def test_what_can_have_no_descriptor_is_read_by_addresses(monkeypatch):
    """Rows of odd lengths, broadcast heads, an address between multiples of 16 bytes: the same results."""
    described = serve_described(monkeypatch)
    q, k, v = tensors((1, 2, 2, 40, 37, 16, 16), torch.float16)
    expected = op.attention(q, k, v, Mask(window_right=0), 0.2)[0]
    assert described == {"attention_forward_kernel"}
    described.clear()
    off = torch.cat([k.new_zeros(1), k.flatten()])[1:].view_as(k)
    odd = torch.nn.functional.pad(k, (0, 1))[..., :16]
    for other in (off, odd):
        torch.testing.assert_close(op.attention(q, other, v, Mask(window_right=0), 0.2)[0], expected)
    alike = k[:, :1].expand(1, 2, 37, 16)
    torch.testing.assert_close(
        op.attention(q, alike, v, Mask(), 0.2)[0], op.attention(q, alike.clone(), v, Mask(), 0.2)[0]
    )
    assert described == {"attention_forward_kernel"}  # of the copy alone


def test_what_is_masked_has_no_part_through_descriptors(monkeypatch):
    """They do not leave out the keys behind a length."""
    described = serve_described(monkeypatch)
    q, k, v = tensors((2, 1, 1, 40, 70, 16, 16), torch.float16)
    mask, results = Mask(key_lengths=torch.tensor([40, 33])), []
    hidden = (torch.arange(70) >= torch.tensor([[40], [33]]))[:, None, :, None]
    for of_keys, of_values in ((0.0, 0.0), (torch.nan, torch.inf)):
        leaves = [q, k.masked_fill(hidden, of_keys), v.masked_fill(hidden, of_values)]
        leaves = [t.clone().requires_grad_() for t in leaves]
        output = op.attention(*leaves, mask, 0.2)[0]
        results.append([output.detach(), *torch.autograd.grad(output, leaves, torch.ones_like(output))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=2e-3, atol=2e-3)
    assert len(described) == 3


@pytest.mark.parametrize("name", ["lengths", "rows"])
def test_empty_rows_are_zeros_or_averages(name):
    shape = (3, 2, 1, 9, 40, 16, 16)
    for uniform in (False, True):
        compare(shape, torch.float32, rule(name, shape), uniform)


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_both_ways_to_delta(dtype, weighed, monkeypatch):
    """And keys and values whose average is not zero, where sums of gradients cancel up to a small rest."""
    monkeypatch.setattr(triton_launch, "from_weights", lambda *args: weighed)
    q, k, v = tensors((1, 1, 1, 33, 140, 32, 16), dtype)
    for keys, values in ((k, v), (k + 3, v + 10)):
        verify(
            attend(), attend(plain=True), (q, keys, values), {"causal": True, "bottom_right": True}
        ).raise_if_failed()


@pytest.mark.parametrize("shape", [(1, 1, 1, 33), (2, 1, 20, 1), (2, 2, 1, 33)])
def test_gradient_of_an_additive_mask_that_broadcasts(shape):
    mask = torch.randn(shape)
    verify(attend(), attend(plain=True), (*tensors((2, 2, 1, 20, 33, 16, 16)), mask)).raise_if_failed()


@pytest.mark.parametrize("name", ["sink, rows", "everything, additive"])
def test_gradient_of_the_sink(name):
    shape = (2, 16, 8, 5, 20, 8, 8)
    compare(shape, torch.float32, rule(name, shape), logsumexp=True, sink_grad=True)


@pytest.mark.parametrize("scale", [-0.5, 0.0, 3.0])
def test_scales(scale):
    inputs, mask = tensors((1, 1, 1, 33, 40, 16, 16)), Mask(window_right=0)
    truth = reference.attention(*(t.double() for t in inputs), *mask.arguments(), scale, False)
    for got, true in zip(op.attention(*inputs, mask, scale), truth, strict=True):
        torch.testing.assert_close(got, true.to(got.dtype), rtol=2e-5, atol=2e-5)


def test_the_log_sum_exp_has_more_than_float32():
    """Its error is that of the scores, not that of rounding it."""
    q, k, v = tensors((1, 1, 1, 64, 300, 16, 16))
    q, k = (t.mul(8).round().div(8) for t in (q, k))  # whose products are exact
    sums = op.attention(q, k, v, Mask(), 0.25)[1]
    truth = reference.attention(q.double(), k.double(), v.double(), *Mask().arguments(), 0.25, False)[1]
    assert (sums - truth).abs().mean() < 2**-25 * truth.abs().mean()


def test_what_is_masked_has_no_part():
    """NaN and inf in masked keys and values, and in queries that do not see a key, reach no result and no gradient."""
    q, k, v = tensors((2, 1, 1, 9, 20, 8, 8))
    seen = (torch.arange(20) % 5 > 0).expand(1, 1, 9, 20)
    hidden = {
        "lengths": ({"key_lengths": torch.tensor([18, 7])}, torch.arange(20) >= torch.tensor([[18], [7]])),
        "causal": ({"causal": True}, (torch.arange(20) >= 9).expand(2, 20)),
        "columns": ({"mask": seen}, (torch.arange(20) % 5 == 0).expand(2, 20)),
    }
    grad = torch.randn(2, 1, 9, 8)
    for name, (mask, columns) in hidden.items():
        results = []
        for of_keys, of_values in ((0.0, 0.0), (torch.nan, torch.inf)):
            spoiled = [t.masked_fill(columns[:, None, :, None], x) for t, x in ((k, of_keys), (v, of_values))]
            inputs = [t.clone().requires_grad_() for t in (q, *spoiled)]
            output = attend()(*inputs, **mask)
            results.append([output.detach(), *torch.autograd.grad(output, inputs, grad)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(b, a, rtol=2e-5, atol=2e-6, msg=lambda told, name=name: f"{name}: {told}")
    broken = q[:1].clone()
    broken[:, :, 7] = torch.nan  # sees the keys up to 7
    inputs = [t.clone().requires_grad_() for t in (broken, k[:1], v[:1])]
    output = attend()(*inputs, causal=True)
    assert output[:, :, 7].isnan().all() and output[:, :, torch.arange(9) != 7].isfinite().all()
    grads = torch.autograd.grad(output, inputs, grad[:1])
    for gradient in grads[1:]:
        assert gradient[:, :, :8].isnan().all() and gradient[:, :, 8:].isfinite().all()


def test_what_is_seen_passes_through():
    """NaN and infinities come out where the plain version has them, and nowhere else."""
    q, k, v = tensors((1, 2, 2, 9, 20, 16, 16))
    v[0, 1, 3, 2], k[0, 0, 5], v[0, 0, 7, 1], v[0, 1, 8, 1] = torch.nan, torch.nan, torch.inf, -torch.inf
    for mask in (Mask(), Mask(window_right=0)):
        results = op.attention(q, k, v, mask, 0.25)
        expected = reference.attention(q, k, v, *mask.arguments(), 0.25, False)
        for got, plain in zip(results, expected, strict=True):  # the log-sum-exp too
            torch.testing.assert_close(got, plain, equal_nan=True, rtol=1e-5, atol=1e-5)
        got = results[0]
        assert got.isnan().any() and got.isinf().any() and got.isfinite().any()


def test_strides():
    shape = (2, 2, 2, 20, 37, 16, 16)
    q, k, v = tensors(shape)
    grad = torch.randn(2, 2, 20, 16)
    layouts = {
        "as they are": lambda t: t,
        "tokens first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "off by an element": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t),
        "last dimension apart": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        "half of a wider head": lambda t: torch.cat([t, t], -1)[..., 16:],
    }
    expected = None
    for name, layout in layouts.items():
        inputs = [layout(t).detach().requires_grad_() for t in (q, k, v)]
        output, _ = op.attention(*inputs, Mask(), 0.2)
        got = [output.detach(), *torch.autograd.grad(output, inputs, layout(grad))]
        expected = expected or got
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b), name
    same = k[:1, :1].expand(2, 2, 37, 16)
    assert torch.equal(op.attention(q, same, same, Mask(), 0.2)[0],
                       op.attention(q, same.contiguous(), same.contiguous(), Mask(), 0.2)[0])  # fmt: skip


@pytest.mark.parametrize("mask", [Mask(), Mask(alibi_slopes=torch.tensor([0.5])), Mask(softcap=20.0)])
def test_tiles_of_scores_that_are_minus_infinity(mask, monkeypatch):
    """Keys with an infinite element: whole tiles of such scores come before the first finite one, without any mask."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.rand(1, 1, s, 16, generator=generator) + 0.1 for s in (20, 64, 64))
    key[0, 0, :50, 3] = -torch.inf
    serve(monkeypatch, interpret, tile=Configuration(32, 16, 4, 1))
    verify(
        lambda *args: op.attention(*args, mask, 0.25)[0],
        lambda *args: reference.attention(*args, *mask.arguments(), 0.25, False)[0],
        (query, key, value), gradients=False,
    ).raise_if_failed()  # fmt: skip
