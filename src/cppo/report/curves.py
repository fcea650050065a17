"""Curves over the steps of training: of one run as they are, of a study a line per variant with an interval over seeds.

The band at a step is the percentile bootstrap of the mean over the finished runs' seeds, at the expanded level of
`cppo.study.statistics` (95%); of two seeds it is simply the range. Long runs are drawn in at most `POINTS` equal
parts, each the mean of its steps, the same parts for all runs.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from cppo.report.source import RunFiles, Source
from cppo.runs.charts import by_step, reward
from cppo.runs.records import benchmarks, judged
from cppo.show.charts import Chart, Line, Section, Thin
from cppo.study.statistics import expanded_level

Array = NDArray[np.float64]
Curve = dict[int, float]
"""A figure by step."""

#: Points of a line at most; with many runs fewer, so that the page stays small.
POINTS, LEAST_POINTS, ALL_POINTS = 240, 40, 60_000
#: Variants beyond which single seeds are left out: their lines would hide the means.
MOST_WITH_SEEDS = 12
#: Resamples of a band: an end of it moves by less than a line's width.
RESAMPLES = 1999


@dataclass(frozen=True)
class Metric:
    """A column of metrics.jsonl, and how it is drawn."""

    name: str
    title: str
    key: str
    y_label: str
    caption: str
    form: str = "number"
    scale: str = "linear"
    zero: bool = False


REWARD = Metric("reward", "Training reward", "reward", "mean reward", "Mean reward of the rollouts of a step.")
TRAINING = (
    REWARD,
    Metric(
        "length",
        "Response length",
        "completions/mean_length",
        "tokens",
        "Mean tokens of a response in the rollouts of a step.",
    ),
    Metric("entropy", "Entropy", "entropy", "nats per token", "Of the policy at sampled tokens, mean of the updates."),
)
TRUST = (
    Metric(
        "masked",
        "Masked fraction",
        "trust/masked_fraction",
        "share of loss tokens",
        "Loss tokens with coefficient 0, mean of the updates of a step; none where all rewards were equal. cispo and "
        "minpro clamp and mask nothing.",
        "percent",
        zero=True,
    ),
    Metric(
        "drift",
        "Divergence from the rollout policy",
        "trust/divergence_mean",
        "mean D_t",
        "Mean over loss tokens and the updates of a step. Rules of the ratio alone measure none; rules may measure "
        "different divergences.",
        zero=True,
    ),
    Metric(
        "mismatch",
        "Mismatch before the first update",
        "trust/first_update_divergence",
        "mean D_t",
        "Sampler and trainer still have the same weights there, so this is numerical noise between the two.",
        scale="log",
    ),
)


def points_of(source: Source) -> int:
    """Points of a line, for the size of the page."""
    return max(LEAST_POINTS, min(POINTS, ALL_POINTS // (8 * max(1, len(source.runs)))))


def thinned(curves: Sequence[Curve], points: int) -> list[Curve]:
    """The same curves in at most `points` equal parts of the steps, each at the mean step and value of its part."""
    last = max((step for curve in curves for step in curve), default=0)
    most = max((len(curve) for curve in curves), default=0)
    if most <= points:
        return list(curves)
    width = math.ceil((last + 1) / points)
    found = []
    for curve in curves:
        parts: dict[int, list[float]] = defaultdict(list)
        for step, value in curve.items():
            parts[step // width].append(value)
        found.append({part * width + width // 2: sum(v) / len(v) for part, v in sorted(parts.items())})
    return found


def band(values: Array) -> tuple[Array, Array]:
    """Ends of the 95% interval of the mean over seeds. values : ``[seeds >= 2, steps]``; two of ``[steps]``."""
    count = len(values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # all seeds equal: both ends are that value
        interval = stats.bootstrap(
            (values,),
            np.mean,
            axis=0,
            n_resamples=RESAMPLES,
            method="percentile",
            confidence_level=expanded_level(count, resamples=RESAMPLES),
            rng=np.random.default_rng(0),
            batch=200,
        ).confidence_interval
    return np.asarray(interval.low), np.asarray(interval.high)


def line_of(source: Source, variant: str, read: Callable[[RunFiles], Curve], points: int) -> Line | None:
    """The line of a variant: mean over its counted runs at the steps that all of them have, band, each run thin."""
    counted = {run.name for run in source.counted(variant)}
    named = [(run, read(run)) for run in source.of(variant)]
    named = [(run, curve) for run, curve in named if curve]
    drawn = thinned([curve for _, curve in named], points)
    curves = list(zip((run for run, _ in named), drawn, strict=True))
    means = [curve for run, curve in curves if run.name in counted]
    if not means:
        return None
    steps = sorted(set.intersection(*(set(curve) for curve in means)))
    values = np.array([[curve[step] for step in steps] for curve in means])
    low: Array | None = None
    high: Array | None = None
    if len(means) > 1 and steps:
        low, high = band(values)
    thin = tuple(Thin(run.name, list(curve), list(curve.values()), run.state == "finished") for run, curve in curves)
    return Line(
        label=variant,
        slot=source.variants.index(variant),
        x=steps,
        y=values.mean(0).tolist(),
        low=None if low is None else low.tolist(),
        high=None if high is None else high.tolist(),
        thin=thin if len(thin) > 1 and len(source.variants) <= MOST_WITH_SEEDS else (),
    )


def chart_of(source: Source, metric: Metric, read: Callable[[RunFiles], Curve]) -> Chart | None:
    """A chart with a line per variant; None where no run has any figure."""
    points = points_of(source)
    lines = [line for variant in source.variants if (line := line_of(source, variant, read, points)) is not None]
    if not lines:
        return None
    return Chart(
        name=metric.name,
        title=metric.title,
        kind="lines",
        x_label="step",
        y_label=metric.y_label,
        form=metric.form,
        caption=metric.caption,
        scale=_scale(metric.scale, lines),
        zero=metric.zero,
        lines=tuple(lines),
    )


def _scale(wanted: str, lines: Sequence[Line]) -> str:
    """A logarithmic scale only where there is something to spread, and nothing that it cannot show."""
    values = [y for line in lines for y in line.y if y is not None]
    wide = len(values) > 0 and min(values) > 0 and max(values) > 10 * min(values)
    return wanted if wanted != "log" or wide else "linear"


def training_charts(source: Source) -> Section:
    """Reward, Avg@k of each benchmark and their mean, response length, entropy."""
    first = reward(source.runs[0].metrics) if source.kind == "run" else _from_training(source, REWARD)
    charts = [first, *_accuracies(source), *(_from_training(source, m) for m in TRAINING[1:])]
    lead = (
        "A line is the mean over the finished seeds, its band the 95% bootstrap interval of that mean; "
        "thin lines are single seeds."
        if source.kind == "study"
        else "One run: there is no interval without other seeds."
    )
    return Section("training", "Training", lead, [chart for chart in charts if chart is not None])


def trust_charts(source: Source) -> list[Chart]:
    """Masked fraction, divergence, mismatch by step."""
    found = (_from_training(source, metric) for metric in TRUST)
    return [chart for chart in found if chart is not None]


def _from_training(source: Source, metric: Metric) -> Chart | None:
    def read(run: RunFiles) -> Curve:
        rows = run.rows("train")
        return by_step(rows if metric in TRAINING else judged(rows), metric.key)

    return chart_of(source, metric, read)


def _accuracies(source: Source) -> list[Chart]:
    evaluations = [row for run in source.runs for row in run.rows("evaluation")]
    names = benchmarks(evaluations)
    counts = sorted({int(row["samples"]) for row in evaluations if row.get("samples")})
    k = counts[0] if len(counts) == 1 else "k"
    found: list[Chart | None] = []
    for at, name in enumerate(["mean", *names] if len(names) > 1 else names):
        what = "mean of the benchmarks" if name == "mean" else name
        caption = f"Share of right answers over the samples of the held-out problems, {what}."
        if len(counts) > 1:
            caption += f" Samples per problem: {', '.join(map(str, counts))}, so points differ in noise."
        file = _file_name(name)  # two names may become one
        file += f"-{at}" if any(chart is not None and chart.name == f"avg-{file}" for chart in found) else ""
        metric = Metric(f"avg-{file}", f"Avg@{k}: {what}", f"avg/{name}", f"Avg@{k}", caption, "percent")
        chart = chart_of(source, metric, lambda run, key=metric.key: by_step(run.rows("evaluation"), key))  # type: ignore[misc]
        found.append(chart)
    return [chart for chart in found if chart is not None]


def _file_name(text: str) -> str:
    return "".join(char if char.isalnum() or char in "-_" else "-" for char in text)
