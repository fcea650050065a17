"""Reading the runs of a study, what they say a variant, and the tables."""

from __future__ import annotations

import io
import random

import pytest
from rich.console import Console

from cppo.runs.folder import RunFolder
from cppo.study import results as results_module
from cppo.study import tables
from cppo.study.compare import write_results
from cppo.study.results import RunRecord, collapse, read_results, read_run, summarise
from cppo.study.store import open_study

from .planned import TRAINING, plan_of


@pytest.mark.parametrize(
    ("rewards", "at"),
    [
        ([0.8] * 20, None),
        ([0.8] * 10 + [0.1] * 10, 13),  # the mean of 5 is under 0.4 once 3 of them are 0.1
        ([0.8] * 10 + [0.1] * 8 + [0.8] * 6, None),  # recovers
        ([0.8] * 14 + [0.1] * 6, None),  # low for less than five steps of the mean
        ([0.8] * 10 + [0.5] * 20, None),  # above a half
        ([0.0] * 20, None),  # never learned
        ([-0.2] * 10 + [-1.0] * 10, None),  # halves of negative rewards mean nothing
        ([0.1] * 9, None),  # too short
        ([0.8] * 10 + [float("nan")] * 10, None),  # unknown is as before
        ([0.8] * 10 + [0.1, None] * 5, 13),
        ([0.8] * 10 + [0.1] * 10 + [0.45] + [0.1] * 5, 13),  # a single better batch is no recovery
    ],
)
def test_collapse(rewards, at):
    assert collapse(rewards) == at


def test_collapse_against_the_definition():
    rng = random.Random(4)
    found = 0
    for _ in range(200):
        curve = [
            rng.choice([0.125, 0.25, 0.75]) if rng.random() < 0.4 else (1.0 if s < 12 else 0.25) for s in range(30)
        ]
        m = {s: sum(curve[s - 5 : s]) / 5 for s in range(5, 31)}
        low = {s: m[s] < max(m[j] for j in range(5, s + 1)) / 2 for s in m}
        starts = [s for s in m if all(low[j] for j in range(s, 31)) and 30 - s + 1 >= 5]
        assert collapse(curve) == (min(starts) if starts else None)
        found += bool(starts)
    assert 20 < found < 190


def test_a_real_run_folder_is_read(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(TRAINING))
    from synthetic import write_run

    plan = plan_of(tmp_path, rules=["cppo"], seeds=1, settings=["steps=20"])
    run = plan.trained[0]
    write_run(plan.folder_of(run), steps=20, updates=2)
    record = read_run(plan, run)
    final = 0.5 + 0.35 * (1 - 0.94**20)
    assert (record.state, record.step, record.samples, record.best_step) == ("finished", 20, 16, 20)
    assert record.final == pytest.approx(
        {"chain_short": final, "chain_long": final - 0.08, "addition": final - 0.16, "mean": final - 0.08}
    )
    assert record.before["mean"] == pytest.approx(0.42) and list(record.final)[-1] == "mean"
    assert len(record.rewards) == 20
    assert record.rewards[0] == pytest.approx(0.5 + 0.4 * 0.05 + 0.03 * (7 % 5 - 2))
    assert record.seconds == pytest.approx(20 * (1.25 + 0.25) + 2 * 2.0)
    assert record.collapsed_at is None and 0 < record.masked_fraction < 1


def test_the_masked_share_is_of_updates_that_had_a_token(tmp_path):
    plan = plan_of(tmp_path, rules=["cppo"], seeds=1)
    run = plan.trained[0]
    for update, (masked, kept) in enumerate(((0.8, 0.2), (0.6, 0.4), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0))):
        row = {"step": 1, "update": update, "kind": "train", "reward": 0.0}
        shares = {"trust/masked_fraction": masked, "trust/token_limit_fraction": masked, "trust/kept_fraction": kept}
        RunFolder(plan.folder_of(run)).append_metrics(row | shares)
    assert read_run(plan, run).masked_fraction == pytest.approx(0.7)


def test_best_is_within_the_run_and_its_benchmarks_at_that_step(tmp_path):
    plan = plan_of(tmp_path, rules=["cppo"], seeds=1)
    run = plan.trained[0]
    for step, a, b in ((0, 0.1, 0.1), (1, 0.9, 0.2), (2, 0.5, 0.7), (3, 0.95, 0.0)):
        row = {"avg/a": a, "avg/b": b, "avg/mean": (a + b) / 2, "samples": 4}
        RunFolder(plan.folder_of(run)).append_metrics({"step": step, "update": step, "kind": "evaluation"} | row)
    record = read_run(plan, run)
    assert (record.best_step, record.best["a"], record.best["b"]) == (2, 0.5, 0.7)
    assert record.final["a"] == 0.95


def test_a_run_in_progress_and_a_broken_one(tmp_path):
    plan = plan_of(tmp_path, seeds=1)
    first, second = plan.trained
    assert read_run(plan, first).state == "not started"
    RunFolder(plan.folder_of(first)).append_metrics({"step": 1, "update": 1, "kind": "train", "reward": 0.5})
    assert (read_run(plan, first).state, read_run(plan, first).step) == ("in progress", 1)
    (plan.folder_of(second)).mkdir(parents=True)
    (plan.folder_of(second) / "metrics.jsonl").write_text("what\n{}\n")
    broken = read_run(plan, second)
    assert broken.state == "failed" and "Line 1 of" in broken.error
    text = tables.markdown(read_results(plan))
    assert "NOT COMPLETE" in text and "in progress, step 1 of 3" in text and "0 of 1" in text


def record(variant, seed, best, final=None, state="finished", **more):
    scores = {which: {"a": value, "mean": value} for which, value in (("best", best), ("final", final or best))}
    return RunRecord(f"{variant}-seed{seed}", variant, seed, state, before={"mean": 0.1}, samples=16, **scores, **more)


def example(baseline=None):
    records = [record("grpo", s, 0.3 + s / 100, 0.2, seconds=10.0, masked_fraction=0.01) for s in range(5)]
    records += [record("dppo", s, 0.35 + s / 100) for s in range(5)]
    records += [record("cppo", s, 0.5 + s / 100, 0.45, collapsed_at=9 if s == 1 else None) for s in range(4)]
    records += [record("cppo", 4, 0.99, state="in progress", step=3, steps=9)]
    return summarise("compare", ["grpo", "dppo", "cppo"], records, baseline)


def test_only_finished_runs_count():
    cppo = example().variants[2]
    assert cppo.seeds == [0, 1, 2, 3] and cppo.left_out == ["cppo-seed4: in progress, step 3 of 9"]
    assert cppo.best["mean"].value == pytest.approx(0.515) and cppo.best["mean"].count == 4
    assert cppo.collapsed == ["cppo-seed1 (step 9)"]
    assert not example().complete


def test_each_is_compared_with_the_best_of_the_others():
    grpo, dppo, cppo = example().variants
    assert [v.compared_with for v in (grpo, dppo, cppo)] == ["cppo", "cppo", "dppo"]
    assert cppo.improvement.value == 1.0 and cppo.improvement.count == 4
    assert cppo.difference.value == pytest.approx(0.15) and cppo.difference.low == pytest.approx(0.15)
    assert cppo.final_difference.value == pytest.approx(0.45 - 0.365)
    assert dppo.improvement.value == 0.0 and dppo.difference.value == pytest.approx(-0.15)
    assert (grpo.seconds, grpo.masked_fraction) == (10.0, 0.01)


def test_a_baseline_that_was_asked_for():
    grpo, dppo, cppo = example("grpo").variants
    assert [v.compared_with for v in (grpo, dppo, cppo)] == [None, "grpo", "grpo"]
    assert grpo.improvement is None and dppo.difference.value == pytest.approx(0.05)


def test_runs_that_did_not_start_alike_are_told():
    records = [record("dppo", 0, 0.5), record("cppo", 0, 0.5)]
    assert summarise("compare", ["dppo", "cppo"], records).unmatched == []
    records[1].before = {"mean": 0.2}
    results = summarise("compare", ["dppo", "cppo"], records)
    assert results.unmatched == [0] and any("not matched" in note for note in tables.notes(results))


def test_nothing_finished_yet():
    results = summarise("compare", ["dppo", "cppo"], [])
    assert results.variants[0].best["mean"].value is None
    assert "| dppo | 0 | - | - | - |" in tables.markdown(results)


def test_tables():
    main, more = tables.cells(example())
    assert main.columns == ("", "seeds", "best Avg@16", "final Avg@16", "P(better) than")
    cppo = main.rows[2]
    assert cppo[:2] == ("cppo", "4 of 5") and cppo[2].startswith("51.5 [50.") and cppo[4] == "1.00 [0.40, 1.00] dppo"
    assert more.rows[2][1:4] == ("+15.0 [+15.0, +15.0] dppo", "+8.5 [+7.0, +10.0]", "1 of 4")
    assert more.rows[0][4:] == ("1.0%", "10 s")
    notes = " ".join(tables.notes(example()))
    assert "88% of cases" in notes and "cppo-seed4: in progress" in notes and "cppo-seed1 (step 9)" in notes


def test_breakdown_by_benchmark():
    records = [record("cppo", s, 0.5) for s in range(2)]
    for r in records:
        r.best["b"] = r.final["b"] = 0.25
    names = [table.title for table in tables.cells(summarise("compare", ["cppo"], records))]
    assert names[2:] == ["best Avg@16 per benchmark, in %", "final Avg@16 per benchmark, in %"]
    breakdown = tables.cells(summarise("compare", ["cppo"], records))[2]
    assert breakdown.columns == ("", "a", "b", "mean") and breakdown.rows[0][2] == "25.0 [25.0, 25.0]"


def test_tables_fit_a_terminal():
    console = Console(file=io.StringIO(), width=100)
    console.print(tables.rich_tables(example()))
    assert "1.00 [0.40, 1.00] dppo" in console.file.getvalue()


def test_results_are_read_from_the_status_file(tmp_path):
    plan = open_study(plan_of(tmp_path, seeds=1), {})
    (tmp_path / "status.json").write_text('{"errors": {"dppo-seed0": "no room"}}')
    assert write_results(plan).records[0].error == "no room"
    (tmp_path / "status.json").write_text("torn")
    assert results_module.read_errors(tmp_path) == {}
