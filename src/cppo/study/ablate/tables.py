"""The tables of an ablation's suites, as `Cells`, for a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.markup import escape

from cppo.show.tables import Cells
from cppo.study import tables
from cppo.study.ablate.frontier import Cell, Frontier
from cppo.study.ablate.suite import Suite, SuiteReport
from cppo.study.statistics import Estimate
from cppo.study.tables import percent

#: With more rows than this the tables of all configurations are in table.md alone.
ROWS_SHOWN = 16


def matrix(
    title: str, corner: str, rows: Sequence[Any], columns: Sequence[Any], values: Sequence[Sequence[Any]]
) -> Cells:
    """A map; values: shares or None."""
    return Cells(
        title,
        (corner, *(f"{column:g}" for column in columns)),
        tuple((f"{row:g}", *map(_percent, line)) for row, line in zip(rows, values, strict=True)),
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def points(estimate: Estimate | None) -> str:
    """+3.1 [+0.2, +6.0], in percentage points."""
    if estimate is None or estimate.value is None:
        return "-"
    text = f"{100 * estimate.value:+.1f}"
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}]"


def course(suite: Suite, key: str, start: Mapping[Any, float], final: Mapping[str, Estimate]) -> Cells:
    """A row per rule, a column per value of the coordinate; first where they started (a mean over runs)."""
    values = suite.values(key)
    rows = [("before training", *(_percent(start.get(value)) for value in values))]
    for rule in suite.values("rule"):
        labels = {entry.at[key]: entry.label for entry in suite.where(rule=rule)}
        rows.append((rule, *(percent(final.get(labels[value])) for value in values)))
    return Cells(f"final Avg@k in % by {key}", ("", *map(str, values)), tuple(rows))


def over(title: str, key: str, values: Sequence[Any], by: Mapping[str, Mapping[Any, Estimate | None]]) -> Cells:
    """Differences: a row per rule, a column per value."""
    rows = tuple((rule, *(points(line[value]) for value in values)) for rule, line in by.items())
    return Cells(title, (key, *map(str, values)), rows)


def targets(suite: Suite, shares: Mapping[str, Sequence[float]], final: Mapping[str, Estimate]) -> Cells:
    """Measured masked fraction beside the target."""
    rows = []
    for entry in suite.entries:
        found = shares.get(entry.label, ())
        spread = f"{sum(found) / len(found):.2%}" if found else "-"
        if len(found) > 1:
            spread += f" ({min(found):.2%} to {max(found):.2%})"
        rows.append((entry.at["rule"], f"{entry.at['target']:.2%}", spread, percent(final.get(entry.label))))
    return Cells("final Avg@k in % at a share of masked tokens", ("", "target", "masked", "final"), tuple(rows))


def frontier(found: Frontier) -> list[Cells]:
    """What a rule stands, the mean over its map, and the maps."""
    columns = [f"M = {m}" for m in found.updates]
    rows = [(each.rule, *(_largest(each.largest[m], m in each.open) for m in found.updates)) for each in found.maps]
    largest = Cells("largest learning rate at which it still learns", ("", *columns), tuple(rows))
    means = tuple(
        (
            each.rule,
            percent(each.mean),
            "-" if each.difference is None else points(each.difference),
            f"{sum(bool(cell.learns) for cell in each.cells)} of {len(each.cells)}",
            str(len(each.by_seed)),
        )
        for each in found.maps
    )
    head = ("", "mean Avg@k, %", f"{found.reference} less it", "cells that learn", "seeds")
    maps = [
        Cells(
            f"{each.rule}: final Avg@k in % (+: learns, !: half or more collapsed, x: a run diverged, ?: runs missing)",
            ("learning rate", *columns),
            tuple(
                (f"{rate:g}", *(_cell(_at(each.cells, rate, m)) for m in found.updates))
                for rate in found.learning_rates
            ),
        )
        for each in found.maps
    ]
    return [largest, Cells("mean over the map, by seed", head, means), *maps]


def _at(cells: Sequence[Cell], rate: float, updates: int) -> Cell:
    return next(cell for cell in cells if (cell.learning_rate, cell.updates) == (rate, updates))


def _largest(rate: float | None, is_open: bool) -> str:
    if rate is None:
        return "?" if is_open else "none"
    return f"{'>= ' if is_open else ''}{rate:g}"


def marks(cell: Cell) -> str:
    """Signs for what a cell's figure does not say."""
    present = {"?": cell.missing, "x": cell.diverged, "+": cell.learns}
    text = "".join(sign for sign, there in present.items() if there)
    # of the runs that are there
    return text + ("!" if cell.learns is False and cell.half_collapsed else "")


def _cell(cell: Cell) -> str:
    return f"{_percent(cell.final)} {marks(cell)}".strip()


def frontier_notes(found: Frontier) -> list[str]:
    """What a reader must know to read the maps."""
    notes = [
        "Learns: the mean over seeds of final less starting Avg@k is above 0, and fewer than half of the runs "
        "collapsed. A run that diverged (NaN guard) counts 0 and as collapsed. '>=': the grid ends there, or larger "
        "ones have missing runs. The mean weighs all cells alike, so it belongs to this grid."
    ]
    if found.missing:
        notes.append(
            f"{len(found.missing)} runs are missing from the maps; a seed enters the mean over a map only with all of "
            f"its cells: {'; '.join(found.missing[:10])}{' ...' if len(found.missing) > 10 else ''}."
        )
    return notes


# -- drawing -----------------------------------------------------------------------------------------------------------


def markdown(report: SuiteReport) -> str:
    """A suite as Markdown: its own tables, then those of every study."""
    parts = [f"# {report.suite.name}: {report.suite.question}"]
    for table in report.tables:
        parts += [f"## {table.title}", table.markdown()]
    _, _, every = tables.markdown(report.results).partition("\n\n")  # without its heading
    return "\n\n".join([*parts, *report.notes, every])


def rich(report: SuiteReport) -> Group:
    """A suite for a terminal: its own tables, and those of every study unless they are long."""
    parts: list[Any] = [*(table.rich() for table in report.tables), *map(escape, report.notes)]
    if len(report.suite.entries) <= ROWS_SHOWN:
        parts.append(tables.rich_tables(report.results))
    else:
        parts.append(f"All {len(report.suite.entries)} configurations: {report.suite.name}/table.md")
    return Group(*parts)
