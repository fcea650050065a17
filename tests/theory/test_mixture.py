"""The policy behind the soft gate: what its gates guarantee, and the guarantee that the paper's does not give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cppo import theory
from cppo.theory import TabularProblem, causal_gate, make_schedule, mixture, paper_gate
from cppo.theory.mixtures import reciprocal

from .cases import CHUNK, at_most, constant_divergence, every_chunk, instance, rows_of


def along(p: TabularProblem, levels: Any) -> np.ndarray:
    """A number a state -> ``[V^T, T]``."""
    return np.stack([np.repeat(x, p.vocabulary ** (p.horizon - t)) for t, x in enumerate(levels)], axis=1)


def thresholds(seed: int) -> tuple[TabularProblem, np.ndarray, float, float]:
    """A problem, weights, and thresholds that it violates (those that it satisfies, divided); delta_b may be 0."""
    p = instance(seed)[1]
    rng = np.random.default_rng(seed)
    w = make_schedule(rng.choice(list(theory.SCHEDULES)), p.horizon, float(rng.uniform(0.2, 1)))
    c = p.constraints(w)
    return p, w, c.delta / float(rng.uniform(1, 5)), c.delta_b * float(rng.choice([0.0, rng.uniform(0, 1)]))


def by_loops(p: TabularProblem, w: np.ndarray, delta: float, delta_b: float, causal: bool) -> list[list[float]]:
    """Both gates prefix by prefix, each from its own walk along the tokens before it."""
    found = []
    for t in range(p.horizon):
        level = []
        for s in rows_of(p.vocabulary, t):
            S = W = spent = g = 0.0
            row = 0
            for i in range(t + 1):
                z = float(w[i] * p.divergence[i][row])
                S += z
                budget = delta + delta_b * W
                if causal:
                    g = min(1.0, delta / z, max(0.0, budget - spent) / z) if z > 0 else 1.0
                else:
                    g = reciprocal(max(z / delta, S / budget))
                spent += g * z
                W += float(w[i])
                row = row * p.vocabulary + s[i] if i < t else row
            level.append(g)
        found.append(level)
    return found


@pytest.mark.parametrize("causal", [False, True])
def test_gates_by_loops(causal: bool) -> None:
    gated = 0
    for seed in range(0, 320, 8):
        p, w, delta, delta_b = thresholds(seed)
        if p.vocabulary**p.horizon > 800:
            continue
        gate = causal_gate if causal else paper_gate
        for found, want in zip(gate(p, w, delta, delta_b), by_loops(p, w, delta, delta_b, causal), strict=True):
            assert found == pytest.approx(want, rel=1e-9, abs=1e-9)
            gated += int((found < 1).sum())
    assert gated > 500


@every_chunk
def test_the_mixtures_divergence(chunk: int) -> None:
    """TV(mu, pi_g) = g TV(mu, pi) at each state, for any g."""
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        p = instance(seed)[1]
        rng = np.random.default_rng(seed)
        gates = [rng.choice([0.0, 1.0, rng.random()], size=p.vocabulary**t) for t in range(p.horizon)]
        m = mixture(p, gates)
        for found, g, D in zip(m.divergence, gates, p.divergence, strict=True):
            assert found == pytest.approx(g * D, rel=1e-9, abs=1e-15)
        assert (m.rewards is p.rewards or (m.rewards == p.rewards).all()) and m.xi == p.xi
        assert m.rollout_probability == pytest.approx(p.rollout_probability, rel=1e-15)


@every_chunk
def test_what_the_papers_gate_guarantees(chunk: int) -> None:
    """Token by token g Z <= delta and g S <= B; of pi_g's own prefix only B (1 + log(S / B))."""
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        p, w, delta, delta_b = thresholds(seed)
        W = w.cumsum()
        budget = delta + delta_b * (W - w)
        Z = w * p.path_divergence
        S = Z.cumsum(1)
        for gate in (reciprocal, lambda x: np.where(x <= 1, 1.0, np.exp(1 - x) / np.maximum(x, 1))):
            gates = paper_gate(p, w, delta, delta_b, gate)
            g = along(p, gates)
            assert at_most(g * Z, delta) and at_most(g * S, np.broadcast_to(budget, S.shape))
            assert (g[(delta >= Z) & (budget >= S)] == 1).all()
            own = (w * mixture(p, gates).path_divergence).cumsum(1)
            bound = budget * (1 + np.log(np.maximum(1, S / budget)))
            assert at_most(own[p.reachable] * (1 - 1e-9), bound[p.reachable])


def test_the_papers_gate_leaves_its_own_budget() -> None:
    """delta_b = 0, Z_t = delta: g_t = 1 / t, and pi_g's prefix is the harmonic series, not delta."""
    delta, T = 0.1, 6
    p, w = constant_divergence(T, delta), np.ones(T)
    gates = paper_gate(p, w, delta, 0.0)
    assert [g[0] for g in gates] == pytest.approx([1 / t for t in range(1, T + 1)])
    own = mixture(p, gates).path_divergence.cumsum(1)[0]
    assert own == pytest.approx(delta * np.cumsum(1 / np.arange(1, T + 1)))
    assert own[1] == pytest.approx(1.5 * delta) and own[-1] > 2.4 * delta  # B_t = delta
    # the causal gate has nothing left after the first token
    gates = causal_gate(p, w, delta, 0.0)
    assert [g[0] for g in gates] == pytest.approx([1] + [0] * (T - 1), abs=1e-12)
    assert mixture(p, gates).path_divergence.cumsum(1).max() <= delta * (1 + 1e-12)


def test_it_happens_on_random_problems_too() -> None:
    beyond = 0
    for seed in range(320):
        p, w, delta, delta_b = thresholds(seed)
        budget = delta + delta_b * (w.cumsum() - w)
        own = (w * mixture(p, paper_gate(p, w, delta, delta_b)).path_divergence).cumsum(1)[p.reachable]
        beyond += bool((own > budget * 1.01).any())
    assert beyond > 50


@every_chunk
def test_the_causal_gate_satisfies_rule_8(chunk: int) -> None:
    """And the bounds for it; it is the largest such gate: where it is below 1, one of the two limits is reached."""
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        p, w, delta, delta_b = thresholds(seed)
        gates = causal_gate(p, w, delta, delta_b)
        assert all(((g >= 0) & (g <= 1)).all() for g in gates)
        m = mixture(p, gates)
        W = w.cumsum()
        budget = delta + delta_b * (W - w)
        Z = (w * m.path_divergence)[p.reachable]
        S = Z.cumsum(1)
        limit = np.minimum(delta, budget - (S - Z))  # c_t of rule (8)
        assert (limit + 1e-12 * (1 + delta) >= Z).all()
        assert (
            S[:, :-1] <= (delta_b * W + delta)[:-1] * (1 + 1e-12) + 1e-14
        ).all()  # Theorem 1's, with the slack delta
        cut = along(p, gates)[p.reachable] < 1
        assert np.abs(Z - limit)[cut].max(initial=0.0) <= 1e-12 * (1 + delta)
        L = min(1.0, delta / float(w.min()))
        found = theory.tightest_residual(w, delta * (1 + 1e-9), delta_b, xi=p.xi, rule=True).bound
        assert at_most(abs(m.residual), found, p.xi)
        if theory.is_monotone(np.arange(p.horizon - 1, -1, -1.0), w):
            spent = theory.coefficients(p.horizon, L, xi=p.xi) @ m.expected_divergence
            bound = theory.theorem_1(p.horizon, delta_b, L, weights=w, xi=p.xi, slack=delta)
            assert at_most(spent * (1 - 1e-9), bound, p.xi)


def test_a_spent_budget_stays_spent() -> None:
    """delta_b = 0: what is left is 0 up to rounding, to either side, and a gate below 0 would be no gate."""
    for seed in range(320):
        p = instance(seed)[1]
        w = make_schedule("linear", p.horizon, 0.8)
        largest = float(p.largest_divergence.max())
        for share in (0.15, 0.3, 0.7, 0.9):
            gates = causal_gate(p, w, share * largest, 0.0)
            assert min(g.min() for g in gates) >= 0


def test_two_gates() -> None:
    """g = 1 is pi, g = 0 is mu."""
    p = instance(7)[1]
    one, zero = ([np.full(p.vocabulary**t, value) for t in range(p.horizon)] for value in (1.0, 0.0))
    assert mixture(p, one).gain == pytest.approx(p.gain, rel=1e-12)
    assert mixture(p, zero).gain == mixture(p, zero).residual == 0
    assert reciprocal(np.array([0.0, 1.0, 4.0])).tolist() == [1, 1, 0.25]
