"""The description of masks against a loop over rows and columns, and through the kernels, exhaustively when small."""

from __future__ import annotations

import itertools

import pytest
import torch

from llmkern.attention.mask import Mask
from tests.attention.cases import attend


def seen_by_loop(queries, keys, length, causal, bottom_right):
    last = (length - queries if bottom_right else 0) if causal else keys
    return [[j < length and (not causal or j <= i + last) for j in range(keys)] for i in range(queries)]


@pytest.mark.parametrize(("causal", "bottom_right"), [(False, False), (True, False), (True, True)])
def test_rules_exhaustively(causal, bottom_right, isa):
    for queries, keys in itertools.product(range(1, 5), range(1, 6)):
        for length in range(keys + 1):
            lengths = torch.tensor([length])
            expected = torch.tensor(seen_by_loop(queries, keys, length, causal, bottom_right))
            seen = Mask(None, lengths, causal, bottom_right).seen(queries, keys, torch.device("cpu"))
            assert torch.equal(seen.expand(1, 1, queries, keys)[0, 0], expected)
            v = torch.eye(keys)[None, None]  # the output is the weights
            output = attend()(
                torch.zeros(1, 1, queries, 4), torch.zeros(1, 1, keys, 4), v, None, lengths, causal, bottom_right
            )
            uniform = expected / expected.sum(-1, keepdim=True).clamp(min=1)
            torch.testing.assert_close(output[0, 0], uniform)
