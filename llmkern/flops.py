"""What torch.utils.flop_counter.FlopCounterMode counts for our operators: two for each multiply-add of the products.

As torch counts its own attention, masks take nothing off, and the exponentials are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

Shape = Sequence[int]


def _products(batch: int, heads: int, queries: int, keys: int, *widths: int) -> int:
    """Of (queries, keys) matrices, one for each width summed over."""
    return 2 * batch * heads * queries * keys * sum(widths)


def _attention(query: Shape, key: Shape, value: Shape) -> int:
    return _products(*query[:3], key[2], query[3], value[3])


def _attention_backward(query: Shape, key: Shape, value: Shape) -> int:
    """The scores again, the gradients of the weights and of query, key and value."""
    return _products(*query[:3], key[2], *(query[3],) * 3, *(value[3],) * 2)


def _varlen(query: Shape, key: Shape, value: Shape, cu_q: Shape, longest_q: int | None, longest_k: int | None) -> int:
    """The sequences' lengths are data: counted as if each had the longest, or without that, the mean length."""
    count = max(cu_q[0] - 1, 1)
    lengths = longest_q or -(-query[0] // count), longest_k or -(-key[0] // count)
    return _products(count, query[1], *lengths, query[2], value[2])


def register() -> None:
    """Registers the formulas; to be called once, when all operators are declared."""
    ops = torch.ops.llmkern
    formulas: dict[Any, Callable[..., int]] = {
        ops.attention: lambda q, k, v, *rest: _attention(q, k, v),
        ops.attention_backward: lambda grad, grad_lse, q, k, v, *rest: _attention_backward(q, k, v),
        ops.attention_weights: lambda q, k, *rest: _products(*q[:3], k[2], q[3]),
        ops.attention_weights_backward: lambda grad, q, k, *rest: _products(*q[:3], k[2], *(q[3],) * 3),
        ops.attention_column_sums: lambda q, k, *rest: _products(*q[:3], k[2], q[3]),
        ops.attention_varlen: lambda q, k, v, cu_q, cu_k, long_q, long_k, *rest: _varlen(q, k, v, cu_q, long_q, long_k),
        ops.attention_varlen_backward: lambda grad, grad_lse, q, k, v, out, lse, cu_q, cu_k, long_q, long_k, *rest: (
            5 * _varlen(q, k, v, cu_q, long_q, long_k) // 2
        ),
        ops.attention_kvcache: lambda q, k, v, *rest: _products(q[0], q[2], q[1], k[1], q[3], v[3]),
        ops.int8_linear: lambda x, w, *rest: 2 * prod(x) * w[0],
    }

    for operator, formula in formulas.items():

        def counted(*args: Any, out_shape: Any = None, formula: Callable[..., int] = formula, **kwargs: Any) -> int:
            return formula(*args)

        register_flop_formula(operator)(counted)
