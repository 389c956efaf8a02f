"""Modules for people who build models."""

from vitkernels.nn.cascaded_group import CascadedGroupAttention, EfficientViTBlock
from vitkernels.nn.head_mixing import ReAttention
from vitkernels.nn.separable import SeparableSelfAttention

__all__ = ["CascadedGroupAttention", "EfficientViTBlock", "ReAttention", "SeparableSelfAttention"]
