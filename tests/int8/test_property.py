"""Random shapes, strides, dtypes and magnitudes, by hypothesis."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmkern.functional import int8_linear
from llmkern.int8 import reference
from tests.int8.cases import FLOATS


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(0, 30), depth=st.integers(0, 200), outputs=st.integers(0, 150), exponent=st.integers(-40, 36),
    offset=st.sampled_from([0.0, 1.0, -3.0]), dtype=st.sampled_from(FLOATS), with_bias=st.booleans(),
    transposed=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_equal_to_the_reference(
    isa, rows, depth, outputs, exponent, offset, dtype, with_bias, transposed, seed
):  # fmt: skip
    torch.manual_seed(seed)
    x = ((torch.randn(depth, rows).t() if transposed else torch.randn(rows, depth)) + offset) * 10.0**exponent
    x = x.to(dtype)
    weight = torch.randint(-128, 128, (outputs, depth), dtype=torch.int8)
    scale = torch.rand(outputs) + 1e-3
    bias = torch.randn(outputs) if with_bias else None
    out, expected = int8_linear(x, weight, scale, bias), reference.int8_linear(x, weight, scale, bias)
    assert out.dtype == dtype and torch.equal(out.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))
