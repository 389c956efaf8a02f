"""Attention over packed sequences (NaViT, arXiv 2307.06304, section 2.1) in Triton: kernels and their launches.

Flash attention (FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2) on tiles of the *packed* rows, no matter where sequences begin, so that
several short ones share a tile. The layout's work list says which rows each row sees, [begin, end). A tile loops from the least begin to the
largest end of its rows and hides, row by row, what lies outside: never more than tiles cut at the ends of sequences would loop over. Sequences do
not overlap, so a tile's rows either all see the same, and but for the last block nothing is hidden, or no block is seen by all of them. A row that
sees nothing (padding) asks for nothing: it takes part in the arithmetic of its tile and is set to zero in the end. Tiles with the most to see start
first.

The norm of q and k costs a multiplication per score: the rows of the side a program owns are normed once and take the other side's weight with
them; the other side's rows go into the product as they are, and its factor (and mean) is applied to the scores, see :func:`_folded`.

Backward: delta (rowsum(dO * O) less the gradient of the logsumexp), then a kernel over query tiles for dQ and one over key tiles for dK and dV, which
sums over the heads of its group; the norms' backward is their epilogue; the gradient of the bias loops over the sequences once more. No atomics:
partial sums are stored and added in a fixed order, so results are equal bit for bit from run to run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitkernels.ops import _triton as shared
from vitkernels.ops._triton import LOG2E, Tile, cast, dot, load_lse, load_rows, philox, wide
from vitkernels.ops.packed import layout, reference

TILE = tl.constexpr(layout.TILE)

# --- pieces of kernels -------------------------------------------------------------------------------------------------------------


@triton.jit
def _place(order, heads, BLOCK: tl.constexpr):
    """(first row, head) of this program: BLOCK rows of a tile of the work list. The heads of a tile run beside each other."""
    i = tl.program_id(0)
    parts: tl.constexpr = TILE // BLOCK
    i_tile = tl.load(order + i // heads // parts)
    return i_tile * TILE + i // heads % parts * BLOCK, i % heads


@triton.jit
def _seen_by(ranges, o_row, rows, BLOCK: tl.constexpr, PLAIN: tl.constexpr):
    """What the rows of a tile see: whether anything, begin and end of each, [rows]; the least begin, the largest end, and up to where from the least
    begin on every row sees every block of BLOCK (PLAIN). Rows that see nothing are in nobody's way: theirs is all that the others see.
    """
    m_row = o_row < rows
    b_begin = tl.load(ranges + 2 * o_row, mask=m_row, other=0)
    b_end = tl.load(ranges + 2 * o_row + 1, mask=m_row, other=0)
    m_sees = b_end > b_begin
    last = tl.max(tl.where(m_sees, b_end, 0), axis=0)
    first = tl.minimum(tl.min(tl.where(m_sees, b_begin, 2147483647), axis=0), last)
    b_begin = tl.where(m_sees, b_begin, first)
    b_end = tl.where(m_sees, b_end, last)
    whole = first
    if PLAIN:
        one = (tl.max(b_begin, axis=0) == first) & (tl.min(b_end, axis=0) == last)
        whole = tl.where(one, last - (last - first) % BLOCK, first)
    return m_sees, b_begin, b_end, first, last, whole


@triton.jit
def _in_use(ranges, o_row, last, GAPS: tl.constexpr):
    """Which rows of a block to read. GAPS: between sequences there may be padding, and what lies there, even NaN, must not be multiplied by 0."""
    m_row = o_row < last
    if GAPS:
        m_row = tl.load(ranges + 2 * o_row, mask=m_row, other=0) < tl.load(ranges + 2 * o_row + 1, mask=m_row, other=0)
    return m_row


@triton.jit
def _store_rows(out, start, m_row, heads, i_h, o_d, m_d, value, D: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr):
    """Write one head's rows of [rows, heads, D] contiguous."""
    o_out = (tl.arange(0, BLOCK) * (heads * D))[:, None] + o_d[None, :]
    out += (tl.cast(start, tl.int64) * heads + i_h) * D
    tl.store(out + o_out, cast(value, out.dtype.element_ty, INTERPRET), mask=m_row[:, None] & m_d[None, :])


@triton.jit
def _moments(b_x, m_d, eps, D: tl.constexpr, NORM: tl.constexpr):
    """Of each row: what the norm subtracts from it, the factor it multiplies by, and the length or deviation behind the factor; fp32 [rows]."""
    b_x = b_x.to(tl.float32)
    b_mean = tl.zeros([b_x.shape[0]], dtype=tl.float32)
    if NORM == 3:
        b_mean = tl.sum(b_x, axis=1) / D
        b_x = tl.where(m_d[None, :], b_x - b_mean[:, None], 0.0)
    b_square = tl.sum(b_x * b_x, axis=1)
    if NORM == 2:
        b_size = tl.sqrt(b_square)
        return b_mean, (D**0.5) / tl.maximum(b_size, eps), b_size
    return b_mean, tl.rsqrt(b_square / D + eps), b_square


@triton.jit
def _mean_and_factor(b_x, m_d, eps, D: tl.constexpr, NORM: tl.constexpr):
    """The first two of :func:`_moments` for rows that are read as they are: a row of zeros has the factor 0."""
    b_mean = tl.zeros([b_x.shape[0]], dtype=tl.float32)
    b_factor = b_mean
    if NORM > 0:
        b_mean, b_factor, b_size = _moments(b_x, m_d, eps, D, NORM)
        b_factor = tl.where(b_size > 0, b_factor, 0.0)
    return b_mean, b_factor


@triton.jit
def _folded(b_x, m_row, weight, bias, other_weight, other_bias, o_d, m_d, eps, D: tl.constexpr, NORM: tl.constexpr, INTERPRET: tl.constexpr):
    """Rows of one side of the scores, so folded with their norm that the other side is read as it is.

    A normed row of the other side is (x - mean) * factor * other_weight + other_bias, and its product with a normed row y of this side is
    (y * other_weight . x - sum(y * other_weight) * mean) * factor + y . other_bias. Returns y * other_weight, its sum, and y . other_bias.
    """
    b_sum = tl.zeros([b_x.shape[0]], dtype=tl.float32)
    b_offset = tl.zeros([b_x.shape[0]], dtype=tl.float32)
    if NORM == 0:
        return b_x, b_sum, b_offset
    b_mean, b_factor, _ = _moments(b_x, m_d, eps, D, NORM)
    b_y = (b_x.to(tl.float32) - b_mean[:, None]) * b_factor[:, None]
    if weight is not None:
        b_y *= tl.load(weight + o_d, mask=m_d, other=0.0)[None, :]
    if bias is not None:
        b_y += tl.load(bias + o_d, mask=m_d, other=0.0)[None, :]
    b_y = tl.where(m_row[:, None] & m_d[None, :], b_y, 0.0)
    if other_bias is not None:
        b_offset = tl.sum(b_y * tl.load(other_bias + o_d, mask=m_d, other=0.0)[None, :], axis=1)
    if other_weight is not None:
        b_y *= tl.load(other_weight + o_d, mask=m_d, other=0.0)[None, :]
    b_y = cast(b_y, b_x.dtype, INTERPRET)
    if NORM == 3:
        b_sum = tl.sum(b_y.to(tl.float32), axis=1)
    return b_y, b_sum, b_offset


@triton.jit
def _scores(
    b_own,
    b_sum,
    b_offset,
    b_other,
    m_d,
    scale,
    eps,
    D: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """[own rows, other rows] of scores from :func:`_folded` rows and others as they are; and the others' means and factors, 0 for a row of zeros."""
    b_s = dot(b_own, tl.trans(b_other), tl.zeros([b_own.shape[0], b_other.shape[0]], dtype=tl.float32), PRECISION, INTERPRET)
    b_mean, b_factor = _mean_and_factor(b_other, m_d, eps, D, NORM)
    if NORM == 3:
        b_s -= b_sum[:, None] * b_mean[None, :]
    if NORM > 0:
        b_s = b_s * b_factor[None, :] + b_offset[:, None]
    return b_s * scale, b_mean, b_factor


@triton.jit
def _add_products(b_grad, b_means, b_sums, b_ds, b_other, b_mean, b_factor, NORM: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """``b_grad`` plus the scores' gradient times the other rows, and the sums over it that :func:`_unfolded` needs."""
    if NORM > 0:
        b_sums += tl.sum(b_ds, axis=1)
        b_ds *= b_factor[None, :]
    b_ds = cast(b_ds, b_other.dtype, INTERPRET)
    if NORM == 3:
        b_means += tl.sum(b_ds.to(tl.float32) * b_mean[None, :], axis=1)
    return dot(b_ds, b_other, b_grad, PRECISION, INTERPRET), b_means, b_sums


@triton.jit
def _unfolded(b_grad, b_means, b_sums, other_weight, other_bias, o_d, m_d, NORM: tl.constexpr):
    """Gradient of normed rows from what :func:`_add_products` summed."""
    if NORM == 3:
        b_grad -= b_means[:, None]
    if other_weight is not None:
        b_grad *= tl.load(other_weight + o_d, mask=m_d, other=0.0)[None, :]
    if other_bias is not None:
        b_grad += b_sums[:, None] * tl.load(other_bias + o_d, mask=m_d, other=0.0)[None, :]
    return b_grad


@triton.jit
def _norm_backward(b_dy, b_x, m_row, weight, part_weight, part_bias, o_part, o_d, m_d, eps, D: tl.constexpr, NORM: tl.constexpr):
    """Gradient of rows ``b_x`` from that of their normed values; the tile's share of the weight's and the bias's gradient is stored."""
    m_x = m_row[:, None] & m_d[None, :]
    b_mean, b_factor, b_size = _moments(b_x, m_d, eps, D, NORM)
    b_y = tl.where(m_x, (b_x.to(tl.float32) - b_mean[:, None]) * b_factor[:, None], 0.0)
    b_dy = tl.where(m_x, b_dy, 0.0)
    if part_weight is not None:
        tl.store(part_weight + o_part + o_d, tl.sum(b_dy * b_y, axis=0), mask=m_d)
    if part_bias is not None:
        tl.store(part_bias + o_part + o_d, tl.sum(b_dy, axis=0), mask=m_d)
    if weight is not None:
        b_dy *= tl.load(weight + o_d, mask=m_d, other=0.0)[None, :]
    b_along = tl.sum(b_dy * b_y, axis=1) / D  # [rows]
    if NORM == 2:
        b_along = tl.where(b_size >= eps, b_along, 0.0)  # below, the factor is constant
    b_dx = b_dy - b_y * b_along[:, None]
    if NORM == 3:
        b_dx -= tl.sum(b_dy, axis=1)[:, None] / D
    return b_dx * b_factor[:, None]


@triton.jit
def _bias_of(bias, o_row, b_first, o_column, b_begin, m_seen, stride_row, stride_column, stride_sequence, length, WIDE: tl.constexpr):
    """[rows, columns] of one head's bias by position in the sequence: the row's own begins at ``b_first``, what it sees at ``b_begin``.

    With a stride from sequence to sequence each has its own, and all have ``length`` rows.
    """
    o_bias = wide(o_row - b_first, WIDE)[:, None] * stride_row + wide(o_column[None, :] - b_begin[:, None], WIDE) * stride_column
    if stride_sequence is not None:
        o_bias += ((b_first // length).to(tl.int64) * stride_sequence)[:, None]
    return tl.load(bias + o_bias, mask=m_seen, other=0.0)


@triton.jit
def _kept(seed, start_q, o_k, i_h, limit, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_M, BLOCK_N]: which weights dropout keeps, for queries from ``start_q`` on, a multiple of 4."""
    b_bits = philox(seed, (start_q // 4 + tl.arange(0, BLOCK_M // 4))[:, None], o_k[None, :], i_h, limit)  # [BLOCK_M / 4, BLOCK_N]
    return tl.reshape((b_bits[:, None, :] >> tl.arange(0, 4)[None, :, None]) & 1, [BLOCK_M, BLOCK_N]) != 0


@triton.jit
def _kept_transposed(seed, start_q, o_k, i_h, limit, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_N, BLOCK_M]: the same, a key a row."""
    b_bits = philox(seed, (start_q // 4 + tl.arange(0, BLOCK_M // 4))[None, :], o_k[:, None], i_h, limit)  # [BLOCK_N, BLOCK_M / 4]
    return tl.reshape((b_bits[:, :, None] >> tl.arange(0, 4)[None, None, :]) & 1, [BLOCK_N, BLOCK_M]) != 0


@triton.jit
def _scaled_values(b_v, keep_scale):
    """Values as dropout scales the weights that it keeps, and what remains of that scale for their products.

    In fp32 the values take all of it: so does the output, of which delta is made, and where a query sees one key both round alike.
    """
    if b_v.dtype == tl.float32:
        return b_v * keep_scale, 1.0
    return b_v, keep_scale


# --- forward -----------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["total_q", "total_k"])
def varlen_attention_fwd_kernel(
    q,  # [T_q, H, D], strides below
    k,  # [T_k, H_k, D]
    v,  # [T_k, H_k, D_v]
    bias,  # [H, M_q, M_k] fp32 or None
    q_weight,  # [H, D] fp32 or None, rows stride_qw apart; like the next three
    q_bias,  # [H, D]
    k_weight,  # [H_k, D]
    k_bias,  # [H_k, D]
    work,  # layout.work_list
    seed,  # [] int64 or None: no dropout
    out,  # [T_q, H, D_v], written
    lse,  # [H, T_q] fp64, written
    stride_qt,
    stride_qh,
    stride_qd,
    stride_kt,
    stride_kh,
    stride_kd,
    stride_vt,
    stride_vh,
    stride_vd,
    stride_bh,
    stride_bm,
    stride_bn,
    stride_bs,  # or None: all sequences have the same
    bias_queries,  # rows and columns of the bias, where stride_bs is not None
    bias_keys,
    stride_qw,
    stride_qb,
    stride_kw,
    stride_kb,
    total_q,
    total_k,
    heads,
    group,
    scale,
    norm_eps,
    drop_limit,
    keep_scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    NORM: tl.constexpr,
    GAPS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Output and logsumexp of BLOCK_M queries of one head."""
    q_ranges = work + 2 * total_q.to(tl.int64)
    start_m, i_h = _place(q_ranges + 2 * total_k.to(tl.int64), heads, BLOCK_M)
    i_hk = (i_h // group).to(tl.int64)
    o_m = start_m + tl.arange(0, BLOCK_M)
    m_m = o_m < total_q
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_dv = tl.arange(0, BLOCK_DV)
    m_dv = o_dv < DV
    PLAIN: tl.constexpr = bias is None and seed is None  # whose arithmetic is more than that of hiding: one loop for all blocks
    m_sees, b_begin, b_end, first, last, whole = _seen_by(work, o_m, total_q, BLOCK_N, PLAIN)
    if bias is not None:
        bias += i_h.to(tl.int64) * stride_bh
        b_first = tl.load(q_ranges + 2 * b_begin, mask=m_sees, other=0)  # where the query's own sequence begins
    if q_weight is not None:
        q_weight += i_h * stride_qw
    if q_bias is not None:
        q_bias += i_h * stride_qb
    if k_weight is not None:
        k_weight += i_hk * stride_kw
    if k_bias is not None:
        k_bias += i_hk * stride_kb
    k += i_hk * stride_kh
    v += i_hk * stride_vh

    b_q = load_rows(q + i_h.to(tl.int64) * stride_qh, start_m, m_m, stride_qt, o_d, m_d, stride_qd, BLOCK_M, WIDE)  # [BLOCK_M, BLOCK_D]
    b_q, b_q_sum, b_q_offset = _folded(b_q, m_m, q_weight, q_bias, k_weight, k_bias, o_d, m_d, norm_eps, D, NORM, INTERPRET)
    b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_out = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    for EDGE in tl.static_range(0 if PLAIN else 1, 2):
        for n in tl.range(whole if EDGE else first, last if EDGE else whole, BLOCK_N, disable_licm=True):
            o_n = n + tl.arange(0, BLOCK_N)
            m_n = _in_use(q_ranges, o_n, last, GAPS and EDGE)
            b_k = load_rows(k, n, m_n, stride_kt, o_d, m_d, stride_kd, BLOCK_N, WIDE)  # [BLOCK_N, BLOCK_D]
            b_s, _, _ = _scores(b_q, b_q_sum, b_q_offset, b_k, m_d, scale, norm_eps, D, NORM, PRECISION, INTERPRET)
            if EDGE:
                m_mn = m_sees[:, None] & (o_n[None, :] >= b_begin[:, None]) & (o_n[None, :] < b_end[:, None])
                if bias is not None:
                    b_s += _bias_of(bias, o_m, b_first, o_n, b_begin, m_mn, stride_bm, stride_bn, stride_bs, bias_queries, WIDE)
                b_s = tl.where(m_mn, b_s, float("-inf"))
            b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
            b_ref = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_rescale = tl.exp2((b_max - b_ref) * LOG2E)
            b_p = tl.exp2((b_s - b_ref[:, None]) * LOG2E)  # [BLOCK_M, BLOCK_N]
            b_sum = b_sum * b_rescale + tl.sum(b_p, axis=1)
            if seed is not None:
                b_p = tl.where(_kept(seed, start_m, o_n, i_h, drop_limit, BLOCK_M, BLOCK_N), b_p, 0.0)
            b_v = load_rows(v, n, m_n, stride_vt, o_dv, m_dv, stride_vd, BLOCK_N, WIDE)  # [BLOCK_N, BLOCK_DV]
            b_out = dot(cast(b_p, b_v.dtype, INTERPRET), b_v, b_out * b_rescale[:, None], PRECISION, INTERPRET)
            b_max = b_new

    m_blind = (b_sum == 0) | ~m_sees
    b_sum = tl.where(m_blind, 1.0, b_sum)
    b_out = tl.where(m_blind[:, None], 0.0, b_out * (keep_scale / b_sum)[:, None])
    _store_rows(out, start_m, m_m, heads, i_h, o_dv, m_dv, b_out, DV, BLOCK_M, INTERPRET)
    b_lse = tl.where(m_blind, float("-inf"), b_max.to(tl.float64) + tl.log(b_sum).to(tl.float64))
    tl.store(lse + i_h.to(tl.int64) * total_q + o_m, b_lse, mask=m_m)


# --- backward ----------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["total_q"])
def varlen_attention_bwd_delta_kernel(
    grad_out,  # [T_q, H, D_v], strides below
    out,  # [T_q, H, D_v] contiguous
    grad_lse,  # [H, T_q], strides below, or None
    lse,  # [H, T_q]
    delta,  # [H, T_q], written
    stride_gt,
    stride_gh,
    stride_gd,
    stride_lh,
    stride_lt,
    total_q,
    heads,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """What is taken from the gradient of each weight of a query: the weights' own mean of it, rowsum(dO * O), less the gradient of the logsumexp.

    The row's product is the diagonal of a matrix product, so that it rounds as dO V^T does: where a query sees one key only, O is its V, and the
    gradient of q and k is exactly zero.
    """
    i = tl.program_id(0)
    i_h = (i % heads).to(tl.int64)
    start_m = i // heads * BLOCK_M
    o_m = start_m + tl.arange(0, BLOCK_M)
    m_m = o_m < total_q
    o_dv = tl.arange(0, BLOCK_DV)
    m_dv = o_dv < DV
    b_g = load_rows(grad_out + i_h * stride_gh, start_m, m_m, stride_gt, o_dv, m_dv, stride_gd, BLOCK_M, WIDE)  # [BLOCK_M, BLOCK_DV]
    b_o = load_rows(out + i_h * DV, start_m, m_m, heads * DV, o_dv, m_dv, 1, BLOCK_M, False)
    b_products = dot(b_g, tl.trans(b_o), tl.zeros([BLOCK_M, BLOCK_M], dtype=tl.float32), PRECISION, INTERPRET)
    m_diagonal = tl.arange(0, BLOCK_M)[:, None] == tl.arange(0, BLOCK_M)[None, :]
    b_delta = tl.sum(tl.where(m_diagonal, b_products, 0.0), axis=1)
    if grad_lse is not None:
        b_delta -= tl.load(grad_lse + i_h * stride_lh + o_m.to(tl.int64) * stride_lt, mask=m_m, other=0.0)
    b_lse = tl.load(lse + i_h * total_q + o_m, mask=m_m, other=0.0)
    tl.store(delta + i_h * total_q + o_m, tl.where(b_lse == float("-inf"), 0.0, b_delta), mask=m_m)


@triton.jit(do_not_specialize=["total_q", "total_k"])
def varlen_attention_bwd_query_kernel(
    grad_out,  # [T_q, H, D_v], strides below
    q,  # [T_q, H, D]
    k,  # [T_k, H_k, D]
    v,  # [T_k, H_k, D_v]
    bias,  # [H, M_q, M_k] or None
    q_weight,  # as in the forward
    q_bias,
    k_weight,
    k_bias,
    work,  # layout.work_list
    seed,  # [] int64 or None
    lse,  # [H, T_q]
    delta,  # [H, T_q]
    grad_q,  # [T_q, H, D] or None, written
    part_weight,  # [tiles, H, D] or None, written: this tile's share of q_weight's gradient
    part_bias,  # [tiles, H, D] or None, written
    stride_gt,
    stride_gh,
    stride_gd,
    stride_qt,
    stride_qh,
    stride_qd,
    stride_kt,
    stride_kh,
    stride_kd,
    stride_vt,
    stride_vh,
    stride_vd,
    stride_bh,
    stride_bm,
    stride_bn,
    stride_bs,  # or None: all sequences have the same
    bias_queries,  # rows and columns of the bias, where stride_bs is not None
    bias_keys,
    stride_qw,
    stride_qb,
    stride_kw,
    stride_kb,
    total_q,
    total_k,
    heads,
    group,
    scale,
    norm_eps,
    drop_limit,
    keep_scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    NORM: tl.constexpr,
    GAPS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Gradient of BLOCK_M queries of one head."""
    q_ranges = work + 2 * total_q.to(tl.int64)
    start_m, i_h = _place(q_ranges + 2 * total_k.to(tl.int64), heads, BLOCK_M)
    i_hk = (i_h // group).to(tl.int64)
    o_m = start_m + tl.arange(0, BLOCK_M)
    m_m = o_m < total_q
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_dv = tl.arange(0, BLOCK_DV)
    m_dv = o_dv < DV
    PLAIN: tl.constexpr = bias is None and seed is None  # whose arithmetic is more than that of hiding: one loop for all blocks
    m_sees, b_begin, b_end, first, last, whole = _seen_by(work, o_m, total_q, BLOCK_N, PLAIN)
    if bias is not None:
        bias += i_h.to(tl.int64) * stride_bh
        b_first = tl.load(q_ranges + 2 * b_begin, mask=m_sees, other=0)
    if q_weight is not None:
        q_weight += i_h * stride_qw
    if q_bias is not None:
        q_bias += i_h * stride_qb
    if k_weight is not None:
        k_weight += i_hk * stride_kw
    if k_bias is not None:
        k_bias += i_hk * stride_kb
    k += i_hk * stride_kh
    v += i_hk * stride_vh
    q += i_h.to(tl.int64) * stride_qh
    grad_out += i_h.to(tl.int64) * stride_gh

    b_q = load_rows(q, start_m, m_m, stride_qt, o_d, m_d, stride_qd, BLOCK_M, WIDE)  # [BLOCK_M, BLOCK_D]
    b_q, b_q_sum, b_q_offset = _folded(b_q, m_m, q_weight, q_bias, k_weight, k_bias, o_d, m_d, norm_eps, D, NORM, INTERPRET)
    b_g = load_rows(grad_out, start_m, m_m, stride_gt, o_dv, m_dv, stride_gd, BLOCK_M, WIDE)  # [BLOCK_M, BLOCK_DV]
    b_high, b_low = load_lse(lse + i_h.to(tl.int64) * total_q, o_m, m_m)  # [BLOCK_M]
    b_delta = tl.load(delta + i_h.to(tl.int64) * total_q + o_m, mask=m_m, other=0.0)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_means = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_sums = tl.zeros([BLOCK_M], dtype=tl.float32)
    for EDGE in tl.static_range(0 if PLAIN else 1, 2):
        for n in tl.range(whole if EDGE else first, last if EDGE else whole, BLOCK_N, disable_licm=True):
            o_n = n + tl.arange(0, BLOCK_N)
            m_n = _in_use(q_ranges, o_n, last, GAPS and EDGE)
            b_k = load_rows(k, n, m_n, stride_kt, o_d, m_d, stride_kd, BLOCK_N, WIDE)  # [BLOCK_N, BLOCK_D]
            b_s, b_mean, b_factor = _scores(b_q, b_q_sum, b_q_offset, b_k, m_d, scale, norm_eps, D, NORM, PRECISION, INTERPRET)
            if EDGE:
                m_mn = m_sees[:, None] & (o_n[None, :] >= b_begin[:, None]) & (o_n[None, :] < b_end[:, None])
                if bias is not None:
                    b_s += _bias_of(bias, o_m, b_first, o_n, b_begin, m_mn, stride_bm, stride_bn, stride_bs, bias_queries, WIDE)
                b_s = tl.where(m_mn, b_s, float("-inf"))
            b_p = tl.exp2(((b_s - b_high[:, None]) - b_low[:, None]) * LOG2E)  # [BLOCK_M, BLOCK_N]
            b_v = load_rows(v, n, m_n, stride_vt, o_dv, m_dv, stride_vd, BLOCK_N, WIDE)  # [BLOCK_N, BLOCK_DV]
            if seed is not None:
                b_v, rest_scale = _scaled_values(b_v, keep_scale)
            b_dp = dot(b_g, tl.trans(b_v), tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32), PRECISION, INTERPRET)
            if seed is not None:
                b_dp = tl.where(_kept(seed, start_m, o_n, i_h, drop_limit, BLOCK_M, BLOCK_N), b_dp * rest_scale, 0.0)
            b_ds = b_p * (b_dp - b_delta[:, None])
            b_dq, b_means, b_sums = _add_products(b_dq, b_means, b_sums, b_ds, b_k, b_mean, b_factor, NORM, PRECISION, INTERPRET)

    b_dq = tl.where(m_sees[:, None], b_dq * scale, 0.0)
    if NORM > 0:
        b_dq = _unfolded(b_dq, b_means * scale, b_sums * scale, k_weight, k_bias, o_d, m_d, NORM)
        b_x = load_rows(q, start_m, m_sees, stride_qt, o_d, m_d, stride_qd, BLOCK_M, WIDE)
        o_part = (start_m // BLOCK_M * heads + i_h) * D
        b_dq = _norm_backward(b_dq, b_x, m_sees, q_weight, part_weight, part_bias, o_part, o_d, m_d, norm_eps, D, NORM)
    if grad_q is not None:
        _store_rows(grad_q, start_m, m_m, heads, i_h, o_d, m_d, b_dq, D, BLOCK_M, INTERPRET)


@triton.jit(do_not_specialize=["total_q", "total_k"])
def varlen_attention_bwd_key_kernel(
    grad_out,  # [T_q, H, D_v], strides below
    q,  # [T_q, H, D]
    k,  # [T_k, H_k, D]
    v,  # [T_k, H_k, D_v]
    bias,  # [H, M_q, M_k] or None
    q_weight,  # as in the forward
    q_bias,
    k_weight,
    k_bias,
    work,  # layout.work_list
    seed,  # [] int64 or None
    lse,  # [H, T_q]
    delta,  # [H, T_q]
    grad_k,  # [T_k, H_k, D] or None, written
    grad_v,  # [T_k, H_k, D_v] or None, written
    part_weight,  # [tiles, H_k, D] or None, written: this tile's share of k_weight's gradient
    part_bias,  # [tiles, H_k, D] or None, written
    stride_gt,
    stride_gh,
    stride_gd,
    stride_qt,
    stride_qh,
    stride_qd,
    stride_kt,
    stride_kh,
    stride_kd,
    stride_vt,
    stride_vh,
    stride_vd,
    stride_bh,
    stride_bm,
    stride_bn,
    stride_bs,  # or None: all sequences have the same
    bias_queries,  # rows and columns of the bias, where stride_bs is not None
    bias_keys,
    stride_qw,
    stride_qb,
    stride_kw,
    stride_kb,
    total_q,
    total_k,
    heads,
    group,
    scale,
    norm_eps,
    drop_limit,
    keep_scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    NORM: tl.constexpr,
    GAPS: tl.constexpr,
    NEED_K: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Gradients of BLOCK_N keys and values of one head, from all heads of its group. Scores are transposed here: a key a row."""
    # In fp32 the norm is folded into the queries, as in the forward: folded into the keys, which is done once for all, scores would differ from those
    # of the logsumexp by their rounding, and a score of 60 rounds by twenty steps of its weight.
    SAME: tl.constexpr = NORM > 0 and k.dtype.element_ty == tl.float32
    q_ranges = work + 2 * total_q.to(tl.int64)
    order = q_ranges + 2 * total_k.to(tl.int64) + tl.cdiv(total_q, TILE)
    start_n, i_hk = _place(order, heads // group, BLOCK_N)
    o_n = start_n + tl.arange(0, BLOCK_N)
    m_n = o_n < total_k
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_dv = tl.arange(0, BLOCK_DV)
    m_dv = o_dv < DV
    PLAIN: tl.constexpr = bias is None and seed is None
    m_seen, b_begin, b_end, first, last, whole = _seen_by(q_ranges, o_n, total_k, BLOCK_M, PLAIN)
    if seed is not None:
        whole = whole // 4 * 4  # four queries share a draw
    if bias is not None:
        b_first = tl.load(work + 2 * b_begin, mask=m_seen, other=0)  # where the key's own sequence begins
    if k_weight is not None:
        k_weight += i_hk * stride_kw
    if k_bias is not None:
        k_bias += i_hk * stride_kb

    k += i_hk.to(tl.int64) * stride_kh
    b_x = load_rows(k, start_n, m_n, stride_kt, o_d, m_d, stride_kd, BLOCK_N, WIDE)  # [BLOCK_N, BLOCK_D]
    b_v = load_rows(v + i_hk.to(tl.int64) * stride_vh, start_n, m_n, stride_vt, o_dv, m_dv, stride_vd, BLOCK_N, WIDE)  # [BLOCK_N, BLOCK_DV]
    if seed is not None:
        b_v, rest_scale = _scaled_values(b_v, keep_scale)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)
    for i_g in tl.range(group, disable_licm=True):
        i_h = (i_hk * group + i_g).to(tl.int64)
        q_head = q + i_h * stride_qh
        g_head = grad_out + i_h * stride_gh
        q_weight_head = q_weight
        q_bias_head = q_bias
        if q_weight is not None:
            q_weight_head = q_weight + i_h * stride_qw
        if q_bias is not None:
            q_bias_head = q_bias + i_h * stride_qb
        if not SAME:
            b_k, b_k_sum, b_k_offset = _folded(b_x, m_n, k_weight, k_bias, q_weight_head, q_bias_head, o_d, m_d, norm_eps, D, NORM, INTERPRET)
        b_grad = b_dk
        b_means = tl.zeros([BLOCK_N], dtype=tl.float32)
        b_sums = tl.zeros([BLOCK_N], dtype=tl.float32)
        if NORM > 0:
            b_grad = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
        for EDGE in tl.static_range(0 if PLAIN else 1, 2):
            for m in tl.range(whole if EDGE else first, last if EDGE else whole, BLOCK_M, disable_licm=True):
                o_m = m + tl.arange(0, BLOCK_M)
                m_m = _in_use(work, o_m, last, GAPS and EDGE)
                b_q = load_rows(q_head, m, m_m, stride_qt, o_d, m_d, stride_qd, BLOCK_M, WIDE)  # [BLOCK_M, BLOCK_D]
                if SAME:
                    b_own, b_q_sum, b_q_offset = _folded(
                        b_q, m_m, q_weight_head, q_bias_head, k_weight, k_bias, o_d, m_d, norm_eps, D, NORM, INTERPRET
                    )
                    b_s, _, _ = _scores(b_own, b_q_sum, b_q_offset, b_x, m_d, scale, norm_eps, D, NORM, PRECISION, INTERPRET)
                    b_s = tl.trans(b_s)
                    b_mean, b_factor = _mean_and_factor(b_q, m_d, norm_eps, D, NORM)
                else:
                    b_s, b_mean, b_factor = _scores(b_k, b_k_sum, b_k_offset, b_q, m_d, scale, norm_eps, D, NORM, PRECISION, INTERPRET)
                if EDGE:
                    m_nm = m_seen[:, None] & (o_m[None, :] >= b_begin[:, None]) & (o_m[None, :] < b_end[:, None])
                    if bias is not None:
                        b_s += _bias_of(bias + i_h * stride_bh, o_n, b_first, o_m, b_begin, m_nm, stride_bn, stride_bm, stride_bs, bias_keys, WIDE)
                    b_s = tl.where(m_nm, b_s, float("-inf"))
                b_high, b_low = load_lse(lse + i_h * total_q, o_m, m_m)
                b_p = tl.exp2(((b_s - b_high[None, :]) - b_low[None, :]) * LOG2E)  # [BLOCK_N, BLOCK_M]
                b_g = load_rows(g_head, m, m_m, stride_gt, o_dv, m_dv, stride_gd, BLOCK_M, WIDE)  # [BLOCK_M, BLOCK_DV]
                b_dropped = b_p
                if seed is not None:
                    m_kept = _kept_transposed(seed, m, o_n, i_h.to(tl.int32), drop_limit, BLOCK_M, BLOCK_N)
                    b_dropped = tl.where(m_kept, b_p, 0.0)
                if grad_v is not None:
                    b_dv = dot(cast(b_dropped, b_g.dtype, INTERPRET), b_g, b_dv, PRECISION, INTERPRET)
                if NEED_K:
                    b_dp = dot(b_v, tl.trans(b_g), tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32), PRECISION, INTERPRET)
                    if seed is not None:
                        b_dp = tl.where(m_kept, b_dp * rest_scale, 0.0)
                    b_ds = b_p * (b_dp - tl.load(delta + i_h * total_q + o_m, mask=m_m, other=0.0)[None, :])
                    b_grad, b_means, b_sums = _add_products(b_grad, b_means, b_sums, b_ds, b_q, b_mean, b_factor, NORM, PRECISION, INTERPRET)
        if NORM > 0:
            b_dk += _unfolded(b_grad, b_means, b_sums, q_weight_head, q_bias_head, o_d, m_d, NORM)
        else:
            b_dk = b_grad

    if grad_v is not None:
        b_dv = tl.where(m_seen[:, None], b_dv * keep_scale, 0.0)
        _store_rows(grad_v, start_n, m_n, heads // group, i_hk, o_dv, m_dv, b_dv, DV, BLOCK_N, INTERPRET)
    if NEED_K:
        b_dk = tl.where(m_seen[:, None], b_dk * scale, 0.0)
        if NORM > 0:
            b_x = load_rows(k, start_n, m_seen, stride_kt, o_d, m_d, stride_kd, BLOCK_N, WIDE)
            o_part = (start_n // BLOCK_N * (heads // group) + i_hk) * D
            b_dk = _norm_backward(b_dk, b_x, m_seen, k_weight, part_weight, part_bias, o_part, o_d, m_d, norm_eps, D, NORM)
        if grad_k is not None:
            _store_rows(grad_k, start_n, m_n, heads // group, i_hk, o_d, m_d, b_dk, D, BLOCK_N, INTERPRET)


@triton.jit(do_not_specialize=["total_q", "sequences", "split_length"])
def varlen_attention_bwd_bias_kernel(
    grad_out,  # [T_q, H, D_v], strides below
    q,  # [T_q, H, D]
    k,  # [T_k, H_k, D]
    v,  # [T_k, H_k, D_v]
    bias,  # [H, M_q, M_k]
    q_weight,  # as in the forward
    q_bias,
    k_weight,
    k_bias,
    seed,  # [] int64 or None
    lse,  # [H, T_q]
    delta,  # [H, T_q]
    cu_seqlens_q,  # [S + 1]
    cu_seqlens_k,  # [S + 1]
    seqused_k,  # [S] or None
    parts,  # [splits, H, M_q, M_k], written: what this split's sequences give to the gradient
    stride_gt,
    stride_gh,
    stride_gd,
    stride_qt,
    stride_qh,
    stride_qd,
    stride_kt,
    stride_kh,
    stride_kd,
    stride_vt,
    stride_vh,
    stride_vd,
    stride_bh,
    stride_bm,
    stride_bn,
    stride_bs,  # or None: all sequences have the same
    bias_queries,  # rows and columns of the bias, where stride_bs is not None
    bias_keys,
    stride_qw,
    stride_qb,
    stride_kw,
    stride_kb,
    longest_q,
    longest_k,
    total_q,
    sequences,
    split_length,
    heads,
    group,
    scale,
    norm_eps,
    drop_limit,
    keep_scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    NORM: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Gradient of a tile of one head's bias, [M_q, M_k], summed over a split's sequences that reach it."""
    i = tl.program_id(0)
    i_n = i % tl.cdiv(longest_k, BLOCK_N)
    i_m = i // tl.cdiv(longest_k, BLOCK_N) % tl.cdiv(longest_q, BLOCK_M)
    i = i // tl.cdiv(longest_k, BLOCK_N) // tl.cdiv(longest_q, BLOCK_M)
    i_h = (i % heads).to(tl.int64)
    i_hk = i_h // group
    i_s = i // heads
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)  # positions in the sequence
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_dv = tl.arange(0, BLOCK_DV)
    m_dv = o_dv < DV
    if q_weight is not None:
        q_weight += i_h * stride_qw
    if q_bias is not None:
        q_bias += i_h * stride_qb
    if k_weight is not None:
        k_weight += i_hk * stride_kw
    if k_bias is not None:
        k_bias += i_hk * stride_kb
    o_bias = wide(o_m, WIDE)[:, None] * stride_bm + wide(o_n, WIDE)[None, :] * stride_bn
    m_bias = (o_m < longest_q)[:, None] & (o_n < longest_k)[None, :]
    if stride_bs is not None:
        bias += i_s.to(tl.int64) * stride_bs  # a split is one sequence
    b_bias = tl.load(bias + i_h * stride_bh + o_bias, mask=m_bias, other=0.0)  # [BLOCK_M, BLOCK_N]

    b_sum = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for s in range(i_s * split_length, tl.minimum((i_s + 1) * split_length, sequences)):
        q_begin = tl.load(cu_seqlens_q + s)
        k_begin = tl.load(cu_seqlens_k + s)
        q_length = tl.load(cu_seqlens_q + s + 1) - q_begin
        k_length = tl.load(cu_seqlens_k + s + 1) - k_begin if seqused_k is None else tl.load(seqused_k + s)
        if (i_m * BLOCK_M < q_length) & (i_n * BLOCK_N < k_length):
            m_m = o_m < q_length
            m_n = o_n < k_length
            start_m = q_begin + i_m * BLOCK_M
            start_n = k_begin + i_n * BLOCK_N
            b_q = load_rows(q + i_h * stride_qh, start_m, m_m, stride_qt, o_d, m_d, stride_qd, BLOCK_M, WIDE)  # [BLOCK_M, BLOCK_D]
            b_q, b_q_sum, b_q_offset = _folded(b_q, m_m, q_weight, q_bias, k_weight, k_bias, o_d, m_d, norm_eps, D, NORM, INTERPRET)
            b_k = load_rows(k + i_hk * stride_kh, start_n, m_n, stride_kt, o_d, m_d, stride_kd, BLOCK_N, WIDE)  # [BLOCK_N, BLOCK_D]
            b_s, _, _ = _scores(b_q, b_q_sum, b_q_offset, b_k, m_d, scale, norm_eps, D, NORM, PRECISION, INTERPRET)
            b_s += b_bias
            b_high, b_low = load_lse(lse + i_h * total_q, q_begin + o_m, m_m)
            b_p = tl.where(m_n[None, :], tl.exp2(((b_s - b_high[:, None]) - b_low[:, None]) * LOG2E), 0.0)  # [BLOCK_M, BLOCK_N]
            b_g = load_rows(grad_out + i_h * stride_gh, start_m, m_m, stride_gt, o_dv, m_dv, stride_gd, BLOCK_M, WIDE)  # [BLOCK_M, BLOCK_DV]
            b_v = load_rows(v + i_hk * stride_vh, start_n, m_n, stride_vt, o_dv, m_dv, stride_vd, BLOCK_N, WIDE)  # [BLOCK_N, BLOCK_DV]
            if seed is not None:
                b_v, rest_scale = _scaled_values(b_v, keep_scale)
            b_dp = dot(b_g, tl.trans(b_v), tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32), PRECISION, INTERPRET)
            if seed is not None:
                o_row = q_begin + o_m
                b_bits = philox(seed, (o_row // 4)[:, None], (k_begin + o_n)[None, :], i_h.to(tl.int32), drop_limit)
                b_dp = tl.where((b_bits >> (o_row % 4)[:, None]) & 1 != 0, b_dp * rest_scale, 0.0)
            b_delta = tl.load(delta + i_h * total_q + q_begin + o_m, mask=m_m, other=0.0)
            b_sum += b_p * (b_dp - b_delta[:, None])
    o_part = (i.to(tl.int64) * longest_q + o_m[:, None]) * longest_k + o_n[None, :]
    tl.store(parts + o_part, b_sum, mask=m_bias)


# --- tiles -------------------------------------------------------------------------------------------------------------------------


def forward_tile(dim: int, dtype: torch.dtype, *, norm: bool, extras: bool) -> Tile:
    """The forward. ``dim``: the wider of both head dims; ``extras``: with a bias or dropout, which take registers, as a norm does."""
    if dtype is torch.float32:
        return _tile(16 if extras or dim > 64 else 32, 32, 8, registers=255 if extras or dim <= 64 else None)
    return _tile(64, 32 if norm or extras or dim > 128 else 64, 4 if dim <= 64 else 8, registers=128 if dim <= 32 else None)


def query_tile(dim: int, dtype: torch.dtype, *, norm: bool, extras: bool) -> Tile:
    """The backward over query tiles, with a second matrix of the scores' size."""
    if dtype is torch.float32:
        return _tile(16, 16, 4, registers=255) if extras or dim > 64 else _tile(32, 32, 8, registers=128)
    return _tile(32 if extras else 64, 32 if norm or extras or dim > 128 else 64, 4 if dim <= 64 else 8)


def key_tile(dim: int, dtype: torch.dtype, *, norm: bool, extras: bool) -> Tile:
    """The backward over key tiles, with a second accumulator, too."""
    if dtype is torch.float32:
        return _tile(16, 32 if dim <= 64 and not norm else 16, 8, registers=255)
    if extras:
        return _tile(32 if dim <= 64 else 16, 32, 8, num_stages=1)
    return _tile(32, 32 if norm or dim > 128 else 64, 4 if dim <= 64 else 8)


def bias_tile(dim: int, dtype: torch.dtype) -> Tile:
    """The bias's gradient."""
    if dtype is torch.float32:
        return _tile(16, 16, 4) if dim <= 128 else _tile(16, 16, 8, registers=255)
    return _tile(32, 32, 4 if dim <= 64 else 8)


def _tile(block_m: int, block_n: int, num_warps: int, registers: int | None = None, num_stages: int = 2) -> Tile:
    """Exact fp32 has its operands in registers, so its tiles are small. On AMD four wavefronts are the threads of eight warps."""
    return Tile({"BLOCK_M": block_m, "BLOCK_N": block_n}, num_warps if torch.version.hip is None else 4, registers, num_stages)


# --- launches ----------------------------------------------------------------------------------------------------------------------

_WIDEST = 256  # head dim


def _strides(*tensors: Tensor | None) -> tuple[int, ...]:
    """Of the last three dimensions."""
    return tuple(stride for t in tensors for stride in (t.stride()[-3:] if t is not None else (0, 0, 0)))


def _of_sequences(bias: Tensor | None) -> tuple[int | None, ...]:
    """Of a bias in four dimensions, [sequences, H, N, M]: its stride from sequence to sequence, N and M."""
    return (None, None, None) if bias is None or bias.dim() == 3 else (bias.stride(0), *bias.shape[2:])


class _Call(NamedTuple):
    """What the launches of one call have in common."""

    total_q: int
    total_k: int
    heads: int
    key_heads: int
    dim: int
    value_dim: int
    extras: bool
    norms: tuple[Tensor | None, ...]
    scalars: tuple[float | int, ...]
    constants: dict[str, Any]

    @staticmethod
    def of(
        tensors: tuple[Tensor, ...],
        bias: Tensor | None,
        seqused_k: Tensor | None,
        norms: tuple[Tensor | None, ...],
        qk_norm: int,
        norm_eps: float,
        scale: float,
        dropout_p: float,
    ) -> _Call:
        """``tensors``: q, k, v and whatever else is read by rows."""
        q, k, v = tensors[:3]
        if max(q.shape[2], v.shape[2]) > _WIDEST:
            raise ValueError(f"varlen_attention: q has head_dim {q.shape[2]} and v {v.shape[2]}; the Triton kernels take at most {_WIDEST}")
        far = [(layout.TILE - 1) * t.stride(0) + (t.shape[2] - 1) * t.stride(2) for t in tensors]
        if bias is not None:
            far.append((bias.shape[-2] - 1) * bias.stride(-2) + (bias.shape[-1] - 1) * bias.stride(-1))
        return _Call(
            q.shape[0],
            k.shape[0],
            q.shape[1],
            k.shape[1],
            q.shape[2],
            v.shape[2],
            bias is not None or dropout_p > 0,
            tuple(w if w is None or w.stride(1) == 1 else w.contiguous() for w in norms),
            (scale, norm_eps, reference.drop_limit(dropout_p), 1 / (1 - dropout_p) if dropout_p < 1 else 0.0),
            {
                "D": q.shape[2],
                "DV": v.shape[2],
                "BLOCK_D": max(16, shared.next_power_of_2(q.shape[2])),
                "BLOCK_DV": max(16, shared.next_power_of_2(v.shape[2])),
                "NORM": qk_norm,
                "GAPS": seqused_k is not None,
                "WIDE": max(far) >= 2**31,
                "PRECISION": "ieee",
                "INTERPRET": shared.INTERPRET,
            },
        )

    @property
    def widest(self) -> int:
        """The wider of both head dims."""
        return max(self.dim, self.value_dim)

    @property
    def norm_strides(self) -> tuple[int, ...]:
        """Between the heads of the norms' weights."""
        return tuple(0 if w is None else w.stride(0) for w in self.norms)

    @property
    def sizes(self) -> tuple[float | int, ...]:
        """The numbers at the end of a kernel's arguments."""
        return (self.total_q, self.total_k, self.heads, self.heads // self.key_heads, *self.scalars)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    work: Tensor | None,
    bias: Tensor | None,
    q_norm_weight: Tensor | None,
    q_norm_bias: Tensor | None,
    k_norm_weight: Tensor | None,
    k_norm_bias: Tensor | None,
    qk_norm: int,
    norm_eps: float,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Forward of ``vitkernels::varlen_attention``; arguments and results as its schema in op.py says."""
    norms = (q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias)
    c = _Call.of((q, k, v), bias, seqused_k, norms, qk_norm, norm_eps, scale, dropout_p)
    out = q.new_empty((c.total_q, c.heads, c.value_dim))
    lse = q.new_empty((c.heads, c.total_q), dtype=torch.float64)
    if work is None:
        work = layout.work_list(cu_seqlens_q, cu_seqlens_k, seqused_k, c.total_q, c.total_k)
    tile_of = query_tile if bias is not None and bias.dim() == 4 else forward_tile  # the sequence's place in a bias takes registers, too
    tile = shared.fill(tile_of(c.widest, q.dtype, norm=c.constants["NORM"] != 0, extras=c.extras), "BLOCK_M", c.total_q, c.heads, q.device)
    with shared.on(q):
        shared.launch(
            varlen_attention_fwd_kernel,
            shared.cdiv(c.total_q, layout.TILE) * (layout.TILE // tile.blocks["BLOCK_M"]) * c.heads,
            *(q, k, v, bias, *c.norms, work, seed, out, lse),
            *(*_strides(q, k, v, bias), *_of_sequences(bias), *c.norm_strides, *c.sizes),
            **c.constants,
            **tile.options,
        )
    return out, lse


def varlen_attention_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    work: Tensor | None,
    bias: Tensor | None,
    q_norm_weight: Tensor | None,
    q_norm_bias: Tensor | None,
    k_norm_weight: Tensor | None,
    k_norm_bias: Tensor | None,
    qk_norm: int,
    norm_eps: float,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    need_q: bool,
    need_k: bool,
    need_v: bool,
    need_bias: bool,
    need_norm: bool,
) -> tuple[Tensor, ...]:
    """Backward of ``vitkernels::varlen_attention``; arguments and results as its schema in op.py says."""
    if grad_out is None:
        grad_out = out.new_zeros(()).expand(out.shape)
    norms = (q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias)
    c = _Call.of((q, k, v, grad_out), bias, seqused_k, norms, qk_norm, norm_eps, scale, dropout_p)
    if work is None:
        work = layout.work_list(cu_seqlens_q, cu_seqlens_k, seqused_k, c.total_q, c.total_k)

    def wanted(needed: bool, like: Tensor | None) -> Tensor | None:
        return like.new_empty(like.shape) if needed and like is not None else None

    grad_q, grad_k, grad_v, grad_bias = wanted(need_q, q), wanted(need_k, k), wanted(need_v, v), wanted(need_bias, bias)
    grad_norms = [wanted(need_norm, w) for w in norms]
    need_query, need_key = need_q or _any(grad_norms[:2]), need_k or _any(grad_norms[2:])

    delta = torch.empty_like(lse, dtype=torch.float32)
    rows = (*_strides(grad_out, q, k, v, bias), *_of_sequences(bias))
    with shared.on(q):
        if need_query or need_key or need_bias:
            shared.launch(
                varlen_attention_bwd_delta_kernel,
                shared.cdiv(c.total_q, 16) * c.heads,
                *(grad_out, out, grad_lse, lse, delta, *grad_out.stride(), *((0, 0) if grad_lse is None else grad_lse.stride()), c.total_q, c.heads),
                DV=c.value_dim,
                BLOCK_M=16,
                num_warps=1,
                **{name: c.constants[name] for name in ("BLOCK_DV", "WIDE", "PRECISION", "INTERPRET")},
            )
        if need_query:
            tile = shared.fill(query_tile(c.widest, q.dtype, norm=c.constants["NORM"] != 0, extras=c.extras), "BLOCK_M", c.total_q, c.heads, q.device)
            tiles = shared.cdiv(c.total_q, layout.TILE) * (layout.TILE // tile.blocks["BLOCK_M"])
            parts = _parts(tiles, grad_norms[:2])
            shared.launch(
                varlen_attention_bwd_query_kernel,
                tiles * c.heads,
                *(grad_out, q, k, v, bias, *c.norms, work, seed, lse, delta, grad_q, *parts),
                *(*rows, *c.norm_strides, *c.sizes),
                **c.constants,
                **tile.options,
            )
            _sum(parts, grad_norms[:2])
        if need_key or need_v:
            tile = shared.fill(
                key_tile(c.widest, q.dtype, norm=c.constants["NORM"] != 0, extras=c.extras), "BLOCK_N", c.total_k, c.key_heads, q.device
            )
            tiles = shared.cdiv(c.total_k, layout.TILE) * (layout.TILE // tile.blocks["BLOCK_N"])
            grad_bias_of_k = grad_norms[3]
            if grad_bias_of_k is not None and grad_lse is None:
                # What is added to all keys moves all scores of a query alike, which its softmax does not feel; summed up, it would be rounding.
                grad_bias_of_k.zero_()
                grad_bias_of_k = None
            parts = _parts(tiles, [grad_norms[2], grad_bias_of_k])
            shared.launch(
                varlen_attention_bwd_key_kernel,
                tiles * c.key_heads,
                *(grad_out, q, k, v, bias, *c.norms, work, seed, lse, delta, grad_k, grad_v, *parts),
                *(*rows, *c.norm_strides, *c.sizes),
                NEED_K=need_key,
                **c.constants,
                **tile.options,
            )
            _sum(parts, grad_norms[2:])
        if grad_bias is not None and bias is not None:
            tensors = (grad_out, q, k, v, bias, *c.norms, seed, lse, delta, cu_seqlens_q, cu_seqlens_k, seqused_k)
            _bias_gradient(c, grad_bias, tensors, rows, cu_seqlens_q.shape[0] - 1, q.dtype)
    return tuple(lse.new_empty((0,)) if grad is None else grad for grad in (grad_q, grad_k, grad_v, grad_bias, *grad_norms))


def _any(grads: list[Tensor | None]) -> bool:
    return any(grad is not None for grad in grads)


def _parts(tiles: int, grads: list[Tensor | None]) -> list[Tensor | None]:
    """Room for every tile's share of the gradients [heads, D]."""
    return [None if grad is None else grad.new_empty((tiles, *grad.shape)) for grad in grads]


def _sum(parts: list[Tensor | None], grads: list[Tensor | None]) -> None:
    for part, grad in zip(parts, grads, strict=True):
        if part is not None and grad is not None:
            shared.sum_parts(part, grad)


def _bias_gradient(
    c: _Call, grad_bias: Tensor, tensors: tuple[Tensor | None, ...], rows: tuple[int | None, ...], sequences: int, dtype: torch.dtype
) -> None:
    """Sequences go in several splits where the bias alone would not fill the GPU."""
    longest_q, longest_k = grad_bias.shape[-2:]
    if grad_bias.numel() == 0:
        return
    tile = bias_tile(c.widest, dtype)
    blocks = shared.cdiv(longest_q, tile.blocks["BLOCK_M"]) * shared.cdiv(longest_k, tile.blocks["BLOCK_N"]) * c.heads
    splits, split_length = shared.splits(blocks, max(sequences, 1), shared.processors(grad_bias.device), least=4)
    if grad_bias.dim() == 4:  # every sequence has its own
        splits, split_length = sequences, 1
    parts = grad_bias if splits == 1 or grad_bias.dim() == 4 else grad_bias.new_empty((splits, *grad_bias.shape))
    shared.launch(
        varlen_attention_bwd_bias_kernel,
        blocks * splits,
        *(*tensors, parts, *rows, *c.norm_strides, longest_q, longest_k),
        *(c.total_q, sequences, split_length, c.heads, c.heads // c.key_heads, *c.scalars),
        **{name: value for name, value in c.constants.items() if name != "GAPS"},
        **tile.options,
    )
    if parts is not grad_bias:
        shared.sum_parts(parts, grad_bias)
