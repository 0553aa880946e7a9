"""torch's own scaled_dot_product_attention, served by llmkern in unchanged code."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from llmkern import functional
from llmkern.functional import install
from tests.attention.cases import tensors

#: In a container: a module's own name for it would be replaced with the others.
HELD = [F.scaled_dot_product_attention]


@pytest.fixture(autouse=True)
def restored():
    yield
    assert F.scaled_dot_product_attention is HELD[0]


def qkv(**kwargs):
    return [t.to(**kwargs) for t in tensors((2, 4, 4, 9, 9, 16, 16))]


def test_served_counted_and_undone():
    q, k, v = qkv()
    options = [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": torch.rand(9, 9) > 0.4},
        {"attn_mask": torch.randn(9, 9)},
    ]
    expected = [HELD[0](q, k, v, **o) for o in options]
    with install() as report:
        found = [F.scaled_dot_product_attention(q, k, v, **o) for o in options for _ in range(2)][::2]
    assert report.served == 10 and not report.left
    for a, b, o in zip(found, expected, options, strict=True):
        torch.testing.assert_close(a, b)
        assert torch.equal(a, functional.scaled_dot_product_attention(q, k, v, **o))


def test_what_is_not_served_goes_to_torch_and_is_told():
    q, k, v = qkv()
    doubles = qkv(dtype=torch.float64)
    report = install()
    try:
        for _ in range(3):
            output = F.scaled_dot_product_attention(*doubles, is_causal=True)
        with torch.autocast("cpu", torch.bfloat16):
            assert F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
        torch.func.vmap(lambda q: F.scaled_dot_product_attention(q, q, q))(q)
        with pytest.raises(RuntimeError):  # torch's own error
            F.scaled_dot_product_attention(q, k[..., :5], v)
        with pytest.raises(TypeError):
            F.scaled_dot_product_attention(q, k, v, dropout_p="a")
        F.scaled_dot_product_attention(q[:, :, :, :0], k[:, :, :, :0], v)
    finally:
        report.undo()
    torch.testing.assert_close(output, HELD[0](*doubles, is_causal=True))
    assert report.served == 1
    assert [n for why, n in report.left.items() if "float64" in why] == [3]
    assert [n for why, n in report.left.items() if "autocast" in why] == [2]
    table = str(report)
    assert table.splitlines()[0].split() == ["calls", "served", "by", "why", "not", "llmkern"]
    assert "3  torch" in table and "1  llmkern" in table


def test_gradients_and_a_module_of_torch():
    layer = nn.MultiheadAttention(16, 4, batch_first=True)
    x = torch.randn(2, 9, 16, requires_grad=True)
    expected = layer(x, x, x, need_weights=False)[0]
    with install() as report:
        found = layer(x, x, x, need_weights=False)[0]
    assert report.served == 1
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        torch.autograd.grad(found.sin().sum(), [x, *layer.parameters()]),
        torch.autograd.grad(expected.sin().sum(), [x, *layer.parameters()]), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_modules_that_hold_the_function_by_name():
    module = types.ModuleType("holds_attention")
    module.attend = HELD[0]
    sys.modules["holds_attention"] = module
    try:
        with install() as report:
            assert "holds_attention" in report.modules and "torch.nn.functional" in report.modules
            assert module.attend is F.scaled_dot_product_attention is not HELD[0]
            module.attend(*qkv())
        assert report.served == 1 and module.attend is HELD[0]
        with install():
            module.attend = len  # changed meanwhile: it is not ours to restore
        assert module.attend is len
    finally:
        del sys.modules["holds_attention"]


def test_once_at_a_time():
    report = install()
    with pytest.raises(RuntimeError, match="expected it not to be installed"):
        install()
    report.undo()
    report.undo()
    with pytest.raises(KeyError), install():
        raise KeyError
    with install() as report:
        assert report.served == 0


def test_compile():
    q, k, v = qkv()

    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True) + 1

    with install():
        found = torch.compile(function, fullgraph=True, backend="aot_eager")(q, k, v)
    assert torch.equal(found, functional.scaled_dot_product_attention(q, k, v, is_causal=True) + 1)
