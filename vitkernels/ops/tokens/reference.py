"""Position embeddings and pooling of packed tokens in plain PyTorch: no loop over the sequences, no host sync."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels.ops import _define
from vitkernels.ops.packed.layout import sequence_of_rows


def factorized_position_embedding(x: Tensor, height_table: Tensor, width_table: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The sum x + height_table[rows] + width_table[columns]; a floating position lies between two entries and takes of both."""
    return x + look_up(height_table, rows) + look_up(width_table, columns)


def look_up(table: Tensor, positions: Tensor) -> Tensor:
    """Entry ``positions`` [T] of a table [L, D]: an index, or a share of the way from the first entry to the last, linearly interpolated."""
    if not positions.is_floating_point():
        return F.embedding(positions, table)
    first, second, share = entries(positions, table.shape[0])
    return torch.lerp(F.embedding(first, table), F.embedding(second, table), share.to(table.dtype)[:, None])


def entries(positions: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each fractional position the two entries, int64, and what the second one counts for."""
    at = positions * (length - 1)
    first = at.nan_to_num(0.0).long().clamp(0, max(length - 1, 0))
    return first, (first + 1).clamp_max(max(length - 1, 0)), at - first


def masked_pool(x: Tensor, cu_seqlens: Tensor, seqused: Tensor | None, mode: str) -> Tensor:
    """Mean or maximum over the rows of each sequence, x [T, D] to [S, D]; 0 where a sequence has none."""
    sequences, dim = cu_seqlens.shape[0] - 1, x.shape[1]
    lengths = cu_seqlens.diff() if seqused is None else seqused
    sequence = pooled_into(cu_seqlens, seqused, x.shape[0])
    if mode == "mean":
        # Rows of no sequence are added to one too many, which is cut off.
        wide = x.to(_define.accumulation_dtype(x.dtype))
        total = wide.new_zeros((sequences + 1, dim)).index_add(0, sequence, wide)[:-1]
        return (total / lengths.clamp_min(1)[:, None]).to(x.dtype)
    values = x.detach()
    everywhere = sequence[:, None].expand(x.shape)
    largest = values.new_full((sequences + 1, dim), -torch.inf).scatter_reduce(0, everywhere, values, "amax").gather(0, everywhere)
    is_largest = (values == largest) | (values.isnan() & largest.isnan())
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    candidates = torch.where(is_largest, rows, x.shape[0])
    first = rows.new_full((sequences + 1, dim), x.shape[0]).scatter_reduce(0, everywhere, candidates, "amin")[:-1]
    padded = torch.cat([x, x.new_zeros((1, dim))])  # an empty sequence takes the row behind the last
    return padded.gather(0, first)


def pooled_into(cu_seqlens: Tensor, seqused: Tensor | None, rows: int) -> Tensor:
    """Of each of ``rows`` rows the sequence it counts in, int64 [rows]; S for those that count in none."""
    sequence, inside = sequence_of_rows(cu_seqlens, rows)
    if seqused is not None:
        place = torch.arange(rows, device=cu_seqlens.device) - cu_seqlens[sequence]
        inside = inside & (place < F.pad(seqused, (0, 1))[sequence])
    return torch.where(inside, sequence, cu_seqlens.shape[0] - 1)
