"""Paired timing: variants run interleaved in one process, so that a ratio compares like with like.

Clocks, neighbours and page faults drift by tens of percent within a minute, and two numbers taken a minute apart differ by as much as the thing
measured. So every round runs every variant once, in random order, and a ratio is taken inside each round; what is reported is the median over rounds.
``torch.utils.benchmark`` times one statement after the other and cannot do that.

On Linux a round that other processes disturbed is thrown away. This matters most with two threads or more: OpenMP's barriers spin, and an
oversubscribed core then costs a whole scheduler slice per barrier.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

Call = Callable[[], Any]
# Never fewer kept rounds than this: below it the disturbed rounds count too and the result calls itself weak.
MIN_CLEAN_ROUNDS = 3


class Elsewhere(Protocol):
    """Something to time that runs in a process of its own and reads its own clock.

    Attributes:
        cpu_seconds: CPU time its process has used: not time that others took.
    """

    cpu_seconds: float

    def seconds_per_call(self, calls: int) -> float:
        """Run ``calls`` times; the seconds one took."""


@dataclass(frozen=True)
class Quantiles:
    """Median and the 20th and 80th percentile of some per-round numbers."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quantiles:
        """The quantiles of at least one number."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        fifths = statistics.quantiles(values, n=5, method="inclusive")
        return cls(fifths[0], statistics.median(values), fifths[3])

    def scaled(self, factor: float) -> tuple[float, float, float]:
        """The three numbers times ``factor``."""
        return self.p20 * factor, self.p50 * factor, self.p80 * factor


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one variant, one number for each kept round."""

    seconds: tuple[float, ...]

    @property
    def quantiles(self) -> Quantiles:
        """Over the rounds."""
        return Quantiles.of(self.seconds)


class Measurement(dict[str, Timing]):
    """What :func:`interleave` measured: a :class:`Timing` by variant, all over the same rounds.

    Attributes:
        kept: rounds the numbers come from.
        discarded: rounds thrown away because other processes ran.
        weak: fewer than three undisturbed rounds were seen, so disturbed ones are among those kept.
    """

    def __init__(self, timings: Mapping[str, Timing], kept: int, discarded: int, weak: bool) -> None:
        super().__init__(timings)
        self.kept = kept
        self.discarded = discarded
        self.weak = weak

    def speedup(self, of: str, over: str) -> Quantiles:
        """How many times faster ``of`` is than ``over``: the ratio of their times inside each round, then its quantiles."""
        return Quantiles.of([b / a for a, b in zip(self[of].seconds, self[over].seconds, strict=True)])


class ProcStatGuard:
    """Says whether other processes used the CPU during a round (Linux).

    A round is disturbed when they took more than 25 ms plus a tenth of its length. The kernel counts in ticks of 10 ms, so the guard is coarse.

    Args:
        read: returns the text of ``/proc/stat``.
        own_time: CPU seconds this process has used, all threads.
        clock: wall clock in seconds.
        ticks: kernel ticks per second.
    """

    def __init__(
        self,
        read: Callable[[], str] = Path("/proc/stat").read_text,
        own_time: Callable[[], float] = time.process_time,
        clock: Callable[[], float] = time.perf_counter,
        ticks: float | None = None,
    ) -> None:
        self._read, self._own_time, self._clock = read, own_time, clock
        self._ticks = float(os.sysconf("SC_CLK_TCK")) if ticks is None else ticks
        self._start = self._sample()

    def _sample(self) -> tuple[float, float]:
        # cpu user nice system idle iowait irq softirq steal guest guest_nice; guest time is counted in user already.
        fields = [int(f) for f in self._read().split("\n", 1)[0].split()[1:9]]
        user, nice, system, _idle, _iowait, irq, softirq, steal = fields + [0] * (8 - len(fields))
        busy = (user + nice + system + irq + softirq + steal) / self._ticks
        return busy - self._own_time(), self._clock()

    def start(self) -> None:
        """A round begins."""
        self._start = self._sample()

    def disturbed(self) -> bool:
        """True if others used too much of the round that began at :meth:`start`."""
        others, now = self._sample()
        return others - self._start[0] > 0.025 + 0.1 * (now - self._start[1])


def default_guard(own_time: Callable[[], float] = time.process_time) -> ProcStatGuard | None:
    """The guard where the system has ``/proc/stat`` to read, else ``None``."""
    try:
        return ProcStatGuard(own_time=own_time)
    except (OSError, ValueError):
        return None


def _run(call: Call, calls: int, device: torch.device) -> float:
    """Seconds per call."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end)) / 1e3 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


def interleave(
    variants: Mapping[str, Call],
    *,
    elsewhere: Mapping[str, Elsewhere] | None = None,
    rounds: int = 20,
    min_time: float = 0.010,
    budget: float = math.inf,
    device: str | torch.device = "cpu",
    contexts: Mapping[str, Callable[[], contextlib.AbstractContextManager[Any]]] | None = None,
    guard: ProcStatGuard | bool | None = True,
    seed: int = 0,
    progress: Callable[[], None] | None = None,
) -> Measurement:
    """Time several callables against each other.

    Args:
        variants: what to time, by name.
        elsewhere: variants that run in processes of their own.
        rounds: undisturbed rounds wanted. At most three times as many are run.
        min_time: a variant is called as often per round as this many seconds take, at least once.
        budget: stop after this many seconds, once three rounds are there.
        device: on CUDA, times come from events.
        contexts: a context to hold open around a variant's calls, by name; its cost is not timed.
        guard: judges rounds; True takes the system's own, None or False judges none.
        seed: of the order inside the rounds.
        progress: called after every round.

    Raises:
        ValueError: nothing to time, or ``rounds`` is not positive.
    """
    if not (variants or elsewhere) or rounds < 1:
        raise ValueError(f"interleave needs variants and a positive number of rounds; got {len(variants)} variants and rounds={rounds}")
    device = torch.device(device)
    contexts = contexts or {}
    remote = elsewhere or {}

    def own_time() -> float:
        return time.process_time() + sum(variant.cpu_seconds for variant in remote.values())

    judge = (default_guard(own_time) if guard is True else guard) or None
    shuffle = random.Random(seed).shuffle

    def run(name: str, calls: int) -> float:
        if name in remote:
            return remote[name].seconds_per_call(calls)
        with contexts.get(name, contextlib.nullcontext)():
            return _run(variants[name], calls, device)

    begin = time.perf_counter()
    # The first call pays for compilation, caches and page faults; the second tells how many calls fill min_time.
    order = [*variants, *remote]
    calls = {}
    for name in order:
        run(name, 1)
        calls[name] = max(1, min(100_000, math.ceil(min_time / max(run(name, 1), 1e-9))))

    clean: list[dict[str, float]] = []
    disturbed: list[dict[str, float]] = []
    while len(clean) < rounds and len(clean) + len(disturbed) < 3 * rounds:
        if time.perf_counter() - begin > budget and len(clean) + len(disturbed) >= MIN_CLEAN_ROUNDS:
            break
        shuffle(order)
        if judge:
            judge.start()
        times = {name: run(name, calls[name]) for name in order}
        (disturbed if judge and judge.disturbed() else clean).append(times)
        if progress:
            progress()

    weak = len(clean) < min(MIN_CLEAN_ROUNDS, rounds)
    kept = clean + disturbed if weak else clean
    timings = {name: Timing(tuple(r[name] for r in kept)) for name in calls}
    return Measurement(timings, len(kept), 0 if weak else len(disturbed), weak)


def rotating(call: Callable[..., Any], argument_sets: Sequence[tuple[Any, ...]]) -> Call:
    """A callable that goes round ``argument_sets``, so that on a GPU no call finds its inputs in the L2 cache."""
    if len(argument_sets) == 1:
        only = argument_sets[0]
        return lambda: call(*only)
    cycle = itertools.cycle(argument_sets)
    return lambda: call(*next(cycle))


def cold_copies(moved_bytes: int, device: str | torch.device) -> int:
    """How many copies of a call's inputs make twice the GPU's L2 cache; 1 on the CPU, whose caches a model really does hit."""
    device = torch.device(device)
    if device.type != "cuda":
        return 1
    return max(2, min(256, math.ceil(2 * torch.cuda.get_device_properties(device).L2_cache_size / max(moved_bytes, 1))))
