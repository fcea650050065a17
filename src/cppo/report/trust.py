"""What the trust region did: masked tokens by reason, divergence by position, certificates; and a study's result."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from cppo.report.charts import Bar, Chart, Layer, Line, Section
from cppo.report.curves import Metric, by_step, chart_of, trust_charts
from cppo.report.source import Row, RunFiles, Source
from cppo.runs.plots import FEW_TOKENS, REASONS, pool_positions
from cppo.runs.records import judged
from cppo.study.results import MEAN, Results

#: Steps at the start and at the end of a run that divergence by position is pooled over.
SPAN = 5
#: Bars over the steps of one run at most.
MOST_BARS = 60

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
    charts = trust_charts(source)
    at = next((i for i, chart in enumerate(charts) if chart.name == "mismatch"), len(charts))
    found: list[Chart | None] = [*charts[:at], relative, *charts[at:]]
    if source.kind == "study":
        found += [_by_reason(source), *_positions_of_study(source)]
        found += [chart_of(source, metric, _certified(metric.key)) for metric in (SURROGATE, RATIOS)]
    else:
        run = source.runs[0]
        found += [_over_steps(run), _within_batch(run), _positions_of_run(run), _certificate(run)]
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


def _shares(rows: Sequence[Row]) -> dict[str, float]:
    """Mean over updates, one at least, of the share of each reason."""
    return {name: sum(float(row.get(f"trust/{name}_fraction") or 0) for row in rows) / len(rows) for name in REASONS}


def _by_reason(source: Source) -> Chart | None:
    counted = {v: [_shares(rows) for run in source.counted(v) if (rows := _judged(run))] for v in source.variants}
    variants = [v for v in source.variants if counted[v]]
    means = {v: {name: float(np.mean([s[name] for s in counted[v]])) for name in REASONS} for v in variants}
    layers = [
        Layer(REASONS[name][0], name, [means[v][name] for v in variants])
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


def _over_steps(run: RunFiles) -> Chart | None:
    curves = {name: by_step(_judged(run), f"trust/{name}_fraction") for name in REASONS}
    steps = sorted({step for curve in curves.values() for step in curve})
    shown = [name for name in REASONS if any(curves[name].values())]
    if not steps or not shown:
        return None
    width = math.ceil(len(steps) / MOST_BARS)
    parts = [steps[at : at + width] for at in range(0, len(steps), width)]
    labels = [str(part[0]) if width == 1 else f"{part[0]}-{part[-1]}" for part in parts]
    layers = [
        Layer(REASONS[n][0], n, [float(np.mean([curves[n].get(step, 0.0) for step in part])) for part in parts])
        for n in shown
    ]
    return Chart(
        "reasons",
        "Held back, by reason",
        "stack",
        "step" + (f" (means of {width})" if width > 1 else ""),
        "share of loss tokens",
        "percent",
        "Mean over the updates of a step. A clamped token counts here although it is not dropped.",
        zero=True,
        layers=tuple(layers),
        x=labels,
    )


def _within_batch(run: RunFiles) -> Chart | None:
    """Mean share by the update inside the rollout batch: later updates are further from the rollout policy."""
    by_update: dict[int, list[Row]] = defaultdict(list)
    first: dict[int, int] = {}
    for logged in run.rows("train"):
        first.setdefault(int(logged["step"]), int(logged["update"]))
    for row in _judged(run):
        by_update[int(row["update"]) - first[int(row["step"])] + 1].append(row)
    shares = {update: _shares(rows) for update, rows in sorted(by_update.items())}
    shown = [name for name in REASONS if any(found[name] > 0 for found in shares.values())]
    if len(shares) < 2 or not shown:
        return None
    layers = [Layer(REASONS[n][0], n, [found[n] for found in shares.values()]) for n in shown]
    return Chart(
        "within",
        "The same, by update of a rollout batch",
        "stack",
        "update of the same rollout batch",
        "share of loss tokens",
        "percent",
        "The first update starts from the rollout policy itself; each one moves further away.",
        zero=True,
        layers=tuple(layers),
        x=[str(update) for update in shares],
    )


# ------------------------------------------------------------------------------------------------------------ positions


def _pooled(rows: Sequence[Row]) -> dict[str, list[float]]:
    """x, mean and tail of pooled rows, without buckets of a few tokens."""
    pooled = pool_positions(rows)
    count = pooled["count"]
    keep = (count >= min(FEW_TOKENS, count.max(initial=0))) & (count > 0)
    width = max(int(row["width"]) for row in rows)
    return {
        "x": (pooled["position"][keep] + (width - 1) / 2).tolist(),
        "mean": pooled["mean"][keep].tolist(),
        "tail": pooled["tail_mean"][keep].tolist(),
    }


def _scored(run: RunFiles) -> list[dict[str, Any]]:
    return [row for row in run.positions if row.get("sum")]


def _positions_of_study(source: Source) -> list[Chart]:
    """Figure 2: mean and top-10% tail by position, over the last steps of the finished runs."""
    found: dict[str, list[Line]] = {"mean": [], "tail": []}
    for slot, variant in enumerate(source.variants):
        rows = [row for run in source.counted(variant) for row in _scored(run)[-SPAN:]]
        if not rows:
            continue
        pooled = _pooled(rows)
        for name, lines in found.items():
            lines.append(Line(variant, slot, pooled["x"], pooled[name]))
    titles = {"mean": "Divergence by position", "tail": "Its largest tenth, by position"}
    captions = {
        "mean": f"Mean D_t at a position of the response, last {SPAN} steps, last update of each, all finished seeds.",
        "tail": "Mean of the largest 10% of D_t at a position: the tail that a token limit sees.",
    }
    return [
        _position_chart(f"position-{name}", titles[name], captions[name], lines)
        for name, lines in found.items()
        if lines
    ]


def _positions_of_run(run: RunFiles) -> Chart | None:
    rows = _scored(run)
    if not rows:
        return None
    span = max(1, min(SPAN, len(rows) // 2))
    groups = [rows[:span], rows[-span:]] if len(rows) > 1 else [rows]
    lines = []
    for slot, group in enumerate(groups):
        pooled = _pooled(group)
        first, last = int(group[0]["step"]), int(group[-1]["step"])
        label = f"step {first}" if first == last else f"steps {first}-{last}"
        lines.append(Line(f"{label}: mean", slot, pooled["x"], pooled["mean"]))
        lines.append(Line(f"{label}: largest tenth", slot, pooled["x"], pooled["tail"], dashed=True))
    caption = "D_t at a position of the response, last update of each step: mean, and mean of the largest 10%."
    return _position_chart("position", "Divergence by position", caption, lines)


def _position_chart(name: str, title: str, caption: str, lines: Sequence[Line]) -> Chart:
    return Chart(
        name,
        title,
        "lines",
        "position in the response (loss tokens)",
        "D_t",
        caption=caption,
        zero=True,
        lines=tuple(lines),
    )


# --------------------------------------------------------------------------------------------------------- certificates


def _certified(key: str) -> Any:
    return lambda run: by_step(run.certificates, key)


def _certificate(run: RunFiles) -> Chart | None:
    lines = []
    for slot, (key, label) in enumerate(
        (
            ("surrogate", "gain of the surrogate, L'"),
            ("ratios", "bound of its error, from the ratios"),
            ("pathwise", "bound of its error, from the divergences"),
            ("product", "product form of Prop. 4"),
        )
    ):
        value, low, high = (by_step(run.certificates, f"{key}{end}") for end in ("", "_low", "_high"))
        if value:
            steps = list(value)
            ends = [[end.get(step) for step in steps] for end in (low, high)]
            whole = all(x is not None for end in ends for x in end)
            band = ends if whole else [None, None]
            lines.append(Line(label, slot, steps, list(value.values()), band[0], band[1]))
    if not lines:
        return None
    certified = run.certificates[-1].get("certified")
    caption = "After every rollout batch; bands are 95% intervals by bootstrap over prompts."
    if not certified and len(lines) > 2:
        caption += " D_t is a lower bound of the exact divergence here, so the bounds from it are no certificates."
    return Chart(
        "certificate",
        "How far the surrogate can be trusted",
        "lines",
        "step",
        "units of the reward",
        caption=caption,
        scale="symlog",
        lines=tuple(lines),
        reference=0.0,
    )
