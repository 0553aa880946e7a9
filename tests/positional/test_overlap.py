"""Shared memory is told from sizes and strides as it is by listing every place."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkern.overlap import at_distance, between, extent, within


def places(sizes, strides, start=0, width=1):
    """Every element's first byte."""
    return [start + width * sum(map(int.__mul__, i, strides)) for i in itertools.product(*map(range, sizes))]


def layout(dimensions, smallest):
    sizes, strides = (st.tuples(*[st.integers(low, high)] * dimensions) for low, high in ((smallest, 4), (0, 14)))
    return st.tuples(sizes, strides)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(layout(4, 0))
def test_within(made):
    every = places(*made)
    assert within(*made) == (len(set(every)) < len(every))


@settings(max_examples=500, deadline=None, derandomize=True)
@given(layout(3, 1), layout(3, 1), st.sampled_from([1, 2, 4]), st.integers(-60, 60))
def test_between(a, b, width, distance):
    bytes_of = [
        {place + i for place in places(*made, start, width) for i in range(width)}
        for made, start in ((a, 0), (b, distance))
    ]
    assert at_distance(distance, width, *a, *b) == bool(bytes_of[0] & bytes_of[1])


def test_of_tensors():
    fused = torch.zeros(2, 5, 3, 4, 8)
    q, k, v = (t.transpose(1, 2) for t in fused.unbind(2))
    assert not between(q, k) and not between(v, q) and between(q, q)
    assert between(q[:, :3], q[:, 2:]) and not between(q[:, :2], q[:, 2:])
    assert between(q, fused.flatten()[5:6]) and not between(q, fused.flatten()[:0])
    assert not between(q, q.clone()) and not between(q, q.to("meta"))
    a, b = torch.zeros(4, device="meta"), torch.zeros(8, device="meta")
    assert not between(a, b) and between(b[:4], b[3:]) and not between(b[::2], b[1::2])
    assert extent(torch.zeros(8)[::2]) == 28 and extent(torch.zeros(0, 3)) == 0


@pytest.mark.parametrize("sizes", [(8, 32, 4096, 128), (1, 1, 1, 10**6)])
def test_large_ones_are_no_more_work(sizes):
    _, heads, length, width = sizes
    strides = (length * 3 * heads * width, width, 3 * heads * width, 1)
    assert not within(sizes, strides)
    assert not at_distance(2 * heads * width, 2, sizes, strides, sizes, strides)
    assert at_distance(2 * (21 * heads * width + width), 2, sizes, strides, sizes, strides) == (heads > 1)
