"""torch.ops.llmkern.int8_linear: checks, backends, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern import autocast, check
from llmkern.backend import Operator, reference_backend
from llmkern.int8 import reference
from llmkern.int8.backward import input_gradient
from llmkern.int8.compiled import CPU_INT8_LINEAR
from llmkern.int8.cuda import CUDA_INT8_LINEAR
from llmkern.int8.scheme import PAIRS
from llmkern.int8.triton_launch import TRITON_INT8_LINEAR
from llmkern.operator import call_key, check_types, define, dispatch, is_compiling, needs_grad, short_autograd
from llmkern.overlap import between, extent, within


def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    input_scale: Tensor | None = None,
    inputs: str = "outliers",
    group: int = 0,
    rotate: int = 1,
    activation: str = "none",
    out: Tensor | None = None,
) -> Tensor:
    """activation(x @ (weight_scale[:, None] * weight)^T + bias) + residual, x quantised to 8 bits on the fly.

    x (..., K), float32, bfloat16 or float16. weight (N, K) int8. weight_scale (N,) float32, or with `group` (N,
    ceil(K / group)). bias (N,), floating. Returns (..., N) in x's dtype, under autocast in autocast's. The integers are
    exact on every backend: llmkern.int8.reference defines them. A row that holds inf or NaN gives NaN.

    inputs, group: how x becomes integers, as in llmkern.int8.scheme.Int8Scheme. input_scale: of inputs="static", (2,)
    float32, scale and zero point. rotate: the size of Hadamard's transform of x before, a power of two with 16 * rotate
    dividing K; 1: none (the weight must be of a transformed one). activation: none, relu, gelu, gelu_tanh, silu, swiglu
    or geglu; the last two take the first N / 2 outputs through the function and multiply by the others. residual: in
    x's dtype and the result's shape. out: a tensor of the result's shape and x's dtype to write to, apart from the
    inputs, where no gradient is recorded; it is returned. As with torch's own, autocast then casts nothing.

    The gradient of x is that of the dequantised weight (straight through the rounding); weights have none.

    Raises TypeError for a wrong dtype, ValueError for a wrong shape, device or name, a scale that requires a gradient,
    or an `out` that shares memory. Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for
    Efficient Integer-Arithmetic-Only Inference", section 2; for outliers Dettmers et al. 2022, "LLM.int8()".
    """
    args = (x, weight, weight_scale, bias, residual, input_scale, inputs, group, rotate, activation)
    if out is not None:
        return _into(out, *args)
    if activation != "none" and needs_grad(*(t for t in args[:5] if isinstance(t, Tensor))):
        return _step_by_step(*args)
    key = None if is_compiling() else call_key(*args)
    if key is not None:
        launch = _SHORT.get(key) or _OPERATOR.short_call(key, _Int8Linear.apply, *args)
        return launch(*args)
    check.is_tensor("x", x)
    cast = autocast.cast(x) if residual is None else autocast.cast(x, residual)
    return dispatch("int8_linear", cast[0], *args[1:4], None if residual is None else cast[1], *args[5:])


def _step_by_step(x: Tensor, *args: Any) -> Tensor:
    """With the function apart, whose gradient needs what it was given; in float32 until the end, as in one kernel."""
    weight, weight_scale, bias, residual, input_scale, inputs, group, rotate, activation = args
    check.is_tensor("x", x)
    x, *rest = autocast.cast(x) if residual is None else autocast.cast(x, residual)
    residual = rest[0] if rest else None
    _check(x, weight, weight_scale, bias, residual, *args[4:])
    with torch.autocast(x.device.type, enabled=False):
        y = int8_linear(
            x.float(), weight, weight_scale, bias, input_scale=input_scale, inputs=inputs, group=group, rotate=rotate
        )  # fmt: skip
        y = reference.activate(y, activation)
        return (y if residual is None else y + residual.float()).to(x.dtype)


def _into(out: Tensor, x: Tensor, *args: Any) -> Tensor:
    check.is_tensor("out", out)
    key = None if is_compiling() else call_key(x, *args, out)
    if key is not None and not key[0]:
        launch = _SHORT.get(key)
        if launch is None:
            check_types("int8_linear_out", (x, *args, out))
            launch = _SHORT.keep(key, _launch_into(x, *args, out))
        return launch(x, *args, out)
    if needs_grad(*(t for t in (x, *args[:4], out) if isinstance(t, Tensor))):
        raise ValueError("out: expected None where a gradient is recorded, got a tensor")
    check.is_tensor("x", x)
    dispatch("int8_linear_out", x, *args, out)
    return out


def _launch_into(*args: Any) -> Any:
    """The launcher of calls with these metadata, which looks at their addresses and tells autograd of the write."""
    launch, wrote = _OPERATOR.plan(*args), torch.autograd.graph.increment_version
    behind = extent(args[-1])
    reach = [(i, extent(t)) for i, t in enumerate(args[:6]) if t is not None]

    def into(*args: Any) -> Tensor:
        out = args[-1]
        address = out.data_ptr()
        for i, size in reach:
            if -size < args[i].data_ptr() - address < behind:  # else they are apart; rows that alternate may be too
                _check_apart(_NAMES[i], args[i], out)
        wrote(out)
        result: Tensor = launch(*args)
        return result

    return into


_NAMES = ("x", "weight", "weight_scale", "bias", "residual", "input_scale")


def _check_apart(name: str, t: Tensor, out: Tensor) -> None:
    if t.dtype != out.dtype or between(t, out):
        raise ValueError(f"out: expected memory of its own, got a tensor that shares some with {name}")


def _check(x: Tensor, *args: Any) -> None:
    """With or without `out` behind the operator's arguments."""
    reference.check_linear(x, *args[:9])
    out = args[9] if len(args) > 9 else None
    if out is not None:
        outputs = args[0].size(0) // 2 if args[8] in PAIRS else args[0].size(0)
        check.same_dtype("out", out, "x", x)
        check.shape("out", out, "(..., outputs)", (*x.shape[:-1], outputs))
        check.same_device("out", out, "x", x)
        if within(out.shape, out.stride()):
            raise ValueError(f"out: expected elements with memory of their own, got strides {out.stride()}")


def _plain(x: Tensor, *args: Any) -> Tensor:
    y = reference.int8_linear(x, *args[:9])
    return y if len(args) < 10 or args[9] is None else args[9].copy_(y)


def _example(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    weight = torch.empty(64, 64, dtype=torch.int8, device=device)
    x = torch.empty(8, 64, dtype=dtype, device=device)
    return x, weight, torch.empty(64, device=device), None, None, None, "outliers", 0, 1, "none"


_OPERATOR = Operator(
    "int8_linear",
    _check,
    _example,
    cpu=[CPU_INT8_LINEAR, reference_backend(_plain)],
    cuda=[CUDA_INT8_LINEAR, TRITON_INT8_LINEAR, reference_backend(_plain)],
    other=[reference_backend(_plain)],
)
_SHORT = _OPERATOR.short


def _fake(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    _check(x, weight, *args)
    return x.new_empty((*x.shape[:-1], weight.size(0) // 2 if args[7] in PAIRS else weight.size(0)))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, weight_scale, bias, _, _, _, ctx.group, ctx.rotate, activation = inputs
    for name, needed in (("weight_scale", ctx.needs_input_grad[2]), ("input_scale", ctx.needs_input_grad[5])):
        if needed:
            raise ValueError(f"{name}: expected a tensor that requires no gradient, got one that does")
    if activation != "none":
        raise ValueError(f"activation: expected 'none' where a gradient is recorded, got {activation!r}")
    ctx.save_for_backward(weight, weight_scale)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, weight_scale = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * 10
    if ctx.needs_input_grad[0]:
        grads[0] = input_gradient(grad, weight, weight_scale, ctx.group, ctx.rotate)
    if ctx.needs_input_grad[3]:
        grads[3] = grad.unsqueeze(0).flatten(0, -2).float().sum(0).to(ctx.bias_dtype)
    if ctx.needs_input_grad[4]:
        grads[4] = grad
    return tuple(grads)


def _vmap(batch_size: int, in_dims: tuple[int | None, ...], x: Tensor, *rest: Any) -> Any:
    if in_dims[0] is None or any(d is not None for d in in_dims[1:]) or rest[3] is not None:
        return NotImplemented
    return torch.ops.llmkern.int8_linear(x.movedim(in_dims[0], 0), *rest), 0


_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? residual, Tensor? input_scale, str inputs, "
    "int group, int rotate, str activation"
)

define(
    f"int8_linear({_ARGUMENTS}) -> Tensor",
    _OPERATOR.run, _fake, setup_context=_setup_context, backward=_backward, vmap=_vmap,
)  # fmt: skip


def _run_out(*args: Any) -> None:
    _launch_into(*args)(*args)


def _fake_out(x: Tensor, *args: Any) -> None:
    _check(x, *args)


define(f"int8_linear_out({_ARGUMENTS}, Tensor(a!) out) -> ()", _run_out, _fake_out)


_Int8Linear = short_autograd(_OPERATOR.run, _setup_context, _backward)
