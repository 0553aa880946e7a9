"""Whether elements share memory, from sizes, strides and addresses alone: what is written in place must not.

An element's place is a sum of index times stride. Two places are equal where a linear equation has a solution within
the bounds of the indices; it is searched from the largest stride down, leaving out what the smaller ones cannot reach.
For the layouts of real tensors, whose dimensions nest, one choice is left at each stride.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor

_Ints = Sequence[int]


def within(sizes: _Ints, strides: _Ints) -> bool:
    """Whether two elements of one tensor lie at one place."""
    dimensions = sorted((stride, size - 1) for size, stride in zip(sizes, strides, strict=True) if size != 1)
    reach, crossed = 0, False
    for stride, last in dimensions:
        crossed |= stride <= reach
        reach += stride * last
    if not crossed or 0 in sizes:
        return False
    if dimensions[0][0] == 0 or math.prod(sizes) > reach + 1:
        return True
    return _search(0, [(stride, -last, last) for stride, last in reversed(dimensions)], True)


def between(a: Tensor, b: Tensor) -> bool:
    """Whether an element of a shares memory with one of b; both have one dtype, and no overlap within."""
    if a.device != b.device or a.numel() == 0 or b.numel() == 0:
        return False
    if "meta" in (a.untyped_storage().device.type, b.untyped_storage().device.type):  # no addresses, as in fake tensors
        if a.untyped_storage()._cdata != b.untyped_storage()._cdata:
            return False
        distance = (b.storage_offset() - a.storage_offset()) * a.element_size()
    else:
        distance = b.data_ptr() - a.data_ptr()
    return at_distance(distance, a.element_size(), tuple(a.shape), a.stride(), tuple(b.shape), b.stride())


def extent(t: Tensor) -> int:
    """The bytes from a tensor's first element to the end of its last; 0 where it has none."""
    if t.numel() == 0:
        return 0
    return (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))) * t.element_size()


@lru_cache(maxsize=4096)
def at_distance(distance: int, width: int, a_sizes: _Ints, a_strides: _Ints, b_sizes: _Ints, b_strides: _Ints) -> bool:
    """Whether tensors share a byte: b's first element is `distance` bytes behind a's, an element has `width` bytes."""
    bounds: dict[int, tuple[int, int]] = {}  # of the index in a less the one in b, where they have one stride
    for sizes, strides, sign in ((a_sizes, a_strides, 1), (b_sizes, b_strides, -1)):
        for size, stride in zip(sizes, strides, strict=True):
            low, high = bounds.get(stride, (0, 0))
            bounds[stride] = (low, high + size - 1) if sign > 0 else (low - size + 1, high)
    terms = [(stride, *bounds[stride]) for stride in sorted(bounds, reverse=True) if stride]
    # Elements that are no whole number of elements apart meet the one before and the one behind.
    return any(_search(target, terms, False) for target in {distance // width, -(-distance // width)})


def _search(target: int, terms: list[tuple[int, int, int]], not_all_zero: bool) -> bool:
    """Whether sum stride * x = target has a solution, low <= x <= high, for terms (stride, low, high)."""
    if not terms:
        return target == 0 and not not_all_zero
    (stride, low, high), rest = terms[0], terms[1:]
    least, most = (sum(s * bound[i] for s, *bound in rest) for i in (0, 1))
    step = math.gcd(*(s for s, _, _ in rest))
    low, high = max(low, -((most - target) // stride)), min(high, (target - least) // stride)
    for x in range(low, high + 1):
        left = target - stride * x
        if (left % step == 0 if step else left == 0) and _search(left, rest, not_all_zero and x == 0):
            return True
    return False
