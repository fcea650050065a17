"""Learning, not only running: verl and CPPO on the built-in arithmetic, from the project's own warm-up.

Twenty updates (ten rollouts of 32 problems x 8 responses, the same problems each time) raise the reward; and on the
first rollouts the TRL engine decides as verl's does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("verl.trainer", reason="verl is not installed: make test-verl")

import torch
from recompute import FORWARD_TIE, assert_recomputed, close, distributions
from safetensors.torch import load_file, save_file
from trainer_runs import SOURCE, SUPPORT, Forks, Result, Run, Update, environment, parquet, train

pytestmark = pytest.mark.e2e

PROMPTS, RESPONSES, STEPS, UPDATES = 32, 8, 10, 2
RULE = {"delta": 0.1, "delta_b": 0.01, "budget": "fixed", "w_min": 0.8, "divergence": "topk_tv"}
#: Of the recipe `arithmetic`, smaller: chains of three steps; the teacher answers a fifth of the facts at random, which
#: leaves the warmed-up model at 0.2 to 0.5.
RECIPE = ["task.options.families=[chain-3]", "task.options.ignorance=0.2", "warmup.steps=300", "seed=1"]
#: Where `make setup-verl` puts TRL (see `support/trl_verdicts.py`).
TRL = Path(sys.prefix) / "lib" / "trl-only"


@pytest.fixture(scope="module")
def task() -> Any:
    from cppo.config.load import load_config
    from cppo.tasks import make_task

    settings = load_config("arithmetic", RECIPE).task
    return make_task(settings.name, **settings.options)


@pytest.fixture(scope="module")
def checkpoint(task: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model after the recipe's warm-up, with a chat template that yields the bare prompt."""
    from cppo.config.load import load_config
    from cppo.training.models import build_policy
    from cppo.training.warmup import warmup_trainer

    config = load_config("arithmetic", RECIPE)
    model, tokenizer = build_policy(config, task.alphabet)
    folder = tmp_path_factory.mktemp("warmup")
    warmup_trainer(model, tokenizer, task, config, folder / "trainer", []).train()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def run(forks: Forks, task: Any, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The task through verl's data pipeline, agent loop and reward loop."""
    folder = tmp_path_factory.mktemp("learning")
    rows = [
        {
            "data_source": "arithmetic",
            "prompt": [{"role": "user", "content": example.prompt}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": example.answer},
            "extra_info": {"index": index, "prompt": example.prompt, "family": example.family},
        }
        for index, example in enumerate(task.train(PROMPTS, seed=5))
    ]
    loss, rollout = "actor_rollout_ref.actor.policy_loss", "actor_rollout_ref.rollout"
    overrides = {
        "trainer.v1.trainer_mode": "cppo_sync",
        "trainer.total_training_steps": STEPS,
        f"{loss}._target_": "cppo.engines.verl.config.TrustRegionLossConfig",
        f"{loss}.loss_mode": "cppo",
        **{f"+{loss}.rule.{name}": value for name, value in RULE.items()},
        "data.train_batch_size": PROMPTS,
        "data.max_prompt_length": 16,
        "data.max_response_length": task.max_response_tokens + 4,
        "actor_rollout_ref.actor.ppo_mini_batch_size": PROMPTS // UPDATES,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": PROMPTS * RESPONSES // UPDATES,
        "actor_rollout_ref.actor.optim.lr": 6e-4,
        f"{rollout}.n": RESPONSES,
        "reward.custom_reward_function.name": "task",
    }
    data = parquet(folder / "arithmetic.parquet", rows)
    return train(Run("learning", overrides), folder / "runs", checkpoint, data, 900, forks=forks)


def test_reward_rises(run: Result) -> None:
    """From under one half; over the last five rollouts at least 0.2 above the first."""
    rewards = [row["critic/rewards/mean"] for row in run.steps]
    print("reward:", *(f"{reward:.3f}" for reward in rewards))
    assert len(rewards) == STEPS and len(run.updates) == STEPS * UPDATES
    assert 0.1 < rewards[0] < 0.7
    assert sum(rewards[-5:]) / 5 > rewards[0] + 0.2
    assert sum(row["actor/trust/masked_fraction"] for row in run.steps) > 0


def test_prompts_and_rewards_are_the_tasks(run: Result, task: Any) -> None:
    """The model saw the bare prompt, and what verl took for the reward is the verifier's word on what it wrote."""
    examples = {example.prompt: example for example in task.train(PROMPTS, seed=5)}
    assert {row["input"] for row in run.rollouts} == set(examples)
    assert len(run.rollouts) == PROMPTS * RESPONSES * STEPS
    for row in run.rollouts:
        assert row["score"] == task.score(examples[row["input"]], row["output"])
        assert row["gts"] == examples[row["input"]].answer


@pytest.mark.parametrize("update", [0, 1])
def test_trl_decides_alike(run: Result, checkpoint: Path, update: int, tmp_path: Path) -> None:
    """The coefficients of verl's first two updates, taken from its gradients, against TRL's on the same rollouts.

    At update 0 pi is mu and they are 1; at update 1 tokens are dropped.
    """
    if not TRL.is_dir():
        pytest.fail(f"TRL is not in {TRL}: make setup-verl puts it there")
    first, judged = run.updates[0], run.updates[update]
    mu, pi = (distributions(checkpoint, weights, judged) for weights in (first.weights, judged.weights))
    responses = assert_recomputed(judged, mu, pi, "cppo", RULE)

    verdicts = trl_verdicts(run.updates[:UPDATES], judged, checkpoint, tmp_path)
    offset = sum(len(call.rows("data.responses")) for call in run.updates[:update])
    compared = dropped = 0
    for row, (response, gradient) in enumerate(zip(responses, judged.responses("grad.log_probs"), strict=True)):
        advantage = torch.tensor(response.advantage)
        if response.expected.margin < FORWARD_TIE or not advantage.any():
            continue
        trl = verdicts[f"coefficient.{offset + row}"]
        close(verdicts[f"advantage.{offset + row}"], advantage[0], 2e-3, "advantage (1e-6 and 1e-4 on the deviation)")
        close(-gradient * judged.tokens / advantage, trl, 1e-4, "coefficient")
        compared, dropped = compared + len(trl), dropped + int((trl == 0).sum())
    assert compared > 500, "most groups have equal rewards"
    assert (dropped > 0) == (update > 0)


def trl_verdicts(calls: list[Update], judged: Update, model: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The TRL engine on the rollouts of `calls`, sampled by the weights of the first, judged at those of `judged`."""
    tensors: dict[str, torch.Tensor] = {}
    fields = {"prompt": "data.prompts", "response": "data.responses", "logp": "data.old_log_probs"}
    for key, name in fields.items():
        rows = [row for call in calls for row in call.rows(name)]
        tensors |= {f"{key}.{i}": row.clone() for i, row in enumerate(rows)}
    scores = [row.sum() for call in calls for row in call.rows("data.rm_scores")]
    tensors |= {f"reward.{i}": score for i, score in enumerate(scores)}
    tensors |= {f"mu.{name}": weight for name, weight in calls[0].weights.items()}
    tensors |= {f"pi.{name}": weight.clone() for name, weight in judged.weights.items()}
    save_file(tensors, folder / "rollouts.safetensors")
    command = [sys.executable, str(SUPPORT / "trl_verdicts.py"), str(model)]
    command += [str(folder / "rollouts.safetensors"), str(folder / "verdicts.safetensors")]
    command += [json.dumps({"name": "cppo", **RULE})]
    env = environment("") | {"PYTHONPATH": os.pathsep.join((str(TRL), str(SOURCE)))}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return load_file(folder / "verdicts.safetensors")
