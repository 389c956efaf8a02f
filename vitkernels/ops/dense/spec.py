"""Samples, bad inputs and benchmark shapes of attention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels import backends
from vitkernels.ops._arrange import HEAD_DIMS, contiguous, long_in, of_one_projection, one_head_for_all, strided, tokens_first
from vitkernels.ops.dense import op
from vitkernels.registry import BadInput, BenchCase, OpSpec, Sample


def _sample(
    name: str,
    shape: tuple[int, int, int, int],
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    grad: bool = False,
    keys: int | None = None,
    kv_heads: int | None = None,
    value_dim: int | None = None,
    logits: float = 1.0,
    arrange: Callable[..., tuple[Tensor, ...]] = contiguous,
    bias: tuple[int, ...] | None = None,
    hidden: bool = False,
    mask: tuple[int, ...] | None = None,
    padded: tuple[int, ...] | None = None,
    frozen: str = "",
    **kwargs: Any,
) -> Sample:
    """One call.

    Args:
        name: the sample's.
        shape: [B, H, N, D].
        dtype: of all floating tensors.
        device: of all tensors.
        grad: whether they require a gradient.
        keys: M, if not N.
        kv_heads: of k and v, if fewer.
        value_dim: of v, if another.
        logits: their standard deviation, about.
        arrange: puts q, k and v under other strides.
        bias: the shape of one.
        hidden: whether -inf in the bias hides a key from all queries, and all keys from a query.
        mask: the shape of a boolean one.
        padded: how many keys of each image are none; of the first image they lie in between.
        frozen: which of q, k and v need no gradient.
        kwargs: more options of the op.
    """
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    batch, heads, tokens, dim = shape
    keys = tokens if keys is None else keys

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator, dtype=torch.float64) * scale).to(dtype)

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.to(device).detach().requires_grad_(grad)

    qkv = (draw(*shape, scale=logits), draw(batch, kv_heads or heads, keys, dim), draw(batch, kv_heads or heads, keys, value_dim or dim))
    args = (leaf(t).requires_grad_(grad and side not in frozen) for side, t in zip("qkv", arrange(*qkv), strict=True))
    if bias is not None:
        table = draw(*bias)
        if hidden:
            table[..., 1] = table[..., 2, :] = -torch.inf
        kwargs["bias"] = leaf(table)
    if mask is not None:
        kwargs["bias"] = (torch.rand(mask, generator=generator) < 0.7).to(device)
    if padded is not None:
        place = torch.arange(keys)
        kwargs["key_padding"] = torch.stack([place >= n if i == 0 else place < keys - n for i, n in enumerate(padded)]).to(device)
    return Sample(name, tuple(args), kwargs)


def _samples(dtype: torch.dtype, device: str = "cpu", *, grad: bool = False, small: bool = False) -> Iterator[Sample]:
    make = functools.partial(_sample, dtype=dtype, device=device, grad=grad)
    yield make("2x2x17x16", (2, 2, 17, 16))
    yield make("tiny", (1, 2, 3, 4), return_lse=True)
    yield make("tiny, with everything", (2, 2, 3, 3), keys=4, kv_heads=1, value_dim=2, bias=(2, 3, 4), hidden=True, padded=(1, 2), return_lse=True)
    yield make("2x3x20, one projection", (2, 3, 20, 16), arrange=of_one_projection, return_lse=True)
    yield make("no image", (0, 2, 9, 16), return_lse=True)
    yield make("no token", (2, 2, 0, 16))
    yield make("no key", (2, 2, 5, 16), keys=0, return_lse=True)
    # The gradients of q and k are zero here: what is computed of them is the rounding of what cancels.
    yield make("one token", (2, 3, 1, 16), frozen="qk")
    yield make("one head, 70 tokens", (1, 1, 70, 16))
    yield make("grouped heads", (2, 6, 20, 24), kv_heads=2, value_dim=20)
    yield make("all heads on one", (1, 3, 70, 8), kv_heads=1, keys=65, return_lse=True)
    yield make("pooling by one query", (2, 3, 1, 16), keys=50, value_dim=24)
    yield make("bias of heads", (2, 3, 20, 16), bias=(3, 20, 20))
    yield make("bias of everything", (2, 2, 9, 16), keys=20, bias=(2, 2, 9, 20), hidden=True, return_lse=True)
    yield make("bias of images", (2, 2, 9, 16), keys=20, bias=(2, 1, 1, 20))
    yield make("bias of queries", (2, 2, 9, 16), bias=(9, 1))
    yield make("bias of one number", (2, 2, 9, 16), bias=())
    yield make("mask", (2, 2, 20, 16), mask=(2, 1, 20, 20), return_lse=True)
    yield make("mask of keys", (2, 3, 20, 16), mask=(20,))
    yield make("padding", (3, 2, 20, 16), padded=(3, 7, 20), return_lse=True)
    yield make("padding and bias", (2, 2, 20, 16), keys=33, padded=(9, 30), bias=(1, 2, 20, 33))
    # As in the packed op: one float32 for the logsumexp would leave more error than eager has.
    yield make("large logits", (2, 3, 20, 16), logits=50.0)
    yield make("tokens first", (2, 3, 20, 16), arrange=tokens_first, value_dim=24)
    yield make("strided", (2, 3, 20, 16), arrange=strided)
    yield make("expanded", (2, 3, 20, 16), arrange=one_head_for_all)
    for index, dim in enumerate((20, 33, 128) if small else HEAD_DIMS):
        yield make(f"head dim {dim}", (1, 2, 17, dim), value_dim=(dim, 8, 64, 17)[index % 4])
    if small:
        return
    for index, tokens in enumerate((7, 16, 49, 50, 63, 196, 197, 198, 257)):
        yield make(f"{tokens} tokens", (2, 4, tokens, 32), arrange=of_one_projection, bias=(4, tokens, tokens) if index % 3 == 1 else None)
    yield make("577 tokens", (1, 3, 577, 64), arrange=of_one_projection)
    yield make("1025 tokens, bias", (1, 2, 1025, 32), bias=(2, 1025, 1025))
    if long_in(dtype, device):
        yield make("4200 tokens", (1, 1, 4200, 16), return_lse=True)


def _bad_inputs() -> Iterator[BadInput]:
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 6)

    def bad(name: str, exception: type[Exception], words: tuple[str, ...], q: Any = q, k: Any = k, v: Any = v, **kwargs: Any) -> BadInput:
        return BadInput.of(name, exception, words, q, k, v, **kwargs)

    yield bad("q is a list", TypeError, ("q is a list", "[B, H, N, D]"), q=[1.0])
    yield bad("integer q", TypeError, ("q has dtype torch.int64", "floating"), q=q.long())
    yield bad("sparse v", TypeError, ("v has layout torch.sparse_coo", "dense"), v=v.to_sparse())
    yield bad("q of three dimensions", ValueError, ("q has shape [4, 9, 8]", "4-dimensional"), q=q[0])
    yield bad("k of another batch", ValueError, ("k has shape [1, 4, 7, 8]", "[2, H_k, M, D]"), k=k[:1])
    yield bad("k of another head_dim", ValueError, ("k has head_dim 7", "D = 8"), k=k[..., :7])
    yield bad("k of heads that do not divide", ValueError, ("k has 3 heads", "divide H = 4"), k=k[:, :3], v=v[:, :3])
    yield bad("v of other tokens", ValueError, ("v has shape [2, 4, 6, 6]", "[2, 4, 7, D_v >= 1]"), v=v[:, :, :6])
    yield bad("v of another dtype", TypeError, ("v has dtype torch.float64", "torch.float32"), v=v.double())
    yield bad("v on another device", ValueError, ("v is on meta", "cpu"), v=v.to("meta"))
    yield bad("no head", ValueError, ("k has 0 heads", "at least 1"), q=q[:, :0], k=k[:, :0], v=v[:, :0])
    yield bad("bias that does not broadcast", ValueError, ("bias has shape [2, 9, 7]", "[2, 4, 9, 7]"), bias=torch.ones(2, 9, 7))
    yield bad("bias of five dimensions", ValueError, ("bias has shape [1, 2, 4, 9, 7]", "[2, 4, 9, 7]"), bias=torch.ones(1, 2, 4, 9, 7))
    yield bad("integer bias", TypeError, ("bias has dtype torch.int64", "bool"), bias=torch.ones(9, 7).long())
    yield bad("bias is a number", TypeError, ("bias is a float",), bias=0.5)
    yield bad("bias on another device", ValueError, ("bias is on meta", "cpu"), bias=torch.ones(9, 7, device="meta"))
    yield bad("key_padding of the queries", ValueError, ("key_padding has shape [2, 9]", "[2, 7]"), key_padding=torch.ones(2, 9, dtype=torch.bool))
    yield bad(
        "integer key_padding", TypeError, ("key_padding has dtype torch.int64", "True where a key takes part"), key_padding=torch.ones(2, 7).long()
    )
    yield bad("key_padding is a list", TypeError, ("key_padding is a list",), key_padding=[3, 5])
    yield bad("dropout_p above 1", ValueError, ("dropout_p is 1.5", "[0, 1]"), dropout_p=1.5)


def _saved(sample: Sample) -> int:
    """The output and the logsumexp; a bias converted for the kernels; the seed."""
    q, _, v = sample.args[:3]
    bias = sample.kwargs.get("bias")
    wide = 8 if q.dtype is torch.float64 else 4
    rows = q.shape[:3].numel()
    converted = 0 if bias is None or bias.dtype.itemsize == wide else bias.numel() * wide
    padding = sample.kwargs["key_padding"].numel() if "key_padding" in sample.kwargs else 0
    return rows * v.shape[3] * q.element_size() + rows * 8 + converted + padding + 8


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=q.shape[1] != k.shape[1])


def _case(batch: int, tokens: int, heads: int, dim: int, *, bias: bool = False) -> BenchCase:
    def make(dtype: torch.dtype, device: str) -> Sample:
        table = (heads, tokens, tokens) if bias else None
        return _sample("bench", (batch, heads, tokens, dim), dtype=dtype, device=device, arrange=of_one_projection, bias=table)

    return BenchCase(
        name=f"B{batch} N{tokens} {heads}x{dim}{', bias' if bias else ''}",
        make=make,
        flops=4 * batch * heads * tokens * tokens * dim,
        elements_moved=4 * batch * heads * tokens * dim,
    )


_SIZES = ((197, 12, 64), (577, 12, 64), (49, 8, 16))

SPECS = (
    OpSpec(
        name="attention",
        family="dense",
        function=op.attention,
        reference=backends.backend("reference")(op.attention),
        summary="attention with any head dims, bias with gradient, padding (ViT, arXiv 2010.11929)",
        samples=_samples,
        bad_inputs=_bad_inputs,
        bench_cases=(
            *(_case(batch, *size) for size in _SIZES for batch in (1, 8)),
            _case(64, 49, 8, 16),
            _case(8, 197, 12, 64, bias=True),
            _case(64, 49, 3, 32, bias=True),
        ),
        gpu_cases=(_case(64, 197, 12, 64), _case(64, 197, 12, 64, bias=True), _case(1024, 49, 8, 16), _case(1024, 49, 3, 32, bias=True)),
        saved_bytes=_saved,
        peers={"SDPA": _sdpa},
        otherwise=("SDPA",),
        kept_by_autocast=("bias",),
        tiles_span_images=("triton",),
    ),
)
