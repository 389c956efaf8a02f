"""The Triton kernels run in Triton's interpreter on CPU tensors: every output and gradient against float64, by the 2x rule."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

import vitkernels
from vitkernels import accuracy, registry
from vitkernels.ops.separable import reference
from vitkernels.registry import Sample

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 from the start of the process"),
    pytest.mark.usefixtures("poison"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPS = ("separable_attention", "separable_self_attention")


def _named(value: Any) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def _on_triton(op: str) -> Any:
    spec = registry.get(op)

    def run(*args: Any, **kwargs: Any) -> Tensor:
        with vitkernels.backend("triton"):
            return spec.function(*args, **kwargs)

    return run


def _first(op: str, dtype: torch.dtype = torch.float32) -> Sample:
    return next(registry.get(op).samples(dtype, grad=True, small=True))


def _assert_holds(comparisons: list[accuracy.Comparison]) -> None:
    broken = [f"{c.name}: error {c.error:.3e}, eager's {c.eager_error:.3e}, floor {c.floor:.3e}" for c in comparisons if not c.holds]
    assert not broken, "\n".join(broken)


def _judge(op: str, sample: Sample) -> None:
    spec = registry.get(op)
    comparisons = accuracy.Judge(spec.reference, sample, names=spec.function)(_on_triton(op))
    assert len(comparisons) == 1 + len(accuracy.leaves(sample))
    _assert_holds(comparisons)


def _cases() -> list[Any]:
    names = {op: [s.name for s in registry.get(op).samples(torch.float32, small=True)] for op in OPS}
    # Half precision differs from float32 in loads, stores and dots, not in shapes and strides: every third sample of each.
    return [
        pytest.param(op, dtype, index, id=f"{op}-{_named(dtype)}-{name}")
        for op in OPS
        for offset, dtype in enumerate(DTYPES)
        for index, name in enumerate(names[op])
        if dtype is torch.float32 or index % 3 == offset % 3 or index == 0
    ]


@pytest.mark.parametrize(("op", "dtype", "index"), _cases())
def test_samples(op: str, dtype: torch.dtype, index: int) -> None:
    _judge(op, list(registry.get(op).samples(dtype, grad=True, small=True))[index])


def _self_sample(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **kwargs: Any) -> Sample:
    generator = torch.Generator().manual_seed(0)
    dim = shape[1]

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()

    args = (draw(*shape), draw(1 + 2 * dim, dim, scale=dim**-0.5), draw(1 + 2 * dim), draw(dim, dim, scale=dim**-0.5), draw(dim))
    return Sample("drawn", args, kwargs)


def test_softmax_in_several_splits() -> None:
    """Enough tokens that each group's reduction is cut in pieces, the last one shorter, and that weight gradients are too."""
    _judge("separable_self_attention", _self_sample((1, 8, 2, 1050)))


def test_several_blocks_of_output_channels() -> None:
    """More channels than one accumulator spans (256 in float32)."""
    _judge("separable_self_attention", _self_sample((1, 260, 1, 3)))


@pytest.mark.parametrize("dtype", DTYPES, ids=_named)
@pytest.mark.parametrize(("shape", "patch"), [((2, 20, 4, 7), (4, 1)), ((1, 12, 6, 8), (2, 2))])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_score_scale(dtype: torch.dtype, shape: tuple[int, ...], patch: tuple[int, int], bias: bool) -> None:
    """Dropout's multipliers, here any numbers: sums of scores are then not one, and the key bias matters to the query's gradient."""
    sample = _self_sample(shape, dtype)
    args = [a if bias or i not in (2, 4) else None for i, a in enumerate(sample.args)]
    scale = torch.rand(shape[0], *shape[2:], generator=torch.Generator().manual_seed(3)) * 2

    def eager(x: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None, out_weight: Tensor, out_bias: Tensor | None) -> Tensor:
        dim = x.shape[1]
        qkv = torch.nn.functional.conv2d(reference.unfold(x, patch), qkv_weight[..., None, None], qkv_bias)
        scores = reference.unfold(scale.unsqueeze(1).to(x.dtype), patch)
        out = reference.separable_attention(*qkv.split([1, dim, dim], dim=1), score_scale=scores)
        out = torch.nn.functional.conv2d(out, out_weight[..., None, None], out_bias)
        return reference.fold(out, patch, (x.shape[2], x.shape[3]))

    def fast(*arguments: Tensor | None) -> Tensor:
        return torch.ops.vitkernels_triton.separable_self_attention(*arguments, scale, *patch)[0]

    comparisons = accuracy.Judge(eager, Sample("scaled", tuple(args)))(fast)
    assert len(comparisons) == (6 if bias else 4)
    _assert_holds(comparisons)


def test_dropout_draws_the_reference_mask() -> None:
    sample = _self_sample((2, 16, 6, 6), dropout_p=0.4, training=True, patch_size=(2, 2))
    spec, results = registry.get("separable_self_attention"), []
    for function in (spec.reference, _on_triton(spec.name)):
        torch.manual_seed(5)
        results.append(function(*sample.args, **sample.kwargs))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("op", OPS)
def test_only_the_needed_gradients(op: str) -> None:
    """Each gradient alone is what it is among all, bit for bit, and what is not needed is empty."""
    sample = _self_sample((2, 12, 4, 6), patch_size=(2, 2)) if op == OPS[1] else _first(op)
    function = _on_triton(op)
    output = function(*sample.args, **sample.kwargs)
    grad_output = accuracy.output_gradient(output)
    together = torch.autograd.grad(output, sample.args, grad_output)
    for index, expected in enumerate(together):
        args = [a.detach().requires_grad_(i == index) for i, a in enumerate(sample.args)]
        (alone,) = torch.autograd.grad(function(*args, **sample.kwargs), [args[index]], grad_output)
        assert torch.equal(alone, expected), f"gradient {index}"


def test_unneeded_gradients_are_empty() -> None:
    x, *weights = (a.detach() for a in _self_sample((1, 8, 4, 4)).args)
    y, *saved = torch.ops.vitkernels_triton.separable_self_attention(x, *weights, None, 2, 2)
    for needed in ((True, False, False), (False, True, False), (False, False, True), (False, False, False)):
        grads = torch.ops.vitkernels_triton.separable_self_attention_backward(y, x, *weights[:3], None, *saved, 2, 2, *needed)
        wanted = (needed[0], needed[1], needed[1], needed[2], needed[2])
        assert [g.numel() > 0 for g in grads] == list(wanted)
        assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=_named)
@pytest.mark.parametrize("op", OPS)
def test_bit_equal_from_run_to_run(op: str, dtype: torch.dtype) -> None:
    sample = _first(op, dtype)
    with torch.no_grad():
        grad_outputs = accuracy.output_gradients(_on_triton(op)(*sample.args, **sample.kwargs))
    first, second = (accuracy.evaluate(_on_triton(op), sample, grad_outputs) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("op", OPS)
def test_expanded_output_gradient(op: str) -> None:
    """``y.sum().backward()`` sends one number expanded to the whole output."""
    sample = _first(op)
    exact = accuracy.as_float64(sample)
    fast = torch.autograd.grad(_on_triton(op)(*sample.args, **sample.kwargs).sum(), accuracy.leaves(sample))
    eager = torch.autograd.grad(registry.get(op).reference(*sample.args, **sample.kwargs).sum(), accuracy.leaves(sample))
    truth = torch.autograd.grad(registry.get(op).reference(*exact.args, **exact.kwargs).sum(), accuracy.leaves(exact))
    _assert_holds([accuracy.compare_tensors(f"gradient {i}", *three) for i, three in enumerate(zip(fast, eager, truth, strict=True))])


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    """With one token per group the op is a single product: it must be the correctly rounded one, where truncation would be off in half the cases."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(4, c, 1, 1, generator=generator).bfloat16() for c in (1, 64, 64))
    with vitkernels.backend("triton"):
        out = vitkernels.ops.separable_attention(q, k, v)
    assert torch.equal(out, (v.float().relu() * k.float()).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=_named)
def test_nan_is_not_swallowed(dtype: torch.dtype) -> None:
    """A NaN in one value reaches exactly the outputs it reaches in eager: relu keeps it."""
    sample = _first("separable_attention", dtype)
    q, k, v = (a.detach().clone() for a in sample.args)
    v[0, 3, 1, 2] = float("nan")
    with vitkernels.backend("triton"):
        out = vitkernels.ops.separable_attention(q, k, v)
    assert torch.equal(out.isnan(), reference.separable_attention(q, k, v).isnan())
