"""What a recipe says, in verl's settings; each knows the recipe's key that it follows from.

Composed for verl 0.9.1's V1 trainer, FSDP2 or Megatron, with vLLM on the same GPUs or on others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cppo.config.load import Config
from cppo.errors import UserError
from cppo.launch import command
from cppo.launch.command import Setting, setting
from cppo.runs.folder import RunFolder

#: `--mode`, and the trainer of ours that it means.
MODES = {"sync": "cppo_sync", "colocate-async": "cppo_colocate_async", "separate-async": "cppo_separate_async"}

#: Longest prompt where a recipe does not bound prompt and response together, in tokens.
PROMPT_LIMIT = 2048

_AGGREGATION = {"dr_grpo": "seq-mean-token-sum-norm", "grpo": "seq-mean-token-mean", "dapo": "token-mean"}

_ACTOR, _ROLLOUT, _MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.model"


@dataclass(frozen=True)
class Cluster:
    """The machines, all of them: `nnodes` with `gpus_per_node` each. `rollout_nnodes` of them generate and do nothing
    else in the mode separate-async (None: half of them, or half of the GPUs of a single machine).
    """

    nnodes: int = 1
    gpus_per_node: int = 8
    mode: str = "sync"
    rollout_nnodes: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"--mode is {self.mode!r}, expected one of {', '.join(MODES)}.")
        for name, value in (("--nnodes", self.nnodes), ("--gpus-per-node", self.gpus_per_node)):
            if value < 1:
                raise UserError(f"{name} is {value}, expected a whole number of at least 1.")
        nodes = self.rollout_nnodes
        if nodes is not None and self.mode != "separate-async":
            raise UserError(f"--rollout-nnodes {nodes} is for --mode separate-async; in {self.mode} all nodes do both.")
        if nodes is not None and not 1 <= nodes < self.nnodes:
            raise UserError(
                f"--rollout-nnodes is {nodes} of {self.nnodes} nodes, expected at least 1 for the rollout and 1 for "
                "the trainer. A single machine is shared by halves without it."
            )
        if self.mode == "separate-async" and self.nnodes == 1 and self.gpus_per_node < 2:
            raise UserError("--mode separate-async needs at least two GPUs: one for the trainer, one for the rollout.")

    @property
    def trainer(self) -> tuple[int, int]:
        """(nodes, GPUs a node) of the trainer."""
        if self.mode != "separate-async":
            return self.nnodes, self.gpus_per_node
        if self.nnodes == 1:
            return 1, self.gpus_per_node - self.gpus_per_node // 2
        return self.nnodes - self.rollout[0], self.gpus_per_node

    @property
    def rollout(self) -> tuple[int, int]:
        """(nodes, GPUs a node) that only generate; (0, ...) but for separate-async."""
        if self.mode != "separate-async":
            return 0, self.gpus_per_node
        if self.nnodes == 1:
            return 1, self.gpus_per_node // 2
        return self.rollout_nnodes or self.nnodes // 2, self.gpus_per_node


#: verl writes its own figures under our name for them.
METRICS = RunFolder(".").metrics_file.name


def verl_settings(
    config: Config, cluster: Cluster, data_dir: Path, output: Path, engine: str = "dp", metrics: str = METRICS
) -> dict[str, Setting]:
    """Every setting of verl's that follows from a recipe, by key, in the order in which they are shown.

    Parameters
    ----------
    data_dir, output : folders, absolute on every node. metrics : name of the file of metrics within `output`.
    engine : verl's ``model_engine``: "dp" (FSDP2) or "megatron".

    Raises
    ------
    UserError : something in the recipe that verl does not have.
    """
    groups = (_data, _model, _actor, _optimizer, _rule, _rollout, _trainer)
    composed = [entry for group in groups for entry in group(config, engine)]
    benchmarks = list(benchmarks_of(config))
    composed[:0] = [
        setting("data.train_files", [str(data_dir / "train.parquet")], "--data-dir"),
        setting("data.val_files", [str(data_dir / f"{name}.parquet") for name in benchmarks], "--data-dir"),
    ]
    (nodes, gpus), (rollout_nodes, rollout_gpus) = cluster.trainer, cluster.rollout
    composed += [
        setting("trainer.nnodes", nodes, "--nnodes"),
        setting("trainer.n_gpus_per_node", gpus, "--gpus-per-node"),
        setting("trainer.v1.trainer_mode", MODES[cluster.mode], "--mode"),
    ]
    if cluster.mode == "separate-async":
        composed += [
            setting(f"{_ROLLOUT}.nnodes", rollout_nodes, "--rollout-nnodes"),
            setting(f"{_ROLLOUT}.n_gpus_per_node", rollout_gpus, "--gpus-per-node"),
            setting(f"{_ROLLOUT}.checkpoint_engine.backend", "nccl"),  # weights travel between GPUs
            setting("trainer.v1.separate_async.parameter_sync_step", config.updates, "updates"),
        ]
    composed.append(setting("trainer.default_local_dir", str(output / "checkpoints"), "output_dir"))
    # verl's own record of its settings goes to the run, not to outputs/DATE/TIME of wherever one stands.
    composed.append(setting("hydra.run.dir", str(output / "hydra"), "output_dir"))
    # On a cluster that was started before, workers do not inherit the environment of this shell.
    for name, value in environment(output / metrics).items():
        composed.append(setting(f"ray_kwargs.ray_init.runtime_env.env_vars.{name}", value, add=True))
    return {entry.key: entry for entry in composed}


def environment(metrics: Path) -> dict[str, str]:
    """The variables that the command needs: the plug-in, beside those that the user loads, and where metrics go."""
    modules = [name for name in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(",") if name.strip()]
    modules = list(dict.fromkeys([*modules, command.PLUGIN]))
    return {"VERL_USE_EXTERNAL_MODULES": ",".join(modules), "VERL_FILE_LOGGER_PATH": str(metrics)}


def benchmarks_of(config: Config) -> list[str]:
    """Names of the validation sets of the task `math`, each a file and a ``data_source`` of its own."""
    validation = config.task.options.get("validation")
    return list(validation) if isinstance(validation, Mapping) else ["validation"]


def _data(config: Config, engine: str) -> Iterator[Setting]:
    rollout = config.rollout
    if rollout.prompts % config.updates:
        raise UserError(
            f"rollout.prompts is {rollout.prompts} and updates {config.updates}: verl splits a rollout batch by "
            f"prompts. Set updates to a divisor of {rollout.prompts}."
        )
    prompt_limit = (rollout.vllm_max_model_length or 0) - rollout.max_new_tokens
    if rollout.vllm_max_model_length is None:
        prompt_limit = PROMPT_LIMIT
    if prompt_limit < 1:
        raise UserError(
            f"rollout.vllm_max_model_length is {rollout.vllm_max_model_length} tokens for prompt and response, and "
            f"rollout.max_new_tokens {rollout.max_new_tokens} for the response alone. Raise the former."
        )
    yield setting("data.train_batch_size", rollout.prompts, "rollout.prompts")
    yield setting("data.max_prompt_length", prompt_limit, "rollout.vllm_max_model_length")
    yield setting("data.max_response_length", rollout.max_new_tokens, "rollout.max_new_tokens")
    yield setting("data.filter_overlong_prompts", True)
    yield setting("data.seed", config.seed, "seed")
    yield setting("reward.custom_reward_function.path", "pkg://cppo.engines.verl.reward")
    yield setting("reward.custom_reward_function.name", "compute_score")
    for option in ("time_limit", "workers"):
        if option in config.task.options:
            key = f"reward.custom_reward_function.reward_kwargs.{option}"
            yield setting(key, config.task.options[option], f"task.options.{option}", add=True)


def _model(config: Config, engine: str) -> Iterator[Setting]:
    checkpointing = config.gradient_checkpointing is not False
    yield setting(f"{_MODEL}.path", config.model, "model")
    yield setting(f"{_MODEL}.use_remove_padding", True)
    yield setting(f"{_MODEL}.use_fused_kernels", False)  # they never hold the logits that top-K divergences look at
    if engine == "megatron":
        recompute = f"{_ACTOR}.megatron.override_transformer_config.recompute"
        values = ("full", "uniform", 1) if checkpointing else (None, None, None)
        for name, value in zip(("granularity", "method", "num_layers"), values, strict=True):
            yield setting(f"{recompute}_{name}", value, "gradient_checkpointing")
    else:
        yield setting(f"{_MODEL}.enable_gradient_checkpointing", checkpointing, "gradient_checkpointing")
    if config.peft is None:
        return
    if config.peft.lora_dropout:
        raise UserError(f"peft.lora_dropout is {config.peft.lora_dropout}; verl's LoRA has none. Set it to 0.")
    if engine == "megatron":
        raise UserError("peft with model_engine=megatron is not composed here: give verl's own settings of model.lora.")
    yield setting(f"{_MODEL}.lora_rank", config.peft.r, "peft.r")
    yield setting(f"{_MODEL}.lora_alpha", round(config.peft.lora_alpha), "peft.lora_alpha")
    yield setting(f"{_MODEL}.target_modules", config.peft.target_modules, "peft.target_modules")
    yield setting(f"{_ROLLOUT}.load_format", "safetensors", "peft")  # vLLM needs the base weights before the adapter


def _actor(config: Config, engine: str) -> Iterator[Setting]:
    rollout = config.rollout
    if config.aggregation not in _AGGREGATION:
        raise UserError(
            f"aggregation is {config.aggregation!r}; verl has {', '.join(_AGGREGATION)}. Set aggregation=dapo for a "
            "mean over the tokens of an update."
        )
    if config.precision == "float32" and engine == "megatron":
        raise UserError(
            "precision is float32; verl's Megatron engine has bfloat16 and float16. Set precision=bfloat16."
        )
    yield setting("algorithm.adv_estimator", "grpo")
    yield setting("algorithm.norm_adv_by_std_in_grpo", config.advantages.kind == "zscore", "advantages.kind")
    # verl's filter would sample other prompts instead; equal rewards have advantage 0 and move nothing.
    yield setting("algorithm.filter_groups.enable", False)
    yield setting("algorithm.use_kl_in_reward", False)
    yield setting("algorithm.rollout_correction.bypass_mode", True)  # anchor: the policy that sampled
    part = "megatron" if engine == "megatron" else "fsdp_config"
    if engine != "megatron":
        yield setting(f"{_ACTOR}.strategy", "fsdp2")
    if config.precision == "float32":
        # verl's FSDP2 engine looks here; `dtype` alone would change nothing.
        mixed = dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"), "fp32")
        yield setting(f"{_ACTOR}.fsdp_config.mixed_precision", mixed, "precision", add=True)
    else:
        yield setting(f"{_ACTOR}.{part}.dtype", "bfloat16", "precision")
    # Trainer and vLLM take turns on the same GPUs; the one that waits keeps its weights in the machine's memory.
    yield setting(f"{_ACTOR}.{part}.param_offload", True)
    yield setting(f"{_ACTOR}.{part}.optimizer_offload", True)
    yield setting(f"{_ACTOR}.{part}.seed", config.seed, "seed")
    yield setting(f"{_ACTOR}.data_loader_seed", config.seed, "seed")
    yield setting(f"{_ACTOR}.ppo_mini_batch_size", rollout.prompts // config.updates, "updates")
    yield setting(f"{_ACTOR}.ppo_epochs", 1)
    yield setting(f"{_ACTOR}.use_dynamic_bsz", True)
    longest = rollout.vllm_max_model_length or PROMPT_LIMIT + rollout.max_new_tokens
    yield setting(f"{_ACTOR}.ppo_max_token_len_per_gpu", (config.micro_batch or 1) * longest, "micro_batch")
    yield setting(f"{_ACTOR}.loss_agg_mode", _AGGREGATION[config.aggregation], "aggregation")
    if config.aggregation == "dr_grpo":
        yield setting(f"{_ACTOR}.loss_scale_factor", rollout.max_new_tokens, "rollout.max_new_tokens")
    yield setting(f"{_ACTOR}.use_kl_loss", False)
    yield setting(f"{_ACTOR}.entropy_coeff", 0)


def _optimizer(config: Config, engine: str) -> Iterator[Setting]:
    optimizer, optim = config.optimizer, f"{_ACTOR}.optim"
    course = "constant" if optimizer.lr_scheduler == "constant_with_warmup" else optimizer.lr_scheduler
    if course == "linear" and engine != "megatron":
        raise UserError("optimizer.lr_scheduler is 'linear'; verl has constant, constant_with_warmup and cosine.")
    yield setting(f"{optim}.lr", optimizer.learning_rate, "optimizer.learning_rate")
    name = "lr_decay_style" if engine == "megatron" else "lr_scheduler_type"
    yield setting(f"{optim}.{name}", course, "optimizer.lr_scheduler")
    # verl moves its schedule once a rollout batch, not once an update.
    warmup = 0 if optimizer.lr_scheduler == "constant" else -(-optimizer.warmup_steps // config.updates)
    yield setting(f"{optim}.lr_warmup_steps", warmup, "optimizer.warmup_steps")
    yield setting(f"{optim}.weight_decay", optimizer.weight_decay, "optimizer.weight_decay")
    yield setting(f"{optim}.betas", list(optimizer.betas), "optimizer.betas")
    yield setting(f"{optim}.clip_grad", optimizer.max_grad_norm, "optimizer.max_grad_norm")


#: For verl's loss, which wants a number: a divergence that none exceeds.
NO_LIMIT = 1e9


def _rule(config: Config, engine: str) -> Iterator[Setting]:
    name, loss = config.rule.name, f"{_ACTOR}.policy_loss"
    divergence = str(config.rule.parameters.get("divergence"))
    if divergence.startswith(("exact_", "adaptive_")):
        raise UserError(
            f"rule.divergence is {divergence!r}, for which two full distributions of a token must be at hand; verl's "
            "rollout engines report log-probabilities of a few ids. Set rule.divergence=topk_tv, or topk_tv_upper for "
            "a bound from above, or train with `cppo train`."
        )
    if automatic := config.rule.automatic:
        raise UserError(
            f"rule.{' and rule.'.join(automatic)} is auto, which `cppo train` finds in its first rollout batches; a "
            "run of verl cannot. Dump some rollouts (docs/inspect.md), propose thresholds with `cppo calibrate DUMP "
            f"--rule {name}`, and give the numbers."
        )
    yield setting(f"{loss}._target_", "cppo.engines.verl.config.TrustRegionLossConfig")
    yield setting(f"{loss}.loss_mode", "cppo" if name == "cppo" else f"cppo_{name}", "rule")
    limit = config.max_on_policy_divergence
    if limit != Config.model_fields["max_on_policy_divergence"].default:
        shown = NO_LIMIT if limit is None else limit
        yield setting(f"{loss}.max_on_policy_divergence", shown, "max_on_policy_divergence")
    for parameter, value in config.rule.parameters.items():
        if value is not None:
            yield setting(f"{loss}.rule.{parameter}", value, f"rule.{parameter}", add=True)
    if divergence.startswith("topk_"):
        yield setting(f"{loss}.top_k", config.top_k, "top_k", add=True)
        yield setting(f"{loss}.topk_variant", config.topk_variant, "topk_variant", add=True)


def _rollout(config: Config, engine: str) -> Iterator[Setting]:
    rollout, evaluation = config.rollout, config.evaluation
    if evaluation.max_new_tokens not in (None, rollout.max_new_tokens):
        raise UserError(
            f"evaluation.max_new_tokens is {evaluation.max_new_tokens} and rollout.max_new_tokens "
            f"{rollout.max_new_tokens}: verl has one response limit for both. Set evaluation.max_new_tokens=null."
        )
    yield setting(f"{_ROLLOUT}.name", "vllm")
    yield setting(f"{_ROLLOUT}.n", rollout.responses, "rollout.responses")
    yield setting(f"{_ROLLOUT}.temperature", rollout.temperature, "rollout.temperature")
    yield setting(f"{_ROLLOUT}.top_p", 1.0)  # the full softmax
    yield setting(f"{_ROLLOUT}.top_k", -1)
    yield setting(f"{_ROLLOUT}.calculate_log_probs", True)
    yield setting(f"{_ROLLOUT}.dtype", "float32" if config.precision == "float32" else "bfloat16", "precision")
    size = rollout.vllm_tensor_parallel_size
    yield setting(f"{_ROLLOUT}.tensor_model_parallel_size", size, "rollout.vllm_tensor_parallel_size")
    share = rollout.vllm_gpu_memory_utilization
    yield setting(f"{_ROLLOUT}.gpu_memory_utilization", share, "rollout.vllm_gpu_memory_utilization")
    length = rollout.vllm_max_model_length or PROMPT_LIMIT + rollout.max_new_tokens
    yield setting(f"{_ROLLOUT}.max_model_len", length, "rollout.vllm_max_model_length")
    yield setting(f"{_ROLLOUT}.seed", config.seed, "seed")
    validation = f"{_ROLLOUT}.val_kwargs"
    yield setting(f"{validation}.n", evaluation.samples, "evaluation.samples")
    yield setting(f"{validation}.do_sample", True)
    yield setting(f"{validation}.temperature", evaluation.temperature, "evaluation.temperature")
    yield setting(f"{validation}.top_p", evaluation.top_p, "evaluation.top_p")


#: Steps between verl's checkpoints where the recipe says `auto`, which verl has not.
VERL_SAVE_FREQ = 20


def _trainer(config: Config, engine: str) -> Iterator[Setting]:
    yield setting("trainer.use_v1", True)
    yield setting("trainer.total_training_steps", config.steps, "steps")
    yield setting("trainer.total_epochs", config.steps, "steps")  # no bound: a pass over the data has a step at least
    yield setting("trainer.val_before_train", True)
    yield setting("trainer.test_freq", config.evaluation.every or config.steps, "evaluation.every")
    every = VERL_SAVE_FREQ if config.save_every == "auto" else config.save_every
    yield setting("trainer.save_freq", every, "save_every")
    yield setting("trainer.max_actor_ckpt_to_keep", config.keep_checkpoints, "keep_checkpoints")
    yield setting("trainer.resume_mode", "auto")
    yield setting("trainer.logger", list(dict.fromkeys(["console", "file", *config.report_to])), "report_to")
    yield setting("trainer.project_name", "cppo")
    yield setting("trainer.experiment_name", f"{config.name}-{config.rule.name}", "name")
