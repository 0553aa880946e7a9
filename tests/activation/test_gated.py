"""Gated activations: the contract with gradients, layouts, the operator as torch sees it, bad input."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from llmkern.activation import compiled, op, reference
from llmkern.verify import verify
from tests.activation.bad_inputs import GATED, t
from tests.activation.cases import ACTIVATIONS, FLOATS, SHAPES, gated, inputs

EACH = pytest.mark.parametrize("activation", ACTIVATIONS)
OPS = torch.ops.llmkern


@EACH
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_contract(shape, dtype, activation, isa):
    verify(gated(activation), gated(activation, plain=True), inputs(shape, dtype)).raise_if_failed()


@EACH
@pytest.mark.parametrize(
    ("low", "high"), [(-90.0, -15.0), (-15.0, -4.0), (-4.0, -1.0), (-0.1, 0.1), (3.0, 12.0), (20.0, 200.0)]
)
def test_every_part_of_the_functions(low, high, activation, isa):
    """Each by itself, so that small results are held to their own size."""
    gate = torch.linspace(low, high, 4001)
    verify(
        gated(activation), gated(activation, plain=True), (gate, torch.ones(4001)), gradients=False
    ).raise_if_failed()
    if low >= -15.0:
        verify(gated(activation), gated(activation, plain=True), (gate, torch.ones(4001))).raise_if_failed()


@EACH
def test_what_is_not_finite(activation, isa):
    gate = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, 1.0, 1e30, -1e30, 0.0, -0.0] * 3)
    up = torch.ones_like(gate)
    up[3], up[4] = torch.nan, torch.inf
    verify(gated(activation), gated(activation, plain=True), (gate, up), gradients=False).raise_if_failed()


def test_the_references_gradient_is_torchs():
    for activation in ACTIVATIONS:
        gate, up = (x.double().requires_grad_() for x in inputs((5, 40), torch.float32))
        grad = torch.randn(5, 40, dtype=torch.float64)
        expected = torch.autograd.grad(reference.gated(gate, up, activation), (gate, up), grad)
        for a, b in zip(reference.gated_backward(grad, gate, up, activation), expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@EACH
@pytest.mark.parametrize("dtype", FLOATS)
def test_strides(dtype, activation, isa):
    gate, up = inputs((4, 6, 24), dtype)
    grad = torch.randn(4, 6, 24).to(dtype)
    halves = torch.cat([gate, up], -1).chunk(2, -1)
    layouts = {
        "halves of one projection": halves,
        "dimensions swapped": [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (gate, up)],
        "width outermost": [x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in (gate, up)],
        "misaligned": [torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x) for x in (gate, up)],
        "every second": [torch.stack([x, x], -1).flatten(-2)[..., ::2] for x in (gate, up)],
    }

    def results(gate, up, grad):
        leaves = [x.detach().requires_grad_() for x in (gate, up)]
        out = op.gated(*leaves, activation)
        return out, *torch.autograd.grad(out, leaves, grad)

    expected = results(gate, up, grad)
    for name, (a, b) in layouts.items():
        for of in (grad, grad.transpose(0, 1).contiguous().transpose(0, 1)):
            for x, y in zip(results(a, b, of), expected, strict=True):
                assert torch.equal(x, y), name


def test_threads_change_nothing(isa):
    gate, up = inputs((100, 500), torch.float32)
    whole = op.gated(gate, up)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(op.gated(gate, up), whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(op.gated(gate[7:9, 3:50], up[7:9, 3:50]), whole[7:9, 3:50])


def test_other_names():
    gate, up = inputs((3, 8), torch.float32)
    assert torch.equal(op.swiglu(gate, up), op.gated(gate, up)) and torch.equal(
        op.geglu(gate, up), op.gated(gate, up, "gelu")
    )
    assert torch.equal(op.geglu(gate, up, approximate="tanh"), op.gated(gate, up, "gelu_tanh"))
    with pytest.raises(ValueError, match="approximate: expected one of none, tanh, got 'sigmoid'"):
        op.geglu(gate, up, "sigmoid")


def test_the_numbers_are_those_of_the_header():
    text = compiled.__file__.rsplit("llmkern", 1)[0] + "csrc/activation/params.h"
    with open(text) as file:
        listed = file.read().split("enum class Gate : int32_t {")[1].split("}")[0]
    assert {k.strip(): int(v) for k, v in (entry.split("=") for entry in listed.split(","))} == compiled.CODES


@EACH
def test_opcheck(activation):
    gate, up = (x.requires_grad_() for x in inputs((5, 12), torch.float32))
    opcheck(OPS.gated, (gate, up, activation))
    opcheck(OPS.gated_backward, (gate, gate, up, activation))


def test_compile_fullgraph():
    function = lambda gate, up: op.swiglu(gate * 2, up).square().sum()  # noqa: E731
    given = [x.requires_grad_() for x in inputs((5, 12), torch.float32)]
    compiled_function = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(*(torch.autograd.grad(f(*given), given) for f in (compiled_function, function)), strict=True):
        torch.testing.assert_close(a, b)


@EACH
def test_second_derivatives(activation):
    def second(leaves, plain):
        grads = torch.autograd.grad(gated(activation, plain)(*leaves).sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    given = [x.double().requires_grad_() for x in inputs((3, 7), torch.float32)]
    singles = [x.detach().float().requires_grad_() for x in given]
    for got, expected in zip(second(singles, False), second(given, True), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-4)


def test_forward_mode_is_refused():
    gate, up = inputs((3, 8), torch.float32)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: op.gated(x, up), (gate,), (gate,))


@pytest.mark.parametrize("mode", ["eager", "fake"])
@pytest.mark.parametrize(("changed", "error", "words"), GATED.values(), ids=GATED)
def test_bad_input(changed, error, words, mode):
    arguments = {"gate": t(3, 8), "up": t(3, 8), "activation": "silu", **changed}
    if mode == "fake":
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        arguments = {k: fake.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(error) as raised:
        op.gated(**arguments)
    assert all(word in str(raised.value) for word in words), str(raised.value)
