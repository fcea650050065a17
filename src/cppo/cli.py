"""The program `cppo`: train, evaluate, bound, launch, list the rules and recipes; the study's commands: cli_study.

What a user can put right is printed as a sentence on stderr and ends with status 2; Ctrl-C ends with 130. Training
libraries are imported inside the commands, after the configuration has been validated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import io
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import cppo
from cppo.cli_study import register
from cppo.errors import UserError
from cppo.rules.base import rule_class

app = typer.Typer(
    name="cppo",
    help="Trust regions for reinforcement learning of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_HERE = str(Path(__file__).resolve().parent)
_debug = False

P = ParamSpec("P")


def _fail(message: str, status: int) -> typer.Exit:
    start = "" if status == 130 else "[bold red]Error:[/] "
    Console(stderr=True, highlight=False, soft_wrap=True).print(start + escape(message))
    return typer.Exit(status)


def _ours(error: BaseException) -> bool:
    """Whether this package itself raised an error, so that its message is a sentence: not torch in a call of ours."""
    if type(error).__module__.partition(".")[0] == "cppo":
        return True
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not str(Path(frames[-1].filename).resolve()).startswith(_HERE + os.sep):
        return False
    return (frames[-1].line or "").startswith("raise ")


def _sentences(command: Callable[P, None]) -> Callable[P, None]:
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
            raise _fail(str(error) or "Stopped.", 130) from None
        except Exception as error:
            if _debug or not _ours(error):
                raise
            raise _fail(
                str(error), 2 if isinstance(error, ValueError | ImportError | FileNotFoundError) else 1
            ) from None

    return wrapped


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Nothing on stderr, warnings included, for the length of an import."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"cppo {cppo.__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks (anywhere on the line).")] = False,
) -> None:
    global _debug
    _debug = debug


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


@app.command()
@_sentences
def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [KEY=VALUE]...",
            help="A shipped recipe or a YAML file (default: arithmetic), then settings.",
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", metavar="RUN", help="Go on with the run in this folder, with its settings."),
    ] = None,
) -> None:
    """Train a policy under a trust region.

    cppo train

    cppo train rule=dppo rule.delta=0.05 steps=4

    cppo train qwen3-1.7b-base output_dir=runs/base

    cppo train --resume runs/arithmetic-cppo-001
    """
    from cppo.training.config import load_config

    recipe, overrides = split_arguments(arguments or [])
    if resume is not None:
        if arguments:
            raise UserError(
                f"--resume {resume} goes on with the settings of that run and takes no others (got "
                f"{' '.join(arguments)}). "
                f"To train with other settings start a new run: cppo train {resume / 'config.yaml'} output_dir=null ..."
            )
        saved = resume / "config.yaml"
        if not saved.is_file():
            raise UserError(f"--resume {resume}: there is no run ({saved} is missing).{_runs_nearby(resume)}")
        config = load_config(saved)
    else:
        config = load_config(recipe, overrides)
    from cppo.training.run import train as run_training

    run_training(config, resume=resume)


def _runs_nearby(folder: Path) -> str:
    """The newest run beside a folder that is none, as a hint."""
    candidates = [folder, folder.parent, Path("runs")]
    found = [path.parent for parent in candidates if parent.is_dir() for path in parent.glob("*/config.yaml")]
    newest = max(found, key=lambda path: (path / "config.yaml").stat().st_mtime, default=None)
    return f" The newest run there is {newest}." if newest else ""


@app.command()
@_sentences
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run, a model folder (such as RUN/best/step-000030) or a hub id.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, such as evaluation.samples=32.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", help="Task and settings (default: those of the run that the model lies in, else arithmetic)."
        ),
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="PATH", help="Also write the figures there.")
    ] = None,
) -> None:
    """Avg@k and pass@k of a model on a task's held-out problems.

    cppo evaluate runs/arithmetic-cppo-001

    cppo evaluate Qwen/Qwen3-1.7B --recipe qwen3-1.7b evaluation.samples=4
    """
    from cppo.training.config import load_config

    words, settings = split_arguments(overrides or [])
    if words is not None:
        raise UserError(f"{words!r} is no setting: expected key=value. A recipe is given as --recipe {words}.")
    if "=" in model:
        raise UserError(f"{model!r} is a setting, expected a model first: cppo evaluate MODEL {model}.")
    folder, saved = locate(model)
    config = load_config(recipe if recipe is not None else saved, settings)
    from cppo.training.evaluate import evaluate_model
    from cppo.training.progress import RunProgress

    with RunProgress(Console(stderr=True)) as progress:
        row = evaluate_model(folder, config, progress)
    Console(highlight=False).print(evaluation_table(folder, row))
    if json_path is not None:
        from cppo.training.files import atomic_write_text

        atomic_write_text(json_path, json.dumps({"model": folder, **row}, indent=2) + "\n")


def locate(model: str) -> tuple[str, Path | None]:
    """(what to load, config.yaml of the run it belongs to or None).

    For a run: its best policy, else its newest checkpoint.

    Raises
    ------
    UserError : a path that does not exist, or a run that has no policy yet.
    """
    path = Path(model)
    if not path.exists():
        if path.is_absolute() or model.startswith((".", "~", "runs/")) or model.count("/") > 1:
            raise UserError(f"there is no folder {model}.{_runs_nearby(path)}")
        return model, None  # a hub id
    if (path / "config.yaml").is_file() and not (path / "config.json").exists():
        policies = sorted(path.glob("best/step-*")) or sorted(path.glob("checkpoints/step-*"))
        if not policies:
            raise UserError(
                f"the run {model} has no policy yet: neither {path / 'best'} nor {path / 'checkpoints'} holds one."
            )
        return str(policies[-1]), path / "config.yaml"
    saved = [parent / "config.yaml" for parent in list(path.resolve().parents)[:2]]
    return model, next((file for file in saved if file.is_file()), None)


def evaluation_table(model: str, row: Mapping[str, Any]) -> Table:
    """The figures of an evaluation (``avg/<benchmark>``, ``pass/<benchmark>``, ``samples``) as a table."""
    k = row.get("samples", "k")
    table = Table(title=escape(model), title_style="")
    table.add_column("benchmark")
    table.add_column(f"Avg@{k}", justify="right")
    table.add_column(f"pass@{k}", justify="right")
    names = [key.removeprefix("avg/") for key in row if key.startswith("avg/")]
    for name in sorted(names, key=lambda name: name == "mean"):
        if name == "mean" and len(names) == 2:
            continue  # of one benchmark
        figures = [f"{row[f'{measure}/{name}']:.3f}" for measure in ("avg", "pass")]
        table.add_row(escape(name), *figures, style="bold" if name == "mean" else None)
    return table


@app.command()
@_sentences
def rules(
    name: Annotated[str | None, typer.Argument(help="One rule: its formula and parameters.")] = None,
) -> None:
    """The trust regions: parameters, defaults, sources."""
    console = Console(highlight=False)
    if name is not None:
        rule = rule_class(name)
        console.print(f"[bold]{name}[/]  {escape(rule.source)}\n", soft_wrap=True)
        console.print(inspect.getdoc(rule) or "", markup=False, soft_wrap=True)
        console.print(f"\nDefaults: {escape(_parameters(rule) or 'no parameters')}", soft_wrap=True)
        return
    table = Table(show_lines=True)
    for title in ("rule", "parameters (defaults)", "source"):
        table.add_column(title, overflow="fold", no_wrap=title == "rule")
    for key, rule in cppo.RULES.items():
        table.add_row(key, escape(_parameters(rule)) or "-", escape(rule.source))
    console.print(table)
    console.print("cppo rules NAME shows the formula; cppo train rule=NAME rule.PARAMETER=VALUE trains with it.")


def _parameters(rule: Any) -> str:
    def shown(value: Any) -> str:
        return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

    return ", ".join(f"{field.name}={shown(field.default)}" for field in dataclasses.fields(rule))


@app.command(name="recipes")
@_sentences
def list_recipes() -> None:
    """The shipped recipes, with their first comment line and their file."""
    from cppo.training.config import recipes

    table = Table()
    for title in ("recipe", "what it is", "file"):
        table.add_column(title, overflow="fold", no_wrap=title == "recipe")
    for key, path in recipes().items():
        first = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        table.add_row(key, escape(first), escape(str(path)))
    Console(highlight=False).print(table)


@app.command()
@_sentences
def bound(
    horizon: Annotated[int | None, typer.Option("--horizon", help="T: tokens of the longest response.")] = None,
    delta: Annotated[float, typer.Option("--delta", help="Token limit on the total variation.")] = 0.15,
    delta_b: Annotated[float, typer.Option("--delta-b", help="Prefix budget a token.")] = 0.02,
    w_min: Annotated[float, typer.Option("--w-min", help="The smallest weight.")] = 0.8,
    schedule: Annotated[
        str, typer.Option("--schedule", help="linear, constant, cosine, reversed or matched.")
    ] = "linear",
    xi: Annotated[float, typer.Option("--xi", help="Half of the reward's range.")] = 0.5,
    rule: Annotated[
        list[str] | None, typer.Option("--rule", help="Only this rule (can be given several times).")
    ] = None,
    schedules: Annotated[bool, typer.Option("--schedules", help="Compare the weight schedules, too.")] = False,
    run: Annotated[
        Path | None, typer.Option("--run", metavar="RUN", help="Instead: the empirical certificates of a run.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """How far the surrogate can be off: the constants of all rules, or the certificates of a run.

    cppo bound --horizon 8192 --delta 0.15 --delta-b 0.02 --w-min 0.8

    cppo bound --run runs/arithmetic-cppo-001
    """
    from cppo import cli_bound, theory

    console = Console(highlight=False)
    if run is not None:
        rows = cli_bound.certificates_of(run)
        if as_json:
            typer.echo(json.dumps(rows, indent=2))
        else:
            console.print(cli_bound.certificate_table(run, rows))
        return
    if horizon is None:
        raise UserError("give --horizon T, the tokens of the longest response (such as 8192), or --run RUN.")
    for name in rule or ():
        rule_class(name)  # an unknown name is an error that lists the rules
    settings = {"horizon": horizon, "delta": delta, "delta_b": delta_b, "w_min": w_min, "xi": xi, "schedule": schedule}
    constants = theory.constants(horizon, delta, delta_b, w_min, xi=xi, schedule=schedule)
    constants = [row for row in constants if not rule or row.rule in rule]
    found = cli_bound.conditions(horizon, delta, delta_b, w_min, schedule)
    costs = theory.compare_schedules(horizon, delta, delta_b, w_min=w_min, xi=xi) if schedules else []
    if as_json:
        typer.echo(json.dumps(cli_bound.constants_as_json(settings, constants, found, costs), indent=2))
    else:
        console.print(cli_bound.constants_table(settings, constants, found, costs))


register(app, _sentences)

launch = typer.Typer(help="Start a run with an engine for clusters.", no_args_is_help=True)
app.add_typer(launch, name="launch")


@launch.command(name="verl")
@_sentences
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
        from cppo.training import launch as verl_launch
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


def main() -> None:
    """Entry point of the program."""
    arguments = sys.argv[1:]
    if "--debug" in arguments:  # accepted anywhere on the line
        arguments = ["--debug", *(argument for argument in arguments if argument != "--debug")]
    app(args=arguments, prog_name="cppo")


if __name__ == "__main__":
    main()
