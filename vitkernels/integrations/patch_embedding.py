"""Patch embeddings of ViTs in evaluation: the image's patches go through one product, whose tiles are gathered from the image as it lies.

A convolution whose stride is its kernel, in whatever model it stands, and vit_pytorch's ``Sequential`` of a Rearrange, a LayerNorm and a linear
layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitkernels.integrations._fused import Fused, original_name
from vitkernels.integrations.folded import Linears, Plan, Run, of_linears, plain, token_norm
from vitkernels.nn._folded import Layer, UnfitError
from vitkernels.ops import _define
from vitkernels.ops.bottleneck.reference import Affine, Norm
from vitkernels.ops.patch_embedding import op

_LEAST = 7
"""Pixels in a row of a patch from which on the op is 0.95x to 4.9x as fast as PyTorch; of larger images with fewer it is 0.6x to 0.9x."""


def _plan(
    takes: Callable[[torch.Size], bool],
    patch: tuple[int, int],
    layers: Callable[[torch.dtype], tuple[Affine, Norm | None]],
    last: Callable[[Tensor], Tensor] = lambda y: y,
) -> Plan:
    """The patches of images that it ``takes``, projected by what ``layers`` gives in a dtype; ``last`` sees the result [B, out, H, W]."""

    def bind(dtype: torch.dtype) -> Run:
        project, norm = layers(_define.accumulation_dtype(dtype))
        packed = op.pack(project, patch, norm, dtype)
        return lambda x: last(op.run(x, packed)) if takes(x.shape) else None

    return of_linears(bind)


class PatchConvolution(Linears):
    """``nn.Conv2d`` over patches."""

    _vk_op: ClassVar[str] = op.NAME

    @classmethod
    def _vk_settings(cls, module: Any) -> Any:
        return _places(module)

    @classmethod
    def _vk_plan(cls, module: Any) -> Plan:
        if not _over_patches(module):
            raise UnfitError("it is no convolution of patches side by side any more")
        channels, patch = module.in_channels, module.kernel_size

        def takes(shape: torch.Size) -> bool:
            return shape[1] == channels and shape[2] >= patch[0] and shape[3] >= patch[1]

        return _plan(takes, patch, lambda dtype: (Layer(module).affine(dtype), None))


def _places(conv: nn.Conv2d) -> tuple[Any, ...]:
    return conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode, conv.in_channels


def _over_patches(conv: nn.Conv2d) -> bool:
    alone = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding in ((0, 0), "valid")
    return alone and conv.stride == conv.kernel_size and conv.kernel_size[1] >= _LEAST


class PatchSequence(Linears):
    """vit_pytorch's: the last of its norms sees the tokens as before."""

    _vk_op: ClassVar[str] = op.NAME

    @classmethod
    def _vk_settings(cls, module: Any) -> Any:
        return [(layer.__dict__.get("pattern"), layer.__dict__.get("axes_lengths")) for layer in module._modules.values()]

    @classmethod
    def _vk_plan(cls, module: Any) -> Plan:
        if not _projects_patches(module):  # a slice of it is of its class
            raise UnfitError("it is no Rearrange, LayerNorm and linear layer")
        rearrange, norm, linear, *last = module
        patch = rearrange.axes_lengths["p1"], rearrange.axes_lengths["p2"]
        norm, linear = token_norm(norm), plain(linear, nn.Linear)
        channels, left = divmod(linear.in_features, patch[0] * patch[1])
        if left or norm.normalized_shape != (linear.in_features,):
            raise UnfitError("its layers are of other patches than its Rearrange makes")

        def takes(shape: torch.Size) -> bool:
            return shape[1] == channels and not (shape[2] % patch[0] or shape[3] % patch[1])

        def as_convolution(vector: Tensor) -> Tensor:
            """Pixels in the order [height, width, channels], last in ``vector``, in that of a convolution's weight."""
            return vector.unflatten(-1, (*patch, channels)).movedim(-1, -3).flatten(-3)

        def layers(dtype: torch.dtype) -> tuple[Affine, Norm]:
            project = Layer(linear).affine(dtype)
            weight, bias = (None if vector is None else as_convolution(vector) for vector in (norm.weight, norm.bias))
            return Affine(as_convolution(project.weight), project.bias), Norm("token", weight, bias, norm.eps)

        def as_tokens(y: Tensor) -> Tensor:
            tokens = y.flatten(2).mT
            for layer in last:
                tokens = layer(tokens)
            return tokens

        return _plan(takes, patch, layers, as_tokens)


def _projects_patches(module: Any) -> bool:
    if len(module) not in (3, 4) or original_name(module[0]) != "einops.layers.torch.Rearrange":
        return False
    known = getattr(module[0], "pattern", None) == _PATTERN and all(map(isinstance, module, (nn.Module, nn.LayerNorm, nn.Linear, nn.LayerNorm)))
    return known and set(module[0].axes_lengths) == {"p1", "p2"}


_PATTERN = "b c (h p1) (w p2) -> b (h w) (p1 p2 c)"


def match(module: nn.Module) -> type[Fused] | None:
    """The replacement of a convolution, or of a ``Sequential``, that projects patches."""
    if type(module) is nn.Conv2d:
        return PatchConvolution if _over_patches(module) else None
    return PatchSequence if type(module) is nn.Sequential and _projects_patches(module) else None
