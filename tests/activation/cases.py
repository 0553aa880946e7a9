"""Named shapes and functions that the tests of this family share."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from llmkern.activation import op, reference

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = op.ACTIVATIONS
SHAPES = {
    "one of everything": (1, 1),
    "usual": (33, 64),
    "primes": (3, 7, 37),
    "around a vector": (5, 17),
    "no rows": (0, 8),
    "no columns": (3, 0),
    "one dimension": (24,),
    "wide": (2, 1030),
}


def inputs(shape: tuple[int, ...], dtype: torch.dtype, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    return (torch.randn(shape) * spread).to(dtype), torch.randn(shape).to(dtype)


def gated(activation: str, plain: bool = False):
    """A function of (gate, up), whose gradients are looked at too."""
    return partial(reference.gated if plain else op.gated, activation=activation)
