"""The Triton kernels of this family as backends: which calls they take, and how the arguments reach them.

Triton is imported when a call comes, never with the package.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmkern import triton
from llmkern.loss.compiled import refused
from llmkern.rows import as_rows, of_rows

if TYPE_CHECKING:
    from llmkern.inspect.triton_source import Compilation

MODULE = "llmkern.loss.triton_kernels"
#: Columns of a block, at most, of which the sums need one pass over lanes each; and elements of a program's tile, at
#: least: short rows come several at a time.
COLUMNS = {"cross_entropy": 4096, "distillation": 2048, "elementwise": 1024}
TILE = 2048
#: Columns are counted in 32 bits.
MOST_CLASSES = 2**31 - max(COLUMNS.values())


def tile(kind: str, width: int) -> tuple[dict[str, int], dict[str, Any]]:
    """The rows and columns of a program's block, and Triton's options."""
    columns = min(max(triton.power_of_two(width), 16), COLUMNS[kind])
    rows = max(1, TILE // columns)
    warps = max(rows * columns // (32 * 16), 4)  # 16 elements a thread: two or four loads of 16 bytes
    # A product that is fused with the first addition of a sum over lanes is rounded on one side of it alone, so that
    # lanes end with different sums.
    return {"ROWS": rows, "COLUMNS": columns}, {"num_warps": warps, "enable_fp_fusion": False}


def cross_entropy(
    run: triton.Run, logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """What op.cross_entropy takes, by cross_entropy_kernel, which `run` runs."""
    loss, lse = of_rows(logits, torch.float32), of_rows(logits, torch.float64)
    forward(
        run, as_rows(logits) if logits.numel() else logits, targets, ignore_index, label_smoothing, z_loss, loss, lse
    )
    return loss, lse


def forward(
    run: triton.Run, rows: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float,
    loss: Tensor, lse: Tensor, in_place: bool = False,
) -> None:  # fmt: skip
    """Writes loss and lse of rows of logits, side by side each; in_place: and their gradients over them, for an
    upstream gradient of 1."""
    if not rows.size(0):
        return
    shape, options = tile("cross_entropy", rows.size(1))
    arguments = (
        rows, targets.contiguous(), loss, lse, *rows.shape, rows.stride(0), ignore_index, 1.0 - label_smoothing,
        float(label_smoothing), float(z_loss), label_smoothing / rows.size(1),
    )  # fmt: skip
    constants = {"SMOOTH": label_smoothing != 0.0, "IN_PLACE": in_place, **shape}
    grid = (-(-rows.size(0) // shape["ROWS"]),)
    changed = ("logits",) if in_place else ()
    run(
        triton.Launch(MODULE, "cross_entropy_kernel", grid, arguments, constants, options, ("loss", "lse"), changed)
    )  # fmt: skip


def cross_entropy_backward(
    run: triton.Run, grad_loss: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, ignore_index: int,
    label_smoothing: float, z_loss: float,
) -> Tensor:  # fmt: skip
    """What op.cross_entropy_backward takes, by cross_entropy_backward_kernel, which `run` runs."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if out.numel():
        backward(run, grad_loss, as_rows(logits), targets, lse, ignore_index, label_smoothing, z_loss, out)
    return out


def backward(
    run: triton.Run, grad_loss: Tensor, rows: Tensor, targets: Tensor, lse: Tensor, ignore_index: int,
    label_smoothing: float, z_loss: float, out: Tensor,
) -> None:  # fmt: skip
    """Writes the gradients of rows of logits to out, which may be the rows."""
    shape, options = tile("elementwise", rows.size(1))
    arguments = (
        grad_loss.contiguous(), rows, targets.contiguous(), lse.contiguous(), out, *rows.shape, rows.stride(0),
        out.stride(0), ignore_index, 1.0 - label_smoothing, float(z_loss), label_smoothing / rows.size(1),
    )  # fmt: skip
    written = ("changed" if out is rows else "written", ("out",))
    run(triton.Launch(
        MODULE, "cross_entropy_backward_kernel", grid(rows, shape), arguments, shape, options, **dict([written])
    ))  # fmt: skip


def grid(rows: Tensor, shape: dict[str, int]) -> tuple[int]:
    """A program for each tile, in one dimension: the others of a grid end at 65535."""
    return (-(-rows.size(0) // shape["ROWS"]) * -(-rows.size(1) // shape["COLUMNS"]),)


def distillation(
    run: triton.Run, student: Tensor, teacher: Tensor, targets: Tensor, temperature: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What op.distillation takes, by distillation_kernel, which `run` runs."""
    soft, hard = (of_rows(student, torch.float32) for _ in range(2))
    statistics = of_rows(student, torch.float64, 3)
    if student.size(0):
        rows = as_rows(student), as_rows(teacher)
        distil(run, *rows, targets, temperature, ignore_index, soft, hard, statistics)
    return soft, hard, statistics


def distil(
    run: triton.Run, student: Tensor, teacher: Tensor, targets: Tensor, temperature: float, ignore_index: int,
    soft: Tensor, hard: Tensor, statistics: Tensor, grad_soft: float = 0.0, grad_hard: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes soft, hard and statistics of rows of logits; with grad_hard, a number on the device, the student's
    gradients over its logits, for that gradient of hard and grad_soft of soft."""
    shape, options = tile("distillation", student.size(1))
    in_place = grad_hard is not None
    arguments = (
        student, teacher, targets.contiguous(), soft, hard, statistics, soft if grad_hard is None else grad_hard,
        *student.shape, student.stride(0), teacher.stride(0), float(temperature), 1.0 / temperature,
        grad_soft / temperature, ignore_index,
    )  # fmt: skip
    run(triton.Launch(
        MODULE, "distillation_kernel", (-(-student.size(0) // shape["ROWS"]),), arguments,
        {"IN_PLACE": in_place, **shape}, options, ("soft", "hard", "statistics"), ("student",) if in_place else (),
    ))  # fmt: skip


def distillation_backward(
    run: triton.Run, grad_soft: Tensor, grad_hard: Tensor, student: Tensor, teacher: Tensor, targets: Tensor,
    statistics: Tensor, soft: Tensor, temperature: float, ignore_index: int, needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What op.distillation_backward takes, by distillation_backward_kernel, which `run` runs."""
    of_student, of_teacher = (
        torch.empty(t.shape if wanted else (0,), dtype=t.dtype, device=t.device)
        for t, wanted in zip((student, teacher), needs, strict=True)
    )
    if student.numel() and any(needs):
        rows = as_rows(student)
        shape, options = tile("elementwise", rows.size(1))
        taught = as_rows(teacher)
        arguments = (
            *(t.contiguous() for t in (grad_soft, grad_hard)), rows, taught,
            *(t.contiguous() for t in (targets, statistics, soft)), of_student if needs[0] else of_teacher,
            of_teacher if needs[1] else of_student, *rows.shape, rows.stride(0), taught.stride(0), float(temperature),
            ignore_index,
        )  # fmt: skip
        constants = {"STUDENT": bool(needs[0]), "TEACHER": bool(needs[1]), **shape}
        written = tuple(n for n, wanted in zip(("student_out", "teacher_out"), needs, strict=True) if wanted)
        run(triton.Launch(
            MODULE, "distillation_backward_kernel", grid(rows, shape), arguments, constants, options, written
        ))  # fmt: skip
    return of_student, of_teacher


def limits(x: Tensor, classes: int) -> str | None:
    """Why a kernel cannot take these logits, wherever they are."""
    many = f"its kernel takes up to {MOST_CLASSES} classes, not {classes}" if classes > MOST_CLASSES else None
    return refused(x) or many


TRITON_CROSS_ENTROPY = triton.served_by(cross_entropy, limits=lambda x, *args: limits(x, x.size(1)))
TRITON_CROSS_ENTROPY_BACKWARD = triton.served_by(
    cross_entropy_backward, limits=lambda grad, x, *args: limits(x, x.size(1))
)
TRITON_DISTILLATION = triton.served_by(distillation, limits=lambda x, *args: limits(x, x.size(1)))
TRITON_DISTILLATION_BACKWARD = triton.served_by(
    distillation_backward, limits=lambda soft, hard, x, *args: limits(x, x.size(1))
)


def examples(dtype: torch.dtype, width: int) -> Iterator[tuple[str, triton.Launch]]:
    """The launches of each kernel, plain and with all that it may have, named, without memory."""
    x = torch.empty(256, width, dtype=dtype, device="meta")
    targets = torch.empty(256, dtype=torch.int64, device="meta")
    loss, lse = of_rows(x, torch.float32), of_rows(x, torch.float64)
    statistics = of_rows(x, torch.float64, 3)
    made: list[triton.Launch] = []
    for smoothing, in_place in ((0.0, False), (0.1, True)):
        forward(made.append, x, targets, -100, smoothing, 1e-4, loss, lse, in_place)
        yield "gradients in place, smoothed" if in_place else "loss", made.pop()
    cross_entropy_backward(made.append, loss, x, targets, lse, -100, 0.1, 1e-4)
    yield "backward", made.pop()
    for factor in (None, loss):
        distil(made.append, x, x, targets, 4.0, -100, loss, loss, statistics, 1.0, factor)
        yield "loss" if factor is None else "gradients in place", made.pop()
    distillation_backward(made.append, loss, loss, x, x, targets, statistics, loss, 4.0, -100, (True, True))
    yield "backward of both", made.pop()


def compilations() -> Iterator[Compilation]:
    """What `python -m llmkern inspect` compiles: rows of a vocabulary, in 16 bits, and the largest in 32."""
    from llmkern.inspect.triton_source import Compilation

    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for name, launch in examples(dtype, 128256):
            if short == "fp32" and not name.startswith("gradients"):
                continue
            yield Compilation.of(launch, f"{short}, {name}, V=128256, {launch.options['num_warps']} warps")
