"""Attention with memory in plain PyTorch: group by group, the logits of all that a query sees side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from vitkernels.ops import _define
from vitkernels.ops.packed.reference import keep_maps


def memory_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor,
    memory_v: Tensor,
    own_k: Tensor | None,
    own_v: Tensor | None,
    *,
    groups: tuple[int, ...],
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``(out, logsumexp)`` of checked arguments, [B, N, H, D_v] and [B, H, N]."""
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    keep = None
    if dropout_p > 0 and seed is not None:
        # One column of random numbers serves all own keys: each query sees one of them.
        keep = keep_maps(seed, (batch, heads, queries, keys + memory_k.shape[0] + 1), dropout_p, stride=keys + memory_k.shape[0])
    outs, lses = [], []
    first = 0
    for g, length in enumerate(groups or memory_k.shape[:1]):
        each = queries // max(len(groups), 1)
        rows, memory = slice(g * each, (g + 1) * each), slice(first, first + length)
        seen_k, seen_v = [k, memory_k[memory].transpose(0, 1)], [v, memory_v[memory].transpose(0, 1)]
        mine = q[:, :, rows]
        parts = [mine @ x.transpose(-2, -1) for x in seen_k]
        if own_k is not None:
            parts.append((mine[..., None, :] @ own_k[:, :, rows, :, None])[..., 0])
        logits = torch.cat(parts, dim=-1).to(_define.accumulation_dtype(q.dtype)) * scale
        blind = (logits == -torch.inf).all(dim=-1, keepdim=True)  # [B, H, N, 1]
        logits = logits.masked_fill(blind, 0.0)
        lses.append(logits.logsumexp(dim=-1).masked_fill(blind[..., 0], -torch.inf))
        p = logits.softmax(dim=-1).masked_fill(blind, 0.0)
        if keep is not None:
            seen = torch.cat((keep[:, :, rows, :keys], keep[:, :, rows, keys:-1][..., memory], keep[:, :, rows, -1:][..., : len(parts) - 2]), dim=-1)
            p = p * seen * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0)
        base, shared, own = p.to(v.dtype).split((keys, length, len(parts) - 2), dim=-1)
        out = base @ seen_v[0] + shared @ seen_v[1]
        outs.append(out if own_v is None else out + own * own_v[:, :, rows])
        first += length
    return torch.cat(outs, dim=2).transpose(1, 2).contiguous(), torch.cat(lses, dim=2)
