"""CPPO: position weights and a prefix budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cppo.rules.base import (
    Account,
    Reason,
    TrustRegion,
    Verdict,
    moves_away,
    register,
    require,
    require_cap,
    require_divergence,
    require_positive,
)
from cppo.rules.gates import Gate, resolve
from cppo.rules.limits import Limit
from cppo.rules.weights import SHAPES, linear_prefix_weight, linear_weights, shuffled_position
from cppo.tokens import TokenBatch
from cppo.words import nearest


@register
@dataclass(frozen=True)
class CPPO(TrustRegion):
    """Cumulative Prefix-divergence Policy Optimization.

    Over the loss tokens t = 1..T of one response::

        w_t = 1 - (1 - w_min) (t - 1)/(T - 1)              w_1 = 1, w_T = w_min; T = 1: w_1 = 1    (Eq. 9)
        Z_t = w_t D_t,   S_t = sum_{j<=t} Z_j,   W_t = sum_{j<=t} w_j
        tau_t = min(delta, delta + delta_b W_{t-1} - S_{t-1})                                      (Eq. 8)
        M_t = 1 if A_t (rho_t - 1) <= 0 or Z_t <= tau_t, else 0                                    (Eq. 10)
        c_t = M_t min(rho_t, ratio_cap)                                                            (Eq. 11)

    (The paper writes c_t for the token limit tau_t; here c_t is the coefficient, as in every rule.)

    S and W run over every loss token, kept or rejected: a rejected token has drifted all the same. tau_t may be
    negative; then only moves towards mu are kept. The adaptive budget sets, per response, from the unweighted
    D_1..D_T (Eq. 22)::

        delta_b = min(budget_max delta_b, max(delta_b, quantile_scale P_quantile(D)))

    Parameters
    ----------
    delta : limit of a token, in units of D (0.15 for TV; 0.2 for large MoE models; 0.1 nats for KL). Always in (0,
        inf).
    delta_b : prefix budget per token: "fixed" takes it as it is (0.015 for post-trained models), "adaptive" as the
        minimum (0.02 for base models). At least 0. The paper's bound beats the uniform rule's where delta_b < delta
        w_min.
    budget : "adaptive" or "fixed".
    w_min : weight of the last token, in (0, 1].
    weights : "linear" (Eq. 9), or for ablations: "none" (w = 1); "cosine" from 1 to w_min; "matched", max(w_min, (T -
        t)/(T - 1)); "reversed", linear from w_min to 1; "shuffled", the linear weights re-assigned at random within
        each response. The assignment depends on `seed`, the position and log mu(y_t) only, so it is the same in every
        update of a rollout batch and under any padding, packing or splitting.
    prefix_budget : False leaves the token limit alone: tau_t = delta.
    gate : soft gate instead of the hard mask (Eq. 19-20): "reciprocal", "sapo" or an admissible function of x; None:
        hard.
    divergence : which D_t (see `cppo.divergence`).
    quantile, quantile_scale, budget_max : of the adaptive budget: P90, 1 and 2 in the paper.
    ratio_cap : bound of the ratio in the coefficient (implementations use 20); None: off.
    seed : of the shuffled weights.
    """

    delta: float = 0.15
    delta_b: float = 0.02
    budget: str = "adaptive"
    w_min: float = 0.8
    weights: str = "linear"
    prefix_budget: bool = True
    gate: str | Gate | None = None
    divergence: str = "topk_tv"
    quantile: float = 0.9
    quantile_scale: float = 1.0
    budget_max: float = 2.0
    ratio_cap: float | None = None
    seed: int = 0

    name = "cppo"
    source = "CPPO (2606.10968v2) Eq. 8-11, 19-20, 22; Algorithm 1"
    limits: ClassVar[Mapping[str, Limit]] = {"delta": Limit(), "delta_b": Limit()}
    limits_tokens = True

    def __post_init__(self) -> None:
        _check(self)

    def position_weights(self, batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
        """w_t and W_{t-1} for each token, and W_{T-1} of its sequence (broadcastable). Outside the mask w is
        arbitrary.
        """
        layout, mask = batch.layout, batch.loss_mask
        count = layout.total(mask.to(batch.dtype))
        position = layout.positions(mask, batch.dtype)
        last = (count - 1).clamp(min=0)
        if self.weights == "none":
            return torch.ones_like(position), position, last
        if self.weights == "linear":
            before = linear_prefix_weight(position, count, self.w_min)
            return linear_weights(position, count, self.w_min), before, linear_prefix_weight(last, count, self.w_min)
        if self.weights in SHAPES:
            weight = SHAPES[self.weights](position, count, self.w_min) * mask
        else:
            weight = linear_weights(shuffled_position(batch, position, self.seed), count, self.w_min) * mask
        before = layout.exclusive_cumsum(weight)
        return weight, before, layout.maximum(before * mask)

    def sequence_budget(self, batch: TokenBatch, divergence: Tensor) -> Tensor:
        """delta_b of each response, broadcastable against tokens (Eq. 22 where the budget is adaptive)."""
        if self.budget == "fixed":
            return divergence.new_full((1,) * divergence.dim(), self.delta_b)
        spread = batch.layout.quantile(divergence, batch.loss_mask, self.quantile) * self.quantile_scale
        return spread.clamp(self.delta_b, self.budget_max * self.delta_b)

    def judge(self, batch: TokenBatch) -> Verdict:
        divergence = self.token_divergence(batch)
        return self._judge(batch, divergence, budget_from=divergence)

    def _judge(self, batch: TokenBatch, divergence: Tensor, budget_from: Tensor) -> Verdict:
        """The rule on D_t = `divergence`, with the adaptive budget of another D_t; both clean outside the mask."""
        layout, mask = batch.layout, batch.loss_mask
        log_ratio = batch.log_ratio()
        away = moves_away(batch.token_advantages(), log_ratio)
        coefficient, capped = self.capped_ratio(log_ratio, mask)
        delta_b = self.sequence_budget(batch, budget_from) if self.prefix_budget else None
        # The largest batches are bound by memory: from here on, arithmetic runs in place where a tensor is not needed
        # again.
        weight, weight_before, weight_all = self.position_weights(batch)
        charge = weight * divergence  # Z_t
        budget_used = excess = None
        limit = torch.full_like(charge[..., :1], self.delta)  # tau_t
        if delta_b is not None:
            spent_before = layout.exclusive_cumsum(charge)  # S_{t-1}
            allowance = weight_before.mul_(delta_b).add_(self.delta)  # delta + delta_b W_{t-1}
            budget_used = layout.squeeze(layout.total(charge) / (self.delta + delta_b * weight_all))
            if self.gate is not None:
                excess = (spent_before + charge) / allowance
            limit = allowance.sub_(spent_before).clamp_(max=self.delta)
            delta_b = layout.squeeze(delta_b.expand_as(divergence))
            del spent_before, allowance
        del weight_before
        over = charge > limit
        over_token = charge > self.delta
        gate = resolve(self.gate)
        if gate is None:
            drop = over & away
            coefficient.masked_fill_(drop, 0.0)
        else:
            token_excess = charge / self.delta
            worst = token_excess if excess is None else torch.maximum(token_excess, excess)
            coefficient.mul_(torch.where(away, gate(worst), 1.0))
            over, drop = worst > 1, (worst > 1) & away
            # which clause is exceeded more
            over_token = over if excess is None else token_excess >= excess
        del charge
        # uint8 arithmetic: KEPT 0, TOWARDS 1; dropped: TOKEN_LIMIT 2 or PREFIX_BUDGET 3
        reason = over.to(torch.uint8).add_(drop).add_(drop & ~over_token)
        reason.masked_fill_(~mask, int(Reason.OUTSIDE))
        threshold = limit.div_(weight) if self.prefix_budget else limit / weight
        return Verdict(coefficient, reason, divergence, threshold, delta_b, budget_used, capped)

    @torch.no_grad()
    def account(self, batch: TokenBatch, verdict: Verdict) -> Account | None:
        """w_t, S_t and delta + delta_b W_{t-1} behind a verdict on `batch`."""
        if verdict.divergence is None:
            return None
        weight, before, _ = self.position_weights(batch)
        charge = weight * verdict.divergence * batch.loss_mask
        spent = batch.layout.exclusive_cumsum(charge) + charge
        budget = self.sequence_budget(batch, verdict.divergence) if self.prefix_budget else None
        return Account(weight.expand_as(charge), spent, None if budget is None else self.delta + budget * before)

    @classmethod
    def idle_limits(cls, parameters: Mapping[str, Any]) -> Mapping[str, str]:
        if parameters.get("prefix_budget") is False:
            return {"delta_b": "prefix_budget=false switches the budget off"}
        return {}

    # -- for `adaptive_tv` alone: skip it at first ----------------------------------------------------------------

    @torch.no_grad()
    def bracket(self, batch: TokenBatch, lower: Tensor, upper: Tensor) -> tuple[Verdict, Verdict]:
        """(permissive, strict); see `TrustRegion.bracket`.

        tau_t falls with every Z and S but rises with the adaptive budget, which grows with D. So each end takes Z and S
        from one end of the intervals and delta_b from the other. With D the truth: S(lower) <= S(D) <= S(upper) and,
        a quantile and its clamp never decreasing in any D_s, delta_b(lower) <= delta_b(D) <= delta_b(upper).
        """
        low, high = (self.token_divergence(batch.with_divergence(end)) for end in (lower, upper))
        return self._judge(batch, low, budget_from=high), self._judge(batch, high, budget_from=low)

    @torch.no_grad()
    def pivotal(self, batch: TokenBatch, lower: Tensor, upper: Tensor) -> Tensor | None:
        """Tokens whose D_t may be one of the two that the quantile of the adaptive budget interpolates between; None
        for a fixed budget. See `TrustRegion.pivotal`.
        """
        if self.budget == "fixed" or not self.prefix_budget:
            return None
        layout, mask = batch.layout, batch.loss_mask
        low, high = batch.clean(lower), batch.clean(upper)
        least, most = (layout.quantile(end, mask, self.quantile) for end in (low, high))
        budgets = (self.sequence_budget(batch, end) for end in (low, high))
        uncertain = torch.ne(*budgets)  # else the clamp has made them equal
        # The lower of the two is at least the largest end below the quantile of the lower ends; likewise above.
        first = layout.maximum(torch.where(mask & (low <= least), low, 0))
        last = -layout.maximum(torch.where(mask & (high >= most), -high, -math.inf))
        return mask & uncertain & (high >= first) & (low <= last)


def _check(rule: CPPO) -> None:
    """Refuse parameters that are out of range; the first one that is."""
    require_positive(
        rule.name,
        delta=rule.delta,
        w_min=rule.w_min,
        quantile_scale=rule.quantile_scale,
        budget_max=rule.budget_max,
    )
    require(rule.w_min <= 1, f"cppo: w_min is {rule.w_min!r}, expected in (0, 1] (the weight of the last token).")
    ok = isinstance(rule.delta_b, int | float) and math.isfinite(rule.delta_b) and rule.delta_b >= 0
    require(
        ok, f"cppo: delta_b is {rule.delta_b!r}, expected a number of at least 0 (budget per token, in units of D)."
    )
    require(rule.budget_max >= 1, f"cppo: budget_max is {rule.budget_max!r}, expected at least 1 (times delta_b).")
    ok = isinstance(rule.quantile, int | float) and 0 <= rule.quantile <= 1
    require(ok, f"cppo: quantile is {rule.quantile!r}, expected in [0, 1].")
    for name, value, known in (
        ("budget", rule.budget, ("adaptive", "fixed")),
        ("weights", rule.weights, ("linear", "none", "shuffled", *SHAPES)),
    ):
        message = f"cppo: {name} is {value!r}, expected one of {', '.join(known)}.{nearest(value, known)}"
        require(value in known, message)
    require(
        isinstance(rule.prefix_budget, bool),
        f"cppo: prefix_budget is {rule.prefix_budget!r}, expected true or false.",
    )
    require(isinstance(rule.seed, int), f"cppo: seed is {rule.seed!r}, expected an integer.")
    require_divergence(rule.name, rule.divergence)
    require_cap(rule.name, rule.ratio_cap)
    resolve(rule.gate)
