"""Studies of real runs, processes and all: a comparison, its report, and an ablation."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cppo.cli.ablate import ablate
from cppo.cli.compare import compare
from cppo.cli.report import default_page, report
from cppo.report.page import build
from cppo.report.source import open_source
from cppo.runs.folder import RunFolder
from cppo.study.results import read_results
from cppo.study.store import load_plan
from forks import python

from .planned import TRAINING

SETTINGS = [
    *("task=toy_task:Letters", "evaluation.problems=2", "evaluation.samples=2", "optimizer.learning_rate=0.003"),
    *("tiny.hidden_size=32", "tiny.layers=1", "tiny.heads=2", "warmup.steps=4", "warmup.batch_size=16"),
    *("rollout.prompts=4", "rollout.responses=4", "rollout.max_new_tokens=24", "updates=2"),
]


@pytest.fixture(scope="module", autouse=True)
def processes() -> Iterator[None]:
    """The task can be imported, here and in the runs, which are forks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TRAINING), os.environ.get("PYTHONPATH", "")]))
        patch.syspath_prepend(str(TRAINING))
        patch.setattr(sys, "executable", python())
        yield


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rules, one seed."""
    folder = tmp_path_factory.mktemp("compare") / "study"
    settings = [*SETTINGS, "steps=2", "rule.delta=0.1", "rule.delta_b=0.001", "samples.every=1"]
    compare(settings, rules="dppo,cppo", seeds=1, jobs=2, out=folder)
    return folder


@pytest.mark.slow
def test_a_real_comparison(comparison: Path) -> None:
    """Same start, another end, and nothing to do the second time."""
    results = read_results(load_plan(comparison))
    dppo, cppo = results.records
    assert results.complete and results.unmatched == [] and dppo.before == cppo.before
    assert dppo.rewards[0] == cppo.rewards[0], "the same policy, prompts and seeds: the same first rollouts"
    assert dppo.masked_fraction != cppo.masked_fraction
    assert dppo.seconds > 0 and set(dppo.final) == {"letters", "mean"}
    began = time.monotonic()
    compare(resume=comparison)
    assert time.monotonic() - began < 10, "finished runs are left alone"


@pytest.mark.slow
def test_the_report_of_a_real_comparison(comparison: Path) -> None:
    page = build(open_source(comparison))
    names = {chart.name for chart in page.charts}
    assert {"result", "reward", "avg-letters", "length", "entropy", "masked", "drift", "relative", "surrogate"} <= names
    assert {response["run"] for response in page.tokens.responses} == {"dppo-seed0", "cppo-seed0"}
    report(comparison)
    assert page.source.marks == [] and default_page(comparison).stat().st_size < 1_000_000


@pytest.mark.slow
def test_a_real_ablation(tmp_path: Path) -> None:
    """A frontier and calibrated rules: files, shared runs, and nothing to do again."""
    asked = {"only": "frontier,delta", "rules": "cppo", "learning_rates": "0.003", "updates": "1,2", "targets": "0.1"}
    folder = tmp_path / "study"
    settings = [*SETTINGS, "steps=3", "calibration.steps=1"]
    ablate(settings, seeds=1, jobs=2, out=folder, **asked)
    assert sorted(path.name for path in (folder / "runs").iterdir()) == [
        "cppo-0.1-seed0",
        "cppo-lr-0.003-M-2-seed0",
        "none-lr-0.003-M-1-seed0",
    ]
    saved = json.loads((folder / "frontier" / "results.json").read_text())
    (cppo,) = saved["answer"]["maps"]
    assert [cell["updates"] for cell in cppo["cells"]] == [1, 2] and saved["answer"]["missing"] == []
    assert cppo["by_seed"]["0"] == pytest.approx(sum(cell["final"] for cell in cppo["cells"]) / 2)
    plots = sorted(path.name for path in (folder / "frontier" / "plots").iterdir())
    assert plots == ["frontier.png", "frontier.svg"]
    assert "largest learning rate at which it still learns" in (folder / "table.md").read_text()
    (point,) = json.loads((folder / "delta" / "results.json").read_text())["answer"]["points"]
    run = folder / "runs" / "cppo-0.1-seed0"
    assert json.loads((run / "calibration.json").read_text())["target"] == 0.1
    rows = [row for row in RunFolder(run).metrics() if row["kind"] == "train" and row["step"] > 1]
    assert len(rows) == 4  # two updates in each of the steps after the calibration
    assert point["masked"] == pytest.approx(sum(row["trust/masked_fraction"] for row in rows) / 4)
    assert point["final"]["count"] == 1
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("metrics.jsonl")}
    ablate(resume=folder)
    assert before == {path: path.stat().st_mtime_ns for path in before}
