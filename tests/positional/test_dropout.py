"""The dropout in the sinusoidal add: its mask and its gradients."""

from __future__ import annotations

import pytest
import torch

from llmkern.positional import op, reference
from llmkern.verify import verify
from tests.positional.cases import FLOATS, add, sinusoidal_inputs


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(7, 3, 37), (4, 2, 64), (1, 1, 1), (2, 1, 3), (0, 2, 8)])
def test_contract(shape, dtype, isa):
    for p, seed in ((0.1, 3), (0.5, -1), (0.9, 2**62 + 5)):
        inputs = sinusoidal_inputs(shape, dtype)
        arguments = {"scale": 2.0, "dropout_p": p, "seed": seed}
        verify(add, reference.sinusoidal_add, inputs, arguments).raise_if_failed()


def test_nothing_and_everything(isa):
    x, pe = sinusoidal_inputs((5, 2, 33), torch.float32)
    assert torch.equal(op.sinusoidal_add(x, pe, dropout_p=0.0, seed=1), op.sinusoidal_add(x, pe))
    assert op.sinusoidal_add(x, pe, dropout_p=1.0, seed=1).abs().max() == 0


def test_the_mask_is_a_function_of_seed_and_place(isa):
    x, pe = torch.ones(40, 3, 50), torch.zeros(40, 1, 50)

    def kept(seed, x=x):
        return op.sinusoidal_add(x, pe, dropout_p=0.3, seed=seed) != 0

    assert torch.equal(kept(5), kept(torch.tensor(5)))
    assert torch.equal(kept(5)[:7], kept(5, x[:7]))
    assert not torch.equal(kept(5), kept(6))
    assert not torch.equal(kept(5), kept(5 + 2**32))
    assert torch.equal(kept(5), reference.dropout_factor(x, 0.3, 5) != 0)


def test_rate_and_expectation(isa):
    x, pe = torch.ones(100, 10, 100), torch.zeros(100, 1, 100)
    out = op.sinusoidal_add(x, pe, dropout_p=0.2, seed=11)
    dropped = (out == 0).float().mean()
    assert abs(dropped - 0.2) < 5 * (0.2 * 0.8 / x.numel()) ** 0.5
    assert torch.equal(out.unique(), torch.tensor([0.0, 1.25]))


def test_without_a_seed_torchs_generator_decides():
    x, pe = sinusoidal_inputs((9, 2, 16), torch.float32)
    torch.manual_seed(4)
    first, second = (op.sinusoidal_add(x, pe, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(4)
    assert torch.equal(op.sinusoidal_add(x, pe, dropout_p=0.5), first)
    assert not torch.equal(first, second)
