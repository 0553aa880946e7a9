"""Launchers of the compiled kernels of the losses of hidden states, and the memory that they work in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmkern import extension
from llmkern.backend import Backend
from llmkern.extension import address
from llmkern.loss import reference
from llmkern.loss.compiled import limits
from llmkern.rows import as_rows, of_rows

#: Rows whose logits, of each of two heads, are in memory together. (Of one head: csrc/loss/layout.h.)
DISTILLATION_ROWS = 32


class Gradients:
    """Memory for the gradients of a head: hidden's in the dtype asked for, the others in float32 until `finish`."""

    def __init__(self, head: Sequence[Tensor | None], wanted: Sequence[bool], dtype: torch.dtype) -> None:
        hidden, self.dtype = head[0], dtype
        asked = [n and t is not None for t, n in zip(head, wanted, strict=True)]
        self.any = any(asked)
        self.wide = dtype == torch.float32
        shapes = reference.gradient_shapes(head, wanted)
        self.tensors = [torch.empty(s, dtype=torch.float32 if i else dtype) for i, s in enumerate(shapes)]
        self.addresses = [t.data_ptr() if a else 0 for t, a in zip(self.tensors, asked, strict=True)]
        if hidden is not None and not hidden.size(0):
            for t in self.tensors:
                t.zero_()

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        of_hidden, of_weight, of_bias = (t.to(self.dtype) for t in self.tensors)
        return of_hidden, of_weight, of_bias


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[list[Tensor | None], tuple[int, int, int]]:
    """Its tensors, whose rows lie side by side, and its width and strides."""
    hidden, weight = as_rows(hidden), as_rows(weight)
    return (
        [hidden, weight, None if bias is None else bias.contiguous()],
        (weight.size(1), hidden.stride(0), weight.stride(0)),
    )  # fmt: skip


def _linear_cross_entropy(
    head: Sequence[Tensor | None], targets: Tensor, upstream: Tensor | None, lse: Tensor | None, gradients: Gradients,
    options: Sequence[Any],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Runs the kernel; lse: given in a backward. Returns the loss (unwritten there) and lse."""
    hidden, weight, bias = head
    assert hidden is not None and weight is not None
    backward = lse is not None
    loss = of_rows(hidden, torch.float32)
    lse = of_rows(hidden, torch.float64) if lse is None else lse.contiguous()
    ignore_index, *rule = options
    given, sizes = _head(hidden, weight, bias)
    wanted, dtype = [bool(a) for a in gradients.addresses], extension.DTYPE_CODES[hidden.dtype]
    units = extension._C.linear_cross_entropy_units(sizes[0], weight.size(0), wanted, backward, dtype)
    work, targets = torch.empty(units, dtype=torch.float32), targets.contiguous()
    if hidden.size(0):
        extension._C.linear_cross_entropy(
            (*(address(t) for t in given), *gradients.addresses, targets.data_ptr(),
             address(upstream) if gradients.any else 0, loss.data_ptr(), lse.data_ptr(), work.data_ptr()),
            (hidden.size(0), weight.size(0)), sizes, ignore_index, tuple(rule), backward, gradients.wide, dtype,
            extension.threads(),
        )  # fmt: skip
    return loss, lse


def _forward(*args: Any) -> Callable[..., tuple[Tensor, ...]]:
    def launch(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int, label_smoothing: float,
        z_loss: float, reduction: str, needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        head = (hidden, weight, bias)
        wanted = (False,) * 3 if reduction == "none" else needs
        gradients = Gradients(head, wanted, reference.gradient_dtype(hidden.dtype))
        upstream = None
        if gradients.any:
            upstream = torch.ones(hidden.size(0))
            if reduction == "mean":
                upstream.mul_(reference.mean_factor(targets, ignore_index, torch.float32))
        options = ignore_index, label_smoothing, z_loss
        loss, lse = _linear_cross_entropy(head, targets, upstream, None, gradients, options)
        return loss, lse, *gradients.finish()

    return launch


def _backward(*args: Any) -> Callable[..., tuple[Tensor, ...]]:
    def launch(
        grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, lse: Tensor,
        ignore_index: int, label_smoothing: float, z_loss: float, needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        head, grad = (hidden, weight, bias), grad.contiguous()
        gradients = Gradients(head, needs, hidden.dtype)
        if gradients.any:
            _linear_cross_entropy(head, targets, grad, lse, gradients, (ignore_index, label_smoothing, z_loss))
        return gradients.finish()

    return launch


def _linear_distillation(*args: Any) -> Callable[..., tuple[Tensor, ...]]:
    def launch(
        student_hidden: Tensor, student_weight: Tensor, student_bias: Tensor | None, teacher_hidden: Tensor,
        teacher_weight: Tensor, teacher_bias: Tensor | None, targets: Tensor, temperature: float, alpha: float,
        ignore_index: int, needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        rows, classes = student_hidden.size(0), student_weight.size(0)
        soft, hard = (of_rows(student_hidden, torch.float32) for _ in range(2))
        dtype = reference.gradient_dtype(student_hidden.dtype)
        gradients = Gradients((student_hidden, student_weight, student_bias), needs, dtype)
        student, student_sizes = _head(student_hidden, student_weight, student_bias)
        teacher, teacher_sizes = _head(teacher_hidden, teacher_weight, teacher_bias)
        targets = targets.contiguous()
        if not rows:
            return soft, hard, *gradients.finish()
        wanted = [bool(a) for a in gradients.addresses]
        units = extension._C.linear_distillation_units(
            student_sizes[0], teacher_sizes[0], classes, DISTILLATION_ROWS, wanted[0], wanted[1], gradients.any
        )
        work = torch.empty(units, dtype=torch.float32)
        counted = float(reference.mean_factor(targets, ignore_index, torch.float64))
        factors = temperature, alpha * temperature**2 / rows, (1.0 - alpha) * counted
        extension._C.linear_distillation(
            (*(address(t) for t in (*student, *teacher)), *gradients.addresses, targets.data_ptr(), soft.data_ptr(),
             hard.data_ptr(), work.data_ptr()),
            (rows, classes, DISTILLATION_ROWS), (student_sizes, teacher_sizes), factors, ignore_index, gradients.wide,
            extension.DTYPE_CODES[student_hidden.dtype], extension.threads(),
        )  # fmt: skip
        return soft, hard, *gradients.finish()

    return launch


CPU_LINEAR_CROSS_ENTROPY = Backend("cpu", _forward, limits)
CPU_LINEAR_CROSS_ENTROPY_BACKWARD = Backend("cpu", _backward, lambda grad, x, *args: limits(x))
CPU_LINEAR_DISTILLATION = Backend("cpu", _linear_distillation, limits)
