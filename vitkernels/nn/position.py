"""Position embeddings of another grid than they were learned on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels.ops import _check

_MODES = ("bicubic", "bilinear")


def interpolate_position_embedding(
    pos_embed: Tensor,
    old_grid: Sequence[int],
    new_grid: Sequence[int],
    *,
    num_prefix_tokens: int = 0,
    mode: str = "bicubic",
    antialias: bool = True,
) -> Tensor:
    """Position embeddings for images of another size (An Image is Worth 16x16 Words, arXiv 2010.11929, section 3.2): 2-D interpolation by their place.

    Args:
        pos_embed: [1, P + h w, D] or [P + h w, D], of any floating dtype: P prefix tokens (class, registers), then the grid row by row.
        old_grid: (h, w), in patches.
        new_grid: (h', w'), in patches.
        num_prefix_tokens: P; these have no place, and stay.
        mode: ``"bicubic"`` or ``"bilinear"``.
        antialias: whether a smaller grid averages over what it leaves out.

    Returns:
        [1, P + h' w', D] or [P + h' w', D], in the dtype of ``pos_embed``; computed in float32 at least. Differentiable. ``pos_embed`` itself where
        the grids are equal. The numbers are those of timm's ``resample_abs_pos_embed``.

    Raises:
        ValueError: a wrong shape, a grid that is not two positive integers, an unknown mode.
        TypeError: something that is no floating tensor.
    """
    op = "interpolate_position_embedding"
    _check.is_tensor(op, "pos_embed", pos_embed, "[1, P + h w, D] or [P + h w, D]")
    _check.floating(op, "pos_embed", pos_embed)
    for name, grid in (("old_grid", old_grid), ("new_grid", new_grid)):
        if len(grid) != 2 or min(grid) < 1:
            raise ValueError(f"{op}: {name} is {tuple(grid)}; it must be two positive integers, rows and columns")
    if num_prefix_tokens < 0:
        raise ValueError(f"{op}: num_prefix_tokens is {num_prefix_tokens}; it must be at least 0")
    if mode not in _MODES:
        raise ValueError(f"{op}: mode is {mode!r}; it must be one of {', '.join(map(repr, _MODES))}")
    rows, columns = old_grid
    tokens = num_prefix_tokens + rows * columns
    if pos_embed.dim() not in (2, 3) or pos_embed.shape[-2] != tokens or pos_embed.shape[:-2].numel() != 1:
        expected = f"[1, {tokens}, D] or [{tokens}, D], {num_prefix_tokens} prefix tokens and {rows} x {columns}"
        raise ValueError(f"{op}: pos_embed has shape {_check.shape_of(pos_embed)}; it must be {expected}")
    if tuple(old_grid) == tuple(new_grid):
        return pos_embed
    prefix, grid = pos_embed.split([num_prefix_tokens, rows * columns], dim=-2)
    grid = grid.reshape(1, rows, columns, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.to(torch.promote_types(grid.dtype, torch.float32)), size=tuple(new_grid), mode=mode, antialias=antialias)
    return torch.cat((prefix, grid.flatten(2).transpose(1, 2).reshape(*prefix.shape[:-2], -1, prefix.shape[-1]).to(prefix.dtype)), dim=-2)
