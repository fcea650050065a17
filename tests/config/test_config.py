"""Recipes, overrides, sentences for mistakes, the exact round trip, and the batch arithmetic that TRL gets."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cppo.config import yaml_io
from cppo.config.keys import dotted_keys
from cppo.config.load import Config, ConfigError, find_recipe, load_config, recipes, trl_config_kwargs
from cppo.config.reference import with_table
from cppo.divergence import DIVERGENCES
from cppo.rules import RULES

ROOT = Path(__file__).resolve().parents[2]


def fails(*overrides: str, recipe: str | Path | None = None) -> list[str]:
    """The problems that loading reports."""
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, overrides)
    return caught.value.problems


# -- recipes ---------------------------------------------------------------------------------------------------------


def test_default_recipe_is_a_small_run_in_which_a_rule_can_act():
    config = load_config()
    assert (config.name, config.model, config.task.name, config.rule.name) == (
        "arithmetic",
        "tiny",
        "arithmetic",
        "cppo",
    )
    assert config.warmup.steps > 0 and config.updates > 1
    assert config.make_rule().parameters()["delta"] == config.rule.parameters["delta"]


SMOLLM2 = {f"smollm2-135m{task}" for task in ("", "-needle", "-reverse", "-spell")}
TABLE_3 = {
    # prompts, n, minibatch prompts, updates, response limit, delta, delta_b, budget, w_min, T_stop
    "qwen3-1.7b": ("Qwen/Qwen3-1.7B", 64, 8, 32, 2, 8192, 0.15, 0.015, "fixed", 0.8, 1120),
    "qwen3-1.7b-base": ("Qwen/Qwen3-1.7B-Base", 64, 8, 32, 2, 8192, 0.15, 0.020, "adaptive", 0.8, 680),
    "qwen3-8b-base": ("Qwen/Qwen3-8B-Base", 128, 8, 32, 4, 8192, 0.15, 0.020, "adaptive", 0.8, 490),
    "qwen3-30b-a3b-base": ("Qwen/Qwen3-30B-A3B-Base", 256, 16, 32, 8, 16384, 0.20, 0.020, "adaptive", 0.8, 560),
}


@pytest.mark.parametrize("name", TABLE_3)
def test_table_3(name):
    model, prompts, n, minibatch, updates, limit, delta, delta_b, budget, w_min, steps = TABLE_3[name]
    config = load_config(name)
    assert config.model == model
    assert (config.rollout.prompts, config.rollout.responses, config.rollout.max_new_tokens) == (prompts, n, limit)
    assert (config.updates, config.steps) == (updates, steps)
    assert prompts // config.updates == minibatch
    rule = config.rule.parameters
    assert (rule["delta"], rule["delta_b"], rule["budget"], rule["w_min"]) == (delta, delta_b, budget, w_min)
    assert (rule["weights"], rule["prefix_budget"], rule["gate"], rule["divergence"]) == (
        "linear",
        True,
        None,
        "topk_tv",
    )
    assert (config.top_k, config.topk_anchor, config.rollout.vllm, config.rollout.temperature) == (
        20,
        "recomputed",
        True,
        1.0,
    )
    assert config.optimizer.learning_rate == 1e-6
    assert config.advantages.kind == "zscore" and config.advantages.zero_spread_filter
    assert (config.evaluation.temperature, config.evaluation.top_p, config.evaluation.samples) == (0.7, 0.95, 16)
    assert config.evaluation.problems is None and config.evaluation.max_new_tokens is None
    assert config.task.name == "math" and "DAPO-Math-17k" in config.task.options["train"]
    assert list(config.task.options["validation"]) == ["AIME24", "AIME25", "AIME26"]
    assert config.warmup.steps == 0


@pytest.mark.parametrize("name", ["arithmetic", *TABLE_3])
def test_the_trl_config_of_every_recipe_is_built(name, tmp_path):
    """The real one, as the trainer builds it, and nothing in it disables the rule. No GPU here: bfloat16 on the CPU."""
    from cppo.engines.trl.settings import TopK, problems, updates_per_rollout
    from cppo.engines.trl.trainer import trust_region_config

    config = load_config(name)
    # as one of so many processes; GRPOConfig itself counts one here
    processes = config.rollout.vllm_tensor_parallel_size
    args = trust_region_config(**trl_config_kwargs(config, tmp_path, processes, gpu=False))
    assert args.generation_batch_size * processes == config.rollout.prompts * config.rollout.responses
    assert updates_per_rollout(args) == config.updates
    assert args.max_steps == config.steps * config.updates
    assert args.use_vllm == (name != "arithmetic") and args.bf16 == (name != "arithmetic")
    assert args.gradient_checkpointing == (name != "arithmetic")
    assert args.learning_rate == config.optimizer.learning_rate and args.beta == 0
    assert args.loss_type == "dr_grpo" and args.scale_rewards == "group"
    top_k = TopK(config.top_k, config.topk_variant, config.topk_anchor, config.topk_store)
    assert problems(args, config.make_rule(), top_k) == []


def test_recipes_are_found_by_name_and_by_path(tmp_path):
    assert set(recipes()) == {"arithmetic", *SMOLLM2, *TABLE_3}
    assert find_recipe("arithmetic") == find_recipe("arithmetic.yaml") == recipes()["arithmetic"]
    own = tmp_path / "mine.yaml"
    own.write_text("rule: dppo\ntask: arithmetic\nsteps: 2\n")
    config = load_config(own)
    assert (config.name, config.rule.name, config.steps) == ("mine", "dppo", 2)
    assert "Did you mean 'arithmetic'?" in fails(recipe="arithmetik")[0]
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert f"cppo train --resume {tmp_path}" in fails(recipe=tmp_path)[0]


# -- precedence and short forms --------------------------------------------------------------------------------------


def test_defaults_then_recipe_then_overrides(tmp_path):
    own = tmp_path / "mine.yaml"
    own.write_text("steps: 7\nupdates: 4\n")
    config = load_config(own, ["steps=9"])
    assert (config.steps, config.updates, config.seed) == (9, 4, 0)
    assert load_config(own, ["steps=9", "steps=11"]).steps == 11


def test_another_rule_drops_the_recipes_parameters():
    assert load_config(None, ["rule=dppo"]).rule.parameters == RULES["dppo"]().parameters()
    assert load_config(None, ["rule.delta=0.07", "rule=dppo"]).rule.parameters["delta"] == 0.07
    assert load_config(None, ["rule.name=trm_max"]).rule.parameters["delta"] == 0.05
    same = load_config(None, ["rule=cppo"])
    assert same == load_config()
    assert load_config(None, ["rule={name: dppo, delta: 0.1}"]).rule.parameters["delta"] == 0.1


@pytest.mark.parametrize("name", list(RULES))
def test_every_rule_by_name(name):
    config = load_config(None, [f"rule={name}"])
    assert config.make_rule() == (load_config().make_rule() if name == "cppo" else RULES[name]())


def test_short_forms_of_rule_and_task():
    config = load_config(None, ["delta=0.05", "divergence=binary_tv", "task.families=[chain-12, add-3]"])
    assert config.rule.parameters["delta"] == 0.05 and config.rule.parameters["divergence"] == "binary_tv"
    assert config.task.options == {"families": ["chain-12", "add-3"]}
    other = load_config(None, ["task=reasoning_gym:chain_sum", "steps=2"])
    assert other.task.name == "reasoning_gym:chain_sum" and other.task.options == {}
    assert load_config(None, ["task=arithmetic"]) == load_config()
    # `seed` is a key of its own, though rules have one, too
    assert load_config(None, ["seed=3"]).rule.parameters["seed"] == 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_can_be_trained_with(divergence):
    config = load_config(None, [f"divergence={divergence}"])
    assert config.make_rule().divergence == divergence
    recipe = ["divergence=" + divergence, "rollout.vllm=true", "model=./folder"]
    if divergence.startswith("binary_"):
        assert load_config(None, recipe).rollout.vllm
    else:
        assert "topk_anchor=recomputed" in fails(*recipe)[0]
        assert load_config(None, [*recipe, "topk_anchor=recomputed"]).rollout.vllm


def test_stores_of_the_top_k():
    assert load_config(None, ["topk_store=compact", "divergence=adaptive_tv"]).topk_store == "compact"
    assert "topk_store=float32" in fails("topk_store=ragged", "divergence=topk_kl")[0]
    assert "255" in fails("topk_store=ragged", "top_k=300")[0]
    assert load_config(None, ["topk_store=compact", "top_k=300"]).top_k == 300


def test_a_given_model_has_no_warmup():
    assert load_config(None, ["model=./folder"]).warmup.steps == 0
    assert load_config(None, ["model=tiny"]).warmup.steps > 0
    assert "warmup.steps is 3" in fails("model=./folder", "warmup.steps=3")[0]


def test_sections_that_are_null_are_made():
    assert load_config(None, ["peft.r=8"]).peft.r == 8
    assert load_config(None, ["peft={r: 4, target_modules: [q_proj]}"]).peft.target_modules == ["q_proj"]
    assert load_config(None, ["report_to=wandb"]).report_to == ["wandb"]


def test_a_section_given_at_once_keeps_its_other_keys_and_an_option_is_replaced():
    assert load_config(None, ["rollout={prompts: 8}"]).rollout.responses == 16
    mine = load_config("qwen3-1.7b", ["task.validation={mine: a.jsonl}"])
    assert mine.task.options["validation"] == {"mine": "a.jsonl"} and "train" in mine.task.options


# -- YAML ------------------------------------------------------------------------------------------------------------


def test_the_traps_of_yaml_1_1():
    read = yaml_io.parse(
        "{a: 1e-6, b: 010, c: on, d: 1:30, e: 2026-01-02, f: 1_000, g: ~, h: 1., i: .5, j: 5E4, k: -3, l: 1.e3}"
    )
    assert read == {
        **{"a": 1e-6, "b": 10, "c": "on", "d": "1:30", "e": "2026-01-02", "f": 1000},
        **{"g": None, "h": 1.0, "i": 0.5, "j": 5e4, "k": -3, "l": 1e3},
    }
    assert load_config(None, ["optimizer.learning_rate=1e-6"]).optimizer.learning_rate == 1e-6
    assert load_config(None, ["steps=1e3"]).steps == 1000


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["C"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc1-", min_size=1), inner, max_size=3),
    max_leaves=8,
)


@given(plain)
def test_what_is_written_is_read_back(value):
    assert yaml_io.parse(yaml_io.dump(value)) == value


@given(
    st.sampled_from(
        ["1e-6", "on", "null", "~", "1:30", "010", "true", "", ".5", "2026-01-02", "- a", "a: b", "#", "@x", "<<"]
    )
)
def test_texts_that_look_like_something_else_stay_texts(text):
    assert yaml_io.parse(yaml_io.dump({text: [text]})) == {text: [text]}


def test_malformed_files_are_named_with_their_line(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("steps: 3\nrule: {name: cppo\nupdates: 8\n")
    assert fails(recipe=path)[0].startswith(f"{path}, line 3")
    path.write_text("steps: 3\nseed: 1\nsteps: 4\n")
    assert fails(recipe=path) == [f"{path}, line 3, column 1: 'steps' is given twice."]
    path.write_bytes(b"\xff\xfe\x00")
    assert "is not a text file" in fails(recipe=path)[0]
    path.write_text("- a\n- b\n")
    assert "expected keys and values" in fails(recipe=path)[0]
    path.write_text("!!python/object/apply:os.system ['true']\n")
    assert "could not determine a constructor" in fails(recipe=path)[0]
    path.write_text("")
    assert load_config(path).name == "bad"


# -- round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe, overrides",
    [
        *itertools.product(["arithmetic", *TABLE_3], [()]),
        *[("arithmetic", (f"rule={rule}",)) for rule in RULES],
        (
            "arithmetic",
            ("gate=reciprocal", "ratio_cap=20", "peft.r=8", "output_dir=on", "name=1e-6", "trl={logging_dir: ~}"),
        ),
        (
            "arithmetic",
            ("optimizer.learning_rate=1e-7", "task=reasoning_gym:chain_sum", "task.options.config={min_terms: 2}"),
        ),
    ],
)
def test_to_yaml_round_trips_exactly(recipe, overrides, tmp_path):
    overrides = [
        o if not o.startswith(("output_dir", "name")) else f"{o.split('=')[0]}='{o.split('=')[1]}'" for o in overrides
    ]
    config = load_config(recipe, overrides)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    again = load_config(path)
    assert again == config and again.to_yaml() == config.to_yaml()
    # nothing is left to defaults of a later version
    written = yaml_io.parse(config.to_yaml())
    assert set(Config.model_fields) == set(written)
    assert set(config.make_rule().parameters()) == set(written["rule"]) - {"name"}


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override, words",
    [
        ("delta=oops", ["rule.delta is 'oops'", "a number above 0"]),
        ("delta=0", ["rule.delta is 0", "above 0"]),
        ("rule.delta=-1", ["rule.delta is -1"]),
        ("w_min=0", ["rule.w_min is 0"]),
        ("w_min=1.5", ["rule.w_min is 1.5", "(0, 1]"]),
        ("delta_b=-0.1", ["rule.delta_b is -0.1", "at least 0"]),
        ("delta=.inf", ["rule.delta"]),
        ("budget=adaptve", ["rule.budget", "Did you mean 'adaptive'?"]),
        ("divergence=top_tv", ["rule.divergence", "topk_tv"]),
        ("divergence=adaptve_tv", ["rule.divergence", "Did you mean 'adaptive_tv'?"]),
        ("topk_store=compat", ["topk_store is 'compat'", "Did you mean 'compact'?"]),
        ("gate=sappo", ["gate", "sapo"]),
        ("rule=dpo", ["no rule 'dpo'", "Did you mean 'dppo'?"]),
        ("rule=7", ["rule is 7"]),
        ("rule.dleta=0.1", ["no parameter 'dleta'", "'delta'"]),
        ("deltaa=0.1", ["no setting 'deltaa'", "rule.delta"]),
        ("delta_avg=0.1", ["delta_avg is a parameter of trm_max_avg", "the rule is cppo"]),
        ("task=arithmetics", ["Did you mean 'arithmetic'?"]),
        ("task=reasoning_gym", ["reasoning_gym:<name>"]),
        ("task=no_such_module:Task", ["no module 'no_such_module'"]),
        ("task.familes=[chain-24]", ["no option 'familes'", "families"]),
        ("task.families=[chain-48]", ["rollout.max_new_tokens", "100"]),
        ("steps=oops", ["steps is 'oops'", "a whole number of at least 1"]),
        ("steps=1.5", ["steps is 1.5"]),
        ("steps=true", ["steps is true"]),
        ("steps=", ["steps has no value", "steps=null"]),
        ("steps=null", ["steps is null"]),
        ("steps.every=3", ["steps is a single value (40)"]),
        ("step=3", ["Did you mean steps?"]),
        ("=3", ["expected key=value"]),
        ("lr=1", ["Did you mean optimizer.learning_rate?"]),
        ("optimizer.lr=1", ["Did you mean optimizer.learning_rate?"]),
        ("optimiser.learning_rate=1", ["Did you mean optimizer.learning_rate"]),
        ("optimizer.learning_rate=nan", ["optimizer.learning_rate is 'nan'"]),
        ("optimizer.learning_rate=.nan", ["optimizer.learning_rate"]),
        ("optimizer.betas=[0.9]", ["a list of 2 numbers"]),
        ("optimizer.warmup_steps=5", ["constant_with_warmup"]),
        ("updates=7", ["updates is 7", "16 * 16 = 256", "4 or 8"]),
        ("updates=1", ["can never act", "rule=none"]),
        ("micro_batch=5", ["micro_batch is 5", "32 responses"]),
        ("rollout.responses=1", ["of at least 2"]),
        ("rollout.temperature=0", ["rollout.temperature is 0", "above 0"]),
        ("rollout.top_p=0.9", ["full softmax", "evaluation.top_p"]),
        ("trl.top_p=0.9", ["full softmax"]),
        ("trl.min_p=0.1", ["full softmax"]),
        ("trl.max_steps=3", ["steps and updates"]),
        ("rollout.vllm=true", ["topk_anchor=recomputed", "binary_tv"]),
        ("rollout.max_new_tokens=600", ["tiny.max_positions"]),
        ("tiny.hidden_size=30", ["multiple of 8"]),
        ("tiny.experts=1", ["tiny.experts_per_token is 2", "the 1 of tiny.experts"]),
        ("aggregation=dr_grp", ["Did you mean 'dr_grpo'?"]),
        ("peft=none", ["null, not none", "peft is 'none'"]),
        ("gradient_checkpointing=on", ["auto, true, false"]),
        ("evaluation.top_p=1.1", ["of at most 1"]),
        ("task.families=[chain-24", ["cannot be read", "Lists are written"]),
        ("warmup=3", ["a section with the keys steps"]),
        ("model=''", ["model is ''"]),
    ],
)
def test_one_sentence_a_mistake(override, words):
    problems = fails(override)
    assert len(problems) == 1
    assert all(word in problems[0] for word in words), problems
    assert problems[0][-1] in ".?)" and "\n" not in problems[0] and "pydantic" not in problems[0]


def test_all_problems_together():
    problems = fails(
        "delta=oops", "steps=oops", "rollout.temperature=0", "nonsense_key=1", "optimizer.betas=[a, b]", "seed="
    )
    assert len(problems) == 6
    with pytest.raises(ConfigError, match="6 problems in the configuration:\n- "):
        load_config(
            None,
            ["delta=oops", "steps=oops", "rollout.temperature=0", "nonsense_key=1", "optimizer.betas=[a, b]", "seed="],
        )


def test_unknown_keys_in_a_file_name_the_nearest(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("stepss: 3\nrollout: {promts: 4}\ndelta: 0.1\noptimiser: {learning_rate: 1e-3}\n")
    problems = "\n".join(fails(recipe=path))
    for key in ("steps", "rollout.prompts", "rule.delta", "optimizer.learning_rate"):
        assert f"Did you mean {key}" in problems


def test_values_that_only_look_wrong_to_yaml_are_texts():
    assert load_config(None, ["model=@home"]).model == "@home"
    assert load_config(None, ["output_dir=a=b"]).output_dir == "a=b"


def test_a_misspelt_key_finds_the_right_one():
    """One letter missing in the last part of any key is always traced back."""
    for key, _ in dotted_keys():
        head, dot, last = key.rpartition(".")
        if len(last) < 6 or key in ("task.options",):
            continue
        wrong = head + dot + last[:2] + last[3:]
        if head in ("rule", "task", "trl"):
            continue
        assert key in "\n".join(fails(f"{wrong}=1", "steps=2")), wrong


def test_validation_imports_no_training_library():
    code = (
        "import sys\nfrom cppo.config.load import load_config\n"
        "load_config('qwen3-8b-base'); load_config(None, ['steps=2'])\n"
        "print([m for m in ('transformers', 'trl', 'datasets', 'accelerate', 'peft', 'vllm') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"


# -- TRL arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [None, 2, 8])
@pytest.mark.parametrize("updates", [2, 4, 8])
def test_a_rollout_batch_is_used_up_by_its_updates(processes, micro_batch, updates):
    overrides = [f"updates={updates}", "save_every=3"] + ([f"micro_batch={micro_batch}"] if micro_batch else [])
    config = load_config(None, overrides)
    kwargs = trl_config_kwargs(config, "out", processes, gpu=False)
    per_device, generation = kwargs["per_device_train_batch_size"], kwargs["steps_per_generation"]
    accumulate = kwargs["gradient_accumulation_steps"]
    responses = config.rollout.prompts * config.rollout.responses
    assert per_device * generation * processes == responses
    assert per_device * accumulate * processes * updates == responses
    assert generation == updates * accumulate
    # otherwise TRL takes the current policy for the rollout policy, and every divergence is 0
    assert accumulate % (generation * kwargs["num_iterations"])
    assert kwargs["save_steps"] % updates == 0 and kwargs["max_steps"] == config.steps * updates
    assert micro_batch in (None, per_device)


def test_what_processes_cannot_share_is_refused():
    config = load_config(None, ["updates=2"])
    with pytest.raises(ValueError, match=r"128 responses .* 3 processes cannot share"):
        trl_config_kwargs(config, "out", 3, gpu=False)
    config = load_config("qwen3-30b-a3b-base")
    assert trl_config_kwargs(config, "out", 8, gpu=True)["gradient_accumulation_steps"] == 64
    with pytest.raises(ValueError, match="vllm_tensor_parallel_size is 4, which does not divide"):
        trl_config_kwargs(config, "out", 2, gpu=True)


def test_device_and_precision():
    tiny, large = load_config(), load_config("qwen3-8b-base", ["precision=auto", "gradient_checkpointing=auto"])
    for gpu in (False, True):
        small, big = trl_config_kwargs(tiny, "out", gpu=gpu), trl_config_kwargs(large, "out", gpu=gpu)
        assert small["use_cpu"] is big["use_cpu"] is (not gpu)
        assert small["bf16"] is small["gradient_checkpointing"] is False
        assert big["bf16"] is big["gradient_checkpointing"] is gpu


def test_settings_reach_trl():
    overrides = [
        "advantages.kind=centred",
        "aggregation=dapo",
        "report_to=[tensorboard, wandb]",
        "optimizer={betas: [0.8, 0.95], weight_decay: 0.1, lr_scheduler: cosine, warmup_steps: 5, max_grad_norm: 0.5}",
        "seed=7",
        "rollout.temperature=0.9",
        "trl.logging_first_step=true",
    ]
    kwargs = trl_config_kwargs(load_config(None, overrides), "out", gpu=False)
    expected = {
        "scale_rewards": "none",
        "loss_type": "dapo",
        "report_to": ["tensorboard", "wandb"],
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 5,
        "max_grad_norm": 0.5,
        "seed": 7,
        "temperature": 0.9,
        "logging_first_step": True,
    }
    assert {key: kwargs[key] for key in expected} == expected
    assert trl_config_kwargs(load_config(), "out", gpu=False)["report_to"] == "none"
    with pytest.raises(ValueError, match=r"no argument 'logging_first_stp'\. Did you mean 'logging_first_step'"):
        trl_config_kwargs(load_config(None, ["trl.logging_first_stp=true"]), "out", gpu=False)


# -- documentation ---------------------------------------------------------------------------------------------------


def test_every_key_is_documented():
    from cppo.config.keys import section_of

    assert [key for key, field in dotted_keys() if not field.description and not section_of(field.annotation)] == []


def test_the_page_lists_the_settings_as_they_are():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == with_table(page), "run: python -m cppo.config.reference docs/configuration.md"


def test_another_task_names_the_run() -> None:
    """Not the recipe that the task was taken out of; a name that is given wins."""
    assert load_config(None, ["steps=2"]).name == "arithmetic"
    assert load_config(None, ["task=reasoning_gym:chain_sum"]).name == "reasoning_gym-chain_sum"
    assert load_config(None, ["name=mine", "task=reasoning_gym:chain_sum"]).name == "mine"
