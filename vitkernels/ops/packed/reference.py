"""Attention over packed sequences in plain PyTorch: a loop over the sequences, each one softmax(q k^T scale + bias) v by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels.ops import _define
from vitkernels.ops.packed.layout import PackedLayout, row_ranges, sequence_of_rows


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    *,
    bias: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    qk_norm: str | None,
    norm_weights: tuple[Tensor | None, ...],
    norm_eps: float,
    dense: bool,
) -> tuple[Tensor, Tensor]:
    """``(out, logsumexp)`` of checked arguments; ``dense`` builds the [T_q, T_k] mask instead of looping, which is what can be traced."""
    q_weight, q_bias, k_weight, k_bias = norm_weights
    q = normalise(q, qk_norm, q_weight, q_bias, norm_eps)
    k = normalise(k, qk_norm, k_weight, k_bias, norm_eps)
    groups = q.shape[1] // k.shape[1]
    if groups != 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    if dense:
        return _dense(q, k, v, layout, bias, scale, dropout_p, seed)
    outs, lses = [], []
    end = 0
    for q_begin, q_end, k_begin, k_end in layout.segments or ((0, 0, 0, 0),):
        local = None if bias is None else bias[:, : q_end - q_begin, : k_end - k_begin]
        keep = None
        if dropout_p > 0 and seed is not None:
            rows, columns = (torch.arange(*ends, device=q.device) for ends in ((q_begin, q_end), (k_begin, k_end)))
            keep = keep_mask(seed, q.shape[1], rows, columns, dropout_p)
        out, lse = _attend(q[q_begin:q_end], k[k_begin:k_end], v[k_begin:k_end], local, None, scale, dropout_p, keep)
        outs.append(out)
        lses.append(lse)
        end = q_end
    padding = q.shape[0] - end
    outs.append(v.new_zeros((padding, q.shape[1], v.shape[2])))
    lses.append(torch.full((q.shape[1], padding), -torch.inf, dtype=_define.accumulation_dtype(q.dtype), device=q.device))
    return torch.cat(outs), torch.cat(lses, dim=1)


def _dense(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, bias: Tensor | None, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows, columns = (torch.arange(x.shape[0], device=q.device) for x in (q, k))
    seen, _ = row_ranges(layout.cu_seqlens_q, layout.cu_seqlens_k, layout.seqused_k, q.shape[0], k.shape[0])
    hidden = (columns < seen[:, :1]) | (columns >= seen[:, 1:])  # [T_q, T_k]
    if bias is not None:
        sequence, inside = sequence_of_rows(layout.cu_seqlens_q, q.shape[0])
        i = torch.where(inside, rows - layout.cu_seqlens_q[sequence], 0).clamp_max(max(bias.shape[1] - 1, 0))
        j = (columns - seen[:, :1]).clamp(0, max(bias.shape[2] - 1, 0))
        bias = bias[:, i[:, None], j]
    keep = keep_mask(seed, q.shape[1], rows, columns, dropout_p) if dropout_p > 0 and seed is not None else None
    return _attend(q, k, v, bias, hidden, scale, dropout_p, keep)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, hidden: Tensor | None, scale: float, dropout_p: float, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T scale + bias) v of [n, H, D], [m, H, D], [m, H, Dv]; a query that sees nothing gives 0 and a logsumexp of -inf."""
    logits = torch.einsum("nhd,mhd->hnm", q, k).to(_define.accumulation_dtype(q.dtype)) * scale
    if bias is not None:
        logits = logits + bias
    if hidden is not None:
        logits = logits.masked_fill(hidden, -torch.inf)
    blind = (logits == -torch.inf).all(dim=-1)  # [H, n]
    logits = logits.masked_fill(blind[..., None], 0.0)
    lse = logits.logsumexp(dim=-1).masked_fill(blind, -torch.inf)
    p = logits.softmax(dim=-1).masked_fill(blind[..., None], 0.0)
    if keep is not None:
        p = p * keep * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0)
    return torch.einsum("hnm,mhe->nhe", p.to(v.dtype), v), lse


def normalise(x: Tensor, kind: str | None, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Each head's vector normalised: x [T, H, D]; weight and bias [H, D] or None."""
    if kind is None:
        return x
    width = x.shape[-1]
    if kind == "rms":
        x = F.rms_norm(x, (width,), eps=eps)
    elif kind == "l2":
        x = F.normalize(x, dim=-1, eps=eps) * width**0.5
    else:
        x = F.layer_norm(x, (width,), eps=eps)
    if weight is not None:
        x = x * weight.to(x.dtype)
    return x if bias is None else x + bias.to(x.dtype)


def drop_limit(dropout_p: float) -> int:
    """A logit's weight is dropped where its 32 random bits are at most this."""
    return min(max(round(dropout_p * 2**32), 1), 2**32) - 1


def keep_mask(seed: Tensor, heads: int, rows: Tensor, columns: Tensor, dropout_p: float) -> Tensor:
    """Which weights dropout keeps: bool [H, rows, columns] for global rows of q and of k.

    A weight's random number is a function of its place alone, so that no map of them is ever stored and the backward finds the same ones: word
    ``row % 4`` of Philox4x32-10 at the counter (column, row // 4, head, 0) under the key ``seed`` (Salmon et al., Parallel random numbers: as easy as
    1, 2, 3, SC 2011, section 3.3).
    """
    head = torch.arange(heads, device=rows.device)[:, None, None]
    column, group, head = torch.broadcast_tensors(columns[None, None, :], (rows // 4)[None, :, None], head)
    words = _philox(seed, [column, group, head, torch.zeros_like(column)])
    word = torch.stack(words).gather(0, (rows % 4)[None, None, :, None].expand(1, *column.shape))[0]
    return word > drop_limit(dropout_p)


def keep_maps(seed: Tensor, shape: Sequence[int], dropout_p: float, stride: int | None = None) -> Tensor:
    """Which elements of maps [B, H, N, M] dropout keeps: :func:`keep_mask` over B sequences of N queries and M keys, one after the other (or every
    ``stride`` keys one).
    """
    batch, heads, queries, keys = shape
    stride = keys if stride is None else stride
    masks = []
    for b in range(batch):
        rows = torch.arange(b * queries, (b + 1) * queries, device=seed.device)
        columns = torch.arange(b * stride, b * stride + keys, device=seed.device)
        masks.append(keep_mask(seed, heads, rows, columns, dropout_p))
    return torch.stack(masks) if masks else seed.new_zeros(shape, dtype=torch.bool)


def _philox(seed: Tensor, counter: list[Tensor]) -> list[Tensor]:
    """Philox4x32-10 on int64 tensors that hold 32-bit words."""
    word = 0xFFFFFFFF
    key = [seed & word, (seed >> 32) & word]
    c0, c1, c2, c3 = counter
    for _ in range(10):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (second >> 32 & word) ^ c1 ^ key[0], second & word, (first >> 32 & word) ^ c3 ^ key[1], first & word
        key = [(key[0] + 0x9E3779B9) & word, (key[1] + 0xBB67AE85) & word]
    return [c0, c1, c2, c3]
