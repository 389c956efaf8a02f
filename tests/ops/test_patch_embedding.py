"""The projection of patches against its definition: any strides, sides that are no multiple of the patch, every dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vitkernels import backends
from vitkernels.accuracy import compare_tensors
from vitkernels.ops.bottleneck.reference import Affine, Norm
from vitkernels.ops.patch_embedding import op
from vitkernels.ops.patch_embedding.reference import patch_embedding

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(backends.why_not(op.NAME, "native", torch.device("cpu"), torch.float32) is not None, reason="no native kernels"),
]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# shape of the image, patch, output channels
CASES: dict[str, tuple[tuple[int, ...], tuple[int, int], int]] = {
    "usual": ((2, 3, 48, 64), (16, 16), 40),
    "a rest at both sides": ((1, 3, 30, 41), (7, 9), 33),
    "one channel": ((3, 1, 28, 28), (14, 14), 7),
    "many channels, small patches": ((1, 20, 10, 6), (2, 1), 32),
    "more tokens than a tile": ((2, 3, 40, 64), (4, 4), 16),
    "one patch": ((1, 3, 8, 8), (8, 8), 5),
    "empty batch": ((0, 3, 16, 16), (8, 8), 5),
}


def drawn(name: str, dtype: torch.dtype, with_norm: bool) -> tuple[Tensor, dict[str, Any]]:
    shape, patch, out = CASES[name]
    generator, depth = torch.Generator().manual_seed(0), shape[1] * patch[0] * patch[1]

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    norm = Norm("token", draw(depth), draw(depth), 1e-5) if with_norm else None
    return draw(*shape), {"project": Affine(draw(out, depth) / depth**0.5, draw(out)), "patch": patch, "norm": norm}


def cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(cast(part, dtype) for part in value))
    return value.to(dtype) if isinstance(value, Tensor) else value


def packed(arguments: dict[str, Any], dtype: torch.dtype) -> op.Packed:
    accumulation = torch.float64 if dtype is torch.float64 else torch.float32
    return op.pack(**{name: cast(value, accumulation) for name, value in arguments.items()}, activations=dtype)


def exactly(x: Tensor, arguments: dict[str, Any]) -> Tensor:
    return patch_embedding(x.double(), **{name: cast(value, torch.float64) for name, value in arguments.items()})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("name", CASES)
def test_against_the_definition(name: str, with_norm: bool, dtype: torch.dtype) -> None:
    x, arguments = drawn(name, dtype, with_norm)
    found, exact = op.run(x, packed(arguments, dtype)), exactly(x, arguments)
    assert found.shape == exact.shape and found.dtype is dtype and found.is_contiguous(memory_format=torch.channels_last)
    if dtype is torch.float64:  # where eager is the truth itself: sums in another order
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-13 * float(exact.abs().max()) if exact.numel() else 0)
        return
    verdict = compare_tensors("output", found, patch_embedding(x, **arguments), exact)
    assert verdict.holds, verdict


def test_patches_of_nearly_one_colour() -> None:
    """Their deviations are small beside their mean: what rounding takes from the mean would be seen in the result (black margins of photos)."""
    x, arguments = drawn("usual", torch.float32, True)
    for deviation in (1e-2, 1e-4, 0.0):
        flat = deviation * x - 2.1179
        found = op.run(flat, packed(arguments, torch.float32))
        verdict = compare_tensors("output", found, patch_embedding(flat, **arguments), exactly(flat, arguments))
        assert verdict.holds, verdict


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_change_no_bit(dtype: torch.dtype) -> None:
    x, arguments = drawn("a rest at both sides", dtype, True)
    weights = packed(arguments, dtype)
    expected = op.run(x, weights)
    wide = torch.full((x.shape[0], 2 * x.shape[1], x.shape[2] + 3, 2 * x.shape[3]), torch.nan, dtype=dtype)
    view = wide[:, ::2, 3:, 1::2].copy_(x)
    for other in (x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT, view):
        assert torch.equal(op.run(other, weights), expected)
    row = x[:, :1].expand(-1, x.shape[1], -1, -1)
    assert torch.equal(op.run(row, weights), op.run(row.contiguous(), weights))


def test_threads_change_no_bit() -> None:
    x, arguments = drawn("more tokens than a tile", torch.float32, True)
    weights, threads = packed(arguments, torch.float32), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = op.run(x, weights)
        torch.set_num_threads(3)
        assert torch.equal(op.run(x, weights), alone)
    finally:
        torch.set_num_threads(threads)


def test_refusals() -> None:
    x, arguments = drawn("usual", torch.float32, False)
    weights = packed(arguments, torch.float32)
    for wrong, message in (
        (x[:, :2], "weight must be contiguous panels"),
        (x.double(), "weight must be contiguous panels"),
        (x[0], r"x must be \[B, C, H, W\]"),
        (x[:, :0], "with channels"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op.run(wrong, weights)
    with pytest.raises(NotImplementedError, match="no gradient; the convolution"):
        op.run(x.requires_grad_(), weights).sum().backward()
