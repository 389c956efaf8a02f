"""The pre-norm layers of the three zoos' ViTs, seen from beside them: where the keys and values of the model's own tokens pass by, and what a layer
does to a token that is not among them.

Classes are recognised by their exact names: no zoo is imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitkernels.integrations import blocks, folded
from vitkernels.integrations._fused import original_name
from vitkernels.nn import _checks
from vitkernels.nn._derived import Derived
from vitkernels.nn._folded import Pass, SideBySide, UnfitError, bottleneck, why_not_tensors

QKV = tuple[Tensor, Tensor, Tensor]
Passes = tuple[Pass, Pass, Pass]
"""What a layer in evaluation does to tokens but for attention, as maps [B, C, 1, N]: norm, queries, keys and values; projection and residual; norm,
MLP and residual.
"""


class Layer:
    """One layer. Its modules are called, as they may be adapted, quantised or accelerated; where they are plain, and no gradient is wanted,
    :meth:`passes` stand in for the calls.

    Args:
        module: the layer.

    Attributes:
        module: the layer.
        sources: modules whose outputs hold the keys and values of the model's tokens.
        last: the module with whose call the layer is past them.
    """

    module: nn.Module
    sources: tuple[nn.Module, ...]
    last: nn.Module
    scale: float

    def keys(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, N, D] from what ``sources`` returned."""
        raise NotImplementedError

    def norm(self, x: Tensor) -> Tensor:
        """What the layer's attention reads, of tokens [.., C]."""
        raise NotImplementedError

    def project(self, normed: Tensor) -> QKV:
        """Queries, keys and values [B, H, N, D] of normed tokens [B, N, C]."""
        raise NotImplementedError

    def split(self, qkv: Tensor) -> QKV:
        """The same, from [B, N, 3 H D]."""
        raise NotImplementedError

    def finish(self, x: Tensor, normed: Tensor, attended: Tensor) -> Tensor:
        """The tokens after the layer, from those before, normed, and attention's result [B, N, H D]."""
        raise NotImplementedError

    def _planned(self, x: Tensor) -> tuple[Any, blocks.Block] | None:
        """What is kept of the layer and what its passes for tokens like ``x`` are made of; None where the modules are to be called."""
        if torch.is_grad_enabled() or not folded.here(x) or torch.is_autocast_enabled("cpu") or _checks.why_not_tensor(x) is not None:
            return None
        entry = _PASSES.entry(self.module)
        plan = entry.plan
        if isinstance(plan, str):
            return None
        return None if (plan.scaled and x.dtype.itemsize == 2) or folded.left_to_pytorch(x.dtype) is not None else (entry, plan)

    def takes_tasks(self, x: Tensor) -> bool:
        """Whether tasks could go beside tokens like ``x`` in one call with other layers."""
        planned = self._planned(x)
        return planned is not None and planned[1].plain

    def passes(self, x: Tensor) -> Passes | None:
        """The passes for tokens like ``x``, their weights packed until one changes; None where the modules are to be called."""
        planned = self._planned(x)
        if planned is None:
            return None
        entry, plan = planned

        def bind() -> Passes | None:
            if why_not_tensors(x, entry.snapshot.tensors) is not None:
                return None
            return plan.project_in.bind(x.dtype), plan.project_out.bind(x.dtype), plan.mlp.bind(x.dtype)

        return entry.value(x.dtype, bind)

    def dropout(self) -> float:
        """The probability with which attention drops a weight now."""
        raise NotImplementedError


class _TimmLayer(Layer):
    """``timm.models.vision_transformer.Block``."""

    attention: ClassVar[str] = "timm.layers.attention.Attention"

    def __init__(self, module: Any) -> None:
        _expect(module.attn, self.attention)
        self.module = self.block = self.last = module
        self.attn = module.attn
        self.scale = module.attn.scale
        self.sources = (self.attn.qkv,) if isinstance(self.attn.k_norm, nn.Identity) else (self.attn.qkv, self.attn.k_norm)

    def _split(self, qkv: Tensor) -> QKV:
        q, k, v = qkv.unflatten(-1, (3, self.attn.num_heads, self.attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def keys(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        _, k, v = self._split(outputs[0])
        return (outputs[1] if len(outputs) > 1 else k), v

    def norm(self, x: Tensor) -> Tensor:
        return self.block.norm1(x)

    def project(self, normed: Tensor) -> QKV:
        return self.split(self.attn.qkv(normed))

    def split(self, qkv: Tensor) -> QKV:
        q, k, v = self._split(qkv)
        return self.attn.q_norm(q), self.attn.k_norm(k), v

    def finish(self, x: Tensor, normed: Tensor, attended: Tensor) -> Tensor:
        block, attn = self.block, self.attn
        attended = attn.norm(attended)
        if attn.gate is not None:
            attended = attended * attn.gate(normed).sigmoid()
        x = x + block.drop_path1(block.ls1(attn.proj_drop(attn.proj(attended))))
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    def dropout(self) -> float:
        return self.attn.attn_drop.p if self.attn.training else 0.0


class _TransformersLayer(Layer):
    """``transformers.models.vit.modeling_vit.ViTLayer``."""

    attention: ClassVar[str] = "transformers.models.vit.modeling_vit.ViTAttention"

    def __init__(self, module: Any) -> None:
        _expect(module.attention, self.attention)
        self.module = self.layer = self.last = module
        self.attn = module.attention
        self.scale = module.attention.scaling
        self.sources = (self.attn.k_proj, self.attn.v_proj)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.attn.head_dim)).transpose(1, 2)

    def keys(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return self._heads(outputs[0]), self._heads(outputs[1])

    def norm(self, x: Tensor) -> Tensor:
        return self.layer.layernorm_before(x)

    def project(self, normed: Tensor) -> QKV:
        attn = self.attn
        return self._heads(attn.q_proj(normed)), self._heads(attn.k_proj(normed)), self._heads(attn.v_proj(normed))

    def split(self, qkv: Tensor) -> QKV:
        q, k, v = map(self._heads, qkv.chunk(3, dim=-1))
        return q, k, v

    def finish(self, x: Tensor, normed: Tensor, attended: Tensor) -> Tensor:
        layer = self.layer
        x = layer.dropout(self.attn.o_proj(attended)) + x
        return layer.dropout(layer.mlp(layer.layernorm_after(x))) + x

    def dropout(self) -> float:
        return self.attn.attention_dropout if self.attn.training else 0.0


class _VitPytorchLayer(Layer):
    """A pair of ``Attention`` and ``FeedForward`` of ``vit_pytorch.vit`` or ``vit_pytorch.learnable_memory_vit``; attention norms by itself."""

    def __init__(self, module: Any, package: str) -> None:
        self.module = module
        self.attn, self.feed_forward = module
        _expect(self.attn, f"{package}.Attention")
        _expect(self.feed_forward, f"{package}.FeedForward")
        self.last, self.scale = self.feed_forward, self.attn.scale
        self.in_one = hasattr(self.attn, "to_qkv")
        self.sources = (self.attn.to_qkv if self.in_one else self.attn.to_kv,)

    def _split(self, projected: Tensor, parts: int) -> tuple[Tensor, ...]:
        """Of the last ``parts`` of queries, keys and values."""
        return projected.unflatten(-1, (-1, self.attn.heads, projected.shape[-1] // (parts * self.attn.heads))).permute(2, 0, 3, 1, 4).unbind(0)

    def keys(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        *_, k, v = self._split(outputs[0], 3 if self.in_one else 2)
        return k, v

    def norm(self, x: Tensor) -> Tensor:
        return self.attn.norm(x)

    def project(self, normed: Tensor) -> QKV:
        if self.in_one:
            q, k, v = self._split(self.attn.to_qkv(normed), 3)
        else:
            (q,), (k, v) = self._split(self.attn.to_q(normed), 1), self._split(self.attn.to_kv(normed), 2)
        return q, k, v

    def split(self, qkv: Tensor) -> QKV:
        q, k, v = self._split(qkv, 3)
        return q, k, v

    def finish(self, x: Tensor, normed: Tensor, attended: Tensor) -> Tensor:
        x = self.attn.to_out(attended) + x
        return self.feed_forward(x) + x

    def dropout(self) -> float:
        return self.attn.dropout.p if self.attn.dropout.training else 0.0


def _block_of(module: Any) -> blocks.Block | str:
    """What the passes of a layer are made of, or why its modules are to be called."""
    if any(child.training for child in module.modules()):
        return "some of its layers are in training mode"
    if any(_checks.hooked(child) for child in module.modules() if child is not module):
        return _checks.HOOKED
    try:
        return _read(module)
    except UnfitError as error:
        return str(error)


def _adapter(module: nn.Module) -> Any:
    """What replaces such a layer."""
    return blocks.TABLE[original_name(module)]


def _read(module: Any) -> blocks.Block:
    if not isinstance(module, nn.ModuleList):
        return _adapter(module)._vk_block(module)
    attention: Any
    attention, feed_forward = module
    if hasattr(attention, "to_qkv"):
        return blocks.VitPytorchTransformer._vk_block(attention, feed_forward)
    inputs = tuple(blocks.linear(layer) for layer in (attention.to_q, attention.to_kv))
    out, *others = attention.to_out
    folded.no_change(*others)
    project_in = bottleneck(SideBySide(inputs), norm=folded.token_norm(attention.norm))
    return blocks.Block(project_in, blocks.softmax(attention.heads, attention.scale), bottleneck(blocks.linear(out)), folded.mlp_layers(feed_forward))


def _settings(module: Any) -> Any:
    if not isinstance(module, nn.ModuleList):
        return _adapter(module)._vk_settings(module)
    return module[0].heads, module[0].scale


_PASSES: Derived[blocks.Block | str, Passes | None] = Derived(_block_of, _settings, below=("training", "eps"))


@dataclass(frozen=True)
class Frame:
    """What is known of one model.

    Attributes:
        layers: in their order.
        width: C, of a token.
        class_token: [C], what the model's own class token is when it enters the first layer; None if it has none.
        norm: the model's last norm, or None.
        stack: the module that calls the layers.
    """

    layers: tuple[Layer, ...]
    width: int
    class_token: Tensor | None
    norm: nn.Module | None
    stack: nn.Module


def _timm(vit: Any) -> Frame:
    token = None
    if vit.cls_token is not None:
        token = vit.cls_token[0, 0]
        if vit.pos_embed is not None and not vit.no_embed_class:
            token = token + vit.pos_embed[0, 0]
        token = vit.norm_pre(token)
    return Frame(_layers(vit.blocks, "timm.models.vision_transformer.Block", _TimmLayer), vit.embed_dim, token, vit.norm, vit.blocks)


def _transformers(vit: Any) -> Frame:
    vit = getattr(vit, "vit", vit)
    token = vit.embeddings.cls_token[0, 0]
    if vit.embeddings.position_embeddings is not None:
        token = token + vit.embeddings.position_embeddings[0, 0]
    layers = _layers(vit.layers, "transformers.models.vit.modeling_vit.ViTLayer", _TransformersLayer)
    return Frame(layers, vit.config.hidden_size, token, vit.layernorm, vit)


def _vit_pytorch(vit: Any) -> Frame:
    token = vit.cls_token
    if token is not None:
        token = token.flatten(0, -2)[0] + vit.pos_embedding.flatten(0, -2)[0]
    package = original_name(vit).rpartition(".")[0]
    layers = tuple(_VitPytorchLayer(pair, package) for pair in vit.transformer.layers)
    last = getattr(vit.transformer, "norm", vit.mlp_head[0] if isinstance(vit.mlp_head, nn.Sequential) else None)
    return Frame(layers, vit.pos_embedding.shape[-1], token, last, vit.transformer)


_FRAMES: dict[str, Callable[[Any], Frame]] = {
    "timm.models.vision_transformer.VisionTransformer": _timm,
    "transformers.models.vit.modeling_vit.ViTModel": _transformers,
    "transformers.models.vit.modeling_vit.ViTForImageClassification": _transformers,
    "vit_pytorch.vit.ViT": _vit_pytorch,
    "vit_pytorch.learnable_memory_vit.ViT": _vit_pytorch,
}


def frame_of(vit: nn.Module) -> Frame:
    """What is known of ``vit``.

    Raises:
        TypeError: it is of a class that is not known, or has a layer of one.
    """
    name = original_name(vit)
    if name not in _FRAMES:
        raise TypeError(f"memory: vit is a {name}; it must be one of {', '.join(_FRAMES)}")
    with torch.no_grad():
        return _FRAMES[name](vit)


def _expect(module: nn.Module, name: str) -> None:
    if (found := original_name(module)) != name:
        raise TypeError(f"memory: a layer of vit is a {found}; it must be a {name}")


def _layers(modules: Any, name: str, kind: type[Any]) -> tuple[Layer, ...]:
    for module in modules:
        _expect(module, name)
    return tuple(kind(module) for module in modules)
