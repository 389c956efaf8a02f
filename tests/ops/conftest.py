"""What the tests of single ops share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import vitkernels
from vitkernels import backends


@pytest.fixture(params=["reference", "native", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend that runs the module's ``OP`` on the CPU, in force."""
    reason = backends.why_not(request.module.OP, request.param, torch.device("cpu"), torch.float32)
    if reason is not None:
        pytest.skip(reason)
    with vitkernels.backend(request.param):
        yield request.param
