"""A dump of rollouts from any engine, as a report: what `cppo inspect` says, beside the token view."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cppo.dumps.dump import read_dump
from cppo.dumps.inspect import inspect_dump
from cppo.report.charts import Chart, Line, Section
from cppo.report.words import dump_tables
from cppo.show.tables import Cells


def dump_report(path: Path) -> tuple[Section, list[Cells], list[str]]:
    """Charts, tables and notes of a dump."""
    found = inspect_dump(read_dump(path))
    D = found["divergence"]
    charts = [
        _by_position(
            "position",
            "Divergence by position",
            f"D_t: {D['name']}",
            D["by_position"],
        )
    ]
    if found["budget"] is not None:
        charts.append(
            _by_position(
                "budget",
                "How much of CPPO's prefix budget is spent",
                "share of the budget",
                found["budget"]["share_by_position"],
                form="percent",
                reference=1.0,
            )
        )
    section = Section("trust", "Trust region", "Where in a response the policy has left the rollout policy.", charts)
    return section, dump_tables(found), list(found["notes"])


def _by_position(
    name: str,
    title: str,
    y_label: str,
    positions: dict[str, Any],
    form: str = "number",
    reference: float | None = None,
) -> Chart:
    width = positions["width"]
    x = [at * width + (width + 1) / 2 for at in range(len(positions["count"]))]
    lines = (
        Line("mean", 0, x, positions["mean"]),
        Line("mean of the largest tenth", 1, x, positions["tail_mean"], dashed=True),
    )
    caption = "Positions count the loss tokens of a response from 1."
    return Chart(
        name,
        title,
        "lines",
        "position in the response (loss tokens)",
        y_label,
        form,
        caption,
        zero=True,
        lines=lines,
        reference=reference,
    )
