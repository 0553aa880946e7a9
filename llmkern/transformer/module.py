"""The encoder-decoder with torch's layers, their attention fused."""

from __future__ import annotations

from torch import nn

from llmkern.transformer import reference
from llmkern.transformer.layers import FusedAttention


class Transformer(reference.Transformer):
    """An encoder and a decoder, sequence first, on fused attention.

    d_model: the width. nhead: attention heads, a divisor of d_model. num_layers: layers of each stack. Constructor,
    forward and state_dict are those of llmkern.reference.Transformer; the same seed gives the same parameters.

    Raises what the reference raises. Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.
    """

    def __init__(self, d_model: int = 512, nhead: int = 8, num_layers: int = 6) -> None:
        super().__init__(d_model, nhead, num_layers)
        for module in self.modules():
            if type(module) is nn.MultiheadAttention:
                module.__class__ = FusedAttention  # adds a forward and no state
