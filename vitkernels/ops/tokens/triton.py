"""Position embeddings and pooling of packed tokens (NaViT, arXiv 2307.06304) in Triton: kernels and their launches.

All are bound by memory. No atomics: the gradient of a table sorts the tokens by the entry they read, and one program adds up the tokens of one entry.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitkernels.ops import _triton as shared
from vitkernels.ops._triton import Tile, cast, power
from vitkernels.ops.tokens import reference

NOWHERE = tl.constexpr(2147483647)  # the row of a maximum that there is none of


# --- factorized position embedding -------------------------------------------------------------------------------------------------


@triton.jit
def _embedding(table, stride_l, stride_d, positions, length, o_t, m_t, o_d, m_td, FRACTIONAL: tl.constexpr):
    """[BLOCK_T, BLOCK_D] fp32: what the tokens find in a table; NaN where their position is outside of it."""
    b_p = tl.load(positions + o_t, mask=m_t, other=0)
    last = length - 1
    if FRACTIONAL:
        b_at = b_p * last
        b_first = tl.minimum(tl.where(b_at > 0, b_at, 0.0), last).to(tl.int32)  # NaN reads entry 0, and its share is NaN
        b_share = tl.where((b_at < 0) | (b_at > last), float("nan"), b_at - b_first)
        m_inside = m_t
    else:
        m_inside = m_t & (b_p >= 0) & (b_p <= last)
        b_first = b_p
    o_entry = b_first.to(tl.int64)[:, None] * stride_l + o_d[None, :] * stride_d
    b_e = tl.load(table + o_entry, mask=m_inside[:, None] & m_td, other=float("nan")).to(tl.float32)
    if FRACTIONAL:
        b_second = tl.minimum(b_first + 1, last)
        o_entry = b_second.to(tl.int64)[:, None] * stride_l + o_d[None, :] * stride_d
        b_next = tl.load(table + o_entry, mask=m_td, other=0.0).to(tl.float32)
        b_e = b_e * (1 - b_share)[:, None] + b_next * b_share[:, None]
    return b_e


@triton.jit(do_not_specialize=["tokens"])
def factorized_position_embedding_fwd_kernel(
    x,  # [T, D], strides below
    height_table,  # [L_h, D]
    width_table,  # [L_w, D]
    rows,  # [T] int64, or fp32: fractional
    columns,  # [T]
    out,  # [T, D], written
    stride_xt,
    stride_xd,
    stride_hl,
    stride_hd,
    stride_wl,
    stride_wd,
    tokens,
    height,
    width,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FRACTIONAL_H: tl.constexpr,
    FRACTIONAL_W: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """The sum for BLOCK_T tokens and BLOCK_D channels."""
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    i = tl.program_id(0)
    o_t = (i // blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = (i % blocks).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_t = o_t < tokens
    m_td = m_t[:, None] & (o_d < D)[None, :]
    b_h = _embedding(height_table, stride_hl, stride_hd, rows, height, o_t, m_t, o_d, m_td, FRACTIONAL_H)
    b_w = _embedding(width_table, stride_wl, stride_wd, columns, width, o_t, m_t, o_d, m_td, FRACTIONAL_W)
    b_x = tl.load(x + o_t[:, None] * stride_xt + o_d[None, :] * stride_xd, mask=m_td, other=0.0).to(tl.float32)
    tl.store(out + o_t[:, None] * D + o_d[None, :], cast(b_x + (b_h + b_w), out.dtype.element_ty, INTERPRET), mask=m_td)


@triton.jit
def factorized_position_embedding_bwd_kernel(
    grad_out,  # [T, D], strides below
    order,  # [T] int64: tokens sorted by the (first) entry they read
    starts,  # [L + 1] int64: where in that order each entry's tokens begin
    shares,  # [T] fp32: what a token's second entry counts for, or None: there is none
    grad_table,  # [L, D], written
    stride_gt,
    stride_gd,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Gradient of BLOCK_D channels of one entry: of the tokens that read it first, and of those that read it second."""
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    i = tl.program_id(0)
    i_l = (i // blocks).to(tl.int64)
    o_d = (i % blocks).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_sum = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for SECOND in tl.static_range(1 if shares is None else 2):
        begin = tl.load(starts + tl.maximum(i_l - SECOND, 0))
        end = tl.load(starts + i_l + 1 - SECOND)  # of entry 0: nobody reads it second
        for n in range(begin, end, BLOCK_T):
            o_n = n + tl.arange(0, BLOCK_T)
            m_n = o_n < end
            b_t = tl.load(order + o_n, mask=m_n, other=0)
            b_g = tl.load(grad_out + b_t[:, None] * stride_gt + o_d[None, :] * stride_gd, mask=m_n[:, None] & m_d[None, :], other=0.0).to(tl.float32)
            if shares is not None:
                b_share = tl.load(shares + b_t, mask=m_n, other=0.0)
                b_g *= (b_share if SECOND else 1 - b_share)[:, None]
            b_sum += b_g
    tl.store(grad_table + i_l * D + o_d, cast(tl.sum(b_sum, axis=0), grad_table.dtype.element_ty, INTERPRET), mask=m_d)


def _tile(dim: int) -> Tile:
    """Some 2048 values a program."""
    block_d = power(dim, 16, 128)
    return Tile({"BLOCK_T": 2048 // block_d, "BLOCK_D": block_d}, 4)


def _blocks(dim: int, tile: Tile) -> int:
    return shared.cdiv(dim, tile.blocks["BLOCK_D"])


def factorized_position_embedding(x: Tensor, height_table: Tensor, width_table: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Forward of ``vitkernels::factorized_position_embedding``; arguments and results as its schema in op.py says."""
    tokens, dim = x.shape
    out = x.new_empty((tokens, dim))
    if out.numel() == 0:
        return out
    tile = _tile(dim)
    with shared.on(x):
        shared.launch(
            factorized_position_embedding_fwd_kernel,
            shared.cdiv(tokens, tile.blocks["BLOCK_T"]) * _blocks(dim, tile),
            *(x, height_table, width_table, rows, columns, out, *x.stride(), *height_table.stride(), *width_table.stride()),
            *(tokens, height_table.shape[0], width_table.shape[0]),
            D=dim,
            FRACTIONAL_H=rows.is_floating_point(),
            FRACTIONAL_W=columns.is_floating_point(),
            INTERPRET=shared.INTERPRET,
            **tile.options,
        )
    return out


def factorized_position_embedding_backward(
    grad_out: Tensor, rows: Tensor, columns: Tensor, height: int, width: int, need_height: bool, need_width: bool
) -> tuple[Tensor, Tensor]:
    """Backward of ``vitkernels::factorized_position_embedding``; arguments and results as its schema in op.py says."""
    return _table_gradient(grad_out, rows, height, need_height), _table_gradient(grad_out, columns, width, need_width)


def _table_gradient(grad_out: Tensor, positions: Tensor, length: int, needed: bool) -> Tensor:
    dim = grad_out.shape[1]
    grad = grad_out.new_empty((length, dim) if needed else (0,))
    if not needed or grad.numel() == 0:
        return grad
    first, shares = positions, None
    if positions.is_floating_point():
        first, _, shares = reference.entries(positions, length)
    sorted_first, order = first.sort(stable=True)
    starts = torch.searchsorted(sorted_first, torch.arange(length + 1, device=first.device))
    tile = _tile(dim)
    with shared.on(grad_out):
        shared.launch(
            factorized_position_embedding_bwd_kernel,
            length * _blocks(dim, tile),
            *(grad_out, order, starts, shares, grad, *grad_out.stride()),
            D=dim,
            INTERPRET=shared.INTERPRET,
            **tile.options,
        )
    return grad


# --- masked pooling ----------------------------------------------------------------------------------------------------------------


@triton.jit
def masked_pool_fwd_kernel(
    x,  # [T, D], strides below
    cu_seqlens,  # [S + 1]
    seqused,  # [S] or None
    out,  # [S, D], written
    indices,  # [S, D] int32, written: the row of each maximum, -1 where there is none; None: the mean
    stride_xt,
    stride_xd,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Mean or maximum of BLOCK_D channels of one sequence."""
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    i = tl.program_id(0)
    i_s = (i // blocks).to(tl.int64)
    o_d = (i % blocks).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    begin = tl.load(cu_seqlens + i_s)
    end = tl.load(cu_seqlens + i_s + 1) if seqused is None else begin + tl.load(seqused + i_s)
    b_acc = tl.full([BLOCK_T, BLOCK_D], 0.0 if indices is None else float("-inf"), dtype=tl.float32)
    b_where = tl.full([BLOCK_T, BLOCK_D], NOWHERE, dtype=tl.int32)  # every BLOCK_T-th row has a maximum of its own, joined below
    for t in range(begin, end, BLOCK_T):
        o_t = t + tl.arange(0, BLOCK_T)
        m_td = (o_t < end)[:, None] & m_d[None, :]
        b_x = tl.load(x + o_t.to(tl.int64)[:, None] * stride_xt + o_d[None, :] * stride_xd, mask=m_td, other=0.0).to(tl.float32)
        if indices is None:
            b_acc += b_x
        else:
            m_better = m_td & ((b_where == NOWHERE) | (b_x > b_acc) | ((b_x != b_x) & (b_acc == b_acc)))
            b_acc = tl.where(m_better, b_x, b_acc)
            b_where = tl.where(m_better, o_t[:, None], b_where)
    if indices is None:
        b_out = tl.sum(b_acc, axis=0) / tl.maximum(end - begin, 1)
    else:
        m_nan = b_acc != b_acc
        b_largest = tl.max(tl.where(m_nan, float("-inf"), b_acc), axis=0)  # [BLOCK_D]
        b_nan = tl.min(tl.where(m_nan, b_where, NOWHERE), axis=0)
        b_first = tl.min(tl.where(b_acc == b_largest[None, :], b_where, NOWHERE), axis=0)
        b_out = tl.where(b_nan != NOWHERE, float("nan"), b_largest)
        b_first = tl.where(b_nan != NOWHERE, b_nan, b_first)
        m_some = b_first != NOWHERE
        b_out = tl.where(m_some, b_out, 0.0)
        tl.store(indices + i_s * D + o_d, tl.where(m_some, b_first, -1), mask=m_d)
    tl.store(out + i_s * D + o_d, cast(b_out, out.dtype.element_ty, INTERPRET), mask=m_d)


@triton.jit(do_not_specialize=["rows", "sequences"])
def masked_pool_bwd_kernel(
    grad_out,  # [S, D], strides below
    indices,  # [S, D] int32 or None: the mean
    pooled_into,  # [T] int64: the sequence of each row, S: none
    lengths,  # [S] int32: the rows that count
    grad_x,  # [T, D], written
    stride_gs,
    stride_gd,
    rows,
    sequences,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Gradient of BLOCK_T rows and BLOCK_D channels."""
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    i = tl.program_id(0)
    o_t = (i // blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = (i % blocks).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_td = (o_t < rows)[:, None] & (o_d < D)[None, :]
    b_s = tl.load(pooled_into + o_t, mask=o_t < rows, other=sequences)
    m_s = b_s < sequences
    m_from = m_td & m_s[:, None]
    b_g = tl.load(grad_out + b_s[:, None] * stride_gs + o_d[None, :] * stride_gd, mask=m_from, other=0.0).to(tl.float32)
    if indices is None:
        b_g /= tl.load(lengths + b_s, mask=m_s, other=1)[:, None]
    else:
        b_g = tl.where(tl.load(indices + b_s[:, None] * D + o_d[None, :], mask=m_from, other=-1) == o_t[:, None], b_g, 0.0)
    tl.store(grad_x + o_t[:, None] * D + o_d[None, :], cast(b_g, grad_x.dtype.element_ty, INTERPRET), mask=m_td)


def _pool_tile(dim: int) -> Tile:
    """Few channels a program: sequences are few, and a long one is shared out among the channels' programs alone."""
    block_d = power(dim, 16, 32)
    return Tile({"BLOCK_T": 64, "BLOCK_D": block_d}, 4)


def masked_pool(x: Tensor, cu_seqlens: Tensor, seqused: Tensor | None, largest: bool) -> tuple[Tensor, Tensor]:
    """Forward of ``vitkernels::masked_pool``; arguments and results as its schema in op.py says."""
    sequences, dim = cu_seqlens.shape[0] - 1, x.shape[1]
    out = x.new_empty((sequences, dim))
    indices = x.new_empty((sequences, dim) if largest else (0,), dtype=torch.int32)
    tile = _pool_tile(dim)
    with shared.on(x):
        shared.launch(
            masked_pool_fwd_kernel,
            sequences * _blocks(dim, tile),
            *(x, cu_seqlens, seqused, out, indices if largest else None, *x.stride()),
            D=dim,
            INTERPRET=shared.INTERPRET,
            **tile.options,
        )
    return out, indices


def masked_pool_backward(grad_out: Tensor, indices: Tensor, cu_seqlens: Tensor, seqused: Tensor | None, rows: int, largest: bool) -> Tensor:
    """Backward of ``vitkernels::masked_pool``; arguments and results as its schema in op.py says."""
    sequences, dim = grad_out.shape
    grad_x = grad_out.new_empty((rows, dim))
    tile = _tile(dim)
    lengths = cu_seqlens.diff() if seqused is None else seqused
    with shared.on(grad_out):
        shared.launch(
            masked_pool_bwd_kernel,
            shared.cdiv(rows, tile.blocks["BLOCK_T"]) * _blocks(dim, tile),
            *(grad_out, indices if largest else None, reference.pooled_into(cu_seqlens, seqused, rows), lengths, grad_x, *grad_out.stride()),
            *(rows, sequences),
            D=dim,
            INTERPRET=shared.INTERPRET,
            **tile.options,
        )
    return grad_x
