"""The command line: ``vitkernels doctor | build | verify | accelerate | inspect | bench | demo``."""

from __future__ import annotations

import click

from vitkernels._version import __version__
from vitkernels.cli import accelerate, bench, build, demo, doctor, inspect, verify
from vitkernels.cli._common import Group


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="vitkernels")
def main() -> None:
    """Fast vision-transformer kernels for the models you already have."""


for module in (doctor, build, verify, accelerate, inspect, bench, demo):
    main.add_command(module.command)
