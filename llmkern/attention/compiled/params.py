"""What every compiled attention kernel is told: sizes, steps and rules, the same for calls of the same metadata."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmkern import extension
from llmkern.attention.mask import Mask
from llmkern.random import drop_below

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_MOST_WIDTH = 576
Strides = tuple[int, int, int, int]


def unsupported(*tensors: Tensor, rules: Sequence[Any]) -> str | None:
    """rules: what Mask.arguments gives, and what follows."""
    if extension.MISSING is not None:
        return extension.MISSING
    if tensors[0].dtype not in _FLOATS:
        return f"its kernels compute float32, bfloat16 and float16, not {str(tensors[0].dtype).removeprefix('torch.')}"
    width = max(t.shape[-1] for t in tensors)
    if width > _MOST_WIDTH:
        return f"its kernels take heads of width 1 to {_MOST_WIDTH}, not {width}"
    if rules[9] > 0.0 and len(rules) > 11 and rules[11]:
        return "its kernels do not drop weights of rows that attend to all keys alike"
    return None


def plain(t: Tensor) -> Tensor:
    """The tensor as a kernel reads it: the last dimension contiguous."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def sizes_of(query: Tensor, key: Tensor, value_width: int) -> list[int]:
    """(B, H, Hkv, Sq, Sk, D, Dv), as `params` takes them."""
    batch, heads, queries, width = query.shape
    return [batch, heads, key.shape[1], queries, key.shape[2], width, value_width]


def params(sizes: list[int], dtype: torch.dtype, rules: Sequence[Any], **tensors: Tensor | Strides) -> Any:
    """A plan of the kernels. rules: what Mask.arguments gives, scale, uniform_empty_rows; tensors: (B, H, S, D) by the
    kernels' names, or their strides."""
    mask, (scale, uniform_empty_rows) = Mask(*rules[:10]), rules[10:]
    dense, key_lengths, slopes = mask.dense, mask.key_lengths, mask.alibi_slopes
    code = extension.DTYPE_CODES[dtype]
    made = extension._C.AttentionParams(sizes, scale, uniform_empty_rows, mask.bottom_right, code)
    made.window(mask.window_left, mask.window_right)
    made.softcap(mask.softcap)
    if slopes is not None:
        made.alibi(slopes.stride(0) if slopes.dim() == 2 else 0, slopes.stride(-1))
    if mask.dropout_p > 0.0 and sizes[6]:
        keep = 0.0 if mask.dropout_p >= 1.0 else 1.0 / (1.0 - mask.dropout_p)
        made.dropout(drop_below(mask.dropout_p), keep)
    if dense is not None:
        batch, heads, _, queries, keys = sizes[:5]
        made.mask(extension.DTYPE_CODES[dense.dtype], list(dense.expand(batch, heads, queries, keys).stride()))
    if key_lengths is not None:
        made.lengths(key_lengths.dtype == torch.int64, key_lengths.stride(0))
    for name, t in tensors.items():
        getattr(made, name)(*(t.stride() if isinstance(t, Tensor) else t)[:3])
    return made


def as_sink(sink: Tensor | None) -> Tensor | None:
    """As the kernels read it."""
    return None if sink is None else sink.float().contiguous()


def through_copies(plan: Callable[..., Any], count: int) -> Callable[..., Any]:
    """A launcher for tensors whose last dimension is not contiguous: the first `count` arguments are made so."""

    def launch(*args: Any) -> Any:
        args = (*(t if t is None else plain(t) for t in args[:count]), *args[count:])
        return plan(*args)(*args)

    return launch
