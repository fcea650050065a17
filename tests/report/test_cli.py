"""The command: where it writes, what it says, what it refuses; and the figures for papers."""

from __future__ import annotations

import importlib.util
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from cppo.cli import report as cli_report
from cppo.errors import UserError
from cppo.report.figures import draw, draw_threshold, write_figures
from cppo.report.page import build
from cppo.report.source import open_source
from cppo.show.charts import Section
from said import said

from .made import plan_of, write_run


def test_default_place_and_words(tmp_path):
    config = plan_of(tmp_path / "plan", ("cppo",), 1).trained[0].config
    folder = write_run(tmp_path / "run", config, last=4)
    text = said(cli_report.report, folder)
    assert (folder / "report.html").is_file()
    assert "Note: This run is in progress or was stopped: step 4 of 8." in text and "Written: " in text


def test_every_chart_can_be_drawn(study, report):
    for chart in [*report.charts, *build(open_source(study / "runs" / "cppo-seed0")).charts]:
        (ax,) = draw(chart).axes
        assert ax.get_title(loc="left") == chart.title
        drawn = {"lines": ax.lines, "stack": ax.patches, "intervals": ax.lines}[chart.kind]
        assert len(drawn) >= len(chart.lines or chart.layers or chart.bars)
    assert draw_threshold(report.tokens.as_json()) is not None


def test_figures_are_whole_files_and_always_the_same(report, tmp_path):
    kinds = {chart.kind: chart for chart in report.charts}
    few = replace(report, result=[], sections=[Section("some", "Some", "", list(kinds.values()))])
    paths = write_figures(few, tmp_path / "figures")
    names = {path.stem for path in paths}
    assert names == {chart.name for chart in kinds.values()} | {"threshold"} and len(kinds) == 3
    assert {path.suffix for path in paths} == {".png", ".svg"} and len(paths) == 2 * len(names)
    for path in paths:
        if path.suffix == ".png":
            assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000
        else:
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
    before = {path.name: path.read_bytes() for path in paths}
    assert {path.name: path.read_bytes() for path in write_figures(few, tmp_path / "figures")} == before


def test_opening(study, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(cli_report.webbrowser, "open", lambda uri: seen.append(uri) or False)
    monkeypatch.setattr("cppo.report.figures.write_figures", lambda report, folder: [folder / "reward.png"])
    text = said(cli_report.report, study, tmp_path / "page.html", open_page=True, figures=tmp_path / "figures")
    assert f"Written to {tmp_path / 'figures'}: 1 files" in text
    assert seen == [(tmp_path / "page.html").as_uri()] and "no browser" in text


def test_refusals(study, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is a folder"):
        cli_report.report(study, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--figures .* is a file"):
        cli_report.report(study, tmp_path / "page.html", figures=tmp_path / "file")
    with pytest.raises(UserError, match="there is nothing at"):
        cli_report.report(tmp_path / "missing")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jinja2" else found(name))
    with pytest.raises(UserError, match=r"needs jinja2 .* pip install 'cppo\[study\]'"):
        cli_report.report(study)
