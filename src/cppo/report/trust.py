"""What the trust region did: masked tokens by reason, divergence by position, certificates; and a study's result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cppo.report.curves import Metric, chart_of, trust_charts
from cppo.report.source import Row, RunFiles, Source
from cppo.runs import charts
from cppo.runs.charts import REASONS, SPAN, by_position, by_step, curves_by_position, pool_positions, shares
from cppo.runs.records import judged
from cppo.show.charts import Bar, Chart, Layer, Line, Section
from cppo.study.results import MEAN, Results

SURROGATE = Metric(
    "surrogate",
    "Gain that the surrogate promises",
    "surrogate",
    "L', units of the reward",
    "At the last update of each rollout batch, with the mean reward of the prompt's other responses as baseline.",
)
RATIOS = Metric(
    "residual",
    "Bound of the surrogate's error",
    "ratios",
    "units of the reward",
    "From the ratios alone, so for every rule. Where it is below the gain, the policy has become better, as "
    "far as these responses go.",
    zero=True,
)


def trust_section(source: Source, relative: Chart | None) -> Section:
    """All of it; relative : the chart of the relative log-prob error (from the samples, `cppo.report.tokens`)."""
    curves = trust_charts(source)
    at = next((i for i, chart in enumerate(curves) if chart.name == "mismatch"), len(curves))
    found: list[Chart | None] = [*curves[:at], relative, *curves[at:]]
    if source.kind == "study":
        found += [_by_reason(source), *_positions_of_study(source)]
        found += [chart_of(source, metric, _certified(metric.key)) for metric in (SURROGATE, RATIOS)]
    else:
        run = source.runs[0]
        rows = run.rows("train")
        found += [charts.masked(rows), charts.within_batch(rows)]
        found += [charts.divergence(run.positions), charts.certificate(run.certificates)]
    lead = (
        "How far the policy has moved from the one that sampled the rollouts, which tokens the rule held back for it, "
        "and how far the surrogate can be trusted."
    )
    return Section("trust", "Trust region", lead, [chart for chart in found if chart is not None])


def result_chart(results: Results) -> Chart | None:
    """Best and final Avg@k of each variant with their intervals."""
    bars = []
    for slot, variant in enumerate(results.variants):
        for which in ("best", "final"):
            estimate = getattr(variant, which).get(MEAN)
            if estimate is not None and estimate.value is not None:
                bars.append(Bar(variant.name, slot, estimate.value, estimate.low, estimate.high, which))
    if not bars:
        return None
    k = results.samples or "k"
    return Chart(
        "result",
        f"Best and final Avg@{k}",
        "intervals",
        "",
        f"Avg@{k}, mean of the benchmarks",
        "percent",
        "Filled: the best evaluation within the budget. Hollow: after the last step. Lines are 95% intervals.",
        bars=tuple(bars),
    )


# -------------------------------------------------------------------------------------------------------------- reasons


def _judged(run: RunFiles) -> Sequence[Row]:
    """The rows of updates in which a rule had a token to judge."""
    return judged(run.rows("train"))


def _by_reason(source: Source) -> Chart | None:
    counted = {v: [shares(rows) for run in source.counted(v) if (rows := _judged(run))] for v in source.variants}
    variants = [v for v in source.variants if counted[v]]
    means = {v: {name: float(np.mean([s[name] for s in counted[v]])) for name in REASONS} for v in variants}
    layers = [
        Layer(REASONS[name], name, [means[v][name] for v in variants])
        for name in REASONS
        if any(means[v][name] > 0 for v in variants)
    ]
    if not layers:
        return None
    return Chart(
        "reasons",
        "Held back, by reason",
        "stack",
        "",
        "share of loss tokens",
        "percent",
        "Mean over the updates of finished runs that had a loss token. A clamped token is not dropped: its weight is "
        "bounded.",
        zero=True,
        layers=tuple(layers),
        x=variants,
    )


# ------------------------------------------------------------------------------------------------------------ positions


def _scored(run: RunFiles) -> list[dict[str, Any]]:
    return [row for row in run.positions if row.get("sum")]


def _positions_of_study(source: Source) -> list[Chart]:
    """Figure 2: mean and top-10% tail by position, over the last steps of the finished runs."""
    found: dict[str, list[Line]] = {"mean": [], "tail": []}
    for slot, variant in enumerate(source.variants):
        rows = [row for run in source.counted(variant) for row in _scored(run)[-SPAN:]]
        if not rows:
            continue
        both = curves_by_position(pool_positions(rows), max(int(row["width"]) for row in rows), variant, slot)
        for lines, line in zip(found.values(), both, strict=True):
            lines.append(replace(line, label=variant, dashed=False))
    titles = {"mean": "Divergence by position", "tail": "Its largest tenth, by position"}
    captions = {
        "mean": f"Mean D_t at a position of the response, last {SPAN} steps, last update of each, all finished seeds.",
        "tail": "Mean of the largest 10% of D_t at a position: the tail that a token limit sees.",
    }
    return [
        by_position(lines, name=f"position-{name}", title=titles[name], y_label="D_t", caption=captions[name])
        for name, lines in found.items()
        if lines
    ]


# --------------------------------------------------------------------------------------------------------- certificates


def _certified(key: str) -> Any:
    return lambda run: by_step(run.certificates, key)
