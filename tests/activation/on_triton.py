"""What holds of the Triton kernels of this family however they are run: in the interpreter, and as PTX."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.activation import reference, triton_launch
from llmkern.verify import verify
from tests.activation.cases import inputs


def results(run, gate: Tensor, up: Tensor, grad: Tensor, activation: str) -> tuple[Tensor, ...]:
    return triton_launch.gated(run, gate, up, activation), *triton_launch.gated_backward(
        run, grad, gate, up, activation
    )


def plain(gate: Tensor, up: Tensor, grad: Tensor, activation: str) -> tuple[Tensor, ...]:
    return reference.gated(gate, up, activation), *reference.gated_backward(grad, gate, up, activation)


def hold(run, shape, dtype: torch.dtype, activation: str) -> None:
    gate, up = inputs(shape, dtype)
    verify(
        lambda *given: results(run, *given, activation), lambda *given: plain(*given, activation),
        (gate, up, torch.randn(shape).to(dtype)), gradients=False,
    ).raise_if_failed()  # fmt: skip
