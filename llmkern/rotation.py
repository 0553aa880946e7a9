"""The rotation of rotary position embedding, which the positional family and the attention on a cache share."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (..., D) with the first R elements of each row rotated in pairs by the angles whose cos and sin are given.

    cos, sin: (..., R/2), broadcasting against x's leading dimensions, R <= D. Pairs are (2 j, 2 j + 1) where
    interleaved, else (j, j + R/2). Returns x's dtype. Source: Su et al. 2021, "RoFormer", section 3.4.
    """
    rotated = x[..., : 2 * cos.size(-1)]
    if interleaved:
        a, b = rotated.unflatten(-1, (-1, 2)).unbind(-1)
        y = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = rotated.chunk(2, -1)
        y = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((y.to(x.dtype), x[..., 2 * cos.size(-1) :]), -1)
