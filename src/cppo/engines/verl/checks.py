"""What verl's configuration must say for a trust region to do what its name says; each refusal with what to set."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

from cppo.divergence import BINARY
from cppo.engines.verl.config import LOSSES, TARGET, needs_top_k, rule_of
from cppo.errors import UserError
from cppo.rules import TrustRegion

logger = logging.getLogger(__name__)

#: Our trainers by name, and the one of verl that each builds on.
TRAINERS = {"cppo_sync": "sync", "cppo_colocate_async": "colocate_async", "cppo_separate_async": "separate_async"}

#: Samplers that do not hand over their top K: finished sequences are scored once more by the same server.
RESCORED = ("sglang", "trtllm", "hf")

#: Strategies whose engine calls the logits hook that top-K divergences use.
TOPK_STRATEGIES = ("fsdp", "fsdp2", "megatron")


def select(config: Any, key: str, default: Any = None) -> Any:
    """The value at a dotted key of an OmegaConf configuration; `default` where there is none or null."""
    from omegaconf import OmegaConf

    value = OmegaConf.select(config, key)
    return default if value is None else value


def check_config(config: Any, mode: str | None = None) -> TrustRegion:
    """Check a whole verl configuration and return the rule that will run.

    Parameters
    ----------
    config : verl's composed configuration (OmegaConf). mode : verl's own name of the trainer mode; None: from
        ``trainer.v1.trainer_mode``.

    Raises
    ------
    UserError : settings under which the rule would not run, do nothing, or measure something else; one line each.
    """
    name = select(config, "trainer.v1.trainer_mode", "sync")
    mode = mode or TRAINERS.get(name, name)
    actor = "actor_rollout_ref.actor"
    loss_mode = select(config, f"{actor}.policy_loss.loss_mode", "vanilla")
    rule = rule_of(loss_mode, select(config, f"{actor}.policy_loss.rule", {}))
    problems = _anchor(config) + _sampling(config) + _updates(config, mode)
    if select(config, f"{actor}.policy_loss._target_") != TARGET:
        problems.append(
            f"{actor}.policy_loss._target_ is {select(config, f'{actor}.policy_loss._target_')}: the rule's parameters "
            f"would be unknown. Set {actor}.policy_loss._target_={TARGET}."
        )
    if needs_top_k(rule):
        problems += _top_k(config, mode, name)
    elif rule.divergence not in (None, *BINARY):
        problems.append(
            f"the rule asks for divergence={rule.divergence!r}, for which two full distributions of a token must be "
            "at hand, and no sampler hands over its own. "
            f"Set +{actor}.policy_loss.rule.divergence=topk_tv (or topk_tv_upper, topk_kl, binary_tv, binary_kl)."
        )
    if problems:
        raise UserError(
            f"the configuration does not fit the trust region {rule.name}:\n" + "\n".join(f"  - {p}" for p in problems)
        )
    for key, usual in (("clip_ratio", 0.2), ("clip_ratio_low", 0.2), ("clip_ratio_high", 0.2), ("clip_ratio_c", 3.0)):
        value = select(config, f"{actor}.{key}", usual)
        if value != usual:
            logger.warning("%s.%s=%s has no effect: the rule %s has limits of its own.", actor, key, value, rule.name)
    return rule


def _anchor(config: Any) -> list[str]:
    problems = []
    if not select(config, "trainer.use_v1", True):
        problems.append(
            "trainer.use_v1=False: with bypass_mode verl's V0 trainer overwrites loss_mode by PPO's clip without a "
            "word. Set trainer.use_v1=True."
        )
    if not select(config, "algorithm.rollout_correction.bypass_mode", False):
        problems.append(
            "algorithm.rollout_correction.bypass_mode is off: ratio and divergence would be against log-probabilities "
            "that the trainer recomputes, not against the policy that sampled. Set "
            "algorithm.rollout_correction.bypass_mode=True."
        )
    if not select(config, "actor_rollout_ref.rollout.calculate_log_probs", False):
        problems.append(
            "actor_rollout_ref.rollout.calculate_log_probs is off: the sampler's log-probabilities are missing. Set "
            "actor_rollout_ref.rollout.calculate_log_probs=True."
        )
    return problems


def _sampling(config: Any) -> list[str]:
    rollout, problems = "actor_rollout_ref.rollout", []
    full = {"top_p": (1, 1.0), "top_k": (-1, 0), "min_p": (0, 0.0), "repetition_penalty": (1, 1.0)}
    for key, values in full.items():
        value = select(config, f"{rollout}.{key}", values[0])
        if value not in values:
            problems.append(
                f"{rollout}.{key}={value}: the tokens would come from another distribution than the one that is "
                f"scored. Set {rollout}.{key}={values[0]} (validation has its own: rollout.val_kwargs)."
            )
    temperature = select(config, f"{rollout}.temperature", 1.0)
    if not temperature > 0:
        problems.append(f"{rollout}.temperature={temperature}: expected a number above 0, usually 1.")
    if temperature != 1 and select(config, f"{rollout}.logprobs_mode", "") != "processed_logprobs":
        problems.append(
            f"{rollout}.temperature={temperature} with {rollout}.logprobs_mode="
            f"{select(config, f'{rollout}.logprobs_mode')}: the sampler would report log-probabilities at temperature "
            f"1. Set {rollout}.logprobs_mode=processed_logprobs."
        )
    return problems


def _updates(config: Any, mode: str) -> list[str]:
    prompts = select(config, "data.train_batch_size", 0)
    each = select(config, "actor_rollout_ref.actor.ppo_mini_batch_size", 0)
    epochs = select(config, "actor_rollout_ref.actor.ppo_epochs", 1)
    rule = LOSSES.get(select(config, "actor_rollout_ref.actor.policy_loss.loss_mode", ""))
    if mode == "sync" and rule != "none" and epochs == 1 and prompts and prompts <= each:
        return [
            f"data.train_batch_size={prompts} and actor.ppo_mini_batch_size={each}: one update a rollout batch, in "
            "which the trained policy is the one that sampled, so no trust region can act. Set "
            f"actor_rollout_ref.actor.ppo_mini_batch_size to a part of it, such as {max(1, prompts // 4)}."
        ]
    return []


def _top_k(config: Any, mode: str, trainer: str) -> list[str]:
    actor, problems = "actor_rollout_ref.actor", []
    binary = f"or do without top-K: +{actor}.policy_loss.rule.divergence=binary_tv"
    if trainer not in TRAINERS:
        problems.append(
            f"trainer.v1.trainer_mode={trainer} does not collect the sampler's top K. Set trainer.v1.trainer_mode="
            f"{next((ours for ours, base in TRAINERS.items() if base == trainer), 'cppo_sync')}, {binary}."
        )
    strategy = select(config, f"{actor}.strategy")
    if strategy not in TOPK_STRATEGIES:
        problems.append(
            f"{actor}.strategy={strategy} has no logits hook that this was written for. Set it to one of "
            f"{', '.join(TOPK_STRATEGIES)}, {binary}."
        )
    if strategy == "megatron" and importlib.util.find_spec("megatron") is None:
        problems.append(f"{actor}.strategy=megatron, but Megatron-Core is not installed.")
    off = {
        "actor_rollout_ref.model.use_fused_kernels": "fused kernels never hold the logits",
        f"{actor}.use_fused_kernels": "fused kernels never hold the logits",
        f"{actor}.pad_to_length": "verl's logits hook does not know about the static padding",
        f"{actor}.fsdp_config.pad_to_length": "verl's logits hook does not know about the static padding",
        f"{actor}.megatron.pad_to_length": "verl's logits hook does not know about the static padding",
        f"{actor}.megatron.dynamic_context_parallel": "verl refuses its logits hook there",
        f"{actor}.use_prefix_grouper": "shared prefixes change the layout of the logits",
        "distillation.enabled": "distillation from a teacher uses the same fields and the same hook",
        "actor_rollout_ref.rollout.disaggregation.enabled": "servers split into prefill and decode are not written for",
    }
    problems += [
        f"{key}=True together with a top-K divergence: {why}. Set {key}=False, {binary}."
        for key, why in off.items()
        if select(config, key, False)
    ]
    manager = select(config, "actor_rollout_ref.rollout.agent.agent_loop_manager_class")
    ours = "cppo.engines.verl.agent.TopKAgentLoopManager"
    if manager not in (None, ours):
        problems.append(
            f"actor_rollout_ref.rollout.agent.agent_loop_manager_class={manager} would not collect the top K. Leave it "
            f"unset (the trainer sets {ours}), {binary}."
        )
    server = select(config, "actor_rollout_ref.rollout.name")
    if server in RESCORED:
        if mode != "sync":
            problems.append(
                f"rollout.name={server} in an asynchronous mode: only vLLM hands over its top K while it samples, and "
                "afterwards the weights have moved on. "
                f"Set actor_rollout_ref.rollout.name=vllm, {binary}."
            )
        elif select(config, "actor_rollout_ref.rollout.temperature", 1.0) != 1:
            problems.append(
                "rollout.temperature is not 1: finished sequences are re-scored at temperature 1. Set "
                f"actor_rollout_ref.rollout.temperature=1, {binary}."
            )
    return problems
