"""The operators as torch sees them: opcheck, compile, export, forward mode."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

import llmkern
from llmkern.functional import rotary
from llmkern.positional import reference
from llmkern.positional.op import sinusoidal_add
from tests.positional.cases import rotary_inputs, sinusoidal_inputs

OPS = torch.ops.llmkern
SEED = torch.tensor(7)


def test_opcheck_sinusoidal():
    x, pe = sinusoidal_inputs((5, 2, 12), torch.float32)
    opcheck(OPS.sinusoidal_add, (x.requires_grad_(), pe.requires_grad_(), None, 1.5, 0.0))
    opcheck(OPS.sinusoidal_add, (x, pe, SEED, 1.5, 0.25))
    opcheck(OPS.sinusoidal_dropout, (x, SEED, 1.5, 0.25))


def test_opcheck_rotary():
    q, k, cos, sin = rotary_inputs((2, 4, 2, 5, 16, 12), torch.float32)
    opcheck(OPS.rotary_, (q.clone(), k.clone(), cos, sin, None, True, False))
    opcheck(OPS.rotary, (q.requires_grad_(), k.requires_grad_(), cos, sin, None, False, False))
    opcheck(OPS.rotary, (q, None, cos, sin, torch.tensor([1, 0, 9, 3, 3]), True, True))
    opcheck(OPS.rotary, (q, k, cos.requires_grad_(), sin.requires_grad_(), None, True, False))


@pytest.mark.parametrize("inplace", [False, True])
def test_compile_fullgraph(inplace):
    def function(q, k, cos, sin):
        q, k = q * 2, k * 2
        a, b = rotary(q, k, cos, sin, inplace=inplace)
        return a + q if inplace else a, b

    q, k, cos, sin = rotary_inputs((2, 4, 2, 5, 16, 16), torch.float32)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for x, y in zip(compiled(q, k, cos, sin), function(q, k, cos, sin), strict=True):
        assert torch.equal(x, y)


def test_compiled_gradients():
    x, pe = sinusoidal_inputs((5, 2, 12), torch.float32)
    x.requires_grad_()
    function = lambda x: sinusoidal_add(x, pe, scale=3.0, dropout_p=0.5, seed=SEED).square().sum()  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    (expected,), (grad,) = (torch.autograd.grad(f(x), x) for f in (function, compiled))
    torch.testing.assert_close(grad, expected)


def test_export():
    module = llmkern.PositionalEncoding(16, scale=4.0).eval()
    x = torch.randn(5, 2, 16)
    assert torch.equal(torch.export.export(module, (x,)).module()(x), module(x))


def test_second_derivatives():
    """Both operators are linear: their gradient's gradient is a call of the same kind."""
    q, k, cos, sin = rotary_inputs((1, 2, 2, 3, 8, 8), torch.float32)
    leaf = q.requires_grad_()
    (grad,) = torch.autograd.grad(rotary(leaf, k, cos, sin)[0].pow(3).sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), leaf)

    def plain(x):
        return reference.rotary(x, None, cos, sin)[0].pow(3).sum()

    (expected,) = torch.autograd.grad(plain(leaf), leaf, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(expected.sum(), leaf)[0])


def test_forward_mode_is_refused():
    q, k, cos, sin = rotary_inputs((1, 2, 2, 3, 8, 8), torch.float32)
    x, pe = sinusoidal_inputs((3, 1, 8), torch.float32)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda q: rotary(q, k, cos, sin)[0], (q,), (q,))
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda q: rotary(q * 1, k, cos, sin, inplace=True)[0], (q,), (q,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        rotary(q, torch.autograd.forward_ad.make_dual(k, k), cos, sin, inplace=True)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: sinusoidal_add(x, pe), (x,), (x,))


def test_autocast_leaves_the_dtype():
    q, k, cos, sin = rotary_inputs((1, 2, 2, 3, 8, 8), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert rotary(q, k, cos, sin)[0].dtype == torch.bfloat16
