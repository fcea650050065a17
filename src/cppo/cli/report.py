"""`cppo report`: a run, a study or a dump as one HTML file, and its figures for papers."""

from __future__ import annotations

import importlib.util
import webbrowser
from pathlib import Path

from rich.console import Console

from cppo.errors import UserError

#: The report's name in the folder that it is about.
REPORT_FILE = "report.html"
#: package -> what it is for.
NEEDED = {"jinja2": "the page", "scipy": "intervals over seeds"}


def run(
    source: Path,
    out: Path | None = None,
    open_page: bool = False,
    figures: Path | None = None,
    console: Console | None = None,
) -> Path:
    """The command; returns the path of the page.

    Parameters
    ----------
    source : folder of a run or a study, as far as they have come; or a dump of `cppo inspect`.
    out : the HTML file (default: report.html in the folder; of a dump that is a file: beside it, by its name).
    open_page : show it in the browser. figures : folder for the figures as PNG and SVG.

    Raises
    ------
    UserError : `source` is nothing of the kind, `out` is a folder, or a package is missing.
    """
    console = console or Console(highlight=False)
    for package, purpose in NEEDED.items():
        if importlib.util.find_spec(package) is None:
            raise UserError(f"cppo report needs {package} for {purpose}: pip install 'cppo[study]'.")
    target = out or _default(source)
    if target.is_dir():
        raise UserError(f"--out {target} is a folder; give the name of a file, such as {target / REPORT_FILE}.")
    if figures is not None and figures.is_file():
        raise UserError(f"--figures {figures} is a file; give a folder.")
    from cppo.files import atomic_write_text
    from cppo.report.page import build, render
    from cppo.report.source import open_source

    found = open_source(source)
    report = build(found)
    path = atomic_write_text(target, render(report))
    for mark in found.marks:
        console.print(f"Note: {mark}", markup=False, soft_wrap=True)
    size = path.stat().st_size / 1e6
    console.print(
        f"Written: {path} ({size:.1f} MB, {len(report.tokens.responses)} responses)", markup=False, soft_wrap=True
    )
    if figures is not None:
        from cppo.report.figures import write_figures

        paths = write_figures(report, figures)
        console.print(f"Written to {figures}: {len(paths)} files, PNG and SVG", markup=False, soft_wrap=True)
    if open_page and not webbrowser.open(path.resolve().as_uri()):
        console.print("There is no browser to open it in.")
    return path


def _default(source: Path) -> Path:
    return source.parent / f"{source.stem}-{REPORT_FILE}" if source.is_file() else source / REPORT_FILE
