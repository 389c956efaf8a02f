"""Re-Attention (DeepViT, arXiv 2103.11886, section 4.2): checks, choice of backend, and the autograd op.

Reads top to bottom: the public function, its checks, then the torch.library op behind it. The derivation is in this folder's README.md.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from vitkernels import backends
from vitkernels.ops import _check, _define
from vitkernels.ops.head_mixing import reference

backends.declare("re_attention", backends.Support(cuda=(torch.float32, torch.bfloat16, torch.float16)))

NORMS = {None: 0, "batch": 1, "layer": 2}
MOST_HEADS = {"native": 64, "triton": 32, "cuda": 32}
"""What the kernels of a backend are written for; with more heads the reference runs."""


def re_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mix_weight: Tensor,
    mix_bias: Tensor | None = None,
    *,
    norm: Literal["batch", "layer"] | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_map: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention whose maps are mixed across heads before they are applied: ``norm(mix_weight softmax(q k^T scale) + mix_bias) v``.

    Args:
        q: [B, H, N, D], any strides, as sliced from a packed [B, N, 3, H, D].
        k: [B, H, N, D].
        v: [B, H, N, D_v].
        mix_weight: [H, H], [out, in] as in the authors' 1x1 convolution (also [H, H, 1, 1]). vit-pytorch's ``reattn_weights`` is its transpose.
        mix_bias: [H], or None.
        norm: of the mixed maps: ``"batch"`` as ``BatchNorm2d(H)`` (the authors), ``"layer"`` over the heads at each pair of tokens (vit-pytorch), or
            None.
        norm_weight: [H], or None.
        norm_bias: [H], or None.
        running_mean: [H], of ``"batch"``: used outside training, updated in place in training as ``F.batch_norm`` does. None: the batch's statistics,
            always.
        running_var: [H], likewise.
        training: whether ``"batch"`` uses (and records) the batch's statistics, and whether dropout drops.
        momentum: of the running statistics.
        eps: of the norm.
        scale: of the logits; default D ** -0.5.
        dropout_p: probability of dropping an element of the maps before they are mixed, in training. The mask is a function of PyTorch's generator
            (one draw a call) and of the place of the element, the same on every backend, and stored nowhere.
        return_map: also return the maps that were applied, [B, H, N, N]. They are then formed, by the reference, at its cost in time and memory.

    q, k and v share one dtype (float32, bfloat16, float16, on the CPU also float64) and one device; autocast casts them. The weights of mix and norm
    may be of any floating dtype and are used as they are. Logits, softmax, mix, norm and sums are in float32 (float64 for float64).

    Returns:
        [B, H, N, D_v], in memory [B, N, H, D_v], and with ``return_map`` the maps. Differentiable once in q, k, v and the weights and biases of mix
        and norm. Saved for backward: the inputs, B H N numbers (the logsumexp of each row) and a few per head; no map is stored.

    Raises:
        ValueError: a wrong shape, a mix of devices, a probability outside [0, 1], an unknown norm, one of two statistics, a norm's argument without
            the norm, a batch of one value per head.
        TypeError: a wrong or mixed dtype, or something that is no tensor.
        BackendUnavailable: a backend was asked for by name and cannot run.

    Paper: DeepViT, arXiv 2103.11886, section 4.2, equation 3.
    """
    op = "re_attention"
    for name, tensor, symbols in (("q", q, "[B, H, N, D]"), ("k", k, "[B, H, N, D]"), ("v", v, "[B, H, N, D_v]")):
        _check.is_tensor(op, name, tensor, symbols)
        _check.strided(op, name, tensor)
        _check.floating(op, name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{op}: {name} has shape {_check.shape_of(tensor)}; it must be 4-dimensional, {symbols}")
    if (dtype := _define.autocast_of(q)) is not None:
        q, k, v = (_define.cast(t, dtype) for t in (q, k, v))
    _check.same_kind(op, "k", k, "q", q)
    _check.same_kind(op, "v", v, "q", q)
    _check.has_shape(op, "k", k, q.shape, "[B, H, N, D] of q")
    _check.has_shape(op, "v", v, (*q.shape[:3], v.shape[3]), "[B, H, N, D_v] with q's B, H and N")
    heads = q.shape[1]
    if not (heads and q.shape[3] and v.shape[3]):
        raise ValueError(f"{op}: q has shape {_check.shape_of(q)} and v {_check.shape_of(v)}; H, D and D_v must be at least 1")
    if norm not in NORMS:
        raise ValueError(f"{op}: norm is {norm!r}; it must be one of {', '.join(map(repr, NORMS))}")
    _check_small(op, q, "mix_weight", mix_weight, "[H, H]", (heads, heads), (heads, heads, 1, 1))
    vectors = {"mix_bias": mix_bias, "norm_weight": norm_weight, "norm_bias": norm_bias, "running_mean": running_mean, "running_var": running_var}
    for name, value in vectors.items():
        if value is None:
            continue
        _check_small(op, q, name, value, "[H] or None", (heads,))
        if name.startswith("norm_") and norm is None:
            raise ValueError(f"{op}: {name} is given and norm is None; it must be 'batch' or 'layer'")
        if name.startswith("running_") and norm != "batch":
            raise ValueError(f"{op}: {name} is given and norm is {norm!r}; only 'batch' has running statistics")
    if (running_mean is None) != (running_var is None):
        given, missing = ("running_mean", "running_var") if running_var is None else ("running_var", "running_mean")
        raise ValueError(f"{op}: {given} is given and {missing} is None; it must be both or neither")
    if dropout_p != 0.0:
        _check.probability(op, "dropout_p", dropout_p)
    live = norm == "batch" and (training or running_mean is None)
    count = q.shape[0] * q.shape[2] * q.shape[2]
    if live and count == 1:
        raise ValueError(f"{op}: q has shape {_check.shape_of(q)}; the statistics of a batch need more than one value per head")

    dropped = float(dropout_p) if training else 0.0
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    seed = torch.randint(2**62, (), device=q.device) if dropped > 0 else None
    mean, var = (None, None) if live else (running_mean, running_var)
    small = (mix_weight.view(heads, heads), mix_bias, norm_weight, norm_bias, mean, var)
    chosen = _chosen(op, q, return_map)
    if chosen == "reference":
        out, maps, batch_mean, batch_var = reference.re_attention(
            q, k, v, *small, norm=norm, live=live, eps=eps, scale=scale, dropout_p=dropped, seed=seed
        )
    else:
        namespace = torch.ops.vitkernels_triton if chosen == "triton" else torch.ops.vitkernels
        weight, bias, gamma, beta, mean, var = (t if t is None else t.to(torch.float64) for t in small)
        out, _, batch_mean, batch_var = _define.call(
            namespace.re_attention.default,
            _define.differentiable(q, k, v, weight, bias, gamma, beta),
            *(q, k, v, weight, bias, NORMS[norm], gamma, beta, mean, var, live, float(eps), scale, dropped, seed),
        )
    if live and running_mean is not None and running_var is not None and count:
        with torch.no_grad():
            running_mean.mul_(1 - momentum).add_(batch_mean.to(running_mean.dtype), alpha=momentum)
            running_var.mul_(1 - momentum).add_(batch_var.to(running_var.dtype), alpha=momentum * count / (count - 1))
    return (out, maps) if return_map else out


def _check_small(op: str, q: Tensor, name: str, value: Tensor, symbols: str, *shapes: tuple[int, ...]) -> None:
    """A weight of mix or norm: of one of these shapes, any floating dtype, on q's device."""
    _check.is_tensor(op, name, value, symbols)
    _check.floating(op, name, value)
    if tuple(value.shape) not in shapes:
        _check.has_shape(op, name, value, shapes[0], symbols.partition(" ")[0])
    if value.device != q.device:
        raise ValueError(f"{op}: {name} is on {value.device}; it must be on {q.device}, the device of q")


def _chosen(op: str, q: Tensor, return_map: bool) -> str:
    """The backend for this call: ``select`` sees neither the number of heads nor what is asked for."""
    chosen = backends.select(op, q)
    if chosen == "reference":
        return chosen
    if return_map:
        reason = "return_map asks for the maps, which only the reference forms"
    elif (heads := q.shape[1]) > MOST_HEADS[chosen]:
        reason = f"q has {heads} heads, and its kernels take up to {MOST_HEADS[chosen]}"
    else:
        return chosen
    if backends.requested() != "auto":
        raise backends.BackendUnavailable(f"backend {chosen!r} cannot run {op}: {reason}")
    return "reference"


# --- vitkernels::re_attention ---------------------------------------------------------------------------------------------------------


def _fake(
    q: Tensor, k: Tensor, v: Tensor, mix_weight: Tensor, mix_bias: Tensor | None, norm: int, norm_weight: Tensor | None, norm_bias: Tensor | None,
    mean: Tensor | None, var: Tensor | None, live: bool, *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    torch._check(q.dim() == 4 and k.dim() == 4 and v.dim() == 4, lambda: "q, k and v must be 4-dimensional")
    batch, heads, tokens, _d = q.shape
    statistics = (heads if live else 0,)
    return (
        _define.token_major(q, v.shape[3]),
        q.new_empty((batch, heads, tokens), dtype=torch.float64),
        mix_weight.new_empty(statistics),
        mix_weight.new_empty(statistics),
    )


def _backward_fake(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, mix_weight: Tensor, mix_bias: Tensor | None, norm: int,
    norm_weight: Tensor | None, norm_bias: Tensor | None, mean: Tensor | None, var: Tensor | None, live: bool, eps: float, scale: float,
    dropout_p: float, seed: Tensor | None, need_q: bool, need_k: bool, need_v: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    tokens = (t.new_empty(t.shape if needed else (0,)) for t, needed in ((q, need_q), (k, need_k), (v, need_v)))
    heads = q.shape[1]
    return (*tokens, mix_weight.new_empty((heads, heads)), *(mix_weight.new_empty((heads,)) for _ in range(3)))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    q, k, v, weight, bias, ctx.norm, gamma, beta, mean, var, ctx.live, ctx.eps, ctx.scale, ctx.dropout_p, seed = inputs
    _, lse, batch_mean, batch_var = output
    ctx.mark_non_differentiable(lse, batch_mean, batch_var)
    if ctx.live:
        mean, var = batch_mean, batch_var
    ctx.save_for_backward(q, k, v, lse, weight, bias, gamma, beta, mean, var, seed)


def _backward(op: Any, ctx: Any, grad_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, lse, weight, bias, gamma, beta, mean, var, seed = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grads = op(
        *(grad_out, q, k, v, lse, weight, bias, ctx.norm, gamma, beta, mean, var, ctx.live, ctx.eps, ctx.scale, ctx.dropout_p, seed),
        *needs[:3],
    )
    grad_q, grad_k, grad_v, grad_weight, grad_bias, grad_gamma, grad_beta = (
        grad if needs[i] else None for grad, i in zip(grads, (0, 1, 2, 3, 4, 6, 7), strict=True)
    )
    return (grad_q, grad_k, grad_v, grad_weight, grad_bias, None, grad_gamma, grad_beta, *(None,) * 7)


_SCHEMA = (
    "Tensor mix_weight, Tensor? mix_bias, int norm, Tensor? norm_weight, Tensor? norm_bias, Tensor? mean, Tensor? var, bool live, float eps,"
    " float scale, float dropout_p, Tensor? seed"
)
_define.define(
    "re_attention",
    schema=f"(Tensor q, Tensor k, Tensor v, {_SCHEMA}) -> (Tensor out, Tensor lse, Tensor batch_mean, Tensor batch_var)",
    backward_schema=(
        f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor lse, {_SCHEMA}, bool need_q, bool need_k, bool need_v)"
        " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_mix_weight, Tensor grad_mix_bias, Tensor grad_norm_weight,"
        " Tensor grad_norm_bias)"
    ),
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup,
    backward=_backward,
    cast_by_autocast=(0, 1, 2),
)

_define.implement_in_triton("head_mixing", "re_attention")

# The CUDA library's own pieces, which vitkernels/ops/head_mixing/cuda.py puts together to the op.
_define.COMPILED.define(
    "re_attention_rows(Tensor q, Tensor k, Tensor v, Tensor? lse, Tensor mix_weight, Tensor? mix_bias, int norm, Tensor? norm_weight,"
    " Tensor? norm_bias, Tensor? mean, Tensor? var, float eps, float scale, int value_dim) -> (Tensor out, Tensor lse)"
)
_define.COMPILED.define("re_attention_lse(Tensor q, Tensor k, float scale) -> Tensor")
_define.COMPILED.define("re_attention_shared_memory(int heads, int dim, int value_dim) -> int")
_define.implement_on_gpu("head_mixing", "re_attention")
