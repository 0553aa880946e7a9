"""Gated activations in Triton, forward and backward: elementwise, tiles of rows and columns."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def logistic(x):  # type: ignore[no-untyped-def]
    """s = 1 / (1 + e^-x) by e^-|x|, which does not overflow, and its slope s (1 - s), whose digits are all there."""
    e = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + e)
    return tl.where(x < 0.0, e * large, large), e * large * large


@triton.jit
def value_and_slope(x, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """f(x) and f'(x)."""
    if ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x), tl.where(x > 0.0, 1.0, x * 0.0)
    elif ACTIVATION == "silu":
        s, slope = logistic(x)
        return x * s, s + x * slope
    elif ACTIVATION == "gelu":
        below = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        return x * below, below + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    else:  # gelu_tanh: (1 + tanh y) / 2 is the sigmoid of 2 y
        s, slope = logistic(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
        return x * s, s + x * slope * 1.5957691216057308 * (1.0 + 0.134145 * x * x)


@triton.jit
def gated_kernel(  # type: ignore[no-untyped-def]
    gate, up, out, rows, width, gate_s, up_s,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out = f(gate) * up; out contiguous. Grid: (blocks of rows, blocks of columns)."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    d = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    there = (row < rows) & (d < width)
    x = tl.load(gate + row * gate_s + d, mask=there, other=0.0).to(tl.float32)
    value, _ = value_and_slope(x, ACTIVATION)
    y = value * tl.load(up + row * up_s + d, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * width + d, y.to(out.dtype.element_ty), mask=there)


@triton.jit
def gated_backward_kernel(  # type: ignore[no-untyped-def]
    grad, gate, up, dgate, dup, rows, width, grad_s, gate_s, up_s,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dgate = grad * up * f'(gate), dup = grad * f(gate), both contiguous. Grid: as gated_kernel's."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    d = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    there = (row < rows) & (d < width)
    g = tl.load(grad + row * grad_s + d, mask=there, other=0.0).to(tl.float32)
    x = tl.load(gate + row * gate_s + d, mask=there, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_s + d, mask=there, other=0.0).to(tl.float32)
    value, slope = value_and_slope(x, ACTIVATION)
    tl.store(dgate + row * width + d, (g * u * slope).to(dgate.dtype.element_ty), mask=there)
    tl.store(dup + row * width + d, (g * value).to(dup.dtype.element_ty), mask=there)
