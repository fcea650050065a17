"""Running a plan: order, failures, Ctrl-C, going on; with a program in place of `cppo train`."""

from __future__ import annotations

import fcntl
import io
import json
import os
import signal
import threading
import time

import pytest
from rich.console import Console

from cppo.errors import UserError
from cppo.files import DiskFullError
from cppo.runs.folder import RunFolder
from cppo.show.progress import RunProgress
from cppo.study.compare import execute
from cppo.study.results import read_results
from cppo.study.runner import Runner
from cppo.study.status import finished, last_error
from cppo.study.store import load_plan

from .planned import programmed


@pytest.fixture
def study(tmp_path, monkeypatch):
    """See `programmed`."""
    return programmed(tmp_path, monkeypatch)


def test_everything_runs_after_its_warmup(study):
    plan, go, events = study
    assert go(jobs=3) == {}
    assert all(finished(plan, run) for run in plan.runs)
    order = [name for name, what, *_ in events() if what == "begin"]
    for run in plan.trained:
        assert order.index(run.name) > order.index(run.after)
    assert {threads for *_, threads in events()} == {"1"}
    assert "compare 6/12" in go.written.getvalue() or "compare 12/12" in go.written.getvalue()
    assert (plan.folder / "logs" / "cppo-seed0.log").read_text().startswith("$ python -S")


@pytest.mark.parametrize("jobs", [1, 2])
def test_no_more_than_jobs_at_a_time(study, jobs):
    _, go, events = study
    go(jobs=jobs)
    at_once = most = 0
    for name, what, *_ in events():
        if not name.startswith("warmup"):
            at_once += {"begin": 1, "end": -1}[what]
            most = max(most, at_once)
    assert most == jobs


def test_a_failing_run_stops_no_other(study):
    plan, go, _ = study
    assert go(dppo_seed0="fail", cppo_seed1="kill") == {
        "dppo-seed0": "the disk is full",
        "cppo-seed1": "killed by SIGKILL (out of memory?)",
    }
    records = {record.name: record for record in read_results(plan).records}
    assert (records["dppo-seed0"].state, records["dppo-seed0"].error) == ("failed", "the disk is full")
    assert [records[name].state for name in ("cppo-seed0", "dppo-seed1")] == ["finished", "finished"]
    assert "dppo-seed0: failed: the disk is full" in go.written.getvalue()


def test_a_failing_warmup_stops_the_runs_of_its_seed(study):
    plan, go, events = study
    errors = go(warmup_seed0="fail")
    assert errors["warmup-seed0"] == "no demonstrations"
    assert errors["dppo-seed0"] == errors["cppo-seed0"] == "warmup-seed0 failed: no demonstrations"
    assert {name for name, *_ in events() if not name.startswith("warmup")} == {"dppo-seed1", "cppo-seed1"}
    assert go() == {} and all(finished(plan, run) for run in plan.runs)


def test_a_second_pass_does_what_is_left(study):
    plan, go, events = study
    go(dppo_seed0="fail")
    before = len(events())
    assert go() == {}
    assert [(name, what) for name, what, *_ in events()[before:]] == [("dppo-seed0", "resume"), ("dppo-seed0", "end")]
    assert read_results(plan).complete
    before = len(events())
    assert go() == {} and len(events()) == before


def test_a_summary_written_half_way_is_no_end(study):
    plan, go, _ = study
    go(dppo_seed0="fail")
    (plan.folder / "runs" / "dppo-seed0" / "summary.md").write_text("so far")
    assert not finished(plan, plan.trained[0]) and finished(plan, plan.trained[1])


def test_a_folder_without_configuration_begins_anew(study):
    plan, go, events = study
    folder = plan.folder / "runs" / "cppo-seed0"
    folder.mkdir(parents=True)
    (folder / "versions.json").write_text("{}")
    assert go() == {}
    assert ["cppo-seed0", "begin"] in [event[:2] for event in events()]


def test_ctrl_c_lets_runs_write_a_checkpoint(study):
    plan, go, events = study

    def interrupt():
        while not [name for name, what, *_ in events() if name == "cppo-seed0" and what == "begin"]:
            time.sleep(0.02)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt, match=f"cppo compare --resume {plan.folder}"):
        go(jobs=2, dppo_seed0="hang", cppo_seed0="hang")
    thread.join()
    assert sorted(name for name, what, *_ in events() if what == "checkpoint") == ["cppo-seed0", "dppo-seed0"]
    states = [record.state for record in read_results(plan).records]
    # the warm-up of the other seed may be done first, and then its runs begin first
    assert states[:2] == ["in progress", "in progress"] and set(states[2:]) <= {"not started", "finished"}
    assert go(jobs=2) == {} and read_results(plan).complete


def test_two_processes_cannot_share_a_study(study):
    plan, go, _ = study
    with open(plan.folder / ".lock", "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process works on"):
            go()


def test_a_moved_study_is_read_but_not_gone_on_with(study, tmp_path):
    plan, go, _ = study
    go(cppo_seed1="fail")
    moved = tmp_path.parent / f"{tmp_path.name}-moved"
    plan.folder.rename(moved)
    again = load_plan(moved)
    assert [record.state for record in read_results(again).records].count("finished") == 3
    with pytest.raises(UserError, match="Move it back"):
        Runner(again, 1, RunProgress(Console(file=io.StringIO()))).run()


def test_execute_writes_results_and_table(study):
    plan, go, _ = study
    go(cppo_seed1="fail")
    go.mend()
    console = Console(file=io.StringIO(), width=200)
    results, fine = execute(plan, 1, console)
    assert fine and results.complete and "best Avg@2" in console.file.getvalue()
    saved = json.loads((plan.folder / "results.json").read_text())
    assert saved["variants"][1]["best"]["mean"] == {"value": 0.4, "low": 0.4, "high": 0.4, "count": 2}
    assert "| cppo | 2 |" in (plan.folder / "table.md").read_text()
    assert "cppo(delta=0.1" in (plan.folder / "table.md").read_text()


@pytest.mark.parametrize(
    ("text", "status", "says"),
    [
        ("a\nError: x is wrong\n\nmore", 2, "x is wrong"),
        ("Traceback ...\n  line\nValueError: bad\n", 1, "ValueError: bad"),
        ("", 1, "ended with status 1 and said nothing"),
        ("Error: before", -9, "killed by SIGKILL (out of memory?)"),
        ("", -15, "killed by SIGTERM"),
    ],
)
def test_last_error(text, status, says):
    assert last_error(text, status) == says


def test_newest_step_of_a_torn_file(tmp_path):
    assert RunFolder(tmp_path).newest_step() is None
    rows = [{"step": step, "kind": "train", "fill": "x" * 900} for step in range(1, 200)]
    lines = [json.dumps(row) for row in [*rows, {"step": 199, "kind": "evaluation"}]]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 200, "ki')
    assert RunFolder(tmp_path).newest_step() == 199


def test_a_full_disk_leaves_no_processes(study, monkeypatch):
    plan, go, events = study

    def full(self):
        for _ in range(1000):  # the other run has begun; on a busy machine that may take seconds
            if "cppo-seed0" in [name for name, *_ in events()]:
                break
            time.sleep(0.02)
        raise DiskFullError(plan.folder / "status.json", OSError(28, "No space left on device"))

    monkeypatch.setattr(Runner, "_write_status", full)
    with pytest.raises(DiskFullError, match="free some space"):
        go(jobs=6, dppo_seed0="fail", cppo_seed0="hang")
    assert "cppo-seed0" in [name for name, what, *_ in events() if what == "checkpoint"]
    assert "cppo-seed0" not in [name for name, what, *_ in events() if what == "end"]
