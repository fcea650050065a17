"""Trust regions in SkyRL: every rule as a policy loss (docs/engines.md).

* `register` adds ``cppo`` and, for the other rules, ``cppo_<name>`` to SkyRL's registry, which Ray workers get pickled.
* `TrustRegionConfig` is SkyRL's config with ``trainer.algorithm.trust_region``, the rule's parameters; `check_config`
  refuses settings that would alter the rule; `main` is SkyRL's entry point with all three.
* SkyRL scales the advantages (by positive factors) so that the sum over tokens, micro-batches and processes is its
  `loss_reduction`. Ulysses and Megatron's context parallelism gather log-probabilities before the loss.

Left out: top-K divergences (SkyRL hands over the sampled token's log-probability only). With step-wise trajectories
every step is a sequence of its own, with its own prefix budget.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from skyrl.backends.skyrl_train.utils import ppo_utils  # type: ignore[import-not-found]
from skyrl.backends.skyrl_train.utils.off_policy_correction_utils import off_policy_correction_enabled  # type: ignore
from skyrl.train.config import AlgorithmConfig, make_config  # type: ignore[import-not-found]
from torch import Tensor, ones_like

from cppo.engines.support import TrustRegionLoss, check_version, require_parameters, sampled_token_rule, steady_metrics
from cppo.errors import UserError
from cppo.rules import RULES
from cppo.tokens import TokenBatch

#: Policy loss -> rule.
LOSSES = {"cppo" if rule == "cppo" else f"cppo_{rule}": rule for rule in RULES}
#: Sampling settings under which the sampler draws from the distribution that the trainer computes, and tells.
PLAIN = {"logprobs": (1, 0), "top_p": (1.0,), "top_k": (-1, 0), "min_p": (0.0,), "repetition_penalty": (1.0,)}


@dataclass
class TrustRegionAlgorithmConfig(AlgorithmConfig):
    """SkyRL's `AlgorithmConfig` and ``trust_region``: parameters of the rule, and max_on_policy_divergence (0.03)."""

    trust_region: dict[str, Any] = field(default_factory=dict)


TrustRegionConfig = make_config(algorithm_cls=TrustRegionAlgorithmConfig)


@dataclass
class PolicyLoss:
    """One rule as a policy loss of SkyRL. Every worker process judges with a copy of its own."""

    rule: str
    made: tuple[dict[str, Any], TrustRegionLoss] | None = None  # parameters, and what they make

    def prepare(self, config: Any) -> TrustRegionLoss:
        """The rule with the parameters of an `AlgorithmConfig`. UserError: wrong parameters, or a second correction."""
        if off_policy_correction_enabled(config.off_policy_correction):
            raise UserError(
                "SkyRL: trainer.algorithm.off_policy_correction would correct a second time. Set its fields to null."
            )
        given = dict(getattr(config, "trust_region", None) or {})  # a stock config: the rule's defaults
        if self.made is None or self.made[0] != given:
            limit = (parameters := {"max_on_policy_divergence": 0.03} | given).pop("max_on_policy_divergence")
            if "name" in parameters:
                raise UserError("SkyRL: trust_region.name is set; trainer.algorithm.policy_loss_type names the rule.")
            rule = sampled_token_rule(self.rule, "SkyRL", **parameters)
            self.made = given, TrustRegionLoss(rule, "SkyRL", max_on_policy_divergence=limit)
        return self.made[1]

    def __call__(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor | None,
        advantages: Tensor,
        config: Any,
        loss_mask: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """-sum_t c_t A_t log pi(y_t) over ``[B, T]``, and metrics. `old_log_probs` are not used."""
        if rollout_logprobs is None:
            raise UserError("SkyRL: no rollout log-probabilities. Set generator.sampling_params.logprobs=1.")
        mask = ones_like(log_probs) if loss_mask is None else loss_mask
        judged = self.prepare(config)(TokenBatch(log_probs, rollout_logprobs, advantages, mask))
        stats = steady_metrics(judged.metrics)  # SkyRL all-reduces one by one: processes that differ would hang
        return ppo_utils.reduce_loss(judged.loss, loss_mask), {"clip_ratio": stats["trust/masked_fraction"], **stats}


def register() -> None:
    """Add the losses to SkyRL's registry: before `validate_cfg`, in the process that starts Ray."""
    check_version("skyrl", "0.3.0")
    require_parameters(ppo_utils.dppo_policy_loss, "advantages", "loss_mask", "rollout_logprobs", engine="SkyRL")
    for name in sorted(LOSSES.keys() - set(ppo_utils.PolicyLossRegistry.list_available())):
        ppo_utils.PolicyLossRegistry.register(name, PolicyLoss(LOSSES[name]))  # an object pickles; a closure may not


def check_config(cfg: Any) -> None:
    """Refuse settings of a `TrustRegionConfig` that would alter the rule. UserError: all of them, and what to set."""
    sampling, mode = cfg.generator.sampling_params, cfg.generator.inference_engine.engine_init_kwargs
    needed: dict[str, Any] = {f"sampling_params.{k}": v[0] for k, v in PLAIN.items() if getattr(sampling, k) not in v}
    if sampling.temperature != 1 and (mode or {}).get("logprobs_mode") != "processed_logprobs":  # vLLM's: before it
        needed["inference_engine.engine_init_kwargs.logprobs_mode"] = "processed_logprobs"
    if not cfg.generator.use_conversation_multi_turn:  # SkyRL 0.3 then trains on end tokens that nobody sampled
        needed["use_conversation_multi_turn"] = "true"
    if needed:
        settings = ", ".join(f"generator.{name}={value}" for name, value in needed.items())
        raise UserError(f"SkyRL: rollout_logprobs would not be those of the policy that is trained. Set {settings}.")
    if (loss := cfg.trainer.algorithm.policy_loss_type) in LOSSES:
        PolicyLoss(LOSSES[loss]).prepare(cfg.trainer.algorithm)


def main() -> None:
    """SkyRL's training entry point with the above: ``trainer.override_entrypoint=cppo.engines.skyrl``."""
    from skyrl.train.entrypoints import main_base  # type: ignore[import-not-found]

    cfg = TrustRegionConfig.from_cli_overrides([a for a in sys.argv[1:] if "override_entrypoint=" not in a])
    register()
    check_config(cfg)
    main_base.validate_cfg(cfg)
    main_base.initialize_ray(cfg)
    main_base.ray.get(main_base.skyrl_entrypoint.remote(cfg))
