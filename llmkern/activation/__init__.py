"""Gated activations: SwiGLU, GeGLU, ReGLU."""
