"""Packed sequences in models: what the NaViT-like models of the three zoos share.

Each of them builds a mask [B, 1, N, N] for all its attention layers. Here the model itself is replaced. It hands its layers a :class:`PackedLayout`
in the place of the mask, and runs on the real tokens alone, [T, D]: its attention layers, which are replaced with it, know what to do with that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from vitkernels import backends, ops
from vitkernels.integrations._fused import Role
from vitkernels.integrations._tokenwise import Inner
from vitkernels.ops import PackedLayout

_OP = "varlen_attention"


class Part(Inner):
    """Base of the layers that take a layout, from the model that they are replaced with."""

    _vk_op: ClassVar[str] = _OP
    _vk_whole: ClassVar[str]
    """The model's class."""

    @classmethod
    def _vk_why_not(cls, module: Any, role: Role) -> str | None:
        return f"it is replaced only with the {cls._vk_whole} around it, which knows where each image lies: from a mask that would be too late"

    def _vk_attend(self, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, dropout: float, **options: Any) -> Tensor:
        """Attention of the layout's rows of q, k and v, [T, H, D] each: [T, H D_v]."""
        out = ops.varlen_attention(q, k, v, layout, dropout_p=dropout if self.training else 0.0, **options)
        assert isinstance(out, Tensor)
        return out.flatten(1)


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, or a stand-in that torch.compile calls and does not look into: what is different for every batch would be compiled every time."""
    if not torch.compiler.is_compiling():
        return function
    if function not in _untraced:
        _untraced[function] = torch.compiler.disable(function)
    return _untraced[function]


_untraced: dict[Callable[..., Any], Callable[..., Any]] = {}


def why_not_here(weight: Tensor) -> str | None:
    """On a GPU whose kernels nobody has proved yet: the reference goes from image to image there, and waits for the GPU, which no original does."""
    if weight.device.type == "cpu" or backends.requested() != "auto" or backends.select(_OP, weight) != "reference":
        return None
    return backends.why_not(_OP, "triton", weight.device, weight.dtype, auto=True)


class RealTokens:
    """Where the real tokens of a padded batch are, and the way there and back. Waits for a GPU, once. Make it with :func:`real_tokens`.

    Args:
        valid: bool [B, N].

    Attributes:
        layout: of the tokens alone, image after image.
    """

    def __init__(self, valid: Tensor) -> None:
        self._shape = valid.shape
        lengths = valid.sum(1).tolist()
        self.layout = PackedLayout.from_lengths(lengths, device=valid.device)
        self._rows = None if self.layout.total_q == valid.numel() else valid.flatten().nonzero()[:, 0]

    def pack(self, x: Tensor) -> Tensor:
        """[B, N, D] to [T, D]."""
        x = x.flatten(0, 1)
        return x if self._rows is None else x.index_select(0, self._rows)

    def unpack(self, x: Tensor) -> Tensor:
        """[T, D] to [B, N, D], padding 0."""
        if self._rows is not None:
            x = x.new_zeros(self._shape.numel(), x.shape[1]).index_copy(0, self._rows, x)
        return x.unflatten(0, self._shape)


def real_tokens(valid: Tensor) -> RealTokens:
    """The real tokens of a batch where ``valid`` [B, N] is true."""
    return untraced(RealTokens)(valid)


def padded_layout(valid: Tensor) -> PackedLayout | None:
    """The layout of the padded batch itself, [B N] rows, in which padding is no one's key; ``None`` if the real tokens are not the first of each row.
    Waits for a GPU.
    """
    return untraced(_padded_layout)(valid)


def _padded_layout(valid: Tensor) -> PackedLayout | None:
    batch, length = valid.shape
    if (valid[:, 1:] > valid[:, :-1]).any():
        return None
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=valid.device) * length
    rows = batch * length
    return PackedLayout.from_cu_seqlens(cu_seqlens, max_seqlen_q=length, max_seqlen_k=length, total_q=rows, total_k=rows, seqused_k=valid.sum(1))
