"""Images of any sizes as one packed sequence of patches (NaViT, arXiv 2307.06304, section 2.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels.navit.dropping import TokenDrop
from vitkernels.ops import PackedLayout

Edge = Literal["error", "crop", "pad"]
_EDGES = ("error", "crop", "pad")


@dataclass(frozen=True)
class PackedBatch:
    """Images as one packed sequence of patches, in the order they were given.

    Attributes:
        tokens: [T, C * p * p], the patches, each flattened channel first (as the weight of a convolution is); padding rows are 0.
        rows: int64 [T], the patch's row in its image; 0 in padding.
        cols: int64 [T], its column.
        image: int64 [T], the image it belongs to, as counted in this batch; -1 in padding.
        grids: int64 [S, 2], rows and columns of patches of each image before any were dropped; (1, 1) where the layout has room for more images.
        layout: where each image's tokens lie; ``layout.total_q`` is T, ``layout.sequences`` is S.
        largest_grid: the most rows and the most columns of any image.
        indices: the position each image had in the list the batch was made from; shorter than S where there is room for more.
        targets: what the data set gave with the images, collated, if a :class:`PackedCollate` made the batch.
    """

    tokens: Tensor
    rows: Tensor
    cols: Tensor
    image: Tensor
    grids: Tensor
    layout: PackedLayout
    largest_grid: tuple[int, int]
    indices: tuple[int, ...]
    targets: Any = None

    def __len__(self) -> int:
        """The number of images."""
        return len(self.indices)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same batch on another device; targets that are tensors (also in tuples, lists and dicts) move along."""
        moved = self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return dataclasses.replace(moved, layout=self.layout.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The same batch with its large tensors in pinned memory; ``DataLoader(pin_memory=True)`` calls it."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, move: Any) -> PackedBatch:
        names = ("tokens", "rows", "cols", "image", "grids")
        targets = torch.utils._pytree.tree_map_only(Tensor, move, self.targets)
        return dataclasses.replace(self, targets=targets, **{name: move(getattr(self, name)) for name in names})


def patchify(
    images: Sequence[Tensor],
    patch_size: int,
    *,
    edge: Edge = "error",
    token_drop: TokenDrop | None = None,
    generator: torch.Generator | None = None,
    capacity: int | None = None,
    max_images: int | None = None,
) -> PackedBatch:
    """Cut images into patches at their own resolution and aspect ratio, and put those of all images one after the other.

    Args:
        images: at least one tensor [C, H, W], of one dtype, device and C, of any H and W. Differentiable.
        patch_size: side p of a patch in pixels.
        edge: what to do with sides that are no multiples of ``patch_size``: raise, crop to the centre, or pad with 0 at the bottom and right.
        token_drop: drops patches of each image at random before they are copied (training only; the caller decides).
        generator: for ``token_drop``; default PyTorch's own.
        capacity: rows of the result, if more than the patches: a token budget. With ``max_images`` every batch then has the same shapes.
        max_images: sequences of the layout, if more than the images.

    Raises:
        ValueError: no image, a wrong shape, sides that are no multiples of the patch with ``edge="error"`` or less than one patch with ``"crop"``,
            more patches than ``capacity``, more images than ``max_images``; the message names the image.
        TypeError: images of different dtypes or devices.
    """
    if not images:
        raise ValueError("patchify: there are no images; at least one is needed")
    return assemble([cut(image, patch_size, edge, i, token_drop, generator) for i, image in enumerate(images)], capacity, max_images)


def patch_grid(image: Tensor, patch_size: int, edge: Edge = "error", index: int = 0) -> tuple[int, int]:
    """Rows and columns of patches of an image [C, H, W]; ``index`` is what an error calls it. Arguments and errors as in :func:`patchify`."""
    if edge not in _EDGES:
        raise ValueError(f"patchify: edge is {edge!r}; it must be one of {', '.join(map(repr, _EDGES))}")
    if patch_size <= 0:
        raise ValueError(f"patchify: patch_size is {patch_size}; it must be positive")
    if not isinstance(image, Tensor) or image.dim() != 3:
        had = f"shape {list(image.shape)}" if isinstance(image, Tensor) else f"type {type(image).__name__}"
        raise ValueError(f"patchify: image {index} has {had}; it must be a tensor [C, H, W]")
    height, width = image.shape[1:]
    if edge == "error" and (height % patch_size or width % patch_size):
        raise ValueError(
            f"patchify: image {index} is {height} x {width}; both must be multiples of patch_size = {patch_size}, or edge be 'crop' or 'pad'"
        )
    extra = patch_size - 1 if edge == "pad" else 0
    grid = (height + extra) // patch_size, (width + extra) // patch_size
    if not all(grid):
        raise ValueError(f"patchify: image {index} is {height} x {width}; it must have at least one patch of {patch_size} x {patch_size}")
    return grid


@dataclass(frozen=True)
class Patches:
    """The patches of one image: tokens [n, C * p * p], rows and cols int64 [n], and the grid they are from."""

    tokens: Tensor
    rows: Tensor
    cols: Tensor
    grid: tuple[int, int]
    index: int


def cut(
    image: Tensor,
    patch_size: int,
    edge: Edge = "error",
    index: int = 0,
    token_drop: TokenDrop | None = None,
    generator: torch.Generator | None = None,
) -> Patches:
    """One image as patches, row by row, those that ``token_drop`` drops left out before anything is copied."""
    grid = rows, cols = patch_grid(image, patch_size, edge, index)
    channels, height, width = image.shape
    down, right = rows * patch_size - height, cols * patch_size - width
    if down or right:
        # A negative pad crops: the odd pixel goes at the bottom and right.
        top, left = (0, 0) if edge == "pad" else (-(-down // 2), -(-right // 2))
        image = F.pad(image, (left, right - left, top, down - top))
    blocks = image.reshape(channels, rows, patch_size, cols, patch_size).permute(1, 3, 0, 2, 4)  # [rows, cols, C, p, p]
    kept = torch.arange(rows * cols) if token_drop is None else token_drop.keep(rows, cols, generator)
    row, col = (at.to(image.device) for at in (kept // cols, kept % cols))
    tokens = blocks.flatten(0, 1) if token_drop is None else blocks[row, col]
    return Patches(tokens.reshape(len(kept), -1), row, col, grid, index)


def assemble(images: Sequence[Patches], capacity: int | None = None, max_images: int | None = None, targets: Any = None) -> PackedBatch:
    """The patches of several images as one batch; arguments and errors as in :func:`patchify`."""
    first = images[0].tokens
    for patches in images:
        tokens = patches.tokens
        if tokens.dtype is not first.dtype or tokens.device != first.device:
            raise TypeError(
                f"patchify: image {patches.index} is {tokens.dtype} on {tokens.device}, image {images[0].index} {first.dtype} on "
                f"{first.device}; they must be alike"
            )
        if tokens.shape[1] != first.shape[1]:
            raise ValueError(
                f"patchify: a patch of image {patches.index} has {tokens.shape[1]} values, of image {images[0].index} {first.shape[1]}; "
                "all images must have the same channels"
            )
    lengths = [len(patches.tokens) for patches in images]
    used, sequences = sum(lengths), max(len(images), max_images or 0)
    layout = PackedLayout.from_lengths(lengths, capacity=capacity, max_sequences=max_images, device=first.device)
    free = layout.total_q - used
    nowhere = torch.zeros(free, dtype=torch.int64, device=first.device)
    image = torch.repeat_interleave(torch.arange(len(images)), torch.tensor(lengths)).to(first.device)
    grids = [patches.grid for patches in images]
    return PackedBatch(
        tokens=torch.cat([*(patches.tokens for patches in images), first.new_zeros(free, first.shape[1])]),
        rows=torch.cat([*(patches.rows for patches in images), nowhere]),
        cols=torch.cat([*(patches.cols for patches in images), nowhere]),
        image=torch.cat([image, nowhere - 1]),
        grids=torch.tensor([*grids, *[(1, 1)] * (sequences - len(images))], device=first.device),
        layout=layout,
        largest_grid=(max(rows for rows, _ in grids), max(cols for _, cols in grids)),
        indices=tuple(patches.index for patches in images),
        targets=targets,
    )
