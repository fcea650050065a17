"""Thresholds from data: against counting tokens one by one, and against the rules themselves."""

from __future__ import annotations

import math

import pytest
import torch

import cppo
from cppo.dumps.propose import away_tokens, divergences_of, masked_fractions, propose, token_limit, translate
from cppo.errors import UserError


def batch(rows: int = 64, length: int = 80, drift: float = 0.4, seed: int = 0) -> cppo.TokenBatch:
    """Padded responses whose divergence from mu grows along them; NaN in the padding."""
    g = torch.Generator().manual_seed(seed)
    rollout = -torch.rand(rows, length, generator=g) * 2.5 - 0.02
    growth = torch.linspace(0.2, 1.5, length)
    policy = (rollout + drift * growth * torch.randn(rows, length, generator=g)).clamp(max=-1e-3)
    mask = torch.arange(length)[None] < torch.randint(length // 3, length + 1, (rows, 1), generator=g)
    policy = torch.where(mask, policy, float("nan"))
    found = cppo.TokenBatch(policy, rollout, torch.randn(rows, generator=g), mask)
    return found.with_divergence(divergences_of(found)["binary_tv"])


def dropped_by_dppo(b: cppo.TokenBatch, D: torch.Tensor, delta: float) -> float:
    """A token at a time."""
    count = total = 0
    for row in range(b.policy_logp.shape[0]):
        for t in range(b.policy_logp.shape[1]):
            if b.loss_mask[row, t]:
                total += 1
                change = float(b.policy_logp[row, t] - b.rollout_logp[row, t])
                count += float(b.advantages[row]) * change > 0 and float(D[row, t]) > delta
    return count / total


@pytest.mark.parametrize("share", [0.002, 0.01, 0.1, 0.3])
def test_token_limit_is_the_limit_of_that_share(share: float) -> None:
    b = batch()
    assert b.divergence is not None
    tokens = int(b.loss_mask.sum())
    delta = token_limit(b.clean(b.divergence), away_tokens(b), tokens, share)
    assert dropped_by_dppo(b, b.divergence, delta) == pytest.approx(round(share * tokens) / tokens, abs=1e-12)
    reason = cppo.DPPO(delta=delta)(b).reason
    assert int((reason == cppo.Reason.TOKEN_LIMIT).sum()) == round(share * tokens)


@pytest.mark.parametrize("target", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("budget", ["fixed", "adaptive"])
def test_proposal_holds_back_the_target(target: float, budget: str) -> None:
    b = batch()
    found = propose(b, target, cppo.CPPO(budget=budget))
    rule = cppo.CPPO(delta=found.delta, delta_b=found.delta_b, budget=budget)
    assert masked_fractions(rule, b) == (found.token_limit, found.prefix_budget)
    assert found.masked <= target and found.masked == pytest.approx(target, rel=0.15)
    assert found.binds and found.token_limit > 0 and found.prefix_budget > 0
    # a smaller budget holds back more, so delta_b is the smallest that does not exceed the target
    tighter = cppo.CPPO(delta=found.delta, delta_b=0.98 * found.delta_b, budget=budget)
    assert sum(masked_fractions(tighter, b)) >= found.masked


def test_parts_of_the_target_and_settings_that_are_kept() -> None:
    b = batch()
    mostly = propose(b, 0.05, by_token=0.9)
    evenly = propose(b, 0.05, by_token=0.5)
    assert mostly.delta < evenly.delta and mostly.delta_b > evenly.delta_b
    assert propose(b, 0.05, cppo.CPPO(w_min=0.5)).w_min == 0.5


def test_a_budget_that_cannot_bind_is_said() -> None:
    """Responses of one token have no prefix."""
    g = torch.Generator().manual_seed(0)
    rollout = -torch.rand(400, 1, generator=g) - 0.1
    policy = (rollout + 0.3 * torch.randn(400, 1, generator=g)).clamp(max=-1e-3)
    b = cppo.TokenBatch(policy, rollout, torch.randn(400, generator=g), torch.ones(400, 1, dtype=torch.bool))
    found = propose(b.with_divergence(divergences_of(b)["binary_tv"]), 0.1)
    assert not found.binds and found.prefix_budget == 0 and found.token_limit == pytest.approx(0.05, abs=0.003)


def test_translated_limits_drop_the_same_share() -> None:
    b = batch(seed=3)
    kinds = divergences_of(b)
    limits, clip = translate(b, kinds, "binary_tv", 0.12)
    share = dropped_by_dppo(b, kinds["binary_tv"], 0.12)
    assert limits["binary_tv"] == 0.12
    assert dropped_by_dppo(b, kinds["binary_kl"], limits["binary_kl"]) == pytest.approx(share, abs=1e-12)
    assert clip.eps_low is not None and clip.eps_high is not None
    verdict = cppo.PPOClip(eps_low=clip.eps_low, eps_high=clip.eps_high)(b)
    clipped = int((verdict.reason == cppo.Reason.RATIO_CLIP).sum()) / int(b.loss_mask.sum())
    assert clipped == pytest.approx(share, abs=1.5 / int(b.loss_mask.sum()))


def test_packed_as_padded() -> None:
    b = batch()
    assert b.divergence is not None
    flat = [x[b.loss_mask] for x in (b.policy_logp, b.rollout_logp, b.divergence)]
    lengths = b.loss_mask.sum(1)
    ends = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()])
    ones = torch.ones(int(ends[-1]), dtype=torch.bool)
    packed = cppo.TokenBatch(flat[0], flat[1], b.advantages, ones, cu_seqlens=ends, divergence=flat[2])
    one, other = propose(b, 0.05), propose(packed, 0.05)
    assert one.delta == pytest.approx(other.delta, rel=1e-6) and one.delta_b == pytest.approx(other.delta_b, rel=2e-3)


def test_what_cannot_be_is_a_sentence() -> None:
    b = batch(rows=4, length=9)
    for target, words in ((0.0, "expected shares"), (1.5, "expected shares"), (1e-6, "less than one token")):
        with pytest.raises(UserError, match=words):
            propose(b, target)
    with pytest.raises(UserError, match="move away from"):
        propose(b, 0.95, by_token=1.0)
    with pytest.raises(UserError, match="no divergence"):
        propose(cppo.TokenBatch(b.policy_logp, b.rollout_logp, b.advantages, b.loss_mask))
    with pytest.raises(UserError, match="the reference is 'exact_tv'"):
        translate(b, divergences_of(b), "exact_tv", 0.1)
    with pytest.raises(UserError, match="no loss token"):
        propose(
            cppo.TokenBatch(
                b.policy_logp, b.rollout_logp, b.advantages, torch.zeros_like(b.loss_mask), divergence=b.divergence
            )
        )
    assert math.isfinite(propose(b, 0.2).delta)
