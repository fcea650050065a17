"""The bounds hold on every random problem, in the order that the theory says, and have their formulas' numbers."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cppo import theory
from cppo.theory import AssumptionError, TabularProblem, make_schedule

from .cases import CHUNK, INSTANCES, at_most, constant_divergence, every_chunk, instance, problems

SCHEDULES = [(name, w_min) for name in theory.SCHEDULES for w_min in (0.3, 0.8)]


def random_monotone(rng: np.random.Generator, horizon: int) -> np.ndarray:
    """Weights for which (T - t) / w_t is non-increasing, and else as they come; w_T is free."""
    rate = np.append(np.sort(rng.uniform(0.2, 1, horizon - 1))[::-1], 1.0)
    w = np.append(np.arange(horizon - 1, 0, -1.0), rng.uniform(0.1, 1)) / rate
    return w / w.max()


# ---------------------------------------------------------------------------------------- from measured divergences


@every_chunk
def test_lemma_3_at_every_prefix(chunk: int) -> None:
    for p in problems(chunk):
        product, total = theory.suffix_tv_bounds(p.largest_divergence)
        assert at_most(product, total) and product[-1] == total[-1] == 0
        for t in range(1, p.horizon + 1):
            reached = p.rollout_probability.reshape(p.vocabulary**t, -1).sum(1) > 0
            assert at_most(p.suffix_tv[t][reached], product[t - 1])
        whole = theory.suffix_tv_bounds([0.0, *p.largest_divergence])[0][0]  # before the first token, too
        assert at_most(p.suffix_tv[0], whole)


@every_chunk
def test_proposition_4_and_the_pathwise_bound(chunk: int) -> None:
    """|Delta| <= ratios <= pathwise <= Prop. 4, and |Delta| <= product form <= Prop. 4 <= sum lambda_t u_t."""
    for p in problems(chunk):
        xi, u, l = p.xi, p.expected_divergence, p.largest_divergence  # noqa: E741
        prop4 = theory.residual_bound(u, l, xi=xi)
        product = theory.residual_bound(u, l, xi=xi, form="product")
        assert at_most(abs(p.residual), p.ratio_bound, xi) and at_most(p.ratio_bound, p.pathwise_bound, xi)
        assert at_most(p.pathwise_bound, prop4, xi)
        assert at_most(abs(p.residual), product, xi) and at_most(product, prop4, xi)
        L = float(l.max())
        assert at_most(prop4, theory.coefficients(p.horizon, L, xi=xi) @ u, xi)
        assert at_most(product, theory.coefficients(p.horizon, L, xi=xi, form="product") @ u, xi)


def test_lemma_3_by_hand() -> None:
    product, total = theory.suffix_tv_bounds([0.9, 0.5, 0.25, 1.0, 0.125])
    assert product.tolist() == [1, 1, 1, 0.125, 0] and total.tolist() == [1.875, 1.375, 1.125, 0.125, 0]
    product, total = theory.suffix_tv_bounds([0.9, 0.5, 0.25, 0.5])
    assert product.tolist() == [1 - 0.5 * 0.75 * 0.5, 1 - 0.75 * 0.5, 0.5, 0] and total.tolist() == [1.25, 0.75, 0.5, 0]
    assert [x.tolist() for x in theory.suffix_tv_bounds([0.4])] == [[0], [0]]


def test_proposition_4_by_hand() -> None:
    """u = (1/4, 1/8, 1/2), l = (1/2, 1/4, 1/2), xi = 1/2: 2 (1/4 * 3/4 + 1/8 * 1/2); product 5/8 for the 3/4."""
    u, l = [0.25, 0.125, 0.5], [0.5, 0.25, 0.5]  # noqa: E741
    assert theory.residual_bound(u, l, xi=0.5) == 2 * (0.1875 + 0.0625)
    assert theory.residual_bound(u, l, xi=0.5, form="product") == 2 * (0.25 * 0.625 + 0.0625)
    assert theory.coefficients(4, 0.25, xi=0.5).tolist() == [1.5, 1, 0.5, 0]
    found = theory.coefficients(4, 0.25, xi=0.5, form="product")
    assert found == pytest.approx([2 * (1 - 0.75**3), 2 * (1 - 0.75**2), 0.5, 0], rel=1e-15)
    assert theory.coefficients(3, 1.0, form="product").tolist() == [4, 4, 0]


# ------------------------------------------------------------------------------------------------- from thresholds


@every_chunk
def test_theorem_1_and_proposition_8(chunk: int) -> None:
    """Every monotone schedule, with the thresholds that the problem satisfies: above sum lambda_t u_t and |Delta|."""
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        p = instance(seed)[1]
        T, xi, u = p.horizon, p.xi, p.expected_divergence
        rng = np.random.default_rng(seed)
        schedules = [make_schedule(name, T, w_min) for name, w_min in SCHEDULES]
        schedules += [random_monotone(rng, T) for _ in range(2)]
        held = 0
        for w in schedules:
            c = p.constraints(w)
            S = (w * p.path_divergence[p.reachable]).cumsum(1)
            W = w.cumsum()
            for L in {float(p.largest_divergence.max()), min(1.0, float((c.delta / w).max()))}:
                spent = float(theory.coefficients(T, L, xi=xi) @ u)
                assert at_most(abs(p.residual), spent, xi)
                last = float(S[:, -2].max() / W[-2])
                assert at_most(spent, theory.terminal_only(T, last, L, weights=w, xi=xi), xi)
                try:
                    bound = theory.theorem_1(T, c.delta_b, L, weights=w, xi=xi)
                except AssumptionError:
                    continue
                held += 1
                assert at_most(spent, bound, xi)
                assert at_most(bound, theory.terminal_only(T, c.delta_b, L, weights=w, xi=xi), xi)
                # Prop. 8, with the rule's delta_b and slack, and with any other pair
                assert c.slack <= c.delta * (1 + 1e-12)
                slacks = [(c.rule_delta_b, c.slack)]
                less = c.delta_b * float(rng.random())
                slacks.append((less, max(0.0, float((S - less * W)[:, :-1].max()))))
                for delta_b, slack in slacks:
                    assert at_most(spent, theory.theorem_1(T, delta_b, L, weights=w, xi=xi, slack=slack), xi)
        assert held >= 8, "the constant, the linear and the random schedules are monotone"


@every_chunk
def test_corollaries_and_the_implemented_rule(chunk: int) -> None:
    """Cor. 6, Cor. 7, rule (8) by position; and with the weights over each response's own length."""
    for p in problems(chunk):
        T, xi, u = p.horizon, p.xi, p.expected_divergence
        for w_min in (0.3, 0.8, 1.0):
            w = make_schedule("linear", T, w_min)
            c = p.constraints(w)
            delta = float(p.largest_divergence.max())
            spent = float(theory.coefficients(T, delta, xi=xi) @ u)
            assert at_most(spent, theory.corollary_6(T, delta, c.delta_b, xi=xi), xi)
            spent = float(theory.coefficients(T, c.delta / w_min, xi=xi) @ u)
            assert at_most(spent, theory.corollary_7(T, c.delta, c.delta_b, w_min, xi=xi), xi)
            bound = theory.implemented_rule(T, c.delta, c.rule_delta_b, w_min, xi=xi)
            assert at_most(spent, bound, xi) and at_most(abs(p.residual), bound, xi)

            own = p.constraints(w_min=w_min)
            spent = float(theory.coefficients(T, own.delta / w_min, xi=xi) @ u)
            assert at_most(spent, theory.own_lengths(T, own.delta, own.delta_b, w_min, xi=xi), xi)
            args = (T, own.delta, own.rule_delta_b, w_min)
            assert at_most(spent, theory.own_lengths(*args, xi=xi, slack=own.slack), xi)
            assert at_most(abs(p.residual), theory.own_lengths(*args, xi=xi, slack=own.slack), xi)


def test_weights_by_own_length_need_a_bound_of_their_own() -> None:
    """Why `own_lengths` is not Cor. 7: a response that must end early moves further than Theorem 1's constraints allow.

    T = 5; every response ends with its fourth token, D_3 is the only divergence. Its own weights at w_min = 0.05 are 1,
    0.683, 0.367, 0.05, so that D_3 <= 0.1 * 2.05 / 0.367; Theorem 1's sum of lambda_t u_t is then beyond its bound.
    """
    T, w_min, delta_b = 5, 0.05, 0.1
    D = delta_b * (3 - (1 - w_min)) / (1 - (1 - w_min) * 2 / 3)
    fair, end = [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]
    rollout, policy = (
        tuple(np.tile(row, (3**t, 1)) for t, row in enumerate([fair, fair, third, end, end]))
        for third in ([0.3, 0.7, 0.0], [0.3 + D, 0.7 - D, 0.0])
    )
    p = TabularProblem(rollout, policy, np.zeros(3**T), eos=2, reward_bound=1.0)
    own = p.constraints(w_min=w_min)
    assert own.delta_b == pytest.approx(delta_b) and p.expected_divergence == pytest.approx([0, 0, D, 0, 0])
    spent = theory.coefficients(T, own.delta / w_min) @ p.expected_divergence
    assert spent > 1.1 * theory.corollary_7(T, own.delta, own.delta_b, w_min)
    assert spent < theory.own_lengths(T, own.delta, own.delta_b, w_min)
    assert p.constraints(make_schedule("linear", T, w_min)).delta_b > 1.1 * own.delta_b


def test_cor_7_for_own_lengths_where_nothing_forces_an_end() -> None:
    """If mu can go on to T tokens from every state, a full response visits it, with the weights by position."""
    seen = 0
    for seed in range(INSTANCES):
        case, p = instance(seed)
        if case.eos is None or not all(min(row) > 0 for row in case.mu.values()):
            continue
        seen += 1
        for w_min in (0.1, 0.8):
            own, by_position = p.constraints(w_min=w_min), p.constraints(make_schedule("linear", p.horizon, w_min))
            assert at_most(by_position.delta, own.delta) and at_most(by_position.delta_b, own.delta_b)
            spent = theory.coefficients(p.horizon, own.delta / w_min, xi=p.xi) @ p.expected_divergence
            assert at_most(spent, theory.corollary_7(p.horizon, own.delta, own.delta_b, w_min, xi=p.xi), p.xi)
    assert seen > 60


def test_product_form() -> None:
    """Where its condition holds: above the sum that it bounds, and below Theorem 1; with a slack, too."""
    seen: Counter[tuple[str, bool]] = Counter()
    for seed in range(INSTANCES):
        p = instance(seed)[1]
        T, xi, u = p.horizon, p.xi, p.expected_divergence
        for name, w_min in SCHEDULES:
            w = make_schedule(name, T, w_min)
            c = p.constraints(w)
            L = float(p.largest_divergence.max())
            gamma = theory.coefficients(T, L, xi=xi, form="product")
            try:
                bound = theory.product_form(T, c.delta_b, L, weights=w, xi=xi)
            except AssumptionError:
                seen[name, False] += 1
                continue
            seen[name, True] += 1
            assert at_most(gamma @ u, bound, xi) and at_most(abs(p.residual), bound, xi)
            assert at_most(bound, 4 * xi * (T - 1) * c.delta_b, xi)
            with_slack = theory.product_form(T, c.rule_delta_b, L, weights=w, xi=xi, slack=c.slack)
            assert at_most(gamma @ u, with_slack, xi)
            if theory.is_monotone(np.arange(T - 1, -1, -1.0), w):
                assert at_most(bound, theory.theorem_1(T, c.delta_b, L, weights=w, xi=xi), xi)
                more = theory.theorem_1(T, c.rule_delta_b, L, weights=w, xi=xi, slack=c.slack)
                assert at_most(with_slack, more, xi)
    assert seen["constant", True] == 2 * INSTANCES and seen["reversed", True] == 2 * INSTANCES
    assert min(seen[name, held] for name in ("linear", "cosine", "matched") for held in (True, False)) > 20


@every_chunk
def test_the_rules_that_it_is_compared_with(chunk: int) -> None:
    """Uniform, with the largest TV; TRM, with the largest KL and the largest mean of a response's KL."""
    for p in problems(chunk):
        T, xi, D = p.horizon, p.xi, p.expected_divergence
        delta = float(p.largest_divergence.max())
        for form in ("sum", "product"):
            gamma = theory.coefficients(T, delta, xi=xi, form=form)
            assert at_most(gamma @ D, theory.uniform(T, delta, xi=xi, form=form), xi)
            assert at_most(abs(p.residual), theory.uniform(T, delta, xi=xi, form=form), xi)
        kl = p.path_kl[p.reachable]
        largest, average = float(kl.max()), float((kl.sum(1) / p.lengths[p.reachable]).max())
        if not math.isfinite(largest):
            continue
        # the steps of the proofs: Pinsker on u_t, and on what follows by the chain rule
        later = np.arange(T - 1, -1, -1)
        assert at_most(D, math.sqrt(largest / 2)) and at_most(D.sum(), T * math.sqrt(average / 2))
        assert at_most(p.largest_suffix_tv, np.sqrt(later * largest / 2))
        assert at_most(p.largest_suffix_tv, math.sqrt(T * average / 2))
        assert at_most(4 * xi * (D @ p.largest_suffix_tv), theory.trm_max(T, largest, xi=xi), xi)
        assert at_most(4 * xi * (D @ p.largest_suffix_tv), theory.trm_avg(T, average, xi=xi), xi)
        both = theory.trm_max_avg(T, largest, average, xi=xi)
        assert at_most(abs(p.residual), both, xi)
        assert both <= min(theory.trm_max(T, largest, xi=xi), theory.trm_avg(T, average, xi=xi))


# ------------------------------------------------------------------------------------------- numbers of the formulas


thresholds = st.floats(1e-4, 0.5)
horizons = st.integers(1, 300)


@given(T=horizons, delta=thresholds, delta_b=thresholds, w_min=st.floats(0.05, 1), xi=st.floats(0.1, 10))
def test_closed_forms_by_summation(T: int, delta: float, delta_b: float, w_min: float, xi: float) -> None:
    """Each constant against the sum over t that it stands for."""
    later = [T - t for t in range(1, T + 1)]
    total = math.fsum(later)
    exact = {"rel": 1e-12, "abs": 0.0}
    assert theory.theorem_1(T, delta_b, delta, xi=xi) == pytest.approx(4 * xi * delta * delta_b * total, **exact)
    eta = 0.3 * delta
    slack = 4 * xi * delta * (T - 1) * eta
    w = [2 * x for x in make_schedule("linear", T, w_min)]
    assert theory.theorem_1(T, delta_b, delta, weights=w, xi=xi, slack=eta) == pytest.approx(
        4 * xi * delta * delta_b * total + slack / 2, **exact
    )
    assert theory.corollary_6(T, delta, delta_b, xi=xi) == pytest.approx(4 * xi * delta * delta_b * total, **exact)
    L = delta / w_min
    weighted = 4 * xi * L * delta_b * total
    assert theory.corollary_7(T, delta, delta_b, w_min, xi=xi) == pytest.approx(weighted, **exact)
    rule = weighted + 4 * xi * L * (T - 1) * delta
    assert theory.implemented_rule(T, delta, delta_b, w_min, xi=xi) == pytest.approx(rule, **exact)
    own = theory.own_lengths(T, delta, delta_b, w_min, xi=xi, slack=eta)
    both = weighted * (1 + w_min) / 2 + 4 * xi * L * (T - 1) * eta
    assert own == pytest.approx(both / w_min, **exact)
    assert theory.uniform(T, delta, xi=xi) == pytest.approx(4 * xi * delta**2 * total, **exact)
    product = math.fsum(1 - (1 - delta) ** n for n in later)
    loose = {"rel": 1e-9, "abs": 0.0}
    assert theory.uniform(T, delta, xi=xi, form="product") == pytest.approx(4 * xi * delta * product, **loose)
    by_slack = 4 * xi * (1 - (1 - delta) ** (T - 1)) * eta
    assert theory.product_form(T, delta_b, delta, xi=xi, slack=eta) == pytest.approx(
        4 * xi * delta_b * product + by_slack, **loose
    )
    twice = theory.product_form(T, delta_b, delta, weights=np.full(T, 2.0), xi=xi, slack=eta)
    assert twice == pytest.approx(4 * xi * delta_b * product + by_slack / 2, **loose)
    # what the text says of them
    assert theory.product_form(T, delta_b, delta, xi=xi) <= theory.theorem_1(T, delta_b, delta, xi=xi) * (1 + 1e-12)
    assert theory.uniform(T, delta, xi=xi, form="product") <= theory.uniform(T, delta, xi=xi) * (1 + 1e-12)
    if T > 1:
        assert theory.corollary_6(T, delta, delta_b, xi=xi) / theory.uniform(T, delta, xi=xi) == pytest.approx(
            delta_b / delta, **exact
        )
        ratio = theory.corollary_7(T, delta, delta_b, w_min, xi=xi) / theory.uniform(T, delta, xi=xi)
        assert ratio == pytest.approx(delta_b / (delta * w_min), **exact)


@given(T=horizons, delta=thresholds, average=thresholds, xi=st.floats(0.1, 10))
def test_trm_by_summation(T: int, delta: float, average: float, xi: float) -> None:
    """TRM-Max is the integral above 4 xi sum_t sqrt(delta / 2) sqrt((T - t) delta / 2), the others their own sums."""
    steps = 4 * xi * math.sqrt(delta / 2) * math.fsum(math.sqrt((T - t) * delta / 2) for t in range(1, T + 1))
    found = theory.trm_max(T, delta, xi=xi)
    assert steps <= found <= steps + 2 * xi * delta * math.sqrt(T)
    assert theory.trm_avg(T, average, xi=xi) == pytest.approx(
        4 * xi * T * math.sqrt(average / 2) * math.sqrt(T * average / 2), rel=1e-12
    )
    mixed = 4 * xi * T * math.sqrt(delta / 2) * math.sqrt(T * average / 2)  # with a sequence KL of T average
    assert theory.trm_max_avg(T, delta, average, xi=xi) == min(found, theory.trm_avg(T, average, xi=xi))
    assert theory.trm_max_avg(T, delta, average, xi=xi) <= mixed * (1 + 1e-12)


def test_trm_max_avg_takes_the_smallest() -> None:
    T = 100
    assert theory.trm_max_avg(T, 1e-4, 0.5) == theory.trm_max(T, 1e-4)  # the average says nothing
    assert theory.trm_max_avg(T, 0.5, 1e-4) == theory.trm_avg(T, 1e-4)  # the maximum says nothing


def test_the_papers_settings() -> None:
    """T = 8192, delta 0.15, delta_b 0.02, w_min 0.8, rewards 0 or 1 (xi = 1/2), each in exact arithmetic."""
    T, delta, delta_b, w_min = 8192, Fraction(15, 100), Fraction(2, 100), Fraction(8, 10)
    pairs = T * (T - 1)  # 2 xi = 1
    assert pairs == 67_100_672
    common = {"xi": 0.5}
    exact = {"rel": 1e-14, "abs": 0}
    assert theory.corollary_7(T, 0.15, 0.02, 0.8, **common) == pytest.approx(
        float(pairs * delta / w_min * delta_b), **exact
    )
    assert float(pairs * delta / w_min * delta_b) == pytest.approx(251_627.52)
    assert theory.corollary_6(T, 0.15, 0.02, **common) == pytest.approx(201_302.016, **exact)
    assert theory.uniform(T, 0.15, **common) == pytest.approx(1_509_765.12, **exact)
    slack = 2 * (T - 1) * delta / w_min * delta  # 4 xi = 2
    rule = float(pairs * delta / w_min * delta_b + slack)
    assert theory.implemented_rule(T, 0.15, 0.02, 0.8, **common) == pytest.approx(rule, **exact)
    q = 1 - delta / w_min
    later = float((T - 1) - q / (1 - q))  # q^(T-1) is 0 in float64
    assert theory.product_form(T, 0.02, 0.1875, **common) == pytest.approx(2 * 0.02 * later, rel=1e-12)
    assert theory.trm_max(T, 0.05, **common) == pytest.approx(2 / 3 * 8192**1.5 * 0.05, **exact)
    assert theory.trm_avg(T, 0.001, **common) == pytest.approx(8192**1.5 * 0.001, **exact)


def test_where_cppo_promises_less_than_the_uniform_rule() -> None:
    """delta_b > delta w_min: 0.02 > 0.15 * 0.1, and Cor. 7's constant is 4/3 of the uniform rule's."""
    cppo_, uniform = theory.corollary_7(64, 0.15, 0.02, 0.1), theory.uniform(64, 0.15)
    assert cppo_ / uniform == pytest.approx(4 / 3, rel=1e-14) and cppo_ > uniform
    # at equality the two are the same
    assert theory.corollary_7(64, 0.15, 0.15 * 0.25, 0.25) == pytest.approx(theory.uniform(64, 0.15), rel=1e-14)


# -------------------------------------------------------------------------------------------------- Eq. 18, App. B.10


@given(T=st.integers(2, 500), delta_b=thresholds, L=thresholds)
def test_the_terminal_constraint_alone(T: int, delta_b: float, L: float) -> None:
    """Twice as much less 2 / T for w = 1; no more for weights proportional to T - t, and strictly more for others."""
    all_prefixes = theory.theorem_1(T, delta_b, L)
    assert theory.terminal_only(T, delta_b, L) / all_prefixes == pytest.approx(2 - 2 / T, rel=1e-12)
    proportional = np.append(np.arange(T - 1, 0, -1.0), 0.01) / T
    assert theory.terminal_only(T, delta_b, L, weights=proportional) == pytest.approx(all_prefixes, rel=1e-12)
    assert theory.theorem_1(T, delta_b, L, weights=proportional) == pytest.approx(all_prefixes, rel=1e-12)
    if T > 2:
        changed = proportional.copy()
        changed[T // 2 - 1] *= 1.01
        assert theory.terminal_only(T, delta_b, L, weights=changed) > all_prefixes * (1 + 1e-7)
        changed[T // 2 - 1] *= 0.98
        assert theory.terminal_only(T, delta_b, L, weights=changed) > all_prefixes * (1 + 1e-7)


def test_the_matched_schedule_needs_no_prefix_constraints() -> None:
    """Its floor below 1 / (T - 1): the constraint at T - 1 gives Theorem 1's bound; with a higher floor it does not."""
    low, high = (make_schedule("matched", 50, w_min) for w_min in (0.02, 0.3))
    assert theory.terminal_only(50, 0.02, 0.1, weights=low) == pytest.approx(theory.theorem_1(50, 0.02, 0.1))
    assert theory.terminal_only(50, 0.02, 0.1, weights=high) > 1.05 * theory.theorem_1(50, 0.02, 0.1, weights=high)


@pytest.mark.parametrize("horizon", [2, 3, 6, 10])
def test_the_saturating_sequence_attains_the_bound(horizon: int) -> None:
    """App. B.10 as numbers, and as a pair of policies with D_t = delta_b at every state."""
    delta, delta_b = 0.15, 0.03
    lam = theory.coefficients(horizon, delta)
    u = theory.saturating(horizon, delta, delta_b)
    assert lam @ u == pytest.approx(theory.theorem_1(horizon, delta_b, delta), rel=1e-13)
    gamma = theory.coefficients(horizon, delta, form="product")
    assert gamma @ u == pytest.approx(theory.product_form(horizon, delta_b, delta), rel=1e-13)
    assert theory.saturating(horizon, delta, delta).tolist() == [delta] * horizon
    p = constant_divergence(horizon, delta_b)
    assert p.expected_divergence == pytest.approx(u, rel=1e-12)
    for name in theory.SCHEDULES:
        c = p.constraints(make_schedule(name, horizon, 0.5))
        assert c.delta_b == pytest.approx(delta_b, rel=1e-12) and c.delta <= delta
    assert lam @ p.expected_divergence == pytest.approx(theory.theorem_1(horizon, c.delta_b, delta), rel=1e-12)


def test_proposition_4_is_attained() -> None:
    """T = 2: a problem whose |Delta| is all that Prop. 4 and the pathwise bound allow, so that no factor is too large.

    mu is fair. pi moves the first token by d and the second, after either first, by e. The reward is 1 for equal
    tokens, else -1: after a 0 it gains from e, after a 1 it loses, and rho_1 - 1 has the same two signs.
    """
    d, e = 0.2, 0.3
    mu = (np.full((1, 2), 0.5), np.full((2, 2), 0.5))
    pi = (np.array([[0.5 + d, 0.5 - d]]), np.tile([0.5 + e, 0.5 - e], (2, 1)))
    p = TabularProblem(mu, pi, np.array([1.0, -1.0, -1.0, 1.0]))
    assert abs(p.residual) == pytest.approx(4 * d * e, rel=1e-12)
    assert theory.residual_bound(p.expected_divergence, p.largest_divergence) == pytest.approx(4 * d * e, rel=1e-12)
    assert p.pathwise_bound == pytest.approx(4 * d * e, rel=1e-12)
