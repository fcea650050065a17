"""A run folder in the real format without a run: random tokens, judged by real rules, written by the real writers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

import cppo
from cppo.engines.trl.batch import attach_rewards
from cppo.files import atomic_write_json, atomic_write_text
from cppo.runs.folder import RunFolder
from cppo.training.recorder import RunRecorder

ALPHABET = "0123456789+-*= ;abcdefghij<>\n\u00e9"


class CharTokenizer:
    """Ids are indices of ALPHABET."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(ALPHABET[int(i)] for i in token_ids)


def minibatch(
    rows: int = 8, length: int = 40, drift: float = 0.3, seed: int = 0
) -> tuple[cppo.TokenBatch, dict[str, torch.Tensor]]:
    """A padded batch with responses of different lengths, and the TRL minibatch it belongs to."""
    generator = torch.Generator().manual_seed(seed)
    rollout = -torch.rand(rows, length, generator=generator) * 2 - 0.05
    growth = torch.linspace(0.2, 1.8, length)
    policy = (rollout + drift * growth * torch.randn(rows, length, generator=generator)).clamp(max=-1e-3)
    lengths = torch.randint(length // 2, length + 1, (rows,), generator=generator)
    mask = torch.arange(length)[None] < lengths[:, None]
    policy = torch.where(mask, policy, float("nan"))  # padding may hold anything
    advantages = torch.randn(rows, generator=generator)
    ids = torch.randint(0, len(ALPHABET), (rows, length), generator=generator)
    prompts = torch.randint(0, len(ALPHABET), (rows, 6), generator=generator)
    prompt_mask = torch.ones(rows, 6, dtype=torch.long)
    prompt_mask[:, 0] = 0
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": prompt_mask,
        "completion_ids": ids,
        "completion_mask": mask.long(),
    }
    attach_rewards(inputs, torch.rand(rows, 1, generator=generator), torch.ones(1), rows // 4 or 1, 0)
    return cppo.TokenBatch(policy, rollout, advantages, mask), inputs


def rule(name: str = "cppo") -> Any:
    """CPPO with the sampled token's divergence (no top-K rows are at hand here), or a rule by name."""
    return cppo.CPPO(delta=0.15, divergence="binary_tv") if name == "cppo" else cppo.make_rule(name)


def observe_step(recorder: RunRecorder, judge: Any, step: int, updates: int, **kwargs: Any) -> list[dict[str, Any]]:
    """Feed the recorder one rollout batch; the train rows it gives."""
    rows = []
    for update in range(updates):
        drift = 0.01 + 0.25 * update / max(1, updates - 1) * (1 + step / 60)
        batch, inputs = minibatch(drift=drift, seed=1000 * step + update, **kwargs)
        verdict = judge(batch)
        recorder(batch, verdict, inputs, update)
        stats = cppo.metrics(batch, verdict, first_update=update == 0)
        rows.append(
            {"step": step, "update": (step - 1) * updates + update + 1, "kind": "train", "loss": 0.01 * update}
            | {"reward": 0.5 + 0.4 * (1 - 0.95**step) + 0.03 * ((step * 7) % 5 - 2), "zero_spread_fraction": 0.2}
            | {"skipped_nonfinite": int(step == 2 and update == 0), "time/step_time": 0.25 if update else 1.25}
            | stats
        )
    return rows


def write_run(folder: Path, steps: int = 60, updates: int = 8, name: str = "cppo", evaluate: bool = True) -> Path:
    """A whole run folder (no checkpoints)."""
    parameters = {"name": name, "delta": 0.15, "delta_b": 0.02} if name == "cppo" else {"name": name}
    model = {"architecture": "qwen3", "hidden_size": 128}
    config = {"model": model, "task": "arithmetic", "rule": parameters, "seed": 7}
    atomic_write_text(folder / "config.yaml", yaml.safe_dump(config))
    atomic_write_json(folder / "versions.json", {"python": "3.12.3", "torch": torch.__version__, "cppo": "0.1.0"})
    judge = rule(name)
    recorder = RunRecorder(folder, CharTokenizer(), 10, 3, updates, judge.divergence)
    for step in range(steps + 1):
        if evaluate and (step in (0, steps) or step % 20 == 0):
            samples = 16 if step in (0, steps) else 4
            accuracies = {
                f"avg/{task}": 0.5 + 0.35 * (1 - 0.94**step) - 0.08 * at
                for at, task in enumerate(("chain_short", "chain_long", "addition"))
            }
            passes = {key.replace("avg/", "pass/"): min(1.0, value + 0.1) for key, value in accuracies.items()}
            means = {"avg/mean": sum(accuracies.values()) / 3, "pass/mean": sum(passes.values()) / 3}
            row = {"step": step, "update": 0, "kind": "evaluation", "samples": samples, "time/evaluation": 2.0}
            RunFolder(folder).append_metrics(row | accuracies | passes | means)
        if step:
            RunFolder(folder).append_metrics(*observe_step(recorder, judge, step, updates))
            recorder.end_of_step(step, last=step == steps)
    return folder
