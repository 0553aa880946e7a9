"""Calls that must raise before any kernel runs: the call, the exception, words of its message."""

from __future__ import annotations

import torch


def t(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


# name: (changed arguments of int8_linear on x (2, 8), weight (4, 8), exception, words)
CASES = {
    "dtype": ({"x": t(2, 8, dtype=torch.float64)}, TypeError, ["x", "float32 or bfloat16 or float16", "float64"]),
    "weight dtype": ({"weight": t(4, 8)}, TypeError, ["weight", "int8", "float32"]),
    "weight rank": ({"weight": t(8, dtype=torch.int8)}, ValueError, ["weight", "(N, K)", "(8,)"]),
    "no weight": ({"weight": None}, TypeError, ["weight", "torch.Tensor", "NoneType"]),
    "no scale": ({"weight_scale": None}, TypeError, ["weight_scale", "torch.Tensor", "NoneType"]),
    "sparse x": ({"x": t(2, 8).to_sparse()}, TypeError, ["x: expected a dense tensor", "got torch.sparse_coo"]),
    "sparse weight": (
        {"weight": t(4, 8, dtype=torch.int8).to_sparse()}, TypeError, ["weight: expected a dense", "torch.sparse_coo"],
    ),
    "a list for x": ({"x": [1.0]}, TypeError, ["x", "torch.Tensor", "list"]),
    "a list for weight": ({"weight": [1.0]}, TypeError, ["weight", "torch.Tensor", "list"]),
    "a list for bias": ({"bias": [1.0]}, TypeError, ["bias", "torch.Tensor", "list"]),
    "depth": ({"x": t(2, 7)}, ValueError, ["x", "K = 8", "(2, 7)"]),
    "no dimension": ({"x": t()}, ValueError, ["x", "(..., K)", "()"]),
    "scale dtype": ({"weight_scale": t(4, dtype=torch.bfloat16)}, TypeError, ["weight_scale", "float32", "bfloat16"]),
    "scale shape": ({"weight_scale": t(5)}, ValueError, ["weight_scale", "(N,) = (4,)", "(5,)"]),
    "bias dtype": ({"bias": t(4, dtype=torch.int32)}, TypeError, ["bias", "float32", "int32"]),
    "bias shape": ({"bias": t(4, 1)}, ValueError, ["bias", "(N,) = (4,)", "(4, 1)"]),
    "device": ({"weight": t(4, 8, dtype=torch.int8, device="meta")}, ValueError, ["weight", "cpu", "meta"]),
    "scale with a gradient": (
        {"weight_scale": t(4).requires_grad_()}, ValueError, ["weight_scale", "requires no gradient"],
    ),
}  # fmt: skip
