"""Random shapes, strides, dtypes and positions, by hypothesis."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmkern.positional import reference
from llmkern.verify import verify
from tests.positional.cases import FLOATS, ROTARY_LAYOUTS, add, rotary_inputs, rotate, sinusoidal_inputs

SETTINGS = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@SETTINGS
@given(
    batch=st.integers(0, 3), kv_heads=st.integers(0, 3), group=st.integers(1, 3), length=st.integers(0, 40),
    pairs=st.integers(1, 70), rest=st.integers(0, 5), interleaved=st.booleans(), ids=st.booleans(),
    layout=st.sampled_from(list(ROTARY_LAYOUTS.values())), dtype=st.sampled_from(FLOATS), seed=st.integers(0, 99),
)  # fmt: skip
def test_rotary(isa, batch, kv_heads, group, length, pairs, rest, interleaved, ids, layout, dtype, seed):
    torch.manual_seed(seed)
    heads = max(kv_heads, 1) * group
    q, k, cos, sin = rotary_inputs((batch, heads, kv_heads, length, 2 * pairs + rest, 2 * pairs), dtype)
    # The tables' gradients are sums over few elements here: test_rotary.py looks at them.
    q, k = layout(q).requires_grad_(), k if k is None else layout(k).requires_grad_()
    positions = torch.randint(0, length + 5, (batch, length)) if ids else None
    functions = (rotate(interleaved, positions), rotate(interleaved, positions, plain=True))
    verify(*functions, (q, k, cos, sin)).raise_if_failed()


@SETTINGS
@given(
    length=st.integers(0, 40), batch=st.integers(0, 4), width=st.integers(1, 150), transposed=st.booleans(),
    p=st.sampled_from([0.0, 0.3, 1.0]), dtype=st.sampled_from(FLOATS), seed=st.integers(0, 99),
)  # fmt: skip
def test_sinusoidal_add(isa, length, batch, width, transposed, p, dtype, seed):
    torch.manual_seed(seed)
    x, pe = sinusoidal_inputs((length, batch, width), dtype)
    x = x.transpose(0, 1).contiguous().transpose(0, 1) if transposed else x
    verify(add, reference.sinusoidal_add, (x, pe), {"scale": 1.25, "dropout_p": p, "seed": seed}).raise_if_failed()
