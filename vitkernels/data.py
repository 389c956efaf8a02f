"""For data loaders: batches of several resolutions. By itself: it is no layer (``nn``), and its batches are dense, not packed (``navit``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized

import torch
from torch.utils.data import Sampler

Place = tuple[int, int, int]
"""(height, width, index) of an image: what the data set is asked for."""


class MultiScaleBatchSampler(Sampler[list[Place]]):
    """The multi-scale sampler of MobileViT (arXiv 2110.02178, section 3.2): each batch has a resolution drawn at random, and as many images as give
    it the pixels of a batch of the largest: small images in large batches keep a GPU as busy, and an epoch has fewer steps.

    Give it to a ``DataLoader`` as ``batch_sampler``. The data set's ``__getitem__`` then gets (height, width, index) and returns image ``index`` in
    that size, as ml-cvnets' ``variable_batch_sampler`` has it.

    Args:
        data_source: the data set, or its length.
        batch_size: images in a batch of the resolution ``base``, at least 1. Batches of others have ``max(1, base pixels * batch_size // pixels)``.
        resolutions: (height, width), or sides of squares; the paper's are 160, 192, 256, 288 and 320.
        base: the resolution ``batch_size`` is for; default, as in the paper, the one with the most pixels.
        shuffle: whether the images come in another order in each epoch.
        seed: of order and resolutions, together with the epoch: see :meth:`set_epoch`.
        num_replicas: processes that share the data, in distributed training. All of them see batches of the same resolution and size at the same
            step, and the same number of them.
        rank: which of them this is.
        drop_last: whether to leave out what does not fill the last batch; if not, it is filled with images from the beginning of the epoch.

    Attributes:
        batch_sizes: {(height, width): images in a batch of it}, by ascending pixels.

    Raises:
        ValueError: a number out of range, no resolutions, an empty data set.

    The length is that of the current epoch: it depends on the draws.
    """

    def __init__(
        self,
        data_source: Sized | int,
        batch_size: int,
        resolutions: Sequence[int | tuple[int, int]] = (160, 192, 256, 288, 320),
        *,
        base: int | tuple[int, int] | None = None,
        shuffle: bool = True,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        drop_last: bool = False,
    ) -> None:
        self._images = data_source if isinstance(data_source, int) else len(data_source)
        sizes = [(size, size) if isinstance(size, int) else (size[0], size[1]) for size in (*resolutions, *(() if base is None else (base,)))]
        for name, value, least in (("batch_size", batch_size, 1), ("num_replicas", num_replicas, 1), ("the length of data_source", self._images, 1)):
            if value < least:
                raise ValueError(f"MultiScaleBatchSampler: {name} is {value}; it must be at least {least}")
        if not 0 <= rank < num_replicas:
            raise ValueError(f"MultiScaleBatchSampler: rank is {rank}; it must be from 0 to {num_replicas - 1}")
        if not resolutions or min(min(size) for size in sizes) < 1:
            raise ValueError(f"MultiScaleBatchSampler: resolutions are {tuple(sizes)}; there must be one at least, of positive sides")
        base_height, base_width = max(sizes, key=_pixels) if base is None else sizes[-1]
        chosen = sorted(set(sizes[: len(resolutions)]), key=lambda size: (_pixels(size), size))
        self.batch_sizes = {size: max(1, base_height * base_width * batch_size // _pixels(size)) for size in chosen}
        self.shuffle, self.seed, self.num_replicas, self.rank, self.drop_last = shuffle, seed, num_replicas, rank, drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw anew: the same seed and epoch give the same batches in every process."""
        self.epoch = epoch

    def _generator(self, what: int) -> torch.Generator:
        # Order and resolutions each have their own, so that the length is known without the order.
        return torch.Generator().manual_seed((self.seed * 2 + what) * 1_000_003 + self.epoch)

    def _plan(self) -> list[tuple[int, int, int]]:
        """(height, width, images of each process) of all batches of the epoch."""
        generator, sizes = self._generator(0), list(self.batch_sizes.items())
        plan, left = [], self._images
        while left > 0:
            (height, width), count = sizes[int(torch.randint(len(sizes), (), generator=generator))]
            left -= count * self.num_replicas
            if left >= 0 or not self.drop_last:
                plan.append((height, width, count))
        return plan

    def __iter__(self) -> Iterator[list[Place]]:
        order = torch.randperm(self._images, generator=self._generator(1)).tolist() if self.shuffle else list(range(self._images))
        begin = self.rank
        for height, width, count in self._plan():
            end = begin + count * self.num_replicas
            yield [(height, width, order[i % self._images]) for i in range(begin, end, self.num_replicas)]
            begin = end

    def __len__(self) -> int:
        return len(self._plan())


def _pixels(size: tuple[int, int]) -> int:
    return size[0] * size[1]
