"""timm: MobileViTv2, EfficientViT (MSRA)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from vitkernels.integrations._fused import Fused, Role
from vitkernels.integrations.cascaded_group import CascadedAttention, WindowAttention
from vitkernels.integrations.separable import Attention, Block, Layer, Layers, Patch


class TimmAttention(Attention):
    """``LinearSelfAttention``."""

    @classmethod
    def _vk_layers(cls, module: Any) -> Layers:
        own = module._modules
        return Layers(own["qkv_proj"], own["out_proj"], own["attn_drop"], own["out_drop"])

    def forward(self, x: Tensor, x_prev: Tensor | None = None, *, patch_size: Patch | None = None) -> Tensor:
        """The original's arguments; ``patch_size`` says that the tensor is a feature map."""
        if x_prev is not None:
            return self._vk_cross_attend(super().forward, x, x_prev)
        return self._vk_attend(x, patch_size, super().forward)


class TimmLayer(Layer):
    """``LinearTransformerBlock``."""

    _vk_attention: ClassVar[str] = "attn"

    def forward(self, x: Tensor, x_prev: Tensor | None = None, *, patch_size: Patch | None = None) -> Tensor:
        """The original's arguments; ``patch_size`` says that the tensor is a feature map."""
        if patch_size is None:
            return super().forward(x, x_prev)
        x = x + self.drop_path1(self.attn(self.norm1(x), patch_size=patch_size))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class TimmBlock(Block):
    """``MobileVitV2Block``."""

    _vk_containers: ClassVar[frozenset[str]] = frozenset({"torch.nn.modules.container.Sequential", "timm.layers.mlp.ConvMlp"})

    @classmethod
    def _vk_stack(cls, module: Any) -> tuple[nn.Module, Iterable[nn.Module], nn.Module]:
        return module.transformer, module.transformer._modules.values(), module.norm

    @classmethod
    def _vk_why_not(cls, module: Any, role: Role) -> str | None:
        if module.coreml_exportable:
            return "it was built for export (timm.layers.set_exportable)"
        return super()._vk_why_not(module, role)

    def forward(self, x: Tensor) -> Tensor:
        """The original's arguments and result."""
        if not self._vk_takes_map(x):
            return super().forward(x)
        (ph, pw), (height, width) = self.patch_size, x.shape[-2:]
        size = (-(-height // ph) * ph, -(-width // pw) * pw)
        if size != (height, width):
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=True)
        x = self.conv_1x1(self.conv_kxk(x))
        for layer in self.transformer:
            x = layer(x, patch_size=(ph, pw))
        return self.conv_proj(self.norm(x))


TABLE: dict[str, type[Fused]] = {
    "timm.models.mobilevit.LinearSelfAttention": TimmAttention,
    "timm.models.mobilevit.LinearTransformerBlock": TimmLayer,
    "timm.models.mobilevit.MobileVitV2Block": TimmBlock,
    "timm.models.efficientvit_msra.CascadedGroupAttention": CascadedAttention,
    "timm.models.efficientvit_msra.LocalWindowAttention": WindowAttention,
}
