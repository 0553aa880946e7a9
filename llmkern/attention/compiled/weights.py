"""The compiled attention weights, their gradients and their column sums, as backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmkern import extension
from llmkern.attention.compiled.dense import empty_grad_scores, mask_grad_of
from llmkern.attention.compiled.params import as_sink, params, plain, sizes_of, through_copies, unsupported
from llmkern.attention.layout import empty_in_order, output_strides
from llmkern.attention.mask import Mask
from llmkern.backend import Backend

#: Queries whose weights are in memory at a time where only their sums are asked for.
_ROWS = 256


def _weights(query: Tensor, key: Tensor, logsumexp: Tensor, *rules: Any) -> Callable[..., Tensor]:
    if any(plain(t) is not t for t in (query, key)):
        return through_copies(_weights, 2)
    shape = (*query.shape[:3], key.shape[2])
    like = torch.empty(shape, dtype=query.dtype, device="meta")
    plan = params(sizes_of(query, key, 0), query.dtype, rules, query=query, key=key, weights=like)
    kernel, threads = extension._C.attention_weights, extension.threads

    def launch(
        query: Tensor, key: Tensor, logsumexp: Tensor, mask: Tensor | None, key_lengths: Tensor | None,
        slopes: Tensor | None, sink: Tensor | None, *rest: Any,
    ) -> Tensor:  # fmt: skip
        weights = query.new_empty(shape)
        logsumexp = logsumexp.contiguous()
        tensors = (mask, key_lengths, logsumexp, None, slopes, as_sink(sink), None, query, key, weights)
        kernel(plan, threads(), *tensors)
        return weights

    return launch


def _weights_backward(
    grad_weights: Tensor, query: Tensor, key: Tensor, logsumexp: Tensor, *rest: Any
) -> Callable[..., tuple[Tensor, ...]]:
    if any(plain(t) is not t for t in (grad_weights, query, key)):
        return through_copies(_weights_backward, 3)
    *rules, mask_grad = rest
    plan = params(
        sizes_of(query, key, 0), query.dtype, rules, query=query, key=key, weights=grad_weights,
        dquery=output_strides(query, query.shape[3]), dkey=output_strides(key, key.shape[3]),
    )  # fmt: skip
    kernel, threads = extension._C.attention_weights_backward, extension.threads

    def launch(
        grad_weights: Tensor, query: Tensor, key: Tensor, logsumexp: Tensor, mask: Tensor | None,
        key_lengths: Tensor | None, slopes: Tensor | None, *rest: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        grads = [empty_in_order(t, t.shape[3]) for t in (query, key)]
        logsumexp = logsumexp.contiguous()
        grad_scores = empty_grad_scores(query, key, mask_grad and mask is not None)
        tensors = (query, key, grad_weights, *grads)
        kernel(plan, threads(), mask, key_lengths, logsumexp, grad_scores, slopes, None, None, *tensors)
        return *grads, mask_grad_of(query, mask, grad_scores), query.new_empty(0, dtype=torch.float32)

    return launch


def _column_sums(query: Tensor, key: Tensor, logsumexp: Tensor, *rules: Any) -> Callable[..., Tensor]:
    """The kernel of the weights on some queries at a time, which a dense mask tells where they stand."""
    queries, keys = query.shape[2], key.shape[2]

    def launch(query: Tensor, key: Tensor, logsumexp: Tensor, *rules: Any) -> Tensor:
        mask = Mask(*rules[:10])
        sums = query.new_zeros((*query.shape[:2], keys), dtype=torch.float32)
        for start in range(0, queries, _ROWS):
            rows = slice(start, start + _ROWS)
            dense = Mask(_dense(mask, queries, keys, rows), softcap=mask.softcap)
            args = (query[:, :, rows], key, logsumexp[:, :, rows], *dense.arguments(), *rules[10:])
            sums += _weights(*args)(*args).sum(2, dtype=torch.float32)
        return sums

    return launch


def _dense(mask: Mask, queries: int, keys: int, rows: slice) -> Tensor | None:
    """All that is added to the scores of some rows, and all that is masked, as one dense mask."""
    where = (queries, keys, torch.device("cpu"), rows)
    seen, added, bias = mask.seen(*where), mask.additive, mask.distance_bias(*where)
    if added is not None and added.size(2) > 1:
        added = added[:, :, rows]
    if bias is not None:
        added = bias if added is None else bias + added
    if seen is not None and added is not None:
        seen = torch.where(seen, added, -torch.inf)
    found = added if seen is None else seen
    return None if found is None else found[(None,) * (4 - found.dim())]


def _unsupported_weights_backward(
    grad_weights: Tensor, query: Tensor, key: Tensor, logsumexp: Tensor, *rest: Any
) -> str | None:
    if rest[3] is not None and extension.MISSING is None:
        return "its kernel of the weights' gradients has none of an attention sink yet"
    return unsupported(query, key, rules=rest)


CPU_ATTENTION_WEIGHTS = Backend(
    "cpu", _weights, lambda query, key, logsumexp, *rest: unsupported(query, key, rules=rest)
)
CPU_ATTENTION_WEIGHTS_BACKWARD = Backend("cpu", _weights_backward, _unsupported_weights_backward)
CPU_COLUMN_SUMS = Backend("cpu", _column_sums, lambda query, key, logsumexp, *rest: unsupported(query, key, rules=rest))
