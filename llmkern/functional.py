"""The kernels as functions."""

from llmkern.activation.op import gated, geglu, swiglu
from llmkern.attention.install import install
from llmkern.attention.int8 import Int8AttentionError, attention_int8, attention_int8_error
from llmkern.attention.op import attention_varlen, attention_with_kvcache
from llmkern.attention.parts import attention_column_sums, attention_weights, merge_attention
from llmkern.attention.sdpa import scaled_dot_product_attention
from llmkern.int8.op import int8_linear
from llmkern.loss.op import cross_entropy, distillation, linear_cross_entropy, linear_distillation
from llmkern.norm.op import layer_norm, rms_norm
from llmkern.positional.op import rotary, sinusoidal_add

__all__ = [
    "Int8AttentionError",
    "attention_column_sums",
    "attention_int8",
    "attention_int8_error",
    "attention_varlen",
    "attention_weights",
    "attention_with_kvcache",
    "cross_entropy",
    "distillation",
    "gated",
    "geglu",
    "install",
    "int8_linear",
    "layer_norm",
    "linear_cross_entropy",
    "linear_distillation",
    "merge_attention",
    "rms_norm",
    "rotary",
    "scaled_dot_product_attention",
    "sinusoidal_add",
    "swiglu",
]
