"""Pre-norm transformer blocks in one call: how they are packed, and the op.

    x = x + project_out(attention(project_in(norm(x))))
    x = x + mlp(norm(x))

For inference, like :mod:`vitkernels.ops.bottleneck.op`, whose passes these are: it has no gradient and is not part of :mod:`vitkernels.ops`. What
calls it is a model whose weights stay packed from call to call. This folder's README.md says what the one call saves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels import backends
from vitkernels.ops import _define
from vitkernels.ops.blocks.reference import Block, Memory, Mixing, Pass, Patch
from vitkernels.ops.bottleneck import op as bottleneck
from vitkernels.ops.bottleneck.reference import ACTIVATIONS, Norm

NAME = "transformer_blocks"
MOST_MIXED = 64
"""Heads whose maps the kernel mixes."""

backends.declare(NAME, backends.Support(triton=()))


def _fake(x: Tensor, *args: Any) -> Tensor:
    first, groups = args[-4], args[-1]
    like = x.new_empty((*x.shape[:2], 1, first + len(groups))) if first else x
    return torch.empty_like(like, memory_format=torch.channels_last)


_define.define_for_inference(
    NAME,
    schema="(Tensor x, Tensor matrices, Tensor vectors, Tensor numbers, int[] program, int patch_height, int patch_width, int first, "
    "Tensor? memory_k, Tensor? memory_v, int[] groups) -> Tensor",
    fake=_fake,
    instead="the layers they stand for",
)
_op = torch.ops.vitkernels.transformer_blocks.default


class Packed(NamedTuple):
    """Blocks as the kernel takes them.

    ``program`` holds for each block its heads, the channels of a head, those inside the MLP, the code of the MLP's activation, and whether its
    queries and keys have a norm, its maps are mixed, and its ``project_out`` has a norm.
    """

    matrices: Tensor  # of each pass the panels, of expand before those of project; in the accumulation dtype, or all in pairs of bfloat16
    vectors: Tensor  # of each pass the norm, where it has one, and the biases; norms of queries and keys behind project_in. Padded to whole panels
    numbers: Tensor  # float64; of each block a scale and five eps, then the mix and its norm
    program: tuple[int, ...]


def pack(blocks: Sequence[Block], dtype: torch.dtype) -> Packed:
    """Blocks with weights in the accumulation dtype, for activations of ``dtype``."""
    passes = [[_pack(one, dtype) for one in (block.project_in, block.project_out, block.mlp)] for block in blocks]
    if len({matrix.dtype for of_block in passes for one in of_block for matrix in _matrices(one)}) > 1:  # some are no pairs
        passes = [[_pack(one, None) for one in (block.project_in, block.project_out, block.mlp)] for block in blocks]
    matrices = [matrix.flatten() for of_block in passes for one in of_block for matrix in _matrices(one)]
    vectors = [_padded(vector) for block, of_block in zip(blocks, passes, strict=True) for vector in _vectors(block, of_block)]
    numbers = [number.flatten() for block in blocks for number in _numbers(block)]
    return Packed(torch.cat(matrices), torch.cat(vectors), torch.cat(numbers), tuple(number for block in blocks for number in _program(block)))


def _pack(one: Pass, activations: torch.dtype | None) -> bottleneck.Packed:
    return bottleneck.pack(**one._asdict(), activations=activations)


def _matrices(packed: bottleneck.Packed) -> Iterator[Tensor]:
    return (tensor for tensor in packed.tensors[2::2] if tensor is not None)


def _vectors(block: Block, passes: list[bottleneck.Packed]) -> Iterator[Tensor]:
    for one, packed in zip((block.project_in, block.project_out, block.mlp), passes, strict=True):
        _, _, _, expand_bias, _, _, _, project_bias = packed.tensors
        assert project_bias is not None
        if one.norm is not None:
            yield from _affine(one.norm, (one.expand or one.project).weight.shape[1], project_bias)
        if expand_bias is not None:
            yield expand_bias
        yield project_bias
        if one is block.project_in and not isinstance(block.attention, Mixing):
            heads, dim = block.attention.heads, _dim(block)
            for norm in (block.attention.q_norm, block.attention.k_norm):
                if norm is not None:
                    yield from (vector.repeat(heads) for vector in _affine(norm, dim, project_bias))


def _numbers(block: Block) -> Iterator[Tensor]:
    attention, dim = block.attention, _dim(block)
    scale = dim**-0.5 if attention.scale is None else attention.scale
    of_heads, of_mix = (None, attention.norm) if isinstance(attention, Mixing) else (attention.q_norm, None)
    norms = (block.project_in.norm, of_heads, block.project_out.norm, block.mlp.norm, of_mix)
    eps = [0.0 if norm is None else norm.eps for norm in norms]
    like = block.project_in.project.weight.new_empty((), dtype=torch.float64)
    yield like.new_tensor([scale, *eps])
    if isinstance(attention, Mixing):
        yield attention.weight.to(like)
        yield from _affine(attention.norm, attention.heads, like)


def _program(block: Block) -> tuple[int, ...]:
    assert block.mlp.expand is not None
    attention, activation = block.attention, tuple(ACTIVATIONS).index(block.mlp.activation)
    normed = not isinstance(attention, Mixing) and attention.q_norm is not None
    flags = normed, isinstance(attention, Mixing), block.project_out.norm is not None
    return attention.heads, _dim(block), block.mlp.expand.weight.shape[0], activation, *map(int, flags)


def _dim(block: Block) -> int:
    """Channels of a head."""
    return block.project_out.project.weight.shape[1] // block.attention.heads


def _affine(norm: Norm, channels: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The weight and the bias of a norm, ones and zeros where it has none."""
    weight = like.new_ones(channels) if norm.weight is None else norm.weight.to(like)
    return weight, like.new_zeros(channels) if norm.bias is None else norm.bias.to(like)


def _padded(vector: Tensor) -> Tensor:
    return F.pad(vector, (0, -vector.shape[0] % bottleneck.PANEL))


def run(x: Tensor, packed: Packed, patch: Patch = None, first: int | None = None, memory: Memory | None = None) -> Tensor:
    """The blocks of ``x``.

    Args:
        x: [B, C, H, W]; float32, bfloat16, float16 or float64, on the CPU. Channels_last is read as it lies.
        packed: the blocks, packed for activations of its dtype.
        patch: (height, width) of patches that divide the map: pixels attend to those at their own position in all patches of their image, as in
            MobileViT. None: to all of their image.
        first: how many pixels of each image are wanted, row by row from its first one on, without a patch; None: all. Of the last block the others
            get keys and values, and nothing else.
        memory: of T tasks; x is then [B, C, 1, N + T], the last T tokens of an image those of the tasks. The others, where they are three or more,
            are what they are without, to the bit, and so, where ``first`` is three or more, are these. Blocks whose maps are mixed or whose queries
            have a norm do not take it, nor goes it with ``patch``.

    Returns:
        [B, C, H, W], or [B, C, 1, first], with memory [B, C, 1, first + T], in channels_last memory, of the dtype of ``x``.

    Raises:
        RuntimeError: shapes or dtypes that do not go together.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    tensors = packed.matrices, packed.vectors, packed.numbers
    places = *(patch or (0, 0)), first or 0, *(memory or (None, None, ()))
    return _define.call(_op, _define.differentiable(x), x, *tensors, packed.program, *places)
