"""Checks of users' input.

A message names the argument, what was expected with the names of the dimensions, and what came.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: What kernels compute; the plain versions take float64 too, which gives the truth that both are compared with.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PLAIN_FLOATS = (*FLOATS, torch.float64)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


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


def number(name: str, value: object) -> None:
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {value!r}")


def probability(name: str, value: Any) -> None:
    number(name, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: expected a probability in [0, 1], got {value}")


def flag(name: str, value: object) -> None:
    if not isinstance(value, (bool, torch.SymBool)):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


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
    if len(padded) != len(target) or any(s not in (1, t) for s, t in zip(padded, target, strict=True)):
        raise ValueError(f"{name}: expected a shape that broadcasts to {dimensions} = {target}, got shape {sizes}")
