"""MobileViT's attention in Triton: the map's pixels copied into sequences, the kernels of packed attention, and back.

On a GPU the copies are a small part of a call; the CPU's kernels read and write the pixels where they lie.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitkernels.ops.dense import triton as dense
from vitkernels.ops.patch import reference


def patch_attention(q: Tensor, k: Tensor, v: Tensor, patch_height: int, patch_width: int, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """Forward of ``vitkernels::patch_attention``; arguments and results as its schema in op.py says."""
    patch = patch_height, patch_width
    q_rows, k_rows, v_rows = (_sequences(t, patch, heads) for t in (q, k, v))
    out, lse = dense.attention(q_rows, k_rows, v_rows, None, None, None, None, scale, 0.0, None)
    return _map(out, v, patch), lse


def patch_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    patch_height: int,
    patch_width: int,
    heads: int,
    scale: float,
    need_q: bool,
    need_k: bool,
    need_v: bool,
) -> tuple[Tensor, ...]:
    """Backward of ``vitkernels::patch_attention``; arguments and results as its schema in op.py says."""
    patch = patch_height, patch_width
    grad_rows, q_rows, k_rows, v_rows, out_rows = (_sequences(t, patch, heads) for t in (grad_out, q, k, v, out))
    needs = (need_q, need_k, need_v)
    grads = dense.attention_backward(
        grad_rows, None, q_rows, k_rows, v_rows, out_rows, lse, None, None, None, None, scale, 0.0, None, *needs, False, False, False
    )
    return tuple(_map(grad, like, patch) if need else grad for grad, like, need in zip(grads[:3], (q, k, v), needs, strict=True))


def _sequences(t: Tensor, patch: tuple[int, int], heads: int) -> Tensor:
    """[B, heads * D, H, W] as [sequences, heads, tokens, D]."""
    return reference.unfold(t, patch, heads).flatten(0, 2)


def _map(rows: Tensor, like: Tensor, patch: tuple[int, int]) -> Tensor:
    """The inverse, in the memory format of ``like``."""
    folded = reference.fold(rows.reshape(like.shape[0], *patch, *rows.shape[1:]), like.shape, patch)
    return torch.empty_like(like).copy_(folded)
