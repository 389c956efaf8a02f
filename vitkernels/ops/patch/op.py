"""MobileViT's attention among equal positions of all patches (arXiv 2110.02178, section 3.1): checks, choice of backend, and the autograd op.

Reads top to bottom: the public function, its checks, then the torch.library op behind it. The derivation is in this folder's README.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitkernels import backends
from vitkernels.ops import _check, _define
from vitkernels.ops.patch import reference

backends.declare("patch_attention", backends.Support())


def patch_attention(q: Tensor, k: Tensor, v: Tensor, *, patch: tuple[int, int] = (2, 2), num_heads: int, scale: float | None = None) -> Tensor:
    """Attention of each pixel of a feature map to the pixels at its own position in all patches: MobileViT's unfold, attend and fold, without copies.

    Pixel (y, x) attends to the pixels with the same y mod ph and x mod pw: with patches of 2 x 2, four separate sequences an image.

    Args:
        q: [B, C, H, W], any strides: contiguous, channels_last, or a slice of a fused projection's [B, 3 C, H, W].
        k: [B, C, H, W].
        v: [B, C_v, H, W].
        patch: (ph, pw), which divide H and W. Models that allow other maps resize them first.
        num_heads: divides C and C_v; head h has the channels from h C / num_heads on.
        scale: of the logits; default (C / num_heads) ** -0.5.

    q, k and v share one dtype (float32, bfloat16, float16, on the CPU also float64) and one device; logits, softmax and sums are in float32 (float64
    for float64). Autocast casts them.

    Returns:
        [B, C_v, H, W], in v's memory format as ``torch.empty_like`` has it. Differentiable once in q, k and v. Saved for backward: the inputs, the
        output and B num_heads H W numbers.

    Raises:
        ValueError: a wrong shape, a map that the patch does not divide, heads that do not divide the channels, a mix of devices.
        TypeError: a wrong or mixed dtype, something that is no tensor, a patch that is no pair of integers.
        BackendUnavailable: a backend was asked for by name and cannot run.

    Paper: MobileViT, arXiv 2110.02178, section 3.1, equation 1.
    """
    op = "patch_attention"
    if isinstance(q, Tensor) and (dtype := _define.autocast_of(q)) is not None:
        q, k, v = (_define.cast(t, dtype) for t in (q, k, v))
    if not _agree(q, k, v, patch, num_heads):
        _refuse(op, q, k, v, patch, num_heads)
    scale = (q.shape[1] // num_heads) ** -0.5 if scale is None else float(scale)

    chosen = backends.select(op, q)
    if chosen == "reference":
        return reference.patch_attention(q, k, v, patch=(patch[0], patch[1]), heads=num_heads, scale=scale)
    out, _ = _define.call(_OPS[chosen], _define.differentiable(q, k, v), q, k, v, *patch, num_heads, scale)
    return out


def _agree(q: Tensor, k: Tensor, v: Tensor, patch: Any, heads: int) -> bool:
    """Whether all is right, in one look: on a small map the messages would cost as much as the kernel."""
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor) and q.dim() == v.dim() == 4 and k.shape == q.shape):
        return False
    if not (isinstance(patch, tuple) and len(patch) == 2 and isinstance(patch[0], int) and isinstance(patch[1], int)):
        return False
    (batch, channels, height, width), (v_batch, v_channels, v_height, v_width), (ph, pw) = q.shape, v.shape, patch
    return (
        (v_batch == batch and v_height == height and v_width == width)
        and (ph > 0 and pw > 0 and height % ph == 0 and width % pw == 0)
        and (heads > 0 and channels > 0 and v_channels > 0 and channels % heads == 0 and v_channels % heads == 0)
        and _check.of_a_kind(q, k, v)
    )


def _refuse(op: str, q: Tensor, k: Tensor, v: Tensor, patch: Any, num_heads: int) -> None:
    """Say what is wrong."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        symbols = "[B, C_v, H, W]" if name == "v" else "[B, C, H, W]"
        _check.is_tensor(op, name, tensor, symbols)
        _check.strided(op, name, tensor)
        _check.floating(op, name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{op}: {name} has shape {_check.shape_of(tensor)}; it must be 4-dimensional, {symbols}")
    _check.same_kind(op, "k", k, "q", q)
    _check.same_kind(op, "v", v, "q", q)
    batch, _, height, width = q.shape
    _check.has_shape(op, "k", k, q.shape, "[B, C, H, W] of q")
    _check.has_shape(op, "v", v, (batch, v.shape[1], height, width), "[B, C_v, H, W] with q's B, H and W")
    if not (isinstance(patch, tuple | list) and len(patch) == 2 and all(isinstance(p, int) for p in patch)):
        raise TypeError(f"{op}: patch is {patch!r}; it must be (ph, pw), two integers")
    if min(patch) < 1 or height % patch[0] or width % patch[1]:
        raise ValueError(f"{op}: patch is {tuple(patch)} and q has shape {_check.shape_of(q)}; it must divide H = {height} and W = {width}")
    for name, tensor in (("q", q), ("v", v)):
        if num_heads < 1 or tensor.shape[1] % num_heads or tensor.shape[1] == 0:
            raise ValueError(f"{op}: num_heads is {num_heads}; it must divide the {tensor.shape[1]} channels of {name}, at least 1")


# --- vitkernels::patch_attention ------------------------------------------------------------------------------------------------------


def _fake(q: Tensor, k: Tensor, v: Tensor, patch_height: int, patch_width: int, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    batch, _, height, width = q.shape
    sequences, tokens = batch * patch_height * patch_width, (height // patch_height) * (width // patch_width)
    return torch.empty_like(v), q.new_empty((sequences, heads, tokens), dtype=torch.float64)


def _backward_fake(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, patch_height: int, patch_width: int, heads: int, scale: float,
    need_q: bool, need_k: bool, need_v: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(torch.empty_like(t) if needed else lse.new_empty((0,)) for t, needed in ((q, need_q), (k, need_k), (v, need_v)))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.patch_height, ctx.patch_width, ctx.heads, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _backward(op: Any, ctx: Any, grad_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    grads = op(grad_out, *ctx.saved_tensors, ctx.patch_height, ctx.patch_width, ctx.heads, ctx.scale, *needs)
    return (*(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), None, None, None, None)


_OPTIONS = "int patch_height, int patch_width, int heads, float scale"
_define.define(
    "patch_attention",
    schema=f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    backward_schema=(
        f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS}, bool need_q, bool need_k, bool need_v)"
        " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)"
    ),
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup,
    backward=_backward,
)
_define.implement_in_triton("patch", "patch_attention")
_OPS = {"native": torch.ops.vitkernels.patch_attention.default, "triton": torch.ops.vitkernels_triton.patch_attention.default}
