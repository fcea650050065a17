"""PNG plots of a run folder: reward, Avg@k, held-back tokens by reason, divergence by position, certificates.

Everything comes from its .jsonl files, so plots can be made again at any time (also while the run goes
on). What is missing is said in the picture. Colours are Okabe and Ito's (safe for colour-blind readers), and no two
lines differ in colour alone. Left out: interactive figures; study/ has the figures that compare runs.
"""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, PercentFormatter

from cppo.files import atomic_write_bytes, read_jsonl
from cppo.runs.certificates import read_certificates
from cppo.runs.records import before_and_after, benchmarks, judged

Row = Mapping[str, Any]

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#666666",
)
LINES = ((BLUE, "o"), (RED, "s"), (GREEN, "^"), (PURPLE, "D"), (ORANGE, "v"), (SKY, "P"))
# held-back reasons in stacking order: metric -> (label, colour, hatch)
REASONS = {
    "token_limit": ("token limit", RED, ""),
    "prefix_budget": ("prefix budget", ORANGE, "//"),
    "sequence_limit": ("sequence limit", PURPLE, "\\\\"),
    "ratio_clip": ("ratio clip", SKY, ".."),
    "clamped": ("clamped", SKY, "xx"),
}
FEW_TOKENS = 10  # a mean of fewer tokens says little: such buckets are left out where others have more


def write_plots(folder: str | Path) -> list[Path]:
    """Draw all plots of a run folder into `folder`/plots; returns their paths. Raises: files.DiskFullError."""
    root = Path(folder)
    rows = read_jsonl(root / "metrics.jsonl")
    positions = read_jsonl(root / "positions.jsonl")
    certificates = read_certificates(root)
    drawings: dict[str, Callable[[], Figure]] = {
        "reward": lambda: draw_reward(rows),
        "avg": lambda: draw_avg(rows),
        "masked": lambda: draw_masked(rows),
        "divergence": lambda: draw_divergence(positions),
        "certificate": lambda: draw_certificate(certificates),
    }
    return [_save(draw(), root / "plots" / f"{name}.png") for name, draw in drawings.items()]


def _save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130)
    return atomic_write_bytes(path, data.getvalue())


def _figure(columns: int = 1, ratios: Sequence[float] | None = None) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(7.2 if columns == 1 else 10.0, 4.2), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, gridspec_kw={"width_ratios": ratios} if ratios else None)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", alpha=0.25, linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, list(axes.flat)


def _say(ax: Axes, text: str) -> None:
    """Put into an empty panel why it is empty."""
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=GREY, fontsize=11, wrap=True)


def _title(ax: Axes, text: str) -> None:
    ax.set_title(text, loc="left", fontsize=11)


def _train(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.get("kind") == "train"]


def _by_step(rows: Sequence[Row], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and the mean of `key` over the updates of each."""
    values: defaultdict[int, list[float]] = defaultdict(list)
    for row in rows:
        if row.get(key) is not None:
            values[int(row["step"])].append(float(row[key]))
    steps = sorted(values)
    return np.array(steps), np.array([np.mean(values[step]) for step in steps])


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of the last `width` values (of fewer at the beginning)."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw_reward(rows: Sequence[Row]) -> Figure:
    """Mean reward of the training rollouts by step, with a running mean when there are many steps."""
    figure, (ax,) = _figure()
    steps, values = _by_step(_train(rows), "reward")
    if not len(steps):
        _title(ax, "Training reward")
        _say(ax, "No reward yet: no training update has been logged.")
        return figure
    if len(steps) >= 20:
        width = max(5, len(steps) // 10)
        ax.plot(steps, values, color=BLUE, alpha=0.3, linewidth=1, label="one step")
        ax.plot(steps, _running_mean(values, width), color=BLUE, linewidth=2.2, label=f"mean of the last {width} steps")
        ax.legend(frameon=False, loc="lower right")
    else:
        ax.plot(steps, values, color=BLUE, marker="o", markersize=4, linewidth=1.5)
    last = values[-max(1, len(values) // 10) :].mean()
    first = values[: max(1, len(values) // 10)].mean()
    if len(steps) == 1:
        _title(ax, f"Training reward of the only step: {first:.2f}")
    else:
        tenth = " (means of the first and last tenth)" if len(steps) >= 20 else ""
        _title(ax, f"Training reward: from {first:.2f} to {last:.2f} in {len(steps)} steps{tenth}")
    ax.set_xlabel("step (one rollout batch each)")
    ax.set_ylabel("mean reward of the rollouts")
    _integers(ax)
    return figure


def _integers(ax: Axes) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    low, high = ax.get_xlim()
    if high - low < 1.5:  # one or two steps: no fractional ticks between and around them
        ticks = range(math.ceil(low), math.floor(high) + 1)
        ax.set_xticks(ticks)
        if len(ticks) == 1:
            ax.set_xlim(ticks[0] - 0.75, ticks[0] + 0.75)


def draw_avg(rows: Sequence[Row]) -> Figure:
    """Left: Avg@k of each benchmark over steps. Right: before and after."""
    figure, (left, right) = _figure(2, (1.25, 1.0))
    evaluations = [row for row in rows if row.get("kind") == "evaluation"]
    names = benchmarks(evaluations)
    counts = sorted({int(row["samples"]) for row in evaluations if row.get("samples")})
    avg = "Avg@" + (str(counts[0]) if len(counts) == 1 else "k")
    if not names:
        _title(left, "Accuracy on held-out problems")
        _say(left, "No evaluation in this run.")
        _title(right, "Before and after")
        _say(right, "Nothing to show.")
        return figure
    for at, name in enumerate(names):
        steps, values = _by_step(evaluations, f"avg/{name}")
        colour, marker = LINES[at % len(LINES)]
        style = "-" if at < len(LINES) else ":"
        left.plot(steps, values, color=colour, marker=marker, markersize=5, linestyle=style, linewidth=1.5, label=name)
    if len(names) > 1:
        steps, values = _by_step(evaluations, "avg/mean")
        if len(steps):
            left.plot(steps, values, color="black", linewidth=2.6, linestyle="--", label="mean")
        below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13)}
        left.legend(frameon=False, fontsize=8 if len(names) <= 8 else 6.5, ncols=4 if len(names) <= 8 else 3, **below)
    _title(left, f"{avg} on held-out problems over the run")
    sampled = f"; samples a problem: {', '.join(map(str, counts))}" if len(counts) > 1 else ""
    left.set_xlabel(f"step (0: before reinforcement learning{sampled})")
    left.set_ylabel(f"{avg}: mean share of right answers")
    left.yaxis.set_major_formatter(PercentFormatter(1.0))
    _integers(left)
    before, after = before_and_after(rows)
    _dumbbells(right, [*names, "mean"] if len(names) > 1 else names, before, after)
    return figure


def _dumbbells(ax: Axes, names: Sequence[str], before: Row | None, after: Row | None) -> None:
    ax.grid(axis="y", visible=False)
    ax.grid(axis="x", alpha=0.25, linewidth=0.6)
    size = 8 if len(names) <= 8 else 6
    for at, name in enumerate(names):
        start = None if before is None else before.get(f"avg/{name}")
        end = None if after is None else after.get(f"avg/{name}")
        if start is not None and end is not None:
            ax.plot([start, end], [at, at], color=GREY, linewidth=1.5, zorder=1)
            ax.annotate(
                f"{100 * (end - start):+.1f} points",
                ((start + end) / 2, at),
                (0, 6),
                textcoords="offset points",
                fontsize=8,
                ha="center",
            )
        if start is not None:
            ax.plot(
                [start],
                [at],
                "o",
                color="white",
                markeredgecolor=GREY,
                markersize=size,
                label="before" if not at else None,
            )
        if end is not None:
            ax.plot([end], [at], "o", color=BLUE, markersize=size, label="after" if not at else None)
    ax.set_yticks(range(len(names)), names, fontsize=8 if len(names) > 6 else 9)
    ax.set_ylim(len(names) - 0.4, -0.7)
    ax.margins(x=0.12)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.set_xlabel("share of right answers")
    if after is None:
        _title(ax, "One evaluation only: no before and after")
    else:
        last = "" if before is None else f" (step {before['step']} and step {after['step']})"
        _title(ax, f"Before and after{last}")
        ax.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)


def draw_masked(rows: Sequence[Row]) -> Figure:
    """Left: share of loss tokens held back over the run, by reason. Right: by update inside the rollout batch."""
    figure, (left, right) = _figure(2, (1.7, 1.0))
    logged = _train(rows)
    train = judged(logged)
    shares = {name: [float(row.get(f"trust/{name}_fraction") or 0.0) for row in train] for name in REASONS}
    shown = [name for name in REASONS if any(shares[name])]
    if not train or not shown:
        why = "No token was held back in any update."
        if not train:
            why = "No update has had a loss token." if logged else "No training update has been logged yet."
        _title(left, "Tokens held back by the trust region")
        _say(left, why)
        _title(right, "By update of a rollout batch")
        _say(right, "Nothing to show.")
        return figure
    # with cispo and minpro a clamped token counts here although its coefficient is not 0
    mean = np.mean([sum(values) for values in zip(*shares.values(), strict=True)])
    # the share climbs within every rollout batch; over the run its mean per step is what can be read
    steps = np.array(sorted({int(row["step"]) for row in train}))
    at_step = {name: _by_step(train, f"trust/{name}_fraction") for name in shown}
    stacked = [np.array([dict(zip(*at_step[name], strict=True)).get(step, 0.0) for step in steps]) for name in shown]
    _stack(left, steps, stacked, shown)
    _title(left, f"Tokens held back by the trust region: {mean:.2%} on average")
    left.set_xlabel("step (mean over its updates)")
    left.set_ylabel("share of loss tokens")
    _integers(left)
    left.legend(frameon=False, fontsize=9, loc="upper left")
    low, high = left.get_ylim()
    left.set_ylim(low, high * 1.25)  # room for the legend
    position = {int(row["update"]): at for row, at in zip(logged, _updates_within(logged), strict=True)}
    within = [position[int(row["update"])] for row in train]
    order = sorted(set(within))
    means = [
        np.array([np.mean([shares[name][i] for i, at in enumerate(within) if at == u]) for u in order])
        for name in shown
    ]
    base = np.zeros(len(order))
    for name, values in zip(shown, means, strict=True):
        label, colour, hatch = REASONS[name]
        right.bar(order, values, bottom=base, color=colour, hatch=hatch, edgecolor="white", label=label)
        base = base + values
    _title(right, "By update of a rollout batch" if len(order) > 1 else "One update a rollout batch")
    right.set_xlabel("update of the same rollout batch")
    right.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    for ax in (left, right):
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


def _updates_within(train: Sequence[Row]) -> list[int]:
    """For each row the number of its update inside its rollout batch, from 1; "update" counts through the whole run."""
    first: dict[int, int] = {}
    for row in train:
        first[int(row["step"])] = min(int(row["update"]), first.get(int(row["step"]), int(row["update"])))
    return [int(row["update"]) - first[int(row["step"])] + 1 for row in train]


def _stack(ax: Axes, steps: np.ndarray, stacked: Sequence[np.ndarray], names: Sequence[str]) -> None:
    """Stacked bars for few steps (an area needs neighbours), a stacked area for many."""
    if len(steps) > 40:
        layers = ax.stackplot(
            steps, stacked, labels=[REASONS[n][0] for n in names], colors=[REASONS[n][1] for n in names], linewidth=0
        )
        for layer, name in zip(layers, names, strict=True):
            layer.set_hatch(REASONS[name][2])
            layer.set_edgecolor("white")
        ax.margins(x=0)
        return
    base = np.zeros(len(steps))
    width = 0.85 if len(steps) == 1 else 0.85 * float(np.min(np.diff(steps)))
    for name, values in zip(names, stacked, strict=True):
        label, colour, hatch = REASONS[name]
        ax.bar(
            steps, values, width, bottom=base, color=colour, hatch=hatch, edgecolor="white", linewidth=0.3, label=label
        )
        base = base + values


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


def draw_divergence(positions: Sequence[Row]) -> Figure:
    """Divergence from the rollout policy by position in the response: first and last steps, mean and top-10% tail."""
    figure, (ax,) = _figure()
    rows = [row for row in positions if row.get("sum")]
    if not rows:
        _title(ax, "Divergence by position")
        _say(
            ax,
            "No divergence was recorded: the rule measures none."
            if positions
            else "No divergence yet: no training step has ended.",
        )
        return figure
    span = max(1, min(5, len(rows) // 2))
    groups = [(rows[:span], BLUE, "o"), (rows[-span:], RED, "s")] if len(rows) > 1 else [(rows, BLUE, "o")]
    lowest, highest = [], []
    for group, colour, marker in groups:
        pooled = pool_positions(group)
        enough = pooled["count"] >= min(FEW_TOKENS, pooled["count"].max())
        x = pooled["position"][enough]
        first, last = int(group[0]["step"]), int(group[-1]["step"])
        label = f"step {first}" if first == last else f"steps {first}-{last}"
        every = max(1, len(x) // 12)
        line: dict[str, Any] = {
            "color": colour,
            "marker": marker,
            "markevery": every,
            "markersize": 4,
            "linewidth": 1.8,
        }
        ax.plot(x, pooled["mean"][enough], label=f"{label}: mean", **line)
        ax.plot(x, pooled["tail_mean"][enough], linestyle="--", label=f"{label}: mean of the top 10%", **line)
        values = np.concatenate([pooled["mean"][enough], pooled["tail_mean"][enough]])
        values = values[values > 0]
        if len(values):
            lowest.append(values.min())
            highest.append(values.max())
    if lowest and max(highest) > 30 * min(lowest):
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        few = max(highest) < 300 * min(lowest)  # label more than the powers of ten
        ax.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0) if few else ()))
        ax.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        ax.set_ylim(bottom=0)
    widest = max(int(row["width"]) for row in rows)
    _title(ax, "Where in a response the policy has left the rollout policy")
    ax.set_xlabel("position in the response (loss tokens" + (f"; buckets of {widest})" if widest > 1 else ")"))
    update = int(rows[-1]["update"]) + 1
    ax.set_ylabel(f"divergence $D_t$ at update {update} of a batch")
    ax.legend(frameon=False, fontsize=8.5, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16), handlelength=4)
    _integers(ax)
    ax.set_xlim(left=1 - 0.01 * (ax.get_xlim()[1] - 1))
    return figure


def draw_certificate(certificates: Sequence[Row]) -> Figure:
    """The surrogate's gain and the bounds of its error, after every rollout batch, with their intervals."""
    figure, (ax,) = _figure()
    _title(ax, "How far the surrogate can be trusted")
    if not certificates:
        _say(ax, "No certificate yet: no training step has ended.")
        return figure
    steps = [int(row["step"]) for row in certificates]
    lines = (
        ("surrogate", "gain that the surrogate promises, $L'$", BLUE, "o"),
        ("ratios", "bound of its error, from the ratios", RED, "s"),
        ("pathwise", "bound of its error, from the divergences", PURPLE, "D"),
        ("product", "product form of Prop. 4", ORANGE, "^"),
    )
    for name, label, colour, marker in lines:
        values, low, high = (
            [np.nan if row.get(f"{name}{end}") is None else float(row[f"{name}{end}"]) for row in certificates]
            for end in ("", "_low", "_high")
        )
        if np.isnan(values).all():
            continue  # the rule measures no divergence
        every = max(1, len(steps) // 12)
        ax.plot(steps, values, color=colour, marker=marker, markevery=every, markersize=4, linewidth=1.6, label=label)
        ax.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.set_yscale("symlog", linthresh=0.01)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_xlabel("step (last update of each rollout batch; bands: 95% by bootstrap over prompts)")
    ax.set_ylabel("units of the reward")
    ax.legend(frameon=False, fontsize=8.5, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16), handlelength=4)
    _integers(ax)
    return figure
