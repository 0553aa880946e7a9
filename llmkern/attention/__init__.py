"""Scaled dot-product attention, fused: forward, backward, and the attention weights on request."""
