"""`cppo ablate`: the suites, the plan they share, and the command."""

from __future__ import annotations

from pathlib import Path

import pytest

from cppo.cli.ablate import ablate
from cppo.config.load import load_config
from cppo.errors import UserError
from cppo.study.ablate.cost import work
from cppo.study.ablate.suite import Entry, Options, Suite, base_of, compose, suites_of, view
from cppo.study.ablate.suites import SUITES, THRESHOLDS, make_suites
from cppo.study.compare import TABLE_1
from cppo.study.results import read_results
from cppo.study.store import load_plan, open_study
from said import said
from study.planned import plan_of

from .ablated import study


def made(name, settings=(), recipe="arithmetic", **options):
    """(base, suite with its variants bound, label -> resolved configuration)"""
    base = base_of(recipe, settings)
    _, (suite,) = compose(base, make_suites(base, [name], Options(**options)))
    return base, suite, {entry.label: base.resolve(entry.settings) for entry in suite.entries}


# -- the suites ------------------------------------------------------------------------------------------------------


def test_mechanisms_change_one_thing_each():
    base, suite, configs = made("mechanisms")
    own = base.config.rule.parameters
    changed = {
        label: {key: value for key, value in config.rule.parameters.items() if own.get(key) != value}
        for label, config in configs.items()
    }
    kl = {"delta": pytest.approx(0.1 * (0.1 / 0.15) ** 2, rel=1e-3), "delta_b": pytest.approx(0.002 / 4)}
    assert suite.baseline == "cppo" and configs["cppo"] == base.config
    assert changed == {
        "cppo": {},
        "without weights": {"weights": "none"},
        "without budget": {"prefix_budget": False},
        "shuffled weights": {"weights": "shuffled"},
        "soft gate": {"gate": "reciprocal"},
        "adaptive budget": {"budget": "adaptive"},
        "KL": {"divergence": "topk_kl", **kl},
        "TRM Max&Avg": {"divergence": "topk_kl", "delta": kl["delta"], "delta_avg": kl["delta_b"]},
        "binary TV": {"divergence": "binary_tv"},
        "exact TV": {"divergence": "exact_tv"},
    }
    for config in configs.values():  # and nothing but the rule
        assert config.model_copy(update={"rule": base.config.rule}) == base.config


def test_kl_thresholds_are_the_papers_where_the_recipe_is_the_papers():
    _, _, configs = made("mechanisms", ["rule.delta=0.15", "rule.delta_b=0.02", "rule.budget=adaptive"])
    for label in ("KL", "TRM Max&Avg"):
        parameters = configs[label].rule.parameters
        assert parameters["delta"] == 0.1 and parameters.get("delta_b", parameters.get("delta_avg")) == 0.002
    assert configs["fixed budget"].rule.parameters["budget"] == "fixed"


def test_what_the_recipe_is_already_is_left_out():
    labels = [entry.label for entry in made("mechanisms", ["rule.divergence=exact_tv", "weights=none"])[1].entries]
    assert "top-K TV" in labels and "exact TV" not in labels and "without weights" not in labels


def test_grid_and_shapes():
    _, suite, configs = made("grid")
    assert len(suite.entries) == 20 and suite.values("delta_b") == [0.0025, 0.005, 0.01, 0.02, 0.04]
    assert suite.values("w_min") == [0.4, 0.6, 0.8, 1.0] and suite.baseline == "delta_b 0.01, w_min 0.8"
    for entry in suite.entries:
        assert {key: configs[entry.label].rule.parameters[key] for key in entry.at} == dict(entry.at)
    assert made("grid", ["rule.w_min=0.7"])[1].values("w_min") == [0.4, 0.6, 0.7, 0.8, 1.0]
    _, _, configs = made("shapes")
    assert {label: c.rule.parameters["weights"] for label, c in configs.items()} == {
        "linear": "linear",
        "constant": "none",
        "cosine": "cosine",
        "reversed": "reversed",
        "matched": "matched",
        "matched, floor 0.05": "matched",
    }


def test_delta_calibrates_every_threshold_of_every_rule_of_table_1():
    assert set(THRESHOLDS) == {*TABLE_1, "trm_max_avg"}
    _, suite, configs = made("delta", targets=(0.01, 0.1))
    assert len(suite.entries) == 2 * len(THRESHOLDS)
    for entry in suite.entries:
        config = configs[entry.label]
        assert config.calibration.target == entry.at["target"]
        automatic = {key for key, value in config.rule.parameters.items() if value == "auto"}
        assert automatic == set(THRESHOLDS[entry.at["rule"]])


def test_length_scales_with_the_chain():
    base, suite, configs = made("length")
    assert suite.values("length") == [6, 12, 24, 48] and suite.values("rule") == ["grpo", "dppo", "cppo"]
    assert configs["cppo, chain-12"] == base.config
    long = configs["dppo, chain-48"]
    assert long.task.options == {"families": ["chain-48"], "ignorance": 0.0125}
    assert long.rollout.max_new_tokens == -(-40 * 100 // 28) and long.warmup.steps == 2000
    assert configs["cppo, chain-6"].task.options["ignorance"] == 0.1
    assert configs["cppo, chain-6"].warmup == base.config.warmup
    with pytest.raises(UserError, match=r"task=arithmetic only; the recipe's is math. Leave it out: --only mech"):
        made("length", recipe="qwen3-1.7b-base")


def test_with_one_update_all_rules_are_one_run():
    _, suite, configs = made("staleness")
    assert suite.values("updates") == [1, 2, 4, 8, 16]
    assert {configs[entry.label].rule.name for entry in suite.where(updates=1)} == {"none"}
    assert {entry.variant for entry in suite.where(updates=1)} == {"none-M-1"}
    assert len({entry.variant for entry in suite.where(updates=2)}) == 3
    with pytest.raises(UserError, match=r"suite staleness, grpo, M 3: updates is 3"):
        made("staleness", updates=(3,))


def test_a_recipe_of_the_paper():
    base = base_of("qwen3-30b-a3b-base", [])
    names = [name for name in SUITES if name not in ("length", "delta")]
    options = Options(rules=("cppo",), learning_rates=(1e-6, 2e-6), updates=(2, 8))
    variants, suites = compose(base, make_suites(base, names, options))
    assert [suite.name for suite in suites] == names
    assert len(variants) == 10 + 19 + 4 + 1 + 2 and work(base.config) is None


# -- one plan for all ------------------------------------------------------------------------------------------------


def test_equal_configurations_run_once_and_warm_ups_are_shared(tmp_path):
    plan = study(tmp_path / "s", "grid,shapes,staleness,length,mechanisms", seeds=2, updates=(1, 8))
    suites = {suite.name: suite for suite in suites_of(plan)}
    shared = {
        ("shapes", "linear"): "delta_b-0.01-w_min-0.8",
        ("mechanisms", "without weights"): "constant",
        ("staleness", "cppo, M 8"): "delta_b-0.01-w_min-0.8",
        ("length", "cppo, chain-12"): "delta_b-0.01-w_min-0.8",
        ("mechanisms", "cppo"): "delta_b-0.01-w_min-0.8",
        ("length", "dppo, chain-12"): "dppo-M-8",
    }
    found = {(s.name, e.label): e.variant for s in suites.values() for e in s.entries}
    assert {key: found[key] for key in shared} == shared
    configs = [run.config.model_dump(exclude={"output_dir"}) for run in plan.trained]
    assert all(configs.count(config) == 1 for config in configs)
    # one per seed for all suites, and one for each other length
    assert len([run for run in plan.runs if run.variant is None]) == 2 * 4
    assert load_plan(plan.folder) == plan and suites_of(load_plan(plan.folder)) == suites_of(plan)


def test_a_view_is_the_suites_study(tmp_path):
    plan = study(tmp_path / "s", "mechanisms,shapes", seeds=2)
    seen = view(plan, suites_of(plan)[1])
    assert [variant.name for variant in seen.variants][:2] == ["linear", "constant"] and seen.baseline == "linear"
    assert [run.variant for run in seen.trained][:3] == ["linear", "linear", "constant"]
    assert seen.folder_of(seen.trained[0]) == plan.folder / "runs" / "cppo-seed0"
    assert read_results(seen).variants[1].left_out == [f"without-weights-seed{s}: not started" for s in (0, 1)]


def test_names_that_two_suites_want():
    base = base_of("arithmetic", [])
    suites = [
        Suite(name, "?", (Entry("x y", ("rule=cppo", f"rule.w_min={w}")),)) for name, w in (("a", 0.5), ("b", 0.6))
    ]
    variants, bound = compose(base, suites)
    assert [variant.name for variant in variants] == ["x-y", "b-x-y"] == [suite.entries[0].variant for suite in bound]


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "arguments", "says"),
    [
        ([], {"only": "mechanism"}, "Did you mean 'mechanisms'"),
        ([], {"only": "grid,grid"}, "grid is given twice"),
        ([], {"only": "frontier", "rules": "dpo"}, "Did you mean 'dppo'"),
        (
            [],
            {"only": "frontier", "learning_rates": "1e-4,x"},
            "--learning-rates is '1e-4,x', expected numbers above 0",
        ),
        ([], {"only": "frontier", "updates": "2.5"}, "expected whole numbers above 0"),
        ([], {"only": "frontier", "updates": "2,2"}, "each value once"),
        ([], {"only": "frontier", "updates": "7"}, r"suite frontier, grpo, lr 7.5e-05, M 7: updates is 7"),
        ([], {"only": "delta", "targets": "2"}, "--targets has 2"),
        ([], {"only": "delta", "rules": "none"}, "which has no threshold"),
        ([], {"only": "grid", "seeds": 0}, "--seeds is 0"),
        (["rule=dppo"], {"only": "grid"}, "chooses the rules itself"),
        (["seed=3"], {"only": "grid"}, "given by --seeds"),
        (["rule.delta_b=auto"], {"only": "grid"}, "starts from the recipe's delta_b, which is 'auto'"),
        (["rule.detla=1"], {"only": "grid"}, "Did you mean 'delta'"),
        ([], {"resume": Path("a"), "out": Path("b")}, "--resume and --out cannot be given together"),
        ([], {"jobs": 0}, "--jobs is 0"),
        ([], {"resume": Path("none")}, "there is no study"),
        (["steps=3"], {"show": Path("a"), "only": "grid"}, r"nothing else .got steps=3 --only"),
    ],
)
def test_mistakes_are_sentences(tmp_path, monkeypatch, settings, arguments, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says):
        ablate(settings, **arguments)
    assert not list(tmp_path.iterdir())


def test_another_kind_of_study_is_refused(tmp_path):
    folder = tmp_path / "s"
    open_study(plan_of(folder), {})
    with pytest.raises(UserError, match="holds a study of `cppo compare`, not of `cppo ablate`"):
        ablate(show=folder)
    with pytest.raises(UserError, match="holds another study: its kind is compare"):
        ablate(["steps=3"], only="shapes", seeds=2, out=folder)


def test_list_runs_nothing_and_counts_what_would_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = said(ablate, ["steps=10"], only="mechanisms,shapes", seeds=3, jobs=1, list_only=True)
    assert not list(tmp_path.iterdir())
    assert "In all 42 runs and 3 warm-ups" in text  # 10, and 4 of the 6 shapes
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if line.count("│") > 4}
    assert [cell.strip() for cell in rows["shapes"].split("│")[3:6]] == ["6", "4", "12"]
    assert "soft-gate: rule=cppo rule.gate=reciprocal" in text


def test_work_counts_what_a_run_does():
    """Twice the steps without evaluations in between: twice the tokens, less the evaluations at both ends."""
    base = ["evaluation.every=0", "warmup.steps=0"]
    once, twice = (work(load_config("arithmetic", [*base, f"steps={steps}"])) for steps in (10, 20))
    weights = 2 * (4 * 128**2 + 3 * 128 * 512)
    sampled = 10 * 256 * 40
    assert twice - once == pytest.approx(weights * (2 + 16) * sampled)
    assert once == pytest.approx(weights * (18 * sampled + 2 * (2 * 64 * 16 * 40)))
