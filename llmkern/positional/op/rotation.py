"""torch.ops.llmkern.rotary, and rotary_ in place: checks, backends, autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

from llmkern import check
from llmkern.backend import Operator, reference_backend
from llmkern.operator import (
    call_key,
    check_types,
    define,
    dispatch,
    is_compiling,
    needs_grad,
    samples,
    short_autograd,
)
from llmkern.overlap import between, extent, within
from llmkern.positional import reference
from llmkern.positional.compiled import CPU_ROTARY, rotary_output
from llmkern.positional.cuda import CUDA_ROTARY
from llmkern.positional.triton_launch import TRITON_ROTARY


def rotary(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Rotary position embedding of queries and keys, both in one pass. Returns (q, k).

    q: (B, H, S, D), float32, bfloat16 or float16. k: (B, Hkv, S, D) in q's dtype, or None. cos, sin: (length, R/2),
    float32 or q's dtype, R <= D: the first R elements of a row are rotated, the others kept. position_ids: (S,) or
    (B, S), int32 or int64, each in [0, length); without, positions are 0 ... S - 1, S <= length.
    interleaved: pairs are (2 j, 2 j + 1) instead of (j, j + R/2).
    inplace: writes over q and k, whose elements must all have memory of their own, and returns them. Where autograd
    records the call, the results are computed apart and copied over q and k, so that gradients are those of any torch
    operation in place; cos and sin that require gradients and leaves that require gradients are refused.
    Raises TypeError for a wrong dtype, ValueError for a wrong shape or device and, on the CPU, for a position outside
    the tables; on a GPU the rotated elements of such a row become NaN. Source: Su et al. 2021, "RoFormer", section 3.4.
    """
    args = (q, k, cos, sin, position_ids, interleaved, False)
    if inplace is not False:
        check.flag("inplace", inplace)
        return _rotary_inplace(*args)
    found = None if is_compiling() else call_key(*args)
    if found is not None and not found[0]:
        launch = _ROTARY.short.get(found) or _ROTARY.short_call(found, _Rotary.apply, *args, False)
        return launch(*args, False)
    if found is not None:
        q_out, k_out = _Rotary.apply(*args)
    else:
        q_out, k_out = dispatch("rotary", *args)
    return q_out, None if k is None else k_out


def _rotary_inplace(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor | None]:
    args = (q, k, cos, sin, position_ids, interleaved, inverse, True)
    found = None if is_compiling() else call_key(*args)
    if found is not None and not found[0]:
        launch = _ROTARY.short.get(found)
        if launch is None:
            check_types("rotary", args)
            launch = _ROTARY.short.keep(found, _launch_inplace(*args))
        return launch(*args)
    if not is_compiling():
        check_types("rotary", args)
    # Torch cannot resolve a negated view for an optional argument, and shows the gradients that are asked for to the
    # innermost transform of torch.func alone; there is neither under compile, which cannot ask.
    direct = is_compiling() or not (_functorch.maybe_current_level() or q.is_neg() or (k is not None and k.is_neg()))
    if direct and not needs_grad(q, k, cos, sin):
        torch.ops.llmkern.rotary_(*args[:-1])
        return q, k
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("inplace: expected False where cos or sin requires a gradient, which needs q and k; got True")
    for name, x in (("q", q), ("k", k)):
        if x is not None and x.requires_grad and x.is_leaf:
            raise ValueError(f"inplace: expected False where {name} is a leaf that requires a gradient; got True")
    if not is_compiling():
        _check_apart(q, k)
    for name, x in (("q", q), ("k", k)):
        _check_inplace(name, x if x is None or is_compiling() else _unwrapped(x))
    q_out, k_out = rotary(q, k, cos, sin, interleaved=interleaved, position_ids=position_ids)
    return q.copy_(q_out), None if k is None or k_out is None else k.copy_(k_out)


def _launch_inplace(q: Tensor, k: Tensor | None, *rest: Any) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The launcher of calls with these metadata, which looks at their addresses and tells autograd of the write.

    Without being told, autograd would use what it had kept of q and k.
    """
    launch, wrote = _ROTARY.plan(q, k, *rest), torch.autograd.graph.increment_version
    if k is None:

        def alone(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
            wrote(q)
            return launch(q, *rest)

        return alone
    before, behind = -extent(k), extent(q)

    def launch_apart(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
        if before < k.data_ptr() - q.data_ptr() < behind:  # else they are apart; heads of one projection may be too
            _check_apart(q, k)
        wrote(q)
        wrote(k)
        return launch(q, k, *rest)

    return launch_apart


def _check_inplace(name: str, x: Tensor | None) -> None:
    if x is not None and within(x.shape, x.stride()):
        raise ValueError(
            f"{name}: expected elements with memory of their own with inplace=True, got strides {x.stride()} "
            f"with shape {tuple(x.shape)}"
        )


def _check_apart(q: Tensor, k: Tensor | None) -> None:
    q, k = _unwrapped(q), None if k is None else _unwrapped(k)
    if k is not None and between(q, k):
        layouts = [f"{tuple(x.shape)} with strides {x.stride()}" for x in (q, k)]
        raise ValueError(
            f"k: expected memory of its own, apart from that of q, with inplace=True, got q {layouts[0]} and k "
            f"{layouts[1]}, which share elements"
        )


def _unwrapped(x: Tensor) -> Tensor:
    """What lies in memory below the transforms of torch.func."""
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
    return x


def _check_rotary(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool,
    inverse: bool, inplace: bool,
) -> None:  # fmt: skip
    reference.check_rotary(q, k, cos, sin, position_ids)
    if inplace:
        _check_inplace("q", q)
        _check_inplace("k", k)


def _plain_rotary(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool,
    inverse: bool, inplace: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    if position_ids is not None:
        reference.check_positions(position_ids, cos)
    sin = -sin if inverse else sin
    q_out, k_out = reference.rotary(q, k, cos, sin, interleaved=interleaved, position_ids=position_ids)
    if not inplace:
        return q_out, k_out
    return q.copy_(q_out), None if k is None or k_out is None else k.copy_(k_out)


def _rotary_example(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    q, k = (torch.empty(1, heads, 8, 64, dtype=dtype, device=device) for heads in (4, 2))
    cos, sin = (torch.empty(8, 32, device=device) for _ in range(2))
    return q, k, cos, sin, None, False, False, False


_ROTARY = Operator(
    "rotary",
    _check_rotary,
    _rotary_example,
    cpu=[CPU_ROTARY, reference_backend(_plain_rotary)],
    cuda=[CUDA_ROTARY, TRITON_ROTARY, reference_backend(_plain_rotary)],
    other=[reference_backend(_plain_rotary)],
)


def _run_rotary(q: Tensor, k: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    q_out, k_out = _ROTARY.run(q, k, *args, False)
    return q_out, q.new_empty(0) if k_out is None else k_out  # an operator's result is never None


def _run_rotary_inplace(q: Tensor, k: Tensor | None, *args: Any) -> None:
    _check_apart(q, k)
    _launch_inplace(q, k, *args, True)(q, k, *args, True)


def _fake_rotary(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    _check_rotary(q, k, cos, sin, position_ids, interleaved, inverse, False)
    return rotary_output(q), q.new_empty(0) if k is None else rotary_output(k)


def _fake_rotary_inplace(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool, inverse: bool
) -> None:
    _check_rotary(q, k, cos, sin, position_ids, interleaved, inverse, True)


def _setup_rotary(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, cos, sin, position_ids, ctx.interleaved, ctx.inverse = inputs
    # q and k only for the gradients of the tables.
    tables = cos.requires_grad or sin.requires_grad
    ctx.has_k = k is not None
    ctx.save_for_backward(q if tables else None, k if tables else None, cos, sin, position_ids)


def _backward_rotary(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    q, k, cos, sin, position_ids = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * 7
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        args = (cos, sin, position_ids, ctx.interleaved, not ctx.inverse)
        gq, gk = torch.ops.llmkern.rotary(grad_q, grad_k if ctx.has_k else None, *args)
        grads[0] = gq if ctx.needs_input_grad[0] else None
        grads[1] = gk if ctx.needs_input_grad[1] else None
    if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
        pairs = [(q, grad_q)] if k is None else [(q, grad_q), (k, grad_k)]
        grad_cos, grad_sin = _table_gradients(pairs, cos, position_ids, ctx.interleaved)
        grads[2] = grad_cos if ctx.needs_input_grad[2] else None
        grads[3] = (-grad_sin if ctx.inverse else grad_sin) if ctx.needs_input_grad[3] else None
    return tuple(grads)


def _table_gradients(
    pairs: list[tuple[Tensor, Tensor]], cos: Tensor, position_ids: Tensor | None, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """From (input, gradient of the output) pairs: each position's sums over heads and over the batch, in float32."""
    half = cos.size(1)
    sums = []
    for x, grad in pairs:
        parts: list[Tensor] = []
        for t in (x, grad):
            rotated = t[..., : 2 * half].float()
            parts += rotated.unflatten(-1, (half, 2)).unbind(-1) if interleaved else rotated.chunk(2, -1)
        a, b, ga, gb = parts
        sums.append(((ga * a + gb * b).sum(1), (gb * a - ga * b).sum(1)))
    batch, length = sums[0][0].shape[:2]
    if position_ids is None:
        position_ids = torch.arange(length, device=cos.device)
    index = position_ids.long().expand(batch, length).flatten()
    results = []
    for part in (0, 1):
        total = sum((s[part] for s in sums[1:]), sums[0][part]).flatten(0, 1)
        table = torch.zeros(cos.shape, dtype=total.dtype, device=cos.device).index_add(0, index, total)
        results.append(table.to(cos.dtype))
    return results[0], results[1]


def _vmap_rotary(
    batch_size: int, in_dims: tuple[int | None, ...], q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor,
    position_ids: Tensor | None, *rest: Any,
) -> Any:  # fmt: skip
    """Samples as part of the batch, with tables that they share."""
    q_dim, k_dim, cos_dim, sin_dim, ids_dim, *_ = in_dims
    if cos_dim is not None or sin_dim is not None:
        return NotImplemented

    q = samples(q, q_dim, batch_size)
    k = None if k is None else samples(k, k_dim, batch_size)
    if position_ids is not None and (ids_dim is not None or position_ids.dim() == 2):
        position_ids = samples(position_ids, ids_dim, batch_size)
        if position_ids.dim() == 2:
            position_ids = position_ids.unsqueeze(1)
        position_ids = position_ids.expand(*q.shape[:2], position_ids.size(-1)).flatten(0, 1)
    folded = (q.flatten(0, 1), None if k is None else k.flatten(0, 1), cos, sin, position_ids, *rest)
    q_out, k_out = torch.ops.llmkern.rotary(*folded)
    if k is None:
        return (q_out.unflatten(0, q.shape[:2]), k_out), (0, None)
    return (q_out.unflatten(0, q.shape[:2]), k_out.unflatten(0, k.shape[:2])), (0, 0)


define(
    "rotary(Tensor q, Tensor? k, Tensor cos, Tensor sin, Tensor? position_ids, bool interleaved, bool inverse)"
    " -> (Tensor, Tensor)",
    _run_rotary, _fake_rotary, setup_context=_setup_rotary, backward=_backward_rotary, vmap=_vmap_rotary,
)  # fmt: skip
define(
    "rotary_(Tensor(a!) q, Tensor(b!)? k, Tensor cos, Tensor sin, Tensor? position_ids, bool interleaved, bool inverse)"
    " -> ()",
    _run_rotary_inplace, _fake_rotary_inplace,
)  # fmt: skip
_Rotary = short_autograd(_run_rotary, _setup_rotary, _backward_rotary)
