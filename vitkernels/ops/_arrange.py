"""The sizes and strides that contract samples take: what several families' ``spec.py`` share."""

from __future__ import annotations

import torch
from torch import Tensor

HEAD_DIMS = (8, 16, 20, 24, 30, 32, 33, 35, 36, 48, 60, 64, 72, 80, 96, 112, 128)


def long_in(dtype: torch.dtype, device: str) -> bool:
    """Whether a sample of thousands of tokens is worth its time: on a CPU eager takes seconds for one in float16 and float64, whose kernels go
    through the tokens by the lines of float32.
    """
    return dtype in (torch.float32, torch.bfloat16) or device != "cpu"


def as_it_is(x: Tensor) -> Tensor:
    """One tensor, as the next four."""
    return x


def with_gaps(x: Tensor) -> Tensor:
    """No dimension of stride 1, NaN between the values."""
    return torch.stack((x, torch.full_like(x, torch.nan)), dim=-1)[..., 0]


def part_of_wider_rows(x: Tensor) -> Tensor:
    """At an offset that no vector is aligned to, NaN in front of each row."""
    return torch.cat((torch.full_like(x[..., :1], torch.nan), x), dim=-1)[..., 1:]


def first_for_all(x: Tensor) -> Tensor:
    """The first entry of the first dimension, whose memory all share."""
    return x[:1].expand(x.shape)


def contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As they are."""
    return tensors


def strided(*tensors: Tensor) -> tuple[Tensor, ...]:
    """No dimension of stride 1, NaN between the values."""
    return tuple(map(with_gaps, tensors))


def of_one_projection(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """[B, H, N, D] as a model has them: slices of one [B, N, 3, H, D]."""
    return tuple(t.transpose(1, 2) for t in torch.stack([t.transpose(1, 2) for t in (q, k, v)], dim=2).unbind(2))


def tokens_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, H, N, D] that lies [N, B, H, D] in memory."""
    return tuple(t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for t in tensors)


def one_head_for_all(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, H, N, D] whose heads share memory."""
    return tuple(t[:, :1].expand(t.shape) for t in tensors)
