"""Shapes, layouts and options drawn by Hypothesis: the corners nobody thought to put into the registry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitkernels.registry import Sample

from .oracle import Target, assert_obeys_the_rule

pytestmark = pytest.mark.fused

_LAYOUTS = ("contiguous", "channels_last", "transposed", "strided", "expanded", "offset")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _arranged(tensor: Tensor, layout: str) -> Tensor:
    """The tensor's values (its first image's, for ``expanded``) under other strides or another offset."""
    if layout == "channels_last":
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        tensor = tensor.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "strided":
        tensor = torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=-1)[..., 0]
    elif layout == "expanded":
        tensor = tensor[:1].expand(tensor.shape) if tensor.shape[0] else tensor
    elif layout == "offset":
        padded = torch.full((tensor.numel() + 3,), torch.nan, dtype=tensor.dtype)
        padded[3:] = tensor.flatten()
        tensor = padded[3:].view(tensor.shape)  # not aligned to any vector
    return tensor


@st.composite
def _attention(draw: st.DrawFn) -> dict[str, Any]:
    shape = draw(st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(0, 6), st.integers(0, 40)))
    return {
        "shape": shape,
        "layouts": draw(st.tuples(*[st.sampled_from(_LAYOUTS)] * 3)),
        "dtype": draw(st.sampled_from(_DTYPES)),
        "seed": draw(st.integers(0, 2**31)),
    }


@st.composite
def _self_attention(draw: st.DrawFn) -> dict[str, Any]:
    patch = draw(st.none() | st.tuples(st.integers(1, 4), st.integers(1, 4)))
    grid = draw(st.tuples(st.integers(0, 9), st.integers(0, 9)))
    return {
        "shape": (draw(st.integers(0, 3)), draw(st.integers(1, 40)), *(g * p for g, p in zip(grid, patch or (1, 4), strict=True))),
        "patch_size": patch,
        "biases": draw(st.tuples(st.booleans(), st.booleans())),
        "convolution": draw(st.booleans()),
        "layout": draw(st.sampled_from(_LAYOUTS)),
        "dtype": draw(st.sampled_from(_DTYPES)),
        "seed": draw(st.integers(0, 2**31)),
    }


def _make_attention(drawn: dict[str, Any], device: str) -> Sample:
    generator = torch.Generator().manual_seed(drawn["seed"])
    batch, dim, positions, patches = drawn["shape"]
    tensors = (torch.randn(batch, channels, positions, patches, generator=generator).to(drawn["dtype"]) for channels in (1, dim, dim))
    return Sample(str(drawn), tuple(_arranged(t, layout).to(device).requires_grad_() for t, layout in zip(tensors, drawn["layouts"], strict=True)))


def _make_self_attention(drawn: dict[str, Any], device: str) -> Sample:
    generator = torch.Generator().manual_seed(drawn["seed"])
    dim = drawn["shape"][1]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(drawn["dtype"])

    tail = (1, 1) if drawn["convolution"] else ()
    args = [
        _arranged(draw(*drawn["shape"]), drawn["layout"]),
        draw(1 + 2 * dim, dim, *tail) * dim**-0.5,
        draw(1 + 2 * dim) if drawn["biases"][0] else None,
        draw(dim, dim, *tail) * dim**-0.5,
        draw(dim) if drawn["biases"][1] else None,
    ]
    return Sample(str(drawn), tuple(None if a is None else a.to(device).requires_grad_() for a in args), {"patch_size": drawn["patch_size"]})


@st.composite
def _cascaded(draw: st.DrawFn) -> dict[str, Any]:
    window = draw(st.integers(1, 9))
    kernels = tuple(draw(st.lists(st.sampled_from((1, 3, 5, 7, 9)), min_size=1, max_size=4)))
    split = draw(st.integers(4, 24))  # of a tensor of one or two numbers a largest error says little
    return {
        "size": (draw(st.integers(0, 3)), len(kernels) * split, *(window + draw(st.integers(0, 12)) for _ in range(2))),
        "window": window,
        "kernels": kernels,
        "key_dim": draw(st.integers(4, 20)),
        "value_dim": split if len(kernels) > 1 else draw(st.integers(4, 40)),
        "biases": draw(st.lists(st.booleans(), min_size=2 * len(kernels) + 1, max_size=2 * len(kernels) + 1)),
        "convolution": draw(st.booleans()),
        "layout": draw(st.sampled_from(_LAYOUTS)),
        "dtype": draw(st.sampled_from(_DTYPES)),
        "seed": draw(st.integers(0, 2**31)),
    }


def _make_cascaded(drawn: dict[str, Any], device: str) -> Sample:
    generator = torch.Generator().manual_seed(drawn["seed"])
    kernels, key_dim, channels, window = drawn["kernels"], drawn["key_dim"], drawn["size"][1], drawn["window"]
    split, inner = channels // len(kernels), len(kernels) * drawn["value_dim"]
    rows = 2 * key_dim + drawn["value_dim"]
    tail = (1, 1) if drawn["convolution"] else ()

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(drawn["dtype"])

    has_bias = iter(drawn["biases"])
    args = (
        _arranged(draw(*drawn["size"]), drawn["layout"]),
        [draw(rows, split, *tail, scale=split**-0.5) for _ in kernels],
        [draw(rows) if next(has_bias) else None for _ in kernels],
        [draw(key_dim, 1, k, k, scale=1 / k) for k in kernels],
        [draw(key_dim) if next(has_bias) else None for _ in kernels],
        draw(len(kernels), window * window),
        draw(channels, inner, *tail, scale=inner**-0.5),
        draw(channels) if next(has_bias) else None,
    )
    return Sample(str(drawn), args, {"key_dim": key_dim, "window": window}).mapped(lambda t: t.to(device).requires_grad_())


@st.composite
def _cascaded_norm(draw: st.DrawFn) -> dict[str, Any]:
    drawn = draw(_cascaded())
    # Enough values a channel, and an eps, for statistics that are no accident of two or three numbers; no kernel of one pixel (see the op's samples).
    kernels = tuple(max(k, 3) for k in drawn["kernels"])
    return drawn | {"size": (draw(st.integers(3, 5)), *drawn["size"][1:]), "kernels": kernels, "eps": draw(st.sampled_from((0.1, 1.0)))}


def _make_cascaded_norm(drawn: dict[str, Any], device: str) -> Sample:
    sample = _make_cascaded(drawn, device)
    x, qkv_weights, _, dw_weights, _, attention_bias, proj_weight, _ = sample.args
    generator = torch.Generator().manual_seed(drawn["seed"])

    def norm(weight: Tensor) -> tuple[Tensor, Tensor]:
        pair = (torch.randn(weight.shape[0], generator=generator) for _ in range(2))
        gamma, beta = (t.to(dtype=weight.dtype, device=device).requires_grad_() for t in pair)
        return gamma, beta

    norms = [norm(w) for w in qkv_weights], [norm(w) for w in dw_weights], norm(proj_weight)
    args = (x, qkv_weights, norms[0], dw_weights, norms[1], attention_bias, proj_weight, norms[2])
    return Sample(sample.name, args, sample.kwargs | {"eps": drawn["eps"]})


# How to draw a call of each op; a new op writes its own here.
_DRAWN = {
    "separable_attention": (_attention, _make_attention),
    "separable_self_attention": (_self_attention, _make_self_attention),
    "cascaded_group_attention": (_cascaded, _make_cascaded),
    "cascaded_group_attention_batch_norm": (_cascaded_norm, _make_cascaded_norm),
}


def test_random_calls_obey_the_rule(target: Target) -> None:
    strategy, make = _DRAWN[target.spec.name]

    @settings(max_examples=8 if target.interpreted else 80, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy())
    def check(drawn: dict[str, Any]) -> None:
        torch.manual_seed(drawn["seed"])  # the cotangent's
        assert_obeys_the_rule(target, make(drawn, target.device))

    check()
