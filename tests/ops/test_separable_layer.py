"""The attention of a MobileViTv2 layer, its norm and its sum, in one call: against what it stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels import backends
from vitkernels.accuracy import compare_tensors
from vitkernels.ops.bottleneck.reference import Affine, Norm
from vitkernels.ops.separable import layer, reference

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(backends.why_not(layer.NAME, "native", torch.device("cpu"), torch.float32) is not None, reason="no native kernels"),
]

# batch, channels, height, width, patch
CASES: dict[str, tuple[int, int, int, int, tuple[int, int]]] = {
    "as in a model": (2, 64, 16, 16, (2, 2)),
    "odd channels": (3, 33, 6, 10, (2, 2)),
    "fewer channels than a vector": (2, 5, 4, 6, (2, 3)),
    "one group": (1, 40, 24, 16, (1, 1)),
    "groups of one pixel": (2, 20, 8, 8, (8, 8)),
    "many pixels": (1, 96, 64, 32, (4, 2)),
    "one pixel": (2, 12, 1, 1, (1, 1)),
    "empty batch": (0, 16, 4, 4, (2, 2)),
}


def arguments(case: tuple[int, int, int, int, tuple[int, int]], dtype: torch.dtype, plain: bool = False) -> tuple[Any, ...]:
    """``plain``: without weights and biases that may be absent."""
    batch, dim, height, width, patch = case
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, qkv, out = 2 * draw(batch, dim, height, width) + 1, draw(1 + 2 * dim, dim) / dim**0.5, draw(dim, dim) / dim**0.5
    of_qkv, of_out, scale, shift = draw(1 + 2 * dim), draw(dim), draw(dim), draw(dim)
    if plain:
        return x, Affine(qkv), Affine(out), Norm("sample", None, None, 1e-5), patch
    return x, Affine(qkv, of_qkv), Affine(out, of_out), Norm("sample", scale, shift, 1e-5), patch


def expected(x: Tensor, qkv: Affine, out: Affine, norm: Norm, patch: tuple[int, int]) -> Tensor:
    if x.numel() == 0:
        return x
    normed = F.group_norm(x, 1, norm.weight, norm.bias, norm.eps)
    return x + reference.separable_self_attention(normed, *qkv, *out, patch_size=patch)


def exactly(value: Any) -> Any:
    if isinstance(value, Affine | Norm):
        return type(value)(*map(exactly, value))
    return value.double() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_against_what_it_stands_for(name: str, dtype: torch.dtype) -> None:
    for plain in (False, True):
        x, *weights, patch = arguments(CASES[name], dtype, plain)
        exact = expected(x.double(), *map(exactly, weights), patch)
        found = layer.run(x, layer.pack(*weights), patch)
        assert found.shape == x.shape and found.dtype is dtype and found.is_contiguous(memory_format=torch.channels_last)
        if dtype is torch.float64:
            torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)
            continue
        verdict = compare_tensors("output", found, expected(x, *weights, patch), exact)
        assert verdict.holds, verdict


@pytest.mark.parametrize("deviation", [1e-2, 1e-4, 0.0])
def test_a_map_of_nearly_one_value(deviation: float) -> None:
    """Its deviations are small beside its mean: what rounding takes from the mean would be seen in the result."""
    x, *weights, patch = arguments(CASES["as in a model"], torch.float32)
    x = deviation * x - 2.1179
    exact = expected(x.double(), *map(exactly, weights), patch)
    verdict = compare_tensors("output", layer.run(x, layer.pack(*weights), patch), expected(x, *weights, patch), exact)
    assert verdict.holds, verdict


def test_a_query_far_from_the_others() -> None:
    """Logits of hundreds: the largest of a group is subtracted first, across the parts of a sample."""
    x, qkv, out, norm, patch = arguments((1, 24, 32, 32, (2, 2)), torch.float32)
    qkv.weight[0] *= 200
    exact = expected(x.double(), *map(exactly, (qkv, out, norm)), patch)
    verdict = compare_tensors("output", layer.run(x, layer.pack(qkv, out, norm), patch), expected(x, qkv, out, norm, patch), exact)
    assert verdict.holds, verdict


def test_schema_and_fake() -> None:
    x, *weights, patch = arguments(CASES["odd channels"], torch.float32)
    packed = layer.pack(*weights)
    call = (x.contiguous(memory_format=torch.channels_last), *packed.tensors, packed.eps, *patch)
    torch.library.opcheck(torch.ops.vitkernels.separable_layer.default, call, test_utils=("test_schema", "test_faketensor"))


def test_what_does_not_fit_is_refused() -> None:
    x, *weights, patch = arguments(CASES["odd channels"], torch.float32)
    packed = layer.pack(*weights)
    with pytest.raises(RuntimeError, match="patch size must divide the map"):
        layer.run(x, packed, (4, 2))
    with pytest.raises(RuntimeError, match="of the accumulation dtype"):
        layer.run(x.double(), packed, patch)
    with pytest.raises(RuntimeError, match=r"must be contiguous|one number a channel"):
        layer.run(x[:, :20], packed, patch)
    with pytest.raises(NotImplementedError, match="for inference"):
        layer.run(x.requires_grad_(), packed, patch).sum().backward()
