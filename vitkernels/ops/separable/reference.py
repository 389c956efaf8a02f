"""Separable self-attention in plain PyTorch: the definition the kernels are tested against, and the fallback.

MobileViTv2, arXiv 2206.02680, section 3.2. One query channel per token, softmax over the N tokens of each of the P pixel positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def separable_attention(q: Tensor, k: Tensor, v: Tensor, *, score_scale: Tensor | None = None) -> Tensor:
    """As :func:`vitkernels.ops.separable_attention`; ``score_scale`` [B, 1, P, N] multiplies the scores (dropout)."""
    scores = torch.softmax(q, dim=-1)  # [B, 1, P, N]
    if score_scale is not None:
        scores = scores * score_scale
    context = (k * scores).sum(dim=-1, keepdim=True)  # [B, d, P, 1]
    return F.relu(v) * context


def unfold(x: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """[B, d, H, W] -> [B, d, P, N]: pixel position p = (h % ph, w % pw), patch n = (h // ph, w // pw)."""
    batch, channels, height, width = x.shape
    ph, pw = patch_size
    x = x.reshape(batch, channels, height // ph, ph, width // pw, pw)
    return x.permute(0, 1, 3, 5, 2, 4).reshape(batch, channels, ph * pw, (height // ph) * (width // pw))


def fold(x: Tensor, patch_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The inverse of :func:`unfold`: [B, d, P, N] -> [B, d, H, W]."""
    batch, channels = x.shape[:2]
    (ph, pw), (height, width) = patch_size, size
    x = x.reshape(batch, channels, ph, pw, height // ph, width // pw)
    return x.permute(0, 1, 4, 2, 5, 3).reshape(batch, channels, height, width)


def _project(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1x1 convolution, [B, d, P, N] -> [B, o, P, N]."""
    weight = weight.reshape(-1, tokens.shape[1], 1, 1)
    if tokens.numel() == 0:
        # conv2d refuses a map without pixels.
        return torch.einsum("od,bdpn->bopn", weight[..., 0, 0], tokens) + (0 if bias is None else bias[:, None, None])
    return F.conv2d(tokens, weight, bias)


def separable_self_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    patch_size: int | tuple[int, int] | None = None,
) -> Tensor:
    """As :func:`vitkernels.ops.separable_self_attention`."""
    dim = x.shape[1]
    if isinstance(patch_size, int):
        patch_size = (patch_size, patch_size)
    tokens = x if patch_size is None else unfold(x, patch_size)  # [B, d, P, N]
    qkv = _project(tokens, qkv_weight, qkv_bias)  # [B, 1 + 2d, P, N]
    q, k, v = qkv.split([1, dim, dim], dim=1)
    score_scale = F.dropout(torch.ones_like(q), dropout_p, training) if training and dropout_p > 0 else None
    out = separable_attention(q, k, v, score_scale=score_scale)
    out = _project(out, out_weight, out_bias)
    return out if patch_size is None else fold(out, patch_size, (x.shape[2], x.shape[3]))
