"""The inverted bottleneck (MobileNetV2, arXiv 1801.04381, section 3.3) in one pass over the map, for inference.

    y = act_out(project(act(depthwise(act(expand(norm(x))))))) + residual

Every part but the projection may be absent: without the depthwise convolution it is a transformer's MLP with the norm in front and the residual
behind, with the projection alone a 1x1 convolution or a linear layer. BatchNorm is not mentioned: :mod:`vitkernels.nn` folds it into the weights.

It has no gradient and no Triton kernel, and it is not part of :mod:`vitkernels.ops`: it stands in for layers of a model in evaluation, which know how
to train by themselves. See this folder's README.md for the order of the work.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels import backends, native
from vitkernels.ops import _define
from vitkernels.ops.bottleneck.reference import ACTIVATIONS, Affine, Depthwise, Norm

NAME = "inverted_bottleneck"
PANEL = 32
"""Output channels of a panel of packed weights: ``kPanel`` of csrc/bottleneck/kernels.h."""

_NORMS = ("none", "token", "sample")
_CODES = tuple(ACTIVATIONS)

backends.declare(NAME, backends.Support(triton=()))


def _fake(x: Tensor, *args: Any) -> Tensor:
    depthwise, out_channels, kernel, stride, padding = args[4], args[9], *args[12:15]
    height, width = x.shape[2:]
    if depthwise is not None:
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
    return x.new_empty((x.shape[0], height, width, out_channels)).permute(0, 3, 1, 2)


_define.define_for_inference(
    NAME,
    schema="(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor? expand_weight, Tensor? expand_bias, Tensor? depthwise_weight, "
    "Tensor? depthwise_bias, Tensor project_weight, Tensor project_bias, Tensor? residual, int out_channels, int norm, float eps, int kernel, "
    "int stride, int padding, int activation, int out_activation) -> Tensor",
    fake=_fake,
    instead="the layers it stands for",
)
_op = torch.ops.vitkernels.inverted_bottleneck.default


class Packed(NamedTuple):
    """The weights as the kernels read them; made by :func:`pack`."""

    tensors: tuple[Tensor | None, ...]  # norm, expand, depthwise, project: weight and bias of each
    settings: tuple[int | float, ...]  # what follows `residual` in the schema


def pack(
    project: Affine,
    *,
    norm: Norm | None = None,
    expand: Affine | None = None,
    depthwise: Depthwise | None = None,
    activation: str = "none",
    out_activation: str = "none",
    activations: torch.dtype | None = None,
) -> Packed:
    """Weights for :func:`run`: panels of 32 output channels, in float32 (float64 for float64).

    Weights that are bfloat16 numbers stay so, in pairs for the CPU's own bfloat16 products, where these are there (:func:`bfloat16_products`) and
    ``activations`` are bfloat16. What lies between the layers is then rounded to bfloat16, as PyTorch rounds it.

    Args:
        project: [out, hidden].
        norm: of the input.
        expand: [hidden, in].
        depthwise: of the hidden channels, square.
        activation: "none", "relu", "silu", "gelu" (exact), "gelu_tanh" or "quick_gelu" (CLIP's), behind ``expand`` and behind ``depthwise``.
        out_activation: behind ``project``, before the residual.
        activations: the dtype of what :func:`run` will be given, if it is known.
    """
    matrices = [layer.weight for layer in (expand, project) if layer is not None]
    pairs = activations is torch.bfloat16 and depthwise is None and bfloat16_products() and all(map(_pairs_of_bfloat16, matrices))
    dtype = _define.accumulation_dtype(project.weight.dtype)

    def padded(tensor: Tensor, dim: int = 0) -> Tensor:
        """Zeros up to whole panels along ``dim``."""
        missing = -tensor.shape[dim] % PANEL
        return F.pad(tensor.to(dtype), [0, 0] * (tensor.dim() - 1 - dim) + [0, missing])

    def bias_of(layer: Affine | Depthwise) -> Tensor:
        rows = layer.weight.shape[0]
        return padded(layer.weight.new_zeros(rows) if layer.bias is None else layer.bias).contiguous()

    def affine_of(layer: Affine | None) -> tuple[Tensor | None, Tensor | None]:
        if layer is None:
            return None, None
        return panels(layer.weight.to(torch.bfloat16 if pairs else dtype), pairs), bias_of(layer)

    taps: tuple[Tensor | None, Tensor | None] = (None, None)
    if depthwise is not None:
        taps = padded(depthwise.weight.flatten(1).T, 1).contiguous(), bias_of(depthwise)  # [k * k, channels]
    affine = (None, None) if norm is None else tuple(None if t is None else t.to(dtype).contiguous() for t in (norm.weight, norm.bias))
    return Packed(
        (*affine, *affine_of(expand), *taps, *affine_of(project)),
        (
            project.weight.shape[0],
            _NORMS.index("none" if norm is None else norm.over),
            0.0 if norm is None else norm.eps,
            0 if depthwise is None else depthwise.weight.shape[-1],
            1 if depthwise is None else depthwise.stride,
            0 if depthwise is None else depthwise.padding,
            _CODES.index(activation),
            _CODES.index(out_activation),
        ),
    )


def panels(weight: Tensor, pairs: bool = False) -> Tensor:
    """A weight [out, depth] as [panels, depth, 32], the output channels filled up with zeros.

    In ``pairs`` a panel's elements lie as [depth / 2, 32, 2]; an odd depth is filled up.
    """
    weight = F.pad(weight, (0, weight.shape[1] % 2 if pairs else 0, 0, -weight.shape[0] % PANEL))
    depth = weight.shape[1]
    if pairs:
        return weight.reshape(-1, PANEL, depth // 2, 2).transpose(1, 2).reshape(-1, depth, PANEL)
    return weight.reshape(-1, PANEL, depth).transpose(1, 2).contiguous()


def bfloat16_products() -> bool:
    """Whether the kernels multiply in bfloat16 with the CPU's own instructions, twice as fast as in float32."""
    return native.cpu_isa() == "avx512_bf16"


def _pairs_of_bfloat16(matrix: Tensor) -> bool:
    return matrix.shape[1] % 2 == 0 and torch.equal(matrix.bfloat16().to(matrix.dtype), matrix)


def run(x: Tensor, packed: Packed, residual: Tensor | None = None) -> Tensor:
    """The bottleneck of ``x``.

    Args:
        x: [B, in, H, W]; float32, bfloat16, float16 or float64, on the CPU. Channels_last is read as it lies.
        packed: the weights, of ``x``'s accumulation dtype, or packed for activations of its dtype.
        residual: [B, out, H', W'], added last.

    Returns:
        [B, out, H', W'] in channels_last memory, of the dtype of ``x``. Sums and norms are in float32; so is what lies between the layers, unless
        the weights are bfloat16.

    Raises:
        RuntimeError: shapes or dtypes that do not go together.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    needs_autograd = torch.is_grad_enabled() and (x.requires_grad or (residual is not None and residual.requires_grad))
    return _define.call(_op, needs_autograd, x, *packed.tensors, residual, *packed.settings)
