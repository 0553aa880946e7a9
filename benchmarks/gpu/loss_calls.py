"""Calls of the losses."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.gpu.call import FLOATS, HALVES, Call, Case, random
from benchmarks.gpu.steps import Setting
from llmkern import functional
from llmkern.loss import reference

IGNORED = -100
OPTIONS = 0.1, 1e-4  #: label smoothing and z-loss


def loss_cases(setting: Setting, small: bool) -> Iterator[Case]:
    for short, dtype in FLOATS.items():
        for shape in [(5, 70)] if small else [(1003, 32003), (40, 128256)]:
            name = f"{','.join(map(str, shape))} {short}"
            for operator, make in (("cross entropy", cross_entropy), ("distillation", distillation)):
                yield Case(
                    operator, name, lambda shape=shape, dtype=dtype, make=make: make(setting, shape, dtype)
                )  # fmt: skip
    for short, dtype in (FLOATS if small else HALVES).items():
        for linear in [(5, 24, 70)] if small else [(700, 512, 32003), (2100, 576, 5003)]:
            name = f"{','.join(map(str, linear))} {short}"
            for reduction in ("mean", "none"):
                yield Case(
                    "linear cross entropy", f"{name} {reduction}",
                    lambda shape=linear, dtype=dtype, reduction=reduction: linear_cross_entropy(
                        setting, shape, dtype, reduction
                    ),
                )  # fmt: skip
            yield Case(
                "linear distillation", name,
                lambda shape=linear, dtype=dtype: linear_distillation(setting, shape, dtype),
            )  # fmt: skip


def classes(setting: Setting, rows: int, count: int) -> Tensor:
    """Every seventh row does not count."""
    generator = torch.Generator(setting.device).manual_seed(rows)
    targets = torch.randint(count, (rows,), generator=generator, device=setting.device)
    targets[::7] = IGNORED
    return targets


def cross_entropy(setting: Setting, shape: tuple[int, int], dtype: torch.dtype) -> Call:
    """The loss of each row, smoothed and with a z-loss, and the gradient of the logits."""
    targets = classes(setting, *shape)

    def ours(logits: Tensor) -> Tensor:
        return functional.cross_entropy(
            logits, targets, label_smoothing=OPTIONS[0], z_loss=OPTIONS[1], reduction="none"
        )

    return Call(
        ours, lambda logits: reference.cross_entropy(logits, targets, IGNORED, *OPTIONS)[0],
        (3 * random(setting, *shape, dtype=dtype),), True,
    )  # fmt: skip


def distillation(setting: Setting, shape: tuple[int, int], dtype: torch.dtype) -> Call:
    """Both losses of each row, and the gradients of both logits."""
    targets, student = classes(setting, *shape), 3 * random(setting, *shape, dtype=dtype)
    teacher = student.flip(0).contiguous()
    return Call(
        lambda student, teacher: torch.ops.llmkern.distillation(student, teacher, targets, 2.0, IGNORED)[:2],
        lambda student, teacher: reference.distillation(student, teacher, targets, 2.0, IGNORED)[:2],
        (student, teacher), True,
    )  # fmt: skip


def _heads(setting: Setting, rows: int, count: int, dtype: torch.dtype, *widths: int) -> tuple[Tensor, ...]:
    made: list[Tensor] = []
    for width in widths:
        made.append(random(setting, rows, width, dtype=dtype))
        made.append(2 * random(setting, count, width, dtype=dtype) * width**-0.5)
    return tuple(made)


def linear_cross_entropy(
    setting: Setting, shape: tuple[int, int, int], dtype: torch.dtype, reduction: str = "mean"
) -> Call:
    """shape: rows, width, classes. The loss, and the gradients of hidden states and weight."""
    rows, width, count = shape
    targets = classes(setting, rows, count)

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        return functional.linear_cross_entropy(hidden, weight, targets, reduction=reduction)

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        loss = reference.cross_entropy(hidden @ weight.T, targets, IGNORED, 0.0, 0.0)[0]
        return loss if reduction == "none" else loss.sum() / (targets != IGNORED).sum()

    return Call(ours, plain, _heads(setting, rows, count, dtype, width), True)


def linear_distillation(setting: Setting, shape: tuple[int, int, int], dtype: torch.dtype) -> Call:
    """shape: rows, the student's width, classes; the teacher is twice as wide."""
    rows, width, count = shape
    targets = classes(setting, rows, count)
    *student, taught, head = _heads(setting, rows, count, dtype, width, 2 * width)

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        return functional.linear_distillation(hidden, weight, taught, head, targets, temperature=2.0)

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        given = hidden, weight, None, taught.to(hidden.dtype), head.to(hidden.dtype), None
        return reference.linear_distillation_loss(*given, targets, 2.0, 0.3, IGNORED)[0]

    return Call(ours, plain, tuple(student), True)
