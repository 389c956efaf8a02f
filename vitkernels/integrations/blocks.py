"""Transformer blocks of ViT, DeepViT and MobileViT in evaluation, one native call for all that stand one after the other.

    x = x + project_out(attention(project_in(norm(x))))        LayerScale folded into the weight
    x = x + mlp(norm(x))                                       likewise

Tokens are the pixels of a map in channels_last, [B, C, 1, N], or those of MobileViT's feature map. The attention and the MLP inside keep their own
replacements, for calls that the original of the block has to make.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from vitkernels.integrations import attention_interface, dense
from vitkernels.integrations._fused import Fused, Role, original_name
from vitkernels.integrations.folded import TRANSFORMERS_VITS, Evaluated, Linears, Plan, Run, mlp_layers, no_change, of_linears, plain, token_norm
from vitkernels.integrations.head_mixing import VitPytorchAttention
from vitkernels.integrations.vit_pytorch import PlainAttention, SequencesAttention
from vitkernels.nn._folded import Bottleneck, Layer, SideBySide, UnfitError, bottleneck, one_by_one, onednn
from vitkernels.ops import _define
from vitkernels.ops.blocks import op, reference
from vitkernels.ops.blocks.reference import Memory, Mixing, Pass, Softmax
from vitkernels.ops.bottleneck.reference import Norm


class Block(NamedTuple):
    """What a pre-norm transformer block is made of."""

    project_in: Bottleneck
    attention: Callable[[], Softmax | Mixing]
    project_out: Bottleneck
    mlp: Bottleneck

    @property
    def scaled(self) -> bool:
        """Whether a LayerScale is folded into its weights."""
        return any(one.project.scale is not None for one in (self.project_out, self.mlp) if isinstance(one.project, Layer))

    @property
    def plain(self) -> bool:
        """Whether tasks can run beside its tokens."""
        found = self.attention()
        return isinstance(found, Softmax) and found.q_norm is None

    def folded(self, dtype: torch.dtype) -> reference.Block:
        """The block as the op takes it, weights in ``dtype``."""
        project_in, project_out, mlp = (one.folded(dtype) for one in (self.project_in, self.project_out, self.mlp))
        passes = [Pass(*(found[name] for name in Pass._fields)) for found in (project_in, project_out, mlp)]
        return reference.Block(passes[0], self.attention(), *passes[1:])


def bind(blocks: Sequence[Block], dtype: torch.dtype) -> Callable[..., Tensor]:
    """The blocks of a map [B, C, H, W], their weights packed for activations of ``dtype``; called with what ``op.run`` is."""
    accumulation = _define.accumulation_dtype(dtype)
    packed = op.pack([block.folded(accumulation) for block in blocks], dtype)
    return lambda x, *options: op.run(x, packed, *options)


def softmax(heads: int, scale: float | None, q_norm: nn.LayerNorm | None = None, k_norm: nn.LayerNorm | None = None) -> Callable[[], Softmax]:
    """Attention as of every ViT; the norms are over each head's channels.

    Raises:
        UnfitError: the norms differ in what the kernel has once.
    """
    if (q_norm is None) != (k_norm is None):
        raise UnfitError("of its queries and keys only one has a norm")
    if q_norm is not None and k_norm is not None and q_norm.eps != k_norm.eps:
        raise UnfitError("the norms of its queries and keys differ")

    def norm_of(norm: nn.LayerNorm | None) -> Norm | None:
        return None if norm is None else Norm("token", norm.weight, norm.bias, norm.eps)

    return lambda: Softmax(heads, scale, norm_of(q_norm), norm_of(k_norm))


def mixing(heads: int, scale: float, weight: Tensor, norm: nn.LayerNorm) -> Callable[[], Mixing]:
    """Re-Attention; ``weight`` is [in, out], as vit_pytorch stores it.

    Raises:
        UnfitError: the kernel mixes fewer heads.
    """
    if heads > op.MOST_MIXED:
        raise UnfitError(f"it mixes {heads} heads, and the kernel at most {op.MOST_MIXED}")
    return lambda: Mixing(heads, scale, weight.t(), Norm("token", norm.weight, norm.bias, norm.eps))


class Tasks:
    """The tokens of tasks, which go through a model's blocks beside its own.

    Attributes:
        tokens: [T, C], as they enter the first block.
        memory: what each of them sees beside the model's tokens and itself.
        result: [B, T, C] behind the last block, once the blocks have run as one.
    """

    def __init__(self, tokens: Tensor, memory: Memory) -> None:
        self.tokens, self.memory = tokens, memory
        self.result: Tensor | None = None


_running = threading.local()
_NONE: tuple[nn.Module | None, tuple[Any, ...]] = (None, ())


@contextlib.contextmanager
def _asking(module: nn.Module, *more: Any) -> Iterator[None]:
    """In this thread ``module``, a replacement, is called with ``more`` of what its plan takes."""
    before, _running.asked = getattr(_running, "asked", _NONE), (module, more)
    try:
        yield
    finally:
        _running.asked = before


def only_first(module: nn.Module, first: int) -> contextlib.AbstractContextManager[None]:
    """In this thread whoever calls ``module``, a replacement, reads its ``first`` tokens, and it may return no more than these. Within
    :func:`with_tasks` it returns at least three: from three on a token's bits do not depend on what goes beside it.
    """
    asked, more = getattr(_running, "asked", _NONE)
    if asked is None:
        return _asking(module, first)
    return _asking(module, max(first, 3), *more[1:]) if asked is module else contextlib.nullcontext()


def with_tasks(module: nn.Module, tasks: Tasks | None) -> contextlib.AbstractContextManager[None]:
    """In this thread ``module``, a replacement, takes these tasks along if it runs as one. With None it makes of its own tokens what it would beside
    some.
    """
    return _asking(module, None, tasks)


class OfTokens(Linears):
    """What takes tokens [B, N, C]."""

    _vk_op: ClassVar[str] = op.NAME
    _vk_dims: ClassVar[range] = range(3, 4)

    def _vk_folded(self, x: Any, *more: Any) -> Tensor | None:
        if one_by_one():
            return None
        module, asked = getattr(_running, "asked", _NONE)
        return super()._vk_folded(x, *(asked if module is self else more))


class _InARow(OfTokens):
    """Several modules of which each has a replacement of its own, ``_vk_each``, as one."""

    _vk_each: ClassVar[Any]
    _vk_names: ClassVar[frozenset[str]]
    """The classes that it replaces."""

    @classmethod
    def _vk_row(cls, module: Any) -> dict[str, Any]:
        """The modules, by what a reason calls them."""
        raise NotImplementedError

    @classmethod
    def _vk_why_not(cls, module: Any, role: Role) -> str | None:
        for name, one in cls._vk_row(module).items():
            if not issubclass(role(one), cls._vk_each):
                return f"its {name} is not replaced"
        return super()._vk_why_not(module, role)

    @classmethod
    def _vk_plan(cls, module: Any) -> Plan:
        row = cls._vk_row(module)
        for name, one in row.items():
            if original_name(one) not in cls._vk_names:
                raise UnfitError(f"its {name} is a {type(one).__name__}")
        return _plan(*map(cls._vk_each._vk_block, row.values()))

    def _vk_left(self, reason: str) -> None:
        """One by one they are no fall-back to report; one that runs its original does so itself."""


def _plan(*blocks: Block, last: Callable[[Tensor], Tensor] | None = None) -> Plan:
    """Blocks one after the other, on tokens [B, N, C] or on a map [B, H/ph, ph, W/pw, pw, C]; ``last`` sees what is behind them."""
    if not blocks:
        raise UnfitError("it has no layers")

    def bind_all(dtype: torch.dtype) -> Run | str:
        if dtype is torch.bfloat16 and onednn(dtype) and any(block.scaled for block in blocks):
            return "its weights times its LayerScale are no bfloat16 numbers, and linear layers in float32 arithmetic are left to PyTorch"
        blocks_of, channels = bind(blocks, dtype), blocks[0].project_in.channels

        plain = all(block.plain for block in blocks)

        def run(x: Tensor, first: int | None = None, tasks: Tasks | None = None) -> Tensor | None:
            if x.shape[-1] != channels:
                return None
            if first is not None and first >= x.shape[1]:
                first = None
            if tasks is not None:
                if not plain:
                    return None
                z = torch.cat([x, tasks.tokens.expand(x.shape[0], -1, -1)], dim=1)
                found = blocks_of(z.mT.unsqueeze(2), None, first, tasks.memory).squeeze(2).mT
                y, tasks.result = found.split([first or x.shape[1], len(tasks.tokens)], dim=1)
                return y if last is None else last(y)
            patch = dense.patch_of(x)
            y = blocks_of(x.contiguous().mT.unsqueeze(2), None, first) if patch is None else blocks_of(dense.as_map(x), patch)
            y = y.squeeze(2).mT if patch is None else dense.as_tokens(y, patch)
            return y if last is None else last(y)

        return run

    return of_linears(bind_all)


# --- timm ----------------------------------------------------------------------------------------------------------------------------


class TimmBlock(OfTokens):
    """``vision_transformer.Block``: of every plain ViT, and of MobileViT, which hands it a map of six dimensions."""

    _vk_dims: ClassVar[range] = range(3, 7, 3)

    @classmethod
    def _vk_settings(cls, module: Any) -> Any:
        attention = module.attn
        return [attention.__dict__.get(name) for name in ("num_heads", "head_dim", "scale", "fused_attn")]

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
        norms = [None if type(norm) is nn.Identity else token_norm(norm) for norm in (attention.q_norm, attention.k_norm, attention.norm)]
        if any(norm is not None and norm.normalized_shape != (attention.head_dim,) for norm in norms[:2]):
            raise UnfitError("the norms of its queries and keys are over more than a head's channels")
        return Block(
            bottleneck(linear(attention.qkv), norm=token_norm(module.norm1)),
            softmax(attention.num_heads, None if attention.fused_attn else attention.scale, *norms[:2]),
            bottleneck(linear(attention.proj, _scale(module.ls1)), norm=norms[2]),
            mlp_layers(module.mlp, module.norm2, _scale(module.ls2)),
        )


_TIMM_BLOCK = "timm.models.vision_transformer.Block"


class TimmBlocks(_InARow):
    """A ``Sequential`` of such blocks."""

    _vk_dims: ClassVar[range] = TimmBlock._vk_dims
    _vk_each: ClassVar[Any] = TimmBlock
    _vk_names: ClassVar[frozenset[str]] = frozenset({_TIMM_BLOCK})

    @classmethod
    def _vk_row(cls, module: Any) -> dict[str, Any]:
        return module._modules

    @classmethod
    def _vk_settings(cls, module: Any) -> Any:
        return [TimmBlock._vk_settings(block) for block in module._modules.values() if "attn" in block._modules]


def match(module: nn.Module) -> type[Fused] | None:
    """The replacement of a ``Sequential`` of nothing but blocks."""
    several = type(module) is nn.Sequential and len(module) > 1
    return TimmBlocks if several and all(original_name(block) == _TIMM_BLOCK for block in module.children()) else None


def linear(module: Any, scale: Tensor | None = None) -> Layer:
    """A linear layer, perhaps with a LayerScale behind it."""
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


class VitPytorchTransformer(OfTokens):
    """``Transformer`` of ``vit``, ``simple_vit`` and ``deepvit``: all of its blocks, whose norms are inside of attention and MLP."""

    @classmethod
    def _vk_settings(cls, module: Any) -> Any:
        return [(own["heads"], own["scale"]) for own in (attention.__dict__ for attention, _ in module.layers)]

    @classmethod
    def _vk_plan(cls, module: Any) -> Plan:
        layers: Any = plain(module.layers, nn.ModuleList)
        blocks = [cls._vk_block(attention, feed_forward) for attention, feed_forward in layers]
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
        attend: Callable[[], Softmax | Mixing]
        if _VIT_PYTORCH[kind] is VitPytorchAttention:
            attend = mixing(heads, scale, attention.reattn_weights, attention.reattn_norm[1])
        else:
            attend = softmax(heads, scale)
        project_in, project_out = bottleneck(linear(attention.to_qkv), norm=token_norm(attention.norm)), bottleneck(linear(out))
        return Block(project_in, attend, project_out, mlp_layers(feed_forward))


_VIT_PYTORCH: dict[str, Any] = {
    "vit_pytorch.vit.Attention": PlainAttention,
    "vit_pytorch.simple_vit.Attention": PlainAttention,
    "vit_pytorch.deepvit.Attention": VitPytorchAttention,
    "vit_pytorch.mobile_vit.Attention": SequencesAttention,
}


# --- transformers --------------------------------------------------------------------------------------------------------------------


class TransformersBlock(OfTokens):
    """``ViTLayer``, ``DeiTLayer``, ``Dinov2Layer``, ``CLIPEncoderLayer`` and ``SiglipEncoderLayer``, where they would call SDPA."""

    @classmethod
    def _vk_attention(cls, module: Any) -> Any:
        return attention_interface.either(module._modules, *_ATTENTIONS)

    @classmethod
    def _vk_settings(cls, module: Any) -> Any:
        attention = cls._vk_attention(module)
        return attention.config._attn_implementation, attention.head_dim, attention_interface.scale_of(attention), attention.is_causal

    @classmethod
    def _vk_plan(cls, module: Any) -> Plan:
        return _plan(cls._vk_block(module))

    @classmethod
    def _vk_block(cls, module: Any) -> Block:
        attention, own = cls._vk_attention(module), module._modules
        if original_name(attention) != original_name(module).removesuffix("Layer").removesuffix("Encoder") + "Attention":
            raise UnfitError(f"its attention is a {type(attention).__name__}")
        if (chosen := attention.config._attn_implementation) not in ("sdpa", attention_interface.NAME):
            raise UnfitError(f"its attention implementation is {chosen!r}, not 'sdpa'")
        if attention.is_causal:
            raise UnfitError("it is causal")
        no_change(own.get("dropout"), own.get("drop_path"))
        before, after = (attention_interface.either(own, *names) for names in (_BEFORE, _AFTER))
        scales = [None if name not in own else _scale(own[name]) for name in ("layer_scale1", "layer_scale2")]
        inputs = tuple(linear(layer) for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
        if len({layer.module.weight.shape for layer in inputs}) > 1:
            raise UnfitError("its queries have not as many channels as its keys and values")
        return Block(
            bottleneck(SideBySide(inputs), norm=token_norm(before)),
            softmax(inputs[0].module.weight.shape[0] // attention.head_dim, attention_interface.scale_of(attention)),
            bottleneck(linear(attention_interface.projection_of(attention), scales[0])),
            mlp_layers(module.mlp, after, scales[1]),
        )


class TransformersBlocks(_InARow):
    """``CLIPEncoder``, ``SiglipEncoder`` and ``Dinov2Encoder``: all layers."""

    _vk_each: ClassVar[Any] = TransformersBlock
    _vk_names: ClassVar[frozenset[str]] = frozenset(name + layer for name, layer in TRANSFORMERS_VITS.items())
    # transformers looks up by the class's name what of a model can be recorded.
    _vk_same_name: ClassVar[bool] = True

    @classmethod
    def _vk_layers(cls, module: Any) -> nn.ModuleList:
        return attention_interface.either(module._modules, "layers", "layer")

    @classmethod
    def _vk_row(cls, module: Any) -> dict[str, Any]:
        return {f"layer {name}": layer for name, layer in cls._vk_layers(module)._modules.items()}

    @classmethod
    def _vk_settings(cls, module: Any) -> Any:
        layers = cls._vk_layers(module)._modules.values()
        return [TransformersBlock._vk_settings(layer) for layer in layers if not _ATTENTIONS.isdisjoint(layer._modules)]

    def _vk_alone(self, others: Iterable[Any], options: dict[str, Any]) -> bool:
        """Whether a call asks for no more than the tokens, as no tuple: what else there is transformers collects by hooks on the layers."""
        config = self.config
        recorded = [getattr(config, name, False) for name in ("output_hidden_states", "output_attentions")]
        as_tuple = options.get("return_dict", getattr(config, "return_dict", True)) is False
        asked = (value for name, value in options.items() if name != "return_dict")
        return not as_tuple and all(value is None or value is False for value in (*others, *asked, *recorded))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's arguments and result."""
        from transformers.modeling_outputs import BaseModelOutput

        options = dict(kwargs)
        tokens, *others = args or (options.pop("inputs_embeds", options.pop("hidden_states", None)),)
        y = self._vk_folded(tokens) if self._vk_alone(others, options) else None
        return super(Evaluated, self).forward(*args, **kwargs) if y is None else BaseModelOutput(last_hidden_state=y)


class TransformersModel(TransformersBlocks):
    """``ViTModel`` and ``DeiTModel``, whose layers are the model's own: they begin with the embedding, and its images."""

    _vk_dims: ClassVar[range] = range(4, 5)

    @classmethod
    def _vk_plan(cls, module: Any) -> Plan:
        embeddings, layers = module.embeddings, super()._vk_plan(module)

        def bind(dtype: torch.dtype) -> Run | str:
            run = layers.bind(dtype)
            return run if isinstance(run, str) else lambda pixels, *more: run(embeddings(pixels), *more)

        return Plan(bind)

    def forward(self, pixel_values: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The original's arguments and result."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        y = None
        if isinstance(pixel_values, Tensor) and self._vk_alone(args, kwargs):
            y = self._vk_folded(pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype))
        if y is None:
            return super(Evaluated, self).forward(pixel_values, *args, **kwargs)
        y = self.layernorm(y)
        return BaseModelOutputWithPooling(last_hidden_state=y, pooler_output=None if self.pooler is None else self.pooler(y))


# The norms in front of attention and MLP.
_BEFORE = ("layernorm_before", "norm1", "layer_norm1")
_AFTER = ("layernorm_after", "norm2", "layer_norm2")
_ATTENTIONS = frozenset({"attention", "self_attn"})


TABLE: dict[str, type[Fused]] = {
    _TIMM_BLOCK: TimmBlock,
    **{f"vit_pytorch.{name}.Transformer": VitPytorchTransformer for name in ("vit", "simple_vit", "deepvit")},
    **dict.fromkeys(TransformersBlocks._vk_names, TransformersBlock),
    **{name + "Encoder": TransformersBlocks for name in TRANSFORMERS_VITS if name.endswith(("CLIP", "Siglip", "Dinov2"))},
    **{name + "Model": TransformersModel for name in TRANSFORMERS_VITS if name.endswith(("ViT", "DeiT"))},
}
