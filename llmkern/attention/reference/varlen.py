"""Attention of sequences laid end to end, in plain PyTorch: each sequence by itself.

query (Tq, H, D), key (Tk, Hkv, D), value (Tk, Hkv, Dv); sequence n is the tokens from cu_seqlens[n] to
cu_seqlens[n + 1]. `rules`: the longest of the queries and keys (or None), then SCORE_RULES of mask.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llmkern.attention import rows
from llmkern.attention.reference import dense


def attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *rules: Any
) -> tuple[Tensor, Tensor]:
    """The output (Tq, H, Dv), and the log-sum-exp (H, Tq) float64. Dropout counts a sequence as a batch."""
    outputs = [query.new_empty(0, query.size(1), value.size(2))]
    sums = [query.new_empty(query.size(1), 0, dtype=torch.float64)]
    for n, q, k, alone in _each(query, key, cu_seqlens_q, cu_seqlens_k, rules):
        output, logsumexp = dense.attention(*(_one(t) for t in (query[q], key[k], value[k])), *alone, first_batch=n)
        outputs.append(output[0].transpose(0, 1))
        sums.append(logsumexp[0])
    return torch.cat(outputs), torch.cat(sums, 1)


def attention_varlen_backward(
    grad_output: Tensor, grad_logsumexp: Tensor | None, query: Tensor, key: Tensor, value: Tensor, output: Tensor,
    logsumexp: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *rules: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key and value, and of the sink in float32 (empty without one)."""
    grads: list[list[Tensor]] = [[t.new_empty(0, *t.shape[1:])] for t in (query, key, value)]
    sink = rules[3]
    grad_sink = query.new_zeros(0 if sink is None else sink.size(0), dtype=torch.float32)
    for n, q, k, alone in _each(query, key, cu_seqlens_q, cu_seqlens_k, rules):
        tensors = (_one(t) for t in (query[q], key[k], value[k], output[q]))
        grad_sums = None if grad_logsumexp is None else grad_logsumexp[None, :, q]
        *found, _, of_sink = dense.attention_backward(
            _one(grad_output[q]), grad_sums, *tensors, logsumexp[None, :, q], *alone, False, first_batch=n
        )
        for parts, grad in zip(grads, found, strict=True):
            parts.append(grad[0].transpose(0, 1))
        grad_sink = grad_sink + of_sink
    dquery, dkey, dvalue = (torch.cat(parts) for parts in grads)
    return dquery, dkey, dvalue, grad_sink


def _each(
    query: Tensor, key: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, rules: Any
) -> Iterator[tuple[int, slice, slice, tuple[Any, ...]]]:
    """For each sequence its number, its queries, its keys, and the rules of the dense operators for it alone."""
    longest_q, longest_k, slopes, *others = rules
    queries = rows.bounds("q", cu_seqlens_q, query.size(0), longest_q)
    keys = rows.bounds("k", cu_seqlens_k, key.size(0), longest_k)
    for n in range(len(queries) - 1):
        own = slopes[n] if slopes is not None and slopes.dim() == 2 else slopes
        yield n, slice(*queries[n : n + 2]), slice(*keys[n : n + 2]), (None, None, own, *others, False)


def _one(x: Tensor) -> Tensor:
    """(1, H, S, D) from (S, H, D)."""
    return x.transpose(0, 1).unsqueeze(0)
