"""`cppo launch verl` against the real verl: its configuration, its classes, its entry point, its data and rewards.

Without verl: tests/launch/test_launch.py.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("verl.trainer", reason="make setup-verl")
pytest.importorskip("hydra", reason="make setup-verl")

from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from cppo.config.load import load_config
from cppo.errors import UserError
from cppo.launch import command
from cppo.launch import verl as launch
from cppo.launch.checks import problems
from cppo.launch.command import SECTIONS, check, read, setting
from cppo.launch.settings import Cluster

ROOT = Path(__file__).resolve().parents[3]
ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"

TABLE_3 = {
    # model, prompts, n, minibatch prompts, response limit, delta, delta_b, budget, T_stop
    "qwen3-1.7b": ("Qwen/Qwen3-1.7B", 64, 8, 32, 8192, 0.15, 0.015, "fixed", 1120),
    "qwen3-1.7b-base": ("Qwen/Qwen3-1.7B-Base", 64, 8, 32, 8192, 0.15, 0.020, "adaptive", 680),
    "qwen3-8b-base": ("Qwen/Qwen3-8B-Base", 128, 8, 32, 8192, 0.15, 0.020, "adaptive", 490),
    "qwen3-30b-a3b-base": ("Qwen/Qwen3-30B-A3B-Base", 256, 16, 32, 16384, 0.20, 0.020, "adaptive", 560),
}


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def accepted(*arguments: str, recipe: str = "qwen3-8b-base", **cluster: Any) -> Any:
    """verl's whole configuration, composed and accepted by verl's own classes."""
    ready = launch.plan(recipe, arguments, Cluster(**cluster))
    assert ready.checked is not None
    return ready.composed


def refused(*arguments: str, recipe: str = "qwen3-8b-base", **cluster: Any) -> str:
    with pytest.raises(UserError) as caught:
        launch.plan(recipe, arguments, Cluster(**cluster))
    return str(caught.value)


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    """A good configuration, to be spoilt."""
    os.chdir(tmp_path_factory.mktemp("composed"))
    return accepted()


# -- accepted --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", TABLE_3)
def test_verl_composes_exactly_table_3(recipe):
    model, prompts, n, minibatch, limit, delta, delta_b, budget, steps = TABLE_3[recipe]
    config = accepted(recipe=recipe, nnodes=4)
    actor, rollout, trainer = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, config.trainer
    assert config.actor_rollout_ref.model.path == model
    assert (config.data.train_batch_size, rollout.n, actor.ppo_mini_batch_size) == (prompts, n, minibatch)
    assert (config.data.max_response_length, rollout.response_length, actor.loss_scale_factor) == (limit,) * 3
    assert (trainer.total_training_steps, trainer.nnodes, trainer.n_gpus_per_node) == (steps, 4, 8)
    assert trainer.total_epochs >= steps  # verl stops at whichever comes first

    loss = actor.policy_loss
    assert (loss.loss_mode, loss.top_k, loss.topk_variant) == ("cppo", 20, "append")
    assert OmegaConf.to_container(loss.rule) == {
        key: value for key, value in load_config(recipe).rule.parameters.items() if value is not None
    }
    assert (loss.rule.delta, loss.rule.delta_b, loss.rule.budget, loss.rule.w_min) == (delta, delta_b, budget, 0.8)
    assert loss.rule.divergence == "topk_tv"

    # GRPO: group-normalised, no KL, no entropy bonus; AdamW at a constant 1e-6; a constant denominator
    assert (config.algorithm.adv_estimator, config.algorithm.norm_adv_by_std_in_grpo) == ("grpo", True)
    assert (config.algorithm.use_kl_in_reward, actor.use_kl_loss, actor.entropy_coeff) == (False, False, 0)
    assert config.algorithm.filter_groups.enable is False  # which would sample other prompts in their place
    assert (actor.optim.optimizer, actor.optim.lr, actor.optim.lr_scheduler_type) == ("AdamW", 1e-6, "constant")
    assert (actor.optim.lr_warmup_steps, actor.optim.weight_decay, actor.ppo_epochs) == (0, 0.0, 1)
    assert actor.loss_agg_mode == "seq-mean-token-sum-norm"

    # the anchor, and the full softmax
    assert (config.algorithm.rollout_correction.bypass_mode, rollout.calculate_log_probs) == (True, True)
    assert (rollout.name, rollout.temperature, rollout.top_p, rollout.top_k) == ("vllm", 1.0, 1.0, -1)
    assert (trainer.use_v1, trainer.v1.trainer_mode) == (True, "cppo_sync")

    # Avg@16 on three AIMEs
    names = [Path(name).name for name in config.data.val_files]
    assert names == ["AIME24.parquet", "AIME25.parquet", "AIME26.parquet"]
    validation = rollout.val_kwargs
    assert (validation.n, validation.temperature, validation.top_p, validation.do_sample) == (16, 0.7, 0.95, True)
    assert trainer.val_before_train and trainer.test_freq == trainer.save_freq == 20


@pytest.mark.parametrize(
    "arguments, cluster",
    [
        ([], {"mode": "colocate-async"}),
        ([], {"mode": "separate-async", "nnodes": 2}),
        (["rule=trm_max"], {"gpus_per_node": 1}),
        (["rule=none", "peft.r=8"], {}),
        (["rule.divergence=binary_tv", "model_engine=megatron", f"{ACTOR}.megatron.tensor_model_parallel_size=4"], {}),
    ],
)
def test_other_modes_rules_and_engines_are_accepted(arguments, cluster):
    assert accepted(*arguments, **cluster).trainer.v1.trainer_mode.startswith("cppo_")


def test_verls_own_entry_point_reads_what_the_program_prints():
    """`--dry-run`, and its output through a shell up to hydra's printing of the configuration; nothing is started."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("VERL_")}
    environment |= {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    settings = ["delta=0.1", "~data.video_key", "output_dir=a folder"]
    words = [sys.executable, "-m", "cppo.cli", "launch", "verl", "--recipe", "qwen3-30b-a3b-base", "--nnodes", "4"]
    done = subprocess.run(
        [*words, "--dry-run", *settings], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "not been checked" not in done.stderr
    assert all(line.startswith("Note: ") for line in done.stderr.splitlines())  # nothing of what verl says on import
    assert done.stdout.startswith("VERL_USE_EXTERNAL_MODULES=cppo_verl_plugin ")

    text = done.stdout.rstrip("\n").replace(" python -m ", f" {shlex.quote(sys.executable)} -m ", 1) + " --cfg job"
    done = subprocess.run(["sh", "-c", text], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    config = OmegaConf.create(done.stdout[done.stdout.index("model_engine:") :])
    assert config.actor_rollout_ref.actor.policy_loss.rule.delta == 0.1
    assert config.trainer.nnodes == 4 and "video_key" not in config.data
    assert config.trainer.default_local_dir == str(Path("a folder/checkpoints").absolute())
    variables = config.ray_kwargs.ray_init.runtime_env.env_vars  # for workers on other nodes
    assert variables.VERL_USE_EXTERNAL_MODULES == "cppo_verl_plugin"


def test_the_trainer_takes_what_is_composed(composed):
    """What CPPO's trainers do with a configuration before they start anything."""
    from omegaconf import open_dict

    from cppo.engines.verl.checks import check_config
    from cppo.engines.verl.trainer import TrustRegionTrainer

    config = composed.copy()
    assert check_config(config).parameters()["delta"] == 0.15
    with open_dict(config):
        TrustRegionTrainer._prepare_top_k(config)
    assert config.actor_rollout_ref.rollout.agent.agent_loop_manager_class.startswith("cppo.")


# -- the page --------------------------------------------------------------------------------------------------------


def _blocks() -> list[str]:
    """The shell blocks of docs/verl.md, continued lines joined."""
    page = (ROOT / "docs" / "verl.md").read_text(encoding="utf-8")
    return [block.replace("\\\n", " ") for block in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)]


def test_the_five_lines_turn_a_script_of_verls_into_one_with_cppo():
    (five,) = [
        block for block in _blocks() if block.lstrip().startswith("actor_rollout_ref.actor.policy_loss._target_")
    ]
    assert len(shlex.split(five)) == 5
    script = [f"{ROLLOUT}.name=vllm", f"{ACTOR}.use_dynamic_bsz=True", "algorithm.adv_estimator=grpo"]
    found = check({entry.key: entry for entry in map(read, [*script, *shlex.split(five)])})
    assert found.problems == [] and found.config.trainer.v1.trainer_mode == "cppo_sync"
    # and each of them is needed
    for line in shlex.split(five):
        rest = [text for text in shlex.split(five) if text != line]
        found = check({entry.key: entry for entry in map(read, [*script, *rest])})
        assert bool(found.problems) != line.startswith("+"), line  # a parameter has a default


def test_the_commands_of_the_page_are_accepted(tmp_path):
    lines = [line.partition("#")[0] for block in _blocks() for line in block.splitlines() if "cppo launch" in line]
    assert len(lines) >= 6
    for line in lines:
        words = shlex.split(line)[3:]
        if "--prepare-data" in words or ("--gpus-per-node" in words and "--nnodes" not in words):
            continue  # another test; and the default
        options = {words[i]: words[i + 1] for i in range(len(words) - 1) if words[i].startswith("--")}
        settings = [word for word in words if "=" in word]
        if "model_engine=megatron" in settings:
            settings.append("rule.divergence=binary_tv")  # Megatron-Core is not installed here
        cluster = Cluster(int(options.get("--nnodes", 1)), int(options.get("--gpus-per-node", 8)))
        assert launch.plan(options["--recipe"], settings, cluster).checked, line


# -- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["trainer.n_gpu_per_node=3"], ["no setting 'trainer.n_gpu_per_node'", "mean trainer.n_gpus_per_node"]),
        (["actor_rollout_ref.actor.lr=1"], ["Did you mean actor_rollout_ref.actor.optim.lr?"]),
        (["+data.custom_cls=1"], ["verl has the setting data.custom_cls", "without the +"]),
        (["~trainer.qqq"], ["verl has no setting 'trainer.qqq'", "Write +trainer.qqq=..."]),
        (["data.train_files=a=b"], ["cannot read a=b", "quoted twice"]),
        (["trainer.logger=console,wandb"], ["choice of values", "[console,wandb]"]),
        (["model_engine=deepspeed"], ["Could not find 'model_engine/deepspeed'", "There are dp, megatron"]),
        (["trainer.project_name=${nowhere}"], ["cannot be composed", "nowhere"]),
        (
            [f"{ACTOR}.entropy_coeff=a", f"{ACTOR}.use_kl_loss=3", "trainer.nnodes=two"],
            ["3 problems", "entropy_coeff=a: expected a number", "use_kl_loss=3: expected True or False", "nnodes=two"],
        ),
        (["trainer.nnodes=1.5"], ["trainer.nnodes=1.5, expected a whole number of at least 1"]),
        (
            ["trainer.use_v1=False", "algorithm.rollout_correction.bypass_mode=False"],
            ["Set trainer.use_v1=True", "Set algorithm.rollout_correction.bypass_mode=True"],
        ),
        (
            [f"{ROLLOUT}.calculate_log_probs=False", f"{ROLLOUT}.top_p=0.9", f"{ROLLOUT}.top_k=50"],
            ["Set actor_rollout_ref.rollout.calculate_log_probs=True", "rollout.top_p=0.9", "rollout.top_k=50"],
        ),
        (
            ["actor_rollout_ref.model.use_fused_kernels=True", "distillation.enabled=True"],
            ["fused kernels never hold the logits", "distillation from a teacher"],
        ),
        (["trainer.v1.trainer_mode=sync"], ["does not collect the sampler's top K", "trainer_mode=cppo_sync"]),
        (["rule.divergence=binary_tv", "trainer.v1.trainer_mode=sync"], ["insists on one of CPPO's trainers"]),
        ([f"+{ACTOR}.policy_loss.rule.deltaa=1"], ["'cppo' has no parameter 'deltaa'", "Did you mean 'delta'"]),
        ([f"{ACTOR}.policy_loss.loss_mode=cppo_dpo"], ["Did you mean 'cppo_dppo'"]),
        ([f"{ACTOR}.policy_loss.loss_mode=vanilla"], ["loss_mode is 'vanilla'"]),
        # what verl says itself
        ([f"+{ACTOR}.policy_loss.nonsense=1"], ["verl refuses", "unexpected keyword argument 'nonsense'"]),
        ([f"{ACTOR}.loss_agg_mode=mean"], ["verl refuses", "Invalid loss_agg_mode: mean"]),
        ([f"{ROLLOUT}.expert_parallel_size=3"], ["verl refuses", "expert_parallel_size must be equal"]),
        (
            [
                f"+{ACTOR}.policy_loss.trainer_checks=False",
                "rule.divergence=binary_tv",
                "trainer.v1.trainer_mode=fsdp",
            ],
            ["verl refuses", "Unknown trainer 'fsdp'", "cppo_sync"],
        ),
    ],
)
def test_mistakes_are_refused_with_what_to_set(arguments, words):
    text = refused(*arguments)
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"trainer.n_gpus_per_node": 7},
            "which 7 data-parallel ranks (1 x 7 = 7 GPUs) cannot share equally. Use 4 GPUs",
        ),
        ({"trainer.nnodes": 40}, "320 data-parallel ranks (40 x 8 = 320 GPUs) cannot share equally. Use 256 GPUs"),
        ({f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size": 3}, "groups of 3 that work on one micro-batch"),
        ({"data.train_batch_size": 100}, "cannot be split into updates of"),
        ({f"{ACTOR}.ppo_mini_batch_size": 256}, "Set the former to 128 or less"),
        ({f"{ROLLOUT}.tensor_model_parallel_size": 16}, "takes 16 GPUs, but there are 1 x 8 = 8 GPUs of the trainer"),
        ({f"{ROLLOUT}.tensor_model_parallel_size": 3}, "replicas of 3 GPUs do not fill 1 x 8 = 8 GPUs"),
        ({f"{ROLLOUT}.tensor_model_parallel_size": 16, "trainer.nnodes": 3}, "replicas of 16 GPUs do not fill 3 x 8"),
        ({f"{ROLLOUT}.gpu_memory_utilization": 1.5}, "above 0 and below 1"),
        ({f"{ROLLOUT}.max_model_len": 8192}, "do not hold the longest prompt and response, 10240"),
        ({f"{ACTOR}.ppo_max_token_len_per_gpu": 4096}, "Set it to at least 10240"),
        (
            {f"{ACTOR}.ppo_max_token_len_per_gpu": 4096, f"{ACTOR}.ulysses_sequence_parallel_size": 2},
            "a micro-batch holds 8192 tokens",
        ),
        ({"data.train_files": ["a.csv"]}, "verl reads .parquet, .json and .jsonl files, not a.csv"),
        ({"trainer.v1.trainer_mode": "cppo_separate_async"}, "needs nodes of its own for the rollout"),
        ({"trainer.v1.trainer_mode": "cppo_separate_async"}, "naive cannot. Set it to nccl"),
        (
            {"trainer.v1.trainer_mode": "separate_async", "trainer.v1.separate_async.parameter_sync_step": 3},
            "Set parameter_sync_step=4",
        ),
        (
            {
                "trainer.v1.trainer_mode": "cppo_separate_async",
                f"{ROLLOUT}.nnodes": 1,
                f"{ROLLOUT}.n_gpus_per_node": 2,
                f"{ROLLOUT}.tensor_model_parallel_size": 4,
            },
            "2 GPUs of the rollout",
        ),
    ],
)
def test_what_verl_finds_late_is_found_early(composed, changes, words):
    assert problems(composed, {}) == []
    config = composed.copy()
    for key, value in changes.items():
        OmegaConf.update(config, key, value)
    text = "\n".join(problems(config, {}))
    assert words in text


def test_megatrons_parallel_groups_are_counted():
    config = accepted("rule.divergence=binary_tv", "model_engine=megatron")
    for key, value in {"tensor": 4, "pipeline": 3}.items():
        config[ACTOR.split(".")[0]].actor.megatron[f"{key}_model_parallel_size"] = value
    (text,) = problems(config, {})
    assert "groups of 12" in text and "tensor, pipeline and context parallel" in text


def test_messages_name_the_recipes_keys(composed):
    config = composed.copy()
    OmegaConf.update(config, f"{ROLLOUT}.tensor_model_parallel_size", 16)
    (text,) = problems(config, {f"{ROLLOUT}.tensor_model_parallel_size": "rollout.vllm_tensor_parallel_size"})
    assert "(from rollout.vllm_tensor_parallel_size)" in text
    assert "Set rollout.vllm_tensor_parallel_size to 8 or less" in text


def test_a_local_models_limits_are_looked_at(composed, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 4096, "num_attention_heads": 12}))
    config = composed.copy()
    changes = {
        "actor_rollout_ref.model.path": str(tmp_path),
        f"{ROLLOUT}.tensor_model_parallel_size": 8,
        f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size": 8,
    }
    for key, value in changes.items():
        OmegaConf.update(config, key, value)
    text = "\n".join(problems(config, {}))
    assert "was made for 4096 tokens" in text
    assert text.count("does not divide the 12 attention heads") == 2


# -- hydra's grammar -------------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"))).filter(lambda text: "${" not in text)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), inner),
    max_leaves=5,
)


@given(VALUES)
def test_hydra_reads_back_what_is_written(value):
    (override,) = OverridesParser.create().parse_overrides([str(setting("a.b", value, add=True))])
    assert override.key_or_group == "a.b" and override.is_add()
    assert override.value() == value


@given(TEXTS)
def test_what_the_user_writes_reaches_hydra_unchanged(text):
    assert str(read(f"+a.b={text}")) == f"+a.b={text}"


def test_the_sections_are_verls():
    folder = command.config_folder()
    assert folder is not None
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(config_dir=str(folder), version_base=None):
        assert sorted([*compose("ppo_trainer"), "hydra"]) == sorted(SECTIONS)
