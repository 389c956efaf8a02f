"""Separable self-attention (MobileViTv2, arXiv 2206.02680, section 3.2): checks, choice of backend, and the autograd ops.

Reads top to bottom: the two public functions, then the two torch.library ops behind them. The derivation is in this folder's README.md.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels import backends
from vitkernels.ops import _check, _define
from vitkernels.ops.separable import reference

backends.declare("separable_attention", backends.Support())
backends.declare("separable_self_attention", backends.Support())


def separable_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The core of separable self-attention: ``relu(v) * sum_n softmax_n(q) k``.

    Args:
        q: query logits, [B, 1, P, N]: one channel per token; P pixel positions, N patches.
        k: keys, [B, d, P, N], any strides.
        v: values, [B, d, P, N], any strides.

    All three share one dtype (float32, bfloat16, float16, on the CPU also float64) and one device. The softmax, the weighted sum and the gradients
    accumulate in float32 (float64 for float64).

    Returns:
        [B, d, P, N], contiguous, in the dtype of ``v``. Differentiable once in q, k and v.

    Raises:
        ValueError: a wrong shape or a mix of devices.
        TypeError: a wrong or mixed dtype, or something that is no tensor.
        BackendUnavailable: a backend was asked for by name and cannot run.

    Paper: MobileViTv2, arXiv 2206.02680, section 3.2, equation 2 without its projections.
    """
    op = "separable_attention"
    for name, value in (("q", q), ("k", k), ("v", v)):
        _check.is_tensor(op, name, value, "[B, 1, P, N]" if name == "q" else "[B, d, P, N]")
        _check.strided(op, name, value)
        _check.floating(op, name, value)
        if value.dim() != 4:
            needs = "[B, 1, P, N]" if name == "q" else "[B, d, P, N]"
            raise ValueError(f"{op}: {name} has shape {_check.shape_of(value)}; it must be 4-dimensional, {needs}")
    batch, _, positions, patches = q.shape
    _check.has_shape(op, "q", q, (batch, 1, positions, patches), "[B, 1, P, N]")
    _check.has_shape(op, "k", k, (batch, k.shape[1], positions, patches), "[B, d, P, N] with q's B, P and N")
    _check.has_shape(op, "v", v, tuple(k.shape), "[B, d, P, N], the shape of k")
    if (dtype := _define.autocast_of(q)) is not None:
        q, k, v = (_define.cast(t, dtype) for t in (q, k, v))
    _check.same_kind(op, "k", k, "q", q)
    _check.same_kind(op, "v", v, "q", q)

    chosen = backends.select(op, q)
    if chosen == "reference":
        return reference.separable_attention(q, k, v)
    namespace = torch.ops.vitkernels_triton if chosen == "triton" else torch.ops.vitkernels
    out, _, _ = _define.call(namespace.separable_attention.default, _define.differentiable(q, k, v), q, k, v)
    return out


def separable_self_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    patch_size: int | tuple[int, int] | None = None,
) -> Tensor:
    """The whole separable self-attention module: both projections and the attention between them.

    The keys are never projected per token: ``sum_n s_n (W_k x_n + b_k) = W_k (sum_n s_n x_n) + b_k sum_n s_n``.

    Args:
        x: [B, d, P, N] (unfolded: P pixel positions, N patches), or with ``patch_size`` the feature map [B, d, H, W] itself, which is read
            and written in place of its unfolded form: no copy. Any strides; contiguous and channels_last are fast.
        qkv_weight: [1 + 2d, d] or [1 + 2d, d, 1, 1]: the rows of the query, then of the keys, then of the values.
        qkv_bias: [1 + 2d], or None.
        out_weight: [d, d] or [d, d, 1, 1].
        out_bias: [d], or None.
        dropout_p: probability of dropping an attention score, in [0, 1]; only when ``training``. The mask is drawn by PyTorch's generator exactly as
            ``F.dropout`` on the scores would draw it.
        training: whether dropout is active.
        patch_size: (ph, pw) or one int for a square: ``x`` is a feature map whose H and W it must divide.

    All tensors share one dtype (float32, bfloat16, float16, on the CPU also float64) and one device; under autocast they are cast like the
    arguments of ``F.linear``. Sums, softmax and gradients accumulate in float32 (float64 for float64).

    Returns:
        The shape, dtype and memory format of ``x``. Differentiable once in every tensor. Saved for backward: ``x``, the weights and
        O(B P (N + d)) numbers.

    Raises:
        ValueError: a wrong shape, a mix of devices, a patch size that does not divide the map, a probability outside [0, 1].
        TypeError: a wrong or mixed dtype, or something that is no tensor.
        BackendUnavailable: a backend was asked for by name and cannot run.

    Paper: MobileViTv2, arXiv 2206.02680, section 3.2, equation 2.
    """
    op = "separable_self_attention"
    patch = _checked_patch(op, x, patch_size)
    dim = x.shape[1]
    tensors = (x, qkv_weight, qkv_bias, out_weight, out_bias)
    _check_projection(op, "qkv_weight", qkv_weight, "[1 + 2d, d] or [1 + 2d, d, 1, 1]", 1 + 2 * dim, dim)
    _check_bias(op, "qkv_bias", qkv_bias, "[1 + 2d]", 1 + 2 * dim)
    _check_projection(op, "out_weight", out_weight, "[d, d] or [d, d, 1, 1]", dim, dim)
    _check_bias(op, "out_bias", out_bias, "[d]", dim)
    if not 0.0 <= dropout_p <= 1.0:
        _check.probability(op, "dropout_p", dropout_p)
    if (dtype := _define.autocast_of(x)) is not None:
        tensors = tuple(_define.cast(t, dtype) for t in tensors)
        x, qkv_weight, qkv_bias, out_weight, out_bias = tensors
    for name, tensor in zip(("qkv_weight", "qkv_bias", "out_weight", "out_bias"), tensors[1:], strict=True):
        if tensor is not None and (tensor.dtype is not x.dtype or tensor.device != x.device):
            _check.same_kind(op, name, tensor, "x", x)

    chosen = backends.select(op, x)
    if chosen == "reference":
        return reference.separable_self_attention(
            x, qkv_weight, qkv_bias, out_weight, out_bias, dropout_p=dropout_p, training=training, patch_size=patch
        )
    score_scale = _score_scale(x, patch, dropout_p) if training and dropout_p > 0 else None
    namespace = torch.ops.vitkernels_triton if chosen == "triton" else torch.ops.vitkernels
    outputs = _define.call(
        namespace.separable_self_attention.default,
        _define.differentiable(*tensors),
        *tensors,
        score_scale,
        # An unfolded [B, d, P, N] is the map of P rows and N columns whose patches are (P, 1): one case, not two.
        *(patch or (x.shape[2], 1)),
    )
    return outputs[0]


def _checked_patch(op: str, x: Tensor, patch_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    needs = "[B, d, P, N]" if patch_size is None else "[B, d, H, W]"
    _check.is_tensor(op, "x", x, needs)
    _check.strided(op, "x", x)
    _check.floating(op, "x", x)
    if x.dim() != 4:
        raise ValueError(f"{op}: x has shape {_check.shape_of(x)}; it must be 4-dimensional, {needs}")
    if patch_size is None:
        return None
    patch = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
    if len(patch) != 2 or not all(isinstance(p, int) and p > 0 for p in patch):
        raise ValueError(f"{op}: patch_size is {patch_size!r}; it must be a positive int or a pair (ph, pw) of them")
    if x.shape[2] % patch[0] or x.shape[3] % patch[1]:
        raise ValueError(f"{op}: x has shape {_check.shape_of(x)}; its H and W must be multiples of patch_size {patch[0]} x {patch[1]}")
    return patch


def _check_projection(op: str, name: str, weight: Tensor, needs: str, rows: int, columns: int) -> None:
    _check.is_tensor(op, name, weight, needs)
    _check.strided(op, name, weight)
    if weight.shape not in ((rows, columns), (rows, columns, 1, 1)):
        raise ValueError(
            f"{op}: {name} has shape {_check.shape_of(weight)}; it must be {needs} = [{rows}, {columns}] for d = {columns}, the channels of x"
        )


def _check_bias(op: str, name: str, bias: Tensor | None, symbols: str, length: int) -> None:
    if bias is not None:
        _check.is_tensor(op, name, bias, symbols)
        _check.has_shape(op, name, bias, (length,), symbols)


def _score_scale(x: Tensor, patch: tuple[int, int] | None, dropout_p: float) -> Tensor:
    """Dropout's multiplier of each score (0 or 1 / (1 - p)), [B, H, W] in the order of the map, drawn in the order of the unfolded scores."""
    batch, _, height, width = x.shape
    ph, pw = patch or (height, 1)
    ones = torch.ones(batch, 1, ph * pw, (height // ph) * (width // pw), dtype=_define.accumulation_dtype(x.dtype), device=x.device)
    scale = F.dropout(ones, dropout_p, training=True)
    return reference.fold(scale, (ph, pw), (height, width)).reshape(batch, height, width)


# --- vitkernels::separable_attention -----------------------------------------------------------------------------------------------


def _core_fake(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(q.dim() == 4 and k.dim() == 4 and v.dim() == 4, lambda: "q, k and v must be 4-dimensional")
    torch._check(q.shape[1] == 1, lambda: f"q must be [B, 1, P, N], got {tuple(q.shape)}")
    torch._check(k.shape == v.shape, lambda: f"k {tuple(k.shape)} and v {tuple(v.shape)} differ")
    batch, dim, positions, patches = k.shape
    out = v.new_empty((batch, dim, positions, patches))
    scores = v.new_empty((batch, positions, patches), dtype=_define.accumulation_dtype(v.dtype))
    return out, scores, scores.new_empty((batch, positions, dim))


def _core_backward_fake(
    grad_out: Tensor, k: Tensor, v: Tensor, scores: Tensor, context: Tensor, need_q: bool, need_k: bool, need_v: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, dim, positions, patches = k.shape

    def grad(needed: bool, channels: int) -> Tensor:
        return k.new_empty((batch, channels, positions, patches) if needed else (0,))

    return grad(need_q, 1), grad(need_k, dim), grad(need_v, dim)


def _core_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, k, v = inputs
    _, scores, context = output
    ctx.save_for_backward(k, v, scores, context)
    ctx.set_materialize_grads(False)


def _core_backward(op: Any, ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return None, None, None
    needed = ctx.needs_input_grad
    grads = op(grad_out, *ctx.saved_tensors, *needed)
    return tuple(g if n else None for g, n in zip(grads, needed, strict=True))


_define.define(
    "separable_attention",
    schema="(Tensor q, Tensor k, Tensor v) -> (Tensor out, Tensor scores, Tensor context)",
    backward_schema=(
        "(Tensor grad_out, Tensor k, Tensor v, Tensor scores, Tensor context, bool need_q, bool need_k, bool need_v)"
        " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)"
    ),
    fake=_core_fake,
    backward_fake=_core_backward_fake,
    setup_context=_core_setup,
    backward=_core_backward,
)


# --- vitkernels::separable_self_attention ------------------------------------------------------------------------------------------


def _self_fake(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    score_scale: Tensor | None,
    patch_h: int,
    patch_w: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch._check(x.dim() == 4, lambda: f"x must be 4-dimensional, got {x.dim()}")
    batch, dim, height, width = x.shape
    torch._check(qkv_weight.shape[0] == 1 + 2 * dim, lambda: f"qkv_weight must have 1 + 2d rows, got {tuple(qkv_weight.shape)}")
    torch._check(out_weight.shape[0] == dim, lambda: f"out_weight must have d rows, got {tuple(out_weight.shape)}")
    dtype = _define.accumulation_dtype(x.dtype)
    logits = x.new_empty((batch, height, width), dtype=dtype)
    stats = x.new_empty((batch, patch_h * patch_w, 2), dtype=dtype)
    return torch.empty_like(x), logits, stats, x.new_empty((batch, patch_h * patch_w, dim), dtype=dtype)


def _self_backward_fake(
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
) -> tuple[Tensor, ...]:
    dim = x.shape[1]
    nothing = (0,)
    return (
        torch.empty_like(x) if need_x else x.new_empty(nothing),
        x.new_empty(qkv_weight.shape if need_qkv else nothing),
        x.new_empty((1 + 2 * dim,) if need_qkv else nothing),
        x.new_empty(out_weight.shape if need_out else nothing),
        x.new_empty((dim,) if need_out else nothing),
    )


def _self_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, qkv_weight, qkv_bias, out_weight, _, score_scale, ctx.patch_h, ctx.patch_w = inputs
    _, logits, stats, pooled = output
    ctx.save_for_backward(x, qkv_weight, qkv_bias, out_weight, score_scale, logits, stats, pooled)
    ctx.set_materialize_grads(False)


def _self_backward(op: Any, ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 8
    need_x, need_qkv_w, need_qkv_b, need_out_w, need_out_b, *_ = ctx.needs_input_grad
    grads = op(grad_y, *ctx.saved_tensors, ctx.patch_h, ctx.patch_w, need_x, need_qkv_w or need_qkv_b, need_out_w or need_out_b)
    needed = (need_x, need_qkv_w, need_qkv_b, need_out_w, need_out_b)
    return (*(g if n else None for g, n in zip(grads, needed, strict=True)), None, None, None)


_define.define(
    "separable_self_attention",
    schema=(
        "(Tensor x, Tensor qkv_weight, Tensor? qkv_bias, Tensor out_weight, Tensor? out_bias, Tensor? score_scale, SymInt patch_h, SymInt patch_w)"
        " -> (Tensor y, Tensor logits, Tensor stats, Tensor pooled)"
    ),
    backward_schema=(
        "(Tensor grad_y, Tensor x, Tensor qkv_weight, Tensor? qkv_bias, Tensor out_weight, Tensor? score_scale, Tensor logits, Tensor stats,"
        " Tensor pooled, SymInt patch_h, SymInt patch_w, bool need_x, bool need_qkv, bool need_out)"
        " -> (Tensor grad_x, Tensor grad_qkv_weight, Tensor grad_qkv_bias, Tensor grad_out_weight, Tensor grad_out_bias)"
    ),
    fake=_self_fake,
    backward_fake=_self_backward_fake,
    setup_context=_self_setup,
    backward=_self_backward,
)

_define.implement_in_triton("separable", "separable_attention", "separable_self_attention")
