"""The losses of hidden states on a GPU: chunks of rows whose logits torch.mm makes and our kernels turn into gradients.

The idea is Liger-Kernel's (Hsu et al. 2024, fused_linear_cross_entropy.py): the logits of a chunk are made, their
gradients take their place, and are multiplied at once, so that one chunk's logits are all that is ever held. Gradients
of weight and bias are summed over the chunks in float32.

The rows of a chunk: as many as MEMORY holds the logits of, but at most MOST, beyond which products gain nothing, and at
most a sixteenth of all, so that small batches do not hold all their logits at once; in steps of STEP, the rows of a
product's tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from llmkern import triton
from llmkern.loss import triton_launch
from llmkern.loss.reference import gradient_dtype, gradient_shapes, mean_factor
from llmkern.loss.triton_launch import limits
from llmkern.rows import of_rows

MEMORY = 2**28  # bytes
MOST = 2048
STEP = 128


def chunk_rows(rows: int, classes: int, size: int) -> int:
    """The rows of a chunk; size: bytes of a logit."""
    share = -(-rows // (16 * STEP)) * STEP
    return max(STEP, min(MEMORY // (classes * size) // STEP * STEP, MOST, share))


class Head:
    """A last layer, chunk by chunk: logits in one buffer, and gradients from theirs, times `factor`, in `dtype`."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool] = (False,) * 3,
        factor: Tensor | float = 1.0, dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.needs, self.factor, self.dtype = (*needs[:2], needs[2] and bias is not None), factor, dtype
        self.rows = chunk_rows(hidden.size(0), weight.size(0), hidden.element_size())
        most = min(self.rows, hidden.size(0))
        self.buffer = torch.empty((most, weight.size(0)), dtype=hidden.dtype, device=hidden.device)
        shapes = gradient_shapes((hidden, weight, bias), self.needs)
        self.of_hidden = torch.empty(shapes[0], dtype=dtype, device=hidden.device)
        self.sums = [torch.zeros(shape, dtype=torch.float32, device=hidden.device) for shape in shapes[1:]]

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """The rows of each chunk, and its logits."""
        for start in range(0, self.hidden.size(0), self.rows):
            at = slice(start, min(start + self.rows, self.hidden.size(0)))
            yield at, self.logits(at)

    def logits(self, at: slice) -> Tensor:
        out, part = self.buffer[: at.stop - at.start], self.hidden[at]
        if self.bias is None:
            return torch.mm(part, self.weight.t(), out=out)
        return torch.addmm(self.bias, part, self.weight.t(), out=out)

    def add(self, at: slice, grad: Tensor) -> None:
        """Multiplies the gradients of a chunk's logits."""
        if self.needs[0]:
            part = torch.zeros(self.hidden[at].shape, dtype=torch.float32, device=grad.device)
            accumulate(part, grad, self.weight)
            self.of_hidden[at] = part.mul_(self.factor)
        if self.needs[1]:
            accumulate(self.sums[0], grad.t(), self.hidden[at])
        if self.needs[2]:
            self.sums[1] += grad.sum(0, dtype=torch.float32)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        of_weight, of_bias = (s.mul_(self.factor).to(self.dtype) for s in self.sums)
        return self.of_hidden, of_weight, of_bias


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (float32) += a @ b. A product of 16 bits is summed in float32 where torch can tell cuBLAS so."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.device.type == "cuda" and not torch.version.hip:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += torch.mm(a, b)


def linear_cross_entropy(
    run: triton.Run, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int,
    label_smoothing: float, z_loss: float, reduction: str, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What op.linear_cross_entropy takes, by cross_entropy_kernel, which `run` runs, between torch's products."""
    loss, lse = of_rows(hidden, torch.float32), of_rows(hidden, torch.float64)
    made = reduction != "none" and any(needs)
    factor = mean_factor(targets, ignore_index, torch.float32) if reduction == "mean" else 1.0
    head = Head(hidden, weight, bias, needs if made else (False,) * 3, factor, gradient_dtype(hidden.dtype))
    for at, logits in head.chunks():
        options = ignore_index, label_smoothing, z_loss
        triton_launch.forward(run, logits, targets[at], *options, loss[at], lse[at], made)
        head.add(at, logits)
    return loss, lse, *head.gradients()


def linear_cross_entropy_backward(
    run: triton.Run, grad_loss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
    lse: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What op.linear_cross_entropy_backward takes, by cross_entropy_backward_kernel over the logits made again."""
    head = Head(hidden, weight, bias, needs, 1.0, hidden.dtype)
    if any(needs):
        for at, logits in head.chunks():
            options = ignore_index, label_smoothing, z_loss
            triton_launch.backward(run, grad_loss[at], logits, targets[at], lse[at], *options, logits)
            head.add(at, logits)
    return head.gradients()


def linear_distillation(
    run: triton.Run, student_hidden: Tensor, student_weight: Tensor, student_bias: Tensor | None,
    teacher_hidden: Tensor, teacher_weight: Tensor, teacher_bias: Tensor | None, targets: Tensor, temperature: float,
    alpha: float, ignore_index: int, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What op.linear_distillation takes, by distillation_kernel over both models' logits of a chunk."""
    soft, hard = (of_rows(student_hidden, torch.float32) for _ in range(2))
    statistics = of_rows(student_hidden, torch.float64, 3)
    rows, grad_hard, dtype = max(student_hidden.size(0), 1), None, gradient_dtype(student_hidden.dtype)
    head = Head(student_hidden, student_weight, student_bias, needs, 1.0 / rows, dtype)
    taught = Head(teacher_hidden, teacher_weight, teacher_bias)
    if any(needs):  # of the sum over rows, whose mean is taken after the products: no gradient is then too small
        grad_hard = mean_factor(targets, ignore_index, torch.float32).mul((1.0 - alpha) * rows)
    for at, logits in head.chunks():
        of_rows_at = soft[at], hard[at], statistics[at]
        triton_launch.distil(
            run, logits, taught.logits(at), targets[at], temperature, ignore_index, *of_rows_at, alpha * temperature**2,
            grad_hard,
        )  # fmt: skip
        head.add(at, logits)
    return soft, hard, *head.gradients()


TRITON_LINEAR_CROSS_ENTROPY = triton.served_by(
    linear_cross_entropy, limits=lambda x, weight, *args: limits(x, weight.size(0))
)
TRITON_LINEAR_CROSS_ENTROPY_BACKWARD = triton.served_by(
    linear_cross_entropy_backward, limits=lambda grad, x, weight, *args: limits(x, weight.size(0))
)
TRITON_LINEAR_DISTILLATION = triton.served_by(
    linear_distillation, limits=lambda x, weight, *args: limits(x, weight.size(0))
)
