"""From settings to the arguments of TRL's GRPOConfig."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cppo.config.precision import choose
from cppo.errors import UserError
from cppo.words import nearest

if TYPE_CHECKING:
    from cppo.config.settings import Settings


def trl_config_kwargs(
    config: Settings, output_dir: str | Path, num_processes: int = 1, gpu: bool | None = None
) -> dict[str, Any]:
    """Arguments for `cppo.engines.trl.trust_region_config`.

    P prompts x n responses are used for M updates on R processes, in micro-batches of b responses. TRL counts in
    micro-batches: ``per_device_train_batch_size = b``, ``gradient_accumulation_steps g = P n / (M R b)`` and
    ``steps_per_generation = M g``, so that one generation batch, b M g R = P n responses, is used up by exactly M
    updates. TRL computes the rollout policy's log-probabilities where g is not a multiple of M g: for every M > 1.

    Parameters
    ----------
    num_processes : data-parallel processes R.
    gpu : whether training runs on a GPU with bfloat16; None asks torch.

    Raises
    ------
    UserError : the responses of an update cannot be shared equally by the processes; a key of ``trl`` is unknown.
    """
    if gpu is None:
        import torch

        gpu = torch.cuda.is_available()
    rollout, optimizer, updates = config.rollout, config.optimizer, config.updates
    minibatch = rollout.prompts * rollout.responses // updates
    micro = config.micro_batch or max(1, minibatch // num_processes)
    if minibatch % (micro * num_processes):
        processes = "1 process" if num_processes == 1 else f"{num_processes} processes"
        raise UserError(
            f"An update has {minibatch} responses (rollout.prompts * rollout.responses / updates), which {processes} "
            f"cannot share in micro-batches of {micro}. Set micro_batch, updates or the number of processes so that "
            "micro_batch * processes divides it."
        )
    accumulate = minibatch // (micro * num_processes)
    _check_keys(config.trl)
    kwargs: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_steps": config.steps * updates,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulate,
        "steps_per_generation": updates * accumulate,
        "num_iterations": 1,
        "num_generations": rollout.responses,
        "max_completion_length": rollout.max_new_tokens,
        "temperature": rollout.temperature,
        "learning_rate": optimizer.learning_rate,
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "max_grad_norm": optimizer.max_grad_norm,
        "lr_scheduler_type": optimizer.lr_scheduler,
        "warmup_steps": optimizer.warmup_steps,
        "beta": 0.0,  # no KL to a reference policy
        "scale_rewards": "group" if config.advantages.kind == "zscore" else "none",
        "loss_type": config.aggregation,
        "bf16": choose(config, gpu).bfloat16,
        # transformers refuses bf16 without a GPU unless it is told that the CPU is meant.
        "use_cpu": not gpu,
        "gradient_checkpointing": (
            gpu and config.model != "tiny" if config.gradient_checkpointing == "auto" else config.gradient_checkpointing
        ),
        # On rollout boundaries only: within one, the buffered responses would be lost and a resumed run would drift.
        "save_strategy": "steps",
        "save_steps": (1 if config.save_every == "auto" else config.save_every) * updates,  # a callback decides
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": config.report_to or "none",
        "disable_tqdm": True,
        "seed": config.seed,
    }
    if rollout.vllm:
        kwargs["use_vllm"] = True
        kwargs["vllm_mode"] = rollout.vllm_mode
        if rollout.vllm_mode == "colocate":
            if num_processes % rollout.vllm_tensor_parallel_size:
                raise UserError(
                    f"rollout.vllm_tensor_parallel_size is {rollout.vllm_tensor_parallel_size}, which does not divide "
                    f"the number of processes, {num_processes}. Start it with `accelerate launch --num_processes N` "
                    "and a multiple, or set rollout.vllm_tensor_parallel_size=1."
                )
            kwargs["vllm_gpu_memory_utilization"] = rollout.vllm_gpu_memory_utilization
            kwargs["vllm_tensor_parallel_size"] = rollout.vllm_tensor_parallel_size
            kwargs["vllm_max_model_length"] = rollout.vllm_max_model_length
            kwargs["vllm_enable_sleep_mode"] = rollout.vllm_enable_sleep_mode
    return {**kwargs, **config.trl}


def _check_keys(options: dict[str, Any]) -> None:
    """Every key of ``trl`` must be an argument of GRPOConfig. Imports TRL (seconds) only where there are any."""
    if not options:
        return
    from trl import GRPOConfig

    known = {field.name for field in dataclasses.fields(GRPOConfig) if field.init}
    wrong = [
        f"trl.{key}: TRL's GRPOConfig has no argument {key!r}.{nearest(key, known)}"
        for key in options
        if key not in known
    ]
    if wrong:
        raise UserError("\n".join(wrong))
