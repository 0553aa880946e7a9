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
    "mask shape": ({"attn_mask": t(5, 6)}, ValueError, ["attn_mask", "(..., H, Sq, Sk)", "(2, 4, 5, 5)", "(5, 6)"]),
    "mask of five dimensions": ({"attn_mask": t(1, 2, 4, 5, 5)}, ValueError, ["attn_mask", "= (2, 4, 5, 5)", "(1, 2,"]),
    "mask heads": ({"attn_mask": t(2, 3, 5, 5)}, ValueError, ["attn_mask", "Sq, Sk) = (2, 4, 5, 5)", "(2, 3, 5, 5)"]),
    "mask batch": ({"attn_mask": t(3, 4, 5, 5)}, ValueError, ["attn_mask", "Sq, Sk) = (2, 4, 5, 5)", "(3, 4, 5, 5)"]),
    "mask of three dimensions": ({"attn_mask": t(3, 5, 5)}, ValueError, ["attn_mask", "= (2, 4, 5, 5)", "(3, 5, 5)"]),
    "mask without a batch": (
        {"query": t(4, 5, 8), "key": t(4, 5, 8), "value": t(4, 5, 8), "attn_mask": t(2, 4, 5, 5)},
        ValueError, ["attn_mask", "(1, 4, 5, 5)", "got shape (2, 4, 5, 5)"],
    ),
    "mask of many dimensions": (
        {"query": t(2, 3, 4, 5, 8), "key": t(2, 3, 4, 5, 8), "value": t(2, 3, 4, 5, 8), "attn_mask": t(2, 2, 4, 5, 5)},
        ValueError, ["attn_mask", "(2, 3, 4, 5, 5)", "got shape (2, 2, 4, 5, 5)"],
    ),
    "mask no tensor": ({"attn_mask": [1]}, TypeError, ["attn_mask", "torch.Tensor", "list"]),
    "mask device": ({"attn_mask": t(5, 5, device="meta")}, ValueError, ["attn_mask", "cpu", "meta"]),
    "mask dtype": ({"attn_mask": t(5, 5, dtype=torch.int64)}, TypeError, ["attn_mask", "bool", "int64"]),
    "scale": ({"scale": "a"}, TypeError, ["scale", "number", "'a'"]),
    "scale no number": ({"scale": True}, TypeError, ["scale", "number", "True"]),
    "scale too large": ({"scale": 10**400}, ValueError, ["scale", "finite number", "an integer of 1329 bits"]),
    "scale NaN": ({"scale": float("nan")}, ValueError, ["scale", "finite number", "nan"]),
    **{
        f"{flag} {value}": ({flag: value}, TypeError, [f"{flag}: expected True or False, got {value!r}"])
        for flag in ("is_causal", "enable_gqa", "deterministic", "return_logsumexp")
        for value in ("a", 1, None)
    },
    "mask and causal": ({"attn_mask": t(5, 5), "is_causal": True}, ValueError, ["attn_mask", "is_causal"]),
    "dropout": ({"dropout_p": 1.5}, ValueError, ["dropout_p", "1.5"]),
    "dropout no number": ({"dropout_p": "a"}, TypeError, ["dropout_p", "number", "'a'"]),
    "dropout of two": ({"dropout_p": t(2)}, TypeError, ["dropout_p: expected a number, got"]),
    "alignment": ({"causal_alignment": "left"}, ValueError, ["causal_alignment", "top_left", "'left'"]),
    "alignment no string": ({"causal_alignment": 3}, ValueError, ["causal_alignment", "top_left", "got 3"]),
    "key_lengths no tensor": ({"key_lengths": [3]}, TypeError, ["key_lengths", "torch.Tensor", "list"]),
    "key_lengths shape": ({"key_lengths": torch.ones(3, dtype=torch.int64)}, ValueError, ["key_lengths", "(3,)"]),
    "window of three": ({"window_size": (1, 2, 3)}, ValueError, ["window_size", "(left, right)", "(1, 2, 3)"]),
    "window no pair": ({"window_size": 4}, ValueError, ["window_size", "(left, right)", "got 4"]),
    "window too small": ({"window_size": (-2, 0)}, ValueError, ["window_size", "-1", "(-2, 0)"]),
    "window of floats": ({"window_size": (1.0, 0)}, ValueError, ["window_size", "integers", "(1.0, 0)"]),
    "window of 71 bits": ({"window_size": (2**70, 0)}, ValueError, ["window_size", "at most 2**62", str(2**70)]),
    "window of 63 bits": ({"window_size": (0, 2**63 - 1)}, ValueError, ["window_size", "at most 2**62"]),
    "softcap no number": ({"softcap": "a"}, TypeError, ["softcap", "number", "'a'"]),
    "softcap None": ({"softcap": None}, TypeError, ["softcap", "number", "None"]),
    "softcap NaN": ({"softcap": float("nan")}, ValueError, ["softcap", "finite", "nan"]),
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
    **{
        f"sparse {name}": (
            {name: tensor.to_sparse()}, TypeError,
            [f"{name}: expected a dense tensor (torch.strided), got torch.sparse_coo"],
        )
        for name, tensor in [
            ("query", t()), ("value", t()), ("attn_mask", t(5, 5)), ("key_lengths", torch.tensor([3, 4])),
            ("alibi_slopes", t(4)),
        ]
    },
}  # fmt: skip
