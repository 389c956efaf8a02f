"""Which images share a sequence: bin packing by token count (NaViT, arXiv 2307.06304, section 2.1), compiled where the host module is built."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor

from vitkernels import host
from vitkernels.navit.patchify import Edge, patch_grid

Method = Literal["first_fit", "best_fit_decreasing"]


def pack(
    lengths_or_images: Sequence[int] | np.ndarray[Any, Any] | Tensor | Sequence[Tensor],
    max_tokens: int,
    *,
    method: Method = "first_fit",
    max_images: int | None = None,
    patch_size: int | None = None,
    edge: Edge = "error",
) -> list[list[int]]:
    """Distribute images over as few sequences of at most ``max_tokens`` tokens as the method finds.

    Args:
        lengths_or_images: tokens per image (integers: a sequence, a numpy array or a tensor of one dimension), or images [C, H, W], which are then
            counted in patches of ``patch_size``. Zero tokens are allowed.
        max_tokens: what a sequence holds.
        method: ``"first_fit"``, the paper's: each image in its order, into the first sequence with room. ``"best_fit_decreasing"``: from the
            largest image, each into the fullest sequence with room; leaves less padding, and needs all lengths before it starts.
        max_images: the most images in a sequence, where the layout has room for so many only; default any number.
        patch_size: side of a patch in pixels, for images.
        edge: for images whose sides are no multiples of ``patch_size``, as in :func:`patchify`.

    Returns:
        For every sequence, in the order they were opened, the indices of its images, ascending. The same input gives the same result, with the
        compiled module and without. O(n log n) in the number of images.

    Raises:
        ValueError: an image has more than ``max_tokens`` tokens (the message names it), a length is negative, or an argument makes no sense.
        TypeError: the lengths are not integers.
    """
    if method not in _PYTHON:
        raise ValueError(f"pack: method is {method!r}; it must be one of {', '.join(map(repr, _PYTHON))}")
    if max_tokens <= 0:
        raise ValueError(f"pack: max_tokens is {max_tokens}; it must be positive")
    if max_images is not None and max_images <= 0:
        raise ValueError(f"pack: max_images is {max_images}; it must be positive")
    lengths = _lengths(lengths_or_images, patch_size, edge)
    if lengths.size and (smallest := int(lengths.min())) < 0:
        raise ValueError(f"pack: image {int(lengths.argmin())} has length {smallest}; a length must not be negative")
    too_long = np.flatnonzero(lengths > max_tokens)
    if too_long.size:
        first, more = int(too_long[0]), too_long.size - 1
        others = f" (and {more} more)" if more else ""
        raise ValueError(
            f"pack: image {first} has {int(lengths[first])} tokens{others}, more than max_tokens = {max_tokens}; resize it, drop tokens "
            "or raise max_tokens"
        )
    bin_of, bins = (host.compiled(method) or _PYTHON[method])(lengths, max_tokens, max_images or max(lengths.size, 1))
    order = np.argsort(bin_of, kind="stable")
    ends = np.cumsum(np.bincount(bin_of, minlength=bins))
    return [part.tolist() for part in np.split(order, ends[:-1])] if bins else []


def padding(lengths: Sequence[int] | np.ndarray[Any, Any], bins: Sequence[Sequence[int]], max_tokens: int) -> float:
    """The share of ``len(bins) * max_tokens`` token slots that no image fills; 0 without bins."""
    used = int(sum(int(lengths[i]) for part in bins for i in part))
    return 1 - used / (len(bins) * max_tokens) if len(bins) else 0.0


def _lengths(given: Any, patch_size: int | None, edge: Edge) -> np.ndarray[Any, Any]:
    """Tokens per image as int64 [n]."""
    if not isinstance(given, (np.ndarray, Tensor)) and any(isinstance(item, Tensor) and item.dim() for item in given):
        if patch_size is None:
            raise ValueError("pack: images are counted in patches, so patch_size must be given")
        return np.array([h * w for h, w in (patch_grid(image, patch_size, edge, i) for i, image in enumerate(given))], dtype=np.int64)
    lengths = np.asarray(given.cpu() if isinstance(given, Tensor) else given)
    if lengths.ndim != 1:
        raise ValueError(f"pack: the lengths have shape {list(lengths.shape)}; they must be of one dimension")
    if lengths.size and not np.issubdtype(lengths.dtype, np.integer):
        raise TypeError(f"pack: the lengths have dtype {lengths.dtype}; they must be integers")
    return lengths.astype(np.int64)


def _first_fit(lengths: np.ndarray[Any, Any], capacity: int, most: int) -> tuple[np.ndarray[Any, Any], int]:
    """csrc/host/packing.cpp, first_fit, word for word: a tree of maxima over the room left."""
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    room, items = [capacity] * (2 * leaves), [0] * leaves
    bin_of = np.empty(len(lengths), dtype=np.int64)
    bins = 0
    for i, length in enumerate(lengths.tolist()):
        node = 1
        while node < leaves:
            node = 2 * node + (room[2 * node] < length)
        bin_of[i] = bin_ = node - leaves
        bins = max(bins, bin_ + 1)
        items[bin_] += 1
        room[node] = room[node] - length if items[bin_] < most else -1
        while node := node // 2:
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bin_of, bins


def _best_fit_decreasing(lengths: np.ndarray[Any, Any], capacity: int, most: int) -> tuple[np.ndarray[Any, Any], int]:
    """csrc/host/packing.cpp, best_fit_decreasing: a sorted list of (room left, bin) where C++ has a set."""
    room: list[tuple[int, int]] = []
    items = [0] * len(lengths)
    bin_of = np.empty(len(lengths), dtype=np.int64)
    bins = 0
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[i])
        at = bisect_left(room, (length, 0))
        if at < len(room):
            left, bin_ = room.pop(at)
        else:
            left, bin_, bins = capacity, bins, bins + 1
        bin_of[i] = bin_
        items[bin_] += 1
        if items[bin_] < most:
            insort(room, (left - length, bin_))
    return bin_of, bins


_PYTHON = {"first_fit": _first_fit, "best_fit_decreasing": _best_fit_decreasing}
