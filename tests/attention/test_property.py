"""Random shapes, masks, strides and dtypes, by hypothesis."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmkern.verify import verify
from tests.attention.cases import FEATURES, RULES, attend, rule, tensors

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


SMALL = st.integers(1, 40)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    batch=st.integers(1, 3), kv_heads=st.integers(1, 2), group=st.integers(1, 3), queries=SMALL, keys=SMALL,
    size=st.integers(1, 32), width=st.integers(1, 32), masked=st.sampled_from([*RULES, *FEATURES]),
    left=st.integers(-1, 50), right=st.integers(-1, 50), bottom_right=st.booleans(), capped=st.booleans(),
    slopes=st.sampled_from([None, 1, 2]), sink=st.booleans(), dropout_p=st.sampled_from([0.0, 0.1, 0.7]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_contract_holds_for_rules_together(
    batch, kv_heads, group, queries, keys, size, width, masked, left, right, bottom_right, capped, slopes, sink,
    dropout_p, dtype, seed,
):  # fmt: skip
    torch.manual_seed(seed)
    heads = kv_heads * group
    shape = (batch, heads, kv_heads, queries, keys, size, width)
    rules = {"window": (left, right), "bottom_right": bottom_right, **rule(masked, shape, dtype)}
    if capped:
        rules["softcap"] = 2.5
    if slopes is not None:
        rules["slopes"] = torch.rand(heads) if slopes == 1 else torch.rand(batch, heads)
    if sink:
        rules["sink"] = torch.randn(heads)
    if dropout_p > 0.0:
        rules.update(dropout_p=dropout_p, seed=torch.tensor(seed))
    verify(attend(), attend(plain=True), tensors(shape, dtype), rules).raise_if_failed()
