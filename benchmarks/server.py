"""A server: several Python threads call one model at once, each with an image of its own. Images a second, original and accelerated.

``python benchmarks/server.py --out benchmarks/results/server`` writes ``server.csv`` and ``server.md``. Before anything is measured the accelerated
model's logits keep the accuracy rule against float64, and every caller's are compared with those of the same image alone, bit for bit.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vitkernels
from vitkernels import accuracy, report, timing
from vitkernels.cli import _zoo

MODELS = ("efficientvit_m4", "mobilevitv2_100", "vit_small_patch16_224")
# Python threads that call, and PyTorch's threads in each call.
SETTINGS = ((1, 1), (1, 2), (2, 1), (2, 2), (4, 1))
COLUMNS = (
    "model",
    "callers",
    "threads",
    "original images/s",
    "accelerated images/s",
    "times as fast p20",
    "p50",
    "p80",
    "rounds",
    "weak",
)
REQUESTS = 8


def serve(pool: ThreadPoolExecutor, model: Any, images: list[Tensor]) -> list[Tensor]:
    """The logits of all requests, as the pool's threads get through them."""

    def answer(image: Tensor) -> Tensor:
        with torch.inference_mode():
            return _zoo.logits(model(image))

    return list(pool.map(answer, images))


def compare(name: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each setting."""
    zoo = _zoo.load(name)
    requests: Any = _zoo.images(zoo, REQUESTS)[0]
    images = list(requests.split(1))
    models = {"original": zoo.module, "accelerated": copy.deepcopy(zoo.module)}
    vitkernels.accelerate(models["accelerated"])
    with torch.no_grad():
        exact = _zoo.logits(copy.deepcopy(zoo.module).double()(requests.double()))
        ours, theirs = (_zoo.logits(models[what](requests)) for what in ("accelerated", "original"))
    if not (found := accuracy.compare_tensors("logits", ours, theirs, exact)).holds:
        raise SystemExit(f"{name}: the accelerated model breaks the accuracy rule, nothing is measured: {found}")
    rows = []
    for callers, threads in SETTINGS:
        torch.set_num_threads(threads)
        with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(callers) as several:
            alone = serve(one, models["accelerated"], images)
            for _ in range(3):
                if not all(map(torch.equal, serve(several, models["accelerated"], images), alone)):
                    raise SystemExit(f"{name}: {callers} callers get other logits than one, nothing is measured")
            calls: dict[str, Callable[[], Any]] = {what: lambda model=model: serve(several, model, images) for what, model in models.items()}
            measured = timing.interleave(calls, rounds=rounds, budget=20)
        faster = measured.speedup("accelerated", over="original")
        speeds = (REQUESTS / measured[what].quantiles.p50 for what in models)
        values = (name, callers, threads, *speeds, faster.p20, faster.p50, faster.p80, measured.kept, measured.weak)
        rows.append(dict(zip(COLUMNS, values, strict=True)))
        print(", ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--model", action="append", help="default: " + ", ".join(MODELS))
    options = parser.parse_args()
    folder = options.out and report.results_folder(options.out)
    rows = [row for name in options.model or MODELS for row in compare(name, options.rounds)]
    if folder:
        title = "A server: Python threads that call one model at once, with PyTorch's threads in each call"
        report.write_results(folder, "server", title, rows, COLUMNS)


if __name__ == "__main__":
    main()
