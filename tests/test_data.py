"""The multi-scale sampler: which images a batch has, in which resolution, how many, and that all processes agree."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitkernels.data import MultiScaleBatchSampler, Place


def sampler(images: int = 1000, batch_size: int = 8, **options: Any) -> MultiScaleBatchSampler:
    return MultiScaleBatchSampler(images, batch_size, **options)


def resolutions(batches: list[list[Place]]) -> list[tuple[int, int]]:
    """Of each batch, whose images have one."""
    found = [{(height, width) for height, width, _ in batch} for batch in batches]
    assert all(len(sizes) == 1 for sizes in found)
    return [size for sizes in found for size in sizes]


def test_sizes_of_batches() -> None:
    """The paper's: b_t = H_n W_n b / (H_t W_t), of the largest resolution."""
    sizes = sampler(batch_size=32).batch_sizes
    assert sizes == {(160, 160): 128, (192, 192): 88, (256, 256): 50, (288, 288): 39, (320, 320): 32}
    assert list(sizes) == sorted(sizes)
    # ml-cvnets': the batch size is that of the base, whether or not it is drawn.
    assert sampler(batch_size=32, resolutions=[(160, 320), 512], base=256).batch_sizes == {(160, 320): 40, (512, 512): 8}
    assert sampler(batch_size=1, resolutions=[64, 1024], base=64).batch_sizes == {(64, 64): 1, (1024, 1024): 1}


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_image_once(shuffle: bool, drop_last: bool) -> None:
    """But for those that fill the last batch, or are left out of it."""
    batches = list(samples := sampler(997, shuffle=shuffle, drop_last=drop_last))
    assert len(batches) == len(samples)
    for batch, size in zip(batches, resolutions(batches), strict=True):
        assert len(batch) == samples.batch_sizes[size]
    order = [index for batch in batches for _, _, index in batch]
    counts = Counter(order)
    assert set(counts) <= set(range(997)) and (order[:900] == list(range(900))) is not shuffle
    largest = max(samples.batch_sizes.values())
    if drop_last:
        assert 997 - largest < len(counts) == len(order) <= 997
    else:
        assert len(counts) == 997 and len(order) - 997 < largest
        assert order[997:] == order[: len(order) - 997]


def test_resolutions_are_drawn_evenly() -> None:
    drawn = Counter(resolutions(list(sampler(200_000, 8))))
    total = sum(drawn.values())
    assert len(drawn) == 5 and total > 5000
    # Five standard deviations of a binomial draw.
    assert all(abs(count - total / 5) < 5 * (total * 0.2 * 0.8) ** 0.5 for count in drawn.values())


def test_seed_and_epoch() -> None:
    first, same, other, later = sampler(seed=1), sampler(seed=1), sampler(seed=2), sampler(seed=1)
    later.set_epoch(1)
    torch.manual_seed(0)
    batches = list(first)
    torch.rand(3)
    assert batches == list(first) == list(same)
    assert batches != list(other) and batches != list(later)
    assert resolutions(batches) != resolutions(list(later))
    later.set_epoch(0)
    assert batches == list(later)


_PRINT = "from vitkernels.data import MultiScaleBatchSampler; print(list(MultiScaleBatchSampler(50, 2, seed=3)))"


def test_another_process_draws_the_same() -> None:
    done = subprocess.run([sys.executable, "-c", _PRINT], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == str(list(MultiScaleBatchSampler(50, 2, seed=3))), done.stderr


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("replicas", [2, 3, 7])
def test_processes_share_the_data(replicas: int, drop_last: bool) -> None:
    """The same resolution and size at each step; together every image, none twice but for those that fill the last batch."""
    ranks = [sampler(500, 4, num_replicas=replicas, rank=rank, drop_last=drop_last) for rank in range(replicas)]
    batches = [list(rank) for rank in ranks]
    assert {len(b) for b in batches} == {len(ranks[0])}
    for step in zip(*batches, strict=True):
        assert len({len(batch) for batch in step}) == 1 and len(set(resolutions(list(step)))) == 1
    counts = Counter(index for rank in batches for batch in rank for _, _, index in batch)
    whole = Counter(index for batch in sampler(500, 4) for _, _, index in batch)
    assert set(whole) == set(range(500))
    if drop_last:
        assert set(counts.values()) <= {1}
    else:
        assert set(counts) == set(range(500))
        assert sum(counts.values()) - 500 < replicas * max(ranks[0].batch_sizes.values())


class _Images(Dataset[Tensor]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, place: Place) -> Tensor:  # type: ignore[override]
        height, width, index = place
        return torch.full((3, height, width), float(index))


@pytest.mark.parametrize("workers", [0, 1])
def test_in_a_data_loader(workers: int) -> None:
    data = _Images()
    batches = MultiScaleBatchSampler(data, 2, (16, 24, (16, 32)))
    loader = DataLoader(data, batch_sampler=batches, num_workers=workers)
    found = list(loader)
    assert len(found) == len(loader) == len(batches)
    assert [tuple(batch.shape) for batch in found] == [
        (batches.batch_sizes[size], 3, *size) for size in resolutions(list(batches))
    ]
    assert {int(index) for batch in found for index in batch[:, 0, 0, 0]} == set(range(40))


def test_a_small_data_set_fills_its_batch() -> None:
    """Also when a batch is larger than the data set."""
    (batch,) = sampler(3, 8, resolutions=[64], shuffle=False)
    assert [index for _, _, index in batch] == list(itertools.islice(itertools.cycle(range(3)), 8))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"images": 0}, "the length of data_source is 0"),
        ({"resolutions": ()}, "resolutions are"),
        ({"resolutions": (64, (0, 64))}, "positive sides"),
        ({"base": 0}, "positive sides"),
        ({"num_replicas": 0}, "num_replicas is 0"),
        ({"num_replicas": 2, "rank": 2}, "rank is 2; it must be from 0 to 1"),
    ],
    ids=str,
)
def test_refuses(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sampler(**options)
