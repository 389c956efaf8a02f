"""The registry's cases for pytest-benchmark: the same calls as ``vitkernels bench``, each checked before it is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from vitkernels import accuracy, backends, bench, registry, report
from vitkernels.registry import BenchCase, OpSpec


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vitkernels")
    group.addoption("--bench-device", default="cpu", help="cpu or cuda")
    group.addoption("--bench-threads", type=int, default=None, help="CPU threads")
    group.addoption("--bench-dtype", action="append", choices=list(bench.DTYPES), help="default float32 and bfloat16; may be given several times")


def pytest_configure(config: pytest.Config) -> None:
    if threads := config.getoption("--bench-threads"):
        torch.set_num_threads(threads)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["vitkernels"] = report.provenance(config.getoption("--bench-device"))


@dataclass(frozen=True)
class Contest:
    """One contender on one case, ready to run."""

    spec: OpSpec
    case: BenchCase
    dtype: torch.dtype
    backward: bool
    contender: str

    def __str__(self) -> str:
        mode = "forward+backward" if self.backward else "forward"
        return f"{self.group}-{mode}-{self.contender}".replace(" ", "_")

    @property
    def group(self) -> str:
        return f"{self.spec.name} {self.case.name} {str(self.dtype).removeprefix('torch.')}"

    @property
    def function(self) -> Callable[..., Any]:
        if self.contender == bench.EAGER:
            return self.spec.reference
        return self.spec.peers.get(self.contender, self.spec.function)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contest" not in metafunc.fixturenames:
        return
    device = torch.device(metafunc.config.getoption("--bench-device"))
    dtypes = [bench.DTYPES[name] for name in metafunc.config.getoption("--bench-dtype") or ("float32", "bfloat16")]
    contests = []
    for spec, case, dtype, backward in bench.plan(list(registry.all_specs().values()), dtypes, backward=True):
        ours = bench.runnable_backends(spec.name, device, dtype) or ["reference"]
        contests += [Contest(spec, case, dtype, backward, name) for name in (*ours, bench.EAGER, *spec.peers)]
    metafunc.parametrize("contest", contests, ids=str)


@pytest.fixture
def step(contest: Contest, request: pytest.FixtureRequest) -> Any:
    """The call to time. It has passed the accuracy rule, output and gradients, by the time a test sees it."""
    device = request.config.getoption("--bench-device")
    sample = contest.case.make(contest.dtype, device)
    if contest.backward:
        sample = accuracy.with_grad(sample)
    judge = accuracy.Judge(contest.spec.reference, sample, contest.spec.function)
    name = contest.contender if contest.contender in backends.BACKENDS else "auto"
    with backends.backend(name), torch.set_grad_enabled(contest.backward):
        for comparison in judge(contest.function):
            assert comparison.holds, f"not timed, because it is wrong: {comparison}"
        yield bench.step(contest.function, [sample], judge.grad_outputs)
