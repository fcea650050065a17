"""`cppo ablate`: a new study, one to go on with, one to look at, or only its size."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console

from cppo.cli.common import Arguments, Jobs, Resume, Seeds, Show, split_arguments
from cppo.cli.compare import check_options, nothing_else
from cppo.errors import UserError

if TYPE_CHECKING:
    from cppo.study.ablate.suite import Base, Suite
    from cppo.study.plan import Plan

T = TypeVar("T", int, float)


def ablate(
    arguments: Arguments = None,
    only: Annotated[
        str | None,
        typer.Option(
            "--only",
            help="Suites, commas between: mechanisms, grid, shapes, delta, length, staleness, frontier (default: all).",
        ),
    ] = None,
    seeds: Seeds = None,
    jobs: Jobs = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The study's folder (default: studies/ablate-...).")
    ] = None,
    resume: Resume = None,
    show: Show = None,
    list_only: Annotated[
        bool, typer.Option("--list", "--dry-run", help="Only say what would be run, and about how long it takes.")
    ] = False,
    rules: Annotated[
        str | None, typer.Option("--rules", help="Of delta, length, staleness, frontier: names with commas between.")
    ] = None,
    learning_rates: Annotated[
        str | None, typer.Option("--learning-rates", help="Of frontier (default: the recipe's times 1/2 ... 8).")
    ] = None,
    updates: Annotated[
        str | None, typer.Option("--updates", help="Updates per rollout batch, of frontier and staleness.")
    ] = None,
    targets: Annotated[
        str | None, typer.Option("--targets", help="Shares of masked tokens of delta (default: 0.003,0.01,0.03,0.1).")
    ] = None,
) -> None:
    """What do the parts of CPPO do, and how far can it be pushed? Suites of matched runs, with intervals.

    cppo ablate --only mechanisms --seeds 1 steps=10

    cppo ablate --list
    """
    check_options("ablate", resume, show, out, jobs)
    from cppo.study import store
    from cppo.study.ablate import answers
    from cppo.study.ablate.cost import listing
    from cppo.study.ablate.suite import suites_of
    from cppo.study.status import default_jobs

    asked = {"--rules": rules, "--learning-rates": learning_rates, "--updates": updates, "--targets": targets}
    at_once = default_jobs() if jobs is None else jobs
    existing = resume or show
    if existing is None:
        base, suites = _asked(arguments or [], only, asked)
        count = 5 if seeds is None else seeds
        if list_only:
            Console(highlight=False).print(listing(base, suites, count, at_once))
        else:
            _execute(_new_plan(base, suites, count, jobs, out), at_once)
        return
    options = {"--only": only, "--seeds": seeds, **asked}
    given = [*(arguments or []), *(name for name, value in options.items() if value is not None)]
    nothing_else(f"{'--resume' if resume else '--show'} {existing}", given)
    plan = store.load_plan(existing)
    suites_of(plan)
    if show is not None or list_only:
        Console(highlight=False).print(answers.shown(answers.read_all(plan)))
    else:
        _execute(plan, at_once)


def _asked(arguments: list[str], only: str | None, asked: dict[str, str | None]) -> tuple[Base, list[Suite]]:
    """What was typed, resolved. asked : by option, numbers and names with commas between."""
    from cppo.config.load import DEFAULT_RECIPE
    from cppo.study.ablate.suite import Options, base_of
    from cppo.study.ablate.suites import SUITES, make_suites

    names = _names("--only", only, SUITES)
    recipe, settings = split_arguments(arguments)
    base = base_of(recipe or DEFAULT_RECIPE, settings)
    rules = _names("--rules", asked["--rules"], base.rules)
    options = Options(
        None if rules is None else tuple(rules),
        _numbers("--learning-rates", asked["--learning-rates"], float),
        _numbers("--updates", asked["--updates"], int),
        _numbers("--targets", asked["--targets"], float),
    )
    return base, make_suites(base, list(SUITES) if names is None else names, options)


def _names(option: str, text: str | None, known: Collection[str]) -> list[str] | None:
    """Names with commas between, each known and once."""
    from cppo.study.plan import check_names
    from cppo.words import nearest

    if text is None:
        return None
    names = _words(text)
    check_names(names)
    for name in names:
        if name not in known:
            raise UserError(f"{option} names {name!r}; there are {', '.join(known)}.{nearest(name, known)}")
    return names


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(option: str, text: str | None, kind: Callable[[str], T]) -> tuple[T, ...] | None:
    """Numbers above 0 with commas between, each once."""
    if text is None:
        return None
    try:
        found = tuple(kind(word) for word in _words(text))
    except ValueError:
        found = ()
    if not found or not all(0 < number < float("inf") for number in found):
        what = "whole numbers" if kind is int else "numbers"
        raise UserError(f"{option} is {text!r}, expected {what} above 0 with commas between, such as 1,2.")
    if len(set(found)) < len(found):
        raise UserError(f"{option} is {text!r}: each value once.")
    return found


def _new_plan(base: Base, suites: Sequence[Suite], seeds: int, jobs: int | None, out: Path | None) -> Plan:
    """The plan of what was typed, written into its folder."""
    from cppo.runs.prepare import versions
    from cppo.study import store
    from cppo.study.ablate.suite import plan_of
    from cppo.study.compare import free_folder
    from cppo.study.status import cores, default_jobs

    folder = out or free_folder(Path("studies"), f"ablate-{Path(base.recipe).stem}")
    threads = max(1, cores() // (jobs or default_jobs()))
    return store.open_study(plan_of(base, suites, folder, seeds, threads), versions())


def _execute(plan: Plan, jobs: int) -> None:
    """Train what is missing; status 1 if a run failed other than by the NaN guard, which is a result."""
    from cppo.study.ablate import answers
    from cppo.study.compare import run_all

    console = Console(highlight=False)
    reports, errors = run_all(plan, jobs, console, answers.write_all)
    console.print(answers.shown(reports))
    console.print(f"Written: {plan.folder / answers.TABLE_FILE}, and a folder per suite beside it", soft_wrap=True)
    if any(not answers.is_result(error) for error in errors.values()):
        raise typer.Exit(1)
