"""Calls of attention on sequences end to end, of its weights, and of their sums."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.gpu.call import HALVES, Call, Case, random
from benchmarks.gpu.steps import Setting
from llmkern import functional
from llmkern.attention import op as attention_op
from llmkern.attention import reference as attention_reference
from llmkern.attention.mask import Mask


def packed_cases(setting: Setting, small: bool) -> Iterator[Case]:
    yield from _varlen(setting, small)
    yield from _weights(setting, small)


def _varlen(setting: Setting, small: bool) -> Iterator[Case]:
    # Queries and keys of each sequence, some without either; (H, Hkv, D).
    lengths = (
        [(33, 70), (0, 5), (12, 0), (9, 20)] if small else [(1500, 1500), (3, 700), (0, 40), (130, 0), (517, 1021)]
    )
    shape = (2, 1, 64) if small else (8, 2, 128)
    for short, dtype in HALVES.items():
        for rule in ("causal", "window"):
            for gradients in (False, True):
                yield Case(
                    "attention varlen", f"{','.join(map(str, shape))} {short} {rule}{' backward' if gradients else ''}",
                    lambda dtype=dtype, rule=rule, gradients=gradients: varlen(
                        setting, lengths, shape, dtype, rule, gradients
                    ),
                )  # fmt: skip


def varlen(
    setting: Setting, lengths: list[tuple[int, int]], shape: tuple[int, int, int], dtype: torch.dtype, rule: str,
    gradients: bool,
) -> Call:  # fmt: skip
    """Sequences laid end to end."""
    h, hkv, d = shape
    of_queries, of_keys = (torch.tensor([0, *x]).cumsum(0).int() for x in zip(*lengths, strict=True))
    sq, sk = int(of_queries[-1]), int(of_keys[-1])
    bounds = of_queries.to(setting.device), of_keys.to(setting.device)
    args = tuple(random(setting, s, n, d, dtype=dtype) for s, n in ((sq, h), (sk, hkv), (sk, hkv)))
    left, scale = (100 if rule == "window" else -1), d**-0.5

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.attention_varlen(
            q, k, v, *bounds, window_size=(left, 0), causal_alignment="bottom_right", scale=scale
        )

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rules = (None, None, None, left, 0, True, 0.0, 0.0, scale)
        return attention_reference.attention_varlen(q, k, v, *bounds, None, None, *rules)[0]

    return Call(ours, plain, args, gradients)


def _weights(setting: Setting, small: bool) -> Iterator[Case]:
    # (B, H, Hkv, Sq, Sk, D)
    shape = (1, 2, 1, 33, 70, 64) if small else (1, 8, 2, 1027, 2113, 128)
    for short, dtype in HALVES.items():
        for summed, gradients in ((False, False), (False, True), (True, False)):
            yield Case(
                "attention column sums" if summed else "attention weights",
                f"{','.join(map(str, shape))} {short}{' backward' if gradients else ''}",
                lambda dtype=dtype, summed=summed, gradients=gradients: weights(
                    setting, shape, dtype, summed, gradients
                ),
            )  # fmt: skip


def weights(
    setting: Setting, shape: tuple[int, ...], dtype: torch.dtype, summed: bool, gradients: bool = False
) -> Call:
    """The weights of a causal call, or their sums over the queries, from the attention's log-sum-exp."""
    b, h, hkv, sq, sk, d = shape
    args = tuple(random(setting, b, n, s, d, dtype=dtype) for n, s in ((h, sq), (hkv, sk)))
    described, scale = Mask(window_right=0, bottom_right=True), d**-0.5
    rules = (*described.arguments(), scale, False)

    def ours(q: Tensor, k: Tensor) -> Tensor:
        logsumexp = attention_op.attention(q, k, k, described, scale)[1]
        of = attention_op.attention_column_sums if summed else attention_op.attention_weights
        return of(q, k, logsumexp, described, scale)

    def plain(q: Tensor, k: Tensor) -> Tensor:
        of = attention_reference.attention_column_sums if summed else attention_reference.attention_weights
        return of(q, k, q.new_zeros(b, h, sq, dtype=torch.float64), *rules)

    return Call(ours, plain, args, gradients)
