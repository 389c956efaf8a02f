"""Factorized position embeddings: one for the row and one for the column of a patch (NaViT, arXiv 2307.06304, section 2.1)."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkernels import ops


class FactorizedPositionEmbedding(nn.Module):
    """Adds phi_y(row) and phi_x(column), combined, to the embedding of each patch.

    Args:
        dim: features of a token, D.
        max_size: absolute: the most patches a side can have (maxLen). Fractional: the resolution of the embedding.
        position: ``"absolute"``: phi of the index p. ``"fractional"``: phi of r = p / (patches of that side), which any image size has.
        kind: ``"learned"``: a table of ``max_size`` vectors for each axis, fractional r at entry ``r * (max_size - 1)``, linearly interpolated;
            ``"sinusoidal"``: fixed sines and cosines of p, or of ``r * max_size``, with wavelengths up to 2 pi 10000 (Vaswani et al., arXiv
            1706.03762, section 3.5); ``"fourier"``: sines and cosines of ``2 pi f r`` (absolute: r = p / max_size), the frequencies f learned (at
            first one to max_size / 2 periods, in equal ratios), and a learned linear map to D.
        combine: ``"sum"``, ``"product"`` of the two, or ``"concat"``: half of the features for each axis.
        frequencies: how many frequencies per axis, for ``"fourier"``.

    The sum of two tables runs through :func:`vitkernels.ops.factorized_position_embedding`. state_dict: ``row_table`` and ``col_table``
    (learned: [max_size, D], concat D / 2); ``row_frequencies``, ``col_frequencies`` [frequencies] and ``row_map.weight``, ``col_map.weight``
    [D, 2 * frequencies] (fourier); nothing (sinusoidal).
    """

    def __init__(
        self,
        dim: int,
        max_size: int,
        *,
        position: Literal["absolute", "fractional"] = "absolute",
        kind: Literal["learned", "sinusoidal", "fourier"] = "learned",
        combine: Literal["sum", "product", "concat"] = "sum",
        frequencies: int = 32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        named = (
            ("position", position, ("absolute", "fractional")),
            ("kind", kind, ("learned", "sinusoidal", "fourier")),
            ("combine", combine, ("sum", "product", "concat")),
        )
        for name, value, choices in named:
            if value not in choices:
                raise ValueError(f"FactorizedPositionEmbedding: {name} is {value!r}; it must be one of {', '.join(map(repr, choices))}")
        for name, number in (("dim", dim), ("max_size", max_size), ("frequencies", frequencies)):
            if number <= 0:
                raise ValueError(f"FactorizedPositionEmbedding: {name} is {number}; it must be positive")
        width = dim // 2 if combine == "concat" else dim
        halves = (combine == "concat") + (kind == "sinusoidal")
        if dim % 2**halves:
            raise ValueError(
                f"FactorizedPositionEmbedding: dim is {dim}; with kind={kind!r} and combine={combine!r} it must be a multiple of {2**halves}"
            )
        self.dim, self.max_size, self.position, self.kind, self.combine, self.width = dim, max_size, position, kind, combine, width
        if kind == "learned":
            self.row_table = nn.Parameter(torch.empty(max_size, width, device=device, dtype=dtype))
            self.col_table = nn.Parameter(torch.empty(max_size, width, device=device, dtype=dtype))
        elif kind == "fourier":
            self.row_frequencies = nn.Parameter(torch.empty(frequencies, device=device, dtype=dtype))
            self.col_frequencies = nn.Parameter(torch.empty(frequencies, device=device, dtype=dtype))
            self.row_map = nn.Linear(2 * frequencies, width, bias=False, device=device, dtype=dtype)
            self.col_map = nn.Linear(2 * frequencies, width, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew: embeddings of variance 1 / D, frequencies as said above."""
        for name, parameter in self.named_parameters():
            if name.endswith("frequencies"):
                with torch.no_grad():
                    parameter.copy_(2 ** torch.linspace(0, math.log2(max(self.max_size / 2, 1)), len(parameter)))
            else:  # the squares of n sines and n cosines sum to n
                gain = 1.0 if self.kind == "learned" else (parameter.shape[1] / 2) ** -0.5
                nn.init.normal_(parameter, std=gain * self.dim**-0.5)

    def forward(self, x: Tensor, rows: Tensor, cols: Tensor, grids: Tensor | None = None) -> Tensor:
        """``x`` plus the embedding of its tokens' places.

        Args:
            x: [T, D].
            rows: int64 [T], the row of each token's patch in its image.
            cols: int64 [T], the column.
            grids: int64 [T, 2], rows and columns of patches of each token's image; for ``"fractional"``.

        Returns:
            [T, D] in the dtype of ``x``.

        Raises:
            ValueError: ``grids`` is missing; an absolute position of ``max_size`` or more.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        at = [rows, cols]
        if self.position == "fractional":
            if grids is None:
                raise ValueError("FactorizedPositionEmbedding: grids is None; with position='fractional' it must be int64 [T, 2]")
            at = [p.to(wide) / side for p, side in zip(at, grids.unbind(1), strict=True)]
        if self.combine == "sum" and (self.kind == "learned" or self.position == "absolute"):
            row_table, col_table = (self._table(axis, x.device, wide).to(x.dtype) for axis in ("row", "col"))
            return ops.factorized_position_embedding(x, row_table, col_table, *at)
        row, col = (self._embed(axis, places, wide) for axis, places in zip(("row", "col"), at, strict=True))
        both = row + col if self.combine == "sum" else row * col if self.combine == "product" else torch.cat((row, col), dim=1)
        return x + both.to(x.dtype)

    def _table(self, axis: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The embedding of every index, [max_size, width]."""
        return getattr(self, f"{axis}_table") if self.kind == "learned" else self._formula(axis, torch.arange(self.max_size, device=device), dtype)

    def _embed(self, axis: str, at: Tensor, dtype: torch.dtype) -> Tensor:
        """The embedding of the places ``at`` [T], indices or shares: [T, width]."""
        return _look_up(self._table(axis, at.device, dtype), at) if self.kind == "learned" else self._formula(axis, at, dtype)

    def _formula(self, axis: str, at: Tensor, dtype: torch.dtype) -> Tensor:
        """Sinusoidal or Fourier features of the places ``at``, in ``dtype`` up to the learned map."""
        index = at.to(dtype) * (self.max_size if at.is_floating_point() else 1)
        if self.kind == "sinusoidal":
            half = torch.arange(self.width // 2, device=at.device, dtype=dtype)
            angles = index[:, None] * 10000 ** (-half / (self.width // 2))
            return torch.cat((angles.sin(), angles.cos()), dim=1)
        frequencies: Tensor = getattr(self, f"{axis}_frequencies")
        linear: nn.Linear = getattr(self, f"{axis}_map")
        angles = (2 * math.pi / self.max_size) * index[:, None] * frequencies
        return linear(torch.cat((angles.sin(), angles.cos()), dim=1).to(linear.weight.dtype))

    def extra_repr(self) -> str:
        """What ``print`` shows beside the class."""
        return f"{self.dim}, max_size={self.max_size}, position={self.position!r}, kind={self.kind!r}, combine={self.combine!r}"


def _look_up(table: Tensor, at: Tensor) -> Tensor:
    """Entries ``at`` [T] of a table [n, D]: indices, or shares of the way from its first entry to its last, linearly interpolated."""
    if not at.is_floating_point():
        return F.embedding(at, table)
    place = at * (table.shape[0] - 1)
    below = place.floor().long()
    above = (below + 1).clamp_max(table.shape[0] - 1)
    return torch.lerp(F.embedding(below, table), F.embedding(above, table), (place - below).to(table.dtype)[:, None])
