"""``vitkernels demo``, behind ``make demo``: real models on real photos, original against accelerated."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import torch

from vitkernels import report, timing
from vitkernels.cli import _blocks, _compare, _engines, _zoo
from vitkernels.cli._common import device_of, device_option, out, peers_option, set_threads, steps, table, threads_option
from vitkernels.cli.accelerate import errors_table, speed_table

# Each model, the side of its photos (of a NaViT, whose photos keep their shapes, the longest) and its larger batch.
_MODELS = {
    "vit_small_patch16_224": (224, 8),
    "vit_pytorch:SimpleViT": (256, 8),
    "mobilevit_s": (256, 8),
    "hf:mobilevit": (256, 8),
    "mobilevitv2_050": (256, 8),
    "mobilevitv2_100": (256, 8),
    "hf:mobilevitv2": (256, 8),
    "efficientvit_m0": (224, 16),
    "efficientvit_m4": (224, 16),
    "vit_pytorch:NaViT": (384, 10),
    "vit_pytorch:DeepViT": (224, 8),
}
_TRAINED = ("mobilevitv2_050", "efficientvit_m0", "vit_pytorch:NaViT")
_HEADERS = (
    "model",
    "batch",
    "dtype",
    "mode",
    "original ms (p20 - p80)",
    "accelerated ms",
    "speed",
    "p20 - p80",
    *(f"{name} ms (its speed)" for name in _engines.ENGINES),
    "rounds",
    "error, original",
    "error, accelerated",
)
_BLOCK_HEADERS = (
    "model",
    "block, input",
    "batch",
    "dtype",
    "mode",
    "original ms",
    "accelerated ms",
    "speed",
    "p20 - p80",
    "error, original",
    "error, ours",
)
Panels = dict[str, dict[str, dict[str, tuple[float, float, float]]]]


def runs() -> list[tuple[str, int, torch.dtype, bool]]:
    """(model, batch, dtype, training): every model at batch 1 and its larger one in both dtypes, and a training step of two."""
    inference = [
        (name, batch, dtype, False) for dtype in (torch.float32, torch.bfloat16) for name, (_, larger) in _MODELS.items() for batch in (1, larger)
    ]
    return [*inference, *((name, _MODELS[name][1], torch.float32, True) for name in _TRAINED)]


@click.command("demo")
@click.option(
    "--out", "folder", type=click.Path(path_type=Path), default=Path("demo-report"), show_default=True, help="Where CSV, plot and report go."
)
@click.option("--model", "models", multiple=True, type=click.Choice(list(_MODELS)), help="Only this model; may be given several times.")
@click.option("--compile", "compiled", is_flag=True, help="Time torch.compile of the original too: minutes more.")
@click.option("--rounds", type=click.IntRange(min=1), default=15, show_default=True, help="Timing rounds a run.")
@click.option("--seconds", type=click.FloatRange(min=0.1), default=6.0, show_default=True, help="Stop timing a run after this long.")
@peers_option
@device_option
@threads_option
def command(
    folder: Path, models: tuple[str, ...], compiled: bool, rounds: int, seconds: float, peers: bool, device: str | None, threads: int | None
) -> None:
    """Real ViT, MobileViT, EfficientViT, NaViT and DeepViT models on photos, original and accelerated: errors against float64, speed, plot, report."""
    target = device_of(device)
    set_threads(threads)
    folder = report.results_folder(folder)
    begin = time.perf_counter()
    planned = [run for run in runs() if not models or run[0] in models]
    zoo: dict[str, _zoo.ZooModel] = {}
    results: list[_compare.Result] = []
    blocks: list[_blocks.Block] = []
    with steps(len(planned)) as progress:
        for name, batch, dtype, training in planned:
            progress.start(f"{name}, batch {batch}, {str(dtype).removeprefix('torch.')}{', training step' if training else ''}")
            if name not in zoo:
                zoo[name] = _zoo.load(name, size=_MODELS[name][0])
            options: dict[str, Any] = {"batch": batch, "dtype": dtype, "device": target, "rounds": rounds, "budget": seconds}
            results.append(_compare.compare(zoo[name], training=training, compiled=compiled, peers=peers, **options))
            if not training:
                blocks += _blocks.compare(zoo[name], **options)
            progress.advance()

    origin = report.provenance(target)
    write(folder, results, blocks, origin)
    out.print(errors_table(results))
    out.print(speed_table(results))
    if blocks:
        out.print(table(_BLOCKS_TITLE, _BLOCK_HEADERS, map(_block_cells, blocks), right=("batch", *_BLOCK_HEADERS[5:])))
    photos = max((r.images for r in results), key=len)
    out.print(f"Photos: {photos}. {time.perf_counter() - begin:.0f} s. Report, plot and CSV are in {folder}.", highlight=False)
    if not all(result.right for result in results) or not all(block.holds for block in blocks):
        raise click.exceptions.Exit(1)


def write(folder: Path, results: list[_compare.Result], blocks: list[_blocks.Block], origin: dict[str, Any]) -> None:
    """demo.csv, blocks.csv, demo.png and report.md."""
    rows = [result.summary() for result in results]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    report.write_csv(folder / "demo.csv", rows, origin, columns)
    block_rows = [block.summary() for block in blocks]
    if block_rows:
        report.write_csv(folder / "blocks.csv", block_rows, origin, list(block_rows[0]))
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
        "# Models, as they are and accelerated",
        "",
        report.origin_sentence(origin),
        "",
        f"Photos ({photos}); random weights with a fixed seed, the same in both models. BatchNorm statistics are those of the photos,",
        "and norms that a zoo starts at weight zero (the last of each residual branch of an EfficientViT) have random weights: each branch counts.",
        "Both run interleaved in one process; speed is the ratio inside each round, its median. The error is against the original model in float64:",
        "of the logits by the largest logit (inference), of the gradient of all parameters by its norm (training step, dropout off).",
        "A NaViT gets the photos at half their size, aspect ratio kept, packed into rows of up to 2048 tokens (its own group_images=True).",
        f"ONNX Runtime and OpenVINO run the original's ONNX export (opset {_engines.OPSET}, float32) in the same rounds with as many threads, each",
        "in a process of its own that is stopped while another is timed; speed is against the original. Their logits keep the same accuracy rule.",
        "",
        report.markdown_table(_HEADERS, map(_cells, results)),
        "",
        *(["![speed](demo.png)", ""] if panels else []),
        *_block_section(blocks),
        *dict.fromkeys(_replacements(result) for result in results),
        *notes,
        "",
    ]
    (folder / "report.md").write_text("\n".join(text))


def _cells(result: _compare.Result) -> list[str]:
    """One line of the report's table."""
    cells = [f"{result.name} ({result.source})", str(result.batch), result.dtype, result.mode]
    if result.measured is None:
        cells += ["not timed: nothing was replaced", *[""] * (4 + len(_engines.ENGINES))]
    else:
        before, after = (result.measured[name].quantiles for name in (_compare.ORIGINAL, _compare.ACCELERATED))
        speedup = result.measured.speedup(_compare.ACCELERATED, over=_compare.ORIGINAL)
        cells += [*map(_milliseconds, (before, after)), f"**{speedup.p50:.2f}x**", f"{speedup.p20:.2f} - {speedup.p80:.2f}"]
        cells += [_engine_cell(result.measured, name) for name in _engines.ENGINES]
        cells += [f"{result.measured.kept} kept, {result.measured.discarded} discarded{', weak' if result.measured.weak else ''}"]
    error = result.errors[-1]
    return [*cells, f"{error.original:.1e}", f"{error.accelerated:.1e}"]


def _milliseconds(quantiles: timing.Quantiles) -> str:
    p20, p50, p80 = map(report.milliseconds, quantiles.scaled(1e3))
    return f"{p50} ({p20} - {p80})"


def _engine_cell(measured: timing.Measurement, name: str) -> str:
    if name not in measured:
        return ""
    return f"{report.milliseconds(measured[name].quantiles.p50 * 1e3)} ({measured.speedup(name, over=_compare.ORIGINAL).p50:.2f}x)"


_BLOCKS_TITLE = "The attention block by itself, its partition into windows or patches included"


def _block_cells(block: _blocks.Block) -> list[str]:
    """One line of the table of blocks."""
    speedup = block.measured.speedup(_blocks.ACCELERATED, over=block.baseline)
    times = (report.milliseconds(block.measured[name].quantiles.p50 * 1e3) for name in (block.baseline, _blocks.ACCELERATED))
    ratios = (f"{speedup.p50:.2f}x", f"{speedup.p20:.2f} - {speedup.p80:.2f}{' (weak)' if block.measured.weak else ''}")
    return [block.model, block.block, str(block.batch), block.dtype, block.mode, *times, *ratios, f"{block.original_error:.1e}", f"{block.error:.1e}"]


def _block_section(blocks: list[_blocks.Block]) -> list[str]:
    if not blocks:
        return []
    return [
        f"## {_BLOCKS_TITLE}",
        "",
        "One block of each kind on the input it gets inside the model. forward and forward+backward: BatchNorm folded into the convolutions of both",
        "where timm does that (EfficientViT; `timm.utils.reparameterize_model`, before accelerating), else with its fixed statistics (MobileViT);",
        "training: live BatchNorm in both. The error is of the output, against float64.",
        "",
        report.markdown_table(_BLOCK_HEADERS, map(_block_cells, blocks)),
        "",
    ]


def _replacements(result: _compare.Result) -> str:
    backends = ", ".join(sorted({record.backend for record in result.replaced})) or "nothing"
    return f"- {result.name} ({result.source}), {result.dtype}: {len(result.replaced)} modules replaced, on {backends}; {len(result.skipped)} skipped"
