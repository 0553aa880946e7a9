"""torch.ops.llmkern.attention_varlen: sequences laid end to end, with its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern import autocast, check, second_order
from llmkern.attention import compiled, reference
from llmkern.attention.mask import SCORE_RULES, window
from llmkern.attention.op import checks
from llmkern.attention.triton_varlen_launch import TRITON_VARLEN, TRITON_VARLEN_BACKWARD
from llmkern.backend import Operator, reference_backend
from llmkern.operator import check_types, define, is_compiling, refuse_forward_ad
from llmkern.random import seed_tensor


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | int | None = None,
    deterministic: bool = False,
    return_logsumexp: bool = False,
) -> Any:
    """scaled_dot_product_attention within each of the sequences that lie end to end.

    query (Tq, H, D), key (Tk, Hkv, D), value (Tk, Hkv, Dv), all float32, bfloat16 or float16, under autocast in
    autocast's, Hkv a divisor of H.
    cu_seqlens_q, cu_seqlens_k (N + 1,) int32 or int64: sequence n has the queries from cu_seqlens_q[n] to
    cu_seqlens_q[n + 1], likewise its keys; they rise from 0 to Tq and Tk. max_seqlen_q, max_seqlen_k: the length of
    the longest, where it is known. Returns (Tq, H, Dv), zeros for a query without keys, and with return_logsumexp also
    (H, Tq) float64.

    The other arguments are those of scaled_dot_product_attention, each sequence being a batch: alibi_slopes (H,) or
    (N, H), "bottom_right" is the corner of the sequence, and dropout draws the numbers that the same sequences have as
    rows of a padded batch with causal_alignment "top_left".

    Raises TypeError for a wrong type or dtype, ValueError for wrong shapes, devices, options or bounds. Triton's
    kernels do not wait for bounds that lie on a GPU: wrong ones give wrong results there, and tokens behind the last
    bound zeros. Names and layout are those of flash-attention's flash_attn_varlen_func (Dao 2023).
    """
    refuse_forward_ad("attention_varlen", query, key, value, learnable_sink)
    for name, t in (("query", query), ("key", key), ("value", value)):
        check.is_tensor(name, t)
    query, key, value = autocast.cast(query, key, value)
    check.flag("deterministic", deterministic)
    check.probability("dropout_p", dropout_p)
    seed = None if dropout_p == 0.0 else seed_tensor("dropout_seed", dropout_seed)
    if scale is None:
        scale = checks.default_scale("query", query, "(Tq, H, D)")
    checks.scores(causal_alignment, scale, softcap)
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if longest is not None:
            check.integer(name, longest)
    check.flag("return_logsumexp", return_logsumexp)
    args = (
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, alibi_slopes, learnable_sink, seed,
        *window(window_size, is_causal), causal_alignment == "bottom_right", softcap, dropout_p, scale,
    )  # fmt: skip
    try:
        output, logsumexp = torch.ops.llmkern.attention_varlen(*args)
    except (RuntimeError, TypeError, ValueError):
        if not is_compiling():  # only here, since it costs as much as the checks before the kernel together
            check_types("attention_varlen", args)
        raise
    return (output, logsumexp) if return_logsumexp else output


def _check(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int | None,
    max_seqlen_k: int | None, *rest: Any,
) -> None:  # fmt: skip
    check.dtype("query", query, check.FLOATS)
    check.rank("query", query, "(Tq, H, D)")
    heads, width = query.shape[1:]
    for name, t, shape in (("key", key, "(Tk, Hkv, D)"), ("value", value, "(Tk, Hkv, Dv)")):
        check.same_dtype(name, t, "query", query)
        check.same_device(name, t, "query", query)
        check.rank(name, t, shape)
    if key.size(2) != width:
        raise ValueError(f"key: expected (Tk, Hkv, D) with D = {width} as in query, got shape {tuple(key.shape)}")
    if (heads and key.size(1) < 1) or heads % max(key.size(1), 1):
        expected = f"(Tk, Hkv, D) with Hkv a divisor of H = {heads}, the heads of query"
        raise ValueError(f"key: expected {expected}, got shape {tuple(key.shape)}")
    if value.shape[:2] != key.shape[:2]:
        expected = f"(Tk, Hkv, Dv) with {tuple(key.shape[:2])} as in key"
        raise ValueError(f"value: expected {expected}, got shape {tuple(value.shape)}")
    for name, t in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check.dtype(name, t, (torch.int32, torch.int64))
        check.same_device(name, t, "query", query)
        check.rank(name, t, "(N + 1)")
        if t.size(0) < 1 or t.size(0) != cu_seqlens_q.size(0):
            expected = "(N + 1,), at least one number" if t.size(0) < 1 else f"(N + 1,) = ({cu_seqlens_q.size(0)},)"
            raise ValueError(f"{name}: expected {expected}, got shape {tuple(t.shape)}")
    checks.score_rules(query, cu_seqlens_q.size(0) - 1, heads, *rest[:8])


def _check_backward(
    grad_output: Tensor, grad_logsumexp: Tensor | None, query: Tensor, key: Tensor, value: Tensor, output: Tensor,
    logsumexp: Tensor, *rest: Any,
) -> None:  # fmt: skip
    _check(query, key, value, *rest)
    for name, t in (("logsumexp", logsumexp), ("grad_logsumexp", grad_logsumexp)):
        if t is not None:
            check.dtype(name, t, (torch.float64,))
            check.same_device(name, t, "query", query)
            check.shape(name, t, "(H, Tq)", (query.size(1), query.size(0)))
    for name, t in (("grad_output", grad_output), ("output", output)):
        checks.like_query(name, query, t, "(Tq, H, Dv)", (*query.shape[:2], value.size(2)))


def _example(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    x, ends = torch.empty(128, 8, 64, dtype=dtype, device=device), torch.empty(5, dtype=torch.int32, device=device)
    return x, x, x, ends, ends, 32, 32, None, None, None, -1, 0, False, 0.0, 0.0, 0.125


def _example_backward(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    x, _, _, *rest = _example(device, dtype)
    return x, None, x, x, x, x, torch.empty(8, 128, dtype=torch.float64, device=device), *rest


_VARLEN = Operator(
    "attention_varlen",
    _check,
    _example,
    cpu=[compiled.CPU_VARLEN, reference_backend(reference.attention_varlen)],
    cuda=[TRITON_VARLEN, reference_backend(reference.attention_varlen)],
    other=[reference_backend(reference.attention_varlen)],
)
_BACKWARD = Operator(
    "attention_varlen_backward",
    _check_backward,
    _example_backward,
    cpu=[compiled.CPU_VARLEN_BACKWARD, reference_backend(reference.attention_varlen_backward)],
    cuda=[TRITON_VARLEN_BACKWARD, reference_backend(reference.attention_varlen_backward)],
    other=[reference_backend(reference.attention_varlen_backward)],
)


def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _check(query, key, value, *rest)
    output = query.new_empty((*query.shape[:2], value.size(2)))
    return output, query.new_empty((query.size(1), query.size(0)), dtype=torch.float64)


def _fake_backward(
    grad_output: Tensor, grad_logsumexp: Tensor | None, query: Tensor, key: Tensor, value: Tensor, output: Tensor,
    logsumexp: Tensor, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    _check_backward(grad_output, grad_logsumexp, query, key, value, output, logsumexp, *rest)
    dquery, dkey, dvalue = (t.new_empty(t.shape) for t in (query, key, value))
    grad_sink = query.new_empty(0 if rest[5] is None else query.size(1), dtype=torch.float32)
    return dquery, dkey, dvalue, grad_sink


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, cu_q, cu_k, longest_q, longest_k, slopes, sink, seed, *others = inputs
    checks.no_gradient_of_slopes(slopes, ctx.needs_input_grad[7])
    ctx.set_materialize_grads(False)
    ctx.longest, ctx.others = (longest_q, longest_k), others
    ctx.save_for_backward(query, key, value, *output, cu_q, cu_k, slopes, sink, seed)


def _backward(ctx: Any, grad_output: Tensor | None, grad_logsumexp: Tensor | None) -> tuple[Any, ...]:
    if grad_output is None and grad_logsumexp is None:
        return (None,) * 16
    query, key, value, output, logsumexp, cu_q, cu_k, *tensors = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    grads = torch.ops.llmkern.attention_varlen_backward(
        grad_output, grad_logsumexp, query, key, value, output, logsumexp, cu_q, cu_k, *ctx.longest, *tensors,
        *ctx.others,
    )  # fmt: skip
    needed = [g if n else None for g, n in zip(grads[:3], ctx.needs_input_grad[:3], strict=True)]
    grad_sink = grads[3].to(tensors[1].dtype) if ctx.needs_input_grad[8] else None
    return *needed, *(None,) * 5, grad_sink, *(None,) * 7


_SEQUENCES = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt? max_seqlen_q, SymInt? max_seqlen_k"
define(
    f"attention_varlen(Tensor query, Tensor key, Tensor value, {_SEQUENCES}, {SCORE_RULES}) -> (Tensor, Tensor)",
    _VARLEN.run, _fake, setup_context=_setup, backward=_backward,
)  # fmt: skip
define(
    "attention_varlen_backward(Tensor grad_output, Tensor? grad_logsumexp, Tensor query, Tensor key, Tensor value, "
    f"Tensor output, Tensor logsumexp, {_SEQUENCES}, {SCORE_RULES}) -> (Tensor, Tensor, Tensor, Tensor)",
    _BACKWARD.run, _fake_backward,
    setup_context=second_order.setup, backward=second_order.backward_of(reference.attention_varlen_backward),
)  # fmt: skip
