"""What a run gives its trainer beside settings: observers, the reward, the sampler, LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate import DistributedType, PartialState

from cppo.config.load import Config
from cppo.engines.trl.trainer import Observer
from cppo.rules import Verdict
from cppo.tasks import Example, Task, score_all
from cppo.tokens import TokenBatch


def observers(*several: Observer) -> Observer | None:
    """All of them as one; None where there is none."""

    def observe(batch: TokenBatch, verdict: Verdict, inputs: dict[str, Any], update: int) -> None:
        for observer in several:
            observer(batch, verdict, inputs, update)

    observe.last_update_whole = True  # type: ignore[attr-defined]  # certificates are of the last update
    return observe if several else None


def reward_function(task: Task, examples: Sequence[Example]) -> Any:
    """The task's score as a TRL reward function; ``index`` is the dataset's column."""

    def reward(completions: list[Any], index: list[int], **_: Any) -> list[float]:
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        return score_all(task, [(examples[i], text) for i, text in zip(index, texts, strict=True)])

    return reward


def sampler_of(config: Config, state: PartialState) -> str:
    """Which sampler `rollout.sampler` means in this run (an argument of `TrustRegionTrainer`)."""
    if config.rollout.sampler != "auto":
        return config.rollout.sampler
    sharded = state.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    return "trl" if config.rollout.vllm or config.model == "tiny" or sharded else "own"


def peft_config(config: Config) -> Any:
    """LoRA settings of the recipe, or None."""
    if config.peft is None:
        return None
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", **config.peft.model_dump(exclude_none=True))
