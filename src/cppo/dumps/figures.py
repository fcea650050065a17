"""Figures of `inspect_dump` as PNG and SVG: divergence and budget by position, and where rules disagree.

Colours are those of the plots of a run (Okabe and Ito's; cividis for the map), no two lines differ in colour alone, and
the map says its numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from cppo.runs.plots import BLUE, FEW_TOKENS, GREY, RED
from cppo.show.figures import save_figure

Report = Mapping[str, Any]


def write_figures(report: Report, folder: str | Path) -> list[Path]:
    """Draw what the report holds into a folder (made where it is missing); returns the paths, two a figure.

    Raises: files.DiskFullError.
    """
    drawings: dict[str, Callable[[Report], Figure]] = {"divergence": draw_divergence}
    if report["budget"] is not None:
        drawings["budget"] = draw_budget
    if len(report["disagreement"]["rules"]) > 1:
        drawings["disagreement"] = draw_disagreement
    return [path for name, draw in drawings.items() for path in save_figure(draw(report), folder, name)]


def draw_divergence(report: Report) -> Figure:
    """Mean and top-10% tail of D_t by position (the paper's Figure 2)."""
    figure, ax = _lines(report["divergence"]["by_position"])
    ax.set_title("Where in a response the policy has left the rollout policy", loc="left", fontsize=11)
    ax.set_ylabel(f"divergence $D_t$: {report['divergence']['name']}")
    return figure


def draw_budget(report: Report) -> Figure:
    """Mean and top-10% tail of S_t / (delta + delta_b W_{t-1}) by position (the paper's Figure 7)."""
    figure, ax = _lines(report["budget"]["share_by_position"])
    ax.axhline(1, color=GREY, linestyle=":", linewidth=1.2, label="all of it: only moves towards mu are kept")
    ax.legend(frameon=False, fontsize=8.5, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14), handlelength=4)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_title("How much of CPPO's prefix budget is spent", loc="left", fontsize=11)
    ax.set_ylabel(r"$S_t \,/\, (\delta + \delta_b W_{t-1})$")
    return figure


def draw_disagreement(report: Report) -> Figure:
    """Share of the loss tokens that one rule keeps and another drops."""
    names, share = report["disagreement"]["rules"], np.array(report["disagreement"]["share"])
    figure = Figure(figsize=(2.2 + 0.62 * len(names), 1.8 + 0.5 * len(names)), layout="constrained")
    ax = figure.subplots()
    top = max(float(share.max()), 1e-9)
    ax.imshow(share, cmap="cividis", vmin=0, vmax=top, aspect="auto")
    for row, column in np.ndindex(share.shape):
        text = "" if row == column else f"{share[row, column]:.1%}"
        light = share[row, column] > 0.6 * top
        ax.text(column, row, text, ha="center", va="center", fontsize=8, color="black" if light else "white")
    ax.set_xticks(range(len(names)), names, rotation=40, ha="right")
    ax.set_yticks(range(len(names)), names)
    ax.set_title("Tokens that one rule keeps and the other drops", loc="left", fontsize=11)
    return figure


def _lines(positions: Mapping[str, Any]) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    ax = figure.subplots()
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", alpha=0.25, linewidth=0.6)
    count = np.array(positions["count"])
    enough = count >= min(FEW_TOKENS, count.max())  # a mean of a few tokens says little
    x = (np.arange(len(count)) * positions["width"] + (positions["width"] + 1) / 2)[enough]
    every = max(1, len(x) // 12)
    for name, label, colour, marker, style in (
        ("mean", "mean", BLUE, "o", "-"),
        ("tail_mean", "mean of the top 10%", RED, "s", "--"),
    ):
        y = np.array(positions[name], dtype=float)[enough]
        ax.plot(x, y, style, color=colour, marker=marker, markevery=every, markersize=4, linewidth=1.8, label=label)
    ax.set_ylim(bottom=0)
    width = positions["width"]
    ax.set_xlabel("position in the response (loss tokens" + (f"; means over {width})" if width > 1 else ")"))
    ax.legend(frameon=False, fontsize=8.5, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14), handlelength=4)
    return figure, ax
