"""PNG plots of a run folder: reward, Avg@k, held-back tokens by reason, divergence by position, certificates.

Everything comes from its .jsonl files, so plots can be made again at any time (also while the run goes on). They are
the report's charts (`cppo.runs.charts`), side by side where two belong together; what is missing is said in the
picture. Left out: interactive figures; the report has those, and study/ the figures that compare runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from cppo.runs import charts
from cppo.runs.folder import RunFolder
from cppo.runs.records import before_and_after, benchmarks, judged
from cppo.show.charts import Chart
from cppo.show.figures import BLUE, GREY, below, draw_on, frame, save_figure, say

Row = Mapping[str, Any]


def write_plots(folder: str | Path) -> list[Path]:
    """Draw all plots of a run folder into `folder`/plots; returns their paths. Raises: files.DiskFullError."""
    plots, found = RunFolder(folder).plots, figures_of(folder)
    return [path for name, figure in found.items() for path in save_figure(figure, plots, name, kinds=["png"])]


def figures_of(folder: str | Path) -> dict[str, Figure]:
    """All plots of a run folder, by the name of their file."""
    run = RunFolder(folder)
    rows = run.metrics()
    return {
        "reward": draw_reward(rows),
        "avg": draw_avg(rows),
        "masked": draw_masked(rows),
        "divergence": draw_divergence(run.positions()),
        "certificate": draw_certificate(run.certificates()),
    }


def _figure(columns: int = 1, ratios: Sequence[float] | None = None) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(7.2 if columns == 1 else 10.0, 4.2), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, gridspec_kw={"width_ratios": ratios} if ratios else None)
    return figure, list(axes.flat)


def _panel(ax: Axes, chart: Chart | None, title: str, why: str) -> None:
    """A chart, or under the title why there is none."""
    if chart is not None:
        draw_on(ax, chart)
    else:
        frame(ax, title)
        say(ax, why)


def _one(chart: Chart | None, title: str, why: str) -> Figure:
    figure, (ax,) = _figure()
    _panel(ax, chart, title, why)
    return figure


def draw_reward(rows: Sequence[Row]) -> Figure:
    """Mean reward of the training rollouts by step."""
    return _one(charts.reward(rows), "Training reward", "No reward yet: no training update has been logged.")


def draw_avg(rows: Sequence[Row]) -> Figure:
    """Left: Avg@k of each benchmark over steps. Right: before and after."""
    figure, (left, right) = _figure(2, (1.25, 1.0))
    _panel(left, charts.accuracy(rows), "Accuracy on held-out problems", "No evaluation in this run.")
    names = benchmarks([row for row in rows if row.get("kind") == "evaluation"])
    if names:
        _dumbbells(right, [*names, "mean"] if len(names) > 1 else names, *before_and_after(rows))
    else:
        _panel(right, None, "Before and after", "Nothing to show.")
    return figure


def _dumbbells(ax: Axes, names: Sequence[str], before: Row | None, after: Row | None) -> None:
    frame(ax, grid="x")
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
        ax.set_title("One evaluation only: no before and after", loc="left", fontsize=11)
    else:
        last = "" if before is None else f" (step {before['step']} and step {after['step']})"
        ax.set_title(f"Before and after{last}", loc="left", fontsize=11)
        ax.legend(**below(ncols=2))


def draw_masked(rows: Sequence[Row]) -> Figure:
    """Left: share of loss tokens held back over the run, by reason. Right: by update inside the rollout batch."""
    figure, (left, right) = _figure(2, (1.7, 1.0))
    why = "No token was held back in any update."
    logged = charts.train_rows(rows)
    if not judged(logged):
        why = "No update has had a loss token." if logged else "No training update has been logged yet."
    _panel(left, charts.masked(rows), "Tokens held back by the trust region", why)
    _panel(right, charts.within_batch(rows), "By update of a rollout batch", "Nothing to show.")
    return figure


def draw_divergence(positions: Sequence[Row]) -> Figure:
    """Divergence from the rollout policy by position in the response: first and last steps, mean and top-10% tail."""
    why = "No divergence yet: no training step has ended."
    if positions:
        why = "No divergence was recorded: the rule measures none."
    return _one(charts.divergence(positions), "Divergence by position", why)


def draw_certificate(certificates: Sequence[Row]) -> Figure:
    """The surrogate's gain and the bounds of its error, after every rollout batch, with their intervals."""
    why = "No certificate yet: no training step has ended."
    return _one(charts.certificate(certificates), "How far the surrogate can be trusted", why)
