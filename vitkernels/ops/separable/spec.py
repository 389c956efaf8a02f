"""Samples, bad inputs and benchmark shapes of the separable ops."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels.ops.separable import op, reference
from vitkernels.registry import BadInput, BenchCase, OpSpec, Sample

# (B, d, P, N): empty and single tokens, batches of none, vector tails on both axes, widths that are no multiple of anything.
_SHAPES = (
    (2, 32, 4, 16),
    (0, 16, 4, 16),
    (2, 8, 4, 0),
    (1, 1, 1, 1),
    (3, 5, 4, 1),
    (2, 20, 1, 7),
    (1, 33, 2, 49),
    (2, 24, 9, 5),
    (1, 48, 4, 63),
    (1, 30, 4, 197),
    (1, 16, 1, 1025),
    (1, 72, 64, 4),
    (1, 128, 4, 257),
)
# (B, d, H, W, patch)
_MAPS = (
    (2, 32, 8, 8, (2, 2)),
    (1, 24, 6, 10, (2, 2)),
    (1, 17, 14, 14, (2, 2)),
    (2, 16, 9, 6, (3, 2)),
    (1, 8, 16, 16, (8, 8)),
    (1, 64, 32, 32, (2, 2)),
)


def _layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values under other strides."""
    yield "channels_last", x.contiguous(memory_format=torch.channels_last)
    yield "transposed", x.transpose(2, 3).contiguous().transpose(2, 3)
    wide = torch.empty(*x.shape[:3], 2 * x.shape[3], dtype=x.dtype)
    wide[..., ::2] = x
    yield "strided", wide[..., ::2]
    yield "expanded", x[:1].expand(3, *x.shape[1:])


def _leaf(tensor: Tensor, device: str, grad: bool) -> Tensor:
    """Move to the device under the same strides; a leaf of its own."""
    moved = tensor.to(device)
    return moved.detach().requires_grad_(grad)


def _core_samples(dtype: torch.dtype, device: str = "cpu", *, grad: bool = False, small: bool = False) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(0)

    def make(name: str, shape: tuple[int, ...], arrange: Any = lambda t: t) -> Sample:
        batch, _, positions, patches = shape
        q = torch.randn(batch, 1, positions, patches, generator=generator, dtype=torch.float64) * 3
        k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        return Sample(name, tuple(_leaf(arrange(t.to(dtype)), device, grad) for t in (q, k, v)))

    shapes = _SHAPES[:8] if small else _SHAPES
    for shape in shapes:
        yield make("x".join(map(str, shape)), shape)
    for name in ("channels_last", "transposed", "strided", "expanded"):
        yield make(name, (2, 12, 4, 18), lambda t, name=name: dict(_layouts(t))[name])


def _weights(dim: int, dtype: torch.dtype, bias: bool, conv: bool, generator: torch.Generator) -> list[Tensor | None]:
    scale = dim**-0.5
    qkv = torch.randn(1 + 2 * dim, dim, generator=generator, dtype=torch.float64) * scale
    out = torch.randn(dim, dim, generator=generator, dtype=torch.float64) * scale
    biases = [torch.randn(n, generator=generator, dtype=torch.float64) * 0.1 if bias else None for n in (1 + 2 * dim, dim)]
    if conv:
        qkv, out = qkv[..., None, None], out[..., None, None]
    weights = [qkv, biases[0], out, biases[1]]
    return [None if w is None else w.to(dtype) for w in weights]


def _self_sample(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    *,
    grad: bool = False,
    bias: bool = True,
    conv: bool = False,
    arrange: Any = lambda t: t,
    seed: int = 0,
    **kwargs: Any,
) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    x = arrange(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
    weights = _weights(shape[1], dtype, bias, conv, generator)
    return Sample(name, tuple(None if t is None else _leaf(t, device, grad) for t in (x, *weights)), kwargs)


def _self_samples(dtype: torch.dtype, device: str = "cpu", *, grad: bool = False, small: bool = False) -> Iterator[Sample]:
    make = functools.partial(_self_sample, dtype=dtype, device=device, grad=grad)
    for index, shape in enumerate(_SHAPES[:8] if small else _SHAPES):
        yield make("x".join(map(str, shape)), shape, bias=index % 3 != 2, conv=index % 2 == 0, seed=index)
    for index, (*size, patch) in enumerate(_MAPS[:4] if small else _MAPS):
        for layout in ("contiguous", "channels_last"):
            arrange = (lambda t: t) if layout == "contiguous" else (lambda t: t.contiguous(memory_format=torch.channels_last))
            yield make(f"map {'x'.join(map(str, size))} {layout}", tuple(size), arrange=arrange, seed=index, patch_size=patch)
    for name in ("channels_last", "transposed", "strided", "expanded"):
        yield make(name, (2, 12, 4, 18), arrange=lambda t, name=name: dict(_layouts(t))[name])
        yield make(f"map {name}", (2, 12, 4, 18), arrange=lambda t, name=name: dict(_layouts(t))[name], patch_size=2)
    yield make("large logits", (1, 16, 2, 40), arrange=lambda t: t * 50)


def _core_bad_inputs() -> Iterator[BadInput]:
    q, k, v = torch.randn(2, 1, 4, 9), torch.randn(2, 8, 4, 9), torch.randn(2, 8, 4, 9)

    def bad(name: str, exception: type[Exception], words: tuple[str, ...], *args: Any) -> BadInput:
        return BadInput.of(name, exception, words, *args)

    yield bad("q with two channels", ValueError, ("q has shape [2, 8, 4, 9]", "[B, 1, P, N]"), k, k, v)
    yield bad("q of three dimensions", ValueError, ("q has shape [1, 4, 9]", "[B, 1, P, N]"), q[0], k, v)
    yield bad("k of another N", ValueError, ("k has shape [2, 8, 4, 8]", "[2, 8, 4, 9]"), q, k[..., :8], v)
    yield bad("v of another d", ValueError, ("v has shape [2, 7, 4, 9]", "[2, 8, 4, 9]"), q, k, v[:, :7])
    yield bad("v of another dtype", TypeError, ("v has dtype torch.float64", "torch.float32"), q, k, v.double())
    yield bad("integer q", TypeError, ("q has dtype torch.int64", "floating"), q.long(), k, v)
    yield bad("v on another device", ValueError, ("v is on meta", "cpu"), q, k, v.to("meta"))
    yield bad("k is a list", TypeError, ("k is a list",), q, [1.0], v)


def _self_bad_inputs() -> Iterator[BadInput]:
    x = torch.randn(2, 8, 4, 6)
    good = {
        "x": x,
        "qkv_weight": torch.randn(17, 8),
        "qkv_bias": torch.randn(17),
        "out_weight": torch.randn(8, 8),
        "out_bias": torch.randn(8),
    }

    def bad(name: str, exception: type[Exception], words: tuple[str, ...], kwargs: dict[str, Any] | None = None, **changes: Any) -> BadInput:
        return BadInput(name, Sample(name, tuple((good | changes).values()), kwargs or {}), exception, words)

    yield bad("x of three dimensions", ValueError, ("x has shape [8, 4, 6]", "[B, d, P, N]"), x=x[0])
    yield bad("x is a list", TypeError, ("x is a list",), x=[1.0])
    yield bad("integer x", TypeError, ("x has dtype torch.int64", "floating"), x=x.long())
    yield bad("sparse x", TypeError, ("x has layout torch.sparse_coo", "dense"), x=x.to_sparse())
    yield bad("qkv_weight too short", ValueError, ("qkv_weight has shape [16, 8]", "[17, 8]"), qkv_weight=torch.randn(16, 8))
    yield bad("qkv_weight of a 3x3 conv", ValueError, ("qkv_weight has shape [17, 8, 3, 3]", "[17, 8]"), qkv_weight=torch.randn(17, 8, 3, 3))
    yield bad("qkv_weight missing", TypeError, ("qkv_weight is a NoneType",), qkv_weight=None)
    yield bad(
        "qkv_weight of another dtype", TypeError, ("qkv_weight has dtype torch.float64", "torch.float32"), qkv_weight=torch.randn(17, 8).double()
    )
    yield bad("qkv_bias too long", ValueError, ("qkv_bias has shape [18]", "[17]"), qkv_bias=torch.randn(18))
    yield bad("out_weight not square", ValueError, ("out_weight has shape [8, 9]", "[8, 8]"), out_weight=torch.randn(8, 9))
    yield bad("out_bias of another dtype", TypeError, ("out_bias has dtype torch.bfloat16", "torch.float32"), out_bias=torch.randn(8).bfloat16())
    yield bad("out_bias two-dimensional", ValueError, ("out_bias has shape [8, 1]", "[8]"), out_bias=torch.randn(8, 1))
    yield bad("out_weight on another device", ValueError, ("out_weight is on meta", "cpu"), out_weight=torch.randn(8, 8, device="meta"))
    yield bad("dropout_p above 1", ValueError, ("dropout_p is 1.5", "[0, 1]"), {"dropout_p": 1.5})
    yield bad("patch_size does not divide", ValueError, ("[2, 8, 4, 6]", "multiples of patch_size 4 x 4"), {"patch_size": 4})
    yield bad("patch_size of three numbers", ValueError, ("patch_size is (2, 2, 2)", "pair"), {"patch_size": (2, 2, 2)})
    yield bad("patch_size zero", ValueError, ("patch_size is 0", "positive"), {"patch_size": 0})


def _without_keys(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    patch_size: Any = None,
) -> Tensor:
    """The same algebra in plain PyTorch (no key per token): what a careful user could write today, and so the fair peer."""
    dim = x.shape[1]
    tokens = x if patch_size is None else reference.unfold(x, patch_size)
    weight = qkv_weight.reshape(-1, dim)
    w_q, w_k, w_v = weight.split([1, dim, dim])
    b_q, b_k, b_v = qkv_bias.split([1, dim, dim])
    scores = F.conv2d(tokens, w_q[..., None, None], b_q).softmax(-1)  # [B, 1, P, N]
    pooled = torch.einsum("bdpn,bpn->bpd", tokens, scores[:, 0])
    context = F.linear(pooled, w_k, b_k).transpose(1, 2)[..., None]  # [B, d, P, 1]
    out = F.conv2d(F.relu(F.conv2d(tokens, w_v[..., None, None], b_v)) * context, out_weight.reshape(dim, dim, 1, 1), out_bias)
    return out if patch_size is None else reference.fold(out, patch_size, (x.shape[2], x.shape[3]))


def _self_case(batch: int, dim: int, positions: int, patches: int) -> BenchCase:
    tokens = batch * positions * patches
    return BenchCase(
        name=f"B{batch} d{dim} N{patches}",
        make=lambda dtype, device: _self_sample("bench", (batch, dim, positions, patches), dtype, device, conv=True),
        flops=4 * dim * dim * tokens + 4 * dim * tokens + 2 * dim * dim * batch * positions,
        elements_moved=2 * dim * tokens + 3 * dim * dim,
    )


def _core_case(batch: int, dim: int, positions: int, patches: int) -> BenchCase:
    def make(dtype: torch.dtype, device: str) -> Sample:
        # As a model makes them: three slices of one projection.
        qkv = torch.randn(batch, 1 + 2 * dim, positions, patches, generator=torch.Generator().manual_seed(0)).to(dtype=dtype, device=device)
        return Sample("bench", tuple(qkv.split([1, dim, dim], dim=1)))

    elements = batch * dim * positions * patches
    return BenchCase(name=f"B{batch} d{dim} N{patches}", make=make, flops=2 * elements, elements_moved=3 * elements)


_BENCH_SHAPES = (
    (1, 128, 4, 256),
    (1, 192, 4, 64),
    (1, 256, 4, 16),
    (16, 128, 4, 256),
    (16, 192, 4, 64),
    (16, 256, 4, 16),
    (1, 128, 4, 4096),
)
_GPU_SHAPES = (
    (1, 128, 4, 256),
    (256, 128, 4, 256),
    (256, 192, 4, 64),
    (256, 256, 4, 16),
    (16, 128, 4, 4096),
)


def _core_saved(sample: Sample) -> int:
    _, k, _ = sample.args
    batch, dim, positions, patches = k.shape
    return batch * positions * (patches + dim) * (8 if k.dtype is torch.float64 else 4)


def _self_saved(sample: Sample) -> int:
    batch, dim, height, width = sample.args[0].shape
    patch = sample.kwargs.get("patch_size")
    ph, pw = (height, 1) if patch is None else (patch, patch) if isinstance(patch, int) else patch
    positions = ph * pw
    tokens = height * width
    # logits, softmax statistics, pooled input; with dropout the scores' multipliers too
    numbers = batch * (tokens + 2 * positions + positions * dim + (tokens if sample.kwargs.get("dropout_p") else 0))
    return numbers * (8 if sample.args[0].dtype is torch.float64 else 4)


SPECS = (
    OpSpec(
        name="separable_attention",
        family="separable",
        function=op.separable_attention,
        reference=reference.separable_attention,
        summary="core of separable self-attention (MobileViTv2, arXiv 2206.02680)",
        samples=_core_samples,
        bad_inputs=_core_bad_inputs,
        bench_cases=tuple(_core_case(*shape) for shape in _BENCH_SHAPES),
        gpu_cases=tuple(_core_case(*shape) for shape in _GPU_SHAPES),
        saved_bytes=_core_saved,
    ),
    OpSpec(
        name="separable_self_attention",
        family="separable",
        function=op.separable_self_attention,
        reference=reference.separable_self_attention,
        summary="separable self-attention with both projections (MobileViTv2, arXiv 2206.02680)",
        samples=_self_samples,
        bad_inputs=_self_bad_inputs,
        bench_cases=tuple(_self_case(*shape) for shape in _BENCH_SHAPES),
        gpu_cases=tuple(_self_case(*shape) for shape in _GPU_SHAPES),
        saved_bytes=_self_saved,
        gpu_working_activations=(1, 3),  # the backward's values times context, and their gradient: op's README
        peers={"eager, keys not projected": _without_keys},
    ),
)
