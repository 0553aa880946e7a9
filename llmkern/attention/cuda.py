"""Launchers of the attention CUDA kernels, each with the reason why it cannot serve a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmkern import cuda
from llmkern.attention.compiled.params import as_sink, params, plain, sizes_of, through_copies
from llmkern.attention.layout import output_strides
from llmkern.backend import Backend

_WIDEST = 128
#: Queries and keys are numbered in 32 bits with room for the sum of a place and a window (key_limits.h, kMostRows).
_MOST_ROWS = 2**28
_ROWS = 64  # queries of a block, or more


def _forward(query: Tensor, key: Tensor, value: Tensor, *rules: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    if any(plain(t) is not t for t in (query, key, value)):
        return through_copies(_forward, 3)
    shape, strides = (*query.shape[:3], value.shape[3]), output_strides(query, value.shape[3])
    sizes = sizes_of(query, key, value.shape[3])
    plan = params(sizes, query.dtype, rules, query=query, key=key, value=value, output=strides)
    dtype, rows, device = query.dtype, shape[:3], query.device
    # On Hopper the launcher takes wgmma and TMA for the calls that they can serve, and mma.sync for the others.
    kernel = cuda.kernel("attention_forward_hopper" if cuda.is_hopper(device) else "attention_forward_cuda")

    def launch(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, key_lengths: Tensor | None,
        slopes: Tensor | None, sink: Tensor | None, seed: Tensor | None, *rest: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        output = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        logsumexp = torch.empty(rows, dtype=torch.float64, device=device)
        tensors = (mask, key_lengths, logsumexp, slopes, as_sink(sink), seed, query, key, value, output)
        kernel(plan, *cuda.stream(device), *tensors)
        return output, logsumexp

    return launch


def _limits(query: Tensor, key: Tensor, value: Tensor, rules: Sequence[Any]) -> str | None:
    """Why the forward's kernels cannot take tensors (B, H, S, D) of these shapes and dtypes."""
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"its kernels compute bfloat16 and float16, not {str(query.dtype).removeprefix('torch.')}"
    width = max(query.shape[-1], value.shape[-1])
    if width > _WIDEST:
        return f"its kernels take heads of width 1 to {_WIDEST}, not {width}"
    rows = max(query.shape[2], key.shape[2])
    if rows > _MOST_ROWS:
        return f"its kernels take up to 2^28 queries and keys, not {rows}"
    blocks = query.shape[0] * query.shape[1] * -(-query.shape[2] // _ROWS)
    if blocks > cuda.MOST_BLOCKS:
        return f"its kernels take up to 2^31 - 1 blocks of {_ROWS} queries of a head, not {blocks}"
    if rules[9] > 0.0 and rules[11]:
        return "its kernels do not drop weights of rows that attend to all keys alike"
    return None


def _unsupported(query: Tensor, key: Tensor, value: Tensor, *rules: Any) -> str | None:
    return cuda.unsupported(query) or _limits(query, key, value, rules)


def _no_backward(*args: Any) -> str | None:
    return cuda.unsupported(args[0]) or "there is no CUDA kernel of the gradients yet"


def _refuse(*args: Any) -> Callable[..., Any]:
    raise NotImplementedError("there is no CUDA kernel of the gradients yet")


CUDA_ATTENTION = Backend("cuda", _forward, _unsupported)
CUDA_ATTENTION_BACKWARD = Backend("cuda", _refuse, _no_backward)
