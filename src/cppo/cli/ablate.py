"""`cppo ablate` behind the command line: a new study, one to go on with, one to look at, or only its size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console

from cppo.cli.compare import check_options, nothing_else
from cppo.errors import UserError

if TYPE_CHECKING:
    from cppo.study.ablate.suite import Base, Suite
    from cppo.study.plan import Plan

T = TypeVar("T", int, float)


def run(
    recipe: str | None,
    settings: Sequence[str],
    *,
    only: str | None = None,
    seeds: int | None = None,
    jobs: int | None = None,
    out: Path | None = None,
    resume: Path | None = None,
    show: Path | None = None,
    list_only: bool = False,
    rules: str | None = None,
    learning_rates: str | None = None,
    updates: str | None = None,
    targets: str | None = None,
    console: Console | None = None,
) -> int:
    """Run suites of ablations; the exit status: 0, or 1 if a run failed (other than by the NaN guard, which is a
    result).

    Parameters
    ----------
    recipe, settings : as of `cppo train`; ``dppo.delta=0.05`` is for one of the rules alone.
    only : comma-separated suites (default: all).  seeds : how many (default 5).  jobs : runs at a time.
    out : folder of the study (default: studies/ablate-<recipe>-001 ...).  resume, show : as of `cppo compare`.
    list_only : only say what would be run, and about how long it takes.
    rules : of frontier, staleness, length and delta.  learning_rates : of frontier.  updates : of frontier and
        staleness.  targets : masked fractions of delta. All comma-separated.

    Raises
    ------
    UserError : what the user can put right.  KeyboardInterrupt : Ctrl-C; `str()` says how to go on.
    """
    console = console or Console(highlight=False)
    check_options("ablate", resume, show, out, jobs)
    from cppo.study import store
    from cppo.study.ablate import answers as ablate_report
    from cppo.study.ablate.cost import listing
    from cppo.study.ablate.suite import suites_of
    from cppo.study.status import default_jobs

    options = {
        "--only": only,
        "--seeds": seeds,
        "--rules": rules,
        "--learning-rates": learning_rates,
        "--updates": updates,
        "--targets": targets,
    }
    at_once = default_jobs() if jobs is None else jobs
    existing = resume or show
    if existing is None:
        base, suites = _asked(recipe, settings, only, rules, learning_rates, updates, targets)
        count = 5 if seeds is None else seeds
        if list_only:
            console.print(listing(base, suites, count, at_once))
            return 0
        return _execute(_new_plan(base, suites, count, jobs, out), at_once, console)
    given = [*([recipe] if recipe else []), *settings, *(name for name, value in options.items() if value is not None)]
    nothing_else(f"{'--resume' if resume else '--show'} {existing}", given)
    plan = store.load_plan(existing)
    suites_of(plan)
    if show is not None or list_only:
        console.print(ablate_report.shown(ablate_report.read_all(plan)))
        return 0
    return _execute(plan, at_once, console)


def _asked(
    recipe: str | None,
    settings: Sequence[str],
    only: str | None,
    rules: str | None,
    learning_rates: str | None,
    updates: str | None,
    targets: str | None,
) -> tuple[Base, list[Suite]]:
    """What was typed, resolved."""
    from cppo.config.load import DEFAULT_RECIPE
    from cppo.study.ablate.suite import Options, base_of
    from cppo.study.ablate.suites import SUITES, make_suites
    from cppo.study.plan import check_names
    from cppo.words import nearest

    names = list(SUITES) if only is None else _words(only)
    check_names(names)
    for name in names:
        if name not in SUITES:
            raise UserError(f"--only names {name!r}; there are {', '.join(SUITES)}.{nearest(name, SUITES)}")
    base = base_of(recipe or DEFAULT_RECIPE, settings)
    labels = None if rules is None else tuple(_words(rules))
    if labels is not None:
        check_names(labels)
    for label in labels or ():
        if label not in base.rules:
            raise UserError(f"--rules names {label!r}; there are {', '.join(base.rules)}.{nearest(label, base.rules)}")
    options = Options(
        labels,
        _numbers("--learning-rates", learning_rates, float),
        _numbers("--updates", updates, int),
        _numbers("--targets", targets, float),
    )
    return base, make_suites(base, names, options)


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
    from cppo.runs.folder import versions
    from cppo.study import store
    from cppo.study.ablate.suite import plan_of
    from cppo.study.compare import free_folder
    from cppo.study.status import cores, default_jobs

    folder = out or free_folder(Path("studies"), f"ablate-{Path(base.recipe).stem}")
    threads = max(1, cores() // (jobs or default_jobs()))
    return store.open_study(plan_of(base, suites, folder, seeds, threads), versions())


def _execute(plan: Plan, jobs: int, console: Console) -> int:
    from cppo.study.ablate import answers as ablate_report
    from cppo.study.compare import run_all

    reports, errors = run_all(plan, jobs, console, ablate_report.write_all)
    console.print(ablate_report.shown(reports))
    console.print(f"Written: {plan.folder / ablate_report.TABLE_FILE}, and a folder a suite beside it", soft_wrap=True)
    return int(any(not ablate_report.is_result(error) for error in errors.values()))
