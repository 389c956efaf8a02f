"""Cascaded group attention (EfficientViT, arXiv 2305.07027, section 3.2): checks, choice of backend, and the autograd ops.

Reads top to bottom: the two public functions, what packs their lists of weights, then the two torch.library ops behind them. The derivation is in
this folder's README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitkernels import backends
from vitkernels.ops import _check, _define
from vitkernels.ops.cascaded_group import reference

backends.declare("cascaded_group_attention", backends.Support(cuda=(torch.float32, torch.bfloat16, torch.float16)))
backends.declare("cascaded_group_attention_batch_norm", backends.Support(triton=()))

Tensors = Sequence[Tensor]

CUDA_WINDOW = 14
"""The largest window of the CUDA C++ kernels."""


def cascaded_group_attention(
    x: Tensor,
    qkv_weights: Tensors,
    qkv_biases: Sequence[Tensor | None] | None,
    dw_weights: Tensors,
    dw_biases: Sequence[Tensor | None] | None,
    attention_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    key_dim: int,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Cascaded group attention on affine (BatchNorm-folded) weights, with its window partition: all heads, one pass.

    The channels of ``x`` are split over the heads. Head i takes split i plus the output of head i - 1, projects it to q, k and v, runs q through a
    depthwise convolution that is zero-padded inside the window, and attends: ``softmax(q^T k * scale + bias) v``. The heads' outputs are
    concatenated, passed through ReLU and projected.

    Args:
        x: feature map, [B, C, H, W], any strides; contiguous and channels_last are fast.
        qkv_weights: one per head, [2 * key_dim + d, C / heads] or [.., .., 1, 1]: rows of q, then k, then v. With more than one head d must be
            C / heads.
        qkv_biases: one per head, [2 * key_dim + d] or None; or None for no bias at all.
        dw_weights: one per head, [key_dim, 1, k, k], k odd; each head may have its own k.
        dw_biases: one per head, [key_dim] or None; or None for no bias at all.
        attention_bias: table [heads, w * w]: a pair of pixels dy rows and dx columns apart uses entry ``|dy| * w + |dx|``.
        proj_weight: [C, heads * d] or [C, heads * d, 1, 1].
        proj_bias: [C], or None.
        key_dim: channels of q and k of one head.
        scale: factor on q^T k; None is ``key_dim ** -0.5``.
        window: side w of the windows, in pixels. Where it does not divide the map, the windows at the bottom and the right are filled up with zero
            pixels, which are attended like any other, as in the published model. None: the map is one window, and must be square.

    All tensors share one dtype (float32, bfloat16, float16, on the CPU also float64) and one device; under autocast they are cast like the
    arguments of ``F.conv2d``. Products, softmax and gradients accumulate in float32 (float64 for float64).

    Returns:
        The shape, dtype and memory format of ``x``. Differentiable once in every tensor. Saved for backward: nothing beyond the arguments and their
        packed copies; the attention is recomputed a window at a time.

    Raises:
        ValueError: a wrong shape, lists of unequal lengths, a mix of devices, a window larger than the map.
        TypeError: a wrong or mixed dtype, or something that is no tensor.
        BackendUnavailable: a backend was asked for by name and cannot run.

    Paper: EfficientViT, arXiv 2305.07027, section 3.2, equations 2 and 3.
    """
    op = "cascaded_group_attention"
    heads = _check_attention(op, x, qkv_weights, dw_weights, attention_bias, proj_weight, key_dim, window)
    qkv_biases = _check_list(op, "qkv_biases", qkv_biases, heads, "[2 * key_dim + d]", (qkv_weights[0].shape[0],))
    dw_biases = _check_list(op, "dw_biases", dw_biases, heads, "[key_dim]", (key_dim,))
    if proj_bias is not None:
        _check.is_tensor(op, "proj_bias", proj_bias, "[C] or None")
        _check.has_shape(op, "proj_bias", proj_bias, (x.shape[1],), "[C]")
    arguments = _autocast_and_check_kind(
        op,
        x,
        {
            "qkv_weights": qkv_weights,
            "qkv_biases": qkv_biases,
            "dw_weights": dw_weights,
            "dw_biases": dw_biases,
            "attention_bias": attention_bias,
            "proj_weight": proj_weight,
            "proj_bias": proj_bias,
        },
    )
    x = arguments.pop("x")
    if _chosen(x, window) == "reference":
        return reference.cascaded_group_attention(x, **arguments, key_dim=key_dim, scale=scale, window=window)
    return attend(x, pack(**arguments, key_dim=key_dim), scale=scale, window=window)


def cascaded_group_attention_batch_norm(
    x: Tensor,
    qkv_weights: Tensors,
    qkv_norms: Sequence[tuple[Tensor, Tensor]],
    dw_weights: Tensors,
    dw_norms: Sequence[tuple[Tensor, Tensor]],
    attention_bias: Tensor,
    proj_weight: Tensor,
    proj_norm: tuple[Tensor, Tensor],
    *,
    key_dim: int,
    eps: float = 1e-5,
    scale: float | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cascaded group attention with live BatchNorm (training): each convolution is normalised by the statistics of this batch.

    The statistics of a qkv convolution are never taken from its output: with ``f`` its input, mean ``W mean(f)`` and variance ``diag(W Cov(f) W^T)``
    come from the C/heads x C/heads covariance of ``f``, and so do the gradients through them.

    Args:
        x: feature map, [B, C, H, W]. This and the arguments named alike are as for :func:`cascaded_group_attention`.
        qkv_weights: one per head, [2 * key_dim + d, C / heads].
        qkv_norms: per head the BatchNorm's (weight, bias), each [2 * key_dim + d].
        dw_weights: one per head, [key_dim, 1, k, k].
        dw_norms: per head (weight, bias), each [key_dim].
        attention_bias: table [heads, w * w].
        proj_weight: [C, heads * d].
        proj_norm: (weight, bias), each [C].
        key_dim: channels of q and k of one head.
        eps: added to each variance.
        scale: factor on q^T k.
        window: side of the windows, or None.

    The norms' weights and biases are in the dtype of ``x`` or in float32, and stay so under autocast. Filled-up pixels count in the statistics, as in
    the published model.

    Returns:
        ``(y, mean, var)``: y has the shape, dtype and memory format of ``x``; mean and (biased) var are the batch statistics of all normalised
        channels in float32 (float64 for float64), not differentiable: [heads * (2 * key_dim + d) + heads * key_dim + C], the qkv norms of every
        head, then the depthwise ones, then the projection's. Saved for backward: the arguments, their packed copies, the statistics, per head the
        C/heads x C/heads covariance of its input, and the projection before its norm, [B * nW * w * w, C].

    Raises:
        ValueError: as :func:`cascaded_group_attention`; also a batch with one value a channel.
        TypeError: a wrong or mixed dtype, or something that is no tensor.
        BackendUnavailable: a backend was asked for by name and cannot run.

    Paper: EfficientViT, arXiv 2305.07027, section 3.2; BatchNorm, arXiv 1502.03167, algorithm 1.
    """
    op = "cascaded_group_attention_batch_norm"
    heads = _check_attention(op, x, qkv_weights, dw_weights, attention_bias, proj_weight, key_dim, window)
    qkv_rows, channels = qkv_weights[0].shape[0], x.shape[1]
    _check_norms(op, "qkv_norms", qkv_norms, heads, "[2 * key_dim + d]", qkv_rows)
    _check_norms(op, "dw_norms", dw_norms, heads, "[key_dim]", key_dim)
    _check_norms(op, "proj_norm", [proj_norm], 1, "[C]", channels)
    w = x.shape[2] if window is None else window
    pixels = x.shape[0] * -(-x.shape[2] // w) * -(-x.shape[3] // w) * w * w
    if pixels <= 1:
        raise ValueError(f"{op}: x has shape {_check.shape_of(x)}; batch statistics need more than one value a channel")
    arguments = _autocast_and_check_kind(
        op, x, {"qkv_weights": qkv_weights, "dw_weights": dw_weights, "attention_bias": attention_bias, "proj_weight": proj_weight}
    )
    x = arguments.pop("x")
    accumulation = _define.accumulation_dtype(x.dtype)
    for name, norms in (("qkv_norms", qkv_norms), ("dw_norms", dw_norms), ("proj_norm", [proj_norm])):
        for tensor in (tensor for norm in norms for tensor in norm):
            if tensor.dtype not in (x.dtype, accumulation):
                raise TypeError(f"{op}: {name} holds dtype {tensor.dtype}; it must be {x.dtype}, the dtype of x, or {accumulation}")
            if tensor.device != x.device:
                _check.same_kind(op, name, tensor, "x", x.to(tensor.dtype))
    chosen = backends.select(op, x)
    if chosen == "reference":
        arguments |= {"qkv_norms": qkv_norms, "dw_norms": dw_norms, "proj_norm": proj_norm}
        return reference.cascaded_group_attention_batch_norm(x, **arguments, key_dim=key_dim, eps=eps, scale=scale, window=window)

    def stacked(norms: Sequence[tuple[Tensor, Tensor]], part: int) -> Tensor:
        return torch.stack([norm[part] for norm in norms]).to(accumulation)

    packed = pack(**(arguments | {"qkv_biases": None, "dw_biases": None, "proj_bias": None}), key_dim=key_dim)
    tensors = (
        x,
        packed.qkv_weight,
        stacked(qkv_norms, 0),
        stacked(qkv_norms, 1),
        packed.dw_weight,
        stacked(dw_norms, 0),
        stacked(dw_norms, 1),
        packed.attention_bias,
        packed.proj_weight,
        proj_norm[0].to(accumulation),
        proj_norm[1].to(accumulation),
    )
    outputs = _define.call(
        torch.ops.vitkernels.cascaded_group_attention_batch_norm.default,
        _define.differentiable(*tensors),
        *tensors,
        packed.kernel_sizes,
        key_dim,
        key_dim**-0.5 if scale is None else scale,
        w,
        eps,
    )
    return outputs[0], outputs[1], outputs[2]


def _check_attention(
    op: str, x: Tensor, qkv_weights: Tensors, dw_weights: Tensors, attention_bias: Tensor, proj_weight: Tensor, key_dim: int, window: int | None
) -> int:
    """What both functions take; returns the number of heads."""
    _check.is_tensor(op, "x", x, "[B, C, H, W]")
    _check.strided(op, "x", x)
    _check.floating(op, "x", x)
    if x.dim() != 4:
        raise ValueError(f"{op}: x has shape {_check.shape_of(x)}; it must be 4-dimensional, [B, C, H, W]")
    _, channels, height, width = x.shape
    _check_sequence(op, "qkv_weights", qkv_weights)
    heads = len(qkv_weights)
    if heads == 0 or channels % heads:
        raise ValueError(f"{op}: qkv_weights has {heads} entries, one per head, and x has {channels} channels; the heads must divide the channels")
    if not isinstance(key_dim, int) or key_dim < 1:
        raise ValueError(f"{op}: key_dim is {key_dim!r}; it must be a positive int")
    split = channels // heads
    _check.is_tensor(op, "qkv_weights[0]", qkv_weights[0], "[2 * key_dim + d, C / heads]")
    value_dim = qkv_weights[0].shape[0] - 2 * key_dim if qkv_weights[0].dim() else 0
    if value_dim < 1:
        raise ValueError(
            f"{op}: qkv_weights[0] has shape {_check.shape_of(qkv_weights[0])}; with key_dim {key_dim} it must be [2 * key_dim + d, C / heads]"
            f" with more than {2 * key_dim} rows"
        )
    if heads > 1 and value_dim != split:
        raise ValueError(
            f"{op}: qkv_weights[0] has shape {_check.shape_of(qkv_weights[0])}, so with key_dim {key_dim} its value dim is {value_dim}; a head's"
            f" output is added to the next split of x, so it must be C / heads = {split}: shape [{2 * key_dim + split}, {split}]"
        )
    for i, weight in enumerate(qkv_weights):
        _check_matrix(op, f"qkv_weights[{i}]", weight, "[2 * key_dim + d, C / heads]", 2 * key_dim + value_dim, split)
    _check_sequence(op, "dw_weights", dw_weights)
    _check_length(op, "dw_weights", dw_weights, heads)
    for i, weight in enumerate(dw_weights):
        _check.is_tensor(op, f"dw_weights[{i}]", weight, "[key_dim, 1, k, k]")
        side = weight.shape[-1] if weight.dim() == 4 else 0
        if weight.shape != (key_dim, 1, side, side) or side % 2 == 0:
            needs = f"[key_dim, 1, k, k] with key_dim {key_dim} and k odd"
            raise ValueError(f"{op}: dw_weights[{i}] has shape {_check.shape_of(weight)}; it must be {needs}")
    if window is None:
        if height != width or height < 1:
            raise ValueError(f"{op}: x has shape {_check.shape_of(x)}; without window the map is one window, so it must be square and not empty")
        window = height
    elif not isinstance(window, int) or window < 1:
        raise ValueError(f"{op}: window is {window!r}; it must be a positive int or None")
    elif window > height or window > width:
        raise ValueError(f"{op}: window is {window}, larger than the map of x, which has shape {_check.shape_of(x)}")
    _check.is_tensor(op, "attention_bias", attention_bias, "[heads, window * window]")
    _check.has_shape(op, "attention_bias", attention_bias, (heads, window * window), "[heads, window * window]")
    _check_matrix(op, "proj_weight", proj_weight, "[C, heads * d]", channels, heads * value_dim)
    return heads


def _check_sequence(op: str, name: str, value: object) -> None:
    if isinstance(value, Tensor) or not isinstance(value, Sequence):
        raise TypeError(f"{op}: {name} is a {type(value).__name__}; it must be a list with one entry per head")


def _check_length(op: str, name: str, value: Sequence[Any], heads: int) -> None:
    if len(value) != heads:
        raise ValueError(f"{op}: {name} has {len(value)} entries, qkv_weights {heads}; both need one per head")


def _check_matrix(op: str, name: str, weight: Tensor, symbols: str, rows: int, columns: int) -> None:
    _check.is_tensor(op, name, weight, symbols)
    if weight.dim() == 4 and weight.shape[2:] == (1, 1):
        _check.has_shape(op, name, weight, (rows, columns, 1, 1), symbols[:-1] + ", 1, 1]")
    else:
        _check.has_shape(op, name, weight, (rows, columns), symbols)


def _check_list(
    op: str, name: str, values: Sequence[Tensor | None] | None, heads: int, symbols: str, shape: tuple[int, ...]
) -> Sequence[Tensor | None] | None:
    if values is None:
        return None
    _check_sequence(op, name, values)
    _check_length(op, name, values, heads)
    for i, value in enumerate(values):
        if value is not None:
            _check.is_tensor(op, f"{name}[{i}]", value, symbols)
            _check.has_shape(op, f"{name}[{i}]", value, shape, symbols)
    return None if all(value is None for value in values) else values


def _check_norms(op: str, name: str, norms: Sequence[tuple[Tensor, Tensor]], count: int, symbols: str, length: int) -> None:
    _check_sequence(op, name, norms)
    _check_length(op, name, norms, count)
    for i, norm in enumerate(norms):
        label = name if name == "proj_norm" else f"{name}[{i}]"
        if not isinstance(norm, tuple | list) or len(norm) != 2:
            raise TypeError(f"{op}: {label} is a {type(norm).__name__}; it must be a pair (weight, bias), each {symbols}")
        for part, tensor in zip(("weight", "bias"), norm, strict=True):
            _check.is_tensor(op, f"the {part} of {label}", tensor, symbols)
            _check.has_shape(op, f"the {part} of {label}", tensor, (length,), symbols)


def _autocast_and_check_kind(op: str, x: Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
    """``x`` and the arguments, tensors and lists of them, cast as autocast would; all of one dtype and device."""
    if (dtype := _define.autocast_of(x)) is not None:
        x = _define.cast(x, dtype)

    def checked(name: str, value: Any) -> Any:
        if value is None:
            return None
        if not isinstance(value, Tensor):
            return [checked(f"{name}[{i}]", entry) for i, entry in enumerate(value)]
        if dtype is not None:
            value = _define.cast(value, dtype)
        if value.dtype is not x.dtype or value.device != x.device:
            _check.same_kind(op, name, value, "x", x)
        return value

    return {"x": x, **{name: checked(name, value) for name, value in arguments.items()}}


class Packed(NamedTuple):
    """The weights of all heads in one tensor each, as the kernels take them.

    ``qkv_weight`` and ``proj_weight`` may have any strides; the native kernels read them without a copy where the output channel is the innermost.
    """

    qkv_weight: Tensor  # [heads, 2 * key_dim + d, C / heads]
    qkv_bias: Tensor | None  # [heads, 2 * key_dim + d]
    dw_weight: Tensor  # flat: head after head, each [key_dim, k, k]
    dw_bias: Tensor | None  # [heads, key_dim]
    attention_bias: Tensor  # [heads, w * w]
    proj_weight: Tensor  # [C, heads * d]
    proj_bias: Tensor | None  # [C]
    kernel_sizes: list[int]  # one k per head
    key_dim: int


def pack(
    qkv_weights: Tensors,
    qkv_biases: Sequence[Tensor | None] | None,
    dw_weights: Tensors,
    dw_biases: Sequence[Tensor | None] | None,
    attention_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    key_dim: int,
) -> Packed:
    """The checked arguments of :func:`cascaded_group_attention` as :class:`Packed`; differentiable."""
    return Packed(
        torch.stack([weight.reshape(weight.shape[:2]) for weight in qkv_weights]),
        _stack_biases(qkv_biases),
        torch.cat([weight.flatten() for weight in dw_weights]),
        _stack_biases(dw_biases),
        attention_bias,
        proj_weight.reshape(proj_weight.shape[:2]),
        proj_bias,
        [weight.shape[-1] for weight in dw_weights],
        key_dim,
    )


def _stack_biases(biases: Sequence[Tensor | None] | None) -> Tensor | None:
    if biases is None:
        return None
    like = next(bias for bias in biases if bias is not None)
    return torch.stack([torch.zeros_like(like) if bias is None else bias for bias in biases])


def unpack(packed: Packed) -> dict[str, Any]:
    """The arguments of :func:`cascaded_group_attention` that :func:`pack` took, as views."""
    sizes = [packed.key_dim * k * k for k in packed.kernel_sizes]
    return {
        "qkv_weights": packed.qkv_weight.unbind(),
        "qkv_biases": None if packed.qkv_bias is None else packed.qkv_bias.unbind(),
        "dw_weights": [flat.view(packed.key_dim, 1, k, k) for flat, k in zip(packed.dw_weight.split(sizes), packed.kernel_sizes, strict=True)],
        "dw_biases": None if packed.dw_bias is None else packed.dw_bias.unbind(),
        "attention_bias": packed.attention_bias,
        "proj_weight": packed.proj_weight,
        "proj_bias": packed.proj_bias,
        "key_dim": packed.key_dim,
    }


def attend(x: Tensor, packed: Packed, *, scale: float | None = None, window: int | None = None) -> Tensor:
    """:func:`cascaded_group_attention` of weights packed before, without its checks: what a model calls that keeps them packed."""
    chosen = _chosen(x, window)
    if chosen == "reference":
        return reference.cascaded_group_attention(x, **unpack(packed), scale=scale, window=window)
    namespace = torch.ops.vitkernels_triton if chosen == "triton" else torch.ops.vitkernels
    *tensors, kernel_sizes, key_dim = packed
    return _define.call(
        namespace.cascaded_group_attention.default,
        _define.differentiable(x, *tensors),
        x,
        *tensors,
        kernel_sizes,
        key_dim,
        key_dim**-0.5 if scale is None else scale,
        x.shape[2] if window is None else window,
    )


def _chosen(x: Tensor, window: int | None) -> str:
    """The backend for this call: ``select`` does not see the window."""
    op = "cascaded_group_attention"
    chosen = backends.select(op, x)
    if chosen == "cuda" and (side := x.shape[2] if window is None else window) > CUDA_WINDOW:
        if backends.requested() == "cuda":
            raise backends.BackendUnavailable(f"backend 'cuda' cannot run {op}: window is {side}, and its kernels take windows up to {CUDA_WINDOW}")
        return "triton" if backends.why_not(op, "triton", x.device, x.dtype, auto=True) is None else "reference"
    return chosen


# --- vitkernels::cascaded_group_attention ------------------------------------------------------------------------------------------

_WEIGHTS = (
    "Tensor qkv_weight, Tensor? qkv_bias, Tensor dw_weight, Tensor? dw_bias, Tensor attention_bias, Tensor proj_weight, Tensor? proj_bias,"
    " int[] kernel_sizes, int key_dim, float scale, SymInt window"
)
_OPTIONS = 4  # kernel_sizes, key_dim, scale, window


def _fake(x: Tensor, qkv_weight: Tensor, *_: Any) -> Tensor:
    torch._check(x.dim() == 4, lambda: f"x must be 4-dimensional, got {x.dim()}")
    torch._check(qkv_weight.dim() == 3, lambda: f"qkv_weight must be [heads, 2 * key_dim + d, C / heads], got {tuple(qkv_weight.shape)}")
    return torch.empty_like(x)


def _backward_fake(
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
    heads = qkv_weight.shape[0]
    shapes = (
        qkv_weight.shape,
        qkv_weight.shape[:2],
        dw_weight.shape,
        (heads, key_dim),
        attention_bias.shape,
        proj_weight.shape,
        proj_weight.shape[:1],
    )
    return (torch.empty_like(x) if need_x else x.new_empty(0), *(x.new_empty(shape if need_weights else 0) for shape in shapes))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _proj_bias, ctx.kernel_sizes, ctx.key_dim, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(op: Any, ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:-_OPTIONS]
    if grad_y is None:
        return (None,) * (len(needed) + _OPTIONS)
    grads = op(grad_y, *ctx.saved_tensors, ctx.kernel_sizes, ctx.key_dim, ctx.scale, ctx.window, needed[0], any(needed[1:]))
    return (*(g if n else None for g, n in zip(grads, needed, strict=True)), *(None,) * _OPTIONS)


_define.define(
    "cascaded_group_attention",
    schema=f"(Tensor x, {_WEIGHTS}) -> Tensor",
    backward_schema=(
        "(Tensor grad_y, Tensor x, Tensor qkv_weight, Tensor? qkv_bias, Tensor dw_weight, Tensor? dw_bias, Tensor attention_bias, Tensor proj_weight,"
        " int[] kernel_sizes, int key_dim, float scale, SymInt window, bool need_x, bool need_weights)"
        " -> (Tensor grad_x, Tensor grad_qkv_weight, Tensor grad_qkv_bias, Tensor grad_dw_weight, Tensor grad_dw_bias, Tensor grad_attention_bias,"
        " Tensor grad_proj_weight, Tensor grad_proj_bias)"
    ),
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup,
    backward=_backward,
)


# --- vitkernels::cascaded_group_attention_batch_norm -------------------------------------------------------------------------------

_NORM_TENSORS = (
    "Tensor x, Tensor qkv_weight, Tensor qkv_gamma, Tensor qkv_beta, Tensor dw_weight, Tensor dw_gamma, Tensor dw_beta, Tensor attention_bias,"
    " Tensor proj_weight, Tensor proj_gamma, Tensor proj_beta"
)
_NORM_OPTIONS = "int[] kernel_sizes, int key_dim, float scale, SymInt window, float eps"


def _norm_fake(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_gamma: Tensor,
    qkv_beta: Tensor,
    dw_weight: Tensor,
    dw_gamma: Tensor,
    dw_beta: Tensor,
    attention_bias: Tensor,
    proj_weight: Tensor,
    proj_gamma: Tensor,
    proj_beta: Tensor,
    kernel_sizes: list[int],
    key_dim: int,
    scale: float,
    window: int,
    eps: float,
) -> tuple[Tensor, ...]:
    torch._check(x.dim() == 4, lambda: f"x must be 4-dimensional, got {x.dim()}")
    dtype = _define.accumulation_dtype(x.dtype)
    batch, channels, height, width = x.shape
    tokens = batch * ((height + window - 1) // window) * ((width + window - 1) // window) * window * window
    heads, rows, split = qkv_weight.shape
    mean, var = (x.new_empty(heads * (rows + key_dim) + channels, dtype=dtype) for _ in range(2))
    return torch.empty_like(x), mean, var, x.new_empty((tokens, channels), dtype=dtype), x.new_empty((heads, 1 + split, split), dtype=dtype)


def _norm_backward_fake(grad_y: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    x, *parameters = arguments[:10]
    need_x, need_weights = arguments[-2:]
    proj_beta = parameters[-1]  # not an argument, but of the shape of proj_gamma
    return (
        torch.empty_like(x) if need_x else x.new_empty(0),
        *(like.new_empty(like.shape if need_weights else (0,)) for like in (*parameters, proj_beta)),
    )


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _proj_beta, ctx.kernel_sizes, ctx.key_dim, ctx.scale, ctx.window, ctx.eps = inputs
    _, *statistics = output
    ctx.mark_non_differentiable(*statistics)
    ctx.save_for_backward(*tensors, *statistics)
    ctx.set_materialize_grads(False)


def _norm_backward(op: Any, ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:-5]
    if grad_y is None:
        return (None,) * (len(needed) + 5)
    grads = op(grad_y, *ctx.saved_tensors, ctx.kernel_sizes, ctx.key_dim, ctx.scale, ctx.window, ctx.eps, needed[0], any(needed[1:]))
    return (*(g if n else None for g, n in zip(grads, needed, strict=True)), *(None,) * 5)


_define.define(
    "cascaded_group_attention_batch_norm",
    schema=f"({_NORM_TENSORS}, {_NORM_OPTIONS}) -> (Tensor y, Tensor mean, Tensor var, Tensor projected, Tensor moments)",
    backward_schema=(
        f"(Tensor grad_y, {_NORM_TENSORS.removesuffix(', Tensor proj_beta')}, Tensor mean, Tensor var, Tensor projected, Tensor moments,"
        f" {_NORM_OPTIONS}, bool need_x, bool need_weights)"
        " -> (Tensor grad_x, Tensor grad_qkv_weight, Tensor grad_qkv_gamma, Tensor grad_qkv_beta, Tensor grad_dw_weight, Tensor grad_dw_gamma,"
        " Tensor grad_dw_beta, Tensor grad_attention_bias, Tensor grad_proj_weight, Tensor grad_proj_gamma, Tensor grad_proj_beta)"
    ),
    fake=_norm_fake,
    backward_fake=_norm_backward_fake,
    setup_context=_norm_setup,
    backward=_norm_backward,
    # The norms' parameters, and what becomes of them, stay in float32 under autocast, as they do in torch's BatchNorm.
    cast_by_autocast=(0, 1, 4, 7, 8),
)

_define.implement_in_triton("cascaded_group", "cascaded_group_attention")
