"""Whole models in training: a step (forward, cross-entropy, backward) of the accelerated model, against PyTorch as it is and what a user tries first.

``python benchmarks/training.py --out benchmarks/results/training`` writes ``training.csv``, ``.md`` and ``.png``. Contenders take turns in the same
rounds of one process; ``--compile`` adds torch.compile, ``--tuned-malloc`` calls ``vitkernels.tune_allocator()`` first, which serves all of them. A
row exists only if the accelerated model's logits and gradients passed the accuracy rule against float64 in that run; dropout is off. No batch of one:
where the last layer is a norm, the mean of its map, which the head reads, is then its bias, and the logits are rounding alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from whole_models import COMPILED, JUDGED, LAST, ORIGINAL, OURS, Row, Speeds, Table, judged

import vitkernels
from vitkernels import report
from vitkernels.cli import _compare, _zoo

MODELS = (
    *("mobilevitv2_050", "mobilevitv2_100", "mobilevit_s", "efficientvit_m0", "efficientvit_m4"),
    *("vit_pytorch:DeepViT", "vit_pytorch:NaViT", "vit_small_patch16_224"),
)
CONTENDERS = (ORIGINAL, LAST, COMPILED, OURS)
ERRORS = ("error of gradients, original", "accelerated")
COLUMNS = ("model", "batch", *(f"{name} ms" for name in CONTENDERS), *JUDGED, *ERRORS)


def compare(name: str, batch: int, rounds: int, seconds: float, with_compiled: bool) -> tuple[Row, Speeds]:
    """One row, and what of it the plot shows."""
    found = _compare.compare(
        _zoo.load(name),
        batch=batch,
        dtype=torch.float32,
        device=torch.device("cpu"),
        training=True,
        rounds=rounds,
        budget=seconds,
        compiled=with_compiled,
        peers=True,
    )
    if not found.right or found.measured is None:
        raise SystemExit(f"{name}, batch {batch}: the accelerated model breaks the accuracy rule, nothing is shown: {found.errors}")
    print(*found.notes, sep="\n", end="\n" if found.notes else "")
    row, speeds = judged(found.measured, CONTENDERS)
    gradients = found.errors[-1]
    return {"model": name, "batch": batch, **row, **dict(zip(ERRORS, (gradients.original, gradients.accelerated), strict=True))}, speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=40.0, help="stop a row after so long")
    parser.add_argument("--model", action="append", help="default: " + ", ".join(MODELS))
    parser.add_argument("--batch", type=int, action="append", help="default: 2 and 8")
    parser.add_argument("--compile", action="store_true", help="torch.compile, too")
    parser.add_argument("--tuned-malloc", action="store_true", help="freed activations stay mapped, for every contender")
    options = parser.parse_args()
    folder = options.out and report.results_folder(options.out)
    torch.set_num_threads(options.threads)
    if options.tuned_malloc:
        print(vitkernels.tune_allocator())
    table = Table()
    for name in options.model or MODELS:
        for batch in options.batch or (2, 8):
            table.add(f"batch {batch}", *compare(name, batch, options.rounds, options.seconds, options.compile))
    if folder:
        title = "Whole models in training, a step; how many times as fast as the best of the others the accelerated model is"
        table.write(folder, "training", title, COLUMNS)


if __name__ == "__main__":
    main()
