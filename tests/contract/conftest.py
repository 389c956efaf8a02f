"""Where the contract's cases come from: every registered op, on every backend, in every dtype that the backend has.

A test asks for ``target`` (an op on a backend), ``case`` (a target, a dtype, one of the op's samples) or ``bad_call`` (a target and a call to
refuse). A backend that cannot run here is one skipped test per op, with its reason. ``@pytest.mark.fused`` leaves the reference backend out, where
the test would compare it with itself; ``@pytest.mark.dtypes(...)`` restricts the dtypes of ``case``, ``@pytest.mark.thin`` its samples
(those of low precision and float64 are thin always).
``@pytest.mark.derivative`` leaves out the ops that nobody differentiates.
``@pytest.mark.kernel`` is what `make test` runs again for every instruction set; `make gpu` runs it and ``@pytest.mark.gpu``.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from _pytest.mark import ParameterSet

from vitkernels import backends, registry

from .oracle import DTYPES, Case, Target


def pytest_addoption(parser: pytest.Parser) -> None:
    # tests/conftest.py may have added it already; it has to be said here too for `pytest tests/contract --device cuda`.
    with contextlib.suppress(ValueError):
        parser.addoption("--device", default="cpu", help="device the contract runs on: cpu or cuda")
    parser.addoption("--op", action="append", help="only this op; may be given several times. The samples of the others are not made")
    parser.addoption("--record", type=Path, help="write every test's outcome to this file as soon as it is there: a run that is cut off loses none")


class Record:
    """A line for every test that ran, and why it failed: outcome, seconds, name."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            print(report.outcome, f"{report.duration:.2f}", report.nodeid, file=self._file)
            if report.failed:
                self._file.writelines(f"    {line}\n" for line in report.longreprtext.splitlines()[-12:])
            self._file.flush()


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device", default="cpu") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: this machine, or this build of torch, has no CUDA device")
    if config.getoption("--record", default=None) and not hasattr(config, "workerinput"):  # the workers of pytest-xdist send their reports here
        config.pluginmanager.register(Record(config.getoption("--record")))
    config.addinivalue_line("markers", "fused: only the backends with kernels of their own, not the reference")
    config.addinivalue_line("markers", "derivative: about gradients, so only the ops that have them")
    config.addinivalue_line("markers", "kernel: about the machine code of a kernel; the rest is the same for every instruction set")
    config.addinivalue_line("markers", "gpu: about what is another thing on a GPU, though no kernel's machine code")
    config.addinivalue_line("markers", "thin: few samples in Triton's interpreter, which is slow, and of the reference")
    config.addinivalue_line("markers", "dtypes(*dtypes): the dtypes that `case` covers")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = metafunc.config.getoption("--device", default="cpu")
    fused = metafunc.definition.get_closest_marker("fused") is not None
    derivative = metafunc.definition.get_closest_marker("derivative") is not None
    thin = metafunc.definition.get_closest_marker("thin") is not None
    marker = metafunc.definition.get_closest_marker("dtypes")
    kinds: dict[str, Callable[[Target], Iterable[tuple[object, str]]]] = {
        "target": lambda target: [(target, str(target))],
        "case": lambda target: _cases(target, marker.args if marker else DTYPES, thin),
        "bad_call": _bad_calls,
    }
    for name in kinds.keys() & set(metafunc.fixturenames):
        metafunc.parametrize(name, list(_expand(device, fused, derivative, kinds[name], metafunc.config.getoption("--op", default=None))))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a GPU, where time is short, the ops and dtypes of a test take turns: a run that is cut off has seen some of each. Thin tests come last."""
    if config.getoption("--device", default="cpu") != "cuda":
        return
    turns: Counter[tuple[str, ...]] = Counter()

    def turn(item: pytest.Item) -> tuple[bool, int]:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        case = parameters.get("case")
        of = (str(case.target), str(case.dtype)) if isinstance(case, Case) else (str(parameters.get("target")),)
        key = (item.nodeid.partition("[")[0], *of)
        turns[key] += 1
        return item.get_closest_marker("thin") is not None, turns[key]

    items.sort(key=turn)


def _expand(
    device: str, fused: bool, derivative: bool, expand: Callable[[Target], Iterable[tuple[object, str]]], ops: list[str] | None
) -> Iterator[ParameterSet]:
    """Every op on every backend, expanded into the parameters (with their ids) that a test runs on; one skipped parameter where it cannot run."""
    for spec in map(registry.get, ops) if ops else registry.all_specs().values():
        if derivative and not spec.differentiable:
            continue
        for backend in backends.BACKENDS[1:] if fused else backends.BACKENDS:
            target = Target(spec, backend, device)
            reason = target.why_not(torch.float32)
            if reason is not None:
                yield pytest.param(target, id=str(target), marks=pytest.mark.skip(reason=reason))
                continue
            for parameter, name in expand(target):
                yield pytest.param(parameter, id=name)


def _cases(target: Target, dtypes: tuple[torch.dtype, ...], thin: bool) -> Iterator[tuple[object, str]]:
    for dtype in dtypes:
        if target.why_not(dtype) is None:
            for case in target.cases(dtype, thin or dtype is not torch.float32):
                yield case, str(case)


def _bad_calls(target: Target) -> Iterator[tuple[object, str]]:
    for bad in target.spec.bad_inputs():
        yield (target, bad), f"{target}-{bad.name}"


@pytest.fixture(autouse=True)
def _usable_gpu(device: str) -> None:
    """A kernel that faulted leaves its process without a GPU: beside others (pytest-xdist) the process ends, and a new one takes what is left."""
    if device == "cuda" and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test draws its own numbers, and the same ones when it is run again alone."""
    with torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
        yield


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--device", default="cpu"))


@pytest.fixture
def threads() -> Iterator[None]:
    """Gives the test leave to change the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
