"""The packed copy of a weight is never stale: not after an update, nor for a new weight at an old address."""

from __future__ import annotations

import gc

import torch

from llmkern.functional import int8_linear
from llmkern.int8 import packing, reference
from tests.int8.cases import inputs


def test_updates_in_place_are_seen(isa):
    x, weight, scale, _ = inputs((3, 64, 48))
    for change in (lambda: weight.add_(1), lambda: weight[5].zero_(), lambda: weight.t().copy_(weight.t().flip(0))):
        int8_linear(x, weight, scale)
        change()
        assert torch.equal(int8_linear(x, weight, scale), reference.int8_linear(x, weight, scale, None))


def test_a_write_past_torch_is_seen_after_forget(isa):
    x, weight, scale, _ = inputs((3, 64, 48))
    int8_linear(x, weight, scale)
    weight.data.add_(1)
    packing.forget(weight)
    assert torch.equal(int8_linear(x, weight, scale), reference.int8_linear(x, weight, scale, None))


def test_fresh_weights_in_a_loop(isa):
    """Freed memory comes back at the same address, and the id of a dead tensor with it."""
    x, _, scale, _ = inputs((3, 64, 48))
    for seed in range(40):
        weight = torch.randint(-127, 128, (48, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(int8_linear(x, weight, scale), reference.int8_linear(x, weight, scale, None))
        del weight


def test_views_and_other_instruction_sets(isa):
    x, weight, scale, _ = inputs((3, 64, 96))
    int8_linear(x, weight, scale)
    part = weight[:48]
    assert torch.equal(int8_linear(x, part, scale[:48]), reference.int8_linear(x, part, scale[:48], None))
    part.mul_(-1)
    assert torch.equal(int8_linear(x, weight, scale), reference.int8_linear(x, weight, scale, None))


def test_set_moves_a_tensor_to_other_memory(isa):
    x, weight, scale, _ = inputs((3, 64, 48))
    int8_linear(x, weight, scale)
    weight.set_(torch.randint(-127, 128, (48, 64), dtype=torch.int8))
    assert torch.equal(int8_linear(x, weight, scale), reference.int8_linear(x, weight, scale, None))


def test_what_is_kept_goes_with_the_weight():
    x, weight, scale, _ = inputs((3, 64, 48))
    int8_linear(x, weight, scale)
    key = id(weight)
    assert key in packing._kept
    del weight
    gc.collect()
    assert key not in packing._kept
