"""The settings of a run, one pydantic model a section; the text under each field is its documentation.

Validated as a whole, before a model or a data set is touched. `cppo.config.load.load_config` builds them from a
recipe and ``key=value`` overrides; from Python, `Config(...)` takes the same keys.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from cppo.config import yaml_io
from cppo.errors import UserError
from cppo.rules import RULES, TrustRegion, make_rule
from cppo.thresholds import AUTO, check_automatic
from cppo.words import nearest


def _whole(value: Any) -> Any:
    # 1e3 is a whole number, too; true and "3" are not.
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Count = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
Whole = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """A group of settings: unknown keys are refused, types are taken strictly."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


class Tiny(Section):
    """The Qwen3-architecture model that `model: tiny` makes from scratch, with one token a character of the task."""

    hidden_size: Count = 128
    """Width, in units; a multiple of 2 * heads."""
    layers: Count = 3
    """Transformer layers."""
    heads: Count = 4
    """Attention heads per layer."""
    intermediate_size: Count | None = None
    """Width of the feed-forward part (of an expert), in units; null: 4 * hidden_size / the experts a token takes."""
    experts: Count | None = None
    """Experts a layer, as in the Qwen3 mixture-of-experts models; null: dense."""
    experts_per_token: Count = 2
    """Experts that each token takes, at most `experts`."""
    max_positions: Count = 512
    """Longest prompt and response together, in tokens."""
    initializer_range: Positive = 0.1
    """Standard deviation of the initial weights. At these widths 0.02, which large models use, does not learn."""
    rope_theta: Positive = 100.0
    """Base of the rotary positions. In contexts this short 1e4, as in large models, blurs neighbouring positions."""


class TaskSettings(Section):
    """What is learned."""

    name: str = "arithmetic"
    """`arithmetic`, `automaton`, `math`, `reasoning_gym:<name>`, or your own as `package.module:ClassOrFactory`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Parameters of the task, see docs/tasks.md; `task.families=[...]` is short for `task.options.families=[...]`."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        forms = (
            "arithmetic, automaton, math, reasoning_gym:<name> (such as reasoning_gym:chain_sum) or package.module:Name"
        )
        if name in ("arithmetic", "automaton", "math") or re.fullmatch(r"reasoning_gym:\w+", name):
            return name
        if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", name) and not name.startswith("reasoning_gym:"):
            module = name.partition(":")[0].partition(".")[0]
            if importlib.util.find_spec(module) is None:
                raise ValueError(
                    f"task.name is {name!r}, but there is no module {module!r}: expected {forms}. A module of your "
                    f"own must be importable from here (PYTHONPATH).{nearest(module, ['reasoning_gym'])}"
                )
            return name
        raise ValueError(
            f"task.name is {name!r}, expected {forms}."
            f"{nearest(name, ['arithmetic', 'automaton', 'math', 'reasoning_gym:<name>'])}"
        )


class Prompt(Section):
    """How the question of a task becomes what the model reads; the same in rollouts, evaluation and samples."""

    format: Literal["auto", "text", "chat"] = "auto"
    """`chat`: as a user's message through the model's chat template; `text`: as it is; `auto`: a chat where there is a
    template."""
    system: str | None = None
    """System message of a chat; null: none of ours (some templates bring their own)."""
    suffix: str = ""
    """Put behind each question, such as where to write the answer."""
    template: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the chat template, such as `enable_thinking: false`."""


class RuleSettings(Section):
    """The trust region: a rule's name and its parameters; `cppo rules` lists them with their defaults."""

    model_config = ConfigDict(extra="allow")

    name: str = "cppo"
    """Which rule. `rule=dppo` on the command line also drops what the recipe has set for another rule."""

    @model_validator(mode="before")
    @classmethod
    def _build(cls, value: Any) -> Any:
        """Make the rule once, so that its own checks speak, and write every parameter out."""
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping):
            raise ValueError(
                f"rule is {value!r}, expected a name or a section with a name, such as rule: {{name: cppo}}."
            )
        given = {"name": "cppo", **value}
        name = given.pop("name")
        known = RULES[name].__dataclass_fields__ if isinstance(name, str) and name in RULES else {}  # type: ignore[attr-defined]
        automatic = check_automatic(name, {key: given[key] for key in known if key in given})
        try:
            rule = make_rule(name, **{key: value for key, value in given.items() if key not in automatic})
        except (ValueError, TypeError) as error:
            # "cppo: delta is ..." -> the key as it is written in a recipe
            raise ValueError(re.sub(rf"^{re.escape(str(name))}: (?=\w+ is )", "rule.", str(error))) from error
        return {"name": name, **rule.parameters(), **dict.fromkeys(automatic, AUTO)}

    @property
    def parameters(self) -> dict[str, Any]:
        """The rule's parameters by name, all of them; `auto` where a threshold sets itself."""
        return dict(self.model_extra or {})

    @property
    def automatic(self) -> list[str]:
        """Names of the thresholds that set themselves (`auto`)."""
        return check_automatic(self.name, self.parameters)

    def make(self, thresholds: Mapping[str, float] | None = None) -> TrustRegion:
        """The rule as an object; `auto` is what `thresholds` says, else the rule's default."""
        automatic = self.automatic
        fixed = {key: value for key, value in self.parameters.items() if key not in automatic}
        return make_rule(self.name, **fixed, **{key: (thresholds or {})[key] for key in automatic if thresholds})


class Calibration(Section):
    """Thresholds that set themselves: `rule.delta=auto`, or any other threshold of a rule."""

    target: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of the loss tokens to hold back (cispo, minpro: to clamp), as the mean over the updates of a batch."""
    steps: Count = 4
    """Rollout batches after which the thresholds stay as they are; the first of several gives a first guess alone."""


class Warmup(Section):
    """Supervised training on the task's demonstrations, before RL; random weights (`tiny`) need it."""

    steps: Whole = 0
    """Optimizer updates; 0: no warm-up."""
    batch_size: Count = 64
    """Demonstrations an update."""
    learning_rate: Positive = 1e-3
    """Peak learning rate (cosine decay)."""
    weight_decay: NonNegative = 0.0
    """AdamW's weight decay, per unit of learning rate."""


class Rollout(Section):
    """How responses are sampled for training: always from the full softmax (no top-p, no top-k)."""

    prompts: Count = 16
    """Prompts a rollout batch, over all processes."""
    responses: Annotated[int, BeforeValidator(_whole), Field(ge=2)] = 16
    """Responses a prompt (the group over which advantages are normalised), at least 2."""
    max_new_tokens: Count = 128
    """Response limit, in tokens."""
    temperature: Positive = 1.0
    """Sampling temperature; the rollout policy and the trained policy are both the tempered distributions."""
    sampler: Literal["auto", "own", "trl"] = "auto"
    """Without vLLM: `own` samples with the model in memory and records mu from the logits that it sampled from; `trl`
    is TRL's generation, with a pass for mu; `auto`: `own` but for `tiny`, and `trl` for sharded models."""
    vllm: bool = False
    """Sample with vLLM (GPUs) instead of transformers."""
    vllm_mode: Literal["colocate", "server"] = "colocate"
    """vLLM in the training processes, or a running `trl vllm-serve` (address: trl.vllm_server_base_url)."""
    vllm_gpu_memory_utilization: Share = 0.3
    """Share of each GPU's memory that a colocated vLLM takes."""
    vllm_tensor_parallel_size: Count = 1
    """GPUs that share one colocated vLLM model; divides the number of processes."""
    vllm_max_model_length: Count | None = None
    """Longest prompt and response together in vLLM, in tokens; null: the model's own limit."""
    vllm_enable_sleep_mode: bool = False
    """Free vLLM's memory during the updates (colocate only)."""


class Optimizer(Section):
    """AdamW."""

    learning_rate: Positive = 1e-6
    """Peak learning rate."""
    weight_decay: NonNegative = 0.0
    """Weight decay, per unit of learning rate."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """Decay rates of the two moments."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this norm."""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    """Course of the learning rate over all updates."""
    warmup_steps: Whole = 0
    """Updates over which the learning rate rises from 0 (not with `constant`)."""


class Advantages(Section):
    """From rewards to advantages, per prompt."""

    kind: Literal["zscore", "centred"] = "zscore"
    """Reward minus group mean; `zscore` divides by the standard deviation (GRPO), `centred` does not (Dr. GRPO)."""
    zero_spread_filter: bool = True
    """Take prompts whose responses all have the same reward out of the loss and out of its denominators."""


class Evaluation(Section):
    """Avg@k and pass@k on held-out problems, before and after training and in between."""

    every: Whole = 0
    """Steps between evaluations; 0: before and after only."""
    problems: Count | None = None
    """Problems a benchmark at most; null: all of them."""
    samples: Count = 16
    """Responses a problem: the k of Avg@k and pass@k."""
    temperature: Positive = 0.7
    """Sampling temperature of the evaluation."""
    top_p: Share = 0.95
    """Share of the probability mass that is sampled from."""
    max_new_tokens: Count | None = None
    """Response limit, in tokens; null: that of the rollouts."""
    batch_size: Count = 256
    """Responses sampled at once on a device."""


class Samples(Section):
    """Responses with per-token reasons, written into the run folder."""

    every: Whole = 10
    """Steps between samples; 0: none."""
    count: Count = 8
    """Responses a sample."""


class Peft(Section):
    """LoRA instead of all weights; names as in peft.LoraConfig."""

    r: Count = 16
    """Rank."""
    lora_alpha: Positive = 32.0
    """Scale: the update is multiplied by lora_alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input; above 0 the trained policy differs from the one that sampled from the start."""
    target_modules: str | list[str] = "all-linear"
    """Modules that get an adapter: `all-linear` or a list of names."""


class Settings(Section):
    """All settings of a run, each checked on its own; `cppo.config.load.Config` checks them together.

    One *step* is one rollout batch, used for `updates` optimizer updates.
    """

    name: str = "custom"
    """Label of the run: its folder is `runs/NAME-RULE-001`. Default: the recipe's file name, or another task's name."""
    model: Annotated[str, Field(min_length=1)] = "tiny"
    """`tiny` (made from the section `tiny`), a local folder, a GGUF file, `package:MODULE/FILE` (a file inside an
    installed package), or a hub id."""
    tiny: Tiny = Field(default_factory=Tiny)
    task: TaskSettings = Field(default_factory=TaskSettings)
    prompt: Prompt = Field(default_factory=Prompt)
    rule: RuleSettings = Field(default_factory=lambda: RuleSettings.model_validate({}))
    calibration: Calibration = Field(default_factory=Calibration)
    top_k: Count = 20
    """K of the top-K and adaptive divergences: tokens of the rollout policy that are classes of their own."""
    topk_variant: Literal["append", "replace_last"] = "append"
    """Sampled token outside of the top K: a class of its own (`append`, K + 2 classes) or in place of the K-th."""
    topk_anchor: Literal["rollout", "recomputed"] = "rollout"
    """Whose distribution D is measured from: the sampler's own, or what the trainer recomputes from the same weights
    (needed with vLLM)."""
    topk_store: Literal["float32", "compact", "ragged"] = "float32"
    """How the top K are kept between rollout and updates, in bytes per token: `float32` 8 K; `compact` 5 K, D off by at
    most 0.0015 (K = 20); `ragged` 1 + 5 for each of those that cover 99.9%, D off by up to 0.001 more."""
    max_on_policy_divergence: Positive | None = 0.03
    """Largest mean D_t of the first update, before any optimizer step, where the trained policy is the one that
    sampled; beyond it the run stops, since the rule would measure that mismatch. null: do not look."""
    warmup: Warmup = Field(default_factory=Warmup)
    rollout: Rollout = Field(default_factory=Rollout)
    updates: Count = 8
    """Optimizer updates on each rollout batch (the paper's M); divides rollout.prompts * rollout.responses."""
    micro_batch: Count | None = None
    """Responses a device at once; the gradient is accumulated over the rest of an update. null: all of its share."""
    steps: Count = 30
    """Rollout batches in the whole run."""
    optimizer: Optimizer = Field(default_factory=Optimizer)
    advantages: Advantages = Field(default_factory=Advantages)
    aggregation: Literal["dr_grpo", "grpo", "dapo", "bnpo"] = "dr_grpo"
    """Denominator of the loss: `dr_grpo` a constant (responses * max_new_tokens), `grpo` each response's length, `dapo`
    the loss tokens of the update, `bnpo` those of the micro-batch."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of forward and backward; auto: bfloat16 on a GPU and on a processor that multiplies it fast, float32 elsewhere
    and for `tiny`."""
    gradient_checkpointing: Literal["auto", True, False] = "auto"
    """Recompute activations in the backward pass to save memory; auto: on a GPU, not for `tiny`."""
    evaluation: Evaluation = Field(default_factory=Evaluation)
    save_every: Count | Literal["auto"] = 1
    """Steps between checkpoints; a stopped run resumes from the last one. `auto`: as often as 5% of the time allow."""
    keep_checkpoints: Count = 2
    """Newest checkpoints that are kept."""
    samples: Samples = Field(default_factory=Samples)
    seed: Whole = 0
    """Of the initial weights, the data and all sampling."""
    output_dir: str | None = None
    """Run folder, new or empty; null: the first free one of `runs/NAME-RULE-001`, `-002` ..."""
    report_to: Annotated[list[str], BeforeValidator(_listed)] = Field(default_factory=list)
    """Trackers that get the metrics beside the run folder: tensorboard, wandb, trackio."""
    peft: Peft | None = None
    """null: all weights are trained."""
    trl: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of GRPOConfig; those with a key of their own here, or that disable the rule, are refused."""
    verl: dict[str, Any] = Field(default_factory=dict)
    """Further settings of verl, by their dotted names, for `cppo launch verl` only; on its command line they stand
    without `verl.` in front."""

    def make_rule(self) -> TrustRegion:
        """The trust region as an object.

        Raises
        ------
        UserError : a threshold is `auto`: which one it is is known in a run alone
            (`cppo.runs.calibration.rule_of_run`).
        """
        if names := self.rule.automatic:
            raise UserError(
                f"rule.{' and rule.'.join(names)} is auto: the thresholds are found in a run, by what its first "
                "rollout batches show (calibration.json in the run folder). Give a number here."
            )
        return self.rule.make()

    def to_yaml(self) -> str:
        """The settings as YAML with every key written out; `load_config` of that text gives an equal Config."""
        return yaml_io.dump(self.model_dump(mode="python"))
