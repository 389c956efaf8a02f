"""Modules for people who build models, and what they need beside them."""

from vitkernels.nn.cascaded_group import CascadedGroupAttention, EfficientViTBlock
from vitkernels.nn.head_mixing import ReAttention
from vitkernels.nn.position import interpolate_position_embedding
from vitkernels.nn.separable import SeparableSelfAttention

__all__ = ["CascadedGroupAttention", "EfficientViTBlock", "ReAttention", "SeparableSelfAttention", "interpolate_position_embedding"]
