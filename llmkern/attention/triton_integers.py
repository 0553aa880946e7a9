"""What the forward in Triton does apart for queries and keys that are integers: their products, and their scales.

query: (address, step, scales, lifts), key: (address, step, scales), as llmkern.attention.triton_int8 made them.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def integer_products(q, k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(BLOCK_M, BLOCK_N) float32: q @ k^T of rows of up to 256 integers from -127 to 127, exact.

    The sums lie within 2^22: counted from the bits of 1.5 * 2^23, they are those of a float32 of that size. This takes
    a subtraction in place of the conversion, which some processors make as slowly as an exponential.
    """
    bits = tl.dot(q, tl.trans(k), tl.full((BLOCK_M, BLOCK_N), 0x4B400000, tl.int32), out_dtype=tl.int32)
    return bits.to(tl.float32, bitcast=True) - 12582912.0


@triton.jit
def of_keys(s, key, first, keys, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, EDGE: tl.constexpr):
    """The products s times the scales of their keys and, where a soft cap must see it, with what the average adds."""
    col = first + tl.arange(0, BLOCK_N)
    if EDGE:  # noqa: SIM108 (known to the compiler)
        scale = tl.load(key[2] + col, mask=col < keys, other=0.0)
    else:
        scale = tl.load(key[2] + col)
    s = s * scale[None, :]
    if SOFTCAP:
        s = s + key[3][:, None]
    return s


@triton.jit
def of_queries(
    query, key, numbers, start, queries, BLOCK_M: tl.constexpr, SOFTCAP: tl.constexpr, BEND: tl.constexpr
):  # fmt: skip
    """(key, numbers, lift): each query with a scale and a unit of its own, and what the average key adds to its scores.

    All scores of a row less the same number have the same weights: it is kept out of them, which are the more exact
    for it, and goes to the log-sum-exp, and from the sink. But a soft cap bends it: there it is the last of key.
    """
    scale, unit, softcap, slope = numbers
    row = start + tl.arange(0, BLOCK_M)
    of_row = tl.load(query[2] + row, mask=row < queries, other=1.0)
    lift = tl.load(query[3] + row, mask=row < queries, other=0.0)
    added = lift
    if SOFTCAP:
        added = lift / of_row
        lift = lift * 0.0
    else:
        lift = lift * scale
    if BEND:
        scales, units = (of_row * scale)[:, None], tl.zeros((BLOCK_M,), tl.float32) + unit
    else:
        scales, units = of_row[:, None], of_row * unit
    return (key[0], key[1], key[2], added), (scales, units, softcap, slope), lift
