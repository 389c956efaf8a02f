"""Attention with memory (Learnable Memory, arXiv 2203.15243, section 3) in Triton: kernels and their launches.

Flash attention (FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2) whose keys come in three parts, each read where it lies: an image's own, the
memory that all images share, and a key that one query alone sees. A program takes a tile of the queries of an image and a head, begins with their own
keys and loops over the other two; of the memory over what the groups of its rows span, and hides, row by row, what is another group's.

Backward: the output is not saved, so a program over query tiles first sums delta, the row sums of P dP less the gradient of the logsumexp, and in a
second loop the gradients of the queries. Then a kernel over key tiles, once for the images' own keys and once for the memory, where it also sums over
the images. No atomics: partial sums are stored and added in a fixed order, so results are equal bit for bit from run to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitkernels.ops import _define
from vitkernels.ops import _triton as shared
from vitkernels.ops._triton import LOG2E, Tile, add_product, cast, dot, load_lse, load_rows, philox
from vitkernels.ops.packed import reference as packed_reference

# --- pieces of kernels -------------------------------------------------------------------------------------------------------------


@triton.jit
def _place(rows, heads, BLOCK: tl.constexpr):
    """(whatever comes before heads, head, first row) of this program. The tiles of a head run beside each other."""
    i = tl.program_id(0)
    i_h = i // tl.cdiv(rows, BLOCK)
    return (i_h // heads).to(tl.int64), (i_h % heads).to(tl.int64), i % tl.cdiv(rows, BLOCK) * BLOCK


@triton.jit
def _memory_of(places, start_m, queries, memories, each, BLOCK: tl.constexpr):
    """From where to where the memory of the groups of a tile's queries lies."""
    begin, end = 0, memories
    if places is not None:
        begin = tl.load(places + memories + start_m // each)
        end = tl.load(places + memories + (tl.minimum(start_m + BLOCK, queries) - 1) // each + 1)
    return begin, end


@triton.jit
def _seen(places, o_m, o_n, last, each):
    """Which keys queries see: those up to the last, and of a memory in groups their own group's. ``o_m`` and ``o_n`` are the axes of the result."""
    m_seen = o_n < last
    if places is not None:
        m_seen &= tl.load(places + o_n, mask=m_seen, other=-1) == o_m // each
    return m_seen


@triton.jit
def _scores(b_a, b_b, m_seen, scale, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """[rows of a, rows of b] of logits, -inf where nothing is seen."""
    b_s = dot(b_a, tl.trans(b_b), tl.zeros([b_a.shape[0], b_b.shape[0]], dtype=tl.float32), PRECISION, INTERPRET)
    return tl.where(m_seen, b_s * scale, float("-inf"))


@triton.jit
def _row_products(b_a, b_b, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """Each row of a times that of b: the diagonal of a matrix product, so that it rounds alike whatever the tile."""
    b_products = dot(b_a, tl.trans(b_b), tl.zeros([b_a.shape[0], b_a.shape[0]], dtype=tl.float32), PRECISION, INTERPRET)
    o = tl.arange(0, b_a.shape[0])
    return tl.sum(tl.where(o[:, None] == o[None, :], b_products, 0.0), axis=1)


@triton.jit
def _kept(seed, o_row, o_column, i_h, limit):
    """Which weights dropout keeps, at rows and columns counted over the whole batch; they are the axes of the result."""
    return (philox(seed, o_row // 4, o_column, i_h.to(tl.int32), limit) >> (o_row % 4)) & 1 != 0


@triton.jit
def _store_rows(out, o_r, m_r, stride_r, o_d, m_d, value, INTERPRET: tl.constexpr):
    """Write rows whose columns lie side by side."""
    o_out = o_r.to(tl.int64)[:, None] * stride_r + o_d[None, :]
    tl.store(out + o_out, cast(value, out.dtype.element_ty, INTERPRET), mask=m_r[:, None] & m_d[None, :])


# --- forward -----------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["queries", "keys", "memories"])
def memory_attention_fwd_kernel(
    q,  # [B, H, N, D], strides below
    k,  # [B, H, K, D]
    v,  # [B, H, K, D_v]
    memory_k,  # [B, H, M, D], 0 from image to image
    memory_v,  # [B, H, M, D_v]
    own_k,  # [B, H, N, D] or None
    own_v,  # [B, H, N, D_v] or None
    places,  # _places, or None: all queries see all of the memory
    seed,  # [] int64 or None: no dropout
    out,  # [B, N, H, D_v], written
    lse,  # [B, H, N] fp64, written
    stride_qb,
    stride_qh,
    stride_qn,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_vd,
    stride_mkb,
    stride_mkh,
    stride_mkn,
    stride_mkd,
    stride_mvb,
    stride_mvh,
    stride_mvn,
    stride_mvd,
    stride_okb,
    stride_okh,
    stride_okn,
    stride_okd,
    stride_ovb,
    stride_ovh,
    stride_ovn,
    stride_ovd,
    heads,
    queries,
    keys,
    memories,
    each,  # queries of a group
    scale,
    drop_limit,
    keep_scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Output and logsumexp of BLOCK_M queries of one image and head."""
    i_b, i_h, start_m = _place(queries, heads, BLOCK_M)
    o_m = start_m + tl.arange(0, BLOCK_M)
    m_m = o_m < queries
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_dv = tl.arange(0, BLOCK_DV)
    m_dv = o_dv < DV
    o_row = (i_b * queries).to(tl.int32) + o_m  # places of dropout
    column = (i_b * (keys + memories)).to(tl.int32)
    k += i_b * stride_kb + i_h * stride_kh
    v += i_b * stride_vb + i_h * stride_vh
    memory_k += i_b * stride_mkb + i_h * stride_mkh
    memory_v += i_b * stride_mvb + i_h * stride_mvh
    begin, end = _memory_of(places, start_m, queries, memories, each, BLOCK_M)

    b_q = load_rows(q + i_b * stride_qb + i_h * stride_qh, start_m, m_m, stride_qn, o_d, m_d, stride_qd, BLOCK_M, WIDE)  # [BLOCK_M, BLOCK_D]
    b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_out = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    if own_k is not None:
        b_own_k = load_rows(own_k + i_b * stride_okb + i_h * stride_okh, start_m, m_m, stride_okn, o_d, m_d, stride_okd, BLOCK_M, WIDE)
        b_own_v = load_rows(own_v + i_b * stride_ovb + i_h * stride_ovh, start_m, m_m, stride_ovn, o_dv, m_dv, stride_ovd, BLOCK_M, WIDE)
        b_max = _row_products(b_q, b_own_k, PRECISION, INTERPRET) * scale
        b_sum = tl.exp2((b_max - tl.where(b_max == float("-inf"), 0.0, b_max)) * LOG2E)  # 1, 0 if the logit is -inf, or NaN
        b_own_p = b_sum
        if seed is not None:
            b_own_p = tl.where(_kept(seed, o_row, column + keys + memories, i_h, drop_limit), b_own_p, 0.0)
        b_out = b_own_p[:, None] * b_own_v.to(tl.float32)
    for MEMORY in tl.static_range(2):
        last = end if MEMORY else keys
        for n in tl.range(begin if MEMORY else 0, last, BLOCK_N, disable_licm=True):
            o_n = n + tl.arange(0, BLOCK_N)
            m_n = o_n < last
            b_k = load_rows(
                memory_k if MEMORY else k, n, m_n, stride_mkn if MEMORY else stride_kn, o_d, m_d, stride_mkd if MEMORY else stride_kd, BLOCK_N, WIDE
            )  # [BLOCK_N, BLOCK_D]
            m_seen = _seen(places if MEMORY else None, o_m[:, None], o_n[None, :], last, each)
            b_s = _scores(b_q, b_k, m_seen, scale, PRECISION, INTERPRET)
            b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
            b_ref = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_rescale = tl.exp2((b_max - b_ref) * LOG2E)
            b_p = tl.exp2((b_s - b_ref[:, None]) * LOG2E)  # [BLOCK_M, BLOCK_N]
            b_sum = b_sum * b_rescale + tl.sum(b_p, axis=1)
            if seed is not None:
                b_p = tl.where(_kept(seed, o_row[:, None], (column + keys * MEMORY + o_n)[None, :], i_h, drop_limit), b_p, 0.0)
            b_v = load_rows(
                memory_v if MEMORY else v, n, m_n, stride_mvn if MEMORY else stride_vn, o_dv, m_dv, stride_mvd if MEMORY else stride_vd, BLOCK_N, WIDE
            )  # [BLOCK_N, BLOCK_DV]
            b_out = add_product(cast(b_p, b_v.dtype, INTERPRET), b_v, b_out * b_rescale[:, None], PRECISION, INTERPRET)
            b_max = b_new

    m_blind = b_sum == 0
    b_sum = tl.where(m_blind, 1.0, b_sum)
    b_out *= (keep_scale / b_sum)[:, None]
    _store_rows(out + (i_b * queries * heads + i_h) * DV, o_m, m_m, heads * DV, o_dv, m_dv, b_out, INTERPRET)
    b_lse = tl.where(m_blind | (b_max == float("inf")), b_max.to(tl.float64), b_max.to(tl.float64) + tl.log(b_sum).to(tl.float64))
    tl.store(lse + (i_b * heads + i_h) * queries + o_m, b_lse, mask=m_m)


# --- backward ----------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["queries", "keys", "memories"])
def memory_attention_bwd_query_kernel(
    grad_out,  # [B, H, N, D_v], strides below
    grad_lse,  # [B, H, N], strides below, or None
    q,  # as in the forward
    k,
    v,
    memory_k,
    memory_v,
    own_k,
    own_v,
    places,
    seed,
    lse,  # [B, H, N]
    delta,  # [B, H, N], written
    grad_q,  # [B, H, N, D] or None, written, strides below
    grad_own_k,  # [B, H, N, D] contiguous or None, written
    grad_own_v,  # [B, H, N, D_v] contiguous or None, written
    stride_gb,
    stride_gh,
    stride_gn,
    stride_gd,
    stride_lb,
    stride_lh,
    stride_ln,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_vd,
    stride_mkb,
    stride_mkh,
    stride_mkn,
    stride_mkd,
    stride_mvb,
    stride_mvh,
    stride_mvn,
    stride_mvd,
    stride_okb,
    stride_okh,
    stride_okn,
    stride_okd,
    stride_ovb,
    stride_ovh,
    stride_ovn,
    stride_ovd,
    stride_dqb,
    stride_dqh,
    stride_dqn,
    heads,
    queries,
    keys,
    memories,
    each,
    scale,
    drop_limit,
    keep_scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Delta and the gradients of BLOCK_M queries of one image and head, and of their own keys and values."""
    i_b, i_h, start_m = _place(queries, heads, BLOCK_M)
    o_m = start_m + tl.arange(0, BLOCK_M)
    m_m = o_m < queries
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_dv = tl.arange(0, BLOCK_DV)
    m_dv = o_dv < DV
    o_row = (i_b * queries).to(tl.int32) + o_m
    column = (i_b * (keys + memories)).to(tl.int32)
    first_row = (i_b * heads + i_h) * queries  # of [B, H, N]
    k += i_b * stride_kb + i_h * stride_kh
    v += i_b * stride_vb + i_h * stride_vh
    memory_k += i_b * stride_mkb + i_h * stride_mkh
    memory_v += i_b * stride_mvb + i_h * stride_mvh
    begin, end = _memory_of(places, start_m, queries, memories, each, BLOCK_M)

    b_q = load_rows(q + i_b * stride_qb + i_h * stride_qh, start_m, m_m, stride_qn, o_d, m_d, stride_qd, BLOCK_M, WIDE)  # [BLOCK_M, BLOCK_D]
    b_g = load_rows(grad_out + i_b * stride_gb + i_h * stride_gh, start_m, m_m, stride_gn, o_dv, m_dv, stride_gd, BLOCK_M, WIDE)
    b_high, b_low = load_lse(lse + first_row, o_m, m_m)  # [BLOCK_M]
    b_delta = tl.zeros([BLOCK_M], dtype=tl.float32)
    if own_k is not None:
        own_k += i_b * stride_okb + i_h * stride_okh
        b_own_k = load_rows(own_k, start_m, m_m, stride_okn, o_d, m_d, stride_okd, BLOCK_M, WIDE)
        b_own_v = load_rows(own_v + i_b * stride_ovb + i_h * stride_ovh, start_m, m_m, stride_ovn, o_dv, m_dv, stride_ovd, BLOCK_M, WIDE)
        b_own_p = tl.exp2(((_row_products(b_q, b_own_k, PRECISION, INTERPRET) * scale - b_high) - b_low) * LOG2E)  # [BLOCK_M]
        b_own_dp = _row_products(b_g, b_own_v, PRECISION, INTERPRET)
        b_dropped = b_own_p
        if seed is not None:
            m_own_kept = _kept(seed, o_row, column + keys + memories, i_h, drop_limit)
            b_own_dp = tl.where(m_own_kept, b_own_dp * keep_scale, 0.0)
            b_dropped = tl.where(m_own_kept, b_own_p * keep_scale, 0.0)
        b_delta += b_own_p * b_own_dp
        if grad_own_v is not None:
            _store_rows(grad_own_v + first_row * DV, o_m, m_m, DV, o_dv, m_dv, b_dropped[:, None] * b_g.to(tl.float32), INTERPRET)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for PASS in tl.static_range(1 if grad_q is None else 2):
        for MEMORY in tl.static_range(2):
            last = end if MEMORY else keys
            for n in tl.range(begin if MEMORY else 0, last, BLOCK_N, disable_licm=True):
                o_n = n + tl.arange(0, BLOCK_N)
                m_n = o_n < last
                b_k = load_rows(
                    memory_k if MEMORY else k,
                    n,
                    m_n,
                    stride_mkn if MEMORY else stride_kn,
                    o_d,
                    m_d,
                    stride_mkd if MEMORY else stride_kd,
                    BLOCK_N,
                    WIDE,
                )  # [BLOCK_N, BLOCK_D]
                m_seen = _seen(places if MEMORY else None, o_m[:, None], o_n[None, :], last, each)
                b_s = _scores(b_q, b_k, m_seen, scale, PRECISION, INTERPRET)
                b_p = tl.exp2(((b_s - b_high[:, None]) - b_low[:, None]) * LOG2E)  # [BLOCK_M, BLOCK_N]
                b_v = load_rows(
                    memory_v if MEMORY else v,
                    n,
                    m_n,
                    stride_mvn if MEMORY else stride_vn,
                    o_dv,
                    m_dv,
                    stride_mvd if MEMORY else stride_vd,
                    BLOCK_N,
                    WIDE,
                )  # [BLOCK_N, BLOCK_DV]
                b_dp = dot(b_g, tl.trans(b_v), tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32), PRECISION, INTERPRET)
                if seed is not None:
                    m_kept = _kept(seed, o_row[:, None], (column + keys * MEMORY + o_n)[None, :], i_h, drop_limit)
                    b_dp = tl.where(m_kept, b_dp * keep_scale, 0.0)
                if PASS == 0:
                    b_delta += tl.sum(b_p * b_dp, axis=1)
                else:
                    b_dq = add_product(cast(b_p * (b_dp - b_delta[:, None]), b_k.dtype, INTERPRET), b_k, b_dq, PRECISION, INTERPRET)
        if PASS == 0:
            if grad_lse is not None:
                o_lse = i_b * stride_lb + i_h * stride_lh + o_m.to(tl.int64) * stride_ln
                b_delta -= tl.load(grad_lse + o_lse, mask=m_m, other=0.0).to(tl.float32)
            b_delta = tl.where(b_high == float("inf"), 0.0, b_delta)  # nothing is seen
            tl.store(delta + first_row + o_m, b_delta, mask=m_m)

    if own_k is not None:
        b_ds = b_own_p * (b_own_dp - b_delta)
        if grad_q is not None:
            b_dq += b_ds[:, None] * load_rows(own_k, start_m, m_m, stride_okn, o_d, m_d, stride_okd, BLOCK_M, WIDE).to(tl.float32)
        if grad_own_k is not None:
            _store_rows(grad_own_k + first_row * D, o_m, m_m, D, o_d, m_d, (b_ds * scale)[:, None] * b_q.to(tl.float32), INTERPRET)
    if grad_q is not None:
        _store_rows(grad_q + i_b * stride_dqb + i_h * stride_dqh, o_m, m_m, stride_dqn, o_d, m_d, b_dq * scale, INTERPRET)


@triton.jit(do_not_specialize=["batch", "queries", "keys", "images", "columns", "first_column"])
def memory_attention_bwd_key_kernel(
    grad_out,  # [B, H, N, D_v], strides below
    q,  # [B, H, N, D]
    k,  # [B, H, K, D], the images' own or the memory, 0 from image to image
    v,  # [B, H, K, D_v]
    places,  # of the memory, or None
    seed,  # [] int64 or None
    lse,  # [B, H, N]
    delta,  # [B, H, N], or None without grad_k
    grad_k,  # [splits, H, K, D] or None, written, strides below
    grad_v,  # [splits, H, K, D_v] or None, written
    stride_gb,
    stride_gh,
    stride_gn,
    stride_gd,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_vd,
    stride_dks,
    stride_dkh,
    stride_dkn,
    stride_dvs,
    stride_dvh,
    stride_dvn,
    batch,
    heads,
    queries,
    keys,
    images,  # of a split
    columns,  # of an image, and which is the first of these keys, where dropout counts
    first_column,
    each,
    scale,
    drop_limit,
    keep_scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Gradients of BLOCK_N keys and values of one head, from the images of one split. Scores are transposed here: a key a row."""
    i_s, i_h, start_n = _place(keys, heads, BLOCK_N)
    o_n = start_n + tl.arange(0, BLOCK_N)
    m_n = o_n < keys
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_dv = tl.arange(0, BLOCK_DV)
    m_dv = o_dv < DV
    first, last = 0, queries
    if places is not None:  # the queries of the tile's groups
        first = tl.load(places + start_n) * each
        last = (tl.load(places + tl.minimum(start_n + BLOCK_N, keys) - 1) + 1) * each
    first_image = (i_s * images).to(tl.int32)
    b_k = load_rows(k + first_image * stride_kb + i_h * stride_kh, start_n, m_n, stride_kn, o_d, m_d, stride_kd, BLOCK_N, WIDE)  # [BLOCK_N, BLOCK_D]
    b_v = load_rows(v + first_image * stride_vb + i_h * stride_vh, start_n, m_n, stride_vn, o_dv, m_dv, stride_vd, BLOCK_N, WIDE)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)
    for i in tl.range(first_image, tl.minimum(first_image + images, batch), disable_licm=True):
        i_b = tl.cast(i, tl.int64)
        first_row = (i_b * heads + i_h) * queries
        for m in tl.range(first, last, BLOCK_M, disable_licm=True):
            o_m = m + tl.arange(0, BLOCK_M)
            m_m = o_m < last
            b_q = load_rows(q + i_b * stride_qb + i_h * stride_qh, m, m_m, stride_qn, o_d, m_d, stride_qd, BLOCK_M, WIDE)  # [BLOCK_M, BLOCK_D]
            b_s = _scores(b_k, b_q, _seen(places, o_m[None, :], o_n[:, None], keys, each), scale, PRECISION, INTERPRET)
            b_high, b_low = load_lse(lse + first_row, o_m, m_m)
            b_p = tl.exp2(((b_s - b_high[None, :]) - b_low[None, :]) * LOG2E)  # [BLOCK_N, BLOCK_M]
            b_g = load_rows(grad_out + i_b * stride_gb + i_h * stride_gh, m, m_m, stride_gn, o_dv, m_dv, stride_gd, BLOCK_M, WIDE)
            b_dropped = b_p
            if seed is not None:
                o_row, o_column = i * queries + o_m, i * columns + first_column + o_n
                m_kept = _kept(seed, o_row[None, :], o_column[:, None], i_h, drop_limit)
                b_dropped = tl.where(m_kept, b_p, 0.0)
            if grad_v is not None:
                b_dv = add_product(cast(b_dropped, b_g.dtype, INTERPRET), b_g, b_dv, PRECISION, INTERPRET)
            if grad_k is not None:
                b_dp = dot(b_v, tl.trans(b_g), tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32), PRECISION, INTERPRET)
                if seed is not None:
                    b_dp = tl.where(m_kept, b_dp * keep_scale, 0.0)
                b_ds = b_p * (b_dp - tl.load(delta + first_row + o_m, mask=m_m, other=0.0)[None, :])
                b_dk = add_product(cast(b_ds, b_q.dtype, INTERPRET), b_q, b_dk, PRECISION, INTERPRET)

    if grad_v is not None:
        _store_rows(grad_v + i_s * stride_dvs + i_h * stride_dvh, o_n, m_n, stride_dvn, o_dv, m_dv, b_dv * keep_scale, INTERPRET)
    if grad_k is not None:
        _store_rows(grad_k + i_s * stride_dks + i_h * stride_dkh, o_n, m_n, stride_dkn, o_d, m_d, b_dk * scale, INTERPRET)


# --- tiles -------------------------------------------------------------------------------------------------------------------------


def forward_tile(dim: int, dtype: torch.dtype, *, dropout: bool) -> Tile:
    """The forward. ``dim``: the wider of both head dims."""
    if dtype is torch.float32:
        return _tile(16, 16, 8) if dim > 64 else _tile(16 if dropout else 32, 32, 8)
    if dim > 128:
        return _tile(32 if dropout else 64, 32, 8)
    return _tile(64, 32 if dropout else 64, 4 if dim <= 64 else 8)


def query_tile(dim: int, dtype: torch.dtype, *, own: bool) -> Tile:
    """The backward over query tiles, with a second matrix of the scores' size; with own keys or without."""
    if dtype is not torch.float32:
        return _tile(32, 32, 4) if dim <= 64 else _tile(16, 32, 8)
    if own or dim <= 64:
        return _tile(16, 32 if own and dim <= 64 else 16, 8)
    return _tile(16, 16, 16, registers=128 if dim <= 128 else None)


def key_tile(dim: int, dtype: torch.dtype) -> Tile:
    """The backward over key tiles, with a second accumulator, too."""
    if dtype is torch.float32:
        return _tile(16, 32 if dim <= 64 else 16, 8, num_stages=2 if dim <= 128 else 1)
    return _tile(32, 32, 4) if dim <= 64 else _tile(32, 64, 8) if dim <= 128 else _tile(16, 32, 8)


def _tile(block_m: int, block_n: int, num_warps: int, registers: int | None = 255, num_stages: int = 2) -> Tile:
    """Exact fp32 has its operands in registers, so its tiles are small. On AMD four wavefronts are the threads of eight warps."""
    return Tile({"BLOCK_M": block_m, "BLOCK_N": block_n}, num_warps if torch.version.hip is None else 4, registers, num_stages)


# --- launches ----------------------------------------------------------------------------------------------------------------------

_WIDEST = 256  # head dim
_LONGEST = 64  # tile


def _strides(*tensors: Tensor | None, last: int = 4) -> tuple[int, ...]:
    """Of the first dimensions."""
    return tuple(stride for t in tensors for stride in (t.stride()[:last] if t is not None else (0,) * last))


def _places(groups: tuple[int, ...], like: Tensor) -> Tensor | None:
    """[M + G + 1] int32: of each row of the memory its group, and then where each group begins and the last one ends. None for one group."""
    if len(groups) < 2:
        return None

    def make() -> Tensor:
        # Filled on the device: while a CUDA graph is captured nothing can be copied there.
        runs = [(length, group) for group, length in enumerate(groups)] + [(1, sum(groups[:g])) for g in range(len(groups) + 1)]
        return torch.cat([torch.full((length,), value, dtype=torch.int32, device=like.device) for length, value in runs])

    return _made.get((groups, like.device), like, make)


_made = shared.Made()


class _Call(NamedTuple):
    """What the launches of one call have in common."""

    q: Tensor  # [B, H, .., ..] like all of them
    k: Tensor
    v: Tensor
    memory_k: Tensor  # as of every image
    memory_v: Tensor
    own_k: Tensor | None
    own_v: Tensor | None
    places: Tensor | None
    batch: int
    heads: int
    queries: int
    keys: int
    memories: int
    each: int
    scalars: tuple[float | int, ...]
    constants: dict[str, Any]

    @staticmethod
    def of(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        memory_k: Tensor,
        memory_v: Tensor,
        own_k: Tensor | None,
        own_v: Tensor | None,
        groups: Sequence[int],
        scale: float,
        dropout_p: float,
        grad_out: Tensor | None = None,
    ) -> _Call:
        batch, heads, queries, dim = q.shape
        value_dim = v.shape[3]
        if max(dim, value_dim) > _WIDEST:
            raise ValueError(f"memory_attention: q has head_dim {dim} and v {value_dim}; the Triton kernels take at most {_WIDEST}")
        images = max(batch, 1)  # without any, the memory's gradient is zero all the same, and its kernel reads the memory
        memory_k, memory_v = (m.transpose(0, 1).expand(images, heads, *m.shape[::2]) for m in (memory_k, memory_v))
        tensors = (q, k, v, memory_k, memory_v, own_k, own_v)
        far = (((_LONGEST - 1) * t.stride(2) + (t.shape[3] - 1) * t.stride(3)) for t in (*tensors, grad_out) if t is not None)
        return _Call(
            *tensors,
            _places(tuple(groups), q),
            batch,
            heads,
            queries,
            k.shape[2],
            memory_k.shape[2],
            queries // max(len(groups), 1),
            (scale, packed_reference.drop_limit(dropout_p), 1 / (1 - dropout_p) if dropout_p < 1 else 0.0),
            {
                "D": dim,
                "DV": value_dim,
                "BLOCK_D": max(16, shared.next_power_of_2(dim)),
                "BLOCK_DV": max(16, shared.next_power_of_2(value_dim)),
                "WIDE": max(far) >= 2**31,
                "PRECISION": "ieee",
                "INTERPRET": shared.INTERPRET,
            },
        )

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The first arguments of a kernel."""
        return self[:7]

    @property
    def widest(self) -> int:
        """The wider of both head dims."""
        return max(self.constants["D"], self.constants["DV"])

    def over_queries(self, tile: Tile, device: torch.device) -> tuple[int, Tile]:
        """(programs, tile) of a kernel over query tiles, none larger than what there is."""
        tile = shared.fill(self.fitted(tile, max(self.keys, self.memories)), "BLOCK_M", self.queries, self.batch * self.heads, device)
        return shared.cdiv(self.queries, tile.blocks["BLOCK_M"]) * self.batch * self.heads, tile

    def fitted(self, tile: Tile, keys: int) -> Tile:
        """The tile, no larger than the queries and the keys."""
        return tile._replace(
            blocks={"BLOCK_M": shared.power(self.queries, 16, tile.blocks["BLOCK_M"]), "BLOCK_N": shared.power(keys, 16, tile.blocks["BLOCK_N"])}
        )


def memory_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor,
    memory_v: Tensor,
    own_k: Tensor | None,
    own_v: Tensor | None,
    groups: Sequence[int],
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Forward of ``vitkernels::memory_attention``; arguments and results as its schema in op.py says."""
    c = _Call.of(q, k, v, memory_k, memory_v, own_k, own_v, groups, scale, dropout_p)
    out = q.new_empty((c.batch, c.queries, c.heads, v.shape[3]))
    lse = q.new_empty((c.batch, c.heads, c.queries), dtype=torch.float64)
    programs, tile = c.over_queries(forward_tile(c.widest, q.dtype, dropout=seed is not None), q.device)
    with shared.on(q):
        shared.launch(
            memory_attention_fwd_kernel,
            programs,
            *(*c.tensors, c.places, seed, out, lse, *_strides(*c.tensors)),
            *(c.heads, c.queries, c.keys, c.memories, c.each, *c.scalars),
            **c.constants,
            **tile.options,
        )
    return out, lse


def memory_attention_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor,
    memory_v: Tensor,
    own_k: Tensor | None,
    own_v: Tensor | None,
    lse: Tensor,
    groups: Sequence[int],
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    need_q: bool,
    need_k: bool,
    need_v: bool,
    need_memory_k: bool,
    need_memory_v: bool,
    need_own_k: bool,
    need_own_v: bool,
) -> tuple[Tensor, ...]:
    """Backward of ``vitkernels::memory_attention``; arguments and results as its schema in op.py says."""
    if grad_out is None:
        grad_out = q.new_zeros(()).expand(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
    grad_out = grad_out.transpose(1, 2)
    c = _Call.of(q, k, v, memory_k, memory_v, own_k, own_v, groups, scale, dropout_p, grad_out)
    plain = not groups and own_k is None

    def wanted(needed: bool, like: Tensor | None) -> Tensor | None:
        if not needed or like is None:
            return None
        return _define.token_major(like, like.shape[3]) if plain and like.dim() == 4 else like.new_empty(like.shape)

    grad_q, grad_k, grad_v = wanted(need_q, q), wanted(need_k, k), wanted(need_v, v)
    grad_memory_k, grad_memory_v = wanted(need_memory_k, memory_k), wanted(need_memory_v, memory_v)
    grad_own_k, grad_own_v = wanted(need_own_k, own_k), wanted(need_own_v, own_v)

    lse = lse.contiguous()
    delta = torch.empty_like(lse, dtype=torch.float32)
    with shared.on(q):
        if any(grad is not None for grad in (grad_q, grad_k, grad_memory_k, grad_own_k, grad_own_v)):
            programs, tile = c.over_queries(query_tile(c.widest, q.dtype, own=own_k is not None), q.device)
            shared.launch(
                memory_attention_bwd_query_kernel,
                programs,
                *(grad_out, grad_lse, *c.tensors, c.places, seed, lse, delta, grad_q, grad_own_k, grad_own_v),
                *(*_strides(grad_out), *_strides(grad_lse, last=3), *_strides(*c.tensors), *_strides(grad_q, last=3)),
                *(c.heads, c.queries, c.keys, c.memories, c.each, *c.scalars),
                **c.constants,
                **tile.options,
            )
        rows = (grad_out, q, seed, lse, delta)
        _key_gradients(c, rows, k, v, None, 0, c.batch, 1, grad_k, grad_v)
        _memory_gradients(c, rows, grad_memory_k, grad_memory_v)
    grads = (grad_q, grad_k, grad_v, grad_memory_k, grad_memory_v, grad_own_k, grad_own_v)
    return tuple(lse.new_empty((0,)) if grad is None else grad for grad in grads)


def _key_gradients(
    c: _Call,
    rows: tuple[Tensor | None, ...],
    k: Tensor,
    v: Tensor,
    places: Tensor | None,
    first_column: int,
    splits: int,
    images: int,
    grad_k: Tensor | None,
    grad_v: Tensor | None,
) -> None:
    """Gradients [splits, H, K, ..] of keys and values, each split's from so many images."""
    if grad_k is None and grad_v is None:
        return
    grad_out, q, seed, lse, delta = rows
    keys = k.shape[2]
    tile = shared.fill(c.fitted(key_tile(c.widest, k.dtype), keys), "BLOCK_N", keys, splits * c.heads, k.device)
    shared.launch(
        memory_attention_bwd_key_kernel,
        shared.cdiv(keys, tile.blocks["BLOCK_N"]) * c.heads * splits,
        *(grad_out, q, k, v, places, seed, lse, None if grad_k is None else delta, grad_k, grad_v),
        *(*_strides(grad_out, q, k, v), *_strides(grad_k, grad_v, last=3)),
        *(c.batch, c.heads, c.queries, keys, images, c.keys + c.memories, first_column, c.each, *c.scalars),
        **c.constants,
        **tile.options,
    )


def _memory_gradients(c: _Call, rows: tuple[Tensor | None, ...], grad_k: Tensor | None, grad_v: Tensor | None) -> None:
    """Gradients [M, H, ..] of the memory. The images go in several splits where the memory alone would not fill the GPU."""
    grads = [grad for grad in (grad_k, grad_v) if grad is not None and grad.numel()]
    if not grads:
        return
    tiles = shared.cdiv(c.memories, 16) * c.heads
    splits, images = shared.splits(tiles, max(c.batch, 1), shared.processors(grads[0].device), least=4)
    parts = [
        None if grad is None else grad[None] if splits == 1 else grad.new_empty((splits, *grad.shape), dtype=torch.float32)
        for grad in (grad_k, grad_v)
    ]
    part_k, part_v = (None if part is None else part.transpose(1, 2) for part in parts)
    _key_gradients(c, rows, c.memory_k, c.memory_v, c.places, c.keys, splits, images, part_k, part_v)
    for part, grad in zip(parts, (grad_k, grad_v), strict=True):
        if part is not None and grad is not None and splits > 1:
            shared.sum_parts(part, grad)
