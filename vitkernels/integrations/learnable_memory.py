"""vit_pytorch's ``learnable_memory_vit``: the ``Adapter``, and the attention of the ViT that it shares with others."""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.integrations._fused import Fused, Role, fell_back
from vitkernels.integrations.vit_pytorch import PlainAttention
from vitkernels.memory.adapters import run_adapters
from vitkernels.memory.layers import frame_of
from vitkernels.nn import _checks

_MODULE = "vit_pytorch.learnable_memory_vit."


class Attention(PlainAttention):
    """``Attention``: memory is shared by the batch, so it is projected once and not repeated; a mask is the kernel's."""

    @classmethod
    def _vk_projection(cls, module: Any) -> nn.Module:
        return module.to_q

    def _vk_split(self, x: Tensor) -> Tensor:
        """[.., N, H D] to [.., H, N, D]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, memories: Tensor | None = None) -> Tensor:
        """The original's arguments and result."""
        blind = attn_mask is not None and not bool(attn_mask.any(dim=-1).all())
        if not self._vk_takes(x, reason="the mask hides every key from some query, which then sees all alike" if blind else None):
            return super(PlainAttention, self).forward(x, attn_mask=attn_mask, memories=memories)
        x = self.norm(x)
        q = self._vk_split(self.to_q(x))
        k, v = map(self._vk_split, self.to_kv(x).chunk(2, dim=-1))
        dropout = self.dropout.p if self.dropout.training else 0.0
        if memories is not None and memories.dim() == 2 and attn_mask is None:
            memory_k, memory_v = (m.unflatten(-1, (self.heads, -1)) for m in self.to_kv(memories).chunk(2, dim=-1))
            out = ops.memory_attention(q, k, v, memory_k, memory_v, scale=self.scale, dropout_p=dropout)
            assert isinstance(out, Tensor)
            return self.to_out(out.transpose(1, 2).flatten(2))
        if memories is not None:
            memory = (self._vk_split(m).expand(*k.shape[:2], -1, -1) for m in self.to_kv(memories).chunk(2, dim=-1))
            k, v = (torch.cat(pair, dim=2) for pair in zip((k, v), memory, strict=True))
        return self.to_out(self._vk_attend(q, k, v, None, dropout, self.scale, attn_mask))


class Adapter(Fused):
    """``Adapter``: the ViT runs on its own tokens alone, without a mask and without a gradient if it is frozen; the adapter's class token is one more
    query a layer.
    """

    _vk_op: ClassVar[str] = "memory_attention"

    @classmethod
    def _vk_why_not(cls, module: Any, role: Role) -> str | None:
        return cls._vk_why_not_here(module)

    @classmethod
    def _vk_why_not_here(cls, module: Any) -> str | None:
        """Why this adapter must run its own code, as it is now."""
        try:
            frame_of(module.vit)
        except TypeError as error:
            return str(error).removeprefix("memory: ")
        if any(map(_checks.watched, module.vit.transformer.modules())):
            return f"its vit {_checks.HOOKED}: it would see the adapter's token apart from the others"
        return None if _is_constructors(module) else "its attn_mask is not the one it was made with"

    @classmethod
    def _vk_weight(cls, module: Any) -> Tensor:
        return module.memory_cls_token

    @classmethod
    def _vk_note(cls, module: Any) -> str:
        dropping = any(isinstance(child, nn.Dropout) and child.p > 0 for child in module.vit.modules())
        return _DROPOUT if dropping else ""

    def forward(self, img: Tensor) -> Tensor:
        """The original's argument and result."""
        reason = _checks.why_not_tensor(img) or self._vk_why_not_here(self)
        if reason is not None:
            fell_back(self, reason)
            return super().forward(img)
        return run_adapters([self], img)[0]


_DROPOUT = "in training, dropout draws other masks than the original, of the same probability"
_masks: weakref.WeakKeyDictionary[nn.Module, tuple[Tensor, int, bool]] = weakref.WeakKeyDictionary()


def _is_constructors(adapter: Any) -> bool:
    """Whether the mask lets the adapter's token see all, and hides it and its memory from the others. Waits for a GPU once for each mask."""
    mask, memories = adapter.attn_mask, adapter.memories_per_layer.shape[1]
    known = _masks.get(adapter)
    if known is None or known[0] is not mask or known[1] != mask._version:
        expected = torch.ones_like(mask)
        expected[1:, 0] = False
        if memories:
            expected[1:, -memories:] = False
        known = _masks[adapter] = (mask, mask._version, torch.equal(mask, expected) and mask.shape[1] == mask.shape[0] + memories)
    return known[2]


TABLE: dict[str, type[Fused]] = {_MODULE + "Adapter": Adapter, _MODULE + "Attention": Attention}
