"""Attention in plain PyTorch: what every kernel of this family is held to."""

from llmkern.attention.reference.dense import (
    attention,
    attention_backward,
    attention_column_sums,
    attention_weights,
    attention_weights_backward,
    dropout_factor,
)
from llmkern.attention.reference.int8 import attention_int8
from llmkern.attention.reference.kvcache import attention_kvcache
from llmkern.attention.reference.module import MultiHeadAttention, check_inputs
from llmkern.attention.reference.varlen import attention_varlen, attention_varlen_backward

__all__ = [
    "MultiHeadAttention",
    "attention",
    "attention_backward",
    "attention_column_sums",
    "attention_int8",
    "attention_kvcache",
    "attention_varlen",
    "attention_varlen_backward",
    "attention_weights",
    "attention_weights_backward",
    "check_inputs",
    "dropout_factor",
]
