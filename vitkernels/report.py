"""What a run leaves behind: CSV with its provenance, PNG plots, a Markdown report.

pandas and matplotlib are imported when something is written, not before.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import os
import platform
import statistics
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vitkernels import allocator, host, native
from vitkernels._version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TUNED_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}
_INK, _RULE = "#1a1a1a", "#d0d0d0"
# The palette of Okabe and Ito: told apart by colour-blind readers too. Ours is the first.
_COLOURS = ("#0072B2", "#9a9a9a", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")


def results_folder(path: str | Path) -> Path:
    """Make the folder if need be and see that a file can be written in it, before anything is computed.

    Raises:
        OSError: it cannot be made or written; the message says so in one line.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write to the results folder {folder}: {error.strerror or error}") from error
    return folder


def package_version(name: str) -> str:
    """The installed version of a package, or ``absent``; the package is not imported."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def cpu_name() -> str:
    """The CPU's name and, where it tells them, family and model: virtual machines call every generation "AMD EPYC"."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = {key.strip(): value.strip() for key, colon, value in (line.partition(":") for line in reversed(lines)) if colon}
    name = told.get("model name") or platform.processor() or platform.machine()
    return f"{name} (family {told['cpu family']}, model {told['model']})" if {"cpu family", "model"} <= told.keys() else name


def device_name(device: str | torch.device) -> str:
    """The GPU's name for a CUDA device, else the CPU's."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def commit() -> str:
    """The git commit of this checkout, with ``+changes`` where it has uncommitted ones; empty for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def malloc_setting() -> str:
    """``tuned`` if glibc was told to keep large blocks, so that they cost no fresh pages; else ``default``."""
    told = all(os.environ.get(name) == value for name, value in TUNED_MALLOC.items())
    return "tuned" if told or allocator.in_force() else "default"


def provenance(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Where and with what a number was measured: columns of every CSV this package writes."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "vitkernels": __version__,
        "torch": str(torch.__version__),
        "triton": package_version("triton"),
        "python": platform.python_version(),
        "machine": device_name(device),
        "isa": native.cpu_isa() or host.isa_report().detected or platform.machine(),
        "threads": torch.get_num_threads(),
        "malloc": malloc_setting(),
    }


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], origin: Mapping[str, Any], columns: Sequence[str]) -> Path:
    """Write ``rows`` with the columns of ``origin`` (:func:`provenance`) behind each; only the header where there is no row."""
    import pandas

    frame = pandas.DataFrame([{**row, **origin} for row in rows], columns=[*columns, *origin])
    frame.to_csv(path, index=False, float_format="%.6g")
    return path


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a bar inside a cell is escaped."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def milliseconds(value: float) -> str:
    """Three digits, whatever the size."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def origin_sentence(origin: Mapping[str, Any]) -> str:
    """:func:`provenance` as one sentence of a report."""
    commit_part = f", commit {origin['commit']}" if origin["commit"] else ""
    return (
        f"Measured {origin['date']} on {origin['machine']} ({origin['isa']}), {origin['threads']} threads, {origin['malloc']} malloc; "
        f"vitkernels {origin['vitkernels']}{commit_part}, torch {origin['torch']}, triton {origin['triton']}, Python {origin['python']}."
    )


def write_results(
    folder: Path, name: str, title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], note: str = "", **origin: Any
) -> None:
    """``<name>.csv`` and ``<name>.md`` of a benchmark script: the rows, where they were measured, and what there is to know of the columns.

    Args:
        folder: of :func:`results_folder`.
        name: of both files.
        title: of the Markdown file.
        rows: with ``columns``.
        columns: in this order.
        note: a sentence above the table.
        origin: what replaces parts of :func:`provenance`.
    """
    measured = {**provenance(), **origin}
    write_csv(folder / f"{name}.csv", rows, measured, columns)
    cells = [[f"{row[c]:.3g}" if isinstance(row[c], float) else str(row[c]) for c in columns] for row in rows]
    parts = (f"# {title}", origin_sentence(measured), note, markdown_table(columns, cells) + "\n")
    (folder / f"{name}.md").write_text("\n\n".join(part for part in parts if part))


def _figure(rows: int, columns: int, height: float) -> tuple[Figure, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5 * columns, height * rows), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _dress(axes: Any, title: str, label: str, grid: str = "x") -> None:
    axes.set_facecolor("white")
    axes.set_title(title, color=_INK, fontsize=11, loc="left")
    axes.set_xlabel(label, color=_INK)
    axes.tick_params(colors=_INK)
    axes.grid(axis=grid, color=_RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def bars(path: Path, panels: Mapping[str, Mapping[str, Mapping[str, tuple[float, float, float]]]], label: str, baseline: float | None = None) -> Path:
    """Grouped horizontal bars with whiskers.

    Args:
        path: the PNG to write.
        panels: panel title -> group -> bar name -> (p20, p50, p80).
        label: of the value axis.
        baseline: a dashed line at this value.
    """
    names = list(dict.fromkeys(name for groups in panels.values() for group in groups.values() for name in group))
    tallest = max(sum(len(group) + 1 for group in groups.values()) for groups in panels.values())
    columns = 1 if len(panels) == 1 else 2
    figure, grid = _figure(-(-len(panels) // columns), columns, max(2.6, 0.24 * tallest + 1.4))
    cells = list(grid.flat)
    for axes in cells[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, groups) in zip(cells, panels.items(), strict=False):
        _dress(axes, title, label)
        position, ticks, drawn = 0.0, [], set()
        for group in groups.values():
            start = position
            for name, (low, middle, high) in group.items():
                error = [[max(0.0, middle - low)], [max(0.0, high - middle)]]
                legend = None if name in drawn else name
                drawn.add(name)
                axes.barh(position, middle, height=0.82, color=_COLOURS[names.index(name) % len(_COLOURS)], label=legend)
                axes.errorbar(middle, position, xerr=error, fmt="none", ecolor=_INK, elinewidth=0.8, capsize=2)
                box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
                offset = {"xytext": (5, 0), "textcoords": "offset points"}
                axes.annotate(f"{middle:.3g}", (max(middle, high), position), va="center", fontsize=8, color=_INK, bbox=box, **offset)
                position += 1
            ticks.append((start + position - 1) / 2)
            position += 0.8
        axes.set_yticks(ticks, list(groups))
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(tallest - 0.5, -0.9)  # bars of one height in every panel
        axes.margins(x=0.12)
        axes.set_xlim(left=0)
        if baseline is not None:
            axes.axvline(baseline, color=_INK, linewidth=0.9, linestyle="--")
    handles: dict[str, Any] = {}
    for axes in cells[: len(panels)]:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles)), frameon=False, labelcolor=_INK)
    figure.savefig(path, dpi=130, facecolor="white")
    return path


def by_depth(path: Path, panels: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], label: str) -> Path:
    """A value from 0 to 1 of each layer, over depth: for each series the mean as a line with a dot at each layer, and each head as a thin line.

    Args:
        path: the PNG to write.
        panels: panel title -> series -> for each layer, the values of its heads; of a layer that has none, nothing. There the lines are broken.
        label: of the value axis.
    """
    figure, grid = _figure(1, len(panels), 4.2)
    for axes, (title, series) in zip(grid.flat, panels.items(), strict=True):
        _dress(axes, title, "layer", grid="y")
        for index, (name, layers) in enumerate(series.items()):
            colour = _COLOURS[index % len(_COLOURS)]
            depth = range(1, len(layers) + 1)
            for head in range(max(map(len, layers), default=0)):
                axes.plot(depth, [layer[head] if head < len(layer) else math.nan for layer in layers], color=colour, linewidth=0.6, alpha=0.35)
            means = [statistics.fmean(layer) if layer else math.nan for layer in layers]
            axes.plot(depth, means, color=colour, linewidth=2, marker="o", markersize=4, label=name)
        axes.set_ylabel(label, color=_INK)
        axes.set_xlim(0.5, max(map(len, series.values()), default=1) + 0.5)
        axes.set_ylim(0, 1.02)
        axes.xaxis.get_major_locator().set_params(integer=True)
    handles, names = grid.flat[0].get_legend_handles_labels()
    names = [f"{name}: mean (thin: each head)" for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, max(1, len(handles))), frameon=False, labelcolor=_INK)
    figure.savefig(path, dpi=130, facecolor="white")
    return path
