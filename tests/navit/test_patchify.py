"""Patches of images of any sizes: every pixel in its place, and nothing else."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels.navit import PackedBatch, TokenDrop, patchify

P = 4


def images(*sizes: tuple[int, int], channels: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(sizes))
    return [torch.rand(channels, rows * P, cols * P, generator=generator) + 1 for rows, cols in sizes]


def rebuilt(batch: PackedBatch, i: int, like: Tensor) -> Tensor:
    """Image ``i`` put together again from its tokens; 0 where a patch was dropped."""
    image = torch.zeros_like(like)
    for t in (batch.image == i).nonzero().flatten().tolist():
        top, left = int(batch.rows[t]) * P, int(batch.cols[t]) * P
        image[:, top : top + P, left : left + P] += batch.tokens[t].view(-1, P, P)
    return image


@pytest.mark.parametrize("room", [{}, {"capacity": 64, "max_images": 7}])
def test_every_pixel_is_in_its_place(room: dict[str, int], poison: None) -> None:
    given = images((2, 5), (1, 1), (6, 3), (1, 4))
    batch = patchify(given, P, **room)
    lengths = [10, 1, 18, 4]
    assert len(batch) == 4
    assert batch.indices == (0, 1, 2, 3)
    assert batch.layout.cu_seqlens_q.tolist() == [0, 10, 11, 29, *[33] * (room.get("max_images", 4) - 3)]
    assert len(batch.tokens) == batch.layout.total_q == room.get("capacity", 33)
    assert batch.image.tolist() == [i for i, n in enumerate(lengths) for _ in range(n)] + [-1] * (room.get("capacity", 33) - 33)
    assert batch.grids.tolist() == [[2, 5], [1, 1], [6, 3], [1, 4], *[[1, 1]] * (room.get("max_images", 4) - 4)]
    assert batch.largest_grid == (6, 5)
    for i, image in enumerate(given):
        assert torch.equal(rebuilt(batch, i, image), image)
    padding = batch.image < 0
    assert not batch.tokens[padding].any() and not batch.rows[padding].any() and not batch.cols[padding].any()


def test_a_linear_layer_on_patches_is_a_patch_convolution() -> None:
    (image,) = images((3, 5))
    weight = torch.randn(8, 3, P, P, generator=torch.Generator().manual_seed(0))
    batch = patchify([image], P)
    expected = F.conv2d(image[None].double(), weight.double(), stride=P)[0, :, batch.rows, batch.cols].T
    torch.testing.assert_close(F.linear(batch.tokens.double(), weight.flatten(1).double()), expected)


def test_token_drop_keeps_each_token_with_its_place() -> None:
    given = images((4, 5), (1, 1), (3, 7))
    batch = patchify(given, P, token_drop=TokenDrop(0.5), generator=torch.Generator().manual_seed(0))
    assert batch.layout.cu_seqlens_q.diff().tolist() == [10, 1, 10]  # round(10.5) is even
    assert batch.grids.tolist() == [[4, 5], [1, 1], [3, 7]]
    for i, image in enumerate(given):
        whole = rebuilt(batch, i, image)
        kept = whole != 0
        assert torch.equal(whole[kept], image[kept])
        assert int(kept.sum()) == int((batch.image == i).sum()) * 3 * P * P, "a patch stands there twice"
    again = patchify(given, P, token_drop=TokenDrop(0.5), generator=torch.Generator().manual_seed(0))
    other = patchify(given, P, token_drop=TokenDrop(0.5), generator=torch.Generator().manual_seed(1))
    assert torch.equal(batch.rows, again.rows) and torch.equal(batch.cols, again.cols)
    assert not (torch.equal(batch.rows, other.rows) and torch.equal(batch.cols, other.cols))


@pytest.mark.parametrize("size", [(9, 14), (11, 8), (5, 5)])
def test_sides_that_are_no_multiples(size: tuple[int, int]) -> None:
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0)) + 1
    height, width = size
    rows, cols = height // P, width // P
    top, left = (height - rows * P) // 2, (width - cols * P) // 2
    centre = image[:, top : top + rows * P, left : left + cols * P]
    cropped = patchify([image], P, edge="crop")
    assert torch.equal(rebuilt(cropped, 0, centre), centre)
    padded = patchify([image], P, edge="pad")
    whole = F.pad(image, (0, -width % P, 0, -height % P))
    assert torch.equal(rebuilt(padded, 0, whole), whole)


def test_gradients_reach_the_pixels() -> None:
    given = [image.double().requires_grad_() for image in images((2, 3), (1, 2), channels=1)]
    drop = TokenDrop(0.4)

    def tokens(*each: Tensor) -> Tensor:
        return patchify(each, P, edge="pad", token_drop=drop, generator=torch.Generator().manual_seed(3), capacity=9).tokens

    assert torch.autograd.gradcheck(tokens, given)


def test_moves_to_another_device_with_all_it_has() -> None:
    batch = patchify(images((2, 3)), P, max_images=2, capacity=8).to("meta")
    tensors = (batch.tokens, batch.rows, batch.cols, batch.image, batch.grids)
    assert all(tensor.is_meta for tensor in tensors)


@pytest.mark.parametrize(
    ("given", "options", "error", "words"),
    [
        ([], {}, ValueError, "there are no images"),
        ([torch.zeros(3, 4, 4), torch.zeros(3, 4, 6)], {}, ValueError, "image 1 is 4 x 6; both must be multiples of patch_size = 4"),
        ([torch.zeros(4, 4)], {}, ValueError, "image 0 has shape [4, 4]; it must be a tensor [C, H, W]"),
        ([[1, 2]], {}, ValueError, "image 0 has type list"),
        ([torch.zeros(3, 3, 9)], {"edge": "crop"}, ValueError, "image 0 is 3 x 9; it must have at least one patch of 4 x 4"),
        ([torch.zeros(3, 0, 4)], {}, ValueError, "image 0 is 0 x 4; it must have at least one patch"),
        ([torch.zeros(3, 4, 4)], {"edge": "resize"}, ValueError, "edge is 'resize'"),
        ([torch.zeros(3, 4, 4), torch.zeros(1, 4, 4)], {}, ValueError, "a patch of image 1 has 16 values, of image 0 48"),
        ([torch.zeros(3, 4, 4), torch.zeros(3, 4, 4).double()], {}, TypeError, "image 1 is torch.float64 on cpu, image 0 torch.float32"),
        ([torch.zeros(3, 8, 8)], {"capacity": 3}, ValueError, "capacity is 3; it must be at least 4"),
        ([torch.zeros(3, 8, 8)] * 2, {"max_images": 1}, ValueError, "max_sequences is 1; it must be at least 2"),
    ],
)
def test_errors(given: Any, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        patchify(given, P, **options)
    with pytest.raises(ValueError, match="patch_size is 0"):
        patchify([torch.zeros(3, 4, 4)], 0)
