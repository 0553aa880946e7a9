"""What stands between the scores and the softmax, as one immutable description for the reference and the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmkern import check

#: The two corners of the scores at which the causal rule may start.
ALIGNMENTS = ("top_left", "bottom_right")
#: The widest window: places may be added to it without leaving 64 bits.
WIDEST = 2**62

#: What happens to scores, and where queries stand among the keys, in the order in which every operator takes it.
SCORE_RULES = (
    "Tensor? alibi_slopes, Tensor? learnable_sink, Tensor? dropout_seed, int window_left, int window_right, "
    "bool bottom_right, float softcap, float dropout_p, float scale"
)
#: All rules of the operators on (B, H, S, D): what `Mask.arguments` gives, the scale and uniform_empty_rows.
RULES = f"Tensor? mask, Tensor? key_lengths, {SCORE_RULES}, bool uniform_empty_rows"
RULE_COUNT = RULES.count(",") + 1


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees, and what happens to their scores, in this order: scale, softcap, alibi_slopes, an
    additive mask, what is masked, learnable_sink, softmax, dropout.

    Key j takes part for query i where each rule given here lets it. The place of query i among the keys is i + offset:
    offset is 0 or, with bottom_right, keys - Sq, where keys is Sk or, with key_lengths, that of the batch (so that new
    queries stand at the end of what a cache holds).

    dense: bool, True takes part, or floating, added to the scores, where -inf masks; broadcasts against (B, H, Sq, Sk).
    key_lengths: (B,) integers: in batch b the keys j < key_lengths[b] exist. Values beyond [0, Sk] count as its ends.
    alibi_slopes: (H,) or (B, H) float32: the score gets -slope * |i + offset - j|.
    learnable_sink: (H,) floating: one more logit in each row's denominator, whose weight goes to no value.
    dropout_seed: int64 (), with dropout_p > 0.
    window_left, window_right: i + offset - window_left <= j <= i + offset + window_right; -1 leaves a side unlimited.
        Causal is window_right = 0.
    softcap: a scaled score s becomes softcap * tanh(s / softcap); 0 leaves it.
    dropout_p: a weight becomes 0 with this probability on its way to the values, and the others grow by
        1 / (1 - dropout_p); `kept` says which.
    """

    dense: Tensor | None = None
    key_lengths: Tensor | None = None
    alibi_slopes: Tensor | None = None
    learnable_sink: Tensor | None = None
    dropout_seed: Tensor | None = None
    window_left: int = -1
    window_right: int = -1
    bottom_right: bool = False
    softcap: float = 0.0
    dropout_p: float = 0.0

    def arguments(self) -> tuple[Any, ...]:
        """The same as the operators take it, in their order."""
        return (
            self.dense, self.key_lengths, self.alibi_slopes, self.learnable_sink, self.dropout_seed, self.window_left,
            self.window_right, self.bottom_right, self.softcap, self.dropout_p,
        )  # fmt: skip

    @property
    def additive(self) -> Tensor | None:
        """What is added to the scaled scores."""
        return self.dense if self.dense is not None and self.dense.dtype != torch.bool else None

    def seen(self, queries: int, keys: int, device: torch.device, rows: slice = slice(None)) -> Tensor | None:
        """Bool, broadcasts against (B, H, Sq, Sk): True where the key takes part; None where all keys do.

        rows: those of the queries that the answer is about.
        """
        rules = []
        if self.dense is not None:
            dense = self.dense[:, :, rows] if self.dense.size(2) > 1 else self.dense
            rules.append(dense if dense.dtype == torch.bool else dense != -torch.inf)
        column = torch.arange(keys, device=device)
        if self.key_lengths is not None:
            rules.append(column < self._lengths(keys))
        if self.window_left >= 0 or self.window_right >= 0:
            place = self._places(queries, keys, device, rows)
            if self.window_right >= 0:
                rules.append(column <= place + self.window_right)
            if self.window_left >= 0:
                rules.append(column >= place - self.window_left)
        if not rules:
            return None
        seen = rules[0]
        for rule in rules[1:]:
            seen = seen & rule
        return seen

    def distance_bias(self, queries: int, keys: int, device: torch.device, rows: slice = slice(None)) -> Tensor | None:
        """-slope * |i + offset - j|, broadcasts against (B, H, Sq, Sk); None without slopes."""
        if self.alibi_slopes is None:
            return None
        distance = (self._places(queries, keys, device, rows) - torch.arange(keys, device=device)).abs()
        return -self.alibi_slopes[..., None, None] * distance

    def _lengths(self, keys: int) -> Any:
        """The number of keys, for each batch where they differ: (B, 1, 1, 1)."""
        return keys if self.key_lengths is None else self.key_lengths.long().clamp(0, keys).view(-1, 1, 1, 1)

    def _places(self, queries: int, keys: int, device: torch.device, rows: slice) -> Tensor:
        """Where each query stands among the keys, i + offset: (rows, 1) or (B, 1, rows, 1)."""
        row = torch.arange(queries, device=device)[rows].view(-1, 1)
        return row + (self._lengths(keys) - queries) if self.bottom_right else row


def window(window_size: Sequence[int], is_causal: bool, causal_name: str = "is_causal") -> tuple[int, int]:
    """window_left and window_right of the public functions' arguments.

    Raises ValueError for what is no pair of integers of at least -1, TypeError for an is_causal that is no flag.
    """
    try:
        left, right = window_size
        good = type(left) is int and type(right) is int and -1 <= left <= WIDEST and -1 <= right <= WIDEST
    except (TypeError, ValueError):
        good = False
    if not good:
        expected = "(left, right), integers of at least -1 (unlimited) and at most 2**62"
        raise ValueError(f"window_size: expected {expected}, got {window_size!r}")
    if is_causal is not False and is_causal is not True:
        check.flag(causal_name, is_causal)
    return left, (0 if is_causal else right)
