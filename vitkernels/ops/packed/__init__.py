"""Attention over packed sequences of any lengths (NaViT)."""
