"""DETR and its family: attention whose queries and keys carry positions, in transformers' classes and in the authors' layers.

The authors' layers are recognised by their attributes (``official.py``). They keep positions out of the values, work on [N, B, C], and ask
``nn.MultiheadAttention`` for attention maps that they throw away; here no map is formed, padding of keys is no mask [N, N], and the queries and keys
of self-attention, which are one tensor, are projected at once.

Two things that the algebra allows are not done. W (x + p) = W x + W p would let W p be kept where p is: but positions are computed anew for each
batch, and those of the queries are so few that to add them costs what adding their projection would. And the keys and values of all decoder layers
could be projected by one product: six of [N, C] x [C, C] run as fast as the one.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.integrations import attention_interface, dense
from vitkernels.integrations._fused import Fused, Role, fell_back, published, why_no_kernel
from vitkernels.integrations._same import why_not_same
from vitkernels.nn import _checks


class SelfAttention(attention_interface.Attention):
    """``DetrSelfAttention``, and the classes of its family that are the same."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, position_embeddings: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The original's arguments and result."""
        reason = attention_interface.why_not(self, hidden_states, hidden_states, attention_mask, **kwargs)
        if not self._vk_takes(hidden_states, reason=reason):
            return super().forward(hidden_states, attention_mask, position_embeddings, **kwargs)
        placed = _placed(hidden_states, position_embeddings)
        return self._vk_attend_chosen(placed, placed, hidden_states, attention_mask), None


class CrossAttention(attention_interface.Attention):
    """``DetrCrossAttention``, and the class of MaskFormer that is the same."""

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        encoder_position_embeddings: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The original's arguments and result."""
        reason = attention_interface.why_not(self, hidden_states, key_value_states, attention_mask, **kwargs)
        if not self._vk_takes(hidden_states, reason=reason or _checks.why_not_tensor(key_value_states)):
            return super().forward(hidden_states, key_value_states, attention_mask, position_embeddings, encoder_position_embeddings, **kwargs)
        queries, keys = _placed(hidden_states, position_embeddings), _placed(key_value_states, encoder_position_embeddings)
        return self._vk_attend_chosen(queries, keys, key_value_states, attention_mask), None


class TableTransformerAttention(dense.Attention):
    """``TableTransformerAttention``, self- and cross-attention, which forms its maps."""

    _vk_forms_maps: ClassVar[bool] = True

    @classmethod
    def _vk_dropout(cls, module: Any) -> float:
        return module.dropout

    @classmethod
    def _vk_projection(cls, module: Any) -> nn.Module:
        return module.q_proj

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        object_queries: Tensor | None = None,
        key_value_states: Tensor | None = None,
        spatial_position_embeddings: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The original's arguments and result."""
        others = [t for t in (attention_mask, key_value_states) if t is not None]
        reason = next((reason for t in others if (reason := _checks.why_not_tensor(t)) is not None), None)
        if output_attentions:
            reason = "output_attentions was given"
        elif (object_queries if key_value_states is None else spatial_position_embeddings) is None:
            reason = "its keys have no positions"
        elif attention_mask is not None and not attention_mask.is_floating_point():
            reason = f"its mask is {attention_mask.dtype}"
        if not self._vk_takes(hidden_states, reason=reason):
            return super().forward(hidden_states, attention_mask, object_queries, key_value_states, spatial_position_embeddings, output_attentions)
        queries = keys = _placed(hidden_states, object_queries)
        values = hidden_states
        if key_value_states is not None:
            keys, values = _placed(key_value_states, spatial_position_embeddings), key_value_states
        inputs = ((self.q_proj, queries), (self.k_proj, keys), (self.v_proj, values))
        q, k, v = (dense.split(projection(x), self.num_heads)[0] for projection, x in inputs)
        dropout = self.dropout if self.training else 0.0
        return self.out_proj(self._vk_attend(q, k, v, None, dropout, self.scaling, attention_mask)), None


def _placed(x: Tensor, positions: Tensor | None) -> Tensor:
    return x if positions is None else x + positions


class Stack(Fused):
    """``DetrEncoder``, ``DetrDecoder`` and those of the family that make a mask [B, 1, N, M] of padding [B, M]: it stays a mask of keys."""

    _vk_op: ClassVar[str] = "attention"
    # transformers looks up by the class's name what of a model can be recorded.
    _vk_same_name: ClassVar[bool] = True

    @classmethod
    def _vk_why_not(cls, module: Any, role: Role) -> str | None:
        if not any(issubclass(role(below), attention_interface.Attention) for below in module.modules()):
            return "none of its attention is replaced"
        return None

    @classmethod
    def _vk_weight(cls, module: Any) -> Tensor:
        return next(module.parameters())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's arguments and result."""
        for name in ("attention_mask", "encoder_attention_mask"):
            if self.config._attn_implementation == "sdpa" and isinstance(mask := kwargs.get(name), Tensor) and mask.dim() == 2:
                kwargs[name] = self._vk_mask(mask)
        return super().forward(*args, **kwargs)

    def _vk_mask(self, mask: Tensor) -> Tensor | None:
        """What transformers passes on as it is. To a layer that is not replaced it is the same: all queries see the same keys."""
        if _checks.why_not_tensor(mask) is not None:
            return mask
        mask = mask.bool()
        if not torch.compiler.is_compiling() and mask.all():
            return None
        return mask[:, None, None, :]


class AuthorsLayer(Fused):
    """Base of the authors' ``TransformerEncoderLayer`` and ``TransformerDecoderLayer``."""

    _vk_op: ClassVar[str] = "attention"
    _vk_attentions: ClassVar[tuple[str, ...]]

    @classmethod
    def _vk_why_not(cls, module: Any, role: Role) -> str | None:
        if (reason := cls._vk_why_not_layers(module)) is not None:
            return reason
        probe = copy.deepcopy(module)
        for name in cls._vk_attentions:
            probe._modules[name].dropout = 0.0  # ours would draw other masks
        shape = (_PROBED, module.self_attn.embed_dim)
        return why_not_same(f"DETR's {published(type(module)).__name__}", probe, {"": cls}, shape, cls._vk_beside)

    @staticmethod
    def _vk_beside(x: Tensor) -> dict[str, Tensor]:
        """What the layer is called with beside ``x``, to compare its code by."""
        raise NotImplementedError

    @classmethod
    def _vk_why_not_layers(cls, module: Any) -> str | None:
        for name in cls._vk_attentions:
            attention = module._modules[name]
            if (reason := _checks.why_not_bypassed(name, attention, nn.MultiheadAttention)) is not None:
                return f"{reason}; its attention maps may be wanted" if _checks.hooked(attention) else reason
            if attention.batch_first or attention.add_zero_attn or attention.bias_k is not None or not attention._qkv_same_embed_dim:
                return f"{name} has options that DETR's has not"
            for weight in (attention.in_proj_weight, attention.out_proj.weight):
                if (reason := _checks.why_not_weight(f"a weight of {name}", weight)) is not None:
                    return reason
        return None

    @classmethod
    def _vk_weight(cls, module: Any) -> Tensor:
        return module.self_attn.in_proj_weight

    @classmethod
    def _vk_note(cls, module: Any) -> str:
        drops = any(module._modules[name].dropout > 0 for name in cls._vk_attentions)
        return "in training, dropout draws other masks than the original, of the same probability" if drops else ""

    def _vk_takes(self, x: Any, *masks: Tensor | None) -> bool:
        """Whether this call can be fused; ``masks`` are those of pairs [N, M], which DETR has none of."""
        reason = _checks.why_not_tensor(x) or self._vk_why_not_layers(self)
        if reason is None and x.dim() != 3:
            reason = f"the input has {x.dim()} dimensions"
        if reason is None and any(mask is not None for mask in masks):
            reason = "a mask of pairs of tokens was given"
        # The original forms the maps: PyTorch's own fused attention is a gain, too.
        if reason is None and not x.is_cuda:
            reason = why_no_kernel(self._vk_op, x)
        if reason is not None:
            fell_back(self, reason)
        return reason is None

    def _vk_attended(self, name: str, queries: Tensor, keys: Tensor, values: Tensor, padding: Tensor | None) -> Tensor:
        """``self.<name>(queries, keys, values, key_padding_mask=padding)[0]``: [N, B, C] and [M, B, C] to [N, B, C]."""
        attention = self._modules[name]
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        width = attention.embed_dim
        parts = (2 * width, width) if queries is keys else (width,) * 3
        inputs = (queries, values) if queries is keys else (queries, keys, values)
        biases = (None,) * 3 if bias is None else bias.split(parts)
        projected = [F.linear(x, w, b) for x, w, b in zip(inputs, weight.split(parts), biases, strict=False)]
        if queries is keys:
            projected[:1] = projected[0].chunk(2, dim=-1)
        # [N, B, C] to [B, H, N, C / H], a view.
        q, k, v = (t.unflatten(-1, (attention.num_heads, -1)).permute(1, 2, 0, 3) for t in projected)
        out = ops.attention(q, k, v, key_padding=None if padding is None else ~padding, dropout_p=attention.dropout if attention.training else 0.0)
        assert isinstance(out, Tensor)
        return attention.out_proj(out.permute(2, 0, 1, 3).flatten(2))

    def _vk_fed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


class AuthorsEncoderLayer(AuthorsLayer):
    """``TransformerEncoderLayer`` of DETR's authors."""

    _vk_attentions: ClassVar[tuple[str, ...]] = ("self_attn",)

    @staticmethod
    def _vk_beside(x: Tensor) -> dict[str, Tensor]:
        """What the layer is called with beside ``x``, to compare its code by."""
        return {"src_key_padding_mask": _last_hidden(x), "pos": torch.randn_like(x)}

    def forward(self, src: Tensor, src_mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None, pos: Tensor | None = None) -> Tensor:
        """The original's arguments and result."""
        if not self._vk_takes(src, src_mask):
            return super().forward(src, src_mask, src_key_padding_mask, pos)

        def attend(x: Tensor) -> Tensor:
            placed = _placed(x, pos)
            return self._vk_attended("self_attn", placed, placed, x, src_key_padding_mask)

        for part, norm, dropout in ((attend, self.norm1, self.dropout1), (self._vk_fed_forward, self.norm2, self.dropout2)):
            src = src + dropout(part(norm(src))) if self.normalize_before else norm(src + dropout(part(src)))
        return src


class AuthorsDecoderLayer(AuthorsLayer):
    """``TransformerDecoderLayer`` of DETR's authors."""

    _vk_attentions: ClassVar[tuple[str, ...]] = ("self_attn", "multihead_attn")

    @staticmethod
    def _vk_beside(x: Tensor) -> dict[str, Tensor]:
        """What the layer is called with beside ``x``, to compare its code by."""
        memory, pos = torch.randn(2, 3, *x.shape[1:], dtype=x.dtype, device=x.device)
        return {"memory": memory, "memory_key_padding_mask": _last_hidden(memory), "pos": pos, "query_pos": torch.randn_like(x)}

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        pos: Tensor | None = None,
        query_pos: Tensor | None = None,
    ) -> Tensor:
        """The original's arguments and result."""
        if not self._vk_takes(tgt, tgt_mask, memory_mask):
            return super().forward(tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, pos, query_pos)

        def attend_to_itself(x: Tensor) -> Tensor:
            placed = _placed(x, query_pos)
            return self._vk_attended("self_attn", placed, placed, x, tgt_key_padding_mask)

        def attend_to_memory(x: Tensor) -> Tensor:
            return self._vk_attended("multihead_attn", _placed(x, query_pos), _placed(memory, pos), memory, memory_key_padding_mask)

        parts = (
            (attend_to_itself, self.norm1, self.dropout1),
            (attend_to_memory, self.norm2, self.dropout2),
            (self._vk_fed_forward, self.norm3, self.dropout3),
        )
        for part, norm, dropout in parts:
            tgt = tgt + dropout(part(norm(tgt))) if self.normalize_before else norm(tgt + dropout(part(tgt)))
        return tgt


_PROBED = 32
"""Images in a comparison of code by running it."""


def _last_hidden(x: Tensor) -> Tensor:
    """A padding mask for [N, B, C]: the last token is padding in every other image."""
    mask = torch.zeros(x.shape[1], x.shape[0], dtype=torch.bool, device=x.device)
    mask[::2, -1] = True
    return mask


_FOLDERS = {
    "Detr": "detr",
    "ConditionalDetr": "conditional_detr",
    "DeformableDetr": "deformable_detr",
    "RTDetr": "rt_detr",
    "RTDetrV2": "rt_detr_v2",
    "DFine": "d_fine",
    "Deimv2": "deimv2",
    "MaskFormerDetr": "maskformer",
    "TableTransformer": "table_transformer",
}


def _class(family: str, kind: str) -> str:
    return f"transformers.models.{_FOLDERS[family]}.modeling_{_FOLDERS[family]}.{family}{kind}"


TABLE: dict[str, type[Fused]] = {
    **{_class(family, "SelfAttention"): SelfAttention for family in _FOLDERS if family != "TableTransformer"},
    **{_class(family, "CrossAttention"): CrossAttention for family in ("Detr", "MaskFormerDetr")},
    **{_class(family, "Encoder"): Stack for family in ("Detr", "ConditionalDetr")},
    **{_class(family, "Decoder"): Stack for family in ("Detr", "MaskFormerDetr")},
    _class("TableTransformer", "Attention"): TableTransformerAttention,
}
