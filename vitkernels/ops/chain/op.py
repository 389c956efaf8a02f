"""A chain of layers of a convolutional network in one call: how its layers are packed, and the op.

For inference: norms are folded into the weights, nothing is differentiable. It is not part of the public API and has no entry in the registry: what
calls it is a whole model whose weights stay packed from call to call (:mod:`vitkernels.nn._chain`). This folder's README.md says how it works.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels import backends
from vitkernels.ops import _define
from vitkernels.ops.bottleneck.op import bfloat16_products, panels
from vitkernels.ops.chain.reference import Attention, Convolution, Depthwise, FeedForward, Layer, Pool, SqueezeExcite

backends.declare("layer_chain", backends.Support(triton=()))

KINDS: tuple[type[Layer], ...] = (Convolution, Depthwise, FeedForward, SqueezeExcite, Attention, Pool)
"""A kind's number in a program is its place here."""

_ALIGN = 16
"""``kAlign`` of csrc/chain/kernels.h."""


class Packed(NamedTuple):
    """Layers as the kernel takes them.

    ``program`` holds for each layer its kind, whether it has a residual, and then

    - of a convolution: output channels, kernel, stride, padding, whether a ReLU follows;
    - of a depthwise one: the same without the output channels;
    - of a feed-forward layer or a squeeze-and-excitation: the channels inside;
    - of an attention: heads, key_dim, value channels of a head, window, and each head's kernel;
    - of a mean: nothing.

    The weight of a first convolution of fewer than 16 channels, without a residual, is among the vectors.
    """

    matrices: Tensor  # each layer's, in panels of their columns and in the dtype of x; bfloat16 where the CPU multiplies in it as pairs, int32
    vectors: Tensor  # in the accumulation dtype: all else, each piece padded
    channels: int  # of x
    program: tuple[int, ...]


def pack(layers: Sequence[Layer], dtype: torch.dtype) -> Packed:
    """Layers, with weights of any dtype, for an input of ``dtype``."""
    pairs = dtype is torch.bfloat16 and bfloat16_products()
    matrices: list[Tensor] = []
    vectors: list[Tensor] = []
    program: list[int] = []
    channels = _channels(layers[0])
    for place, layer in enumerate(layers):
        program += [KINDS.index(type(layer)), layer.residual]
        match layer:
            case Convolution():
                out_channels, _, kernel, _ = layer.weight.shape
                program += [out_channels, kernel, layer.stride, layer.padding, layer.relu]
                if place == 0 and channels < _ALIGN and not layer.residual:
                    vectors.append(layer.weight)
                else:
                    matrices.append(layer.weight.permute(0, 2, 3, 1).flatten(1))  # [out, (dy, dx, channel)]
                vectors.append(layer.bias)
            case Depthwise():
                program += [layer.weight.shape[-1], layer.stride, layer.padding, layer.relu]
                vectors += [_padded(layer.weight.flatten(1).T), layer.bias]  # [(dy, dx), channel]
            case FeedForward() | SqueezeExcite():
                program.append(layer.weight_1.shape[0])
                matrices += [layer.weight_1, layer.weight_2]
                vectors += [layer.bias_1, layer.bias_2]
            case Attention():
                program += _attention(layer, vectors)
            case Pool():
                vectors += [layer.weight, layer.bias]
    flat = [_padded(vector.flatten()) for vector in vectors]
    accumulation = _define.accumulation_dtype(dtype)
    packed = torch.cat([flat[0].new_empty(0, dtype=dtype), *(panels(matrix.to(dtype), pairs).flatten() for matrix in matrices)])
    return Packed(packed.view(torch.int32) if pairs else packed, torch.cat(flat).to(accumulation).contiguous(), channels, tuple(map(int, program)))


def _channels(layer: Layer) -> int:
    match layer:
        case Convolution() | FeedForward() | SqueezeExcite():
            weight = layer.weight if isinstance(layer, Convolution) else layer.weight_1
            return weight.shape[1]
        case Depthwise() | Pool():
            return layer.weight.shape[0]
        case Attention():
            return layer.packed.proj_weight.shape[0]


def _padded(tensor: Tensor) -> Tensor:
    return F.pad(tensor, (0, -tensor.shape[-1] % _ALIGN))


def _attention(layer: Attention, vectors: list[Tensor]) -> list[int]:
    packed = layer.packed
    heads, rows, _ = packed.qkv_weight.shape
    out_channels, value_channels = packed.proj_weight.shape
    like = packed.proj_weight

    def or_zeros(bias: Tensor | None, *shape: int) -> Tensor:
        return like.new_zeros(shape) if bias is None else bias

    vectors += [
        packed.qkv_weight.mT,  # [heads, split, rows]
        or_zeros(packed.qkv_bias, heads, rows),
        packed.dw_weight * layer.scale,  # and with it every logit
        or_zeros(packed.dw_bias, heads, packed.key_dim) * layer.scale,
        packed.attention_bias,
        packed.proj_weight.T,
        or_zeros(packed.proj_bias, out_channels),
    ]
    return [heads, packed.key_dim, value_channels // heads, layer.window, *packed.kernel_sizes]


def run(x: Tensor, packed: Packed) -> Tensor:
    """``x`` [B, C, H, W], any strides, through packed layers: [B, C', H', W'] in the dtype of ``x`` and channels_last where ``x`` is.

    Not differentiable. A shape that does not fit fails in the kernel; :func:`why_not_map` says so before.
    """
    return _define.call(
        torch.ops.vitkernels.layer_chain.default,
        _define.differentiable(x, packed.matrices, packed.vectors),
        *(x, packed.matrices, packed.vectors, packed.program),
    )


@functools.lru_cache(maxsize=1024)
def why_not_map(packed_program: tuple[int, ...], channels: int, height: int, width: int) -> str | None:
    """Why a map of this shape is not one that the layers take; ``None`` if it is."""
    for shape, least in _shapes(packed_program, channels, height, width):
        if min(shape[1:]) < least:
            return f"the map is {height} x {width}, and a layer inside would find {shape[1]} x {shape[2]} where it needs at least {least} x {least}"
    return None


def _shapes(program: Sequence[int], channels: int, height: Any, width: Any) -> Iterator[tuple[tuple[int, Any, Any], int]]:
    """(channels, height, width) of each layer's input, with the least side that it takes; at last those of the output."""
    numbers = iter(program)
    for kind in numbers:
        next(numbers)  # residual
        shape, least, out_channels = (channels, height, width), 1, channels
        if KINDS[kind] in (Convolution, Depthwise):
            if KINDS[kind] is Convolution:
                out_channels = next(numbers)
            kernel, stride, padding, _ = (next(numbers) for _ in range(4))
            least = max(kernel - 2 * padding, 1)
            height, width = ((size + 2 * padding - kernel) // stride + 1 for size in (height, width))
        elif KINDS[kind] is Attention:
            heads, _, _, least = (next(numbers) for _ in range(4))
            for _ in range(heads):
                next(numbers)
        elif KINDS[kind] is Pool:
            height = width = 1
        else:
            next(numbers)
        yield shape, least
        channels = out_channels
    yield (channels, height, width), 1


# --- vitkernels::layer_chain ------------------------------------------------------------------------------------------------------------


def _fake(x: Tensor, matrices: Tensor, vectors: Tensor, program: Iterable[int]) -> Tensor:
    torch._check(x.dim() == 4, lambda: f"x must be 4-dimensional, got {x.dim()}")
    *_, (shape, _) = _shapes(list(program), *x.shape[1:])
    y = x.new_empty((x.shape[0], *shape))
    channels_last = x.stride(1) == 1 and not x.is_contiguous()
    return y.contiguous(memory_format=torch.channels_last) if channels_last else y


_define.define_for_inference(
    "layer_chain",
    schema="(Tensor x, Tensor matrices, Tensor vectors, int[] program) -> Tensor",
    fake=_fake,
    instead="vitkernels.ops.chain.reference.layer_chain",
)
