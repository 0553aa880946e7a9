"""The plain PyTorch versions, under the names of the fast ones: what every kernel is held to."""

from torch.nn import LayerNorm, RMSNorm

from llmkern.attention.reference import MultiHeadAttention
from llmkern.int8.reference import Int8Linear, quantize_model
from llmkern.loss.reference_module import (
    CrossEntropyLoss,
    DistillationLoss,
    LinearCrossEntropyLoss,
    LinearDistillationLoss,
)
from llmkern.positional.reference import PositionalEncoding, RotaryEmbedding
from llmkern.transformer.reference import Transformer

__all__ = [
    "CrossEntropyLoss",
    "DistillationLoss",
    "Int8Linear",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "LinearDistillationLoss",
    "MultiHeadAttention",
    "PositionalEncoding",
    "RMSNorm",
    "RotaryEmbedding",
    "Transformer",
    "quantize_model",
]
