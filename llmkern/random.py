"""The random numbers of dropout: a function of a seed and of an element's place, the same on every backend.

The families say which counter belongs to which element; what they share is the generator, the threshold, and the seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern import check

PHILOX_ROUNDS = 10
LOW = 0xFFFFFFFF


def drop_below(dropout_p: float) -> int:
    """The random words, of 32 bits, that drop an element: those below this number."""
    return min(round(dropout_p * 2.0**32), LOW)


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four random words for a counter of four and a key of two; all int64 tensors holding uint32.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return c0, c1, c2, c3


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low halves of the product of 32-bit words; in parts, since int64 holds no 64-bit unsigned product."""
    low, middle = a * (b & 0xFFFF), a * (b >> 16)
    carried = middle + (low >> 16)
    return carried >> 16, ((carried & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_words(counter: tuple[Tensor, ...], seed: Tensor | int) -> Tensor:
    """Philox4x32-10 keyed by the halves of a 64-bit seed; the four words stand in a last dimension.

    counter: four int64 tensors holding uint32, which broadcast against each other, on one device.
    """
    counter = torch.broadcast_tensors(*counter)
    seed = torch.as_tensor(seed, device=counter[0].device)
    return torch.stack(philox(counter, (seed & LOW, (seed >> 32) & LOW)), -1)


def seed_tensor(name: str, seed: int | Tensor | None) -> Tensor:
    """The seed as an int64 tensor () on the CPU; drawn from torch's CPU generator for None.

    Raises, naming the argument, TypeError for what is no integer and ValueError for one of more than 64 bits. A tensor
    is checked by `check_dropout`.
    """
    if seed is None:
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu")
    if isinstance(seed, Tensor):
        return seed
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"{name}: expected an integer of 64 bits, got {seed!r}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"{name}: expected an integer of 64 bits, got {seed!r}")
    return torch.tensor(seed, dtype=torch.int64, device="cpu")


def check_dropout(name: str, seed: Tensor | None, dropout_p: float) -> None:
    """Raises on what is no probability `dropout_p`, and on a seed, the argument `name`, that is none."""
    check.probability("dropout_p", dropout_p)
    if seed is None:
        if dropout_p > 0.0:
            raise ValueError(f"{name}: expected an int64 tensor () with dropout_p = {dropout_p}, got None")
        return
    check.dtype(name, seed, (torch.int64,))
    check.shape(name, seed, "()", ())
    if seed.device.type != "cpu":
        raise ValueError(f"{name}: expected the device cpu, got {seed.device}")
