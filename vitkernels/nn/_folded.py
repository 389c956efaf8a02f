"""Layers of a model in evaluation, BatchNorm folded in, as few passes over memory: what a block of convolutions has to do to run so.

A plan says which layers of a module make which passes; binding it to a dtype folds and packs their weights. Both are kept outside of the module
(:mod:`vitkernels.nn._derived`), and made again once something they came from has changed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitkernels.nn import _checks, _conv_norm
from vitkernels.ops import _define
from vitkernels.ops.bottleneck import op
from vitkernels.ops.bottleneck.reference import ACTIVATIONS, Affine, Depthwise, Norm
from vitkernels.ops.chain import op as chain
from vitkernels.ops.separable import layer as separable

_running = threading.local()


@contextlib.contextmanager
def layers_one_by_one() -> Iterator[None]:
    """Blocks of several layers run these one by one in this thread: for who listens to them with hooks, call by call."""
    before, _running.one_by_one = one_by_one(), True
    try:
        yield
    finally:
        _running.one_by_one = before


def one_by_one() -> bool:
    """Whether that is wanted here now."""
    return getattr(_running, "one_by_one", False)


class UnfitError(Exception):
    """Why layers cannot run folded, as a phrase that a report can print."""


Pass = Callable[..., Tensor]
"""``pass_(x)`` or ``pass_(x, residual)`` of maps [B, C, H, W]."""


@dataclass(frozen=True)
class Layer:
    """A convolution or a linear layer, and what follows it."""

    module: nn.Conv2d | nn.Linear
    norm: nn.BatchNorm2d | None = None
    activation: str = "none"
    scale: Tensor | None = None
    """A factor of each output of a linear layer (LayerScale)."""

    def folded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the one affine map, in ``dtype``."""
        conv: Any = self.module  # a linear layer has no norm, and is read alike
        weight, bias = _conv_norm.folded(_conv_norm.Layer(conv, self.norm), dtype)
        if self.scale is None:
            return weight, bias
        scale = self.scale.to(dtype)
        return weight * scale[:, None], None if bias is None else bias * scale

    def affine(self, dtype: torch.dtype) -> Affine:
        """The weight as a matrix [out, in]."""
        weight, bias = self.folded(dtype)
        return Affine(weight.flatten(1), bias)

    @property
    def pointwise(self) -> bool:
        """Whether it works on each pixel by itself."""
        conv = self.module
        if isinstance(conv, nn.Linear):
            return True
        plain = conv.padding in ((0, 0), "same", "valid") and conv.groups == 1
        return conv.kernel_size == (1, 1) and conv.stride == (1, 1) and plain

    @property
    def channels(self) -> int:
        """Of its input, where it is pointwise."""
        return self.module.weight.shape[1]

    @property
    def depth(self) -> int:
        """Products in the sum of each output."""
        return self.module.weight[0].numel()

    @property
    def square(self) -> bool:
        """Whether it is a convolution alike in both directions, not dilated, padded with zeros, fewer than its kernel is wide."""
        conv = self.module
        if isinstance(conv, nn.Linear) or _conv_norm.why_not_square("", conv) is not None:
            return False
        return int(conv.padding[0]) < conv.kernel_size[0]

    @property
    def dense(self) -> bool:
        """Whether it is a convolution of all channels that a chain takes."""
        return self.square and isinstance(self.module, nn.Conv2d) and self.module.groups == 1

    @property
    def depthwise(self) -> bool:
        """Whether it is a depthwise convolution that the op takes."""
        conv = self.module
        return self.square and isinstance(conv, nn.Conv2d) and conv.groups == conv.in_channels == conv.out_channels


@dataclass(frozen=True)
class SideBySide:
    """Linear layers of one input as one: their outputs one after another."""

    layers: tuple[Layer, ...]
    activation: str = "none"
    pointwise: bool = True

    @property
    def channels(self) -> int:
        """Of their input."""
        return self.layers[0].channels

    def affine(self, dtype: torch.dtype) -> Affine:
        """All weights as one matrix [out, in]."""
        found = [layer.affine(dtype) for layer in self.layers]
        biases = [one.weight.new_zeros(one.weight.shape[0]) if one.bias is None else one.bias for one in found]
        return Affine(torch.cat([one.weight for one in found]), torch.cat(biases))


class Bottleneck(NamedTuple):
    """One call of the op: see :mod:`vitkernels.ops.bottleneck.op`."""

    project: Layer | SideBySide
    expand: Layer | None = None
    depthwise: Layer | None = None
    norm: nn.LayerNorm | nn.GroupNorm | None = None

    @property
    def channels(self) -> int:
        """Of the input."""
        return (self.expand or self.project).channels

    def folded(self, dtype: torch.dtype) -> dict[str, Any]:
        """The arguments of :func:`vitkernels.ops.bottleneck.op.pack`, weights in ``dtype``."""
        depthwise, norm = None, None
        if self.depthwise is not None:
            weight, bias = self.depthwise.folded(dtype)
            conv: Any = self.depthwise.module
            depthwise = Depthwise(weight.flatten(0, 1), bias, conv.stride[0], conv.padding[0])
        if self.norm is not None:
            norm = Norm("token" if isinstance(self.norm, nn.LayerNorm) else "sample", self.norm.weight, self.norm.bias, self.norm.eps)
        inner = [layer.activation for layer in (self.expand, self.depthwise) if layer is not None]
        return {
            "project": self.project.affine(dtype),
            "norm": norm,
            "expand": None if self.expand is None else self.expand.affine(dtype),
            "depthwise": depthwise,
            "activation": inner[0] if inner else "none",
            "out_activation": self.project.activation,
        }

    def bind(self, dtype: torch.dtype) -> Pass:
        """The pass with its weights packed for activations of ``dtype``."""
        packed = op.pack(**self.folded(_define.accumulation_dtype(dtype)), activations=dtype)
        return lambda x, residual=None: op.run(x, packed, residual)


def bottleneck(
    project: Layer | SideBySide, *, expand: Layer | None = None, depthwise: Layer | None = None, norm: nn.Module | None = None
) -> Bottleneck:
    """The pass these layers make.

    Raises:
        UnfitError: they are not what the op computes.
    """
    inner = [layer for layer in (expand, depthwise) if layer is not None]
    if not project.pointwise or not (expand is None or expand.pointwise):
        raise UnfitError("its outer convolutions are not plain 1x1 convolutions")
    if not (depthwise is None or depthwise.depthwise):
        raise UnfitError("its middle convolution is not a plain depthwise one")
    if len({layer.activation for layer in inner}) > 1:
        raise UnfitError("its activations differ")
    if norm is not None and not isinstance(norm, nn.LayerNorm) and not (isinstance(norm, nn.GroupNorm) and norm.num_groups == 1):
        raise UnfitError(f"a {type(norm).__name__} stands in front")
    return Bottleneck(project, expand, depthwise, norm)


class SeparableAttention(NamedTuple):
    """The attention of a MobileViTv2 layer with its norm and its sum: see :mod:`vitkernels.ops.separable.layer`."""

    norm: nn.GroupNorm
    qkv: Layer
    out: Layer

    def bind(self, dtype: torch.dtype) -> Callable[[Tensor, tuple[int, int]], Tensor]:
        """The layer of a map and its patch, its weights packed for activations of ``dtype``."""
        accumulation, norm = _define.accumulation_dtype(dtype), self.norm
        of_norm = Norm("sample", norm.weight, norm.bias, norm.eps)
        packed = separable.pack(self.qkv.affine(accumulation), self.out.affine(accumulation), of_norm, dtype)
        return lambda x, patch: separable.run(x, packed, patch)


class Dense(NamedTuple):
    """A convolution that sums many products: a chain of one layer, see :mod:`vitkernels.ops.chain.op`."""

    layer: Layer

    def bind(self, dtype: torch.dtype) -> Pass:
        """The pass with its weights packed for activations of ``dtype``."""
        conv: Any = self.layer.module
        weight, bias = self.layer.folded(_define.accumulation_dtype(dtype))
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
        relu = self.layer.activation == "relu"
        packed = chain.pack([chain.Convolution(weight, bias, conv.stride[0], conv.padding[0], relu)], dtype)
        activation = ACTIVATIONS["none" if relu else self.layer.activation]
        return lambda x: activation(chain.run(x.contiguous(memory_format=torch.channels_last), packed))


class Convolution(NamedTuple):
    """Any other convolution: PyTorch's oneDNN, which takes the activation into the convolution and keeps the weight in its own layout."""

    layer: Layer

    def bind(self, dtype: torch.dtype) -> Pass:
        """The pass with its weights folded for activations of ``dtype``."""
        if dtype in (torch.bfloat16, torch.float16) and not onednn(dtype) and self.layer.dense:
            return Dense(self.layer).bind(dtype)
        conv: Any = self.layer.module
        exact, exact_bias = self.layer.folded(_define.accumulation_dtype(dtype))
        weight, bias = exact.to(dtype), None if exact_bias is None else exact_bias.to(dtype)
        places = (conv.padding, conv.stride, conv.dilation)
        activation = ACTIVATIONS[self.layer.activation]
        known = conv.padding_mode == "zeros" and not isinstance(conv.padding, str) and self.layer.activation in _ONEDNN
        if not known or not onednn(dtype) or self.layer.depth > _SHORT:
            return lambda x: activation(conv._conv_forward(x, weight, bias))
        kernels, packed = torch.ops.mkldnn, None

        def run(x: Tensor) -> Tensor:
            nonlocal packed
            x = x.contiguous(memory_format=torch.channels_last)
            if packed is None:  # for the first size it sees; oneDNN runs any other with it, too
                packed = kernels._reorder_convolution_weight(weight, *map(list, places), conv.groups, list(x.shape))
            return kernels._convolution_pointwise(x, packed, bias, *map(list, places), conv.groups, *_ONEDNN[self.layer.activation])

        return run


_ONEDNN: dict[str, tuple[str, list[Any], str | None]] = {
    "none": ("none", [], ""),
    "relu": ("relu", [], ""),
    "silu": ("swish", [], ""),
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
}


def onednn(dtype: torch.dtype) -> bool:
    """Whether PyTorch's oneDNN multiplies and convolves in this dtype here. In 16 bits what PyTorch does without it is several times slower."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype is torch.float32


# Products in a sum that oneDNN may make in one chain, as it does of a channels_last map. Of three times as many the rounding is more than twice
# that of the original, whose sums are made of parts.
_SHORT = 128


def long_sums(layer: Layer) -> bool:
    """Whether it is a convolution of several pixels that sums many products."""
    return not layer.pointwise and layer.depth > _SHORT


def single(layer: Layer) -> Bottleneck | Dense | Convolution:
    """The pass of one convolution."""
    if layer.pointwise:
        return Bottleneck(layer)
    return Dense(layer) if long_sums(layer) and layer.dense else Convolution(layer)


def why_not_tensors(x: Tensor, tensors: Iterable[Tensor]) -> str | None:
    """Weights that are no plain tensors, or not of the kind of ``x``."""
    for tensor in tensors:
        if (reason := _checks.why_not_weight("a weight", tensor)) is not None:
            return reason
        if tensor.is_floating_point() and (tensor.dtype is not x.dtype or tensor.device != x.device):
            return f"the input is {x.dtype} on {x.device}, a weight {tensor.dtype} on {tensor.device}"
    return None
