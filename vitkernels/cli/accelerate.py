"""``vitkernels accelerate MODEL``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from vitkernels import report, timing
from vitkernels.cli import _compare, _zoo
from vitkernels.cli._common import (
    device_of,
    device_option,
    dtype_of,
    dtype_option,
    json_option,
    out,
    peers_option,
    print_json,
    set_threads,
    steps,
    table,
    threads_option,
    verdict,
)
from vitkernels.integrations import Record


@click.command("accelerate")
@click.argument("model")
@click.option("--source", type=click.Choice(["auto", *_zoo.SOURCES]), default="auto", show_default=True, help="The zoo that MODEL is a name of.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True)
@dtype_option
@device_option
@threads_option
@click.option("--train", is_flag=True, help="A training step (forward, backward) instead of inference.")
@click.option("--image", type=click.Path(path_type=Path), default=None, help="An image to run on; default scikit-image's photos.")
@click.option("--size", type=click.IntRange(min=8), default=None, help="Side of the images; default the model's own.")
@click.option("--repeats", type=click.IntRange(min=1), default=20, show_default=True, help="Timing rounds; each runs both models.")
@click.option(
    "--compile/--no-compile",
    "compiled",
    default=True,
    show_default=True,
    help="Time torch.compile of the original too, its weights frozen in inference on the CPU (it compiles first, for a minute or two).",
)
@peers_option
@click.option("--save-plot", type=click.Path(path_type=Path, dir_okay=False), default=None, help="Write the timings to this PNG.")
@json_option
def command(
    model: str,
    source: str,
    batch: int,
    dtype: str,
    device: str | None,
    threads: int | None,
    train: bool,
    image: Path | None,
    size: int | None,
    repeats: int,
    compiled: bool,
    peers: bool,
    save_plot: Path | None,
    as_json: bool,
) -> None:
    """Run MODEL as it is and accelerated, side by side.

    MODEL is a name of timm (mobilevitv2_050), a transformers config (hf:mobilevitv2) or a vit_pytorch class (vit_pytorch:MobileViT). Weights are
    random with a fixed seed; nothing is downloaded. Shows what was replaced and what was not and why, the error of both against float64, and the
    speed of both, interleaved, beside channels_last, torch.compile, ONNX Runtime and OpenVINO where these compute the same. Exit code 1 if the
    accelerated model is less accurate than the rule allows.
    """
    target = device_of(device)
    set_threads(threads)
    _zoo.check_image(image)
    if save_plot is not None:
        report.results_folder(save_plot.parent)
    zoo_model = _zoo.load(model, source, size)
    with steps(repeats) as progress:
        progress.start(f"{zoo_model.name}: original and accelerated, interleaved")
        result = _compare.compare(
            zoo_model,
            batch=batch,
            dtype=dtype_of(dtype),
            device=target,
            training=train,
            image=image,
            rounds=repeats,
            compiled=compiled,
            peers=peers,
            progress=progress.advance,
        )
    if save_plot is not None and result.measured is not None:
        milliseconds = {name: _scaled(t.quantiles, 1e3) for name, t in result.measured.items()}
        report.bars(save_plot, {result.title: {"": milliseconds}}, "ms (median; whiskers p20 and p80)")
    if as_json:
        print_json(as_data(result) | {"machine": report.provenance(target)})
    else:
        show(result)
        if save_plot is not None and result.measured is not None:
            out.print(f"Plot: {save_plot}", highlight=False)
    if not result.right:
        raise click.exceptions.Exit(1)


def _scaled(quantiles: timing.Quantiles, factor: float) -> tuple[float, float, float]:
    return quantiles.p20 * factor, quantiles.p50 * factor, quantiles.p80 * factor


def as_data(result: _compare.Result) -> dict[str, Any]:
    """The whole result as plain data."""
    return {
        **result.summary(),
        "replaced": [asdict(record) for record in result.replaced],
        "skipped": [asdict(record) for record in result.skipped],
        "fallbacks": result.fallbacks,
        "notes": list(result.notes),
    }


def show(result: _compare.Result) -> None:
    """Print the result as tables."""
    out.print(f"[bold]{result.title}[/bold]; images: {result.images}", highlight=False)
    if not result.replaced and not result.skipped:
        out.print("Nothing to replace: no module of this model is of a class vitkernels knows, so nothing was timed.", highlight=False)
        return
    modules = [
        (record.path or "(the model)", record.original_class.rpartition(".")[2], record.op, record.backend or "skipped", _note(result, record))
        for record in (*result.replaced, *result.skipped)
    ]
    headers = ("module", "class", "op", "backend", "note")
    out.print(table(f"{len(result.replaced)} modules replaced, {len(result.skipped)} skipped", headers, modules))
    out.print(errors_table([result]))
    if result.measured is None:
        out.print("Nothing was replaced, so nothing was timed.")
        return
    out.print(speed_table([result]))
    out.print(rounds_sentence(result.measured), highlight=False)
    for note in result.notes:
        out.print(note, highlight=False, markup=False)


def _note(result: _compare.Result, record: Record) -> str:
    """Why a module was skipped, or ran its original code; else what to know of it."""
    if record.reason:
        return record.reason
    return f"ran its original code: {result.fallbacks[record.path]}" if record.path in result.fallbacks else record.note


def errors_table(results: list[_compare.Result]) -> Table:
    """Error against float64, of the original and of the accelerated model."""
    rows: list[tuple[str | Text, ...]] = [
        (*_run(r), error.of, f"{error.original:.2e}", f"{error.accelerated:.2e}", verdict(error.holds)) for r in results for error in r.errors
    ]
    headers = ("model", "batch", "dtype", "mode", "of", "original", "accelerated", "within the rule")
    title = "Error against the original model in float64, relative; the rule: at most twice the original's own"
    return table(title, headers, rows, right=("batch", "original", "accelerated"))


def speed_table(results: list[_compare.Result]) -> Table:
    """p20, p50 and p80 of each model, the paired ratio, and the error against float64."""
    rows: list[tuple[str, ...]] = []
    for r in results:
        if r.measured is None:
            continue
        for name, found in r.measured.items():
            ratio = r.measured.speedup(name, over=_compare.ORIGINAL)
            numbers = (report.milliseconds(value) for value in found.quantiles.scaled(1e3))
            error = r.error_of_logits(name)
            said = "" if error is None else f"{error:.1e}"
            rows.append((*_run(r), name, *numbers, f"{ratio.p50:.2f}x", f"{ratio.p20:.2f} - {ratio.p80:.2f}", said))
    headers = ("model", "batch", "dtype", "mode", "variant", "p20 ms", "p50 ms", "p80 ms", "speed", "p20 - p80", "error of logits")
    return table("Speed, interleaved; the ratio is taken inside each round", headers, rows, right=("batch", *headers[5:]))


def _run(result: _compare.Result) -> tuple[str, ...]:
    return (f"{result.name} ({result.source})", str(result.batch), result.dtype, result.mode)


def rounds_sentence(measured: timing.Measurement) -> str:
    """How many rounds the numbers come from."""
    if measured.weak:
        return f"{measured.kept} rounds, nearly all disturbed by other processes: a weak number; run it again on a quiet machine."
    return f"{measured.kept} rounds kept, {measured.discarded} discarded because other processes ran."
