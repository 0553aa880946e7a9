"""torch.ops.llmkern.sinusoidal_add and its backward's sinusoidal_dropout: checks, backends, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern import check
from llmkern.backend import Operator, reference_backend
from llmkern.operator import call_key, define, dispatch, is_compiling, short_autograd
from llmkern.positional import reference
from llmkern.positional.compiled import CPU_SINUSOIDAL_ADD, CPU_SINUSOIDAL_DROPOUT
from llmkern.positional.cuda import CUDA_SINUSOIDAL_ADD, CUDA_SINUSOIDAL_DROPOUT
from llmkern.positional.triton_launch import TRITON_SINUSOIDAL_ADD, TRITON_SINUSOIDAL_DROPOUT
from llmkern.random import check_dropout, seed_tensor


def sinusoidal_add(
    x: Tensor,
    pe: Tensor,
    *,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """dropout(x * scale + pe[:S]), in one pass.

    x: (S, B, D), float32, bfloat16 or float16. pe: (max_len, 1, D), float32, S <= max_len. Returns (S, B, D) in x's
    dtype. dropout_p: the probability, in [0, 1], with which an element becomes 0; the others are multiplied by
    1 / (1 - dropout_p). The mask is a function of `seed` and of the element's place alone (Philox4x32-10, Salmon et
    al. 2011), the same on every backend, and is made anew in the backward instead of being kept. seed: an integer or a
    CPU int64 tensor (); without one it is drawn from torch's CPU generator.
    Raises TypeError for a wrong dtype, ValueError for a wrong shape, device or probability and for a scale that is not
    finite.
    """
    if not (type(scale) is float and scale == 1.0):  # the default costs no check
        check.finite("scale", scale)
    try:
        key = seed_tensor("seed", seed) if dropout_p > 0.0 else None
    except TypeError:
        check.probability("dropout_p", dropout_p)
        raise
    args = (x, pe, key, scale, dropout_p)
    found = None if is_compiling() else call_key(*args)
    if found is not None:
        launch = _SINUSOIDAL_ADD.short.get(found) or _SINUSOIDAL_ADD.short_call(found, _SinusoidalAdd.apply, *args)
        return launch(*args)
    return dispatch("sinusoidal_add", *args)


def _check_sinusoidal_add(x: Tensor, pe: Tensor, seed: Tensor | None, scale: float, dropout_p: float) -> None:
    check.dtype("x", x, check.FLOATS)
    check.dtype("pe", pe, (torch.float32,))
    check.same_device("pe", pe, "x", x)
    check.rank("x", x, "(S, B, D)")
    check.rank("pe", pe, "(max_len, 1, D)")
    if pe.size(1) != 1 or pe.size(2) != x.size(2):
        raise ValueError(f"pe: expected (max_len, 1, D) with D = {x.size(2)} as in x, got shape {tuple(pe.shape)}")
    if x.size(0) > pe.size(0):
        raise ValueError(f"x: expected (S, B, D) with S <= max_len = {pe.size(0)} of pe, got shape {tuple(x.shape)}")
    check_dropout("seed", seed, dropout_p)


def _check_sinusoidal_dropout(x: Tensor, seed: Tensor, scale: float, dropout_p: float) -> None:
    check.dtype("x", x, check.FLOATS)
    check.rank("x", x, "(S, B, D)")
    check_dropout("seed", seed, dropout_p)


def _plain_add(x: Tensor, pe: Tensor, seed: Tensor | None, scale: float, dropout_p: float) -> Tensor:
    return reference.sinusoidal_add(x, pe, scale, dropout_p, seed)


def _plain_dropout(x: Tensor, seed: Tensor, scale: float, dropout_p: float) -> Tensor:
    return x * scale * reference.dropout_factor(x, dropout_p, seed)


def _sinusoidal_example(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    x = torch.empty(8, 2, 64, dtype=dtype, device=device)
    return x, torch.empty(8, 1, 64, device=device), None, 1.0, 0.0


def _dropout_example(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    return torch.empty(8, 2, 64, dtype=dtype, device=device), torch.empty((), dtype=torch.int64), 1.0, 0.1


_SINUSOIDAL_ADD = Operator(
    "sinusoidal_add",
    _check_sinusoidal_add,
    _sinusoidal_example,
    cpu=[CPU_SINUSOIDAL_ADD, reference_backend(_plain_add)],
    cuda=[CUDA_SINUSOIDAL_ADD, TRITON_SINUSOIDAL_ADD, reference_backend(_plain_add)],
    other=[reference_backend(_plain_add)],
)
_SINUSOIDAL_DROPOUT = Operator(
    "sinusoidal_dropout",
    _check_sinusoidal_dropout,
    _dropout_example,
    cpu=[CPU_SINUSOIDAL_DROPOUT, reference_backend(_plain_dropout)],
    cuda=[CUDA_SINUSOIDAL_DROPOUT, TRITON_SINUSOIDAL_DROPOUT, reference_backend(_plain_dropout)],
    other=[reference_backend(_plain_dropout)],
)


def _fake_sinusoidal_add(x: Tensor, pe: Tensor, seed: Tensor | None, scale: float, dropout_p: float) -> Tensor:
    _check_sinusoidal_add(x, pe, seed, scale, dropout_p)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake_sinusoidal_dropout(x: Tensor, seed: Tensor, scale: float, dropout_p: float) -> Tensor:
    _check_sinusoidal_dropout(x, seed, scale, dropout_p)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup_sinusoidal_add(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, pe, seed, ctx.scale, ctx.dropout_p = inputs
    ctx.pe_shape = pe.shape
    ctx.save_for_backward(seed)


def _backward_sinusoidal_add(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (seed,) = ctx.saved_tensors
    grad_x = grad_pe = None
    if ctx.needs_input_grad[0]:
        grad_x = grad * ctx.scale if seed is None else _dropout(grad, seed, ctx.scale, ctx.dropout_p)
    if ctx.needs_input_grad[1]:
        kept = grad.float() if seed is None else _dropout(grad.float(), seed, 1.0, ctx.dropout_p)
        rows = kept.sum(1, keepdim=True)
        grad_pe = torch.cat((rows, rows.new_zeros(ctx.pe_shape[0] - rows.size(0), *ctx.pe_shape[1:])))
    return grad_x, grad_pe, None, None, None


def _dropout(x: Tensor, seed: Tensor, scale: float, dropout_p: float) -> Tensor:
    return torch.ops.llmkern.sinusoidal_dropout(x, seed, scale, dropout_p)


def _setup_dropout(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, ctx.scale, ctx.dropout_p = inputs
    ctx.save_for_backward(seed)


def _backward_dropout(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (seed,) = ctx.saved_tensors
    return _dropout(grad, seed, ctx.scale, ctx.dropout_p), None, None, None


def _vmap_sinusoidal_add(
    batch_size: int, in_dims: tuple[int | None, ...], x: Tensor, pe: Tensor, seed: Tensor | None, *rest: Any
) -> Any:
    if in_dims[0] is None or in_dims[1] is not None or seed is not None:  # a sample's dropout looks at its own rows
        return NotImplemented
    x = x.movedim(in_dims[0], 1)
    return torch.ops.llmkern.sinusoidal_add(x.flatten(1, 2), pe, None, *rest).unflatten(1, x.shape[1:3]), 1


define(
    "sinusoidal_add(Tensor x, Tensor pe, Tensor? seed, float scale, float dropout_p) -> Tensor",
    _SINUSOIDAL_ADD.run, _fake_sinusoidal_add, setup_context=_setup_sinusoidal_add, backward=_backward_sinusoidal_add,
    vmap=_vmap_sinusoidal_add,
)  # fmt: skip
define(
    "sinusoidal_dropout(Tensor x, Tensor seed, float scale, float dropout_p) -> Tensor",
    _SINUSOIDAL_DROPOUT.run, _fake_sinusoidal_dropout, setup_context=_setup_dropout, backward=_backward_dropout,
)  # fmt: skip
_SinusoidalAdd = short_autograd(_SINUSOIDAL_ADD.run, _setup_sinusoidal_add, _backward_sinusoidal_add)
