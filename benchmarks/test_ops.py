"""Microbenchmarks of every op on every case of the registry, forward and forward+backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


def test_op(benchmark: Any, contest: Any, step: Callable[[], Any], request: pytest.FixtureRequest) -> None:
    benchmark.group = f"{contest.group} {'forward+backward' if contest.backward else 'forward'}"
    benchmark.extra_info.update(op=contest.spec.name, case=contest.case.name, contender=contest.contender)
    if request.config.getoption("--bench-device") == "cpu":
        benchmark(step)
    else:
        # pytest-benchmark reads the wall clock: a GPU has to be waited for.
        benchmark(lambda: (step(), torch.cuda.synchronize()))
