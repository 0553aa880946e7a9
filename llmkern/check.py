"""Checks of users' input.

A message names the argument, what was expected with the names of the dimensions, and what came.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

#: What kernels compute; the plain versions take float64 too, which gives the truth that both are compared with.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PLAIN_FLOATS = (*FLOATS, torch.float64)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shown(value: object) -> str:
    """As it was written, where that is short: Python refuses to print very long integers."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)


def is_tensor(name: str, value: object) -> None:
    """A tensor whose elements lie in memory at strides, which every function here takes them to do."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    # A nested tensor may call itself strided.
    if value.layout is not torch.strided or value.is_nested:
        came = f"a nested tensor ({value.layout})" if value.is_nested else str(value.layout)
        raise TypeError(f"{name}: expected a dense tensor (torch.strided), got {came}")


def has_memory(name: str, value: Tensor) -> None:
    """Raises for a tensor whose storage was resized to nothing, as sharding does between uses; what wraps others has
    no memory of its own."""
    if type(value) is not Tensor and type(value) is not torch.nn.Parameter:
        return
    if value.device.type == "meta" or not value.numel() or torch._C._functorch.is_functorch_wrapped_tensor(value):
        return
    if value.layout is torch.strided and value.untyped_storage().nbytes() == 0:
        raise ValueError(f"{name}: expected a tensor with memory, got one whose storage was released")


def positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a positive integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value}")


def integer(name: str, value: object) -> None:
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected an integer of 64 bits, got {_shown(value)}")


def number(name: str, value: object) -> None:
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if isinstance(value, int) and abs(value) > sys.float_info.max:  # compared exactly
        raise ValueError(f"{name}: expected a finite number, got {_shown(value)}")


def finite(name: str, value: Any) -> None:
    number(name, value)
    if not abs(value) <= sys.float_info.max:  # NaN fails every comparison
        raise ValueError(f"{name}: expected a finite number, got {value}")


def above_zero(name: str, value: Any) -> None:
    finite(name, value)
    if value <= 0:
        raise ValueError(f"{name}: expected a number above 0, got {value}")


def at_least(name: str, value: Any, least: float) -> None:
    finite(name, value)
    if value < least:
        raise ValueError(f"{name}: expected a number of at least {least:g}, got {value}")


def probability(name: str, value: Any) -> None:
    number(name, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: expected a probability in [0, 1], got {value}")


def flag(name: str, value: object) -> None:
    if not isinstance(value, (bool, torch.SymBool)):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def flags(name: str, value: object) -> None:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name}: expected a list of True and False, got {value!r}")
    for each in value:
        flag(name, each)


def text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a string, got {value!r}")


def one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def dtype(name: str, value: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    is_tensor(name, value)
    if value.dtype not in allowed:
        expected = " or ".join(short(d) for d in allowed)
        raise TypeError(f"{name}: expected dtype {expected}, got {short(value.dtype)}")


def is_floating(name: str, value: Tensor) -> None:
    is_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {short(value.dtype)}")


def same_dtype(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    is_tensor(name, value)
    if value.dtype != other.dtype:
        raise TypeError(f"{name}: expected the dtype of {other_name}, {short(other.dtype)}, got {short(value.dtype)}")


def parameters_dtype(name: str, value: Tensor, dtypes: tuple[torch.dtype, ...], is_cast: bool) -> None:
    """dtypes: those of the parameters that meet the value. is_cast: under autocast, which casts all but float64."""
    if is_cast and all(d in FLOATS for d in dtypes):
        return dtype(name, value, FLOATS)
    is_tensor(name, value)
    for d in dtypes:
        if value.dtype != d:
            raise TypeError(f"{name}: expected the dtype of the parameters, {short(d)}, got {short(value.dtype)}")


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name}, {other.device}, got {value.device}")


def rank(name: str, value: Tensor, dimensions: str) -> None:
    """dimensions: their names as the message shows them, "(B, H, S, D)"."""
    if value.dim() != dimensions.count(",") + 1:
        raise ValueError(f"{name}: expected {dimensions}, got shape {tuple(value.shape)}")


def shape(name: str, value: Tensor, dimensions: str, expected: tuple[int, ...]) -> None:
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name}: expected {dimensions} = {tuple(expected)}, got shape {tuple(value.shape)}")


def broadcasts(name: str, value: Tensor, dimensions: str, target: tuple[int, ...]) -> None:
    """value's shape must broadcast to the target, whose dimensions are named as the message shows them."""
    sizes = tuple(value.shape)
    padded = (1,) * (len(target) - len(sizes)) + sizes
    # Not "s not in (1, t)", which torch.compile answers wrongly for a size that it has made a symbol.
    if len(padded) != len(target) or any(s != 1 and s != t for s, t in zip(padded, target, strict=True)):
        raise ValueError(f"{name}: expected a shape that broadcasts to {dimensions} = {target}, got shape {sizes}")
