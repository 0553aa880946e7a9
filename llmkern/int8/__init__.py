"""Linear layers in 8-bit integers: weights per output channel, activations per row, quantised on the fly."""
