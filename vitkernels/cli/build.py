"""``vitkernels build``."""

from __future__ import annotations

from pathlib import Path

import click

from vitkernels import builder, host, native
from vitkernels.cli._common import CliError, err


@click.command("build")
@click.option("--verbose", "-v", is_flag=True, help="Show the compiler's commands and output.")
def command(verbose: bool) -> None:
    """Compile the native libraries for this machine into your cache.

    For an install that came without them. Needs a C++20 compiler and ninja; nvcc too for the CUDA library.
    """
    folder = builder.cache_library_dir()
    try:
        if verbose:
            libraries = builder.build(folder, verbose=True)
        else:
            with err.status(f"Compiling for this machine into {folder}"):
                libraries = builder.build(folder)
    except builder.BuildError as error:
        raise CliError(f"{error}") from error
    for path in libraries:
        click.echo(f"built {Path(path)}")
    native.forget()
    host.forget()
    if (reason := native.why_not()) is not None:
        raise CliError(f"built, but it does not load: {reason}")
    click.echo(f"The native backend is ready: {native.cpu_isa()}.")
