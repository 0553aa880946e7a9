"""Launchers of the compiled normalisation kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmkern import extension
from llmkern.backend import Backend
from llmkern.extension import address
from llmkern.rows import as_rows


def chunks(rows: int, least: int = 32, most: int = 64) -> tuple[int, int]:
    """How many chunks, and the rows of each: by the number of rows alone, so that sums are the same on every machine.

    least: the rows of a chunk, at least. most: how many chunks there may be.
    """
    size = max(least, -(-rows // most))
    return -(-rows // size), size


def outputs(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(x.shape if residual is not None else (0,), dtype=x.dtype, device=x.device)
    return out, total, torch.empty((*x.shape[:-1], 2), dtype=torch.float32, device=x.device)


def _norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float,
    centred: bool,
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    kernel, threads = extension._C.norm, extension.threads
    width = x.size(-1)
    codes = (extension.DTYPE_CODES[x.dtype], _weights(x, weight, bias))

    def launch(
        x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, total, statistics = outputs(x, residual)
        if not out.numel():
            return out, total, statistics
        rows, added = as_rows(x), None if residual is None else as_rows(residual)
        weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
        kernel(
            (rows.data_ptr(), address(added), address(weight), address(bias), out.data_ptr(), total.data_ptr(),
             statistics.data_ptr()),
            (rows.size(0), width), (rows.stride(0), 0 if added is None else added.stride(0)), codes, eps, offset,
            centred, threads(),
        )  # fmt: skip
        return out, total, statistics

    return launch


def _weights(x: Tensor, *given: Tensor | None) -> int:
    """The code of the dtype of weight and bias."""
    return extension.DTYPE_CODES[next((t.dtype for t in given if t is not None), torch.float32)]


def _norm_backward(
    grad: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor | None, statistics: Tensor, eps: float,
    offset: float, centred: bool, with_bias: bool,
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    kernel, threads = extension._C.norm_backward, extension.threads
    width = total.size(-1)
    codes = (extension.DTYPE_CODES[total.dtype], _weights(total, weight))

    def launch(
        grad: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor | None, statistics: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        dx = torch.empty(total.shape, dtype=total.dtype, device=total.device)
        count, size = chunks(dx.numel() // width if width else 0)
        sums = [torch.empty((count, width), dtype=torch.float32) if wanted else None
                for wanted in (weight is not None, with_bias)]  # fmt: skip
        if dx.numel():
            given, rows = as_rows(grad), as_rows(total)
            added = None if grad_total is None else as_rows(grad_total)
            weight = None if weight is None else weight.contiguous()
            statistics = statistics.contiguous()
            kernel(
                (given.data_ptr(), address(added), rows.data_ptr(), address(weight), statistics.data_ptr(),
                 dx.data_ptr(), address(sums[0]), address(sums[1])),
                (rows.size(0), width, count, size),
                (given.stride(0), 0 if added is None else added.stride(0), rows.stride(0)), codes, offset, centred,
                threads(),
            )  # fmt: skip
        dweight, dbias = (torch.empty(0) if s is None else s.sum(0) for s in sums)
        return dx, dweight, dbias

    return launch


CPU_NORM = Backend("cpu", _norm, extension.missing)
CPU_NORM_BACKWARD = Backend("cpu", _norm_backward, extension.missing)
