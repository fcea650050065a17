"""`cppo report`: a run, a study or a dump as one HTML file, and its figures for papers."""

from __future__ import annotations

import importlib.util
import webbrowser
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cppo.errors import UserError

#: The report's name in the folder that it is about.
REPORT_FILE = "report.html"
#: package -> what it is for.
NEEDED = {"jinja2": "the page", "scipy": "intervals over seeds"}


def report(
    source: Annotated[Path, typer.Argument(metavar="RUN|STUDY", help="A run, a study, or a dump of `cppo inspect`.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The HTML file (default: report.html in the folder).")
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
    figures: Annotated[
        Path | None, typer.Option("--figures", metavar="DIR", help="Write the figures there, too, as PNG and SVG.")
    ] = None,
) -> None:
    """One HTML file about a run or a study: curves, tables, and every token under every rule.

    cppo report studies/compare-arithmetic-001 --open
    """
    for package, purpose in NEEDED.items():
        if importlib.util.find_spec(package) is None:
            raise UserError(f"cppo report needs {package} for {purpose}: pip install 'cppo[study]'.")
    target = out or default_page(source)
    if target.is_dir():
        raise UserError(f"--out {target} is a folder; give the name of a file, such as {target / REPORT_FILE}.")
    if figures is not None and figures.is_file():
        raise UserError(f"--figures {figures} is a file; give a folder.")
    from cppo.files import atomic_write_text
    from cppo.report.page import build, render
    from cppo.report.source import open_source

    found = open_source(source)
    built = build(found)
    path = atomic_write_text(target, render(built))
    console = Console(highlight=False)
    for mark in found.marks:
        console.print(f"Note: {mark}", markup=False, soft_wrap=True)
    size = path.stat().st_size / 1e6
    console.print(
        f"Written: {path} ({size:.1f} MB, {len(built.tokens.responses)} responses)", markup=False, soft_wrap=True
    )
    if figures is not None:
        from cppo.report.figures import write_figures

        paths = write_figures(built, figures)
        console.print(f"Written to {figures}: {len(paths)} files, PNG and SVG", markup=False, soft_wrap=True)
    if open_page and not webbrowser.open(path.resolve().as_uri()):
        console.print("There is no browser to open it in.")


def default_page(source: Path) -> Path:
    """In the folder; of a dump that is a file beside it, by its name."""
    return source.parent / f"{source.stem}-{REPORT_FILE}" if source.is_file() else source / REPORT_FILE
