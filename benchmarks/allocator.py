"""What ``vitkernels.tune_allocator`` gains on whole models, original and accelerated, and what it costs in memory.

``python benchmarks/allocator.py --out benchmarks/results/allocator`` writes ``allocator.csv`` and ``allocator.md``. The setting is of a process and
cannot be undone, so each contender lives in a process of its own; they take turns in the same rounds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import vitkernels
from vitkernels import report, timing
from vitkernels.cli import _zoo

MODELS = {"mobilevitv2_100": 8, "efficientvit_m4": 16, "vit_small_patch16_224": 8}
COLUMNS = (
    "model",
    "batch",
    "dtype",
    "what",
    "default_ms",
    "tuned_ms",
    "times_as_fast_p20",
    "times_as_fast_p50",
    "times_as_fast_p80",
    "default_faults",
    "tuned_faults",
    "default_peak_mb",
    "tuned_peak_mb",
    "rounds",
    "discarded",
    "weak",
)


def work(pipe: Connection, name: str, batch: int, dtype: torch.dtype, threads: int, accelerated: bool, tuned: bool) -> None:
    """A contender's process: sends its logits, and then for each number of calls the seconds, the CPU time, the faults a call and the peak memory."""
    if tuned:
        tuning = vitkernels.tune_allocator()
        if not tuning:
            raise SystemExit(str(tuning))
    torch.set_num_threads(threads)
    zoo = _zoo.load(name, "timm")
    images = _zoo.to(_zoo.images(zoo, batch)[0], dtype)
    model = zoo.module.eval().to(dtype)
    if accelerated:
        vitkernels.accelerate(model)
    with torch.inference_mode():
        pipe.send(_zoo.logits(model(images)).float().numpy())
        while calls := pipe.recv():
            faults, begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
            for _ in range(calls):
                model(images)
            seconds, used = (time.perf_counter() - begin) / calls, resource.getrusage(resource.RUSAGE_SELF)
            pipe.send((seconds, time.process_time(), (used.ru_minflt - faults) / calls, used.ru_maxrss / 1024))


class Contender:
    """A process that waits until it is its turn: a :class:`vitkernels.timing.Elsewhere`."""

    def __init__(self, *what: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.cpu_seconds = self.faults = self.peak_mb = 0.0
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, *what), daemon=True)
        self._process.start()
        theirs.close()  # so that its end is an end of file here
        self.logits = torch.from_numpy(self._pipe.recv())

    def seconds_per_call(self, calls: int) -> float:
        self._pipe.send(calls)
        seconds, self.cpu_seconds, self.faults, self.peak_mb = self._pipe.recv()
        return float(seconds)

    def close(self) -> None:
        self._pipe.send(0)
        self._process.join()


def compare(name: str, batch: int, dtype: torch.dtype, threads: int, rounds: int) -> list[dict[str, Any]]:
    """A row for the original and one for the accelerated model."""
    kinds = {(what, malloc): (what == "accelerated", malloc == "tuned") for what in ("original", "accelerated") for malloc in ("default", "tuned")}
    contenders = {f"{what}, {malloc}": Contender(name, batch, dtype, threads, *flags) for (what, malloc), flags in kinds.items()}
    expected = contenders["original, default"].logits
    tolerance = (0.05 if dtype is torch.bfloat16 else 1e-3) * float(expected.abs().max())
    for contender in contenders.values():
        torch.testing.assert_close(contender.logits, expected, rtol=0, atol=tolerance)
    measured = timing.interleave({}, elsewhere=contenders, rounds=rounds, min_time=0.05)
    rows = []
    for what in ("original", "accelerated"):
        default, tuned = (f"{what}, {malloc}" for malloc in ("default", "tuned"))
        faster = measured.speedup(tuned, over=default)
        values = (
            *(name, batch, str(dtype).removeprefix("torch."), what),
            *(measured[which].quantiles.p50 * 1e3 for which in (default, tuned)),
            *(faster.p20, faster.p50, faster.p80),
            *(round(contenders[which].faults) for which in (default, tuned)),
            *(round(contenders[which].peak_mb) for which in (default, tuned)),
            *(measured.kept, measured.discarded, measured.weak),
        )
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    for contender in contenders.values():
        contender.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--model", action="append", choices=MODELS, help="default: all")
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16"), help="default: float32")
    options = parser.parse_args()
    folder = options.out and report.results_folder(options.out)
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.model or MODELS:
        for dtype in options.dtype or ("float32",):
            for row in compare(name, MODELS[name], getattr(torch, dtype), options.threads, options.rounds):
                rows.append(row)
                times = " / ".join(f"{row[f'times_as_fast_{p}']:.3g}" for p in ("p20", "p50", "p80"))
                print(
                    f"{name} B{row['batch']} {dtype}, {row['what']}: {row['default_ms']:.1f} ms, tuned {row['tuned_ms']:.1f} ms,"
                    f" {times} times as fast{' weak' if row['weak'] else ''}; faults a call {row['default_faults']} and {row['tuned_faults']},"
                    f" peak {row['default_peak_mb']} and {row['tuned_peak_mb']} MB",
                    flush=True,
                )
    if folder:
        title = "Whole models with glibc's malloc as it is, and after `vitkernels.tune_allocator()`"
        report.write_results(folder, "allocator", title, rows, COLUMNS, malloc="default and tuned")


if __name__ == "__main__":
    main()
