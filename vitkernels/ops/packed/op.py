"""Attention over packed sequences (NaViT, arXiv 2307.06304, section 2.1): checks, choice of backend, and the autograd op.

Reads top to bottom: the two public functions, their checks, then the torch.library op behind both. The derivation is in this folder's README.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitkernels import backends
from vitkernels.ops import _check, _define
from vitkernels.ops.packed import layout as _layout
from vitkernels.ops.packed import reference
from vitkernels.ops.packed.layout import PackedLayout

backends.declare("varlen_attention", backends.Support())
backends.declare("packed_attention", backends.Support())

NORMS = {None: 0, "rms": 1, "l2": 2, "layer": 3}
_NORM_EPS = {None: 0.0, "rms": 1e-6, "l2": 1e-12, "layer": 1e-5}


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout | None = None,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    qk_norm: str | None = None,
    q_norm_weight: Tensor | None = None,
    q_norm_bias: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    k_norm_bias: Tensor | None = None,
    norm_eps: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q k^T scale + bias) v within each of many sequences of any lengths that lie one after the other, without any mask.

    Args:
        q: [T_q, H, D], any strides: the queries of all sequences.
        k: [T_k, H_k, D]; H_k divides H (grouped heads: head h reads the keys of head h H_k / H).
        v: [T_k, H_k, D_v].
        layout: where each sequence lies; build it once per batch, see :class:`PackedLayout`.
        cu_seqlens_q: int [S + 1], in place of ``layout``, as flash-attn takes it: from 0, not decreasing, ending at T_q. Checked on the CPU; on a GPU
            that would wait for it, and a :class:`PackedLayout` checks once.
        cu_seqlens_k: the same of the keys; default ``cu_seqlens_q``.
        max_seqlen_q: the longest sequence; accepted as flash-attn has it, needed nowhere.
        max_seqlen_k: the same of the keys.
        seqused_k: int [S], with ``cu_seqlens_q``: only the first ``seqused_k[s]`` keys of sequence s count.
        bias: [H or 1, M_q, M_k], at least as long as the longest sequences: added to the logits of every sequence by the position in it. -inf hides
            a key. Differentiable.
        scale: of the logits; default D ** -0.5.
        dropout_p: probability of dropping an attention weight. The mask is a function of PyTorch's generator (one draw a call) and of the place of
            the weight, the same on every backend, and stored nowhere.
        return_lse: also return the logsumexp of each query's logits.
        qk_norm: each head's query and key is normalised first: ``"rms"`` as ``F.rms_norm``, ``"l2"`` as ``F.normalize`` times sqrt(D) (the RMSNorm of
            vit-pytorch), ``"layer"`` as ``F.layer_norm``. Default: not.
        q_norm_weight: [D] or [H, D], multiplies the normalised query. Like the other three it may be of any floating dtype.
        q_norm_bias: [D] or [H, D], added to it.
        k_norm_weight: [D] or [H_k, D].
        k_norm_bias: [D] or [H_k, D].
        norm_eps: default 1e-6 (``"rms"``), 1e-12 (``"l2"``: least norm), 1e-5 (``"layer"``).

    q, k and v share one dtype (float32, bfloat16, float16, on the CPU also float64) and one device; logits, softmax and sums are in float32 (float64
    for float64). Autocast casts q, k and v.

    Returns:
        [T_q, H, D_v], contiguous; with ``return_lse`` also [H, T_q] in float32 (float64), natural logarithm. A query that sees no key, and padding
        beyond the last sequence, gives 0 and -inf. Differentiable once in q, k, v, bias and the norms' weights, through the logsumexp, too. Saved for
        backward: the inputs, the output and H T_q numbers.

    Raises:
        ValueError: a wrong shape, a layout of other totals, bad cumulative lengths, a probability outside [0, 1], a mix of devices.
        TypeError: a wrong or mixed dtype, something that is no tensor, neither or both of layout and cu_seqlens_q.
        BackendUnavailable: a backend was asked for by name and cannot run.

    Paper: NaViT, arXiv 2307.06304, section 2.1, masked self-attention; the softmax as in FlashAttention-2, arXiv 2307.08691, section 3.
    """
    op = "varlen_attention"
    for name, value in (("q", q), ("k", k), ("v", v)):
        _check_heads(op, name, value, 3, _SYMBOLS[name])
    if layout is None:
        if cu_seqlens_q is None:
            raise TypeError(f"{op}: neither layout nor cu_seqlens_q is given; one of them must be")
        layout = _from_cu_seqlens(op, q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k)
    elif not isinstance(layout, PackedLayout):
        raise TypeError(f"{op}: layout is a {type(layout).__name__}; it must be a PackedLayout (cumulative lengths go to cu_seqlens_q=)")
    elif any(x is not None for x in (cu_seqlens_q, cu_seqlens_k, seqused_k)):
        raise TypeError(f"{op}: both layout and cu_seqlens or seqused_k are given; it must be one of them")
    options = _Options(bias, scale, dropout_p, qk_norm, (q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias), norm_eps)
    out, lse = _run(op, q, k, v, layout, options)
    return (out, lse.to(_define.accumulation_dtype(q.dtype))) if return_lse else out


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_ids: Tensor | PackedLayout,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    qk_norm: str | None = None,
    q_norm_weight: Tensor | None = None,
    q_norm_bias: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    k_norm_bias: Tensor | None = None,
    norm_eps: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`varlen_attention` on rows of several images and padding, as existing NaViT code has them, without the [R, S, S] mask.

    Args:
        q: [R, S, H, D]; free of copies where R and S are one dimension in memory, as in any slice of a projection's [R, S, 3, H, D].
        k: [R, S, H_k, D].
        v: [R, S, H_k, D_v].
        image_ids: integers [R, S]: tokens of one row with one id see each other; negative is padding, which costs nothing and gives 0. Or the
            :meth:`PackedLayout.from_image_ids` of them, built once for all layers.

        bias: [H or 1, M_q, M_k], added to the logits by the position within the image.
        scale: of the logits; default D ** -0.5.
        dropout_p: probability of dropping an attention weight.
        return_lse: also return the logsumexp of each query's logits.
        qk_norm: ``"rms"``, ``"l2"``, ``"layer"`` or None.
        q_norm_weight: [D] or [H, D].
        q_norm_bias: [D] or [H, D].
        k_norm_weight: [D] or [H_k, D].
        k_norm_bias: [D] or [H_k, D].
        norm_eps: of the norm.

    Options, dtypes and errors are those of :func:`varlen_attention`.

    Returns:
        [R, S, H, D_v]; with ``return_lse`` also [R, H, S].

    Paper: NaViT, arXiv 2307.06304, section 2.1.
    """
    op = "packed_attention"
    for name, value in (("q", q), ("k", k), ("v", v)):
        _check_heads(op, name, value, 4, "[R, S, H, D]" if name == "q" else "[R, S, H_k, D]" if name == "k" else "[R, S, H_k, D_v]")
        _check.has_shape(op, name, value, (*q.shape[:2], *value.shape[2:]), "[R, S, heads, head_dim] with q's R and S")
    rows, length = q.shape[:2]
    if isinstance(image_ids, PackedLayout):
        layout = image_ids
    else:
        _check.is_tensor(op, "image_ids", image_ids, "[R, S], or a PackedLayout")
        _check.has_shape(op, "image_ids", image_ids, (rows, length), "[R, S]")
        if image_ids.device != q.device:
            raise ValueError(f"{op}: image_ids is on {image_ids.device}; it must be on {q.device}, the device of q")
        layout = PackedLayout.from_image_ids(image_ids)
    options = _Options(bias, scale, dropout_p, qk_norm, (q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias), norm_eps)
    out, lse = _run(op, q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), layout, options)
    out = out.unflatten(0, (rows, length))
    return (out, lse.to(_define.accumulation_dtype(q.dtype)).unflatten(1, (rows, length)).transpose(0, 1)) if return_lse else out


@dataclass(frozen=True)
class _Options:
    """What both functions take beside the tokens and the layout."""

    bias: Tensor | None
    scale: float | None
    dropout_p: float
    qk_norm: str | None
    norm_weights: tuple[Tensor | None, ...]
    norm_eps: float | None


_SYMBOLS = {"q": "[T_q, H, D]", "k": "[T_k, H_k, D]", "v": "[T_k, H_k, D_v]"}


def _run(op: str, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, o: _Options) -> tuple[Tensor, Tensor]:
    """Check, choose, call."""
    if (dtype := _define.autocast_of(q)) is not None:
        q, k, v = (_define.cast(t, dtype) for t in (q, k, v))
    _check_kinds(op, q, k, v)
    _check_layout(op, q, k, layout)
    if o.dropout_p != 0.0:
        _check.probability(op, "dropout_p", o.dropout_p)
    if o.qk_norm not in NORMS:
        raise ValueError(f"{op}: qk_norm is {o.qk_norm!r}; it must be one of {', '.join(map(repr, NORMS))}")
    weights = o.norm_weights
    if o.qk_norm is not None or any(w is not None for w in weights):
        weights = _norm_weights(op, q, k, o)
    bias = None if o.bias is None else _checked_bias(op, o.bias, q, layout)
    scale = q.shape[2] ** -0.5 if o.scale is None else float(o.scale)
    eps = _NORM_EPS[o.qk_norm] if o.norm_eps is None else float(o.norm_eps)
    seed = torch.randint(2**62, (), device=q.device) if o.dropout_p > 0 else None

    chosen = backends.select(op, q)
    if chosen == "reference":
        return reference.varlen_attention(
            q, k, v, layout, bias=bias, scale=scale, dropout_p=o.dropout_p, seed=seed, qk_norm=o.qk_norm, norm_weights=weights, norm_eps=eps,
            dense=_layout.traced(q),  # a loop would need the lengths as numbers
        )  # fmt: skip
    work = layout.work
    if chosen == "triton":
        if work is None:
            work = _layout.work_list(layout.cu_seqlens_q, layout.cu_seqlens_k, layout.seqused_k, layout.total_q, layout.total_k)
        namespace = torch.ops.vitkernels_triton
    else:
        work, namespace = None, torch.ops.vitkernels
    return _define.call(
        namespace.varlen_attention.default,
        _define.differentiable(q, k, v, bias, *weights),
        *(q, k, v, layout.cu_seqlens_q, layout.cu_seqlens_k, layout.seqused_k, work, bias, *weights),
        *(NORMS[o.qk_norm], eps, scale, float(o.dropout_p), seed),
    )


def _check_heads(op: str, name: str, value: Tensor, dims: int, symbols: str) -> None:
    _check.is_tensor(op, name, value, symbols)
    _check.strided(op, name, value)
    _check.floating(op, name, value)
    if value.dim() != dims:
        raise ValueError(f"{op}: {name} has shape {_check.shape_of(value)}; it must be {dims}-dimensional, {symbols}")


def _check_kinds(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Shapes, dtypes and devices of the flattened tokens."""
    if k.dtype is not q.dtype or k.device != q.device:
        _check.same_kind(op, "k", k, "q", q)
    if v.dtype is not q.dtype or v.device != q.device:
        _check.same_kind(op, "v", v, "q", q)
    heads, width = q.shape[1:]
    if k.shape[2] != width or width == 0:
        raise ValueError(f"{op}: k has head_dim {k.shape[2]}; it must be D = {width} of q, at least 1")
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(f"{op}: k has {k.shape[1]} heads; the number must divide H = {heads}, the heads of q")
    if v.shape[:2] != k.shape[:2] or v.shape[2] == 0:
        raise ValueError(f"{op}: v has shape {_check.shape_of(v)}; it must have the rows and heads of k, [{k.shape[0]}, {k.shape[1]}, D_v >= 1]")


def _check_layout(op: str, q: Tensor, k: Tensor, layout: PackedLayout) -> None:
    for side, rows, total in (("q", q, layout.total_q), ("k", k, layout.total_k)):
        if rows.shape[0] != total:
            raise ValueError(f"{op}: {side} has {rows.shape[0]} token rows; it must have {total}, total_{side} of the layout")
    if layout.cu_seqlens_q.device != q.device:
        raise ValueError(f"{op}: the layout is on {layout.cu_seqlens_q.device}; it must be on {q.device}, the device of q (layout.to(...))")


def _from_cu_seqlens(
    op: str,
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    seqused_k: Tensor | None,
) -> PackedLayout:
    total_q, total_k = q.shape[0], k.shape[0]
    if cu_seqlens_k is None and total_k != total_q:
        raise ValueError(f"{op}: k has {total_k} token rows and q {total_q}; cu_seqlens_k must be given where they differ")
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    sides = (("q", cu_seqlens_q, total_q), ("k", cu_seqlens_k, total_k))
    readable = q.device.type == "cpu" and not _layout.traced(q)
    for side, cu_seqlens, total in sides:
        _layout.check_cu_seqlens(op, f"cu_seqlens_{side}", cu_seqlens)
        if cu_seqlens.device != q.device:
            raise ValueError(f"{op}: cu_seqlens_{side} is on {cu_seqlens.device}; it must be on {q.device}, the device of q")
        if readable and int(cu_seqlens[-1]) != total:
            raise ValueError(f"{op}: cu_seqlens_{side} ends at {int(cu_seqlens[-1])}; it must end at {total}, the rows of {side}")
    if readable:
        return PackedLayout.from_cu_seqlens(
            cu_seqlens_q, cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, total_q=total_q, total_k=total_k, seqused_k=seqused_k
        )
    cu_q, cu_k, used = _layout.as_int32(cu_seqlens_q, cu_seqlens_k, seqused_k)
    return PackedLayout(cu_q, cu_k, max_seqlen_q or total_q, max_seqlen_k or total_k, total_q, total_k, used)


def _norm_weights(op: str, q: Tensor, k: Tensor, o: _Options) -> tuple[Tensor | None, ...]:
    """The norms' weights and biases as [heads, D] in the accumulation dtype, which is how the kernels take them."""
    found: list[Tensor | None] = []
    names = ("q_norm_weight", "q_norm_bias", "k_norm_weight", "k_norm_bias")
    for name, weight, side in zip(names, o.norm_weights, (q, q, k, k), strict=True):
        if weight is None:
            found.append(None)
            continue
        if o.qk_norm is None:
            raise ValueError(f"{op}: {name} is given and qk_norm is None; it must be 'rms', 'l2' or 'layer'")
        heads, width = side.shape[1:]
        _check.is_tensor(op, name, weight, "[D] or [heads, D]")
        _check.floating(op, name, weight)
        if tuple(weight.shape) not in ((width,), (heads, width)):
            raise ValueError(f"{op}: {name} has shape {_check.shape_of(weight)}; it must be [D] = [{width}] or [heads, D] = [{heads}, {width}]")
        if weight.device != q.device:
            raise ValueError(f"{op}: {name} is on {weight.device}; it must be on {q.device}, the device of q")
        found.append(weight.to(_define.accumulation_dtype(q.dtype)).expand(heads, width))
    return tuple(found)


def _checked_bias(op: str, bias: Tensor, q: Tensor, layout: PackedLayout) -> Tensor:
    _check.is_tensor(op, "bias", bias, "[H or 1, M_q, M_k]")
    _check.floating(op, "bias", bias)
    heads = q.shape[1]
    if bias.dim() != 3 or bias.shape[0] not in (1, heads):
        raise ValueError(f"{op}: bias has shape {_check.shape_of(bias)}; it must be [H or 1, M_q, M_k] with H = {heads}")
    if bias.shape[1] < layout.max_seqlen_q or bias.shape[2] < layout.max_seqlen_k:
        raise ValueError(
            f"{op}: bias has shape {_check.shape_of(bias)}; it must reach the longest sequences, "
            f"[H or 1, >= {layout.max_seqlen_q}, >= {layout.max_seqlen_k}]"
        )
    if bias.device != q.device:
        raise ValueError(f"{op}: bias is on {bias.device}; it must be on {q.device}, the device of q")
    return bias.to(_define.accumulation_dtype(q.dtype)).expand(heads, -1, -1)


# --- vitkernels::varlen_attention -----------------------------------------------------------------------------------------------------


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    torch._check(q.dim() == 3 and k.dim() == 3 and v.dim() == 3, lambda: "q, k and v must be 3-dimensional")
    torch._check(q.shape[2] == k.shape[2], lambda: f"q and k have head_dim {q.shape[2]} and {k.shape[2]}")
    rows, heads, _d = q.shape
    return q.new_empty((rows, heads, v.shape[2])), q.new_empty((heads, rows), dtype=torch.float64)


def _backward_fake(
    grad_out: Tensor | None, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, seqused_k: Tensor | None, work: Tensor | None, bias: Tensor | None, q_weight: Tensor | None, q_bias: Tensor | None,
    k_weight: Tensor | None, k_bias: Tensor | None, qk_norm: int, norm_eps: float, scale: float, dropout_p: float, seed: Tensor | None,
    need_q: bool, need_k: bool, need_v: bool, need_bias: bool, need_norm: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    def grad(needed: bool, like: Tensor | None) -> Tensor:
        if not needed or like is None:
            return lse.new_empty((0,))
        return like.new_empty(like.shape)

    norms = (q_weight, q_bias, k_weight, k_bias)
    return (grad(need_q, q), grad(need_k, k), grad(need_v, v), grad(need_bias, bias), *(grad(need_norm, w) for w in norms))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.qk_norm, ctx.norm_eps, ctx.scale, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(*tensors, seed, *output)
    ctx.set_materialize_grads(False)


def _backward(op: Any, ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, cu_q, cu_k, used, work, bias, *norms, seed, out, lse = ctx.saved_tensors
    nothing = (None,) * 17
    if grad_out is None and grad_lse is None:
        return nothing
    need_q, need_k, need_v, need_bias = (ctx.needs_input_grad[i] for i in (0, 1, 2, 7))
    need_norms = ctx.needs_input_grad[8:12]
    grad_q, grad_k, grad_v, grad_bias, *grad_norms = op(
        *(grad_out, grad_lse, q, k, v, out, lse, cu_q, cu_k, used, work, bias, *norms),
        *(ctx.qk_norm, ctx.norm_eps, ctx.scale, ctx.dropout_p, seed, need_q, need_k, need_v, need_bias, any(need_norms)),
    )
    return (
        *(grad_q if need_q else None, grad_k if need_k else None, grad_v if need_v else None),
        *(None, None, None, None, grad_bias if need_bias else None),
        *(g if needed else None for g, needed in zip(grad_norms, need_norms, strict=True)),
        *(None, None, None, None, None),
    )


_NORM_SCHEMA = "Tensor? q_norm_weight, Tensor? q_norm_bias, Tensor? k_norm_weight, Tensor? k_norm_bias"
_LAYOUT_SCHEMA = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? seqused_k, Tensor? work"
_define.define(
    "varlen_attention",
    schema=(
        f"(Tensor q, Tensor k, Tensor v, {_LAYOUT_SCHEMA}, Tensor? bias, {_NORM_SCHEMA},"
        " int qk_norm, float norm_eps, float scale, float dropout_p, Tensor? seed) -> (Tensor out, Tensor lse)"
    ),
    backward_schema=(
        f"(Tensor? grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_LAYOUT_SCHEMA}, Tensor? bias, {_NORM_SCHEMA},"
        " int qk_norm, float norm_eps, float scale, float dropout_p, Tensor? seed,"
        " bool need_q, bool need_k, bool need_v, bool need_bias, bool need_norm)"
        " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias,"
        " Tensor grad_q_norm_weight, Tensor grad_q_norm_bias, Tensor grad_k_norm_weight, Tensor grad_k_norm_bias)"
    ),
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup,
    backward=_backward,
    cast_by_autocast=(0, 1, 2),
)

_define.implement_in_triton("packed", "varlen_attention")
