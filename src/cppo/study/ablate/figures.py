"""Figures of an ablation, PNG and SVG: intervals per configuration, courses of rules, maps.

Colours are those of a run's plots (Okabe and Ito's; cividis for maps), no two lines differ in colour alone, and maps
say their numbers. Where an interval is drawn it is the table's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator, PercentFormatter

from cppo.show.figures import BLUE, GREY, LINES, RED, below, frame, say
from cppo.study.ablate.frontier import Frontier
from cppo.study.ablate.suite import Suite
from cppo.study.ablate.tables import marks
from cppo.study.results import MEAN, Results
from cppo.study.statistics import Estimate

STYLES = ("-", "--", "-.", ":")
#: Those of a run's plots and two more, for eight rules.
MARKED = (*LINES, ("black", "X"), (GREY, "*"))


def _spread(estimate: Estimate) -> list[list[float]] | None:
    """Lengths of the error bar below and above, as matplotlib takes them."""
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return None
    return [[max(0.0, estimate.value - estimate.low)], [max(0.0, estimate.high - estimate.value)]]


def dots(results: Results, suite: Suite, difference: bool = False) -> Figure:
    """One row per configuration: its final Avg@k with the interval, or by how much it differs from the baseline's."""
    done = [variant for variant in results.variants if variant.seeds]
    if difference:
        done = [variant for variant in done if variant.final_difference is not None]
    figure = Figure(figsize=(7.2, 1.6 + 0.42 * max(len(done), 3)), layout="constrained")
    ax = figure.subplots()
    if not done:
        say(ax, "No run is finished yet.")
        return figure
    frame(ax, suite.question, "x")
    for at, variant in enumerate(done):
        estimate = variant.final_difference if difference else variant.final[MEAN]
        if estimate is None or estimate.value is None:
            continue
        colour, marker = (RED, "s") if variant.name == suite.baseline else (BLUE, "o")
        ax.errorbar(estimate.value, at, xerr=_spread(estimate), fmt=marker, color=colour, capsize=3, markersize=6)
        if variant.name == suite.baseline:
            ax.axvline(estimate.value, color=RED, linestyle=":", linewidth=1, zorder=0)
    ax.set_yticks(range(len(done)), [variant.name for variant in done])
    ax.set_ylim(len(done) - 0.4, -0.6)
    counts = {len(variant.seeds) for variant in done}
    spread = "one seed: no interval" if counts == {1} else f"mean and 95% interval, {_range(counts)} seeds"
    score = f"final Avg@{results.samples or 'k'}"
    if difference:
        ax.axvline(0, color=GREY, linestyle=":", linewidth=1.2, zorder=0)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:+.3g}"))
        ax.set_xlabel(f"{score} less that of {suite.baseline}, points ({spread})")
    else:
        ax.xaxis.set_major_formatter(PercentFormatter(1.0))
        ax.set_xlabel(f"{score} ({spread})")
    return figure


def _range(counts: set[int]) -> str:
    return str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"


def lines(
    series: Mapping[str, Sequence[tuple[float, Estimate]]], x: str, y: str, title: str, scale: str, zero: bool = False
) -> Figure:
    """A line per rule, with intervals. scale: "log2" or "share" of x; zero: draw a line at 0 (differences)."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    ax = figure.subplots()
    frame(ax, title)
    drawn = {name: points for name, points in series.items() if points}
    if not drawn:
        say(ax, "No run is finished yet.")
        return figure
    _scaled(ax, scale, sorted({at for points in drawn.values() for at, _ in points}))
    for i, (name, points) in enumerate(drawn.items()):
        colour, marker = MARKED[i % len(MARKED)]
        # side by side, so that intervals at the same place can be told apart
        shift = 2 ** (0.05 * (i - (len(drawn) - 1) / 2)) if scale == "log2" else 1.0
        xs, ys = [at * shift for at, _ in points], [estimate.value for _, estimate in points]
        style = STYLES[i % len(STYLES)]
        ax.plot(xs, ys, style, color=colour, marker=marker, markersize=5, linewidth=1.6, label=name)  # type: ignore[arg-type]
        for at, (_, estimate) in zip(xs, points, strict=True):
            if (spread := _spread(estimate)) is not None:
                ax.errorbar(at, estimate.value, yerr=spread, color=colour, capsize=2.5, linewidth=1, alpha=0.55)  # type: ignore[arg-type]
    if zero:
        ax.axhline(0, color=GREY, linestyle=":", linewidth=1.2)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:+.0f}") if zero else PercentFormatter(1.0))
    ax.set_xlabel(x)
    ax.set_ylabel(y + (" (percentage points)" if zero else ""))
    ax.legend(**below(ncols=4, handlelength=4))
    return figure


def _scaled(ax: Axes, scale: str, values: Sequence[float]) -> None:
    if scale == "log2":
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_locator(FixedLocator(list(values)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    else:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:g}%"))
    ax.xaxis.set_minor_locator(NullLocator())


@dataclass(frozen=True)
class Panel:
    """One map: shares or None by row and column. outlined, texts: of cells by (row, column)."""

    title: str
    values: Sequence[Sequence[float | None]]
    outlined: Sequence[tuple[int, int]] = ()
    texts: Mapping[tuple[int, int], str] = field(default_factory=dict)


@dataclass(frozen=True)
class Axis:
    """What rows or columns are."""

    label: str
    values: Sequence[float]


def maps(panels: Sequence[Panel], rows: Axis, columns: Axis, title: str, note: str = "") -> Figure:
    """Maps side by side on one scale of colours, each cell with its number; the last row is drawn at the bottom."""
    wide, high = 0.72 * len(columns.values) + 0.7, 0.5 * len(rows.values) + 1.9
    figure = Figure(figsize=(max(6.0, 1.8 + wide * len(panels)), high + (0.4 if note else 0)), layout="constrained")
    axes = list(figure.subplots(1, len(panels), squeeze=False).flat)
    tables = [np.array(panel.values, dtype=float) for panel in panels]
    known = np.concatenate([table[np.isfinite(table)] for table in tables])
    low, top = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    top = max(top, low + 1e-3)
    image = None
    for ax, panel, table in zip(axes, panels, tables, strict=True):
        image = ax.imshow(
            np.ma.masked_invalid(table), cmap="cividis", vmin=low, vmax=top, aspect="auto", origin="lower"
        )
        ax.set_facecolor("#dddddd")
        for (row, column), value in np.ndenumerate(table):
            light = np.isfinite(value) and value < low + 0.6 * (top - low)
            text = ("-" if np.isnan(value) else f"{100 * value:.1f}") + panel.texts.get((row, column), "")
            ax.text(column, row, text, ha="center", va="center", fontsize=8.5, color="white" if light else "black")
        for row, column in panel.outlined:
            frame = Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, fill=False, edgecolor=RED, linewidth=2.4)
            ax.add_patch(frame)
        ax.set_xticks(range(len(columns.values)), [f"{value:g}" for value in columns.values])
        ax.set_yticks(range(len(rows.values)), [f"{value:g}" for value in rows.values])
        ax.set_title(panel.title, fontsize=10)
        ax.set_xlabel(columns.label)
    axes[0].set_ylabel(rows.label)
    if image is not None:
        figure.colorbar(image, ax=axes, format=PercentFormatter(1.0), label="final Avg@k", shrink=0.9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    if note:
        figure.supxlabel(note, fontsize=8.5, color=GREY)
    return figure


def frontier(found: Frontier) -> Figure:
    """A map per rule: final Avg@k over learning rate and updates per batch, framed where the largest still learns."""
    panels = []
    for each in found.maps:
        cells = {(cell.learning_rate, cell.updates): cell for cell in each.cells}
        places = [(r, c) for r in range(len(found.learning_rates)) for c in range(len(found.updates))]
        here = {place: cells[found.learning_rates[place[0]], found.updates[place[1]]] for place in places}
        values = [[here[r, c].final for c in range(len(found.updates))] for r in range(len(found.learning_rates))]
        largest = [
            (found.learning_rates.index(rate), found.updates.index(m)) for m, rate in each.largest.items() if rate
        ]
        texts = {place: f" {marks(cell)}" if marks(cell) else "" for place, cell in here.items()}
        mean = "" if each.mean.value is None else f": mean {100 * each.mean.value:.1f}%"
        panels.append(Panel(each.rule + mean, values, largest, texts))
    note = (
        "framed: largest step at which it still learns;  + learns   ! half or more collapsed   x diverged   ? missing"
    )
    rates = Axis("learning rate", found.learning_rates)
    updates = Axis("updates per rollout batch", [float(m) for m in found.updates])
    return maps(panels, rates, updates, "How large a step does each rule stand?", note)
