"""Launchers of the compiled kernels of the losses: of logits; those of hidden states stand in compiled_linear.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmkern import check, extension
from llmkern.backend import Backend
from llmkern.rows import as_rows, of_rows


def refused(x: Tensor) -> str | None:
    """Why no kernel, of whatever device, takes arguments of which x has the dtype."""
    if x.dtype not in check.FLOATS:
        return f"its kernel takes float32, bfloat16 and float16, not {check.short(x.dtype)}"
    return None


def limits(x: Tensor, *args: Any) -> str | None:
    """Why no compiled kernel takes these arguments."""
    return refused(x) or extension.missing()


def _cross_entropy(logits: Tensor, *args: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    kernel, threads, code = extension._C.cross_entropy, extension.threads, extension.DTYPE_CODES[logits.dtype]

    def launch(
        logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        loss, lse = of_rows(logits, torch.float32), of_rows(logits, torch.float64)
        rows, targets = as_rows(logits), targets.contiguous()
        kernel(
            (rows.data_ptr(), targets.data_ptr(), loss.data_ptr(), lse.data_ptr()), (*rows.shape, rows.stride(0)),
            ignore_index, (label_smoothing, z_loss), code, threads(),
        )  # fmt: skip
        return loss, lse

    return launch


def _cross_entropy_backward(grad: Tensor, logits: Tensor, *args: Any) -> Callable[..., Tensor]:
    kernel, threads = extension._C.cross_entropy_backward, extension.threads
    code = extension.DTYPE_CODES[logits.dtype]

    def launch(
        grad: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, ignore_index: int, label_smoothing: float,
        z_loss: float,
    ) -> Tensor:  # fmt: skip
        out = torch.empty(logits.shape, dtype=logits.dtype)
        rows = as_rows(logits)
        grad, targets, lse = grad.contiguous(), targets.contiguous(), lse.contiguous()
        kernel(
            (grad.data_ptr(), rows.data_ptr(), targets.data_ptr(), lse.data_ptr(), out.data_ptr()),
            (*rows.shape, rows.stride(0)), ignore_index, (label_smoothing, z_loss), code, threads(),
        )  # fmt: skip
        return out

    return launch


def _distillation(student: Tensor, *args: Any) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    kernel, threads, code = extension._C.distillation, extension.threads, extension.DTYPE_CODES[student.dtype]

    def launch(
        student: Tensor, teacher: Tensor, targets: Tensor, temperature: float, ignore_index: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        soft, hard = (of_rows(student, torch.float32) for _ in range(2))
        statistics = of_rows(student, torch.float64, 3)
        rows, taught, targets = as_rows(student), as_rows(teacher), targets.contiguous()
        kernel(
            (rows.data_ptr(), taught.data_ptr(), targets.data_ptr(), soft.data_ptr(), hard.data_ptr(),
             statistics.data_ptr()),
            (*rows.shape, rows.stride(0), taught.stride(0)), temperature, ignore_index, code, threads(),
        )  # fmt: skip
        return soft, hard, statistics

    return launch


def _distillation_backward(
    grad_soft: Tensor, grad_hard: Tensor, student: Tensor, *args: Any
) -> Callable[..., tuple[Tensor, Tensor]]:
    kernel, threads = extension._C.distillation_backward, extension.threads
    code = extension.DTYPE_CODES[student.dtype]

    def launch(
        grad_soft: Tensor, grad_hard: Tensor, student: Tensor, teacher: Tensor, targets: Tensor, statistics: Tensor,
        soft: Tensor, temperature: float, ignore_index: int, needs: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        outs = [torch.empty(student.shape if n else (0,), dtype=student.dtype) for n in needs]
        rows, taught = as_rows(student), as_rows(teacher)
        given = [t.contiguous() for t in (grad_soft, grad_hard, targets, statistics, soft)]
        kernel(
            (given[0].data_ptr(), given[1].data_ptr(), rows.data_ptr(), taught.data_ptr(),
             *(t.data_ptr() for t in given[2:]), *(o.data_ptr() if n else 0 for o, n in zip(outs, needs, strict=True))),
            (*rows.shape, rows.stride(0), taught.stride(0)), temperature, ignore_index, code, threads(),
        )  # fmt: skip
        return outs[0], outs[1]

    return launch


CPU_CROSS_ENTROPY = Backend("cpu", _cross_entropy, limits)
CPU_CROSS_ENTROPY_BACKWARD = Backend("cpu", _cross_entropy_backward, lambda grad, x, *args: limits(x))
CPU_DISTILLATION = Backend("cpu", _distillation, limits)
CPU_DISTILLATION_BACKWARD = Backend("cpu", _distillation_backward, lambda soft, hard, x, *args: limits(x))
