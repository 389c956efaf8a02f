"""Batch normalisation and an activation in plain PyTorch: the definition the kernels are held against, and the fallback."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from vitkernels.ops._define import accumulation_dtype

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda y: y, "relu": F.relu, "silu": F.silu}


def batch_norm_act(x: Tensor, weight: Tensor, bias: Tensor, *, activation: str = "none", eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1 of arXiv 1502.03167, then the activation; and the batch's mean and biased variance, without a gradient."""
    y = ACTIVATIONS[activation](F.batch_norm(x, None, None, weight, bias, training=True, eps=eps))
    values = x.detach().to(accumulation_dtype(x.dtype))
    mean, var = values.mean((0, 2, 3)), values.var((0, 2, 3), correction=0)
    return y, mean, var
