"""The compiled attention of padded batches, forward and backward, as backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmkern import extension
from llmkern.attention.compiled.params import as_sink, params, plain, sizes_of, through_copies, unsupported
from llmkern.attention.layout import empty_in_order, output_strides
from llmkern.backend import Backend


def _forward(query: Tensor, key: Tensor, value: Tensor, *rules: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    if any(plain(t) is not t for t in (query, key, value)):
        return through_copies(_forward, 3)
    shape, strides = (*query.shape[:3], value.shape[3]), output_strides(query, value.shape[3])
    sizes = sizes_of(query, key, value.shape[3])
    plan = params(sizes, query.dtype, rules, query=query, key=key, value=value, output=strides)
    kernel, threads, dtype, rows = extension._C.attention_forward, extension.threads, query.dtype, shape[:3]

    def launch(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, key_lengths: Tensor | None,
        slopes: Tensor | None, sink: Tensor | None, seed: Tensor | None, *rest: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        output = torch.empty_strided(shape, strides, dtype=dtype)
        logsumexp = torch.empty(rows, dtype=torch.float64)
        tensors = (mask, key_lengths, logsumexp, slopes, as_sink(sink), seed, query, key, value, output)
        kernel(plan, threads(), *tensors)
        return output, logsumexp

    return launch


def _backward(
    grad_output: Tensor, grad_logsumexp: Tensor | None, query: Tensor, key: Tensor, value: Tensor, output: Tensor,
    logsumexp: Tensor, *rest: Any,
) -> Callable[..., tuple[Tensor, ...]]:  # fmt: skip
    if any(plain(t) is not t for t in (grad_output, query, key, value, output)):
        return through_copies(_backward, 6)
    *rules, mask_grad = rest
    width = value.shape[3]
    plan = params(
        sizes_of(query, key, width), query.dtype, rules, query=query, key=key, value=value, output=output,
        grad_output=grad_output, dquery=output_strides(query, query.shape[3]),
        dkey=output_strides(key, key.shape[3]), dvalue=output_strides(value, width),
    )  # fmt: skip
    kernel, threads = extension._C.attention_backward, extension.threads

    def launch(
        grad_output: Tensor, grad_logsumexp: Tensor | None, query: Tensor, key: Tensor, value: Tensor, output: Tensor,
        logsumexp: Tensor, mask: Tensor | None, key_lengths: Tensor | None, slopes: Tensor | None,
        sink: Tensor | None, seed: Tensor | None, *rest: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        grads = [empty_in_order(t, t.shape[3]) for t in (query, key, value)]
        logsumexp, of_sums = logsumexp.contiguous(), as_rows(grad_logsumexp)
        grad_scores = empty_grad_scores(query, key, mask_grad and mask is not None)
        row_sums = empty_row_sums(sink, logsumexp)
        rules = (mask, key_lengths, logsumexp, slopes, as_sink(sink), seed)
        tensors = (query, key, value, output, grad_output, *grads)
        kernel(plan, threads(), of_sums, grad_scores, row_sums, *rules, *tensors)
        of_sink = sink_grad(sink, row_sums, logsumexp, of_sums)
        return *grads, mask_grad_of(query, mask, grad_scores), of_sink

    return launch


def empty_grad_scores(query: Tensor, key: Tensor, wanted: bool) -> Tensor | None:
    """The gradient of the scaled scores, (B, H, Sq, Sk) float32, for the kernel to fill where a query sees a key."""
    return query.new_zeros((*query.shape[:3], key.shape[2]), dtype=torch.float32) if wanted else None


def as_rows(grad_logsumexp: Tensor | None) -> Tensor | None:
    """As the kernels read it."""
    return None if grad_logsumexp is None else grad_logsumexp.contiguous()


def empty_row_sums(sink: Tensor | None, logsumexp: Tensor) -> Tensor | None:
    """For the kernel: of each row the sum of weight times gradient, which a sink's gradient is made of."""
    return None if sink is None else torch.zeros(logsumexp.shape, dtype=torch.float32)


def sink_grad(sink: Tensor | None, row_sums: Tensor | None, logsumexp: Tensor, grad_logsumexp: Tensor | None) -> Tensor:
    """A sink's logit takes from every row its own weight times what the row's values give. Tensors (B, H, Sq)."""
    if sink is None or row_sums is None:
        return logsumexp.new_empty(0, dtype=torch.float32)
    weight = torch.exp(sink.double()[:, None] - logsumexp).nan_to_num(0.0)
    given = -row_sums if grad_logsumexp is None else grad_logsumexp - row_sums
    return (weight * given).sum((0, 2)).float()


def mask_grad_of(query: Tensor, mask: Tensor | None, grad_scores: Tensor | None) -> Tensor:
    if grad_scores is None or mask is None:
        return query.new_empty(0, dtype=torch.float32)
    return grad_scores.sum_to_size(mask.shape).contiguous()


def _unsupported_backward(
    grad_output: Tensor, grad_logsumexp: Tensor | None, query: Tensor, key: Tensor, value: Tensor, output: Tensor,
    logsumexp: Tensor, *rest: Any,
) -> str | None:  # fmt: skip
    return unsupported(query, key, value, rules=rest)


CPU_ATTENTION = Backend("cpu", _forward, lambda query, key, value, *rest: unsupported(query, key, value, rules=rest))
CPU_ATTENTION_BACKWARD = Backend("cpu", _backward, _unsupported_backward)
