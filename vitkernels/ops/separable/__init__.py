"""Separable self-attention of MobileViTv2."""
