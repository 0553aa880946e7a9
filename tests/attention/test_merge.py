"""Partial results over disjoint keys, merged."""

from __future__ import annotations

import pytest
import torch

from llmkern.functional import merge_attention, scaled_dot_product_attention
from llmkern.verify import verify
from tests.attention.cases import tensors

CUTS = [(0, 5), (5, 6), (6, 40), (40, 40)]


def in_parts(q, k, v, **options):
    parts = []
    for a, b in CUTS:
        of_part = {name: f(a, b) for name, f in options.items()}
        keys, values = k[:, :, a:b], v[:, :, a:b]
        parts.append(
            scaled_dot_product_attention(q, keys, values, enable_gqa=True, return_logsumexp=True, **of_part)
        )  # fmt: skip
    return merge_attention([o for o, _ in parts], [s for _, s in parts])


def whole(q, k, v):
    scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) / q.size(3) ** 0.5
    return scores.softmax(-1) @ v.repeat_interleave(2, 1), scores.double().logsumexp(-1)


def test_parts_give_the_whole_with_gradients(isa):
    q, k, v = (t.requires_grad_() for t in tensors((2, 4, 2, 9, 40, 16, 12)))
    merged, plain = in_parts(q, k, v), whole(q, k, v)
    for a, b in zip(merged, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    grads = [torch.randn_like(t) for t in plain]
    found, expected = (torch.autograd.grad(r, (q, k, v), grads) for r in (merged, plain))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_rows_without_keys():
    """Some rows see nothing of a part, some nothing at all; neither gives a NaN, nor a gradient that is one."""
    q, k, v = (t.requires_grad_() for t in tensors((1, 2, 1, 5, 40, 8, 8)))
    seen = (torch.rand(5, 40) > 0.5) & (torch.arange(5) != 2)[:, None]
    seen[3, :6] = False
    output, sums = in_parts(q, k, v, attn_mask=lambda a, b: seen[:, a:b])
    torch.testing.assert_close(output, scaled_dot_product_attention(q, k, v, seen, enable_gqa=True))
    assert output[:, :, 2].abs().max() == 0 and (sums[:, :, 2] == -torch.inf).all()
    finite = sums.isfinite()
    grads = torch.autograd.grad(output.square().sum() + sums[finite].sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)


def test_large_and_far_apart():
    outputs = [torch.full((1, 2), x) for x in (1.0, 2.0, 3.0)]
    for shift in (0.0, 5e3, -5e3):
        sums = [torch.tensor([shift + x], dtype=torch.float64) for x in (0.0, 800.0, 0.0)]
        merged, together = merge_attention(outputs, sums)
        assert torch.equal(merged, outputs[1]) and together == sums[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    parts = [torch.randn(2, 3, 5, 8, dtype=dtype) for _ in range(4)]
    sums = [torch.randn(2, 3, 5) for _ in range(4)]

    def plain(*parts):
        shares = torch.stack(sums).softmax(0).unsqueeze(-1).to(parts[0].dtype)
        return (torch.stack(parts) * shares).sum(0)

    verify(lambda *p: merge_attention(p, sums)[0], plain, parts).raise_if_failed()


def test_a_gradient_of_a_gradient():
    outputs = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    sums = [torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    inputs = (*outputs, *sums)
    assert torch.autograd.gradgradcheck(lambda *t: merge_attention(t[:3], t[3:]), inputs)
    assert torch.autograd.gradcheck(lambda *t: merge_attention(t[:3], t[3:]), inputs, check_forward_ad=True)


def test_bad_inputs():
    x, s = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    for arguments, error, message in [
        (([], []), ValueError, "logsumexps: expected as many as outputs, 0, at least one, got 0"),
        (([x], [s, s]), ValueError, "logsumexps: expected as many as outputs, 1, .* got 2"),
        (([x, x[:1]], [s, s]), ValueError, r"outputs\[1\]: expected the shape of outputs\[0\] = \(2, 3, 4\)"),
        (([x, x.double()], [s, s]), TypeError, r"outputs\[1\]: .* float32, got float64"),
        (([x], [s.half()]), TypeError, r"logsumexps\[0\]: expected dtype float32 or float64, got float16"),
        (([x], [x]), ValueError, r"logsumexps\[0\]: expected \(..., Sq\) = \(2, 3\)"),
        ((None, None), TypeError, "outputs: expected a sequence of tensors, .* got NoneType"),
        ((x, s), TypeError, "outputs: expected a sequence of tensors, .* got Tensor"),
        (([x], s), TypeError, "logsumexps: expected a sequence of tensors, .* got Tensor"),
        (([x.int()], [s]), TypeError, r"outputs\[0\]: expected dtype"),
    ]:
        with pytest.raises(error, match=message):
            merge_attention(*arguments)


def test_a_part_without_keys_takes_no_part_whatever_it_holds():
    q, k, v = tensors((1, 2, 2, 3, 8, 8, 8))
    output, sums = scaled_dot_product_attention(q, k, v, return_logsumexp=True)
    nothing = torch.full_like(output, torch.nan), torch.full_like(sums, -torch.inf)
    merged, together = merge_attention([output, nothing[0]], [sums, nothing[1]])
    assert torch.equal(merged, output)
    torch.testing.assert_close(together, sums)
