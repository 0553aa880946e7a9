"""Sequences laid end to end as the rows of padded batches, for kernels that know batches alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

#: A batch may hold so many times the tokens that are there, padding included.
_MOST = 4


def bounds(name: str, cu_seqlens: Tensor, total: int, longest: int | None) -> list[int]:
    """The bounds as integers. Raises ValueError, naming the argument, where they are none of `total` tokens."""
    found: list[int] = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(found)]
    if found[0] != 0 or found[-1] != total or min(lengths, default=0) < 0:
        expected = f"bounds that rise from 0 to the number of tokens, {total}"
        raise ValueError(f"cu_seqlens_{name}: expected {expected}, got {found if len(found) < 9 else found[:8]}")
    if longest is not None and max(lengths, default=0) > longest:
        expected = f"at least the length of the longest sequence, {max(lengths)}"
        raise ValueError(f"max_seqlen_{name}: expected {expected}, got {longest}")
    return found


def groups(queries: Sequence[int], keys: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Runs of sequences, first and past the last, that make batches with little padding, from the sequences' bounds."""
    first = most_queries = most_keys = 0
    for i in range(len(queries) - 1):
        most_queries = max(most_queries, queries[i + 1] - queries[i])
        most_keys = max(most_keys, keys[i + 1] - keys[i])
        tokens = queries[i + 1] - queries[first] + keys[i + 1] - keys[first]
        if (i + 1 - first) * (most_queries + most_keys) > _MOST * tokens and i > first:
            yield first, i
            first, most_queries, most_keys = i, queries[i + 1] - queries[i], keys[i + 1] - keys[i]
    if first < len(queries) - 1:
        yield first, len(queries) - 1


class Rows:
    """A run of sequences, a row for each; padding stands behind them or, with at_end, before them."""

    def __init__(self, bounds: Sequence[int], at_end: bool = False) -> None:
        self.tokens = slice(bounds[0], bounds[-1])
        self.lengths = torch.tensor([end - start for start, end in pairwise(bounds)])
        self.count, self.longest = self.lengths.numel(), int(self.lengths.max())
        row = torch.arange(self.count).repeat_interleave(self.lengths)
        shift = torch.arange(self.count) * self.longest - (self.lengths.cumsum(0) - self.lengths)
        if at_end:
            shift = shift + self.longest - self.lengths
        self.place = torch.arange(bounds[-1] - bounds[0]) + shift[row]

    def batch(self, x: Tensor) -> Tensor:
        """(N, H, S, D), zeros where there is no token, from all tokens (T, H, D)."""
        x = x[self.tokens]
        if self.count > 1:
            x = x.new_zeros(self.count * self.longest, *x.shape[1:]).index_copy_(0, self.place, x)
        return x.view(self.count, self.longest, *x.shape[1:]).transpose(1, 2)

    def packed(self, x: Tensor) -> Tensor:
        """(T, H, D) from (N, H, S, D), for the tokens of this run."""
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.place)

    def batch_of_rows(self, x: Tensor) -> Tensor:
        """(N, H, S) from one number for each head and token, (H, T)."""
        spread = x.new_zeros(x.size(0), self.count * self.longest).index_copy_(1, self.place, x[:, self.tokens])
        return spread.view(x.size(0), self.count, self.longest).transpose(0, 1).contiguous()

    def packed_rows(self, x: Tensor) -> Tensor:
        """(H, T) from (N, H, S)."""
        return x.transpose(0, 1).flatten(1).index_select(1, self.place)
