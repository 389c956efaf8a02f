"""Attention of a batch in Triton: the kernels of packed attention, on sequences of one length.

[B, H, N, D] goes in as the packed rows [B N, H, D]: as it lies where images follow each other at N times the stride of a token, as in any slice of a
projection, and copied elsewhere. Padding goes into the bias. Shared keys are copied behind each image's own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vitkernels.ops._triton import Made
from vitkernels.ops.packed import layout
from vitkernels.ops.packed import triton as packed


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_padding: Tensor | None,
    shared_k: Tensor | None,
    shared_v: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Forward of ``vitkernels::attention``; arguments and results as its schema in op.py says."""
    batch, heads, tokens, _ = q.shape
    k, v = _with_shared(k, shared_k), _with_shared(v, shared_v)
    inputs = (*_places(q, k), _table(bias, key_padding, q, k), None, None, None, None, 0, 0.0, scale, dropout_p, seed)
    out, lse = packed.varlen_attention(_rows(q), _rows(k), _rows(v), *inputs)
    return _images(out, batch, tokens), lse.view(heads, batch, tokens).transpose(0, 1).contiguous()


def attention_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    key_padding: Tensor | None,
    shared_k: Tensor | None,
    shared_v: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    need_q: bool,
    need_k: bool,
    need_v: bool,
    need_bias: bool,
    need_shared_k: bool,
    need_shared_v: bool,
) -> tuple[Tensor, ...]:
    """Backward of ``vitkernels::attention``; arguments and results as its schema in op.py says."""
    batch, keys = k.shape[0], k.shape[2]
    joined_k, joined_v = _with_shared(k, shared_k), _with_shared(v, shared_v)
    grad_rows = None if grad_out is None else _rows(grad_out)
    inputs = (*_places(q, joined_k), _table(bias, key_padding, q, joined_k), None, None, None, None, 0, 0.0, scale, dropout_p, seed)
    grad_q, grad_k, grad_v, grad_table, *_ = packed.varlen_attention_backward(
        *(
            grad_rows,
            None if grad_lse is None else _of_heads(grad_lse),
            _rows(q),
            _rows(joined_k),
            _rows(joined_v),
            _rows(out).contiguous(),
            _of_heads(lse).contiguous(),
            *inputs,
        ),
        *(need_q, need_k or need_shared_k, need_v or need_shared_v, need_bias, False),
    )

    def nothing() -> Tensor:
        return lse.new_empty((0,))

    grad_bias = grad_table.view(-1, *grad_table.shape[-3:]).sum_to_size(bias.shape).contiguous() if need_bias and bias is not None else nothing()
    own_k, grad_shared_k = _apart(grad_k, batch, keys, shared_k, need_k, need_shared_k, nothing)
    own_v, grad_shared_v = _apart(grad_v, batch, keys, shared_v, need_v, need_shared_v, nothing)
    return (_images(grad_q, batch, q.shape[2]) if need_q else nothing(), own_k, own_v, grad_bias, grad_shared_k, grad_shared_v)


def _rows(t: Tensor) -> Tensor:
    """[B, H, N, D] as [B N, H, D]."""
    return t.transpose(1, 2).reshape(t.shape[0] * t.shape[2], t.shape[1], t.shape[3])


def _images(rows: Tensor, batch: int, tokens: int) -> Tensor:
    """[B N, H, D] as [B, H, N, D]."""
    return rows.view(batch, tokens, *rows.shape[1:]).transpose(1, 2)


def _of_heads(lse: Tensor) -> Tensor:
    """[B, H, N] as [H, B N]."""
    return lse.transpose(0, 1).reshape(lse.shape[1], lse.shape[0] * lse.shape[2])


def _with_shared(t: Tensor, shared: Tensor | None) -> Tensor:
    """[B, H, M + m, D]: the shared rows [m, H, D] behind every image's own."""
    if shared is None:
        return t
    return torch.cat((t.transpose(1, 2), shared.expand(t.shape[0], *shared.shape)), dim=1).transpose(1, 2)


def _apart(
    grad: Tensor, batch: int, keys: int, shared: Tensor | None, need: bool, need_shared: bool, nothing: Callable[[], Tensor]
) -> tuple[Tensor, Tensor]:
    """The gradients of an image's own rows, [B, H, M, D], and of the shared ones, [m, H, D], from that of all."""
    if not need and not need_shared:
        return nothing(), nothing()
    if shared is None:
        return _images(grad, batch, keys), nothing()
    whole = grad.view(batch, keys + shared.shape[0], *grad.shape[1:])  # [B, M + m, H, D]
    own = whole[:, :keys].contiguous().transpose(1, 2) if need else nothing()
    return own, whole[:, keys:].sum(0, dtype=torch.float32).to(shared.dtype) if need_shared else nothing()


def _table(bias: Tensor | None, key_padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Bias and padding as the packed kernels take a bias: [H, N, M] of all images, or [B, H, N, M]."""
    batch, heads, tokens, _ = q.shape
    keys = k.shape[2]
    if key_padding is not None:
        shown = torch.nn.functional.pad(key_padding, (0, keys - key_padding.shape[1]), value=True)[:, None, None, :]
        hidden = torch.zeros_like(shown, dtype=torch.float32).masked_fill(~shown, -torch.inf)
        bias = hidden if bias is None else bias.masked_fill(~shown, -torch.inf)
    if bias is None:
        return None
    return bias[0].expand(heads, tokens, keys) if bias.shape[0] == 1 else bias.expand(batch, heads, tokens, keys)


def _places(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, None, Tensor]:
    """Cumulative lengths of the queries and the keys, no number of keys in use, and the work list."""
    key = (q.shape[0], q.shape[2], k.shape[2], q.device)
    cu_q, cu_k, work = _made.get(key, q, lambda: _even(*key))
    return cu_q, cu_k, None, work


_made = Made()


def _even(batch: int, queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    cu_q, cu_k = (torch.arange(batch + 1, dtype=torch.int32, device=device) * n for n in (queries, keys))
    return cu_q, cu_k, layout.work_list(cu_q, cu_k, None, batch * queries, batch * keys)
