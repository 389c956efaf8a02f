"""Whole models in inference on a GPU: accelerated, against PyTorch as it is and torch.compile, each also as a CUDA graph.

``python benchmarks/whole_models_gpu.py --out benchmarks/results/gpu`` writes ``whole_models_gpu.csv`` and ``whole_models_gpu.md``, anew after every
row, so that nothing is lost when the time is up. First every row is measured without torch.compile; then, with ``--compile``, again with it, as far
as ``--total`` reaches, since it takes longer to compile than all the rest takes. No contender is timed whose logits did not pass the accuracy rule
against float64 in that run, as a graph, too. Weights and images are of one dtype, without autocast.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from whole_models import COMPILED, LAST, MODELS, ORIGINAL, OURS, cell

import vitkernels
from vitkernels import accuracy, backends, bench, report, timing
from vitkernels.cli import _compare, _zoo
from vitkernels.cli._common import CliError
from vitkernels.registry import Sample

FORCED = {f"{OURS} [{name}]": name for name in ("triton", "cuda")}
CONTENDERS = (ORIGINAL, LAST, COMPILED, OURS, *FORCED)
GRAPHS = tuple(name + bench.GRAPH for name in CONTENDERS)
MILLISECONDS = tuple(f"{name} ms" for name in (*CONTENDERS, *GRAPHS))
AUTO = ("auto p20", "auto p50", "auto p80", "auto, graph p50")
BEST = ("best of ours", "best other", "best p20", "best p50", "best p80")
COLUMNS = ("model", "batch", "dtype", "auto runs", *MILLISECONDS, *AUTO, *BEST, "worst error", "original's error", "rounds", "weak")
NOTE = (
    "*auto* is how many times as fast the accelerated model is as the original (as graphs: graph against graph), taken inside each round; *best* the"
    " fastest accelerated contender against the fastest of the others. *[triton]* and *[cuda]* are backends asked for by name; a cell is empty where"
    " that changes nothing or cannot run. *auto runs* says what `auto` chose, and for how many modules. float32 is PyTorch's default: TF32 in"
    " convolutions, not in matrix products."
)


@dataclass(frozen=True)
class Contender:
    """A forward, and the backend in force around it."""

    call: Callable[[], Tensor]
    images: Tensor
    model: Any
    backend: str = "auto"

    def on(self, images: Tensor) -> Tensor:
        with backends.backend(self.backend):
            return _zoo.logits(self.model(images))


def contender(model: Any, images: Tensor, backend: str = "auto") -> Contender:
    return Contender(lambda: _zoo.logits(model(images)), images, model, backend)


def accelerated(original: nn.Module, images: Tensor, backend: str) -> tuple[Contender, Counter[str]]:
    """A copy accelerated under a backend, run once; and what its modules run on, by op.

    Raises:
        BackendUnavailable: a module cannot run on that backend.
    """
    model = copy.deepcopy(original)
    with backends.backend(backend):
        handle = vitkernels.accelerate(model)
        model(images)
    left = handle.fallbacks
    return contender(model, images, backend), Counter(f"{r.op} {'original' if r.path in left else r.backend}" for r in handle.replaced)


def contenders(original: nn.Module, images: Tensor, compiled: bool, notes: list[str]) -> tuple[dict[str, Contender], str]:
    """All but the graphs, and what ``auto`` runs."""
    last = copy.deepcopy(original).to(memory_format=torch.channels_last)
    found = {ORIGINAL: contender(original, images), LAST: contender(last, images.contiguous(memory_format=torch.channels_last))}
    found[OURS], usual = accelerated(original, images, "auto")
    seen = [usual]
    for name, backend in FORCED.items():
        try:
            forced, runs = accelerated(original, images, backend)
        except Exception as error:  # not for this op, or a kernel that does not compile or launch here
            notes.append(f"{name}: {bench.first_line(error)}")
            continue
        if runs not in seen:
            seen.append(runs)
            found[name] = forced
    if compiled:
        torch.compiler.reset()
        try:
            found[COMPILED] = contender(_compare.compiled_for_inference(original, images), images)
        except Exception as error:  # whatever a compiler meets
            notes.append(f"{COMPILED}: {bench.first_line(error)}")
    return found, ", ".join(f"{count} {what}" for what, count in sorted(usual.items())) or "nothing replaced"


def right(name: str, one: Contender, output: Tensor, original: Contender, exact: nn.Module, notes: list[str]) -> accuracy.Comparison | None:
    """The verdict on a contender's logits, or None, and a note, where they break the rule: in this draw of the images and in the median of more."""

    def compared(fast: Tensor, images: Tensor) -> list[accuracy.Comparison]:
        return [accuracy.compare_tensors("logits", fast, original.on(images), _zoo.logits(exact(images.double())))]

    def draw(number: int) -> list[accuracy.Comparison]:
        (images,) = accuracy.jittered(Sample("", (one.images,)), number, accuracy.REDRAW_STEP).args
        return compared(one.on(images), images)

    (found,) = accuracy.settled(compared(output, one.images), draw)
    if found.holds:
        return found
    notes.append(f"{name}: not timed, its logits are off by {found.relative_error:.1e}, the original's by {found.relative_eager_error:.1e}")
    return None


def compare(
    model: _zoo.ZooModel, batch: int, dtype: torch.dtype, device: torch.device, rounds: int, seconds: float, compiled: bool
) -> tuple[dict[str, Any], list[str]]:
    """One row, and what there is to say about contenders that are not in it."""
    notes: list[str] = []
    images: Any = _zoo.images(model, batch)[0]
    images = images.to(device, dtype)
    original = copy.deepcopy(model.module).to(device, dtype)
    # The weights of that dtype: what is judged is the arithmetic, not what rounding the weights did to the model.
    exact = copy.deepcopy(original).double()
    found, runs = contenders(original, images, compiled, notes)
    calls: dict[str, timing.Call] = {}
    contexts: dict[str, Any] = {}
    verdicts: dict[str, accuracy.Comparison] = {}
    for name, one in found.items():
        outputs = {name: one.on(one.images)}
        replay: timing.Call | None = None
        if device.type == "cuda":
            try:
                with backends.backend(one.backend):
                    replay, outputs[name + bench.GRAPH] = bench.captured(one.call)
                replay()
            except RuntimeError as error:
                notes.append(f"{name + bench.GRAPH}: {bench.first_line(error)}")
        for variant, output in outputs.items():
            verdict = right(variant, one, output, found[ORIGINAL], exact, notes)
            if verdict is not None:
                verdicts[variant] = verdict
                calls[variant] = one.call if variant == name else replay  # type: ignore[assignment]
                contexts[variant] = partial(backends.backend, one.backend) if variant == name else contextlib.nullcontext
    del exact
    measured = timing.interleave(calls, rounds=rounds, budget=seconds, device=device, contexts=contexts)
    row: dict[str, Any] = {"model": model.name, "batch": batch, "dtype": str(dtype).removeprefix("torch."), "auto runs": runs}
    times = {name: measured[name].quantiles.p50 for name in calls}
    row |= {f"{name} ms": seconds * 1e3 for name, seconds in times.items()}
    for values, ours, base in ((AUTO[:3], OURS, ORIGINAL), (AUTO[3:], OURS + bench.GRAPH, ORIGINAL + bench.GRAPH)):
        if ours in calls and base in calls:
            faster = measured.speedup(ours, over=base)
            row |= dict(zip(values, (faster.p20, faster.p50, faster.p80) if len(values) == 3 else (faster.p50,), strict=True))
    own = [name for name in times if name.startswith(OURS)]
    others = [name for name in times if not name.startswith(OURS)]
    if own and others:
        best, rival = min(own, key=times.__getitem__), min(others, key=times.__getitem__)
        faster = measured.speedup(best, over=rival)
        row |= dict(zip(BEST, (best, rival, faster.p20, faster.p50, faster.p80), strict=True))
    if own:
        worst = accuracy.worst([verdicts[name] for name in own])
        row |= {"worst error": worst.relative_error, "original's error": worst.relative_eager_error}
    row |= {"rounds": measured.kept, "weak": measured.weak}
    return {column: row.get(column, "") for column in COLUMNS}, notes


def loaded(names: list[str]) -> Iterator[_zoo.ZooModel]:
    """The models whose zoo is here; of the others it is said why not."""
    for name in names:
        try:
            yield _zoo.load(name)
        except CliError as error:
            print(f"{name}: skipped, {error.format_message()}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=8.0, help="stop timing a row after so long")
    parser.add_argument("--total", type=float, default=600.0, help="begin no row after so long")
    parser.add_argument("--model", action="append", help="default: " + ", ".join(MODELS))
    parser.add_argument("--batch", type=int, action="append", help="default: 64 and 1")
    parser.add_argument("--dtype", action="append", choices=list(bench.DTYPES), help="default: bfloat16 and float32")
    parser.add_argument("--compile", action="store_true", help="then measure every row again with torch.compile")
    options = parser.parse_args()
    begin = time.perf_counter()
    folder = options.out and report.results_folder(options.out)
    device = torch.device(options.device)
    models = list(loaded(options.model or list(MODELS)))
    plan = [
        (model, dtype, batch, compiled)
        for compiled in ((False, True) if options.compile else (False,))
        for dtype in options.dtype or ("bfloat16", "float32")
        for batch in options.batch or (64, 1)
        for model in models
    ]
    rows: dict[tuple[str, str, int], dict[str, Any]] = {}
    wrong = 0
    with torch.no_grad():
        for model, dtype, batch, compiled in plan:
            what = f"{model.name}, batch {batch}, {dtype}{', with torch.compile' if compiled else ''}"
            if time.perf_counter() - begin > options.total:
                print(f"{what}: left out, the time was up", flush=True)
                continue
            started = time.perf_counter()
            try:
                row, notes = compare(model, batch, bench.DTYPES[dtype], device, options.rounds, options.seconds, compiled)
            except Exception as error:  # out of memory, a kernel that does not launch: the others are still to be measured
                print(f"{what}: {bench.first_line(error)}", flush=True)
                wrong += 1
                continue
            finally:
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            wrong += sum(note.startswith(OURS) and "not timed" in note for note in notes)
            rows[model.name, dtype, batch] = row
            shown = ", ".join(f"{key} {cell(value)}" for key, value in row.items() if value != "")
            print(f"{shown} ({time.perf_counter() - started:.0f} s)", flush=True)
            print(*(f"  {note}" for note in notes), sep="\n", end="\n" if notes else "", flush=True)
            if folder:
                title = "Whole models in inference on a GPU"
                report.write_results(folder, "whole_models_gpu", title, list(rows.values()), COLUMNS, NOTE, **report.provenance(device))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
