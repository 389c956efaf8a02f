"""What the commands share: consoles, one-line errors, progress, tables."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from vitkernels.bench import DTYPES

INTERRUPTED = 130

# Into a file or a pipe, tables take the width they need.
out = Console(width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True, width=None if sys.stderr.isatty() else 160)


class CliError(click.ClickException):
    """Something the user can put right: one line on stderr, exit code 2."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"error: {self.format_message()}", err=True)


class Group(click.Group):
    """The command group: an interrupt ends with one word and 130, a file that cannot be read or written with one line and 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)
        except BrokenPipeError:
            raise
        except OSError as error:
            # An error that the code words itself has one argument; one from the system names its file.
            raise CliError(str(error) if len(error.args) == 1 else f"{error.strerror}: {error.filename}") from error


def table(title: str, headers: Sequence[str], rows: Iterable[Sequence[str | Text]], right: Sequence[str] = ()) -> Table:
    """A table whose columns named in ``right`` are right-aligned. Cells are plain text: a bracket is a bracket."""
    result = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for header in headers:
        result.add_column(header, justify="right" if header in right else "left", overflow="fold")
    for row in rows:
        result.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return result


def verdict(good: bool, yes: str = "yes", no: str = "NO") -> Text:
    """A coloured yes or no."""
    return Text(yes, style="green") if good else Text(no, style="bold red")


def print_json(value: Any) -> None:
    """JSON on stdout, and nothing else."""
    click.echo(json.dumps(value, indent=1))


class Steps:
    """Progress on stderr: a bar on a terminal, else one line a step."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        self._task = progress.add_task("", total=total) if progress else None

    def start(self, description: str) -> None:
        """Say what is being done now."""
        if self._progress and self._task is not None:
            self._progress.update(self._task, description=description)
        else:
            click.echo(f"[{self._done + 1}/{self._total}] {description}", err=True)

    def advance(self) -> None:
        """One step is done."""
        self._done += 1
        if self._progress and self._task is not None:
            self._progress.advance(self._task)


@contextlib.contextmanager
def steps(total: int) -> Iterator[Steps]:
    """Progress over ``total`` steps."""
    if not sys.stderr.isatty():
        yield Steps(None, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        yield Steps(progress, total)


def dtype_of(name: str) -> torch.dtype:
    """The dtype of an option's value."""
    return DTYPES[name]


def device_of(name: str | None) -> torch.device:
    """The device asked for, or the best one here.

    Raises:
        CliError: there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CliError(f"no device named {name!r}; use cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise CliError(f"vitkernels times on cpu and cuda; got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CliError(f"no {name} here: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs")
    return device


def set_threads(threads: int | None) -> None:
    """Use this many CPU threads, if a number is given."""
    if threads is not None:
        torch.set_num_threads(threads)


dtype_option = click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True, help="Dtype of model and input.")
device_option = click.option("--device", default=None, help="cpu, cuda or cuda:N; the GPU if there is one.")
threads_option = click.option("--threads", type=click.IntRange(min=1), default=None, help="CPU threads; PyTorch's own choice if not given.")
peers_option = click.option(
    "--peers/--no-peers",
    default=True,
    show_default=True,
    help="Time channels_last and, in float32, ONNX Runtime and OpenVINO too (inference on the CPU).",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
