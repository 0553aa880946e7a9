"""llmkern: drop-in fused attention, positional encoding and int8 linear for PyTorch transformers.

The modules here have the constructor, forward and state_dict of their plain versions in `llmkern.reference`;
`verify` shows for any of them, or for a model of yours, that outputs and gradients are as accurate as the plain
version's.
"""

__version__ = "0.1.0"
