"""The projection of an image's patches (ViT, arXiv 2010.11929, section 3.1): a convolution whose stride is its kernel, for inference.

    y[b, :, i, j] = W norm(patch (i, j) of image b) + bias

Its arithmetic is the :mod:`inverted bottleneck <vitkernels.ops.bottleneck.op>`'s projection; like that it has no gradient and is not part of
:mod:`vitkernels.ops`. This folder's README.md says what it saves.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitkernels import backends
from vitkernels.ops import _define
from vitkernels.ops.bottleneck import op as bottleneck
from vitkernels.ops.bottleneck.reference import Affine, Norm

NAME = "patch_embedding"

backends.declare(NAME, backends.Support(triton=()))


def _fake(x: Tensor, *args: Any) -> Tensor:
    out_channels, *patch = args[4:7]
    rows, columns = (side // length for side, length in zip(x.shape[2:], patch, strict=True))
    return x.new_empty((x.shape[0], rows, columns, out_channels)).permute(0, 3, 1, 2)


_define.define_for_inference(
    NAME,
    schema="(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor weight, Tensor bias, int out_channels, int patch_height, int patch_width, "
    "bool norm, float eps) -> Tensor",
    fake=_fake,
    instead="the convolution it stands for",
)
_op = torch.ops.vitkernels.patch_embedding.default


class Packed(NamedTuple):
    """The weights as the kernel reads them; made by :func:`pack`."""

    tensors: tuple[Tensor | None, ...]  # norm, projection: weight and bias of each
    settings: tuple[int | float, ...]  # what follows them in the schema


def pack(project: Affine, patch: tuple[int, int], norm: Norm | None = None, activations: torch.dtype | None = None) -> Packed:
    """Weights for :func:`run`, packed as the inverted bottleneck's.

    Args:
        project: [out, C * height * width], the pixels in the order of a convolution's weight.
        patch: (height, width).
        norm: of the pixels of each patch.
        activations: the dtype of what :func:`run` will be given, if it is known.
    """
    packed = bottleneck.pack(project, norm=norm, activations=activations)
    return Packed(packed.tensors[:2] + packed.tensors[-2:], (project.weight.shape[0], *patch, norm is not None, 0.0 if norm is None else norm.eps))


def run(x: Tensor, packed: Packed) -> Tensor:
    """The projected patches of ``x``.

    Args:
        x: [B, C, H, W], any strides; float32, bfloat16, float16 or float64, on the CPU. What is left at the right and the bottom when a side is not
            a multiple of the patch's takes no part.
        packed: the weights, of ``x``'s accumulation dtype, or packed for activations of its dtype.

    Returns:
        [B, out, H // height, W // width] in channels_last memory, of the dtype of ``x``.

    Raises:
        RuntimeError: shapes or dtypes that do not go together.
    """
    return _define.call(_op, _define.differentiable(x), x, *packed.tensors, *packed.settings)
