"""The Triton kernel of Hadamard's transform, before rows become integers and behind the gradient of the input."""

from __future__ import annotations

import triton
import triton.language as tl

#: Elements that are mixed lie so far apart (llmkern.int8.scheme.ROTATION_STRIDE).
STRIDE = tl.constexpr(16)


@triton.jit
def butterfly(v, ROWS: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """v (ROWS, 16 SIZE): elements 16 HALF apart become their sum and difference."""
    apart = tl.reshape(v, (ROWS, SIZE // (2 * HALF), 2, HALF * STRIDE))
    a, b = tl.split(tl.permute(apart, (0, 1, 3, 2)))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (ROWS, SIZE * STRIDE))


@triton.jit
def hadamard_kernel(  # type: ignore[no-untyped-def]
    x, out, rows, blocks, factor, x_s, out_s,
    SIZE: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out = Hadamard's transform of x (rows, blocks * 16 SIZE), both contiguous along the row, in out's dtype.

    SIZE = 2^STEPS; factor: SIZE^-1/2 as the reference rounds it. ROWS rows of one block a program. Sums in float32 and
    the order of llmkern.int8.reference.hadamard, so that float32 results are its bits. Source: Ashkboos et al. 2024,
    "QuaRot", section 3; the fast transform is Fino and Algazi 1976.
    """
    program = tl.program_id(0)
    m = (program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = program % blocks * (SIZE * STRIDE) + tl.arange(0, SIZE * STRIDE)
    mine = (m < rows)[:, None]
    v = tl.load(x + (m * x_s)[:, None] + k[None, :], mask=mine, other=0.0).to(tl.float32)
    for step in tl.static_range(STEPS):
        v = butterfly(v, ROWS, SIZE, 1 << step)
    tl.store(out + (m * out_s)[:, None] + k[None, :], (v * factor).to(out.dtype.element_ty), mask=mine)
