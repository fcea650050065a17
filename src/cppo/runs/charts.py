"""The curves of one run as `Chart`s, from the rows of its .jsonl files: its plots and its report draw the same ones."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cppo.rules.base import HELD
from cppo.runs.records import benchmarks, judged
from cppo.show.charts import Chart, Layer, Line, Thin

Row = Mapping[str, Any]

#: Held-back reasons in stacking order, as they are called in figures.
REASONS = {reason.key: reason.key.replace("_", " ") for reason in HELD}
#: A mean of fewer tokens says little: such buckets are left out where others have more.
FEW_TOKENS = 10
#: Steps at the start and at the end of a run that divergence by position is pooled over.
SPAN = 5
#: Bars over the steps of a run at most.
MOST_BARS = 60
#: Steps from which on a running mean is drawn.
MANY_STEPS = 20
#: What a certificate says of the surrogate, and its lines.
CERTIFICATE = {
    "surrogate": "gain that the surrogate promises, L'",
    "ratios": "bound of its error, from the ratios",
    "pathwise": "bound of its error, from the divergences",
    "product": "product form of Prop. 4",
}


def by_step(rows: Sequence[Row], key: str) -> dict[int, float]:
    """The mean of a column over the rows of each step; steps without a finite value are left out."""
    values: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        value = row.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            values[int(row["step"])].append(float(value))
    return {step: sum(found) / len(found) for step, found in sorted(values.items())}


def train_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows of updates."""
    return [row for row in rows if row.get("kind") == "train"]


def reward(rows: Sequence[Row]) -> Chart | None:
    """Mean reward of the training rollouts by step, behind a running mean when there are many steps."""
    curve = by_step(train_rows(rows), "reward")
    if not curve:
        return None
    steps, values = list(curve), list(curve.values())
    first, last = (float(np.mean(part)) for part in (values[: _tenth(values)], values[-_tenth(values) :]))
    title = f"Training reward of the only step: {first:.2f}"
    if len(steps) > 1:
        title = f"Training reward: from {first:.2f} to {last:.2f} in {len(steps)} steps"
    line = Line("reward", 0, steps, values)
    x_label = "step (one rollout batch each)"
    if len(steps) >= MANY_STEPS:
        width = max(5, len(steps) // 10)
        title += " (means of the first and last tenth)"
        x_label = f"step (thin: each rollout batch; thick: mean of the last {width})"
        line = Line("reward", 0, steps, _running_mean(values, width), thin=(Thin("each step", steps, values),))
    return Chart("reward", title, "lines", x_label, "mean reward of the rollouts", lines=(line,))


def _tenth(values: Sequence[float]) -> int:
    return max(1, len(values) // 10)


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of the last `width` values (of fewer at the beginning)."""
    return [float(np.mean(values[max(0, end - width) : end])) for end in range(1, len(values) + 1)]


def accuracy(rows: Sequence[Row]) -> Chart | None:
    """Avg@k of each benchmark by step, and their mean."""
    evaluations = [row for row in rows if row.get("kind") == "evaluation"]
    names = benchmarks(evaluations)
    if not names:
        return None
    counts = sorted({int(row["samples"]) for row in evaluations if row.get("samples")})
    avg = "Avg@" + (str(counts[0]) if len(counts) == 1 else "k")
    sampled = f"; samples per problem: {', '.join(map(str, counts))}" if len(counts) > 1 else ""
    found = [(name, at, by_step(evaluations, f"avg/{name}")) for at, name in enumerate(names)]
    lines = [Line(name, at, list(curve), list(curve.values())) for name, at, curve in found]
    if len(names) > 1 and (mean := by_step(evaluations, "avg/mean")):
        lines.append(Line("mean", "mean", list(mean), list(mean.values())))
    return Chart(
        "avg",
        f"{avg} on held-out problems over the run",
        "lines",
        f"step (0: before reinforcement learning{sampled})",
        f"{avg}: mean share of right answers",
        "percent",
        lines=tuple(lines),
    )


# -------------------------------------------------------------------------------------------------------------- reasons


def shares(rows: Sequence[Row]) -> dict[str, float]:
    """Mean over updates, one at least, of the share of each reason."""
    return {name: sum(float(row.get(f"trust/{name}_fraction") or 0) for row in rows) / len(rows) for name in REASONS}


def masked(rows: Sequence[Row]) -> Chart | None:
    """Share of the loss tokens held back over the steps, by reason: the mean over the updates of a step."""
    train = judged(train_rows(rows))
    curves = {name: by_step(train, f"trust/{name}_fraction") for name in REASONS}
    steps = sorted({step for curve in curves.values() for step in curve})
    shown = [name for name in REASONS if any(curves[name].values())]
    if not steps or not shown:
        return None
    width = math.ceil(len(steps) / MOST_BARS)
    parts = [steps[at : at + width] for at in range(0, len(steps), width)]
    labels = [str(part[0]) if width == 1 else f"{part[0]}-{part[-1]}" for part in parts]
    layers = [
        Layer(REASONS[n], n, [float(np.mean([curves[n].get(step, 0.0) for step in part])) for part in parts])
        for n in shown
    ]
    return _stacked(
        "reasons",
        f"Tokens held back by the trust region: {sum(shares(train).values()):.2%} on average",
        "step" + (f" (means of {width})" if width > 1 else ""),
        "Mean over the updates of a step. A clamped token counts here although it is not dropped.",
        layers,
        labels,
    )


def within_batch(rows: Sequence[Row]) -> Chart | None:
    """Mean share by the update inside the rollout batch: later updates are further from the rollout policy."""
    by_update: dict[int, list[Row]] = defaultdict(list)
    first: dict[int, int] = {}
    for row in train_rows(rows):  # "update" counts through the whole run
        first[int(row["step"])] = min(int(row["update"]), first.get(int(row["step"]), int(row["update"])))
    for row in judged(train_rows(rows)):
        by_update[int(row["update"]) - first[int(row["step"])] + 1].append(row)
    found = {update: shares(found) for update, found in sorted(by_update.items())}
    shown = [name for name in REASONS if any(each[name] > 0 for each in found.values())]
    if not shown:
        return None
    return _stacked(
        "within",
        "By update of a rollout batch" if len(found) > 1 else "One update per rollout batch",
        "update of the same rollout batch",
        "The first update starts from the rollout policy itself; each one moves further away.",
        [Layer(REASONS[n], n, [each[n] for each in found.values()]) for n in shown],
        [str(update) for update in found],
    )


def _stacked(
    name: str, title: str, x_label: str, caption: str, layers: Sequence[Layer], x: Sequence[float | str]
) -> Chart:
    y_label = "share of loss tokens"
    return Chart(name, title, "stack", x_label, y_label, "percent", caption, zero=True, layers=tuple(layers), x=x)


# ------------------------------------------------------------------------------------------------------------ positions


def pool_positions(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Pool rows of positions.jsonl: "position" (first of each bucket, 1-based), "count", "mean", "tail_mean".

    Rows with narrower buckets are pooled to the widest. The mean is exact; the tail's mean is the mean of the rows'
    tail means, weighted by their tokens.
    """
    width = max((int(row["width"]) for row in rows), default=1)
    length = max((-(-len(row["count"]) * int(row["width"]) // width) for row in rows), default=0)
    count, total, tail = np.zeros(length), np.zeros(length), np.zeros(length)
    for row in rows:
        if row.get("sum") is None:
            continue
        index = np.arange(len(row["count"])) * int(row["width"]) // width
        tokens = np.array(row["count"], dtype=float)
        np.add.at(count, index, tokens)
        np.add.at(total, index, [value or 0.0 for value in row["sum"]])
        np.add.at(tail, index, [(value or 0.0) * n for value, n in zip(row["tail_mean"], tokens, strict=True)])
    filled = count > 0
    safe = np.where(filled, count, 1.0)
    mean, tail_mean = np.where(filled, total / safe, np.nan), np.where(filled, tail / safe, np.nan)
    return {"position": np.arange(length) * width + 1, "count": count, "mean": mean, "tail_mean": tail_mean}


def curves_by_position(pooled: Mapping[str, Any], width: int, label: str = "", slot: int = 0) -> tuple[Line, Line]:
    """Mean and top-10% tail at the middle of each bucket, without buckets of a few tokens.

    pooled : "count", "mean", "tail_mean" by bucket, of `width` positions each.
    """
    count = np.array(pooled["count"], dtype=float)
    keep = (count >= min(FEW_TOKENS, count.max(initial=0))) & (count > 0)
    x = (np.arange(len(count)) * width + (width + 1) / 2)[keep].tolist()
    mean, tail = (np.array(pooled[name], dtype=float)[keep].tolist() for name in ("mean", "tail_mean"))
    start = f"{label}: " if label else ""
    return Line(f"{start}mean", slot, x, mean), Line(f"{start}mean of the top 10%", slot, x, tail, dashed=True)


def by_position(lines: Sequence[Line], *, width: int = 1, wide: bool = False, **words: Any) -> Chart:
    """A chart of lines over the position in the response. wide : a logarithmic scale where the values span much.

    words : `name`, `title`, `y_label` and others of `Chart`.
    """
    drawn = [y for line in lines for y in line.y if y is not None and y > 0]
    scale = "log" if wide and drawn and max(drawn) > 30 * min(drawn) else "linear"
    x_label = "position in the response (loss tokens" + (f"; means over {width})" if width > 1 else ")")
    return Chart(kind="lines", x_label=x_label, scale=scale, zero=scale == "linear", lines=tuple(lines), **words)


def divergence(positions: Sequence[Row]) -> Chart | None:
    """D_t by position in the response: first and last steps, mean and top-10% tail (the paper's Figure 2)."""
    rows = [row for row in positions if row.get("sum")]
    if not rows:
        return None
    span = max(1, min(SPAN, len(rows) // 2))
    lines: list[Line] = []
    for slot, group in enumerate([rows[:span], rows[-span:]] if len(rows) > 1 else [rows]):
        first, last = int(group[0]["step"]), int(group[-1]["step"])
        label = f"step {first}" if first == last else f"steps {first}-{last}"
        width = max(int(row["width"]) for row in group)
        lines += curves_by_position(pool_positions(group), width, label, slot)
    return by_position(
        lines,
        width=max(int(row["width"]) for row in rows),
        wide=True,
        name="position",
        title="Where in a response the policy has left the rollout policy",
        y_label=f"D_t at update {int(rows[-1]['update']) + 1} of a batch",
        caption="D_t at a position of the response, last update of each step: mean, and mean of the largest 10%.",
    )


# --------------------------------------------------------------------------------------------------------- certificates


def certificate(certificates: Sequence[Row]) -> Chart | None:
    """The surrogate's gain and the bounds of its error, after every rollout batch, with their intervals."""
    lines = []
    for slot, (key, label) in enumerate(CERTIFICATE.items()):
        value, low, high = (by_step(certificates, f"{key}{end}") for end in ("", "_low", "_high"))
        if not value:
            continue  # the rule measures no divergence
        steps = list(value)
        ends = [[end.get(step) for step in steps] for end in (low, high)]
        whole = all(x is not None for end in ends for x in end)
        lines.append(Line(label, slot, steps, list(value.values()), *(ends if whole else (None, None))))
    if not lines:
        return None
    caption = "After every rollout batch; bands are 95% intervals by bootstrap over prompts."
    if not certificates[-1].get("certified") and len(lines) > 2:
        caption += " D_t is a lower bound of the exact divergence here, so the bounds from it are not certificates."
    return Chart(
        "certificate",
        "How far the surrogate can be trusted",
        "lines",
        "step (last update of each rollout batch; bands: 95% by bootstrap over prompts)",
        "units of the reward",
        caption=caption,
        scale="symlog",
        lines=tuple(lines),
        reference=0.0,
    )
