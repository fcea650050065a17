"""A dump of rollouts from any engine, as a report: what `cppo inspect` says, beside the token view."""

from __future__ import annotations

from pathlib import Path

from cppo.dumps.charts import charts_of
from cppo.dumps.dump import read_dump
from cppo.dumps.inspect import inspect_dump
from cppo.report.words import dump_tables
from cppo.show.charts import Section
from cppo.show.tables import Cells


def dump_report(path: Path) -> tuple[Section, list[Cells], list[str]]:
    """Charts, tables and notes of a dump."""
    found = inspect_dump(read_dump(path))
    section = Section(
        "trust", "Trust region", "Where in a response the policy has left the rollout policy.", charts_of(found)
    )
    return section, dump_tables(found), list(found["notes"])
