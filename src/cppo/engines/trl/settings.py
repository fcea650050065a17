"""TRL settings under which a trust region works, and the ones that would silently disable or alter it.

* `problems`: every setting that does not go together with a rule, as sentences: what is set, what it would do, what to
  set.
* `generation_problems`: the same for a model's own `generation_config`, whose values TRL's generation falls back to.
* `trust_region_config`: a config without any of them.

Left out: settings that TRL refuses by itself, and those that change the task but not the rule (rewards, lengths, beta).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from trl import GRPOConfig

from cppo.divergence import BINARY, Variant
from cppo.engines.sampling import SAMPLING
from cppo.rules import NoTrustRegion, TrustRegion

#: Loss types that multiply a per-token loss -ratio * A by the off-policy mask; what is left to choose is the
#: denominator.
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")

_SUPPORT = (
    "it samples from another distribution than the one that is scored, so ratios and divergences against the rollout "
    "policy would be wrong"
)


#: How mu's top K may be kept (`cppo.scoring.store`).
STORES = ("float32", "compact", "ragged")


@dataclass(frozen=True)
class TopK:
    """The trainer's own arguments about mu's scores (`cppo.engines.trl.TrustRegionTrainer`)."""

    k: int = 20
    variant: Variant = "append"
    anchor: str = "rollout"
    store: str = "float32"


def needs_head(divergence: str | None) -> bool:
    """Whether a divergence needs more than the sampled token's two log-probabilities."""
    return divergence not in (None, *BINARY)


def problems(args: GRPOConfig, rule: TrustRegion, top_k: TopK) -> list[str]:
    """Everything in `args` and `top_k` that would silently disable or alter `rule`, one or two sentences each."""
    return [
        *_divergence_problems(args, rule.divergence, top_k),
        *_reuse_problems(args, rule),
        *_rollout_problems(args),
        *_loss_problems(args),
    ]


def _divergence_problems(args: GRPOConfig, divergence: str | None, top_k: TopK) -> list[str]:
    """Can mu be known as far as the divergence needs it?"""
    if divergence is None or not needs_head(divergence):
        return []
    found = []
    if not divergence.startswith("exact_"):
        if not isinstance(top_k.k, int) or top_k.k < 1:
            found.append(f"top_k={top_k.k!r} (of the trainer) is not a number of tokens. Set top_k=20.")
        elif top_k.store == "ragged" and top_k.k > 255:
            found.append(
                f"topk_store='ragged' counts a token's entries in one byte, but top_k={top_k.k}. Set top_k to 255 at "
                "most, or topk_store='compact'."
            )
        if top_k.variant not in ("append", "replace_last"):
            found.append(f"topk_variant={top_k.variant!r} is unknown. Set topk_variant='append' or 'replace_last'.")
        if top_k.store not in STORES:
            found.append(f"topk_store={top_k.store!r} is unknown. Set topk_store to one of {', '.join(STORES)}.")
        elif divergence.endswith("_kl") and top_k.store != "float32":
            found.append(
                f"topk_store={top_k.store!r} rounds mu's log-probabilities, which moves a total variation by 0.0015 at "
                f"most (K = 20) but has no such bound for divergence={divergence!r}, where what is left over may have "
                "next to no mass. Set topk_store='float32', or divergence='topk_tv' in the rule."
            )
    if top_k.anchor not in ("rollout", "recomputed"):
        found.append(f"topk_anchor={top_k.anchor!r} is unknown. Set topk_anchor='rollout' or 'recomputed'.")
    elif args.use_vllm and top_k.anchor == "rollout":
        what = "top-K is" if divergence.startswith("topk_") else "other probabilities are"
        found.append(
            f"use_vllm=True with divergence={divergence!r}: vLLM hands the sampled token's log-probability to TRL "
            f"and nothing else, so the rollout policy's {what} not known. Set divergence='binary_tv' in the rule, "
            "or topk_anchor='recomputed' to measure the divergence against the same weights as the trainer "
            "computes them (the ratio stays against vLLM)."
        )
    return found


def _reuse_problems(args: GRPOConfig, rule: TrustRegion) -> list[str]:
    """Is there a second update on a rollout batch, anchored at mu, and are checkpoints between rollout batches?"""
    found = []
    batch = args.steps_per_generation * args.num_iterations
    shown = (
        f"gradient_accumulation_steps={args.gradient_accumulation_steps}, "
        f"steps_per_generation={args.steps_per_generation}, num_iterations={args.num_iterations}"
    )
    reuse = (
        "For M updates on each rollout batch set gradient_accumulation_steps=1, steps_per_generation=M and "
        "per_device_train_batch_size = responses / (M * processes)"
    )
    if args.gradient_accumulation_steps % batch == 0 and not args.use_vllm and not isinstance(rule, NoTrustRegion):
        if args.gradient_accumulation_steps == batch:
            found.append(
                f"{shown}: each rollout batch gets exactly one update, on the weights that sampled it. Divergence is 0 "
                f"and the rule {rule.name!r} can never act. {reuse}; or use cppo.NoTrustRegion() if one update is "
                "meant."
            )
        else:
            found.append(
                f"{shown}: TRL then does not compute the log-probabilities of the rollout policy and takes the current "
                f"ones instead, so divergence is 0 everywhere and the rule {rule.name!r} is silently dead. {reuse}."
            )
    steps = {"steps": ("save_steps", args.save_steps), "best": ("eval_steps", args.eval_steps)}
    strategy = getattr(args.save_strategy, "value", args.save_strategy)
    if strategy in steps:
        name, every = steps[strategy]
        updates = f"{updates_per_rollout(args):g} updates to a rollout batch"
        where = "A run that resumes in the middle of a rollout batch has lost the rest of it and drifts silently."
        if every is not None and 0 < every < 1:
            found.append(
                f"{name}={every} is a share of the run, which can fall in the middle of a rollout batch ({updates}). "
                f"{where} Set {name} to a number of updates that is a multiple of that."
            )
        elif every and every * args.gradient_accumulation_steps % batch:
            found.append(
                f"save_strategy={strategy!r} with {name}={every:g} saves in the middle of a rollout batch ({updates}). "
                f"{where} Set {name}={aligned_save_steps(args, int(every))}."
            )
    return found


def _rollout_problems(args: GRPOConfig) -> list[str]:
    found = []
    if not args.temperature > 0:
        found.append(f"temperature={args.temperature}: {_SUPPORT}. Set temperature=1.0.")
    for name in ("top_p", "top_k", "min_p", "repetition_penalty"):
        value = getattr(args, name)
        if not SAMPLING[name](value):
            neutral = {"top_p": "1.0", "top_k": "0", "min_p": "None", "repetition_penalty": "1.0"}[name]
            found.append(f"{name}={value}: {_SUPPORT}. Set {name}={neutral}.")
    options = args.generation_kwargs or {}
    for name, value in options.items():
        if name in SAMPLING and not SAMPLING[name](value):
            found.append(f"generation_kwargs[{name!r}]={value!r}: {_SUPPORT}. Remove it.")
        if name == "temperature" and value != args.temperature:
            found.append(
                f"generation_kwargs['temperature']={value!r} overrides temperature={args.temperature} in sampling "
                f"only: {_SUPPORT}. Set temperature={value!r} instead."
            )
    if getattr(args, "vllm_structured_outputs_regex", None):
        found.append(f"vllm_structured_outputs_regex is set: {_SUPPORT}. Set it to None.")
    if not args.use_vllm:
        return found
    if not args.vllm_importance_sampling_correction:
        found.append(
            "vllm_importance_sampling_correction=False: TRL then takes its own recomputed log-probabilities for the "
            "rollout policy's in the ratio. Set vllm_importance_sampling_correction=True."
        )
    if args.vllm_importance_sampling_mode != "token_truncate":
        found.append(
            f"vllm_importance_sampling_mode={args.vllm_importance_sampling_mode!r} drops or reweights tokens on top of "
            "the rule. Set vllm_importance_sampling_mode='token_truncate'."
        )
    cap = args.vllm_importance_sampling_clip_max
    if cap is not None and cap < OPEN:
        found.append(
            f"vllm_importance_sampling_clip_max={cap:g} truncates the ratio a second time, on top of the rule. "
            f"Set vllm_importance_sampling_clip_max={OPEN:g} (a bound belongs into the rule: ratio_cap)."
        )
    if args.vllm_importance_sampling_clip_min:
        found.append(
            f"vllm_importance_sampling_clip_min={args.vllm_importance_sampling_clip_min:g} raises small ratios behind "
            "the rule's back. Set vllm_importance_sampling_clip_min=None."
        )
    return found


def _loss_problems(args: GRPOConfig) -> list[str]:
    found = []
    if args.off_policy_mask_threshold is None:
        found.append(
            "off_policy_mask_threshold=None: TRL never calls the hook in which the rule lives, so there would be no "
            f"trust region at all. Set off_policy_mask_threshold={OPEN:g} (its value is not used)."
        )
    for name in ("epsilon", "epsilon_high"):
        value = getattr(args, name)
        if value is not None and value < OPEN:
            found.append(f"{name}={value:g}: TRL clips the ratio on top of the rule. Set {name}={OPEN:g}.")
    if args.delta is not None and args.delta < OPEN:
        found.append(
            f"delta={args.delta:g} (of GRPOConfig) bounds the ratio on top of the rule. Set delta=1e30; the rule's own "
            "limits are parameters of the rule."
        )
    if args.delta is None:
        found.append(
            "delta=None (of GRPOConfig): TRL's own ratio has no upper bound, and one overflow makes a loss NaN. Set "
            "delta=1e30."
        )
    if args.loss_type not in LOSS_TYPES:
        found.append(
            f"loss_type={args.loss_type!r} brings its own weights for the ratio, or ignores the hook. Set loss_type to "
            f"one of {', '.join(LOSS_TYPES)}: they differ in the denominator only."
        )
    if args.importance_sampling_level != "token":
        found.append(
            f"importance_sampling_level={args.importance_sampling_level!r} replaces the token ratio by a sequence "
            "ratio. Set importance_sampling_level='token' (sequence criteria: cppo.TRMMax, cppo.TRMAvg)."
        )
    if args.top_entropy_quantile < 1:
        found.append(
            f"top_entropy_quantile={args.top_entropy_quantile} drops low-entropy tokens from the loss after the rule "
            "has judged them. Set top_entropy_quantile=1.0."
        )
    if args.use_liger_kernel:
        found.append(
            "use_liger_kernel=True replaces parts of the model's forward, from which the rule's log-probabilities "
            "come. Set use_liger_kernel=False."
        )
    return found


def generation_problems(config: Any, args: GRPOConfig) -> list[str]:
    """Sampling options of the model's own `generation_config` (a `GenerationConfig`) that would reach training
    rollouts.

    transformers falls back to these for every option that TRL leaves at None. vLLM does not read them.
    """
    if args.use_vllm or config is None:
        return []
    set_by_trl = {"do_sample", "temperature", "top_p", "top_k", "repetition_penalty"}
    set_by_trl |= {
        name for name, value in {"min_p": args.min_p, **(args.generation_kwargs or {})}.items() if value is not None
    }
    return [
        f"the model's generation_config has {name}={getattr(config, name)!r}: {_SUPPORT}. "
        f"Set model.generation_config.{name} = None before building the trainer."
        for name, neutral in SAMPLING.items()
        if name not in set_by_trl and not neutral(getattr(config, name, None))
    ]


#: Bounds that TRL's own clipping gets. The rule's ratio is at most e^20 = 4.9e8 (`cppo.tokens.LOG_RATIO_MAX`) and TRL's
#: own is kept below that, too (`cppo.engines.trl.trainer.OLD_LOGP_MIN`), so that 1e9 never clips.
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
