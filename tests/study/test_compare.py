"""`cppo compare`: the plan and the command."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import typer

from cppo.cli.compare import compare
from cppo.errors import UserError
from cppo.study import compare as compare_module
from cppo.study.plan import Variant, make_plan
from cppo.study.runner import Runner
from cppo.study.store import load_plan, open_study
from said import said

from .planned import plan_of, programmed, rule_of


@pytest.fixture
def study(tmp_path, monkeypatch):
    """See `programmed`."""
    return programmed(tmp_path, monkeypatch)


# -- the plan --------------------------------------------------------------------------------------------------------


def test_runs_of_a_seed_differ_in_the_rule_alone(tmp_path):
    plan = plan_of(tmp_path, compare_module.TABLE_1)
    assert [run.name for run in plan.trained[:3]] == ["grpo-seed0", "minpro-seed0", "cispo-seed0"]
    assert len(plan.trained) == 14 and plan.seeds == (0, 1)
    for seed in plan.seeds:
        dumps = [run.config.model_dump() for run in plan.trained if run.seed == seed]
        for key in dumps[0]:
            assert key in ("rule", "output_dir") or all(d[key] == dumps[0][key] for d in dumps), key
        assert dumps[0]["seed"] == seed


def test_one_warmup_a_seed(tmp_path):
    plan = plan_of(tmp_path)
    warmups = [run for run in plan.runs if run.variant is None]
    assert [run.name for run in warmups] == ["warmup-seed0", "warmup-seed1"] and plan.runs[:2] == tuple(warmups)
    assert warmups[0].config.model == "tiny" and warmups[0].config.warmup.steps == 500
    run = plan.trained[0]
    assert run.after == "warmup-seed0" and run.config.model == str(tmp_path / "warmup/seed0/warmup/model")
    assert run.config.warmup.steps == 0 and run.config.precision == "float32"


def test_variants_that_change_the_start_get_their_own(tmp_path):
    """An ablation may vary anything: what makes another model has a warm-up of its own."""
    variants = [Variant("plain"), Variant("wide", ("tiny.hidden_size=256",)), Variant("hard", ("rule.w_min=0.6",))]
    plan = make_plan("ablate", tmp_path, "arithmetic", [], variants, 1, 1)
    assert [run.after for run in plan.trained] == ["warmup-seed0", "warmup-seed0-2", "warmup-seed0"]


def test_other_models_have_no_warmup(tmp_path):
    plan = plan_of(tmp_path, settings=["model=some/model"])
    assert plan.runs == plan.trained and {run.after for run in plan.runs} == {None}


def test_seeds_count_from_the_recipes(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("seed: 7\ntask: {name: arithmetic, options: {families: [chain-12]}}\n")
    plan = make_plan("compare", tmp_path / "s", str(recipe), [], [Variant("cppo")], 2, 1)
    assert plan.seeds == (7, 8)


def test_parameters_of_rules(tmp_path):
    plan = plan_of(tmp_path, compare_module.TABLE_1, settings=["rule.delta=0.07", "w_min=0.9", "trm_max.delta=0.2"])
    cppo, dppo = (rule_of(plan, name).parameters for name in ("cppo", "dppo"))
    assert (cppo["delta"], cppo["delta_b"], cppo["w_min"]) == (0.07, 0.01, 0.9)
    assert (dppo["delta"], dppo["divergence"]) == (0.07, "topk_tv")
    assert rule_of(plan, "grpo").name == "ppo_clip"
    assert rule_of(plan, "grpo").parameters["eps_high"] == 0.28
    assert rule_of(plan, "trm_max").parameters["delta"] == 0.2
    assert rule_of(plan, "trm_avg").parameters["delta"] == 0.001
    own = plan_of(tmp_path, settings=["dppo.delta=0.3"])
    assert rule_of(own, "dppo").parameters["delta"] == 0.3 and rule_of(own, "cppo").parameters["delta"] == 0.1


@pytest.mark.parametrize(
    ("rules", "settings", "seeds", "says"),
    [
        (["dpo"], [], 1, "Did you mean 'dppo'"),
        (["cppo", "cppo"], [], 1, "cppo is given twice"),
        ([], [], 1, "at least one configuration"),
        (["cppo"], [], 0, "--seeds is 0"),
        (["cppo"], ["seed=3"], 1, "given by --seeds"),
        (["cppo"], ["output_dir=x"], 1, "--out"),
        (["cppo"], ["rule=dppo"], 1, "--rules"),
        (["cppo"], ["dppo.delta=0.1"], 1, "which --rules does not name"),
        (["cppo", "dppo"], ["dppo.detla=0.1"], 1, "Did you mean 'delta'"),
        (["cppo"], ["step=4"], 1, "steps"),
    ],
)
def test_mistakes_are_sentences(tmp_path, rules, settings, seeds, says):
    with pytest.raises(UserError, match=says):
        plan_of(tmp_path, rules, seeds, settings)
    assert not list(tmp_path.iterdir())


def test_baseline_must_be_compared(tmp_path):
    with pytest.raises(UserError, match="expected one of dppo, cppo"):
        plan_of(tmp_path, baseline="grpo")


def test_a_plan_is_read_back(tmp_path):
    plan = open_study(plan_of(tmp_path / "s", settings=["steps=3", "dppo.delta=0.3"]), {"python": "3"})
    assert load_plan(tmp_path / "s") == plan
    assert open_study(dataclasses.replace(plan, threads=9), {}).threads == 1, "threads are kept"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"settings": ["steps=4"]}, "its settings are steps=3, not steps=4"),
        ({"rules": ["cppo"]}, "it compares dppo, cppo, not cppo"),
        ({"seeds": 3}, "its seeds are 0, 1, not 0, 1, 2"),
        ({"settings": ["steps=3", "dppo.delta=0.3"]}, "rule of dppo-seed0 is"),
    ],
)
def test_another_plan_is_refused(tmp_path, change, says):
    open_study(plan_of(tmp_path), {})
    with pytest.raises(UserError, match=says):
        open_study(plan_of(tmp_path, **change), {})


def test_folders_that_are_no_study(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        open_study(plan_of(tmp_path), {})
    with pytest.raises(UserError, match="is a file"):
        open_study(plan_of(tmp_path / "notes.txt"), {})
    with pytest.raises(UserError, match="there is no study"):
        load_plan(tmp_path)
    (tmp_path / "study.yaml").write_text("study: 1\nkind: compare\n")
    with pytest.raises(UserError, match="not a plan of a study"):
        load_plan(tmp_path)


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"resume": Path("a"), "show": Path("b")}, "--resume and --show cannot be given together"),
        ({"resume": Path("a"), "out": Path("b")}, "--resume and --out"),
        ({"jobs": 0}, "--jobs is 0"),
        ({"resume": Path("none")}, "there is no study"),
        ({"resume": Path("a"), "rules": "cppo"}, "nothing else .got --rules"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says):
        compare(**arguments)
    assert not list(tmp_path.iterdir())


def test_without_scipy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'cppo\[study\]'"):
        compare()


def test_show_and_baseline(study):
    plan, go, _ = study
    go(dppo_seed1="fail")
    text = said(compare, show=plan.folder, baseline="dppo", width=120)
    assert "dppo-seed1: failed: the disk is full" in " ".join(text.split())
    with pytest.raises(UserError, match="expected one of dppo, cppo"):
        compare(show=plan.folder, baseline="grpo")


def test_another_kind_of_study_is_not_taken_for_a_comparison(tmp_path):
    plan = open_study(dataclasses.replace(plan_of(tmp_path / "study"), kind="ablate"), {})
    with pytest.raises(UserError, match="is a study of cppo ablate: cppo ablate --show"):
        compare(show=plan.folder)


def test_status_of_the_command(study):
    plan, go, _ = study
    go(cppo_seed1="fail")
    go.mend()
    said(compare, resume=plan.folder, jobs=1)


def test_status_after_a_failure(study, monkeypatch):
    plan, _, _ = study
    failing = ["-S", "-c", "import sys; sys.exit('Error: always')"]
    monkeypatch.setattr(Runner, "command", lambda self, run: failing)
    with pytest.raises(typer.Exit) as status:
        said(compare, resume=plan.folder, jobs=2)
    assert status.value.exit_code == 1
    assert "always" in (plan.folder / "table.md").read_text()
