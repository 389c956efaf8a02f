"""Where the built libraries and their objects are, and an environment to start a fresh Python in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vitkernels import builder, native


@pytest.fixture(scope="session")
def cpu_library() -> Path:
    """The CPU library that this Python would load."""
    path = native.find(builder.CPU_LIBRARY)
    if path is None:
        pytest.skip("the CPU library is not built here: `vitkernels build`")
    return path


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run code in a fresh Python outside the checkout, with changes to the environment (``None`` removes a variable).

    It finds the vitkernels under test, unless ``PYTHONPATH`` is among the changes.
    """
    package = str(Path(builder.__file__).parents[1])

    def run(code: str, *arguments: str, python: str | Path = sys.executable, **changes: str | None) -> subprocess.CompletedProcess[str]:
        environment = {key: value for key, value in {**os.environ, "PYTHONPATH": package, **changes}.items() if value is not None}
        command = [str(python), "-c", code, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=110)

    return run
