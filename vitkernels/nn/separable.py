"""Separable self-attention as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitkernels import ops


class SeparableSelfAttention(nn.Module):
    """Separable self-attention of MobileViTv2 (arXiv 2206.02680, section 3.2), linear in the number of tokens.

    Args:
        embed_dim: channels d.
        attn_dropout: probability of dropping an attention score in training.
        proj_dropout: probability of dropping an output element in training.
        bias: whether both projections have a bias.
        patch_size: None for unfolded input [B, d, P, N]; an int or (ph, pw) to take the feature map [B, d, H, W] itself.

    Shape: input and output are [B, d, P, N], or [B, d, H, W] with ``patch_size``.

    The parameters are named and shaped as in timm's ``LinearSelfAttention`` (``qkv_proj``, ``out_proj``: 1x1 convolutions), so checkpoints load
    both ways.
    """

    def __init__(
        self,
        embed_dim: int,
        attn_dropout: float = 0.0,
        proj_dropout: float = 0.0,
        bias: bool = True,
        patch_size: int | tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if embed_dim <= 0:
            raise ValueError(f"SeparableSelfAttention: embed_dim is {embed_dim}; it must be positive")
        self.embed_dim = embed_dim
        self.patch_size = patch_size
        self.attn_dropout = attn_dropout
        self.qkv_proj = nn.Conv2d(embed_dim, 1 + 2 * embed_dim, kernel_size=1, bias=bias, device=device, dtype=dtype)
        self.out_proj = nn.Conv2d(embed_dim, embed_dim, kernel_size=1, bias=bias, device=device, dtype=dtype)
        self.out_drop = nn.Dropout(proj_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, d, P, N] or, with ``patch_size``, [B, d, H, W]; the output has the shape of ``x``."""
        out = ops.separable_self_attention(
            x,
            self.qkv_proj.weight,
            self.qkv_proj.bias,
            self.out_proj.weight,
            self.out_proj.bias,
            dropout_p=self.attn_dropout,
            training=self.training,
            patch_size=self.patch_size,
        )
        return self.out_drop(out)

    def extra_repr(self) -> str:
        """What ``print`` shows beside the class."""
        return f"embed_dim={self.embed_dim}, attn_dropout={self.attn_dropout}, patch_size={self.patch_size}"
