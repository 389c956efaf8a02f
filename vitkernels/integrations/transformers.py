"""transformers: ViT, MobileViT, MobileViTV2, Siglip2's vision model, and DETR's family, in ``detr.py`` and ``matching.py``. What has its attention
chosen by name can have it without any swap, too: see ``attention_interface.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitkernels.integrations import _tokenwise, attention_interface, dense, detr, matching, packed
from vitkernels.integrations._fused import Fused, Role, fell_back, original_name, published, qualified
from vitkernels.integrations.folded import TRANSFORMERS_VITS
from vitkernels.integrations.separable import Attention, Block, Layer, Layers, Patch
from vitkernels.nn import _checks
from vitkernels.ops import PackedLayout

_MODELING = "transformers.models.mobilevitv2.modeling_mobilevitv2."
_V1 = "transformers.models.mobilevit.modeling_mobilevit."
_SIGLIP2 = "transformers.models.siglip2.modeling_siglip2."


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
            if original_name(layer) != _MODELING + "MobileViTV2ConvLayer" or layer.normalization is not None or layer.activation is not None:
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


class ViTAttention(attention_interface.Attention):
    """``ViTAttention`` and those of DeiT, Dinov2, CLIP and SigLIP, where they would call SDPA."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """The original's arguments and result."""
        reason = attention_interface.why_not(self, hidden_states, hidden_states, attention_mask, **kwargs)
        if not self._vk_takes(hidden_states, reason=reason):
            return super().forward(hidden_states, attention_mask, **kwargs)
        return self._vk_attend_chosen(hidden_states, hidden_states, hidden_states, attention_mask), None


class MobileViTAttention(dense.Attention):
    """``MobileViTSelfAttention``, whose maps are formed."""

    _vk_forms_maps: ClassVar[bool] = True

    @classmethod
    def _vk_why_not_layers(cls, module: Any) -> str | None:
        return _checks.why_not_bypassed("dropout", module.dropout, nn.Dropout)

    @classmethod
    def _vk_dropout(cls, module: Any) -> float:
        return module.dropout.p

    @classmethod
    def _vk_heads(cls, module: Any) -> int:
        return module.num_attention_heads

    @classmethod
    def _vk_projection(cls, module: Any) -> nn.Module:
        return module.query

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The original's argument and result; it may be a map [B, H/ph, ph, W/pw, pw, C]."""
        if not self._vk_takes(hidden_states):
            return super().forward(hidden_states)
        q, k, v = (dense.split(projection(hidden_states), self.num_attention_heads)[0] for projection in (self.query, self.key, self.value))
        dropout = self.dropout.p if self.dropout.training else 0.0
        return self._vk_attend(q, k, v, dense.patch_of(hidden_states), dropout, None)


class MobileViTBlock(dense.MapBlock):
    """``MobileViTLayer``, a GradientCheckpointingLayer: which wraps this forward as it wraps the original."""

    _vk_layers: ClassVar[_tokenwise.Layers] = _tokenwise.Layers(
        {_V1 + "MobileViTSelfAttention": MobileViTAttention},
        {
            *(f"{_V1}MobileViT{name}" for name in ("Transformer", "TransformerLayer", "Attention", "SelfOutput", "Intermediate", "Output")),
            *(f"transformers.activations.{name}Activation" for name in ("SiLU", "GELU")),
        },
    )

    @classmethod
    def _vk_inside(cls, module: Any) -> tuple[nn.Module, ...]:
        return module.transformer, module.layernorm

    def forward(self, features: Tensor) -> Tensor:
        """The original's argument and result."""
        if not self._vk_takes_map(features):
            return super().forward(features)
        if self.downsampling_layer:
            features = self.downsampling_layer(features)
        found = self.conv_1x1(self.conv_kxk(features))
        found = dense.on_map(found, (self.patch_height, self.patch_width), self.transformer, self.layernorm)
        return self.fusion(torch.cat((features, self.conv_projection(found)), dim=1))


class Siglip2Attention(packed.Part):
    """``Siglip2Attention`` in a vision model."""

    _vk_whole: ClassVar[str] = "Siglip2VisionModel"

    @classmethod
    def _vk_weight(cls, module: Any) -> Tensor:
        return module.q_proj.weight

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """The original's arguments; ``attention_mask`` may be the layout of tokens, [T, D] or [B, N, D]."""
        if not isinstance(attention_mask, PackedLayout):
            return super().forward(hidden_states, attention_mask, **kwargs)
        q, k, v = (
            projection(hidden_states).unflatten(-1, (self.num_heads, -1)).flatten(0, -3) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = self._vk_attend(q, k, v, attention_mask, self.dropout, scale=self.scale)
        return self.out_proj(y.view(hidden_states.shape)), None


class Siglip2Encoder(packed.Part):
    """``Siglip2Encoder`` in a vision model: makes a layout of the mask of keys [B, 1, 1, N], and runs on the real tokens alone."""

    _vk_whole: ClassVar[str] = "Siglip2VisionModel"

    @classmethod
    def _vk_weight(cls, module: Any) -> Tensor:
        return next(module.parameters())

    def forward(self, inputs_embeds: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        """The original's arguments and result."""
        if attention_mask is None or attention_mask.dim() != 4 or attention_mask.shape[1:3] != (1, 1):
            return super().forward(inputs_embeds, attention_mask, **kwargs)  # the model has said why
        if (reason := _checks.why_not_tensor(inputs_embeds)) is not None:
            fell_back(self, reason)
            return super().forward(inputs_embeds, attention_mask, **kwargs)
        real = attention_mask[:, 0, 0]
        if _SIGLIP2_LAYERS.why_not((self.layers,), running=True) is None:
            tokens = packed.real_tokens(real)
            output = super().forward(tokens.pack(inputs_embeds), tokens.layout, **kwargs)
            output.last_hidden_state = tokens.unpack(output.last_hidden_state)
            return output
        # Somebody's hook waits for [B, N, D], for one that of output_hidden_states.
        layout = packed.padded_layout(real)
        replaced = all(isinstance(layer.self_attn, Siglip2Attention) for layer in self.layers)
        if layout is None or not replaced:
            fell_back(self, "the mask is not true for the first patches of each image alone" if replaced else "an attention is not replaced")
            return super().forward(inputs_embeds, attention_mask, **kwargs)
        return super().forward(inputs_embeds, layout, **kwargs)


class Siglip2Vision(Fused):
    """``Siglip2VisionModel``: batches padded to one length run on their real patches alone, and no mask [B, 1, N, N] is built.

    In ``last_hidden_state``, padding is the final norm of 0; the original has there what a query of padding sees. No pooling reads it.
    """

    _vk_op: ClassVar[str] = "varlen_attention"
    # transformers looks up by the class's name what of a model can be recorded, and writes it into the configs it saves.
    _vk_same_name: ClassVar[bool] = True

    @classmethod
    def _vk_why_not(cls, module: Any, role: Role) -> str | None:
        encoder = module._modules.get("encoder")
        if qualified(published(type(encoder))) != _SIGLIP2 + "Siglip2Encoder":
            return f"its encoder is a {type(encoder).__name__}, not a Siglip2Encoder"
        return cls._vk_why_not_now(module) or _SIGLIP2_LAYERS.why_not((module.encoder,), running=False)

    @classmethod
    def _vk_why_not_now(cls, module: Any) -> str | None:
        chosen = module.config._attn_implementation
        if chosen != "sdpa":
            return f"its attention implementation is {chosen!r}, not 'sdpa'"
        return "output_attentions is set in its config" if getattr(module.config, "output_attentions", False) else None

    @classmethod
    def _vk_parts(cls, module: Any) -> dict[nn.Module, type[Fused]]:
        return _SIGLIP2_LAYERS.parts_of((module.encoder,))

    @classmethod
    def _vk_weight(cls, module: Any) -> Tensor:
        return module.embeddings.patch_embedding.weight

    @classmethod
    def _vk_note(cls, module: Any) -> str:
        note = "last_hidden_state of padding is not the original's (which no pooling reads)"
        return f"{note}; attention dropout draws other masks, of the same probability" if module.config.attention_dropout > 0 else note

    def forward(self, pixel_values: Tensor, pixel_attention_mask: Tensor, spatial_shapes: Tensor, **kwargs: Any) -> Any:
        """The original's arguments and result."""
        reason = self._vk_why_not_now(self)
        if kwargs.get("output_attentions"):
            reason = "output_attentions was asked for"
        elif not isinstance(pixel_attention_mask, Tensor) or pixel_attention_mask.dim() != 2:
            reason = "there is no mask [B, N]"
        reason = reason or _checks.why_not_tensor(pixel_values) or packed.why_not_here(self._vk_weight(self))
        if reason is not None:
            fell_back(self, reason)
        else:
            # As a mask of keys, which transformers passes on as it is. To a layer that is not replaced it is the same: all queries see the same keys.
            pixel_attention_mask = pixel_attention_mask[:, None, None, :].bool()
        return super().forward(pixel_values, pixel_attention_mask, spatial_shapes, **kwargs)


_SIGLIP2_LAYERS = _tokenwise.Layers(
    {_SIGLIP2 + "Siglip2Encoder": Siglip2Encoder, _SIGLIP2 + "Siglip2Attention": Siglip2Attention},
    {_SIGLIP2 + "Siglip2EncoderLayer", _SIGLIP2 + "Siglip2MLP", *(f"transformers.activations.{name}" for name in ("GELUTanh", "GELUActivation"))},
)


TABLE: dict[str, type[Fused]] = {
    **{f"{name}Attention": ViTAttention for name in TRANSFORMERS_VITS},
    _V1 + "MobileViTSelfAttention": MobileViTAttention,
    _V1 + "MobileViTLayer": MobileViTBlock,
    _MODELING + "MobileViTV2LinearSelfAttention": TransformersAttention,
    _MODELING + "MobileViTV2TransformerLayer": TransformersLayer,
    _MODELING + "MobileViTV2Layer": TransformersBlock,
    _SIGLIP2 + "Siglip2VisionModel": Siglip2Vision,
    _SIGLIP2 + "Siglip2Attention": Siglip2Attention,
    **detr.TABLE,
    **matching.TABLE,
}
