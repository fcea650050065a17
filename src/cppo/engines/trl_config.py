"""`trust_region_config`: a `GRPOConfig` in which a trust region can work, and what follows from its settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from trl import GRPOConfig

#: Bounds that TRL's own clipping gets. The rule's ratio is at most e^20 = 4.9e8 (`cppo.tokens.LOG_RATIO_MAX`) and TRL's
#: own is kept below that, too (`cppo.engines.trl.OLD_LOGP_MIN`), so that 1e9 never clips.
OPEN = 1e9

PRESETS: Mapping[str, Any] = {
    "loss_type": "dr_grpo",
    "beta": 0.0,
    # TRL's clipping off: the rule decides alone.
    "epsilon": OPEN,
    "epsilon_high": OPEN,
    "delta": 1e30,
    # Not None switches TRL's off-policy mask hook on; the value itself is ignored by our override.
    "off_policy_mask_threshold": OPEN,
    "importance_sampling_level": "token",
    # With vLLM: (pi/old) * (old/mu) = pi/mu, untruncated.
    "vllm_importance_sampling_mode": "token_truncate",
    "vllm_importance_sampling_clip_max": OPEN,
    # The full softmax: mu and pi must have common support.
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
}


def trust_region_config(**kwargs: Any) -> GRPOConfig:
    """`GRPOConfig(**kwargs)` with TRL's own clipping off and its mask hook on (`PRESETS`; `kwargs` win).

    Without an accelerator also bf16=False, use_cpu=True, gradient_checkpointing=False, as TRL's defaults assume a GPU.
    A `save_steps` that is not given is TRL's 500 rounded up to the end of a rollout batch.
    """
    cpu = {} if torch.accelerator.is_available() else {"bf16": False, "use_cpu": True, "gradient_checkpointing": False}
    config = GRPOConfig(**{**PRESETS, **cpu, **kwargs})
    if "save_steps" not in kwargs:
        config.save_steps = aligned_save_steps(config, int(config.save_steps))
    return config


def updates_per_rollout(args: GRPOConfig) -> float:
    """Optimizer steps on one rollout batch: steps_per_generation * num_iterations / gradient_accumulation_steps."""
    return args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps


def aligned_save_steps(args: GRPOConfig, save_steps: int) -> int:
    """The next number of optimizer steps from `save_steps` on at which a rollout batch ends."""
    while save_steps * args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations):
        save_steps += 1
    return save_steps
