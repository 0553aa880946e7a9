"""The operators of the family: checks, backends, autograd, and second derivatives by composition."""

from llmkern.attention.op.dense import attention, short_attention
from llmkern.attention.op.int8 import attention_int8
from llmkern.attention.op.kvcache import attention_with_kvcache
from llmkern.attention.op.varlen import attention_varlen
from llmkern.attention.op.weights import attention_column_sums, attention_weights

__all__ = [
    "attention",
    "attention_column_sums",
    "attention_int8",
    "attention_varlen",
    "attention_weights",
    "attention_with_kvcache",
    "short_attention",
]
