"""Cascaded group attention in plain PyTorch: the definition the kernels are held against, and the fallback.

EfficientViT, arXiv 2305.07027, section 3.2, equations 2 and 3, with BatchNorm folded into the convolutions around it, or live.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def partition(x: Tensor, window: int) -> Tensor:
    """[B, C, H, W] -> [B * nH * nW, C, window, window], zeros at the bottom and the right where the window does not divide the map."""
    batch, channels, height, width = x.shape
    x = F.pad(x, (0, -width % window, 0, -height % window))
    rows, columns = x.shape[2] // window, x.shape[3] // window
    x = x.reshape(batch, channels, rows, window, columns, window).permute(0, 2, 4, 1, 3, 5)  # [B, nH, nW, C, w, w]
    return x.reshape(batch * rows * columns, channels, window, window)


def reverse(tiles: Tensor, window: int, size: tuple[int, int]) -> Tensor:
    """The inverse of :func:`partition` for a map of ``size`` (H, W)."""
    rows, columns = -(-size[0] // window), -(-size[1] // window)
    batch = tiles.shape[0] // (rows * columns)
    x = tiles.reshape(batch, rows, columns, tiles.shape[1], window, window).permute(0, 3, 1, 4, 2, 5)  # [B, C, nH, w, nW, w]
    return x.reshape(batch, tiles.shape[1], rows * window, columns * window)[:, :, : size[0], : size[1]]


def bias_index(window: int, device: torch.device) -> Tensor:
    """[N, N] with N = window * window: the entry of the bias table that a pair of pixels uses, ``|dy| * window + |dx|``."""
    place = torch.arange(window * window, device=device)
    y, x = place // window, place % window
    return (y[:, None] - y).abs() * window + (x[:, None] - x).abs()


Convolve = Callable[..., Tensor]
"""``convolve(layer, head, input, weight, **options)``: a convolution with its bias or its BatchNorm; ``layer`` is "qkv", "dw" or "proj"."""


def _cascade(
    x: Tensor,
    qkv_weights: Sequence[Tensor],
    dw_weights: Sequence[Tensor],
    attention_bias: Tensor,
    proj_weight: Tensor,
    convolve: Convolve,
    key_dim: int,
    scale: float | None,
    window: int | None,
) -> Tensor:
    size = (x.shape[2], x.shape[3])
    w = size[0] if window is None else window
    scale = key_dim**-0.5 if scale is None else scale
    tiles = partition(x, w)  # [T, C, w, w]
    bias = attention_bias[:, bias_index(w, x.device)]  # [heads, N, N]
    outputs: list[Tensor] = []
    for head, (split, weight, dw_weight) in enumerate(zip(tiles.chunk(len(qkv_weights), dim=1), qkv_weights, dw_weights, strict=True)):
        feature = split + outputs[-1] if outputs else split
        y = convolve("qkv", head, feature, weight.reshape(*weight.shape[:2], 1, 1))
        q, k, v = y.split([key_dim, key_dim, y.shape[1] - 2 * key_dim], dim=1)
        q = convolve("dw", head, q, dw_weight, padding=dw_weight.shape[-1] // 2, groups=key_dim)
        scores = (q.flatten(2) * scale).transpose(1, 2) @ k.flatten(2) + bias[head]  # [T, N, N]
        outputs.append((v.flatten(2) @ scores.softmax(-1).transpose(1, 2)).reshape(v.shape))
    y = convolve("proj", 0, F.relu(torch.cat(outputs, dim=1)), proj_weight.reshape(*proj_weight.shape[:2], 1, 1))
    return reverse(y, w, size)


def cascaded_group_attention(
    x: Tensor,
    qkv_weights: Sequence[Tensor],
    qkv_biases: Sequence[Tensor | None] | None,
    dw_weights: Sequence[Tensor],
    dw_biases: Sequence[Tensor | None] | None,
    attention_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    key_dim: int,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """:func:`vitkernels.ops.cascaded_group_attention`, step by step."""
    biases = {"qkv": qkv_biases, "dw": dw_biases, "proj": [proj_bias]}

    def convolve(layer: str, head: int, feature: Tensor, weight: Tensor, **options: int) -> Tensor:
        of_layer = biases[layer]
        return F.conv2d(feature, weight, None if of_layer is None else of_layer[head], **options)

    return _cascade(x, qkv_weights, dw_weights, attention_bias, proj_weight, convolve, key_dim, scale, window)


def cascaded_group_attention_batch_norm(
    x: Tensor,
    qkv_weights: Sequence[Tensor],
    qkv_norms: Sequence[tuple[Tensor, Tensor]],
    dw_weights: Sequence[Tensor],
    dw_norms: Sequence[tuple[Tensor, Tensor]],
    attention_bias: Tensor,
    proj_weight: Tensor,
    proj_norm: tuple[Tensor, Tensor],
    *,
    key_dim: int,
    eps: float = 1e-5,
    scale: float | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`vitkernels.ops.cascaded_group_attention_batch_norm`, step by step."""
    norms = {"qkv": qkv_norms, "dw": dw_norms, "proj": [proj_norm]}
    means: dict[str, list[Tensor]] = {layer: [] for layer in norms}
    variances: dict[str, list[Tensor]] = {layer: [] for layer in norms}

    def convolve(layer: str, head: int, feature: Tensor, weight: Tensor, **options: int) -> Tensor:
        y = F.conv2d(feature, weight, None, **options)
        variance, mean = torch.var_mean(y.detach().to(_accumulation(y)), dim=(0, 2, 3), correction=0)
        means[layer].append(mean)
        variances[layer].append(variance)
        weight, bias = norms[layer][head]
        # Over [T, C, N]: torch 2.13's CPU backward over [1, C, w, w] is wrong where input and gradient are contiguous and transposed tokens.
        return F.batch_norm(y.flatten(2), None, None, weight, bias, training=True, eps=eps).view(y.shape)

    y = _cascade(x, qkv_weights, dw_weights, attention_bias, proj_weight, convolve, key_dim, scale, window)
    mean, var = (torch.cat([part for layer in parts.values() for part in layer]) for parts in (means, variances))
    return y, mean, var


def _accumulation(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32
