"""Whole models in training: a step (forward, cross-entropy, backward) of the accelerated model, against PyTorch as it is and what a user tries first.

``python benchmarks/training.py --out benchmarks/results/training`` writes ``training.csv``, ``.md`` and ``.png``. Contenders take turns in the same
rounds of one process; ``--compile`` adds torch.compile, ``--tuned-malloc`` calls ``vitkernels.tune_allocator()`` first, which serves all of them. A
row exists only if the accelerated model's logits and gradients passed the accuracy rule against float64 in that run; dropout is off. No batch of one:
where the last layer is a norm, the mean of its map, which the head reads, is then its bias, and the logits are rounding alone.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

import vitkernels
from vitkernels import report
from vitkernels.cli import _compare, _zoo

MODELS = (
    *("mobilevitv2_050", "mobilevitv2_100", "mobilevit_s", "efficientvit_m0", "efficientvit_m4"),
    *("vit_pytorch:DeepViT", "vit_pytorch:NaViT", "vit_small_patch16_224"),
)
ORIGINAL, LAST, COMPILED, OURS = _compare.ORIGINAL, _compare.LAST, _compare.COMPILED, _compare.ACCELERATED
CONTENDERS = (ORIGINAL, LAST, COMPILED, OURS)
ERRORS = ("error of gradients, original", "accelerated")
COLUMNS = ("model", "batch", *(f"{name} ms" for name in CONTENDERS), "best other", "times as fast p20", "p50", "p80", "rounds", "weak", *ERRORS)

Speeds = dict[str, tuple[float, float, float]]
"""Of each contender, how many times as fast as the original it is: p20, median, p80."""


def compare(name: str, batch: int, rounds: int, seconds: float, with_compiled: bool) -> tuple[dict[str, Any], Speeds]:
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
    measured = found.measured
    times = {other: measured[other].quantiles.p50 * 1e3 for other in CONTENDERS if other in measured}
    best = min((other for other in times if other != OURS), key=lambda other: times[other])
    faster, gradients = measured.speedup(OURS, over=best), found.errors[-1]
    row: dict[str, Any] = {"model": name, "batch": batch} | {f"{other} ms": times.get(other, "") for other in CONTENDERS}
    values = (best, faster.p20, faster.p50, faster.p80, measured.kept, measured.weak, gradients.original, gradients.accelerated)
    speeds = {other: measured.speedup(other, over=ORIGINAL).scaled(1) for other in times if other != ORIGINAL}
    return row | dict(zip(COLUMNS[-len(values) :], values, strict=True)), speeds


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
    rows, panels = [], defaultdict[str, dict[str, Speeds]](dict)
    for name in options.model or MODELS:
        for batch in options.batch or (2, 8):
            row, speeds = compare(name, batch, options.rounds, options.seconds, options.compile)
            rows.append(row)
            panels[f"batch {batch}"][name] = speeds
            print(", ".join(f"{key} {cell(value)}" for key, value in row.items() if value != ""), flush=True)
    if folder:
        title = "Whole models in training, a step; how many times as fast as the best of the others the accelerated model is"
        report.write_results(folder, "training", title, rows, COLUMNS)
        report.bars(folder / "training.png", panels, "times as fast as PyTorch as it is (median; whiskers p20 and p80)", baseline=1.0)


def cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
