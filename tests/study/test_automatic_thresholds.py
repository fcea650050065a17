"""`delta=auto` in a study: who inherits it, and what the table of rules says."""

from __future__ import annotations

from pathlib import Path

from cppo.config.load import load_config
from cppo.runs.calibration import write_calibration
from cppo.study import tables
from cppo.study.results import read_results
from cppo.study.store import open_study
from study.planned import plan_of, rule_of


def history(delta: float) -> list[dict[str, object]]:
    return [{"step": 1, "tokens": 10, "thresholds": {"delta": delta}, "share": 0.01}]


def test_dppo_and_cppo_calibrate_the_same_threshold_and_others_none(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, rules=("grpo", "dppo", "cppo"), settings=("delta=auto", "calibration.target=0.02"))
    assert [rule_of(plan, name).automatic for name in ("grpo", "dppo", "cppo")] == [[], ["delta"], ["delta"]]
    assert {run.config.calibration.target for run in plan.runs} == {0.02}
    # what is written for the processes is read back by them
    open_study(plan, {})
    for run in plan.trained:
        assert load_config(tmp_path / "configs" / f"{run.name}.yaml").rule == run.config.rule


def test_the_table_shows_what_each_run_has_found(tmp_path: Path) -> None:
    plan = open_study(plan_of(tmp_path, settings=("delta=auto", "steps=6")), {})
    shown = {variant.name: variant.rule for variant in read_results(plan).variants}
    assert "delta=auto," in shown["dppo"]  # nothing has run
    for run, delta in zip((run for run in plan.trained if run.variant == "dppo"), (0.0812345, 0.11), strict=True):
        write_calibration(plan.folder_of(run), "dppo", 0.01, 1, history(delta))  # type: ignore[arg-type]
    results = read_results(plan)
    assert "dppo(delta=auto (0.0812-0.11), divergence=topk_tv" in tables.markdown(results)
    broken = plan.folder_of(next(run for run in plan.trained if run.variant == "dppo")) / "calibration.json"
    broken.write_text("{")
    assert "delta=auto (0.11)" in read_results(plan).variants[0].rule
