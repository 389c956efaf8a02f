"""Re-Attention (DeepViT, arXiv 2103.11886, section 4.2) in Triton: kernels and their launches.

A flash-style pass stores the logsumexp of each row. With it the maps of any tile of queries and keys are one exponential away, so a program takes a
tile of *all heads* together, [HEADS, BLOCK_M, BLOCK_N] with HEADS a power of two, and mixes it with one matrix product. No map is stored.

What a norm does is folded into small matrices by PyTorch in float64, on the device. A batch norm is a factor on the rows of the mix and a constant;
the mean that a layer norm takes off is taken off the mix itself, so that only its variance is left to sum over the heads; what is added to every
element of a map reaches the output as a multiple of the sum of the values. For a batch norm the maps are centred by 1 / N first. Its statistics in
training come from the sums and the products of the centred maps over all queries and keys, one more pass.

Backward, with y, the gradient of the normed maps, dO V^T: a pass of sums gives the gradients of mix and norm and, since all but the layer norm is
linear, what a live batch norm adds to the gradient of the maps as one more small matrix. Delta, the row sums of P dP, comes from the same pass, or
from another one where a live norm waits for the sums. Then a kernel over query tiles for dQ, and one over key tiles for dK and dV. No atomics:
partial sums are stored and added in a fixed order, so results are equal bit for bit from run to run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vitkernels.ops import _define
from vitkernels.ops import _triton as shared
from vitkernels.ops._triton import LOG2E, Tile, cast, dot, wide
from vitkernels.ops.packed import reference as packed_reference

BATCH, LAYER = 1, 2  # of the schema's ``norm``

# --- pieces of kernels -------------------------------------------------------------------------------------------------------------


@triton.jit
def _place(i, tokens, seed, BLOCK: tl.constexpr):
    """(sample, first query) of the ``i``-th tile of queries.

    Four queries share a draw of dropout, counted over the whole batch: then tiles begin at a multiple of four, the first one before its sample does.
    """
    shift = 0
    tiles = tl.cdiv(tokens, BLOCK)
    if seed is not None:
        tiles = tl.cdiv(tokens + 3, BLOCK)
        shift = ((i // tiles).to(tl.int64) * tokens % 4).to(tl.int32)
    return (i // tiles).to(tl.int64), i % tiles * BLOCK - shift


@triton.jit
def _rows(x, o_h, m_h, o_r, m_r, o_d, COLUMNS: tl.constexpr, STEP: tl.constexpr, stride_h, stride_r, WIDE: tl.constexpr):
    """[HEADS, rows, columns] of one sample, 0 where there is none. ``COLUMNS``: how many there are before :func:`_padded` makes them whole steps."""
    o_x = (wide(o_h, WIDE) * stride_h)[:, None, None] + (wide(o_r, WIDE) * stride_r)[None, :, None] + o_d[None, None, :]
    m_d = o_d < (COLUMNS + STEP - 1) // STEP * STEP
    return tl.load(x + o_x, mask=m_h[:, None, None] & m_r[None, :, None] & m_d[None, None, :], other=0.0)


@triton.jit
def _products(
    a,
    b,
    o_h,
    m_h,
    o_a,
    m_a,
    o_b,
    m_b,
    stride_ah,
    stride_ar,
    stride_bh,
    stride_br,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """[HEADS, rows of a, rows of b]: of each head the products of both sides' rows, BLOCK_K columns at a time."""
    b_products = tl.zeros([o_h.shape[0], o_a.shape[0], o_b.shape[0]], dtype=tl.float32)
    for d in tl.range(0, D, BLOCK_K, disable_licm=True):
        o_d = d + tl.arange(0, BLOCK_K)
        b_a = _rows(a, o_h, m_h, o_a, m_a, o_d, D, BLOCK_K, stride_ah, stride_ar, WIDE)  # [HEADS, rows of a, BLOCK_K]
        b_b = _rows(b, o_h, m_h, o_b, m_b, o_d, D, BLOCK_K, stride_bh, stride_br, WIDE)  # [HEADS, rows of b, BLOCK_K]
        b_products = dot(b_a, tl.permute(b_b, (0, 2, 1)), b_products, PRECISION, INTERPRET)
    return b_products


@triton.jit
def _kept(seed, row, o_k, o_h, limit, BLOCK_M: tl.constexpr):
    """[HEADS, BLOCK_M, BLOCK_N]: what dropout keeps, ``packed.reference.keep_mask``; ``row``, the first query, is a multiple of 4."""
    o_q = (row // 4).to(tl.int32) + tl.arange(0, BLOCK_M // 4)
    limit = tl.cast(limit, tl.uint32)
    a, b, c, d = tl.philox(tl.load(seed), o_k[None, None, :], o_q[None, :, None], o_h[:, None, None], 0)  # [HEADS, BLOCK_M / 4, BLOCK_N] each
    b_bits = (a > limit).to(tl.int32) | (b > limit).to(tl.int32) << 1 | (c > limit).to(tl.int32) << 2 | (d > limit).to(tl.int32) << 3
    b_kept = (b_bits[:, :, None, :] >> tl.arange(0, 4)[None, None, :, None]) & 1
    return tl.reshape(b_kept, [o_h.shape[0], BLOCK_M, o_k.shape[0]]) != 0


@triton.jit
def _maps(
    b_s,  # [HEADS, BLOCK_M, BLOCK_N], products of q and k
    b_high,
    b_low,
    m_m,
    m_n,
    seed,
    row,  # the sample's first one, counted over the whole batch
    start_m,
    o_n,
    o_h,
    scale,
    centre,
    drop_limit,
    keep_scale,
    BLOCK_M: tl.constexpr,
    NORM: tl.constexpr,
):
    """[HEADS, BLOCK_M, BLOCK_N]: the maps, what dropout leaves of them, and that centred, which is what is mixed; all 0 beyond the last key."""
    m_mn = (m_m[:, None] & m_n[None, :])[None, :, :]
    b_p = tl.where(m_mn, tl.exp2(((b_s * scale - b_high[:, :, None]) - b_low[:, :, None]) * LOG2E), 0.0)
    b_left = b_p
    if seed is not None:
        b_left = tl.where(_kept(seed, row + start_m, (row + o_n).to(tl.int32), o_h, drop_limit, BLOCK_M), b_p * keep_scale, 0.0)
    b_x = b_left
    if NORM == 1:
        b_x = tl.where(m_mn, b_left - centre, 0.0)
    return b_p, b_left, b_x


@triton.jit
def _load_lse(lse, heads, tokens, o_h, m_h, o_m, m_m):
    """[HEADS, BLOCK_M]: the logsumexp in two fp32 pieces, +inf where there is no such row, so that its map comes out as 0.

    In one piece the rounding of a large one would be an error of 1e-6 in every element.
    """
    b_lse = tl.load(lse + o_h[:, None] * tokens + o_m[None, :], mask=m_h[:, None] & m_m[None, :], other=float("inf"))  # fp64
    b_high = b_lse.to(tl.float32)
    b_low = tl.where(b_high == float("inf"), 0.0, (b_lse - b_high.to(tl.float64)).to(tl.float32))
    return b_high, b_low


@triton.jit
def _square(matrix, o_h, m_h, heads, stride_row, stride_column):
    """[HEADS, HEADS] of a small fp64 matrix, with zeros for the heads that there are not."""
    return tl.load(matrix + o_h[:, None] * stride_row + o_h[None, :] * stride_column, mask=m_h[:, None] & m_h[None, :], other=0.0).to(tl.float32)


@triton.jit
def _vector(vector, o_h, m_h):
    """[HEADS, 1, 1] of a small fp64 vector."""
    return tl.load(vector + o_h, mask=m_h, other=0.0).to(tl.float32)[:, None, None]


@triton.jit
def _rounded(value, PRECISION: tl.constexpr):
    """``value`` as tf32, to nearest: the hardware would truncate, and all of a sum towards zero. NaN stays NaN."""
    if PRECISION == "tf32":
        bits = (value.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value


@triton.jit
def _mixed(b_mix, b_x, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """[HEADS, BLOCK_M, BLOCK_N]: ``b_mix`` [HEADS, HEADS] times what each element of a map is in all heads."""
    HEADS: tl.constexpr = b_x.shape[0]
    SIZE: tl.constexpr = b_x.shape[1] * b_x.shape[2]
    b_x = _rounded(b_x, PRECISION)
    b_z = dot(_rounded(b_mix, PRECISION), tl.reshape(b_x, [HEADS, SIZE]), tl.zeros([HEADS, SIZE], dtype=tl.float32), PRECISION, INTERPRET)
    return tl.reshape(b_z, b_x.shape)


@triton.jit
def _layer_norm(b_x, b_mix, start, o_h, m_h, m_n, heads, eps, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """Mixed maps normed over the heads, and the factor of it, [1, BLOCK_M, BLOCK_N], 0 beyond the last key. The mix has no mean over its rows."""
    b_z = _mixed(b_mix, b_x, PRECISION, INTERPRET)
    if start is not None:
        b_z += _vector(start, o_h, m_h)
    b_inverse = tl.where(m_n[None, :], tl.rsqrt(tl.sum(b_z * b_z, axis=0) / heads + eps), 0.0)[None, :, :]
    return b_z * b_inverse, b_inverse


@triton.jit
def _gram(b_y, b_x, b_products, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """``b_products`` [BLOCK_M, HEADS, HEADS] plus, for each query, the products of all heads' maps."""
    # Three products of so many heads' fp32 maps would need more shared memory than there is.
    OWN: tl.constexpr = "ieee" if PRECISION == "tf32x3" and b_y.shape[0] > 16 else PRECISION
    b_y = tl.permute(_rounded(b_y, PRECISION), (1, 0, 2))  # [BLOCK_M, HEADS, BLOCK_N]
    b_x = tl.permute(_rounded(b_x, PRECISION), (1, 2, 0))  # [BLOCK_M, BLOCK_N, HEADS]
    return dot(b_y, b_x, b_products, OWN, INTERPRET)


@triton.jit
def _store_rows(
    out, i_b, heads, tokens, stride_h, stride_r, o_h, m_h, o_r, m_r, o_d, m_d, value, D: tl.constexpr, WIDE: tl.constexpr, INTERPRET: tl.constexpr
):
    """Write all heads' rows of [B, H, N, D], dense."""
    o_out = (wide(o_h, WIDE) * stride_h)[:, None, None] + (wide(o_r, WIDE) * stride_r)[None, :, None] + o_d[None, None, :]
    m_out = m_h[:, None, None] & m_r[None, :, None] & m_d[None, None, :]
    tl.store(out + i_b * heads * tokens * D + o_out, cast(value, out.dtype.element_ty, INTERPRET), mask=m_out)


@triton.jit
def re_attention_column_sums_kernel(
    x,  # [B, H, N, D], strides below
    out,  # [B, H, D] fp64, written
    stride_b,
    stride_h,
    stride_n,
    tokens,
    heads,
    columns,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The sum of a head's rows, in a fixed order whatever the strides. PyTorch's own sum in fp64 makes a copy in fp64 first."""
    i = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(columns, BLOCK_C)
    o_c = i % chunks * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < columns
    x += i // chunks // heads * stride_b + i // chunks % heads * stride_h
    b_sum = tl.zeros([BLOCK_N, BLOCK_C], dtype=tl.float64)
    for n in range(0, tokens, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N).to(tl.int64)
        b_sum += tl.load(x + o_n[:, None] * stride_n + o_c[None, :], mask=(o_n < tokens)[:, None] & m_c[None, :], other=0.0).to(tl.float64)
    tl.store(out + i // chunks * columns + o_c, tl.sum(b_sum, axis=0), mask=m_c)


# --- forward -----------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tokens"])
def re_attention_lse_kernel(
    q,  # [B, H, N, D], strides below
    k,  # [B, H, N, D]
    lse,  # [B, H, N] fp64, written
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    tokens,
    heads,
    scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Logsumexp of BLOCK_M queries of one head."""
    i = tl.program_id(0)
    tiles = tl.cdiv(tokens, BLOCK_M)
    i_b = (i // tiles // heads).to(tl.int64)
    i_h = (i // tiles % heads).to(tl.int64)
    o_m = i % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < tokens
    q += i_b * stride_qb + i_h * stride_qh
    k += i_b * stride_kb + i_h * stride_kh
    b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    for n in range(0, tokens, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        m_n = o_n < tokens
        b_s = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for d in tl.static_range(0, D, BLOCK_K):
            o_d = d + tl.arange(0, BLOCK_K)
            b_q = tl.load(q + (wide(o_m, WIDE) * stride_qn)[:, None] + o_d[None, :], mask=m_m[:, None], other=0.0)
            b_k = tl.load(k + (wide(o_n, WIDE) * stride_kn)[:, None] + o_d[None, :], mask=m_n[:, None], other=0.0)
            b_s = dot(b_q, tl.trans(b_k), b_s, PRECISION, INTERPRET)
        b_s = tl.where(m_n[None, :], b_s * scale, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
        b_sum = b_sum * tl.exp2((b_max - b_new) * LOG2E) + tl.sum(tl.exp2((b_s - b_new[:, None]) * LOG2E), axis=1)
        b_max = b_new
    b_lse = b_max.to(tl.float64) + tl.log(b_sum).to(tl.float64)
    tl.store(lse + (i_b * heads + i_h) * tokens + o_m, b_lse, mask=m_m)


@triton.jit(do_not_specialize=["tokens"])
def re_attention_fwd_kernel(
    q,  # [B, H, N, D], strides below
    k,  # [B, H, N, D]
    v,  # [B, H, N, D_v]
    seed,  # [] int64 or None: no dropout
    lse,  # [B, H, N]
    mix,  # [H, H] fp64, folded
    start,  # [H] fp64 or None: added to the mixed maps before a layer norm
    weight,  # [H] fp64 or None: of a layer norm
    added,  # [B, H, D_v] fp64 or None: added to every row of the output
    out,  # [B, H, N, D_v], in memory [B, N, H, D_v], written
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    tokens,
    heads,
    scale,
    eps,
    centre,
    drop_limit,
    keep_scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """BLOCK_C columns of the output of BLOCK_M queries, all heads."""
    chunks: tl.constexpr = tl.cdiv(DV, BLOCK_C)
    i_b, start_m = _place(tl.program_id(0) // chunks, tokens, seed, BLOCK_M)
    o_h = tl.arange(0, HEADS)
    m_h = o_h < heads
    o_m = start_m + tl.arange(0, BLOCK_M)
    m_m = (o_m >= 0) & (o_m < tokens)
    o_c = tl.program_id(0) % chunks * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < DV
    q += i_b * stride_qb
    k += i_b * stride_kb
    v += i_b * stride_vb
    b_high, b_low = _load_lse(lse + i_b * heads * tokens, heads, tokens, o_h, m_h, o_m, m_m)
    b_mix = _square(mix, o_h, m_h, heads, heads, 1)
    b_out = tl.zeros([HEADS, BLOCK_M, BLOCK_C], dtype=tl.float32)
    for n in range(0, tokens, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        m_n = o_n < tokens
        b_s = _products(
            *(q, k, o_h, m_h, o_m, m_m, o_n, m_n, stride_qh, stride_qn, stride_kh, stride_kn),
            *(D, BLOCK_K, WIDE, PRECISION, INTERPRET),
        )
        _, _, b_x = _maps(b_s, b_high, b_low, m_m, m_n, seed, i_b * tokens, start_m, o_n, o_h, scale, centre, drop_limit, keep_scale, BLOCK_M, NORM)
        if NORM == 2:
            b_z, _ = _layer_norm(b_x, b_mix, start, o_h, m_h, m_n, heads, eps, PRECISION, INTERPRET)
            if weight is not None:
                b_z *= _vector(weight, o_h, m_h)
        else:
            b_z = _mixed(b_mix, b_x, PRECISION, INTERPRET)
        b_v = _rows(v, o_h, m_h, o_n, m_n, o_c, DV, BLOCK_K, stride_vh, stride_vn, WIDE)  # [HEADS, BLOCK_N, BLOCK_C]
        b_out = dot(cast(b_z, b_v.dtype, INTERPRET), b_v, b_out, PRECISION, INTERPRET)
    if added is not None:
        o_added = o_h[:, None] * DV + o_c[None, :]
        b_out += tl.load(added + i_b * heads * DV + o_added, mask=m_h[:, None] & m_c[None, :], other=0.0).to(tl.float32)[:, None, :]
    _store_rows(out, i_b, heads, tokens, DV, heads * DV, o_h, m_h, o_m, m_m, o_c, m_c, b_out, DV, WIDE, INTERPRET)


# --- backward ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def _gradients(
    b_x,
    b_y,
    b_mix,
    b_mix_back,
    start,
    weight,
    square,
    offset,
    o_h,
    m_h,
    m_n,
    heads,
    eps,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """[HEADS, BLOCK_M, BLOCK_N]: a layer norm's normed maps, the gradient of the mixed maps as folded, that of what dropout leaves of the maps."""
    b_hat = b_x
    if NORM == 2:
        b_hat, b_inverse = _layer_norm(b_x, b_mix, start, o_h, m_h, m_n, heads, eps, PRECISION, INTERPRET)
        if weight is not None:
            b_y *= _vector(weight, o_h, m_h)
        b_mean = tl.sum(b_y, axis=0) / heads  # [BLOCK_M, BLOCK_N]
        b_along = tl.sum(b_y * b_hat, axis=0) / heads
        b_y = (b_y - b_mean[None, :, :] - b_hat * b_along[None, :, :]) * b_inverse
    b_dp = _mixed(b_mix_back, b_y, PRECISION, INTERPRET)
    if square is not None:
        b_dp += _mixed(_square(square, o_h, m_h, heads, heads, 1), b_x, PRECISION, INTERPRET)
    if offset is not None:
        b_dp += _vector(offset, o_h, m_h)
    return b_hat, b_y, b_dp


@triton.jit
def _softmax_gradient(b_p, b_left, b_dp, b_delta, seed):
    """[HEADS, BLOCK_M, BLOCK_N]: the gradient of the logits from that of what dropout leaves of the maps."""
    if seed is None:
        return b_p * (b_dp - b_delta[:, :, None])
    return b_left * b_dp - b_p * b_delta[:, :, None]


@triton.jit(do_not_specialize=["tokens"])
def re_attention_sums_kernel(
    grad_out,  # [B, H, N, D_v], strides below, or None: only what the maps themselves sum to
    q,  # [B, H, N, D]
    k,  # [B, H, N, D]
    v,  # [B, H, N, D_v]
    seed,  # [] int64 or None
    lse,  # [B, H, N]
    mix,  # as in the forward
    start,
    weight,
    square,  # [H, H] fp64 or None: of a live batch norm, times the maps, added to their gradient
    offset,  # [H] fp64 or None: added to it
    delta,  # [B, H, N] fp32 or None, written: the sum over a query's keys of the maps times their gradient
    part_yx,  # [tiles, H, H] fp32 or None, written, as all below: this tile's sum of the mixed maps' gradient, as folded, times the maps
    part_xx,  # [tiles, H, H]: of the maps times the maps
    part_x,  # [tiles, H]: of the maps
    part_y,  # [tiles, H]: of the mixed maps' gradient, as folded
    part_weight,  # [tiles, H]: of the normed maps' gradient times the normed maps
    stride_gb,
    stride_gh,
    stride_gn,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    tokens,
    heads,
    scale,
    eps,
    centre,
    drop_limit,
    keep_scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Sums over BLOCK_M queries and all keys, and delta of those queries."""
    i_b, start_m = _place(tl.program_id(0), tokens, seed, BLOCK_M)
    o_h = tl.arange(0, HEADS)
    m_h = o_h < heads
    o_m = start_m + tl.arange(0, BLOCK_M)
    m_m = (o_m >= 0) & (o_m < tokens)
    q += i_b * stride_qb
    k += i_b * stride_kb
    b_high, b_low = _load_lse(lse + i_b * heads * tokens, heads, tokens, o_h, m_h, o_m, m_m)
    if grad_out is not None:
        grad_out += i_b * stride_gb
        v += i_b * stride_vb
        b_mix = _square(mix, o_h, m_h, heads, heads, 1)
        b_mix_back = _square(mix, o_h, m_h, heads, 1, heads)
    b_yx = tl.zeros([BLOCK_M, HEADS, HEADS], dtype=tl.float32)
    b_xx = tl.zeros([BLOCK_M, HEADS, HEADS], dtype=tl.float32)
    b_x_sum = tl.zeros([HEADS, BLOCK_M], dtype=tl.float32)
    b_y_sum = tl.zeros([HEADS, BLOCK_M], dtype=tl.float32)
    b_weight = tl.zeros([HEADS, BLOCK_M], dtype=tl.float32)
    b_delta = tl.zeros([HEADS, BLOCK_M], dtype=tl.float32)
    for n in tl.range(0, tokens, BLOCK_N, disable_licm=True):
        o_n = n + tl.arange(0, BLOCK_N)
        m_n = o_n < tokens
        b_s = _products(
            *(q, k, o_h, m_h, o_m, m_m, o_n, m_n, stride_qh, stride_qn, stride_kh, stride_kn),
            *(D, BLOCK_K, WIDE, PRECISION, INTERPRET),
        )
        _, b_left, b_x = _maps(
            b_s, b_high, b_low, m_m, m_n, seed, i_b * tokens, start_m, o_n, o_h, scale, centre, drop_limit, keep_scale, BLOCK_M, NORM
        )
        if part_xx is not None:
            b_xx = _gram(b_x, b_x, b_xx, PRECISION, INTERPRET)
        if part_x is not None:
            b_x_sum += tl.sum(b_x, axis=2)
        if grad_out is not None:
            b_y = _products(
                *(grad_out, v, o_h, m_h, o_m, m_m, o_n, m_n, stride_gh, stride_gn, stride_vh, stride_vn),
                *(DV, BLOCK_K, WIDE, PRECISION, INTERPRET),
            )
            b_hat, b_u, b_dp = _gradients(
                b_x, b_y, b_mix, b_mix_back, start, weight, square, offset, o_h, m_h, m_n, heads, eps, NORM, PRECISION, INTERPRET
            )
            if part_yx is not None:
                b_yx = _gram(b_u, b_x, b_yx, PRECISION, INTERPRET)
            if part_y is not None:
                b_y_sum += tl.sum(b_u, axis=2)
            if part_weight is not None:
                b_weight += tl.sum(b_y * b_hat, axis=2)
            if delta is not None:
                b_delta += tl.sum(b_left * b_dp, axis=2)

    i = tl.program_id(0).to(tl.int64)
    o_square = i * heads * heads + o_h[:, None] * heads + o_h[None, :]
    m_square = m_h[:, None] & m_h[None, :]
    if part_yx is not None:
        tl.store(part_yx + o_square, tl.sum(b_yx, axis=0), mask=m_square)
    if part_xx is not None:
        tl.store(part_xx + o_square, tl.sum(b_xx, axis=0), mask=m_square)
    if part_x is not None:
        tl.store(part_x + i * heads + o_h, tl.sum(b_x_sum, axis=1), mask=m_h)
    if part_y is not None:
        tl.store(part_y + i * heads + o_h, tl.sum(b_y_sum, axis=1), mask=m_h)
    if part_weight is not None:
        tl.store(part_weight + i * heads + o_h, tl.sum(b_weight, axis=1), mask=m_h)
    if delta is not None:
        tl.store(delta + i_b * heads * tokens + o_h[:, None] * tokens + o_m[None, :], b_delta, mask=m_h[:, None] & m_m[None, :])


@triton.jit(do_not_specialize=["tokens"])
def re_attention_bwd_query_kernel(
    grad_out,  # [B, H, N, D_v], strides below
    q,  # [B, H, N, D]
    k,  # [B, H, N, D]
    v,  # [B, H, N, D_v]
    seed,  # [] int64 or None
    lse,  # [B, H, N]
    delta,  # [B, H, N]
    mix,  # as in the sums
    start,
    weight,
    square,
    offset,
    grad_q,  # [B, H, N, D], written
    stride_gb,
    stride_gh,
    stride_gn,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    tokens,
    heads,
    scale,
    eps,
    centre,
    drop_limit,
    keep_scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """BLOCK_C columns of the gradient of BLOCK_M queries, all heads."""
    chunks: tl.constexpr = tl.cdiv(D, BLOCK_C)
    i_b, start_m = _place(tl.program_id(0) // chunks, tokens, seed, BLOCK_M)
    o_h = tl.arange(0, HEADS)
    m_h = o_h < heads
    o_m = start_m + tl.arange(0, BLOCK_M)
    m_m = (o_m >= 0) & (o_m < tokens)
    o_c = tl.program_id(0) % chunks * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < D
    grad_out += i_b * stride_gb
    q += i_b * stride_qb
    k += i_b * stride_kb
    v += i_b * stride_vb
    b_high, b_low = _load_lse(lse + i_b * heads * tokens, heads, tokens, o_h, m_h, o_m, m_m)
    o_delta = i_b * heads * tokens + o_h[:, None] * tokens + o_m[None, :]
    b_delta = tl.load(delta + o_delta, mask=m_h[:, None] & m_m[None, :], other=0.0)  # [HEADS, BLOCK_M]
    b_mix = _square(mix, o_h, m_h, heads, heads, 1)
    b_mix_back = _square(mix, o_h, m_h, heads, 1, heads)
    b_dq = tl.zeros([HEADS, BLOCK_M, BLOCK_C], dtype=tl.float32)
    for n in tl.range(0, tokens, BLOCK_N, disable_licm=True):
        o_n = n + tl.arange(0, BLOCK_N)
        m_n = o_n < tokens
        b_s = _products(
            *(q, k, o_h, m_h, o_m, m_m, o_n, m_n, stride_qh, stride_qn, stride_kh, stride_kn),
            *(D, BLOCK_K, WIDE, PRECISION, INTERPRET),
        )
        b_p, b_left, b_x = _maps(
            b_s, b_high, b_low, m_m, m_n, seed, i_b * tokens, start_m, o_n, o_h, scale, centre, drop_limit, keep_scale, BLOCK_M, NORM
        )
        b_y = _products(
            *(grad_out, v, o_h, m_h, o_m, m_m, o_n, m_n, stride_gh, stride_gn, stride_vh, stride_vn),
            *(DV, BLOCK_K, WIDE, PRECISION, INTERPRET),
        )
        _, _, b_dp = _gradients(b_x, b_y, b_mix, b_mix_back, start, weight, square, offset, o_h, m_h, m_n, heads, eps, NORM, PRECISION, INTERPRET)
        b_k = _rows(k, o_h, m_h, o_n, m_n, o_c, D, BLOCK_K, stride_kh, stride_kn, WIDE)  # [HEADS, BLOCK_N, BLOCK_C]
        b_ds = _softmax_gradient(b_p, b_left, b_dp, b_delta, seed)
        b_dq = dot(cast(b_ds, b_k.dtype, INTERPRET), b_k, b_dq, PRECISION, INTERPRET)
    _store_rows(grad_q, i_b, heads, tokens, tokens * D, D, o_h, m_h, o_m, m_m, o_c, m_c, b_dq * scale, D, WIDE, INTERPRET)


@triton.jit(do_not_specialize=["tokens"])
def re_attention_bwd_key_kernel(
    grad_out,  # [B, H, N, D_v], strides below
    q,  # [B, H, N, D]
    k,  # [B, H, N, D]
    v,  # [B, H, N, D_v]
    seed,  # [] int64 or None
    lse,  # [B, H, N]
    delta,  # [B, H, N]
    mix,  # as in the sums
    start,
    weight,
    square,
    offset,
    added,  # [B, H, D_v] fp64 or None: added to every row of the gradient of v
    grad_k,  # [B, H, N, D] or None, written
    grad_v,  # [B, H, N, D_v] or None, written
    stride_gb,
    stride_gh,
    stride_gn,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    tokens,
    heads,
    scale,
    eps,
    centre,
    drop_limit,
    keep_scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """BLOCK_C columns of the gradients of BLOCK_N keys or values or both, all heads."""
    chunks: tl.constexpr = tl.cdiv(D if grad_v is None else DV if grad_k is None else max(D, DV), BLOCK_C)
    i = tl.program_id(0) // chunks
    tiles = tl.cdiv(tokens, BLOCK_N)
    i_b = (i // tiles).to(tl.int64)
    first = 0
    if seed is not None:
        first = -(i_b * tokens % 4).to(tl.int32)
    o_h = tl.arange(0, HEADS)
    m_h = o_h < heads
    o_n = i % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < tokens
    o_c = tl.program_id(0) % chunks * BLOCK_C + tl.arange(0, BLOCK_C)
    grad_out += i_b * stride_gb
    q += i_b * stride_qb
    k += i_b * stride_kb
    v += i_b * stride_vb
    lse += i_b * heads * tokens
    b_mix = _square(mix, o_h, m_h, heads, heads, 1)
    b_mix_back = _square(mix, o_h, m_h, heads, 1, heads)
    b_dk = tl.zeros([HEADS, BLOCK_N, BLOCK_C], dtype=tl.float32)
    b_dv = tl.zeros([HEADS, BLOCK_N, BLOCK_C], dtype=tl.float32)
    for m in tl.range(first, tokens, BLOCK_M, disable_licm=True):
        o_m = m + tl.arange(0, BLOCK_M)
        m_m = (o_m >= 0) & (o_m < tokens)
        b_s = _products(
            *(q, k, o_h, m_h, o_m, m_m, o_n, m_n, stride_qh, stride_qn, stride_kh, stride_kn),
            *(D, BLOCK_K, WIDE, PRECISION, INTERPRET),
        )
        b_high, b_low = _load_lse(lse, heads, tokens, o_h, m_h, o_m, m_m)
        b_p, b_left, b_x = _maps(b_s, b_high, b_low, m_m, m_n, seed, i_b * tokens, m, o_n, o_h, scale, centre, drop_limit, keep_scale, BLOCK_M, NORM)
        if grad_v is not None:
            if NORM == 2:
                b_z, _ = _layer_norm(b_x, b_mix, start, o_h, m_h, m_n, heads, eps, PRECISION, INTERPRET)
                if weight is not None:
                    b_z *= _vector(weight, o_h, m_h)
            else:
                b_z = _mixed(b_mix, b_x, PRECISION, INTERPRET)
            b_g = _rows(grad_out, o_h, m_h, o_m, m_m, o_c, DV, BLOCK_K, stride_gh, stride_gn, WIDE)  # [HEADS, BLOCK_M, BLOCK_C]
            b_dv = dot(tl.permute(cast(b_z, b_g.dtype, INTERPRET), (0, 2, 1)), b_g, b_dv, PRECISION, INTERPRET)
        if grad_k is not None:
            b_y = _products(
                *(grad_out, v, o_h, m_h, o_m, m_m, o_n, m_n, stride_gh, stride_gn, stride_vh, stride_vn),
                *(DV, BLOCK_K, WIDE, PRECISION, INTERPRET),
            )
            _, _, b_dp = _gradients(b_x, b_y, b_mix, b_mix_back, start, weight, square, offset, o_h, m_h, m_n, heads, eps, NORM, PRECISION, INTERPRET)
            o_delta = i_b * heads * tokens + o_h[:, None] * tokens + o_m[None, :]
            b_delta = tl.load(delta + o_delta, mask=m_h[:, None] & m_m[None, :], other=0.0)  # [HEADS, BLOCK_M]
            b_ds = _softmax_gradient(b_p, b_left, b_dp, b_delta, seed)
            b_q = _rows(q, o_h, m_h, o_m, m_m, o_c, D, BLOCK_K, stride_qh, stride_qn, WIDE)  # [HEADS, BLOCK_M, BLOCK_C]
            b_dk = dot(tl.permute(cast(b_ds, b_q.dtype, INTERPRET), (0, 2, 1)), b_q, b_dk, PRECISION, INTERPRET)
    if grad_k is not None:
        _store_rows(grad_k, i_b, heads, tokens, tokens * D, D, o_h, m_h, o_n, m_n, o_c, o_c < D, b_dk * scale, D, WIDE, INTERPRET)
    if grad_v is not None:
        if added is not None:
            m_added = m_h[:, None] & (o_c < DV)[None, :]
            b_added = tl.load(added + i_b * heads * DV + o_h[:, None] * DV + o_c[None, :], mask=m_added, other=0.0)
            b_dv += b_added.to(tl.float32)[:, None, :]
        _store_rows(grad_v, i_b, heads, tokens, tokens * DV, DV, o_h, m_h, o_n, m_n, o_c, o_c < DV, b_dv, DV, WIDE, INTERPRET)


# --- tiles -------------------------------------------------------------------------------------------------------------------------


def lse_tile(step: int) -> Tile:
    """The logsumexp, of one head a program. ``step``: of the head dims, here and below."""
    return _tile(step, 64, 64, num_warps=4)


def sums_tile(heads: int, step: int) -> Tile:
    """The sums."""
    return _of_all_heads(heads, step)


def row_tile(heads: int, step: int, columns: int) -> Tile:
    """All that write rows, of that many columns."""
    return _of_all_heads(heads, step, BLOCK_C=shared.power(columns, 16, 32 if step == 16 or heads > 16 else 64))


def together(heads: int, dtype: torch.dtype, *, dropout: bool) -> bool:
    """Whether there are registers for all sums at once, and for the gradients of keys and values. Three products of tf32 make one of fp32."""
    return heads <= 16 and dtype is not torch.float32 and not dropout


def step_of(dtype: torch.dtype, *dims: int) -> int:
    """How many columns of the heads are read at a time; their rows are padded to whole steps."""
    return 16 if dtype is torch.float32 or max(dims) <= 16 else 32


def _of_all_heads(heads: int, step: int, **blocks: int) -> Tile:
    """16 x 16 is the least that the products take, and with all heads enough."""
    return _tile(step, 16, 16, num_warps=8 if heads <= 16 else 16, registers=255 if heads <= 16 else None, **blocks)


def _tile(step: int, block_m: int, block_n: int, *, num_warps: int, registers: int | None = None, **blocks: int) -> Tile:
    """On AMD four wavefronts are the threads of eight warps."""
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": step, **blocks}
    return Tile(blocks, num_warps if torch.version.hip is None else num_warps // 2, registers, num_stages=1)


# --- launches ----------------------------------------------------------------------------------------------------------------------


class _Folded(NamedTuple):
    """The small matrices as the kernels take them, in float64.

    ``mean``, ``std`` and ``factor`` are a batch norm's, the mean that of the centred maps and without the bias; ``constant`` is added to every
    element of a mixed map.
    """

    mix: Tensor
    start: Tensor | None
    weight: Tensor | None
    constant: Tensor | None
    mean: Tensor | None = None
    std: Tensor | None = None
    factor: Tensor | None = None

    @staticmethod
    def of(
        mix: Tensor,
        bias: Tensor | None,
        norm: int,
        gamma: Tensor | None,
        beta: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        eps: float,
        centre: float,
    ) -> _Folded:
        """``mean`` and ``var``: of the mixed maps, of a batch norm."""
        mix = mix.contiguous()
        if norm == LAYER:
            start = None if bias is None else bias - bias.mean()
            return _Folded(mix - mix.mean(dim=0), start, _dense(gamma), beta)
        if norm != BATCH or mean is None or var is None:
            return _Folded(mix, None, None, bias)
        mean = mean - mix.sum(dim=1) * centre
        if bias is not None:
            mean = mean - bias
        std = (var + eps).sqrt()
        factor = 1 / std if gamma is None else gamma / std
        constant = -factor * mean if beta is None else beta - factor * mean
        return _Folded(factor[:, None] * mix, None, None, constant, mean, std, factor)

    def added(self, x: Tensor) -> Tensor | None:
        """[B, H, columns]: the constant times the sum of the rows of ``x``."""
        return None if self.constant is None else self.constant[:, None] * _column_sums(x)


class _Call(NamedTuple):
    """What the launches of one call have in common."""

    batch: int
    heads: int
    tokens: int
    dim: int
    value_dim: int
    step: int
    centre: float
    scalars: tuple[float | int, ...]
    constants: dict[str, Any]

    @staticmethod
    def of(q: Tensor, v: Tensor, rows: tuple[Tensor, ...], norm: int, eps: float, scale: float, dropout_p: float) -> _Call:
        """``rows``: what is read by rows, :func:`_padded`."""
        batch, heads, tokens, dim = q.shape
        value_dim = v.shape[3]
        centre = 1 / tokens if norm == BATCH and tokens and dropout_p < 1 else 0.0
        keep_scale = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
        precision = "ieee" if torch.version.hip is not None else "tf32x3" if q.dtype is torch.float32 else "tf32"
        return _Call(
            *(batch, heads, tokens, dim, value_dim, step_of(q.dtype, dim, value_dim), centre),
            (tokens, heads, scale, eps, centre, packed_reference.drop_limit(dropout_p), keep_scale),
            {
                "D": dim,
                "DV": value_dim,
                "NORM": norm,
                "HEADS": max(16, shared.next_power_of_2(heads)),
                "WIDE": shared.reaches_64_bit(*rows) or heads * tokens * max(dim, value_dim) >= 2**31,
                "PRECISION": precision,
                "INTERPRET": shared.INTERPRET,
            },
        )

    @property
    def elements(self) -> int:
        """Elements of one head's maps."""
        return max(self.batch * self.tokens**2, 1)

    def tiles(self, block: int, *, aligned: bool) -> int:
        """Tiles of ``block`` rows; ``aligned``: to the draws of dropout."""
        return self.batch * shared.cdiv(self.tokens + 3 * aligned, block) if self.tokens else 0


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _padded(step: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Each [B, H, N, D] with rows of whole steps, padded with zeros, that begin at multiples of 16 elements.

    Loads are of 16 bytes then; rows of 33 elements would be read one by one, and the addresses alone would fill the registers. Tensors that are so,
    as slices of a projection to heads of 32, 64 or 128 are, stay where they are.
    """
    return tuple(x if in_steps(x, step, 16) else F.pad(x, (0, -x.shape[3] % step)).contiguous() for x in tensors)


def in_steps(x: Tensor, step: int, multiple: int) -> bool:
    """Whether the rows of [B, H, N, D] are whole steps, and begin that many elements apart or a multiple of it."""
    return x.shape[3] % step == 0 and x.stride(3) == 1 and all(stride % multiple == 0 for stride in x.stride()[:3])


def _column_sums(x: Tensor) -> Tensor:
    """[B, H, D] in float64: the sum of each head's rows, equal bit for bit whatever the strides."""
    batch, heads, tokens, columns = x.shape
    if x.stride(3) != 1:
        x = x.contiguous()
    out = x.new_empty((batch, heads, columns), dtype=torch.float64)
    block = shared.power(columns, 16, 64)
    shared.launch(
        re_attention_column_sums_kernel,
        batch * heads * shared.cdiv(columns, block),
        *(x, out, *_strides(x), tokens, heads, columns),
        BLOCK_N=1024 // block,
        BLOCK_C=block,
        num_warps=4,
    )
    return out


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """Of samples, heads and rows."""
    return tuple(stride for t in tensors for stride in t.stride()[:3])


def _sums(
    c: _Call,
    rows: tuple[Tensor | None, ...],
    seed: Tensor | None,
    lse: Tensor,
    matrices: tuple[Tensor | None, ...],
    delta: Tensor | None,
    *wanted: bool,
) -> list[Tensor]:
    """The sums kernel, and its parts summed over the tiles in float64: yx, xx, x, y, weight; of those not ``wanted`` zeros."""
    grad_out, q, k, v = rows
    assert q is not None and k is not None and v is not None
    tile = sums_tile(c.heads, c.step)
    tiles = c.tiles(tile.blocks["BLOCK_M"], aligned=seed is not None)
    shapes = [(c.heads, c.heads)] * 2 + [(c.heads,)] * 3
    parts = [q.new_empty((tiles, *shape), dtype=torch.float32) if want else None for shape, want in zip(shapes, wanted, strict=True)]
    shared.launch(
        re_attention_sums_kernel,
        tiles,
        *(grad_out, q, k, v, seed, lse, *matrices, delta, *parts, *_strides(v if grad_out is None else grad_out, q, k, v), *c.scalars),
        **c.constants,
        **tile.options,
    )
    return [lse.new_zeros(shape) if part is None else part.sum(dim=0, dtype=torch.float64) for part, shape in zip(parts, shapes, strict=True)]


def re_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mix_weight: Tensor,
    mix_bias: Tensor | None,
    norm: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    live: bool,
    eps: float,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forward of ``vitkernels::re_attention``; arguments and results as its schema in op.py says."""
    rows = _padded(step_of(q.dtype, q.shape[3], v.shape[3]), q, k, v)
    c = _Call.of(q, v, rows, norm, eps, scale, dropout_p)
    seed = seed if dropout_p > 0 else None
    out = _define.token_major(q, c.value_dim)
    lse = q.new_empty((c.batch, c.heads, c.tokens), dtype=torch.float64)
    with shared.on(q):
        tile = lse_tile(c.step)
        shared.launch(
            re_attention_lse_kernel,
            c.heads * c.tiles(tile.blocks["BLOCK_M"], aligned=False),
            *(*rows[:2], lse, *_strides(*rows[:2]), c.tokens, c.heads, scale),
            **{name: c.constants[name] for name in ("D", "WIDE", "PRECISION", "INTERPRET")},
            **tile.options,
        )
        batch = _statistics(c, rows, seed, lse, mix_weight, mix_bias) if live else None
        mean, var = batch or (mean, var)
        folded = _Folded.of(mix_weight, mix_bias, norm, norm_weight, norm_bias, mean, var, eps, c.centre)
        tile = row_tile(c.heads, c.step, c.value_dim)
        shared.launch(
            re_attention_fwd_kernel,
            c.tiles(tile.blocks["BLOCK_M"], aligned=seed is not None) * shared.cdiv(c.value_dim, tile.blocks["BLOCK_C"]),
            *(*rows, seed, lse, *folded[:3], folded.added(v), out, *_strides(*rows), *c.scalars),
            **c.constants,
            **tile.options,
        )
    return out, lse, *results_of(batch, mix_weight)


def results_of(batch: tuple[Tensor, Tensor] | None, mix_weight: Tensor) -> tuple[Tensor, Tensor]:
    """The statistics of a live norm as the schema has them: two empty ones where it is not live."""
    return batch or (mix_weight.new_empty((0,)), mix_weight.new_empty((0,)))


def statistics(q: Tensor, k: Tensor, v: Tensor, lse: Tensor, mix_weight: Tensor, mix_bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the mixed maps without dropout, [H] in float64, from the logsumexp."""
    rows = _padded(step_of(q.dtype, q.shape[3], v.shape[3]), q, k, v)
    with shared.on(q):
        return _statistics(_Call.of(q, v, rows, BATCH, 0.0, scale, 0.0), rows, None, lse, mix_weight, mix_bias)


def _statistics(c: _Call, rows: tuple[Tensor, ...], seed: Tensor | None, lse: Tensor, mix: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the mixed maps, [H] in float64. Rows of a softmax sum to 1: without dropout the centred maps' mean is zero."""
    _, squares, sums, _, _ = _sums(c, (None, *rows), seed, lse, (None,) * 5, None, False, True, seed is not None, False, False)
    mean = mix @ (sums / c.elements)
    var = (((mix @ squares) * mix).sum(dim=1) / c.elements - mean**2).clamp(min=0)
    mean = mean + mix.sum(dim=1) * c.centre
    return mean if bias is None else mean + bias, var


def re_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    mix_weight: Tensor,
    mix_bias: Tensor | None,
    norm: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    live: bool,
    eps: float,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    need_q: bool,
    need_k: bool,
    need_v: bool,
) -> tuple[Tensor, ...]:
    """Backward of ``vitkernels::re_attention``; arguments and results as its schema in op.py says."""
    rows = _padded(step_of(q.dtype, q.shape[3], v.shape[3]), grad_out, q, k, v)
    c = _Call.of(q, v, rows, norm, eps, scale, dropout_p)
    seed = seed if dropout_p > 0 else None
    lse = lse.contiguous()
    folded = _Folded.of(mix_weight, mix_bias, norm, norm_weight, norm_bias, mean, var, eps, c.centre)
    matrices: tuple[Tensor | None, ...] = (*folded[:3], None, None)
    grad_q, grad_k, grad_v = (t.new_empty(t.shape if need else (0,)) for t, need in ((q, need_q), (k, need_k), (v, need_v)))
    delta = lse.new_empty(lse.shape, dtype=torch.float32) if need_q or need_k else None
    layer = norm == LAYER
    later = live or not together(c.heads, q.dtype, dropout=seed is not None)
    with shared.on(q):
        both = live and c.heads <= 16  # products of maps of more heads fill the registers and the shared memory by themselves
        sums = _sums(*(c, rows, seed, lse, matrices, None if later else delta), *(True, both, live and seed is not None, layer, layer))
        if live and not both:
            sums[1] = _sums(c, (None, *rows[1:]), seed, lse, (None,) * 5, None, *(False, True, False, False, False))[1]
        grad_constant = (_column_sums(grad_out) * _column_sums(v)).sum(dim=(0, 2))
        small, square, offset = _small_gradients(c, mix_weight, folded, norm, live, grad_constant, *sums)
        if live:
            matrices = *folded[:3], square, offset if seed is not None else None
        if later and delta is not None:
            _sums(c, rows, seed, lse, matrices, delta, *(False,) * 5)
        if need_q:
            tile = row_tile(c.heads, c.step, c.dim)
            shared.launch(
                re_attention_bwd_query_kernel,
                c.tiles(tile.blocks["BLOCK_M"], aligned=seed is not None) * shared.cdiv(c.dim, tile.blocks["BLOCK_C"]),
                *(*rows, seed, lse, delta, *matrices, grad_q, *_strides(*rows), *c.scalars),
                **c.constants,
                **tile.options,
            )
        if need_k or need_v:
            added = folded.added(grad_out)
            at_once = together(c.heads, q.dtype, dropout=seed is not None) and max(c.dim, c.value_dim) <= 32
            for keys, values in ((need_k, need_v),) if at_once else ((need_k, False), (False, need_v)):
                columns = max(c.dim if keys else 0, c.value_dim if values else 0)
                tile = row_tile(c.heads, c.step, columns)
                shared.launch(
                    re_attention_bwd_key_kernel,
                    c.tiles(tile.blocks["BLOCK_N"], aligned=False) * shared.cdiv(columns, tile.blocks["BLOCK_C"]) if columns else 0,
                    *(*rows, seed, lse, delta, *matrices, added, grad_k if keys else None, grad_v if values else None),
                    *(*_strides(*rows), *c.scalars),
                    **c.constants,
                    **tile.options,
                )
    return (grad_q, grad_k, grad_v, *small)


def _small_gradients(
    c: _Call, mix: Tensor, folded: _Folded, norm: int, live: bool, y: Tensor, yx: Tensor, xx: Tensor, x: Tensor, u: Tensor, weight: Tensor
) -> tuple[tuple[Tensor, ...], Tensor | None, Tensor | None]:
    """The gradients of the weight and the bias of the mix and of the norm, and what a live batch norm adds to that of the maps.

    ``y``: the sum of the normed maps' gradient; the others as the parts of the sums kernel.
    """
    if norm == LAYER:
        return (yx, u, weight, y), None, None
    mean, std, factor = folded.mean, folded.std, folded.factor
    if mean is None or std is None or factor is None:
        return (yx, y, torch.zeros_like(y), torch.zeros_like(y)), None, None
    hat = ((mix * yx).sum(dim=1) - mean * y) / std  # the sum of the normed maps' gradient times the normed maps
    if not live:
        return (factor[:, None] * (yx + c.centre * y[:, None]), factor * y, hat, y), None, None
    slope, along = y / c.elements, hat / c.elements / std
    # The gradient sums to zero, so that the maps may be the centred ones.
    grad_mix = factor[:, None] * (yx - slope[:, None] * x - along[:, None] * (mix @ xx - mean[:, None] * x))
    square = -folded.mix.t() @ (along[:, None] * mix)
    offset = folded.mix.t() @ (along * mean - slope)
    return (grad_mix, torch.zeros_like(y), hat, y), square, offset
