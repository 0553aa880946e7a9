"""The operators as torch sees them: opcheck, compile, export, second derivatives, bad input, the modules."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import llmkern
from llmkern.norm import op
from llmkern.verify import verify
from tests.norm.bad_inputs import LAYER_NORM, t
from tests.norm.cases import FLOATS, KINDS, inputs, normalise

OPS = torch.ops.llmkern
BOTH = pytest.mark.parametrize("centred", KINDS.values(), ids=KINDS)


@BOTH
def test_opcheck(centred):
    given = tuple(x.requires_grad_() for x in inputs((5, 12), torch.float32))
    opcheck(OPS.norm, (*given, 1e-5, 0.0, centred))
    opcheck(OPS.norm, (given[0], None, None, None, 1e-5, 0.0, centred))
    x, residual, weight, _ = (x.detach().requires_grad_() for x in given)
    statistics = OPS.norm(x, None, None, None, 1e-5, 0.0, centred)[2].detach()
    opcheck(OPS.norm_backward, (x, residual, x, weight, statistics, 1e-5, 0.0, centred, True))
    opcheck(OPS.norm_backward, (x, None, x, None, statistics, 1e-5, 1.0, centred, False))


@BOTH
def test_compile_fullgraph(centred):
    def function(x, residual, weight, bias):
        y = op.layer_norm(x * 2, weight, bias) if centred else op.rms_norm(x * 2, weight, offset=1.0)
        out, total = op.rms_norm(y, weight, residual=residual)
        return (out * total).sum()

    given = [x.requires_grad_() for x in inputs((5, 12), torch.float32)]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    used = given if centred else given[:3]
    expected, got = (torch.autograd.grad(f(*given), used) for f in (function, compiled))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@BOTH
def test_export(centred):
    module = (llmkern.LayerNorm if centred else llmkern.RMSNorm)(16)
    x = torch.randn(5, 16)
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},)).module()
    assert torch.equal(exported(x), module(x)) and torch.equal(exported(x[:2]), module(x[:2]))


@BOTH
def test_second_derivatives(centred):
    given = [x.double().requires_grad_() for x in inputs((3, 7), torch.float32)]
    singles = [x.detach().float().requires_grad_() for x in given]

    def second(leaves, plain):
        out, total = normalise(centred, plain)(*leaves)
        grads = torch.autograd.grad((out.sin() * total).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    for got, expected in zip(second(singles, False), second(given, True), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_forward_mode_is_refused():
    x, _, weight, _ = inputs((3, 8), torch.float32)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: op.rms_norm(x, weight), (x,), (x,))


@pytest.mark.parametrize("mode", ["eager", "fake"])
@pytest.mark.parametrize(("changed", "error", "words"), LAYER_NORM.values(), ids=LAYER_NORM)
def test_bad_input(changed, error, words, mode):
    arguments = {"x": t(3, 8), "weight": t(8), "bias": t(8), **changed}
    if mode == "fake":
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        arguments = {k: fake.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(error) as raised:
        op.layer_norm(**arguments)
    assert all(word in str(raised.value) for word in words), str(raised.value)
    if "bias" not in changed and mode == "eager":
        arguments.pop("bias")
        with pytest.raises(error) as raised:
            op.rms_norm(**arguments)
        assert all(word in str(raised.value) for word in words), str(raised.value)


def test_a_bad_offset():
    with pytest.raises(TypeError, match="offset: expected a number, got 'a'"):
        op.rms_norm(t(3, 8), offset="a")
    with pytest.raises(ValueError, match="offset: expected a finite number, got inf"):
        op.rms_norm(t(3, 8), offset=float("inf"))


MODULES = {
    "LayerNorm": (llmkern.LayerNorm, torch.nn.LayerNorm, (24,), {}),
    "LayerNorm without bias": (llmkern.LayerNorm, torch.nn.LayerNorm, (24,), {"bias": False}),
    "LayerNorm of two dimensions": (llmkern.LayerNorm, torch.nn.LayerNorm, ((3, 24),), {}),
    "LayerNorm without weights": (llmkern.LayerNorm, torch.nn.LayerNorm, (24,), {"elementwise_affine": False}),
    "RMSNorm": (llmkern.RMSNorm, torch.nn.RMSNorm, (24,), {}),
    "RMSNorm of two dimensions": (llmkern.RMSNorm, torch.nn.RMSNorm, ([3, 24],), {"eps": 1e-3}),
    "RMSNorm without weights": (llmkern.RMSNorm, torch.nn.RMSNorm, (24,), {"elementwise_affine": False}),
}


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize(("fast", "plain", "arguments", "options"), MODULES.values(), ids=MODULES)
def test_modules(fast, plain, arguments, options, dtype, isa):
    fast, plain = (m(*arguments, **options) for m in (fast, plain))
    for p in plain.parameters():
        torch.nn.init.normal_(p)
    fast.load_state_dict(plain.state_dict())
    assert list(fast.state_dict()) == list(plain.state_dict()) and repr(fast) == repr(plain)
    fast, plain = fast.to(dtype), plain.to(dtype)
    x = torch.randn(5, 3, 24).to(dtype)
    if dtype != torch.float64:
        verify(fast, plain, x).raise_if_failed()
    else:
        assert torch.equal(fast(x), plain(x))
    out, total = fast(x, residual=x * 2)
    assert torch.equal(total, x + x * 2) and torch.equal(out, fast(total))


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_modules_under_autocast(name, dtype, autocast, isa):
    fast, plain = getattr(llmkern, name)(24), getattr(torch.nn, name)(24)
    x = torch.randn(5, 24).to(dtype)
    with torch.autocast("cpu", autocast):
        assert fast(x).dtype == plain(x).dtype
        verify(fast, plain, x, gradients=False).raise_if_failed()


def test_what_torch_refuses_is_torchs_to_say():
    for module, plain in ((llmkern.LayerNorm(8), torch.nn.LayerNorm(8)), (llmkern.RMSNorm(8), torch.nn.RMSNorm(8))):
        for x in (torch.randn(3, 7), [1.0], torch.ones(3, 8, dtype=torch.int64)):
            with pytest.raises((RuntimeError, TypeError)) as expected:
                plain(x)
            with pytest.raises(type(expected.value)) as raised:
                module(x)
            assert str(raised.value) == str(expected.value)
