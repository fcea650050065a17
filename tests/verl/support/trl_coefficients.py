"""The TRL engine's coefficients on rollouts that verl recorded; run where TRL can be imported (and verl is not needed).

    python trl_coefficients.py REQUEST.safetensors ANSWER.json

REQUEST holds, in its metadata, ``model`` (a folder), ``rule`` (name and parameters), ``top_k`` and ``groups``: for each
prompt its token ids and its responses (ids, log mu, reward). Its tensors are ``<k>.<weight>``: the weights of the
rollout policy (k = 0) and of the policy before each further update. ANSWER: for each k, a coefficient list a response.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import Dataset
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import cppo
from cppo.engines.trl import TrustRegionTrainer, trust_region_config

with safe_open(sys.argv[1], framework="pt") as opened:
    request = json.loads(opened.metadata()["request"])
    tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
groups: list[dict[str, Any]] = request["groups"]
size = len(groups[0]["responses"])
updates = 1 + max(int(name.partition(".")[0]) for name in tensors)


def weights(k: int) -> dict[str, torch.Tensor]:
    return {name.partition(".")[2]: value for name, value in tensors.items() if name.startswith(f"{k}.")}


def replay(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """TRL's `rollout_func`: the recorded responses of each prompt, one after the other."""
    turn = dict.fromkeys(prompts, 0)
    found: dict[str, Any] = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
    for prompt in prompts:
        group = groups[int(prompt)]
        response = group["responses"][turn[prompt]]
        turn[prompt] += 1
        found["prompt_ids"].append(list(group["prompt"]))
        found["completion_ids"].append(list(response["ids"]))
        found["logprobs"].append(list(response["logp"]))
    return found


def rewards(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    found = []
    for prompt, ids in zip(prompts, completion_ids, strict=True):
        found.append(next(r["reward"] for r in groups[int(prompt)]["responses"] if r["ids"] == ids))
    return found


model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32)
model.load_state_dict(weights(0))
with tempfile.TemporaryDirectory() as folder:
    trainer = TrustRegionTrainer(
        model,
        rewards,
        trust_region_config(
            output_dir=folder,
            per_device_train_batch_size=len(groups) * size // 2,
            steps_per_generation=2,
            gradient_accumulation_steps=1,
            num_generations=size,
            max_completion_length=max(len(r["ids"]) for g in groups for r in g["responses"]),
            max_steps=2,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        rule=cppo.make_rule(**request["rule"]),
        train_dataset=Dataset.from_list([{"prompt": str(i)} for i in range(len(groups))]),
        processing_class=AutoTokenizer.from_pretrained(request["model"], padding_side="left"),
        rollout_func=replay,
        top_k=request["top_k"],
        topk_anchor="recomputed",
        zero_spread_filter=False,
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))  # samples, scores mu, splits into minibatches
    minibatches = trainer._buffered_inputs
    answer: list[dict[str, list[float]]] = []
    for k in range(updates):
        trainer.accelerator.unwrap_model(trainer.model).load_state_dict(weights(k))
        found: dict[str, list[float]] = {}

        def watch(batch: Any, verdict: Any, inputs: Any, update: int, found: dict[str, list[float]] = found) -> None:
            for row in range(len(inputs["completion_ids"])):
                prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()].tolist()
                inside = inputs["completion_mask"][row].bool()
                key = json.dumps([prompt, inputs["completion_ids"][row][inside].tolist()])
                found[key] = verdict.coefficient[row][inside].tolist()

        trainer._trust_observer = watch
        for inputs in minibatches:
            with torch.no_grad():
                trainer._compute_loss(trainer.model, inputs)
        answer.append(found)
Path(sys.argv[2]).write_text(json.dumps(answer))
