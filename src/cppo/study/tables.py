"""The tables of a study, for a terminal and as Markdown, from the same cells.

* one row per variant: best and final Avg@k, the comparison with the best of the others, collapses, cost (as the paper's
  Table 1, with intervals);
* one row per variant and a column per benchmark (as its Table 4), where there are several.
"""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Group
from rich.markup import escape

from cppo.show.progress import duration
from cppo.show.tables import Cells
from cppo.study.results import MEAN, Results, VariantSummary
from cppo.study.statistics import Estimate, attainable_coverage


def percent(estimate: Estimate | None) -> str:
    """52.3 [48.1, 56.6], in percent; - where there is nothing, no interval for one seed."""
    return _cell(estimate, lambda value: f"{100 * value:.1f}")


def _points(estimate: Estimate | None) -> str:
    return _cell(estimate, lambda value: f"{100 * value:+.1f}")


def share(estimate: Estimate | None) -> str:
    return _cell(estimate, lambda value: f"{value:.2f}")


def _cell(estimate: Estimate | None, form: Callable[[float], str]) -> str:
    if estimate is None or estimate.value is None:
        return "-"
    if estimate.low is None or estimate.high is None:
        return form(estimate.value)
    return f"{form(estimate.value)} [{form(estimate.low)}, {form(estimate.high)}]"


def cells(results: Results) -> list[Cells]:
    """The tables of a study."""
    k = results.samples or "k"
    main = Cells(
        f"{results.kind}: Avg@{k} in %, mean over seeds [95% interval]",
        ("", "seeds", f"best Avg@{k}", f"final Avg@{k}", "P(better) than"),
        tuple(map(_scores, results.variants)),
    )
    more = Cells(
        "differences in percentage points, and what it took",
        ("", "best, less that of", "final", "collapsed", "masked", "time per run"),
        tuple(map(_costs, results.variants)),
    )
    tables = [main, more]
    if len(results.benchmarks) > 1:
        names = (*results.benchmarks, MEAN)
        for which in ("best", "final"):
            rows = tuple(
                (variant.name, *(percent(getattr(variant, which).get(name)) for name in names))
                for variant in results.variants
            )
            tables.append(Cells(f"{which} Avg@{k} per benchmark, in %", ("", *names), rows))
    return tables


def _scores(variant: VariantSummary) -> tuple[str, ...]:
    done, planned = len(variant.seeds), len(variant.seeds) + len(variant.left_out)
    return (
        variant.name,
        str(done) if done == planned else f"{done} of {planned}",
        percent(variant.best.get(MEAN)),
        percent(variant.final.get(MEAN)),
        _against(variant, share(variant.improvement)),
    )


def _costs(variant: VariantSummary) -> tuple[str, ...]:
    return (
        variant.name,
        _against(variant, _points(variant.difference)),
        _points(variant.final_difference),
        f"{len(variant.collapsed)} of {len(variant.seeds)}" if variant.seeds else "-",
        "-" if variant.masked_fraction is None else f"{variant.masked_fraction:.1%}",
        "-" if variant.seconds is None else duration(variant.seconds),
    )


def _against(variant: VariantSummary, text: str) -> str:
    return text if text == "-" else f"{text} {variant.compared_with}"


def notes(results: Results) -> list[str]:
    """What a reader must know to read the tables."""
    found = [
        "Best: the evaluation with the highest mean within the budget, its benchmarks at that step. P(better): the "
        "probability that a run has a higher best Avg@k than one of the configuration named there; differences are by "
        f"seed. {_intervals(results)}"
    ]
    counts = {len(variant.seeds) for variant in results.variants if variant.seeds}
    if counts and min(counts) < 2:
        found.append("One seed has no interval: what it shows may be chance.")
    elif counts and min(counts) < 5:
        most = attainable_coverage(min(counts))
        found.append(
            f"With {min(counts)} seeds an interval from the seen values covers the mean in {most:.0%} of cases at "
            "most, not in 95%: take five or more."
        )
    if left := [text for variant in results.variants for text in variant.left_out]:
        found.append("NOT COMPLETE, left out of all figures: " + "; ".join(left) + ".")
    if collapsed := [text for variant in results.variants for text in variant.collapsed]:
        found.append(
            "Collapsed (the reward fell under half of its best and stayed there): " + ", ".join(collapsed) + "."
        )
    if results.unmatched:
        found.append(
            f"WARNING: runs of seed {', '.join(map(str, results.unmatched))} did not start with the same accuracy, so "
            "they are not matched."
        )
    return found


def _intervals(results: Results) -> str:
    if not results.problems:
        return "Intervals are over seeds, on the same held-out problems."
    shown = ", ".join(f"{count} of {name}" for name, count in results.problems.items())
    return f"Intervals are over seeds and held-out problems ({shown}), which all runs share."


def rich_tables(results: Results) -> Group:
    """For a terminal."""
    return Group(*(table.rich() for table in cells(results)), *map(escape, notes(results)))


def markdown(results: Results) -> str:
    """The same as Markdown."""
    parts = [f"# {results.kind}"]
    for table in cells(results):
        parts += [f"## {table.title}", table.markdown()]
    rules = [f"- {variant.name}: {variant.rule}" for variant in results.variants if variant.rule]
    if rules:
        parts += ["## What was run", "\n".join(rules)]
    return "\n\n".join([*parts, *notes(results)]) + "\n"
