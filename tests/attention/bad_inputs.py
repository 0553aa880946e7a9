"""Calls that must raise before any kernel runs: the call, the exception, words of its message."""

from __future__ import annotations

import torch

Q = (2, 4, 5, 8)


def t(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape or Q, dtype=dtype, device=device)


# name: (changed arguments of scaled_dot_product_attention, exception, words)
CASES = {
    "dtype": ({"query": t(dtype=torch.float64)}, TypeError, ["query", "float32 or bfloat16 or float16", "float64"]),
    "mixed dtypes": ({"key": t(dtype=torch.bfloat16)}, TypeError, ["key", "query", "float32", "bfloat16"]),
    "value dtype": ({"value": t(dtype=torch.float16)}, TypeError, ["value", "float32", "float16"]),
    "device": ({"key": t(device="meta")}, ValueError, ["key", "device", "cpu", "meta"]),
    "rank": ({"key": t(4, 5, 8)}, ValueError, ["key", "(4, 5, 8)"]),
    "no tensor": ({"query": [1.0]}, TypeError, ["query", "torch.Tensor", "list"]),
    "head size": ({"key": t(2, 4, 5, 7)}, ValueError, ["key", "D = 8", "(2, 4, 5, 7)"]),
    "batch": ({"key": t(3, 4, 5, 8), "value": t(3, 4, 5, 8)}, ValueError, ["key", "B = 2", "(3, 4, 5, 8)"]),
    "heads": ({"key": t(2, 3, 5, 8), "value": t(2, 3, 5, 8), "enable_gqa": True}, ValueError, ["key", "H = 4"]),
    "heads without enable_gqa": ({"key": t(2, 2, 5, 8), "value": t(2, 2, 5, 8)}, ValueError, ["key", "enable_gqa"]),
    "lengths of key and value": ({"value": t(2, 4, 6, 8)}, ValueError, ["value", "key", "(2, 4, 6, 8)"]),
    "mask shape": ({"attn_mask": t(5, 6)}, ValueError, ["mask", "(B, H, Sq, Sk)", "(2, 4, 5, 5)", "6"]),
    "mask dtype": ({"attn_mask": t(5, 5, dtype=torch.int64)}, TypeError, ["mask", "bool", "int64"]),
    "mask and causal": ({"attn_mask": t(5, 5), "is_causal": True}, ValueError, ["attn_mask", "is_causal"]),
    "dropout": ({"dropout_p": 1.5}, ValueError, ["dropout_p", "1.5"]),
    "alignment": ({"causal_alignment": "left"}, ValueError, ["causal_alignment", "top_left", "'left'"]),
    "key_lengths shape": ({"key_lengths": torch.ones(3, dtype=torch.int64)}, ValueError, ["key_lengths", "(3,)"]),
    "key_lengths dtype": ({"key_lengths": torch.ones(2)}, TypeError, ["key_lengths", "int32 or int64", "float32"]),
}  # fmt: skip
