"""Re-Attention in plain PyTorch, as its authors and vit-pytorch write it: the maps are formed, mixed, normalised and applied."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels.ops import _define
from vitkernels.ops.packed.reference import keep_maps


def re_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mix_weight: Tensor,
    mix_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    *,
    norm: str | None,
    live: bool,
    eps: float,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(out, map, batch mean, biased batch variance)`` of checked arguments; the last two are empty unless ``live``."""
    maps = (q @ k.transpose(-2, -1) * scale).softmax(dim=-1).to(v.dtype)  # [B, H, N, N]
    if dropout_p > 0 and seed is not None:
        maps = maps * keep_maps(seed, maps.shape, dropout_p) * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0)
    maps = torch.einsum("gh,bhij->bgij", mix_weight.to(maps.dtype), maps)
    if mix_bias is not None:
        maps = maps + mix_bias[:, None, None].to(maps.dtype)
    batch_mean = batch_var = q.new_empty(0)
    if norm == "layer":
        weight, bias = (t if t is None else t.to(maps.dtype) for t in (norm_weight, norm_bias))
        maps = F.layer_norm(maps.permute(0, 2, 3, 1), (maps.shape[1],), weight, bias, eps).permute(0, 3, 1, 2)
    elif norm == "batch":
        wide = _define.accumulation_dtype(maps.dtype)
        if live and maps.numel():
            batch_var, batch_mean = torch.var_mean(maps.detach().to(wide), dim=(0, 2, 3), correction=0)
        mean, var, weight, bias = (t if t is None else t.to(wide) for t in (mean, var, norm_weight, norm_bias))
        maps = F.batch_norm(maps, mean, var, weight, bias, live, 0.0, eps)
    return maps.to(v.dtype) @ v, maps, batch_mean, batch_var
