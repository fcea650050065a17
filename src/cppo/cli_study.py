"""The commands of a study: compare, ablate, report, inspect, calibrate. `register` adds them to the program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from cppo.errors import UserError

# Of every command that runs a study.
Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE] [KEY=VALUE]...",
        help="A recipe or YAML file (default: arithmetic), then settings: for all, or for one (dppo.delta=0.05).",
    ),
]
Seeds = Annotated[int | None, typer.Option("--seeds", help="How many, from the recipe's on (default 5).")]
Jobs = Annotated[int | None, typer.Option("--jobs", help="Runs at a time (default: half of the cores, or one a GPU).")]
Resume = Annotated[Path | None, typer.Option("--resume", metavar="DIR", help="Go on with the study in this folder.")]
Show = Annotated[Path | None, typer.Option("--show", metavar="DIR", help="Only print what that study has so far.")]


def register(app: typer.Typer, sentences: Callable[..., Any]) -> None:
    """Add the commands to `app`, each wrapped in `sentences` (mistakes of the user as a sentence)."""
    for command in (compare, ablate, report, inspect, calibrate):
        app.command()(sentences(command))


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
    from cppo.cli import split_arguments
    from cppo.cli_compare import compare as run

    recipe, settings = split_arguments(arguments or [])
    status = run(
        recipe, settings, rules=rules, seeds=seeds, jobs=jobs, out=out, resume=resume, show=show, baseline=baseline
    )
    if status:
        raise typer.Exit(status)


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
        str | None, typer.Option("--updates", help="Updates a rollout batch, of frontier and staleness.")
    ] = None,
    targets: Annotated[
        str | None, typer.Option("--targets", help="Shares of masked tokens of delta (default: 0.003,0.01,0.03,0.1).")
    ] = None,
) -> None:
    """What do the parts of CPPO do, and how far can it be pushed? Suites of matched runs, with intervals.

    cppo ablate --only mechanisms --seeds 1 steps=10

    cppo ablate --list
    """
    from cppo import cli_ablate
    from cppo.cli import split_arguments

    recipe, settings = split_arguments(arguments or [])
    status = cli_ablate.run(
        recipe,
        settings,
        only=only,
        seeds=seeds,
        jobs=jobs,
        out=out,
        resume=resume,
        show=show,
        list_only=list_only,
        rules=rules,
        learning_rates=learning_rates,
        updates=updates,
        targets=targets,
    )
    if status:
        raise typer.Exit(status)


def report(
    source: Annotated[Path, typer.Argument(metavar="RUN|STUDY", help="A run, a study, or a dump of `cppo inspect`.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The HTML file (default: report.html in the folder).")
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
    figures: Annotated[
        Path | None, typer.Option("--figures", metavar="DIR", help="Write the figures there, too, as PNG and SVG.")
    ] = None,
) -> None:
    """One HTML file about a run or a study: curves, tables, and every token under every rule.

    cppo report studies/compare-arithmetic-001 --open
    """
    from cppo import cli_report

    cli_report.run(source, out, open_page, figures)


def inspect(
    dump: Annotated[
        Path, typer.Argument(metavar="DUMP", help="A .jsonl or .parquet file, a folder of them, or a run.")
    ],
    rule: Annotated[
        list[str] | None, typer.Option("--rule", help="Only this rule (can be given several times).")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="RULE.KEY=VALUE", help="A parameter, such as cppo.delta=0.1.")
    ] = None,
    update: Annotated[str, typer.Option("--update", help="last, all, or a number (0: the first of a batch).")] = "last",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write figures (PNG, SVG) and inspect.json there.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What a dump of rollouts shows: divergence by position, what each rule would mask, budgets, the certificate.

    cppo inspect dump.jsonl --out figures

    cppo inspect runs/arithmetic-cppo-001 --rule cppo --rule dppo --set cppo.delta=0.05
    """
    from cppo import cli_inspect

    cli_inspect.run(dump, rule or (), settings or (), update, out, as_json)


def calibrate(
    dump: Annotated[
        Path, typer.Argument(metavar="DUMP", help="A .jsonl or .parquet file, a folder of them, or a run.")
    ],
    target: Annotated[float, typer.Option("--target", help="Share of the loss tokens to hold back.")] = 0.01,
    w_min: Annotated[float, typer.Option("--w-min", help="CPPO's smallest weight.")] = 0.8,
    budget: Annotated[str, typer.Option("--budget", help="CPPO's budget: adaptive or fixed.")] = "adaptive",
    delta: Annotated[
        float | None, typer.Option("--delta", help="Translate this limit into other divergences, not the proposed one.")
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option("--rule", help="Thresholds of this rule instead (can be given several times)."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="RULE.KEY=VALUE", help="With --rule: a parameter that stays, as cppo.delta_b=0.02."
        ),
    ] = None,
    update: Annotated[str, typer.Option("--update", help="With --rule: last or all.")] = "last",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Thresholds from measured divergences: delta and delta_b for a target, and limits that correspond.

    cppo calibrate dump.jsonl --target 0.02

    cppo calibrate dump.jsonl --rule dppo --rule ppo_clip
    """
    from cppo import cli_calibrate

    if budget not in ("adaptive", "fixed"):
        raise UserError(f"--budget is {budget!r}, expected adaptive or fixed.")
    cli_calibrate.run(
        dump, target, w_min, budget, delta, as_json, rules=rule or (), settings=settings or (), update=update
    )
