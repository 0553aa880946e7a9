"""Rows of logits far from 0, where a log-sum-exp is the highest logit whatever its logarithm, and torch's gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.loss.cases import IGNORED

#: On both sides of where logarithms are scaled; where a double loses them; the largest.
SIZES = (1e6, 5e8, 2.0**29, 2.0**30 - 64, 2.0**30, 2.0**30 + 128, 1e9, 1e12, 2.0**53, 1e16, 1e18, 1e30, None)
#: What of a size stands in a row: some are nearest floats, -1 and 0 far below.
PATTERNS = ([1.0] * 7, [1.0, 1.0, -1.0, 0.0, 1.0, -1.0, 1.0], [1.0, -1.0, 0.0, 0.5, 0.0, -1.0, -0.25])


def far(dtype: torch.dtype, masked: bool = False) -> tuple[Tensor, Tensor]:
    """Logits and targets: rows of every size the dtype has, positive and negative, between usual ones; with classes
    that are -inf where `masked`, none of them a target."""
    most = torch.finfo(dtype).max
    rows = []
    for size in (most if s is None else s for s in SIZES):
        for sign in (size, -size) if size <= most else ():
            rows += [[sign * p for p in pattern] for pattern in PATTERNS]
            rows.append(torch.randn(7).tolist())
    x = torch.tensor(rows, dtype=torch.float64).to(dtype)
    if dtype == torch.float32:
        x[::4, 2] = torch.nextafter(x[::4, 2], torch.zeros(()))
    if masked:
        x[1::3, 4] = -torch.inf
    targets = torch.tensor([0, 1, 2, 3, 5, 6]).repeat(len(x))[: len(x)]
    targets[5::9] = IGNORED
    return x, targets


def wider(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def cross_entropy_gradient(x: Tensor, targets: Tensor, smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """Of the sum of the rows' losses, in float32 (float64 for float64)."""
    leaf = x.to(wider(x.dtype)).requires_grad_()
    loss = F.cross_entropy(leaf, targets, ignore_index=IGNORED, label_smoothing=smoothing, reduction="sum")
    (grad,) = torch.autograd.grad(loss, leaf)
    # torch's logsumexp has no digits of p in its own gradient.
    of_z = 2.0 * z_loss * leaf.logsumexp(-1, keepdim=True) * leaf.softmax(-1)
    return (grad + torch.where(targets[:, None] == IGNORED, 0.0, of_z)).detach() if z_loss else grad


def distillation_gradients(
    student: Tensor, teacher: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Of the sum of the rows' soft and hard losses, in float32 (float64 for float64)."""
    leaves = [t.to(wider(student.dtype)).requires_grad_() for t in (student, teacher)]
    log_p, log_q = (F.log_softmax(t / temperature, -1) for t in leaves)
    # Where the teacher's probability is 0 torch has 0 times what may be infinite.
    seen = torch.where(log_q.exp() == 0.0, 0.0, log_p), torch.where(log_q.exp() == 0.0, -torch.inf, log_q)
    soft = F.kl_div(*seen, log_target=True, reduction="sum")
    hard = F.cross_entropy(leaves[0], targets, ignore_index=IGNORED, reduction="sum")
    of_student, of_teacher = torch.autograd.grad(soft + hard, leaves)
    return of_student, of_teacher


def close(found: Tensor, expected: Tensor) -> None:
    """To the rounding of its dtype."""
    torch.testing.assert_close(found, expected.to(found.dtype))
