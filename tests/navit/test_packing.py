"""Bin packing: the compiled module and Python give the same bins, both methods do what they say, and the padding is what it should be."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitkernels import host
from vitkernels.navit import pack, padding

METHODS = ("first_fit", "best_fit_decreasing")
needs_module = pytest.mark.skipif(host.compiled("first_fit") is None, reason="vitkernels._host is not built here, or is an older one")

lengths_and_limit = st.integers(1, 60).flatmap(lambda limit: st.tuples(st.lists(st.integers(0, limit), max_size=80), st.just(limit)))
bounds = st.one_of(st.none(), st.integers(1, 5))


def naive(lengths: list[int], limit: int, method: str, most: int) -> list[list[int]]:
    """The definition, O(n * bins)."""
    bins: list[list[int]] = []
    order = range(len(lengths)) if method == "first_fit" else sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for i in order:
        room = [limit - sum(lengths[j] for j in part) if len(part) < most else -1 for part in bins]
        fitting = [b for b in range(len(bins)) if room[b] >= lengths[i]]
        if not fitting:
            bins.append([i])
        else:
            bins[fitting[0] if method == "first_fit" else min(fitting, key=lambda b: room[b])].append(i)
    return [sorted(part) for part in bins]


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(case=lengths_and_limit, most=bounds)
def test_bins_are_those_of_the_definition(method: Any, case: tuple[list[int], int], most: int | None) -> None:
    lengths, limit = case
    assert pack(lengths, limit, method=method, max_images=most) == naive(lengths, limit, method, most or len(lengths) + 1)


@contextlib.contextmanager
def without_module() -> Iterator[None]:
    """As where it is not built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "_module", lambda: None)
        host.compiled.cache_clear()
        try:
            yield
        finally:
            host.compiled.cache_clear()


@needs_module
@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(case=lengths_and_limit, most=bounds)
def test_without_the_compiled_module_the_same(method: Any, case: tuple[list[int], int], most: int | None) -> None:
    lengths, limit = case
    compiled = pack(lengths, limit, method=method, max_images=most)
    with without_module():
        assert host.compiled(method) is None
        assert pack(lengths, limit, method=method, max_images=most) == compiled


@needs_module
@pytest.mark.parametrize("method", METHODS)
def test_a_hundred_thousand_images(method: Any) -> None:
    """Far beyond what a scan of all bins could do in a test: 30 000 bins are open at a time."""
    lengths = np.random.default_rng(0).integers(1, 1000, 100_000)
    bins = pack(lengths, 1600, method=method)
    assert sorted(i for part in bins for i in part) == list(range(len(lengths)))
    assert max(lengths[part].sum() for part in bins) <= 1600
    with without_module():
        assert host.compiled(method) is None
        assert pack(lengths, 1600, method=method) == bins


def realistic(images: int, limit: int, seed: int) -> list[int]:
    """Patches of 16 pixels of images whose side (the root of the area) is log-normal about 224 pixels, a tenth of them above 400, whose aspect ratio
    is log-normal about 1, two fifths of them beyond 4:3 or 3:4, and which are resized where they have more patches than the limit.
    """
    draw = np.random.default_rng(seed)
    side, ratio = np.exp(draw.normal(math.log(224), 0.45, images)), np.exp(draw.normal(0, 0.35, images))
    rows, cols = (np.maximum(np.floor(side * ratio**power / 16), 1).astype(int) for power in (0.5, -0.5))
    return np.minimum(rows * cols, limit).tolist()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("limit", [1024, 2048, 4096])
def test_padding_is_below_two_percent(method: Any, limit: int) -> None:
    """Batches of 512 images, the last sequence of each counted as it is. The mean of 20 batches: the rest that the last sequence leaves is chance."""
    shares = []
    for seed in range(20):
        lengths = realistic(512, limit, seed)
        bins = pack(lengths, limit, method=method)
        shares.append(padding(lengths, bins, limit))
        if method == "best_fit_decreasing":
            assert len(bins) <= math.ceil(sum(lengths) / limit) + 1
    assert 0 < np.mean(shares) < 0.02


def test_images_are_counted_in_patches() -> None:
    images = [torch.zeros(3, 32, 48), torch.zeros(3, 16, 16), torch.zeros(3, 64, 64)]
    assert pack(images, 16, patch_size=16) == [[0, 1], [2]]
    assert pack([torch.zeros(3, 40, 50)], 12, patch_size=16, edge="pad") == [[0]]
    with pytest.raises(ValueError, match=re.escape("image 0 has 12 tokens, more than max_tokens = 6")):
        pack([torch.zeros(3, 40, 50)], 6, patch_size=16, edge="pad")
    assert pack([torch.zeros(3, 40, 50)], 6, patch_size=16, edge="crop") == [[0]]


@pytest.mark.parametrize("lengths", [[5, 6, 5], (5, 6, 5), np.array([5, 6, 5], np.uint8), torch.tensor([5, 6, 5], dtype=torch.int32)])
def test_lengths_of_any_integer_kind(lengths: Any) -> None:
    assert pack(lengths, 10) == [[0, 2], [1]]


def test_nothing_to_pack() -> None:
    assert pack([], 10) == []
    assert pack(np.array([], np.int64), 10, method="best_fit_decreasing") == []
    assert padding([], [], 10) == 0


@pytest.mark.parametrize(
    ("lengths", "options", "error", "words"),
    [
        ([3, 11, 12], {}, ValueError, "image 1 has 11 tokens (and 1 more), more than max_tokens = 10"),
        ([3, -1], {}, ValueError, "image 1 has length -1"),
        ([3.0], {}, TypeError, "dtype float64; they must be integers"),
        ([[3], [4]], {}, ValueError, "shape [2, 1]; they must be of one dimension"),
        ([3], {"max_tokens": 0}, ValueError, "max_tokens is 0"),
        ([3], {"max_images": 0}, ValueError, "max_images is 0"),
        ([3], {"method": "next_fit"}, ValueError, "method is 'next_fit'; it must be one of 'first_fit', 'best_fit_decreasing'"),
        ([torch.zeros(3, 16, 16)], {}, ValueError, "patch_size must be given"),
        ([torch.zeros(3, 16, 17)], {"patch_size": 16}, ValueError, "image 0 is 16 x 17; both must be multiples of patch_size = 16"),
    ],
)
def test_errors(lengths: Any, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        pack(lengths, **{"max_tokens": 10, **options})
