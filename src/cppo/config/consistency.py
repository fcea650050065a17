"""Settings that are each fine and wrong together, as sentences: what is set, what it would do, what to set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from cppo.divergence import BINARY
from cppo.engines.sampling import SAMPLING

if TYPE_CHECKING:
    from cppo.config.settings import Settings

#: Arguments of GRPOConfig that have a key of their own here.
OWN_KEYS: Mapping[str, str] = {
    "output_dir": "output_dir",
    "max_steps": "steps and updates",
    "num_train_epochs": "steps",
    "per_device_train_batch_size": "rollout.prompts, rollout.responses, updates and micro_batch",
    "gradient_accumulation_steps": "micro_batch",
    "steps_per_generation": "updates",
    "generation_batch_size": "rollout.prompts and rollout.responses",
    "num_generations": "rollout.responses",
    "num_iterations": "updates",
    "max_completion_length": "rollout.max_new_tokens",
    "temperature": "rollout.temperature",
    "use_vllm": "rollout.vllm",
    "vllm_mode": "rollout.vllm_mode",
    "vllm_gpu_memory_utilization": "rollout.vllm_gpu_memory_utilization",
    "vllm_tensor_parallel_size": "rollout.vllm_tensor_parallel_size",
    "vllm_max_model_length": "rollout.vllm_max_model_length",
    "vllm_enable_sleep_mode": "rollout.vllm_enable_sleep_mode",
    "learning_rate": "optimizer.learning_rate",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "max_grad_norm": "optimizer.max_grad_norm",
    "lr_scheduler_type": "optimizer.lr_scheduler",
    "warmup_steps": "optimizer.warmup_steps",
    "scale_rewards": "advantages.kind",
    "loss_type": "aggregation",
    "bf16": "precision",
    "fp16": "precision",
    "use_cpu": "nothing: the device is chosen by what is there",
    "gradient_checkpointing": "gradient_checkpointing",
    "save_strategy": "save_every",
    "save_steps": "save_every",
    "logging_strategy": "nothing: every update is logged",
    "logging_steps": "nothing: every update is logged",
    "report_to": "report_to",
    "seed": "seed",
    "epsilon": "rule=ppo_clip and its parameters",
    "epsilon_high": "rule=ppo_clip and its parameters",
    "delta": "rule.ratio_cap",
}

#: The largest learning rate of a warm-up that starts from trained weights.
PRETRAINED_RATE = 1e-4


def problems(config: Settings) -> list[str]:
    """Every contradiction in `config`; empty if there is none."""
    checks = (_task, _batches, _model, _trust_region, _calibration, _optimizer, _trl)
    return [problem for check in checks for problem in check(config)]


def _task(config: Settings) -> Iterator[str]:
    if config.task.name != "arithmetic":  # others read data or start helper processes when they are made
        return
    from cppo.tasks import make_task

    try:
        longest = make_task("arithmetic", **config.task.options).max_response_tokens  # type: ignore[attr-defined]
    except (ValueError, TypeError) as error:
        text = str(error)
        yield f"task.options: {text}" + ("" if text.endswith((".", "?")) else ".")
        return
    if config.model == "tiny" and longest > config.rollout.max_new_tokens:
        yield (
            f"rollout.max_new_tokens is {config.rollout.max_new_tokens}, but right answers of this task have up to "
            f"{longest} tokens and could never be given. Set rollout.max_new_tokens={longest} or more."
        )


def _batches(config: Settings) -> Iterator[str]:
    rollout, updates = config.rollout, config.updates
    responses = rollout.prompts * rollout.responses
    shown = f"rollout.prompts * rollout.responses = {rollout.prompts} * {rollout.responses} = {responses}"
    if responses % updates:
        fits = [m for m in range(1, responses + 1) if responses % m == 0]
        near = sorted(fits, key=lambda m: (abs(m - updates), m))[:2]
        yield (
            f"updates is {updates}, but {shown} responses cannot be split into {updates} equal minibatches. "
            f"Set updates to a divisor, such as {' or '.join(map(str, sorted(near)))}."
        )
    elif config.micro_batch is not None and (responses // updates) % config.micro_batch:
        yield (
            f"micro_batch is {config.micro_batch}, but an update has {responses // updates} responses ({shown}, "
            f"updates = {updates}). Set micro_batch to a divisor of {responses // updates}."
        )


def _model(config: Settings) -> Iterator[str]:
    tiny, limit = config.tiny, config.evaluation.max_new_tokens
    if config.model != "tiny":
        if config.warmup.steps and config.warmup.learning_rate > PRETRAINED_RATE:
            yield (
                f"warmup.steps is {config.warmup.steps} at warmup.learning_rate={config.warmup.learning_rate:g}, which "
                f"would undo the training of model={config.model!r}. Set warmup.steps=0, or a learning rate of at most "
                f"{PRETRAINED_RATE:g}."
            )
        return
    if tiny.hidden_size % (2 * tiny.heads):
        yield (
            f"tiny.hidden_size is {tiny.hidden_size} and tiny.heads {tiny.heads}: each head needs an even width. "
            f"Set tiny.hidden_size to a multiple of {2 * tiny.heads}."
        )
    if tiny.experts is not None and tiny.experts_per_token > tiny.experts:
        yield (
            f"tiny.experts_per_token is {tiny.experts_per_token}, more than the {tiny.experts} of tiny.experts. "
            "Lower it or raise tiny.experts."
        )
    for name, value in (("rollout", config.rollout.max_new_tokens), ("evaluation", limit)):
        if value is not None and value >= tiny.max_positions:
            yield (
                f"{name}.max_new_tokens is {value}, but tiny.max_positions, which holds the prompt, too, is "
                f"{tiny.max_positions}. Raise tiny.max_positions or lower {name}.max_new_tokens."
            )


def _trust_region(config: Settings) -> Iterator[str]:
    divergence = config.rule.parameters.get("divergence")
    if config.rollout.vllm and divergence not in (None, *BINARY) and config.topk_anchor == "rollout":
        yield (
            f"rule.divergence is {divergence!r} with rollout.vllm=true and topk_anchor=rollout, but vLLM hands over "
            "the sampled token's log-probability and no others. Set topk_anchor=recomputed (the distributions of the "
            "trainer's own forward with the same weights; the ratio stays against vLLM) or rule.divergence=binary_tv."
        )
    if divergence == "topk_kl" and config.topk_store != "float32":
        yield (
            f"rule.divergence is 'topk_kl' with topk_store={config.topk_store}, whose rounding moves a total variation "
            "by 0.0015 at most (K = 20), but for a KL there is no such bound. Set topk_store=float32 or "
            "rule.divergence=topk_tv."
        )
    if config.topk_store == "ragged" and config.top_k > 255:
        yield (
            f"top_k is {config.top_k} with topk_store=ragged, which counts a token's entries in one byte. Set top_k "
            "to 255 at most, or topk_store=compact."
        )
    if config.updates == 1 and not config.rollout.vllm and config.rule.name != "none":
        yield (
            "updates is 1: each rollout batch gets one update, on the weights that sampled it, so the rule "
            f"{config.rule.name!r} can never act. Set updates=2 or more, or rule=none if this is meant."
        )


def _calibration(config: Settings) -> Iterator[str]:
    steps, warmup = config.calibration.steps, config.optimizer.warmup_steps
    names = " and ".join(f"rule.{name}" for name in config.rule.automatic)
    if not names:
        return
    if steps >= config.steps:
        yield (
            f"{names} is auto with calibration.steps={steps} and steps={config.steps}: what all these rollout batches "
            f"give would never be used. Set steps={steps + 1} or more, or calibration.steps lower."
        )
    if config.optimizer.lr_scheduler != "constant" and warmup > steps * config.updates / 2:
        yield (
            f"{names} is auto with optimizer.warmup_steps={warmup}, more than half of the {steps * config.updates} "
            "updates of the calibration: the policy hardly moves in them, and the thresholds would be too tight. Set "
            f"calibration.steps={-(-2 * warmup // config.updates)}."
        )


def _optimizer(config: Settings) -> Iterator[str]:
    if config.optimizer.lr_scheduler == "constant" and config.optimizer.warmup_steps:
        yield (
            f"optimizer.warmup_steps is {config.optimizer.warmup_steps}, which optimizer.lr_scheduler=constant "
            "ignores. Set optimizer.lr_scheduler=constant_with_warmup."
        )


def _trl(config: Settings) -> Iterator[str]:
    for key, value in config.trl.items():
        if key in OWN_KEYS:
            yield f"trl.{key} is {value!r}, but it follows from {OWN_KEYS[key]}. Remove trl.{key}."
        elif key in SAMPLING and not SAMPLING[key](value):
            yield (
                f"trl.{key} is {value!r}: training rollouts are sampled from the full softmax, since truncated "
                f"sampling breaks every ratio and divergence. Remove trl.{key} (the evaluation's own top-p is "
                "evaluation.top_p)."
            )
