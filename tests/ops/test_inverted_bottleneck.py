"""The inverted bottleneck against its definition, in every dtype and on every part it may have or lack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vitkernels import backends
from vitkernels.accuracy import compare_tensors
from vitkernels.ops.bottleneck import op
from vitkernels.ops.bottleneck.reference import ACTIVATIONS, Affine, Depthwise, Norm, inverted_bottleneck

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(backends.why_not(op.NAME, "native", torch.device("cpu"), torch.float32) is not None, reason="no native kernels"),
]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# batch, in, hidden, out, height, width, kernel, stride, padding; kernel 0: no depthwise convolution, hidden 0: no expansion
CASES: dict[str, tuple[int, ...]] = {
    "inverted residual": (2, 16, 64, 16, 9, 11, 3, 1, 1),
    "stride 2": (3, 24, 48, 40, 13, 10, 3, 2, 1),
    "kernel 5 without padding": (1, 7, 33, 5, 8, 9, 5, 1, 0),
    "stride beyond the kernel": (2, 8, 16, 8, 11, 11, 2, 3, 0),
    "wide map": (1, 3, 17, 35, 3, 200, 3, 1, 1),
    "no expansion": (2, 20, 0, 12, 7, 7, 3, 1, 1),
    "one pixel": (1, 5, 9, 3, 1, 1, 3, 1, 1),
    "mlp": (2, 40, 130, 40, 5, 29, 0, 1, 0),
    "projection": (3, 300, 0, 31, 4, 5, 0, 1, 0),
    "odd mlp": (1, 21, 67, 21, 1, 67, 0, 1, 0),
    "more tokens than a tile": (1, 136, 264, 48, 1, 131, 0, 1, 0),
    "kernel 5, stride 2": (1, 6, 40, 8, 12, 27, 5, 2, 2),
    "kernel 3, a map of 13 columns": (1, 6, 72, 8, 5, 13, 3, 1, 1),
    "empty batch": (0, 4, 8, 4, 3, 3, 3, 1, 1),
}


def layers(case: tuple[int, ...], dtype: torch.dtype, **options: Any) -> tuple[Tensor, dict[str, Any]]:
    batch, inner, hidden, out, height, width, kernel, stride, padding = case
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, between = draw(batch, inner, height, width), hidden or inner
    arguments: dict[str, Any] = {"project": Affine(draw(out, between) / between**0.5, draw(out)), **options}
    if hidden:
        arguments["expand"] = Affine(draw(hidden, inner) / inner**0.5, None)
    if kernel:
        arguments["depthwise"] = Depthwise(draw(between, kernel, kernel) / kernel, draw(between), stride, padding)
    if (over := options.get("norm")) is not None:
        arguments["norm"] = Norm(over, draw(inner), draw(inner), 1e-5)
    return x, arguments


def exactly(value: Any) -> Any:
    if isinstance(value, tuple):
        return type(value)(*map(exactly, value))
    return value.double() if isinstance(value, Tensor) else value


def check(case: tuple[int, ...], dtype: torch.dtype, with_residual: bool, deviation: float | None = None, **options: Any) -> None:
    x, arguments = layers(case, dtype, **options)
    if deviation is not None:
        x = deviation * x - 2.1179
    eager = inverted_bottleneck(x, **arguments)
    residual = torch.randn(eager.shape).to(dtype) if with_residual else None
    exact = inverted_bottleneck(x.double(), **{name: exactly(value) for name, value in arguments.items()}, residual=exactly(residual))
    found = op.run(x, op.pack(**arguments, activations=dtype), residual)
    assert found.shape == exact.shape and found.dtype is dtype and found.is_contiguous(memory_format=torch.channels_last)
    if dtype is torch.float64:  # where eager is the truth itself: sums in another order
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-13 * float(exact.abs().max()) if exact.numel() else 0)
        return
    verdict = compare_tensors("output", found, inverted_bottleneck(x, **arguments, residual=residual), exact)
    assert verdict.holds, verdict


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_against_the_definition(name: str, dtype: torch.dtype) -> None:
    check(CASES[name], dtype, True, activation="silu")


@pytest.mark.parametrize("norm", ["token", "sample"])
@pytest.mark.parametrize("deviation", [1e-2, 1e-4, 0.0])
def test_norms_of_nearly_one_value(norm: str, deviation: float) -> None:
    """Deviations are small beside the mean: what rounding takes from the mean would be seen in the result."""
    for name in ("mlp", "inverted residual"):
        check(CASES[name], torch.float32, False, deviation, norm=norm)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_activations(activation: str, dtype: torch.dtype) -> None:
    check(CASES["mlp"], dtype, False, activation=activation, out_activation=activation)
    check(CASES["stride 2"], dtype, False, activation=activation, out_activation=activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_any_number(activation: str) -> None:
    """From the smallest to those whose cube is no float any more; infinities and NaN are eager's."""
    magnitudes = torch.cat((torch.logspace(-37, 38, 2000), torch.linspace(0, 30, 2000)))
    x = torch.cat((magnitudes, -magnitudes)).view(1, 1, 1, -1)
    identity = op.pack(Affine(torch.ones(1, 1)), out_activation=activation)
    verdict = compare_tensors("output", op.run(x, identity), ACTIVATIONS[activation](x), ACTIVATIONS[activation](x.double()))
    assert verdict.holds, verdict
    small = magnitudes[magnitudes < 1].view(1, 1, 1, -1)  # judged by themselves
    verdict = compare_tensors("output", op.run(-small, identity), ACTIVATIONS[activation](-small), ACTIVATIONS[activation](-small.double()))
    assert verdict.holds, verdict
    special = torch.tensor([torch.inf, torch.nan]).view(1, 1, 1, -1)
    torch.testing.assert_close(op.run(special, identity), ACTIVATIONS[activation](special), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("over", ["token", "sample"])
@pytest.mark.parametrize("name", ["mlp", "projection", "inverted residual"])
def test_norms(name: str, over: str, dtype: torch.dtype) -> None:
    check(CASES[name], dtype, True, norm=over, activation="gelu")


@pytest.mark.skipif(not op.bfloat16_products(), reason="no bfloat16 products")
def test_only_exact_bfloat16_weights_are_packed_in_bfloat16() -> None:
    _, arguments = layers(CASES["mlp"], torch.bfloat16)
    packed = op.pack(**arguments, activations=torch.bfloat16)
    assert {packed.tensors[2].dtype, packed.tensors[6].dtype} == {torch.bfloat16}
    inexact = arguments | {"expand": Affine(arguments["expand"].weight.float() * 1.001)}
    for other in (op.pack(**inexact, activations=torch.bfloat16), op.pack(**arguments)):
        assert {other.tensors[2].dtype, other.tensors[6].dtype} == {torch.float32}
    x = torch.randn(1, 40, 1, 9)
    with pytest.raises(RuntimeError, match="accumulation dtype"):
        op.run(x, packed)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_is_the_same_alone_and_in_a_crowd(dtype: torch.dtype, threads: int) -> None:
    """However many tokens there are and threads that share them, from three on."""
    x, arguments = layers(CASES["more tokens than a tile"], dtype, norm="token", activation="gelu")
    packed = op.pack(**arguments, activations=dtype)
    alone = torch.cat([op.run(part, packed) for part in x[..., :129].split(3, dim=-1)], dim=-1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for tokens in (129, 67, 17, 11):
            assert torch.equal(op.run(x[..., :tokens], packed)[..., : tokens // 3 * 3], alone[..., : tokens // 3 * 3])
    finally:
        torch.set_num_threads(before)


def test_a_long_sum() -> None:
    """One running sum of so many products would have four times eager's error."""
    check((1, 2048, 0, 64, 8, 8, 0, 1, 0), torch.float32, False)


def test_schema_and_fake() -> None:
    x, arguments = layers(CASES["stride 2"], torch.float32, activation="silu")
    packed = op.pack(**arguments)
    x = x.contiguous(memory_format=torch.channels_last)
    call = (x, *packed.tensors, None, *packed.settings)
    torch.library.opcheck(torch.ops.vitkernels.inverted_bottleneck.default, call, test_utils=("test_schema", "test_faketensor"))


def test_it_has_no_gradient() -> None:
    x, arguments = layers(CASES["mlp"], torch.float32)
    y = op.run(x.requires_grad_(), op.pack(**arguments))
    with pytest.raises(NotImplementedError, match="for inference"):
        y.sum().backward()


def test_weights_that_do_not_fit_are_refused() -> None:
    x, arguments = layers(CASES["mlp"], torch.float32)
    with pytest.raises(RuntimeError, match="expand_weight must be contiguous panels"):
        op.run(x[:, :-1], op.pack(**arguments))
    with pytest.raises(RuntimeError, match="accumulation dtype"):
        op.run(x.double(), op.pack(**arguments))
    with pytest.raises(RuntimeError, match="residual must have the shape of the result"):
        op.run(x, op.pack(**arguments), x[:, :-1])
