"""One vector per image out of the tokens of many (NaViT, arXiv 2307.06304, section 2.1): masked pooling."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.ops import PackedLayout


class AttentionPooling(nn.Module):
    """Multi-head attention of one learned query to the tokens of each image, the pooling head of Zhai et al. (arXiv 2106.04560) without its MLP.

    Args:
        dim: features of a token.
        heads: attention heads; divides ``dim``.
        qk_norm: how each head's query and key are normalised, as in :func:`vitkernels.ops.varlen_attention`; ``None`` for not at all.
        bias: whether the projections have one.

    state_dict: ``query`` [dim], ``to_q.weight``, ``to_kv.weight`` [2 dim, dim] (keys first), ``proj.weight``, with ``bias`` their ``.bias``, and with
    ``qk_norm`` ``q_norm`` and ``k_norm`` [dim / heads].
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        qk_norm: Literal["rms", "l2", "layer"] | None = "layer",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if heads <= 0 or dim % heads:
            raise ValueError(f"AttentionPooling: dim is {dim} and heads {heads}; heads must divide dim")
        self.heads, self.head_dim, self.qk_norm = heads, dim // heads, qk_norm
        self.query = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.to_q = nn.Linear(dim, dim, bias=bias, device=device, dtype=dtype)
        self.to_kv = nn.Linear(dim, 2 * dim, bias=bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, bias=bias, device=device, dtype=dtype)
        shape = None if qk_norm is None else torch.ones(self.head_dim, device=device, dtype=dtype)
        self.q_norm = None if shape is None else nn.Parameter(shape.clone())
        self.k_norm = None if shape is None else nn.Parameter(shape.clone())
        nn.init.trunc_normal_(self.query, std=dim**-0.5)

    def forward(self, x: Tensor, layout: PackedLayout) -> Tensor:
        """``x`` [T, dim] and where its images lie: [layout.sequences, dim]; the projection of 0 for an image without tokens."""
        images = layout.sequences
        q = self.to_q(self.query).view(1, self.heads, self.head_dim).expand(images, -1, -1)
        k, v = self.to_kv(x).view(x.shape[0], 2, self.heads, self.head_dim).unbind(1)
        out = ops.varlen_attention(q, k, v, layout.cross(1), qk_norm=self.qk_norm, q_norm_weight=self.q_norm, k_norm_weight=self.k_norm)
        assert isinstance(out, Tensor)
        return self.proj(out.flatten(1))
