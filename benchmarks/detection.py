"""DETR's matcher, its loss with the backward pass, and a whole training step: how much faster than transformers' own.

``python benchmarks/detection.py --out benchmarks/results/detection`` writes ``detection.csv`` and ``detection.md``. What is compared is interleaved
in the same rounds, after a check that both give the same.
"""

from __future__ import annotations

import argparse
import copy
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import vitkernels
from vitkernels import ops, report, timing
from vitkernels.cli import _zoo
from vitkernels.detection import HungarianMatcher

QUERIES, CLASSES, LAYERS = 100, 91, 6
COLUMNS = (
    "what",
    "batch",
    "original_ms",
    "ours_ms",
    "times_as_fast_p20",
    "times_as_fast_p50",
    "times_as_fast_p80",
    "rounds",
    "discarded",
    "weak",
)

Case = tuple[str, Callable[[], Any], Callable[[], Any], Callable[[Any, Any], None]]
"""What it is, the original, ours, and a check of what they return."""


def sample(batch: int) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    """Logits [L, B, Q, C + 1] and boxes of all layers, and some twenty targets for each image."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(LAYERS, batch, QUERIES, CLASSES + 1, generator=generator)
    boxes = torch.rand(LAYERS, batch, QUERIES, 4, generator=generator) * 0.4 + 0.2
    counts = torch.randint(15, 26, (batch,), generator=generator).tolist()
    labels = [torch.randint(CLASSES, (n,), generator=generator) for n in counts]
    targets = [{"class_labels": label, "labels": label, "boxes": torch.rand(len(label), 4, generator=generator) * 0.4 + 0.2} for label in labels]
    return logits, boxes, targets


def detector(size: int) -> Any:
    """DETR of transformers, of the paper's width, six and six layers, on a small convolutional backbone; without dropout, to be compared."""
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    backbone = transformers.ResNetConfig(layer_type="basic", depths=[1, 1, 1, 1], hidden_sizes=[32, 64, 96, 128], embedding_size=32)
    backbone.out_features = ["stage4"]
    config = transformers.DetrConfig(
        use_timm_backbone=False, backbone=None, backbone_config=backbone, num_labels=CLASSES, num_queries=QUERIES, auxiliary_loss=True, dropout=0.0
    )
    return transformers.DetrForObjectDetection(config).train()


def same_pairs(theirs: Any, ours: Any) -> None:
    for pair, other in zip(theirs, ours, strict=True):
        for index, wanted in zip(other, pair, strict=True):
            if not torch.equal(torch.as_tensor(index), torch.as_tensor(wanted)):
                raise SystemExit("the matches are not the same: nothing is measured")


def close(theirs: Any, ours: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def cases(batches: list[int], size: int) -> Iterator[tuple[int, Case]]:
    """With their batch."""
    loss_module = importlib.import_module("transformers.loss.loss_for_object_detection")
    for rows, columns in ((1, 1), (5, 5), (10, 10), (20, 20), (20, QUERIES)):
        costs = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)).numpy()
        what = f"scipy alone, one problem of {rows} x {columns}"
        yield 1, (what, lambda: [linear_sum_assignment(costs)], lambda: [ops.linear_sum_assignment(costs)], same_pairs)  # noqa: B023
    original = detector(size)
    accelerated = copy.deepcopy(original)
    vitkernels.accelerate(accelerated)
    for batch in batches:
        logits, boxes, targets = sample(batch)
        theirs, ours = loss_module.HungarianMatcher(1, 5, 2), HungarianMatcher(1, 5, 2)
        last = {"logits": logits[-1], "pred_boxes": boxes[-1], "pred_logits": logits[-1]}
        yield batch, ("matcher", lambda: theirs(last, targets), lambda: ours(last, targets), same_pairs)  # noqa: B023

        def loss_and_gradients(model: Any) -> tuple[Tensor, ...]:
            given = [t.detach().requires_grad_() for t in (logits[-1], boxes[-1], logits, boxes)]  # noqa: B023
            total, _, _ = model.loss_function(given[0], targets, torch.device("cpu"), given[1], model.config, *given[2:])  # noqa: B023
            return (total.detach(), *torch.autograd.grad(total, given))

        call = loss_and_gradients
        yield batch, (f"loss of {LAYERS} layers, forward + backward", lambda: call(original), lambda: call(accelerated), close)  # noqa: B023
        pixels = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))

        def step(model: Any) -> Tensor:
            model.zero_grad()
            loss = model(pixel_values=pixels, labels=targets).loss  # noqa: B023
            loss.backward()
            return loss.detach()

        run = step
        yield batch, (f"training step of DETR, {size} px", lambda: run(original), lambda: run(accelerated), close)  # noqa: B023


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, action="append", help="default: 2 and 16")
    parser.add_argument("--size", type=int, default=320, help="side of the images of a training step")
    parser.add_argument("--only", default="", help="a part of what is measured, by its name")
    options = parser.parse_args()
    folder = options.out and report.results_folder(options.out)
    torch.set_num_threads(options.threads)
    _zoo._package("hf")
    rows = []
    for batch, (what, original, ours, check) in cases(options.batch or [2, 16], options.size):
        if options.only not in what:
            continue
        check(original(), ours())
        measured = timing.interleave({"original": original, "ours": ours}, rounds=options.rounds, min_time=0.01)
        faster = measured.speedup("ours", over="original")
        times = (measured[name].quantiles.p50 * 1e3 for name in ("original", "ours"))
        values = (what, batch, *times, faster.p20, faster.p50, faster.p80, measured.kept, measured.discarded, measured.weak)
        rows.append(dict(zip(COLUMNS, values, strict=True)))
        row = rows[-1]
        print(
            f"B{batch} {what}: {row['original_ms']:.3g} ms, ours {row['ours_ms']:.3g} ms,"
            f" {' / '.join(f'{value:.3g}' for value in (faster.p20, faster.p50, faster.p80))} times as fast{' weak' if measured.weak else ''}",
            flush=True,
        )
    if folder:
        title = f"DETR: matching, loss and training, {QUERIES} queries, {CLASSES} classes, some 20 targets an image"
        report.write_results(folder, "detection", title, rows, COLUMNS)


if __name__ == "__main__":
    main()
