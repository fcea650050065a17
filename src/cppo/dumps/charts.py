"""What `inspect_dump` says by position, as `Chart`s: for figures and for the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cppo.runs.charts import by_position, curves_by_position
from cppo.show.charts import Chart

Report = Mapping[str, Any]
CAPTION = "Positions count the loss tokens of a response from 1."


def charts_of(report: Report) -> list[Chart]:
    """Divergence by position, and where the dump has one CPPO's budget."""
    return [divergence(report), *([budget(report)] if report["budget"] is not None else [])]


def divergence(report: Report) -> Chart:
    """Mean and top-10% tail of D_t by position (the paper's Figure 2)."""
    found = report["divergence"]
    return _chart(
        found["by_position"],
        name="divergence",
        title="Where in a response the policy has left the rollout policy",
        y_label=f"D_t: {found['name']}",
    )


def budget(report: Report) -> Chart:
    """Mean and top-10% tail of S_t / (delta + delta_b W_{t-1}) by position (the paper's Figure 7)."""
    return _chart(
        report["budget"]["share_by_position"],
        name="budget",
        title="How much of CPPO's prefix budget is spent (dotted: all of it)",
        y_label="S_t / (delta + delta_b W_{t-1})",
        form="percent",
        reference=1.0,
    )


def _chart(positions: Mapping[str, Any], **words: Any) -> Chart:
    width = positions["width"]
    return by_position(curves_by_position(positions, width), width=width, caption=CAPTION, **words)
