"""`cppo compare`: a new study, one to go on with, or one to look at."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from cppo.cli.common import Arguments, Jobs, Resume, Seeds, Show, split_arguments
from cppo.errors import UserError

if TYPE_CHECKING:
    from cppo.study.plan import Plan


def compare(
    arguments: Arguments = None,
    rules: Annotated[
        str | None,
        typer.Option("--rules", help="Names with commas between (default: the seven of the paper's Table 1)."),
    ] = None,
    seeds: Seeds = None,
    jobs: Jobs = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The study's folder (default: studies/compare-...).")
    ] = None,
    resume: Resume = None,
    show: Show = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="Measure against this rule (default: the best of the others).")
    ] = None,
) -> None:
    """Does it help on my task? Matched runs of several rules and seeds, with intervals.

    cppo compare --rules grpo,dppo,cppo --seeds 2 steps=10

    cppo compare --resume studies/compare-arithmetic-001
    """
    check_options("compare", resume, show, out, jobs)
    existing = resume or show
    if existing is None:
        _run(_new_plan(arguments, rules, seeds, jobs, out, baseline), jobs)
        return
    given = [
        *(arguments or []),
        *(f"--{name}" for name, value in (("rules", rules), ("seeds", seeds)) if value is not None),
    ]
    option = "--resume" if resume else "--show"
    nothing_else(f"{option} {existing}", given)
    plan = _existing(existing, option, baseline)
    if show is None:
        _run(plan, jobs)
        return
    from cppo.study.results import read_results
    from cppo.study.tables import rich_tables

    Console(highlight=False).print(rich_tables(read_results(plan)))


def check_options(command: str, resume: Path | None, show: Path | None, out: Path | None, jobs: int | None) -> None:
    """What commands that run a study have in common.

    Raises
    ------
    UserError : options that exclude each other, no jobs, or scipy is missing.
    """
    chosen = [name for name, folder in (("--resume", resume), ("--show", show), ("--out", out)) if folder is not None]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(chosen)} cannot be given together.")
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs is {jobs}, expected at least 1.")
    if importlib.util.find_spec("scipy") is None:
        raise UserError(
            f"cppo {command} needs scipy for its intervals, which is not installed: pip install 'cppo[study]'."
        )


def nothing_else(option: str, given: Sequence[str]) -> None:
    """Refuse settings beside --resume or --show; `option`: with its folder."""
    if given:
        raise UserError(
            f"{option} takes everything from that study and nothing else (got {' '.join(given)}). "
            "For another study leave it out."
        )


def _existing(folder: Path, option: str, baseline: str | None) -> Plan:
    """The plan of a study that is there, measured against another rule where one is given."""
    from cppo.study import store

    plan = store.load_plan(folder)
    if plan.kind != "compare":
        raise UserError(f"{folder} is a study of cppo {plan.kind}: cppo {plan.kind} {option} {folder}.")
    if baseline is None:
        return plan
    names = [variant.name for variant in plan.variants]
    if baseline not in names:
        raise UserError(f"--baseline is {baseline!r}, expected one of {', '.join(names)}.")
    return dataclasses.replace(plan, baseline=baseline)


def _new_plan(
    arguments: list[str] | None,
    rules: str | None,
    seeds: int | None,
    jobs: int | None,
    out: Path | None,
    baseline: str | None,
) -> Plan:
    """The plan of what was typed, written into its folder."""
    from cppo.config.load import DEFAULT_RECIPE
    from cppo.runs.prepare import versions
    from cppo.study import store
    from cppo.study.compare import TABLE_1, free_folder, rule_variants
    from cppo.study.plan import make_plan
    from cppo.study.status import cores, default_jobs

    typed, settings = split_arguments(arguments or [])
    recipe = typed or DEFAULT_RECIPE
    names = list(TABLE_1) if rules is None else [name.strip() for name in rules.split(",") if name.strip()]
    common, variants = rule_variants(recipe, settings, names)
    folder = out or free_folder(Path("studies"), f"compare-{Path(recipe).stem}")
    threads = max(1, cores() // (jobs or default_jobs()))
    plan = make_plan("compare", folder, recipe, common, variants, 5 if seeds is None else seeds, threads, baseline)
    return store.open_study(plan, versions())


def _run(plan: Plan, jobs: int | None) -> None:
    """Train what is missing; status 1 if a run failed."""
    from cppo.study.compare import execute
    from cppo.study.status import default_jobs

    _, fine = execute(plan, default_jobs() if jobs is None else jobs, Console(highlight=False))
    if not fine:
        raise typer.Exit(1)
