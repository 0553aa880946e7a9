"""Launchers of the positional CUDA kernels, each with the reason why it cannot serve a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmkern import extension
from llmkern.backend import Backend
from llmkern.positional.compiled import rotary_launcher, side_by_side
from llmkern.random import drop_below

OLDEST = (8, 0)  # the compute capability that the machine code in the library begins with


def _unsupported(x: Tensor, *args: Any) -> str | None:
    if extension.MISSING:
        return extension.MISSING
    if not extension._C.cuda_architectures:
        return (
            "the compiled library has no CUDA part: run `pip install -e .` again with a CUDA toolkit's nvcc, 12.8 or "
            "newer, on PATH"
        )
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) was built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if x.device.type != "cuda":
        return f"the tensors are on {x.device}, not on a CUDA device"
    capability = torch.cuda.get_device_capability(x.device)
    if capability < OLDEST:
        return f"{x.device} has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0 or newer"
    return None


def _kernel(name: str) -> Callable[..., None]:
    kernel: Callable[..., None] = getattr(extension._C, name)
    return kernel


def _stream(device: torch.device) -> tuple[int, int]:
    """The device's index and the address of torch's current stream there, as the kernels take them."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, torch._C._cuda_getCurrentRawStream(index)


def _sinusoidal_add(
    x: Tensor, pe: Tensor | None, seed: Tensor | None, scale: float, dropout_p: float
) -> Callable[..., Tensor]:
    """pe None stands for zeros: the backward, which only scales and drops."""
    if not all(t is None or side_by_side(t) for t in (x, pe)):

        def contiguous(x: Tensor, pe: Tensor | None, *rest: Any) -> Tensor:
            x, pe = x.contiguous(), None if pe is None else pe.contiguous()
            return _sinusoidal_add(x, pe, *rest)(x, pe, *rest)

        return contiguous
    kernel, device = _kernel("sinusoidal_add_cuda"), x.device
    length, batch, width = x.shape
    strides = (x.stride(0), x.stride(1), 0 if pe is None else pe.stride(0), batch * width, width)
    code = extension.DTYPE_CODES[x.dtype]
    drop = drop_below(dropout_p) if seed is not None else 0
    keep_scale = 0.0 if dropout_p >= 1.0 else 1.0 / (1.0 - dropout_p)

    def launch(x: Tensor, pe: Tensor | None, seed: Tensor | None, scale: float, dropout_p: float) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        kernel(
            x.data_ptr(), 0 if pe is None else pe.data_ptr(), out.data_ptr(), length, batch, width, *strides, scale,
            code, *_stream(device), drop, keep_scale, 0 if seed is None else int(seed),
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
    return rotary_launcher(_kernel("rotary_cuda"), lambda: _stream(device), q, *args)


CUDA_ROTARY = Backend("cuda", _rotary, _unsupported)
