"""``vitkernels bench [OP...]``."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch

from vitkernels import bench as benchmark
from vitkernels import proof, registry, report
from vitkernels.bench import COLUMNS, DTYPES, EAGER, OURS, Refused, Row
from vitkernels.cli._common import (
    CliError,
    device_of,
    device_option,
    dtype_of,
    err,
    json_option,
    out,
    print_json,
    set_threads,
    steps,
    table,
    threads_option,
)
from vitkernels.registry import OpSpec

_HEADERS = (
    "case",
    "contender",
    "backend",
    "p20 ms",
    "p50 ms",
    "p80 ms",
    "against eager",
    "ours against it",
    "of gemm",
    "of gemm fp32",
    "of copy",
    "error",
    "eager's error",
)


_SHARE = 25  # of the --seconds of a run, what timing one case may take: a peer of a second a call must not take the others' time


@click.command("bench")
@click.argument("ops", nargs=-1, metavar="[OP]...")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)), help="May be given several times; default float32 and bfloat16.")
@device_option
@threads_option
@click.option("--case", "cases", multiple=True, help="Only cases whose name holds this, such as B16; may be given several times.")
@click.option("--backward/--no-backward", default=True, show_default=True, help="Also forward and backward together.")
@click.option("--compile/--no-compile", "compiled", default=True, show_default=True, help="Let torch.compile take part (it compiles first).")
@click.option("--rounds", type=click.IntRange(min=1), default=20, show_default=True, help="Timing rounds a case.")
@click.option("--seconds", type=click.FloatRange(min=0), default=None, help="Begin no case after this many; the report names those left out.")
@click.option("--quick", is_flag=True, help="Two cases an op, 5 rounds, no torch.compile, float32 unless --dtype says otherwise.")
@click.option("--tuned-malloc", is_flag=True, help="Run with glibc told to keep large blocks, so that neither side pays for fresh pages.")
@click.option("--out", "folder", type=click.Path(path_type=Path), default=None, help="Write CSV, plots and a Markdown report into this folder.")
@json_option
def command(
    ops: tuple[str, ...],
    dtypes: tuple[str, ...],
    device: str | None,
    threads: int | None,
    cases: tuple[str, ...],
    backward: bool,
    compiled: bool,
    rounds: int,
    seconds: float | None,
    quick: bool,
    tuned_malloc: bool,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Time ops against eager, torch.compile, their peers and the machine's roofs, interleaved in one process.

    A row is written only if that contender's output and gradients were right in this very run. Without OP, every op; on a GPU, every op with a
    kernel there. The files of --out are written anew after every case, so that an interrupt loses none; the plots, at the end.
    """
    if tuned_malloc and report.malloc_setting() != "tuned":
        # glibc reads these when the process starts.
        os.execve(sys.executable, [sys.executable, "-m", "vitkernels", *sys.argv[1:]], {**os.environ, **report.TUNED_MALLOC})
    target = device_of(device)
    set_threads(threads)
    try:
        specs = [registry.get(name) for name in ops] if ops else _with_kernels(target)
    except ValueError as error:
        raise CliError(str(error)) from error
    if folder is not None:
        folder = report.results_folder(folder)
    wanted = [dtype_of(name) for name in dtypes or (("float32",) if quick else ("float32", "bfloat16"))]
    plan = list(benchmark.plan(specs, wanted, backward, cases, quick, target))
    if seconds is not None:
        plan = benchmark.in_turns(plan)
    if not plan:
        names = dict.fromkeys(case.name for spec in specs for case in spec.cases(target))
        raise CliError(f"no case holds {', '.join(cases)}; there are {', '.join(names)}")

    rows: list[Row] = []
    refused: list[Refused] = []
    origin = report.provenance(target)
    begin = time.perf_counter()
    interrupted = False
    with steps(len(plan)) as progress:
        for spec, case, dtype, with_backward in plan:
            mode = proof.TRAINING if with_backward else proof.FORWARD
            progress.start(f"{spec.name} {case.name} {str(dtype).removeprefix('torch.')} {mode}")
            missing = Refused(spec.name, case.name, str(dtype).removeprefix("torch."), mode, "any", "", wrong=False)
            if interrupted or (seconds is not None and time.perf_counter() - begin > seconds):
                refused.append(replace(missing, reason=f"left out: {'interrupted' if interrupted else 'the time was up'}"))
                continue
            try:
                good, bad = benchmark.bench_case(
                    spec,
                    case,
                    dtype,
                    target,
                    backward=with_backward,
                    compiled=compiled and not quick,
                    rounds=min(rounds, 5) if quick else rounds,
                    budget=60.0 if seconds is None else min(60.0, seconds / _SHARE),
                )
            except torch.OutOfMemoryError:
                good, bad = [], [replace(missing, variant=EAGER, reason="out of memory")]
            except KeyboardInterrupt:
                interrupted = True
                good, bad = [], [replace(missing, reason="left out: interrupted")]
            rows += good
            refused += bad
            if folder is not None:
                write(folder, rows, refused, origin)
            progress.advance()

    if folder is not None:
        write(folder, rows, refused, origin)
        plot(folder, rows, origin)
    if as_json:
        print_json({"provenance": origin, "rows": [asdict(r) for r in rows], "refused": [asdict(r) for r in refused]})
    else:
        _show(rows, refused)
        if folder is not None:
            out.print(f"CSV, plots and report.md are in {folder}", highlight=False)
    if interrupted:
        raise KeyboardInterrupt
    if any(r.wrong and r.variant.startswith(OURS) for r in refused):
        raise click.exceptions.Exit(1)


def _with_kernels(device: torch.device) -> list[OpSpec]:
    """What is timed if no op is named: on a GPU not those that only eager runs there."""
    specs = registry.all_specs().values()
    if device.type != "cuda":
        return list(specs)
    return [spec for spec in specs if any(benchmark.runnable_backends(spec.name, device, dtype) for dtype in DTYPES.values())]


def _groups(rows: list[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Rows by (op, mode, dtype), in order."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.op, row.mode, row.dtype), []).append(row)
    return groups


def _cells(row: Row) -> tuple[str, ...]:
    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.0%}"

    return (
        row.case,
        row.variant,
        row.backend,
        *(report.milliseconds(value) for value in (row.p20_ms, row.p50_ms, row.p80_ms)),
        f"{row.speedup_p50:.2f}x",
        "" if row.ours_speedup is None or row.variant == OURS else f"{row.ours_speedup:.2f}x",
        share(row.gemm_fraction),
        share(row.gemm32_fraction),
        share(row.copy_fraction),
        *("" if error is None else f"{error:.1e}" for error in (row.error, row.eager_error)),
    )


def _show(rows: list[Row], refused: list[Refused]) -> None:
    for (op, mode, dtype), group in _groups(rows).items():
        out.print(table(f"{op}, {mode}, {dtype}", _HEADERS, [_cells(row) for row in group], right=_HEADERS[3:]))
    for r in refused:
        err.print(f"no row for {r.variant} on {r.op} {r.case} {r.dtype} {r.mode}: {r.reason}", highlight=False, markup=False)


def _rounds(group: list[Row]) -> str:
    """How many rounds a table's numbers come from."""
    kept = [row.rounds_kept for row in group]
    sentence = f"{min(kept)} to {max(kept)} rounds kept a case, at most {max(row.rounds_discarded for row in group)} discarded."
    weak = dict.fromkeys(row.case for row in group if row.weak)
    return sentence + (f" Weak, with fewer than three undisturbed rounds: {', '.join(weak)}." if weak else "")


def losing(rows: list[Row]) -> list[str]:
    """Where not to use an op: the cases in which eager or another contender was faster than ours in the median."""
    lines = []
    for row in rows:
        if row.ours_speedup is not None and not row.variant.startswith(OURS) and row.ours_speedup < 1:
            lines.append(f"{row.op}, {row.case}, {row.dtype}, {row.mode}: {row.variant} is {1 / row.ours_speedup:.2f}x as fast")
    return lines


def _suffix(origin: dict[str, Any]) -> str:
    """Names carry the malloc setting, so that both runs fit in one folder."""
    return "" if origin["malloc"] == "default" else f"-{origin['malloc']}-malloc"


def plot(folder: Path, rows: list[Row], origin: dict[str, Any]) -> None:
    """One plot an op."""
    for op in dict.fromkeys(row.op for row in rows):
        panels: dict[str, dict[str, dict[str, tuple[float, float, float]]]] = {}
        for (name, mode, dtype), group in _groups(rows).items():
            if name == op:
                panel = panels.setdefault(f"{mode}, {dtype}", {})
                for row in group:
                    if row.variant != EAGER:
                        panel.setdefault(row.case, {})[row.variant] = (row.speedup_p20, row.speedup_p50, row.speedup_p80)
        report.bars(folder / f"{op}{_suffix(origin)}.png", panels, "times as fast as eager (median; whiskers p20 and p80)", baseline=1.0)


def write(folder: Path, rows: list[Row], refused: list[Refused], origin: dict[str, Any]) -> None:
    """CSV and the Markdown report, which shows the plots of :func:`plot`."""
    suffix = _suffix(origin)
    report.write_csv(folder / f"bench{suffix}.csv", [asdict(row) for row in rows], origin, COLUMNS)
    text = ["# vitkernels bench", "", report.origin_sentence(origin), ""]
    text += [
        "Speed is eager's time by the contender's, taken inside each round of an interleaved run; the median. *of gemm*: the algorithm's",
        "arithmetic by the time, against a square `torch.mm` in the same dtype (and in float32) in the same rounds; forward+backward counts three",
        "forwards. *of copy*: the least memory traffic against a copy of as many bytes. *error*: the largest error against float64 by the largest",
        "value, of the output or gradient that is nearest to the limit (twice eager's own error, plus rounding); none for what computes",
        "something else.",
        "",
    ]
    for op in dict.fromkeys(row.op for row in rows):
        text += [f"## {op}", "", f"![speed of {op}]({op}{suffix}.png)", ""]
        for (name, mode, dtype), group in _groups(rows).items():
            if name == op:
                text += [f"### {mode}, {dtype}", "", report.markdown_table(_HEADERS, map(_cells, group)), "", _rounds(group), ""]
    if proved := proof.shown(map(asdict, rows), registry.all_specs()):
        text += ["## What this proves", "", "Right in every case of the op, and in none slower in the median than what would run otherwise:", ""]
        text += [f"- {op} on {backend}: {', '.join(map(' '.join, measured))}" for (op, backend), measured in proved.items()] + [""]
    lost = losing(rows)
    text += ["## Where not to use it", "", *([f"- {line}" for line in lost] or ["No contender was faster than ours in this run."]), ""]
    if refused:
        text += ["## No row", "", *(f"- {r.variant} on {r.op}, {r.case}, {r.dtype}, {r.mode}: {r.reason}" for r in refused), ""]
    (folder / f"report{suffix}.md").write_text("\n".join(text))
