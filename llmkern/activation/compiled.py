"""Launchers of the compiled gated activations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmkern import extension
from llmkern.backend import Backend
from llmkern.rows import as_rows

#: The numbers of enum Gate in csrc/activation/params.h.
CODES = {"relu": 0, "gelu": 1, "gelu_tanh": 2, "silu": 3}


def _gated(gate: Tensor, up: Tensor, activation: str) -> Callable[..., Tensor]:
    kernel, threads = extension._C.gated, extension.threads
    width, function, code = gate.size(-1), CODES[activation], extension.DTYPE_CODES[gate.dtype]

    def launch(gate: Tensor, up: Tensor, activation: str) -> Tensor:
        out = torch.empty(gate.shape, dtype=gate.dtype)
        if out.numel():
            gate, up = as_rows(gate), as_rows(up)
            kernel(
                gate.data_ptr(), up.data_ptr(), out.data_ptr(), (gate.size(0), width), (gate.stride(0), up.stride(0)),
                function, code, threads(),
            )  # fmt: skip
        return out

    return launch


def _gated_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> Callable[..., tuple[Tensor, Tensor]]:
    kernel, threads = extension._C.gated_backward, extension.threads
    width, function, code = gate.size(-1), CODES[activation], extension.DTYPE_CODES[gate.dtype]

    def launch(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
        dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype) for _ in range(2))
        if dgate.numel():
            grad, gate, up = as_rows(grad), as_rows(gate), as_rows(up)
            kernel(
                grad.data_ptr(), gate.data_ptr(), up.data_ptr(), dgate.data_ptr(), dup.data_ptr(),
                (gate.size(0), width), (grad.stride(0), gate.stride(0), up.stride(0), width, width), function, code,
                threads(),
            )  # fmt: skip
        return dgate, dup

    return launch


CPU_GATED = Backend("cpu", _gated, extension.missing)
CPU_GATED_BACKWARD = Backend("cpu", _gated_backward, extension.missing)
