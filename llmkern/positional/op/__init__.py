"""The operators of this family: torch.ops.llmkern.sinusoidal_add, rotary and what their gradients need."""

from llmkern.positional.op.rotation import rotary
from llmkern.positional.op.sinusoidal import sinusoidal_add

__all__ = ["rotary", "sinusoidal_add"]
