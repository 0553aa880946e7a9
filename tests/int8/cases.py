"""Named shapes and rows that the tests of this family share."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.int8 import reference

FLOATS = [torch.float32, torch.bfloat16, torch.float16]

# (M, K, N)
SHAPES = {
    "one of everything": (1, 1, 1),
    "one row": (1, 768, 96),
    "few rows": (4, 64, 65),
    "every count of rows up to twice a tile": (13, 33, 17),
    "primes": (7, 131, 67),
    "around a panel": (5, 256, 129),
    "many rows": (515, 48, 80),
    "a tile of AMX and a row": (17, 200, 130),
    "two tiles of AMX and a row": (33, 320, 96),
    "no rows": (0, 8, 4),
    "no columns": (3, 0, 4),
    "no outputs": (3, 8, 0),
}


# How inputs become integers: keyword arguments of int8_linear.
QUANTIZATIONS = {
    "outliers": {},
    "row": {"inputs": "row"},
    "symmetric": {"inputs": "symmetric"},
    "static": {"inputs": "static", "input_scale": torch.tensor([0.02, 131.0])},
    "16bit": {"inputs": "16bit"},
    "groups of 32": {"inputs": "symmetric", "group": 32},
    "groups of 96": {"inputs": "symmetric", "group": 96},
    "groups of 128": {"inputs": "symmetric", "group": 128},
    "groups of 64 by row": {"inputs": "row", "group": 64},
    "rotated": {"inputs": "row", "rotate": 4},
    "rotated outliers": {"rotate": 2},
}


def with_outliers(x: Tensor) -> Tensor:
    """Some rows get values far outside the others': in a channel that rows share, one of a row's own, both signs."""
    x = x.clone()
    rows, depth = x.shape
    if rows and depth:
        x[::2, depth // 3] *= 40
        x[torch.arange(0, rows, 3), torch.arange(0, rows, 3) * 7 % depth] = -30
    return x


def quantized(weight: Tensor, group: int = 0, **_: object) -> tuple[Tensor, Tensor]:
    return reference.quantize_weight(weight, group)


def positional(input_scale=None, inputs="outliers", group=0, rotate=1, activation="none", residual=None):
    """Those keyword arguments in the order of the operator and the reference."""
    return residual, input_scale, inputs, group, rotate, activation


def inputs(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, depth, outputs = shape
    weight, scale = reference.quantize_weight(torch.randn(outputs, depth))
    return torch.randn(rows, depth).to(dtype), weight, scale, torch.randn(outputs)


def row_kinds(depth: int) -> dict[str, Tensor]:
    """Rows whose quantisation has something special."""
    ramp = torch.linspace(-1, 1, depth)
    return {
        "zeros": torch.zeros(depth),
        "one constant": torch.full((depth,), 3.7),
        "one negative constant": torch.full((depth,), -0.01),
        "positive alone": ramp + 1.5,
        "negative alone": ramp - 1.5,
        "an outlier": torch.cat([ramp[:-1] * 1e-3, torch.tensor([1e4])]),
        "halves": torch.arange(depth) % 256 - 0.5,  # ties everywhere
        "subnormal": ramp * 1e-39,
        "smallest with a scale": ramp * 255 * 2.0**-126,
        "huge": ramp * 1e36,
        "range beyond float32": ramp * 3e38,
        "infinite": torch.where(torch.arange(depth) == 1, torch.inf, ramp),
        "negative infinite": torch.where(torch.arange(depth) == depth - 1, -torch.inf, ramp),
        "nan first": torch.where(torch.arange(depth) == 0, torch.nan, ramp),
        "nan last": torch.where(torch.arange(depth) == depth - 1, torch.nan, ramp),
    }


def of_scheme(shape: tuple[int, int, int], dtype: torch.dtype, kw: dict) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x with outliers, a weight and its scales as those keyword arguments want them, and a bias."""
    x, _, _, bias = inputs(shape, dtype)
    return with_outliers(x), *quantized(torch.randn(shape[2], shape[1]), **kw), bias


def plain(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, **kw: object) -> Tensor:
    """The reference with the operator's keyword arguments."""
    return reference.int8_linear(x, weight, scale, bias, *positional(**kw))
