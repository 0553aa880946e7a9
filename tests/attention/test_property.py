"""Random shapes, masks, strides and dtypes, by hypothesis."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmkern.verify import verify
from tests.attention.cases import RULES, attend, rule, tensors

SIZES = st.integers(1, 140)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    batch=st.integers(1, 3), kv_heads=st.integers(1, 2), group=st.integers(1, 3), queries=SIZES, keys=SIZES,
    size=st.integers(1, 96), width=st.integers(1, 96), name=st.sampled_from(RULES), transposed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_contract_holds(
    isa, batch, kv_heads, group, queries, keys, size, width, name, transposed, dtype, seed
):  # fmt: skip
    torch.manual_seed(seed)
    shape = (batch, kv_heads * group, kv_heads, queries, keys, size, width)
    inputs = tensors(shape, dtype)
    if transposed:
        inputs = tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs)
    verify(attend(), attend(plain=True), inputs, rule(name, shape, dtype)).raise_if_failed()
