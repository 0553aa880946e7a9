"""torch's own inputs for the tests of its modules (torch.testing._internal.common_modules), given to kernelized ones"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal import common_modules

import llmkern
from llmkern.verify import verify

KINDS = (
    nn.LayerNorm, nn.RMSNorm, nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder,
    nn.TransformerDecoderLayer, nn.Transformer,
)  # fmt: skip
INFOS = [info for info in common_modules.module_db if info.module_cls in KINDS]


def test_every_kind_is_there():
    assert {info.module_cls for info in INFOS} == set(KINDS)


def cases(info, dtype, training):
    """Of each of torch's inputs the module, its kernelized twin, and the arguments of their forward."""
    given = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)
    for case in given:
        if case.forward_input is None:
            continue
        made = copy.deepcopy(case.constructor_input)
        torch.manual_seed(0)
        plain = info.module_cls(*made.args, **made.kwargs).to(dtype).train(training)
        fast = copy.deepcopy(plain)
        assert llmkern.kernelize(fast).replaced
        yield plain, fast, case.forward_input.args, case.forward_input.kwargs


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.module_cls.__name__)
def test_results_and_gradients(info, dtype, training):
    for plain, fast, args, kwargs in cases(info, dtype, training):
        verify(fast, plain, args, kwargs).raise_if_failed()


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.module_cls.__name__)
def test_inference(info):
    """Without gradients torch takes functions of its own, fused and nested."""
    for plain, fast, args, kwargs in cases(info, torch.float32, False):
        verify(fast, plain, args, kwargs, gradients=False).raise_if_failed()


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.module_cls.__name__)
def test_float64_is_torchs(info):
    """No kernel has float64: it is as precise as torch's."""
    for plain, fast, args, kwargs in cases(info, torch.float64, True):
        for a, b in zip(results(fast(*args, **kwargs)), results(plain(*args, **kwargs)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.module_cls.__name__)
def test_second_derivatives(info):
    plain, fast, args, kwargs = next(cases(info, torch.float64, True))
    with sdpa_kernel(SDPBackend.MATH):  # torch's fused attention, which float64 is left to, has no second derivative
        found = second_derivatives(fast, args, kwargs)
        expected = second_derivatives(plain, args, kwargs)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def second_derivatives(module, args, kwargs):
    leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad] + list(module.parameters())
    value = sum(r.square().sum() for r in results(module(*args, **kwargs)))
    gradients = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
    return torch.autograd.grad(sum(g.sin().sum() for g in gradients if g is not None), leaves, allow_unused=True)


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.module_cls.__name__)
def test_saved_as_a_whole_and_as_a_state(info):
    plain, fast, args, kwargs = next(cases(info, torch.float32, False))
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    plain.load_state_dict(fast.state_dict())
    llmkern.restore(again)
    assert [type(m) for m in again.modules()] == [type(m) for m in plain.modules()]
    for a, b in zip(results(again(*args, **kwargs)), results(plain(*args, **kwargs)), strict=True):
        assert torch.equal(a, b)


def results(given):
    return [t for t in (given if isinstance(given, tuple) else (given,)) if t is not None]
