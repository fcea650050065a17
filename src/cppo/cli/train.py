"""`cppo train` and `cppo evaluate`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group

from cppo.cli.common import split_arguments
from cppo.errors import UserError
from cppo.show.tables import Cells


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
    from cppo.config.load import load_config
    from cppo.runs.folder import RunFolder

    recipe, overrides = split_arguments(arguments or [])
    if resume is not None:
        if arguments:
            raise UserError(
                f"--resume {resume} goes on with the settings of that run and takes no others (got "
                f"{' '.join(arguments)}). To train with other settings start a new run: cppo train "
                f"{RunFolder(resume).config_file} output_dir=null ..."
            )
        run = RunFolder(resume)
        if not run.exists:
            raise UserError(f"--resume {resume}: there is no run ({run.config_file} is missing).{_runs_nearby(resume)}")
        config = load_config(run.config_file)
    else:
        config = load_config(recipe, overrides)
    from cppo.training.run import train as run_training

    run_training(config, resume=resume)


def _runs_nearby(folder: Path) -> str:
    """The newest run beside a folder that is not one, as a hint."""
    from cppo.runs.folder import RunFolder

    candidates = [folder, folder.parent, Path("runs")]
    entries = [RunFolder(path) for parent in candidates if parent.is_dir() for path in parent.iterdir()]
    found = [run for run in entries if run.exists]
    newest = max(found, key=lambda run: run.config_file.stat().st_mtime, default=None)
    return f" The newest run there is {newest.path}." if newest else ""


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
    from cppo.config.load import load_config

    words, settings = split_arguments(overrides or [])
    if words is not None:
        raise UserError(f"{words!r} is not a setting: expected key=value. A recipe is given as --recipe {words}.")
    if "=" in model:
        raise UserError(f"{model!r} is a setting, expected a model first: cppo evaluate MODEL {model}.")
    folder, saved = locate(model)
    config = load_config(recipe if recipe is not None else saved, settings)
    from cppo.show.progress import RunProgress
    from cppo.training.evaluate import evaluate_model

    with RunProgress(Console(stderr=True)) as progress:
        row = evaluate_model(folder, config, progress)
    Console(highlight=False).print(evaluation_table(folder, row))
    if json_path is not None:
        from cppo.files import atomic_write_text

        atomic_write_text(json_path, json.dumps({"model": folder, **row}, indent=2) + "\n")


def locate(model: str) -> tuple[str, Path | None]:
    """(what to load, config.yaml of the run it belongs to or None).

    For a run: its best policy, else its newest checkpoint.

    Raises
    ------
    UserError : a path that does not exist, or a run that has no policy yet.
    """
    from cppo.runs.folder import RunFolder

    path = Path(model)
    if not path.exists():
        if path.is_absolute() or model.startswith((".", "~", "runs/")) or model.count("/") > 1:
            raise UserError(f"there is no folder {model}.{_runs_nearby(path)}")
        return model, None  # a hub id
    run = RunFolder(path)
    if run.exists and not (path / "config.json").exists():
        policy = run.policy()
        if policy is None:
            raise UserError(f"the run {model} has no policy yet: neither {run.best} nor {run.checkpoints} holds one.")
        return str(policy), run.config_file
    around = [RunFolder(parent) for parent in list(path.resolve().parents)[:2]]
    return model, next((run.config_file for run in around if run.exists), None)


def evaluation_table(model: str, row: Mapping[str, Any]) -> Group:
    """The figures of an evaluation (``avg/<benchmark>``, ``pass/<benchmark>``, ``samples``) as a table."""
    k = row.get("samples", "k")
    names = [key.removeprefix("avg/") for key in row if key.startswith("avg/")]
    names.sort(key=lambda name: name == "mean")
    if len(names) == 2:  # of one benchmark its mean says nothing more
        names.pop()
    rows = [(name, *(f"{row[f'{measure}/{name}']:.3f}" for measure in ("avg", "pass"))) for name in names]
    return Cells(model, ("benchmark", f"Avg@{k}", f"pass@{k}"), rows, bold="mean").rich()
