"""`cppo inspect`: what a dump of rollouts shows, as tables, JSON and figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group
from rich.markup import escape

from cppo.errors import UserError, as_user_error
from cppo.show.tables import Cells

if TYPE_CHECKING:
    from cppo.rules import TrustRegion

#: Rows of the table by position.
SHOWN = 12


#: The dump of `cppo inspect` and `cppo calibrate`.
DumpPath = Annotated[
    Path, typer.Argument(metavar="DUMP", help="A .jsonl or .parquet file, a folder of them, or a run.")
]


def inspect(
    dump: DumpPath,
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
    from cppo.dumps.dump import read_dump
    from cppo.dumps.inspect import inspect_dump

    judges = chosen_rules(rule or (), settings or ())
    if update not in ("last", "all") and not update.isdigit():
        raise UserError(f"--update is {update!r}, expected last, all or a number (0: the first update).")
    report = inspect_dump(read_dump(dump), judges, int(update) if update.isdigit() else update)
    console = Console(highlight=False)
    if as_json:
        console.file.write(json.dumps(report, indent=2, allow_nan=False) + "\n")
    else:
        console.print(tables(report))
    if out is not None:
        from cppo.dumps.figures import write_figures
        from cppo.files import atomic_write_json

        paths = [*write_figures(report, out), atomic_write_json(out / "inspect.json", report)]
        if not as_json:
            console.print(f"Written to {out}: {', '.join(path.name for path in paths)}", soft_wrap=True)


def chosen_rules(names: Sequence[str], settings: Sequence[str]) -> list[TrustRegion]:
    """The rules by name (none: all of them) with the parameters set, such as "cppo.delta=0.1".

    Raises
    ------
    UserError : an unknown rule or parameter, a setting of a rule that is not shown, or not of that form.
    """
    from cppo.rules import RULES, make_rule

    parameters = parse_settings(list(names) or list(RULES), settings)
    with as_user_error():
        return [make_rule(name, **given) for name, given in parameters.items()]


def parse_settings(names: Sequence[str], settings: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The parameters of each of the rules `names` that settings such as "cppo.delta=0.1" give.

    Raises
    ------
    UserError : a setting of a rule that is unknown or not among the names, or not of that form.
    """
    from cppo.rules.base import rule_class

    parameters: dict[str, dict[str, Any]] = {name: {} for name in names}
    for setting in settings:
        key, equals, text = setting.partition("=")
        rule, dot, parameter = key.partition(".")
        if not (equals and dot and rule and parameter):
            raise UserError(f"--set {setting!r}: expected RULE.PARAMETER=VALUE, such as cppo.delta=0.1.")
        if rule not in parameters:
            with as_user_error():
                rule_class(rule)  # an unknown name is an error that lists the rules
            raise UserError(f"--set {setting}: the rule {rule} is not shown; add --rule {rule}.")
        parameters[rule][parameter] = _value(text)
    return parameters


def _value(text: str) -> Any:
    """A number, true, false or null; else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return None if text.lower() == "none" else text


# --------------------------------------------------------------------------------------------------------------- tables


def tables(report: Mapping[str, Any]) -> Group:
    """The report for people."""
    parts = [Cells(report["dump"]["path"], ("", ""), _about(report), text=2), _positions(report)]
    if report["rules"]:
        parts.append(_rules(report))
    if len(report["disagreement"]["rules"]) > 1:
        parts.append(_disagreement(report["disagreement"]))
    if report["budget"] is not None:
        parts.append(_budget(report["budget"]))
    if report["certificate"] is not None:
        parts.append(_certificate(report["certificate"]))
    return Group(*(table.rich() for table in parts), *(f"[bold]Note:[/] {escape(note)}" for note in report["notes"]))


def _about(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    dump, mismatch, D = report["dump"], report["mismatch"], report["divergence"]
    seen = f"{dump['responses']:,}"
    if dump["groups"] is not None:
        seen += f" to {dump['groups']:,} prompts"
    if dump["steps"] is not None:
        first, last = dump["steps"]
        seen += f", step {first}" if first == last else f", steps {first}-{last}"
    if dump["update"] is not None:
        seen += f", update {dump['update']}"
    rows = [("responses", seen)]
    left = [(dump["at_other_updates"], "at other updates"), (dump["without_loss_tokens"], "without a loss token")]
    if any(count for count, _ in left):
        rows.append(("left out", ", ".join(f"{count:,} {what}" for count, what in left if count)))
    lengths = f"{dump['loss_tokens']:,}; {dump['mean_length']:.4g} per response, {dump['longest']:,} at most"
    rows.append(("loss tokens", lengths))
    if dump["reward"] is not None:
        rows.append(("mean reward", f"{dump['reward']:.4g}"))
    spread = ", ".join(f"{name} {D[name]:.4g}" for name in ("mean", "p50", "p90", "p99", "max"))
    floor = f"|log ratio| {mismatch['abs_log_ratio']:.3g}, {mismatch['name']} {mismatch['divergence']:.3g}"
    return [*rows, ("divergence D_t", f"{D['name']}: {spread}"), ("mismatch floor", f"{floor}: {mismatch['source']}")]


def _positions(report: Mapping[str, Any]) -> Cells:
    D = report["divergence"]["by_position"]
    budget = report["budget"] and report["budget"]["share_by_position"]
    columns = ("position", "tokens", "mean D", "top 10%", *(("budget spent", "top 10%") if budget else ()))
    rows = []
    span = -(-len(D["count"]) // SHOWN)
    for start in range(0, len(D["count"]), span):
        stop = min(start + span, len(D["count"]))
        count = sum(D["count"][start:stop])
        if not count:
            continue

        def mean(row: Mapping[str, Any], name: str, part: slice = slice(start, stop), n: int = count) -> float:
            pairs = zip(row[name][part], row["count"][part], strict=True)
            return float(sum((value or 0.0) * tokens for value, tokens in pairs) / n)

        cells = [f"{mean(D, name):.4g}" for name in ("mean", "tail_mean")]
        if budget:
            cells += [f"{mean(budget, name):.1%}" for name in ("mean", "tail_mean")]
        last = min(stop * D["width"], report["dump"]["longest"])
        rows.append((f"{start * D['width'] + 1}-{last}", f"{count:,}", *cells))
    return Cells(f"By position: {report['divergence']['name']}", columns, rows, text=0)


def _rules(report: Mapping[str, Any]) -> Cells:
    from cppo.rules import Reason
    from cppo.rules.base import HELD

    reasons = [reason.key for reason in (Reason.TOWARDS, *HELD)]
    columns = ("rule", "D_t", "masked", *(reason.replace("_", " ") for reason in reasons), "responses hit")
    rows = []
    for name, row in report["rules"].items():
        shares = [row["masked"], *(row["reasons"][reason] for reason in reasons), row["responses_with_masked"]]
        rows.append((name, row["divergence"] or "-", *(f"{share:.2%}" if share else "-" for share in shares)))
    caption = (
        "masked: coefficient 0; some rules clamp the weight instead. "
        "towards: over a limit, but kept, since it moves back to mu."
    )
    return Cells("What each rule would do (shares of the loss tokens)", columns, rows, text=2, caption=caption)


def _disagreement(found: Mapping[str, Any]) -> Cells:
    others = len(found["rules"]) - 1
    rows = [
        (name, *(f"{share:.1%}" if share else "-" for share in shares[:at]), *[""] * (others - at))
        for at, (name, shares) in enumerate(zip(found["rules"], found["share"], strict=True))
        if at
    ]
    return Cells("Tokens that one rule keeps and the other drops", ("", *found["rules"][:-1]), rows)


def _budget(found: Mapping[str, Any]) -> Cells:
    rows = []
    for name, label in (("delta_b", "delta_b in use"), ("budget_used", "spent at the end of a response")):
        spread = ", ".join(f"{key} {found[name][key]:.4g}" for key in ("mean", "p50", "p90", "max"))
        rows.append((label, spread))
    ends = f"{found['at_minimum']:.1%}, {found['at_maximum']:.1%} of responses"
    rows += [("delta_b at its minimum, maximum", ends), ("overdrawn", f"{found['overdrawn']:.1%} of responses")]
    return Cells("CPPO's prefix budget", ("", ""), rows, text=2)


def _certificate(row: Mapping[str, Any]) -> Cells:
    unit = "the reward" if row["unit"] == "reward" else "the advantage: there are no rewards"
    rows = []
    bounded = f"{row['divergence']}" + ("" if row["certified"] else ", a lower bound: no certificate")
    for name, label in (
        ("surrogate", "gain L' that the surrogate promises"),
        ("ratios", "bound of its error, from ratios"),
        ("improvement", "L' - bound (above 0: pi is better than mu)"),
        ("pathwise", f"bound of its error, pathwise ({bounded})"),
        ("product", f"bound, product form of Prop. 4 ({bounded})"),
        ("prop4", f"bound of Prop. 4 ({bounded})"),
    ):
        if row.get(name) is not None:
            rows.append((label, f"{row[name]:.3g}", f"[{row[f'{name}_low']:.3g}, {row[f'{name}_high']:.3g}]"))
    return Cells(f"Certificate: {row['of']} (units of {unit}; 95% intervals)", ("", "value", "interval"), rows)
