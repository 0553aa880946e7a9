"""LayerNorm and RMSNorm, with the residual added in the same pass."""
