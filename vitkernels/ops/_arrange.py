"""The sizes and strides that contract samples of attention take: what several families' ``spec.py`` share."""

from __future__ import annotations

import torch
from torch import Tensor

HEAD_DIMS = (8, 16, 20, 24, 30, 32, 33, 35, 36, 48, 60, 64, 72, 80, 96, 112, 128)


def long_in(dtype: torch.dtype, device: str) -> bool:
    """Whether a sample of thousands of tokens is worth its time: on a CPU eager takes seconds for one in float16 and float64, whose kernels go
    through the tokens by the lines of float32.
    """
    return dtype in (torch.float32, torch.bfloat16) or device != "cpu"


def contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As they are."""
    return tensors


def strided(*tensors: Tensor) -> tuple[Tensor, ...]:
    """No dimension of stride 1, NaN between the values."""
    return tuple(torch.stack((t, torch.full_like(t, torch.nan)), dim=-1)[..., 0] for t in tensors)


def of_one_projection(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """[B, H, N, D] as a model has them: slices of one [B, N, 3, H, D]."""
    return tuple(t.transpose(1, 2) for t in torch.stack([t.transpose(1, 2) for t in (q, k, v)], dim=2).unbind(2))


def tokens_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, H, N, D] that lies [N, B, H, D] in memory."""
    return tuple(t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for t in tensors)


def one_head_for_all(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, H, N, D] whose heads share memory."""
    return tuple(t[:, :1].expand(t.shape) for t in tensors)
