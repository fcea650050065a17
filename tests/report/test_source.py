"""What lies at a path, and the sentences about what is not complete."""

from __future__ import annotations

import json
import shutil

import pytest

from cppo.errors import UserError
from cppo.report.source import open_source
from cppo.report.tokens import token_data
from cppo.study.results import read_results
from cppo.study.store import load_plan

from .made import STEPS, plan_of, write_run


def test_a_whole_study_has_no_marks(study):
    source = open_source(study)
    assert source.kind == "study" and source.marks == []
    assert [run.state for run in source.runs] == ["finished"] * 4
    assert [len(source.counted(variant)) for variant in source.variants] == [2, 2]


def test_half_a_study_says_so_first(half):
    source = open_source(half)
    states = {run.name: run.state for run in source.runs}
    assert states == {record.name: record.state for record in read_results(load_plan(half)).records}
    assert source.marks[0].startswith("This study is not complete: 1 of 6 runs are finished")
    assert "1 failed, 1 in progress, 3 not started" in source.marks[0]
    assert "cppo-seed0 failed: <i>the disk is full</i>" in source.marks
    assert [run.name for run in source.counted("dppo")] == ["dppo-seed0"], "finished runs alone"
    assert any(mark.startswith("cppo has no finished run") for mark in source.marks)


@pytest.mark.parametrize("last, says", [(3, f"step 3 of {STEPS}"), (0, "has not begun to train")])
def test_a_run_in_progress(tmp_path, last, says):
    config = plan_of(tmp_path / "plan", ("cppo",), 1).trained[0].config
    folder = write_run(tmp_path / "run", config, last=last)
    source = open_source(folder)
    assert source.kind == "run" and source.runs[0].state == "in progress"
    assert len(source.marks) == 1 and says in source.marks[0]


def test_a_finished_run(study):
    source = open_source(study / "runs" / "cppo-seed1")
    run = source.runs[0]
    assert (run.state, run.variant, run.seed, run.step, source.marks) == ("finished", "cppo", 1, STEPS, [])
    planned = next(one for one in load_plan(study).trained if one.name == "cppo-seed1")
    assert run.rule == planned.config.make_rule()


def test_thresholds_that_set_themselves(tmp_path, study):
    """The run's own threshold is the one that it found, and the token view judges by it."""
    folder = tmp_path / "run"
    shutil.copytree(study / "runs" / "cppo-seed0", folder)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("delta: 0.15", "delta: auto"))
    assert "0 of the 4 batches" in open_source(folder).marks[0]
    entry = {"step": 1, "tokens": 100, "thresholds": {"delta": 0.07}, "share": 0.01}
    record = {"rule": "cppo", "target": 0.01, "steps": 1, "thresholds": {"delta": 0.07}, "history": [entry]}
    (folder / "calibration.json").write_text(json.dumps(record))
    source = open_source(folder)
    assert source.runs[0].rule.delta == 0.07 and source.marks == []
    response = token_data(source, 1_000_000).responses[0]
    assert response["verdicts"][response["own"]]["left"][0] == 0.07


def test_a_rule_of_another_version(tmp_path, study):
    folder = tmp_path / "run"
    shutil.copytree(study / "runs" / "cppo-seed0", folder)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("name: cppo", "name: cppo_next"))
    source = open_source(folder)
    assert source.runs[0].rule is None and "there is no rule 'cppo_next'" in source.marks[0]


def test_a_damaged_file_is_a_mark(tmp_path, study):
    folder = tmp_path / "run"
    shutil.copytree(study / "runs" / "cppo-seed0", folder)
    (folder / "positions.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    source = open_source(folder)
    assert source.runs[0].positions == [] and source.runs[0].metrics
    assert "Line 2 of" in source.marks[0] and "positions.jsonl" in source.marks[0]


def test_a_torn_last_line_is_nothing(tmp_path, study):
    folder = tmp_path / "run"
    shutil.copytree(study / "runs" / "cppo-seed0", folder)
    with open(folder / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 9, "upd')
    assert open_source(folder).marks == []


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("nothing", None, "there is nothing at"),
        ("empty", {}, "neither a run .* nor a study .* nor a dump"),
        ("text.txt", "text", "neither a run"),
        ("run", {"config.yaml": "- 1\n"}, "holds no configuration"),
        ("run", {"config.yaml": "a: [\n"}, "config.yaml"),
        ("run", {"metrics.jsonl": "{}\n"}, "config.yaml is missing"),
        ("study", {"study.yaml": "study: 1\n"}, "is not a plan of a study"),
        ("study", {"study.yaml": json.dumps({"study": 99})}, "is of version 99"),
    ],
)
def test_what_is_no_source(tmp_path, name, content, says):
    path = tmp_path / name
    if isinstance(content, str):
        path.write_text(content)
    elif content is not None:
        path.mkdir()
        for file, text in content.items():
            (path / file).write_text(text)
    with pytest.raises(UserError, match=says):
        open_source(path)
