"""The report's charts as PNG and SVG for papers, drawn by matplotlib from the same `Chart`s as the page.

Colours are those of the plots of a run (Okabe and Ito's); lines differ in their markers, reasons in their hatch, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from cppo.report.charts import Chart, Numbers
from cppo.rules import Reason
from cppo.runs.plots import GREEN, GREY, LINES, REASONS
from cppo.show.figures import save_figure

if TYPE_CHECKING:
    from cppo.report.page import Report

#: Within this distance of zero the symmetric scale is linear, as on the page.
LINEAR_WITHIN = 0.01
#: Tokens of a threshold figure whose bars can be told apart.
MOST_BARS = 400


def write_figures(report: Report, folder: str | Path) -> list[Path]:
    """Draw every chart, and the threshold of a response, into a folder; returns the paths, two a figure.

    Raises: files.DiskFullError.
    """
    figures = {chart.name: draw(chart) for chart in report.charts}
    if (threshold := draw_threshold(report.tokens.as_json())) is not None:
        figures["threshold"] = threshold
    return [path for name, figure in figures.items() for path in save_figure(figure, folder, name, dpi=160)]


def draw(chart: Chart) -> Figure:
    """One chart."""
    rows = len({bar.label for bar in chart.bars}) or (len(chart.x) if _words(chart) else 0)
    figure = Figure(figsize=(5.2, 1.4 + 0.34 * rows if rows else 3.4), layout="constrained")
    ax = figure.subplots()
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="x" if rows else "y", alpha=0.25, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.set_title(_plain(chart.title), loc="left", fontsize=11)
    {"lines": _lines, "stack": _stack, "intervals": _intervals}[chart.kind](ax, chart)
    return figure


def _plain(text: str) -> str:
    """Text without mathematics: a name with $ is no formula."""
    return text.replace("$", r"\$")


def _floats(values: Numbers) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _words(chart: Chart) -> bool:
    return chart.kind == "stack" and not chart.x_label


def _lines(ax: Axes, chart: Chart) -> None:
    for line in chart.lines:
        colour, marker = LINES[int(line.slot) % len(LINES)]
        # a seventh colour does not exist: from there on lines are dotted
        style = "--" if line.dashed else "-" if int(line.slot) < len(LINES) else ":"
        for thin in line.thin:
            ax.plot(
                _floats(thin.x),
                _floats(thin.y),
                color=colour,
                linewidth=0.7,
                alpha=0.3,
                linestyle="-" if thin.counted else (0, (3, 3)),
            )
        if line.low is not None and line.high is not None:
            ax.fill_between(
                _floats(line.x), _floats(line.low), _floats(line.high), color=colour, alpha=0.16, linewidth=0
            )
        every = max(1, len(line.x) // 8)
        ax.plot(
            _floats(line.x),
            _floats(line.y),
            style,
            color=colour,
            marker=marker,
            markevery=every,
            markersize=4,
            linewidth=1.7,
            label=_plain(line.label),
        )
    if chart.reference is not None:
        ax.axhline(chart.reference, color=GREY, linestyle=":", linewidth=1)
    if chart.scale == "symlog":
        ax.set_yscale("symlog", linthresh=LINEAR_WITHIN)
    elif chart.scale == "log":
        ax.set_yscale("log")
    elif chart.zero:
        ax.set_ylim(bottom=0)
    ax.set_xlabel(chart.x_label)
    ax.set_ylabel(_plain(chart.y_label))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    _form(ax, chart, "y")
    if len(chart.lines) > 1:
        ax.legend(frameon=False, fontsize=8, ncols=2 if len(chart.lines) < 5 else 4, **_below())


def _below() -> dict[str, Any]:
    return {"loc": "upper center", "bbox_to_anchor": (0.5, -0.18), "handlelength": 3}


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
        _, colour, pattern = REASONS[layer.slot]
        values = np.nan_to_num(_floats(layer.y))
        options: dict[str, Any] = {"color": colour, "hatch": pattern, "edgecolor": "white", "label": layer.label}
        if _words(chart):
            ax.barh(places, values, 0.62, left=base, **options)
        else:
            ax.bar(places, values, 0.84, bottom=base, **options)
        base = base + values
    names = [_plain(str(x)) for x in chart.x]
    if _words(chart):
        ax.set_yticks(places, names)
        ax.invert_yaxis()
        ax.set_xlabel(chart.y_label)
        _form(ax, chart, "x")
    else:
        every = max(1, -(-len(names) // 10))
        ax.set_xticks(places[::every], names[::every])
        ax.set_xlabel(chart.x_label)
        ax.set_ylabel(chart.y_label)
        _form(ax, chart, "y")
    ax.legend(frameon=False, fontsize=8, ncols=2, **_below())


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
        ax.plot(
            [bar.value], [y], marker, color=colour, markersize=6, markerfacecolor="white" if final else colour, zorder=3
        )
    ax.set_yticks(range(len(labels)), [_plain(label) for label in labels])
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.set_xlabel(f"{chart.y_label} (filled: best, hollow: final)")
    _form(ax, chart, "x")


def draw_threshold(tokens: dict[str, Any]) -> Figure | None:
    """D_t of every token of one response and the largest D_t within the limits (the paper's Figure 3).

    Of the last sampled step of a run of cppo where there is one, the response with the most held-back tokens that are
    at most half of it; else of any. None without a response, or where no rule has a threshold.
    """
    found = max(tokens["responses"], key=lambda r: _telling(tokens, r), default=None)
    at = None if found is None else _judge_of(tokens, found)
    if found is None or at is None:
        return None
    verdict, judge = found["verdicts"][at], _judges(tokens, found)[at]
    D = _floats(found["D"][verdict["d"]]["values"][:MOST_BARS])
    t = np.arange(1, len(D) + 1)
    given = verdict["th"]
    threshold = _floats(given[:MOST_BARS]) if isinstance(given, list) else np.full(len(D), float(given))
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    ax = figure.subplots()
    ax.spines[["top", "right"]].set_visible(False)
    _reasons(ax, t, D, verdict["r"])
    ax.step(t, threshold, where="mid", color="black", linewidth=1.3, label="largest $D_t$ within the limits")
    largest = float(np.nanmax(D))
    ax.set_ylim(max(np.nanmin(threshold), -0.5 * largest) if np.nanmin(threshold) < 0 else 0, None)
    if np.nanmax(threshold) > 4 * largest:
        ax.set_ylim(top=4 * largest)
    ax.axhline(0, color=GREY, linewidth=0.6)
    ax.set_xlabel("position in the response (tokens)")
    ax.set_ylabel(f"$D_t$: {found['D'][verdict['d']]['name']}")
    ax.set_title(_plain(f"{judge['label']}: threshold and divergence of a response"), loc="left", fontsize=11)
    ax.legend(frameon=False, fontsize=8, ncols=3, **_below())
    return figure


def _reasons(ax: Axes, t: np.ndarray, D: np.ndarray, codes: str) -> None:
    for code in Reason:
        name = code.name.lower()
        chosen = np.array([int(c) == code for c in codes[: len(D)]])
        if code == Reason.OUTSIDE or not chosen.any():
            continue
        label, colour, pattern = REASONS.get(name, (name, GREEN if name == "towards" else GREY, ""))
        ax.bar(t[chosen], D[chosen], 0.8, color=colour, hatch=pattern, edgecolor="white", linewidth=0, label=label)


def _judge_of(tokens: dict[str, Any], response: dict[str, Any]) -> int | None:
    """The run's own rule where it has a threshold, else the first that has."""
    order = [response["own"]] if response["own"] is not None else []
    order += [k for k, judge in enumerate(_judges(tokens, response)) if judge["rule"] == "cppo"]
    order += list(range(len(response["verdicts"])))
    return next((k for k in order if "th" in response["verdicts"][k]), None)


def _judges(tokens: dict[str, Any], response: dict[str, Any]) -> list[dict[str, Any]]:
    """The rules of a response's verdicts: the page's, and the run's own where the page has no room for it."""
    return tokens["judges"] + ([response["extra"]] if "extra" in response else [])


def _telling(tokens: dict[str, Any], response: dict[str, Any]) -> tuple[bool, bool, int, int]:
    own = response["own"]
    cppo = own is not None and _judges(tokens, response)[own]["rule"] == "cppo"
    return cppo, 0 < 2 * response["held"] <= response["length"], response["step"] or 0, response["held"]
