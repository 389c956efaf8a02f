"""Batch normalisation and an activation in plain PyTorch: the definition the kernels are held against, and the fallback."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vitkernels.ops._define import accumulation_dtype
from vitkernels.ops.bottleneck import reference as bottleneck

ACTIVATIONS = {name: bottleneck.ACTIVATIONS[name] for name in ("none", "relu", "silu")}


def batch_norm_act(x: Tensor, weight: Tensor, bias: Tensor, *, activation: str = "none", eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1 of arXiv 1502.03167, then the activation; and the batch's mean and biased variance, without a gradient."""
    count, dtype = x.numel() // max(x.shape[1], 1), accumulation_dtype(x.dtype)
    mean, var = (x.new_zeros(x.shape[1], dtype=dtype) for _ in range(2))  # as running statistics, overwritten by the batch's
    y = F.batch_norm(x, mean, var, weight.to(dtype), bias.to(dtype), training=True, momentum=1.0, eps=eps)
    return ACTIVATIONS[activation](y), mean, var * ((count - 1) / count)
