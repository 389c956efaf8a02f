"""The papers' own code, which is copied into projects under many module names: recognised by its attributes.

MobileViTv2 (ml-cvnets): ``LinearSelfAttention`` with ``qkv_proj.block.conv``, ``attn_dropout``, ``out_proj.block.conv``.

EfficientViT (Cream): ``CascadedGroupAttention`` with ``qkvs``, ``dws``, ``proj``, ``attention_biases`` and ``attention_bias_idxs``,
``LocalWindowAttention`` with ``attn``, ``resolution`` and ``window_resolution``, and the model ``EfficientViT`` with ``patch_embed``, ``blocks1`` to
``blocks3`` and ``head``.

DeepViT: ``ReAttention`` with ``qkv``, ``reatten_matrix``, ``var_norm`` and ``proj``, in a ``DeepVisionTransformer`` with ``blocks`` and ``cos_reg``.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from vitkernels.integrations import efficientvit, head_mixing
from vitkernels.integrations._fused import Fused, Role, fell_back, published
from vitkernels.integrations._same import why_not_same
from vitkernels.integrations.cascaded_group import CascadedAttention, WindowAttention
from vitkernels.integrations.separable import Attention, Layers, Patch
from vitkernels.nn import _checks


class CvnetsAttention(Attention):
    """ml-cvnets' ``LinearSelfAttention``."""

    @classmethod
    def _vk_layers(cls, module: Any) -> Layers:
        return Layers(_conv(module.qkv_proj), _conv(module.out_proj), module.attn_dropout, module._modules.get("out_dropout"))

    @classmethod
    def _vk_why_not_layers(cls, module: Any, layers: Layers) -> str | None:
        for name, projection in (("qkv_proj", module.qkv_proj), ("out_proj", module.out_proj)):
            if layers.qkv is projection or layers.out is projection or list(projection.block._modules) != ["conv"]:
                return f"{name} is more than a convolution"
            if _checks.hooked(projection) or _checks.hooked(projection.block):
                return f"{name} {_checks.HOOKED}"
        return super()._vk_why_not_layers(module, layers)

    @classmethod
    def _vk_why_not(cls, module: Any, role: Role) -> str | None:
        return super()._vk_why_not(module, role) or why_not_same(
            "ml-cvnets' LinearSelfAttention", module, {"": cls}, (cls._vk_layers(module).out.in_channels, 3, 5)
        )

    def forward(self, x: Tensor, x_prev: Tensor | None = None, *args: Any, patch_size: Patch | None = None, **kwargs: Any) -> Tensor:
        """The original's arguments; ``patch_size`` says that the tensor is a feature map."""
        if x_prev is not None:
            return self._vk_cross_attend(super().forward, x, x_prev, *args, **kwargs)
        return self._vk_attend(x, patch_size, super().forward)


def _conv(projection: Any) -> Any:
    """The convolution in ml-cvnets' ``ConvLayer2d``; a projection that was replaced by something else is returned as it is."""
    return getattr(getattr(projection, "block", None), "conv", projection)


class CreamAttention(CascadedAttention):
    """Cream's ``CascadedGroupAttention``. In evaluation Cream's code gathers its bias once and without gradients; here it is what the table says at
    each call, and has its gradient.
    """

    @classmethod
    def _vk_why_not(cls, module: Any, role: Role) -> str | None:
        if (reason := super()._vk_why_not(module, role)) is not None:
            return reason
        side = math.isqrt(module.attention_biases.shape[1])
        return why_not_same("Cream's CascadedGroupAttention", module, {"": cls}, (_channels(module), side, side))


class CreamWindowAttention(WindowAttention):
    """Cream's ``LocalWindowAttention``, made for maps of one size."""

    @classmethod
    def _vk_why_not(cls, module: Any, role: Role) -> str | None:
        if (reason := super()._vk_why_not(module, role)) is not None:
            return reason
        shape = (_channels(module.attn), module.resolution, module.resolution)
        return why_not_same("Cream's LocalWindowAttention", module, {"": cls, "attn": CreamAttention}, shape)

    def forward(self, x: Tensor) -> Tensor:
        """The original's argument and result, and for a map of another size its error."""
        if tuple(x.shape[2:]) != (self.resolution, self.resolution):
            fell_back(self, f"the map is not {self.resolution} x {self.resolution}")
            return super(WindowAttention, self).forward(x)
        return super().forward(x)


def _channels(attention: Any) -> int:
    return attention.proj[1].weight.shape[0] if isinstance(attention.proj[1], nn.Conv2d) else attention.proj[1][0].weight.shape[0]


_ATTRIBUTES: dict[str, tuple[type[Fused], set[str], set[str], tuple[str, ...]]] = {
    "LinearSelfAttention": (
        CvnetsAttention,
        {"qkv_proj", "attn_dropout", "out_proj"},
        {"out_dropout"},
        ("embed_dim", "qkv_proj.block", "out_proj.block"),
    ),
    "CascadedGroupAttention": (
        CreamAttention,
        {"qkvs", "dws", "proj"},
        set(),
        ("key_dim", "scale", "attention_biases", "attention_bias_idxs"),
    ),
    "LocalWindowAttention": (CreamWindowAttention, {"attn"}, set(), ("resolution", "window_resolution", "attn.attention_bias_idxs")),
    "EfficientViT": (efficientvit.AuthorsModel, {"patch_embed", "blocks1", "blocks2", "blocks3", "head"}, set(), ()),
    "ReAttention": (
        head_mixing.AuthorsAttention,
        {"qkv", "attn_drop", "proj", "proj_drop"},
        {"reatten_matrix", "var_norm"},
        ("num_heads", "scale", "apply_transform"),
    ),
    "DeepVisionTransformer": (
        head_mixing.AuthorsModel,
        {"patch_embed", "pos_drop", "blocks", "norm", "head"},
        set(),
        ("cos_reg", "cls_token", "pos_embed", "forward_features"),
    ),
}
"""Class name: the replacement, the children it has, those it may have, and the attributes."""


def match(module: nn.Module) -> type[Fused] | None:
    """The replacement for a class known by its attributes, or ``None``."""
    known = _ATTRIBUTES.get(published(type(module)).__name__)
    if known is None:
        return None
    mixin, required, optional, attributes = known
    children = module._modules.keys()
    return mixin if required <= children <= required | optional and all(_has(module, path) for path in attributes) else None


def _has(module: Any, path: str) -> bool:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module is not None
