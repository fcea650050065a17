"""What the TRL engine decides on given rollouts: run by `test_learning.py` in a process of its own.

    python trl_verdicts.py MODEL INPUT OUTPUT RULE

verl 0.9 does not start where it finds a current TRL, so TRL lies outside the environment and only this process has its
folder on PYTHONPATH. INPUT (safetensors): rows ``prompt.<i>``, ``response.<i>``, ``logp.<i>`` (log mu of the response's
tokens), ``reward.<i>``, and ``mu.*`` / ``pi.*``, the weights that sampled and those that are judged. RULE: JSON, its
name and parameters. OUTPUT: ``coefficient.<i>`` and ``advantage.<i>`` for the same rows.

TRL is given the rollouts by its own `rollout_func`; it computes rewards, advantages, mu's top K (at the weights that
sampled, as in a run) and minibatches. The learning rate is 0, so both minibatches are judged at the same weights.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import defaultdict
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import cppo
from cppo.engines.trl.trainer import TrustRegionTrainer, trust_region_config


def main(model_folder: str, source: str, target: str, rule: str) -> None:
    tensors = load_file(source)
    count = sum(name.startswith("prompt.") for name in tensors)
    rows = [{key: tensors[f"{key}.{i}"] for key in ("prompt", "response", "logp", "reward")} for i in range(count)]
    weights = {
        part: {name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")}
        for part in ("mu", "pi")
    }
    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model.load_state_dict(weights["mu"])

    def text(row: dict[str, Any]) -> str:
        return tokenizer.decode(row["prompt"])

    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[text(row)].append(row)
    (size,) = {len(group) for group in groups.values()}
    rewards = {(text(row), *row["response"].tolist()): float(row["reward"]) for row in rows}

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        waiting = {prompt: iter(group) for prompt, group in groups.items()}
        chosen = [next(waiting[prompt]) for prompt in prompts]
        return {
            "prompt_ids": [row["prompt"].tolist() for row in chosen],
            "completion_ids": [row["response"].tolist() for row in chosen],
            "logprobs": [row["logp"].tolist() for row in chosen],
        }

    def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [rewards[prompt, *ids] for prompt, ids in zip(prompts, completion_ids, strict=True)]

    found: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def observe(batch: cppo.TokenBatch, verdict: cppo.Verdict, inputs: dict[str, Any], update: int) -> None:
        for i, mask in enumerate(batch.loss_mask):
            prompt = inputs["prompt_ids"][i][inputs["prompt_mask"][i].bool()].tolist()
            response = inputs["completion_ids"][i][mask].tolist()
            found[(*prompt, -1, *response)] = (verdict.coefficient[i][mask], batch.advantages.reshape(-1)[i])

    class Trainer(TrustRegionTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            output = super()._generate_and_score_completions(inputs)
            self.model.load_state_dict(weights["pi"])
            return output

    parameters = json.loads(rule)
    with tempfile.TemporaryDirectory() as folder:
        args = trust_region_config(
            output_dir=folder,
            per_device_train_batch_size=count // 2,
            steps_per_generation=2,
            num_generations=size,
            max_completion_length=max(len(row["response"]) for row in rows),
            max_steps=2,
            learning_rate=0.0,
            scale_rewards="group",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        Trainer(
            model,
            reward,
            args,
            rule=cppo.make_rule(parameters.pop("name"), **parameters),
            topk_anchor="recomputed",
            zero_spread_filter=False,
            observer=observe,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in groups]),
            processing_class=tokenizer,
            rollout_func=rollout,
        ).train()
    saved = {}
    for i, row in enumerate(rows):
        coefficient, advantage = found[(*row["prompt"].tolist(), -1, *row["response"].tolist())]
        saved |= {f"coefficient.{i}": coefficient.clone(), f"advantage.{i}": advantage.clone()}
    save_file(saved, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
