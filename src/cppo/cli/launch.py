"""`cppo launch`: a run with an engine for clusters."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from cppo.errors import UserError


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Nothing on stderr, warnings included, for the length of an import."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def launch_verl(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Settings of the recipe (rule.delta=0.2) and of verl (trainer.save_freq=10, also with + ++ ~).",
        ),
    ] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", help="A shipped recipe or a YAML file.")] = None,
    nnodes: Annotated[int, typer.Option("--nnodes", help="Machines in all.")] = 1,
    gpus_per_node: Annotated[int, typer.Option("--gpus-per-node", help="GPUs of each.")] = 8,
    mode: Annotated[str, typer.Option("--mode", help="sync, colocate-async or separate-async.")] = "sync",
    rollout_nnodes: Annotated[
        int | None,
        typer.Option("--rollout-nnodes", help="Machines that only generate, with separate-async (default: half)."),
    ] = None,
    data_dir: Annotated[
        Path, typer.Option("--data-dir", metavar="DIR", help="Where --prepare-data has written the data.")
    ] = Path("data/verl"),
    prepare_data: Annotated[
        Path | None,
        typer.Option("--prepare-data", metavar="DIR", help="Write the recipe's data there as verl reads it, and end."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and print the command, and end.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
) -> None:
    """Train with verl: a recipe as verl's command, checked with verl's own configuration first.

    cppo launch verl --recipe qwen3-8b-base --prepare-data data/verl

    cppo launch verl --recipe qwen3-8b-base --gpus-per-node 8 --dry-run

    cppo launch verl --recipe qwen3-30b-a3b-base --nnodes 4 --gpus-per-node 8 rule.delta=0.15 trainer.save_freq=10
    """
    if recipe is None:
        words = [word for word in settings or [] if "=" not in word]
        raise UserError(
            "which recipe? "
            + (f"Say --recipe {words[0]}." if words else "Say --recipe qwen3-8b-base, or another of `cppo recipes`.")
        )
    stderr = Console(stderr=True, highlight=False, soft_wrap=True)
    with _silence():  # verl, where it is installed, reports on import what accelerators it does not see
        from cppo.engines import verl  # noqa: F401
        from cppo.launch import verl as verl_launch
    if prepare_data is not None:
        for line in verl_launch.prepare_data(recipe, settings or [], prepare_data):
            typer.echo(line)
        return
    cluster = verl_launch.Cluster(nnodes, gpus_per_node, mode, rollout_nnodes)
    ready = verl_launch.plan(recipe, settings or [], cluster, data_dir)
    for note in ready.remarks(dry_run):
        stderr.print(f"[bold]Note:[/] {escape(note)}")
    if dry_run:
        typer.echo(ready.shell(), nl=False)
        return
    status = verl_launch.run(ready, resume, say=lambda text: stderr.print(escape(text)))
    if status:
        raise typer.Exit(status)
