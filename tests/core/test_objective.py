"""The one loss: its gradient, where gradients may flow, and the aggregation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cppo

from .cases import CASES, NEEDS_DIVERGENCE, gradient, make, pack, pad, random_responses

every_case = pytest.mark.parametrize("case", CASES)


@every_case
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), lengths=st.lists(st.integers(1, 15), min_size=1, max_size=4))
def test_gradient_is_minus_c_times_a(case: str, seed: int, lengths: list[int]) -> None:
    """d l_t / d log pi = -c_t A_t, and the value is -c_t A_t log pi."""
    responses = random_responses(seed, lengths, 0.4, 0.2, token_advantages=True)
    for lay in (pad, pack):
        batch = lay(responses, grad=True)
        loss, grad, verdict = gradient(batch, make(case))
        inside = batch.tokens.mask
        a = batch.tokens.token_advantages()
        want = -(verdict.coefficient * a)[inside]
        torch.testing.assert_close(grad[inside], want, rtol=1e-6, atol=0)
        torch.testing.assert_close(loss[inside], want * batch.tokens.policy_logp.detach()[inside], rtol=1e-6, atol=0)
        assert (loss[~inside] == 0).all() and (grad[~inside] == 0).all()


#: Rules whose coefficient is M_t rho_t with M detached: the textbook surrogate with a differentiable ratio.
RATIO_WEIGHTED = [c for c in CASES if not c.startswith(("cispo", "minpro")) and "capped" not in c]


@pytest.mark.parametrize("case", RATIO_WEIGHTED)
def test_equals_autograd_through_the_ratio(case: str) -> None:
    """-A rho M with rho = exp(log pi - log mu) differentiable and M = c / rho: the same gradient."""
    for seed in range(5):
        responses = random_responses(seed, [21, 8], 0.4)
        batch = pad(responses, grad=True)
        inside = batch.tokens.mask
        verdict = make(case)(batch.tokens)
        policy = batch.tokens.policy_logp
        rho = (policy - batch.tokens.rollout_logp).exp()
        mask = (verdict.coefficient / rho).detach()
        surrogate = torch.where(inside, -batch.tokens.token_advantages() * rho * mask, 0.0)
        (want,) = torch.autograd.grad(surrogate.sum(), policy)
        _, grad, _ = gradient(batch, make(case))
        torch.testing.assert_close(grad, want, rtol=2e-6, atol=1e-7)


def test_ppo_clip_equals_autograd_of_the_clipped_surrogate() -> None:
    """max(-A r, -A clip(r)), with the dual clip min(., -A c) for A < 0; away from its corners."""
    for seed in range(10):
        responses = random_responses(seed, [30], 0.5)
        batch = pad(responses, grad=True)
        policy, a = batch.tokens.policy_logp, batch.tokens.token_advantages()
        r = (policy - batch.tokens.rollout_logp).exp()
        for low, high, dual in ((0.2, 0.28, None), (0.2, 0.2, None), (0.2, 0.28, 1.5)):
            surrogate = torch.maximum(-a * r, -a * r.clamp(1 - low, 1 + high))
            if dual is not None:
                surrogate = torch.where(a < 0, torch.minimum(surrogate, -a * dual), surrogate)
            (want,) = torch.autograd.grad(surrogate.sum(), policy, retain_graph=True)
            _, grad, _ = gradient(batch, cppo.PPOClip(low, high, dual))
            torch.testing.assert_close(grad, want, rtol=2e-6, atol=1e-7)


@every_case
def test_gradient_flows_through_the_policy_alone(case: str) -> None:
    g = torch.Generator().manual_seed(0)
    policy, rollout = ((-torch.rand(3, 6, generator=g) - 0.1).requires_grad_() for _ in range(2))
    advantages = torch.randn(3, generator=g).requires_grad_()
    divergence = (torch.rand(3, 6, generator=g) * 0.2).requires_grad_() if case in NEEDS_DIVERGENCE else None
    batch = cppo.TokenBatch(policy, rollout, advantages, torch.ones(3, 6), divergence=divergence)
    verdict = make(case)(batch)
    for name in ("coefficient", "divergence", "threshold", "delta_b", "budget_used"):
        value = getattr(verdict, name)
        assert value is None or not value.requires_grad, name
    inputs = [x for x in (policy, rollout, advantages, divergence) if x is not None]
    loss = cppo.token_loss(batch, verdict.coefficient).sum()
    first, *others = torch.autograd.grad(loss, inputs, allow_unused=True)
    assert first is not None
    assert all(o is None or (o == 0).all() for o in others)


def test_the_ratio_is_clamped_from_above_only() -> None:
    """rho = e^20 at most; e^-95 is e^-95 (0 in float32 is fine, but no floor)."""
    policy = torch.tensor([[-1.0, -1.0, -96.0, -31.0]], dtype=torch.float64)
    rollout = torch.tensor([[-96.0, -20.5, -1.0, -1.0]], dtype=torch.float64)
    batch = cppo.TokenBatch(policy, rollout, torch.ones(1), torch.ones(1, 4))
    got = cppo.NoTrustRegion()(batch).coefficient
    want = torch.tensor([[20.0, 19.5, -95.0, -30.0]], dtype=torch.float64).exp()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_a_policy_that_gave_a_token_up() -> None:
    """log pi = -inf at a loss token: rho = 0, no gradient, no NaN."""
    for case in CASES:
        name, _ = CASES[case]
        if name in ("minpro", "cispo") and make(case).parameters().get("ratio_min", 1.0) > 0:
            continue  # their weight has a floor, so the loss is honestly infinite
        policy = torch.tensor([[-1.0, -math.inf, -0.7]], requires_grad=True)
        batch = cppo.TokenBatch(policy, torch.tensor([[-1.1, -0.5, -0.9]]), torch.ones(1), torch.ones(1, 3))
        loss = cppo.token_loss(batch, make(case)(batch).coefficient)
        (grad,) = torch.autograd.grad(loss.sum(), policy)
        assert loss.isfinite().all() and grad.isfinite().all() and grad[0, 1] == 0, case


# ---------------------------------------------------------------------------------------------------------- aggregation


def slow_aggregate(rows: list[Tensor], masks: list[Tensor], how: str, horizon: int) -> float:
    """Loops over responses; those without loss tokens are in no denominator."""
    pairs = [(r.double(), m) for r, m in zip(rows, masks, strict=True) if m.any()]
    if not pairs:
        return 0.0
    if how == "token-mean":
        return sum(r[m].sum().item() for r, m in pairs) / sum(int(m.sum()) for _, m in pairs)
    if how == "seq-mean-token-mean":
        return sum(r[m].mean().item() for r, m in pairs) / len(pairs)
    total = sum(r[m].sum().item() for r, m in pairs) / len(pairs)
    return total / horizon if how == "seq-mean-token-sum-norm" else total


HOWS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("case", ["dppo", "cppo adaptive", "none"])
def test_aggregate(case: str, how: Any) -> None:
    """Padded = packed = loops: rejected tokens stay in every denominator, padding and dropped responses do not."""
    for seed in range(4):
        responses = random_responses(seed, [12, 7, 4, 9], 0.4, 0.3)
        responses[2].mask[:] = False  # a group without spread, filtered out
        values = []
        for batch in (
            pad(responses, grad=True),
            pad(responses, left=3, right=5, grad=True),
            pack(responses, grad=True),
        ):
            loss = cppo.token_loss(batch.tokens, make(case)(batch.tokens).coefficient)
            total = cppo.aggregate(loss, batch.tokens, how, horizon=32)
            want = slow_aggregate(batch.split(loss.detach()), [r.mask for r in responses], how, 32)
            assert total.shape == () and total.item() == pytest.approx(want, rel=1e-5, abs=1e-6)
            (grad,) = torch.autograd.grad(total, batch.tokens.policy_logp)
            values.append(torch.cat(batch.split(grad)))
        for value in values[1:]:
            torch.testing.assert_close(value, values[0], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("how", HOWS)
def test_aggregate_without_any_loss_token(how: Any) -> None:
    """Every group was dropped: 0 with a zero gradient, not NaN."""
    policy = torch.full((2, 3), -1.0, requires_grad=True)
    batch = cppo.TokenBatch(policy, torch.full((2, 3), -1.0), torch.ones(2), torch.zeros(2, 3))
    loss = cppo.token_loss(batch, cppo.CPPO(divergence="binary_tv")(batch).coefficient)
    total = cppo.aggregate(loss, batch, how, horizon=8)
    (grad,) = torch.autograd.grad(total, policy)
    assert total.item() == 0 and (grad == 0).all()


def test_aggregate_refuses() -> None:
    batch = pad(random_responses(0, [3])).tokens
    loss = cppo.token_loss(batch, cppo.NoTrustRegion()(batch).coefficient)
    with pytest.raises(ValueError, match="token-mean"):
        cppo.aggregate(loss, batch, "mean")  # type: ignore[arg-type]
    for horizon in (None, 0, -1):
        with pytest.raises(ValueError, match="horizon"):
            cppo.aggregate(loss, batch, "seq-mean-token-sum-norm", horizon=horizon)
