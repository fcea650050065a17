"""The program `cppo`: what it is made of. A file of this folder is a command or two.

What a user can put right is printed as a sentence on stderr and ends with status 2; Ctrl-C ends with 130. Torch and
training libraries are imported inside the commands, so that `cppo --help` is there at once.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from cppo import __version__
from cppo.cli import common
from cppo.cli.ablate import ablate
from cppo.cli.bound import bound
from cppo.cli.calibrate import calibrate
from cppo.cli.compare import compare
from cppo.cli.inspect import inspect
from cppo.cli.launch import launch_verl
from cppo.cli.report import report
from cppo.cli.rules import list_recipes, rules
from cppo.cli.train import evaluate, train

app = typer.Typer(
    name="cppo",
    help="Trust regions for reinforcement learning of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"cppo {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks (anywhere on the line).")] = False,
) -> None:
    common.debug = debug


app.command()(common.sentences(train))
app.command()(common.sentences(evaluate))
app.command()(common.sentences(rules))
app.command(name="recipes")(common.sentences(list_recipes))
for command in (bound, compare, ablate, report, inspect, calibrate):
    app.command()(common.sentences(command))

launch = typer.Typer(help="Start a run with an engine for clusters.", no_args_is_help=True)
launch.command(name="verl")(common.sentences(launch_verl))
app.add_typer(launch, name="launch")


def main() -> None:
    """Entry point of the program."""
    arguments = sys.argv[1:]
    if "--debug" in arguments:  # accepted anywhere on the line
        arguments = ["--debug", *(argument for argument in arguments if argument != "--debug")]
    app(args=arguments, prog_name="cppo")
