"""The description of masks against a loop written from its definition in words, exhaustively when small."""

from __future__ import annotations

import itertools

import pytest
import torch

from llmkern.attention.mask import RULE_COUNT, Mask, window
from tests.attention.cases import attend

CPU = torch.device("cpu")


def seen_by_loop(queries, keys, length, left, right, bottom_right):
    """Whether each key takes part, said once more in words: it exists, and lies neither too far left nor right."""
    rows = []
    for i in range(queries):
        place = i + length - queries if bottom_right else i
        row = []
        for j in range(keys):
            exists = j < length
            too_far_left = left != -1 and j < place - left
            too_far_right = right != -1 and j > place + right
            row.append(exists and not too_far_left and not too_far_right)
        rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize("bottom_right", [False, True])
def test_rules_exhaustively(bottom_right):
    for queries, keys, left, right in itertools.product(range(1, 6), range(1, 6), range(-1, 5), range(-1, 4)):
        for length in range(keys + 1):
            expected = seen_by_loop(queries, keys, length, left, right, bottom_right)
            described = Mask(
                None, torch.tensor([length]), window_left=left, window_right=right, bottom_right=bottom_right
            )
            seen = described.seen(queries, keys, CPU)
            assert torch.equal(seen.expand(1, 1, queries, keys)[0, 0], expected)
            some = described.seen(queries, keys, CPU, slice(1, 3)).expand(1, 1, -1, keys)[0, 0]
            assert torch.equal(some.expand(len(expected[1:3]), -1), expected[1:3])
            if length == keys:
                shared = Mask(window_left=left, window_right=right, bottom_right=bottom_right)
                seen = shared.seen(queries, keys, CPU)
                assert expected.all() if seen is None else torch.equal(seen.expand(queries, keys), expected)


@pytest.mark.parametrize(("left", "right"), [(-1, -1), (-1, 0), (1, 0), (0, 2)])
@pytest.mark.parametrize("bottom_right", [False, True])
def test_rules_through_the_operator(left, right, bottom_right, isa):
    for queries, keys in itertools.product(range(1, 5), range(1, 6)):
        for length in range(keys + 1):
            expected = seen_by_loop(queries, keys, length, left, right, bottom_right)
            v = torch.eye(keys)[None, None]  # the output is the weights
            q, k = torch.zeros(1, 1, queries, 4), torch.zeros(1, 1, keys, 4)
            lengths = torch.tensor([length])
            output = attend()(q, k, v, None, lengths, bottom_right=bottom_right, window=(left, right))
            uniform = expected / expected.sum(-1, keepdim=True).clamp(min=1)
            torch.testing.assert_close(output[0, 0], uniform)


def test_distances():
    slopes = torch.tensor([[0.5, 2.0], [1.0, 0.0]])
    for bottom_right, lengths in ((False, None), (True, None), (True, torch.tensor([4, 1]))):
        described = Mask(None, lengths, slopes, bottom_right=bottom_right)
        bias = described.distance_bias(3, 5, CPU).expand(2, 2, 3, 5)
        for b, h, i, j in itertools.product(range(2), range(2), range(3), range(5)):
            length = 5 if lengths is None else int(lengths[b])
            place = i + length - 3 if bottom_right else i
            assert bias[b, h, i, j] == -slopes[b, h] * abs(place - j)
    assert Mask().distance_bias(3, 5, CPU) is None
    assert torch.equal(
        Mask(None, None, slopes[0]).distance_bias(3, 5, CPU)[0],
        -slopes[0, 0] * (torch.arange(3)[:, None] - torch.arange(5)).abs(),
    )


def test_windows():
    assert window((3, -1), False) == (3, -1) and window([3, 4], True) == (3, 0)
    for bad in ((1,), 5, (1, -2), (1.0, 0), None, (True, 1)):
        with pytest.raises(ValueError, match=r"window_size: expected \(left, right\), integers of at least -1"):
            window(bad, False)


def test_the_rules_count():
    assert len(Mask().arguments()) + 2 == RULE_COUNT
