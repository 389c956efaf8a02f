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


# How to draw a call of each op; a new op writes its own here.
_DRAWN = {"separable_attention": (_attention, _make_attention), "separable_self_attention": (_self_attention, _make_self_attention)}


def test_random_calls_obey_the_rule(target: Target) -> None:
    strategy, make = _DRAWN[target.spec.name]

    @settings(max_examples=15 if target.interpreted else 80, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy())
    def check(drawn: dict[str, Any]) -> None:
        torch.manual_seed(drawn["seed"])  # the cotangent's
        assert_obeys_the_rule(target, make(drawn, target.device))

    check()
