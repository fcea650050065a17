"""Trust regions in AReaL: the loss of its PPO actor replaced, in every process that trains (docs/engines.md).

In a training script, between loading the configuration and making the trainer::

    config, _ = load_expr_config(args, GRPOConfig)
    cppo.engines.areal.use(config, rule="cppo", delta=0.15)
    with PPOTrainer(config, train_dataset, valid_dataset) as trainer: ...

* AReaL packs: 1-D tensors and ``cu_seqlens``; values at a position belong to the *next* token (AReaL rolls mask,
  log-probabilities and advantages alike). Ulysses and context parallelism are gathered before the loss.
* The anchor is the inference engine's ``logprobs``; settings under which AReaL overwrites them are refused.
* Workers get AReaL's engine classes by import path: `use` points the trainer to subclasses in this module, which put
  the loss in place, and sends the rule along as the environment variable ``CPPO_RULE``.

Left out: top-K divergences; the Archon backend; AReaL's clipping. Its rejection sampling and M2PO are refused.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from functools import wraps
from importlib import import_module
from typing import Any

from torch import Tensor

from cppo.engines import support
from cppo.errors import UserError
from cppo.tokens import TokenBatch

WRITTEN_FOR = "1.0.4"
#: Engine classes of AReaL; this module has a subclass of each, made on demand.
ENGINES = ("FSDPPPOActor", "MegatronPPOActor")
#: Settings of ``actor`` that stand for a mask or a correction of AReaL's, with the value that switches each off.
NEUTRAL: dict[str, Any] = {"rejection_sampling": None, "m2_threshold": None, "use_sapo_loss": False}
NEUTRAL |= {"importance_sampling_level": "token", "enable_tree_training": False}


def use(config: Any, rule: str = "cppo", *, max_on_policy_divergence: float = 0.03, **parameters: Any) -> None:
    """Let AReaL's trainer train with `rule`: a name and its parameters, divergences of the sampled token only.

    Raises
    ------
    UserError : an unknown rule or parameter, or settings of ``config.actor`` that contradict (see `check`).
    """
    check(config.actor)
    settings = {"name": rule, "max_on_policy_divergence": max_on_policy_divergence, **parameters}
    support.loss_from_settings(settings, "AReaL", "the rule")
    os.environ[support.RULE_VARIABLE] = json.dumps(settings)
    for spec in config.actor.scheduling_spec:
        spec.env_vars[support.RULE_VARIABLE] = os.environ[support.RULE_VARIABLE]
    for name in ENGINES:
        with suppress(ImportError):  # of a backend that is not installed, which cannot be chosen
            setattr(import_module("areal.engine"), name, __getattr__(name))


def __getattr__(name: str) -> Any:
    """AReaL's engine class `name` with our loss; workers import it as ``cppo.engines.areal.<name>``."""
    if name not in ENGINES:
        raise AttributeError(f"{__name__} has no attribute {name!r}")
    theirs: Any = getattr(import_module("areal.engine"), name)

    def init(self: Any, config: Any) -> None:
        install(config)
        theirs.__init__(self, config)

    return globals().setdefault(name, type(name, (theirs,), {"__init__": init, "__module__": __name__}))


def check(config: Any) -> None:
    """Refuse settings of AReaL's ``actor`` that replace the anchor or would have no effect."""
    if config.recompute_logprob and not config.use_decoupled_loss:
        wrong = "actor.recompute_logprob=true overwrites the rollout's log-probabilities"
        raise UserError(f"AReaL: {wrong}. Set actor.recompute_logprob=false.")
    for name, neutral in NEUTRAL.items():
        if (value := getattr(config, name, neutral)) != neutral:
            raise UserError(f"AReaL: actor.{name} is {value!r}: this loss would ignore it. Set it to {neutral!r}.")


def install(config: Any) -> None:
    """Replace ``areal.trainer.ppo.actor.grpo_loss_fn`` in this process by the rule in ``CPPO_RULE``; once is enough."""
    check(config)
    actor: Any = import_module("areal.trainer.ppo.actor")
    theirs = actor.grpo_loss_fn
    if hasattr(theirs, "judge"):
        return
    support.check_version("areal", WRITTEN_FOR)
    support.require_parameters(theirs, "logprobs", "entropy", "input_data", engine="AReaL")
    judge = support.loss_from_environment("AReaL")

    @wraps(theirs)
    def grpo_loss_fn(logprobs: Tensor, entropy: Tensor, input_data: dict[str, Any], **settings: Any) -> Tensor:
        return loss(judge, actor, logprobs, entropy, input_data)

    grpo_loss_fn.judge = judge  # type: ignore[attr-defined]
    actor.grpo_loss_fn = grpo_loss_fn


def loss(judge: support.TrustRegionLoss, actor: Any, logprobs: Tensor, entropy: Tensor, data: dict[str, Any]) -> Tensor:
    """Mean over loss tokens, rejected ones included (AReaL's weight of it), of -c_t A_t log pi(y_t); all ``[N]``."""
    edges, rollout, mask = data.get("cu_seqlens"), data.get("logprobs"), data["loss_mask"].bool()
    if rollout is None or data.get("teacher_logp") is not None:
        raise UserError(
            "AReaL: the batch has no logprobs of the inference engine, or it has a teacher's. Let the workflow return "
            "them, and set actor.recompute_logprob=false and teacher=null."
        )
    if edges is None or int(edges[-1]) != len(logprobs):
        raise UserError(f"AReaL: cu_seqlens {edges} does not fit the {len(logprobs)} tokens of the pack.")
    judged = judge(TokenBatch(logprobs, rollout, data["advantages"], mask, cu_seqlens=edges))
    tracker, dropped = actor.stats_tracker, judged.verdict.coefficient == 0
    tracker.denominator(n_tokens=actor.infer_token_denominator(data, mask), n_valid_tokens=mask)
    tokens = {"new_logp": logprobs, "old_logp": rollout, "entropy": entropy, "actor_loss": judged.loss}
    tokens |= {"trust_masked": dropped, "importance_weight": (logprobs - rollout).clamp(max=20).exp()}
    tracker.stat(**{name: x.detach().float() for name, x in tokens.items()}, denominator="n_valid_tokens")
    tracker.scalar(**support.steady_metrics(judged.metrics))
    return judged.loss.sum() / mask.sum().clamp(min=1)
