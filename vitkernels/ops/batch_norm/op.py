"""Batch normalisation in training with the activation behind it (BatchNorm, arXiv 1502.03167): checks, choice of backend, and the autograd op.

Reads top to bottom: the public function, then the torch.library op behind it. The derivation is in this folder's README.md.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from vitkernels import backends
from vitkernels.ops import _check, _define
from vitkernels.ops.batch_norm import reference

NAME = "batch_norm_act"
ACTIVATIONS = tuple(reference.ACTIVATIONS)
"""In the order of their numbers in ``csrc/batch_norm/kernels.h``."""

backends.declare(NAME, backends.Support(triton=()))


def batch_norm_act(
    x: Tensor, weight: Tensor, bias: Tensor, *, activation: Literal["none", "relu", "silu"] = "none", eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalisation by the statistics of this batch, and the activation behind it, in one pass more over the map than the statistics take.

    ``y = activation((x - mean) / sqrt(var + eps) * weight + bias)``, mean and (biased) var of each channel over the batch and the pixels.

    Args:
        x: feature map, [B, C, H, W], any strides; contiguous and channels_last are fast.
        weight: [C].
        bias: [C].
        activation: "none", "relu" or "silu".
        eps: added to each variance.

    weight and bias are in the dtype of ``x`` or in float32, and stay so under autocast, which casts ``x``.

    Returns:
        ``(y, mean, var)``: y has the shape and dtype of ``x`` and is channels_last where ``x`` is, contiguous otherwise; mean and var, [C], are in
        float32 (float64 for float64) and not differentiable: for running statistics, which this op does not keep. Differentiable once in x, weight
        and bias. Saved for backward: x, weight, bias, mean and var; PyTorch saves the map in front of the activation, too.

    Raises:
        ValueError: a wrong shape, an unknown activation, a batch with one value a channel, a mix of devices.
        TypeError: a wrong or mixed dtype, something that is no tensor.
        BackendUnavailable: a backend was asked for by name and cannot run.

    Paper: BatchNorm, arXiv 1502.03167, algorithm 1.
    """
    _check.is_tensor(NAME, "x", x, "[B, C, H, W]")
    _check.strided(NAME, "x", x)
    _check.floating(NAME, "x", x)
    if x.dim() != 4:
        raise ValueError(f"{NAME}: x has shape {_check.shape_of(x)}; it must be 4-dimensional, [B, C, H, W]")
    if x.shape[0] * x.shape[2] * x.shape[3] <= 1:
        raise ValueError(f"{NAME}: x has shape {_check.shape_of(x)}; batch statistics need more than one value a channel")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{NAME}: activation is {activation!r}; it must be one of {', '.join(map(repr, ACTIVATIONS))}")
    if (dtype := _define.autocast_of(x)) is not None:
        x = _define.cast(x, dtype)
    accumulation = _define.accumulation_dtype(x.dtype)
    for name, tensor in (("weight", weight), ("bias", bias)):
        _check.is_tensor(NAME, name, tensor, "[C]")
        _check.strided(NAME, name, tensor)
        _check.has_shape(NAME, name, tensor, (x.shape[1],), "[C]")
        if tensor.dtype not in (x.dtype, accumulation):
            raise TypeError(f"{NAME}: {name} has dtype {tensor.dtype}; it must be {x.dtype}, the dtype of x, or {accumulation}")
        if tensor.device != x.device:
            raise ValueError(f"{NAME}: {name} is on {tensor.device}; it must be on {x.device}, the device of x")
    if backends.select(NAME, x) == "reference":
        return reference.batch_norm_act(x, weight, bias, activation=activation, eps=eps)
    weight, bias = weight.to(accumulation).contiguous(), bias.to(accumulation).contiguous()
    arguments = (x, weight, bias, eps, ACTIVATIONS.index(activation))
    y, mean, var = _define.call(torch.ops.vitkernels.batch_norm_act.default, _define.differentiable(x, weight, bias), *arguments)
    return y, mean, var


# --- vitkernels::batch_norm_act -------------------------------------------------------------------------------------------------------


def _empty_map(x: Tensor) -> Tensor:
    """channels_last where ``x`` is that alone, contiguous otherwise."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.empty_like(x, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float, activation: int) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(x.dim() == 4, lambda: f"x must be 4-dimensional, got {x.dim()}")
    mean, var = (x.new_empty((x.shape[1],), dtype=_define.accumulation_dtype(x.dtype)) for _ in range(2))
    return _empty_map(x), mean, var


def _backward_fake(grad_y: Tensor, x: Tensor, weight: Tensor, *_arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_x = _arguments[-1]
    return _empty_map(x) if need_x else x.new_empty((0,)), torch.empty_like(weight), torch.empty_like(weight)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, ctx.eps, ctx.activation = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(x, weight, bias, mean, var)
    ctx.set_materialize_grads(False)


def _backward(op: Any, ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 5
    needed = ctx.needs_input_grad[:3]
    grads = op(grad_y, *ctx.saved_tensors, ctx.eps, ctx.activation, needed[0])
    return (*(grad if need else None for grad, need in zip(grads, needed, strict=True)), None, None)


_define.define(
    NAME,
    schema="(Tensor x, Tensor weight, Tensor bias, float eps, int activation) -> (Tensor y, Tensor mean, Tensor var)",
    backward_schema=(
        "(Tensor grad_y, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor var, float eps, int activation, bool need_x)"
        " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)"
    ),
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup,
    backward=_backward,
    cast_by_autocast=(0,),  # weight and bias stay in float32, as they do in torch's BatchNorm
)
