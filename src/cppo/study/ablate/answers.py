"""What the suites of an ablation say: tables, `results.json` and figures, a folder a suite.

Every suite is read through `view`, so its scores, intervals and comparisons are those of `cppo compare`
(docs/compare.md). What this file adds are the tables of a question: a map, a course over the horizon, a frontier.
"""

from __future__ import annotations

import statistics as plain
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group
from rich.markup import escape

from cppo import files
from cppo.rules.base import HELD
from cppo.runs.folder import RunFolder
from cppo.runs.records import judged
from cppo.show.figures import save_figure
from cppo.study.ablate import figures, tables
from cppo.study.ablate.frontier import diverged, read_frontier
from cppo.study.ablate.suite import RULE, Suite, SuiteReport, suites_of, view
from cppo.study.plan import Plan
from cppo.study.results import MEAN, Results, RunRecord, read_results
from cppo.study.statistics import Estimate

RESULTS_FILE = "results.json"
TABLE_FILE = "table.md"
HARDLY = 0.02  # Avg@k before training under which there is next to nothing to reinforce
#: Shares of the loss tokens that together are what a rule held back or clamped.
HELD_SHARES = tuple(f"trust/{reason.key}_fraction" for reason in HELD)


def read_all(plan: Plan) -> list[SuiteReport]:
    """All suites of an ablation, as far as they have come."""
    return [read_suite(plan, suite) for suite in suites_of(plan)]


def write_all(plan: Plan) -> list[SuiteReport]:
    """Read all suites, and write `table.md` of all, and a folder a suite with its table, results and figures."""
    reports = read_all(plan)
    for report in reports:
        folder = plan.folder / report.suite.name
        files.atomic_write_json(folder / RESULTS_FILE, report.as_json())
        files.atomic_write_text(folder / TABLE_FILE, tables.markdown(report))
        for name, draw in report.drawings.items():
            save_figure(draw(), RunFolder(folder).plots, name)
    whole = "\n".join(tables.markdown(report) for report in reports)
    files.atomic_write_text(plan.folder / TABLE_FILE, whole)
    return reports


def shown(reports: Sequence[SuiteReport]) -> Group:
    """For a terminal."""
    parts: list[Any] = []
    for report in reports:
        parts += [f"\n[bold]{escape(report.suite.name)}: {escape(report.suite.question)}[/]", tables.rich(report)]
    return Group(*parts)


def is_result(error: str) -> bool:
    """Whether an error is a finding about the configuration and no failure of the study: the run diverged."""
    return diverged(RunRecord("", "", 0, "failed", error=error))


def read_suite(plan: Plan, suite: Suite) -> SuiteReport:
    """One suite, with the answer to its own question where it has one."""
    report = SuiteReport(suite, read_results(view(plan, suite)))
    answer = {
        "grid": _grid,
        "delta": _delta,
        "length": _over("length", "length of the chain"),
        "staleness": _over("updates", "updates per rollout batch"),
        "frontier": _frontier,
    }.get(suite.name, _parts)
    answer(plan, report)
    if any(record.state == "failed" and diverged(record) for record in report.results.records):
        report.notes.append(
            "A run that diverged (its numbers were not finite) has no policy to evaluate: it is listed as failed and "
            "is in no mean" + (" of other tables, but counts 0 in the maps." if suite.name == "frontier" else ".")
        )
    return report


def _parts(plan: Plan, report: SuiteReport) -> None:
    report.drawings["final"] = lambda: figures.dots(report.results, report.suite)
    report.drawings["difference"] = lambda: figures.dots(report.results, report.suite, difference=True)


def final_of(results: Results) -> dict[str, Estimate]:
    """Final Avg@k (mean of the benchmarks) by label, where a run is finished."""
    return {v.name: v.final[MEAN] for v in results.variants if v.seeds}


def _grid(plan: Plan, report: SuiteReport) -> None:
    suite, final = report.suite, final_of(report.results)
    rows, columns = suite.values("delta_b"), suite.values("w_min")
    at = {(e.at["delta_b"], e.at["w_min"]): final[e.label].value for e in suite.entries if e.label in final}
    matrix = [[at.get((b, w)) for w in columns] for b in rows]
    own = next(entry.at for entry in suite.entries if entry.label == suite.baseline)
    report.data = {"delta_b": rows, "w_min": columns, "final": matrix, "recipe": dict(own)}
    report.tables.append(tables.matrix("final Avg@k in %, mean over seeds", "delta_b \\ w_min", rows, columns, matrix))
    panel = figures.Panel("", matrix, outlined=[(rows.index(own["delta_b"]), columns.index(own["w_min"]))])
    texts = (
        figures.Axis(r"budget per token $\delta_b$", rows),
        figures.Axis("weight of the last token $w_{min}$", columns),
    )
    title = "Final Avg@k by budget and smallest weight (framed: the recipe's)"
    report.drawings["map"] = lambda: figures.maps([panel], *texts, title)


def measured(plan: Plan, label_of: Mapping[str, str]) -> dict[str, list[float]]:
    """Label -> for each run, the mean share of tokens held back or clamped, over its updates with tokens after its
    calibration; runs without such updates are left out.

    label_of: variant -> label.
    """
    found: dict[str, list[float]] = {}
    for run in plan.trained:
        label = label_of.get(str(run.variant))
        if label is None:
            continue
        calibration = getattr(run.config, "calibration", None)
        before = calibration.steps if calibration is not None else 0
        rows = [row for row in judged(RunFolder(plan.folder_of(run)).metrics()) if int(row["step"]) > before]
        shares = [sum(float(row.get(name) or 0.0) for name in HELD_SHARES) for row in rows]
        if shares:
            found.setdefault(label, []).append(plain.fmean(shares))
    return found


def _delta(plan: Plan, report: SuiteReport) -> None:
    suite, final = report.suite, final_of(report.results)
    shares = measured(plan, {e.variant: e.label for e in suite.entries})
    points = [
        {
            "rule": entry.at["rule"],
            "target": entry.at["target"],
            "masked": plain.fmean(shares[entry.label]) if entry.label in shares else None,
            "final": asdict(final[entry.label]) if entry.label in final else None,
        }
        for entry in suite.entries
    ]
    report.data = {"points": points}
    report.tables.append(tables.targets(suite, shares, final))
    report.notes.append(
        "Masked: the share of loss tokens that was held back or clamped after the calibration, mean of updates and "
        "seeds. Compare rules at the same measured share, not at the same target."
    )
    series = {
        rule: [(p["masked"], final[e.label]) for p, e in zip(points, suite.entries, strict=True)
               if e.at["rule"] == rule and p["masked"] and e.label in final]
        for rule in suite.values("rule")
    }  # fmt: skip
    text = "share of loss tokens held back (measured)", "final Avg@k"
    report.drawings["final"] = lambda: figures.lines(series, *text, "Rules at the same share of masked tokens", "share")


def _over(key: str, text: str) -> Callable[[Plan, SuiteReport], None]:
    """The answer of a suite over one coordinate: courses of the rules, and how far CPPO is ahead along it."""

    def answer(plan: Plan, report: SuiteReport) -> None:
        suite = report.suite
        rules, values = suite.values("rule"), suite.values(key)
        # value by value: lengths have held-out problems of their own, which intervals are over, too
        parts = [read_results(view(plan, suite, suite.where(**{key: value}))) for value in values]
        final = {label: estimate for part in parts for label, estimate in final_of(part).items()}
        if not report.results.problems and all(part.problems for part in parts):
            report.notes.append(f"Intervals of the tables above are over seeds and the problems of each {key}.")
        ahead = {} if RULE not in rules else {
            other: {value: _ahead(plan, suite, other, **{key: value}) for value in values}
            for other in rules if other != RULE
        }  # fmt: skip
        report.data = {
            "over": key,
            "ahead": {rule: {str(v): asdict(e) for v, e in by.items() if e is not None} for rule, by in ahead.items()},
        }
        start = starts(suite, key, report.results.records)
        report.data["before"] = {str(value): mean for value, mean in start.items()}
        report.tables.append(tables.course(suite, key, start, final))
        if low := [str(value) for value, mean in start.items() if mean < HARDLY]:
            report.notes.append(
                f"At {key} {', '.join(low)} hardly a problem is solved before training, so there is next to nothing to "
                "reinforce and rules cannot differ: raise warmup.steps."
            )
        if ahead:
            title = f"final Avg@k of {RULE} less that of the rule, in percentage points"
            report.tables.append(tables.over(title, key, values, ahead))
        courses = {
            rule: [(float(e.at[key]), final[e.label]) for e in suite.where(rule=rule) if e.label in final]
            for rule in rules
        }
        gaps = {
            f"{RULE} less {rule}": [(float(v), e) for v, e in by.items() if e is not None] for rule, by in ahead.items()
        }
        report.drawings["final"] = lambda: figures.lines(courses, text, "final Avg@k", f"Final Avg@k by {text}", "log2")
        if ahead:
            ahead_title = f"How far {RULE} is ahead, by {text}"
            report.drawings["ahead"] = lambda: figures.lines(
                gaps, text, "difference of final Avg@k", ahead_title, "log2", zero=True
            )

    return answer


def starts(suite: Suite, key: str, records: Sequence[RunRecord]) -> dict[Any, float]:
    """Value of a coordinate -> mean Avg@k before training of its runs, where there are any."""
    place = {entry.label: entry.at[key] for entry in suite.entries}
    found: dict[Any, list[float]] = {}
    for record in records:
        if MEAN in record.before:
            found.setdefault(place[record.variant], []).append(record.before[MEAN])
    return {value: plain.fmean(found[value]) for value in suite.values(key) if value in found}


def _ahead(plan: Plan, suite: Suite, other: str, **at: Any) -> Estimate | None:
    """Final Avg@k of CPPO less another rule's at some coordinates, by seed; None where one has no finished run."""
    mine, theirs = suite.where(rule=RULE, **at)[0], suite.where(rule=other, **at)[0]
    results = read_results(view(plan, suite, (mine, theirs), theirs.label))
    return results.variants[0].final_difference


def _frontier(plan: Plan, report: SuiteReport) -> None:
    found = read_frontier(report.suite, report.results.records)
    report.data = found.as_json()
    report.tables += tables.frontier(found)
    report.notes += tables.frontier_notes(found)
    report.drawings["frontier"] = lambda: figures.frontier(found)
