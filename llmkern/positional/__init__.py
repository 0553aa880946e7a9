"""Positional encodings: the sinusoidal table added to embeddings, and rotary embedding of queries and keys."""
