"""Thresholds from data: delta, delta_b for a target masked fraction, and limits of other divergences that correspond.

All from one batch of responses with measured divergences: which tokens a rule would have held back there. A run that is
trained under other thresholds moves differently, so these are the thresholds to start from; docs/inspect.md.

* `token_limit`: the delta at which a share f of the loss tokens moves away from mu with w_t D_t > delta: a quantile.
* `propose`: delta for a part of the target by the token limit, then delta_b, by bisection, for the rest by the prefix
  budget. The masked fraction never grows with either.
* `translate`: for each divergence the limit that drops the share of tokens which another one's limit drops, and the
  clip range of the ratio that drops it, for each sign of the advantage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cppo import divergence
from cppo.dumps.dump import Dump
from cppo.dumps.inspect import last_update
from cppo.dumps.scores import Scores
from cppo.errors import UserError
from cppo.rules import CPPO, Reason
from cppo.rules.base import moves_away
from cppo.tokens import TokenBatch

#: delta_b between which `propose` looks, as shares of delta: below the first the budget is nothing but delta itself.
SMALLEST_SHARE, LARGEST_SHARE = 1e-4, 10.0


@dataclass(frozen=True)
class Proposal:
    """Thresholds for CPPO, and what they would have held back on the batch, as shares of the loss tokens.

    binds : whether the prefix budget holds back anything at these thresholds. Where it does not, even the smallest
    delta_b that was tried, a ten-thousandth of delta, holds back no more: the responses are too short or too close to
    mu.
    """

    delta: float
    delta_b: float
    w_min: float
    target: float
    token_limit: float
    prefix_budget: float
    binds: bool

    @property
    def masked(self) -> float:
        """The whole masked fraction."""
        return self.token_limit + self.prefix_budget


@dataclass(frozen=True)
class ClipRange:
    """eps of PPO's clip: the share of loss tokens with A > 0 and rho > 1 + eps_high is the reference's share with
    A > 0, likewise below. None: the reference drops no token of that sign, or all that move that way.
    """

    eps_low: float | None
    eps_high: float | None


def away_tokens(batch: TokenBatch) -> Tensor:
    """Loss tokens that move away from mu, sign(A_t) (rho_t - 1) > 0: bool, shape of the tokens."""
    return moves_away(batch.token_advantages(), batch.log_ratio()) & batch.loss_mask


def token_limit(score: Tensor, away: Tensor, tokens: int, share: float) -> float:
    """The limit that `share` of all `tokens` exceed by moving away with a larger score.

    It lies halfway between the two scores that it separates.

    Raises
    ------
    UserError : fewer tokens than that move away, or none would be dropped.
    """
    values = score[away].double().sort(descending=True).values
    count = round(share * tokens)
    if count < 1:
        raise UserError(
            f"{share:.3g} of {tokens} loss tokens is less than one token: give more responses or a larger target."
        )
    if count >= values.numel():
        raise UserError(
            f"the target is {share:.3g} of the loss tokens, and {values.numel() / max(tokens, 1):.3g} move away from "
            "the rollout policy at all: set a smaller target (a trust region drops none of the others)."
        )
    return float((values[count - 1] + values[count]) / 2)


def masked_fractions(rule: CPPO, batch: TokenBatch) -> tuple[float, float]:
    """(by the token limit, by the prefix budget): shares of the loss tokens that the rule holds back."""
    reason = rule(batch).reason
    tokens = max(int(batch.loss_mask.sum()), 1)
    return tuple(int((reason == code).sum()) / tokens for code in (Reason.TOKEN_LIMIT, Reason.PREFIX_BUDGET))  # type: ignore[return-value]


@torch.no_grad()
def propose(batch: TokenBatch, target: float = 0.01, rule: CPPO | None = None, by_token: float = 0.5) -> Proposal:
    """delta and delta_b with which the rule holds back a share `target` of the loss tokens of the batch.

    Parameters
    ----------
    batch : with its divergence; as many responses as there are. target : in (0, 1).
    rule : what else of CPPO to keep (w_min, weights, kind of budget ...); default CPPO(). by_token : which part of the
        target the token limit takes; the rest is the prefix budget's.

    Raises
    ------
    UserError : a target outside of (0, 1), no divergence, no token, or a target that the tokens cannot give.
    """
    if not 0 < target < 1 or not 0 < by_token <= 1:
        raise UserError(f"target is {target} and by_token {by_token}: expected shares, such as 0.01 and 0.5.")
    if batch.divergence is None:
        raise UserError("the batch carries no divergence: give it one (TokenBatch(..., divergence=D)).")
    rule = rule or CPPO()
    tokens = int(batch.loss_mask.sum())
    if tokens == 0:
        raise UserError("the batch has no loss token.")
    weight, _, _ = rule.position_weights(batch)
    score = batch.clean(weight * batch.divergence.to(weight.dtype))
    delta = token_limit(score, away_tokens(batch), tokens, by_token * target)
    rule = replace(rule, delta=delta)

    def at(share: float) -> tuple[float, float]:
        return masked_fractions(replace(rule, delta_b=share * delta), batch)

    low, high = SMALLEST_SHARE, LARGEST_SHARE
    if sum(at(low)) <= target:
        high = low  # even the smallest budget drops no more
    while high > 1.001 * low:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if sum(at(middle)) > target else (low, middle)
    by_limit, by_budget = at(high)
    return Proposal(delta, high * delta, rule.w_min, target, by_limit, by_budget, by_budget > 0)


@torch.no_grad()
def translate(
    batch: TokenBatch, divergences: Mapping[str, Tensor], reference: str, limit: float
) -> tuple[dict[str, float], ClipRange]:
    """({divergence: limit that drops the same share of tokens}, clip range of the ratio), for a limit of `reference`.

    divergences : D_t by name, shape of the tokens. The rule is DPPO's: away from mu and D_t above the limit.

    Raises
    ------
    UserError : `reference` is not among the divergences, or its limit drops no token or all that move away.
    """
    if reference not in divergences:
        raise UserError(f"the reference is {reference!r}, and there are {', '.join(divergences) or 'no divergences'}.")
    away, tokens = away_tokens(batch), int(batch.loss_mask.sum())
    dropped = away & (batch.clean(divergences[reference]) > limit)
    share = int(dropped.sum()) / max(tokens, 1)
    limits = {
        name: limit if name == reference else token_limit(batch.clean(D), away, tokens, share)
        for name, D in divergences.items()
    }
    log_ratio, positive = batch.log_ratio(), batch.token_advantages() > 0

    def side(sign: float) -> float | None:
        chosen = away & (positive if sign > 0 else ~positive)
        part = int((dropped & chosen).sum()) / max(tokens, 1)
        if part == 0:
            return None
        try:
            edge = token_limit(sign * log_ratio, chosen, tokens, part)
        except UserError:
            return None
        return abs(float(torch.tensor(sign * edge, dtype=torch.float64).expm1()))

    return limits, ClipRange(side(-1.0), side(1.0))


def divergences_of(batch: TokenBatch) -> dict[str, Tensor]:
    """What the sampled tokens alone give: binary TV and KL, shape of the tokens."""
    logp = batch.clean(batch.policy_logp), batch.clean(batch.rollout_logp)
    return {"binary_tv": divergence.binary_tv(*logp), "binary_kl": divergence.binary_kl(*logp)}


def calibrate_dump(dump: Dump, target: float, rule: CPPO | None = None, delta: float | None = None) -> dict[str, Any]:
    """What `cppo calibrate` says of a dump (`cppo.dumps.dump.read_dump`), as plain numbers.

    Parameters
    ----------
    target : masked fraction to aim at. rule : as in `propose`. delta : translate this limit of the dump's divergence
        instead of the proposed one.

    Returns
    -------
    "divergence": the one that the thresholds are for (the dump's own, else top-K TV, else binary TV); "proposal" with
    the numbers of `Proposal`, and "dppo_delta", the uniform limit for the whole target; "limits" of every divergence
    that can be computed, for the limit "delta", and "clip" with "eps_low" and "eps_high"; "notes".

    Raises
    ------
    UserError : as `propose` and `translate`; the dump has no advantages.
    """
    notes = list(dump.notes)
    if dump.excerpt:
        notes.append(
            "thresholds from responses that were chosen because tokens were held back in them are too loose: export "
            "whole batches (dump_observer, docs/inspect.md)."
        )
    dump = last_update(dump)
    dump = dump.select(dump.loss_tokens > 0)
    scores = Scores(dump)
    name, D = scores.main()
    batch = dump.packed(D)
    found = propose(batch, target, rule)
    kinds = {"binary_tv", "binary_kl"} | ({"topk_tv", "topk_kl"} if dump.topk_ids is not None else set())
    divergences = {kind: torch.from_numpy(scores.computed(kind)[1]) for kind in sorted(kinds)}
    divergences[name] = torch.from_numpy(D)
    limit = found.delta if delta is None else delta
    limits, clip = translate(batch, divergences, name, limit)
    tokens = int(batch.loss_mask.sum())
    return {
        "dump": str(dump.path),
        "responses": len(dump.lengths),
        "loss_tokens": tokens,
        "divergence": name,
        "proposal": asdict(found) | {"masked": found.masked},
        "dppo_delta": token_limit(batch.clean(torch.from_numpy(D)), away_tokens(batch), tokens, target),
        "delta": limit,
        "limits": limits,
        "clip": asdict(clip),
        "notes": notes,
    }
