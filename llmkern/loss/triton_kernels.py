"""Cross-entropy and distillation in Triton: a program takes whole rows of logits, block after block.

Sums of exponentials are kept relative to the highest logit so far (online softmax), so that the forward reads each
logit once. csrc/loss and llmkern/loss/reference.py have the formulas. Log-sum-exps go through memory as float64 and are
subtracted in two parts of float32, so that the probabilities of large logits keep their digits. csrc/loss/row.h says
why the logarithm is scaled beside a highest logit beyond 2**30.

Rows whose target is ignore_index are not read. A target that is no class makes its row NaN, and reads nothing astray.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def classes(targets, row, rows, width, ignore_index):  # type: ignore[no-untyped-def]
    """Of each row: its class, -1 where it is none; whether it counts; what to add to its results: NaN for no class."""
    t = tl.load(targets + row, mask=row < rows, other=ignore_index)
    known = (t >= 0) & (t < width)
    return tl.where(known, t, -1).to(tl.int32), t != ignore_index, tl.where(known, 0.0, float("nan"))


@triton.jit
def shift_of(highest):  # type: ignore[no-untyped-def]
    """What is subtracted before exponentials are taken: 0 while all are -inf, whose difference would be NaN."""
    return tl.where(highest == float("-inf"), 0.0, highest)


@triton.jit
def logarithm(total):  # type: ignore[no-untyped-def]
    """log of a sum of exponentials relative to the highest; NaN where there were none but of -inf."""
    return tl.where(total == 0.0, float("nan"), tl.log(total))


@triton.jit
def scale_of(highest):  # type: ignore[no-untyped-def]
    """What the logarithm is multiplied by before it is added to the highest logit."""
    return tl.maximum(tl.abs(highest) * 2.0**-30, 1.0)


@triton.jit
def together(highest, log_sum):  # type: ignore[no-untyped-def]
    """The float64 log-sum-exp that goes through memory."""
    return highest.to(tl.float64) + log_sum.to(tl.float64) * scale_of(highest).to(tl.float64)


@triton.jit
def parts(lse):  # type: ignore[no-untyped-def]
    """A float64 log-sum-exp as two of float32, what is subtracted first and what then."""
    high = lse.to(tl.float32)
    rest, scale = (lse - high.to(tl.float64)).to(tl.float32), scale_of(high)
    return high, tl.where(scale > 1.0, rest / scale, rest)  # a division that is rounded right takes registers


@triton.jit
def row_sums(  # type: ignore[no-untyped-def]
    start, there, target, width, SMOOTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Of rows that begin at `start`, pointers (ROWS, 1): the highest logit, the sum of exponentials relative to it, the
    target's logit, and the sum of all where SMOOTH."""
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    given = tl.zeros((ROWS,), tl.float32)
    plain = tl.zeros((ROWS,), tl.float32)
    for first in range(0, width, COLUMNS):
        d = first + tl.arange(0, COLUMNS)[None, :]
        inside = there[:, None] & (d < width)
        x = tl.load(start + d, mask=inside, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(x, 1))
        shift = shift_of(higher)
        total = total * tl.exp(highest - shift) + tl.sum(tl.exp(x - shift[:, None]), 1)
        given += tl.sum(tl.where(d == target[:, None], x, 0.0), 1)
        if SMOOTH:
            plain += tl.sum(tl.where(inside, x, 0.0), 1)
        highest = higher
    return highest, total, given, plain


@triton.jit
def store_loss(  # type: ignore[no-untyped-def]
    loss, lse, row, rows, counted, wrong, highest, log_sum, given, plain, width, right, smoothing, z_loss,
    SMOOTH: tl.constexpr,
):  # fmt: skip
    value = right * (highest - given)  # small where the target is the highest, and so is the logarithm then
    if SMOOTH:
        value += smoothing * (highest - plain / width)
    sums = highest + log_sum
    value += log_sum + z_loss * sums * sums + wrong
    tl.store(loss + row, tl.where(counted, value, 0.0), mask=row < rows)
    tl.store(lse + row, tl.where(counted, together(highest, log_sum), 0.0), mask=row < rows)


@triton.jit
def slope(x, d, target, high, low, factor, right, share):  # type: ignore[no-untyped-def]
    """The gradient of logits x in columns d, for an upstream gradient of 1: with p = e^(x - high - low), lse's parts,
    p - share - right at the target + factor p, which is small and added last."""
    p = tl.exp((x - high[:, None]) - low[:, None])
    return (p - share - tl.where(d == target[:, None], right, 0.0)) + p * factor[:, None]


@triton.jit
def cross_entropy_kernel(  # type: ignore[no-untyped-def]
    logits, targets, loss, lse, rows, width, logits_s, ignore_index, right, smoothing, z_loss, share,
    SMOOTH: tl.constexpr, IN_PLACE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """loss and lse of ROWS rows; IN_PLACE: their gradients for an upstream gradient of 1 take the place of the logits.

    Grid: (blocks of rows,). right: 1 - smoothing. share: smoothing / width.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    target, counted, wrong = classes(targets, row, rows, width, ignore_index)
    start = logits + (row * logits_s)[:, None]
    highest, total, given, plain = row_sums(start, counted, target, width, SMOOTH, ROWS, COLUMNS)
    log_sum = logarithm(total)
    store_loss(
        loss, lse, row, rows, counted, wrong, highest, log_sum, given, plain, width, right, smoothing, z_loss, SMOOTH
    )
    if IN_PLACE:
        factor = 2.0 * z_loss * (highest + log_sum) + wrong
        for first in range(0, width, COLUMNS):
            d = first + tl.arange(0, COLUMNS)[None, :]
            inside = d < width
            x = tl.load(start + d, mask=inside & counted[:, None], other=0.0).to(tl.float32)
            grad = slope(x, d, target, highest, log_sum, factor, right, share)
            grad = tl.where(counted[:, None], grad, 0.0).to(logits.dtype.element_ty)
            tl.store(start + d, grad, mask=inside & (row < rows)[:, None])


@triton.jit
def cross_entropy_backward_kernel(  # type: ignore[no-untyped-def]
    grad_loss, logits, targets, lse, out, rows, width, logits_s, out_s, ignore_index, right, z_loss, share,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of logits; out may be the logits. Grid: (blocks of rows * blocks of columns,)."""
    blocks = tl.cdiv(width, COLUMNS)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    target, counted, wrong = classes(targets, row, rows, width, ignore_index)
    there = (row < rows)[:, None] & (d < width)
    given = tl.load(grad_loss + row, mask=counted, other=0.0)
    sums = tl.load(lse + row, mask=counted, other=0.0)
    high, low = parts(sums)
    x = tl.load(logits + (row * logits_s)[:, None] + d, mask=there & counted[:, None], other=0.0).to(tl.float32)
    factor = 2.0 * z_loss * high + wrong
    grad = slope(x, d, target, high, low, factor, right, share) * given[:, None]
    grad = tl.where(counted[:, None], grad, 0.0).to(out.dtype.element_ty)
    tl.store(out + (row * out_s)[:, None] + d, grad, mask=there)


@triton.jit
def distillation_kernel(  # type: ignore[no-untyped-def]
    student, teacher, targets, soft, hard, statistics, hard_factor, rows, width, student_s, teacher_s, temperature,
    inverse, soft_factor, ignore_index, IN_PLACE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """soft, hard and statistics of ROWS rows, both logits read once; IN_PLACE: the student's gradients, for upstream
    gradients soft_factor * T of soft and *hard_factor of hard, take the place of its logits.

    Grid: (blocks of rows,). inverse: 1 / T. The divergence is the mean of the difference of both models' logits, in the
    teacher's probabilities, less the difference of their log-sum-exps; each logit relative to its row's highest so far,
    by whose change the sum is corrected.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    target, counted, wrong = classes(targets, row, rows, width, ignore_index)
    start = student + (row * student_s)[:, None]
    taught = teacher + (row * teacher_s)[:, None]
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    highest_q = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)  # of the student at T
    total_hard = tl.zeros((ROWS,), tl.float32)  # at 1
    total_q = tl.zeros((ROWS,), tl.float32)  # of the teacher at T
    apart = tl.zeros((ROWS,), tl.float32)  # the differences in the teacher's weights
    given = tl.zeros((ROWS,), tl.float32)
    for first in range(0, width, COLUMNS):
        d = first + tl.arange(0, COLUMNS)[None, :]
        inside = exists[:, None] & (d < width)
        x = tl.load(start + d, mask=inside, other=float("-inf")).to(tl.float32)
        y = tl.load(taught + d, mask=inside, other=float("-inf")).to(tl.float32)
        higher, higher_q = tl.maximum(highest, tl.max(x, 1)), tl.maximum(highest_q, tl.max(y, 1))
        shift, shift_q = shift_of(higher), shift_of(higher_q)
        given += tl.sum(tl.where(d == target[:, None], x, 0.0), 1)
        x -= shift[:, None]
        y -= shift_q[:, None]
        q = tl.exp(y * inverse)
        moved = tl.where(highest == float("-inf"), 0.0, highest - shift)
        moved_q = tl.where(highest_q == float("-inf"), 0.0, highest_q - shift_q)
        apart = (apart + total_q * (moved_q - moved)) * tl.exp(moved_q * inverse)
        apart += tl.sum(tl.where(q == 0.0, 0.0, q * (y - x)), 1)
        total = total * tl.exp(moved * inverse) + tl.sum(tl.exp(x * inverse), 1)
        total_hard = total_hard * tl.exp(moved) + tl.sum(tl.exp(x), 1)
        total_q = total_q * tl.exp(moved_q * inverse) + tl.sum(q, 1)
        highest, highest_q = higher, higher_q
    log_sum, log_hard, log_q = logarithm(total), logarithm(total_hard), logarithm(total_q)
    tl.store(soft + row, apart / total_q * inverse - log_q + log_sum, mask=exists)
    tl.store(hard + row, tl.where(counted, log_hard + (highest - given) + wrong, 0.0), mask=exists)
    at = statistics + 3 * row
    tl.store(at, together(tl.div_rn(highest, temperature), log_sum), mask=exists)
    tl.store(at + 1, together(highest, log_hard), mask=exists)
    tl.store(at + 2, together(tl.div_rn(highest_q, temperature), log_q), mask=exists)
    if IN_PLACE:
        factor = tl.load(hard_factor) + wrong
        for first in range(0, width, COLUMNS):
            d = first + tl.arange(0, COLUMNS)[None, :]
            inside = exists[:, None] & (d < width)
            x = tl.load(start + d, mask=inside, other=0.0).to(tl.float32) - highest[:, None]
            y = tl.load(taught + d, mask=inside, other=0.0).to(tl.float32) - highest_q[:, None]
            p, q = tl.exp(x * inverse - log_sum[:, None]), tl.exp(y * inverse - log_q[:, None])
            right = tl.exp(x - log_hard[:, None]) - tl.where(d == target[:, None], 1.0, 0.0)
            grad = soft_factor * (p - q) + tl.where(counted[:, None], factor[:, None] * right, 0.0)
            tl.store(start + d, grad.to(student.dtype.element_ty), mask=inside)


@triton.jit
def distillation_backward_kernel(  # type: ignore[no-untyped-def]
    grad_soft, grad_hard, student, teacher, targets, statistics, soft, student_out, teacher_out, rows, width,
    student_s, teacher_s, temperature, ignore_index, STUDENT: tl.constexpr, TEACHER: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of both logits, contiguous; STUDENT, TEACHER: which are wanted. Grid: as
    cross_entropy_backward_kernel's."""
    blocks = tl.cdiv(width, COLUMNS)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    exists = row < rows
    there = exists[:, None] & (d < width)
    target, counted, wrong = classes(targets, row, rows, width, ignore_index)
    scale = tl.div_rn(tl.load(grad_soft + row, mask=exists, other=0.0), temperature)
    x = tl.load(student + (row * student_s)[:, None] + d, mask=there, other=0.0).to(tl.float32)
    y = tl.load(teacher + (row * teacher_s)[:, None] + d, mask=there, other=0.0).to(tl.float32)
    at = statistics + 3 * row
    high, low = parts(tl.load(at, mask=exists, other=0.0))
    high_q, low_q = parts(tl.load(at + 2, mask=exists, other=0.0))
    log_p = (tl.div_rn(x, temperature) - high[:, None]) - low[:, None]
    log_q = (tl.div_rn(y, temperature) - high_q[:, None]) - low_q[:, None]
    q = tl.exp(log_q)
    place = (row * width)[:, None] + d
    if STUDENT:
        given = tl.load(grad_hard + row, mask=counted, other=0.0) + wrong
        high_1, low_1 = parts(tl.load(at + 1, mask=exists, other=0.0))
        right = tl.exp((x - high_1[:, None]) - low_1[:, None]) - tl.where(d == target[:, None], 1.0, 0.0)
        grad = scale[:, None] * (tl.exp(log_p) - q) + tl.where(counted[:, None], given[:, None] * right, 0.0)
        tl.store(student_out + place, grad.to(student_out.dtype.element_ty), mask=there)
    if TEACHER:
        divergence = tl.load(soft + row, mask=exists, other=0.0)
        difference = tl.where(q == 0.0, 0.0, log_q - log_p - divergence[:, None])
        grad = scale[:, None] * q * difference
        tl.store(teacher_out + place, grad.to(teacher_out.dtype.element_ty), mask=there)
