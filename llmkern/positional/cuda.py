"""Launchers of the positional CUDA kernels, each with the reason why it cannot serve a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmkern import cuda, extension
from llmkern.backend import Backend
from llmkern.positional.compiled import rotary_launcher, side_by_side
from llmkern.random import drop_below


def _unsupported(x: Tensor, *args: Any) -> str | None:
    return cuda.unsupported(x)


def _sinusoidal_add(
    x: Tensor, pe: Tensor | None, seed: Tensor | None, scale: float, dropout_p: float
) -> Callable[..., Tensor]:
    """pe None stands for zeros: the backward, which only scales and drops."""
    if not all(t is None or side_by_side(t) for t in (x, pe)):

        def contiguous(x: Tensor, pe: Tensor | None, *rest: Any) -> Tensor:
            x, pe = x.contiguous(), None if pe is None else pe.contiguous()
            return _sinusoidal_add(x, pe, *rest)(x, pe, *rest)

        return contiguous
    kernel, device = cuda.kernel("sinusoidal_add_cuda"), x.device
    length, batch, width = x.shape
    strides = (x.stride(0), x.stride(1), 0 if pe is None else pe.stride(0), batch * width, width)
    code = extension.DTYPE_CODES[x.dtype]
    drop = drop_below(dropout_p) if seed is not None else 0
    keep_scale = 0.0 if dropout_p >= 1.0 else 1.0 / (1.0 - dropout_p)

    def launch(x: Tensor, pe: Tensor | None, seed: Tensor | None, scale: float, dropout_p: float) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        kernel(
            x.data_ptr(), 0 if pe is None else pe.data_ptr(), out.data_ptr(), length, batch, width, *strides, scale,
            code, *cuda.stream(device), drop, keep_scale, 0 if seed is None else int(seed),
        )  # fmt: skip
        return out

    return launch


def _dropout(x: Tensor, seed: Tensor, scale: float, dropout_p: float) -> Callable[..., Tensor]:
    launch = _sinusoidal_add(x, None, seed, scale, dropout_p)
    return lambda x, seed, scale, dropout_p: launch(x, None, seed, scale, dropout_p)


CUDA_SINUSOIDAL_ADD = Backend("cuda", _sinusoidal_add, _unsupported)
CUDA_SINUSOIDAL_DROPOUT = Backend("cuda", _dropout, _unsupported)


def _rotary(q: Tensor, *args: Any) -> Callable[..., tuple[Tensor, Tensor | None]]:
    device = q.device
    return rotary_launcher(cuda.kernel("rotary_cuda"), lambda: cuda.stream(device), q, *args)


CUDA_ROTARY = Backend("cuda", _rotary, _unsupported)
