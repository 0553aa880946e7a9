"""Calls of the norms and of the gated activations."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.gpu.call import FLOATS, Call, Case, random
from benchmarks.gpu.steps import Setting
from llmkern import functional
from llmkern.activation import op as activation_op
from llmkern.activation import reference as activation_reference
from llmkern.norm import reference as norm_reference

EPS = {True: 1e-5, False: 1e-6}  #: of the layer norm and of the RMS norm


def row_cases(setting: Setting, small: bool) -> Iterator[Case]:
    for short, dtype in FLOATS.items():
        for shape in [(5, 70)] if small else [(4001, 4096), (1003, 5120)]:
            name = f"{','.join(map(str, shape))} {short}"
            for centred in (False, True):
                yield Case(
                    "layer norm" if centred else "rms norm", name,
                    lambda shape=shape, dtype=dtype, centred=centred: norm(setting, shape, dtype, centred),
                )  # fmt: skip
            for function in ("silu", "gelu"):
                yield Case(
                    "gated activation", f"{name} {function}",
                    lambda shape=shape, dtype=dtype, function=function: gated(setting, shape, dtype, function),
                )  # fmt: skip


def norm(setting: Setting, shape: tuple[int, int], dtype: torch.dtype, centred: bool) -> Call:
    """With a residual; what is normalised and the sum, and the gradients of all."""
    x, residual = random(setting, *shape, dtype=dtype), random(setting, *shape, dtype=dtype)
    weight, bias = random(setting, shape[1], dtype=dtype), random(setting, shape[1], dtype=dtype)

    def ours(x: Tensor, residual: Tensor, weight: Tensor, *bias: Tensor) -> tuple[Tensor, Tensor]:
        if centred:
            return functional.layer_norm(x, weight, *bias, residual=residual)
        return functional.rms_norm(x, weight, residual=residual)

    def plain(x: Tensor, residual: Tensor, weight: Tensor, *bias: Tensor) -> tuple[Tensor, Tensor]:
        eps = EPS[centred]
        return norm_reference.norm(x, residual, weight, bias[0] if bias else None, eps, 0.0, centred)[:2]

    return Call(ours, plain, (x, residual, weight, *([bias] if centred else [])), True)


def gated(setting: Setting, shape: tuple[int, int], dtype: torch.dtype, function: str) -> Call:
    """function(gate) * up, and both gradients."""
    return Call(
        lambda gate, up: activation_op.gated(gate, up, function),
        lambda gate, up: activation_reference.gated(gate, up, function),
        (random(setting, *shape, dtype=dtype), random(setting, *shape, dtype=dtype)),
        True,
    )
