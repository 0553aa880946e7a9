"""torch's LayerNorm and RMSNorm on the fused kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmkern import autocast, check
from llmkern.norm import op


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm, fused; with a residual, the sum and its normalisation in one pass.

    Constructor, state_dict and results are torch's. What the kernels do not take (float64, or a weight in another
    16-bit dtype than the input's) is torch's own to serve.

    Raises what torch.nn.LayerNorm raises. Source: Ba et al. 2016, "Layer Normalization", section 3.
    """

    def __init__(
        self, normalized_shape: int | Sequence[int], eps: float = 1e-5, elementwise_affine: bool = True,
        bias: bool = True, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        shape = normalized_shape if isinstance(normalized_shape, int) else list(normalized_shape)
        super().__init__(shape, eps, elementwise_affine, bias, device, dtype)

    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Any:
        """input (..., *normalized_shape). Returns its shape and dtype; with a residual of the same shape and dtype
        (normalised sum, sum)."""
        if not _fits(self, input, residual, self.weight, self.bias):
            return _plain(super().forward, input, residual)
        x, added = (_flat(t, len(self.normalized_shape)) for t in (input, residual))
        weight, bias = (None if t is None else t.flatten() for t in (self.weight, self.bias))
        return _shaped(op.layer_norm(x, weight, bias, self.eps, residual=added), input)


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm, fused; with a residual, the sum and its normalisation in one pass.

    Constructor, state_dict and results are torch's; as `LayerNorm` otherwise. Source: Zhang and Sennrich 2019, "Root
    Mean Square Layer Normalization", section 4.
    """

    def __init__(
        self, normalized_shape: int | Sequence[int], eps: float | None = None, elementwise_affine: bool = True,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        shape = normalized_shape if isinstance(normalized_shape, int) else list(normalized_shape)
        super().__init__(shape, eps, elementwise_affine, device, dtype)

    def forward(self, x: Tensor, *, residual: Tensor | None = None) -> Any:
        """x (..., *normalized_shape). Returns its shape and dtype; with a residual of the same shape and dtype
        (normalised sum, sum)."""
        if not _fits(self, x, residual, self.weight, None):
            return _plain(super().forward, x, residual)
        eps = torch.finfo(torch.float32).eps if self.eps is None else self.eps  # torch's, in 16 bits too
        rows, added = (_flat(t, len(self.normalized_shape)) for t in (x, residual))
        weight = None if self.weight is None else self.weight.flatten()
        return _shaped(op.rms_norm(rows, weight, eps, residual=added), x)


def _fits(
    module: nn.LayerNorm | nn.RMSNorm, x: Any, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> bool:
    """Whether the kernels take the call; torch's own forward raises on what is wrong with it."""
    shape = module.normalized_shape
    if not isinstance(x, Tensor) or x.dtype not in check.FLOATS or x.layout is not torch.strided or x.is_nested:
        return False
    if x.dim() < len(shape) or tuple(x.shape[x.dim() - len(shape) :]) != tuple(shape):
        return False
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        return False
    if x.device.type != "cpu" and autocast.is_on(x.device):  # which makes float32 of 16 bits there
        return False
    given = [t for t in (weight, bias) if t is not None]
    return all(t.dtype == torch.float32 for t in given) or all(t.dtype == x.dtype for t in given)


def _plain(forward: Any, x: Tensor, residual: Tensor | None) -> Any:
    if residual is None:
        return forward(x)
    total = x + residual
    return forward(total), total


def _flat(x: Tensor | None, dimensions: int) -> Any:
    return x if x is None or dimensions == 1 else x.flatten(-dimensions)


def _shaped(result: Any, x: Tensor) -> Any:
    """No view where none is needed: FSDP2 warns of modules that return one."""
    if isinstance(result, tuple):
        return tuple(_shaped(t, x) for t in result)
    return result if result.shape == x.shape else result.view(x.shape)
