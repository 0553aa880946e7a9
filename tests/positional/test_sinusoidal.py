"""x * scale + pe: the contract, layouts, gradients."""

from __future__ import annotations

import pytest
import torch

from llmkern.positional import op, reference
from llmkern.verify import verify
from tests.positional.cases import FLOATS, SINUSOIDAL, add, sinusoidal_inputs


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SINUSOIDAL.values(), ids=SINUSOIDAL)
def test_contract(shape, dtype, isa):
    for scale in (1.0, 22.627416997969522):
        inputs = sinusoidal_inputs(shape, dtype)
        verify(add, reference.sinusoidal_add, inputs, {"scale": scale}).raise_if_failed()


def test_the_table_is_that_of_the_paper():
    table = reference.sinusoidal_table(50, 7).double()
    for position, column in ((0, 0), (0, 1), (3, 2), (49, 3), (17, 6)):
        angle = torch.tensor(position / 10000.0 ** (2 * (column // 2) / 7), dtype=torch.float64)
        expected = angle.cos() if column % 2 else angle.sin()
        assert abs(table[position, 0, column] - expected) < 1e-5


@pytest.mark.parametrize("dtype", FLOATS)
def test_strides(dtype, isa):
    x, pe = sinusoidal_inputs((9, 4, 24), dtype)
    expected = op.sinusoidal_add(x, pe, scale=1.5)
    layouts = {
        "batch first": x.transpose(0, 1).contiguous().transpose(0, 1),
        "width outermost": x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "every second": torch.stack([x, x], -1).flatten(-2)[..., ::2],
        "misaligned": torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
    }
    for name, strided in layouts.items():
        assert torch.equal(op.sinusoidal_add(strided, pe, scale=1.5), expected), name
    repeated = x[:, :1].expand(9, 4, 24)
    assert torch.equal(op.sinusoidal_add(repeated, pe), op.sinusoidal_add(repeated.contiguous(), pe))
    sparse = torch.stack([pe, pe], -1).flatten(-2)[..., ::2]
    assert torch.equal(op.sinusoidal_add(x, sparse, scale=1.5), expected)


def test_rows_do_not_depend_on_the_batch_or_the_threads(isa):
    x, pe = sinusoidal_inputs((200, 5, 300), torch.float32)
    whole = op.sinusoidal_add(x, pe)
    assert torch.equal(whole[:, 2:3], op.sinusoidal_add(x[:, 2:3], pe))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(whole, op.sinusoidal_add(x, pe))
    finally:
        torch.set_num_threads(threads)


def test_what_is_not_finite_passes(isa):
    x, pe = sinusoidal_inputs((2, 1, 19), torch.float32)
    x[0, 0, 3], x[1, 0, 18], x[1, 0, 0] = torch.nan, torch.inf, -torch.inf
    verify(add, reference.sinusoidal_add, (x, pe), gradients=False).raise_if_failed()
