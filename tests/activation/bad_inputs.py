"""Calls that must raise before any kernel runs: the call, the exception, words of its message."""

from __future__ import annotations

import torch


def t(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


# name: (changed arguments of gated on gate and up (3, 8), exception, words)
GATED = {
    "dtype": ({"gate": t(3, 8, dtype=torch.float64)}, TypeError, ["gate", "float32 or bfloat16 or float16", "float64"]),
    "no tensor": ({"gate": None}, TypeError, ["gate", "torch.Tensor", "NoneType"]),
    "a list": ({"up": [1.0]}, TypeError, ["up", "torch.Tensor", "list"]),
    "no dimensions": ({"gate": t()}, ValueError, ["gate", "(..., N)", "()"]),
    "sparse": ({"up": t(3, 8).to_sparse()}, TypeError, ["up: expected a dense tensor", "got torch.sparse_coo"]),
    "shape": ({"up": t(1, 8)}, ValueError, ["up", "(3, 8)", "(1, 8)"]),
    "mixed dtypes": ({"up": t(3, 8, dtype=torch.float16)}, TypeError, ["up", "dtype of gate, float32", "float16"]),
    "device": ({"up": t(3, 8, device="meta")}, ValueError, ["up", "device of gate, cpu", "meta"]),
    "activation": ({"activation": "tanh"}, ValueError, ["activation", "relu, gelu, gelu_tanh, silu", "'tanh'"]),
    "no name": ({"activation": None}, TypeError, ["activation", "a string", "None"]),
}  # fmt: skip
