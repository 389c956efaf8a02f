"""Attention with learnable memory (Sandler et al., arXiv 2203.15243, section 3): checks, choice of backend, and the autograd op.

Reads top to bottom: the public function, its checks, then the torch.library op behind it. The derivation is in this folder's README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitkernels import backends
from vitkernels.ops import _check, _define
from vitkernels.ops.memory import reference

backends.declare("memory_attention", backends.Support())


def memory_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor,
    memory_v: Tensor,
    *,
    own_k: Tensor | None = None,
    own_v: Tensor | None = None,
    groups: Sequence[int] | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q [k, memory_k]^T scale) [v, memory_v], with a memory that all samples share: nothing is expanded, concatenated or masked.

    One task whose tokens all see the memory: ``q``, ``k`` and ``v`` of the tokens, and the memory. Several tasks over one model that they leave as it
    is (the paper's attention masking, section 3.2): ``q`` holds the class tokens of T tasks, T = N, ``k`` and ``v`` the model's own tokens, which see
    nothing of the tasks and so attend among themselves; ``own_k`` and ``own_v`` are of the class tokens; ``groups`` says how much of the memory is
    each task's. Class token t then sees the model's tokens, itself and memory t.

    Args:
        q: [B, H, N, D], any strides.
        k: [B, H, K, D]; every query sees all K of its sample.
        v: [B, H, K, D_v].
        memory_k: [M, H, D], the same for every sample. M may be 0.
        memory_v: [M, H, D_v].
        own_k: [B, H, N, D] or None: a key that query i alone sees.
        own_v: [B, H, N, D_v], likewise.
        groups: lengths that add up to M: the memory is that of so many groups, one after the other, and the queries are as many groups of equal size
            (T groups of N / T). A query sees the memory of its group. None: one group, every query sees all of it.
        scale: of the logits; default D ** -0.5.
        dropout_p: probability of dropping an attention weight. The mask is a function of PyTorch's generator (one draw a call) and of the place of
            the weight, the same on every backend, and stored nowhere.
        return_lse: also return the logsumexp of each query's logits.

    All tensors share one dtype (float32, bfloat16, float16, on the CPU also float64) and one device; autocast casts them. Logits, softmax and sums
    are in float32 (float64 for float64).

    Returns:
        [B, H, N, D_v], a view of a contiguous [B, N, H, D_v], so that the heads are joined without a copy; with ``return_lse`` also [B, H, N] in
        float32 (float64), natural logarithm. A query that sees no key gives 0 and -inf. Differentiable once in all seven tensors, through the
        logsumexp, too; the gradient of the memory is the sum over the batch. Saved for backward: the inputs and B H N numbers.

    Raises:
        ValueError: a wrong shape, one of own_k and own_v alone, groups that do not add up or whose number does not divide N, a probability outside
            [0, 1], a mix of devices.
        TypeError: a wrong or mixed dtype, something that is no tensor.
        BackendUnavailable: a backend was asked for by name and cannot run.

    Paper: Fine-tuning Image Transformers using Learnable Memory, arXiv 2203.15243, sections 3.1 and 3.2.
    """
    op = "memory_attention"
    if (own_k is None) != (own_v is None):
        given, missing = ("own_k", "own_v") if own_v is None else ("own_v", "own_k")
        raise ValueError(f"{op}: {given} is given and {missing} is None; it must be both or neither")
    named = {"q": q, "k": k, "v": v, "memory_k": memory_k, "memory_v": memory_v}
    if own_k is not None and own_v is not None:
        named |= {"own_k": own_k, "own_v": own_v}
    for name, tensor in named.items():
        _check.is_tensor(op, name, tensor, _SYMBOLS[name])
        _check.strided(op, name, tensor)
        _check.floating(op, name, tensor)
        dims = _SYMBOLS[name].count(",") + 1
        if tensor.dim() != dims:
            raise ValueError(f"{op}: {name} has shape {_check.shape_of(tensor)}; it must be {dims}-dimensional, {_SYMBOLS[name]}")
    if (dtype := _define.autocast_of(q)) is not None:
        named = {name: _define.cast(tensor, dtype) for name, tensor in named.items()}
        q, k, v, memory_k, memory_v = (named[name] for name in ("q", "k", "v", "memory_k", "memory_v"))
        own_k, own_v = named.get("own_k"), named.get("own_v")
    batch, heads, queries, width = q.shape
    keys, value_width, memories = k.shape[2], v.shape[3], memory_k.shape[0]
    shapes = {
        "k": (batch, heads, keys, width),
        "v": (batch, heads, keys, value_width),
        "memory_k": (memories, heads, width),
        "memory_v": (memories, heads, value_width),
        "own_k": (batch, heads, queries, width),
        "own_v": (batch, heads, queries, value_width),
    }
    for name, tensor in named.items():
        if tensor.dtype is not q.dtype or tensor.device != q.device:
            _check.same_kind(op, name, tensor, "q", q)
        if name != "q":
            _check.has_shape(op, name, tensor, shapes[name], _SYMBOLS[name])
    if not (heads and width and value_width):
        raise ValueError(f"{op}: q has shape {_check.shape_of(q)} and v {_check.shape_of(v)}; H, D and D_v must be at least 1")
    lengths = () if groups is None else _checked_groups(op, groups, memories, queries)
    if dropout_p != 0.0:
        _check.probability(op, "dropout_p", dropout_p)
    scale = width**-0.5 if scale is None else float(scale)
    seed = torch.randint(2**62, (), device=q.device) if dropout_p > 0 else None

    chosen = backends.select(op, q)
    if chosen == "reference":
        out, lse = reference.memory_attention(q, k, v, memory_k, memory_v, own_k, own_v, groups=lengths, scale=scale, dropout_p=dropout_p, seed=seed)
    else:
        namespace = torch.ops.vitkernels_triton if chosen == "triton" else torch.ops.vitkernels
        out, lse = _define.call(
            namespace.memory_attention.default,
            _define.differentiable(q, k, v, memory_k, memory_v, own_k, own_v),
            *(q, k, v, memory_k, memory_v, own_k, own_v, lengths, scale, float(dropout_p), seed),
        )
    out = out.transpose(1, 2)
    return (out, lse.to(_define.accumulation_dtype(q.dtype))) if return_lse else out


_SYMBOLS = {
    "q": "[B, H, N, D]",
    "k": "[B, H, K, D]",
    "v": "[B, H, K, D_v]",
    "memory_k": "[M, H, D]",
    "memory_v": "[M, H, D_v]",
    "own_k": "[B, H, N, D]",
    "own_v": "[B, H, N, D_v]",
}


def _checked_groups(op: str, groups: Sequence[int], memories: int, queries: int) -> tuple[int, ...]:
    if not isinstance(groups, (tuple, list)) or not all(isinstance(length, int) for length in groups):
        raise TypeError(f"{op}: groups is {groups!r}; it must be a sequence of integers, or None")
    if not groups or min(groups) < 0 or sum(groups) != memories:
        raise ValueError(f"{op}: groups is {groups!r}; it must hold lengths, at least one and none negative, that add up to M = {memories}")
    if queries % len(groups):
        raise ValueError(f"{op}: groups holds {len(groups)} lengths; their number must divide N = {queries}, the queries")
    return tuple(groups)


# --- vitkernels::memory_attention -----------------------------------------------------------------------------------------------------


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    torch._check(q.dim() == 4 and k.dim() == 4 and v.dim() == 4, lambda: "q, k and v must be 4-dimensional")
    torch._check(q.shape[3] == k.shape[3], lambda: f"q and k have head_dim {q.shape[3]} and {k.shape[3]}")
    batch, heads, queries, _d = q.shape
    return q.new_empty((batch, queries, heads, v.shape[3])), q.new_empty((batch, heads, queries), dtype=torch.float64)


_DIFFERENTIABLE = 7  # q, k, v, memory_k, memory_v, own_k, own_v


def _backward_fake(grad_out: Tensor | None, grad_lse: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    inputs, (lse, groups), needed = rest[:_DIFFERENTIABLE], rest[_DIFFERENTIABLE : _DIFFERENTIABLE + 2], rest[-_DIFFERENTIABLE:]
    plain = not groups and inputs[-1] is None

    def empty(x: Tensor) -> Tensor:
        # Plain attention with shared keys makes what the gradients of a projection want: [B, N, H, D] in memory.
        return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) if plain and x.dim() == 4 else x.new_empty(x.shape)

    return tuple(empty(x) if wanted and x is not None else lse.new_empty((0,)) for x, wanted in zip(inputs, needed, strict=True))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.groups, ctx.scale, ctx.dropout_p, seed = inputs[_DIFFERENTIABLE:]
    ctx.save_for_backward(*inputs[:_DIFFERENTIABLE], seed, output[1])
    ctx.set_materialize_grads(False)


def _backward(op: Any, ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None and grad_lse is None:
        return (None,) * (_DIFFERENTIABLE + 4)
    *inputs, seed, lse = ctx.saved_tensors
    needed = ctx.needs_input_grad[:_DIFFERENTIABLE]
    grads = op(grad_out, grad_lse, *inputs, lse, ctx.groups, ctx.scale, ctx.dropout_p, seed, *needed)
    return (*(g if wanted else None for g, wanted in zip(grads, needed, strict=True)), None, None, None, None)


_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor memory_k, Tensor memory_v, Tensor? own_k, Tensor? own_v"
_OPTIONS = "int[] groups, float scale, float dropout_p, Tensor? seed"
_define.define(
    "memory_attention",
    schema=f"({_TENSORS}, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    backward_schema=(
        f"(Tensor? grad_out, Tensor? grad_lse, {_TENSORS}, Tensor lse, {_OPTIONS}, bool need_q, bool need_k, bool need_v,"
        " bool need_memory_k, bool need_memory_v, bool need_own_k, bool need_own_v)"
        " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_memory_k, Tensor grad_memory_v, Tensor grad_own_k, Tensor grad_own_v)"
    ),
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup,
    backward=_backward,
)
_define.implement_in_triton("memory", "memory_attention")
