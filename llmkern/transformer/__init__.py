"""The encoder-decoder of "Attention Is All You Need" on fused attention."""

from llmkern.transformer.module import Transformer

__all__ = ["Transformer"]
