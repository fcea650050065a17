"""What the runs of a study gave, read from their folders, and what it says a variant.

`read_run` looks at one run folder (docs/runs.md), whatever has become of it; `summarise` puts those of a plan together.
Only finished runs enter the statistics: a run half way has not had the budget of the others. What is left out is
counted and shown, since runs that fail are seldom a rule's best.
"""

from __future__ import annotations

import math
import statistics as plain
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from cppo.runs.calibration import rule_as_run
from cppo.runs.folder import RunFolder
from cppo.runs.records import best_evaluation, judged
from cppo.runs.summary import STEP_TIME
from cppo.study.plan import Plan, PlannedRun
from cppo.study.statistics import Estimate, Figure, mean_interval, paired_difference, probability_of_improvement
from cppo.study.status import read_errors

WINDOW = 5  # steps of the running mean in which a collapse is looked for
MEAN = "mean"


@dataclass
class RunRecord:
    """One run: where it stands, and its figures as far as it has come."""

    name: str
    variant: str
    seed: int
    state: str
    """"finished", "failed", "in progress" or "not started"."""
    step: int = 0
    steps: int = 0
    error: str | None = None
    """The last error line of a run that failed."""
    samples: int | None = None
    """k of Avg@k."""
    before: dict[str, float] = field(default_factory=dict)
    """Avg@k at step 0 a benchmark, and "mean" over them."""
    best: dict[str, float] = field(default_factory=dict)
    """The same at the evaluation whose mean is highest."""
    best_step: int | None = None
    final: dict[str, float] = field(default_factory=dict)
    """The same after the last step."""
    best_problems: dict[str, list[float]] = field(default_factory=dict)
    """Benchmark -> mean score of each problem, at the best evaluation; empty where the run does not have them."""
    final_problems: dict[str, list[float]] = field(default_factory=dict)
    """The same after the last step."""
    rewards: list[float | None] = field(default_factory=list)
    """Mean training reward of each step."""
    collapsed_at: int | None = None
    """The step from which the reward stays collapsed; None: it does not. See `collapse`."""
    masked_fraction: float | None = None
    """Mean over the updates that had a loss token."""
    seconds: float = 0.0
    """Rollouts, updates and evaluations, of what was kept; work that a kill has lost is not in it."""


def collapse(rewards: Sequence[float | None], window: int = WINDOW) -> int | None:
    """The step (from 1) at which a run collapsed, or None.

    m_s is the mean reward of the last `window` steps (fewer than `window` steps: no m_s, so no verdict), and b_s the
    largest m_j, j <= s. A run has collapsed if m_s < b_s / 2 for the last `window` steps or more, to the very end; the
    step is the first of that stretch. A dip from which it recovers is not a collapse, nor is a run that never learned.
    Rewards must be such that half of them means something: where b_s is not above 0 there is no collapse.

    `rewards` : [S], a number per step; None or NaN (a step whose row has no reward) counts as the one before.
    """
    known: list[float] = []
    for reward in rewards:
        good = reward is not None and math.isfinite(reward)
        known.append(float(reward) if good and reward is not None else (known[-1] if known else 0.0))
    if len(known) < 2 * window:
        return None
    m = np.lib.stride_tricks.sliding_window_view(np.array(known), window).mean(-1)  # m[i] belongs to step i + window
    b = np.maximum.accumulate(m)
    low = (b > 0) & (m < b / 2)
    stretch = len(low) if low.all() else int(np.argmin(low[::-1]))
    return len(known) - stretch + 1 if stretch >= window else None


def read_run(plan: Plan, run: PlannedRun, error: str | None = None) -> RunRecord:
    """The record of a run. Never raises for what lies in the folder: a file that cannot be read is a failed run."""
    steps = run.config.steps
    record = RunRecord(run.name, str(run.variant), run.seed, "not started", steps=steps, error=error)
    folder = RunFolder(plan.folder_of(run))
    try:
        rows, problems = folder.metrics(), folder.problems()
    except (OSError, ValueError) as problem:
        record.state, record.error = "failed", str(problem)
        return record
    evaluations = [row for row in rows if row.get("kind") == "evaluation" and row.get("avg/mean") is not None]
    trained = [row for row in rows if row.get("kind") == "train"]
    record.step = max((int(row["step"]) for row in trained), default=0)
    for row in evaluations:
        record.samples = int(row["samples"]) if row.get("samples") else record.samples
        if row["step"] == 0:
            record.before = _scores(row)
        if row["step"] == steps:
            record.final = _scores(row)
    if (best := best_evaluation(evaluations)) is not None:
        record.best, record.best_step = _scores(best), int(best["step"])
        record.best_problems = problems.get(record.best_step, {})
        record.final_problems = problems.get(steps, {}) if record.final else {}
    record.rewards = _curve(trained, record.step)
    record.collapsed_at = collapse(record.rewards)
    masked = [row["trust/masked_fraction"] for row in judged(trained)]
    record.masked_fraction = plain.fmean(masked) if masked else None
    clocks = [row.get(STEP_TIME) for row in trained] + [row.get("time/evaluation") for row in evaluations]
    record.seconds = float(sum(seconds for seconds in clocks if seconds is not None))
    if record.final:
        record.state = "finished"
    elif error is not None:
        record.state = "failed"
    elif rows or folder.exists:
        record.state = "in progress"
    return record


def _scores(row: Mapping[str, Any]) -> dict[str, float]:
    found = {
        key.removeprefix("avg/"): float(row[key]) for key in row if key.startswith("avg/") and row[key] is not None
    }
    return {name: found[name] for name in sorted(found, key=lambda name: name == MEAN)}


def _curve(trained: Sequence[Mapping[str, Any]], last: int) -> list[float | None]:
    by_step: dict[int, list[float]] = defaultdict(list)
    for row in trained:
        if row.get("reward") is not None:
            by_step[int(row["step"])].append(float(row["reward"]))
    return [plain.fmean(by_step[step]) if by_step[step] else None for step in range(1, last + 1)]


@dataclass
class VariantSummary:
    """What the finished runs of one variant say. Keys of `best`, `final`: benchmarks, then "mean"."""

    name: str
    seeds: list[int]
    """Of the finished runs."""
    left_out: list[str]
    """Runs that are not in the figures, each with its state."""
    best: dict[str, Estimate]
    final: dict[str, Estimate]
    compared_with: str | None
    """The baseline of the two below: as asked, else the other variant with the highest mean of best Avg@k."""
    improvement: Estimate | None
    """Probability that a run has a higher best Avg@k (mean of the benchmarks) than one of the baseline."""
    difference: Estimate | None
    """Best Avg@k less the baseline's, by seed."""
    final_improvement: Estimate | None
    """As `improvement`, of the final Avg@k, against the same baseline."""
    final_difference: Estimate | None
    collapsed: list[str]
    """Finished runs whose reward collapsed, with the step."""
    masked_fraction: float | None
    seconds: float | None
    """Mean of the runs."""
    rule: str = ""
    """The trust region with all parameters, as it was run."""


@dataclass
class Results:
    """A study as far as it has come."""

    kind: str
    records: list[RunRecord]
    variants: list[VariantSummary]
    benchmarks: list[str]
    samples: int | None
    unmatched: list[int]
    """Seeds whose runs did not start with the same accuracy, although they share their start."""
    problems: dict[str, int] = field(default_factory=dict)
    """Benchmark -> held-out problems that the intervals are over, beside the seeds; empty: over seeds alone."""

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain types."""
        return asdict(self)

    @property
    def complete(self) -> bool:
        """Whether every run is finished."""
        return all(record.state == "finished" for record in self.records)


def read_results(plan: Plan, errors: Mapping[str, str] | None = None) -> Results:
    """Read all run folders of a study; `errors`: of failed runs by name (default: those in its `status.json`)."""
    errors = read_errors(plan.folder) if errors is None else errors
    records = [read_run(plan, run, errors.get(run.name)) for run in plan.trained]
    results = summarise(plan.kind, [variant.name for variant in plan.variants], records, plan.baseline)
    for variant in results.variants:
        runs = [run for run in plan.trained if run.variant == variant.name]
        variant.rule = rule_as_run(runs[0].config.rule, [plan.folder_of(run) for run in runs])
    return results


def summarise(kind: str, names: Sequence[str], records: Sequence[RunRecord], baseline: str | None = None) -> Results:
    """Statistics of the finished runs of each variant, in the order of `names`."""
    done = {name: {r.seed: r for r in records if r.variant == name and r.state == "finished"} for name in names}
    finished = [record for runs in done.values() for record in runs.values()]
    benchmarks = list(dict.fromkeys(key for record in finished for key in record.final if key != MEAN))
    problems = _shared_problems(finished, benchmarks)
    means = {name: plain.fmean(r.best[MEAN] for r in done[name].values()) for name in names if done[name]}
    starts: dict[int, set[tuple[float, ...]]] = defaultdict(set)
    for record in records:
        if record.before:
            starts[record.seed].add(tuple(record.before.values()))
    variants = []
    for name in names:
        others = {other: mean for other, mean in means.items() if other != name}
        rival = baseline if baseline is not None else max(others, key=lambda other: others[other], default=None)
        variants.append(_variant(name, records, done, benchmarks, None if rival == name else rival, bool(problems)))
    samples = next((record.samples for record in finished if record.samples), None)
    unmatched = sorted(seed for seed, found in starts.items() if len(found) > 1)
    return Results(kind, list(records), variants, benchmarks, samples, unmatched, problems)


def _shared_problems(finished: Sequence[RunRecord], benchmarks: Sequence[str]) -> dict[str, int]:
    """Benchmark -> number of problems, where all finished runs have the scores of the same number; else {}."""
    counts = {
        tuple((name, len(scores.get(name, ()))) for name in benchmarks)
        for run in finished
        for scores in (run.best_problems, run.final_problems)
    }
    only = counts.pop() if len(counts) == 1 else ()
    return dict(only) if all(number for _, number in only) else {}


def _figure(run: RunRecord, which: str, key: str, by_problem: bool) -> Figure:
    """What `statistics` takes for a run: its number, or the scores of the problems behind it."""
    if not by_problem:
        return float(getattr(run, which)[key])
    scores = getattr(run, f"{which}_problems")
    return list(scores.values()) if key == MEAN else [scores[key]]


def _variant(
    name: str,
    records: Sequence[RunRecord],
    done: Mapping[str, Mapping[int, RunRecord]],
    benchmarks: Sequence[str],
    rival: str | None,
    by_problem: bool,
) -> VariantSummary:
    runs = done[name]
    best, final = (
        {
            key: mean_interval([_figure(r, which, key, by_problem) for r in runs.values() if key in getattr(r, which)])
            for key in (*benchmarks, MEAN)
        }
        for which in ("best", "final")
    )
    compared: dict[str, tuple[Estimate, Estimate]] = {}
    if rival is not None and runs and done.get(rival):
        for which in ("best", "final"):
            mine, theirs = (
                {seed: _figure(r, which, MEAN, by_problem) for seed, r in done[v].items()} for v in (name, rival)
            )
            compared[which] = probability_of_improvement(mine, theirs), paired_difference(mine, theirs)
    improvement, difference = compared.get("best", (None, None))
    final_improvement, final_difference = compared.get("final", (None, None))
    masked = [r.masked_fraction for r in runs.values() if r.masked_fraction is not None]
    return VariantSummary(
        name=name,
        seeds=sorted(runs),
        left_out=[f"{r.name}: {_state(r)}" for r in records if r.variant == name and r.state != "finished"],
        best=best,
        final=final,
        compared_with=rival,
        improvement=improvement,
        difference=difference,
        final_improvement=final_improvement,
        final_difference=final_difference,
        collapsed=[f"{r.name} (step {r.collapsed_at})" for r in runs.values() if r.collapsed_at is not None],
        masked_fraction=plain.fmean(masked) if masked else None,
        seconds=plain.fmean(r.seconds for r in runs.values()) if runs else None,
    )


def _state(record: RunRecord) -> str:
    if record.state == "in progress":
        return f"in progress, step {record.step} of {record.steps}"
    return record.state + (f": {record.error}" if record.error else "")
