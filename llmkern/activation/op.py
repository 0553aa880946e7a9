"""torch.ops.llmkern.gated and gated_backward: checks, backends, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern import check
from llmkern.activation import reference
from llmkern.activation.compiled import CPU_GATED, CPU_GATED_BACKWARD
from llmkern.activation.triton_launch import TRITON_GATED, TRITON_GATED_BACKWARD
from llmkern.backend import Operator, reference_backend
from llmkern.operator import call_key, define, dispatch, is_compiling, samples, short_autograd
from llmkern.second_order import backward_of, setup

ACTIVATIONS = tuple(reference.FUNCTIONS)


def gated(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """f(gate) * up in one pass, the middle of a gated feed-forward layer.

    gate, up: one shape (..., N) and dtype, float32, bfloat16 or float16; halves of one projection may come as views.
    activation: "silu" (SwiGLU), "gelu" (GeGLU, exact), "gelu_tanh" (its approximation by tanh), "relu" (ReGLU).
    Returns that shape and dtype, rounded once. The backward makes f(gate) again instead of keeping it.

    Raises TypeError for a wrong dtype, ValueError for a wrong shape, device or activation. Source: Shazeer 2020, "GLU
    Variants Improve Transformer", section 2.
    """
    found = None if is_compiling() else call_key(gate, up, activation)
    if found is not None:
        launch = _GATED.short.get(found) or _GATED.short_call(found, _Gated.apply, gate, up, activation)
        return launch(gate, up, activation)
    return dispatch("gated", gate, up, activation)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up: `gated` with activation="silu"."""
    return gated(gate, up, "silu")


def geglu(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """gelu(gate) * up: `gated` with "gelu" or, for approximate="tanh", "gelu_tanh", as torch's gelu names them."""
    check.one_of("approximate", approximate, ("none", "tanh"))
    return gated(gate, up, "gelu" if approximate == "none" else "gelu_tanh")


def _check(gate: Tensor, up: Tensor, activation: str) -> None:
    check.dtype("gate", gate, check.FLOATS)
    if gate.dim() == 0:
        raise ValueError("gate: expected (..., N), got shape ()")
    check.same_dtype("up", up, "gate", gate)
    check.same_device("up", up, "gate", gate)
    check.shape("up", up, "the shape of gate", tuple(gate.shape))
    check.one_of("activation", activation, ACTIVATIONS)


def _check_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    _check(gate, up, activation)
    check.same_dtype("grad", grad, "gate", gate)
    check.same_device("grad", grad, "gate", gate)
    check.shape("grad", grad, "the shape of gate", tuple(gate.shape))


def _example(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    x = torch.empty(8, 64, dtype=dtype, device=device)
    return x, x, "silu"


_GATED = Operator(
    "gated", _check, _example,
    cpu=[CPU_GATED, reference_backend(reference.gated)],
    cuda=[TRITON_GATED, reference_backend(reference.gated)],
    other=[reference_backend(reference.gated)],
)  # fmt: skip
_BACKWARD = Operator(
    "gated_backward", _check_backward, lambda device, dtype: (_example(device, dtype)[0], *_example(device, dtype)),
    cpu=[CPU_GATED_BACKWARD, reference_backend(reference.gated_backward)],
    cuda=[TRITON_GATED_BACKWARD, reference_backend(reference.gated_backward)],
    other=[reference_backend(reference.gated_backward)],
)  # fmt: skip


def _fake(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    _check(gate, up, activation)
    return gate.new_empty(gate.shape)


def _fake_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    _check_backward(grad, gate, up, activation)
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gate, up = ctx.saved_tensors
    dgate, dup = torch.ops.llmkern.gated_backward(grad, gate, up, ctx.activation)
    return dgate if ctx.needs_input_grad[0] else None, dup if ctx.needs_input_grad[1] else None, None


def _vmap(batch_size: int, in_dims: tuple[int | None, ...], gate: Tensor, up: Tensor, activation: str) -> Any:
    given = (samples(t, dim, batch_size) for t, dim in zip((gate, up), in_dims[:2], strict=True))
    return torch.ops.llmkern.gated(*given, activation), 0


define(
    "gated(Tensor gate, Tensor up, str activation) -> Tensor",
    _GATED.run, _fake, setup_context=_setup, backward=_backward, vmap=_vmap,
)  # fmt: skip
define(
    "gated_backward(Tensor grad, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
    _BACKWARD.run, _fake_backward, setup_context=setup, backward=backward_of(reference.gated_backward),
)  # fmt: skip
_Gated = short_autograd(_GATED.run, _setup, _backward)
