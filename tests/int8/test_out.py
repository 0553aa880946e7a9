"""int8_linear(..., out=...): the same bits, into any rows and nothing besides, and what must not be written is refused."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from llmkern.functional import int8_linear
from llmkern.int8 import reference, scheme
from tests.int8.cases import FLOATS, QUANTIZATIONS, inputs, positional, quantized, with_outliers

OP = torch.ops.llmkern.int8_linear_out


def arguments(rows, outputs, choice, activation="none", dtype=torch.float32, depth=64):
    x = with_outliers(torch.randn(rows, depth)).to(dtype)
    weight, scale = quantized(torch.randn(outputs, depth), **choice)
    written = outputs // 2 if activation in scheme.PAIRS else outputs
    return (x, weight, scale, torch.randn(outputs)), torch.randn(rows, written).to(dtype)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
@pytest.mark.parametrize("activation", scheme.ACTIVATIONS)
def test_the_bits_of_a_call_without(activation, kind, isa):
    choice = {**QUANTIZATIONS[kind], "activation": activation}
    for rows, dtype in ((1, torch.float32), (5, torch.bfloat16), (33, torch.float16), (35, torch.float32)):
        args, residual = arguments(rows, 2 * 37, QUANTIZATIONS[kind], activation, dtype)
        for r in (None, residual):
            expected = int8_linear(*args, residual=r, **choice)
            out = torch.empty_like(expected)
            assert int8_linear(*args, residual=r, out=out, **choice) is out
            assert torch.equal(out, expected), (rows, dtype)
            assert int8_linear(*args, residual=r, out=out, **choice) is out  # by the plan that is kept
            assert torch.equal(out, expected), (rows, dtype)


# A tensor of the shape (rows, outputs) within a larger one, and that one.
LAYOUTS = {
    "padded rows": lambda m, n: (whole := torch.empty(m, n + 5), whole[:, 2 : n + 2]),
    "every second row": lambda m, n: (whole := torch.empty(2 * m, n), whole[1::2]),
    "rows far apart": lambda m, n: (whole := torch.empty(m, 4099), whole[:, 1000 : 1000 + n]),
    "misaligned": lambda m, n: (whole := torch.empty(m * n + 2), whole[1:-1].view(m, n)),
    "every second column": lambda m, n: (whole := torch.empty(m, 2 * n + 1), whole[:, 1::2]),
    "transposed": lambda m, n: (whole := torch.empty(n, m + 1), whole[:, 1:].t()),
    "rows in another order": lambda m, n: (whole := torch.empty(1, n, 1, m), whole[0, :, 0].t()),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_layout_and_nothing_around_it(layout, dtype, isa):
    for kind, activation in (("outliers", "none"), ("16bit", "gelu"), ("groups of 32", "swiglu")):
        choice = {**QUANTIZATIONS[kind], "activation": activation}
        for rows, outputs in ((1, 2), (7, 66), (33, 130)):
            args, residual = arguments(rows, outputs, QUANTIZATIONS[kind], activation, dtype)
            whole, out = (t.to(dtype) for t in layout(*residual.shape))
            out = whole.as_strided(out.shape, layout(*residual.shape)[1].stride(), layout(*residual.shape)[1].storage_offset())
            around = torch.ones_like(whole, dtype=torch.bool)
            around.as_strided(out.shape, out.stride(), out.storage_offset()).zero_()
            whole.fill_(7)
            assert int8_linear(*args, residual=residual, out=out, **choice) is out
            assert torch.equal(out, int8_linear(*args, residual=residual, **choice)), (kind, rows)
            assert (whole[around] == 7).all(), (kind, rows)
