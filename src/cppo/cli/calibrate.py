"""`cppo calibrate`: thresholds from the divergences of a dump, as tables or JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from cppo.cli.inspect import DumpPath, parse_settings
from cppo.errors import UserError


def calibrate(
    dump: DumpPath,
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
    if budget not in ("adaptive", "fixed"):
        raise UserError(f"--budget is {budget!r}, expected adaptive or fixed.")
    from cppo.dumps.dump import read_dump

    if rule:
        from cppo.dumps.calibrate import propose_rules

        if delta is not None:
            raise UserError("--delta translates a limit of CPPO's table: leave --rule out, or set cppo.delta by --set.")
        given = parse_settings(rule, settings or ())
        if "cppo" in given:
            given["cppo"] = {"w_min": w_min, "budget": budget} | given["cppo"]
        report = propose_rules(read_dump(dump), given, target, update)
    elif settings or update != "last":
        raise UserError(f"{'--set' if settings else '--update'} needs --rule: without it the proposal is for CPPO.")
    else:
        from cppo.dumps.propose import calibrate_dump
        from cppo.rules import CPPO

        report = calibrate_dump(read_dump(dump), target, CPPO(w_min=w_min, budget=budget), delta)
    console = Console(highlight=False)
    if as_json:
        console.file.write(json.dumps(report, indent=2, allow_nan=False) + "\n")
    else:
        console.print(rule_table(report) if rule else tables(report))


def rule_table(report: Mapping[str, Any]) -> Group:
    """Thresholds by rule, for people."""
    table = Table()
    for column in ("rule", "thresholds", "held back", "D_t"):
        table.add_column(column, justify="right" if column == "held back" else "left", overflow="fold")
    problems = []
    for name, entry in report["rules"].items():
        if entry["problem"]:
            problems.append(entry["problem"])
            table.add_row(name, "-", "-", entry["divergence"] or "-")
            continue
        thresholds = " ".join(f"{key}={value:.4g}" for key, value in entry["thresholds"].items())
        given = " ".join(f"{key}={value}" for key, value in entry["given"].items())
        what = f"{entry['share']:.2%}{' clamped' if name in ('cispo', 'minpro') else ''}"
        table.add_row(
            name, escape(thresholds) + (f" [dim]{escape(given)}[/]" if given else ""), what, entry["divergence"] or "-"
        )
    head = f"Thresholds for {report['target']:.3g} of the tokens ({escape(report['dump'])})"
    seen = f"From {report['responses']:,} responses with {report['loss_tokens']:,} loss tokens, "
    seen += "seen at the last update of each step." if report["update"] == "last" else "all updates."
    notes = (f"[bold]Note:[/] {escape(note)}" for note in (*problems, *report["notes"]))
    return Group(head, table, seen, *notes)


def tables(report: Mapping[str, Any]) -> Group:
    """The report for people."""
    found = report["proposal"]
    name = escape(report["divergence"])
    head = f"Thresholds for {found['target']:.3g} of the tokens, D_t = {name} ({escape(report['dump'])})"
    proposal = Table()
    for column in ("rule", "thresholds", "token limit", "prefix budget", "masked"):
        proposal.add_column(column, justify="left" if column in ("rule", "thresholds") else "right")
    thresholds = f"delta={found['delta']:.3g} delta_b={found['delta_b']:.3g} w_min={found['w_min']:g}"
    shares = (found["token_limit"], found["prefix_budget"], found["masked"])
    proposal.add_row("cppo", thresholds, *(f"{share:.2%}" for share in shares))
    target = f"{found['target']:.2%}"
    proposal.add_row("dppo", f"delta={report['dppo_delta']:.3g}", target, "-", target)
    limits = Table()
    limits.add_column("divergence")
    limits.add_column("limit", justify="right")
    for kind, limit in report["limits"].items():
        limits.add_row(kind, f"{limit:.3g}")
    for side in ("eps_low", "eps_high"):
        value = report["clip"][side]
        limits.add_row(f"ratio clip: {side}", "-" if value is None else f"{value:.3g}")
    notes = [f"From {report['responses']:,} responses with {report['loss_tokens']:,} loss tokens."]
    if not found["binds"]:
        notes.append("The prefix budget holds nothing back: the responses are too short, or too close to mu.")
    between = f"Limits that drop as much as {name} > {report['delta']:.3g}"
    return Group(
        head, proposal, between, limits, *notes, *(f"[bold]Note:[/] {escape(note)}" for note in report["notes"])
    )
