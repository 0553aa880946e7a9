"""Any strides and any rank give the same numbers."""

from __future__ import annotations

import pytest
import torch

from llmkern.functional import int8_linear
from tests.int8.cases import FLOATS, inputs

LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "every second column": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "every second row": lambda x: torch.stack([x, x], 1).flatten(0, 1)[::2],
    "padded rows": lambda x: torch.cat([x, x[:, :3]], 1)[:, : x.size(1)],
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides(layout, dtype, isa):
    x, weight, scale, bias = inputs((9, 70, 33), dtype)
    expected = int8_linear(x, weight, scale, bias)
    assert torch.equal(int8_linear(layout(x), weight, scale, bias), expected)
    assert torch.equal(int8_linear(x, layout(weight), scale, bias), expected)
    spread = [torch.stack([t, t], 1)[:, 0] for t in (scale, bias)]
    assert torch.equal(int8_linear(x, weight, *spread), expected)


def test_ranks(isa):
    x, weight, scale, bias = inputs((24, 70, 33))
    expected = int8_linear(x, weight, scale, bias)
    assert torch.equal(int8_linear(x[0], weight, scale, bias), expected[0])
    for shape in ((2, 12), (2, 3, 4), (1, 24, 1)):
        assert torch.equal(int8_linear(x.view(*shape, 70), weight, scale, bias), expected.view(*shape, 33))
    batch = x.view(4, 6, 70)
    assert torch.equal(int8_linear(batch.transpose(0, 1), weight, scale, bias), expected.view(4, 6, 33).transpose(0, 1))
    assert torch.equal(int8_linear(batch[:, 2:4], weight, scale, bias), expected.view(4, 6, 33)[:, 2:4])
    assert torch.equal(int8_linear(x[:1].expand(5, 70), weight, scale, bias), expected[:1].expand(5, 33))
    assert int8_linear(x.new_zeros(0, 3, 70), weight, scale, bias).shape == (0, 3, 33)
