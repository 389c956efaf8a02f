"""The paired timer and its guard against disturbed rounds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from vitkernels import timing
from vitkernels.timing import Measurement, ProcStatGuard, Quantiles, Timing, cold_copies, interleave, rotating


class Machine:
    """A machine made up: what /proc/stat, this process's CPU clock and the wall clock say."""

    def __init__(self) -> None:
        self.wall = 100.0
        self.own = 5.0
        self.ticks = {"user": 1000, "nice": 0, "system": 300, "idle": 90000, "iowait": 10, "irq": 0, "softirq": 2, "steal": 0, "guest": 0}

    def read(self) -> str:
        return f"cpu  {' '.join(map(str, self.ticks.values()))}\ncpu0 1 2 3 4\nctxt 12\n"

    def guard(self) -> ProcStatGuard:
        return ProcStatGuard(self.read, lambda: self.own, lambda: self.wall, ticks=100)


@pytest.mark.parametrize(
    ("field", "ticks", "disturbed"),
    [
        ("user", 12, False),  # 120 ms of a one-second round: 25 ms + a tenth allow 125 ms
        ("user", 13, True),
        ("nice", 13, True),
        ("system", 13, True),
        ("softirq", 13, True),
        ("steal", 13, True),
        ("idle", 500, False),
        ("iowait", 500, False),
    ],
)
def test_guard_counts_the_cpu_time_of_others(field: str, ticks: int, disturbed: bool) -> None:
    machine = Machine()
    guard = machine.guard()
    guard.start()
    machine.wall += 1.0
    machine.ticks[field] += ticks
    assert guard.disturbed() is disturbed


def test_guard_does_not_count_this_process() -> None:
    machine = Machine()
    guard = machine.guard()
    guard.start()
    machine.wall += 1.0
    machine.own += 1.9
    machine.ticks["user"] += 195  # two threads of ours, and 50 ms of somebody else
    assert not guard.disturbed()
    machine.ticks["user"] += 10
    assert guard.disturbed()


def test_guard_judges_each_round_by_itself() -> None:
    machine = Machine()
    guard = machine.guard()
    guard.start()
    machine.wall += 0.1
    machine.ticks["user"] += 50
    assert guard.disturbed()
    guard.start()
    machine.wall += 0.1
    machine.ticks["user"] += 1
    assert not guard.disturbed()


def test_guard_reads_old_kernels_with_fewer_fields() -> None:
    texts: Iterator[str] = iter(["cpu 10 0 5 100\n", "cpu 10 0 5 100\n", "cpu 60 0 5 100\n"])
    guard = ProcStatGuard(lambda: next(texts), lambda: 0.0, lambda: 0.0, ticks=100)
    guard.start()
    assert guard.disturbed()


class Script:
    """A guard that says what it was told to say."""

    def __init__(self, *verdicts: bool) -> None:
        self.verdicts = list(verdicts)
        self.rounds = 0

    def start(self) -> None:
        self.rounds += 1

    def disturbed(self) -> bool:
        return self.verdicts[(self.rounds - 1) % len(self.verdicts)]


def run(guard: Any, rounds: int, **kwargs: Any) -> tuple[Measurement, dict[str, int]]:
    calls = {"a": 0, "b": 0}

    def count(name: str) -> Any:
        def call() -> None:
            calls[name] += 1
            time.sleep(0.0005)

        return call

    return interleave({name: count(name) for name in calls}, rounds=rounds, min_time=0.0, guard=guard, **kwargs), calls


def test_disturbed_rounds_are_discarded_and_counted() -> None:
    measured, _ = run(Script(True, False, False), rounds=6)
    assert (measured.kept, measured.discarded, measured.weak) == (6, 3, False)
    assert [len(timing.seconds) for timing in measured.values()] == [6, 6]


def test_a_machine_that_is_never_quiet_does_not_hang_and_says_so() -> None:
    measured, calls = run(Script(True), rounds=4)
    assert (measured.kept, measured.discarded, measured.weak) == (12, 0, True)
    # min_time=0 makes it one call a round, after two to warm up and calibrate
    assert calls == {"a": 14, "b": 14}


def test_two_clean_rounds_among_many_are_still_weak() -> None:
    measured, _ = run(Script(False, False, *[True] * 13), rounds=5)
    assert measured.weak
    assert measured.kept == 15


def test_without_a_guard_every_round_counts() -> None:
    measured, _ = run(None, rounds=3)
    assert (measured.kept, measured.discarded, measured.weak) == (3, 0, False)


def test_the_budget_ends_a_run_but_not_before_three_rounds() -> None:
    measured, _ = run(None, rounds=1000, budget=0.0)
    assert measured.kept == 3


def test_every_round_runs_every_variant_once_in_changing_order() -> None:
    log: list[str] = []
    variants = {name: (lambda name=name: log.append(name)) for name in "abc"}
    interleave(variants, rounds=30, min_time=0.0, guard=None)
    rounds = ["".join(log[i : i + 3]) for i in range(6, len(log), 3)]
    assert len(rounds) == 30
    assert all(sorted(order) == list("abc") for order in rounds)
    assert len(set(rounds)) > 1


def test_fast_variants_are_called_until_min_time_has_passed() -> None:
    calls = 0

    def fast() -> None:
        nonlocal calls
        calls += 1

    measured = interleave({"fast": fast}, rounds=1, min_time=0.005, guard=None)
    assert calls > 100
    assert measured["fast"].seconds[0] < 0.005


def test_a_context_is_open_around_its_own_variant_only() -> None:
    state = {"open": False}
    seen: dict[str, set[bool]] = {"inside": set(), "outside": set()}

    @contextlib.contextmanager
    def opened() -> Iterator[None]:
        state["open"] = True
        yield
        state["open"] = False

    interleave(
        {name: (lambda name=name: seen[name].add(state["open"])) for name in seen}, rounds=5, min_time=0.0, guard=None, contexts={"inside": opened}
    )
    assert seen == {"inside": {True}, "outside": {False}}


def test_a_speedup_is_taken_inside_each_round() -> None:
    # The clock of the second round ran four times slower for both. The ratio of medians would be 2/1.5; the paired one is 2 in every round.
    measured = Measurement({"ours": Timing((1.0, 4.0, 1.5)), "eager": Timing((2.0, 8.0, 3.0))}, kept=3, discarded=0, weak=False)
    assert measured.speedup("ours", over="eager") == Quantiles(2.0, 2.0, 2.0)
    uneven = Measurement({"ours": Timing((1.0, 1.0, 1.0)), "eager": Timing((1.0, 2.0, 9.0))}, kept=3, discarded=0, weak=False)
    assert uneven.speedup("ours", over="eager").p50 == 2.0
    assert uneven.speedup("eager", over="ours").p50 == 0.5


def test_quantiles() -> None:
    assert Quantiles.of([5.0]) == Quantiles(5.0, 5.0, 5.0)
    found = Quantiles.of([float(i) for i in range(11)])
    assert (found.p20, found.p50, found.p80) == (2.0, 5.0, 8.0)
    assert found.scaled(10) == (20.0, 50.0, 80.0)


def test_nothing_to_time_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 variants"):
        interleave({}, rounds=3)
    with pytest.raises(ValueError, match="rounds=0"):
        interleave({"a": lambda: None}, rounds=0)


def test_rotation_goes_round_its_arguments() -> None:
    seen: list[int] = []
    call = rotating(seen.append, [(1,), (2,), (3,)])
    for _ in range(5):
        call()
    assert seen == [1, 2, 3, 1, 2]
    assert cold_copies(1, "cpu") == 1


class Engine:
    """A variant in another process, made up: each call takes two seconds of its own clock and of the CPU."""

    def __init__(self) -> None:
        self.cpu_seconds = 0.0
        self.asked: list[int] = []

    def seconds_per_call(self, calls: int) -> float:
        self.asked.append(calls)
        self.cpu_seconds += 2.0 * calls
        return 2.0


def test_a_variant_elsewhere_reads_its_own_clock() -> None:
    engine = Engine()
    measured = interleave({"here": lambda: None}, elsewhere={"there": engine}, rounds=4, min_time=0.0, guard=None)
    assert measured["there"].seconds == (2.0,) * 4
    assert engine.asked == [1] * 6
    assert measured.speedup("here", over="there").p50 > 1


def test_the_cpu_time_of_a_variant_elsewhere_is_not_that_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    clocks: list[float] = []

    def guard(own_time: Callable[[], float]) -> None:
        clocks.append(own_time())
        engine.cpu_seconds += 100.0
        clocks.append(own_time())

    monkeypatch.setattr(timing, "default_guard", guard)
    interleave({"here": lambda: None}, elsewhere={"there": engine}, rounds=1, min_time=0.0)
    assert clocks[1] - clocks[0] == pytest.approx(100.0, abs=1.0)
