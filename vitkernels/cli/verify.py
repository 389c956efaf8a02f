"""``vitkernels verify``: proof, on this very machine, that each kernel is right and not slower than eager."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial

import click
import torch

from vitkernels import accuracy, backends, bench, proof, registry, timing
from vitkernels.cli._common import device_of, err, json_option, out, print_json, set_threads, steps, table, threads_option, verdict
from vitkernels.registry import OpSpec

Speed = tuple[float, float, float]


class TimeUp(Exception):
    """There was no time to look at all of a kernel."""


@dataclass
class Proof:
    """What was found for one op on one backend and device.

    Attributes:
        checked: tensors (outputs and gradients) that were compared with float64.
        wrong: those that broke the rule, in words.
        worst: the largest error as a fraction of what the rule allows.
        speedups: paired speed against eager, or what is faster of that which would run otherwise, by case, dtype and mode: (p20, p50, p80).
        stamped: the dtypes and modes in which ``auto`` takes the kernel on this GPU from now on.
    """

    op: str
    backend: str
    device: str
    checked: int = 0
    worst: float = 0.0
    wrong: list[str] = field(default_factory=list)
    speedups: dict[tuple[str, str, str], Speed] = field(default_factory=dict)
    stamped: list[proof.Measured] = field(default_factory=list)

    @property
    def slower(self) -> list[str]:
        """The calls where something else is faster even at the 80th percentile."""
        return [", ".join(call) for call in self._lost]

    @property
    def _lost(self) -> list[tuple[str, str, str]]:
        return [call for call, (_, _, p80) in self.speedups.items() if p80 < 1]

    @property
    def earned(self) -> list[proof.Measured]:
        """In what ``auto`` may take the kernel: it was checked and is right, and in that dtype and mode it was timed and nowhere slower."""
        if not self.checked or self.wrong:
            return []
        lost = {call[1:] for call in self._lost}
        return [measured for measured in dict.fromkeys(call[1:] for call in self.speedups) if measured not in lost]


def targets(only: torch.device | None = None) -> Iterator[tuple[OpSpec, str, torch.device]]:
    """Every kernel that can run on the hardware here, or on one kind of it."""
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    for spec in registry.all_specs().values():
        for device in devices:
            if only is not None and device.type != only.type:
                continue
            for name in backends.BACKENDS:
                if name != "reference" and any(backends.why_not(spec.name, name, device, d) is None for d in bench.DTYPES.values()):
                    yield spec, name, device


def check(spec: OpSpec, backend: str, device: torch.device, result: Proof, until: float = math.inf) -> None:
    """Hold every registry sample, its output and every gradient, to the accuracy rule in every dtype of the backend.

    Raises:
        TimeUp: ``time.perf_counter()`` passed ``until``.
    """
    small = backend == "triton" and device.type == "cpu"
    for dtype_name, dtype in bench.DTYPES.items():
        if backends.why_not(spec.name, backend, device, dtype) is not None:
            continue
        for sample in spec.samples(dtype, str(device), grad=True, small=small):
            if time.perf_counter() > until:
                raise TimeUp
            where = f"{dtype_name}, {sample.name}"
            judge = accuracy.Judge(spec.reference, sample, spec.function)
            try:
                with backends.backend(backend):
                    comparisons = judge(spec.function)
            except Exception as error:  # a kernel that does not compile or launch here is a finding, not the end of the run
                result.wrong.append(f"{where}: {bench.first_line(error)}")
                continue
            result.checked += len(comparisons)
            result.worst = max([result.worst, *(c.badness for c in comparisons)])
            result.wrong += [f"{where}: {c.name} is off by {c.error:.2e}, eager by {c.eager_error:.2e}" for c in comparisons if not c.holds]


def race(spec: OpSpec, backend: str, device: torch.device, result: Proof, rounds: int, until: float = math.inf) -> None:
    """Time forward and forward+backward against eager, interleaved, on the bench cases; on a GPU, where ``auto`` goes by it, in each dtype and
    against what would run otherwise, too.

    Raises:
        TimeUp: ``time.perf_counter()`` passed ``until``; of the dtype and mode under way nothing is kept.
    """
    dtypes = {name: dtype for name, dtype in bench.DTYPES.items() if backends.why_not(spec.name, backend, device, dtype) is None}
    modes = (proof.FORWARD, proof.TRAINING) if spec.differentiable else (proof.FORWARD,)
    for name, mode in itertools.product(dtypes if device.type == "cuda" else ("float32",), modes):
        speeds: dict[tuple[str, str, str], Speed] = {}
        for case in spec.cases(device):
            if time.perf_counter() > until:
                raise TimeUp
            samples = bench.cold_samples(case, bench.DTYPES[name], device)
            grad_outputs = None
            if mode == proof.TRAINING:
                samples = [accuracy.with_grad(sample) for sample in samples]
                with torch.no_grad():
                    grad_outputs = accuracy.output_gradients(spec.reference(*samples[0].args, **samples[0].kwargs))
            with torch.set_grad_enabled(grad_outputs is not None):
                calls = {bench.EAGER: bench.step(spec.reference, samples, grad_outputs)}
                for other in spec.otherwise if device.type == "cuda" else ():
                    call = bench.step(spec.peers[other], samples, grad_outputs)
                    with contextlib.suppress(Exception):  # it does not take such a call, so it would not run
                        call()
                        calls[other] = call
                ours = {bench.OURS: bench.step(spec.function, samples, grad_outputs)}
                under = {bench.OURS: partial(backends.backend, backend)}
                measured = timing.interleave(ours | calls, rounds=rounds, budget=5.0, device=device, contexts=under)
            over = [measured.speedup(bench.OURS, over=other) for other in calls]
            speeds[case.name, name, mode] = (min(s.p20 for s in over), min(s.p50 for s in over), min(s.p80 for s in over))
        result.speedups |= speeds


@click.command("verify")
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True, help="Timing rounds a case.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default=None, help="Only there; default: everywhere.")
@click.option("--seconds", type=click.FloatRange(min=0), default=None, help="Stop after this many; what is left out is named.")
@threads_option
@json_option
def command(rounds: int, device: str | None, seconds: float | None, threads: int | None, as_json: bool) -> None:
    """Prove every kernel on the hardware found here.

    Each output and each gradient is compared with float64: a kernel may be at most twice as far off as eager PyTorch in the same dtype. Then a short
    timing against eager. A GPU kernel that is right becomes the default on this GPU in each dtype, with or without gradients, in which it is nowhere
    slower. Exit code 1 if anything is wrong.
    """
    set_threads(threads)
    found = list(targets(device_of(device) if device else None))
    results = []
    left: list[str] = []
    begin = time.perf_counter()
    with steps(2 * len(found)) as progress:
        for spec, backend, place in found:
            if seconds is not None and time.perf_counter() - begin > seconds:
                left.append(f"{spec.name} on {backend} ({place})")
                continue
            result = Proof(spec.name, backend, str(place))
            results.append(result)
            interpreted = backend == "triton" and place.type == "cpu"
            until = math.inf if seconds is None else begin + seconds
            try:
                progress.start(f"checking {spec.name} on {backend} ({place})")
                check(spec, backend, place, result, until)
                progress.advance()
                if not result.wrong and not interpreted:
                    progress.start(f"timing {spec.name} on {backend} ({place})")
                    race(spec, backend, place, result, rounds, until)
                progress.advance()
            except TimeUp:
                left.append(f"{spec.name} on {backend} ({place}), in part")
            if place.type == "cuda" and result.earned:
                result.stamped = result.earned
                proof.write_stamp(spec.name, backend, place, result.stamped)

    wrong = [line for result in results for line in (f"{result.op} on {result.backend}: {w}" for w in result.wrong)]
    if as_json:
        proofs = [{**asdict(r), "speedups": {", ".join(call): s for call, s in r.speedups.items()}, "slower": r.slower} for r in results]
        print_json({"ok": not wrong, "proofs": proofs, "left_out": left})
    else:
        if results or not left:
            _show(results)
        if left:
            out.print(f"Left out, the time was up: {', '.join(left)}", highlight=False)
        for line in wrong:
            err.print(f"[bold red]wrong[/bold red] {line}", highlight=False)
    if wrong:
        raise click.exceptions.Exit(1)


def _show(results: list[Proof]) -> None:
    rows = []
    for r in results:
        medians = [p50 for _, p50, _ in r.speedups.values()]
        speed = f"{min(medians):.2f}x to {max(medians):.2f}x" if medians else "not timed"
        rows.append((r.op, r.backend, r.device, verdict(not r.wrong), str(r.checked), f"{r.worst:.0%}", speed, _outcome(r)))
    if not results:
        out.print("No kernel can run here, so there is nothing to verify: `vitkernels doctor` says what is missing.", highlight=False)
        return
    headers = ("op", "backend", "device", "right", "tensors", "worst error", "against eager", "auto")
    out.print(table("Kernels against float64, and against eager", headers, rows, right=("tensors", "worst error")))
    out.print(
        "worst error: of what the rule allows (twice eager's own error, plus rounding). against eager: the slowest and the fastest case, on a GPU"
    )
    out.print("against the fastest of what would run otherwise.")


def _outcome(result: Proof) -> str:
    """What the proof means for the automatic choice."""
    if not result.device.startswith("cuda"):
        if result.backend == "triton":
            return "does not take it: Triton's interpreter is for tests"
        return "takes it, and should not: VITKERNELS_BACKEND=reference avoids it" if result.wrong else "takes it"
    if result.wrong:
        return "does not take it: wrong"
    slower = f"slower on {'; '.join(result.slower)}"
    if not result.stamped:
        return f"does not take it: {slower if result.slower else 'not timed'}"
    taken = f"takes it on this GPU from now on: {', '.join(map(' '.join, result.stamped))}"
    return f"{taken}; {slower}" if result.slower else taken
