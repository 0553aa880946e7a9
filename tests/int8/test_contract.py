"""The integers are exact, and so are the few float32 operations after them: every result equals the reference's."""

from __future__ import annotations

import pytest
import torch

from llmkern import backend
from llmkern.functional import int8_linear
from llmkern.int8 import reference
from llmkern.int8.compiled import MOST_DEPTH
from llmkern.verify import verify
from tests.int8.cases import FLOATS, SHAPES, inputs, row_kinds


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and torch.equal(
        a.nan_to_num(nan=0.0), b.nan_to_num(nan=0.0)
    )  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equal_to_the_reference(shape, dtype, isa):
    x, weight, scale, bias = inputs(shape, dtype)
    for b in (None, bias, bias.to(dtype)):
        assert same(int8_linear(x, weight, scale, b), reference.int8_linear(x, weight, scale, b))


def test_the_reference_is_integer_arithmetic():
    """In Python's integers and fractions of float32, element by element."""
    x, weight, scale, _ = inputs((3, 50, 4))
    q, row_scale, zero_point = reference.quantize_rows(x)
    y = reference.int8_linear(x, weight, scale, None)
    for m in range(3):
        for n in range(4):
            total = sum((int(a) - int(zero_point[m])) * int(w) for a, w in zip(q[m], weight[n], strict=True))
            assert y[m, n] == torch.tensor(float(total)) * (row_scale[m] * scale[n])


@pytest.mark.parametrize("depth", [3, 64, 301])
def test_special_rows(depth, isa):
    kinds = row_kinds(depth)
    x = torch.stack(list(kinds.values()))
    _, weight, scale, bias = inputs((1, depth, 37))
    out, expected = int8_linear(x, weight, scale, bias), reference.int8_linear(x, weight, scale, bias)
    for i, name in enumerate(kinds):
        assert same(out[i], expected[i]), name
        broken = name in ("range beyond float32", "infinite", "negative infinite", "nan first", "nan last")
        assert out[i].isnan().all() if broken else out[i].isfinite().all(), name


@pytest.mark.parametrize("depth", [16, 4096, 65_000])
def test_the_largest_sums(depth, isa):
    """All products at their extremes: no instruction may saturate on the way."""
    for low, high, value in ((0.0, 255.0, 127), (-255.0, 0.0, -127), (0.0, 255.0, -128)):
        x = torch.full((2, depth), high if high else low)
        x[1, ::2] = low if high else high
        weight = torch.full((33, depth), value, dtype=torch.int8)
        scale = torch.ones(33)
        assert same(int8_linear(x, weight, scale), reference.int8_linear(x, weight, scale, None))


def test_deeper_than_the_sums_hold_goes_to_the_reference(monkeypatch):
    monkeypatch.setattr(backend, "_warned", set())
    x, weight, scale = torch.ones(1, MOST_DEPTH + 1), torch.ones(1, MOST_DEPTH + 1, dtype=torch.int8), torch.ones(1)
    with pytest.warns(UserWarning, match=r"K = \d+ is above"):
        out = int8_linear(x, weight, scale)
    assert abs(out.item() / (MOST_DEPTH + 1) - 1) < 1e-6


def test_a_row_depends_on_nothing_around_it(isa):
    x, weight, scale, bias = inputs((100, 96, 130))
    whole = int8_linear(x, weight, scale, bias)
    for rows in (slice(0, 1), slice(7, 12), slice(99, 100)):
        assert torch.equal(int8_linear(x[rows], weight, scale, bias), whole[rows])
    assert torch.equal(int8_linear(x, weight[30:40], scale[30:40], bias[30:40]), whole[:, 30:40])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(int8_linear(x, weight, scale, bias), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients(dtype, isa):
    """Those of a linear layer with the dequantised weight: straight through the rounding."""
    x, weight, scale, bias = inputs((9, 70, 33), dtype)

    bias = bias.to(dtype)
    arguments = (x.requires_grad_(), weight, scale, bias.requires_grad_())
    report = verify(int8_linear, reference.int8_linear, arguments)
    report.raise_if_failed()
    assert [row.name for row in report.rows] == ["output", "x", "bias"]
    grad = torch.autograd.grad(reference.int8_linear(*arguments).sum(), x)[0]
    expected = (weight * scale[:, None].double()).sum(0).expand_as(x)
    torch.testing.assert_close(grad, expected.to(dtype))
