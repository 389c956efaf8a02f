"""Softmax attention of ViT and MobileViT in models: what the three zoos' classes share.

What a call skips (softmax, dropout on the maps) must be the plain layers it was. The projections and norms are called like ever, and may be anything:
adapted, quantised, hooked.

MobileViT unfolds a feature map [B, C, H, W] into sequences [4 B, N, C], one for each of the four pixels of a patch, and folds it back after its
transformer. All of its layers but attention work on each token by itself, so here they see the map, [B, H/ph, ph, W/pw, pw, C], which is no copy of a
channels-last one, and attention, which sees by the six dimensions what it has got, reads the pixels of a sequence where they lie.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.integrations import _tokenwise
from vitkernels.integrations._fused import Fused, Role, fell_back, why_no_kernel
from vitkernels.nn import _checks


class Attention(_tokenwise.Inner):
    """Base of the attention replacements."""

    _vk_op: ClassVar[str] = "attention"
    _vk_forms_maps: ClassVar[bool] = False
    """Whether the original does: then PyTorch's own fused attention, which the op calls on a GPU where no kernel is proved, is a gain, too."""

    @classmethod
    def _vk_why_not(cls, module: Any, role: Role) -> str | None:
        projection = cls._vk_projection(module)
        if next(projection.parameters(), None) is None:
            return f"its {type(projection).__name__} has no parameters: it is quantised, or something of its own"
        return cls._vk_why_not_layers(module)

    @classmethod
    def _vk_projection(cls, module: Any) -> nn.Module:
        """Its first projection."""
        raise NotImplementedError

    @classmethod
    def _vk_weight(cls, module: Any) -> Tensor:
        return next(cls._vk_projection(module).parameters())

    @classmethod
    def _vk_dropout(cls, module: Any) -> float:
        """The probability with which training drops attention weights."""
        raise NotImplementedError

    @classmethod
    def _vk_note(cls, module: Any) -> str:
        return "in training, dropout draws other masks than the original, of the same probability" if cls._vk_dropout(module) > 0 else ""

    def _vk_takes(self, x: Any, *, dims: int = 3, reason: str | None = None) -> bool:
        """Whether this call can be fused; the reason (``reason``, if given) is kept for the handle's report if not.

        A map comes from a :class:`MapBlock`, which has looked at everything in it before it decided to hand on maps.
        """
        if reason is None and type(x) is Tensor and x.dim() == _MAP_DIMS:
            return True
        reason = reason or _checks.why_not_tensor(x) or self._vk_why_not_layers(self)
        if reason is None and x.dim() != dims:
            reason = f"the input has {x.dim()} dimensions"
        if reason is None and not (self._vk_forms_maps and x.is_cuda):
            reason = why_no_kernel(self._vk_op, x)
        if reason is not None:
            fell_back(self, reason)
        return reason is None

    def _vk_attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        patch: Patch,
        dropout: float,
        scale: float | None,
        bias: Tensor | None = None,
        key_padding: Tensor | None = None,
    ) -> Tensor:
        """Attention of what :func:`split` gives: tokens again, or a map, in the shape that came in."""
        if patch is not None:
            return as_tokens(ops.patch_attention(q, k, v, patch=patch, num_heads=self._vk_heads(self), scale=scale), patch)
        out = ops.attention(q, k, v, bias=bias, key_padding=key_padding, scale=scale, dropout_p=dropout)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2).flatten(2)

    @classmethod
    def _vk_heads(cls, module: Any) -> int:
        """Its heads."""
        raise NotImplementedError


Patch = tuple[int, int] | None
"""The size of a map's patches, or of tokens None."""


def patch_of(x: Tensor) -> Patch:
    """Of a map [B, H/ph, ph, W/pw, pw, C]."""
    return (x.shape[2], x.shape[4]) if x.dim() == _MAP_DIMS else None


def split(x: Tensor, heads: int, count: int = 1) -> tuple[Tensor, ...]:
    """A projection's ``count`` parts, all of them views: tokens [B, N, count H D] as [B, H, N, D] each, a map as [B, H D, H', W'] each."""
    if x.dim() == _MAP_DIMS:
        return as_map(x).chunk(count, dim=1) if count > 1 else (as_map(x),)
    batch, tokens, _ = x.shape
    return x.reshape(batch, tokens, count, heads, x.shape[2] // (count * heads)).permute(2, 0, 3, 1, 4).unbind(0)


_MAP_DIMS = 6


def as_tokens(x: Tensor, patch: tuple[int, int]) -> Tensor:
    """[B, C, H, W] as [B, H/ph, ph, W/pw, pw, C]: no copy of a channels-last map."""
    (batch, channels, height, width), (ph, pw) = x.shape, patch
    return x.permute(0, 2, 3, 1).contiguous().view(batch, height // ph, ph, width // pw, pw, channels)


def as_map(x: Tensor) -> Tensor:
    """The inverse, always a view."""
    batch, rows, ph, columns, pw, channels = x.shape
    return x.view(batch, rows * ph, columns * pw, channels).permute(0, 3, 1, 2)


def norm_heads(norm: Callable[[Tensor], Tensor], x: Tensor, heads: int) -> Tensor:
    """A norm over each head's channels, of a map [B, H D, H', W']."""
    return norm(x.unflatten(1, (heads, -1)).movedim(2, -1)).movedim(-1, 2).flatten(1, 2)


class MapBlock(Fused):
    """Base of MobileViT's blocks: convolutions around a transformer, which here is given the map and never unfolds it."""

    _vk_op: ClassVar[str] = "patch_attention"
    _vk_layers: ClassVar[_tokenwise.Layers]

    @classmethod
    def _vk_inside(cls, module: Any) -> tuple[nn.Module, ...]:
        """What the original runs between unfolding and folding."""
        raise NotImplementedError

    @classmethod
    def _vk_why_not(cls, module: Any, role: Role) -> str | None:
        return cls._vk_layers.why_not(cls._vk_inside(module), running=False)

    @classmethod
    def _vk_parts(cls, module: Any) -> dict[nn.Module, type[Fused]]:
        return cls._vk_layers.parts_of(cls._vk_inside(module))

    @classmethod
    def _vk_weight(cls, module: Any) -> Tensor:
        return next(cls._vk_inside(module)[0].parameters())

    @classmethod
    def _vk_note(cls, module: Any) -> str:
        return "unfolds in training, where its layers draw random numbers" if _tokenwise.random_in(cls._vk_inside(module)) else ""

    def _vk_takes_map(self, x: Any) -> bool:
        """Whether this call can run on the feature map; the reason is kept for the handle's report if not."""
        inside = self._vk_inside(self)
        # Random numbers are drawn in the order of the elements, or one for each sequence: of an unfolded map.
        reason = _checks.why_not_tensor(x) or self._vk_layers.why_not(inside, running=True, calm=True) or why_no_kernel(self._vk_op, x)
        if reason is not None:
            fell_back(self, reason)
        return reason is None


def on_map(x: Tensor, patch: tuple[int, int], *layers: Callable[[Tensor], Tensor]) -> Tensor:
    """``layers``, one after the other, on the tokens of a map [B, C, H, W], in the place of unfold, layers and fold.

    A map that the patch does not divide is resized to one that it does, and back, as timm, transformers and the authors do it.
    """
    size = size_of(x)
    tokens = as_tokens(resized(x, whole_patches(size, patch)), patch)
    for layer in layers:
        tokens = layer(tokens)
    # What comes out of a fold is contiguous, and the convolution after it expects no less.
    return resized(as_map(tokens).contiguous(), size)


Size = tuple[int, int]


def size_of(x: Tensor) -> Size:
    """Height and width of a map [B, C, H, W]."""
    return x.shape[2], x.shape[3]


def whole_patches(size: Size, patch: tuple[int, int]) -> Size:
    """The size of the smallest map of whole patches that is no smaller."""
    (height, width), (ph, pw) = size, patch
    return -(-height // ph) * ph, -(-width // pw) * pw


def resized(x: Tensor, size: Size, *, align_corners: bool = False) -> Tensor:
    """A map [B, C, H, W] in another size, by bilinear interpolation; in its own, itself."""
    return x if size == size_of(x) else F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)
