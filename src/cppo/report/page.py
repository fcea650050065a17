"""The page: everything in one file, with nothing that is fetched and nothing that is run but its own script.

What comes from models, prompts and file names gets in by two ways only: Jinja's autoescape, and one block of JSON whose
`<`, `>` and `&` are \\u escapes, read by the script and put on the page as text. A content security policy with the
hashes of the page's own style and script forbids everything else, should both ever fail.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from cppo.errors import UserError
from cppo.report import words
from cppo.report.curves import training_charts
from cppo.report.dumps import dump_report
from cppo.report.source import Source
from cppo.report.tokens import TokenData, token_data
from cppo.report.trust import result_chart, trust_section
from cppo.rules import Reason
from cppo.runs.samples import printable
from cppo.show.charts import Chart, Section

#: The largest page, in bytes.
LIMIT = 5_000_000
#: Least of it that tokens may take.
LEAST_FOR_TOKENS = 500_000

STYLES = ("charts.css", "page.css", "tokens.css")
SCRIPTS = ("svg.js", "chart.js", "tokenplot.js", "tokens.js", "main.js")


@dataclass
class Report:
    """What a report holds, before it is a page."""

    source: Source
    result: list[Chart]
    sections: list[Section]
    tokens: TokenData
    tables: list[Any]
    notes: list[str]

    @property
    def charts(self) -> list[Chart]:
        """All charts, in the order of the page."""
        return [*self.result, *(chart for section in self.sections for chart in section.charts)]


def build(source: Source, limit: int = LIMIT) -> Report:
    """Read the samples and draw up all charts and tables; tokens take what the rest leaves of `limit` bytes."""
    if source.kind == "dump":
        return _of_dump(source, limit)
    training = training_charts(source)
    result = result_chart(source.results) if source.results is not None else None
    charts = [*training.charts, *trust_section(source, None).charts]
    taken = sum(len(json.dumps(chart.as_json())) for chart in charts) + _fixed_size(source)
    tokens = token_data(source, max(LEAST_FOR_TOKENS, limit - taken))
    sections = [training, trust_section(source, tokens.relative)]
    tables = words.result_tables(source)
    return Report(source, [result] if result is not None else [], sections, tokens, tables, words.result_notes(source))


def _of_dump(source: Source, limit: int) -> Report:
    section, tables, notes = dump_report(source.path)
    return Report(source, [], [section], token_data(source, limit - 400_000), tables, notes)


def _fixed_size(source: Source) -> int:
    return 300_000 + 2_000 * len(source.runs)


def render(report: Report) -> str:
    """The page as HTML.

    Raises
    ------
    UserError : it would be larger than `LIMIT` (thousands of runs).
    """
    source = report.source
    style = "\n".join(map(_template, STYLES))
    script = "\n".join(map(_template, SCRIPTS))
    versions, differing = words.versions_table(source)
    page = _environment().from_string(_template("report.html.j2"))
    html = page.render(
        title=words.title_of(source),
        kind=source.kind,
        path=str(source.path),
        facts=words.facts_of(source) if source.kind != "dump" else [],
        marks=source.marks,
        headlines=words.headlines(source),
        result=[(at, chart) for at, chart in enumerate(report.result)],
        sections=_numbered(report),
        tables=report.tables,
        notes=report.notes,
        runs=words.runs_table(source),
        rules=words.rules_table(source) if source.variants else None,
        configuration=words.configuration(source),
        versions=versions,
        differing=differing,
        tokens=report.tokens,
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        data=Markup(embedded(_data(report))),
    )
    size = len(html.encode("utf-8", errors="replace"))
    if size > LIMIT:
        raise UserError(
            f"the report of {source.path} would take {size / 1e6:.1f} MB, more than {LIMIT / 1e6:.0f} MB: it has "
            f"{len(source.runs)} runs. Report on single runs instead."
        )
    return html


def _numbered(report: Report) -> list[tuple[Section, list[tuple[int, Chart]]]]:
    at, found = len(report.result), []
    for section in report.sections:
        found.append((section, list(enumerate(section.charts, start=at))))
        at += len(section.charts)
    return [(section, charts) for section, charts in found if charts]


def _data(report: Report) -> dict[str, Any]:
    return {
        "charts": [chart.as_json() for chart in report.charts],
        "variants": report.source.variants,
        "tokens": report.tokens.as_json(),
        "reasons": [{"name": code.key, "words": code.caption, "held": code.held} for code in Reason],
    }


def embedded(value: Mapping[str, Any]) -> str:
    """JSON that is safe inside <script type="application/json">: no <, >, & and no line ends of JavaScript."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _template(name: str) -> str:
    return (resources.files("cppo.report") / "templates" / name).read_text(encoding="utf-8")


def _environment() -> Environment:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["printable"] = lambda text: printable(str(text))
    return environment
