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
        typer.Option("--rule", help="This rule instead of cppo and dppo (can be given several times)."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="RULE.KEY=VALUE", help="A parameter that stays, such as cppo.delta_b=0.02."),
    ] = None,
    update: Annotated[str, typer.Option("--update", help="last or all.")] = "last",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Thresholds from measured divergences: delta and delta_b for a target, and limits that correspond.

    cppo calibrate dump.jsonl --target 0.02

    cppo calibrate dump.jsonl --rule dppo --rule ppo_clip
    """
    if budget not in ("adaptive", "fixed"):
        raise UserError(f"--budget is {budget!r}, expected adaptive or fixed.")
    if rule and delta is not None:
        raise UserError("--delta translates a limit of CPPO's table: leave --rule out, or set cppo.delta by --set.")
    given = parse_settings(rule or ("cppo", "dppo"), settings or ())
    if "cppo" in given:
        given["cppo"] = {"w_min": w_min, "budget": budget} | given["cppo"]
    from cppo.dumps.calibrate import calibrate_dump
    from cppo.dumps.dump import read_dump

    report = calibrate_dump(read_dump(dump), given, target, update, translated=not rule, delta=delta)
    console = Console(highlight=False)
    if as_json:
        console.file.write(json.dumps(report, indent=2, allow_nan=False) + "\n")
    else:
        console.print(tables(report))


def tables(report: Mapping[str, Any]) -> Group:
    """The report for people."""
    table = Table()
    for column in ("rule", "thresholds", "held back", "of these", "D_t"):
        table.add_column(column, justify="right" if column == "held back" else "left", overflow="fold")
    notes = []
    for name, entry in report["rules"].items():
        if entry["problem"]:
            notes.append(entry["problem"])
            table.add_row(name, "-", "-", "-", escape(entry["divergence"] or "-"))
            continue
        thresholds = " ".join(f"{key}={value:.4g}" for key, value in entry["thresholds"].items())
        given = " ".join(f"{key}={value}" for key, value in entry["given"].items())
        what = f"{entry['share']:.2%}{' clamped' if name in ('cispo', 'minpro') else ''}"
        parts = ", ".join(f"{reason.replace('_', ' ')} {share:.2%}" for reason, share in entry["reasons"].items())
        shown = escape(thresholds) + (f" [dim]{escape(given)}[/]" if given else "")
        parts = parts if len(entry["reasons"]) > 1 else "-"
        table.add_row(name, shown, what, parts, escape(entry["divergence"] or "-"))
        if "delta_b" in entry["thresholds"] and "prefix_budget" not in entry["reasons"]:
            notes.append("the prefix budget holds nothing back: the responses are too short, or too close to mu.")
    head = f"Thresholds for {report['target']:.3g} of the tokens ({escape(report['dump'])})"
    seen = f"From {report['responses']:,} responses with {report['loss_tokens']:,} loss tokens, "
    seen += "seen at the last update of each step." if report["update"] == "last" else "all updates."
    translation = [] if report["translation"] is None else _translation(report["translation"])
    said = (f"[bold]Note:[/] {escape(note)}" for note in (*notes, *report["notes"]))
    return Group(head, table, *translation, seen, *said)


def _translation(found: Mapping[str, Any]) -> list[Any]:
    limits = Table()
    limits.add_column("divergence")
    limits.add_column("limit", justify="right")
    for kind, limit in found["limits"].items():
        limits.add_row(escape(kind), f"{limit:.3g}")
    for side, value in found["clip"].items():
        limits.add_row(f"ratio clip: {side}", "-" if value is None else f"{value:.3g}")
    return [f"Limits that drop as much as {escape(found['divergence'])} > {found['delta']:.3g}", limits]
