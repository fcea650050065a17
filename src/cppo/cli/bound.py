"""`cppo bound`: what the theorems promise for thresholds, and the certificate of a run, as tables or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.markup import escape

from cppo import theory
from cppo.errors import UserError, as_user_error
from cppo.show.tables import Cells
from cppo.theory import Constant, ScheduleCost, bounds, coefficients, is_monotone, make_schedule

#: Rows of a run's table; longer runs are shown at evenly spaced steps.
SHOWN = 16


def conditions(horizon: int, delta: float, delta_b: float, w_min: float, schedule: str) -> list[tuple[str, bool]]:
    """What the statements need of the settings, and whether it holds."""
    w = make_schedule(schedule, horizon, w_min)
    largest = min(delta / float(w.min()), 1.0)
    product = coefficients(horizon, largest, form="product")
    return [
        ("Theorem 1: (T - t) / w_t is non-increasing", is_monotone(coefficients(horizon, 1.0), w)),
        ("product form: (1 - (1 - L)^(T - t)) / w_t is non-increasing", is_monotone(product, w)),
        (
            "delta_b < delta min w: Cor. 7's constant is below the uniform rule's",
            delta_b < delta * float(w.min()),
        ),
    ]


def constants_as_json(
    settings: dict[str, Any], rows: Sequence[Constant], found: Sequence[tuple[str, bool]], costs: Sequence[ScheduleCost]
) -> dict[str, Any]:
    """Settings, constants with their ratio to the uniform rule, conditions, schedules."""
    reference = _uniform(settings)
    return {
        **settings,
        "conditions": dict(found),
        "constants": [vars(row) | {"ratio": _ratio(row.bound, reference)} for row in rows],
        "schedules": [vars(cost) for cost in costs],
    }


def constants_table(
    settings: dict[str, Any], rows: Sequence[Constant], found: Sequence[tuple[str, bool]], costs: Sequence[ScheduleCost]
) -> Group:
    """The same for people."""
    reference = _uniform(settings)
    lines = [
        (
            row.rule,
            row.statement,
            row.condition if row.bound is not None else row.remark.partition(":")[0],
            _number(row.bound),
            _number(_ratio(row.bound, reference)),
        )
        for row in rows
    ]
    tables = [
        Cells(
            f"Bounds of |Delta| = |surrogate - gain|, T = {settings['horizon']}",
            ("rule", "statement", "holds where, on every rollout", "bound", "/ uniform"),
            lines,
            text=3,
        ),
        Cells("Conditions", ("", ""), [(text, "holds" if holds else "does not hold") for text, holds in found], text=2),
    ]
    if costs:
        tables.append(_schedules(costs))
    xi = settings["xi"]
    note = (
        f"In units of the reward, whose range is {2 * xi:g} (xi = {xi:g}): a gain cannot be larger than that, so a "
        "larger bound guarantees nothing by itself. What the constants compare is how they grow. A bound holds for the "
        "policies that satisfy its condition; a mask does not force them to (docs/theory.md)."
    )
    return Group(*(table.rich() for table in tables), escape(note))


def _schedules(costs: Sequence[ScheduleCost]) -> Cells:
    columns = ("schedule", "Theorem 1", "tightest", "rule (8)", "product", "D_1 at most", "D_T at most", "room")
    rows = []
    for cost in costs:
        figures = (cost.theorem, cost.tightest, cost.tightest_rule, cost.tightest_product)
        limits = (f"{cost.first:.4g}", f"{cost.last:.4g}", f"{cost.room:.4f}")
        rows.append((cost.name, *map(_number, figures), *limits))
    return Cells("Schedules at these thresholds (largest weight 1)", columns, rows)


def _uniform(settings: dict[str, Any]) -> float:
    return bounds.uniform(settings["horizon"], settings["delta"], xi=settings["xi"])


def _ratio(bound: float | None, reference: float) -> float | None:
    return None if bound is None or not reference else bound / reference


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def certificates_of(run: Path) -> list[dict[str, Any]]:
    """The certificates of a run folder, oldest first.

    Raises
    ------
    UserError : no run is there, or it has no certificates, and why that can be.
    """
    from cppo.runs.folder import RunFolder

    folder = RunFolder(run)
    if not folder.exists:
        raise UserError(f"--run {run}: there is no run ({folder.config_file} is missing).")
    rows = folder.certificates()
    if not rows:
        raise UserError(
            f"the run {run} has no certificates ({folder.certificates_file.name}): no rollout batch has ended, "
            "no response had a loss token, or it was made before certificates were written."
        )
    return rows


def certificate_table(run: Path, rows: Sequence[dict[str, Any]]) -> Group:
    """Gain of the surrogate and bounds of its error, by step."""
    columns = (
        "step",
        "responses",
        "T",
        "gain L'",
        "bound: ratios",
        "L' - bound",
        "pathwise",
        "product form",
        "Prop. 4",
    )
    span = max(1, -(-len(rows) // SHOWN))
    shown = [row for at, row in enumerate(rows) if at % span == 0 or at == len(rows) - 1]

    def cell(row: dict[str, Any], name: str) -> str:
        value, low, high = (row.get(f"{name}{end}") for end in ("", "_low", "_high"))
        if value is None or low is None or high is None:
            return "-"
        return f"{value:.2g} [{low:.2g}, {high:.2g}]"

    names = ("surrogate", "ratios", "improvement", "pathwise", "product", "prop4")
    cells = [
        (str(row["step"]), str(row["responses"]), str(row["horizon"]), *(cell(row, name) for name in names))
        for row in shown
    ]
    table = Cells(f"{run}: what the surrogate promises, and how far it can be off", columns, cells, text=0)
    last = rows[-1]
    certain = sum(1 for row in rows if (row.get("improvement_low") or 0) > 0)
    kind = last["divergence"]
    lines = [
        "At the last update of each rollout batch, over its responses; 95% intervals by bootstrap over prompts; in "
        f"units of the reward (xi = {last['xi']:g}).",
        f"In {certain} of {len(rows)} steps L' less the bound from ratios is above 0 with its interval: there the "
        "policy was better than the one that sampled, as far as these responses go.",
    ]
    if kind is None:
        lines.append("The rule measures no divergence; the bound from ratios needs none.")
    elif not last["certified"]:
        lines.append(
            f"The last three are of D_t = {kind}, a lower bound of the exact divergence, and so no certificates "
            "(divergence=exact_tv or topk_tv_upper gives those). The bound from ratios needs no divergence."
        )
    return Group(table.rich(), *map(escape, lines))


def bound(
    horizon: Annotated[int | None, typer.Option("--horizon", help="T: tokens of the longest response.")] = None,
    delta: Annotated[float, typer.Option("--delta", help="Token limit on the total variation.")] = 0.15,
    delta_b: Annotated[float, typer.Option("--delta-b", help="Prefix budget per token.")] = 0.02,
    w_min: Annotated[float, typer.Option("--w-min", help="The smallest weight.")] = 0.8,
    schedule: Annotated[
        str, typer.Option("--schedule", help="linear, constant, cosine, reversed or matched.")
    ] = "linear",
    xi: Annotated[float, typer.Option("--xi", help="Half of the reward's range.")] = 0.5,
    rule: Annotated[
        list[str] | None, typer.Option("--rule", help="Only this rule (can be given several times).")
    ] = None,
    schedules: Annotated[bool, typer.Option("--schedules", help="Compare the weight schedules, too.")] = False,
    run: Annotated[
        Path | None, typer.Option("--run", metavar="RUN", help="Instead: the empirical certificates of a run.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """How far the surrogate can be off: the constants of all rules, or the certificates of a run.

    cppo bound --horizon 8192 --delta 0.15 --delta-b 0.02 --w-min 0.8

    cppo bound --run runs/arithmetic-cppo-001
    """

    console = Console(highlight=False)
    if run is not None:
        rows = certificates_of(run)
        if as_json:
            typer.echo(json.dumps(rows, indent=2))
        else:
            console.print(certificate_table(run, rows))
        return
    if horizon is None:
        raise UserError("give --horizon T, the tokens of the longest response (such as 8192), or --run RUN.")
    from cppo.rules.base import RULES, rule_class

    with as_user_error():
        for name in rule or ():
            rule_class(name)  # an unknown name is an error that lists the rules
        constants = theory.constants(horizon, delta, delta_b, w_min, xi=xi, schedule=schedule)
        found = conditions(horizon, delta, delta_b, w_min, schedule)
        costs = theory.compare_schedules(horizon, delta, delta_b, w_min=w_min, xi=xi) if schedules else []
    settings = {"horizon": horizon, "delta": delta, "delta_b": delta_b, "w_min": w_min, "xi": xi, "schedule": schedule}
    bounded = {row.rule for row in constants}
    constants += [Constant(n, "none", "-", None, r.unbounded) for n, r in RULES.items() if n not in bounded]
    constants = [row for row in constants if not rule or row.rule in rule]
    if as_json:
        typer.echo(json.dumps(constants_as_json(settings, constants, found, costs), indent=2))
    else:
        console.print(constants_table(settings, constants, found, costs))
