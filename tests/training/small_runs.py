"""The smallest runs, and what they have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from cppo.config.load import load_config
from cppo.training import run as run_module

HERE = Path(__file__).parent
TINY = ["tiny.hidden_size=32", "tiny.layers=1", "tiny.heads=2", "warmup.steps=20", "warmup.batch_size=16"]
BATCH = ["rollout.prompts=4", "rollout.responses=4", "updates=2", "evaluation.problems=4", "evaluation.samples=2"]
ARITHMETIC = ["task=arithmetic", "task.families=[chain-12]", "rollout.max_new_tokens=40", *TINY, *BATCH]
LETTERS = ["task=toy_task:Letters", "rollout.max_new_tokens=12", "optimizer.learning_rate=0.003", *BATCH]


def train(*settings: str) -> Any:
    return run_module.train(load_config(None, list(settings)))


def rows(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if kind in (None, row["kind"])]


def untimed(folder: Path) -> list[dict[str, Any]]:
    return [{name: row[name] for name in row if not name.startswith("time/")} for row in rows(folder)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def loads_and_generates(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("1+2=", return_tensors="pt")
    output = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=3)
    assert output.shape[1] > 4


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)
