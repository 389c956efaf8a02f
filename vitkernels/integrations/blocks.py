"""Transformer blocks of ViT, DeepViT and MobileViT in evaluation, four native calls each.

    qkv = project_in(norm(x))            the packed projection
    y   = attend(q, k, v)                views of it, read where they lie
    x   = x + project_out(y)             LayerScale folded into the weight
    x   = x + mlp(norm(x))               likewise

Tokens are the pixels of a map in channels_last, [B, C, 1, N], or those of MobileViT's feature map. Nothing is copied between the calls. The attention
and the MLP inside keep their own replacements, for calls that the original of the block has to make.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.integrations import attention_interface, dense
from vitkernels.integrations._fused import Fused, Role, original_name
from vitkernels.integrations.dense import Patch
from vitkernels.integrations.folded import TRANSFORMERS_VITS, Folded, Plan, Run, left_to_pytorch, mlp_layers, no_change, plain, token_norm
from vitkernels.integrations.head_mixing import VitPytorchAttention
from vitkernels.integrations.vit_pytorch import PlainAttention, SequencesAttention
from vitkernels.nn._folded import Bottleneck, Layer, SideBySide, UnfitError, bottleneck, one_by_one
from vitkernels.nn.head_mixing import join

Attend = Callable[[Tensor, Patch], Tensor]
"""The packed projection, a map [B, 3 H D, H', W'], and the patch if it is MobileViT's map: to a map [B, H D, H', W']."""


class Block(NamedTuple):
    """What a pre-norm transformer block is made of."""

    project_in: Bottleneck
    attend: Callable[[], Attend]
    project_out: Bottleneck
    mlp: Bottleneck

    @property
    def scaled(self) -> bool:
        """Whether a LayerScale is folded into its weights."""
        return any(one.project.scale is not None for one in (self.project_out, self.mlp) if isinstance(one.project, Layer))

    def bind(self, dtype: torch.dtype) -> Callable[[Tensor, Patch], Tensor]:
        """The block of maps in channels_last memory, its weights packed for activations of ``dtype``."""
        project_in, project_out, mlp = (one.bind(dtype) for one in (self.project_in, self.project_out, self.mlp))
        attend = self.attend()

        def run(x: Tensor, patch: Patch) -> Tensor:
            x = project_out(attend(project_in(x), patch), x)
            return mlp(x, x)

        return run


def _heads(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """q, k and v, [B, H, N, D] each, of the packed projection of tokens [B, 3 H D, 1, N]."""
    return dense.split(qkv.squeeze(2).mT, heads, 3)


def _joined(out: Tensor) -> Tensor:
    """[B, H, N, D] as a map [B, H D, 1, N]."""
    return join(out).mT.unsqueeze(2)


def softmax(heads: int, scale: float | None, q_norm: Any = None, k_norm: Any = None) -> Callable[[], Attend]:
    """Attention as of every ViT; the norms are over each head's channels."""

    def attend(qkv: Tensor, patch: Patch) -> Tensor:
        if patch is not None:
            q, k, v = qkv.chunk(3, 1)
            if q_norm is not None:
                q, k = dense.norm_heads(q_norm, q, heads), dense.norm_heads(k_norm, k, heads)
            return ops.patch_attention(q, k, v, patch=patch, num_heads=heads, scale=scale)
        q, k, v = _heads(qkv, heads)
        if q_norm is not None:
            q, k = q_norm(q), k_norm(k)
        out = ops.attention(q, k, v, scale=scale)
        assert isinstance(out, Tensor)
        return _joined(out)

    return lambda: attend


def mixing(heads: int, scale: float, weight: Tensor, norm: nn.LayerNorm) -> Callable[[], Attend]:
    """Re-Attention; ``weight`` is [in, out], as vit_pytorch stores it."""

    def bind() -> Attend:
        # In float64, as the op wants them: not converted at each call.
        mix, gamma, beta = (None if t is None else t.detach().double().contiguous() for t in (weight.t(), norm.weight, norm.bias))
        assert mix is not None

        def attend(qkv: Tensor, patch: Patch) -> Tensor:
            q, k, v = _heads(qkv, heads)
            out = ops.re_attention(q, k, v, mix, norm="layer", norm_weight=gamma, norm_bias=beta, eps=norm.eps, scale=scale)
            assert isinstance(out, Tensor)
            return _joined(out)

        return attend

    return bind


class _OfTokens(Folded):
    """What takes tokens [B, N, C]."""

    _vk_dims: ClassVar[range] = range(3, 4)

    def _vk_folded(self, x: Any) -> Tensor | None:
        return None if one_by_one() else super()._vk_folded(x)

    @classmethod
    def _vk_why_not(cls, module: Any, role: Role) -> str | None:
        return super()._vk_why_not(module, role) or left_to_pytorch(cls._vk_weight(module).dtype)


def _plan(*blocks: Block, last: Callable[[Tensor], Tensor] | None = None) -> Plan:
    """Blocks one after the other, on tokens [B, N, C] or on a map [B, H/ph, ph, W/pw, pw, C]; ``last`` sees the tokens behind them."""

    def bind(dtype: torch.dtype) -> Run | str:
        if (reason := left_to_pytorch(dtype)) is not None:
            return reason
        if dtype is torch.bfloat16 and any(block.scaled for block in blocks):
            return "its weights times its LayerScale are no bfloat16 numbers, and linear layers in float32 arithmetic are left to PyTorch"
        runs, channels = [block.bind(dtype) for block in blocks], blocks[0].project_in.channels

        def run(x: Tensor) -> Tensor | None:
            if x.shape[-1] != channels:
                return None
            patch = dense.patch_of(x)
            y = x.contiguous().mT.unsqueeze(2) if patch is None else dense.as_map(x)
            for block in runs:
                y = block(y, patch)
            y = y.squeeze(2).mT if patch is None else dense.as_tokens(y, patch)
            return y if last is None else last(y)

        return run

    return Plan(bind)


# --- timm ----------------------------------------------------------------------------------------------------------------------------


class TimmBlock(_OfTokens):
    """``vision_transformer.Block``: of every plain ViT, and of MobileViT, which hands it a map of six dimensions."""

    _vk_dims: ClassVar[range] = range(3, 7, 3)

    @classmethod
    def _vk_settings(cls, module: Any) -> Any:
        attention = module.attn
        return [attention.__dict__.get(name) for name in ("num_heads", "scale", "fused_attn")]

    @classmethod
    def _vk_plan(cls, module: Any) -> Plan:
        return _plan(cls._vk_block(module))

    @classmethod
    def _vk_block(cls, module: Any) -> Block:
        attention = module.attn
        if original_name(attention) != "timm.layers.attention.Attention":
            raise UnfitError(f"its attention is a {type(attention).__name__}")
        if attention._modules.get("gate") is not None:
            raise UnfitError("its attention has a gate")
        no_change(module.drop_path1, module.drop_path2, attention.attn_drop, attention.proj_drop)
        q_norm, k_norm, norm = (None if type(norm) is nn.Identity else norm for norm in (attention.q_norm, attention.k_norm, attention.norm))
        if (q_norm is None) != (k_norm is None):
            raise UnfitError("of its queries and keys only one has a norm")
        return Block(
            bottleneck(_linear(attention.qkv), norm=token_norm(module.norm1)),
            softmax(attention.num_heads, None if attention.fused_attn else attention.scale, q_norm, k_norm),
            bottleneck(_linear(attention.proj, _scale(module.ls1)), norm=None if norm is None else token_norm(norm)),
            mlp_layers(module.mlp, module.norm2, _scale(module.ls2)),
        )


def _linear(module: Any, scale: Tensor | None = None) -> Layer:
    return Layer(plain(module, nn.Linear), scale=scale)


def _scale(module: Any) -> Tensor | None:
    """The factors of a LayerScale, or of nothing None."""
    if type(module) is nn.Identity:
        return None
    if original_name(module) not in _LAYER_SCALES:
        raise UnfitError(f"it has a {type(module).__name__} in between")
    return getattr(module, _LAYER_SCALES[original_name(module)])


_LAYER_SCALES = {"timm.layers.layer_scale.LayerScale": "gamma", "transformers.models.dinov2.modeling_dinov2.Dinov2LayerScale": "lambda1"}


# --- vit_pytorch ---------------------------------------------------------------------------------------------------------------------


class VitPytorchTransformer(_OfTokens):
    """``Transformer`` of ``vit``, ``simple_vit`` and ``deepvit``: all of its blocks, whose norms are inside of attention and MLP."""

    @classmethod
    def _vk_settings(cls, module: Any) -> Any:
        return [(own["heads"], own["scale"]) for own in (attention.__dict__ for attention, _ in module.layers)]

    @classmethod
    def _vk_plan(cls, module: Any) -> Plan:
        layers: Any = plain(module.layers, nn.ModuleList)
        blocks = [cls._vk_block(attention, feed_forward) for attention, feed_forward in layers]
        if not blocks:
            raise UnfitError("it has no layers")
        return _plan(*blocks, last=module._modules.get("norm"))

    @classmethod
    def _vk_block(cls, attention: Any, feed_forward: Any) -> Block:
        kind = original_name(attention)
        if kind not in _VIT_PYTORCH:
            raise UnfitError(f"its attention is a {type(attention).__name__}")
        if (reason := _VIT_PYTORCH[kind]._vk_why_not_layers(attention)) is not None:
            raise UnfitError(reason)
        out = attention.to_out
        if type(out) is nn.Sequential:
            out, *others = out
            no_change(*others)
        heads, scale = attention.heads, attention.scale
        if _VIT_PYTORCH[kind] is VitPytorchAttention:
            attend = mixing(heads, scale, attention.reattn_weights, attention.reattn_norm[1])
        else:
            attend = softmax(heads, scale)
        project_in, project_out = bottleneck(_linear(attention.to_qkv), norm=token_norm(attention.norm)), bottleneck(_linear(out))
        return Block(project_in, attend, project_out, mlp_layers(feed_forward))


_VIT_PYTORCH: dict[str, Any] = {
    "vit_pytorch.vit.Attention": PlainAttention,
    "vit_pytorch.simple_vit.Attention": PlainAttention,
    "vit_pytorch.deepvit.Attention": VitPytorchAttention,
    "vit_pytorch.mobile_vit.Attention": SequencesAttention,
}


# --- transformers --------------------------------------------------------------------------------------------------------------------


class TransformersBlock(_OfTokens):
    """``ViTLayer``, ``DeiTLayer`` and ``Dinov2Layer``, where they would call SDPA."""

    @classmethod
    def _vk_settings(cls, module: Any) -> Any:
        attention = module.attention
        return attention.config._attn_implementation, attention.head_dim, attention.scaling, attention.is_causal

    @classmethod
    def _vk_plan(cls, module: Any) -> Plan:
        attention, own = module.attention, module._modules
        if original_name(attention) != original_name(module).replace("Layer", "Attention"):
            raise UnfitError(f"its attention is a {type(attention).__name__}")
        if (chosen := attention.config._attn_implementation) not in ("sdpa", attention_interface.NAME):
            raise UnfitError(f"its attention implementation is {chosen!r}, not 'sdpa'")
        if attention.is_causal:
            raise UnfitError("it is causal")
        no_change(own.get("dropout"), own.get("drop_path"))
        before, after = (own["layernorm_before"], own["layernorm_after"]) if "layernorm_before" in own else (own["norm1"], own["norm2"])
        scales = [None if name not in own else _scale(own[name]) for name in ("layer_scale1", "layer_scale2")]
        inputs = tuple(_linear(layer) for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
        if len({layer.module.weight.shape for layer in inputs}) > 1:
            raise UnfitError("its queries have not as many channels as its keys and values")
        block = Block(
            bottleneck(SideBySide(inputs), norm=token_norm(before)),
            softmax(inputs[0].module.weight.shape[0] // attention.head_dim, attention.scaling),
            bottleneck(_linear(attention.o_proj, scales[0])),
            mlp_layers(module.mlp, after, scales[1]),
        )
        return _plan(block)


TABLE: dict[str, type[Fused]] = {
    "timm.models.vision_transformer.Block": TimmBlock,
    **{f"vit_pytorch.{name}.Transformer": VitPytorchTransformer for name in ("vit", "simple_vit", "deepvit")},
    **{f"{name}Layer": TransformersBlock for name in TRANSFORMERS_VITS},
}
