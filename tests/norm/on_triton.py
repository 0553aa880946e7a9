"""What holds of the Triton kernels of this family however they are run: in the interpreter, and as PTX."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.norm import reference, triton_launch
from llmkern.verify import verify
from tests.norm.cases import inputs, normalise


def forward(run, centred: bool, offset: float = 0.0):
    """A function of (x, residual, weight, bias), as tests.norm.cases.normalise, whose launches `run` runs."""

    def function(x, residual, weight, bias):
        out, total, statistics = triton_launch.norm(run, x, residual, weight, bias, 1e-5, offset, centred)
        assert not out.numel() or statistics.isfinite().all()
        return out if residual is None else (out, total)

    return function


def hold_forward(run, shape, dtype: torch.dtype, centred: bool, offset: float = 0.0, weights=None, bare=False) -> None:
    given = inputs(shape, dtype, weights)
    given = (given[0], None, None, None) if bare else given if centred else (*given[:3], None)
    plain = normalise(centred, plain=True, offset=offset)
    verify(forward(run, centred, offset), plain, given, gradients=False).raise_if_failed()


def wanted(found, weight, with_bias: bool):
    """The gradients without those of a weight and a bias that are not there."""
    return found[0], *([found[1]] if weight is not None else []), *([found[2]] if with_bias else [])


def backward(run, centred: bool, offset: float, with_bias: bool):
    def function(grad, grad_total, total, weight, statistics):
        found = triton_launch.norm_backward(
            run, grad, grad_total, total, weight, statistics.float(), 1e-5, offset, centred, with_bias
        )
        return wanted(found, weight, with_bias)

    return function


def plain_backward(centred: bool, offset: float, with_bias: bool):
    def function(grad, grad_total, total, weight, statistics):
        found = reference.norm_backward(grad, grad_total, total, weight, statistics, 1e-5, offset, centred, with_bias)
        return wanted(found, weight, with_bias)

    return function


def hold_backward(run, shape, dtype: torch.dtype, centred: bool, offset: float = 0.0, weights=None, bare=False) -> None:
    total, grad, weight, _ = inputs(shape, dtype, weights)
    statistics = reference.norm(total, None, None, None, 1e-5, 0.0, centred)[2]
    grad_total = torch.randn(shape).to(dtype)
    given: tuple[Tensor | None, ...] = (grad, grad_total, total, weight, statistics)
    if bare:
        given = (grad, None, total, None, statistics)
    options = centred, offset, centred and not bare
    verify(backward(run, *options), plain_backward(*options), given, gradients=False).raise_if_failed()
