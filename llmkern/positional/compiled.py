"""Launchers of the compiled positional kernels, each with the reason why it cannot serve a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmkern import extension
from llmkern.backend import Backend
from llmkern.random import drop_below


def _sinusoidal_add(
    x: Tensor, pe: Tensor | None, seed: Tensor | None, scale: float, dropout_p: float
) -> Callable[..., Tensor]:
    """pe None stands for zeros: the backward, which only scales and drops."""
    if not all(t is None or side_by_side(t) for t in (x, pe)):

        def contiguous(x: Tensor, pe: Tensor | None, *rest: Any) -> Tensor:
            x, pe = x.contiguous(), None if pe is None else pe.contiguous()
            return _sinusoidal_add(x, pe, seed, scale, dropout_p)(x, pe, *rest)

        return contiguous
    kernel, threads = extension._C.sinusoidal_add, extension.threads
    length, batch, width = x.shape
    strides = (x.stride(0), x.stride(1), 0 if pe is None else pe.stride(0), batch * width, width)
    code = extension.DTYPE_CODES[x.dtype]
    drop = drop_below(dropout_p) if seed is not None else 0
    keep_scale = 0.0 if dropout_p >= 1.0 else 1.0 / (1.0 - dropout_p)

    def launch(x: Tensor, pe: Tensor | None, seed: Tensor | None, scale: float, dropout_p: float) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        table = 0 if pe is None else pe.data_ptr()
        if seed is None:
            kernel(x.data_ptr(), table, out.data_ptr(), length, batch, width, *strides, scale, code, threads())
        else:
            kernel(x.data_ptr(), table, out.data_ptr(), length, batch, width, *strides, scale, code, threads(),
                   drop, keep_scale, int(seed))  # fmt: skip
        return out

    return launch


CPU_SINUSOIDAL_ADD = Backend("cpu", _sinusoidal_add, extension.missing)
CPU_SINUSOIDAL_DROPOUT = Backend(
    "cpu",
    lambda x, seed, scale, dropout_p: _dropout(_sinusoidal_add(x, None, seed, scale, dropout_p)),
    extension.missing,
)


def _dropout(launch: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, seed, scale, dropout_p: launch(x, None, seed, scale, dropout_p)


def rotary_output(x: Tensor) -> Tensor:
    """Where a rotation of x is written: the memory order of x, but always with contiguous rows."""
    out = torch.empty_like(x)
    return out if side_by_side(out) else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def side_by_side(x: Tensor) -> bool:
    """Whether the elements of a row are neighbours in memory."""
    return x.stride(-1) == 1 or x.size(-1) == 1 or x.numel() == 0


def rotary_launcher(
    kernel: Callable[..., None], last: Callable[[], tuple[int, ...]], q: Tensor, k: Tensor | None, cos: Tensor,
    sin: Tensor, position_ids: Tensor | None, interleaved: bool, inverse: bool, inplace: bool,
) -> Callable[..., tuple[Tensor, Tensor | None]]:  # fmt: skip
    """The launcher of `kernel`, which takes a plan, the addresses and what `last()` gives."""
    if not all(x is None or side_by_side(x) for x in (q, k, cos, sin)):
        return _on_copies(kernel, last)
    q_out, k_out = (q, k) if inplace else (rotary_output(q), None if k is None else rotary_output(k))
    position_strides = (0, 0)
    if position_ids is not None:
        position_strides = (position_ids.stride(0) if position_ids.dim() == 2 else 0, position_ids.stride(-1))
    codes, zero = extension.DTYPE_CODES, (0, 0, 0)
    plan = extension._C.RotaryPlan(
        [q.size(0), q.size(1), 0 if k is None else k.size(1), q.size(2), q.size(3), 2 * cos.size(1), cos.size(0)],
        [*q.stride()[:3], *(zero if k is None else k.stride()[:3]), *q_out.stride()[:3],
         *(zero if k_out is None else k_out.stride()[:3]), cos.stride(0), sin.stride(0), *position_strides],
        [codes[q.dtype], codes[cos.dtype], 0 if position_ids is None else codes[position_ids.dtype]],
        interleaved, inverse,
    )  # fmt: skip

    def launch(
        q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, position_ids: Tensor | None, *rest: Any
    ) -> tuple[Tensor, Tensor | None]:
        q_out, k_out = (q, k) if inplace else (rotary_output(q), None if k is None else rotary_output(k))
        kernel(
            plan, q.data_ptr(), 0 if k is None else k.data_ptr(), q_out.data_ptr(),
            0 if k_out is None else k_out.data_ptr(), cos.data_ptr(), sin.data_ptr(),
            0 if position_ids is None else position_ids.data_ptr(), *last(),
        )  # fmt: skip
        return q_out, k_out

    return launch


def _on_copies(
    kernel: Callable[..., None], last: Callable[[], tuple[int, ...]]
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """For rows whose elements do not lie side by side."""

    def launch(
        q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool,
        inverse: bool, inplace: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        args = (q.contiguous(), None if k is None else k.contiguous(), cos.contiguous(), sin.contiguous(), position_ids,
                interleaved, inverse, False)  # fmt: skip
        q_out, k_out = rotary_launcher(kernel, last, *args)(*args)
        if inplace:
            return q.copy_(q_out), None if k is None or k_out is None else k.copy_(k_out)
        return q_out, k_out

    return launch


def _rotary(*args: Any) -> Callable[..., tuple[Tensor, Tensor | None]]:
    return rotary_launcher(extension._C.rotary, lambda: (extension.threads(),), *args)


CPU_ROTARY = Backend("cpu", _rotary, extension.missing)
