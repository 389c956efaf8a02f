"""The NaViT model (arXiv 2307.06304): a vision transformer on images of any sizes, packed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.navit.dropping import TokenDrop
from vitkernels.navit.patchify import Edge, PackedBatch, patchify
from vitkernels.navit.pooling import AttentionPooling
from vitkernels.navit.position import FactorizedPositionEmbedding
from vitkernels.ops import PackedLayout

QKNorm = Literal["rms", "l2", "layer"]


class NaViT(nn.Module):
    """A pre-norm vision transformer over packed images of any sizes: one vector per image, whatever else is in the batch.

    As in the paper (section 2.1 and appendix): factorized position embeddings, q/k norm, no biases (only the head has one), attention pooling.

    Args:
        patch_size: side p of a patch in pixels.
        dim: features of a token.
        depth: transformer blocks.
        heads: attention heads; divides ``dim``.
        out_features: classes, or the width of an embedding; ``None``: the pooled and normalised vector itself, of width ``dim``.
        in_channels: channels C of an image.
        mlp_dim: width of the feed-forward layers; default ``4 * dim``.
        max_size: of the :class:`FactorizedPositionEmbedding`; with absolute positions the most patches a side of an image can have.
        position: ``"absolute"`` or ``"fractional"``.
        position_kind: ``"learned"``, ``"sinusoidal"`` or ``"fourier"``.
        position_combine: ``"sum"``, ``"product"`` or ``"concat"``.
        pooling: ``"attention"``, ``"mean"`` or ``"max"``.
        qk_norm: of :func:`vitkernels.ops.varlen_attention`, with a learned weight per channel of a head; ``None`` for not at all.
        bias: whether the projections, feed-forward layers and norms have biases.
        dropout: probability of dropping an element behind the attention and in the feed-forward layers in training.
        attn_dropout: probability of dropping an attention weight in training.
        token_drop: drops patches of images given as a list, in training. A packed batch has had its drop where it was made.
        edge: what to do with images, given as a list, whose sides are no multiples of ``patch_size``: :func:`patchify`.

    state_dict: ``patch_embed.weight`` [dim, C p p] (a patch flattened channel first: the weight of a patch convolution reshaped), ``pos_embed.*``
    (:class:`FactorizedPositionEmbedding`), for each block ``blocks.i.`` with ``norm1.weight``, ``qkv.weight`` [3 dim, dim] (q, k, v, each head
    after head), ``q_norm`` and ``k_norm`` [dim / heads], ``proj.weight``, ``norm2.weight``, ``fc1.weight``, ``fc2.weight``; then ``norm.weight``,
    ``pool.*`` (:class:`AttentionPooling`), ``pool_norm.weight``, ``head.weight``, ``head.bias``. With ``bias`` also a ``.bias`` of every norm and
    linear layer but ``patch_embed``.
    """

    def __init__(
        self,
        patch_size: int = 16,
        dim: int = 384,
        depth: int = 12,
        heads: int = 6,
        out_features: int | None = 1000,
        *,
        in_channels: int = 3,
        mlp_dim: int | None = None,
        max_size: int = 64,
        position: Literal["absolute", "fractional"] = "absolute",
        position_kind: Literal["learned", "sinusoidal", "fourier"] = "learned",
        position_combine: Literal["sum", "product", "concat"] = "sum",
        pooling: Literal["attention", "mean", "max"] = "attention",
        qk_norm: QKNorm | None = "layer",
        bias: bool = False,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        token_drop: TokenDrop | None = None,
        edge: Edge = "error",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if pooling not in ("attention", "mean", "max"):
            raise ValueError(f"NaViT: pooling is {pooling!r}; it must be 'attention', 'mean' or 'max'")
        if heads <= 0 or dim % heads:
            raise ValueError(f"NaViT: dim is {dim} and heads {heads}; heads must divide dim")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.patch_size, self.pooling, self.token_drop, self.edge = patch_size, pooling, token_drop, edge
        self.patch_embed = nn.Linear(in_channels * patch_size**2, dim, bias=False, **factory)
        self.pos_embed = FactorizedPositionEmbedding(dim, max_size, position=position, kind=position_kind, combine=position_combine, **factory)
        self.blocks = nn.ModuleList(
            Block(dim, heads, mlp_dim or 4 * dim, qk_norm=qk_norm, bias=bias, dropout=dropout, attn_dropout=attn_dropout, **factory)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, bias=bias, **factory)
        self.pool = AttentionPooling(dim, heads, qk_norm=qk_norm, bias=bias, **factory) if pooling == "attention" else None
        self.pool_norm = nn.LayerNorm(dim, bias=bias, **factory)
        self.head = nn.Identity() if out_features is None else nn.Linear(dim, out_features, **factory)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.pos_embed.reset_parameters()
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=0.02)

    def forward(self, images: PackedBatch | Sequence[Tensor], generator: torch.Generator | None = None) -> Tensor:
        """One vector per image, in the order of the images.

        Args:
            images: tensors [C, H, W] of any sizes, or the batch that :func:`patchify` or a :class:`PackedCollate` made of them.
            generator: for ``token_drop``.

        Returns:
            [number of images, out_features]. Of a batch with room for more images [layout.sequences, out_features]: the rows behind the last image
            are those of images without tokens, so that shapes never change.

        Raises:
            ValueError: as :func:`patchify`; tokens of another width; an image with more than ``max_size`` patches a side, with absolute positions.
            TypeError: images that are not floating.
        """
        batch = images if isinstance(images, PackedBatch) else self.pack(images, generator)
        self._check(batch)
        x = self.patch_embed(batch.tokens)
        x = self.pos_embed(x, batch.rows, batch.cols, batch.grids[batch.image.clamp_min(0)])
        for block in self.blocks:
            x = block(x, batch.layout)
        x = self.norm(x)
        pooled = (
            self.pool(x, batch.layout) if self.pool is not None else ops.masked_pool(x, batch.layout, "mean" if self.pooling == "mean" else "max")
        )
        return self.head(self.pool_norm(pooled))

    def pack(self, images: Sequence[Tensor], generator: torch.Generator | None = None) -> PackedBatch:
        """What ``forward`` makes of a list of images: patchified, in training with tokens dropped, on the device of the weights."""
        drop = self.token_drop if self.training else None
        return patchify(list(images), self.patch_size, edge=self.edge, token_drop=drop, generator=generator).to(self.patch_embed.weight.device)

    def _check(self, batch: PackedBatch) -> None:
        if not batch.tokens.is_floating_point():
            raise TypeError(f"NaViT: the images have dtype {batch.tokens.dtype}; they must be floating (scale and normalise them first)")
        if batch.tokens.shape[1] != self.patch_embed.in_features:
            raise ValueError(
                f"NaViT: a patch has {batch.tokens.shape[1]} values; it must have {self.patch_embed.in_features} = in_channels * patch_size ** 2"
            )
        # Compiled, a number of this batch would become a reason to compile again for the next.
        if not torch.compiler.is_compiling() and self.pos_embed.position == "absolute" and max(batch.largest_grid) > self.pos_embed.max_size:
            raise ValueError(
                f"NaViT: the largest image has {batch.largest_grid[0]} x {batch.largest_grid[1]} patches a side; max_size is "
                f"{self.pos_embed.max_size}: resize it, build the model with a larger one or with position='fractional'"
            )


class Block(nn.Module):
    """A pre-norm transformer block on packed tokens: self-attention within each image, then a GELU feed-forward layer. Arguments: :class:`NaViT`."""

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_dim: int,
        *,
        qk_norm: QKNorm | None = "layer",
        bias: bool = False,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.heads, self.head_dim, self.qk_norm, self.attn_dropout = heads, dim // heads, qk_norm, attn_dropout
        self.norm1 = nn.LayerNorm(dim, bias=bias, **factory)
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias, **factory)
        self.q_norm = None if qk_norm is None else nn.Parameter(torch.ones(self.head_dim, **factory))
        self.k_norm = None if qk_norm is None else nn.Parameter(torch.ones(self.head_dim, **factory))
        self.proj = nn.Linear(dim, dim, bias=bias, **factory)
        self.norm2 = nn.LayerNorm(dim, bias=bias, **factory)
        self.fc1 = nn.Linear(dim, mlp_dim, bias=bias, **factory)
        self.fc2 = nn.Linear(mlp_dim, dim, bias=bias, **factory)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, layout: PackedLayout) -> Tensor:
        """[T, dim] to [T, dim]; padding rows pass through the feed-forward layer and touch nothing else."""
        q, k, v = self.qkv(self.norm1(x)).view(x.shape[0], 3, self.heads, self.head_dim).unbind(1)
        out = ops.varlen_attention(
            q,
            k,
            v,
            layout,
            dropout_p=self.attn_dropout if self.training else 0.0,
            qk_norm=self.qk_norm,
            q_norm_weight=self.q_norm,
            k_norm_weight=self.k_norm,
        )
        assert isinstance(out, Tensor)
        x = x + self.drop(self.proj(out.flatten(1)))
        return x + self.drop(self.fc2(self.drop(F.gelu(self.fc1(self.norm2(x))))))
