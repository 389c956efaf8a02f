"""Argument checks shared by the ops. Each error names the argument, the shape or dtype it has, and what it needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def shape_of(tensor: Tensor) -> str:
    return "[" + ", ".join(map(str, tensor.shape)) + "]"


def is_tensor(op: str, name: str, value: object, needs: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} is a {type(value).__name__}; it must be a Tensor {needs}")


def has_shape(op: str, name: str, tensor: Tensor, shape: Sequence[int], symbols: str) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} has shape {shape_of(tensor)}; it must be {symbols} = [{', '.join(map(str, shape))}]")


def floating(op: str, name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} has dtype {tensor.dtype}; it must be a floating dtype")


_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def of_a_kind(x: Tensor, y: Tensor, z: Tensor) -> bool:
    """Whether three tensors share a floating dtype, a device and strides, in one look: what to say of those that do not is for the checks above."""
    dtype, device, dense = x.dtype, x.device, torch.strided
    return (
        (dtype in _FLOATING and y.dtype is dtype and z.dtype is dtype)
        and (y.device == device and z.device == device)
        and (x.layout is dense and y.layout is dense and z.layout is dense)
    )


def same_kind(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """``tensor`` has the dtype and the device of ``like``."""
    if tensor.dtype is not like.dtype:
        raise TypeError(f"{op}: {name} has dtype {tensor.dtype}; it must be {like.dtype}, the dtype of {like_name}")
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}; it must be on {like.device}, the device of {like_name}")


def probability(op: str, name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{op}: {name} is {value}; it must be in [0, 1]")


def strided(op: str, name: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided:
        raise TypeError(f"{op}: {name} has layout {tensor.layout}; it must be a dense (strided) tensor")
