"""timm: ViT, MobileViT, MobileViTv2, EfficientViT (MSRA), NaFlexVit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkernels.integrations import _tokenwise, dense, efficientvit, packed
from vitkernels.integrations._fused import Fused, Role, fell_back
from vitkernels.integrations.cascaded_group import CascadedAttention, WindowAttention
from vitkernels.integrations.head_mixing import TalkingHeads
from vitkernels.integrations.separable import Attention, Block, Layer, Layers, Patch
from vitkernels.nn import _checks
from vitkernels.ops import PackedLayout

# What of a transformer works on each token by itself.
_TRANSFORMER = frozenset(
    {
        "timm.models.vision_transformer.Block",
        *(f"timm.layers.{name}" for name in ("drop.DropPath", "layer_scale.LayerScale", "activations.GELUTanh")),
        *(f"timm.layers.mlp.{name}" for name in ("Mlp", "GluMlp", "SwiGLU")),
        *(f"timm.layers.norm.{name}" for name in ("LayerNorm", "LayerNormFp32", "RmsNorm", "SimpleNorm")),
    }
)


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
        ph, pw = patch = self.patch_size
        x = dense.resized(x, dense.whole_patches(dense.size_of(x), patch), align_corners=True)
        x = self.conv_1x1(self.conv_kxk(x))
        for layer in self.transformer:
            x = layer(x, patch_size=(ph, pw))
        return self.conv_proj(self.norm(x))


class TimmDense(dense.Attention):
    """``Attention``: of every ViT, and of MobileViT."""

    @classmethod
    def _vk_why_not_layers(cls, module: Any) -> str | None:
        # With fused_attn the original does not call its dropout either.
        return None if module.fused_attn else _checks.why_not_bypassed("attn_drop", module.attn_drop, nn.Dropout)

    @classmethod
    def _vk_dropout(cls, module: Any) -> float:
        return module.attn_drop.p

    @classmethod
    def _vk_heads(cls, module: Any) -> int:
        return module.num_heads

    @classmethod
    def _vk_projection(cls, module: Any) -> nn.Module:
        return module.qkv

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """The original's arguments and result; ``x`` may be a map [B, H/ph, ph, W/pw, pw, C]."""
        reason = "is_causal was asked for" if is_causal else None if attn_mask is None else _checks.why_not_tensor(attn_mask)
        if not self._vk_takes(x, reason=reason):
            return super().forward(x, attn_mask, is_causal)
        q, k, v = dense.split(self.qkv(x), self.num_heads, 3)
        patch = dense.patch_of(x)
        if patch is None:
            q, k = self.q_norm(q), self.k_norm(k)
        elif not isinstance(self.q_norm, nn.Identity) or not isinstance(self.k_norm, nn.Identity):
            q, k = dense.norm_heads(self.q_norm, q, self.num_heads), dense.norm_heads(self.k_norm, k, self.num_heads)
        # SDPA knows nothing of self.scale, and of the dropout its probability alone.
        fused = self.fused_attn
        drops = self.training if fused else self.attn_drop.training
        y = self._vk_attend(q, k, v, patch, self.attn_drop.p if drops else 0.0, None if fused else self.scale, attn_mask)
        y = self.norm(y)
        gate = self._modules.get("gate")
        return self.proj_drop(self.proj(y if gate is None else y * gate(x).sigmoid()))


class TimmMapBlock(dense.MapBlock):
    """``MobileVitBlock``."""

    _vk_layers: ClassVar[_tokenwise.Layers] = _tokenwise.Layers({"timm.layers.attention.Attention": TimmDense}, _TRANSFORMER)

    @classmethod
    def _vk_inside(cls, module: Any) -> tuple[nn.Module, ...]:
        return module.transformer, module.norm

    def forward(self, x: Tensor) -> Tensor:
        """The original's arguments and result."""
        if not self._vk_takes_map(x):
            return super().forward(x)
        shortcut, x = x, self.conv_1x1(self.conv_kxk(x))
        x = self.conv_proj(dense.on_map(x, self.patch_size, self.transformer, self.norm))
        return x if self.conv_fusion is None else self.conv_fusion(torch.cat((shortcut, x), dim=1))


class NaFlexAttention(packed.Part):
    """``Attention`` in a NaFlexVit."""

    _vk_whole: ClassVar[str] = "NaFlexVit"

    @classmethod
    def _vk_weight(cls, module: Any) -> Tensor:
        return module.qkv.weight

    def forward(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
        """The original's arguments; ``attn_mask`` may be the layout of tokens ``x``, [T, D] or [B, N, D]."""
        if not isinstance(attn_mask, PackedLayout):
            return super().forward(x, attn_mask, is_causal)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        q, k, v = (tokens.flatten(0, -3) for tokens in (self.q_norm(q), self.k_norm(k), v))
        y = self._vk_attend(q, k, v, attn_mask, self.attn_drop.p, scale=self.scale)
        y = self.norm(y.view(*x.shape[:-1], -1))
        gate = self._modules.get("gate")
        return self.proj_drop(self.proj(y if gate is None else y * gate(x).sigmoid()))


class NaFlex(Fused):
    """``NaFlexVit``: batches padded to one length run on their real tokens alone, and no mask [B, 1, N, N] is built.

    The features of padding, which the original computes from a uniform average over all tokens and which no pooling reads, are 0. Where a layer
    draws random numbers (dropout, stochastic depth) or somebody's hook looks at tokens, the batch stays padded, so that these find what they expect;
    then the features of padding are those of queries like any other. So it is in ``forward_intermediates``.
    """

    _vk_op: ClassVar[str] = "varlen_attention"
    _vk_layers: ClassVar[_tokenwise.Layers] = _tokenwise.Layers({"timm.layers.attention.Attention": NaFlexAttention}, _TRANSFORMER)

    @classmethod
    def _vk_why_not(cls, module: Any, role: Role) -> str | None:
        if not all(hasattr(module, name) for name in ("_forward_embeds", "num_prefix_tokens", "patch_drop", "rope")):
            return "it is of a version of timm that is not known"
        if module.rope is not None:
            return "it has rotary position embeddings"
        return cls._vk_layers.why_not((module.blocks, module.norm), running=False)

    @classmethod
    def _vk_parts(cls, module: Any) -> dict[nn.Module, type[Fused]]:
        return cls._vk_layers.parts_of((module.blocks,))

    @classmethod
    def _vk_weight(cls, module: Any) -> Tensor:
        return next(module.blocks.parameters())

    @classmethod
    def _vk_note(cls, module: Any) -> str:
        dropping = any(block.attn.attn_drop.p > 0 for block in module.blocks)
        note = "the features of padding are not the original's (which no pooling reads)"
        return f"{note}; attention dropout draws other masks, of the same probability" if dropping else note

    def _vk_why_not_packed(self, x: Any, patch_valid: Any) -> str | None:
        """Why the original has to run a call."""
        if patch_valid is None:
            return "the batch came without patch_valid"
        for tensor in (x, patch_valid):
            if (reason := _checks.why_not_tensor(tensor)) is not None:
                return reason
        if any(not isinstance(block.attn, NaFlexAttention) for block in self.blocks):
            return "an attention in its blocks is not replaced"
        return packed.why_not_here(self._vk_weight(self))

    def _vk_real(self, patch_valid: Tensor) -> Tensor:
        """Of all tokens, class and register tokens included, which are real: bool [B, N]."""
        return F.pad(patch_valid.bool(), (self.num_prefix_tokens, 0), value=True)

    def forward_features(
        self, patches: Tensor, patch_coord: Tensor | None = None, patch_valid: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Any:
        """The original's arguments and result."""
        inside = (self.blocks, self.norm)
        if (
            attn_mask is not None
            or patch_coord is None
            or self._vk_why_not_packed(patches, patch_valid) is not None
            or _tokenwise.random_in(inside, now=True)
            or self._vk_layers.why_not(inside, running=True) is not None
        ):
            return super().forward_features(patches, patch_coord, patch_valid, attn_mask)
        request = _TokensPlease()
        features = super().forward_features(patches, patch_coord, patch_valid, request)
        return {**features, "patches": request.tokens.unpack(features["patches"])}

    def _forward_embeds(self, x: Any, patch_coord: Any, patch_valid: Any, attn_mask: Any) -> dict[str, Any]:
        """The original's arguments and result, but for a layout in the place of the mask, which the original does not build where it is given one."""
        if isinstance(attn_mask, _TokensPlease):
            embeds = super()._forward_embeds(x, patch_coord, patch_valid, attn_mask)
            tokens = attn_mask.tokens = packed.real_tokens(self._vk_real(embeds["patch_valid"]))
            return {**embeds, "patches": tokens.pack(embeds["patches"]), "attn_mask": tokens.layout}
        if attn_mask is None:
            reason = self._vk_why_not_packed(x, patch_valid)
            if reason is None and self.training and self.patch_drop is not None:
                reason = "patches are dropped, and a layer has to see the padding among the others"
            if reason is None and (attn_mask := packed.padded_layout(self._vk_real(patch_valid))) is None:
                reason = "patch_valid is not true for the first patches of each image and false for the others"
            if reason is not None:
                fell_back(self, reason)
        return super()._forward_embeds(x, patch_coord, patch_valid, attn_mask)


class _TokensPlease:
    """Stands for the mask on the way to ``_forward_embeds``, which answers with the tokens."""

    tokens: packed.RealTokens


TABLE: dict[str, type[Fused]] = {
    "timm.layers.attention.Attention": TimmDense,
    "timm.models.mobilevit.MobileVitBlock": TimmMapBlock,
    "timm.models.mobilevit.LinearSelfAttention": TimmAttention,
    "timm.models.mobilevit.LinearTransformerBlock": TimmLayer,
    "timm.models.mobilevit.MobileVitV2Block": TimmBlock,
    "timm.models.efficientvit_msra.CascadedGroupAttention": CascadedAttention,
    "timm.models.efficientvit_msra.LocalWindowAttention": WindowAttention,
    "timm.models.efficientvit_msra.EfficientVitMsra": efficientvit.Model,
    "timm.models.efficientvit_msra.EfficientVitStage": efficientvit.Chain,
    "timm.models.efficientvit_msra.PatchEmbedding": efficientvit.Chain,
    "timm.models.naflexvit.NaFlexVit": NaFlex,
    "timm.models.cait.TalkingHeadAttn": TalkingHeads,
}
