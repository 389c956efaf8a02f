"""Cascaded group attention and the EfficientViT block as modules."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkernels.nn._cascade import attend
from vitkernels.nn._conv_norm import ConvNorm
from vitkernels.ops.cascaded_group.reference import bias_index, partition, reverse


class CascadedGroupAttention(nn.Module):
    """Cascaded group attention of EfficientViT (arXiv 2305.07027, section 3.2), with its window partition if asked for.

    Args:
        dim: channels C, a multiple of ``num_heads``.
        key_dim: channels of q and k of one head.
        num_heads: heads H.
        attn_ratio: value channels of a head as a multiple of ``key_dim``; None for C / H, which more than one head needs.
        resolution: side w of the window.
        kernels: side of each head's depthwise convolution on q: at least one odd int per head, or one for all.
        partition: take a map of any size and attend inside its windows, filled up with zero pixels at the bottom and the right; otherwise the input
            is one window.
        device: as of every module.
        dtype: as of every module.

    Shape: input and output are [B, C, w, w], or [B, C, height, width] with ``partition``.

    While the norms are in training their statistics are this batch's, and their running statistics are updated as ``nn.BatchNorm2d`` does; frozen,
    they are folded into the convolutions. Without a gradient the folded weights are kept (outside of the module) until a weight or a statistic
    changes. A change that PyTorch does not count, a write in place through ``parameter.data``, is seen after the next call in training.

    Parameters and buffers are named and shaped as in timm's ``CascadedGroupAttention``, so checkpoints load both ways.
    """

    def __init__(
        self,
        dim: int,
        key_dim: int = 16,
        num_heads: int = 4,
        attn_ratio: float | None = None,
        resolution: int = 7,
        kernels: int | Sequence[int] = 5,
        partition: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        for argument, value in (("dim", dim), ("key_dim", key_dim), ("num_heads", num_heads), ("resolution", resolution)):
            if value < 1:
                raise ValueError(f"{name}: {argument} is {value}; it must be positive")
        if dim % num_heads:
            raise ValueError(f"{name}: dim is {dim}; it must be a multiple of num_heads, {num_heads}")
        split = dim // num_heads
        value_dim = split if attn_ratio is None else int(attn_ratio * key_dim)
        if value_dim < 1 or (num_heads > 1 and value_dim != split):
            raise ValueError(
                f"{name}: attn_ratio {attn_ratio} makes {value_dim} value channels; a head's output is added to the next head's input, so they must"
                f" be as many as that has: dim / num_heads = {split}"
            )
        sides = [kernels] * num_heads if isinstance(kernels, int) else list(kernels)
        if len(sides) < num_heads or any(side < 1 or side % 2 == 0 for side in sides):
            raise ValueError(f"{name}: kernels is {kernels}; it must be an odd int, or one per head for {num_heads} heads")
        self.dim, self.key_dim, self.num_heads, self.val_dim = dim, key_dim, num_heads, value_dim
        self.resolution, self.partition = resolution, partition
        self.scale = key_dim**-0.5
        self.qkvs = nn.ModuleList(ConvNorm(split, 2 * key_dim + value_dim, device=device, dtype=dtype) for _ in range(num_heads))
        self.dws = nn.ModuleList(ConvNorm(key_dim, key_dim, sides[i], groups=key_dim, device=device, dtype=dtype) for i in range(num_heads))
        self.proj = nn.Sequential(nn.ReLU(), ConvNorm(num_heads * value_dim, dim, norm_init=0.0, device=device, dtype=dtype))
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, resolution * resolution, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, w, w] or, with ``partition``, [B, C, height, width]; the output has the shape of ``x``."""
        y = attend(self, x, partition=self.partition)
        if isinstance(y, Tensor):
            return y
        if not self.partition:
            return self._layer_by_layer(x)
        return reverse(self._layer_by_layer(partition(x, self.resolution)), self.resolution, (x.shape[2], x.shape[3]))

    def _layer_by_layer(self, tiles: Tensor) -> Tensor:
        """[T, C, w, w] through the layers as they are: hooked, adapted, synchronised or traced."""
        index = bias_index(self.resolution, tiles.device)
        outputs: list[Tensor] = []
        for i, (split, qkv, dw) in enumerate(zip(tiles.chunk(self.num_heads, dim=1), self.qkvs, self.dws, strict=True)):
            y = qkv(split + outputs[-1] if outputs else split)
            q, k, v = y.split([self.key_dim, self.key_dim, self.val_dim], dim=1)
            scores = (dw(q).flatten(2) * self.scale).transpose(1, 2) @ k.flatten(2) + self.attention_biases[i][index]  # [T, N, N]
            outputs.append((v.flatten(2) @ scores.softmax(-1).transpose(1, 2)).reshape(v.shape))
        return self.proj(torch.cat(outputs, dim=1))

    def extra_repr(self) -> str:
        """What ``print`` shows beside the class."""
        return f"dim={self.dim}, key_dim={self.key_dim}, num_heads={self.num_heads}, resolution={self.resolution}, partition={self.partition}"


class _Residual(nn.Module):
    """``x + m(x)``; in training, with probability ``drop``, a sample's ``m(x)`` is left out."""

    def __init__(self, m: nn.Module, drop: float) -> None:
        super().__init__()
        self.m, self.drop = m, drop

    def forward(self, x: Tensor) -> Tensor:
        y = self.m(x)
        if self.training and self.drop > 0:
            kept = torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= self.drop
            y = y * (kept / (1 - self.drop)).to(y.dtype)
        return x + y


class _FeedForward(nn.Module):
    """Two 1x1 convolutions with ReLU between, twice as wide inside."""

    def __init__(self, dim: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.pw1 = ConvNorm(dim, 2 * dim, device=device, dtype=dtype)
        self.pw2 = ConvNorm(2 * dim, dim, norm_init=0.0, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw2(F.relu(self.pw1(x)))


class EfficientViTBlock(nn.Module):
    """The sandwich block of EfficientViT (arXiv 2305.07027, section 3.1): depthwise convolution, feed-forward, cascaded group attention, and the
    first two again, each with a residual.

    Args:
        dim: channels C.
        key_dim: as of :class:`CascadedGroupAttention`, like the next two.
        num_heads: heads.
        attn_ratio: value channels as a multiple of ``key_dim``.
        resolution: side of the map it is made for; a map smaller than the window makes the window smaller.
        window_resolution: side of the windows.
        kernels: sides of the depthwise convolutions on q.
        drop: probability of leaving out a residual's branch for a sample, in training.
        device: as of every module.
        dtype: as of every module.

    Shape: [B, C, H, W] to the same, for any H and W.

    Parameters and buffers are named and shaped as in timm's ``EfficientVitBlock``, so checkpoints load both ways.
    """

    def __init__(
        self,
        dim: int,
        key_dim: int = 16,
        num_heads: int = 4,
        attn_ratio: float | None = None,
        resolution: int = 14,
        window_resolution: int = 7,
        kernels: int | Sequence[int] = 5,
        drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 <= drop < 1.0:
            raise ValueError(f"EfficientViTBlock: drop is {drop}; it must be in [0, 1)")
        attention = CascadedGroupAttention(
            dim, key_dim, num_heads, attn_ratio, min(window_resolution, resolution), kernels, partition=True, device=device, dtype=dtype
        )
        self.dw0 = _Residual(ConvNorm(dim, dim, 3, groups=dim, norm_init=0.0, device=device, dtype=dtype), drop)
        self.ffn0 = _Residual(_FeedForward(dim, device, dtype), drop)
        self.mixer = _Residual(nn.Sequential(OrderedDict(attn=attention)), drop)
        self.dw1 = _Residual(ConvNorm(dim, dim, 3, groups=dim, norm_init=0.0, device=device, dtype=dtype), drop)
        self.ffn1 = _Residual(_FeedForward(dim, device, dtype), drop)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, H, W]."""
        return self.ffn1(self.dw1(self.mixer(self.ffn0(self.dw0(x)))))
