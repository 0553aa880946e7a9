"""What torch.utils.flop_counter.FlopCounterMode counts for the operators: their matrix products, as for torch's own.

A multiply-add counts 2. Masks, causal or other, are not subtracted; elementwise work (rotary, sinusoidal_add, a loss of
logits) is 0.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

COUNTER = "torch.utils.flop_counter"


def _values(t: Tensor) -> list[int] | None:
    """The numbers in it, or None where it has shapes alone."""
    return None if isinstance(t, FakeTensor) or t.is_meta else t.tolist()


def _attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> int:
    batch, heads, queries, size = query.shape
    return 2 * batch * heads * queries * key.shape[2] * (size + value.shape[3])


def _attention_backward(grad_output: Tensor, grad_logsumexp: Tensor | None, *inputs: Any) -> int:
    """Five products for the forward's two."""
    return _attention(*inputs) * 5 // 2


def _weights(query: Tensor, key: Tensor, *rest: Any) -> int:
    batch, heads, queries, size = query.shape
    return 2 * batch * heads * queries * key.shape[2] * size


def _weights_backward(grad_weights: Tensor, *inputs: Any) -> int:
    """The scores again, and the gradients of query and key."""
    return 3 * _weights(*inputs)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int | None, max_seqlen_k: int | None, *rest: Any,
) -> int:  # fmt: skip
    """Each sequence by its length; by the longest, as torch counts, or by all rows where there are shapes alone."""
    ends_q, ends_k = _values(cu_seqlens_q), _values(cu_seqlens_k)
    if ends_q is None or ends_k is None:
        sequences = cu_seqlens_q.shape[0] - 1
        if max_seqlen_q is None or max_seqlen_k is None:
            pairs = query.shape[0] * key.shape[0]
        else:
            pairs = sequences * max_seqlen_q * max_seqlen_k
    else:
        pairs = sum(
            (q1 - q0) * (k1 - k0) for q0, q1, k0, k1 in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False)
        )
    return 2 * query.shape[1] * pairs * (query.shape[2] + value.shape[2])


def _varlen_backward(
    grad_output: Tensor, grad_logsumexp: Tensor | None, query: Tensor, key: Tensor, value: Tensor, output: Tensor,
    logsumexp: Tensor, *rest: Any,
) -> int:  # fmt: skip
    return _varlen(query, key, value, *rest) * 5 // 2


def _kvcache(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, key: Tensor | None, value: Tensor | None, rotary_cos: Any,
    rotary_sin: Any, cache_seqlens: Tensor | None, block_table: Tensor | None, *rest: Any,
) -> int:  # fmt: skip
    """Each sequence by the tokens that it holds with the new ones; by the cache's size where there are shapes alone."""
    batch, queries, heads, size = query.shape
    tokens = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    held = None if cache_seqlens is None else _values(cache_seqlens)
    keys = batch * tokens if held is None else sum(held) + batch * (0 if key is None else key.shape[1])
    return 2 * heads * queries * keys * (size + v_cache.shape[3])


def _int8_linear(x: Tensor, weight: Tensor, *rest: Any) -> int:
    return 2 * x.shape[:-1].numel() * weight.shape[0] * weight.shape[1]


def _products(hidden: Tensor, weight: Tensor, needs: Sequence[bool] = ()) -> int:
    """The logits, and the gradients that are made with them: as many products of the same size."""
    return 2 * hidden.shape[0] * weight.shape[0] * weight.shape[1] * (1 + sum(map(bool, needs[:2])))


def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int, label_smoothing: float,
    z_loss: float, reduction: str, needs: Sequence[bool],
) -> int:  # fmt: skip
    return _products(hidden, weight, () if reduction == "none" else needs)


def _linear_cross_entropy_backward(grad_loss: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> int:
    return _products(hidden, weight, rest[-1])


def _linear_distillation(
    student_hidden: Tensor, student_weight: Tensor, student_bias: Tensor | None, teacher_hidden: Tensor,
    teacher_weight: Tensor, *rest: Any,
) -> int:  # fmt: skip
    return _products(student_hidden, student_weight, rest[-1]) + _products(teacher_hidden, teacher_weight)


FORMULAS: dict[str, Callable[..., int]] = {
    "attention": _attention,
    "attention_backward": _attention_backward,
    "attention_int8": _attention,
    "attention_weights": _weights,
    "attention_weights_backward": _weights_backward,
    "attention_column_sums": _weights,
    "attention_varlen": _varlen,
    "attention_varlen_backward": _varlen_backward,
    "attention_kvcache": _kvcache,
    "int8_linear": _int8_linear,
    "int8_linear_backward": _int8_linear,
    "linear_cross_entropy": _linear_cross_entropy,
    "linear_cross_entropy_backward": _linear_cross_entropy_backward,
    "linear_distillation": _linear_distillation,
}


def register() -> None:
    """Tells torch's counter the formulas: now if it is loaded, otherwise when it is, since it loads Triton."""
    if COUNTER in sys.modules:
        _tell(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _WhenLoaded())


class _WhenLoaded(MetaPathFinder):
    """Finds the counter's module as Python does without it, and tells it the formulas once it has run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != COUNTER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_tell(module: Any) -> None:
                run(module)
                _tell(module)

            spec.loader.exec_module = run_and_tell  # type: ignore[method-assign]
        return spec


def _tell(counter: Any) -> None:
    for name, formula in FORMULAS.items():

        def count(*args: Any, formula: Callable[..., int] = formula, out_val: Any = None) -> int:
            return formula(*args)

        counter.register_flop_formula(getattr(torch.ops.llmkern, name), get_raw=True)(count)
