"""Whole models in inference: accelerated, against PyTorch as it is and what a CPU user exports to.

``python benchmarks/whole_models.py --out benchmarks/results/whole_models`` writes ``whole_models.csv``, ``.md`` and ``.png``. Contenders take
turns in the same rounds, ONNX Runtime and OpenVINO in processes of their own that sleep meanwhile; ``--compile`` adds torch.compile with frozen
weights, which takes minutes to compile. A row exists only if the accelerated model's logits passed the accuracy rule against float64 in that run.
"""

from __future__ import annotations

import argparse
import copy
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import vitkernels
from vitkernels import accuracy, report, timing
from vitkernels.cli import _compare, _engines, _zoo

MODELS = ("efficientvit_m0", "efficientvit_m4", "mobilevitv2_100", "mobilevit_s", "vit_pytorch:DeepViT", "vit_small_patch16_224")
ORIGINAL, LAST, COMPILED, OURS = _compare.ORIGINAL, _compare.LAST, _compare.COMPILED, _compare.ACCELERATED
CONTENDERS = (ORIGINAL, LAST, COMPILED, *_engines.ENGINES, OURS)
JUDGED = ("best other", "times as fast p20", "p50", "p80", "rounds", "weak")
COLUMNS = ("model", "batch", "dtype", *(f"{name} ms" for name in CONTENDERS), *JUDGED)


Row = dict[str, Any]
Speeds = dict[str, tuple[float, float, float]]
"""Of each contender, how many times as fast as the original it is: p20, median, p80."""


def compare(name: str, batch: int, dtype: torch.dtype, rounds: int, seconds: float, with_compiled: bool) -> tuple[Row, Speeds]:
    """One row, and what of it the plot shows."""
    zoo = _zoo.load(name)
    images: Any = _zoo.images(zoo, batch)[0]
    exact = _zoo.logits(copy.deepcopy(zoo.module).double()(images.double()))
    original: Any = zoo.module.to(dtype)
    images = images.to(dtype)
    last = copy.deepcopy(original).to(memory_format=torch.channels_last)
    last_images = images.contiguous(memory_format=torch.channels_last)
    accelerated = copy.deepcopy(original)
    vitkernels.accelerate(accelerated)
    found = accuracy.compare_tensors("logits", _zoo.logits(accelerated(images)), _zoo.logits(original(images)), exact)
    if not found.holds:
        raise SystemExit(f"{name}, batch {batch}: the accelerated model breaks the accuracy rule, nothing is measured: {found}")
    calls = {ORIGINAL: lambda: original(images), LAST: lambda: last(last_images), OURS: lambda: accelerated(images)}
    if with_compiled:
        program = _compare.compiled_for_inference(original, images)
        calls[COMPILED] = lambda: program(images)
    if dtype is torch.float32:
        with _engines.engines(original, images) as (engines, notes):
            measured = timing.interleave(calls, elsewhere=engines, rounds=rounds, budget=seconds)
        print(*notes, sep="\n", end="\n" if notes else "")
    else:
        measured = timing.interleave(calls, rounds=rounds, budget=seconds)
    row, speeds = judged(measured, CONTENDERS)
    return {"model": name, "batch": batch, "dtype": str(dtype).removeprefix("torch."), **row}, speeds


def judged(measured: timing.Measurement, contenders: Sequence[str]) -> tuple[Row, Speeds]:
    """The contenders' milliseconds and :data:`JUDGED`, ours against the best of the others; and what of it the plot shows."""
    times = {name: measured[name].quantiles.p50 * 1e3 for name in contenders if name in measured}
    best = min((name for name in times if name != OURS), key=lambda name: times[name])
    faster = measured.speedup(OURS, over=best)
    values = (best, faster.p20, faster.p50, faster.p80, measured.kept, measured.weak)
    row = {f"{name} ms": times.get(name, "") for name in contenders} | dict(zip(JUDGED, values, strict=True))
    return row, {name: measured.speedup(name, over=ORIGINAL).scaled(1) for name in times if name != ORIGINAL}


class Table:
    """The rows of a script, told as they come and written at the end."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.panels = defaultdict[str, dict[str, Speeds]](dict)

    def add(self, panel: str, row: Row, speeds: Speeds) -> None:
        """A row, of a model in a panel of the plot."""
        self.rows.append(row)
        self.panels[panel][row["model"]] = speeds
        print(", ".join(f"{key} {cell(value)}" for key, value in row.items() if value != ""), flush=True)

    def write(self, folder: Path, name: str, title: str, columns: Sequence[str]) -> None:
        """``<name>.csv``, ``.md`` and ``.png``."""
        report.write_results(folder, name, title, self.rows, columns)
        label = "times as fast as PyTorch as it is (median; whiskers p20 and p80)"
        report.bars(folder / f"{name}.png", self.panels, label, baseline=1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=30.0, help="stop a row after so long")
    parser.add_argument("--model", action="append", help="default: " + ", ".join(MODELS))
    parser.add_argument("--batch", type=int, action="append", help="default: 1 and 16")
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16", "float16"), help="default: float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile with frozen weights, too")
    options = parser.parse_args()
    folder = options.out and report.results_folder(options.out)
    torch.set_num_threads(options.threads)
    table = Table()
    with torch.no_grad():
        for name in options.model or MODELS:
            for dtype in options.dtype or ("float32",):
                for batch in options.batch or (1, 16):
                    found = compare(name, batch, getattr(torch, dtype), options.rounds, options.seconds, options.compile)
                    table.add(f"batch {batch}, {dtype}", *found)
    if folder:
        title = "Whole models in inference; how many times as fast as the best of the others the accelerated model is"
        table.write(folder, "whole_models", title, COLUMNS)


def cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
