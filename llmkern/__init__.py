"""llmkern: drop-in fused attention, positional encoding and int8 linear for PyTorch transformers.

The modules here have the constructor, forward and state_dict of their plain versions in `llmkern.reference`;
`llmkern.functional` holds the same kernels as functions; `verify` shows for any of them, or for a model of yours, that
outputs and gradients are as accurate as the plain version's. `python -m llmkern` prints what serves each operator here.
"""

from llmkern import flops, functional, monitoring, reference
from llmkern.attention.module import MultiHeadAttention
from llmkern.evaluation.recommend import recommend
from llmkern.int8.module import Int8Linear
from llmkern.int8.scheme import Int8Scheme
from llmkern.loss.module import CrossEntropyLoss, LinearCrossEntropyLoss
from llmkern.models.kernelize import kernelize, report, restore
from llmkern.models.quantize import quantize_like, quantize_model
from llmkern.norm.module import LayerNorm, RMSNorm
from llmkern.positional.module import PositionalEncoding, RotaryEmbedding
from llmkern.transformer import Transformer
from llmkern.verify import verify

flops.register()

__version__ = "0.1.0"

__all__ = [
    "CrossEntropyLoss",
    "Int8Linear",
    "Int8Scheme",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "MultiHeadAttention",
    "PositionalEncoding",
    "RMSNorm",
    "RotaryEmbedding",
    "Transformer",
    "functional",
    "kernelize",
    "monitoring",
    "quantize_like",
    "quantize_model",
    "recommend",
    "reference",
    "report",
    "restore",
    "verify",
]
