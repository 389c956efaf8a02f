"""Attention with learnable memory: keys and values that a batch shares, also those of several tasks at once."""
