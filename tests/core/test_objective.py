"""The one loss: its gradient, where gradients may flow, the aggregation; and `metrics()` against NumPy loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cppo
from cppo import Reason

from .cases import CASES, NEEDS_DIVERGENCE, Batch, gradient, make, pack, pad, random_responses

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


# -- metrics -----------------------------------------------------------------------------------------------------------

HELD = (Reason.TOKEN_LIMIT, Reason.PREFIX_BUDGET, Reason.SEQUENCE_LIMIT, Reason.RATIO_CLIP, Reason.CLAMPED)


def slow(batch: Batch, verdict: Any) -> dict[str, float]:
    """The definitions, a response at a time."""
    masks = [r.mask.numpy() for r in batch.responses]

    def rows(x: Tensor) -> list[Any]:
        split = batch.split(x.expand(verdict.reason.shape))
        return [row.double().numpy()[m] for row, m in zip(split, masks, strict=True)]

    reasons, coefficients = rows(verdict.reason), rows(verdict.coefficient)
    ratios = [
        (r.policy.double() - r.rollout.double()).clamp(max=20).exp().numpy()[m]
        for r, m in zip(batch.responses, masks, strict=True)
    ]
    flat = np.concatenate(reasons)
    out = {f"{reason.name.lower()}_fraction": float((flat == reason).mean()) for reason in Reason}
    del out["outside_fraction"]
    out["masked_fraction"] = float((np.concatenate(coefficients) == 0).mean())
    out["ratio_mean"], out["ratio_max"] = np.concatenate(ratios).mean(), np.concatenate(ratios).max()
    if verdict.divergence is not None:
        d = np.concatenate(rows(verdict.divergence))
        out |= {"divergence_mean": d.mean(), "divergence_p90": np.quantile(d, 0.9), "divergence_max": d.max()}
    filled = [i for i, m in enumerate(masks) if m.any()]
    for name in ("delta_b", "budget_used"):
        value = getattr(verdict, name)
        if value is not None:
            out[name] = float(np.mean([value[i].item() for i in filled]))
    first = [1 + int(np.isin(r, HELD).argmax()) for r in reasons if np.isin(r, HELD).any()]
    out["held_responses_fraction"] = len(first) / max(len(filled), 1)
    if first:
        out["first_rejected_position"] = float(np.mean(first))
    if verdict.capped is not None:
        out["capped_fraction"] = float(np.concatenate(rows(verdict.capped)).mean())
    return {f"trust/{key}": float(value) for key, value in out.items()}


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    holes=st.sampled_from([0.0, 0.3]),
    empty=st.booleans(),
)
def test_equals_numpy_padded_and_packed(case: str, seed: int, lengths: list[int], holes: float, empty: bool) -> None:
    responses = random_responses(seed, lengths, 0.4, holes)
    responses[0].mask[0] = True
    responses[0].policy[0], responses[0].rollout[0] = -1.0, -1.1
    if empty and len(responses) > 1:
        responses[1].mask[:] = False
    seen = []
    for batch in (pad(responses, left=1, right=2, garbage=float("nan")), pack(responses)):
        verdict = make(case)(batch.tokens)
        got = cppo.metrics(batch.tokens, verdict)
        want = slow(batch, verdict)
        assert got.keys() == want.keys()
        for key, value in want.items():
            assert isinstance(got[key], float)
            assert got[key] == pytest.approx(value, rel=2e-5, abs=1e-6), key
        seen.append(got)
    for key in seen[0]:  # a token at a limit may fall either way between layouts: then the fractions jump by a token
        tokens = sum(int(r.mask.sum()) for r in responses)
        if key.endswith("fraction"):
            assert seen[0][key] == pytest.approx(seen[1][key], abs=1.01 / tokens), key


@pytest.mark.parametrize("case", CASES)
def test_fractions_add_up(case: str) -> None:
    batch = pad(random_responses(1, [40, 20], 0.4, 0.2)).tokens
    got = cppo.metrics(batch, make(case)(batch))
    reasons = [f"trust/{r.name.lower()}_fraction" for r in Reason if r != Reason.OUTSIDE]
    assert sum(got[key] for key in reasons) == pytest.approx(1)
    if CASES[case][0] not in ("cispo", "minpro") and "soft" not in case:  # these three reduce, they do not drop
        dropped = sum(got[f"trust/{r.name.lower()}_fraction"] for r in HELD)
        assert got["trust/masked_fraction"] == pytest.approx(dropped)


def test_first_update() -> None:
    """The divergence before any step on a rollout batch: 0 where sampler and trainer agree, else their mismatch."""
    for scale, low, high in ((0.0, 0.0, 1e-7), (0.01, 1e-4, 1e-2)):
        batch = pad(random_responses(3, [50, 20], scale)).tokens
        verdict = make("cppo adaptive")(batch)
        got = cppo.metrics(batch, verdict, first_update=True)
        assert low <= got["trust/first_update_divergence"] <= high
        assert got["trust/first_update_divergence"] == got["trust/divergence_mean"]
        assert "trust/first_update_divergence" not in cppo.metrics(batch, verdict)


@pytest.mark.parametrize("case", ["none", *NEEDS_DIVERGENCE])
def test_reduced_over_processes(case: str) -> None:
    """Two processes with half the responses each report what one process with all of them does (P90 is an average)."""
    responses = random_responses(4, [30, 12, 25, 9], 0.4, 0.2)
    rule = make(case)
    halves = [pad(responses[:2]).tokens, pack(responses[2:]).tokens]
    sent: list[tuple[Tensor, Tensor]] = []

    def record(sums: Tensor, maxima: Tensor) -> tuple[Tensor, Tensor]:
        sent.append((sums.clone(), maxima.clone()))
        return sums, maxima

    alone = [cppo.metrics(half, rule(half), reduce=record) for half in halves]
    sums, maxima = sent[0][0] + sent[1][0], torch.maximum(sent[0][1], sent[1][1])
    whole = pad(responses).tokens
    want = cppo.metrics(whole, rule(whole))
    for half in halves:
        got = cppo.metrics(half, rule(half), reduce=lambda *_: (sums, maxima))
        assert got.keys() == want.keys()
        for key in want:
            if key != "trust/divergence_p90":
                assert got[key] == pytest.approx(want[key], rel=1e-5, abs=1e-9), key
            else:
                low, high = sorted(a[key] for a in alone)
                assert low <= got[key] <= high


def test_a_batch_without_loss_tokens() -> None:
    """All groups dropped: zeros, no division by zero, no NaN."""
    for lay in (pad, pack):
        responses = random_responses(5, [6, 3], 0.3)
        for r in responses:
            r.mask[:] = False
        for case in CASES:
            batch = lay(responses).tokens
            got = cppo.metrics(batch, make(case)(batch))
            assert all(np.isfinite(value) for value in got.values())
            assert got["trust/masked_fraction"] == 0 and "trust/first_rejected_position" not in got
