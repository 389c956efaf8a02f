"""Position embeddings and pooling of packed tokens (NaViT, arXiv 2307.06304): checks, choice of backend, and the autograd ops.

Reads top to bottom: for each op the public function, its checks, then the torch.library op behind it. The derivation is in this folder's README.md.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from vitkernels import backends
from vitkernels.ops import _check, _define
from vitkernels.ops.packed import layout as _layout
from vitkernels.ops.packed.layout import PackedLayout
from vitkernels.ops.tokens import reference

backends.declare("factorized_position_embedding", backends.Support())
backends.declare("masked_pool", backends.Support())

MODES = ("mean", "max")


def factorized_position_embedding(x: Tensor, height_table: Tensor, width_table: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The sum x + height_table[rows] + width_table[columns] in one pass: embeddings of the row and of the column of each patch.

    Args:
        x: [T, D], any strides: tokens, of one image or of many.
        height_table: [L_h, D].
        width_table: [L_w, D].
        rows: [T]. Integers: the entry of the height table. Floating, of any precision: a share in [0, 1] of the way from the table's first entry to
            its last, linearly interpolated between the two entries around r (L_h - 1), so that one table serves every resolution.
        columns: [T], the same of the width table.

    x and the tables share one dtype (float32, bfloat16, float16, on the CPU also float64), the arithmetic is in float32 (float64 for float64).
    Autocast casts them, not the positions. On the CPU positions are checked; on a GPU that would wait for it, and a token whose position is outside
    becomes NaN (on the reference a device-side assert for an index).

    Returns:
        [T, D], contiguous. Differentiable once in x and the tables, not in the positions. Saved for backward: the positions. The gradients of the
        tables are summed in float32 in a fixed order: equal bit for bit from run to run, whatever the number of threads.

    Raises:
        ValueError: a wrong shape, a position outside its table, positions that require a gradient, a mix of devices.
        TypeError: a wrong or mixed dtype, something that is no tensor.
        BackendUnavailable: a backend was asked for by name and cannot run.

    Paper: NaViT, arXiv 2307.06304, section 2.1, factorized and fractional positional embeddings.
    """
    op = "factorized_position_embedding"
    tensors = (("x", x, "[T, D]"), ("height_table", height_table, "[L_h, D]"), ("width_table", width_table, "[L_w, D]"))
    for name, tensor, symbols in tensors:
        _check.is_tensor(op, name, tensor, symbols)
        _check.strided(op, name, tensor)
        _check.floating(op, name, tensor)
        if tensor.dim() != 2:
            raise ValueError(f"{op}: {name} has shape {_check.shape_of(tensor)}; it must be 2-dimensional, {symbols}")
        if tensor.shape[1] != x.shape[1]:
            raise ValueError(f"{op}: {name} has shape {_check.shape_of(tensor)}; it must be {symbols} with D = {x.shape[1]} of x")
    if (dtype := _define.autocast_of(x)) is not None:
        x, height_table, width_table = (_define.cast(t, dtype) for t in (x, height_table, width_table))
    _check.same_kind(op, "height_table", height_table, "x", x)
    _check.same_kind(op, "width_table", width_table, "x", x)
    rows = _checked_positions(op, "rows", rows, x, "height_table", height_table.shape[0])
    columns = _checked_positions(op, "columns", columns, x, "width_table", width_table.shape[0])

    chosen = backends.select(op, x)
    if chosen == "reference":
        return reference.factorized_position_embedding(x, height_table, width_table, rows, columns)
    namespace = torch.ops.vitkernels_triton if chosen == "triton" else torch.ops.vitkernels
    return _define.call(
        namespace.factorized_position_embedding.default,
        _define.differentiable(x, height_table, width_table),
        *(x, height_table, width_table, rows, columns),
    )


def _checked_positions(op: str, name: str, positions: Tensor, x: Tensor, table: str, length: int) -> Tensor:
    """The positions as the kernels take them: contiguous, int64 or the accumulation dtype."""
    _check.is_tensor(op, name, positions, "[T]")
    _check.strided(op, name, positions)
    fractional = positions.is_floating_point()
    if not fractional and (positions.is_complex() or positions.dtype is torch.bool):
        raise TypeError(f"{op}: {name} has dtype {positions.dtype}; it must be an integer dtype (indices) or a floating one (shares in [0, 1])")
    _check.has_shape(op, name, positions, (x.shape[0],), "[T]")
    if positions.device != x.device:
        raise ValueError(f"{op}: {name} is on {positions.device}; it must be on {x.device}, the device of x")
    if positions.requires_grad:
        raise ValueError(f"{op}: {name} requires a gradient; it must not, positions are not differentiated ({name}.detach() is accepted)")
    if positions.device.type == "cpu" and positions.numel() and _layout.can_read(positions):
        low, high = (value.item() for value in positions.aminmax())
        if low < 0 or high > (1 if fractional else length - 1):
            wrong = low if low < 0 else high
            needs = "shares in [0, 1]" if fractional else f"indices of {table}, which has {length} entries"
            raise ValueError(f"{op}: {name} holds {wrong}; it must hold {needs}")
    return positions.to(_define.accumulation_dtype(x.dtype) if fractional else torch.int64).contiguous()


def masked_pool(x: Tensor, layout: PackedLayout, mode: Literal["mean", "max"] = "mean") -> Tensor:
    """The mean or the maximum of the tokens of each sequence: one vector per image, whatever else is in the batch.

    Args:
        x: [T, D] or [T, H, D], any strides; T is ``layout.total_k``.
        layout: where each sequence lies: the side of the keys, so ``cu_seqlens_k`` and, where given, only the first ``seqused_k`` rows. Padding
            counts for nothing, whatever it holds.
        mode: ``"mean"``, summed in float32 (float64 for float64), or ``"max"``, which is NaN where a NaN is among the values, as ``torch.amax`` is.

    x is of float32, bfloat16, float16, on the CPU also float64. Autocast casts it.

    Returns:
        [S, D] or [S, H, D], contiguous, S = ``layout.sequences``; 0 for an empty sequence. Differentiable once in x. The gradient of a maximum goes
        to the first row that has it, as that of ``torch.max(dim)`` (``torch.amax`` shares it out among equals), that of NaN to the first NaN. Saved
        for backward: the layout, for ``"max"`` also the row of each maximum, 4 bytes each.

    Raises:
        ValueError: a wrong shape, a layout of another number of rows or on another device, an unknown mode.
        TypeError: a wrong dtype, something that is no tensor or no layout.
        BackendUnavailable: a backend was asked for by name and cannot run.

    Paper: NaViT, arXiv 2307.06304, section 2.1, masked pooling.
    """
    op = "masked_pool"
    _check.is_tensor(op, "x", x, "[T, D] or [T, H, D]")
    _check.strided(op, "x", x)
    _check.floating(op, "x", x)
    if x.dim() not in (2, 3):
        raise ValueError(f"{op}: x has shape {_check.shape_of(x)}; it must be [T, D] or [T, H, D]")
    if not isinstance(layout, PackedLayout):
        raise TypeError(f"{op}: layout is a {type(layout).__name__}; it must be a PackedLayout (PackedLayout.from_cu_seqlens makes one of lengths)")
    if x.shape[0] != layout.total_k:
        raise ValueError(f"{op}: x has {x.shape[0]} token rows; it must have {layout.total_k}, total_k of the layout")
    if layout.cu_seqlens_k.device != x.device:
        raise ValueError(f"{op}: the layout is on {layout.cu_seqlens_k.device}; it must be on {x.device}, the device of x (layout.to(...))")
    if mode not in MODES:
        raise ValueError(f"{op}: mode is {mode!r}; it must be one of {', '.join(map(repr, MODES))}")
    if (dtype := _define.autocast_of(x)) is not None:
        x = _define.cast(x, dtype)
    flat = x if x.dim() == 2 else x.reshape(x.shape[0], x.shape[1] * x.shape[2])

    chosen = backends.select(op, x)
    if chosen == "reference":
        out = reference.masked_pool(flat, layout.cu_seqlens_k, layout.seqused_k, mode)
    else:
        namespace = torch.ops.vitkernels_triton if chosen == "triton" else torch.ops.vitkernels
        pool = namespace.masked_pool.default
        out, _ = _define.call(pool, _define.differentiable(flat), flat, layout.cu_seqlens_k, layout.seqused_k, mode == "max")
    return out if x.dim() == 2 else out.view(out.shape[0], *x.shape[1:])


# --- vitkernels::factorized_position_embedding ----------------------------------------------------------------------------------------


def _position_fake(x: Tensor, height_table: Tensor, width_table: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    torch._check(x.dim() == 2 and height_table.dim() == 2 and width_table.dim() == 2, lambda: "x and the tables must be 2-dimensional")
    torch._check(rows.dim() == 1 and columns.dim() == 1, lambda: "rows and columns must be 1-dimensional")
    return x.new_empty((x.shape[0], x.shape[1]))


def _position_backward_fake(
    grad_out: Tensor, rows: Tensor, columns: Tensor, height: int, width: int, need_height: bool, need_width: bool
) -> tuple[Tensor, Tensor]:
    dim = grad_out.shape[1]
    return grad_out.new_empty((height, dim) if need_height else (0,)), grad_out.new_empty((width, dim) if need_width else (0,))


def _position_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, height_table, width_table, rows, columns = inputs
    ctx.lengths = height_table.shape[0], width_table.shape[0]
    ctx.save_for_backward(rows, columns)


def _position_backward(op: Any, ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    need_x, need_height, need_width = ctx.needs_input_grad[:3]
    grad_height = grad_width = None
    if need_height or need_width:
        grad_height, grad_width = op(grad_out, *ctx.saved_tensors, *ctx.lengths, need_height, need_width)
    return grad_out if need_x else None, grad_height if need_height else None, grad_width if need_width else None, None, None


_define.define(
    "factorized_position_embedding",
    schema="(Tensor x, Tensor height_table, Tensor width_table, Tensor rows, Tensor columns) -> Tensor",
    backward_schema=(
        "(Tensor grad_out, Tensor rows, Tensor columns, SymInt height, SymInt width, bool need_height, bool need_width)"
        " -> (Tensor grad_height_table, Tensor grad_width_table)"
    ),
    fake=_position_fake,
    backward_fake=_position_backward_fake,
    setup_context=_position_setup,
    backward=_position_backward,
    cast_by_autocast=(0, 1, 2),
)


# --- vitkernels::masked_pool ----------------------------------------------------------------------------------------------------------


def _pool_fake(x: Tensor, cu_seqlens: Tensor, seqused: Tensor | None, largest: bool) -> tuple[Tensor, Tensor]:
    torch._check(x.dim() == 2 and cu_seqlens.dim() == 1, lambda: "x must be 2-dimensional and cu_seqlens 1-dimensional")
    shape = (cu_seqlens.shape[0] - 1, x.shape[1])
    return x.new_empty(shape), x.new_empty(shape if largest else (0,), dtype=torch.int32)


def _pool_backward_fake(grad_out: Tensor, indices: Tensor, cu_seqlens: Tensor, seqused: Tensor | None, rows: int, largest: bool) -> Tensor:
    return grad_out.new_empty((rows, grad_out.shape[1]))


def _pool_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, cu_seqlens, seqused, ctx.largest = inputs
    ctx.rows = x.shape[0]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], cu_seqlens, seqused)


def _pool_backward(op: Any, ctx: Any, grad_out: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return op(grad_out, *ctx.saved_tensors, ctx.rows, ctx.largest), None, None, None


_define.define(
    "masked_pool",
    schema="(Tensor x, Tensor cu_seqlens, Tensor? seqused, bool largest) -> (Tensor out, Tensor indices)",
    backward_schema="(Tensor grad_out, Tensor indices, Tensor cu_seqlens, Tensor? seqused, SymInt rows, bool largest) -> Tensor",
    fake=_pool_fake,
    backward_fake=_pool_backward_fake,
    setup_context=_pool_setup,
    backward=_pool_backward,
    cast_by_autocast=(0,),
)

_define.implement_in_triton("tokens", "factorized_position_embedding", "masked_pool")
