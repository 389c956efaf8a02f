"""MobileViT's attention in plain PyTorch: unfold, attend, fold (arXiv 2110.02178, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from vitkernels.ops.dense import reference as dense


def patch_attention(q: Tensor, k: Tensor, v: Tensor, *, patch: tuple[int, int], heads: int, scale: float) -> Tensor:
    """The output of checked arguments."""
    rows = [unfold(t, patch, heads) for t in (q, k, v)]
    out, _ = dense.attention(*(t.flatten(0, 2) for t in rows), bias=None, key_padding=None, scale=scale, dropout_p=0.0, seed=None)
    return fold(out.view(rows[2].shape), v.shape, patch)


def unfold(t: Tensor, patch: tuple[int, int], heads: int) -> Tensor:
    """[B, heads * D, H, W] as [B, ph, pw, heads, patches, D]: a token is a patch's pixel, a sequence the pixels of one position in the patch."""
    batch, channels, height, width = t.shape
    high, wide = height // patch[0], width // patch[1]
    t = t.reshape(batch, heads, channels // heads, high, patch[0], wide, patch[1])
    return t.permute(0, 4, 6, 1, 3, 5, 2).reshape(batch, *patch, heads, high * wide, channels // heads)


def fold(t: Tensor, shape: torch.Size, patch: tuple[int, int]) -> Tensor:
    """The inverse of :func:`unfold`, to a map of this shape."""
    batch, _, _, heads, _, dim = t.shape
    t = t.reshape(batch, *patch, heads, shape[2] // patch[0], shape[3] // patch[1], dim)
    return t.permute(0, 3, 6, 4, 1, 5, 2).reshape(shape)
