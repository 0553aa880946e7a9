"""Calls that must raise before any kernel runs: the call, the exception, words of its message."""

from __future__ import annotations

import torch


def t(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


# name: (changed arguments of rotary on q (2, 4, 5, 8), k (2, 2, 5, 8), tables (6, 4), exception, words)
ROTARY = {
    "dtype": ({"q": t(2, 4, 5, 8, dtype=torch.float64)}, TypeError, ["q", "float32 or bfloat16 or float16", "float64"]),
    "mixed dtypes": ({"k": t(2, 2, 5, 8, dtype=torch.bfloat16)}, TypeError, ["k", "q", "float32", "bfloat16"]),
    "device": ({"k": t(2, 2, 5, 8, device="meta")}, ValueError, ["k", "device", "cpu", "meta"]),
    "no tensor": ({"cos": None}, TypeError, ["cos", "torch.Tensor", "NoneType"]),
    "rank": ({"q": t(4, 5, 8)}, ValueError, ["q", "(B, H, S, D)", "(4, 5, 8)"]),
    "shape of k": ({"k": t(2, 2, 6, 8)}, ValueError, ["k", "(B, Hkv, S, D)", "(2, 2, 6, 8)"]),
    "table dtype": ({"cos": t(6, 4, dtype=torch.float16)}, TypeError, ["cos", "float32", "float16"]),
    "tables that differ": ({"sin": t(6, 3)}, ValueError, ["sin", "(length, R/2)", "(6, 3)"]),
    "a table wider than the head": ({"cos": t(6, 5), "sin": t(6, 5)}, ValueError, ["cos", "R <= D = 8", "(6, 5)"]),
    "a short table": ({"cos": t(4, 4), "sin": t(4, 4)}, ValueError, ["q", "S <= length = 4", "(2, 4, 5, 8)"]),
    "ids dtype": ({"position_ids": t(5)}, TypeError, ["position_ids", "int64 or int32", "float32"]),
    "ids shape": ({"position_ids": t(3, 5, dtype=torch.int64)}, ValueError, ["position_ids", "(B, S)", "(3, 5)"]),
    "in place over repeated memory": (
        {"q": t(1, 1, 5, 8).expand(2, 4, 5, 8), "inplace": True}, ValueError, ["q", "memory of their own", "strides"],
    ),
}  # fmt: skip

# name: (changed arguments of sinusoidal_add on x (5, 2, 8), pe (6, 1, 8), exception, words)
SINUSOIDAL = {
    "dtype": ({"x": t(5, 2, 8, dtype=torch.int32)}, TypeError, ["x", "float32 or bfloat16 or float16", "int32"]),
    "table dtype": ({"pe": t(6, 1, 8, dtype=torch.float64)}, TypeError, ["pe", "float32", "float64"]),
    "device": ({"pe": t(6, 1, 8, device="meta")}, ValueError, ["pe", "device", "cpu", "meta"]),
    "no tensor": ({"x": None}, TypeError, ["x", "torch.Tensor", "NoneType"]),
    "rank": ({"x": t(5, 8)}, ValueError, ["x", "(S, B, D)", "(5, 8)"]),
    "table shape": ({"pe": t(6, 8)}, ValueError, ["pe", "(max_len, 1, D)", "(6, 8)"]),
    "width": ({"pe": t(6, 1, 9)}, ValueError, ["pe", "D = 8", "(6, 1, 9)"]),
    "too long": ({"x": t(7, 2, 8)}, ValueError, ["x", "S <= max_len = 6", "(7, 2, 8)"]),
    "probability": ({"dropout_p": 1.5, "seed": 1}, ValueError, ["dropout_p", "[0, 1]", "1.5"]),
    "seed": ({"dropout_p": 0.5, "seed": 0.5}, ValueError, ["seed", "integer", "0.5"]),
    "seed dtype": ({"dropout_p": 0.5, "seed": t()}, TypeError, ["seed", "int64", "float32"]),
}
