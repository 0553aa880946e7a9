"""Named shapes, layouts and functions that the tests of this family share."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from llmkern.norm import op, reference

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
#: LayerNorm and RMSNorm.
KINDS = {"LayerNorm": True, "RMSNorm": False}
SHAPES = {
    "one of everything": (1, 1),
    "usual": (33, 64),
    "primes": (3, 7, 37),
    "around a vector": (5, 17),
    "a row of four chains and a rest": (2, 3, 203),
    "no rows": (0, 8),
    "no columns": (3, 0),
    "one dimension": (24,),
    "many rows": (2100, 8),
    "wide": (2, 1030),
}


def inputs(shape: tuple[int, ...], dtype: torch.dtype, weights: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """x, residual, weight and bias; rows that do not lie around 0."""
    x, residual = torch.randn(shape).to(dtype) * 3 + 2, torch.randn(shape).to(dtype)
    return x, residual, *(torch.randn(shape[-1]).to(weights or dtype) for _ in range(2))


def normalise(centred: bool, plain: bool = False, eps: float = 1e-5, offset: float = 0.0):
    """A function of (x, residual, weight, bias) that gives out and, with a residual, the total."""
    function = reference.norm if plain else torch.ops.llmkern.norm
    return partial(_call, function, centred, eps, offset)


def _call(function, centred, eps, offset, x, residual, weight, bias):
    out, total, _ = function(x, residual, weight, bias, eps, offset, centred)
    return out if residual is None else (out, total)


def public(centred: bool):
    """The same by the public functions, whose eager calls take the short way."""

    def function(x, residual, weight, bias):
        if centred:
            return op.layer_norm(x, weight, bias, residual=residual)
        return op.rms_norm(x, weight, 1e-5, residual=residual)

    return function


LAYOUTS = {
    "rows apart": lambda t: torch.nn.functional.pad(t, (0, 5), value=7.0)[..., : t.size(-1)],
    "dimensions swapped": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "width outermost": lambda t: t.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "every second": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t),
}
