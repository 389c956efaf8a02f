"""The projection of patches in plain PyTorch: the definition."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vitkernels.ops.bottleneck.reference import Affine, Norm


def patch_embedding(x: Tensor, project: Affine, patch: tuple[int, int], norm: Norm | None = None) -> Tensor:
    """The result of :func:`vitkernels.ops.patch_embedding.op.run` on what :func:`~vitkernels.ops.patch_embedding.op.pack` is given."""
    rows, columns = (side // length for side, length in zip(x.shape[2:], patch, strict=True))
    tokens = F.unfold(x, patch, stride=patch).mT  # [B, rows * columns, C * height * width]
    if norm is not None:
        tokens = F.layer_norm(tokens, tokens.shape[-1:], norm.weight, norm.bias, norm.eps)
    return F.linear(tokens, *project).mT.unflatten(2, (rows, columns))
