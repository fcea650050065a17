"""`cppo calibrate`: thresholds from the divergences of a dump, as tables or JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.markup import escape

from cppo.cli.inspect import DumpPath, parse_settings
from cppo.errors import UserError
from cppo.show.tables import Cells


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
    rows, notes = [], []
    for name, entry in report["rules"].items():
        rows.append((name, *_found(name, entry), entry["divergence"] or "-"))
        if entry["problem"]:
            notes.append(entry["problem"])
        elif "delta_b" in entry["thresholds"] and "prefix_budget" not in entry["reasons"]:
            notes.append("the prefix budget holds nothing back: the responses are too short, or too close to mu.")
    title = f"Thresholds for {report['target']:.3g} of the tokens ({report['dump']})"
    found = [Cells(title, ("rule", "thresholds", "given", "held back", "of these", "D_t"), rows, text=6)]
    if report["translation"] is not None:
        found.append(_translation(report["translation"]))
    seen = f"From {report['responses']:,} responses with {report['loss_tokens']:,} loss tokens, "
    seen += "seen at the last update of each step." if report["update"] == "last" else "all updates."
    said = (f"[bold]Note:[/] {escape(note)}" for note in (*notes, *report["notes"]))
    return Group(*(table.rich() for table in found), seen, *said)


def _found(name: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
    """Of a rule: thresholds, what was given, the share held back, the same by reason."""
    given = " ".join(f"{key}={value}" for key, value in entry["given"].items()) or "-"
    if entry["problem"]:
        return "-", given, "-", "-"
    thresholds = " ".join(f"{key}={value:.4g}" for key, value in entry["thresholds"].items())
    share = f"{entry['share']:.2%}{' clamped' if set(entry['reasons']) == {'clamped'} else ''}"
    reasons = [f"{reason.replace('_', ' ')} {part:.2%}" for reason, part in entry["reasons"].items()]
    return thresholds, given, share, ", ".join(reasons) if len(reasons) > 1 else "-"


def _translation(found: Mapping[str, Any]) -> Cells:
    rows = [(kind, f"{limit:.3g}") for kind, limit in found["limits"].items()]
    rows += [(f"ratio clip: {side}", "-" if value is None else f"{value:.3g}") for side, value in found["clip"].items()]
    title = f"Limits that drop as much as {found['divergence']} > {found['delta']:.3g}"
    return Cells(title, ("divergence", "limit"), rows)
