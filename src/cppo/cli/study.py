"""The commands of a study: compare, ablate, report, inspect, calibrate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cppo.cli.common import Arguments, Jobs, Resume, Seeds, Show, sentences, split_arguments
from cppo.errors import UserError


@sentences
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
    from cppo.cli.compare import compare as run

    recipe, settings = split_arguments(arguments or [])
    status = run(
        recipe, settings, rules=rules, seeds=seeds, jobs=jobs, out=out, resume=resume, show=show, baseline=baseline
    )
    if status:
        raise typer.Exit(status)


@sentences
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
    from cppo.cli import ablate as cli_ablate

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


@sentences
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
    from cppo.cli import report as cli_report

    cli_report.run(source, out, open_page, figures)


@sentences
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
    from cppo.cli import inspect as cli_inspect

    cli_inspect.run(dump, rule or (), settings or (), update, out, as_json)


@sentences
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
    from cppo.cli import calibrate as cli_calibrate

    if budget not in ("adaptive", "fixed"):
        raise UserError(f"--budget is {budget!r}, expected adaptive or fixed.")
    cli_calibrate.run(
        dump, target, w_min, budget, delta, as_json, rules=rule or (), settings=settings or (), update=update
    )
