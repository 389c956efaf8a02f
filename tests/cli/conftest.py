"""A runner for the command line, with nothing of the user's touched and nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from vitkernels import timing
from vitkernels.cli import main


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """--threads is process-wide; the next test gets its own back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def any_machine_is_quiet_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """No number is judged here, so no round needs repeating."""
    monkeypatch.setattr(timing, "default_guard", lambda own_time: None)


@pytest.fixture
def vitkernels() -> Callable[..., Result]:
    """Run a command. An exception that would be a traceback on the user's screen fails the test."""

    def run(*words: object) -> Result:
        result = CliRunner().invoke(main, [str(word) for word in words])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture
def report(vitkernels: Callable[..., Result]) -> Callable[..., Any]:
    """Run a command with --json and read what it printed on stdout, which must be JSON and nothing else."""

    def run(*words: object) -> Any:
        result = vitkernels(*words, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return run


@pytest.fixture
def one_line_error() -> Callable[[Result], str]:
    """The message of a command that refused: exit code 2, one line on stderr, nothing on stdout."""

    def check(result: Result) -> str:
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        lines = [line for line in result.stderr.splitlines() if not line.startswith("[")]  # progress
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")

    return check


@pytest.fixture
def unwritable(tmp_path: Path) -> Path:
    """A folder nobody can make, root included: its parent is a file."""
    (tmp_path / "file").write_text("not a folder")
    return tmp_path / "file" / "results"
