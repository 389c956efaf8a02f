"""Triton kernels of the matching cost and the set loss, and their launch code. The arithmetic is float32.

A program takes a block of queries of one layer. Rows of logits are read a block of classes at a time, so that there may be any number of them; the
largest logit and the sum of exponentials are carried along.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitkernels.ops import _triton as shared
from vitkernels.ops._triton import Tile, cast, power

# --- pieces of kernels -------------------------------------------------------------------------------------------------------------


@triton.jit
def softmax_statistics(rows, m_r, stride_c, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of each row its largest logit and the sum of e^(x - that); NaN for the sum where softmax is NaN."""
    b_most = tl.full([BLOCK_R], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_R], dtype=tl.float32)
    for c in range(0, C, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        m_rc = m_r[:, None] & (o_c < C)[None, :]
        b_x = tl.load(rows[:, None] + o_c.to(tl.int64)[None, :] * stride_c, mask=m_rc, other=float("-inf")).to(tl.float32)
        b_new = tl.maximum(b_most, tl.max(b_x, axis=1))
        b_from = tl.where(b_new == float("-inf"), 0.0, b_new)  # -inf - -inf is NaN, which the next classes may not deserve
        b_sum = b_sum * tl.exp(b_most - b_from) + tl.sum(tl.exp(b_x - b_from[:, None]), axis=1)
        b_most = b_new
    return b_most, tl.where(b_most == float("-inf"), float("nan"), b_sum)


@triton.jit
def sigmoid(x):
    """Its value, 1 - value without cancellation, and log(1 + e^x), whose log(1 + e) is 2 artanh(e / (2 + e)): small ones keep their digits."""
    e = tl.exp(tl.where(x < 0, x, -x))
    near = 1.0 / (1.0 + e)
    far = e * near
    z = e / (2.0 + e)
    w = z * z
    series = 1.0 + w * (1 / 3 + w * (1 / 5 + w * (1 / 7 + w * (1 / 9 + w * (1 / 11 + w * (1 / 13 + w * (1 / 15)))))))
    return tl.where(x < 0, far, near), tl.where(x < 0, near, far), tl.where(x < 0, 0.0, x) + 2.0 * z * series


@triton.jit
def raised(v, GAMMA: tl.constexpr):
    """``v**GAMMA`` of a probability."""
    if GAMMA == 2.0:
        v = v * v
    elif GAMMA == 0.0:
        v = v * 0.0 + 1.0
    elif GAMMA != 1.0:
        v = tl.exp(GAMMA * tl.log(tl.where(v < 1e-37, 1e-37, v)))
    return v


@triton.jit
def focal_loss(x, GAMMA: tl.constexpr):
    """Of an example against a class; of one of it, that of -x."""
    p, _, softplus = sigmoid(x)
    return raised(p, GAMMA) * softplus


@triton.jit
def along(centre, length, other_centre, other_length):
    """Along one axis: corners of a box and of its target, what they share (negative where they are apart), and the length that holds both."""
    low, high = centre - 0.5 * length, centre + 0.5 * length
    other_low, other_high = other_centre - 0.5 * other_length, other_centre + 0.5 * other_length
    shared_length = tl.minimum(high, other_high) - tl.maximum(low, other_low)
    return low, high, other_low, other_high, shared_length, tl.maximum(high, other_high) - tl.minimum(low, other_low)


@triton.jit
def overlap_parts(x, y, w, h, tx, ty, tw, th):
    """Intersection, union and hull of a box and its target, of which GIoU is made."""
    xl, xh, txl, txh, across, around_x = along(x, w, tx, tw)
    yl, yh, tyl, tyh, down, around_y = along(y, h, ty, th)
    overlap = tl.where(across < 0, 0.0, across) * tl.where(down < 0, 0.0, down)
    together = (xh - xl) * (yh - yl) + (txh - txl) * (tyh - tyl) - overlap
    return overlap, together, around_x * around_y


@triton.jit
def share(a, b):
    """How much of a gradient of max(a, b) is a's: of equals both have a half."""
    return tl.where(a == b, 0.5, tl.where(a > b, 1.0, 0.0))


@triton.jit
def axis_gradient(centre, length, other_centre, other_length, of_length, of_shared, of_around):
    """Gradients of the box's centre and length from those of its measured length, of what is shared, and of what holds both."""
    low, high, other_low, other_high, shared_length, _ = along(centre, length, other_centre, other_length)
    within = tl.where(shared_length >= 0, of_shared, 0.0)
    of_high = of_length + within * share(other_high, high) + of_around * share(high, other_high)
    of_low = -of_length - within * share(low, other_low) - of_around * share(other_low, low)
    return of_low + of_high, 0.5 * (of_high - of_low)


@triton.jit
def sign(v):
    """-1, 0, 1; NaN of NaN."""
    return tl.where(v > 0, 1.0, tl.where(v < 0, -1.0, v * 0.0))


@triton.jit
def load_box(boxes, stride, mask):
    """Four numbers; of a box that is masked a unit square."""
    x = tl.load(boxes, mask=mask, other=0.5).to(tl.float32)
    y = tl.load(boxes + stride, mask=mask, other=0.5).to(tl.float32)
    w = tl.load(boxes + 2 * stride, mask=mask, other=1.0).to(tl.float32)
    h = tl.load(boxes + 3 * stride, mask=mask, other=1.0).to(tl.float32)
    return x, y, w, h


# --- pairwise_box_cost -------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["images", "targets", "queries"])
def pairwise_box_cost_kernel(
    logits,  # [L, B, Q, C], strides below
    boxes,  # [L, B, Q, 4], strides below
    labels,  # [T]
    target_boxes,  # [T, 4]
    cu_targets,  # [B + 1]
    costs,  # [L, T, Q], written
    stride_ll,
    stride_lb,
    stride_lq,
    stride_lc,
    stride_bl,
    stride_bb,
    stride_bq,
    stride_bc,
    images,
    targets,
    queries,
    class_weight,
    box_weight,
    overlap_weight,
    alpha,
    C: tl.constexpr,
    FOCAL: tl.constexpr,
    GAMMA: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """BLOCK_Q queries of one image in one layer, and all targets of the image."""
    blocks = (queries + BLOCK_Q - 1) // BLOCK_Q
    i = tl.program_id(0)
    i_b = ((i // blocks) % images).to(tl.int64)
    i_l = (i // blocks // images).to(tl.int64)
    o_q = (i % blocks).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_q = o_q < queries
    begin = tl.load(cu_targets + i_b)
    end = tl.load(cu_targets + i_b + 1)
    rows = logits + i_l * stride_ll + i_b * stride_lb + o_q * stride_lq
    if begin < end:
        if not FOCAL:
            b_most, b_sum = softmax_statistics(rows, m_q, stride_lc, C, BLOCK_Q, BLOCK_C)
        x, y, w, h = load_box(boxes + i_l * stride_bl + i_b * stride_bb + o_q * stride_bq, stride_bc, m_q)
        for t in range(begin, end, BLOCK_T):
            o_t = t + tl.arange(0, BLOCK_T).to(tl.int64)
            m_t = o_t < end
            m_tq = m_t[:, None] & m_q[None, :]
            b_label = tl.load(labels + o_t, mask=m_t, other=0)
            m_known = (b_label >= 0) & (b_label < C)
            b_x = tl.load(rows[None, :] + b_label[:, None] * stride_lc, mask=m_tq & m_known[:, None], other=float("nan")).to(tl.float32)
            if FOCAL:
                b_p, b_rest, _ = sigmoid(b_x)
                b_cost = (1 - alpha) * raised(b_p, GAMMA) * tl.log(b_rest + 1e-8) - alpha * raised(b_rest, GAMMA) * tl.log(b_p + 1e-8)
            else:
                b_cost = -tl.exp(b_x - b_most[None, :]) / b_sum[None, :]
            tx, ty, tw, th = load_box(target_boxes + o_t * 4, 1, m_t)
            tx, ty, tw, th = tx[:, None], ty[:, None], tw[:, None], th[:, None]
            x1, y1, w1, h1 = x[None, :], y[None, :], w[None, :], h[None, :]
            overlap, together, hull = overlap_parts(x1, y1, w1, h1, tx, ty, tw, th)
            distance = tl.abs(x1 - tx) + tl.abs(y1 - ty) + tl.abs(w1 - tw) + tl.abs(h1 - th)
            b_cost = class_weight * b_cost + box_weight * distance - overlap_weight * (overlap / together - (hull - together) / hull)
            tl.store(costs + (i_l * targets + o_t)[:, None] * queries + o_q[None, :], b_cost, mask=m_tq)


_REGISTERS = 168  # more than any of the kernels needs


def _cost_tile(classes: int) -> Tile:
    return Tile({"BLOCK_Q": 32, "BLOCK_T": 16, "BLOCK_C": power(classes, 16, 64)}, 4, _REGISTERS)


def pairwise_box_cost(
    logits: Tensor,
    boxes: Tensor,
    target_labels: Tensor,
    target_boxes: Tensor,
    cu_targets: Tensor,
    weights: list[float],
    focal: bool,
    alpha: float,
    gamma: float,
) -> Tensor:
    """``vitkernels::pairwise_box_cost``; arguments and results as its schema in op.py says."""
    layers, images, queries, classes = logits.shape
    targets = target_labels.shape[0]
    costs = logits.new_empty((layers, targets, queries), dtype=torch.float32)
    tile = _cost_tile(classes)
    with shared.on(logits):
        shared.launch(
            pairwise_box_cost_kernel,
            layers * images * shared.cdiv(queries, tile.blocks["BLOCK_Q"]) if targets else 0,
            *(logits, boxes, target_labels, target_boxes, cu_targets, costs, *logits.stride(), *boxes.stride()),
            *(images, targets, queries, *weights, alpha),
            C=classes,
            FOCAL=focal,
            GAMMA=gamma,
            **tile.options,
        )
    return costs


# --- detection_set_loss ------------------------------------------------------------------------------------------------------------


@triton.jit
def query_rows(matches, labels, i_l, o_r, m_r, rows, C, FOCAL: tl.constexpr):
    """Of each query its match, its class, and whether that is one; without a match no object, which under focal is none of the classes."""
    b_match = tl.load(matches + i_l * rows + o_r, mask=m_r, other=-1)
    m_match = b_match >= 0
    b_label = tl.load(labels + b_match, mask=m_match, other=-1 if FOCAL else C - 1)
    return b_match, m_match, b_label, (b_label >= 0) & (b_label < C)


@triton.jit(do_not_specialize=["rows", "queries"])
def detection_set_loss_fwd_kernel(
    logits,  # [L, B, Q, C], strides below
    boxes,  # [L, B, Q, 4], strides below
    labels,  # [T]
    target_boxes,  # [T, 4]
    matches,  # [L, B Q]
    sums,  # [L, blocks, 4], written: of the class loss, of its weights, of L1, of 1 - GIoU
    stride_ll,
    stride_lb,
    stride_lq,
    stride_lc,
    stride_bl,
    stride_bb,
    stride_bq,
    stride_bc,
    rows,
    queries,
    eos_coef,
    alpha,
    C: tl.constexpr,
    FOCAL: tl.constexpr,
    GAMMA: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """BLOCK_R queries of one layer."""
    blocks = (rows + BLOCK_R - 1) // BLOCK_R
    i = tl.program_id(0)
    i_l = (i // blocks).to(tl.int64)
    o_r = (i % blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < rows
    b_match, m_match, b_label, m_known = query_rows(matches, labels, i_l, o_r, m_r, rows, C, FOCAL)
    row = logits + i_l * stride_ll + (o_r // queries) * stride_lb + (o_r % queries) * stride_lq
    b_x = tl.load(row + b_label * stride_lc, mask=m_r & m_known, other=float("nan")).to(tl.float32)
    b_weight = tl.where(b_label == C - 1, eos_coef, 1.0)
    if FOCAL:
        b_loss = tl.where(m_match, alpha * focal_loss(-b_x, GAMMA), 0.0)
        for c in range(0, C, BLOCK_C):
            o_c = c + tl.arange(0, BLOCK_C)
            m_rc = m_r[:, None] & (o_c < C)[None, :] & (o_c[None, :] != b_label[:, None])
            b_y = tl.load(row[:, None] + o_c.to(tl.int64)[None, :] * stride_lc, mask=m_rc, other=0.0).to(tl.float32)
            b_loss += tl.sum(tl.where(m_rc, (1 - alpha) * focal_loss(b_y, GAMMA), 0.0), axis=1)
    else:
        b_most, b_sum = softmax_statistics(row, m_r, stride_lc, C, BLOCK_R, BLOCK_C)
        b_loss = b_weight * (tl.log(b_sum) + (b_most - b_x))
    x, y, w, h = load_box(boxes + i_l * stride_bl + (o_r // queries) * stride_bb + (o_r % queries) * stride_bq, stride_bc, m_match)
    tx, ty, tw, th = load_box(target_boxes + b_match * 4, 1, m_match)
    overlap, together, hull = overlap_parts(x, y, w, h, tx, ty, tw, th)
    distance = tl.abs(x - tx) + tl.abs(y - ty) + tl.abs(w - tw) + tl.abs(h - th)
    at = sums + i.to(tl.int64) * 4
    tl.store(at, tl.sum(tl.where(m_r, b_loss, 0.0), axis=0))
    tl.store(at + 1, tl.sum(tl.where(m_r, b_weight, 0.0), axis=0))
    tl.store(at + 2, tl.sum(distance, axis=0))
    tl.store(at + 3, tl.sum(tl.where(m_match, 1.0 - (overlap / together - (hull - together) / hull), 0.0), axis=0))


@triton.jit(do_not_specialize=["rows", "queries"])
def detection_set_loss_bwd_kernel(
    grads,  # [L, 3]: of the class loss, of L1, of GIoU, each divided by what the loss was divided by
    logits,  # [L, B, Q, C], strides below
    boxes,  # [L, B, Q, 4], strides below
    labels,  # [T]
    target_boxes,  # [T, 4]
    matches,  # [L, B Q]
    grad_logits,  # [L, B Q, C], written
    grad_boxes,  # [L, B Q, 4], written
    stride_ll,
    stride_lb,
    stride_lq,
    stride_lc,
    stride_bl,
    stride_bb,
    stride_bq,
    stride_bc,
    rows,
    queries,
    eos_coef,
    alpha,
    C: tl.constexpr,
    FOCAL: tl.constexpr,
    GAMMA: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Gradients of BLOCK_R queries of one layer."""
    blocks = (rows + BLOCK_R - 1) // BLOCK_R
    i = tl.program_id(0)
    i_l = (i // blocks).to(tl.int64)
    o_r = (i % blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < rows
    b_match, m_match, b_label, m_known = query_rows(matches, labels, i_l, o_r, m_r, rows, C, FOCAL)
    row = logits + i_l * stride_ll + (o_r // queries) * stride_lb + (o_r % queries) * stride_lq
    b_grad = tl.load(grads + i_l * 3) * tl.where(m_known | (b_match < 0), 1.0, float("nan"))
    if not FOCAL:
        b_grad *= tl.where(b_label == C - 1, eos_coef, 1.0)
        b_most, b_sum = softmax_statistics(row, m_r, stride_lc, C, BLOCK_R, BLOCK_C)
    for c in range(0, C, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        m_rc = m_r[:, None] & (o_c < C)[None, :]
        m_label = o_c[None, :] == b_label[:, None]
        b_x = tl.load(row[:, None] + o_c.to(tl.int64)[None, :] * stride_lc, mask=m_rc, other=0.0).to(tl.float32)
        if FOCAL:
            b_p, b_rest, b_softplus = sigmoid(tl.where(m_label, -b_x, b_x))
            b_g = tl.where(m_label, -alpha, 1 - alpha) * raised(b_p, GAMMA) * (GAMMA * b_rest * b_softplus + b_p)
        else:
            b_g = tl.exp(b_x - b_most[:, None]) / b_sum[:, None] - tl.where(m_label, 1.0, 0.0)
        b_g = cast(b_grad[:, None] * b_g, grad_logits.dtype.element_ty, INTERPRET)
        tl.store(grad_logits + (i_l * rows + o_r)[:, None] * C + o_c[None, :], b_g, mask=m_rc)
    x, y, w, h = load_box(boxes + i_l * stride_bl + (o_r // queries) * stride_bb + (o_r % queries) * stride_bq, stride_bc, m_match)
    tx, ty, tw, th = load_box(target_boxes + b_match * 4, 1, m_match)
    overlap, together, hull = overlap_parts(x, y, w, h, tx, ty, tw, th)
    of_distance, of_loss = tl.load(grads + i_l * 3 + 1), tl.load(grads + i_l * 3 + 2)
    of_together = of_loss * (overlap / (together * together) - 1.0 / hull)
    of_overlap = -of_loss / together - of_together
    of_hull = of_loss * together / (hull * hull)
    xl, xh, _, _, across, around_x = along(x, w, tx, tw)
    yl, yh, _, _, down, around_y = along(y, h, ty, th)
    gx, gw = axis_gradient(x, w, tx, tw, of_together * (yh - yl), of_overlap * tl.where(down < 0, 0.0, down), of_hull * around_y)
    gy, gh = axis_gradient(y, h, ty, th, of_together * (xh - xl), of_overlap * tl.where(across < 0, 0.0, across), of_hull * around_x)
    at = grad_boxes + (i_l * rows + o_r) * 4
    dtype = grad_boxes.dtype.element_ty
    tl.store(at, cast(tl.where(m_match, gx + of_distance * sign(x - tx), 0.0), dtype, INTERPRET), mask=m_r)
    tl.store(at + 1, cast(tl.where(m_match, gy + of_distance * sign(y - ty), 0.0), dtype, INTERPRET), mask=m_r)
    tl.store(at + 2, cast(tl.where(m_match, gw + of_distance * sign(w - tw), 0.0), dtype, INTERPRET), mask=m_r)
    tl.store(at + 3, cast(tl.where(m_match, gh + of_distance * sign(h - th), 0.0), dtype, INTERPRET), mask=m_r)


def _loss_tile(classes: int) -> Tile:
    return Tile({"BLOCK_R": 16, "BLOCK_C": power(classes, 16, 64)}, 4, _REGISTERS)


def _loss_arguments(logits: Tensor, boxes: Tensor, eos_coef: float, alpha: float) -> tuple[Any, ...]:
    _, images, queries, _ = logits.shape
    return (*logits.stride(), *boxes.stride(), images * queries, queries, eos_coef, alpha)


def detection_set_loss(
    logits: Tensor,
    boxes: Tensor,
    target_labels: Tensor,
    target_boxes: Tensor,
    matches: Tensor,
    num_boxes: Tensor,
    eos_coef: float,
    focal: bool,
    alpha: float,
    gamma: float,
) -> tuple[Tensor, Tensor]:
    """Forward of ``vitkernels::detection_set_loss``; arguments and results as its schema in op.py says."""
    layers, images, queries, classes = logits.shape
    tile = _loss_tile(classes)
    blocks = shared.cdiv(images * queries, tile.blocks["BLOCK_R"])
    sums = logits.new_empty((layers, blocks, 4), dtype=torch.float32)
    with shared.on(logits):
        shared.launch(
            detection_set_loss_fwd_kernel,
            layers * blocks,
            *(logits, boxes, target_labels, target_boxes, matches, sums, *_loss_arguments(logits, boxes, eos_coef, alpha)),
            C=classes,
            FOCAL=focal,
            GAMMA=gamma,
            **tile.options,
        )
    total = sums.sum(1)
    divisors = num_boxes.expand(layers).clone() if focal else total[:, 1].clone()
    return torch.stack((total[:, 0] / divisors, total[:, 2] / num_boxes, total[:, 3] / num_boxes), dim=1), divisors


def detection_set_loss_backward(
    grad_losses: Tensor,
    logits: Tensor,
    boxes: Tensor,
    target_labels: Tensor,
    target_boxes: Tensor,
    matches: Tensor,
    num_boxes: Tensor,
    divisors: Tensor,
    eos_coef: float,
    focal: bool,
    alpha: float,
    gamma: float,
) -> tuple[Tensor, Tensor]:
    """Backward of ``vitkernels::detection_set_loss``; arguments and results as its schema in op.py says."""
    layers, images, queries, classes = logits.shape
    grad_logits, grad_boxes = logits.new_empty(logits.shape), boxes.new_empty(boxes.shape)
    grads = torch.cat((grad_losses[:, :1] / divisors[:, None], grad_losses[:, 1:] / num_boxes), dim=1)
    tile = _loss_tile(classes)
    with shared.on(logits):
        shared.launch(
            detection_set_loss_bwd_kernel,
            layers * shared.cdiv(images * queries, tile.blocks["BLOCK_R"]),
            *(grads, logits, boxes, target_labels, target_boxes, matches, grad_logits, grad_boxes),
            *_loss_arguments(logits, boxes, eos_coef, alpha),
            C=classes,
            FOCAL=focal,
            GAMMA=gamma,
            INTERPRET=shared.INTERPRET,
            **tile.options,
        )
    return grad_logits, grad_boxes
