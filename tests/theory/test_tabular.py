"""`TabularProblem` against loops over sequences, and its identities."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from cppo.theory import TabularProblem

from . import reference
from .cases import CHUNK, INSTANCES, draw_exact, every_chunk, instance, problems, rows_of, tabular


def test_the_instances_are_diverse() -> None:
    """What the other tests run through: else a bound that fails for large divergences alone would go unseen."""
    every = [instance(seed) for seed in range(INSTANCES)]
    assert {(p.vocabulary, p.horizon) for _, p in every} == {(V, T) for V in (2, 3, 4) for T in (2, 3, 4, 5, 6)}
    largest = [p.largest_divergence.max() for _, p in every]
    assert min(largest) < 1e-5 and max(largest) > 0.99 and np.histogram(largest, [0, 0.01, 0.1, 0.5, 1])[0].min() >= 25
    assert {case.eos for case, _ in every} == {None, 0, 1, 2, 3}
    assert sum(len(np.unique(p.lengths)) > 1 for _, p in every) >= 100
    assert sum(not p.reachable.all() and np.isfinite(p.path_kl[p.reachable]).all() for _, p in every) >= 20
    assert sum(np.isinf(p.path_kl[p.reachable]).any() for _, p in every) >= 20


@every_chunk
def test_objective_surrogate_and_residual(chunk: int) -> None:
    """Equal to the loops', and gain = surrogate - residual, to 1e-12 of the rewards' size."""
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        case, p = instance(seed)
        xi = reference.largest_reward(case)
        assert p.xi == xi
        assert p.gain == pytest.approx(
            reference.objective(case, case.pi) - reference.objective(case, case.mu), rel=0, abs=1e-12 * xi
        )
        assert p.surrogate == pytest.approx(reference.surrogate(case), rel=0, abs=1e-12 * xi)
        assert p.residual == pytest.approx(reference.residual(case), rel=0, abs=1e-12 * xi)
        assert p.gain == pytest.approx(p.surrogate - p.residual, rel=0, abs=1e-12 * xi)
        assert p.pathwise_bound == pytest.approx(reference.pathwise_bound(case, xi), rel=1e-12, abs=1e-14 * xi)
        assert p.ratio_bound == pytest.approx(reference.ratio_bound(case, xi), rel=1e-10, abs=1e-13 * xi)


@every_chunk
def test_divergences_at_every_prefix(chunk: int) -> None:
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        case, p = instance(seed)
        V, T = case.vocabulary, case.horizon
        reached = set(reference.visited(case))
        for t in range(T):
            for row, s in enumerate(rows_of(V, t)):
                assert p.divergence[t][row] == pytest.approx(reference.divergence(case, s), rel=1e-12, abs=1e-15)
                if s in case.mu:
                    assert p.kl[t][row] == pytest.approx(reference.kl(case, s), rel=1e-9, abs=1e-14)
                if t == 0 or len(reached) < 400 or row % 7 == 0:  # of the largest tables every seventh
                    want = reference.suffix_tv(case, s)
                    assert p.suffix_tv[t][row] == pytest.approx(want, rel=1e-12, abs=1e-14), s
        assert p.expected_divergence == pytest.approx(reference.expected_divergence(case), rel=1e-12, abs=1e-15)
        assert p.largest_divergence == pytest.approx(reference.largest_divergence(case), rel=1e-12, abs=1e-15)


@every_chunk
def test_what_follows_a_prefix_at_most(chunk: int) -> None:
    """`largest_suffix_tv` counts the prefixes that mu can write, and no other."""
    for p in problems(chunk):
        for t in range(1, p.horizon + 1):
            prefix_mass = p.rollout_probability.reshape(p.vocabulary**t, -1).sum(1)
            assert p.largest_suffix_tv[t - 1] == max(tv for tv, m in zip(p.suffix_tv[t], prefix_mass, strict=True) if m)
        assert p.largest_suffix_tv[-1] == 0


def test_along_the_responses() -> None:
    """Lengths, probabilities, divergences and ratios of each response, ended ones padded with the last token."""
    for seed in range(40):
        case, p = instance(seed)
        found = set()
        for row, y in enumerate(rows_of(case.vocabulary, case.horizon)):
            end = y.index(case.eos) + 1 if case.eos is not None and case.eos in y else case.horizon
            assert p.lengths[row] == end
            own = y[:end]
            mass = reference.probability(case.mu, own) if set(y[end:]) <= {case.eos} else 0.0
            assert p.rollout_probability[row] == pytest.approx(mass, rel=1e-12, abs=0)
            assert p.reachable[row] == (mass > 0)
            if mass > 0:
                found.add(own)
                assert p.policy_probability[row] == pytest.approx(reference.probability(case.pi, own), rel=1e-12)
                D = [reference.divergence(case, own[:t]) for t in range(end)]
                assert p.path_divergence[row] == pytest.approx([*D, *[0] * (case.horizon - end)], rel=1e-12, abs=1e-15)
                rho = reference.ratios(case, own)
                assert p.path_ratio[row] == pytest.approx([*rho, *[1] * (case.horizon - end)], rel=1e-12)
        assert found == set(reference.rollouts(case))


@every_chunk
def test_smallest_thresholds(chunk: int) -> None:
    """Equal to the loops'; the constraints hold with them, and with any smaller one they do not."""
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        case, p = instance(seed)
        rng = np.random.default_rng(seed)
        weights = rng.uniform(0.3, 1, p.horizon)
        w_min = float(rng.choice([0.5, 0.8, 1.0]))
        kinds = (
            (p.constraints(weights), reference.paths(case, weights.tolist())),
            (p.constraints(w_min=w_min), reference.paths(case, w_min=w_min)),
        )
        for found, given in kinds:
            delta, delta_b, rule_delta_b, slack = reference.smallest_thresholds(given)
            assert found.delta == pytest.approx(delta, rel=1e-12)
            assert found.delta_b == pytest.approx(delta_b, rel=1e-12)
            assert found.rule_delta_b == pytest.approx(rule_delta_b, rel=1e-12, abs=1e-12 * delta)
            assert found.slack == pytest.approx(slack, rel=1e-12, abs=1e-12 * delta)
            assert found.slack <= found.delta * (1 + 1e-12)
            more, less = 1 + 1e-9, 1 - 1e-9
            assert reference.obeys_theorem_1(given, delta * more, delta_b * more)
            assert not reference.obeys_theorem_1(given, delta * less, delta_b * more)
            assert delta_b == 0 or not reference.obeys_theorem_1(given, delta * more, delta_b * less)
            bit = 1e-9 * delta
            assert reference.obeys_rule_8(given, delta + bit, rule_delta_b + bit)
            assert rule_delta_b < bit or not reference.obeys_rule_8(given, delta, rule_delta_b - bit)
            assert reference.obeys_theorem_1(given, delta + bit, rule_delta_b, slack + bit)
            assert slack < bit or not reference.obeys_theorem_1(given, delta + bit, rule_delta_b, slack - bit)


@pytest.mark.parametrize("seed", range(12))
def test_identities_in_fractions(seed: int) -> None:
    """Lemma 2 without any rounding, and the package's floats beside it."""
    case = draw_exact(seed)
    gain = reference.objective(case, case.pi) - reference.objective(case, case.mu)
    surrogate, residual = reference.surrogate(case), reference.residual(case)
    assert all(isinstance(x, Fraction) for x in (gain, surrogate, residual))
    assert gain == surrogate - residual and residual != 0
    p = tabular(case)
    assert p.gain == pytest.approx(float(gain), rel=0, abs=2e-15)
    assert p.surrogate == pytest.approx(float(surrogate), rel=0, abs=1e-14)
    assert p.residual == pytest.approx(float(residual), rel=0, abs=1e-14)
    assert p.expected_divergence == pytest.approx([float(u) for u in reference.expected_divergence(case)], rel=1e-14)
    for t in range(case.horizon):
        for row, s in enumerate(rows_of(case.vocabulary, t)):
            assert p.suffix_tv[t][row] == pytest.approx(float(reference.suffix_tv(case, s)), rel=1e-13)


def test_two_tokens_by_hand() -> None:
    """mu is fair; pi writes 0 with 3/4, then 0 after a 0, and is fair after a 1; the reward is 1 for 00."""
    mu = (np.array([[0.5, 0.5]]), np.array([[0.5, 0.5], [0.5, 0.5]]))
    pi = (np.array([[0.75, 0.25]]), np.array([[1.0, 0.0], [0.5, 0.5]]))
    p = TabularProblem(mu, pi, np.array([1.0, 0, 0, 0]))
    assert (p.gain, p.surrogate, p.residual) == (0.5, 0.375, -0.125)
    assert p.expected_divergence.tolist() == [0.25, 0.25] and p.largest_divergence.tolist() == [0.25, 0.5]
    assert p.suffix_tv[1].tolist() == [0.5, 0.0] and p.largest_suffix_tv.tolist() == [0.5, 0.0]
    assert p.suffix_tv[0].tolist() == [0.5]  # pi(00) = 3/4, pi(10) = pi(11) = 1/8, mu = 1/4 each
    assert p.pathwise_bound == 0.25
    found = p.constraints([1.0, 1.0])
    assert (found.delta, found.delta_b, found.rule_delta_b, found.slack) == (0.5, 0.25, 0.25, 0.0)
    found = p.constraints(w_min=0.5)
    assert (found.delta, found.delta_b, found.rule_delta_b, found.slack) == (0.25, 0.25, 0.25, 0.0)


def test_one_token() -> None:
    """T = 1: the surrogate is exact, and there is no prefix constraint."""
    p = TabularProblem((np.array([[0.5, 0.5]]),), (np.array([[0.2, 0.8]]),), np.array([0.0, 1.0]))
    assert p.gain == pytest.approx(0.3) and p.surrogate == pytest.approx(0.3) and p.residual == 0
    found = p.constraints([1.0])
    assert found.delta == pytest.approx(0.3) and (found.delta_b, found.rule_delta_b, found.slack) == (0, 0, 0)


def test_rewards_may_be_bounded_by_more() -> None:
    case, p = instance(0)
    wide = tabular(case, reward_bound=3 * p.xi)
    assert wide.xi == 3 * p.xi and wide.residual == p.residual
    assert wide.pathwise_bound == pytest.approx(3 * p.pathwise_bound)
    assert wide.with_policy(p.rollout).xi == wide.xi
    same = wide.with_policy(p.rollout)
    assert same.gain == same.surrogate == same.residual == 0 and not same.largest_divergence.any()


def test_random_problems() -> None:
    """`random` draws what it says: reproducible, with the end-of-sequence token 0 or none, pi at the distance asked."""
    one, two = (TabularProblem.random(np.random.default_rng(3), 3, 4) for _ in range(2))
    assert one.gain == two.gain and one.eos == 0 and len(np.unique(one.lengths)) == 4
    assert TabularProblem.random(np.random.default_rng(3), 3, 4, eos=False).lengths.min() == 4
    near, far = (
        TabularProblem.random(np.random.default_rng(3), 3, 4, scale=scale).largest_divergence.max()
        for scale in (1e-3, 10.0)
    )
    assert near < 2e-3 and far > 0.9 and one.xi == 1
