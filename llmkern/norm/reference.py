"""Normalisation in plain PyTorch: what every kernel of this family is held to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """LayerNorm (centred) or RMSNorm of the last dimension of total = x + residual -> (out, total, statistics).

    x, residual (..., N), weight, bias (N,). out = normalised total * (offset + weight) + bias, in x's dtype; total is
    empty without a residual. statistics (..., 2): the mean (0 where not centred) and the reciprocal of the root that
    the row is divided by.
    """
    total = x if residual is None else x + residual
    wide = total.to(torch.promote_types(x.dtype, torch.float32))  # sums of 16 bits would lose what they add
    factors = None if weight is None else weight.to(wide.dtype) + offset
    width = (x.size(-1),)
    if centred:
        out = F.layer_norm(wide, width, factors, None if bias is None else bias.to(wide.dtype), eps)
    else:
        out = F.rms_norm(wide, width, factors, eps)
        out = out if bias is None else out + bias
    return out.to(x.dtype), x.new_empty(0) if residual is None else total, row_statistics(wide, eps, centred)


def row_statistics(wide: Tensor, eps: float, centred: bool) -> Tensor:
    mean = wide.mean(-1) if centred else wide.new_zeros(wide.shape[:-1])
    squares = (wide - mean[..., None]).square().mean(-1)
    return torch.stack([mean, (squares + eps).rsqrt()], -1)


def norm_backward(
    grad: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor | None, statistics: Tensor, eps: float,
    offset: float, centred: bool, with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients (of x and of the residual alike, of weight, of bias) from those of out and of total.

    With y the normalised row and g = grad * (offset + weight): (g - mean(g) - y mean(g y)) / root, without mean(g)
    where not centred; sum(grad y) and sum(grad) over all rows. The gradients of weight and bias are in the dtype that
    is computed in, and empty where there is no weight or bias. statistics: as `norm` gives them.
    """
    wide = torch.promote_types(total.dtype, torch.float32)
    y = (total.to(wide) - statistics[..., :1]) * statistics[..., 1:]
    given = grad.to(wide)
    g = given if weight is None else given * (weight.to(wide) + offset)
    dx = g - y * (g * y).mean(-1, keepdim=True)
    if centred:
        dx = dx - g.mean(-1, keepdim=True)
    dx = dx * statistics[..., 1:]
    if grad_total is not None:
        dx = dx + grad_total.to(wide)
    empty, rows = dx.new_empty(0), tuple(range(total.dim() - 1))
    dweight = empty if weight is None else (given * y).sum(rows) if rows else given * y
    dbias = (given.sum(rows) if rows else given.clone()) if with_bias else empty
    return dx.to(total.dtype), dweight, dbias


def norm_backward_of_total(
    grad: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor | None, statistics: Tensor, eps: float,
    offset: float, centred: bool, with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same with the statistics made of total again, through which its own gradient flows."""
    again = row_statistics(total.to(torch.promote_types(total.dtype, torch.float32)), eps, centred)
    return norm_backward(grad, grad_total, total, weight, again, eps, offset, centred, with_bias)
