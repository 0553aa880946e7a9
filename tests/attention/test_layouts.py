"""Any strides give the same numbers, and the output keeps the query's memory order."""

from __future__ import annotations

import pytest
import torch

from tests.attention.cases import attend, tensors

SHAPE = (2, 4, 4, 37, 37, 24, 24)


def fused_qkv(q, k, v):
    packed = torch.stack([t.transpose(1, 2) for t in (q, k, v)], 2)  # (B, S, 3, H, D)
    return tuple(packed[:, :, i].transpose(1, 2) for i in range(3))


LAYOUTS = {
    "batch, sequence, head": lambda *t: tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in t),
    "sequence, batch, head": lambda *t: tuple(x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for x in t),
    "one fused projection": fused_qkv,
    "head dimension outermost": lambda *t: tuple(x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0) for x in t),
    "misaligned": lambda *t: tuple(torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x) for x in t),
    "every second": lambda *t: tuple(torch.stack([x, x], -1).flatten(-2)[..., ::2] for x in t),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides(layout, dtype, isa):
    plain = [t.requires_grad_() for t in tensors(SHAPE, dtype)]
    strided = [t.detach().requires_grad_() for t in layout(*(t.detach() for t in plain))]
    expected, output = (attend()(*t, causal=True) for t in (plain, strided))
    assert torch.equal(output, expected)
    grad = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(output, strided, grad), torch.autograd.grad(expected, plain, grad), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 7, 8, 15, 16, 17, 31, 33, 63, 95])
@pytest.mark.parametrize("length", [3, 67])
def test_what_lies_around_the_rows_is_not_read(length, width, dtype, isa):
    def between_nan(t):
        whole = t.new_full((*t.shape[:2], t.shape[2] + 2, t.shape[3] + 2), torch.nan)
        whole[..., 1:-1, 1:-1] = t
        return whole[..., 1:-1, 1:-1]

    plain = [t.requires_grad_() for t in tensors((1, 2, 2, length, length, width, width), dtype)]
    within = [between_nan(t.detach()).requires_grad_() for t in plain]
    expected, output = (attend()(*t, causal=True) for t in (plain, within))
    assert torch.equal(output, expected)
    grad = torch.randn_like(expected)
    expected, grads = (torch.autograd.grad(o, t, grad) for o, t in ((expected, plain), (output, within)))
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_broadcast_heads_and_batches(isa):
    q, k, v = tensors((2, 4, 4, 9, 11, 16, 16))
    k, v = k[:1, :1].expand(2, 4, -1, -1), v[:, :1].expand(-1, 4, -1, -1)
    assert torch.equal(attend()(q, k, v), attend()(q, k.contiguous(), v.contiguous()))


@pytest.mark.parametrize("strides", [(0, 1, 2), (0, 2, 1), (2, 0, 1)])
def test_the_output_lies_as_the_query_does(strides, isa):
    q, k, v = (t.permute(*strides, 3).contiguous().permute(*(strides.index(i) for i in range(3)), 3)
               for t in tensors(SHAPE))  # fmt: skip
    assert attend()(q, k, v).stride() == q.stride()


def test_masks_with_any_strides(isa):
    q, k, v = tensors(SHAPE)
    mask = torch.rand(37, 37) > 0.5
    expected = attend()(q, k, v, mask=mask[None, None])
    assert torch.equal(attend()(q, k, v, mask=mask.t().contiguous().t()[None, None]), expected)
    assert torch.equal(attend()(q, k, v, mask=mask.expand(2, 4, 37, 37)), expected)
    assert torch.equal(attend()(q, k, v, mask=mask.expand(2, 4, 37, 37).contiguous()), expected)
