"""The compiled attention kernels as backends: which calls they take, and how the arguments reach them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from llmkern import extension
from llmkern.attention.layout import empty_in_order, output_strides
from llmkern.backend import Backend

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_MOST_WIDTH = 256
Strides = tuple[int, int, int, int]


def _unsupported(*tensors: Tensor) -> str | None:
    if extension.MISSING is not None:
        return extension.MISSING
    if tensors[0].dtype not in _FLOATS:
        return f"its kernels compute float32, bfloat16 and float16, not {str(tensors[0].dtype).removeprefix('torch.')}"
    width = max(t.shape[3] for t in tensors)
    if width > _MOST_WIDTH:
        return f"its kernels take heads of width 1 to {_MOST_WIDTH}, not {width}"
    return None


def _plain(t: Tensor) -> Tensor:
    """The tensor as a kernel reads it: the last dimension contiguous."""
    return t if t.stride(3) == 1 or t.shape[3] <= 1 else t.contiguous()


def _params(
    query: Tensor, key: Tensor, value_width: int, mask: Tensor | None, key_lengths: Tensor | None, causal: bool,
    bottom_right: bool, scale: float, uniform_empty_rows: bool, *, more: Mapping[str, Tensor | Strides],
) -> Any:  # fmt: skip
    """What stays the same from call to call; `more` are the kernel's further tensors, or their strides."""
    batch, heads, queries, width = query.shape
    keys = key.shape[2]
    sizes = [batch, heads, key.shape[1], queries, keys, width, value_width]
    code = extension.DTYPE_CODES[query.dtype]
    params = extension._C.AttentionParams(sizes, scale, uniform_empty_rows, causal, bottom_right, code)
    if mask is not None:
        strides = mask.expand(batch, heads, queries, keys).stride()
        params.mask(extension.DTYPE_CODES[mask.dtype], list(strides))
    if key_lengths is not None:
        params.lengths(key_lengths.dtype == torch.int64, key_lengths.stride(0))
    for name, t in {"query": query, "key": key, **more}.items():
        getattr(params, name)(*(t.stride() if isinstance(t, Tensor) else t)[:3])
    return params


def _forward(query: Tensor, key: Tensor, value: Tensor, *rules: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    if any(_plain(t) is not t for t in (query, key, value)):
        return _through_copies(_forward, 3)
    shape, strides = (*query.shape[:3], value.shape[3]), output_strides(query, value.shape[3])
    params = _params(query, key, value.shape[3], *rules, more={"value": value, "output": strides})
    kernel, threads, dtype, rows = extension._C.attention_forward, extension.threads, query.dtype, shape[:3]

    def launch(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, key_lengths: Tensor | None, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        output = torch.empty_strided(shape, strides, dtype=dtype)
        logsumexp = torch.empty(rows, dtype=torch.float64)
        kernel(params, threads(), mask, key_lengths, logsumexp, None, None, None, None, query, key, value, output)
        return output, logsumexp

    return launch


def _backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor, *rest: Any
) -> Callable[..., tuple[Tensor, ...]]:
    if any(_plain(t) is not t for t in (grad_output, query, key, value, output)):
        return _through_copies(_backward, 5)
    *rules, mask_grad = rest
    width = value.shape[3]
    more: dict[str, Tensor | Strides] = {
        "value": value,
        "output": output,
        "grad_output": grad_output,
        "dquery": output_strides(query, query.shape[3]),
        "dkey": output_strides(key, key.shape[3]),
        "dvalue": output_strides(value, width),
    }
    params = _params(query, key, width, *rules, more=more)
    kernel, threads = extension._C.attention_backward, extension.threads

    def launch(
        grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor,
        mask: Tensor | None, key_lengths: Tensor | None, *rest: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        grads = [empty_in_order(t, t.shape[3]) for t in (query, key, value)]
        logsumexp = logsumexp.contiguous()
        grad_scores = _grad_scores(query, key, mask_grad and mask is not None)
        tensors = (query, key, value, output, grad_output, *grads)
        kernel(params, threads(), mask, key_lengths, logsumexp, grad_scores, None, None, None, *tensors)
        return *grads, _mask_grad(query, mask, grad_scores)

    return launch


def _weights(query: Tensor, key: Tensor, logsumexp: Tensor, *rules: Any) -> Callable[..., Tensor]:
    if any(_plain(t) is not t for t in (query, key)):
        return _through_copies(_weights, 2)
    shape = (*query.shape[:3], key.shape[2])
    like = torch.empty(shape, dtype=query.dtype, device="meta")
    params = _params(query, key, 0, *rules, more={"weights": like})
    kernel, threads = extension._C.attention_weights, extension.threads

    def launch(
        query: Tensor, key: Tensor, logsumexp: Tensor, mask: Tensor | None, key_lengths: Tensor | None, *rest: Any
    ) -> Tensor:
        weights = query.new_empty(shape)
        logsumexp = logsumexp.contiguous()
        kernel(params, threads(), mask, key_lengths, logsumexp, None, None, None, None, query, key, weights)
        return weights

    return launch


def _weights_backward(
    grad_weights: Tensor, query: Tensor, key: Tensor, logsumexp: Tensor, *rest: Any
) -> Callable[..., tuple[Tensor, ...]]:
    if any(_plain(t) is not t for t in (grad_weights, query, key)):
        return _through_copies(_weights_backward, 3)
    *rules, mask_grad = rest
    more: dict[str, Tensor | Strides] = {
        "weights": grad_weights,
        "dquery": output_strides(query, query.shape[3]),
        "dkey": output_strides(key, key.shape[3]),
    }
    params = _params(query, key, 0, *rules, more=more)
    kernel, threads = extension._C.attention_weights_backward, extension.threads

    def launch(
        grad_weights: Tensor, query: Tensor, key: Tensor, logsumexp: Tensor, mask: Tensor | None,
        key_lengths: Tensor | None, *rest: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        grads = [empty_in_order(t, t.shape[3]) for t in (query, key)]
        logsumexp = logsumexp.contiguous()
        grad_scores = _grad_scores(query, key, mask_grad and mask is not None)
        kernel(params, threads(), mask, key_lengths, logsumexp, grad_scores, None, None, None, query, key, grad_weights, *grads)
        return *grads, _mask_grad(query, mask, grad_scores)

    return launch


def _through_copies(plan: Callable[..., Any], count: int) -> Callable[..., Any]:
    """A launcher for tensors whose last dimension is not contiguous: the first `count` arguments are made so."""

    def launch(*args: Any) -> Any:
        args = (*(_plain(t) for t in args[:count]), *args[count:])
        return plan(*args)(*args)

    return launch


def _grad_scores(query: Tensor, key: Tensor, wanted: bool) -> Tensor | None:
    """The gradient of the scaled scores, (B, H, Sq, Sk) float32, for the kernel to fill where a query sees a key."""
    return query.new_zeros((*query.shape[:3], key.shape[2]), dtype=torch.float32) if wanted else None


def _mask_grad(query: Tensor, mask: Tensor | None, grad_scores: Tensor | None) -> Tensor:
    if grad_scores is None or mask is None:
        return query.new_empty(0, dtype=torch.float32)
    return grad_scores.sum_to_size(mask.shape).contiguous()


CPU_ATTENTION = Backend("cpu", _forward, lambda query, key, value, *rest: _unsupported(query, key, value))
CPU_ATTENTION_BACKWARD = Backend(
    "cpu", _backward, lambda grad_output, query, key, value, *rest: _unsupported(query, key, value)
)
CPU_ATTENTION_WEIGHTS = Backend("cpu", _weights, lambda query, key, *rest: _unsupported(query, key))
CPU_ATTENTION_WEIGHTS_BACKWARD = Backend(
    "cpu", _weights_backward, lambda grad_weights, query, key, *rest: _unsupported(query, key)
)
