"""MobileViT's blocks, of both versions, as wholes in evaluation: from the local convolution to the last one the map stays in channels_last.

    v1   x -> conv -> conv -> (norm, attention, sum; norm, MLP, sum) ... -> norm and conv -> conv of it beside x
    v2   x -> depthwise conv -> conv -> (norm, separable attention, sum; norm, FFN, sum) ... -> norm and conv

Each bracket's part is one native call or, of softmax attention, three. Nothing is unfolded: attention finds the pixels of a group by their addresses,
all else works on each pixel by itself, and GroupNorm's sums are over all of them in any order.

A whole stands in front of the replacement that runs the block's layers one by one, which takes the calls that are not for it: with gradients, under
autocast, in another dtype, with a hook inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from vitkernels.integrations import blocks, timm, transformers, vit_pytorch
from vitkernels.integrations._fused import Fused, original_name
from vitkernels.integrations.convolutions import InvertedResidual, sequences
from vitkernels.integrations.dense import resized, size_of, whole_patches
from vitkernels.integrations.folded import (
    Evaluated,
    Plan,
    Run,
    activation_of,
    conv_layer,
    conv_sequence,
    no_change,
    of_linears,
    plain,
    plan_of,
    token_norm,
)
from vitkernels.nn._folded import Bottleneck, Layer, SeparableAttention, SideBySide, UnfitError, bottleneck, single

Patch = tuple[int, int]
Bind = Callable[[torch.dtype], Any]


class Whole(Evaluated):
    """Base of the wholes."""

    def _vk_left(self, reason: str) -> None:
        """The layers one by one are no fall-back to report; what makes them the original does so itself."""

    @classmethod
    def _vk_note(cls, module: Any) -> str:
        reason = None if cls._vk_weight(module).is_cuda else plan_of(cls, module)
        left = f"runs its layers one by one: {reason}" if isinstance(reason, str) else ""
        return "; ".join(filter(None, (super()._vk_note(module), left)))


def _known(module: Any, name: str) -> Any:
    """``module``, of the class of this name.

    Raises:
        UnfitError: it is of another.
    """
    if original_name(module) != name:
        raise UnfitError(f"a {type(module).__name__} stands where a {name.rpartition('.')[2]} should")
    return module


def _local(conv: Layer, reduce: Layer) -> list[Bind]:
    """The convolutions in front of a transformer: in one call if the first is depthwise."""
    if conv.depthwise:
        return [bottleneck(reduce, depthwise=conv).bind]
    return [single(conv).bind, single(reduce).bind]


# --- MobileViTv2 ---------------------------------------------------------------------------------------------------------------------


class SeparableLayer(NamedTuple):
    """A transformer layer: both halves with their norm and their sum."""

    attention: SeparableAttention
    mlp: Bottleneck


class Separable(NamedTuple):
    """What a block is made of."""

    before: Sequence[Bind]
    layers: list[SeparableLayer]
    project: Bottleneck
    patch: Patch
    resizes: bool
    """A map that has a part of a patch at its edge; else the block does something else with it."""

    def bind(self, dtype: torch.dtype) -> Run:
        """The block, its weights packed for activations of ``dtype``."""
        before, project, patch = [bind(dtype) for bind in self.before], self.project.bind(dtype), self.patch
        layers = [(layer.attention.bind(dtype), layer.mlp.bind(dtype)) for layer in self.layers]

        def run(x: Tensor) -> Tensor | None:
            if x.numel() == 0:
                return None
            if self.resizes:
                x = resized(x, whole_patches(size_of(x), patch), align_corners=True)
            for one in before:
                x = one(x)
            if whole_patches(size_of(x), patch) != size_of(x):
                return None
            for attention, mlp in layers:
                x = attention(x, patch)
                x = mlp(x, x)
            return project(x)

        return run


def _sample_norm(module: Any) -> nn.GroupNorm:
    """A GroupNorm of one group."""
    if original_name(module) not in ("torch.nn.modules.normalization.GroupNorm", "timm.layers.norm.GroupNorm1", "timm.layers.norm.GroupNorm"):
        raise UnfitError(f"its norm is a {type(module).__name__}")
    return module


def _separable(kind: Any, attention: Any, norm: Any) -> SeparableAttention:
    """``kind`` is the replacement of the class of ``attention``, and knows its layers."""
    layers = kind._vk_layers(attention)
    if (reason := kind._vk_why_not_layers(attention, layers)) is not None:
        raise UnfitError(reason)
    no_change(layers.out_dropout)
    return SeparableAttention(_sample_norm(norm), Layer(layers.qkv), Layer(layers.out))


class TimmSeparable(Whole, timm.TimmBlock):
    """``MobileVitV2Block``."""

    @classmethod
    def _vk_settings(cls, module: Any) -> Any:
        return module.patch_size

    @classmethod
    def _vk_plan(cls, module: Any) -> Plan:
        layers = [cls._vk_layer(layer) for layer in plain(module.transformer, nn.Sequential)]
        before = _local(conv_layer(module.conv_kxk), conv_layer(module.conv_1x1))
        project = bottleneck(conv_layer(module.conv_proj), norm=_sample_norm(module.norm))
        return of_linears(Separable(before, layers, project, module.patch_size, resizes=True).bind)

    @classmethod
    def _vk_layer(cls, layer: Any) -> SeparableLayer:
        _known(layer, "timm.models.mobilevit.LinearTransformerBlock")
        attention, mlp = _known(layer.attn, "timm.models.mobilevit.LinearSelfAttention"), _known(layer.mlp, "timm.layers.mlp.ConvMlp")
        no_change(layer.drop_path1, layer.drop_path2, mlp.norm, mlp.drop)
        expand, project = Layer(plain(mlp.fc1, nn.Conv2d), activation=activation_of(mlp.act)), Layer(plain(mlp.fc2, nn.Conv2d))
        return SeparableLayer(
            _separable(timm.TimmAttention, attention, layer.norm1), bottleneck(project, expand=expand, norm=_sample_norm(layer.norm2))
        )


class TransformersSeparable(Whole, transformers.TransformersBlock):
    """``MobileViTV2Layer``."""

    @classmethod
    def _vk_settings(cls, module: Any) -> Any:
        return module.patch_height, module.patch_width, module.downsampling_layer and module.downsampling_layer.use_residual

    @classmethod
    def _vk_plan(cls, module: Any) -> Plan:
        layers = [cls._vk_layer(layer) for layer in plain(_known(module.transformer, f"{_V2}Transformer").layer, nn.ModuleList)]
        before = [*_downsampling(module, _V2), *_local(conv_layer(module.conv_kxk), conv_layer(module.conv_1x1))]
        project = bottleneck(conv_layer(module.conv_projection), norm=_sample_norm(module.layernorm))
        return of_linears(Separable(before, layers, project, (module.patch_height, module.patch_width), resizes=False).bind)

    @classmethod
    def _vk_layer(cls, layer: Any) -> SeparableLayer:
        _known(layer, f"{_V2}TransformerLayer")
        attention, ffn = _known(layer.attention, f"{_V2}LinearSelfAttention"), _known(layer.ffn, f"{_V2}FFN")
        no_change(ffn.dropout1, ffn.dropout2)
        mlp = bottleneck(conv_layer(ffn.conv2), expand=conv_layer(ffn.conv1), norm=_sample_norm(layer.layernorm_after))
        return SeparableLayer(_separable(transformers.TransformersAttention, attention, layer.layernorm_before), mlp)


_V1, _V2 = (f"transformers.models.{name}" for name in ("mobilevit.modeling_mobilevit.MobileViT", "mobilevitv2.modeling_mobilevitv2.MobileViTV2"))


def _downsampling(module: Any, zoo: str) -> list[Bind]:
    """The inverted residual that a block of transformers may begin with."""
    layer = module.downsampling_layer
    return [] if layer is None else [InvertedResidual._vk_plan(_known(layer, f"{zoo}InvertedResidual")).bind]


# --- MobileViT -----------------------------------------------------------------------------------------------------------------------


class Dense(NamedTuple):
    """What a block is made of."""

    first: Sequence[Bind]
    """What comes before the map that is joined with the result."""
    before: Sequence[Bind]
    layers: list[blocks.Block]
    norm: nn.LayerNorm | None
    project: Layer
    fusion: Layer | None
    patch: Patch
    resizes: bool = True
    """A map that has a part of a patch at its edge; else it is refused."""
    joined_last: bool = False
    """Whether the block's own map is behind the result, not in front of it."""

    def bind(self, dtype: torch.dtype) -> Run:
        """The block, its weights packed for activations of ``dtype``."""
        first, before = ([bind(dtype) for bind in binds] for binds in (self.first, self.before))
        layers, patch = blocks.bind(self.layers, dtype), self.patch
        project = bottleneck(self.project, norm=self.norm).bind(dtype)
        project_alone = bottleneck(self.project).bind(dtype)  # the norm of a map that is resized comes before
        fusion = None if self.fusion is None else single(self.fusion).bind(dtype)

        def run(x: Tensor) -> Tensor | None:
            if x.numel() == 0:
                return None
            for one in first:
                x = one(x)
            y = x
            for one in before:
                y = one(y)
            outer = size_of(y)
            inner = whole_patches(outer, patch)
            if inner != outer and not self.resizes:
                return None
            y = resized(y, inner)
            y = layers(y, patch)
            if inner == outer:
                y = project(y)
            else:
                y = y if self.norm is None else self.norm(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
                y = project_alone(resized(y, outer))
            if fusion is None:
                return y
            return fusion(torch.cat((y, x) if self.joined_last else (x, y), 1))

        return run


class TimmDense(Whole, timm.TimmMapBlock):
    """``MobileVitBlock``."""

    _vk_absorbs: ClassVar[tuple[type[Fused], ...]] = (blocks.TimmBlocks,)

    @classmethod
    def _vk_settings(cls, module: Any) -> Any:
        return module.patch_size, [blocks.TimmBlock._vk_settings(layer) for layer in module.transformer]

    @classmethod
    def _vk_plan(cls, module: Any) -> Plan:
        layers = [
            blocks.TimmBlock._vk_block(_known(layer, "timm.models.vision_transformer.Block")) for layer in plain(module.transformer, nn.Sequential)
        ]
        before = _local(conv_layer(module.conv_kxk), conv_layer(module.conv_1x1))
        fusion = None if module.conv_fusion is None else conv_layer(module.conv_fusion)
        whole = Dense([], before, layers, token_norm(module.norm), conv_layer(module.conv_proj), fusion, module.patch_size)
        return of_linears(whole.bind)


class TransformersDense(Whole, transformers.MobileViTBlock):
    """``MobileViTLayer``."""

    @classmethod
    def _vk_settings(cls, module: Any) -> Any:
        heads = [layer.attention.attention.num_attention_heads for layer in module.transformer.layer]
        return module.patch_height, module.patch_width, module.downsampling_layer and module.downsampling_layer.use_residual, heads

    @classmethod
    def _vk_plan(cls, module: Any) -> Plan:
        layers = [cls._vk_block(layer) for layer in plain(_known(module.transformer, f"{_V1}Transformer").layer, nn.ModuleList)]
        before = _local(conv_layer(module.conv_kxk), conv_layer(module.conv_1x1))
        project, fusion, patch = conv_layer(module.conv_projection), conv_layer(module.fusion), (module.patch_height, module.patch_width)
        return of_linears(Dense(_downsampling(module, _V1), before, layers, token_norm(module.layernorm), project, fusion, patch).bind)

    @classmethod
    def _vk_block(cls, layer: Any) -> blocks.Block:
        around = _known(_known(layer, f"{_V1}TransformerLayer").attention, f"{_V1}Attention")
        attention, project = _known(around.attention, f"{_V1}SelfAttention"), _known(around.output, f"{_V1}SelfOutput")
        first, second = _known(layer.intermediate, f"{_V1}Intermediate"), _known(layer.output, f"{_V1}Output")
        no_change(attention.dropout, project.dropout, second.dropout)
        inputs = tuple(Layer(plain(linear, nn.Linear)) for linear in (attention.query, attention.key, attention.value))
        return blocks.Block(
            bottleneck(SideBySide(inputs), norm=token_norm(layer.layernorm_before)),
            blocks.softmax(attention.num_attention_heads, None),
            bottleneck(Layer(plain(project.dense, nn.Linear))),
            bottleneck(
                Layer(plain(second.dense, nn.Linear)),
                expand=Layer(plain(first.dense, nn.Linear), activation=activation_of(first.intermediate_act_fn)),
                norm=token_norm(layer.layernorm_after),
            ),
        )


class VitPytorchDense(Whole, vit_pytorch.MapBlock):
    """``mobile_vit.MobileViTBlock``, which has no norm behind its transformer."""

    @classmethod
    def _vk_parts(cls, module: Any) -> dict[nn.Module, type[Fused]]:
        return {**super()._vk_parts(module), **sequences(module.conv1, module.conv2, module.conv3, module.conv4)}

    @classmethod
    def _vk_settings(cls, module: Any) -> Any:
        return module.ph, module.pw, blocks.VitPytorchTransformer._vk_settings(module.transformer)

    @classmethod
    def _vk_plan(cls, module: Any) -> Plan:
        pairs: Any = plain(_known(module.transformer, "vit_pytorch.mobile_vit.Transformer").layers, nn.ModuleList)
        layers = [blocks.VitPytorchTransformer._vk_block(attention, feed_forward) for attention, feed_forward in pairs]
        convolutions = [conv_sequence(one) for one in (module.conv1, module.conv2, module.conv3, module.conv4)]
        if any(len(found) != 1 for found in convolutions):
            raise UnfitError("its convolutions are of another number")
        local, reduce, project, fusion = (found[0] for found in convolutions)
        return of_linears(
            Dense([], _local(local, reduce), layers, None, project, fusion, (module.ph, module.pw), resizes=False, joined_last=True).bind
        )


TABLE: dict[str, type[Fused]] = {
    "timm.models.mobilevit.MobileVitV2Block": TimmSeparable,
    f"{_V2}Layer": TransformersSeparable,
    "timm.models.mobilevit.MobileVitBlock": TimmDense,
    f"{_V1}Layer": TransformersDense,
    "vit_pytorch.mobile_vit.MobileViTBlock": VitPytorchDense,
}
