"""The generator of dropout's random numbers, and its seed."""

from __future__ import annotations

import pytest
import torch

from llmkern.random import check_dropout, drop_below, philox, philox_words, seed_tensor

# Known answers published with Salmon et al. 2011 (Random123, kat_vectors): counter, key, result.
ONES = 0xFFFFFFFF
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox(counter, key, expected):
    words = philox(tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key))
    assert tuple(int(w) for w in words) == expected


def test_words_of_a_seed():
    counter = tuple(torch.tensor(c) for c in (5, 6, 7, 8))
    expected = torch.stack(philox(counter, (torch.tensor(3), torch.tensor(2**32 - 2))))
    seed = 3 - 2 * 2**32  # the halves of its two's complement
    assert torch.equal(philox_words(counter, seed), expected)
    assert torch.equal(philox_words(counter, torch.tensor(seed)), expected)


def test_seeds():
    torch.manual_seed(1)
    drawn = seed_tensor("seed", None)
    torch.manual_seed(1)
    assert torch.equal(drawn, seed_tensor("seed", None)) and drawn.dtype == torch.int64
    assert int(seed_tensor("seed", -5)) == -5 and seed_tensor("seed", drawn) is drawn
    for bad, error in ((2**63, ValueError), (1.5, TypeError), ("1", TypeError), (True, TypeError)):
        with pytest.raises(error, match="seed: expected an integer of 64 bits, got"):
            seed_tensor("seed", bad)
    with pytest.raises(ValueError, match=r"dropout_p: expected a probability in \[0, 1\], got 2"):
        check_dropout("seed", None, 2.0)
    with pytest.raises(ValueError, match=r"seed: expected an int64 tensor \(\) with dropout_p = 0.5, got None"):
        check_dropout("seed", None, 0.5)
    with pytest.raises(TypeError, match="seed: expected dtype int64, got float32"):
        check_dropout("seed", torch.zeros(()), 0.5)
    assert [drop_below(p) for p in (0.0, 0.5, 1.0)] == [0, 2**31, 2**32 - 1]
