"""Which keys a query sees, as one immutable description for the reference and the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mask:
    """Key j takes part for query i if each rule given here lets it.

    dense: bool, True takes part, or floating, added to the scaled scores, where -inf masks; broadcasts against
        (B, H, Sq, Sk).
    key_lengths: (B,) integers: in batch b the keys j < key_lengths[b] exist. Values beyond [0, Sk] count as its ends.
    causal: j <= i, or with bottom_right j <= i + keys - Sq, where keys is Sk or, with key_lengths, that of the batch
        (so that new queries stand at the end of what a cache holds).
    """

    dense: Tensor | None = None
    key_lengths: Tensor | None = None
    causal: bool = False
    bottom_right: bool = False

    @property
    def additive(self) -> Tensor | None:
        """What is added to the scaled scores."""
        return self.dense if self.dense is not None and self.dense.dtype != torch.bool else None

    def seen(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """Bool, broadcasts against (B, H, Sq, Sk): True where the key takes part; None where all keys do."""
        rules = []
        if self.dense is not None:
            rules.append(self.dense if self.dense.dtype == torch.bool else self.dense != -torch.inf)
        column = torch.arange(keys, device=device)
        lengths: Tensor | int = keys
        if self.key_lengths is not None:
            lengths = self.key_lengths.to(torch.int64).clamp(0, keys).view(-1, 1, 1, 1)
            rules.append(column < lengths)
        if self.causal:
            last = torch.arange(queries, device=device).view(-1, 1) + (lengths - queries if self.bottom_right else 0)
            rules.append(column <= last)
        if not rules:
            return None
        seen = rules[0]
        for rule in rules[1:]:
            seen = seen & rule
        return seen

    def arguments(self) -> tuple[Tensor | None, Tensor | None, bool, bool]:
        """The same as the operators take it, in their order."""
        return self.dense, self.key_lengths, self.causal, self.bottom_right
