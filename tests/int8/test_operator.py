"""The operator as torch sees it: opcheck, compile, export, autocast, forward mode."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

import llmkern
from llmkern.functional import int8_linear
from tests.int8.cases import inputs

OP = torch.ops.llmkern.int8_linear


def test_opcheck():
    x, weight, scale, bias = inputs((5, 24, 17))
    rest = (None, None, "outliers", 0, 1, "none")
    opcheck(OP, (x.requires_grad_(), weight, scale, bias.requires_grad_(), *rest))
    opcheck(OP, (x.view(5, 1, 24), weight, scale, None, *rest))
    opcheck(OP, (x.detach().bfloat16(), weight, scale, bias.detach(), *rest))


def test_compile_fullgraph_with_gradients():
    x, weight, scale, bias = inputs((5, 24, 17))
    x.requires_grad_()

    def function(x):
        return int8_linear(x * 2, weight, scale, bias).square()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), function(x))
    (expected,), (grad,) = (torch.autograd.grad(f(x).sum(), x) for f in (function, compiled))
    assert torch.equal(grad, expected)


def test_export():
    module, x = llmkern.Int8Linear(24, 17), torch.randn(5, 24)
    assert torch.equal(torch.export.export(module, (x,)).module()(x), module(x))


def test_autocast_is_torchs():
    module, plain, linear = llmkern.Int8Linear(24, 17), llmkern.reference.Int8Linear(24, 17), torch.nn.Linear(24, 17)
    plain.load_state_dict(module.state_dict())
    x = torch.randn(5, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
        assert out.dtype == plain(x).dtype == linear(x).dtype == torch.bfloat16
        assert torch.compile(module, fullgraph=True, backend="aot_eager")(x).dtype == torch.bfloat16
        with pytest.raises(TypeError, match="x: expected"):
            module([1.0])
    assert torch.equal(out, module(x.bfloat16()))
    out.sum().backward()
    assert x.grad.dtype == torch.float32


def test_forward_mode_is_refused():
    x, weight, scale, bias = inputs((5, 24, 17))
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: int8_linear(x, weight, scale, bias), (x,), (x,))


def test_inference_mode():
    module, x = llmkern.Int8Linear(24, 17), torch.randn(5, 24)
    expected = module(x).detach()
    with torch.inference_mode():
        assert torch.equal(module(x), expected)
        made_inside = llmkern.Int8Linear.from_linear(torch.nn.Linear(24, 17))
        first = made_inside(x)
        made_inside.weight.zero_()
        assert torch.equal(made_inside(x), made_inside.bias.expand(5, 17)) and not torch.equal(first, made_inside(x))
