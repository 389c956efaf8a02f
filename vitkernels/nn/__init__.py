"""Modules for people who build models."""

from vitkernels.nn.separable import SeparableSelfAttention

__all__ = ["SeparableSelfAttention"]
