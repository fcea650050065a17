"""What the suites of an ablation say: their own tables, files and figures, from run folders with chosen figures."""

from __future__ import annotations

import json

import pytest

from cppo.runs.folder import RunFolder
from cppo.study.ablate import answers as ablate_report
from cppo.study.ablate.answers import measured, read_all, write_all
from cppo.study.ablate.suite import suites_of

from .ablated import fail, study, write_run


def test_mechanisms_against_the_whole_of_it(tmp_path):
    plan = study(tmp_path / "s", "mechanisms,shapes", seeds=2)
    for run in plan.trained:
        if run.name != "KL-seed1":
            write_run(plan, run, 0.6 if run.variant == "cppo" else 0.5 + 0.02 * run.seed)
    fail(plan, {"KL-seed1": "the disk is full"})
    reports = write_all(plan)
    mechanisms, shapes = (report.results for report in reports)
    rows = {variant.name: variant for variant in mechanisms.variants}
    assert rows["soft gate"].compared_with == "cppo" and rows["cppo"].compared_with is None
    assert rows["soft gate"].final_difference.value == pytest.approx(-0.09)
    assert rows["KL"].left_out == ["KL-seed1: failed: the disk is full"]
    assert {v.name: v.final["mean"].value for v in shapes.variants}["linear"] == 0.6, "the same runs as cppo's"
    table = (plan.folder / "table.md").read_text()
    assert table.count("# mechanisms: What does each part of CPPO do?") == 1 and "# shapes: Which" in table
    assert "| soft gate | 2 | 51.0" in table and "KL-seed1: failed: the disk is full" in table
    for name in ("mechanisms", "shapes"):
        folder = plan.folder / name
        assert sorted(p.name for p in (folder / "plots").iterdir()) == [
            f"{which}.{suffix}" for which in ("difference", "final") for suffix in ("png", "svg")
        ]
        assert json.loads((folder / "results.json").read_text())["suite"] == name


def test_a_map_has_each_cell_in_its_place(tmp_path):
    plan = study(tmp_path / "s", "grid", seeds=1)
    for at, run in enumerate(plan.trained):
        if run.config.rule.parameters["w_min"] != 1.0:
            write_run(plan, run, at / 100)
    (report,) = write_all(plan)
    (suite,) = suites_of(plan)
    for (row, b), (column, w) in (
        (r, c) for r in enumerate(report.data["delta_b"]) for c in enumerate(report.data["w_min"])
    ):
        (entry,) = suite.where(delta_b=b, w_min=w)
        expected = None if w == 1.0 else [v.name for v in plan.variants].index(entry.variant) / 100
        assert report.data["final"][row][column] == expected
    assert report.tables[0].rows[0] == ("0.0025", "0.0", "1.0", "2.0", "-")
    assert (plan.folder / "grid" / "plots" / "map.svg").exists()


def test_the_advantage_over_the_horizon(tmp_path):
    plan = study(tmp_path / "s", "length", seeds=3)
    ahead = {"grpo": 0.1, "dppo": 0.05}
    for run in plan.trained:
        n = int(run.config.task.options["families"][0].removeprefix("chain-"))
        rule = "grpo" if run.config.rule.name == "ppo_clip" else run.config.rule.name
        write_run(plan, run, 0.6 - ahead.get(rule, 0.0) * n / 48 + 0.01 * run.seed, before=0.01 if n == 48 else 0.3)
    (report,) = read_all(plan)
    for rule, most in ahead.items():
        found = report.data["ahead"][rule]
        assert {n: e["value"] for n, e in found.items()} == pytest.approx(
            {str(n): most * n / 48 for n in (6, 12, 24, 48)}
        )
        assert all(e["low"] <= e["value"] <= e["high"] and e["count"] == 3 for e in found.values())
    assert report.data["before"] == pytest.approx({"6": 0.3, "12": 0.3, "24": 0.3, "48": 0.01})
    assert report.notes[0].startswith("Intervals of the tables above are over seeds and the problems")
    assert "At length 48 hardly a problem is solved before training" in " ".join(report.notes)
    course, gaps = report.tables
    assert course.rows[0] == ("before training", "30.0", "30.0", "30.0", "1.0")
    assert gaps.columns == ("length", "6", "12", "24", "48") and gaps.rows[0][-1].startswith("+10.0 [")
    for draw in report.drawings.values():
        (ax,) = draw().axes
        assert len(ax.get_legend().get_texts()) in (2, 3)


def test_at_one_update_there_is_no_difference(tmp_path):
    plan = study(tmp_path / "s", "staleness", seeds=2, updates=(1, 2), rules=("dppo", "cppo"))
    for run in plan.trained:
        write_run(plan, run, 0.5 + 0.1 * (run.config.rule.name == "cppo"))
    (report,) = read_all(plan)
    found = report.data["ahead"]["dppo"]
    assert (found["1"]["value"], found["2"]["value"]) == (0.0, pytest.approx(0.1))


def test_masked_fractions_are_measured_after_the_calibration(tmp_path):
    plan = study(tmp_path / "s", "delta", seeds=2, rules=("dppo", "cispo"), targets=(0.01, 0.1))
    for run in plan.trained:
        target = run.config.calibration.target
        clamps = run.config.rule.name == "cispo"
        held = {"masked": 0.0 if clamps else 1.1 * target, "clipped": target if clamps else 0.0}
        write_run(plan, run, 0.5 - target, **held)
        # the first batches ran under other thresholds
        metrics = plan.folder_of(run) / "metrics.jsonl"
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        metrics.unlink()
        for line in lines:
            if line["kind"] == "train" and line["step"] <= run.config.calibration.steps:
                line |= {"trust/token_limit_fraction": 0.9}
            RunFolder(plan.folder_of(run)).append_metrics(line)
    (report,) = read_all(plan)
    found = {(p["rule"], p["target"]): (p["masked"], p["final"]["value"]) for p in report.data["points"]}
    assert found == {
        ("dppo", 0.01): (pytest.approx(0.011), pytest.approx(0.49)),
        ("dppo", 0.1): (pytest.approx(0.11), pytest.approx(0.4)),
        ("cispo", 0.01): (pytest.approx(0.01), pytest.approx(0.49)),
        ("cispo", 0.1): (pytest.approx(0.1), pytest.approx(0.4)),
    }
    assert report.tables[0].rows[1][:3] == ("dppo", "10.00%", "11.00% (11.00% to 11.00%)")
    (suite,) = suites_of(plan)
    assert measured(plan, {suite.entries[0].variant: "x"}) == {"x": pytest.approx([0.011, 0.011])}


def test_before_anything_has_run(tmp_path):
    """Every suite can be shown and drawn empty."""
    options = {"rules": ("dppo", "cppo"), "updates": (2,), "learning_rates": (1e-4,), "targets": (0.01,)}
    plan = study(tmp_path / "s", "mechanisms,grid,shapes,delta,length,staleness,frontier", seeds=1, **options)
    reports = write_all(plan)
    assert len(reports) == 7
    assert all(not variant.seeds for report in reports for variant in report.results.variants)
    assert len(list(plan.folder.rglob("plots/*.png"))) == 2 + 1 + 2 + 1 + 2 + 2 + 1
    assert "not started" in (plan.folder / "table.md").read_text()
    ablate_report.shown(reports)
