"""Similarity of attention maps (DeepViT, arXiv 2103.11886, section 3) without the maps: a metric in plain PyTorch, on any device.

It has no kernel and so no entry in the registry; see this folder's README.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vitkernels.ops import _check, _define

BLOCK_BYTES = {"cpu": 1 << 20}
"""Of one layer's maps, how much is formed at a time, by device type: what a core's L2 cache holds."""
OTHER_BLOCK_BYTES = 64 << 20
"""The same of a GPU, which wants more work in a launch."""
LEAST_NORM = 1e-8  # of torch.nn.functional.cosine_similarity


@torch.no_grad()
def attention_similarity(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor | None = None,
    k2: Tensor | None = None,
    *,
    scale: float | tuple[float, float] | None = None,
    dim: int = -2,
) -> Tensor:
    """Mean cosine similarity of attention maps softmax(q k^T scale): of two layers for each head or, of one layer, between its heads.

    Two layers: ``F.cosine_similarity(map1, map2, dim).mean((0, 2))``. One layer (``q2`` and ``k2`` None): the same of each pair of its heads.

    Args:
        q1: [B, H, N, D], any strides, as sliced from a packed [B, N, 3, H, D].
        k1: [B, H, N, D].
        q2: [B, H, N, D2] of another layer, or None. Its head dimension may be another one; batch, heads and tokens are the same.
        k2: [B, H, N, D2], or None.
        scale: of the logits, a number for both layers or one for each; default the layer's own D ** -0.5.
        dim: which vectors of the maps are compared. -2: columns, how much one token gives to each of the others, as in the paper. -1: rows, what one
            token looks at.

    All share one device and one floating dtype of any precision. Low precision is upcast; everything is computed in float32 (float64 for float64),
    under autocast too. Neither map is ever stored: blocks of query rows are formed and forgotten, see ``BLOCK_BYTES`` and the README.

    Returns:
        float32 (float64 for float64): [H] of two layers, [H, H] of one, whose diagonal is 1 but for rounding. NaN if there is no token (B or N is 0),
        as any mean of nothing. It is a metric, computed under ``torch.no_grad``: it has no gradient, whatever the inputs require.

    Raises:
        ValueError: a wrong shape, one of q2 and k2 alone, a mix of devices, a wrong ``dim`` or ``scale``.
        TypeError: a wrong or mixed dtype, something that is no tensor.

    Paper: DeepViT, arXiv 2103.11886, section 3.
    """
    op = "attention_similarity"
    layers = [("q1", q1, "k1", k1, "D")]
    if q2 is not None or k2 is not None:
        if q2 is None or k2 is None:
            given, missing = ("q2", "k2") if k2 is None else ("k2", "q2")
            raise ValueError(f"{op}: {given} is given and {missing} is None; it must be both or neither")
        layers.append(("q2", q2, "k2", k2, "D2"))
    for q_name, q, k_name, k, symbol in layers:
        for name, tensor in ((q_name, q), (k_name, k)):
            symbols = f"[B, H, N, {symbol}]"
            _check.is_tensor(op, name, tensor, symbols)
            _check.strided(op, name, tensor)
            _check.floating(op, name, tensor)
            if tensor.dim() != 4:
                raise ValueError(f"{op}: {name} has shape {_check.shape_of(tensor)}; it must be 4-dimensional, {symbols}")
            _check.same_kind(op, name, tensor, "q1", q1)
        _check.has_shape(op, k_name, k, q.shape, f"[B, H, N, {symbol}] of {q_name}")
        if not (q.shape[1] and q.shape[3]):
            raise ValueError(f"{op}: {q_name} has shape {_check.shape_of(q)}; H and {symbol} must be at least 1")
    if q2 is not None:
        _check.has_shape(op, "q2", q2, (*q1.shape[:3], q2.shape[3]), "[B, H, N, D2] with q1's B, H and N")
    if dim not in (-1, -2):
        raise ValueError(f"{op}: dim is {dim!r}; it must be -1 (rows of the maps) or -2 (columns)")
    scales = scale if isinstance(scale, (tuple, list)) else (scale,) * len(layers)
    if len(scales) != len(layers):
        raise ValueError(f"{op}: scale holds {len(scales)} numbers; it must hold {len(layers)}, one for each layer")

    compare = _rows if dim == -1 else _columns
    with torch.autocast(q1.device.type, enabled=False):
        total = compare([(q, k, q.shape[3] ** -0.5 if s is None else float(s)) for (_, q, _, k, _), s in zip(layers, scales, strict=True)])
    return total / (q1.shape[0] * q1.shape[2])


Layers = Sequence[tuple[Tensor, Tensor, float]]
"""q, k and scale of one layer or of two."""


def _blocks(q: Tensor) -> tuple[int, int]:
    """Into how many elements of the batch and how many query rows at a time the maps are cut."""
    batch, heads, tokens, _ = q.shape
    size = _define.accumulation_dtype(q.dtype).itemsize
    allowed = BLOCK_BYTES.get(q.device.type, OTHER_BLOCK_BYTES)
    rows = min(tokens, max(1, allowed // (heads * max(1, tokens) * size)))
    elements = min(batch, max(1, allowed // (heads * max(1, rows * tokens) * size)))
    return max(1, elements), max(1, rows)


def _maps(layers: Layers, begin: int, end: int, rows: int) -> Iterator[list[Tensor]]:
    """The maps of some elements of the batch, block by block of query rows, of each layer: [elements, H, rows, N]."""
    wide = _define.accumulation_dtype(layers[0][0].dtype)
    keys = [k[begin:end].to(wide).transpose(-2, -1) for _, k, _ in layers]
    for row in range(0, layers[0][0].shape[2], rows):
        yield [(q[begin:end, :, row : row + rows].to(wide) * scale @ key).softmax(dim=-1) for (q, _, scale), key in zip(layers, keys, strict=True)]


def _rows(layers: Layers) -> Tensor:
    """The sum over batch and rows of the similarity of rows: [H], or [H, H] of one layer."""
    q = layers[0][0]
    batch, heads, _, _ = q.shape
    elements, rows = _blocks(q)
    total = q.new_zeros((heads,) * (3 - len(layers)), dtype=_define.accumulation_dtype(q.dtype))
    for begin in range(0, batch, elements):
        for maps in _maps(layers, begin, begin + elements, rows):
            # A row of N weights that sum to 1 is at least N ** -0.5 long.
            units = [m.div_(torch.linalg.vector_norm(m, dim=-1, keepdim=True)) for m in maps]
            if len(units) == 2:
                total += torch.linalg.vecdot(units[0], units[1]).sum((0, 2))
            else:
                by_row = units[0].transpose(1, 2)  # [elements, rows, H, N]
                total += (by_row @ by_row.transpose(-2, -1)).sum((0, 1))
    return total


def _columns(layers: Layers) -> Tensor:
    """The sum over batch and columns of the similarity of columns: [H], or [H, H] of one layer. A column is complete only after the last block."""
    q = layers[0][0]
    batch, heads, tokens, _ = q.shape
    wide = _define.accumulation_dtype(q.dtype)
    _, rows = _blocks(q)
    total = q.new_zeros((heads,) * (3 - len(layers)), dtype=wide)
    for element in range(batch):
        products = q.new_zeros((heads, tokens) if len(layers) == 2 else (tokens, heads, heads), dtype=wide)
        squares = [q.new_zeros((heads, tokens), dtype=wide) for _ in layers]
        for maps in _maps(layers, element, element + 1, rows):
            for m, square in zip(maps, squares, strict=True):
                square += torch.linalg.vecdot(m[0], m[0], dim=-2)
            if len(maps) == 2:
                products += torch.linalg.vecdot(maps[0][0], maps[1][0], dim=-2)
            else:
                by_column = maps[0][0].permute(2, 0, 1).contiguous()  # [N, H, rows]
                products += by_column @ by_column.transpose(-2, -1)
        norms = [square.sqrt().clamp_min(LEAST_NORM) for square in squares]
        if len(layers) == 2:
            total += (products / (norms[0] * norms[1])).sum(-1)
        else:
            by_token = norms[0].T
            total += (products / (by_token[:, :, None] * by_token[:, None, :])).sum(0)
    return total
