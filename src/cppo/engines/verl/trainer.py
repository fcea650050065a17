"""verl's three V1 trainers under a trust region: ``trainer.v1.trainer_mode=cppo_sync`` and so on.

Nothing of verl's training loop is copied. A trainer of ours checks the configuration, gives the actor a loss function
that checks the anchor (`cppo.engines.verl.loss.trust_region_loss`), puts the collection of mu's top K in place where
the rule needs it, and looks at the first metrics.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from omegaconf import DictConfig, open_dict
from verl.trainer.ppo.v1 import PPOTrainerColocateAsync, PPOTrainerSeparateAsync, PPOTrainerSync, register_trainer
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.rollout.replica import RolloutReplicaRegistry

from cppo.engines.verl.checks import check_config, select
from cppo.engines.verl.config import SETTING, needs_top_k
from cppo.engines.verl.loss import MARK, trust_region_loss
from cppo.errors import UserError

logger = logging.getLogger(__name__)


def _top_k_replica() -> Any:
    from cppo.engines.verl.sampler import TopKvLLMReplica

    return TopKvLLMReplica


class TrustRegionTrainer:
    """Mixin in front of one of verl's trainers; `base_mode` is verl's own name of that one."""

    base_mode = ""
    config: Any
    actor_rollout_wg: Any

    def __init__(self, config: DictConfig) -> None:
        self.cppo_rule = check_config(config, self.base_mode)
        self.cppo_top_k = needs_top_k(self.cppo_rule)
        self.cppo_seen = False
        with open_dict(config):
            # verl looks up settings and its replay buffer by this name.
            config.trainer.v1.trainer_mode = self.base_mode
            if self.cppo_top_k:
                self._prepare_top_k(config)
        super().__init__(config)  # type: ignore[call-arg]

    @staticmethod
    def _prepare_top_k(config: DictConfig) -> None:
        rollout, k = config.actor_rollout_ref.rollout, int(config.actor_rollout_ref.actor.policy_loss.get("top_k", 20))
        rollout.agent.agent_loop_manager_class = "cppo.engines.verl.agent.TopKAgentLoopManager"
        rollout.custom = {**(select(rollout, "custom") or {}), SETTING: k}
        if rollout.name == "vllm":
            settings = rollout.engine_kwargs.setdefault("vllm", {})
            # vLLM returns 20 at most unless told otherwise
            settings["max_logprobs"] = max(k, int(select(settings, "max_logprobs", 20)))
            RolloutReplicaRegistry.register("vllm", _top_k_replica)

    def on_init_end(self) -> None:
        """Give the actor its loss function, once its workers exist."""
        actor = omega_conf_to_dataclass(self.config.actor_rollout_ref.actor)
        self.actor_rollout_wg.set_loss_fn(partial(trust_region_loss, config=actor))
        if self.cppo_top_k:
            update = self.actor_rollout_wg.update_actor

            def with_hook(batch: Any) -> Any:
                # For this call alone: the flag also belongs to passes that know nothing of a top K.
                batch.extra_info["distillation_use_topk"] = True
                try:
                    return update(batch)
                finally:
                    batch.extra_info["distillation_use_topk"] = False

            self.actor_rollout_wg.update_actor = with_hook
        super().on_init_end()  # type: ignore[misc]

    def _client(self, manager: Any, asynchronous: bool) -> Any:
        from cppo.engines.verl.agent import FullyAsyncTopKClient, TopKClient

        return manager.get_client(client_cls=FullyAsyncTopKClient if asynchronous else TopKClient)

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = super()._update_actor(batch, metrics)  # type: ignore[misc]
        self._check_update(metrics)
        return batch

    def _check_update(self, metrics: dict[str, Any]) -> None:
        if MARK not in metrics:
            raise UserError(
                f"the actor's update reports no {MARK}: another loss than the trust region {self.cppo_rule.name} ran. "
                "See docs/verl.md."
            )
        if self.cppo_seen:
            return
        self.cppo_seen = True
        drift = metrics.get("actor/trust/first_update_divergence", 0.0)
        logger.warning(
            "CPPO: rule %s, anchored at the rollout policy; divergence before the first step %.3g.",
            self.cppo_rule,
            drift,
        )
        largest = metrics.get("actor/trust/divergence_max", metrics["actor/trust/ratio_max"] - 1)
        if self.base_mode == "sync" and largest == 0 and metrics.get("actor/grad_norm", 0) > 0:
            raise UserError(
                "after several updates on a rollout batch the divergence is still exactly 0 at every token: "
                "old_log_prob follows the trained policy. Set algorithm.rollout_correction.bypass_mode=True."
            )


@register_trainer("cppo_sync")
class CPPOTrainerSync(TrustRegionTrainer, PPOTrainerSync):
    """Sampling and training take turns."""

    base_mode = "sync"

    def get_llm_client(self) -> Any:
        return self._client(self.llm_server_manager, False) if self.cppo_top_k else super().get_llm_client()


@register_trainer("cppo_colocate_async")
class CPPOTrainerColocateAsync(TrustRegionTrainer, PPOTrainerColocateAsync):
    """On the same GPUs; generations are interrupted by updates and resumed."""

    base_mode = "colocate_async"

    def get_llm_client(self) -> Any:
        return self._client(self.llm_server_manager, True) if self.cppo_top_k else super().get_llm_client()


@register_trainer("cppo_separate_async")
class CPPOTrainerSeparateAsync(TrustRegionTrainer, PPOTrainerSeparateAsync):
    """On GPUs of their own; weights follow every few updates."""

    base_mode = "separate_async"

    def get_llm_client(self) -> Any:
        return self._client(self.standalone_server_manager, True) if self.cppo_top_k else super().get_llm_client()
