"""The interval of the exact TV that k classes give, and what its upper end certifies."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cppo import divergence, theory
from cppo.theory import make_schedule, topk_interval

from . import reference
from .cases import CHUNK, at_most, every_chunk, instance, problems


def interval(mu: list[float], pi: list[float], k: int) -> tuple[float, float]:
    """The formulas by loops: the k likeliest tokens of mu, the first of equal ones, and the rest in one class."""
    inside = sorted(range(len(mu)), key=lambda v: -mu[v])[:k]
    rest_mu = math.fsum(m for v, m in enumerate(mu) if v not in inside)
    rest_pi = math.fsum(p for v, p in enumerate(pi) if v not in inside)
    lower = (math.fsum(abs(mu[v] - pi[v]) for v in inside) + abs(rest_mu - rest_pi)) / 2
    return lower, lower + min(rest_mu, rest_pi)


@given(seed=st.integers(0, 10**6), V=st.integers(1, 12), k=st.integers(1, 14), scale=st.floats(0.01, 5))
def test_the_interval_by_loops(seed: int, V: int, k: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    mu = rng.dirichlet(np.ones(V), size=3)
    pi = mu * np.exp(scale * rng.standard_normal((3, V)))
    pi /= pi.sum(1, keepdims=True)
    lower, upper = topk_interval(mu, pi, k)
    for row in range(3):
        want = interval(mu[row].tolist(), pi[row].tolist(), k)
        assert (lower[row], upper[row]) == pytest.approx(want, rel=1e-12, abs=1e-15)
    assert upper.max() <= 1


@every_chunk
def test_the_exact_tv_is_inside(chunk: int) -> None:
    """And more classes narrow the interval, until it is one number."""
    for p in problems(chunk):
        for D, mu, pi in zip(p.divergence, p.rollout, p.policy, strict=True):
            narrower = np.zeros_like(D), np.ones_like(D)
            for k in range(1, p.vocabulary + 1):
                lower, upper = topk_interval(mu, pi, k)
                assert at_most(lower, D) and at_most(D, upper)
                assert at_most(narrower[0], lower) and at_most(upper, narrower[1])
                narrower = lower, upper
            assert lower == pytest.approx(D, rel=1e-12, abs=1e-15) and upper == pytest.approx(D, rel=1e-12, abs=1e-15)


@every_chunk
def test_thresholds_that_the_upper_end_satisfies(chunk: int) -> None:
    """Hold for the exact TV: the constraints of Theorem 1 and of rule (8), and so the bounds."""
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        case, p = instance(seed)
        T, xi = p.horizon, p.xi
        pairs = [topk_interval(mu, pi, 1) for mu, pi in zip(p.rollout, p.policy, strict=True)]
        repeats = [p.vocabulary ** (T - t) for t in range(T)]
        above = np.stack([np.repeat(upper, n) for (_, upper), n in zip(pairs, repeats, strict=True)], axis=1)
        w_min = 0.3 if seed % 2 else 0.8
        w = make_schedule("linear", T, w_min)
        W = w.cumsum()
        Z = (w * above)[p.reachable]
        S = Z.cumsum(1)
        delta, delta_b = float(Z.max()), float((S / W)[:, :-1].max())
        rule_delta_b = max(0.0, float(((S[:, 1:] - delta) / W[:-1]).max()))
        c, bit = p.constraints(w), 1 + 1e-12
        assert c.delta <= delta * bit and c.delta_b <= delta_b * bit
        given_ = reference.paths(case, w.tolist())
        assert reference.obeys_theorem_1(given_, delta * bit, delta_b * bit)
        assert reference.obeys_rule_8(given_, delta * bit, rule_delta_b * bit + 1e-12 * delta)
        L = min(1.0, delta / w_min)
        spent = theory.coefficients(T, L, xi=xi) @ p.expected_divergence
        assert at_most(spent, theory.theorem_1(T, delta_b, L, weights=w, xi=xi), xi)
        assert at_most(abs(p.residual), theory.tightest_residual(w, delta * bit, delta_b * bit, xi=xi).bound, xi)


def test_the_lower_end_certifies_nothing() -> None:
    """Two tokens beyond the first class change places: top-1 TV is 0, the exact one 0.4. An upper end is at most 1."""
    mu, pi = [0.5, 0.45, 0.05], [0.5, 0.05, 0.45]
    assert topk_interval(mu, pi, 1) == (0.0, 0.5)
    assert topk_interval(mu, pi, 3)[0] == pytest.approx(0.4)
    assert topk_interval([0.4, 0.3, 0.3], [0.0, 0.5, 0.5], 1) == pytest.approx((0.4, 1.0))


@pytest.mark.parametrize("k", [1, 3])
def test_as_in_training(k: int) -> None:
    """`cppo.divergence.topk_tv_upper`, which training computes from log-probabilities, where y_t is among the k."""
    rng = np.random.default_rng(k)
    mu, pi = rng.dirichlet(np.ones(6), size=50), rng.dirichlet(np.ones(6), size=50)
    ids = torch.from_numpy(np.argsort(-mu, axis=1)[:, :k].copy())
    log_mu, log_pi = torch.from_numpy(mu).log().gather(1, ids), torch.from_numpy(pi).log().gather(1, ids)
    inside = torch.ones(50, dtype=torch.bool)
    found = divergence.topk_tv_upper(log_pi, log_mu, log_pi[:, 0], log_mu[:, 0], inside)
    assert found.numpy() == pytest.approx(topk_interval(mu, pi, k)[1], abs=1e-6)
