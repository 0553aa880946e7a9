"""What torch.autocast does to torch's own matrix products, for ours and for their plain versions."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern import check


def is_on(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The float32, bfloat16 and float16 ones in autocast's dtype, where it is on for the first one's device."""
    device = tensors[0].device
    if not is_on(device):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)
    return tuple(t.to(dtype) if t.dtype in check.FLOATS else t for t in tensors)
