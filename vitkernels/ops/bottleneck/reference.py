"""The inverted bottleneck in plain PyTorch: the definition."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Affine(NamedTuple):
    """A 1x1 convolution: ``weight`` [out, in], ``bias`` [out] or None."""

    weight: Tensor
    bias: Tensor | None = None


class Depthwise(NamedTuple):
    """A depthwise convolution: ``weight`` [C, k, k], ``bias`` [C] or None."""

    weight: Tensor
    bias: Tensor | None = None
    stride: int = 1
    padding: int = 0


class Norm(NamedTuple):
    """``over`` "token": of the channels of each pixel (LayerNorm); "sample": of all of a sample (GroupNorm with one group)."""

    over: str
    weight: Tensor | None
    bias: Tensor | None
    eps: float


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def inverted_bottleneck(
    x: Tensor,
    project: Affine,
    *,
    norm: Norm | None = None,
    expand: Affine | None = None,
    depthwise: Depthwise | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    out_activation: str = "none",
) -> Tensor:
    """The arguments and the result of :func:`vitkernels.ops.bottleneck.op.run` on what :func:`~vitkernels.ops.bottleneck.op.pack` is given."""
    act = ACTIVATIONS[activation]
    if norm is not None and norm.over == "token":
        x = F.layer_norm(x.movedim(1, -1), (x.shape[1],), norm.weight, norm.bias, norm.eps).movedim(-1, 1)
    elif norm is not None:
        x = F.group_norm(x, 1, norm.weight, norm.bias, norm.eps)
    if expand is not None:
        x = act(F.conv2d(x, expand.weight[:, :, None, None], expand.bias))
    if depthwise is not None:
        x = act(F.conv2d(x, depthwise.weight[:, None], depthwise.bias, depthwise.stride, depthwise.padding, groups=x.shape[1]))
    x = ACTIVATIONS[out_activation](F.conv2d(x, project.weight[:, :, None, None], project.bias))
    return x if residual is None else torch.add(x, residual)
