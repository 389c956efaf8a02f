"""Samples, bad inputs and benchmark shapes of the batch norm with its activation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels.ops._arrange import as_it_is, first_for_all, part_of_wider_rows, with_gaps
from vitkernels.ops.batch_norm import op, reference
from vitkernels.registry import BadInput, BenchCase, OpSpec, Sample

Shape = tuple[int, int, int, int]


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _format(arrange: Callable[[Tensor], Tensor]) -> str:
    return "channels_last" if arrange is _channels_last else "contiguous"


def _sample(
    name: str,
    shape: Shape,
    activation: str = "silu",
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    grad: bool = False,
    arrange: Callable[[Tensor], Tensor] = as_it_is,
    mean: float = 0.3,
    deviation: float = 1.0,
    wide: bool = False,
    eps: float = 1e-5,
) -> Sample:
    """One call on values of this mean and standard deviation; ``wide`` leaves weight and bias in float32."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    x = arrange((mean + deviation * draw(*shape)).to(dtype))
    kept = torch.float32 if wide else dtype
    weight, bias = (1 + 0.3 * draw(shape[1])).to(kept), (0.3 * draw(shape[1])).to(kept)
    args = tuple(t.to(device).detach().requires_grad_(grad) for t in (x, weight, bias))
    return Sample(name, args, {"activation": activation, "eps": eps})


def _samples(dtype: torch.dtype, device: str = "cpu", *, grad: bool = False, small: bool = False) -> Iterator[Sample]:
    make = functools.partial(_sample, dtype=dtype, device=device, grad=grad)
    yield make("3x20x7x6", (3, 20, 7, 6))
    yield make("2x5x3x4, tiny", (2, 5, 3, 4))
    for activation in op.ACTIVATIONS:
        for arrange in (as_it_is, _channels_last):
            kind = f"{activation}_{_format(arrange)}"
            yield make(f"4x33x9x5 {kind}", (4, 33, 9, 5), activation, arrange=arrange)
            yield make(f"2x64x14x14 {kind}", (2, 64, 14, 14), activation, arrange=arrange)
    for channels in (1, 2, 7, 16, 17, 48, 100):
        yield make(f"{channels} channels", (3, channels, 5, 5), arrange=_channels_last)
        yield make(f"{channels} channels, planes", (3, channels, 5, 5), "relu")
    for side in (1, 2, 4, 7):
        yield make(f"map of {side}", (9, 12, side, side), "none")
        yield make(f"map of {side}, channels last", (9, 12, side, side), arrange=_channels_last)
    yield make("one image", (1, 24, 8, 8), arrange=_channels_last)
    yield make("two values", (2, 6, 1, 1), "none", eps=0.1)
    yield make("far from 0", (4, 24, 8, 8), "none", mean=30.0)
    yield make("far from 0, channels last", (4, 24, 8, 8), "none", mean=30.0, arrange=_channels_last)
    yield make("near 0", (4, 24, 8, 8), deviation=1e-3, mean=0.0, arrange=_channels_last)
    yield make("strided", (3, 20, 6, 7), arrange=with_gaps)
    yield make("part of wider rows", (3, 20, 6, 7), arrange=part_of_wider_rows)
    yield make("images share memory", (3, 20, 6, 7), arrange=first_for_all)
    if dtype in (torch.bfloat16, torch.float16):
        yield make("parameters in float32", (3, 20, 7, 6), wide=True, arrange=_channels_last)
    if not small:
        yield make("large", (2, 72, 64, 65))
        yield make("large, channels last", (2, 72, 64, 65), arrange=_channels_last)
        yield make("many channels", (2, 1030, 9, 8), "relu", arrange=_channels_last)


def _bad_inputs() -> Iterator[BadInput]:
    x, weight, bias = torch.randn(2, 6, 4, 4), torch.randn(6), torch.randn(6)

    def bad(
        name: str, exception: type[Exception], words: tuple[str, ...], x: Any = x, weight: Any = weight, bias: Any = bias, **options: Any
    ) -> BadInput:
        return BadInput.of(name, exception, words, x, weight, bias, **options)

    yield bad("x is a list", TypeError, ("x is a list", "[B, C, H, W]"), x=[1.0])
    yield bad("x of tokens", ValueError, ("x has shape [2, 6, 16]", "[B, C, H, W]"), x=x.flatten(2))
    yield bad("integer x", TypeError, ("x has dtype torch.int64", "floating"), x=x.long())
    yield bad("sparse x", TypeError, ("x has layout torch.sparse_coo", "dense"), x=x.to_sparse())
    yield bad("one value a channel", ValueError, ("x has shape [1, 6, 1, 1]", "more than one value"), x=x[:1, :, :1, :1])
    yield bad("batch of none", ValueError, ("x has shape [0, 6, 4, 4]", "more than one value"), x=x[:0])
    yield bad("weight missing", TypeError, ("weight is a NoneType", "[C]"), weight=None)
    yield bad("weight too short", ValueError, ("weight has shape [5]", "[C] = [6]"), weight=weight[:5])
    yield bad("bias of two dimensions", ValueError, ("bias has shape [6, 1]", "[C] = [6]"), bias=bias[:, None])
    yield bad("bias of another dtype", TypeError, ("bias has dtype torch.float16", "torch.float32"), bias=bias.half())
    yield bad("weight on another device", ValueError, ("weight is on meta", "cpu"), weight=weight.to("meta"))
    yield bad("unknown activation", ValueError, ("activation is 'gelu'", "'silu'"), activation="gelu")


def _saved(sample: Sample) -> int:
    """Weight and bias in the accumulation dtype, and the statistics."""
    x = sample.args[0]
    return 4 * x.shape[1] * (8 if x.dtype is torch.float64 else 4)


def _in_place(x: Tensor, weight: Tensor, bias: Tensor, *, activation: str = "none", eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    """As models write it, with the activation in place."""
    y, mean, var = reference.batch_norm_act(x, weight, bias, eps=eps)
    in_place: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda y: y, "relu": F.relu_, "silu": functools.partial(F.silu, inplace=True)}
    return in_place[activation](y), mean, var


def _case(shape: Shape, activation: str, arrange: Callable[[Tensor], Tensor]) -> BenchCase:
    def make(dtype: torch.dtype, device: str) -> Sample:
        return _sample("bench", shape, activation, dtype=dtype, device=device, arrange=arrange, wide=dtype is not torch.float64)

    name = f"B{shape[0]} {shape[1]}x{shape[2]}x{shape[3]} {activation} {_format(arrange)}"
    return BenchCase(name=name, make=make, flops=0, elements_moved=3 * torch.Size(shape).numel())


SPECS = (
    OpSpec(
        name=op.NAME,
        family="batch_norm",
        function=op.batch_norm_act,
        reference=reference.batch_norm_act,
        summary="batch normalisation with the activation behind it, for training (arXiv 1502.03167)",
        samples=_samples,
        bad_inputs=_bad_inputs,
        bench_cases=(
            _case((1, 64, 128, 128), "silu", _channels_last),
            _case((8, 64, 128, 128), "silu", _channels_last),
            _case((8, 256, 32, 32), "silu", _channels_last),
            _case((8, 512, 8, 8), "silu", _channels_last),
            _case((8, 64, 128, 128), "silu", as_it_is),
            _case((16, 64, 14, 14), "relu", as_it_is),
        ),
        saved_bytes=_saved,
        peers={"in place": _in_place},
        kept_by_autocast=("weight", "bias"),
    ),
)
