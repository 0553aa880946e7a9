"""The compiled attention of sequences laid end to end, forward and backward, as backends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmkern import extension
from llmkern.attention.compiled.dense import as_rows, empty_row_sums, sink_grad
from llmkern.attention.compiled.params import Strides, as_sink, params, plain, through_copies, unsupported
from llmkern.backend import Backend


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, longest_q: int | None,
    longest_k: int | None, *rules: Any,
) -> Callable[..., tuple[Tensor, Tensor]]:  # fmt: skip
    tensors = (query, key, value, cu_seqlens_q, cu_seqlens_k)
    if any(plain(t) is not t for t in tensors):
        return through_copies(_varlen, 5)
    shape, sums = (*query.shape[:2], value.shape[2]), (query.shape[1], query.shape[0])
    output = torch.empty(shape, device="meta")
    plan = _varlen_params(tensors, longest_q, longest_k, rules, value=value, output=output)
    kernel, threads = extension._C.attention_varlen, extension.threads

    def launch(
        query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, longest_q: int | None,
        longest_k: int | None, slopes: Tensor | None, sink: Tensor | None, seed: Tensor | None, *rest: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        output = torch.empty(shape, dtype=query.dtype)
        logsumexp = torch.empty(sums, dtype=torch.float64)
        rules = (None, None, logsumexp, slopes, as_sink(sink), seed)
        kernel(plan, threads(), cu_seqlens_q, cu_seqlens_k, *rules, query, key, value, output)
        return output, logsumexp

    return launch


def _varlen_backward(
    grad_output: Tensor, grad_logsumexp: Tensor | None, query: Tensor, key: Tensor, value: Tensor, output: Tensor,
    logsumexp: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, longest_q: int | None, longest_k: int | None,
    *rules: Any,
) -> Callable[..., tuple[Tensor, ...]]:  # fmt: skip
    tensors = (grad_output, query, key, value, output, cu_seqlens_q, cu_seqlens_k)
    if any(plain(t) is not t for t in tensors):
        return through_copies(_varlen_backward, 9)
    dquery, dkey, dvalue = (torch.empty(t.shape, device="meta") for t in (query, key, value))
    plan = _varlen_params(
        (query, key, value, cu_seqlens_q, cu_seqlens_k), longest_q, longest_k, rules, value=value, output=output,
        grad_output=grad_output, dquery=dquery, dkey=dkey, dvalue=dvalue,
    )  # fmt: skip
    kernel, threads = extension._C.attention_varlen_backward, extension.threads

    def launch(
        grad_output: Tensor, grad_logsumexp: Tensor | None, query: Tensor, key: Tensor, value: Tensor, output: Tensor,
        logsumexp: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, longest_q: int | None, longest_k: int | None,
        slopes: Tensor | None, sink: Tensor | None, seed: Tensor | None, *rest: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        grads = [torch.empty(t.shape, dtype=t.dtype) for t in (query, key, value)]
        logsumexp, of_sums = logsumexp.contiguous(), as_rows(grad_logsumexp)
        rules = (None, None, logsumexp, slopes, as_sink(sink), seed)
        tensors = (query, key, value, output, grad_output, *grads)
        row_sums = empty_row_sums(sink, logsumexp)
        kernel(plan, threads(), of_sums, None, row_sums, cu_seqlens_q, cu_seqlens_k, *rules, *tensors)
        return *grads, sink_grad(sink, None if row_sums is None else row_sums[None], logsumexp[None], of_sums)

    return launch


def _varlen_params(
    tensors: Sequence[Tensor], longest_q: int | None, longest_k: int | None, rules: Sequence[Any], **more: Tensor
) -> Any:
    """The kernels find the sequences' lengths in the bounds, and raise where those are none."""
    query, key, value, cu_seqlens_q, cu_seqlens_k = tensors
    promised = [-1 if longest is None else longest for longest in (longest_q, longest_k)]
    batch, (tokens, heads, width), (of_keys, kv_heads, _) = cu_seqlens_q.shape[0] - 1, query.shape, key.shape
    slopes, sink, seed, *others = rules
    plan = params(
        [batch, heads, kv_heads, *promised, width, value.shape[2]], query.dtype,
        (None, None, slopes, sink, seed, *others, False),
        query=_as_heads(query), key=_as_heads(key), **{name: _as_heads(t) for name, t in more.items()},
    )  # fmt: skip
    plan.bounds(cu_seqlens_q.dtype == torch.int64, tokens, cu_seqlens_k.dtype == torch.int64, of_keys)
    return plan


def _as_heads(t: Tensor) -> Strides:
    """Steps of (sequence, head, token) of tokens (T, H, D) that lie end to end."""
    return 0, t.stride(1), t.stride(0), 1


def _unsupported_varlen(*tensors: Tensor, rules: Sequence[Any]) -> str | None:
    return unsupported(*tensors, rules=(None, None, *rules, False))


def _unsupported_varlen_backward(
    grad_output: Tensor, grad_logsumexp: Tensor | None, query: Tensor, key: Tensor, value: Tensor, output: Tensor,
    logsumexp: Tensor, cu_q: Tensor, cu_k: Tensor, longest_q: int | None, longest_k: int | None, *rest: Any,
) -> str | None:  # fmt: skip
    return _unsupported_varlen(query, key, value, rules=rest)


CPU_VARLEN = Backend(
    "cpu",
    _varlen,
    lambda query, key, value, cu_q, cu_k, longest_q, longest_k, *rest: _unsupported_varlen(
        query, key, value, rules=rest
    ),
)
CPU_VARLEN_BACKWARD = Backend("cpu", _varlen_backward, _unsupported_varlen_backward)
