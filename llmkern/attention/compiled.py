"""The compiled attention kernels as backends: which calls they take, and how the arguments reach them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmkern import extension
from llmkern.attention.layout import output_strides
from llmkern.backend import Backend

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_MOST_WIDTH = 256


def _unsupported(query: Tensor, key: Tensor, *rest: Any) -> str | None:
    if extension.MISSING is not None:
        return extension.MISSING
    if query.dtype not in _FLOATS:
        return f"its kernels compute float32, bfloat16 and float16, not {str(query.dtype).removeprefix('torch.')}"
    values = [t.shape[3] for t in rest if isinstance(t, Tensor) and t.dim() == 4][:1]
    if max(query.shape[3], *values) > _MOST_WIDTH and rest:
        return f"its kernels take heads of width 1 to {_MOST_WIDTH}, not {max(query.shape[3], *values)}"
    return None


def _plain(t: Tensor) -> bool:
    """Whether a kernel reads this tensor as it is: the last dimension contiguous."""
    return t.stride(3) == 1 or t.shape[3] <= 1


def _params(
    query: Tensor, key: Tensor, value_width: int, mask: Tensor | None, key_lengths: Tensor | None, causal: bool,
    bottom_right: bool, scale: float, uniform_empty_rows: bool,
) -> Any:  # fmt: skip
    batch, heads, queries, width = query.shape
    keys = key.shape[2]
    sizes = [batch, heads, key.shape[1], queries, keys, width, value_width]
    code = extension.DTYPE_CODES[query.dtype]
    params = extension._C.AttentionParams(sizes, scale, uniform_empty_rows, causal, bottom_right, code)
    params.query(*query.stride()[:3])
    params.key(*key.stride()[:3])
    if mask is not None:
        strides = mask.expand(batch, heads, queries, keys).stride()
        params.mask(extension.DTYPE_CODES[mask.dtype], list(strides))
    if key_lengths is not None:
        params.lengths(key_lengths.dtype == torch.int64, key_lengths.stride(0) if key_lengths.dim() else 0)
    return params


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, key_lengths: Tensor | None, causal: bool,
    bottom_right: bool, scale: float, uniform_empty_rows: bool,
) -> Callable[..., tuple[Tensor, Tensor]]:  # fmt: skip
    if not (_plain(query) and _plain(key) and _plain(value)):

        def contiguous(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
            args = [t if _plain(t) else t.contiguous() for t in (query, key, value)]
            return _forward(*args, *rest)(*args, *rest)

        return contiguous
    params = _params(
        query, key, value.shape[3], mask, key_lengths, causal, bottom_right, scale, uniform_empty_rows
    )  # fmt: skip
    batch, heads, queries, _ = query.shape
    params.value(*value.stride()[:3])
    shape, strides = (batch, heads, queries, value.shape[3]), output_strides(query, value.shape[3])
    params.output(*strides[:3])
    kernel, threads, dtype, rows = extension._C.attention_forward, extension.threads, query.dtype, shape[:3]

    def launch(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, key_lengths: Tensor | None, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        output = torch.empty_strided(shape, strides, dtype=dtype)
        logsumexp = torch.empty(rows, dtype=torch.float32)
        kernel(
            params, query.data_ptr(), key.data_ptr(), value.data_ptr(), _address(mask), _address(key_lengths),
            output.data_ptr(), logsumexp.data_ptr(), threads(),
        )  # fmt: skip
        return output, logsumexp

    return launch


CPU_ATTENTION = Backend("cpu", _forward, _unsupported)
