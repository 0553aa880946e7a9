"""The kernels as functions."""

from llmkern.attention.op import attention_varlen
from llmkern.attention.sdpa import scaled_dot_product_attention
from llmkern.int8.op import int8_linear
from llmkern.positional.op import rotary, sinusoidal_add

__all__ = [
    "attention_varlen",
    "int8_linear",
    "rotary",
    "scaled_dot_product_attention",
    "sinusoidal_add",
]
