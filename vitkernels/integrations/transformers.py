"""transformers: MobileViTV2."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor, nn

from vitkernels.integrations._fused import Fused, qualified
from vitkernels.integrations.separable import Attention, Block, Layer, Layers, Patch
from vitkernels.nn import _checks

_MODELING = "transformers.models.mobilevitv2.modeling_mobilevitv2."


class TransformersAttention(Attention):
    """``MobileViTV2LinearSelfAttention``."""

    @classmethod
    def _vk_layers(cls, module: Any) -> Layers:
        own = module._modules
        qkv, out = own["qkv_proj"], own["out_proj"]
        return Layers(qkv._modules.get("convolution", qkv), out._modules.get("convolution", out), own["attn_dropout"], None)

    @classmethod
    def _vk_why_not_layers(cls, module: Any, layers: Layers) -> str | None:
        for name in ("qkv_proj", "out_proj"):
            layer = module._modules[name]
            if qualified(type(layer)) != _MODELING + "MobileViTV2ConvLayer" or layer.normalization is not None or layer.activation is not None:
                return f"{name} is not a MobileViTV2ConvLayer without normalization and activation"
            if _checks.hooked(layer):
                return f"{name} {_checks.HOOKED}"
        return super()._vk_why_not_layers(module, layers)

    def forward(self, hidden_states: Tensor, *, patch_size: Patch | None = None) -> Tensor:
        """The original's arguments; ``patch_size`` says that the tensor is a feature map."""
        return self._vk_attend(hidden_states, patch_size, super().forward)


class TransformersLayer(Layer):
    """``MobileViTV2TransformerLayer``."""

    _vk_attention: ClassVar[str] = "attention"

    def forward(self, hidden_states: Tensor, *, patch_size: Patch | None = None) -> Tensor:
        """The original's arguments; ``patch_size`` says that the tensor is a feature map."""
        if patch_size is None:
            return super().forward(hidden_states)
        hidden_states = self.attention(self.layernorm_before(hidden_states), patch_size=patch_size) + hidden_states
        return self.ffn(self.layernorm_after(hidden_states)) + hidden_states


class TransformersBlock(Block):
    """``MobileViTV2Layer``, a GradientCheckpointingLayer: which wraps this forward as it wraps the original."""

    _vk_containers: ClassVar[frozenset[str]] = frozenset(
        {_MODELING + "MobileViTV2Transformer", _MODELING + "MobileViTV2FFN", _MODELING + "MobileViTV2ConvLayer"}
    )

    @classmethod
    def _vk_stack(cls, module: Any) -> tuple[nn.Module, Iterable[nn.Module], nn.Module]:
        return module.transformer, module.transformer.layer._modules.values(), module.layernorm

    def forward(self, features: Tensor) -> Tensor:
        """The original's arguments and result."""
        if not self._vk_takes_map(features):
            return super().forward(features)
        if self.downsampling_layer:
            features = self.downsampling_layer(features)
        features = self.conv_1x1(self.conv_kxk(features))
        patch = (self.patch_height, self.patch_width)
        if features.shape[2] % patch[0] == 0 and features.shape[3] % patch[1] == 0:
            for layer in self.transformer.layer:
                features = layer(features, patch_size=patch)
            features = self.layernorm(features)
        else:
            # The original drops the rows and columns that fill no patch, and gives them back as zeros.
            patches, size = self.unfolding(features)
            features = self.folding(self.layernorm(self.transformer(patches)), size)
        return self.conv_projection(features)


TABLE: dict[str, type[Fused]] = {
    _MODELING + "MobileViTV2LinearSelfAttention": TransformersAttention,
    _MODELING + "MobileViTV2TransformerLayer": TransformersLayer,
    _MODELING + "MobileViTV2Layer": TransformersBlock,
}
