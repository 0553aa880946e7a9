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
    "batch": ({"key": t(3, 4, 5, 8), "value": t(3, 4, 5, 8)}, ValueError, ["query, key, value", "broadcast", "(3, 4"]),
    "heads": ({"key": t(2, 3, 5, 8), "value": t(2, 3, 5, 8), "enable_gqa": True}, ValueError, ["key", "H = 4"]),
    "heads without enable_gqa": ({"key": t(2, 2, 5, 8), "value": t(2, 2, 5, 8)}, ValueError, ["key", "enable_gqa"]),
    "lengths of key and value": ({"value": t(2, 4, 6, 8)}, ValueError, ["value", "key", "(2, 4, 6, 8)"]),
    "mask shape": ({"attn_mask": t(5, 6)}, ValueError, ["attn_mask", "(..., H, Sq, Sk)", "(..., 5, 5)", "(5, 6)"]),
    "mask dtype": ({"attn_mask": t(5, 5, dtype=torch.int64)}, TypeError, ["attn_mask", "bool", "int64"]),
    "scale": ({"scale": "a"}, TypeError, ["scale", "number", "'a'"]),
    "mask and causal": ({"attn_mask": t(5, 5), "is_causal": True}, ValueError, ["attn_mask", "is_causal"]),
    "dropout": ({"dropout_p": 1.5}, ValueError, ["dropout_p", "1.5"]),
    "alignment": ({"causal_alignment": "left"}, ValueError, ["causal_alignment", "top_left", "'left'"]),
    "key_lengths shape": ({"key_lengths": torch.ones(3, dtype=torch.int64)}, ValueError, ["key_lengths", "(3,)"]),
    "window of three": ({"window_size": (1, 2, 3)}, ValueError, ["window_size", "(left, right)", "(1, 2, 3)"]),
    "window no pair": ({"window_size": 4}, ValueError, ["window_size", "(left, right)", "got 4"]),
    "window too small": ({"window_size": (-2, 0)}, ValueError, ["window_size", "-1", "(-2, 0)"]),
    "window of floats": ({"window_size": (1.0, 0)}, ValueError, ["window_size", "integers", "(1.0, 0)"]),
    "softcap": ({"softcap": -1.0}, ValueError, ["softcap", "at least 0", "-1.0"]),
    "softcap infinite": ({"softcap": float("inf")}, ValueError, ["softcap", "finite", "inf"]),
    "slopes shape": ({"alibi_slopes": t(3)}, ValueError, ["alibi_slopes", "(H,) = (4,)", "(2, 4)", "(3,)"]),
    "slopes dtype": ({"alibi_slopes": t(4, dtype=torch.float16)}, TypeError, ["alibi_slopes", "float32", "float16"]),
    "slopes device": ({"alibi_slopes": t(4, device="meta")}, ValueError, ["alibi_slopes", "cpu", "meta"]),
    "slopes no tensor": ({"alibi_slopes": [0.5]}, TypeError, ["alibi_slopes", "torch.Tensor", "list"]),
    "sink shape": ({"learnable_sink": t(2, 4)}, ValueError, ["learnable_sink", "(H,) = (4,)", "(2, 4)"]),
    "sink dtype": ({"learnable_sink": t(4, dtype=torch.int32)}, TypeError, ["learnable_sink", "float32", "int32"]),
    "sink device": ({"learnable_sink": t(4, device="meta")}, ValueError, ["learnable_sink", "cpu", "meta"]),
    "sink no tensor": ({"learnable_sink": 1.0}, TypeError, ["learnable_sink", "torch.Tensor", "float"]),
    "seed no integer": ({"dropout_p": 0.5, "dropout_seed": 1.5}, TypeError, ["dropout_seed", "64 bits", "1.5"]),
    "seed dtype": ({"dropout_p": 0.5, "dropout_seed": t(1)[0]}, TypeError, ["dropout_seed", "int64", "float32"]),
    "seed shape": (
        {"dropout_p": 0.5, "dropout_seed": t(2, dtype=torch.int64)}, ValueError, ["dropout_seed", "()", "(2,)"],
    ),
    "key_lengths dtype": ({"key_lengths": torch.ones(2)}, TypeError, ["key_lengths", "int32 or int64", "float32"]),
}  # fmt: skip
