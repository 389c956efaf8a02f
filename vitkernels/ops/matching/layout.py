"""Which targets belong to which image: built once per batch, read by the cost, the assignment and whoever wants pairs of indices back."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitkernels import host
from vitkernels.ops import _check

Array = np.ndarray[Any, Any]
Pairs = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TargetLayout:
    """The targets of a batch, one image after the other: image b has ``sizes[b]`` of them. An image may have none, or more than there are queries.

    Build it with :meth:`from_sizes` or :meth:`from_targets`, once per batch.

    Attributes:
        sizes: targets of each image, on the host.
        cu_targets: int32 [B + 1] on the device of the targets: image b has the targets from ``cu_targets[b]`` up to ``cu_targets[b + 1]``.
    """

    sizes: tuple[int, ...]
    cu_targets: Tensor

    @classmethod
    def from_sizes(cls, sizes: Sequence[int], *, device: torch.device | str = "cpu") -> TargetLayout:
        """Images with so many targets each.

        Raises:
            ValueError: a negative number, the message names the image.
            TypeError: no integers.
        """
        for image, size in enumerate(sizes):
            if not isinstance(size, int):
                raise TypeError(f"TargetLayout: sizes[{image}] is a {type(size).__name__}; it must be an int, the targets of image {image}")
            if size < 0:
                raise ValueError(f"TargetLayout: sizes[{image}] is {size}; image {image} cannot have fewer than 0 targets")
        return cls(tuple(sizes), torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32, device=device))

    @classmethod
    def from_targets(cls, targets: Sequence[Mapping[str, Tensor]], *, labels: str = "class_labels", boxes: str = "boxes") -> TargetLayout:
        """From the list of dicts that DETRs are trained on: for each image labels [T_b] and boxes [T_b, 4].

        Args:
            targets: one dict for each image.
            labels: its key for the labels: ``"class_labels"`` in transformers, ``"labels"`` in the official code.
            boxes: its key for the boxes.

        Raises:
            ValueError: labels and boxes of different numbers, of other shapes, or on different devices; the message names the image.
            TypeError: something that is no tensor.
            KeyError: an image without one of the keys; the message names it.
        """
        device = None
        for image, target in enumerate(targets):
            for key in (labels, boxes):
                if key not in target:
                    raise KeyError(f"TargetLayout: targets[{image}] has no {key!r}; it has {', '.join(map(repr, target))}")
                _check.is_tensor("TargetLayout", f"{key} of image {image}", target[key], "[T_b]" if key == labels else "[T_b, 4]")
            label, box = target[labels], target[boxes]
            if label.dim() != 1:
                raise ValueError(f"TargetLayout: {labels} of image {image} has shape {_check.shape_of(label)}; it must be [T_b]")
            _check.has_shape("TargetLayout", f"{boxes} of image {image}", box, (label.shape[0], 4), "[T_b, 4]")
            device = device or label.device
            for key in (labels, boxes):
                if target[key].device != device:
                    raise ValueError(f"TargetLayout: {key} of image {image} is on {target[key].device}; it must be on {device}, as those of image 0")
        return cls.from_sizes([target[labels].shape[0] for target in targets], device=device or "cpu")

    @property
    def images(self) -> int:
        """How many images, B."""
        return len(self.sizes)

    @functools.cached_property
    def offsets(self) -> tuple[int, ...]:
        """``cu_targets`` on the host."""
        return (0, *itertools.accumulate(self.sizes))

    @property
    def total(self) -> int:
        """How many targets, T."""
        return self.offsets[-1]

    def image_of(self, target: int) -> int:
        """The image that target belongs to."""
        return next(image for image, end in enumerate(self.offsets[1:]) if target < end)

    def pairs(self, matches: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The matches of one layer as scipy and DETR's matchers give them: for each image its matched queries, ascending, and their targets.

        Args:
            matches: int64 [B, Q], as :func:`vitkernels.ops.linear_sum_assignment` returns them.

        Returns:
            For each image two int64 tensors of one length on the CPU; targets are counted from the image's first. Waits for a GPU.
        """
        if matches.dim() != 2 or matches.shape[0] != self.images:
            raise ValueError(f"TargetLayout: matches has shape {_check.shape_of(matches)}; it must be [B, Q] with B = {self.images}")
        if matches.dtype is not torch.int64:
            raise TypeError(f"TargetLayout: matches has dtype {matches.dtype}; it must be torch.int64")
        queries, targets, counts = (host.compiled("pairs_of") or _pairs_of)(np.ascontiguousarray(matches.cpu().numpy()), self.offsets)
        split = (torch.from_numpy(indices).split_with_sizes(counts) for indices in (queries, targets))
        return list(zip(*split, strict=True))

    def matches(self, pairs: Pairs, queries: int) -> Tensor:
        """The inverse of :meth:`pairs`: int64 [B, Q], the target of each query counted over the batch, -1 where it has none.

        Args:
            pairs: for each image its matched queries and their targets, as any DETR matcher returns them.
            queries: Q.

        Raises:
            ValueError: another number of images, a query or a target that does not exist; the message names the image.
        """
        if len(pairs) != self.images:
            raise ValueError(f"TargetLayout: there are pairs for {len(pairs)} images; there must be for {self.images}")
        found = torch.full((self.images, queries), -1, dtype=torch.int64)
        for image, ((query, target), size, offset) in enumerate(zip(pairs, self.sizes, self.offsets, strict=False)):
            query, target = query.cpu(), target.cpu()
            for name, index, count in (("query", query, queries), ("target", target, size)):
                if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < count:
                    raise ValueError(f"TargetLayout: a {name} of image {image} is outside of [0, {count})")
            found[image, query] = target + offset
        return found.to(self.cu_targets.device)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TargetLayout:
        """The same layout on another device."""
        return TargetLayout(self.sizes, self.cu_targets.to(device, non_blocking=non_blocking))


def _pairs_of(matches: Array, offsets: tuple[int, ...]) -> tuple[Array, Array, list[int]]:
    """What the host module computes, where it is not built."""
    images, queries = (matches >= 0).nonzero()
    targets = matches[images, queries] - np.asarray(offsets[:-1], np.int64)[images]
    return queries, targets, np.bincount(images, minlength=len(matches)).tolist()
