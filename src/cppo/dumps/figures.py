"""Figures of `inspect_dump` as PNG and SVG: divergence and budget by position, and where rules disagree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from cppo.dumps.charts import charts_of
from cppo.show.figures import draw, save_figure

Report = Mapping[str, Any]


def write_figures(report: Report, folder: str | Path) -> list[Path]:
    """Draw what the report holds into a folder (made where it is missing); returns the paths, two per figure.

    Raises: files.DiskFullError.
    """
    figures = {chart.name: draw(chart, (7.2, 4.2)) for chart in charts_of(report)}
    if len(report["disagreement"]["rules"]) > 1:
        figures["disagreement"] = draw_disagreement(report)
    return [path for name, figure in figures.items() for path in save_figure(figure, folder, name)]


def draw_disagreement(report: Report) -> Figure:
    """Share of the loss tokens that one rule keeps and another drops; every cell says its number."""
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
