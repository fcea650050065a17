"""`cppo compare` behind the command line: a new study, one to go on with, or one to look at."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from cppo.errors import UserError

if TYPE_CHECKING:
    from cppo.study.plan import Plan


def compare(
    recipe: str | None,
    settings: Sequence[str],
    *,
    rules: str | None = None,
    seeds: int | None = None,
    jobs: int | None = None,
    out: Path | None = None,
    resume: Path | None = None,
    show: Path | None = None,
    baseline: str | None = None,
    console: Console | None = None,
) -> int:
    """Compare rules on one task; the exit status: 0, or 1 if a run failed.

    Parameters
    ----------
    recipe, settings : as of `cppo train`; ``dppo.delta=0.05`` is for one of the rules alone.
    rules : comma-separated names (default: the seven of the paper's Table 1; `grpo` is ppo_clip with 0.2 / 0.28).
    seeds : how many (default 5), from the recipe's seed on.
    jobs : runs at a time (default: half of the cores, or one a GPU).
    out : folder of the study, new, empty, or that of the same study (default: studies/compare-<recipe>-001 ...).
    resume : go on with the study in this folder.  show : only print what it has so far, also while it runs.
    baseline : the rule that all others are measured against (default: for each the best of the others).

    Raises
    ------
    UserError : what the user can put right.  KeyboardInterrupt : Ctrl-C; `str()` says how to go on.
    """
    console = console or Console(highlight=False)
    check_options("compare", resume, show, out, jobs)
    from cppo.study import store

    existing = resume or show
    if existing is not None:
        given = [*([recipe] if recipe else []), *settings]
        given += [f"--{name}" for name, value in (("rules", rules), ("seeds", seeds)) if value is not None]
        option = "--resume" if resume else "--show"
        nothing_else(f"{option} {existing}", given)
        plan = store.load_plan(existing)
        if plan.kind != "compare":
            raise UserError(f"{existing} is a study of cppo {plan.kind}: cppo {plan.kind} {option} {existing}.")
        if baseline is not None:
            names = [variant.name for variant in plan.variants]
            if baseline not in names:
                raise UserError(f"--baseline is {baseline!r}, expected one of {', '.join(names)}.")
            plan = dataclasses.replace(plan, baseline=baseline)
        if show is not None:
            from cppo.study.results import read_results
            from cppo.study.tables import rich_tables

            console.print(rich_tables(read_results(plan)))
            return 0
        return _run(plan, jobs, console)
    return _run(_new_plan(recipe, settings, rules, seeds, jobs, out, baseline), jobs, console)


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
            f"{option} takes everything from that study and nothing else (got {' '.join(given)}). For another study "
            "leave it out."
        )


def _new_plan(
    recipe: str | None,
    settings: Sequence[str],
    rules: str | None,
    seeds: int | None,
    jobs: int | None,
    out: Path | None,
    baseline: str | None,
) -> Plan:
    """The plan of what was typed, written into its folder."""
    from cppo.config.load import DEFAULT_RECIPE
    from cppo.study import store
    from cppo.study.compare import TABLE_1, free_folder, rule_variants
    from cppo.study.plan import make_plan
    from cppo.study.status import cores, default_jobs

    recipe = recipe or DEFAULT_RECIPE
    names = list(TABLE_1) if rules is None else [name.strip() for name in rules.split(",") if name.strip()]
    common, variants = rule_variants(recipe, settings, names)
    folder = out or free_folder(Path("studies"), f"compare-{Path(recipe).stem}")
    threads = max(1, cores() // (jobs or default_jobs()))
    plan = make_plan("compare", folder, recipe, common, variants, 5 if seeds is None else seeds, threads, baseline)
    from cppo.runs.folder import versions

    return store.open_study(plan, versions())


def _run(plan: Plan, jobs: int | None, console: Console) -> int:
    from cppo.study.compare import execute
    from cppo.study.status import default_jobs

    _, fine = execute(plan, default_jobs() if jobs is None else jobs, console)
    return 0 if fine else 1
