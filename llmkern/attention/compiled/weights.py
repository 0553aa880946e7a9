"""The compiled attention weights, their gradients and their column sums, as backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmkern import extension
from llmkern.attention.compiled.dense import empty_grad_scores, empty_row_sums, mask_grad_of, sink_grad
from llmkern.attention.compiled.params import as_sink, params, plain, sizes_of, through_copies, unsupported
from llmkern.attention.layout import empty_in_order, output_strides
from llmkern.backend import Backend


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
        tensors = (mask, key_lengths, logsumexp, slopes, as_sink(sink), None, query, key, weights)
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
        key_lengths: Tensor | None, slopes: Tensor | None, sink: Tensor | None, *rest: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        grads = [empty_in_order(t, t.shape[3]) for t in (query, key)]
        logsumexp = logsumexp.contiguous()
        grad_scores = empty_grad_scores(query, key, mask_grad and mask is not None)
        row_sums = empty_row_sums(sink, logsumexp)
        rules = (mask, key_lengths, logsumexp, slopes, as_sink(sink), None)
        kernel(plan, threads(), None, grad_scores, row_sums, *rules, query, key, grad_weights, *grads)
        return *grads, mask_grad_of(query, mask, grad_scores), sink_grad(sink, row_sums, logsumexp, None)

    return launch


def _column_sums(query: Tensor, key: Tensor, logsumexp: Tensor, *rules: Any) -> Callable[..., Tensor]:
    if any(plain(t) is not t for t in (query, key)):
        return through_copies(_column_sums, 2)
    shape = (*query.shape[:2], key.shape[2])
    plan = params(sizes_of(query, key, 0), query.dtype, rules, query=query, key=key)
    kernel, threads = extension._C.attention_column_sums, extension.threads

    def launch(
        query: Tensor, key: Tensor, logsumexp: Tensor, mask: Tensor | None, key_lengths: Tensor | None,
        slopes: Tensor | None, sink: Tensor | None, *rest: Any,
    ) -> Tensor:  # fmt: skip
        sums = query.new_zeros(shape, dtype=torch.float32)  # without queries no kernel writes to them
        logsumexp = logsumexp.contiguous()
        kernel(plan, threads(), sums, mask, key_lengths, logsumexp, slopes, as_sink(sink), None, query, key)
        return sums

    return launch


CPU_ATTENTION_WEIGHTS = Backend(
    "cpu", _weights, lambda query, key, logsumexp, *rest: unsupported(query, key, rules=rest)
)
CPU_ATTENTION_WEIGHTS_BACKWARD = Backend(
    "cpu", _weights_backward, lambda grad_weights, query, key, logsumexp, *rest: unsupported(query, key, rules=rest)
)
CPU_COLUMN_SUMS = Backend("cpu", _column_sums, lambda query, key, logsumexp, *rest: unsupported(query, key, rules=rest))
