"""A chain of layers in plain PyTorch: what the kernel computes, and the truth it is tested against."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels.ops.cascaded_group import reference as cascaded_group
from vitkernels.ops.cascaded_group.op import Packed, unpack


class Convolution(NamedTuple):
    """``relu(conv2d(x))``, plus x with ``residual``. Kernel, stride and zero padding are the same in both directions."""

    weight: Tensor  # [O, C, k, k]
    bias: Tensor  # [O]
    stride: int = 1
    padding: int = 0
    relu: bool = False
    residual: bool = False


class Depthwise(NamedTuple):
    """The same with a kernel for each channel."""

    weight: Tensor  # [C, 1, k, k]
    bias: Tensor  # [C]
    stride: int = 1
    padding: int = 0
    relu: bool = False
    residual: bool = False


class FeedForward(NamedTuple):
    """``W_2 relu(W_1 x + b_1) + b_2`` of each pixel, plus x with ``residual``."""

    weight_1: Tensor  # [hidden, C]
    bias_1: Tensor  # [hidden]
    weight_2: Tensor  # [C, hidden]
    bias_2: Tensor  # [C]
    residual: bool = False


class SqueezeExcite(NamedTuple):
    """``x * sigmoid(W_2 relu(W_1 mean(x) + b_1) + b_2)`` (arXiv 1709.01507, section 3), plus x with ``residual``."""

    weight_1: Tensor  # [hidden, C]
    bias_1: Tensor  # [hidden]
    weight_2: Tensor  # [C, hidden]
    bias_2: Tensor  # [C]
    residual: bool = False


class Attention(NamedTuple):
    """Cascaded group attention within windows (arXiv 2305.07027, section 3.2), plus x with ``residual``."""

    packed: Packed
    scale: float
    window: int
    residual: bool = False


class Pool(NamedTuple):
    """The mean of each channel, ``mean(x) * weight + bias``: [B, C, H, W] to [B, C, 1, 1]."""

    weight: Tensor  # [C]
    bias: Tensor  # [C]
    residual: bool = False


Layer = Convolution | Depthwise | FeedForward | SqueezeExcite | Attention | Pool


def layer_chain(x: Tensor, layers: Iterable[Layer]) -> Tensor:
    """[B, C, H, W] through the layers, one after the other."""
    for layer in layers:
        y = _layer(x, layer)
        x = x + y if layer.residual else y
    return x


def _layer(x: Tensor, layer: Layer) -> Tensor:
    match layer:
        case Convolution() | Depthwise():
            groups = x.shape[1] if isinstance(layer, Depthwise) else 1
            y = F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, groups=groups)
            return F.relu(y) if layer.relu else y
        case FeedForward():
            return _twice(x, layer)
        case SqueezeExcite():
            return x * torch.sigmoid(_twice(x.mean((2, 3), keepdim=True), layer))
        case Attention():
            return cascaded_group.cascaded_group_attention(x, **unpack(layer.packed), scale=layer.scale, window=layer.window)
        case Pool():
            return torch.addcmul(layer.bias[:, None, None], x.mean((2, 3), keepdim=True), layer.weight[:, None, None])


def _twice(x: Tensor, layer: FeedForward | SqueezeExcite) -> Tensor:
    hidden = F.relu(F.conv2d(x, layer.weight_1[..., None, None], layer.bias_1))
    return F.conv2d(hidden, layer.weight_2[..., None, None], layer.bias_2)
