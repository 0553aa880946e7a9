"""torch.ops.llmkern.sinusoidal_add: checks, backends, autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmkern import check, extension
from llmkern.backend import Backend, Operator, reference_backend
from llmkern.operator import define, is_plain, needs_grad, short_autograd
from llmkern.positional import reference


def sinusoidal_add(x: Tensor, pe: Tensor, *, scale: float = 1.0) -> Tensor:
    """x * scale + pe[:S], in one pass.

    x: (S, B, D), float32, bfloat16 or float16. pe: (max_len, 1, D), float32, S <= max_len. Returns (S, B, D) in x's
    dtype.
    Raises TypeError for a wrong dtype, ValueError for a wrong shape or device.
    """
    if not is_plain(x, pe):
        return torch.ops.llmkern.sinusoidal_add(x, pe, scale)
    if needs_grad(x, pe):
        return _SinusoidalAdd.apply(x, pe, scale)
    return _OPERATOR.run(x, pe, scale)


def _check(x: Tensor, pe: Tensor, scale: float) -> None:
    check.dtype("x", x, check.FLOATS)
    check.dtype("pe", pe, (torch.float32,))
    check.same_device("pe", pe, "x", x)
    check.rank("x", x, "(S, B, D)")
    check.rank("pe", pe, "(max_len, 1, D)")
    if pe.size(1) != 1 or pe.size(2) != x.size(2):
        raise ValueError(f"pe: expected (max_len, 1, D) with D = {x.size(2)} as in x, got shape {tuple(pe.shape)}")
    if x.size(0) > pe.size(0):
        raise ValueError(f"x: expected (S, B, D) with S <= max_len = {pe.size(0)} of pe, got shape {tuple(x.shape)}")


def _cpu_unsupported(x: Tensor, pe: Tensor, scale: float) -> str | None:
    return extension.MISSING


def _cpu(x: Tensor, pe: Tensor, scale: float) -> Callable[..., Tensor]:
    kernel, threads = extension._C.sinusoidal_add, extension.threads
    length, batch, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype)
    strides = (x.stride(0), x.stride(1), pe.stride(0), out.stride(0), out.stride(1))
    code = extension.DTYPE_CODES[x.dtype]

    def launch(x: Tensor, pe: Tensor, scale: float) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        kernel(x.data_ptr(), pe.data_ptr(), out.data_ptr(), length, batch, width, *strides, scale, code, threads())
        return out

    if x.stride(2) == 1 and pe.stride(2) == 1:
        return launch
    return lambda x, pe, scale: _OPERATOR.run(x.contiguous(), pe.contiguous(), scale)


def _example(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    return torch.empty(8, 2, 64, dtype=dtype, device=device), torch.empty(8, 1, 64, device=device), 1.0


_OPERATOR = Operator(
    "sinusoidal_add",
    _check,
    _example,
    cpu=[Backend("cpu", _cpu, _cpu_unsupported), reference_backend(reference.sinusoidal_add)],
    other=[reference_backend(reference.sinusoidal_add)],
)


def _fake(x: Tensor, pe: Tensor, scale: float) -> Tensor:
    _check(x, pe, scale)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, pe, ctx.scale = inputs
    ctx.pe_shape = pe.shape


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    grad_pe = None
    if ctx.needs_input_grad[1]:
        grad_pe = grad.new_zeros(ctx.pe_shape, dtype=torch.float32)
        grad_pe[: grad.size(0)] = grad.float().sum(1, keepdim=True)
    return (grad * ctx.scale if ctx.needs_input_grad[0] else None), grad_pe, None


define(
    "sinusoidal_add(Tensor x, Tensor pe, float scale) -> Tensor",
    _OPERATOR.run, _fake, setup_context=_setup_context, backward=_backward,
)  # fmt: skip


_SinusoidalAdd = short_autograd(_OPERATOR.run, _setup_context, _backward)
