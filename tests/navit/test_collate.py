"""PackedCollate by itself, in DataLoader workers, and in the example."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitkernels.navit import PackedBatch, PackedCollate, ResolutionSampler, TokenDrop, pack, patchify

P = 4


class Numbered(Dataset):
    """Image i is i everywhere, of a size of its own; its label is i, its name says so."""

    def __init__(self, count: int = 40) -> None:
        sizes = torch.randint(1, 7, (count, 2), generator=torch.Generator().manual_seed(0)).tolist()
        self.sizes = [(rows * P, cols * P) for rows, cols in sizes]

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i: int) -> tuple[Tensor, int, dict[str, Any]]:
        return torch.full((1, *self.sizes[i]), float(i)), i, {"half": i / 2, "name": f"image {i}"}


def check_aligned(batch: PackedBatch) -> None:
    """Every image's tokens hold the number that its targets say."""
    labels, other = batch.targets
    assert len(batch) == len(labels) == len(other["name"])
    for s, label in enumerate(labels.tolist()):
        tokens = batch.tokens[batch.image == s]
        assert len(tokens) and (tokens == label).all()
        assert float(other["half"][s]) == label / 2 and other["name"][s] == f"image {label}"
    assert not batch.tokens[batch.image < 0].any()


def test_without_a_budget_one_batch_in_order() -> None:
    samples = [Numbered()[i] for i in (3, 1, 2)]
    batch = PackedCollate(P)(samples)
    assert isinstance(batch, PackedBatch)
    assert torch.equal(batch.tokens, patchify([image for image, *_ in samples], P).tokens)
    assert batch.targets[0].tolist() == [3, 1, 2] and batch.indices == (0, 1, 2)
    check_aligned(batch)


def test_with_a_budget_batches_of_one_shape() -> None:
    samples = [*map(Numbered().__getitem__, range(40))]
    batches = PackedCollate(P, 50, max_images=6)(samples)
    assert isinstance(batches, list) and len(batches) > 3
    lengths = [image[0, ::P, ::P].numel() for image, *_ in samples]
    assert [list(batch.indices) for batch in batches] == pack(lengths, 50, max_images=6, method="best_fit_decreasing")
    for batch in batches:
        assert batch.tokens.shape == (50, P * P) and batch.layout.sequences == 6 and batch.grids.shape == (6, 2)
        assert batch.targets[0].tolist() == list(batch.indices)
        check_aligned(batch)


@pytest.mark.parametrize("context", [None, "fork", "spawn"])
def test_in_workers(context: str | None) -> None:
    """The same images in the same batches whoever collates them, every image once."""
    loader = DataLoader(
        Numbered(),
        batch_size=20,
        num_workers=0 if context is None else 1,
        collate_fn=PackedCollate(P, 64, max_images=8),
        multiprocessing_context=context,
    )
    seen = []
    for batch in (batch for packed in loader for batch in packed):
        assert batch.layout.cu_seqlens_q is batch.layout.cu_seqlens_k
        check_aligned(batch)
        seen += batch.targets[0].tolist()
    assert sorted(seen) == list(range(40))


def sizes_seen(seed: int, workers: int) -> list[list[Any]]:
    collate = PackedCollate(P, resolution=ResolutionSampler(8, 40, P), token_drop=TokenDrop(0.5))
    loader = DataLoader(
        [torch.zeros(1, 30, 30)] * 8, batch_size=4, num_workers=workers, collate_fn=collate, generator=torch.Generator().manual_seed(seed)
    )
    return [[batch.grids.tolist(), batch.rows.tolist(), batch.cols.tolist()] for batch in loader]


def test_workers_draw_reproducibly_and_each_for_itself() -> None:
    first = sizes_seen(0, workers=2)
    assert first == sizes_seen(0, workers=2)
    assert first != sizes_seen(1, workers=2)
    assert first[0] != first[1], "two workers drew the same numbers"


@pytest.mark.parametrize(
    ("samples", "targets"),
    [
        ([torch.zeros(1, P, P)] * 2, None),
        ([(torch.zeros(1, P, P),)] * 2, None),
        ([[torch.zeros(1, P, P), 3], [torch.zeros(1, P, P), 4]], [3, 4]),
    ],
)
def test_kinds_of_samples(samples: Any, targets: Any) -> None:
    batch = PackedCollate(P)(samples)
    assert isinstance(batch, PackedBatch)
    assert batch.targets is targets if targets is None else batch.targets.tolist() == targets


def test_moves_with_its_targets() -> None:
    batch = PackedCollate(P)([Numbered()[1]])
    assert isinstance(batch, PackedBatch)
    moved = batch.to("meta")
    assert moved.targets[0].is_meta and moved.targets[1]["half"].is_meta and moved.targets[1]["name"] == ["image 1"]
    again = pickle.loads(pickle.dumps(batch))
    assert torch.equal(again.tokens, batch.tokens) and again.layout.cu_seqlens_q is again.layout.cu_seqlens_k


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a GPU")
def test_pinned_memory() -> None:
    (batch,) = DataLoader(Numbered(4), batch_size=4, collate_fn=PackedCollate(P), pin_memory=True)
    assert batch.tokens.is_pinned() and batch.targets[0].is_pinned()
    check_aligned(batch)


def test_errors() -> None:
    with pytest.raises(ValueError, match="max_images is given without max_tokens"):
        PackedCollate(P, max_images=3)
    with pytest.raises(ValueError, match=re.escape("image 1 has 36 tokens, more than max_tokens = 20")):
        PackedCollate(P, 20)([torch.zeros(1, P, P), torch.zeros(1, 6 * P, 6 * P)])


def test_the_example_runs() -> None:
    root = Path(__file__).parents[2]
    script = root / "examples" / "navit" / "train_digits.py"
    if not script.is_file():
        pytest.skip("the examples are not part of this copy")
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), "--epochs", "1", "--workers", "0", "--images", "400"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    printed = re.fullmatch(r"epoch 1: loss ([\d.]+), padding ([\d.]+)%, accuracy ([\d.]+)%\n", done.stdout)
    assert printed is not None, done.stdout
    loss, padding, _ = map(float, printed.groups())
    assert loss < 2.6 and 0 < padding < 20, done.stdout
