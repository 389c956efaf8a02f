"""Samples, bad inputs and benchmark shapes of MobileViT's attention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels import backends
from vitkernels.ops._arrange import contiguous, strided
from vitkernels.ops.patch import op, reference
from vitkernels.registry import BadInput, BenchCase, OpSpec, Sample


def _channels_last(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.contiguous(memory_format=torch.channels_last) for t in tensors)


def _of_one_map(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Slices of a projection's [B, 3 C, H, W]."""
    return torch.cat(tensors, dim=1).split([t.shape[1] for t in tensors], dim=1)


def _of_one_row(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same, with the channels last: what a linear layer on pixels leaves."""
    return _channels_last(torch.cat(tensors, dim=1))[0].split([t.shape[1] for t in tensors], dim=1)


def _sample(
    name: str,
    size: tuple[int, int, int],
    heads: int,
    dim: int,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    grad: bool = False,
    value_dim: int | None = None,
    arrange: Callable[..., tuple[Tensor, ...]] = contiguous,
    frozen: str = "",
    **kwargs: Any,
) -> Sample:
    """One call.

    Args:
        name: the sample's.
        size: [B, H, W].
        heads: of all.
        dim: of a head.
        dtype: of all tensors.
        device: of all tensors.
        grad: whether they require a gradient.
        value_dim: of a head of v, if another.
        arrange: puts q, k and v under other strides.
        frozen: which of q, k and v need no gradient.
        kwargs: more options of the op.
    """
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    batch, height, width = size
    drawn = (torch.randn(batch, heads * d, height, width, generator=generator, dtype=torch.float64).to(dtype) for d in (dim, dim, value_dim or dim))
    args = (t.to(device).detach().requires_grad_(grad and side not in frozen) for side, t in zip("qkv", arrange(*drawn), strict=True))
    return Sample(name, tuple(args), {"num_heads": heads} | kwargs)


def _samples(dtype: torch.dtype, device: str = "cpu", *, grad: bool = False, small: bool = False) -> Iterator[Sample]:
    make = functools.partial(_sample, dtype=dtype, device=device, grad=grad)
    yield make("2x8x6, 2 heads of 16", (2, 8, 6), 2, 16)
    yield make("tiny", (1, 4, 4), 1, 3, value_dim=2)
    yield make("2x6x8, channels_last", (2, 6, 8), 2, 18, arrange=_channels_last)
    yield make("2x6x8, slices of one map", (2, 6, 8), 2, 18, arrange=_of_one_map)
    yield make("2x6x8, slices of rows", (2, 6, 8), 2, 18, arrange=_of_one_row)
    yield make("strided", (1, 6, 4), 2, 16, arrange=strided)
    yield make("no image", (0, 4, 4), 2, 16)
    yield make("no pixel", (2, 0, 4), 2, 16)
    # The gradients of q and k are zero: what is computed of them is the rounding of what cancels.
    yield make("one patch", (2, 2, 2), 2, 16, frozen="qk")
    yield make("patches of 1", (2, 3, 5), 2, 16, patch=(1, 1))
    yield make("patches of 3x2", (2, 9, 8), 1, 20, patch=(3, 2), value_dim=24, scale=0.3, arrange=_channels_last)
    yield make("patches as large as the map's height", (1, 4, 12), 1, 16, patch=(4, 1))
    for dim in (36, 60) if small else (16, 18, 20, 30, 36, 48, 60):
        yield make(f"head dim {dim}", (1, 8, 8), 4, dim, arrange=_of_one_row)
    if small:
        return
    yield make("32x32", (1, 32, 32), 4, 36, arrange=_of_one_row)
    yield make("16x48", (2, 16, 48), 4, 48, arrange=_of_one_map)


def _bad_inputs() -> Iterator[BadInput]:
    q, k, v = torch.randn(2, 12, 6, 8), torch.randn(2, 12, 6, 8), torch.randn(2, 8, 6, 8)

    def bad(name: str, exception: type[Exception], words: tuple[str, ...], q: Any = q, k: Any = k, v: Any = v, **kwargs: Any) -> BadInput:
        return BadInput.of(name, exception, words, q, k, v, **{"num_heads": 4, **kwargs})

    yield bad("q is a list", TypeError, ("q is a list", "[B, C, H, W]"), q=[1.0])
    yield bad("integer q", TypeError, ("q has dtype torch.int64", "floating"), q=q.long())
    yield bad("sparse v", TypeError, ("v has layout torch.sparse_coo", "dense"), v=v.to_sparse())
    yield bad("q of three dimensions", ValueError, ("q has shape [12, 6, 8]", "4-dimensional"), q=q[0])
    yield bad("k of other channels", ValueError, ("k has shape [2, 8, 6, 8]", "[2, 12, 6, 8]"), k=k[:, :8])
    yield bad("v of another map", ValueError, ("v has shape [2, 8, 6, 6]", "[2, 8, 6, 8]"), v=v[..., :6])
    yield bad("k of another dtype", TypeError, ("k has dtype torch.float64", "torch.float32"), k=k.double())
    yield bad("v on another device", ValueError, ("v is on meta", "cpu"), v=v.to("meta"))
    yield bad("a patch that does not divide", ValueError, ("patch is (4, 2)", "[2, 12, 6, 8]", "H = 6"), patch=(4, 2))
    yield bad("a patch of nothing", ValueError, ("patch is (0, 2)", "divide"), patch=(0, 2))
    yield bad("a patch of one number", TypeError, ("patch is 2", "(ph, pw)"), patch=2)
    yield bad("heads that do not divide", ValueError, ("num_heads is 5", "12 channels of q"), num_heads=5)
    yield bad("heads that do not divide v", ValueError, ("num_heads is 6", "8 channels of v"), num_heads=6)
    yield bad("no head", ValueError, ("num_heads is 0", "at least 1"), num_heads=0)


def _saved(sample: Sample) -> int:
    """The output and the logsumexp."""
    batch, _, height, width = sample.args[0].shape
    return batch * height * width * (sample.args[2].shape[1] * sample.args[2].element_size() + 8 * sample.kwargs["num_heads"])


def _unfold_sdpa_fold(q: Tensor, k: Tensor, v: Tensor, *, patch: tuple[int, int] = (2, 2), num_heads: int) -> Tensor:
    """What the models compute, with PyTorch's attention."""
    rows = [reference.unfold(t, patch, num_heads) for t in (q, k, v)]
    query, key, value = (t.flatten(0, 2) for t in rows)
    out = F.scaled_dot_product_attention(query, key, value)
    return reference.fold(out.reshape(rows[2].shape), v.shape, patch)


def _case(batch: int, side: int, dim: int) -> BenchCase:
    def make(dtype: torch.dtype, device: str) -> Sample:
        return _sample("bench", (batch, side, side), 4, dim, dtype=dtype, device=device, arrange=_of_one_row)

    return BenchCase(
        name=f"B{batch} {side}x{side} 4x{dim}",
        make=make,
        flops=4 * batch * 4 * dim * side**4 // 4,
        elements_moved=4 * batch * 4 * dim * side**2,
    )


SPECS = (
    OpSpec(
        name="patch_attention",
        family="patch",
        function=op.patch_attention,
        reference=backends.backend("reference")(op.patch_attention),
        summary="attention among equal positions of all patches of a map (MobileViT, arXiv 2110.02178)",
        samples=_samples,
        bad_inputs=_bad_inputs,
        # The three stages of MobileViT-S at 256 x 256.
        bench_cases=tuple(_case(batch, side, dim) for side, dim in ((32, 36), (16, 48), (8, 60)) for batch in (1, 8)),
        gpu_cases=(_case(64, 32, 36), _case(64, 16, 48)),
        saved_bytes=_saved,
        peers={"unfold, SDPA, fold": _unfold_sdpa_fold},
        otherwise=("unfold, SDPA, fold",),
        tiles_span_images=("triton",),
    ),
)
