"""Gated activations in plain PyTorch: what every kernel of this family is held to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """f(gate) * up; gate and up of one shape and dtype."""
    return FUNCTIONS[activation](gate) * up


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up from that of f(gate) * up."""
    value, slope = _value_and_slope(gate.to(torch.promote_types(gate.dtype, torch.float32)), activation)
    return (grad * up * slope).to(gate.dtype), (grad * value).to(gate.dtype)


def _value_and_slope(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """f(x) and f'(x)."""
    value = FUNCTIONS[activation](x)
    if activation == "relu":
        return value, (x > 0).to(x.dtype) + x * 0
    if activation == "silu":
        sigmoid = x.sigmoid()
        return value, sigmoid * (1 + x * (1 - sigmoid))
    if activation == "gelu":
        return value, torch.special.ndtr(x) + x * torch.exp(-0.5 * x * x) / (2 * torch.pi) ** 0.5
    inner = (8 / torch.pi) ** 0.5 * x * (1 + 0.044715 * x * x)
    sigmoid = inner.sigmoid()
    return value, sigmoid * (1 + x * (1 - sigmoid) * (8 / torch.pi) ** 0.5 * (1 + 3 * 0.044715 * x * x))
