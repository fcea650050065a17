"""The parameters of a trust region in verl's configuration: ``actor_rollout_ref.actor.policy_loss``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from verl.workers.config import PolicyLossConfig

from cppo.errors import UserError
from cppo.rules import RULES, TrustRegion, make_rule
from cppo.words import nearest

#: verl's ``loss_mode`` -> our rule. verl has a loss named ``dppo_tv``, ``gspo``, ``cispo`` ...: ours begin with cppo.
LOSSES = {"cppo" if name == "cppo" else f"cppo_{name}": name for name in RULES}

TARGET = "cppo.engines.verl.config.TrustRegionLossConfig"


def plain(value: Any) -> dict[str, Any]:
    """A mapping of OmegaConf, or any other, as a dict of plain values."""
    from omegaconf import OmegaConf

    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    if not isinstance(value, Mapping):
        raise UserError(
            f"policy_loss.rule is {value!r}, expected the rule's parameters, such as "
            "+actor_rollout_ref.actor.policy_loss.rule.delta=0.15 (the rule itself is named by loss_mode)."
        )
    return dict(value)


@dataclass
class TrustRegionLossConfig(PolicyLossConfig):
    """verl's policy loss configuration with a trust region.

    Parameters
    ----------
    loss_mode : ``cppo``, or ``cppo_`` and another rule's name (`LOSSES`).
    rule : the rule's parameters (`cppo rules NAME`); what is not given keeps its default.
    top_k : K of top-K divergences: mu's K likeliest tokens, the sampled token, everything else.
    topk_variant : ``append`` or ``replace_last`` (`cppo.divergence.topk_tv`).
    max_on_policy_divergence : largest mean D_t of the first micro-batch, before any optimizer step; above it the run
        stops.
    trainer_checks : the loss insists on one of CPPO's trainers, which check the whole configuration. False: another
        trainer runs it (verl's own, or one of a framework on top of verl), and you have seen to the anchor.

    Raises
    ------
    UserError : an unknown rule or parameter, or a value out of range.
    """

    loss_mode: str = "cppo"
    rule: dict[str, Any] = field(default_factory=dict)
    top_k: int = 20
    topk_variant: str = "append"
    max_on_policy_divergence: float = 0.03
    trainer_checks: bool = True

    def __post_init__(self) -> None:
        self.trust_region()  # its own checks speak
        if not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 1:
            raise UserError(f"policy_loss.top_k is {self.top_k!r}, expected a whole number, at least 1.")
        if self.topk_variant not in ("append", "replace_last"):
            raise UserError(f"policy_loss.topk_variant is {self.topk_variant!r}, expected append or replace_last.")
        if not self.max_on_policy_divergence > 0:
            raise UserError(
                f"policy_loss.max_on_policy_divergence is {self.max_on_policy_divergence!r}, expected a number above 0."
            )

    def trust_region(self) -> TrustRegion:
        """The rule."""
        return rule_of(self.loss_mode, self.rule)

    @property
    def uses_top_k(self) -> bool:
        """Whether the rule's divergence needs mu's top K."""
        return needs_top_k(self.trust_region())


def rule_of(loss_mode: str, parameters: Any) -> TrustRegion:
    """The rule that a loss_mode names, with its parameters.

    Raises
    ------
    UserError : it is no loss of ours, or a parameter is wrong.
    """
    if loss_mode not in LOSSES:
        bypassed = (
            " verl's V0 trainer puts 'bypass_mode' there, which is PPO's clip: set trainer.use_v1=True."
            if loss_mode == "bypass_mode"
            else nearest(loss_mode, LOSSES)
        )
        raise UserError(f"actor.policy_loss.loss_mode is {loss_mode!r}, expected one of {', '.join(LOSSES)}.{bypassed}")
    given = plain(parameters or {})
    try:
        return make_rule(LOSSES[loss_mode], **given)
    except (ValueError, TypeError) as error:
        raise UserError(f"actor.policy_loss.rule: {error}") from error


def needs_top_k(rule: TrustRegion) -> bool:
    """Whether D_t of the rule is taken over mu's top K."""
    return rule.divergence is not None and rule.divergence.startswith("topk_")


#: Extra fields of a server's answer: arrays or lists ``[tokens, K]``, mu's likeliest ids first, and their log mu.
IDS, LOGP = "mu_topk_ids", "mu_topk_logprobs"
#: Key of K in ``actor_rollout_ref.rollout.custom``, from which a server learns how many are wanted.
SETTING = "cppo_top_k"
