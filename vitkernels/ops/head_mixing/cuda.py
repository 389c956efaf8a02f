"""Re-Attention on a GPU with the CUDA C++ kernels (csrc/head_mixing/cuda_forward.h).

They are the forward in 16 bits, of up to 16 heads of up to 64 columns, without dropout. Whatever else is asked for is done by the Triton kernels, as
are the backward and the statistics of a live batch norm: all read the same logsumexp.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from vitkernels.ops.head_mixing import triton

MOST_HEADS, MOST_COLUMNS = 16, 64

re_attention_backward = triton.re_attention_backward


def re_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mix_weight: Tensor,
    mix_bias: Tensor | None,
    norm: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    live: bool,
    eps: float,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forward of ``vitkernels::re_attention``; arguments and results as its schema in op.py says."""
    small = (mix_weight, mix_bias, norm, norm_weight, norm_bias)
    heads, dim, value_dim = q.shape[1], q.shape[3], v.shape[3]
    if q.dtype is torch.float32 or dropout_p > 0 or heads > MOST_HEADS or dim > MOST_COLUMNS or not _fits(q.device, heads, dim, value_dim):
        return triton.re_attention(q, k, v, *small, mean, var, live, eps, scale, dropout_p, seed)
    library = torch.ops.vitkernels
    rows = tuple(map(_whole, (q, k, v)))
    lse = library.re_attention_lse(rows[0], rows[1], scale) if live else None
    batch = None if lse is None else triton.statistics(q, k, v, lse, mix_weight, mix_bias, scale)
    mean, var = batch or (mean, var)
    dense = (t.contiguous() if isinstance(t, Tensor) else t for t in (*small, mean, var))
    out, lse = library.re_attention_rows(*rows, lse, *dense, eps, scale, value_dim)
    return out.transpose(1, 2), lse, *triton.results_of(batch, mix_weight)


@functools.cache
def _fits(device: torch.device, heads: int, dim: int, value_dim: int) -> bool:
    """Whether this GPU has the shared memory that a block needs."""
    needed = int(torch.ops.vitkernels.re_attention_shared_memory(heads, dim, value_dim))
    return needed <= int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0))


def _whole(x: Tensor) -> Tensor:
    """[B, H, N, D] with rows of whole 16 bytes that begin at multiples of 16 bytes, padded with zeros; where it is so, itself."""
    if triton.in_steps(x, 8, 8) and x.data_ptr() % 16 == 0:
        return x
    padded = x.new_zeros((*x.shape[:3], -(-x.shape[3] // 8) * 8))
    padded[..., : x.shape[3]] = x
    return padded
