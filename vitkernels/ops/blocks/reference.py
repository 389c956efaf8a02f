"""Pre-norm transformer blocks in plain PyTorch: the definition."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels.ops.bottleneck.reference import Affine, Norm, inverted_bottleneck
from vitkernels.ops.memory.reference import memory_attention

Patch = tuple[int, int] | None
"""The size of a map's patches, whose positions are sequences of their own; None: all pixels of an image are one sequence."""


class Pass(NamedTuple):
    """A linear layer of each pixel, or two with an activation between; in front perhaps a norm."""

    project: Affine
    norm: Norm | None = None
    expand: Affine | None = None
    activation: str = "none"


class Softmax(NamedTuple):
    """Attention as of every ViT; the norms are over the channels of a head."""

    heads: int
    scale: float | None = None  # None: one over the root of a head's channels
    q_norm: Norm | None = None
    k_norm: Norm | None = None


class Mixing(NamedTuple):
    """Re-Attention (arXiv 2103.11886, section 4.2) with a LayerNorm over the heads; ``weight`` is [out, in]."""

    heads: int
    scale: float | None
    weight: Tensor
    norm: Norm


class Memory(NamedTuple):
    """The memory of tasks beside a model's tokens (arXiv 2203.15243, section 3.2), as keys and values. A task is one more token, that sees the
    model's, itself and its memory; the model's tokens do not see it.
    """

    k: Tensor  # [blocks, M, H, D]
    v: Tensor
    groups: tuple[int, ...]  # how much of it is each task's


class Block(NamedTuple):
    """``x = x + project_out(attention(project_in(x)))``, then ``x + mlp(x)``. ``project_in`` and ``mlp`` have a norm, ``mlp`` two layers."""

    project_in: Pass
    attention: Softmax | Mixing
    project_out: Pass
    mlp: Pass


def transformer_blocks(x: Tensor, blocks: Iterable[Block], patch: Patch = None, first: int | None = None, memory: Memory | None = None) -> Tensor:
    """[B, C, H, W] through the blocks, one after the other; with ``first`` the first so many pixels of that, [B, C, 1, first]. With ``memory``
    [B, C, 1, N + T], the tokens of T tasks behind the model's, which stay behind the ``first`` of these.
    """
    for index, block in enumerate(blocks):
        qkv, attention = _pass(x, block.project_in), block.attention
        if memory is None:
            attended = _attend(qkv, attention, patch)
        else:
            tokens = x.shape[-1] - len(memory.groups)
            of_tasks = _attend_tasks(qkv, attention, tokens, memory.k[index], memory.v[index], memory.groups)
            attended = torch.cat([_attend(qkv[..., :tokens], attention, None), of_tasks], dim=-1)
        x = x + _pass(attended, block.project_out)
        x = x + _pass(x, block.mlp)
    if first is None:
        return x
    pixels, tasks = x.flatten(2)[:, :, None], 0 if memory is None else len(memory.groups)
    return torch.cat([pixels[..., :first], pixels[..., pixels.shape[-1] - tasks :]], dim=-1)


def _pass(x: Tensor, one: Pass) -> Tensor:
    return inverted_bottleneck(x, **one._asdict())


def _attend_tasks(qkv: Tensor, attention: Softmax | Mixing, tokens: int, memory_k: Tensor, memory_v: Tensor, groups: tuple[int, ...]) -> Tensor:
    """Of [B, 3 H D, 1, N + T] the attention of the last T tokens, [B, H D, 1, T]."""
    q, k, v = qkv.squeeze(2).unflatten(1, (3, attention.heads, -1)).permute(1, 0, 2, 4, 3).unbind(0)  # [B, H, N + T, D]
    scale = q.shape[-1] ** -0.5 if attention.scale is None else attention.scale
    keys, own = slice(None, tokens), slice(tokens, None)
    out, _ = memory_attention(
        q[:, :, own],
        k[:, :, keys],
        v[:, :, keys],
        memory_k,
        memory_v,
        own_k=k[:, :, own],
        own_v=v[:, :, own],
        groups=groups,
        scale=scale,
        dropout_p=0.0,
        seed=None,
    )
    return out.flatten(2).mT.unsqueeze(2)


def _attend(qkv: Tensor, attention: Softmax | Mixing, patch: Patch) -> Tensor:
    """[B, 3 H D, H', W'] to [B, H D, H', W']."""
    (batch, _, height, width), heads = qkv.shape, attention.heads
    ph, pw = patch or (1, 1)
    split = qkv.view(batch, 3, heads, -1, height // ph, ph, width // pw, pw).permute(1, 0, 5, 7, 2, 4, 6, 3)
    q, k, v = split.flatten(5, 6).unbind(0)  # [B, ph, pw, heads, tokens, D]
    if isinstance(attention, Mixing):
        scale = q.shape[-1] ** -0.5 if attention.scale is None else attention.scale
        maps = (q @ k.mT * scale).softmax(-1)
        mixed = (attention.weight @ maps.flatten(-2)).view_as(maps)
        norm = attention.norm
        mixed = F.layer_norm(mixed.movedim(-3, -1), (heads,), norm.weight, norm.bias, norm.eps).movedim(-1, -3)
        out = mixed @ v
    else:
        q, k = (x if n is None else F.layer_norm(x, x.shape[-1:], n.weight, n.bias, n.eps) for x, n in ((q, attention.q_norm), (k, attention.k_norm)))
        out = F.scaled_dot_product_attention(q, k, v, scale=attention.scale)
    out = out.unflatten(4, (height // ph, width // pw)).permute(0, 3, 6, 4, 1, 5, 2)  # [B, heads, D, H'/ph, ph, W'/pw, pw]
    return out.reshape(batch, -1, height, width)
