"""Separable self-attention (MobileViTv2, arXiv 2206.02680, section 3.2) in Triton: kernels and their launches.

Two walks over a map. *Reductions go group by group*: one program owns pixels of one group p (pixel position in the patch), so that the softmax,
the pooled input and the context's gradient are plain sums. *Writes go pixel by pixel* in the order of the map, so that stores to a contiguous map
coalesce. Both read ``x`` through its strides; nothing is unfolded.

Forward: pool (logits, online softmax, pooled input: one read of x), context (merges the pool's splits, projects to the context), then one kernel with
both GEMMs, V never leaving the SM. Backward: value (V recomputed; U and dV), context again (transposed), query (dq), input (dx), and split-K weight
gradients. No atomics: partial sums are stored and added in a fixed order, so results are equal bit for bit from run to run.

Notation of the folder's README.md: s the softmax, s' = s * score_scale, c the context, U = relu(V) * c. ``tokens`` = H * W, ``groups`` = P.
"""

from __future__ import annotations

from typing import Any, NamedTuple, overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitkernels.ops import _triton as shared
from vitkernels.ops._triton import LOG2E, Tile, add_product, cast, dot, power, relu, wide

# --- pieces of kernels -------------------------------------------------------------------------------------------------------------


@triton.jit
def _pixel(i_p, o_n, width, patch_h, patch_w, ONE_ROW: tl.constexpr):
    """Index in the map, row-major, of token ``o_n`` of group ``i_p``. ONE_ROW: the map is one patch high, as an unfolded tensor is."""
    if ONE_ROW:
        return (i_p // patch_w) * width + o_n * patch_w + i_p % patch_w
    per_row = width // patch_w
    return ((o_n // per_row) * patch_h + i_p // patch_w) * width + (o_n % per_row) * patch_w + i_p % patch_w


@triton.jit
def _group(o_t, width, patch_h, patch_w):
    """Group of pixel ``o_t`` of the map."""
    return ((o_t // width) % patch_h) * patch_w + (o_t % width) % patch_w


@triton.jit
def _offset(o_t, width, stride_h, stride_w, FLAT: tl.constexpr, WIDE: tl.constexpr):
    """Where pixel ``o_t`` lies in one channel of one image. FLAT: rows follow each other, so that one stride says it."""
    o_t = wide(o_t, WIDE)
    if FLAT:
        return o_t * stride_w
    return (o_t // width) * stride_h + (o_t % width) * stride_w


# --- forward -----------------------------------------------------------------------------------------------------------------------


@triton.jit
def separable_self_attention_fwd_pool_kernel(
    x,  # [B, d, H, W], strides below
    qkv_weight,  # [1 + 2d, d]
    qkv_bias,  # [1 + 2d] or None
    score_scale,  # [B, H, W] or None
    logits,  # [B, H, W], written
    part_max,  # [B, splits, P], written: largest logit, times log2(e)
    part_sum,  # [B, splits, P], written: sum of exponentials
    part_mass,  # [B, splits, P] or None, written: the same sum with each term scaled by score_scale
    part_pooled,  # [B, splits, P, d], written: sum of exponential * score_scale * x
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    width,
    tokens,
    groups,
    patches,
    patch_h,
    patch_w,
    splits,
    split_length,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FLAT: tl.constexpr,
    ONE_ROW: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Logits, online softmax and pooled input of one group's share of tokens. Groups run fastest over programs: they share cache lines of x."""
    i = tl.program_id(0).to(tl.int64)
    i_p = (i % groups).to(tl.int32)
    i_s = (i // groups % splits).to(tl.int32)
    i_b = i // groups // splits

    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_wq = tl.load(qkv_weight + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BLOCK_D]
    bias_q = 0.0
    if qkv_bias is not None:
        bias_q = tl.load(qkv_bias).to(tl.float32)
    x_channel = x + i_b * stride_b + wide(o_d, WIDE) * stride_c  # [BLOCK_D]

    running_max = float("-inf")
    running_sum = 0.0
    running_mass = 0.0
    b_pooled = tl.zeros([BLOCK_D, BLOCK_N], dtype=tl.float32)  # summed over tokens only at the end
    start = i_s * split_length
    for n in range(start, tl.minimum(start + split_length, patches), BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        m_n = o_n < patches
        o_t = _pixel(i_p, o_n, width, patch_h, patch_w, ONE_ROW)
        o_x = _offset(o_t, width, stride_h, stride_w, FLAT, WIDE)
        b_x = tl.load(x_channel[:, None] + o_x[None, :], mask=m_d[:, None] & m_n[None, :], other=0.0).to(tl.float32)  # [BLOCK_D, BLOCK_N]
        b_logit = tl.sum(b_x * b_wq[:, None], axis=0) + bias_q  # [BLOCK_N]
        tl.store(logits + i_b * tokens + o_t, b_logit, mask=m_n)
        b_logit = tl.where(m_n, b_logit * LOG2E, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(b_logit, axis=0))
        rescale = tl.exp2(running_max - new_max)
        b_e = tl.exp2(b_logit - new_max)  # [BLOCK_N]
        running_sum = running_sum * rescale + tl.sum(b_e, axis=0)
        if score_scale is not None:
            b_e *= tl.load(score_scale + i_b * tokens + o_t, mask=m_n, other=0.0)
            running_mass = running_mass * rescale + tl.sum(b_e, axis=0)
        b_pooled = b_pooled * rescale + b_x * b_e[None, :]
        running_max = new_max

    tl.store(part_max + i, running_max)
    tl.store(part_sum + i, running_sum)
    if score_scale is not None:
        tl.store(part_mass + i, running_mass)
    tl.store(part_pooled + i * D + o_d, tl.sum(b_pooled, axis=1), mask=m_d)


@triton.jit
def separable_self_attention_context_kernel(
    pooled,  # [G, d]: with MERGE written, else read
    weight,  # [d, d], strides below
    bias,  # [d] or None
    mass,  # [G] or None (all ones): with MERGE written, else read
    out,  # [G, d], written: pooled weight^T + mass bias
    stats,  # [G, 2], written with MERGE: maximum (in units of log 2) and sum of exponentials of each group's logits
    part_max,
    part_sum,
    part_mass,
    part_pooled,
    rows,
    groups,
    splits,
    stride_wo,
    stride_wi,
    D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MERGE: tl.constexpr,
):
    """One row per (image, group), G = B * P of them: a small linear layer in fp32, which with MERGE first joins the pool kernel's splits.

    Forward: pooled -> context, weight W_k. Backward: dc -> W_k^T dc, by swapped strides.
    """
    i_o = tl.program_id(0) % tl.cdiv(D, BLOCK_O)
    i_g = tl.program_id(0) // tl.cdiv(D, BLOCK_O)
    o_g = i_g.to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    m_g = o_g < rows
    o_o = i_o * BLOCK_O + tl.arange(0, BLOCK_O)
    m_o = o_o < D
    first = m_g & (i_o == 0)

    b_mass = tl.full([BLOCK_G], 1.0, dtype=tl.float32)
    b_part = o_g // groups * splits * groups + o_g % groups  # the group's first split
    b_max = tl.full([BLOCK_G], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_G], dtype=tl.float32)
    if MERGE:
        for i_s in range(splits):
            b_max = tl.maximum(b_max, tl.load(part_max + b_part + i_s * groups, mask=m_g, other=0.0))
        b_scaled = tl.zeros([BLOCK_G], dtype=tl.float32)
        for i_s in range(splits):
            b_share = tl.exp2(tl.load(part_max + b_part + i_s * groups, mask=m_g, other=0.0) - b_max)
            b_sum += b_share * tl.load(part_sum + b_part + i_s * groups, mask=m_g, other=1.0)
            if part_mass is not None:
                b_scaled += b_share * tl.load(part_mass + b_part + i_s * groups, mask=m_g, other=0.0)
        tl.store(stats + 2 * o_g, b_max, mask=first)
        tl.store(stats + 2 * o_g + 1, b_sum, mask=first)
        if mass is not None:
            b_mass = b_scaled / b_sum
            tl.store(mass + o_g, b_mass, mask=first)
    elif mass is not None:
        b_mass = tl.load(mass + o_g, mask=m_g, other=0.0)

    b_out = tl.zeros([BLOCK_G, BLOCK_O], dtype=tl.float32)
    for k in range(0, D, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_k = o_k < D
        m_gk = m_g[:, None] & m_k[None, :]
        b_in = tl.zeros([BLOCK_G, BLOCK_K], dtype=tl.float32)
        if MERGE:
            for i_s in range(splits):
                b_row = b_part + i_s * groups
                b_share = tl.exp2(tl.load(part_max + b_row, mask=m_g, other=0.0) - b_max) / b_sum
                b_in += b_share[:, None] * tl.load(part_pooled + b_row[:, None] * D + o_k[None, :], mask=m_gk, other=0.0)
            tl.store(pooled + o_g[:, None] * D + o_k[None, :], b_in, mask=first[:, None] & m_k[None, :])
        else:
            b_in = tl.load(pooled + o_g[:, None] * D + o_k[None, :], mask=m_gk, other=0.0)
        o_w = o_o[None, :] * stride_wo + o_k[:, None] * stride_wi
        b_w = tl.load(weight + o_w, mask=m_k[:, None] & m_o[None, :], other=0.0).to(tl.float32)  # [BLOCK_K, BLOCK_O]
        b_out = tl.dot(b_in, b_w, b_out, input_precision="ieee")
    if bias is not None:
        b_out += b_mass[:, None] * tl.load(bias + o_o, mask=m_o, other=0.0).to(tl.float32)[None, :]
    tl.store(out + o_g[:, None] * D + o_o[None, :], b_out, mask=m_g[:, None] & m_o[None, :])


@triton.jit
def separable_self_attention_fwd_kernel(
    x,  # [B, d, H, W]
    qkv_weight,  # [1 + 2d, d]
    qkv_bias,  # [1 + 2d] or None
    context,  # [B, P, d]
    out_weight,  # [d, d]
    out_bias,  # [d] or None
    y,  # [B, d, H, W], written
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_yb,
    stride_yc,
    stride_yh,
    stride_yw,
    width,
    tokens,
    groups,
    patch_h,
    patch_w,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FLAT_X: tl.constexpr,
    FLAT_Y: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """The output, W_o (relu(W_v x + b_v) * context) + b_o, for a tile of pixels.

    BLOCK_E channels of V at a time, each used up before the next: V never leaves the multiprocessor.
    """
    i = tl.program_id(0)
    i_o = i % tl.cdiv(D, BLOCK_O)
    i_t = i // tl.cdiv(D, BLOCK_O) % tl.cdiv(tokens, BLOCK_T)
    i_b = (i // tl.cdiv(D, BLOCK_O) // tl.cdiv(tokens, BLOCK_T)).to(tl.int64)
    dtype = y.dtype.element_ty

    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < tokens
    o_p = _group(o_t, width, patch_h, patch_w)
    o_o = i_o * BLOCK_O + tl.arange(0, BLOCK_O)
    m_o = o_o < D
    x_pixel = x + i_b * stride_xb + _offset(o_t, width, stride_xh, stride_xw, FLAT_X, WIDE)  # [BLOCK_T]
    context_row = context + (i_b * groups + o_p) * D  # [BLOCK_T]
    v_weight = qkv_weight + (1 + D) * D

    b_y = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
    for e in range(0, D, BLOCK_E):
        o_e = e + tl.arange(0, BLOCK_E)
        m_e = o_e < D
        b_v = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
        for k in range(0, D, BLOCK_K):
            o_k = k + tl.arange(0, BLOCK_K)
            m_k = o_k < D
            b_x = tl.load(x_pixel[:, None] + wide(o_k, WIDE)[None, :] * stride_xc, mask=m_t[:, None] & m_k[None, :], other=0.0)  # [BLOCK_T, BLOCK_K]
            b_wv = tl.load(v_weight + o_e[None, :] * D + o_k[:, None], mask=m_e[None, :] & m_k[:, None], other=0.0)  # [BLOCK_K, BLOCK_E]
            b_v = dot(b_x, b_wv, b_v, PRECISION, INTERPRET)
        if qkv_bias is not None:
            b_v += tl.load(qkv_bias + 1 + D + o_e, mask=m_e, other=0.0).to(tl.float32)[None, :]
        b_c = tl.load(context_row[:, None] + o_e[None, :], mask=m_t[:, None] & m_e[None, :], other=0.0)  # [BLOCK_T, BLOCK_E]
        b_u = cast(relu(b_v) * b_c, dtype, INTERPRET)
        b_wo = tl.load(out_weight + o_o[None, :] * D + o_e[:, None], mask=m_o[None, :] & m_e[:, None], other=0.0)  # [BLOCK_E, BLOCK_O]
        b_y = dot(b_u, b_wo, b_y, PRECISION, INTERPRET)
    if out_bias is not None:
        b_y += tl.load(out_bias + o_o, mask=m_o, other=0.0).to(tl.float32)[None, :]
    y_pixel = y + i_b * stride_yb + _offset(o_t, width, stride_yh, stride_yw, FLAT_Y, WIDE)
    y_at = y_pixel[:, None] + wide(o_o, WIDE)[None, :] * stride_yc
    tl.store(y_at, cast(b_y, dtype, INTERPRET), mask=m_t[:, None] & m_o[None, :])


# --- backward ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def separable_self_attention_bwd_value_kernel(
    x,  # [B, d, H, W]
    grad_y,  # [B, d, H, W]
    qkv_weight,  # [1 + 2d, d]
    qkv_bias,  # [1 + 2d] or None
    context,  # [B, P, d]
    out_weight,  # [d, d]
    u,  # [B, H, W, d] or None, written: relu(V) * context
    grad_v,  # [B, H, W, d] or None, written
    part_context,  # [tiles, B, P, d] or None, written: this tile's share of the context's gradient
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_gb,
    stride_gc,
    stride_gh,
    stride_gw,
    width,
    tokens,
    groups,
    patches,
    patch_h,
    patch_w,
    batch,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FLAT_X: tl.constexpr,
    FLAT_G: tl.constexpr,
    ONE_ROW: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """V again, and dU = W_o^T dy beside it, for BLOCK_N tokens of one group and BLOCK_E channels; both GEMMs share one loop over d."""
    i = tl.program_id(0)
    i_e = i % tl.cdiv(D, BLOCK_E)
    i_p = i // tl.cdiv(D, BLOCK_E) % groups
    i_n = i // tl.cdiv(D, BLOCK_E) // groups % tl.cdiv(patches, BLOCK_N)
    i_b = (i // tl.cdiv(D, BLOCK_E) // groups // tl.cdiv(patches, BLOCK_N)).to(tl.int64)

    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < patches
    o_t = _pixel(i_p, o_n, width, patch_h, patch_w, ONE_ROW)
    o_e = i_e * BLOCK_E + tl.arange(0, BLOCK_E)
    m_e = o_e < D
    x_pixel = x + i_b * stride_xb + _offset(o_t, width, stride_xh, stride_xw, FLAT_X, WIDE)  # [BLOCK_N]
    g_pixel = grad_y + i_b * stride_gb + _offset(o_t, width, stride_gh, stride_gw, FLAT_G, WIDE)
    v_weight = qkv_weight + (1 + D) * D

    b_v = tl.zeros([BLOCK_N, BLOCK_E], dtype=tl.float32)
    b_du = tl.zeros([BLOCK_N, BLOCK_E], dtype=tl.float32)
    for k in range(0, D, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_k = o_k < D
        m_nk = m_n[:, None] & m_k[None, :]
        m_ke = m_k[:, None] & m_e[None, :]
        b_x = tl.load(x_pixel[:, None] + wide(o_k, WIDE)[None, :] * stride_xc, mask=m_nk, other=0.0)  # [BLOCK_N, BLOCK_K]
        b_wv = tl.load(v_weight + o_e[None, :] * D + o_k[:, None], mask=m_ke, other=0.0)  # [BLOCK_K, BLOCK_E]
        b_v = dot(b_x, b_wv, b_v, PRECISION, INTERPRET)
        if grad_v is not None:
            b_g = tl.load(g_pixel[:, None] + wide(o_k, WIDE)[None, :] * stride_gc, mask=m_nk, other=0.0)  # [BLOCK_N, BLOCK_K]
            b_wo = tl.load(out_weight + o_k[:, None] * D + o_e[None, :], mask=m_ke, other=0.0)  # [BLOCK_K, BLOCK_E]
            b_du = dot(b_g, b_wo, b_du, PRECISION, INTERPRET)
    if qkv_bias is not None:
        b_v += tl.load(qkv_bias + 1 + D + o_e, mask=m_e, other=0.0).to(tl.float32)[None, :]
    b_relu = relu(b_v)
    b_c = tl.load(context + (i_b * groups + i_p) * D + o_e, mask=m_e, other=0.0)  # [BLOCK_E]
    o_out = (i_b * tokens + o_t)[:, None] * D + o_e[None, :]
    m_out = m_n[:, None] & m_e[None, :]
    if u is not None:
        tl.store(u + o_out, cast(b_relu * b_c[None, :], u.dtype.element_ty, INTERPRET), mask=m_out)
    if grad_v is not None:
        b_dc = tl.sum(b_du * b_relu, axis=0)  # [BLOCK_E]
        tl.store(part_context + ((i_n * batch + i_b) * groups + i_p) * D + o_e, b_dc, mask=m_e)
        b_dv = tl.where(b_v > 0, b_du * b_c[None, :], 0.0)
        tl.store(grad_v + o_out, cast(b_dv, grad_v.dtype.element_ty, INTERPRET), mask=m_out)


@triton.jit
def separable_self_attention_bwd_query_kernel(
    x,  # [B, d, H, W]
    score_scale,  # [B, H, W] or None
    logits,  # [B, H, W]
    stats,  # [B, P, 2]
    mass,  # [B, P] or None
    pooled,  # [B, P, d]
    k_bias,  # [d] or None
    grad_context,  # [B, P, d]
    grad_pooled,  # [B, P, d]: W_k^T grad_context
    grad_logits,  # [B, H, W], written
    part_weight,  # [B, splits, P, d], written: this split's share of the query row's gradient
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    width,
    tokens,
    groups,
    patches,
    patch_h,
    patch_w,
    splits,
    split_length,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FLAT: tl.constexpr,
    ONE_ROW: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Softmax backward of one group's share of tokens, and with it the gradient of the query row.

    ds'_n = dxbar . x_n + b_k . dc and dq_n = s_n (score_scale_n ds'_n - sum_m s'_m ds'_m). With the mean token m = pooled / mass, where ds' has the
    value r = dxbar . m + b_k . dc, the sum is mass r and needs no pass of its own:
    dq_n = s_n (score_scale_n dxbar . (x_n - m) + (score_scale_n - mass) r). Without score_scale the second term is nothing. The difference of tokens,
    not of dot products: where one score is nearly 1 the latter would be mostly rounding. The dq of a group add up to 0 (the softmax does not see a
    shift), so the gradient of the query's bias is 0 and the query row's, sum_n dq_n x_n, is taken about m too.
    """
    i = tl.program_id(0).to(tl.int64)
    i_p = (i % groups).to(tl.int32)
    i_s = (i // groups % splits).to(tl.int32)
    i_b = i // groups // splits
    i_g = i_b * groups + i_p

    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_dxbar = tl.load(grad_pooled + i_g * D + o_d, mask=m_d, other=0.0)  # [BLOCK_D]
    b_mean = tl.load(pooled + i_g * D + o_d, mask=m_d, other=0.0)  # [BLOCK_D]
    if score_scale is not None:
        group_mass = tl.load(mass + i_g)
        b_mean = tl.where(group_mass == 0, 0.0, b_mean / group_mass)  # a group whose every score was dropped
        mean_ds = tl.sum(b_dxbar * b_mean, axis=0)
        if k_bias is not None:
            b_dc = tl.load(grad_context + i_g * D + o_d, mask=m_d, other=0.0)
            mean_ds += tl.sum(b_dc * tl.load(k_bias + o_d, mask=m_d, other=0.0).to(tl.float32), axis=0)
    group_max = tl.load(stats + 2 * i_g)
    group_sum = tl.load(stats + 2 * i_g + 1)
    x_channel = x + i_b * stride_b + wide(o_d, WIDE) * stride_c  # [BLOCK_D]

    b_weight = tl.zeros([BLOCK_D, BLOCK_N], dtype=tl.float32)
    start = i_s * split_length
    for n in range(start, tl.minimum(start + split_length, patches), BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        m_n = o_n < patches
        o_t = _pixel(i_p, o_n, width, patch_h, patch_w, ONE_ROW)
        o_x = _offset(o_t, width, stride_h, stride_w, FLAT, WIDE)
        b_x = tl.load(x_channel[:, None] + o_x[None, :], mask=m_d[:, None] & m_n[None, :], other=0.0).to(tl.float32)  # [BLOCK_D, BLOCK_N]
        b_x -= b_mean[:, None]
        b_ds = tl.sum(b_x * b_dxbar[:, None], axis=0)  # [BLOCK_N]
        if score_scale is not None:
            b_scale = tl.load(score_scale + i_b * tokens + o_t, mask=m_n, other=0.0)
            b_ds = b_scale * b_ds + (b_scale - group_mass) * mean_ds
        b_s = tl.exp2(tl.load(logits + i_b * tokens + o_t, mask=m_n, other=float("-inf")) * LOG2E - group_max) / group_sum
        b_dq = b_s * b_ds
        tl.store(grad_logits + i_b * tokens + o_t, b_dq, mask=m_n)
        b_weight += b_x * b_dq[None, :]
    tl.store(part_weight + i * D + o_d, tl.sum(b_weight, axis=1), mask=m_d)


@triton.jit
def separable_self_attention_bwd_input_kernel(
    grad_v,  # [B, H, W, d]
    qkv_weight,  # [1 + 2d, d]
    score_scale,  # [B, H, W] or None
    logits,  # [B, H, W]
    stats,  # [B, P, 2]
    grad_pooled,  # [B, P, d]
    grad_logits,  # [B, H, W]
    grad_x,  # [B, d, H, W], written
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    width,
    tokens,
    groups,
    patch_h,
    patch_w,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FLAT: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Input gradient, W_v^T dv + s' dxbar + dq w_q, for a tile of pixels and BLOCK_O channels: a GEMM with a rank-two epilogue."""
    i = tl.program_id(0)
    i_o = i % tl.cdiv(D, BLOCK_O)
    i_t = i // tl.cdiv(D, BLOCK_O) % tl.cdiv(tokens, BLOCK_T)
    i_b = (i // tl.cdiv(D, BLOCK_O) // tl.cdiv(tokens, BLOCK_T)).to(tl.int64)

    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < tokens
    o_row = i_b * tokens + o_t
    o_g = i_b * groups + _group(o_t, width, patch_h, patch_w)
    o_o = i_o * BLOCK_O + tl.arange(0, BLOCK_O)
    m_o = o_o < D
    v_weight = qkv_weight + (1 + D) * D

    b_dx = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
    for k in range(0, D, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_k = o_k < D
        b_dv = tl.load(grad_v + o_row[:, None] * D + o_k[None, :], mask=m_t[:, None] & m_k[None, :], other=0.0)  # [BLOCK_T, BLOCK_K]
        b_wv = tl.load(v_weight + o_k[:, None] * D + o_o[None, :], mask=m_k[:, None] & m_o[None, :], other=0.0)  # [BLOCK_K, BLOCK_O]
        b_dx = dot(b_dv, b_wv, b_dx, PRECISION, INTERPRET)
    b_max = tl.load(stats + 2 * o_g, mask=m_t, other=0.0)
    b_s = tl.exp2(tl.load(logits + o_row, mask=m_t, other=0.0) * LOG2E - b_max)  # [BLOCK_T]
    b_s /= tl.load(stats + 2 * o_g + 1, mask=m_t, other=1.0)
    if score_scale is not None:
        b_s *= tl.load(score_scale + o_row, mask=m_t, other=0.0)
    m_out = m_t[:, None] & m_o[None, :]
    b_dx += b_s[:, None] * tl.load(grad_pooled + o_g[:, None] * D + o_o[None, :], mask=m_out, other=0.0)
    b_wq = tl.load(qkv_weight + o_o, mask=m_o, other=0.0).to(tl.float32)
    b_dx += tl.load(grad_logits + o_row, mask=m_t, other=0.0)[:, None] * b_wq[None, :]
    x_pixel = grad_x + i_b * stride_b + _offset(o_t, width, stride_h, stride_w, FLAT, WIDE)
    x_at = x_pixel[:, None] + wide(o_o, WIDE)[None, :] * stride_c
    tl.store(x_at, cast(b_dx, grad_x.dtype.element_ty, INTERPRET), mask=m_out)


@triton.jit
def separable_self_attention_bwd_weight_kernel(
    grad_out,  # [B, d, H, W]: gradient of a linear layer's output
    inputs,  # [B, d, H, W]: the layer's input
    part_weight,  # [splits, d, d], written: this split's share of grad_out inputs^T
    part_bias,  # [splits, d], written: of the sum of grad_out over tokens
    stride_gb,
    stride_gc,
    stride_gh,
    stride_gw,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    width,
    tokens,
    tiles,
    split_tiles,
    D: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    FLAT_G: tl.constexpr,
    FLAT_X: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Weight and bias gradient of a linear layer over the pixels of a map, split over tokens (split-K)."""
    i = tl.program_id(0)
    i_i = i % tl.cdiv(D, BLOCK_I)
    i_o = i // tl.cdiv(D, BLOCK_I) % tl.cdiv(D, BLOCK_O)
    i_s = i // tl.cdiv(D, BLOCK_I) // tl.cdiv(D, BLOCK_O)

    o_o = i_o * BLOCK_O + tl.arange(0, BLOCK_O)
    o_i = i_i * BLOCK_I + tl.arange(0, BLOCK_I)
    m_o = o_o < D
    m_i = o_i < D
    g_channel = grad_out + wide(o_o, WIDE) * stride_gc
    x_channel = inputs + wide(o_i, WIDE) * stride_xc
    per_image = tl.cdiv(tokens, BLOCK_T)

    b_weight = tl.zeros([BLOCK_O, BLOCK_I], dtype=tl.float32)
    b_bias = tl.zeros([BLOCK_O], dtype=tl.float32)
    for i_tile in range(i_s * split_tiles, tl.minimum(i_s * split_tiles + split_tiles, tiles)):
        i_b = (i_tile // per_image).to(tl.int64)
        o_t = i_tile % per_image * BLOCK_T + tl.arange(0, BLOCK_T)
        m_t = o_t < tokens
        o_g = i_b * stride_gb + _offset(o_t, width, stride_gh, stride_gw, FLAT_G, WIDE)
        o_x = i_b * stride_xb + _offset(o_t, width, stride_xh, stride_xw, FLAT_X, WIDE)
        b_g = tl.load(g_channel[:, None] + o_g[None, :], mask=m_o[:, None] & m_t[None, :], other=0.0)  # [BLOCK_O, BLOCK_T]
        b_x = tl.load(x_channel[None, :] + o_x[:, None], mask=m_i[None, :] & m_t[:, None], other=0.0)  # [BLOCK_T, BLOCK_I]
        b_weight = add_product(b_g, b_x, b_weight, PRECISION, INTERPRET)
        b_bias += tl.sum(b_g.to(tl.float32), axis=1)
    o_part = i_s.to(tl.int64) * D + o_o
    tl.store(part_weight + o_part[:, None] * D + o_i[None, :], b_weight, mask=m_o[:, None] & m_i[None, :])
    tl.store(part_bias + o_part, b_bias, mask=m_o & (i_i == 0))


# --- the core alone ----------------------------------------------------------------------------------------------------------------


@triton.jit
def separable_attention_fwd_kernel(
    q,  # [B, 1, P, N]
    k,  # [B, d, P, N]
    v,  # [B, d, P, N]
    out,  # [B, d, P, N] contiguous, written
    scores,  # [B, P, N], written
    context,  # [B, P, d], written
    stride_qb,
    stride_qp,
    stride_qn,
    stride_kb,
    stride_kc,
    stride_kp,
    stride_kn,
    stride_vb,
    stride_vc,
    stride_vp,
    stride_vn,
    groups,
    patches,
    D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Softmax, context and output of BLOCK_C channels of one group. The softmax of one channel of logits is cheap to redo per channel block."""
    i = tl.program_id(0)
    i_c = i % tl.cdiv(D, BLOCK_C)
    i_p = wide(i // tl.cdiv(D, BLOCK_C) % groups, WIDE)
    i_b = (i // tl.cdiv(D, BLOCK_C) // groups).to(tl.int64)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < D
    q_row = q + i_b * stride_qb + i_p * stride_qp
    k_row = k + i_b * stride_kb + i_p * stride_kp + wide(o_c, WIDE) * stride_kc  # [BLOCK_C]
    v_row = v + i_b * stride_vb + i_p * stride_vp + wide(o_c, WIDE) * stride_vc
    s_row = scores + (i_b * groups + i_p) * patches
    out_row = out + ((i_b * D + o_c) * groups + i_p) * patches  # [BLOCK_C]

    b_max = tl.full([BLOCK_N], float("-inf"), dtype=tl.float32)
    for n in range(0, patches, BLOCK_N):
        o_n = wide(n + tl.arange(0, BLOCK_N), WIDE)
        b_max = tl.maximum(b_max, tl.load(q_row + o_n * stride_qn, mask=o_n < patches, other=float("-inf")).to(tl.float32))
    largest = tl.max(b_max, axis=0)
    b_sum = tl.zeros([BLOCK_N], dtype=tl.float32)
    b_context = tl.zeros([BLOCK_C, BLOCK_N], dtype=tl.float32)
    for n in range(0, patches, BLOCK_N):
        o_n = wide(n + tl.arange(0, BLOCK_N), WIDE)
        m_n = o_n < patches
        b_q = tl.load(q_row + o_n * stride_qn, mask=m_n, other=float("-inf")).to(tl.float32)
        b_e = tl.exp2((b_q - largest) * LOG2E)
        b_sum += b_e
        b_k = tl.load(k_row[:, None] + o_n[None, :] * stride_kn, mask=m_c[:, None] & m_n[None, :], other=0.0).to(tl.float32)  # [BLOCK_C, BLOCK_N]
        b_context += b_k * b_e[None, :]
    total = tl.sum(b_sum, axis=0)
    b_c = tl.sum(b_context, axis=1) / total  # [BLOCK_C]
    tl.store(context + (i_b * groups + i_p) * D + o_c, b_c, mask=m_c)
    for n in range(0, patches, BLOCK_N):
        o_n = wide(n + tl.arange(0, BLOCK_N), WIDE)
        m_n = o_n < patches
        m_cn = m_c[:, None] & m_n[None, :]
        b_q = tl.load(q_row + o_n * stride_qn, mask=m_n, other=float("-inf")).to(tl.float32)
        tl.store(s_row + o_n, tl.exp2((b_q - largest) * LOG2E) / total, mask=m_n & (i_c == 0))
        b_v = tl.load(v_row[:, None] + o_n[None, :] * stride_vn, mask=m_cn, other=0.0).to(tl.float32)
        tl.store(out_row[:, None] + o_n[None, :], cast(relu(b_v) * b_c[:, None], out.dtype.element_ty, INTERPRET), mask=m_cn)


@triton.jit
def separable_attention_bwd_kernel(
    grad_out,  # [B, d, P, N]
    k,  # [B, d, P, N]
    v,  # [B, d, P, N]
    scores,  # [B, P, N]
    context,  # [B, P, d]
    grad_k,  # [B, d, P, N] contiguous or None, written
    grad_v,  # [B, d, P, N] contiguous or None, written
    part_scores,  # [channel blocks, B, P, N] or None, written: this block's share of the scores' gradient less its mean
    stride_gb,
    stride_gc,
    stride_gp,
    stride_gn,
    stride_kb,
    stride_kc,
    stride_kp,
    stride_kn,
    stride_vb,
    stride_vc,
    stride_vp,
    stride_vn,
    groups,
    patches,
    batch,
    D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Gradients of k and v, and of the scores in part, for BLOCK_C channels of one group.

    The softmax backward is s_n (ds_n - sum_m s_m ds_m) with ds_n = dc . k_n, and sum_m s_m ds_m = dc . c. The difference is taken as
    dc . (k_n - c): where one score is nearly 1 both sums are nearly equal, and their difference would be mostly rounding.
    """
    i = tl.program_id(0)
    i_c = i % tl.cdiv(D, BLOCK_C)
    i_p = wide(i // tl.cdiv(D, BLOCK_C) % groups, WIDE)
    i_b = (i // tl.cdiv(D, BLOCK_C) // groups).to(tl.int64)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < D
    g_row = grad_out + i_b * stride_gb + i_p * stride_gp + wide(o_c, WIDE) * stride_gc  # [BLOCK_C]
    k_row = k + i_b * stride_kb + i_p * stride_kp + wide(o_c, WIDE) * stride_kc
    v_row = v + i_b * stride_vb + i_p * stride_vp + wide(o_c, WIDE) * stride_vc
    i_g = i_b * groups + i_p
    o_out = ((i_b * D + o_c) * groups + i_p) * patches  # [BLOCK_C]
    b_c = tl.load(context + i_g * D + o_c, mask=m_c, other=0.0)  # [BLOCK_C]

    b_sum = tl.zeros([BLOCK_C, BLOCK_N], dtype=tl.float32)
    for n in range(0, patches, BLOCK_N):
        o_n = wide(n + tl.arange(0, BLOCK_N), WIDE)
        m_cn = m_c[:, None] & (o_n < patches)[None, :]
        b_g = tl.load(g_row[:, None] + o_n[None, :] * stride_gn, mask=m_cn, other=0.0).to(tl.float32)  # [BLOCK_C, BLOCK_N]
        b_v = tl.load(v_row[:, None] + o_n[None, :] * stride_vn, mask=m_cn, other=0.0).to(tl.float32)
        b_sum += b_g * relu(b_v)
        if grad_v is not None:
            b_dv = tl.where(b_v > 0, b_g * b_c[:, None], 0.0)
            tl.store(grad_v + o_out[:, None] + o_n[None, :], cast(b_dv, grad_v.dtype.element_ty, INTERPRET), mask=m_cn)
    b_dc = tl.sum(b_sum, axis=1)  # [BLOCK_C]
    if (grad_k is not None) or (part_scores is not None):
        for n in range(0, patches, BLOCK_N):
            o_n = wide(n + tl.arange(0, BLOCK_N), WIDE)
            m_n = o_n < patches
            m_cn = m_c[:, None] & m_n[None, :]
            if grad_k is not None:
                b_dk = b_dc[:, None] * tl.load(scores + i_g * patches + o_n, mask=m_n, other=0.0)[None, :]
                tl.store(grad_k + o_out[:, None] + o_n[None, :], cast(b_dk, grad_k.dtype.element_ty, INTERPRET), mask=m_cn)
            if part_scores is not None:
                b_k = tl.load(k_row[:, None] + o_n[None, :] * stride_kn, mask=m_cn, other=0.0).to(tl.float32)
                b_ds = tl.sum((b_k - b_c[:, None]) * b_dc[:, None], axis=0)  # [BLOCK_N]
                tl.store(part_scores + (i_c.to(tl.int64) * batch * groups + i_g) * patches + o_n, b_ds, mask=m_n)


@triton.jit
def separable_attention_bwd_query_kernel(
    scores,  # [B, P, N]
    part_scores,  # [channel blocks, B, P, N]
    grad_q,  # [B, 1, P, N] contiguous, written
    rows,
    patches,
    blocks,
    BLOCK_N: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Softmax backward: the scores times the sum of the channel blocks' shares."""
    i = tl.program_id(0)
    i_n = i % tl.cdiv(patches, BLOCK_N)
    i_g = (i // tl.cdiv(patches, BLOCK_N)).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < patches
    b_ds = tl.zeros([BLOCK_N], dtype=tl.float32)
    o_part = i_g
    for _ in range(blocks):
        b_ds += tl.load(part_scores + o_part * patches + o_n, mask=m_n, other=0.0)
        o_part += rows
    b_dq = tl.load(scores + i_g * patches + o_n, mask=m_n, other=0.0) * b_ds
    tl.store(grad_q + i_g * patches + o_n, cast(b_dq, grad_q.dtype.element_ty, INTERPRET), mask=m_n)


# --- tiles -------------------------------------------------------------------------------------------------------------------------


def reduction_tile(dim: int) -> Tile:
    """Pool and query kernels: all channels of a few tokens, in registers twice (the input and its weighted sum): 16 values a thread each."""
    block_d = shared.next_power_of_2(dim)
    num_warps = 4 if block_d <= 64 else 8 if block_d <= 256 else 16
    return Tile({"BLOCK_D": block_d, "BLOCK_N": power(512 * num_warps // block_d, 1, 128)}, num_warps)


def context_tile(dim: int) -> Tile:
    """The context kernel: few rows, exact fp32."""
    block = power(dim, 16, 32)
    return Tile({"BLOCK_G": 16, "BLOCK_O": block, "BLOCK_K": block}, 4, registers=128)


def _gemm_edge(dtype: torch.dtype) -> int:
    """Edge of a GEMM tile: 64 fills the tensor cores; exact fp32 runs on the CUDA cores, whose operands sit in registers."""
    return 32 if dtype is torch.float32 else 64


def _token_tile(tokens: int, programs_per_tile: int, dtype: torch.dtype, wanted: int) -> int:
    """Tokens a program takes: the full edge, halved while the GPU would not be filled."""
    block = power(tokens, 16, _gemm_edge(dtype))
    while block > 16 and shared.cdiv(tokens, block) * programs_per_tile < wanted:
        block //= 2
    return block


def forward_tile(dim: int, dtype: torch.dtype) -> Tile:
    """Forward kernel: one accumulator spans all output channels up to 512 (fp32: 256, or it spills), so that V is computed once; wider outputs take
    several programs, each with V of its own. V goes in pieces of BLOCK_E, narrower where the output weight's tile beside it is tall.
    """
    edge = _gemm_edge(dtype)
    block_o = power(dim, 16, 256 if dtype is torch.float32 else 512)
    block_e = power(dim, 16, edge if block_o < 512 else edge // 2)
    return Tile({"BLOCK_O": block_o, "BLOCK_E": block_e, "BLOCK_K": power(dim, 16, edge)}, 4 if block_o <= 128 else 8, registers=255)


def value_tile(dim: int, patches: int, dtype: torch.dtype) -> Tile:
    """The backward's value kernel: two accumulators and four operands at a time, so half the depth of a single GEMM."""
    edge = _gemm_edge(dtype)
    blocks = {"BLOCK_N": power(patches, 16, edge), "BLOCK_E": power(dim, 16, edge), "BLOCK_K": power(dim, 16, 32)}
    return Tile(blocks, 4, registers=255)


def input_tile(dim: int, dtype: torch.dtype) -> Tile:
    """The backward's input kernel: a plain GEMM over d, whose epilogue holds as much again as its accumulator, so twice the warps."""
    edge = power(dim, 16, _gemm_edge(dtype))
    return Tile({"BLOCK_O": edge, "BLOCK_K": edge}, _gemm_edge(dtype) // 8, registers=128)


def weight_tile(dim: int, tokens: int, dtype: torch.dtype) -> Tile:
    """The backward's weight kernel, a GEMM over tokens."""
    edge = power(dim, 16, _gemm_edge(dtype))
    return Tile({"BLOCK_O": edge, "BLOCK_I": edge, "BLOCK_T": power(tokens, 16, _gemm_edge(dtype))}, 4, registers=168)


# --- launches ----------------------------------------------------------------------------------------------------------------------


@overload
def _packed(parameter: Tensor) -> Tensor: ...
@overload
def _packed(parameter: None) -> None: ...
def _packed(parameter: Tensor | None) -> Tensor | None:
    """A weight [rows, d] or [rows, d, 1, 1] as [rows, d], a bias [rows] as it is; contiguous. No copy where it is contiguous already."""
    return None if parameter is None else parameter.flatten(1).contiguous() if parameter.dim() > 1 else parameter.contiguous()


def _strides(t: Tensor) -> tuple[tuple[int, int, int, int], bool]:
    """Strides of a map, and whether pixel t of a channel simply lies at t * stride_w."""
    b, c, h, w = t.stride()
    height, width = t.shape[2:]
    if width == 1:
        return (b, c, h, h), True
    return (b, c, h, w), height == 1 or h == width * w


class _Map(NamedTuple):
    """What the kernels need to know of a map and its patches."""

    batch: int
    dim: int
    width: int
    tokens: int
    groups: int
    patches: int
    patch_h: int
    patch_w: int
    one_row: bool
    wanted: int

    @staticmethod
    def of(x: Tensor, patch_h: int, patch_w: int) -> _Map:
        batch, dim, height, width = x.shape
        groups, tokens = patch_h * patch_w, height * width
        return _Map(batch, dim, width, tokens, groups, tokens // groups, patch_h, patch_w, height == patch_h, shared.processors(x.device))

    def splits(self, block_n: int) -> tuple[int, int]:
        """(splits, tokens per split) of each group for the kernels that reduce over it."""
        splits, blocks = shared.splits(self.batch * self.groups, shared.cdiv(self.patches, block_n), self.wanted, least=4)
        return splits, blocks * block_n


def _group_linear(
    m: _Map,
    pooled: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mass: Tensor | None,
    *,
    transposed: bool = False,
    parts: tuple[Any, ...] | None = None,
) -> Tensor:
    """[B, P, d] -> [B, P, d]: ``pooled weight^T + mass bias``.

    With ``parts`` (stats, the pool kernel's four partial results, splits) the splits are joined first, into ``pooled``, ``mass`` and ``stats``.
    """
    out = torch.empty_like(pooled)
    rows = m.batch * m.groups
    tile = context_tile(m.dim)
    stats, *partial, splits = parts or (None,) * 5 + (0,)
    shared.launch(
        separable_self_attention_context_kernel,
        shared.cdiv(rows, tile.blocks["BLOCK_G"]) * shared.cdiv(m.dim, tile.blocks["BLOCK_O"]),
        *(pooled, weight, bias, mass, out, stats, *partial, rows, m.groups, splits),
        *((1, m.dim) if transposed else (m.dim, 1)),
        D=m.dim,
        MERGE=parts is not None,
        **tile.options,
    )
    return out


def separable_self_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    score_scale: Tensor | None,
    patch_h: int,
    patch_w: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forward of ``vitkernels::separable_self_attention``; arguments and results as its schema in op.py says."""
    batch, dim, height, width = x.shape
    y = torch.empty_like(x)
    logits = x.new_empty((batch, height, width), dtype=torch.float32)
    stats = x.new_empty((batch, patch_h * patch_w, 2), dtype=torch.float32)
    pooled = x.new_empty((batch, patch_h * patch_w, dim), dtype=torch.float32)
    if x.numel() == 0:
        return y, logits, stats.zero_(), pooled.zero_()
    m = _Map.of(x, patch_h, patch_w)
    qkv_weight, out_weight = _packed(qkv_weight), _packed(out_weight)
    qkv_bias, out_bias = _packed(qkv_bias), _packed(out_bias)
    (x_strides, x_flat), (y_strides, y_flat) = _strides(x), _strides(y)
    wide = shared.reaches_64_bit(x, y)

    with shared.on(x):
        tile = reduction_tile(dim)
        splits, length = m.splits(tile.blocks["BLOCK_N"])
        parts = x.new_empty((2 if score_scale is None else 3, batch, splits, m.groups), dtype=torch.float32)
        part_max, part_sum, part_mass = (*parts, None)[:3]
        part_pooled = x.new_empty((batch, splits, m.groups, dim), dtype=torch.float32)
        shared.launch(
            separable_self_attention_fwd_pool_kernel,
            batch * splits * m.groups,
            *(x, qkv_weight, qkv_bias, score_scale, logits, part_max, part_sum, part_mass, part_pooled, *x_strides),
            *(width, m.tokens, m.groups, m.patches, patch_h, patch_w, splits, length),
            D=dim,
            FLAT=x_flat,
            ONE_ROW=m.one_row,
            WIDE=wide,
            **tile.options,
        )
        mass = None if score_scale is None else stats.new_empty((batch, m.groups))
        k_bias = None if qkv_bias is None else qkv_bias[1 : 1 + dim]
        k_weight = qkv_weight[1 : 1 + dim]
        context = _group_linear(m, pooled, k_weight, k_bias, mass, parts=(stats, part_max, part_sum, part_mass, part_pooled, splits))

        tile = forward_tile(dim, x.dtype)
        output_blocks = shared.cdiv(dim, tile.blocks["BLOCK_O"])
        block_t = _token_tile(m.tokens, batch * output_blocks, x.dtype, m.wanted)
        shared.launch(
            separable_self_attention_fwd_kernel,
            batch * shared.cdiv(m.tokens, block_t) * output_blocks,
            *(x, qkv_weight, qkv_bias, context, out_weight, out_bias, y, *x_strides, *y_strides),
            *(width, m.tokens, m.groups, patch_h, patch_w),
            D=dim,
            BLOCK_T=block_t,
            FLAT_X=x_flat,
            FLAT_Y=y_flat,
            WIDE=wide,
            PRECISION="ieee",
            INTERPRET=shared.INTERPRET,
            **tile.options,
        )
    return y, logits, stats, pooled


def _mass(m: _Map, score_scale: Tensor, logits: Tensor, stats: Tensor) -> Tensor:
    """[B, P]: sum of s' over each group. Only dropout needs it, so plain PyTorch does: three passes over one channel."""
    split = (m.batch, m.tokens // m.width // m.patch_h, m.patch_h, m.width // m.patch_w, m.patch_w)
    highest, total = (t.reshape(m.batch, 1, m.patch_h, 1, m.patch_w) for t in stats.unbind(-1))
    scores = torch.exp2(logits.view(split) * LOG2E.value - highest) / total
    return (scores * score_scale.view(split)).sum((1, 3)).view(m.batch, m.groups)


def _linear_gradients(grad_out: Tensor, inputs: Tensor, wanted: int, weight: Tensor, bias: Tensor | None) -> None:
    """Gradients of a linear layer over maps [B, d, H, W], written to ``weight`` [d, d] and ``bias`` [d]."""
    batch, dim, height, width = inputs.shape
    (g_strides, g_flat), (x_strides, x_flat) = _strides(grad_out), _strides(inputs)
    tile = weight_tile(dim, height * width, inputs.dtype)
    tiles = batch * shared.cdiv(height * width, tile.blocks["BLOCK_T"])
    blocks = shared.cdiv(dim, tile.blocks["BLOCK_O"]) ** 2
    splits, split_tiles = shared.splits(blocks, tiles, 2 * wanted, least=4)
    part_weight = inputs.new_empty((splits, dim, dim), dtype=torch.float32)
    part_bias = inputs.new_empty((splits, dim), dtype=torch.float32)
    shared.launch(
        separable_self_attention_bwd_weight_kernel,
        blocks * splits,
        *(grad_out, inputs, part_weight, part_bias, *g_strides, *x_strides),
        *(width, height * width, tiles, split_tiles),
        D=dim,
        FLAT_G=g_flat,
        FLAT_X=x_flat,
        WIDE=shared.reaches_64_bit(grad_out, inputs),
        PRECISION="ieee",
        INTERPRET=shared.INTERPRET,
        **tile.options,
    )
    shared.sum_parts(part_weight, weight)
    if bias is not None:
        shared.sum_parts(part_bias, bias)


def separable_self_attention_backward(
    grad_y: Tensor,
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    score_scale: Tensor | None,
    logits: Tensor,
    stats: Tensor,
    pooled: Tensor,
    patch_h: int,
    patch_w: int,
    need_x: bool,
    need_qkv: bool,
    need_out: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Backward of ``vitkernels::separable_self_attention``; arguments and results as its schema in op.py says."""
    batch, dim, height, width = x.shape
    grad_x = torch.empty_like(x) if need_x else x.new_empty(0)
    grad_qkv, grad_qkv_bias = (x.new_empty(n if need_qkv else 0) for n in (qkv_weight.shape, 1 + 2 * dim))
    grad_out, grad_out_bias = (x.new_empty(n if need_out else 0) for n in (out_weight.shape, dim))
    grads = (grad_x, grad_qkv, grad_qkv_bias, grad_out, grad_out_bias)
    if x.numel() == 0:
        for grad in grads:
            grad.zero_()
        return grads
    if not (need_x or need_qkv or need_out):
        return grads
    m = _Map.of(x, patch_h, patch_w)
    qkv_weight, out_weight, qkv_bias = _packed(qkv_weight), _packed(out_weight), _packed(qkv_bias)
    k_weight = qkv_weight[1 : 1 + dim]
    k_bias = None if qkv_bias is None else qkv_bias[1 : 1 + dim]
    (x_strides, x_flat), (g_strides, g_flat) = _strides(x), _strides(grad_y)
    wide = shared.reaches_64_bit(x, grad_y, grad_x if need_x else x)
    rows = batch * m.groups

    def scratch() -> Tensor:
        return x.new_empty((batch, height, width, dim))

    with shared.on(x):
        mass = None if score_scale is None else _mass(m, score_scale, logits, stats)
        context = _group_linear(m, pooled, k_weight, k_bias, mass)

        tile = value_tile(dim, m.patches, x.dtype)
        tiles = shared.cdiv(m.patches, tile.blocks["BLOCK_N"])
        u = scratch() if need_out else None
        grad_v = scratch() if need_x or need_qkv else None
        part_context = None if grad_v is None else x.new_empty((tiles, batch, m.groups, dim), dtype=torch.float32)
        shared.launch(
            separable_self_attention_bwd_value_kernel,
            rows * tiles * shared.cdiv(dim, tile.blocks["BLOCK_E"]),
            *(x, grad_y, qkv_weight, qkv_bias, context, out_weight, u, grad_v, part_context, *x_strides, *g_strides),
            *(width, m.tokens, m.groups, m.patches, patch_h, patch_w, batch),
            D=dim,
            FLAT_X=x_flat,
            FLAT_G=g_flat,
            ONE_ROW=m.one_row,
            WIDE=wide,
            PRECISION="ieee",
            INTERPRET=shared.INTERPRET,
            **tile.options,
        )
        if u is not None:
            _linear_gradients(grad_y, u.permute(0, 3, 1, 2), m.wanted, grad_out, grad_out_bias)
        if grad_v is None or part_context is None:
            return grads

        grad_context = part_context[0] if tiles == 1 else shared.sum_parts(part_context, torch.empty_like(pooled))
        grad_pooled = _group_linear(m, grad_context, k_weight, None, None, transposed=True)
        tile = reduction_tile(dim)
        splits, length = m.splits(tile.blocks["BLOCK_N"])
        part_weight = x.new_empty((batch * splits * m.groups, dim), dtype=torch.float32)
        grad_logits = torch.empty_like(logits)
        shared.launch(
            separable_self_attention_bwd_query_kernel,
            rows * splits,
            *(x, score_scale, logits, stats, mass, pooled, k_bias, grad_context, grad_pooled, grad_logits, part_weight, *x_strides),
            *(width, m.tokens, m.groups, m.patches, patch_h, patch_w, splits, length),
            D=dim,
            FLAT=x_flat,
            ONE_ROW=m.one_row,
            WIDE=wide,
            **tile.options,
        )
        if need_qkv:
            w_q, w_k, w_v = grad_qkv.view(-1, dim).split([1, dim, dim])
            b_q, b_k, b_v = grad_qkv_bias.split([1, dim, dim])
            shared.sum_parts(part_weight, w_q)
            b_q.zero_()
            _linear_gradients(_as_map(grad_context), _as_map(pooled), m.wanted, w_k, b_k if mass is None else None)
            if mass is not None:
                b_k.copy_((grad_context * mass.unsqueeze(-1)).sum((0, 1)))
            _linear_gradients(grad_v.permute(0, 3, 1, 2), x, m.wanted, w_v, b_v)
        if need_x:
            (o_strides, o_flat), tile = _strides(grad_x), input_tile(dim, x.dtype)
            blocks = shared.cdiv(dim, tile.blocks["BLOCK_O"])
            block_t = _token_tile(m.tokens, batch * blocks, x.dtype, m.wanted)
            shared.launch(
                separable_self_attention_bwd_input_kernel,
                batch * shared.cdiv(m.tokens, block_t) * blocks,
                *(grad_v, qkv_weight, score_scale, logits, stats, grad_pooled, grad_logits, grad_x, *o_strides),
                *(width, m.tokens, m.groups, patch_h, patch_w),
                D=dim,
                BLOCK_T=block_t,
                FLAT=o_flat,
                WIDE=wide,
                PRECISION="ieee",
                INTERPRET=shared.INTERPRET,
                **tile.options,
            )
    return grads


def _as_map(rows: Tensor) -> Tensor:
    """[B, P, d] contiguous as the map [1, d, B * P, 1]."""
    return rows.view(1, -1, rows.shape[-1]).permute(0, 2, 1).unsqueeze(-1)


def _core_tile(dim: int, patches: int, rows: int, wanted: int) -> Tile:
    """Channels a program takes: 16, fewer while the GPU would not be filled; 2048 values in all."""
    block_c = power(dim, 1, 16)
    while block_c > 4 and shared.cdiv(dim, block_c) * rows < wanted:
        block_c //= 2
    return Tile({"BLOCK_C": block_c, "BLOCK_N": power(patches, 16, 2048 // block_c)}, 4)


def separable_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Forward of ``vitkernels::separable_attention``; arguments and results as its schema in op.py says."""
    batch, dim, groups, patches = k.shape
    out = v.new_empty((batch, dim, groups, patches))
    scores = v.new_empty((batch, groups, patches), dtype=torch.float32)
    context = v.new_empty((batch, groups, dim), dtype=torch.float32)
    if k.numel() == 0:
        return out, torch.softmax(q[:, 0].float(), dim=-1, out=scores) if scores.numel() else scores, context.zero_()
    with shared.on(k):
        tile = _core_tile(dim, patches, batch * groups, shared.processors(k.device))
        shared.launch(
            separable_attention_fwd_kernel,
            batch * groups * shared.cdiv(dim, tile.blocks["BLOCK_C"]),
            *(q, k, v, out, scores, context),
            *(q.stride(0), q.stride(2), q.stride(3), *k.stride(), *v.stride()),
            *(groups, patches),
            D=dim,
            WIDE=shared.reaches_64_bit(q, k, v),
            INTERPRET=shared.INTERPRET,
            **tile.options,
        )
    return out, scores, context


def separable_attention_backward(
    grad_out: Tensor, k: Tensor, v: Tensor, scores: Tensor, context: Tensor, need_q: bool, need_k: bool, need_v: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of ``vitkernels::separable_attention``; arguments and results as its schema in op.py says."""
    batch, dim, groups, patches = k.shape
    grad_q = k.new_empty((batch, 1, groups, patches) if need_q else 0)
    grad_k, grad_v = (k.new_empty(k.shape if needed else 0) for needed in (need_k, need_v))
    if k.numel() == 0:
        return grad_q.zero_(), grad_k, grad_v
    rows = batch * groups
    with shared.on(k):
        tile = _core_tile(dim, patches, rows, shared.processors(k.device))
        blocks = shared.cdiv(dim, tile.blocks["BLOCK_C"])
        part_scores = k.new_empty((blocks, batch, groups, patches), dtype=torch.float32) if need_q else None
        if need_q or need_k or need_v:
            shared.launch(
                separable_attention_bwd_kernel,
                rows * blocks,
                *(grad_out, k, v, scores, context, grad_k if need_k else None, grad_v if need_v else None, part_scores),
                *(*grad_out.stride(), *k.stride(), *v.stride()),
                *(groups, patches, batch),
                D=dim,
                WIDE=shared.reaches_64_bit(grad_out, k, v),
                INTERPRET=shared.INTERPRET,
                **tile.options,
            )
        if need_q:
            block_n = tile.blocks["BLOCK_N"]
            shared.launch(
                separable_attention_bwd_query_kernel,
                rows * shared.cdiv(patches, block_n),
                *(scores, part_scores, grad_q, rows, patches, blocks),
                BLOCK_N=block_n,
                INTERPRET=shared.INTERPRET,
                num_warps=4,
            )
    return grad_q, grad_k, grad_v
