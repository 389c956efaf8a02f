"""Convolutions with a live BatchNorm, in training on the CPU: the map in channels_last, norm and activation in one op.

In channels_last a convolution is a matrix product over rows of pixels, which oneDNN runs faster than what it makes of NCHW, forward and backward.
But it makes a sum of many products in one chain there, and rounds more than twice as much as in NCHW: a convolution of such sums stays in that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitkernels.nn import _checks, _conv_norm
from vitkernels.nn._folded import Layer, long_sums
from vitkernels.ops.batch_norm import op


def why_not(layers: Sequence[Layer]) -> str | None:
    """Why these layers cannot be trained so."""
    for layer in layers:
        norm = layer.norm
        if norm is not None and layer.activation not in op.ACTIVATIONS:
            return f"its activation is {layer.activation}"
        if norm is None and layer.activation != "none":
            return "it has an activation and no norm"
        if norm is not None and norm.num_batches_tracked is None:
            return "its norm counts no batches"
    return None


def why_not_now(layers: Sequence[Layer], x: Tensor) -> str | None:
    """Why this call has to run them one by one."""
    norms = [layer.norm for layer in layers if layer.norm is not None]
    if not all(norm.training for norm in norms):
        return "some of its norms are frozen"
    return _checks.why_not_tensor(x) or _conv_norm.why_not_norms(norms, x)


def run(layers: Sequence[Layer], x: Tensor) -> Tensor | None:
    """The layers' output for a map [B, C, H, W], in the memory format of the last; their running statistics are updated as their own forward would.

    None, and nothing done, where a norm would refuse its input.
    """
    if x.shape[0] * x.shape[2] * x.shape[3] <= 1:
        return None
    y = x
    for layer in layers:
        y = layer.module(y.contiguous(memory_format=torch.contiguous_format if long_sums(layer) else torch.channels_last))
        if layer.norm is not None:
            y = _normalised(layer.norm, layer.activation, y)
    return y


def _normalised(norm: nn.BatchNorm2d, activation: str, y: Tensor) -> Tensor:
    weight, bias = norm.weight, norm.bias
    z, mean, var = op.batch_norm_act(y, weight, bias, activation=activation, eps=norm.eps)  # type: ignore[arg-type]
    _conv_norm.update_running_statistics([norm], mean, var, y.numel() // y.shape[1])
    return z
