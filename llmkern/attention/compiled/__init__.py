"""The compiled attention kernels as backends: which calls they take, and how the arguments reach them."""

from llmkern.attention.compiled.dense import CPU_ATTENTION, CPU_ATTENTION_BACKWARD
from llmkern.attention.compiled.kvcache import CPU_KVCACHE
from llmkern.attention.compiled.varlen import CPU_VARLEN, CPU_VARLEN_BACKWARD
from llmkern.attention.compiled.weights import (
    CPU_ATTENTION_WEIGHTS,
    CPU_ATTENTION_WEIGHTS_BACKWARD,
    CPU_COLUMN_SUMS,
)

__all__ = [
    "CPU_ATTENTION",
    "CPU_ATTENTION_BACKWARD",
    "CPU_ATTENTION_WEIGHTS",
    "CPU_ATTENTION_WEIGHTS_BACKWARD",
    "CPU_COLUMN_SUMS",
    "CPU_KVCACHE",
    "CPU_VARLEN",
    "CPU_VARLEN_BACKWARD",
]
