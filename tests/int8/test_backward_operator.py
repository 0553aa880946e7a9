"""torch.ops.llmkern.int8_linear_backward as torch sees it: opcheck, bad inputs, compile, its own gradient, vmap."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from llmkern.int8 import reference
from llmkern.int8.backward import input_gradient
from tests.int8.bad_inputs import BACKWARD, t
from tests.int8.cases import quantized

OP = torch.ops.llmkern.int8_linear_backward


def arguments(rows=5, depth=64, outputs=17, dtype=torch.float32, group=0, rotate=1):
    weight, scale = quantized(torch.randn(outputs, depth), group)
    return torch.randn(rows, outputs).to(dtype), weight, scale, group, rotate


def test_opcheck():
    grad, *rest = arguments()
    opcheck(OP, (grad.requires_grad_(), *rest))
    opcheck(OP, (grad.detach().view(5, 1, 17), *rest))
    opcheck(OP, arguments(dtype=torch.bfloat16, group=32))
    opcheck(OP, arguments(rotate=2))


@pytest.mark.parametrize("mode", ["eager", "fake"])
@pytest.mark.parametrize(("changed", "error", "words"), BACKWARD.values(), ids=BACKWARD)
def test_bad_inputs(changed, error, words, mode):
    given = {"grad": t(2, 4), "weight": t(4, 8, dtype=torch.int8), "weight_scale": t(4), "group": 0, "rotate": 1}
    given |= changed
    if mode == "fake":
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        given = {k: fake.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    with pytest.raises(error) as raised:
        input_gradient(**given)
    assert all(word in str(raised.value) for word in words), str(raised.value)


@pytest.mark.parametrize(("group", "rotate"), [(0, 1), (32, 1), (0, 2)])
def test_compile_fullgraph(group, rotate):
    grad, *rest = arguments(group=group, rotate=rotate)

    def function(grad):
        return input_gradient(grad * 2, *rest).square()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(grad), function(grad))
    grad.requires_grad_()
    (expected,), (got,) = (torch.autograd.grad(f(grad).sum(), grad) for f in (function, compiled))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("rotate", [1, 2])
def test_its_gradient_is_that_of_the_reference(rotate):
    grad, *rest = arguments(rotate=rotate)
    grad, weight = grad.requires_grad_(), torch.randn(5, 64)
    function, plain = ((f(grad, *rest) * weight).sum() for f in (input_gradient, reference.input_gradient))
    (got,), (expected,) = (torch.autograd.grad(y, grad) for y in (function, plain))
    torch.testing.assert_close(got, expected)


def test_vmap_and_no_rows():
    grad, *rest = arguments()
    stacked = torch.stack([grad, 2 * grad], 1)
    got = torch.func.vmap(lambda g: input_gradient(g, *rest), in_dims=1)(stacked)
    # All rows together; torch's product promises no bits of fewer, and has others on some processors.
    torch.testing.assert_close(got, torch.stack([input_gradient(g, *rest) for g in (grad, 2 * grad)]))
    assert input_gradient(grad[:0], *rest).shape == (0, 64)
