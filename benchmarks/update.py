"""What the trust region costs inside a real run: the default job's model and batch through TRL, random rewards.

    python -m benchmarks.update [--json PATH] [--repeats 3] [--steps 4]

Claims: evaluating the rule takes at most 2% of an update; top-K divergence costs at most 8% more than binary, the
rollout included (mu's top-K is taken there). Runs of both kinds alternate, the first step of each is dropped, figures
are medians over steps. The model is not warmed up, so responses run to the limit, the longest a step can take.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback

from cppo.config.load import load_config, trl_config_kwargs
from cppo.engines.trl.trainer import TrustRegionTrainer, trust_region_config
from cppo.files import atomic_write_json
from cppo.rules import TrustRegion
from cppo.tasks import make_task
from cppo.training.models import build_policy

DIVERGENCES = ("binary_tv", "topk_tv")


class Clock(TrainerCallback):
    """Seconds from the end of one rollout batch's last update to the end of the next one's."""

    def __init__(self, updates: int) -> None:
        self.updates = updates
        self.steps: list[float] = []
        self.last = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.last = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.updates == 0:
            now = time.perf_counter()
            self.steps.append(now - self.last)
            self.last = now


def timed(cls: type, name: str, times: list[float]) -> None:
    """Record how long each call of a method takes."""
    original = getattr(cls, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = original(*args, **kwargs)
        times.append(time.perf_counter() - began)
        return result

    setattr(cls, name, wrapped)


def run(divergence: str, steps: int, folder: str) -> list[float]:
    """Train for `steps` rollout batches; seconds of each but the first."""
    config = load_config("arithmetic", [f"steps={steps}", "warmup.steps=0", f"rule.divergence={divergence}"])
    task = make_task(config.task.name, **config.task.options)
    examples = task.train(config.steps * config.rollout.prompts, seed=0)
    model, tokenizer = build_policy(config, task.alphabet)  # type: ignore[attr-defined]
    rng = random.Random(0)
    clock = Clock(config.updates)
    arguments = {**trl_config_kwargs(config, folder), "save_strategy": "no"}
    trainer = TrustRegionTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [rng.random() for _ in completions],
        args=trust_region_config(**arguments),
        train_dataset=Dataset.from_list([{"prompt": e.prompt} for e in examples]),
        processing_class=tokenizer,
        rule=config.make_rule(),
        top_k=config.top_k,
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock.steps[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    rule_times: list[float] = []
    update_times: list[float] = []
    timed(TrustRegion, "__call__", rule_times)
    timed(TrustRegionTrainer, "training_step", update_times)
    seconds: dict[str, list[float]] = {name: [] for name in DIVERGENCES}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.repeats):
            for name in DIVERGENCES:
                seconds[name] += run(name, options.steps, folder)
    step = {name: statistics.median(values) for name, values in seconds.items()}
    results = {
        "seconds_per_step": step,
        "topk_over_binary": step["topk_tv"] / step["binary_tv"],
        "rule_share_of_update": statistics.median(rule_times) / statistics.median(update_times),
        "seconds_per_rule": statistics.median(rule_times),
        "seconds_per_update": statistics.median(update_times),
        "machine": {"cpu": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__},
    }
    print(f"rule evaluation / update (its forward and backward): {results['rule_share_of_update']:.2%}  (claim: <= 2%)")
    print(f"top-K / binary, whole step with rollout: {results['topk_over_binary']:.3f}  (claim: <= 1.08)")
    if options.json:
        atomic_write_json(options.json, results)


if __name__ == "__main__":
    main()
