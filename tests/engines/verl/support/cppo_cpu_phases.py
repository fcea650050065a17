"""A trainer that goes through several policy losses in one start, a step each: starting verl costs most of a run.

Named in VERL_USE_EXTERNAL_MODULES; ``trainer.v1.trainer_mode=phases`` and
``+trainer.v1.losses=[{loss_mode: cppo_dppo, rule: {delta: 0.1}}, ...]``. Step i trains under loss i, on a fresh
rollout of the policy as it then is. All else is ``cppo_sync``: its constructor runs under that name, and each loss goes
through the same check of the configuration and the same call of the actor as the one of a start.
"""

from __future__ import annotations

import copy
from functools import partial

from omegaconf import DictConfig, open_dict
from verl.trainer.ppo.v1 import register_trainer
from verl.utils.config import omega_conf_to_dataclass

from cppo.engines.verl.checks import check_config
from cppo.engines.verl.loss import trust_region_loss
from cppo.engines.verl.trainer import CPPOTrainerSync


@register_trainer("phases")
class Phases(CPPOTrainerSync):
    """See above."""

    def __init__(self, config: DictConfig) -> None:
        config.trainer.v1.trainer_mode = "cppo_sync"
        self.first = copy.deepcopy(config)  # as the user gave it, for the checks
        super().__init__(config)

    def on_step_begin(self) -> None:
        loss = self.config.trainer.v1.losses[self.global_steps - 1]
        for config in (self.first, self.config):
            settings = config.actor_rollout_ref.actor.policy_loss
            with open_dict(settings):
                settings.loss_mode, settings.rule = loss.loss_mode, loss.get("rule", {})
        self.cppo_rule, self.cppo_seen = check_config(self.first), False
        actor = omega_conf_to_dataclass(self.config.actor_rollout_ref.actor)
        self.actor_rollout_wg.set_loss_fn(partial(trust_region_loss, config=actor))
        super().on_step_begin()
