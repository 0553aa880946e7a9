"""Attention to a cache of keys and values, in plain PyTorch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llmkern.attention import cache
from llmkern.attention.reference import dense


def attention_kvcache(*args: Any) -> tuple[Tensor, Tensor]:
    """The output (B, Sq, H, Dv) and the log-sum-exp (B, H, Sq) float64; args as torch.ops.llmkern.attention_kvcache
    takes them. The caches are written in place."""
    output, logsumexp = cache.attend(dense.attention, *args)
    return output.contiguous(), logsumexp
