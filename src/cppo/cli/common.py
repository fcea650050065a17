"""What the commands share: mistakes as sentences, `[RECIPE] [KEY=VALUE]...`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ParamSpec

import typer
from rich.console import Console
from rich.markup import escape

from cppo.errors import StopError, UserError

#: Show tracebacks of mistakes, too (`--debug`).
debug = False

P = ParamSpec("P")


def fail(message: str, status: int) -> typer.Exit:
    start = "" if status == 130 else "[bold red]Error:[/] "
    Console(stderr=True, highlight=False, soft_wrap=True).print(start + escape(message))
    return typer.Exit(status)


def sentences(command: Callable[P, None]) -> Callable[P, None]:
    """Mistakes of the user as a sentence with status 2, a run that had to stop as one with 1, Ctrl-C with 130.

    Everything else is a fault of the program and keeps its traceback.
    """

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except typer.Exit:  # a status, not a mistake
            raise
        except KeyboardInterrupt as error:
            raise fail(str(error) or "Stopped.", 130) from None
        except (UserError, StopError) as error:
            if debug:
                raise
            raise fail(str(error), 2 if isinstance(error, UserError) else 1) from None

    return wrapped


def split_arguments(arguments: list[str]) -> tuple[str | None, list[str]]:
    """(recipe or None, overrides): a word without ``=`` is the recipe, and there is at most one.

    Raises
    ------
    UserError : more than one word without ``=``.
    """
    words = [argument for argument in arguments if "=" not in argument]
    if len(words) > 1:
        raise UserError(
            f"expected one recipe, got {', '.join(words)}. Settings are given as key=value, such as steps=4."
        )
    return (words[0] if words else None), [argument for argument in arguments if "=" in argument]


# Of every command that runs a study.
Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE] [KEY=VALUE]...",
        help="A recipe or YAML file (default: arithmetic), then settings: for all, or for one (dppo.delta=0.05).",
    ),
]
Seeds = Annotated[int | None, typer.Option("--seeds", help="How many, from the recipe's on (default 5).")]
Jobs = Annotated[
    int | None, typer.Option("--jobs", help="Runs at a time (default: half of the cores, or one per GPU).")
]
Resume = Annotated[Path | None, typer.Option("--resume", metavar="DIR", help="Go on with the study in this folder.")]
Show = Annotated[Path | None, typer.Option("--show", metavar="DIR", help="Only print what that study has so far.")]
