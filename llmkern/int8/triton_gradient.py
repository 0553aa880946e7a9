"""The Triton kernel of the gradient of int8_linear's input: that of the dequantised weight."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gradient_kernel(  # type: ignore[no-untyped-def]
    grad, weight, weight_scale, out,
    rows, outputs, depth, grad_s, weight_s, scale_n, scale_g, out_s,
    GROUP: tl.constexpr, TERMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    ABREAST: tl.constexpr,
):  # fmt: skip
    """out (rows, depth) = grad (rows, outputs) @ (weight_scale * weight) (outputs, depth), in out's dtype.

    grad, weight and out contiguous along their rows; weight int8, weight_scale float32 of outputs, with GROUP, a
    multiple of COLUMNS, of groups of k too. A tile of ROWS x COLUMNS a program, DEPTH outputs a step.

    An integer of 8 bits is a bfloat16, and a scale, the same for all columns of a tile, goes with the gradient. What is
    multiplied is therefore exact but for grad * scale, which is cut into TERMS bfloat16 of 8 bits each: 3 hold a
    float32, 2 more than a gradient of half precision has. The sums are float32, in the order of the outputs.
    """
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(depth, COLUMNS)
    program = tl.program_id(0)
    wide = ABREAST * across
    top = program // wide * ABREAST
    tall = tl.minimum(down - top, ABREAST)
    m = (top + program % wide % tall) * ROWS + tl.arange(0, ROWS)
    first_k = (program % wide // tall) * COLUMNS
    k = first_k + tl.arange(0, COLUMNS)
    n = tl.arange(0, DEPTH)
    from_grad = grad + (m.to(tl.int64) * grad_s)[:, None] + n[None, :]
    mine, there = (m < rows)[:, None], (k < depth)[None, :]
    if GROUP > 0:
        weight_scale += first_k // GROUP * scale_g
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, outputs, DEPTH):
        left = first + n < outputs
        g = tl.load(from_grad + first, mask=mine & left[None, :], other=0.0).to(tl.float32)
        s = tl.load(weight_scale + (first + n).to(tl.int64) * scale_n, mask=left, other=0.0)
        from_weight = weight + ((first + n).to(tl.int64) * weight_s)[:, None] + k[None, :]
        w = tl.load(from_weight, mask=left[:, None] & there, other=0).to(tl.float32).to(tl.bfloat16)
        rest = g * s[None, :]
        for term in tl.static_range(TERMS):
            part = rest.to(tl.bfloat16)
            acc = tl.dot(part, w, acc)
            if term + 1 < TERMS:
                kept = part.to(tl.float32)
                rest = tl.where(tl.abs(kept) < float("inf"), rest - kept, 0.0)  # of infinity nothing is left, not NaN
    tl.store(out + (m.to(tl.int64) * out_s)[:, None] + k[None, :], acc.to(out.dtype.element_ty), mask=mine & there)
