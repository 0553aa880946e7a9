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
    "a list for residual": ({"residual": [1.0]}, TypeError, ["residual", "torch.Tensor", "list"]),
    "residual dtype": (
        {"residual": t(2, 4, dtype=torch.bfloat16)}, TypeError, ["residual", "dtype of x, float32", "bfloat16"],
    ),
    "residual shape": ({"residual": t(4)}, ValueError, ["residual: expected (..., outputs) = (2, 4), got shape (4,)"]),
    "residual that broadcasts": (
        {"residual": t(1, 4)}, ValueError, ["residual: expected (..., outputs) = (2, 4), got shape (1, 4)"],
    ),
    "residual of pairs": (
        {"residual": t(2, 4), "activation": "swiglu"}, ValueError, ["residual", "(..., outputs) = (2, 2)", "(2, 4)"],
    ),
    "residual device": ({"residual": t(2, 4, device="meta")}, ValueError, ["residual", "device of x, cpu", "meta"]),
    "sparse residual": ({"residual": t(2, 4).to_sparse()}, TypeError, ["residual: expected a dense", "sparse_coo"]),
    "inputs": (
        {"inputs": "rows"}, ValueError, ["inputs: expected one of outliers, row, symmetric, static, 16bit, got 'rows'"],
    ),
    "inputs of another type": ({"inputs": 8}, TypeError, ["inputs: expected a string, got 8"]),
    "no inputs": ({"inputs": None}, TypeError, ["inputs: expected a string, got None"]),
    "no input_scale": (
        {"inputs": "static"}, ValueError, ["input_scale: expected a tensor with inputs='static', got None"],
    ),
    "input_scale of what has its own": (
        {"input_scale": t(2)}, ValueError, ["input_scale: expected None with inputs='outliers', got a tensor"],
    ),
    "a list for input_scale": (
        {"inputs": "static", "input_scale": [1.0, 0.0]}, TypeError, ["input_scale", "torch.Tensor", "list"],
    ),
    "input_scale dtype": (
        {"inputs": "static", "input_scale": t(2, dtype=torch.float16)}, TypeError, ["input_scale", "float32, got"],
    ),
    "input_scale shape": (
        {"inputs": "static", "input_scale": t(1)}, ValueError, ["input_scale", "(scale and zero point,) = (2,)"],
    ),
    "input_scale device": (
        {"inputs": "static", "input_scale": t(2, device="meta")}, ValueError, ["input_scale", "device of x, cpu"],
    ),
    "input_scale with a gradient": (
        {"inputs": "static", "input_scale": t(2).requires_grad_()}, ValueError, ["input_scale", "requires no gradient"],
    ),
    "group": (
        {"inputs": "symmetric", "group": 48}, ValueError, ["group: expected 0 or a multiple of 32, got 48"],
    ),
    "a negative group": (
        {"inputs": "symmetric", "group": -32}, ValueError, ["group: expected 0 or a multiple of 32, got -32"],
    ),
    "a group of other inputs": (
        {"group": 32}, ValueError, ["group: expected 0 with inputs='outliers'", "'symmetric'", "got 32"],
    ),
    "a group that is no integer": (
        {"inputs": "symmetric", "group": 32.0}, TypeError, ["group: expected an integer, got 32.0"],
    ),
    "a group that is a flag": (
        {"inputs": "symmetric", "group": False}, TypeError, ["group: expected an integer, got False"],
    ),
    "a huge group": (
        {"inputs": "symmetric", "group": 2**70}, ValueError, ["group: expected an integer of 64 bits, got"],
    ),
    "one scale for groups": (
        {"inputs": "symmetric", "group": 32}, ValueError, ["weight_scale", "(N, groups) = (4, 1), got shape (4,)"],
    ),
    "scales of groups without": (
        {"inputs": "symmetric", "weight_scale": t(4, 1)}, ValueError, ["weight_scale: expected (N,) = (4,)", "(4, 1)"],
    ),
    "no rotation": ({"rotate": 0}, ValueError, ["rotate: expected a positive integer, got 0"]),
    "a negative rotation": ({"rotate": -2}, ValueError, ["rotate: expected a positive integer, got -2"]),
    "rotation": (
        {"rotate": 3, "x": t(2, 48), "weight": t(4, 48, dtype=torch.int8)}, ValueError,
        ["rotate: expected a power of two r with K a multiple of 16 r, got 3 for K = 48"],
    ),
    "rotation of a depth": (
        {"rotate": 2}, ValueError, ["rotate: expected a power of two r with K a multiple of 16 r, got 2 for K = 8"],
    ),
    "a rotation that is no integer": ({"rotate": 2.0}, TypeError, ["rotate: expected an integer, got 2.0"]),
    "a rotation that is a flag": ({"rotate": True}, TypeError, ["rotate: expected an integer, got True"]),
    "activation": (
        {"activation": "tanh"}, ValueError,
        ["activation: expected one of none, relu, gelu, gelu_tanh, silu, swiglu, geglu, got 'tanh'"],
    ),
    "no activation": ({"activation": None}, TypeError, ["activation: expected a string, got None"]),
    "a function for activation": ({"activation": torch.relu}, TypeError, ["activation: expected a string, got <"]),
    "pairs of an odd number": (
        {"activation": "geglu", "weight": t(5, 8, dtype=torch.int8), "weight_scale": t(5)}, ValueError,
        ["weight: expected an even N, (N, K), for activation='geglu', got N = 5"],
    ),
    "a list for out": ({"out": [1.0]}, TypeError, ["out", "torch.Tensor", "list"]),
    "out dtype": (
        {"out": t(2, 4, dtype=torch.bfloat16)}, TypeError, ["out: expected the dtype of x, float32, got bfloat16"],
    ),
    "out shape": ({"out": t(2, 5)}, ValueError, ["out: expected (..., outputs) = (2, 4), got shape (2, 5)"]),
    "out of another rank": ({"out": t(8)}, ValueError, ["out: expected (..., outputs) = (2, 4), got shape (8,)"]),
    "out of nothing, which torch would resize": (
        {"out": t(0)}, ValueError, ["out: expected (..., outputs) = (2, 4), got shape (0,)"],
    ),
    "out of pairs": (
        {"out": t(2, 4), "activation": "swiglu"}, ValueError, ["out: expected (..., outputs) = (2, 2)", "(2, 4)"],
    ),
    "out device": ({"out": t(2, 4, device="meta")}, ValueError, ["out: expected the device of x, cpu, got meta"]),
    "sparse out": ({"out": t(2, 4).to_sparse()}, TypeError, ["out: expected a dense tensor", "got torch.sparse_coo"]),
    "out that is expanded": (
        {"out": t(1, 4).expand(2, 4)}, ValueError, ["out: expected elements with memory of their own", "(0, 1)"],
    ),
    "out with a gradient": (
        {"out": t(2, 4).requires_grad_()}, ValueError, ["out: expected None where a gradient is recorded"],
    ),
}  # fmt: skip

# name: (changed arguments of int8_linear_backward on grad (2, 4), weight (4, 8), exception, words)
BACKWARD = {
    "dtype": ({"grad": t(2, 4, dtype=torch.float64)}, TypeError, ["grad", "float32 or bfloat16 or float16", "float64"]),
    "outputs": ({"grad": t(2, 5)}, ValueError, ["grad: expected (..., N) with N = 4 as in weight, got (2, 5)"]),
    "no dimension": ({"grad": t()}, ValueError, ["grad: expected (..., N)", "()"]),
    "weight dtype": ({"weight": t(4, 8)}, TypeError, ["weight", "int8", "float32"]),
    "weight rank": ({"weight": t(4, dtype=torch.int8)}, ValueError, ["weight", "(N, K)", "(4,)"]),
    "scale dtype": ({"weight_scale": t(4, dtype=torch.float16)}, TypeError, ["weight_scale", "float32", "float16"]),
    "scale shape": ({"weight_scale": t(5)}, ValueError, ["weight_scale", "(N,) = (4,)", "(5,)"]),
    "scales of groups": ({"group": 32}, ValueError, ["weight_scale", "(N, groups) = (4, 1)", "(4,)"]),
    "group": ({"group": 48}, ValueError, ["group: expected 0 or a multiple of 32, got 48"]),
    "rotation": ({"rotate": 2}, ValueError, ["rotate: expected a power of two r with K a multiple of 16 r", "K = 8"]),
    "no rotation": ({"rotate": 0}, ValueError, ["rotate: expected a positive integer, got 0"]),
    "device": ({"weight": t(4, 8, dtype=torch.int8, device="meta")}, ValueError, ["weight", "cpu", "meta"]),
}  # fmt: skip

# name: (arguments of Int8Scheme, exception, words)
SCHEMES = {
    "inputs": (("rows",), ValueError, ["inputs: expected one of outliers, row, symmetric, static, 16bit, got 'rows'"]),
    "inputs of another type": ((8,), ValueError, ["inputs: expected one of outliers", "got 8"]),
    "no inputs": ((None,), ValueError, ["inputs: expected one of outliers", "got None"]),
    "group": (("symmetric", 48), ValueError, ["group: expected 0 or a multiple of 32, got 48"]),
    "a negative group": (("symmetric", -32), ValueError, ["group: expected 0 or a multiple of 32, got -32"]),
    "a group of other inputs": (("16bit", 64), ValueError, ["group: expected 0 with inputs='16bit'", "got 64"]),
    "a group that is no integer": (("symmetric", 64.0), TypeError, ["group: expected an integer, got 64.0"]),
    "a group that is a flag": (("symmetric", True), TypeError, ["group: expected an integer, got True"]),
    "no group": (("symmetric", None), TypeError, ["group: expected an integer, got None"]),
    "rotate": (("row", 0, 4), TypeError, ["rotate: expected True or False, got 4"]),
    "smooth": (("row", 0, False, 1.5), ValueError, ["smooth: expected a probability in [0, 1], got 1.5"]),
    "a negative smooth": (("row", 0, False, -0.1), ValueError, ["smooth: expected a probability in [0, 1], got -0.1"]),
    "smooth of NaN": (("row", 0, False, float("nan")), ValueError, ["smooth: expected a probability", "nan"]),
    "smooth of another type": (("row", 0, False, "a"), TypeError, ["smooth: expected a number, got 'a'"]),
    "smooth that is a flag": (("row", 0, False, True), TypeError, ["smooth: expected a number, got True"]),
}

# What is no scheme: the argument, words.
NO_SCHEMES = {
    "another name": ("int4", ["scheme: expected an Int8Scheme or one of outliers, row,", "got 'int4'"]),
    "how inputs become integers": ("16bit", ["scheme: expected an Int8Scheme or one of", "weight_only", "got '16bit'"]),
    "None": (None, ["scheme: expected an Int8Scheme or one of", "got None"]),
    "a number": (8, ["scheme: expected an Int8Scheme or one of", "got 8"]),
    "a class": (dict, ["scheme: expected an Int8Scheme or one of", "got <class 'dict'>"]),
    "fields": ({"inputs": "row"}, ["scheme: expected an Int8Scheme or one of", "got {'inputs': 'row'}"]),
}
