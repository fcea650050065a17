"""The stability frontier: how hard can each rule be pushed before training fails?

A grid of learning rates times updates per rollout batch (M), for each rule, each run from the same warm-up of its seed.
Of a run of seed s in cell (eta, M): f_s, its final Avg@k (mean of the benchmarks), and b_s, that before training.

* A run that ended for numbers that are not finite (the NaN guard's `NonFiniteError`, or a policy that could not be
  sampled from) has *diverged*: it has no policy to ship, so f_s = 0 and it counts as collapsed. To leave it out would
  reward a rule for failing. Runs that failed otherwise (memory, disk) or are not done say nothing of the rule: they
  are *missing*.
* A rule **learns** in a cell if no run is missing, the mean over seeds of f_s - b_s is above 0, and fewer than half of
  the runs collapsed (`cppo.study.results.collapse`, or diverged).
* The **largest learning rate** at M is the largest of the grid at which the rule learns, whatever the smaller ones do.
  It is open to above where that is the end of the grid or a larger one has missing runs.
* The **mean over the map** of seed s is the mean of f_s over all cells, which weighs the grid's cells alike; it needs
  all of them. Its interval is a bootstrap over seeds, and over the held-out problems where the runs have their scores
  (`mean_interval`); rules are compared by seed (`paired_difference`).
"""

from __future__ import annotations

import statistics as plain
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cppo.errors import UserError
from cppo.study.ablate.suite import RULE, RULES_COMPARED, Base, Options, Suite, stale
from cppo.study.results import MEAN, RunRecord
from cppo.study.statistics import Estimate, mean_interval, paired_difference

#: Times the recipe's learning rate.
FACTORS = (0.5, 1, 2, 4, 8)
UPDATES = (2, 4, 8, 16)


def frontier(base: Base, options: Options) -> Suite:
    """Learning rate x updates per rollout batch, for each rule."""
    rules = options.rules or RULES_COMPARED
    own = base.config.optimizer.learning_rate
    rates = options.learning_rates or tuple(float(f"{own * factor:.3g}") for factor in FACTORS)
    batch = base.config.rollout.prompts * base.config.rollout.responses
    updates = options.updates or tuple(m for m in UPDATES if batch % m == 0)
    for name, values in (("--rules", rules), ("--learning-rates", rates), ("--updates", updates)):
        if len(set(values)) < len(values):
            raise UserError(f"{name} has a value twice: {', '.join(map(str, values))}.")
    entries = [
        stale(
            base,
            f"{rule}, lr {rate:g}, M {m}",
            {"rule": rule, "learning_rate": rate, "updates": m},
            f"optimizer.learning_rate={rate!r}",
        )
        for rule in rules
        for rate in sorted(rates)
        for m in sorted(updates)
    ]
    return Suite("frontier", "How large a step does each rule stand?", tuple(entries))


#: What such a run says at its end: `cppo.training.callbacks.NonFiniteError`, and torch where it is to sample.
NOT_FINITE = ("NaN or infinite gradient", "probability tensor contains either `inf`, `nan`")


def diverged(record: RunRecord) -> bool:
    """Whether the run failed since its numbers were not finite."""
    return record.state == "failed" and any(text in (record.error or "") for text in NOT_FINITE)


def outcome(record: RunRecord) -> float | None:
    """Final Avg@k; 0 for a run that diverged; None for one that is missing."""
    return record.final[MEAN] if record.state == "finished" else 0.0 if diverged(record) else None


@dataclass(frozen=True)
class Cell:
    """One learning rate and M of one rule."""

    learning_rate: float
    updates: int
    final: float | None
    """Mean over the seeds that are there; None: none is."""
    gain: float | None
    """Mean of final less before."""
    collapsed: int
    """Runs, diverged ones included."""
    diverged: int
    missing: int
    learns: bool | None
    """None: runs are missing."""
    half_collapsed: bool
    """Half or more of the runs that are there collapsed."""


@dataclass(frozen=True)
class RuleMap:
    """The map of one rule."""

    rule: str
    cells: list[Cell]
    largest: dict[int, float | None]
    """M -> largest learning rate at which it learns; None: at none."""
    open: list[int]
    """M at which a larger one may do."""
    by_seed: dict[int, float]
    """Mean over the map, for the seeds that have all cells."""
    mean: Estimate
    difference: Estimate | None
    """The reference's mean over the map less this one's, by seed."""


@dataclass(frozen=True)
class Frontier:
    """All maps. reference: the rule whose mean the others are subtracted from."""

    maps: list[RuleMap]
    reference: str
    learning_rates: list[float]
    updates: list[int]
    missing: list[str]
    """Runs that are not in the maps, with their state."""

    def as_json(self) -> dict[str, Any]:
        """As plain types."""
        return asdict(self)


def read_frontier(suite: Suite, records: Sequence[RunRecord]) -> Frontier:
    """The maps of a suite. records: of all its runs, under the labels of its entries (`view`)."""
    by_label: dict[str, list[RunRecord]] = {entry.label: [] for entry in suite.entries}
    for record in records:
        by_label[record.variant].append(record)
    rules, rates, updates = (suite.values(key) for key in ("rule", "learning_rate", "updates"))
    reference = RULE if RULE in rules else rules[-1]
    cells_of = {rule: [by_label[entry.label] for entry in suite.where(rule=rule)] for rule in rules}
    problems = _problems(records)
    figures = {rule: _by_seed(cells_of[rule], problems) for rule in rules}
    maps = []
    for rule in rules:
        cells = [_cell(e.at["learning_rate"], e.at["updates"], by_label[e.label]) for e in suite.where(rule=rule)]
        largest, still_open = _largest(cells, updates)
        difference = None if rule == reference else paired_difference(figures[reference], figures[rule])
        mean = mean_interval(list(figures[rule].values()))
        numbers = {seed: float(np.mean([np.mean(scores) for scores in f])) for seed, f in figures[rule].items()}
        maps.append(RuleMap(rule, cells, largest, still_open, numbers, mean, difference))
    missing = [f"{record.name}: {record.state}" for record in records if outcome(record) is None]
    return Frontier(maps, reference, rates, updates, list(dict.fromkeys(missing)))


def _cell(rate: float, updates: int, records: Sequence[RunRecord]) -> Cell:
    known = [(record, value) for record in records if (value := outcome(record)) is not None]
    gains = [value - record.before.get(MEAN, 0.0) for record, value in known]
    gone = sum(diverged(record) for record, _ in known)
    collapsed = gone + sum(record.collapsed_at is not None for record, _ in known if not diverged(record))
    missing = len(records) - len(known)
    gain = plain.fmean(gains) if gains else None
    return Cell(
        rate,
        updates,
        plain.fmean(value for _, value in known) if known else None,
        gain,
        collapsed,
        gone,
        missing,
        None if missing or gain is None else gain > 0 and 2 * collapsed < len(known),
        bool(known) and 2 * collapsed >= len(known),
    )


def _largest(cells: Sequence[Cell], updates: Sequence[int]) -> tuple[dict[int, float | None], list[int]]:
    largest: dict[int, float | None] = {}
    still_open = []
    for m in updates:
        column = sorted((cell for cell in cells if cell.updates == m), key=lambda cell: cell.learning_rate)
        at = max((i for i, cell in enumerate(column) if cell.learns), default=None)
        largest[m] = None if at is None else column[at].learning_rate
        above = column if at is None else column[at + 1 :]
        if at == len(column) - 1 or any(cell.learns is None for cell in above):
            still_open.append(m)
    return largest, still_open


def _problems(records: Sequence[RunRecord]) -> dict[str, int]:
    """Benchmark -> number of held-out problems, where all finished runs have the scores of the same ones; else {}."""
    shapes = {
        tuple((name, len(scores)) for name, scores in record.final_problems.items())
        for record in records
        if record.state == "finished"
    }
    return dict(shapes.pop()) if len(shapes) == 1 else {}


def _by_seed(cells: Sequence[Sequence[RunRecord]], problems: Mapping[str, int]) -> dict[int, list[list[float]]]:
    """Seed -> mean over all cells of the scores of each problem, a list a benchmark as `mean_interval` takes them, for
    the seeds that have all cells. Without scores: one benchmark of one problem, the outcome.
    """
    found: dict[int, list[list[float]]] = {}
    for seed in sorted({record.seed for cell in cells for record in cell}):
        here = [record for cell in cells for record in cell if record.seed == seed]
        values = [value for record in here if (value := outcome(record)) is not None]
        if len(values) < len(cells):
            continue
        found[seed] = [[plain.fmean(values)]]
        if problems:  # a run that diverged has none: 0 on each
            totals = {name: np.zeros(count) for name, count in problems.items()}
            for record in here:
                for name, scores in record.final_problems.items():
                    totals[name] += scores
            found[seed] = [(total / len(here)).tolist() for total in totals.values()]
    return found
