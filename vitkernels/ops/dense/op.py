"""Attention of a batch, a drop-in for ``F.scaled_dot_product_attention``: checks, choice of backend, and the autograd op.

Reads top to bottom: the public function, its checks, then the torch.library op behind it. The derivation is in this folder's README.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels import backends
from vitkernels.ops import _check, _define
from vitkernels.ops.dense import reference

_FEW_LOGITS = 4096


def _for_torch(
    chosen: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    key_padding: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> str | None:
    """Why ``auto`` hands a call to ``F.scaled_dot_product_attention``, or None.

    On a GPU where the alternative is the definition, which forms the logits; on a CPU in float32 training, where the logits are so few that autograd
    in Python costs more than the kernels (benchmarks/sweep_attention.py: one image of 16 tokens). What PyTorch has no fused kernel for stays, and so
    does a bias in more digits than q has, which PyTorch's would round.
    """
    if chosen == "native" and not torch.is_grad_enabled():  # asked first: inference on few tokens is where this rule's own time counts
        return None
    if return_lse or key_padding is not None or k.shape[3] != v.shape[3] or q.dtype is torch.float64:
        return None
    if bias is not None and (chosen == "native" or bias.dtype not in (_define.autocast_of(q) or q.dtype, torch.bool)):
        return None
    if chosen == "native":
        if torch.compiler.is_compiling() or q.dtype is not torch.float32 or dropout_p > 0:
            return None
        if q.shape[:3].numel() * k.shape[2] > _FEW_LOGITS or not _define.differentiable(q, k, v):
            return None
        return "of so few logits PyTorch's own autograd is faster than one written in Python"
    if chosen != "reference" or q.device.type != "cuda":
        return None
    return "on a GPU PyTorch's fused attention is faster than the definition, and the Triton kernels are not proved on this one"


backends.declare("attention", backends.Support(torch=_for_torch))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    key_padding: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q k^T scale + bias) v, as ``F.scaled_dot_product_attention`` has it.

    Args:
        q: [B, H, N, D], any strides: a slice of a projection's [B, N, 3, H, D] is read where it lies.
        k: [B, H_k, M, D]; H_k divides H (grouped heads: head h reads the keys of head h H_k / H).
        v: [B, H_k, M, D_v].
        bias: added to the logits; floating, of any shape that broadcasts to [B, H, N, M]. -inf hides a key. Differentiable in the shape it has:
            a bias that all images share is never expanded, nor is its gradient. Or bool, where True means that the key takes part, as in SDPA.
        key_padding: bool [B, M]: True where a key takes part, False where it is padding (the complement of ``nn.MultiheadAttention``'s
            ``key_padding_mask``; transformers' ``attention_mask.bool()``).
        scale: of the logits; default D ** -0.5.
        dropout_p: probability of dropping an attention weight, always applied, as in SDPA. The mask is a function of PyTorch's generator (one draw a
            call) and of the place of the weight, the same on every backend, and stored nowhere. (Where ``auto`` calls PyTorch's attention, which
            ``vitkernels.explain`` tells, it is PyTorch's.)
        return_lse: also return the logsumexp of each query's logits.

    q, k and v share one dtype (float32, bfloat16, float16, on the CPU also float64) and one device; logits, softmax and sums are in float32 (float64
    for float64). Autocast casts q, k and v.

    Returns:
        [B, H, N, D_v], in memory [B, N, H, D_v], so that the ``transpose(1, 2).reshape(B, N, H * D_v)`` that follows in every model copies nothing;
        with ``return_lse`` also [B, H, N] in float32 (float64), natural logarithm. A query that sees no key gives 0 and -inf, and finite gradients.
        Differentiable once in q, k, v and bias, through the logsumexp, too. Saved for backward: the inputs, the output and B H N numbers.

    Raises:
        ValueError: a wrong shape, a probability outside [0, 1], a mix of devices.
        TypeError: a wrong or mixed dtype, or something that is no tensor.
        BackendUnavailable: a backend was asked for by name and cannot run.

    Paper: An Image is Worth 16x16 Words, arXiv 2010.11929, appendix A; the softmax as in FlashAttention-2, arXiv 2307.08691, section 3.
    """

    def for_torch(chosen: str) -> str | None:
        return _for_torch(chosen, q, k, v, bias=bias, key_padding=key_padding, dropout_p=dropout_p, return_lse=return_lse)

    out, lse = run("attention", q, k, v, bias=bias, key_padding=key_padding, scale=scale, dropout_p=dropout_p, for_torch=for_torch)
    return (out, lse.to(_define.accumulation_dtype(q.dtype))) if return_lse else out


def run(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    key_padding: Tensor | None = None,
    shared_k: Tensor | None = None,
    shared_v: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    for_torch: Callable[[str], str | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Check, choose, call: ``(out, logsumexp)`` of :func:`attention`, for every public op that is one.

    ``shared_k`` [m, H_k, D] and ``shared_v`` [m, H_k, D_v] are keys and values that every image sees behind its own M; bias then has M + m columns,
    and dropout counts them so. They are the caller's to check. ``for_torch`` is the rule by which ``auto`` may call PyTorch's attention, for a caller
    who wants the output alone; the logsumexp is then empty.
    """
    if isinstance(q, Tensor) and (dtype := _define.autocast_of(q)) is not None:
        q, k, v, shared_k, shared_v = (_define.cast(t, dtype) for t in (q, k, v, shared_k, shared_v))
    if not _agree(q, k, v):
        _refuse(op, q, k, v)
    if dropout_p != 0.0:
        _check.probability(op, "dropout_p", dropout_p)
    keys = k.shape[2] + (0 if shared_k is None else shared_k.shape[0])
    if bias is not None:
        bias = _checked_bias(op, bias, q, keys)
    if key_padding is not None:
        _check_padding(op, key_padding, q, k)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    seed = torch.randint(2**62, (), device=q.device) if dropout_p > 0 else None

    chosen = backends.select(op, q, for_torch)
    if chosen == backends.TORCH:
        grouped = q.shape[1] != k.shape[1]
        if bias is not None:
            bias = bias.to(q.dtype)  # as it came
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=scale, enable_gqa=grouped), q.new_empty(0)
    if chosen == "reference":
        return reference.attention(
            q, k, v, bias=bias, key_padding=key_padding, shared_k=shared_k, shared_v=shared_v, scale=scale, dropout_p=dropout_p, seed=seed
        )
    return _define.call(
        _OPS[chosen],
        _define.differentiable(q, k, v, bias, shared_k, shared_v),
        *(q, k, v, bias, key_padding, shared_k, shared_v, scale, float(dropout_p), seed),
    )


def _agree(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether shapes, dtypes and devices are right, in one look: a call on few tokens takes twenty microseconds, of which messages would be five."""
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor) and q.dim() == 4):
        return False
    batch, heads, _, width = shape = q.shape
    if k.shape == shape == v.shape:  # as nearly all have it
        return width > 0 and heads > 0 and _check.of_a_kind(q, k, v)
    if not k.dim() == v.dim() == 4:
        return False
    k_batch, k_heads, keys, k_width = k.shape
    v_batch, v_heads, v_keys, v_width = v.shape
    return (
        (k_batch == batch and v_batch == batch and k_width == width and v_heads == k_heads and v_keys == keys)
        and (width > 0 and v_width > 0 and k_heads > 0 and heads > 0 and heads % k_heads == 0)
        and _check.of_a_kind(q, k, v)
    )


def _refuse(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Say what is wrong."""
    for name, tensor, symbols in (("q", q, "[B, H, N, D]"), ("k", k, "[B, H_k, M, D]"), ("v", v, "[B, H_k, M, D_v]")):
        _check.is_tensor(op, name, tensor, symbols)
        _check.strided(op, name, tensor)
        _check.floating(op, name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{op}: {name} has shape {_check.shape_of(tensor)}; it must be 4-dimensional, {symbols}")
    _check.same_kind(op, "k", k, "q", q)
    _check.same_kind(op, "v", v, "q", q)
    batch, heads, _, width = q.shape
    if k.shape[0] != batch:
        raise ValueError(f"{op}: k has shape {_check.shape_of(k)}; it must have the batch of q, [{batch}, H_k, M, D]")
    if k.shape[3] != width or width == 0:
        raise ValueError(f"{op}: k has head_dim {k.shape[3]}; it must be D = {width} of q, at least 1")
    if k.shape[1] == 0 or heads == 0 or heads % k.shape[1]:
        raise ValueError(f"{op}: k has {k.shape[1]} heads; the number must divide H = {heads}, the heads of q, at least 1")
    if v.shape[:3] != k.shape[:3] or v.shape[3] == 0:
        expected = ", ".join(map(str, k.shape[:3]))
        raise ValueError(f"{op}: v has shape {_check.shape_of(v)}; it must have the batch, heads and tokens of k, [{expected}, D_v >= 1]")


def _checked_bias(op: str, bias: Tensor, q: Tensor, keys: int) -> Tensor:
    """In four dimensions, each of them 1 or whole, and the dtype of the logits."""
    _check.is_tensor(op, "bias", bias, "that broadcasts to [B, H, N, M]")
    if bias.dtype is not torch.bool and not bias.is_floating_point():
        raise TypeError(f"{op}: bias has dtype {bias.dtype}; it must be floating, or bool")
    whole = (*q.shape[:3], keys)
    shape = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    if len(shape) > 4 or any(n not in (1, all_of) for n, all_of in zip(shape, whole, strict=True)):
        raise ValueError(f"{op}: bias has shape {_check.shape_of(bias)}; it must broadcast to [B, H, N, M] = [{', '.join(map(str, whole))}]")
    if bias.device != q.device:
        raise ValueError(f"{op}: bias is on {bias.device}; it must be on {q.device}, the device of q")
    dtype = _define.accumulation_dtype(q.dtype)
    if bias.dtype is torch.bool:
        bias = torch.zeros_like(bias, dtype=dtype).masked_fill(~bias, -torch.inf)
    return bias.to(dtype)[(None,) * (4 - bias.dim())]


def _check_padding(op: str, key_padding: Tensor, q: Tensor, k: Tensor) -> None:
    _check.is_tensor(op, "key_padding", key_padding, "[B, M]")
    if key_padding.dtype is not torch.bool:
        raise TypeError(f"{op}: key_padding has dtype {key_padding.dtype}; it must be torch.bool, True where a key takes part")
    _check.has_shape(op, "key_padding", key_padding, (k.shape[0], k.shape[2]), "[B, M]")
    if key_padding.device != q.device:
        raise ValueError(f"{op}: key_padding is on {key_padding.device}; it must be on {q.device}, the device of q")


# --- vitkernels::attention ------------------------------------------------------------------------------------------------------------


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    torch._check(q.dim() == 4 and k.dim() == 4 and v.dim() == 4, lambda: "q, k and v must be 4-dimensional")
    torch._check(q.shape[3] == k.shape[3], lambda: f"q and k have head_dim {q.shape[3]} and {k.shape[3]}")
    return _define.token_major(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float64)


def _backward_fake(
    grad_out: Tensor | None, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor | None,
    key_padding: Tensor | None, shared_k: Tensor | None, shared_v: Tensor | None, scale: float, dropout_p: float, seed: Tensor | None,
    need_q: bool, need_k: bool, need_v: bool, need_bias: bool, need_shared_k: bool, need_shared_v: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    def grad(needed: bool, like: Tensor | None) -> Tensor:
        return like.new_empty(like.shape) if needed and like is not None else lse.new_empty((0,))

    tokens = (_define.token_major(t, t.shape[3]) if needed else lse.new_empty((0,)) for t, needed in ((q, need_q), (k, need_k), (v, need_v)))
    return (*tokens, grad(need_bias, bias), grad(need_shared_k, shared_k), grad(need_shared_v, shared_v))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(*tensors, seed, *output)
    ctx.set_materialize_grads(False)


def _backward(op: Any, ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, bias, key_padding, shared_k, shared_v, seed, out, lse = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * 10
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 3, 5, 6)]
    grads = op(grad_out, grad_lse, q, k, v, out, lse, bias, key_padding, shared_k, shared_v, ctx.scale, ctx.dropout_p, seed, *needs)
    grad_q, grad_k, grad_v, grad_bias, grad_shared_k, grad_shared_v = (g if needed else None for g, needed in zip(grads, needs, strict=True))
    return (grad_q, grad_k, grad_v, grad_bias, None, grad_shared_k, grad_shared_v, None, None, None)


_OPTIONS = "Tensor? bias, Tensor? key_padding, Tensor? shared_k, Tensor? shared_v, float scale, float dropout_p, Tensor? seed"
_define.define(
    "attention",
    schema=f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    backward_schema=(
        f"(Tensor? grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS},"
        " bool need_q, bool need_k, bool need_v, bool need_bias, bool need_shared_k, bool need_shared_v)"
        " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias, Tensor grad_shared_k, Tensor grad_shared_v)"
    ),
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup,
    backward=_backward,
    cast_by_autocast=(0, 1, 2, 5, 6),
)
_define.implement_in_triton("dense", "attention")
_OPS = {"native": torch.ops.vitkernels.attention.default, "triton": torch.ops.vitkernels_triton.attention.default}
