"""Random numbers that are a function of a seed, a purpose and a position: nothing drawn before changes them."""

from __future__ import annotations

import numpy as np

from llmkern import check

ORDER, MASKING, PAIRING = range(3)  #: purposes: each has a stream of its own
WORD = (1 << 64) - 1


def generator(seed: int, purpose: int, position: int) -> np.random.Generator:
    """numpy's generator on Philox4x64-10, keyed by seed and purpose, its counter begun at the position.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.
    """
    # The counter's lowest word counts the draws; the position stands two words above, so that no two streams meet.
    return np.random.Generator(np.random.Philox(key=[seed & WORD, purpose], counter=[0, 0, position, 0]))


def check_seed(seed: object) -> None:
    check.integer("seed", seed)
