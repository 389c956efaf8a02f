"""``vitkernels demo``, behind ``make demo``: real MobileViTv2 models on real photos, original against accelerated."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import torch

from vitkernels import report, timing
from vitkernels.cli import _compare, _zoo
from vitkernels.cli._common import device_of, device_option, out, set_threads, steps, threads_option
from vitkernels.cli.accelerate import errors_table, speed_table

_MODELS = ("mobilevitv2_050", "mobilevitv2_100", "hf:mobilevitv2")
_SIZE = 256
_HEADERS = (
    "model",
    "batch",
    "dtype",
    "mode",
    "original ms (p20 - p80)",
    "accelerated ms",
    "speed",
    "p20 - p80",
    "rounds",
    "error, original",
    "error, accelerated",
)
Panels = dict[str, dict[str, dict[str, tuple[float, float, float]]]]


def runs() -> list[tuple[str, int, torch.dtype, bool]]:
    """(model, batch, dtype, training): every model at batch 1 and 8 in both dtypes, and one training step."""
    inference = [(name, batch, dtype, False) for dtype in (torch.float32, torch.bfloat16) for name in _MODELS for batch in (1, 8)]
    return [*inference, (_MODELS[0], 8, torch.float32, True)]


@click.command("demo")
@click.option(
    "--out", "folder", type=click.Path(path_type=Path), default=Path("demo-report"), show_default=True, help="Where CSV, plot and report go."
)
@click.option("--compile", "compiled", is_flag=True, help="Time torch.compile of the original too: minutes more.")
@click.option("--rounds", type=click.IntRange(min=1), default=15, show_default=True, help="Timing rounds a run.")
@click.option("--seconds", type=click.FloatRange(min=0.1), default=6.0, show_default=True, help="Stop timing a run after this long.")
@device_option
@threads_option
def command(folder: Path, compiled: bool, rounds: int, seconds: float, device: str | None, threads: int | None) -> None:
    """Real MobileViTv2 models on real photos, as they are and accelerated: errors against float64, speed, a plot and a report."""
    target = device_of(device)
    set_threads(threads)
    folder = report.results_folder(folder)
    begin = time.perf_counter()
    planned = runs()
    zoo: dict[str, _zoo.ZooModel] = {}
    results: list[_compare.Result] = []
    with steps(len(planned)) as progress:
        for name, batch, dtype, training in planned:
            progress.start(f"{name}, batch {batch}, {str(dtype).removeprefix('torch.')}{', training step' if training else ''}")
            if name not in zoo:
                zoo[name] = _zoo.load(name, size=_SIZE)
            results.append(
                _compare.compare(
                    zoo[name], batch=batch, dtype=dtype, device=target, training=training, rounds=rounds, budget=seconds, compiled=compiled
                )
            )
            progress.advance()

    origin = report.provenance(target)
    write(folder, results, origin)
    out.print(errors_table(results))
    out.print(speed_table(results))
    photos = max((r.images for r in results), key=len)
    out.print(f"Photos: {photos}. {time.perf_counter() - begin:.0f} s. Report, plot and CSV are in {folder}.", highlight=False)
    if not all(result.right for result in results):
        raise click.exceptions.Exit(1)


def write(folder: Path, results: list[_compare.Result], origin: dict[str, Any]) -> None:
    """demo.csv, demo.png and report.md."""
    rows = [result.summary() for result in results]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    report.write_csv(folder / "demo.csv", rows, origin, columns)
    panels: Panels = {}
    for result in results:
        if result.measured is not None:
            group = panels.setdefault(f"{result.mode}, {result.dtype}", {})
            group[f"{result.name} ({result.source})\nbatch {result.batch}"] = {
                name: result.measured.speedup(name, over=_compare.ORIGINAL).scaled(1) for name in result.measured if name != _compare.ORIGINAL
            }
    if panels:
        report.bars(folder / "demo.png", panels, "times as fast as the original (median; whiskers p20 and p80)", baseline=1.0)
    photos = max((r.images for r in results), key=len)
    notes = [f"- {r.title}: {note}" for r in results for note in r.notes]
    notes += [f"- {r.title}: {path} ran its original code: {reason}" for r in results for path, reason in r.fallbacks.items()]
    text = [
        "# MobileViTv2, as it is and accelerated",
        "",
        report.origin_sentence(origin),
        "",
        f"{_SIZE} px photos ({photos}); random weights with a fixed seed, the same in both models.",
        "Both run interleaved in one process; speed is the ratio inside each round, its median. The error is against the original model in float64:",
        "of the logits by the largest logit (inference), of the gradient of all parameters by its norm (training step, dropout off).",
        "",
        report.markdown_table(_HEADERS, map(_cells, results)),
        "",
        *(["![speed](demo.png)", ""] if panels else []),
        *dict.fromkeys(_replacements(result) for result in results),
        *notes,
        "",
    ]
    (folder / "report.md").write_text("\n".join(text))


def _cells(result: _compare.Result) -> list[str]:
    """One line of the report's table."""
    cells = [f"{result.name} ({result.source})", str(result.batch), result.dtype, result.mode]
    if result.measured is None:
        cells += ["not timed: nothing was replaced", "", "", "", ""]
    else:
        before, after = (result.measured[name].quantiles for name in (_compare.ORIGINAL, _compare.ACCELERATED))
        speedup = result.measured.speedup(_compare.ACCELERATED, over=_compare.ORIGINAL)
        cells += [*map(_milliseconds, (before, after)), f"**{speedup.p50:.2f}x**", f"{speedup.p20:.2f} - {speedup.p80:.2f}"]
        cells += [f"{result.measured.kept} kept, {result.measured.discarded} discarded{', weak' if result.measured.weak else ''}"]
    error = result.errors[-1]
    return [*cells, f"{error.original:.1e}", f"{error.accelerated:.1e}"]


def _milliseconds(quantiles: timing.Quantiles) -> str:
    p20, p50, p80 = map(report.milliseconds, quantiles.scaled(1e3))
    return f"{p50} ({p20} - {p80})"


def _replacements(result: _compare.Result) -> str:
    backends = ", ".join(sorted({record.backend for record in result.replaced})) or "nothing"
    return f"- {result.name} ({result.source}), {result.dtype}: {len(result.replaced)} modules replaced, on {backends}; {len(result.skipped)} skipped"
