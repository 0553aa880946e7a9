"""Calls that must raise before any kernel runs: the call, the exception, words of its message."""

from __future__ import annotations

import torch


def t(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


# name: (changed arguments of layer_norm on x (3, 8), weight and bias (8,), exception, words)
LAYER_NORM = {
    "dtype": ({"x": t(3, 8, dtype=torch.float64)}, TypeError, ["x", "float32 or bfloat16 or float16", "float64"]),
    "no tensor": ({"x": None}, TypeError, ["x", "torch.Tensor", "NoneType"]),
    "a list": ({"x": [1.0]}, TypeError, ["x", "torch.Tensor", "list"]),
    "no dimensions": ({"x": t(), "weight": None, "bias": None}, ValueError, ["x", "(..., N)", "()"]),
    "sparse": ({"x": t(3, 8).to_sparse()}, TypeError, ["x: expected a dense tensor", "got torch.sparse_coo"]),
    "shape of the weight": ({"weight": t(7)}, ValueError, ["weight", "(N,) = (8,)", "(7,)"]),
    "rank of the bias": ({"bias": t(1, 8)}, ValueError, ["bias", "(N,) = (8,)", "(1, 8)"]),
    "dtype of the weight": ({"weight": t(8, dtype=torch.float16)}, TypeError, ["weight", "float32", "float16"]),
    "a bias of another dtype": (
        {"x": t(3, 8, dtype=torch.float16), "bias": t(8, dtype=torch.float16)}, TypeError,
        ["bias", "dtype of weight, float32", "float16"],
    ),
    "a list for a weight": ({"weight": [1.0]}, TypeError, ["weight", "torch.Tensor", "list"]),
    "device": ({"weight": t(8, device="meta")}, ValueError, ["weight", "device of x, cpu", "meta"]),
    "shape of the residual": ({"residual": t(1, 8)}, ValueError, ["residual", "(3, 8)", "(1, 8)"]),
    "dtype of the residual": (
        {"residual": t(3, 8, dtype=torch.bfloat16)}, TypeError, ["residual", "dtype of x, float32", "bfloat16"],
    ),
    "device of the residual": ({"residual": t(3, 8, device="meta")}, ValueError, ["residual", "cpu", "meta"]),
    "a word for eps": ({"eps": "a"}, TypeError, ["eps", "a number", "'a'"]),
    "a flag for eps": ({"eps": True}, TypeError, ["eps", "a number", "True"]),
    "no finite eps": ({"eps": float("nan")}, ValueError, ["eps", "a finite number", "nan"]),
}  # fmt: skip
