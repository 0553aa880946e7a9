"""Errors that are too large by chance pass, and faults fail on every seed all the same (docs/numerics.md, "Chance")."""

from __future__ import annotations

import pytest
import torch

import llmkern
from llmkern.verify import plain_version, verify
from tests.test_verify import reference


@pytest.fixture
def inputs():
    return torch.randn(9, 16), torch.randn(16, 12)


def attention_report(seed, dtype, width, heads, queries, keys, mask=None):
    torch.manual_seed(seed)
    fast = llmkern.MultiHeadAttention(width, heads).to(dtype)
    query, key = torch.randn(2, queries, width).to(dtype), torch.randn(2, keys, width).to(dtype)
    return verify(fast, inputs=(query, key, key, mask))


@pytest.mark.parametrize(
    ("dtype", "width", "heads", "queries", "keys"),
    [(torch.float32, 99, 3, 1, 5), (torch.float32, 48, 3, 1, 2), (torch.bfloat16, 48, 3, 1, 5)],
)
def test_a_verdict_is_no_matter_of_the_seed(dtype, width, heads, queries, keys):
    """The gradient of w_k.bias is 0 in truth, since the softmax does not see a shift of all scores: both versions
    compute their own rounding, and by one draw of each a tenth to a third of these seeds fail."""
    reports = [attention_report(seed, dtype, width, heads, queries, keys) for seed in range(15)]
    for report in reports:
        report.raise_if_failed()
    drawn = [r for report in reports for r in report.rows if r.draws > 1]
    assert drawn and {r.name for r in drawn} <= {"w_k.bias", "w_q.bias", "w_q.weight", "w_k.weight", "query", "key"}
    assert any("quadratic means of several draws in w_k.bias" in str(report) for report in reports)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_the_example_of_the_documentation_in_half_precision(dtype, masked):
    for seed in range(8):
        mask = torch.ones(10, 10).tril() if masked else None
        attention_report(seed, dtype, 64, 4, 10, 10, mask).raise_if_failed()


def test_an_integer_that_rounding_may_tip_over_is_chance_too():
    """A quantised activation in the middle between two integers: with seed 138 several draws are needed."""
    for seed in (*range(3), 138):
        torch.manual_seed(seed)
        fast = llmkern.Transformer(32, 4, 1).eval()
        plain = plain_version(fast)
        llmkern.quantize_model(fast), llmkern.reference.quantize_model(plain)
        verify(fast, plain, (torch.randn(9, 3, 32), torch.randn(7, 3, 32))).raise_if_failed()


class Shifted(llmkern.reference.MultiHeadAttention):
    """The output is right, and the gradient of w_k.bias, which is 0, off by the given number in every element."""

    wrong = 0.0

    def forward(self, *args):
        output, weights = super().forward(*args)
        return output + self.wrong * (self.w_k.bias - self.w_k.bias.detach()).sum(), weights


@pytest.mark.parametrize(("dtype", "wrong"), [(torch.float32, 1e-7), (torch.bfloat16, 1e-3), (torch.float16, 1e-3)])
def test_a_wrong_gradient_that_should_be_zero_fails_on_every_seed(dtype, wrong):
    for seed in range(3):
        torch.manual_seed(seed)
        plain, candidate = llmkern.reference.MultiHeadAttention(64, 4).to(dtype), Shifted(64, 4).to(dtype)
        candidate.load_state_dict(plain.state_dict())
        candidate.wrong, x = wrong, torch.randn(2, 10, 64).to(dtype)
        assert [r.name for r in verify(candidate, plain, (x, x, x)).rows if not r.passed] == ["w_k.bias"]
        candidate.wrong = 0.0
        assert verify(candidate, plain, (x, x, x))


def attend(q, k, v, scale=1.0, cast=None):
    weights = torch.softmax(q @ k.transpose(0, 1) * (scale / q.shape[1] ** 0.5), -1)
    return (weights if cast is None else weights.to(cast).to(v.dtype)) @ v


@pytest.mark.parametrize(
    ("dtype", "fault"),
    [
        (torch.bfloat16, lambda q, k, v: attend(q, k, v, scale=1.02)),
        (torch.float16, lambda q, k, v: attend(q, k, v, scale=1.002)),
        (torch.float32, lambda q, k, v: attend(q, k, v, scale=1 + 1e-6)),
        (torch.float32, lambda q, k, v: attend(q, k, v, cast=torch.bfloat16)),
        (torch.bfloat16, lambda q, k, v: attend(q, k[:-1], v[:-1])),
        (torch.float32, lambda q, k, v: attend(q[:, 8:], k[:, 8:], v, scale=(1 - 8 / 32) ** 0.5)),
    ],
    ids=["scale", "scale in fp16", "scale in fp32", "weights in bf16", "the last key", "a dropped block"],
)
def test_small_faults_fail_on_every_seed(dtype, fault):
    for seed in range(5):
        torch.manual_seed(seed)
        inputs = [torch.randn(20, 32).to(dtype) for _ in range(3)]
        assert not verify(fault, attend, inputs), seed
        assert verify(attend, attend, inputs)


@pytest.mark.parametrize("garbage", [torch.nan, 1e-3])
def test_a_fault_that_comes_and_goes_fails(inputs, garbage):
    calls = []

    def sometimes(x, w):
        calls.append(1)
        # A little off in the first call, so that more draws are made, and garbage in one of these.
        return reference(x, w) + (2e-7 if len(calls) == 1 else garbage if len(calls) == 4 else 0.0)

    assert not verify(sometimes, reference, inputs) and len(calls) > 4


def test_arguments_that_are_refused_once_they_move_leave_the_first_verdict(inputs):
    def only_these(a, b):
        if not torch.equal(a.float(), inputs[0]):
            raise ValueError("a: expected the one x")
        return reference(a, b)

    report = verify(lambda a, b: only_these(a, b) + 3e-7, only_these, inputs)
    assert not report and all(r.draws == 1 for r in report.rows)


def test_whole_numbers_and_strides_stay_as_they_are_in_further_draws():
    x = torch.tensor([0.0, 1.0, -2.0, 0.5, torch.inf, 0.3])[::2]
    flags, seen = torch.tensor([0.0, 1.0, 1.0]), []

    def candidate(x, flags):
        seen.append((x.detach().clone(), flags.detach().clone(), x.stride()))
        return x * flags + 1e-6 * (1.0 + 5.0 * (len(seen) % 2))

    verify(candidate, lambda x, flags: x * flags, (x, flags), gradients=False)
    assert len(seen) > 4
    assert all(torch.equal(f, flags) and a[0] == 0 and a[1] == -2 and s == x.stride() for a, f, s in seen)
    assert torch.equal(x, torch.tensor([0.0, -2.0, torch.inf]))


# --- infinities and NaN
