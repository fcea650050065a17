"""The report's charts as PNG and SVG for papers: the same `Chart`s as the page's, and the threshold of a response."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cppo.rules import Reason
from cppo.runs.charts import REASONS
from cppo.show import figures
from cppo.show.figures import GREY, below, draw, floats, frame, save_figure

if TYPE_CHECKING:
    from cppo.report.page import Report

#: Tokens of a threshold figure whose bars can be told apart.
MOST_BARS = 400


def write_figures(report: Report, folder: str | Path) -> list[Path]:
    """Draw every chart, and the threshold of a response, into a folder; returns the paths, two per figure.

    Raises: files.DiskFullError.
    """
    drawn = {chart.name: draw(chart) for chart in report.charts}
    if (threshold := draw_threshold(report.tokens.as_json())) is not None:
        drawn["threshold"] = threshold
    return [path for name, figure in drawn.items() for path in save_figure(figure, folder, name, dpi=160)]


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
    D = floats(found["D"][verdict["d"]]["values"][:MOST_BARS])
    t = np.arange(1, len(D) + 1)
    given = verdict["th"]
    threshold = floats(given[:MOST_BARS]) if isinstance(given, list) else np.full(len(D), float(given))
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    ax = figure.subplots()
    frame(ax, f"{judge['label']}: threshold and divergence of a response")
    _reasons(ax, t, D, verdict["r"])
    ax.step(t, threshold, where="mid", color="black", linewidth=1.3, label="largest $D_t$ within the limits")
    largest = float(np.nanmax(D))
    ax.set_ylim(max(np.nanmin(threshold), -0.5 * largest) if np.nanmin(threshold) < 0 else 0, None)
    if np.nanmax(threshold) > 4 * largest:
        ax.set_ylim(top=4 * largest)
    ax.axhline(0, color=GREY, linewidth=0.6)
    ax.set_xlabel("position in the response (tokens)")
    ax.set_ylabel(f"$D_t$: {found['D'][verdict['d']]['name']}")
    ax.legend(**below(ncols=3))
    return figure


def _reasons(ax: Axes, t: np.ndarray, D: np.ndarray, codes: str) -> None:
    for code in Reason:
        name = code.name.lower()
        chosen = np.array([int(c) == code for c in codes[: len(D)]])
        if code == Reason.OUTSIDE or not chosen.any():
            continue
        colour, hatch = figures.REASONS.get(name, (GREY, ""))
        label = REASONS.get(name, name)
        ax.bar(t[chosen], D[chosen], 0.8, color=colour, hatch=hatch, edgecolor="white", linewidth=0, label=label)


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
