"""Cascaded group attention (EfficientViT, arXiv 2305.07027, section 3.2) in Triton: kernels and their launches.

One program per window walks the heads in cascade; the partition into windows, their zero padding at the bottom and the right, and the way back are
addresses. Triton can neither index a tile in registers nor address shared memory, so what one step of the walk hands to the next at another
position (q to its depthwise convolution, a head's output to the next head) goes through scratch in global memory, which the program itself wrote
and so finds in its cache; ``tl.debug_barrier`` stands between the writing and the reading. Each step works on tiles of at most 64 tokens, so
registers are bounded whatever the window; nothing is hoisted out of the walk's loops (disable_licm), where it would hold registers through every
step.

Forward: cascade (all heads of a window, up to the concatenated outputs), then projection, pixel by pixel in the order of the map. Backward: cascade
again, this time keeping q, k, v and the softmax's statistics; the projection transposed; then one kernel that walks each window's heads backwards,
its programs looping over windows so that the gradient of the scores is summed per program; and split-K weight gradients. No atomics: partial sums
are stored and added in a fixed order, so results are equal bit for bit from run to run.

Sizes in comments: T windows of N = w * w tokens; a head reads S = C / heads channels and has R = 2 * key_dim + d rows of q, k and v. A *row* is one
of the T * N tokens, window after window, padding included; a *pixel* is one of the map.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitkernels.ops import _triton as shared
from vitkernels.ops._triton import LOG2E, Tile, add_product, cast, dot, power, relu, wide

# --- pieces of kernels -------------------------------------------------------------------------------------------------------------


@triton.jit
def _split_index(i_tile, length, BLOCK: tl.constexpr):
    """(index, index // length, index % length) of the BLOCK indices from ``i_tile * BLOCK`` on: only the first is divided in 64 bit."""
    first = i_tile.to(tl.int64) * BLOCK
    o_local = (first % length).to(tl.int32) + tl.arange(0, BLOCK)
    return first + tl.arange(0, BLOCK), (first // length).to(tl.int32) + o_local // length, o_local % length


@triton.jit
def _place(i_t, o_n, height, width, columns, windows, WINDOW: tl.constexpr):
    """(image, row, column) of token ``o_n`` of window ``i_t``, and whether that is a pixel of the map and not padding.

    ``columns`` windows lie beside each other, ``windows`` make an image.
    """
    i_w = i_t % windows
    o_y = (i_w // columns) * WINDOW + o_n // WINDOW
    o_x = (i_w % columns) * WINDOW + o_n % WINDOW
    return (i_t // windows).to(tl.int64), o_y, o_x, (o_n < WINDOW * WINDOW) & (o_y < height) & (o_x < width)


@triton.jit
def _load_map(pixel, o_c, m_pixel, m_c, stride_c, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr):
    """[pixels, channels] of a map, read along whichever of the two lies side by side in memory. ``pixel``: pointers to channel 0."""
    o_c = wide(o_c, WIDE)
    if CHANNELS_LAST:
        return tl.load(pixel[:, None] + o_c[None, :] * stride_c, mask=m_pixel[:, None] & m_c[None, :], other=0.0)
    return tl.trans(tl.load(pixel[None, :] + o_c[:, None] * stride_c, mask=m_pixel[None, :] & m_c[:, None], other=0.0))


@triton.jit
def _store_map(pixel, o_c, value, m_pixel, m_c, stride_c, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr):
    """The opposite of :func:`_load_map`."""
    o_c = wide(o_c, WIDE)
    if CHANNELS_LAST:
        tl.store(pixel[:, None] + o_c[None, :] * stride_c, value, mask=m_pixel[:, None] & m_c[None, :])
    else:
        tl.store(pixel[None, :] + o_c[:, None] * stride_c, tl.trans(value), mask=m_pixel[None, :] & m_c[:, None])


@triton.jit
def _load_rows(source, o_n, o_c, stride, LENGTH: tl.constexpr, WIDTH: tl.constexpr):
    """Rows ``o_n`` of a scratch, columns ``o_c`` of WIDTH; 0 beyond either."""
    return tl.load(source + o_n[:, None] * stride + o_c[None, :], mask=(o_n < LENGTH)[:, None] & (o_c < WIDTH)[None, :], other=0.0)


@triton.jit
def _filter_of(i_h, KERNELS: tl.constexpr, HEADS: tl.constexpr, KEY_DIM: tl.constexpr):
    """Side of head ``i_h``'s depthwise kernel, and where its weights begin."""
    side = KERNELS[0]
    start = 0
    for h in tl.static_range(1, HEADS):
        start = tl.where(i_h >= h, start + KEY_DIM * KERNELS[h - 1] * KERNELS[h - 1], start)
        side = tl.where(i_h == h, KERNELS[h], side)
    return side, start


@triton.jit
def _depthwise(source, stride, o_n, o_k, weight, side, SIGN: tl.constexpr, WINDOW: tl.constexpr, KEY_DIM: tl.constexpr):
    """[tokens, channels]: the depthwise convolution of a window in scratch, zero-padded inside the window. SIGN -1: transposed."""
    m_k = o_k < KEY_DIM
    o_y = o_n // WINDOW
    o_x = o_n % WINDOW
    b_from = source + o_n[:, None] * stride + o_k[None, :]
    w_tap = weight + o_k * side * side
    b_out = tl.zeros([o_n.shape[0], o_k.shape[0]], dtype=tl.float32)
    for tap_y in range(side):
        dy = SIGN * (tap_y - side // 2)
        m_y = (o_n < WINDOW * WINDOW) & (o_y >= -dy) & (o_y < WINDOW - dy)
        for tap_x in range(side):
            dx = SIGN * (tap_x - side // 2)
            m_in = m_y & (o_x >= -dx) & (o_x < WINDOW - dx)
            b_in = tl.load(b_from + (dy * WINDOW + dx) * stride, mask=m_in[:, None] & m_k[None, :], other=0.0).to(tl.float32)
            b_out += b_in * tl.load(w_tap, mask=m_k, other=0.0).to(tl.float32)[None, :]
            w_tap += 1
    return b_out


@triton.jit
def _scores(b_q, b_k, table, o_m, o_n, scale, WINDOW: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """[queries, keys]: (q k^T * scale + bias) * log2(e), -inf for keys beyond the window. The bias is read from the head's table."""
    b_s = dot(b_q, tl.trans(b_k), tl.zeros([o_m.shape[0], o_n.shape[0]], dtype=tl.float32), PRECISION, INTERPRET)
    o_dy = tl.abs((o_m // WINDOW)[:, None] - (o_n // WINDOW)[None, :])
    o_dx = tl.abs((o_m % WINDOW)[:, None] - (o_n % WINDOW)[None, :])
    m_n = (o_n < WINDOW * WINDOW)[None, :]
    b_bias = tl.load(table + o_dy * WINDOW + o_dx, mask=m_n & (o_m < WINDOW * WINDOW)[:, None], other=0.0).to(tl.float32)
    return tl.where(m_n, (b_s * scale + b_bias) * LOG2E, float("-inf"))


@triton.jit
def _softmax(b_q, b_k, table, stats, stride, o_m, o_n, scale, WINDOW: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """[queries, keys]: the softmax of :func:`_scores` again, by the maximum and the sum the forward found; finite for queries beyond the window.

    The maximum and the sum, not the logarithm of both in one: its rounding would shift every score of a query, and a sum of probabilities that is
    not one shows in the gradients of q and k. For the same reason the mean of the gradients is divided by that sum.
    """
    m_m = o_m < WINDOW * WINDOW
    b_max = tl.load(stats + o_m * stride, mask=m_m, other=0.0)
    b_sum = tl.load(stats + o_m * stride + 1, mask=m_m, other=1.0)
    return tl.exp2(_scores(b_q, b_k, table, o_m, o_n, scale, WINDOW, PRECISION, INTERPRET) - b_max[:, None]) / b_sum[:, None]


@triton.jit
def _products(
    a,
    stride_a,
    o_m,
    b,
    stride_b,
    o_n,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N]: the products of rows ``o_m`` of ``a`` with rows ``o_n`` of ``b``, both WIDTH long."""
    b_out = tl.zeros([o_m.shape[0], o_n.shape[0]], dtype=tl.float32)
    for d in range(0, WIDTH, BLOCK):
        o_d = d + tl.arange(0, BLOCK)
        b_b = _load_rows(b, o_n, o_d, stride_b, LENGTH, WIDTH)
        b_out = dot(_load_rows(a, o_m, o_d, stride_a, LENGTH, WIDTH), tl.trans(b_b), b_out, PRECISION, INTERPRET)
    return b_out


# --- forward -----------------------------------------------------------------------------------------------------------------------


@triton.jit
def cascaded_group_attention_fwd_kernel(
    x,  # [B, C, H, W], strides below
    qkv_weight,  # [heads, R, S], strides below
    qkv_bias,  # [heads, R] or None
    dw_weight,  # flat, head after head
    dw_bias,  # [heads, key_dim] or None
    attention_bias,  # [heads, N]
    qkv,  # [T * N, slots, R], written: q before its depthwise convolution, k and v
    conv_q,  # [T * N, heads, key_dim] or None, written: q after it
    stats,  # [T * N, heads, 2] or None, written: largest score, times log2(e), and sum of exponentials
    cat,  # [T * N, heads * d], written: the heads' outputs before the ReLU
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_wh,
    stride_wr,
    stride_ws,
    height,
    width,
    columns,
    windows,
    tokens,
    scale,
    HEADS: tl.constexpr,
    KERNELS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """All heads of one window in cascade. With ``conv_q`` every head keeps what it computed (slots = heads); without, each writes over the last."""
    N: tl.constexpr = WINDOW * WINDOW
    R: tl.constexpr = 2 * KEY_DIM + VALUE_DIM
    SLOTS: tl.constexpr = 1 if conv_q is None else HEADS
    dtype = cat.dtype.element_ty
    i_t = tl.program_id(0)
    row = i_t.to(tl.int64) * N
    qkv += row * SLOTS * R
    cat += row * HEADS * VALUE_DIM
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < KEY_DIM

    for i_h in tl.range(HEADS, disable_licm=True):
        for t in tl.range(0, tokens, BLOCK_T, disable_licm=True):
            o_n = t + tl.arange(0, BLOCK_T)
            i_b, o_y, o_x, m_pixel = _place(i_t, o_n, height, width, columns, windows, WINDOW)
            x_pixel = x + i_b * stride_xb + wide(o_y, WIDE) * stride_xh + wide(o_x, WIDE) * stride_xw  # [BLOCK_T]
            for r in range(0, R, BLOCK_R):
                o_r = r + tl.arange(0, BLOCK_R)
                m_r = o_r < R
                b_qkv = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
                for s in range(0, SPLIT, BLOCK_S):
                    o_s = s + tl.arange(0, BLOCK_S)
                    m_s = o_s < SPLIT
                    b_f = _load_map(x_pixel, i_h * SPLIT + o_s, m_pixel, m_s, stride_xc, CHANNELS_LAST, WIDE)  # [BLOCK_T, BLOCK_S]
                    if HEADS > 1:
                        o_last = o_n[:, None] * (HEADS * VALUE_DIM) + (i_h - 1) * VALUE_DIM + o_s[None, :]
                        b_last = tl.load(cat + o_last, mask=(o_n < N)[:, None] & m_s[None, :] & (i_h > 0), other=0.0)
                        b_f = cast(b_f.to(tl.float32) + b_last.to(tl.float32), dtype, INTERPRET)
                    o_w = i_h * stride_wh + o_s[:, None] * stride_ws + o_r[None, :] * stride_wr
                    b_w = tl.load(qkv_weight + o_w, mask=m_s[:, None] & m_r[None, :], other=0.0)  # [BLOCK_S, BLOCK_R]
                    b_qkv = dot(b_f, b_w, b_qkv, PRECISION, INTERPRET)
                if qkv_bias is not None:
                    b_qkv += tl.load(qkv_bias + i_h * R + o_r, mask=m_r, other=0.0).to(tl.float32)[None, :]
                o_out = (o_n * SLOTS + i_h % SLOTS)[:, None] * R + o_r[None, :]
                tl.store(qkv + o_out, cast(b_qkv, dtype, INTERPRET), mask=(o_n < N)[:, None] & m_r[None, :])
        tl.debug_barrier()

        qkv_head = qkv + (i_h % SLOTS) * R
        side, start = _filter_of(i_h, KERNELS, HEADS, KEY_DIM)
        for t in tl.range(0, tokens, BLOCK_T, disable_licm=True):
            o_m = t + tl.arange(0, BLOCK_T)
            m_m = o_m < N
            b_q = _depthwise(qkv_head, SLOTS * R, o_m, o_k, dw_weight + start, side, 1, WINDOW, KEY_DIM)  # [BLOCK_T, BLOCK_K]
            if dw_bias is not None:
                b_q += tl.load(dw_bias + i_h * KEY_DIM + o_k, mask=m_k, other=0.0).to(tl.float32)[None, :]
            b_q = cast(b_q, dtype, INTERPRET)
            if conv_q is not None:
                q_out = conv_q + (row * HEADS + i_h) * KEY_DIM
                tl.store(q_out + o_m[:, None] * (HEADS * KEY_DIM) + o_k[None, :], b_q, mask=m_m[:, None] & m_k[None, :])
            for d in range(0, VALUE_DIM, BLOCK_D):
                o_d = d + tl.arange(0, BLOCK_D)
                b_max = tl.full([BLOCK_T], float("-inf"), dtype=tl.float32)
                b_sum = tl.zeros([BLOCK_T], dtype=tl.float32)
                b_out = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
                for n in tl.range(0, tokens, BLOCK_T, disable_licm=True):
                    o_n = n + tl.arange(0, BLOCK_T)
                    b_k = _load_rows(qkv_head + KEY_DIM, o_n, o_k, SLOTS * R, N, KEY_DIM)  # [BLOCK_T, BLOCK_K]
                    b_s = _scores(b_q, b_k, attention_bias + i_h * N, o_m, o_n, scale, WINDOW, PRECISION, INTERPRET)  # [BLOCK_T, BLOCK_T]
                    b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
                    b_rescale = tl.exp2(b_max - b_new)
                    b_p = tl.exp2(b_s - b_new[:, None])
                    b_sum = b_sum * b_rescale + tl.sum(b_p, axis=1)
                    b_v = _load_rows(qkv_head + 2 * KEY_DIM, o_n, o_d, SLOTS * R, N, VALUE_DIM)  # [BLOCK_T, BLOCK_D]
                    b_out = dot(cast(b_p, dtype, INTERPRET), b_v, b_out * b_rescale[:, None], PRECISION, INTERPRET)
                    b_max = b_new
                b_out = cast(b_out / b_sum[:, None], dtype, INTERPRET)
                o_out = o_m[:, None] * (HEADS * VALUE_DIM) + i_h * VALUE_DIM + o_d[None, :]
                tl.store(cat + o_out, b_out, mask=m_m[:, None] & (o_d < VALUE_DIM)[None, :])
                if stats is not None:
                    stats_out = stats + (row * HEADS + i_h) * 2 + o_m * (HEADS * 2)
                    tl.store(stats_out, b_max, mask=m_m & (d == 0))
                    tl.store(stats_out + 1, b_sum, mask=m_m & (d == 0))
        tl.debug_barrier()


@triton.jit
def cascaded_group_attention_fwd_project_kernel(
    cat,  # [T * N, E]
    proj_weight,  # [C, E], strides below
    proj_bias,  # [C] or None
    y,  # [B, C, H, W], written
    stride_wo,
    stride_wi,
    stride_yb,
    stride_yc,
    stride_yh,
    stride_yw,
    pixels,
    height,
    width,
    columns,
    windows,
    channels,
    E: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """ReLU, projection and the way back to the map, for a tile of pixels in the order of the map, over the borders of images."""
    i_o = tl.program_id(0) % tl.cdiv(channels, BLOCK_O)
    i_tile = tl.program_id(0) // tl.cdiv(channels, BLOCK_O)
    dtype = y.dtype.element_ty
    o_p, o_b, o_local = _split_index(i_tile, height * width, BLOCK_T)
    m_p = o_p < pixels
    o_y = o_local // width
    o_x = o_local % width
    o_t = o_b * windows + (o_y // WINDOW) * columns + o_x // WINDOW
    o_row = o_t.to(tl.int64) * (WINDOW * WINDOW) + (o_y % WINDOW) * WINDOW + o_x % WINDOW
    o_o = i_o * BLOCK_O + tl.arange(0, BLOCK_O)
    m_o = o_o < channels

    b_y = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
    for e in range(0, E, BLOCK_I):
        o_e = e + tl.arange(0, BLOCK_I)
        m_e = o_e < E
        b_cat = tl.load(cat + o_row[:, None] * E + o_e[None, :], mask=m_p[:, None] & m_e[None, :], other=0.0)  # [BLOCK_T, BLOCK_I]
        b_cat = cast(relu(b_cat.to(tl.float32)), dtype, INTERPRET)
        b_w = tl.load(
            proj_weight + o_o[None, :] * stride_wo + o_e[:, None] * stride_wi, mask=m_o[None, :] & m_e[:, None], other=0.0
        )  # [BLOCK_I, BLOCK_O]
        b_y = dot(b_cat, b_w, b_y, PRECISION, INTERPRET)
    if proj_bias is not None:
        b_y += tl.load(proj_bias + o_o, mask=m_o, other=0.0).to(tl.float32)[None, :]
    y_pixel = y + o_b.to(tl.int64) * stride_yb + wide(o_y, WIDE) * stride_yh + wide(o_x, WIDE) * stride_yw
    _store_map(y_pixel, o_o, cast(b_y, dtype, INTERPRET), m_p, m_o, stride_yc, CHANNELS_LAST, WIDE)


# --- backward ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def cascaded_group_attention_bwd_project_kernel(
    grad_y,  # [B, C, H, W]
    proj_weight,  # [C, E], strides below
    cat,  # [T * N, E]
    grad_cat,  # [T * N, E], written: 0 in padding
    stride_wo,
    stride_wi,
    stride_gb,
    stride_gc,
    stride_gh,
    stride_gw,
    rows,
    height,
    width,
    columns,
    windows,
    channels,
    E: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Gradient of the concatenated outputs, through the projection and the ReLU, for a tile of rows."""
    i_e = tl.program_id(0) % tl.cdiv(E, BLOCK_I)
    o_row, o_t, o_n = _split_index(tl.program_id(0) // tl.cdiv(E, BLOCK_I), WINDOW * WINDOW, BLOCK_T)
    m_row = o_row < rows
    o_b, o_y, o_x, m_pixel = _place(o_t, o_n, height, width, columns, windows, WINDOW)
    g_pixel = grad_y + o_b * stride_gb + wide(o_y, WIDE) * stride_gh + wide(o_x, WIDE) * stride_gw
    o_e = i_e * BLOCK_I + tl.arange(0, BLOCK_I)
    m_e = o_e < E

    b_grad = tl.zeros([BLOCK_T, BLOCK_I], dtype=tl.float32)
    for c in range(0, channels, BLOCK_O):
        o_c = c + tl.arange(0, BLOCK_O)
        m_c = o_c < channels
        b_g = _load_map(g_pixel, o_c, m_pixel & m_row, m_c, stride_gc, CHANNELS_LAST, WIDE)  # [BLOCK_T, BLOCK_O]
        b_w = tl.load(
            proj_weight + o_c[:, None] * stride_wo + o_e[None, :] * stride_wi, mask=m_c[:, None] & m_e[None, :], other=0.0
        )  # [BLOCK_O, BLOCK_I]
        b_grad = dot(b_g, b_w, b_grad, PRECISION, INTERPRET)
    o_out = o_row[:, None] * E + o_e[None, :]
    m_out = m_row[:, None] & m_e[None, :]
    b_cat = tl.load(cat + o_out, mask=m_out, other=0.0).to(tl.float32)
    tl.store(grad_cat + o_out, cast(tl.where(b_cat <= 0, 0.0, b_grad), grad_cat.dtype.element_ty, INTERPRET), mask=m_out)


@triton.jit
def cascaded_group_attention_bwd_kernel(
    qkv_weight,  # [heads, R, S], strides below
    dw_weight,  # flat, head after head
    attention_bias,  # [heads, N]
    qkv,  # [T * N, heads, R]
    conv_q,  # [T * N, heads, key_dim]
    stats,  # [T * N, heads, 2]
    cat,  # [T * N, heads * d]
    grad_cat,  # [T * N, heads * d], read and, through the cascade, added to
    grad_qkv,  # [T * N, heads, R], written: of q before its depthwise convolution, k and v
    grad_conv_q,  # [T * N, heads, key_dim] fp32, written: of q after it
    delta,  # [programs, N] fp32, scratch: per query the mean of dP by P, where the keys are more than one tile
    part_scores,  # [programs, heads, N, N] fp32 or None, written: gradient of the scores, summed over the program's windows
    grad_x,  # [B, C, H, W] or None, written
    stride_wh,
    stride_wr,
    stride_ws,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    height,
    width,
    columns,
    windows,
    tokens,
    total,
    programs,
    scale,
    HEADS: tl.constexpr,
    KERNELS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """The heads of a window, last to first; each program takes every ``programs``-th of the ``total`` windows."""
    N: tl.constexpr = WINDOW * WINDOW
    R: tl.constexpr = 2 * KEY_DIM + VALUE_DIM
    E: tl.constexpr = HEADS * VALUE_DIM
    dtype = qkv.dtype.element_ty
    i = tl.program_id(0)
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < KEY_DIM
    delta += i.to(tl.int64) * N

    for turn in tl.range(tl.cdiv(total - i, programs), disable_licm=True):
        i_t = i + turn * programs
        row = i_t.to(tl.int64) * N
        for step in tl.range(HEADS, disable_licm=True):
            i_h = HEADS - 1 - step
            qkv_head = qkv + (row * HEADS + i_h) * R
            q_head = conv_q + (row * HEADS + i_h) * KEY_DIM
            g_head = grad_cat + row * E + i_h * VALUE_DIM
            grad_head = grad_qkv + (row * HEADS + i_h) * R
            grad_q_head = grad_conv_q + (row * HEADS + i_h) * KEY_DIM
            stats_head = stats + (row * HEADS + i_h) * 2
            table = attention_bias + i_h * N
            if part_scores is not None:
                part_head = part_scores + (i.to(tl.int64) * HEADS + i_h) * (N * N)

            if N > BLOCK_T:
                for t in tl.range(0, tokens, BLOCK_T, disable_licm=True):
                    o_m = t + tl.arange(0, BLOCK_T)
                    b_q = _load_rows(q_head, o_m, o_k, HEADS * KEY_DIM, N, KEY_DIM)
                    b_delta = tl.zeros([BLOCK_T], dtype=tl.float32)
                    b_mass = tl.zeros([BLOCK_T], dtype=tl.float32)
                    for n in tl.range(0, tokens, BLOCK_T, disable_licm=True):
                        o_n = n + tl.arange(0, BLOCK_T)
                        b_k = _load_rows(qkv_head + KEY_DIM, o_n, o_k, HEADS * R, N, KEY_DIM)
                        b_p = _softmax(b_q, b_k, table, stats_head, HEADS * 2, o_m, o_n, scale, WINDOW, PRECISION, INTERPRET)
                        b_dp = _products(g_head, E, o_m, qkv_head + 2 * KEY_DIM, HEADS * R, o_n, N, VALUE_DIM, BLOCK_S, PRECISION, INTERPRET)
                        b_delta += tl.sum(b_p * b_dp, axis=1)
                        b_mass += tl.sum(b_p, axis=1)
                    tl.store(delta + o_m, b_delta / b_mass, mask=o_m < N)
                tl.debug_barrier()

            for n in tl.range(0, tokens, BLOCK_T, disable_licm=True):
                o_n = n + tl.arange(0, BLOCK_T)
                b_k = _load_rows(qkv_head + KEY_DIM, o_n, o_k, HEADS * R, N, KEY_DIM)  # [BLOCK_T, BLOCK_K]
                for d in range(0, VALUE_DIM, BLOCK_D):
                    o_d = d + tl.arange(0, BLOCK_D)
                    b_dv = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
                    for t in tl.range(0, tokens, BLOCK_T, disable_licm=True):
                        o_m = t + tl.arange(0, BLOCK_T)
                        b_q = _load_rows(q_head, o_m, o_k, HEADS * KEY_DIM, N, KEY_DIM)
                        b_p = _softmax(b_q, b_k, table, stats_head, HEADS * 2, o_m, o_n, scale, WINDOW, PRECISION, INTERPRET)
                        b_g = _load_rows(g_head, o_m, o_d, E, N, VALUE_DIM)
                        b_dv = dot(tl.trans(cast(b_p, dtype, INTERPRET)), b_g, b_dv, PRECISION, INTERPRET)
                    o_out = o_n[:, None] * (HEADS * R) + 2 * KEY_DIM + o_d[None, :]
                    tl.store(grad_head + o_out, cast(b_dv, dtype, INTERPRET), mask=(o_n < N)[:, None] & (o_d < VALUE_DIM)[None, :])

                b_dk = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.float32)
                for t in tl.range(0, tokens, BLOCK_T, disable_licm=True):
                    o_m = t + tl.arange(0, BLOCK_T)
                    b_q = _load_rows(q_head, o_m, o_k, HEADS * KEY_DIM, N, KEY_DIM)
                    b_p = _softmax(b_q, b_k, table, stats_head, HEADS * 2, o_m, o_n, scale, WINDOW, PRECISION, INTERPRET)
                    b_dp = _products(g_head, E, o_m, qkv_head + 2 * KEY_DIM, HEADS * R, o_n, N, VALUE_DIM, BLOCK_S, PRECISION, INTERPRET)
                    b_own = tl.sum(b_p * b_dp, axis=1) / tl.sum(b_p, axis=1)
                    b_delta = tl.load(delta + o_m, mask=o_m < N, other=0.0) if N > BLOCK_T else b_own
                    b_ds = b_p * (b_dp - b_delta[:, None])  # [BLOCK_T, BLOCK_T]
                    if part_scores is not None:
                        o_part = o_m[:, None] * N + o_n[None, :]
                        m_part = (o_m < N)[:, None] & (o_n < N)[None, :]
                        b_part = tl.load(part_head + o_part, mask=m_part & (turn > 0), other=0.0)
                        tl.store(part_head + o_part, b_part + b_ds, mask=m_part)
                    b_ds = cast(b_ds, dtype, INTERPRET)
                    b_dk = dot(tl.trans(b_ds), b_q, b_dk, PRECISION, INTERPRET)
                    o_q = o_m[:, None] * (HEADS * KEY_DIM) + o_k[None, :]
                    m_q = (o_m < N)[:, None] & m_k[None, :]
                    b_dq = tl.load(grad_q_head + o_q, mask=m_q & (n > 0), other=0.0)
                    b_dq += scale * dot(b_ds, b_k, tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.float32), PRECISION, INTERPRET)
                    tl.store(grad_q_head + o_q, b_dq, mask=m_q)
                o_out = o_n[:, None] * (HEADS * R) + KEY_DIM + o_k[None, :]
                tl.store(grad_head + o_out, cast(scale * b_dk, dtype, INTERPRET), mask=(o_n < N)[:, None] & m_k[None, :])
                tl.debug_barrier()

            side, start = _filter_of(i_h, KERNELS, HEADS, KEY_DIM)
            for t in tl.range(0, tokens, BLOCK_T, disable_licm=True):
                o_m = t + tl.arange(0, BLOCK_T)
                b_dq = _depthwise(grad_q_head, HEADS * KEY_DIM, o_m, o_k, dw_weight + start, side, -1, WINDOW, KEY_DIM)
                tl.store(grad_head + o_m[:, None] * (HEADS * R) + o_k[None, :], cast(b_dq, dtype, INTERPRET), mask=(o_m < N)[:, None] & m_k[None, :])
            tl.debug_barrier()

            for t in tl.range(0, tokens, BLOCK_T, disable_licm=True):
                o_n = t + tl.arange(0, BLOCK_T)
                i_b, o_y, o_x, m_pixel = _place(i_t, o_n, height, width, columns, windows, WINDOW)
                for s in range(0, SPLIT, BLOCK_S):
                    o_s = s + tl.arange(0, BLOCK_S)
                    m_s = o_s < SPLIT
                    b_df = tl.zeros([BLOCK_T, BLOCK_S], dtype=tl.float32)
                    for r in range(0, R, BLOCK_R):
                        o_r = r + tl.arange(0, BLOCK_R)
                        b_g = _load_rows(grad_head, o_n, o_r, HEADS * R, N, R)  # [BLOCK_T, BLOCK_R]
                        o_w = i_h * stride_wh + o_r[:, None] * stride_wr + o_s[None, :] * stride_ws
                        b_w = tl.load(qkv_weight + o_w, mask=(o_r < R)[:, None] & m_s[None, :], other=0.0)  # [BLOCK_R, BLOCK_S]
                        b_df = dot(b_g, b_w, b_df, PRECISION, INTERPRET)
                    if grad_x is not None:
                        x_pixel = grad_x + i_b * stride_xb + wide(o_y, WIDE) * stride_xh + wide(o_x, WIDE) * stride_xw
                        _store_map(x_pixel, i_h * SPLIT + o_s, cast(b_df, dtype, INTERPRET), m_pixel, m_s, stride_xc, CHANNELS_LAST, WIDE)
                    if HEADS > 1:
                        g_last = g_head - VALUE_DIM + o_n[:, None] * E + o_s[None, :]
                        m_last = (o_n < N)[:, None] & m_s[None, :] & (i_h > 0)
                        b_df += tl.load(g_last, mask=m_last, other=0.0).to(tl.float32)
                        tl.store(g_last, cast(b_df, dtype, INTERPRET), mask=m_last)
            tl.debug_barrier()


@triton.jit
def cascaded_group_attention_bwd_qkv_weight_kernel(
    grad_qkv,  # [T * N, heads, R]
    x,  # [B, C, H, W]
    cat,  # [T * N, heads * d]
    part_weight,  # [splits, heads, R, S] fp32, written: this split's share of grad_qkv^T f
    part_bias,  # [splits, heads, R] fp32, written: of the sum of grad_qkv over rows
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    rows,
    height,
    width,
    columns,
    windows,
    tiles,
    split_tiles,
    HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    R: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Weight and bias gradient of one head's q, k and v, over one split of the rows; the head's input is put together again."""
    i = tl.program_id(0)
    i_i = i % tl.cdiv(SPLIT, BLOCK_I)
    i_o = i // tl.cdiv(SPLIT, BLOCK_I) % tl.cdiv(R, BLOCK_O)
    i_h = i // tl.cdiv(SPLIT, BLOCK_I) // tl.cdiv(R, BLOCK_O) % HEADS
    i_s = i // tl.cdiv(SPLIT, BLOCK_I) // tl.cdiv(R, BLOCK_O) // HEADS
    o_o = i_o * BLOCK_O + tl.arange(0, BLOCK_O)
    o_i = i_i * BLOCK_I + tl.arange(0, BLOCK_I)
    m_o = o_o < R
    m_i = o_i < SPLIT

    b_weight = tl.zeros([BLOCK_O, BLOCK_I], dtype=tl.float32)
    b_bias = tl.zeros([BLOCK_O], dtype=tl.float32)
    for step in range(tl.minimum(split_tiles, tiles - i_s * split_tiles)):
        o_row, o_t, o_n = _split_index(i_s * split_tiles + step, WINDOW * WINDOW, BLOCK_T)
        m_row = o_row < rows
        o_b, o_y, o_x, m_pixel = _place(o_t, o_n, height, width, columns, windows, WINDOW)
        x_pixel = x + o_b * stride_xb + wide(o_y, WIDE) * stride_xh + wide(o_x, WIDE) * stride_xw
        b_f = _load_map(x_pixel, i_h * SPLIT + o_i, m_pixel & m_row, m_i, stride_xc, CHANNELS_LAST, WIDE)  # [BLOCK_T, BLOCK_I]
        if HEADS > 1:
            o_last = o_row[:, None] * (HEADS * VALUE_DIM) + (i_h - 1) * VALUE_DIM + o_i[None, :]
            b_last = tl.load(cat + o_last, mask=m_row[:, None] & m_i[None, :] & (i_h > 0), other=0.0)
            b_f = cast(b_f.to(tl.float32) + b_last.to(tl.float32), cat.dtype.element_ty, INTERPRET)
        o_g = (o_row * HEADS + i_h)[:, None] * R + o_o[None, :]
        b_g = tl.load(grad_qkv + o_g, mask=m_row[:, None] & m_o[None, :], other=0.0)  # [BLOCK_T, BLOCK_O]
        b_weight = add_product(tl.trans(b_g), b_f, b_weight, PRECISION, INTERPRET)
        b_bias += tl.sum(b_g.to(tl.float32), axis=0)
    o_part = (i_s.to(tl.int64) * HEADS + i_h) * R + o_o
    tl.store(part_weight + o_part[:, None] * SPLIT + o_i[None, :], b_weight, mask=m_o[:, None] & m_i[None, :])
    tl.store(part_bias + o_part, b_bias, mask=m_o & (i_i == 0))


@triton.jit
def cascaded_group_attention_bwd_proj_weight_kernel(
    grad_y,  # [B, C, H, W]
    cat,  # [T * N, E]
    part_weight,  # [splits, C, E] fp32, written: this split's share of grad_y^T relu(cat)
    part_bias,  # [splits, C] fp32, written: of the sum of grad_y over pixels
    stride_gb,
    stride_gc,
    stride_gh,
    stride_gw,
    rows,
    height,
    width,
    columns,
    windows,
    tiles,
    split_tiles,
    channels,
    E: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Weight and bias gradient of the projection over one split of the rows."""
    i = tl.program_id(0)
    i_i = i % tl.cdiv(E, BLOCK_I)
    i_o = i // tl.cdiv(E, BLOCK_I) % tl.cdiv(channels, BLOCK_O)
    i_s = i // tl.cdiv(E, BLOCK_I) // tl.cdiv(channels, BLOCK_O)
    o_o = i_o * BLOCK_O + tl.arange(0, BLOCK_O)
    o_i = i_i * BLOCK_I + tl.arange(0, BLOCK_I)
    m_o = o_o < channels
    m_i = o_i < E

    b_weight = tl.zeros([BLOCK_O, BLOCK_I], dtype=tl.float32)
    b_bias = tl.zeros([BLOCK_O], dtype=tl.float32)
    for step in range(tl.minimum(split_tiles, tiles - i_s * split_tiles)):
        o_row, o_t, o_n = _split_index(i_s * split_tiles + step, WINDOW * WINDOW, BLOCK_T)
        m_row = o_row < rows
        o_b, o_y, o_x, m_pixel = _place(o_t, o_n, height, width, columns, windows, WINDOW)
        g_pixel = grad_y + o_b * stride_gb + wide(o_y, WIDE) * stride_gh + wide(o_x, WIDE) * stride_gw
        b_g = _load_map(g_pixel, o_o, m_pixel & m_row, m_o, stride_gc, CHANNELS_LAST, WIDE)  # [BLOCK_T, BLOCK_O]
        b_cat = tl.load(cat + o_row[:, None] * E + o_i[None, :], mask=m_row[:, None] & m_i[None, :], other=0.0)  # [BLOCK_T, BLOCK_I]
        b_cat = cast(relu(b_cat.to(tl.float32)), cat.dtype.element_ty, INTERPRET)
        b_weight = add_product(tl.trans(b_g), b_cat, b_weight, PRECISION, INTERPRET)
        b_bias += tl.sum(b_g.to(tl.float32), axis=0)
    o_part = i_s.to(tl.int64) * channels + o_o
    tl.store(part_weight + o_part[:, None] * E + o_i[None, :], b_weight, mask=m_o[:, None] & m_i[None, :])
    tl.store(part_bias + o_part, b_bias, mask=m_o & (i_i == 0))


@triton.jit
def cascaded_group_attention_bwd_dw_weight_kernel(
    grad_conv_q,  # [T * N, heads, key_dim] fp32
    qkv,  # [T * N, heads, R]
    part_weight,  # [splits, all heads' weights] fp32, written
    part_bias,  # [splits, heads, key_dim] fp32, written
    rows,
    tiles,
    split_tiles,
    length,
    HEADS: tl.constexpr,
    KERNELS: tl.constexpr,
    TAPS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    R: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradient of one tap of one head's depthwise kernel, all channels, over one split of the rows; tap 0 has the bias, too."""
    i = tl.program_id(0)
    i_tap = i % TAPS
    i_h = i // TAPS % HEADS
    i_s = i // TAPS // HEADS
    side, start = _filter_of(i_h, KERNELS, HEADS, KEY_DIM)
    if i_tap < side * side:
        dy = i_tap // side - side // 2
        dx = i_tap % side - side // 2
        o_k = tl.arange(0, BLOCK_K)
        m_k = o_k < KEY_DIM
        b_weight = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.float32)
        b_bias = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.float32)
        for step in range(tl.minimum(split_tiles, tiles - i_s * split_tiles)):
            o_row, _, o_n = _split_index(i_s * split_tiles + step, WINDOW * WINDOW, BLOCK_T)
            m_row = o_row < rows
            o_y = o_n // WINDOW + dy
            o_x = o_n % WINDOW + dx
            m_in = m_row & (o_y >= 0) & (o_y < WINDOW) & (o_x >= 0) & (o_x < WINDOW)
            o_in = ((o_row + dy * WINDOW + dx) * HEADS + i_h)[:, None] * R + o_k[None, :]
            b_g = tl.load(grad_conv_q + (o_row * HEADS + i_h)[:, None] * KEY_DIM + o_k[None, :], mask=m_row[:, None] & m_k[None, :], other=0.0)
            b_q = tl.load(qkv + o_in, mask=m_in[:, None] & m_k[None, :], other=0.0).to(tl.float32)
            b_weight += b_g * b_q
            b_bias += b_g
        o_part = i_s.to(tl.int64) * length + start + o_k * (side * side) + i_tap
        tl.store(part_weight + o_part, tl.sum(b_weight, axis=0), mask=m_k)
        tl.store(part_bias + (i_s.to(tl.int64) * HEADS + i_h) * KEY_DIM + o_k, tl.sum(b_bias, axis=0), mask=m_k & (i_tap == 0))


@triton.jit
def cascaded_group_attention_bwd_table_kernel(
    grad_scores,  # [heads, N, N] fp32: gradient of the scores, summed over windows
    grad_table,  # [heads, N], written
    WINDOW: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Entries of one head's bias table: each the sum over all pairs of tokens ``(dy, dx)`` apart, in either direction along either axis."""
    N: tl.constexpr = WINDOW * WINDOW
    i_e = tl.program_id(0) % tl.cdiv(N, BLOCK_E)
    i_h = (tl.program_id(0) // tl.cdiv(N, BLOCK_E)).to(tl.int64)
    o_e = i_e * BLOCK_E + tl.arange(0, BLOCK_E)
    dy = (o_e // WINDOW)[:, None]
    dx = (o_e % WINDOW)[:, None]
    b_sum = tl.zeros([BLOCK_E, BLOCK_N], dtype=tl.float32)
    for n in range(0, N, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        for sign in tl.static_range(4):
            # A distance of 0 has one direction, not two.
            o_y = (o_n // WINDOW)[None, :] + (dy if sign < 2 else -dy)  # [BLOCK_E, BLOCK_N]
            o_x = (o_n % WINDOW)[None, :] + (dx if sign % 2 == 0 else -dx)
            m_pair = (o_e < N)[:, None] & (o_n < N)[None, :] & (o_y >= 0) & (o_y < WINDOW) & (o_x >= 0) & (o_x < WINDOW)
            m_pair = m_pair & ((sign < 2) | (dy > 0)) & ((sign % 2 == 0) | (dx > 0))
            b_sum += tl.load(grad_scores + i_h * (N * N) + (o_y * WINDOW + o_x) * N + o_n[None, :], mask=m_pair, other=0.0)
    tl.store(grad_table + i_h * N + o_e, cast(tl.sum(b_sum, axis=1), grad_table.dtype.element_ty, INTERPRET), mask=o_e < N)


# --- tiles -------------------------------------------------------------------------------------------------------------------------


def _edge(dtype: torch.dtype) -> int:
    """Edge of a tile: 64 fills the tensor cores; exact fp32 runs on the CUDA cores, whose operands sit in registers."""
    return 32 if dtype is torch.float32 else 64


def cascade_tile(split: int, key_dim: int, value_dim: int, window: int, dtype: torch.dtype, *, backward: bool) -> Tile:
    """The kernels that walk a window's heads.

    Many steps in one program leave no registers for fetching the next tile ahead (num_stages 1), and the backward, which holds scores, probabilities
    and both their gradients, takes half the tokens. The forward's tiles are shared by 256 threads: 8 warps, or 4 of AMD's wavefronts. Exact fp32
    has its operands in registers: where the loops over channels have one step and unroll, the backward's tile is smaller, and a window of one small
    tile has fewer warps, between which fewer operands are repeated.
    """
    exact = dtype is torch.float32
    edge = 32 if backward else _edge(dtype)
    depth = 16 if exact else edge
    block_t = power(window * window, 16, 16 if backward and exact and value_dim <= 32 else edge)
    blocks = {
        "BLOCK_T": block_t,
        "BLOCK_R": power(2 * key_dim + value_dim, 16, depth),
        "BLOCK_S": power(split, 16, depth),
        "BLOCK_K": max(16, shared.next_power_of_2(key_dim)),
        "BLOCK_D": power(value_dim, 16, edge),
    }
    small = exact and window * window <= 16
    forward_warps = 8 if block_t > 16 and torch.version.hip is None else 4
    num_warps = forward_warps if not backward else 2 if small else 4
    return Tile(blocks, num_warps, registers=255, num_stages=1)


def gemm_tile(outputs: int, inputs: int, rows: int, dtype: torch.dtype) -> Tile:
    """Projection and weight gradients: plain GEMMs with ``outputs`` and ``inputs`` channels."""
    edge = _edge(dtype)
    return Tile({"BLOCK_O": power(outputs, 16, edge), "BLOCK_I": power(inputs, 16, edge), "BLOCK_T": power(rows, 16, edge)}, 4, registers=255)


# --- launches ----------------------------------------------------------------------------------------------------------------------

_SCORES_SCRATCH = 2**26  # bytes, at most, of the gradient of the scores that the backward's programs sum up


class _Call(NamedTuple):
    """What the launches need to know of a call."""

    shape: tuple[int, int, int, int]
    heads: int
    split: int
    value_dim: int
    key_dim: int
    kernels: tuple[int, ...]
    scale: float
    window: int
    rows_of_windows: int
    columns: int
    wide: bool
    wanted: int

    @staticmethod
    def of(qkv_weight: Tensor, kernel_sizes: list[int], key_dim: int, scale: float, window: int, *maps: Tensor) -> _Call:
        heads, rows, split = qkv_weight.shape
        batch, channels, height, width = maps[0].shape
        return _Call(
            (batch, channels, height, width),
            heads,
            split,
            rows - 2 * key_dim,
            key_dim,
            tuple(kernel_sizes),
            scale,
            window,
            shared.cdiv(height, window),
            shared.cdiv(width, window),
            shared.reaches_64_bit(*maps),
            shared.processors(maps[0].device),
        )

    @property
    def tokens(self) -> int:
        """N, tokens of a window."""
        return self.window * self.window

    @property
    def windows(self) -> int:
        """T, windows of the batch."""
        return self.shape[0] * self.rows_of_windows * self.columns

    @property
    def rows(self) -> int:
        """Tokens of the batch, padding included."""
        return self.windows * self.tokens

    @property
    def qkv_rows(self) -> int:
        """R, channels of one head's q, k and v."""
        return 2 * self.key_dim + self.value_dim

    @property
    def geometry(self) -> tuple[int, int, int, int]:
        """Height and width of the map, windows beside each other, windows in an image."""
        return self.shape[2], self.shape[3], self.columns, self.rows_of_windows * self.columns

    def cascade(self, map_: Tensor, *, backward: bool) -> dict[str, Any]:
        """Constants of the kernels that walk a window's heads."""
        return {
            "HEADS": self.heads,
            "KERNELS": self.kernels,
            "KEY_DIM": self.key_dim,
            "VALUE_DIM": self.value_dim,
            "SPLIT": self.split,
            **self.constants(map_),
            **cascade_tile(self.split, self.key_dim, self.value_dim, self.window, map_.dtype, backward=backward).options,
        }

    def constants(self, map_: Tensor) -> dict[str, Any]:
        """Constants of every kernel that reads or writes a map."""
        return {
            "WINDOW": self.window,
            "CHANNELS_LAST": map_.stride(1) == 1 and self.shape[1] > 1,
            "WIDE": self.wide,
            "PRECISION": "ieee",
            "INTERPRET": shared.INTERPRET,
        }


class _Kept(NamedTuple):
    """What the forward's cascade writes; of all but ``cat`` only the backward needs every head."""

    qkv: Tensor  # [T * N, slots, R]
    conv_q: Tensor | None  # [T * N, heads, key_dim]
    stats: Tensor | None  # [T * N, heads, 2]
    cat: Tensor  # [T * N, heads * d]


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _near(weight: Tensor) -> Tensor:
    """The weight, copied where it reaches further than the 32-bit offsets that the kernels use in a weight."""
    reach = sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))
    return weight if reach < 2**31 else weight.contiguous()


def _cascade(
    c: _Call,
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    attention_bias: Tensor,
    *,
    keep: bool,
) -> _Kept:
    """All heads of all windows, up to their concatenated outputs before the ReLU."""
    kept = _Kept(
        x.new_empty((c.rows, c.heads if keep else 1, c.qkv_rows)),
        x.new_empty((c.rows, c.heads, c.key_dim)) if keep else None,
        x.new_empty((c.rows, c.heads, 2), dtype=torch.float32) if keep else None,
        x.new_empty((c.rows, c.heads * c.value_dim)),
    )
    shared.launch(
        cascaded_group_attention_fwd_kernel,
        c.windows,
        *(x, qkv_weight, _contiguous(qkv_bias), dw_weight.contiguous(), _contiguous(dw_bias), attention_bias.contiguous(), *kept),
        *(*x.stride(), *qkv_weight.stride(), *c.geometry, c.tokens, c.scale),
        **c.cascade(x, backward=False),
    )
    return kept


def cascaded_group_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    attention_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    kernel_sizes: list[int],
    key_dim: int,
    scale: float,
    window: int,
) -> Tensor:
    """Forward of ``vitkernels::cascaded_group_attention``; arguments and result as its schema in op.py says."""
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    qkv_weight, proj_weight = _near(qkv_weight), _near(proj_weight)
    c = _Call.of(qkv_weight, kernel_sizes, key_dim, scale, window, x, y)
    batch, channels, height, width = c.shape
    with shared.on(x):
        cat = _cascade(c, x, qkv_weight, qkv_bias, dw_weight, dw_bias, attention_bias, keep=False).cat
        pixels = batch * height * width
        tile = gemm_tile(channels, cat.shape[1], pixels, x.dtype)
        shared.launch(
            cascaded_group_attention_fwd_project_kernel,
            shared.cdiv(pixels, tile.blocks["BLOCK_T"]) * shared.cdiv(channels, tile.blocks["BLOCK_O"]),
            *(cat, proj_weight, _contiguous(proj_bias), y, *proj_weight.stride(), *y.stride(), pixels, *c.geometry, channels),
            E=cat.shape[1],
            **c.constants(y),
            **tile.options,
        )
    return y


def _weight_gradients(
    kernel: Any, c: _Call, map_: Tensor, inputs: tuple[Any, ...], sizes: tuple[int, int, int], **constants: Any
) -> tuple[Tensor, Tensor]:
    """(weight, bias) gradients in parts, [splits, groups * rows * columns] and [splits, groups * rows], of ``sizes`` (groups, rows, columns)."""
    groups, outputs, columns = sizes
    # Of exact fp32's operands and its two sums (see add_product) 32 tokens take more than the registers there are.
    tile = gemm_tile(outputs, columns, 16 if map_.dtype is torch.float32 else c.rows, map_.dtype)
    tiles = shared.cdiv(c.rows, tile.blocks["BLOCK_T"])
    blocks = groups * shared.cdiv(outputs, tile.blocks["BLOCK_O"]) * shared.cdiv(columns, tile.blocks["BLOCK_I"])
    splits, split_tiles = shared.splits(blocks, tiles, 2 * c.wanted, least=4)
    part_weight = map_.new_empty((splits, groups * outputs * columns), dtype=torch.float32)
    part_bias = map_.new_empty((splits, groups * outputs), dtype=torch.float32)
    shared.launch(
        kernel,
        blocks * splits,
        *(*inputs, part_weight, part_bias, *map_.stride(), c.rows, *c.geometry, tiles, split_tiles),
        **constants,
        **c.constants(map_),
        **tile.options,
    )
    return part_weight, part_bias


def cascaded_group_attention_backward(
    grad_y: Tensor,
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    attention_bias: Tensor,
    proj_weight: Tensor,
    kernel_sizes: list[int],
    key_dim: int,
    scale: float,
    window: int,
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor, ...]:
    """Backward of ``vitkernels::cascaded_group_attention``; arguments and results as its schema in op.py says."""
    heads = qkv_weight.shape[0]
    grad_x = torch.empty_like(x) if need_x else x.new_empty(0)
    shapes = (
        qkv_weight.shape,
        qkv_weight.shape[:2],
        dw_weight.shape,
        (heads, key_dim),
        attention_bias.shape,
        proj_weight.shape,
        proj_weight.shape[:1],
    )
    grads = (grad_x, *(x.new_empty(shape if need_weights else 0) for shape in shapes))
    if x.numel() == 0:
        for grad in grads:
            grad.zero_()
    if x.numel() == 0 or not (need_x or need_weights):
        return grads
    qkv_weight, proj_weight = _near(qkv_weight), _near(proj_weight)
    c = _Call.of(qkv_weight, kernel_sizes, key_dim, scale, window, x, grad_y, *((grad_x,) if need_x else ()))
    channels, embed = c.shape[1], heads * c.value_dim

    with shared.on(x):
        kept = _cascade(c, x, qkv_weight, qkv_bias, dw_weight, dw_bias, attention_bias, keep=True)
        grad_cat = torch.empty_like(kept.cat)
        tile = gemm_tile(channels, embed, c.rows, x.dtype)
        shared.launch(
            cascaded_group_attention_bwd_project_kernel,
            shared.cdiv(c.rows, tile.blocks["BLOCK_T"]) * shared.cdiv(embed, tile.blocks["BLOCK_I"]),
            *(grad_y, proj_weight, kept.cat, grad_cat, *proj_weight.stride(), *grad_y.stride(), c.rows, *c.geometry, channels),
            E=embed,
            **c.constants(grad_y),
            **tile.options,
        )

        scores_bytes = 4 * heads * c.tokens * c.tokens
        programs = min(c.windows, 4 * c.wanted, max(1, _SCORES_SCRATCH // scores_bytes) if need_weights else c.windows)
        part_scores = x.new_empty((programs, heads, c.tokens, c.tokens), dtype=torch.float32) if need_weights else None
        grad_qkv = torch.empty_like(kept.qkv)
        grad_conv_q = x.new_empty((c.rows, heads, key_dim), dtype=torch.float32)
        delta = x.new_empty((programs, c.tokens), dtype=torch.float32)
        shared.launch(
            cascaded_group_attention_bwd_kernel,
            programs,
            *(qkv_weight, dw_weight.contiguous(), attention_bias.contiguous(), *kept, grad_cat, grad_qkv, grad_conv_q, delta, part_scores),
            *(
                grad_x if need_x else None,
                *qkv_weight.stride(),
                *(grad_x if need_x else x).stride(),
                *c.geometry,
                c.tokens,
                c.windows,
                programs,
                c.scale,
            ),
            **c.cascade(grad_x if need_x else x, backward=True),
        )
        if part_scores is None:
            return grads

        _, grad_qkv_weight, grad_qkv_bias, grad_dw_weight, grad_dw_bias, grad_table, grad_proj_weight, grad_proj_bias = grads
        grad_scores = part_scores[0] if programs == 1 else shared.sum_parts(part_scores, torch.empty_like(part_scores[0]))
        block_e = power(c.tokens, 1, 16)
        shared.launch(
            cascaded_group_attention_bwd_table_kernel,
            heads * shared.cdiv(c.tokens, block_e),
            *(grad_scores, grad_table),
            WINDOW=window,
            BLOCK_E=block_e,
            BLOCK_N=power(c.tokens, 16, 64),
            INTERPRET=shared.INTERPRET,
            num_warps=4,
        )
        part_weight, part_bias = _weight_gradients(
            cascaded_group_attention_bwd_qkv_weight_kernel,
            c,
            x,
            (grad_qkv, x, kept.cat),
            (heads, c.qkv_rows, c.split),
            HEADS=heads,
            VALUE_DIM=c.value_dim,
            SPLIT=c.split,
            R=c.qkv_rows,
        )
        shared.sum_parts(part_weight, grad_qkv_weight)
        shared.sum_parts(part_bias, grad_qkv_bias)
        part_weight, part_bias = _weight_gradients(
            cascaded_group_attention_bwd_proj_weight_kernel, c, grad_y, (grad_y, kept.cat), (1, channels, embed), channels=channels, E=embed
        )
        shared.sum_parts(part_weight, grad_proj_weight)
        shared.sum_parts(part_bias, grad_proj_bias)
        part_weight, part_bias = _depthwise_gradients(c, grad_conv_q, kept.qkv, dw_weight.numel())
        shared.sum_parts(part_weight, grad_dw_weight)
        shared.sum_parts(part_bias, grad_dw_bias)
    return grads


def _depthwise_gradients(c: _Call, grad_conv_q: Tensor, qkv: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(weight, bias) gradients in parts, [splits, length] and [splits, heads * key_dim]."""
    block_t = power(c.rows, 16, 128)
    taps = max(c.kernels) ** 2
    tiles = shared.cdiv(c.rows, block_t)
    splits, split_tiles = shared.splits(taps * c.heads, tiles, 4 * c.wanted, least=4)
    part_weight = grad_conv_q.new_empty((splits, length))
    part_bias = grad_conv_q.new_empty((splits, c.heads * c.key_dim))
    shared.launch(
        cascaded_group_attention_bwd_dw_weight_kernel,
        splits * c.heads * taps,
        *(grad_conv_q, qkv, part_weight, part_bias, c.rows, tiles, split_tiles, length),
        HEADS=c.heads,
        KERNELS=c.kernels,
        TAPS=taps,
        KEY_DIM=c.key_dim,
        R=c.qkv_rows,
        WINDOW=c.window,
        BLOCK_T=block_t,
        BLOCK_K=max(16, shared.next_power_of_2(c.key_dim)),
        num_warps=4,
    )
    return part_weight, part_bias
