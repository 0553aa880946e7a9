"""What the operators of this family ask of their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern import check

REDUCTIONS = ("none", "mean", "sum")


def rows(name: str, x: Tensor, dimensions: str) -> None:
    """A floating matrix with a class, or a column, at least."""
    check.dtype(name, x, check.PLAIN_FLOATS)
    if x.dim() != 2 or x.size(1) < 1:
        raise ValueError(f"{name}: expected {dimensions}, the last at least 1, got shape {tuple(x.shape)}")


def like(name: str, value: Tensor, other_name: str, other: Tensor, dimensions: str, shape: tuple[int, ...]) -> None:
    check.same_dtype(name, value, other_name, other)
    check.same_device(name, value, other_name, other)
    check.shape(name, value, dimensions, shape)


def of_rows(name: str, value: Tensor, dtype: torch.dtype, other_name: str, other: Tensor, columns: int = 0) -> None:
    """(N,) or (N, columns) of this dtype, for the rows of another."""
    check.dtype(name, value, (dtype,))
    check.same_device(name, value, other_name, other)
    shape = (other.size(0), columns) if columns else (other.size(0),)
    check.shape(name, value, f"(N, {columns})" if columns else "(N,)", shape)


def options(label_smoothing: float, z_loss: float) -> None:
    check.probability("label_smoothing", label_smoothing)
    check.finite("z_loss", z_loss)


def temperature(value: float) -> None:
    check.finite("temperature", value)
    if not value > 0.0:
        raise ValueError(f"temperature: expected a positive number, got {value}")


def head(prefix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """A last layer: hidden (N, D), weight (V, D), bias (V,)."""
    rows(f"{prefix}hidden", hidden, "(N, D)")
    check.same_dtype(f"{prefix}weight", weight, f"{prefix}hidden", hidden)
    check.same_device(f"{prefix}weight", weight, f"{prefix}hidden", hidden)
    if weight.dim() != 2 or weight.size(1) != hidden.size(1) or weight.size(0) < 1:
        raise ValueError(
            f"{prefix}weight: expected (V, D) = (V, {hidden.size(1)}), V at least 1, got shape {tuple(weight.shape)}"
        )
    if bias is not None:
        like(f"{prefix}bias", bias, f"{prefix}weight", weight, "(V,)", (weight.size(0),))


def leading(targets: Tensor, name: str, x: Tensor, last: str) -> None:
    """targets: a class for each row of x (..., last), in any shape."""
    check.is_tensor("targets", targets)
    check.is_tensor(name, x)
    if x.dim() == 0:
        raise ValueError(f"{name}: expected (..., {last}), got shape ()")
    if tuple(targets.shape) != tuple(x.shape[:-1]):
        channels = x.dim() > 2 and tuple(targets.shape) == (x.size(0), *x.shape[2:])
        hint = (
            "; torch's (N, C, d1, ...) is not taken, move the classes last: logits.movedim(1, -1)" if channels else ""
        )
        raise ValueError(
            f"targets: expected the shape of {name} (..., {last}) without the last dimension, {tuple(x.shape[:-1])}, "
            f"got {tuple(targets.shape)}{hint}"
        )


def in_range(targets: Tensor, classes: int, ignore_index: int) -> None:
    """Raises for a class that is not there, where it can be read without waiting for a device: on the CPU."""
    if targets.device.type != "cpu" or not targets.numel():
        return
    lowest, highest = (int(x) for x in targets.aminmax())
    if lowest >= 0 and highest < classes:
        return
    wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= classes))]
    if wrong.numel():
        raise IndexError(
            f"targets: expected classes of 0 to {classes - 1} or ignore_index, {ignore_index}; "
            f"Target {int(wrong[0])} is out of bounds."
        )
