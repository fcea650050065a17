"""`cppo launch verl` as far as it goes without verl: what is composed, printed, refused, written and run.

With verl's own configuration: tests/engines/verl/test_verl_launch.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cppo.cli import app as cli
from cppo.config.load import load_config
from cppo.errors import UserError
from cppo.launch import command
from cppo.launch import verl as launch
from cppo.launch.command import Setting, is_verl, merge, read, setting, shell_command, written
from cppo.launch.settings import Cluster

ROOT = Path(__file__).resolve().parents[2]
ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
RECIPES = ("qwen3-1.7b", "qwen3-1.7b-base", "qwen3-8b-base", "qwen3-30b-a3b-base")


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path):
    """In an empty folder, and as on a machine without verl: the check has tests of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "config_folder", lambda: None)
    monkeypatch.delenv("VERL_USE_EXTERNAL_MODULES", raising=False)


def values(*arguments: str, recipe: str = "qwen3-8b-base", **cluster) -> dict[str, str | None]:
    ready = launch.plan(recipe, arguments, Cluster(**cluster))
    return {key: entry.value for key, entry in ready.settings.items()}


def refused(*arguments: str, recipe: str = "qwen3-8b-base", **cluster) -> str:
    with pytest.raises(UserError) as caught:
        launch.plan(recipe, arguments, Cluster(**cluster))
    return str(caught.value)


# -- composing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_of_table_3_is_composed(recipe):
    found = values(recipe=recipe, nnodes=4)
    config = load_config(recipe)
    rollout = config.rollout
    assert found["data.train_batch_size"] == str(rollout.prompts)
    assert found[f"{ACTOR}.ppo_mini_batch_size"] == "32"
    assert found[f"{ROLLOUT}.n"] == str(rollout.responses)
    assert found["trainer.total_training_steps"] == str(config.steps)
    assert found[f"{ACTOR}.policy_loss.rule.delta"] == str(config.rule.parameters["delta"])
    # A micro-batch is one response of full length, over all GPUs that share it.
    share = int(found.get(f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size") or 1)
    limit = int(found["data.max_prompt_length"] or 0) + int(found["data.max_response_length"] or 0)
    assert int(found[f"{ACTOR}.ppo_max_token_len_per_gpu"] or 0) * share == limit == rollout.vllm_max_model_length


def test_machines_and_modes():
    assert Cluster(4, 8).trainer == (4, 8) and Cluster(4, 8).rollout == (0, 8)
    assert Cluster(4, 8, "separate-async").trainer == (2, 8) == Cluster(4, 8, "separate-async").rollout
    half = Cluster(5, 8, "separate-async", rollout_nnodes=1)
    assert (half.trainer, half.rollout) == ((4, 8), (1, 8))
    one = Cluster(1, 7, "separate-async")
    assert (one.trainer, one.rollout) == ((1, 4), (1, 3))
    found = values(mode="separate-async", nnodes=2)
    assert found["trainer.v1.trainer_mode"] == "cppo_separate_async"
    assert (found["trainer.nnodes"], found[f"{ROLLOUT}.nnodes"]) == ("1", "1")
    assert found["trainer.v1.separate_async.parameter_sync_step"] == "4"  # updates on a rollout batch
    assert found[f"{ROLLOUT}.checkpoint_engine.backend"] == "nccl"
    assert values(mode="colocate-async")["trainer.v1.trainer_mode"] == "cppo_colocate_async"


@pytest.mark.parametrize(
    "cluster, words",
    [
        ({"mode": "async"}, "--mode is 'async', expected one of sync, colocate-async, separate-async"),
        ({"nnodes": 0}, "--nnodes is 0"),
        ({"gpus_per_node": 0}, "--gpus-per-node is 0"),
        ({"rollout_nnodes": 1}, "is for --mode separate-async"),
        ({"nnodes": 2, "mode": "separate-async", "rollout_nnodes": 2}, "--rollout-nnodes is 2 of 2 nodes"),
        ({"gpus_per_node": 1, "mode": "separate-async"}, "at least two GPUs"),
    ],
)
def test_machines_that_cannot_be(cluster, words):
    with pytest.raises(UserError, match=re.escape(words)):
        Cluster(**cluster)


def test_settings_of_the_recipe_become_settings_of_verl():
    found = values("delta=0.1", "rule.budget=fixed", "rollout.prompts=64", "updates=2", "steps=7", "seed=5")
    assert found[f"{ACTOR}.policy_loss.rule.delta"] == "0.1"
    assert found[f"{ACTOR}.policy_loss.rule.budget"] == "fixed"
    assert found[f"{ACTOR}.ppo_mini_batch_size"] == "32"
    assert found["trainer.total_training_steps"] == "7"
    assert {found[key] for key in ("data.seed", f"{ROLLOUT}.seed", f"{ACTOR}.data_loader_seed")} == {"5"}
    dppo = values("rule=dppo", "rule.divergence=binary_tv")
    assert dppo[f"{ACTOR}.policy_loss.loss_mode"] == "cppo_dppo"
    assert f"{ACTOR}.policy_loss.top_k" not in dppo and f"{ACTOR}.policy_loss.rule.w_min" not in dppo
    assert values("rule=none")[f"{ACTOR}.policy_loss.loss_mode"] == "cppo_none"
    grpo = values("aggregation=grpo", "advantages.kind=centred")
    assert grpo[f"{ACTOR}.loss_agg_mode"] == "seq-mean-token-mean" and f"{ACTOR}.loss_scale_factor" not in grpo
    assert grpo["algorithm.norm_adv_by_std_in_grpo"] == "False"
    lora = values("peft.r=8", "peft.lora_alpha=16.0", "task.time_limit=2.5")
    assert (lora["actor_rollout_ref.model.lora_rank"], lora["actor_rollout_ref.model.lora_alpha"]) == ("8", "16")
    assert lora["reward.custom_reward_function.reward_kwargs.time_limit"] == "2.5"
    warm = values("optimizer.lr_scheduler=constant_with_warmup", "optimizer.warmup_steps=10")
    assert warm[f"{ACTOR}.optim.lr_warmup_steps"] == "3"  # rollout batches of 4 updates
    assert values("precision=float32")[f"{ACTOR}.fsdp_config.mixed_precision"].startswith("{param_dtype:fp32")
    # before and after only
    assert values("evaluation.every=0", "steps=7")["trainer.test_freq"] == "7"
    unbounded = values("rollout.vllm_max_model_length=null")
    assert (unbounded["data.max_prompt_length"], unbounded[f"{ROLLOUT}.max_model_len"]) == ("2048", "10240")


def test_megatron():
    found = values("model_engine=megatron", "optimizer.lr_scheduler=linear", recipe="qwen3-30b-a3b-base")
    assert not any("fsdp_config" in key for key in found) and f"{ACTOR}.strategy" not in found
    assert found[f"{ACTOR}.optim.lr_decay_style"] == "linear"
    assert found[f"{ACTOR}.megatron.override_transformer_config.recompute_granularity"] == "full"
    ready = launch.plan("qwen3-30b-a3b-base", ["model_engine=megatron"])
    assert any("ulysses_sequence_parallel_size=4 is left out" in note for note in ready.notes)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["rollout.prompts=66"], "verl splits a rollout batch by prompts"),
        (["rollout.vllm_max_model_length=8192"], "8192 tokens for prompt and response"),
        (["aggregation=bnpo"], "verl has dr_grpo, grpo, dapo"),
        (["optimizer.lr_scheduler=linear"], "verl has constant, constant_with_warmup and cosine"),
        (["evaluation.max_new_tokens=4096"], "verl has one response limit for both"),
        (["peft.lora_dropout=0.1"], "verl's LoRA has none"),
        (["peft.r=8", "model_engine=megatron"], "peft with model_engine=megatron"),
        (["precision=float32", "model_engine=megatron"], "has bfloat16 and float16"),
        (["task=reasoning_gym:chain_sum"], "composed for the task math"),
        (["output_dir=a${b"], "a reference to another setting"),
        (["rule.divergence=exact_tv"], "topk_tv_upper for a bound from above"),
        (["rule.divergence=adaptive_tv"], "report log-probabilities of a few ids"),
        (["topk_store=compact"], "a format of its own"),
        (["rule.delta=x"], "rule.delta is 'x'"),
        (["rule.deltaa=1"], "Did you mean 'delta'"),
    ],
)
def test_what_verl_cannot_express_is_refused(arguments, words):
    assert words in refused(*arguments)


def test_the_default_recipe_is_not_for_verl():
    text = refused(recipe="arithmetic")
    assert "model is 'tiny', which `cppo train` makes" in text and "task.name is 'arithmetic'" in text


def test_another_task_needs_data_and_rewards_of_its_own():
    own = ["data.train_files=[a.parquet]", "data.val_files=[b.parquet]", "reward.custom_reward_function.path=c.py"]
    found = values("task=reasoning_gym:chain_sum", *own)
    assert found["data.train_files"] == "[a.parquet]" and found["reward.custom_reward_function.path"] == "c.py"


def test_differences_are_said():
    notes = launch.plan("qwen3-8b-base", ["aggregation=dapo"]).notes
    assert any("stay in the denominator of aggregation=dapo" in note for note in notes)
    arguments = ["optimizer.lr_scheduler=cosine", "optimizer.warmup_steps=10"]
    assert any("rounded up to whole rollout batches of 4" in n for n in launch.plan("qwen3-8b-base", arguments).notes)
    assert launch.plan("qwen3-8b-base").notes == []


# -- whose setting is it? --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, theirs",
    [
        ("rule.delta=0.2", False),
        ("steps=10", False),
        ("rollout.responses=8", False),
        ("trainer.save_freq=5", True),
        ("actor_rollout_ref.actor.optim.lr=1e-6", True),
        ("model_engine=megatron", True),
        ("+anything.at.all=1", True),
        ("++trainer.nnodes=1", True),
        ("~trainer.logger", True),
        ("hydra.run.dir=x", True),
        ("database=1", False),  # not verl's section `data`
    ],
)
def test_settings_are_told_apart(text, theirs):
    assert is_verl(text) == theirs


def test_what_belongs_to_neither_is_refused_all_together():
    text = refused("x", "actor.optim.lr=1", "trl.beta=1", "rollout.vllm_mode=server", "evaluation.problems=3")
    assert text.startswith("5 problems")
    for words in (
        "given as --recipe x",
        "verl's is actor_rollout_ref.actor.optim.lr",
        "it holds arguments of TRL",
        "--mode says where",
        "together with --prepare-data",
    ):
        assert words in text


def test_verls_settings_pass_through_and_replace():
    ready = launch.plan(
        "qwen3-8b-base",
        [
            "trainer.save_freq=5",  # in place of the recipe's
            "trainer.balance_batch=False",  # one that the recipe does not touch
            "+trainer.new=1",
            "~trainer.logger",
            f"{ACTOR}.policy_loss.top_k=10",  # composed with a +, which is kept
            f"++{ACTOR}.grad_clip=1",
        ],
    )
    lines = [str(entry) for entry in ready.settings.values()]
    assert {"trainer.save_freq=5", "trainer.balance_batch=False", "+trainer.new=1", "~trainer.logger"} <= set(lines)
    assert {f"+{ACTOR}.policy_loss.top_k=10", f"++{ACTOR}.grad_clip=1"} <= set(lines)
    assert len([line for line in lines if "trainer.save_freq" in line]) == 1
    assert "trainer.save_freq=5 replaces 20, which follows from save_every." in ready.notes


def test_the_same_thing_given_twice_is_refused_with_both_names():
    text = refused("rollout.prompts=64", "data.train_batch_size=128")
    assert text.startswith("rollout.prompts (of the recipe) and data.train_batch_size (of verl)")
    assert "rule.delta (of the recipe)" in refused("delta=0.1", f"+{ACTOR}.policy_loss.rule.delta=0.2")
    # What merely follows from a recipe's setting can be set beside it.
    found = values("rollout.max_new_tokens=4096", f"{ACTOR}.loss_scale_factor=1000")
    assert (found["data.max_response_length"], found[f"{ACTOR}.loss_scale_factor"]) == ("4096", "1000")


def test_a_recipes_own_section_for_verl(tmp_path):
    path = tmp_path / "mine.yaml"
    text = load_config("qwen3-8b-base").to_yaml().partition("\nverl:")[0]
    path.write_text(text + "\nverl:\n  trainer: {log_val_generations: 4}\n  trainer.save_freq: 3\n")
    found = values(recipe=str(path))
    assert (found["trainer.log_val_generations"], found["trainer.save_freq"]) == ("4", "3")
    assert values("trainer.save_freq=9", recipe=str(path))["trainer.save_freq"] == "9"  # the command line wins,
    assert values("save_every=9", recipe=str(path))["trainer.save_freq"] == "9"  # by either name


def test_merge():
    settings = {"a": setting("a", 1, "x"), "b": setting("b", 2, add=True)}
    notes = merge(settings, [read("a=1"), read("~b"), read("++c=3")])
    assert list(map(str, settings.values())) == ["a=1", "++c=3"] and notes == []
    for text in ("novalue", "=3", "+=3", " =1"):
        with pytest.raises(UserError, match="not a setting of verl"):
            read(text)
    assert read("~a.b") == Setting("a.b", None, "~") and read("~a=1") == Setting("a", "1", "~")


# -- printing --------------------------------------------------------------------------------------------------------


def test_values_are_written_in_hydras_grammar():
    plain = {"a/b-c.d": "a/b-c.d", 1e-06: "1e-06", True: "True", 20: "20", "0.5": "'0.5'", "": "''"}
    for value, text in plain.items():
        assert written(value) == text
    assert written(None) == "null" and written("null") == "'null'" and written("it's") == r"'it\'s'"
    assert written(["a b", 1]) == "['a b',1]" and written({"a": 0.5}) == "{a:0.5}"


def test_the_printed_command_gives_a_shell_the_very_arguments(tmp_path):
    """Through a real shell, with everything that shells and hydra treat specially in it."""
    nasty = ["it's", 'say "x"', "$HOME `ls` \\", "a b=c,d[e]{f}", "*?~!#&;|<>", "ünïcode", "line\\"]
    settings = [setting(f"trainer.t{i}", text) for i, text in enumerate(nasty)]
    settings += [setting("data.files", nasty, add=True), Setting("trainer.logger", None, "~")]
    fake = tmp_path / "python"
    fake.write_text(f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([sys.argv[1:], os.environ['A']]))\n")
    fake.chmod(0o755)
    text = shell_command(settings, {"A": "x 'y' $z"})
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-c", text], capture_output=True, text=True, env=environment, check=True)
    assert json.loads(done.stdout) == [command.arguments(settings), "x 'y' $z"]
    lines = text.splitlines()
    assert len(lines) == 1 + len(settings)  # one setting a line
    assert all(line.endswith(" \\") for line in lines[:-1]) and all(line.startswith("    ") for line in lines[1:])


def test_dry_run_prints_the_command_and_says_that_it_has_not_been_checked():
    done = CliRunner().invoke(
        cli.app, ["launch", "verl", "--recipe", "qwen3-30b-a3b-base", "--nnodes", "4", "--dry-run"]
    )
    assert done.exit_code == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert first.startswith("VERL_USE_EXTERNAL_MODULES=cppo_verl_plugin ") and "-m verl.trainer.main_ppo" in first
    assert "    trainer.nnodes=4 \\" in rest
    assert "has not been checked with verl's own classes: pip install 'cppo[verl]'" in done.stderr
    assert "--recipe qwen3-30b-a3b-base --prepare-data" in done.stderr  # there are no data here


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "which recipe? Say --recipe qwen3-8b-base"),
        (["qwen3-8b-base"], "Say --recipe qwen3-8b-base."),
        (["--recipe", "qwen3-8b-bas"], "Did you mean 'qwen3-8b-base'"),
        (["--recipe", "qwen3-8b-base", "--mode", "fast"], "--mode is 'fast'"),
        (["--recipe", "qwen3-8b-base"], "verl is not installed here: pip install 'cppo[verl]'"),
        (["--recipe", "qwen3-8b-base", "--prepare-data", "d", "trainer.nnodes=1"], "takes no settings of verl"),
        (["--recipe", "arithmetic", "--prepare-data", "d"], "writes the data of the task math"),
    ],
)
def test_mistakes_are_sentences_with_status_2(arguments, words):
    done = CliRunner().invoke(cli.app, ["launch", "verl", *arguments])
    assert done.exit_code == 2 and done.stdout == ""
    assert words in done.stderr and "Traceback" not in done.stderr
    assert not list(Path().iterdir())  # nothing has been written


def test_launch_and_rules_work_without_any_training_library():
    """As in an environment made for verl: no TRL, no datasets, no transformers that this package has a say in."""
    blocked = ("trl", "transformers", "datasets", "accelerate", "peft", "verl", "hydra", "vllm")
    code = (
        f"import sys\nblocked = {blocked}\n"
        "class No:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in blocked: raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, No())\n"
        "from typer.testing import CliRunner\nfrom cppo.cli import app as cli\nfrom cppo.launch import command\n"
        "command.config_folder = lambda: None\n"
        "run = lambda *words: CliRunner().invoke(cli.app, list(words)).exit_code\n"
        "print(run('launch', 'verl', '--recipe', 'qwen3-8b-base', '--dry-run'), run('rules'), run('recipes'))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "0 0 0"
