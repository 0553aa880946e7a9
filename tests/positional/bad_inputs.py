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
    "sparse q": ({"q": t(2, 4, 5, 8).to_sparse()}, TypeError, ["q: expected a dense tensor", "got torch.sparse_coo"]),
    "sparse k in place": (
        {"k": t(2, 2, 5, 8).to_sparse(), "inplace": True}, TypeError, ["k: expected a dense", "got torch.sparse_coo"],
    ),
    "sparse ids": (
        {"position_ids": torch.arange(5).to_sparse()}, TypeError, ["position_ids: expected a dense", "sparse_coo"],
    ),
    "a list for q": ({"q": [1.0]}, TypeError, ["q", "torch.Tensor", "list"]),
    "a list for k": ({"k": [1.0]}, TypeError, ["k", "torch.Tensor", "list"]),
    "a list for k, in place": ({"k": [1.0], "inplace": True}, TypeError, ["k", "torch.Tensor", "list"]),
    "a list of ids": ({"position_ids": [0, 1, 2, 3, 4]}, TypeError, ["position_ids", "torch.Tensor", "list"]),
    "bool ids": ({"position_ids": t(5, dtype=torch.bool)}, TypeError, ["position_ids", "int64 or int32", "bool"]),
    "a word for a flag": ({"interleaved": "no"}, TypeError, ["interleaved", "True or False", "'no'"]),
    "another word for a flag": ({"inplace": "no"}, TypeError, ["inplace", "True or False", "'no'"]),
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
    "no probability": ({"dropout_p": None}, TypeError, ["dropout_p", "a number", "None"]),
    "a word for a probability": ({"dropout_p": "a"}, TypeError, ["dropout_p", "a number", "'a'"]),
    "a flag for a probability": ({"dropout_p": True, "seed": 1}, TypeError, ["dropout_p", "a number", "True"]),
    "a word for a scale": ({"scale": "a"}, TypeError, ["scale", "a number", "'a'"]),
    "sparse x": ({"x": t(5, 2, 8).to_sparse()}, TypeError, ["x: expected a dense tensor", "got torch.sparse_coo"]),
    "no finite scale": ({"scale": float("nan")}, ValueError, ["scale", "a finite number", "nan"]),
    "an infinite scale": ({"scale": float("inf")}, ValueError, ["scale", "a finite number", "inf"]),
    "a scale beyond float64": ({"scale": 10**400}, ValueError, ["scale", "a finite number"]),
    "a seed of 65 bits": ({"dropout_p": 0.5, "seed": 2**63}, ValueError, ["seed", "64 bits", str(2**63)]),
    "a list for x": ({"x": [1.0]}, TypeError, ["x", "torch.Tensor", "list"]),
    "a list for pe": ({"pe": [1.0]}, TypeError, ["pe", "torch.Tensor", "list"]),
    "a flag for a seed": ({"dropout_p": 0.5, "seed": True}, TypeError, ["seed", "integer", "True"]),
    "seed": ({"dropout_p": 0.5, "seed": 0.5}, TypeError, ["seed", "integer", "0.5"]),
    "seed dtype": ({"dropout_p": 0.5, "seed": t()}, TypeError, ["seed", "int64", "float32"]),
}

# name: (arguments of RotaryEmbedding(8, max_len=6), exception, words)
ROTARY_MODULE = {
    "a negative position": (
        {"position_ids": torch.tensor([0, -1, 2, 3, 4])}, ValueError, ["position_ids", "[0, length)", "6", "-1"],
    ),
    "a position behind the table, by its offset": (
        {"position_ids": torch.arange(5), "offset": 2}, ValueError, ["position_ids", "[0, length)", "got 6"],
    ),
    "ids dtype": ({"position_ids": t(5)}, TypeError, ["position_ids", "int64 or int32", "float32"]),
    "bool ids": ({"position_ids": t(5, dtype=torch.bool)}, TypeError, ["position_ids", "int64 or int32", "bool"]),
    "a list of ids": ({"position_ids": [0] * 5}, TypeError, ["position_ids", "torch.Tensor", "list"]),
    "dtype": ({"q": t(2, 4, 5, 8, dtype=torch.int32)}, TypeError, ["q", "float32 or bfloat16", "int32"]),
    "batch of k": ({"k": t(1, 2, 5, 8)}, ValueError, ["k", "(2, 2, 5, 8)", "(1, 2, 5, 8)"]),
    "rank": ({"q": t(5, 8)}, ValueError, ["q", "(B, H, S, D)", "(5, 8)"]),
    "no tensor": ({"q": [1.0]}, TypeError, ["q", "torch.Tensor", "list"]),
    "no tensor for k": ({"k": [1.0]}, TypeError, ["k", "torch.Tensor", "list"]),
    "width": ({"q": t(2, 4, 5, 6), "k": None}, ValueError, ["R <= D = 6", "(6, 4)"]),
    "too long": ({"q": t(2, 4, 7, 8), "k": None}, ValueError, ["q", "S <= length = 6", "(2, 4, 7, 8)"]),
    "a fraction for an offset": ({"offset": 1.5}, TypeError, ["offset", "an integer", "1.5"]),
    "a flag for an offset": ({"offset": True}, TypeError, ["offset", "an integer", "True"]),
    "a negative offset": ({"offset": -1}, ValueError, ["offset", "max_len - S = 1", "-1"]),
    "an offset beyond the ids' dtype": (
        {"position_ids": torch.arange(5, dtype=torch.int32), "offset": 2**32}, ValueError,
        ["offset", "32 bits", str(2**32)],
    ),
    "an offset just beyond the ids' dtype": (
        {"position_ids": torch.arange(5, dtype=torch.int32), "offset": 2**31}, ValueError,
        ["offset", "32 bits", str(2**31)],
    ),
    "a sum beyond the ids' dtype": (
        {"position_ids": torch.full((5,), 2**31 - 1, dtype=torch.int32), "offset": 2**31 - 1}, ValueError,
        ["position_ids", str(2**32 - 2)],
    ),
    "an offset beyond every integer": (
        {"position_ids": torch.arange(5), "offset": 2**70}, ValueError, ["offset", "64 bits", str(2**70)],
    ),
    "such an offset without ids": ({"offset": 2**70}, ValueError, ["offset", "64 bits", str(2**70)]),
    "an offset past the table": ({"offset": 2}, ValueError, ["offset", "max_len - S = 1", "2"]),
}  # fmt: skip

# (module, arguments, exception, words)
CONSTRUCTORS = [
    ("RotaryEmbedding", (7,), ValueError, ["dim", "a positive even number", "7"]),
    ("RotaryEmbedding", ("a",), TypeError, ["dim", "an integer", "'a'"]),
    ("RotaryEmbedding", (8.0,), TypeError, ["dim", "an integer", "8.0"]),
    ("RotaryEmbedding", (8, 6, 0), ValueError, ["base", "a positive number", "0"]),
    ("RotaryEmbedding", (8, 6, -1.0), ValueError, ["base", "a positive number", "-1.0"]),
    ("RotaryEmbedding", (8, 6, "a"), TypeError, ["base", "a number", "'a'"]),
    ("RotaryEmbedding", (8, 6, 1e4, "no"), TypeError, ["interleaved", "True or False", "'no'"]),
    ("RotaryEmbedding", (8, 6, float("inf")), ValueError, ["base", "a finite number", "inf"]),
    ("RotaryEmbedding", (8, 6, 10**400), ValueError, ["base", "a finite number"]),
    ("PositionalEncoding", (0,), ValueError, ["d_model", "a positive integer", "0"]),
    ("PositionalEncoding", (8, 2.5), TypeError, ["max_len", "a positive integer", "2.5"]),
]

# name: (x for PositionalEncoding(8, max_len=4), exception, words)
ENCODING = {
    "rank": (t(4, 8), ValueError, ["x", "(S, B, d_model)", "(4, 8)"]),
    "too long": (t(5, 2, 8), ValueError, ["x", "max_len = 4", "(5, 2, 8)"]),
    "width": (t(4, 2, 7), ValueError, ["x", "d_model = 8", "(4, 2, 7)"]),
    "dtype": (t(4, 2, 8, dtype=torch.int64), TypeError, ["x", "float32 or bfloat16", "int64"]),
    "device": (t(4, 2, 8, device="meta"), ValueError, ["x", "device of pe, cpu", "meta"]),
    "no tensor": ([1.0], TypeError, ["x", "torch.Tensor", "list"]),
}
