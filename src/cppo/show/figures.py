"""Figures for papers: the one palette, a `Chart` drawn by matplotlib, and files.

Colours are Okabe and Ito's (safe for colour-blind readers). No two lines differ in colour alone: they have markers, and
reasons have a hatch.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, PercentFormatter

from cppo.files import atomic_write_bytes
from cppo.show.charts import Chart, Line, Numbers

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    *("#0072B2", "#E69F00", "#009E73", "#D55E00"),
    *("#CC79A7", "#56B4E9", "#666666"),
)
LINES = ((BLUE, "o"), (RED, "s"), (GREEN, "^"), (PURPLE, "D"), (ORANGE, "v"), (SKY, "P"))
#: Reason -> colour, hatch.
REASONS = {
    "token_limit": (RED, ""),
    "prefix_budget": (ORANGE, "//"),
    "sequence_limit": (PURPLE, "\\\\"),
    "ratio_clip": (SKY, ".."),
    "clamped": (SKY, "xx"),
    "towards": (GREEN, ""),
}
#: Within this distance of zero the symmetric scale is linear, as on the page.
LINEAR_WITHIN = 0.01


def save_figure(
    figure: Figure, folder: str | Path, name: str, dpi: int = 130, kinds: Sequence[str] = ("png", "svg")
) -> list[Path]:
    """Write NAME.png and NAME.svg, the same bytes for the same figure. dpi: of the PNG. Raises: files.DiskFullError."""
    paths = []
    for kind in kinds:
        data = io.BytesIO()
        options: dict[str, Any] = {"dpi": dpi} if kind == "png" else {"metadata": {"Date": None}}
        with matplotlib.rc_context({"svg.hashsalt": "cppo"}):  # else its ids are random
            FigureCanvasAgg(figure)
            figure.savefig(data, format=kind, **options)
        paths.append(atomic_write_bytes(Path(folder) / f"{name}.{kind}", data.getvalue()))
    return paths


def frame(ax: Axes, title: str = "", grid: str = "y") -> None:
    """The look of all figures: title to the left, no box, a faint grid across one axis."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis=grid, alpha=0.25, linewidth=0.6)  # type: ignore[arg-type]
    ax.set_axisbelow(True)
    ax.set_title(plain(title), loc="left", fontsize=11)


def say(ax: Axes, text: str) -> None:
    """Put into an empty panel why it is empty."""
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=GREY, fontsize=11, wrap=True)


def below(**options: Any) -> dict[str, Any]:
    """A legend under the axes."""
    under: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "frameon": False, "fontsize": 8}
    return under | {"handlelength": 3} | options


def plain(text: str) -> str:
    """Text without mathematics: a name with $ is not a formula."""
    return text.replace("$", r"\$")


def floats(values: Numbers) -> np.ndarray:
    """None as NaN."""
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def integers(ax: Axes) -> None:
    """Ticks of x at whole numbers."""
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    low, high = ax.get_xlim()
    if high - low < 1.5:  # one or two steps: no fractional ticks between and around them
        ticks = range(math.ceil(low), math.floor(high) + 1)
        ax.set_xticks(ticks)
        if len(ticks) == 1:
            ax.set_xlim(ticks[0] - 0.75, ticks[0] + 0.75)


def draw(chart: Chart, size: tuple[float, float] | None = None) -> Figure:
    """One chart as a figure."""
    rows = len({bar.label for bar in chart.bars}) or (len(chart.x) if _words(chart) else 0)
    size = size or (5.2, 1.4 + 0.34 * rows if rows else 3.4)
    figure = Figure(figsize=size, layout="constrained")
    draw_on(figure.subplots(), chart)
    return figure


def draw_on(ax: Axes, chart: Chart) -> None:
    """One chart into a panel."""
    frame(ax, chart.title, "x" if chart.kind == "intervals" or _words(chart) else "y")
    {"lines": _lines, "stack": _stack, "intervals": _intervals}[chart.kind](ax, chart)


def _words(chart: Chart) -> bool:
    return chart.kind == "stack" and not chart.x_label


def _lines(ax: Axes, chart: Chart) -> None:
    for line in chart.lines:
        _line(ax, line)
    if chart.reference is not None:
        ax.axhline(chart.reference, color=GREY, linestyle=":", linewidth=1)
    if chart.scale == "symlog":
        ax.set_yscale("symlog", linthresh=LINEAR_WITHIN)
    elif chart.scale == "log":
        _logarithmic(ax, chart)
    elif chart.zero:
        ax.set_ylim(bottom=0)
    ax.set_xlabel(chart.x_label)
    ax.set_ylabel(plain(chart.y_label))
    integers(ax)
    _form(ax, chart, "y")
    count = len(chart.lines)
    if count > 1:
        columns = 3 if count > 9 else 4 if count > 4 else 2
        ax.legend(**below(ncols=columns, fontsize=6.5 if count > 9 else 8))


def _line(ax: Axes, line: Line) -> None:
    x, y = floats(line.x), floats(line.y)
    if line.slot == "mean":
        ax.plot(x, y, "--", color="black", linewidth=2.6, label=plain(line.label), zorder=3)
        return
    slot = int(line.slot)
    colour, marker = LINES[slot % len(LINES)]
    # a seventh colour does not exist: from there on lines are dotted
    style = "--" if line.dashed else "-" if slot < len(LINES) else ":"
    for thin in line.thin:
        dashes: Any = "-" if thin.counted else (0, (3, 3))
        ax.plot(floats(thin.x), floats(thin.y), color=colour, linewidth=0.7, alpha=0.3, linestyle=dashes)
    if line.low is not None and line.high is not None:
        ax.fill_between(x, floats(line.low), floats(line.high), color=colour, alpha=0.16, linewidth=0)
    marks: dict[str, Any] = {"marker": marker, "markevery": max(1, len(x) // 8), "markersize": 4}
    ax.plot(x, y, style, color=colour, linewidth=1.7, label=plain(line.label), **marks)


def _logarithmic(ax: Axes, chart: Chart) -> None:
    ax.set_yscale("log")
    drawn = np.concatenate([floats(line.y) for line in chart.lines])
    drawn = drawn[drawn > 0]
    few = drawn.size > 0 and drawn.max() < 300 * drawn.min()  # label more than the powers of ten
    ax.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0) if few else ()))
    ax.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _form(ax: Axes, chart: Chart, which: str) -> None:
    axis = ax.yaxis if which == "y" else ax.xaxis
    if chart.form == "percent":
        axis.set_major_formatter(PercentFormatter(1.0))
    elif chart.scale != "linear":
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _stack(ax: Axes, chart: Chart) -> None:
    places = np.arange(len(chart.x))
    base = np.zeros(len(chart.x))
    for layer in chart.layers:
        colour, hatch = REASONS[layer.slot]
        values = np.nan_to_num(floats(layer.y))
        options: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": "white", "label": layer.label}
        if _words(chart):
            ax.barh(places, values, 0.62, left=base, **options)
        else:
            ax.bar(places, values, 0.84, bottom=base, linewidth=0.3, **options)
        base = base + values
    names = [plain(str(x)) for x in chart.x]
    if _words(chart):
        ax.set_yticks(places, names)
        ax.invert_yaxis()
        ax.set_xlabel(chart.y_label)
        _form(ax, chart, "x")
    else:
        every = max(1, -(-len(names) // (10 if max(map(len, names), default=0) < 6 else 7)))
        ax.set_xticks(places[::every], names[::every])
        if len(names) < 3:  # one bar is not a wall
            ax.set_xlim(-1.5, len(names) + 0.5)
        ax.set_xlabel(chart.x_label)
        ax.set_ylabel(chart.y_label)
        _form(ax, chart, "y")
    ax.legend(**below(ncols=2))


def _intervals(ax: Axes, chart: Chart) -> None:
    labels = list(dict.fromkeys(bar.label for bar in chart.bars))
    for bar in chart.bars:
        if bar.value is None:
            continue
        colour, marker = LINES[bar.slot % len(LINES)]
        final = bar.note == "final"
        y = labels.index(bar.label) + (0.16 if final else -0.16)
        if bar.low is not None and bar.high is not None:
            ax.plot([bar.low, bar.high], [y, y], color=colour, linewidth=1.8)
        face = "white" if final else colour
        ax.plot([bar.value], [y], marker, color=colour, markersize=6, markerfacecolor=face, zorder=3)
    ax.set_yticks(range(len(labels)), [plain(label) for label in labels])
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.set_xlabel(f"{chart.y_label} (filled: best, hollow: final)")
    _form(ax, chart, "x")
