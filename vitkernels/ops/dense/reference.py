"""Attention in plain PyTorch: softmax(q k^T scale + bias) v, with the logits formed."""

from __future__ import annotations

import torch
from torch import Tensor

from vitkernels.ops import _define
from vitkernels.ops.packed.reference import keep_maps


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None,
    key_padding: Tensor | None,
    shared_k: Tensor | None = None,
    shared_v: Tensor | None = None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``(out, logsumexp)`` of checked arguments, those of the op's schema (op.py)."""
    batch, heads = q.shape[:2]
    if shared_k is not None and shared_v is not None:
        k, v = (torch.cat((own, shared.transpose(0, 1).expand(batch, -1, -1, -1)), dim=2) for own, shared in ((k, shared_k), (v, shared_v)))
    groups = heads // k.shape[1]
    if groups != 1:
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    logits = (q @ k.transpose(-2, -1)).to(_define.accumulation_dtype(q.dtype)) * scale  # [B, H, N, M]
    if bias is not None:
        logits = logits + bias
    if key_padding is not None:
        shown = torch.nn.functional.pad(key_padding, (0, k.shape[2] - key_padding.shape[1]), value=True)
        logits = logits.masked_fill(~shown[:, None, None, :], -torch.inf)
    blind = (logits == -torch.inf).all(dim=-1)  # [B, H, N]
    logits = logits.masked_fill(blind[..., None], 0.0)
    lse = logits.logsumexp(dim=-1).masked_fill(blind, -torch.inf)
    p = logits.softmax(dim=-1).masked_fill(blind[..., None], 0.0)
    if dropout_p > 0 and seed is not None:
        p = p * keep_maps(seed, p.shape, dropout_p) * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0)
    return p.to(v.dtype) @ v, lse
