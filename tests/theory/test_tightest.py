"""The tightest bound against a general solver (HiGHS), against the theorems above it and the residuals below it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from cppo import theory
from cppo.theory import is_monotone, make_schedule, schedule_cost, tightest_residual
from cppo.theory.tightest import _greedy, spend

from .cases import CHUNK, at_most, constant_divergence, every_chunk, instance

FORMS = ("sum", "product")
REL = 1e-8  # HiGHS stops at 1e-7 of its constraints; its optimum is a vertex, and better than that


def solve(gamma: Any, weights: Any, limits: Any, budgets: Any) -> float:
    """max sum_t gamma_t / w_t z_t: 0 <= z <= limits, z_1 + ... + z_m <= budgets_m; a row a prefix."""
    T = len(gamma)
    found = linprog(
        -np.asarray(gamma) / weights,
        A_ub=np.tril(np.ones((T, T))),
        b_ub=budgets,
        bounds=[(0, x) for x in limits],
        method="highs",
    )
    assert found.status == 0, found.message
    return float(-found.fun)


def budgets_of(w: Any, delta: float, delta_b: float, rule: bool, slack: float) -> list[float]:
    """By loops: rule (8) has S_t <= delta + delta_b W_{t-1}; Theorem 1 S_m <= delta_b W_m + slack, m < T."""
    found, W = [], 0.0
    for t, weight in enumerate(w):
        if rule:
            found.append(delta + delta_b * W)
        else:
            found.append(delta_b * (W + weight) + slack if t + 1 < len(w) else math.inf)
        W += weight
    return found


def later_of(l: Any, form: str) -> list[float]:  # noqa: E741
    """sum_{j>t} l_j, or 1 - prod_{j>t} (1 - l_j), by loops."""
    if form == "sum":
        return [math.fsum(l[t + 1 :]) for t in range(len(l))]
    return [1 - math.prod(1 - x for x in l[t + 1 :]) for t in range(len(l))]


def finite(budgets: list[float]) -> list[float]:
    """No budget at all is one that nothing reaches."""
    return [min(b, 1e3) for b in budgets]


def random_weights(rng: np.random.Generator, T: int) -> np.ndarray:
    """A schedule, one that sums by parts, or anything."""
    kind = rng.integers(3)
    if kind == 0:
        return make_schedule(rng.choice(list(theory.SCHEDULES)), T, float(rng.uniform(0.1, 1)))
    w = rng.uniform(0.1, 1, T)
    return np.sort(w)[::-1].copy() if kind == 1 else w


@pytest.mark.parametrize("seed", range(60))
def test_against_a_general_solver(seed: int) -> None:
    """Every option. l, too, is the optimum of a program: the largest D_j under the constraints."""
    rng = np.random.default_rng(seed)
    T = int(rng.integers(1, 9 if seed % 2 else 41))
    w = random_weights(rng, T)
    delta = float(10 ** rng.uniform(-2, 0.2))
    delta_b = delta * float(rng.choice([0.0, 1.0, 2.0, *10 ** rng.uniform(-2, 0, 6)]))
    rule = bool(rng.integers(2))
    slack = 0.0 if rule else float(rng.choice([0.0, rng.uniform(0, 2 * delta)]))
    form, xi = FORMS[rng.integers(2)], float(rng.uniform(0.1, 2))
    budgets = budgets_of(w, delta, delta_b, rule, slack)
    limits = np.minimum(delta, w)
    if T < 9:
        unit = np.eye(T)
        l = [solve(unit[j], w, limits, finite(budgets)) for j in range(T)]  # noqa: E741
    else:
        l = [min(delta, b, w_j) / w_j for b, w_j in zip(budgets, w, strict=True)]  # noqa: E741
    gamma = later_of(l, form)
    want = 4 * xi * solve(gamma, w, limits, finite(budgets))

    found = tightest_residual(w, delta, delta_b, xi=xi, rule=rule, slack=slack, form=form)
    assert found.bound == pytest.approx(want, rel=REL, abs=1e-9)
    assert found.largest == pytest.approx(l, rel=1e-7, abs=1e-9)
    # its u is allowed, and attains the bound
    assert (found.expected >= 0).all() and at_most(w * found.expected, delta) and at_most(found.expected, 1.0)
    assert at_most(np.cumsum(w * found.expected)[:-1], budgets[:-1])
    assert found.bound == pytest.approx(4 * xi * math.fsum(np.array(gamma) * found.expected), rel=1e-8, abs=1e-12)


@st.composite
def programs(draw: Any, monotone: bool | None = None) -> tuple[np.ndarray, ...]:
    """gamma, weights, limits, budgets; budgets may fall, gamma may be 0. monotone: gamma / w does not increase."""
    T = draw(st.integers(1, 40))

    def numbers(low: float, high: float) -> np.ndarray:
        return np.array(draw(st.lists(st.floats(low, high), min_size=T, max_size=T)))

    w = numbers(0.05, 2)
    gamma = numbers(0, 5) * (numbers(0, 1) > 0.2)
    if monotone:
        gamma = np.sort(gamma / w)[::-1] * w
    limits, budgets = numbers(0, 1), numbers(0, 1)
    if draw(st.booleans()):
        budgets = np.cumsum(budgets)
    return gamma, w, limits, budgets


@given(program=programs())
def test_spend_against_a_general_solver(program: tuple[np.ndarray, ...]) -> None:
    gamma, w, limits, budgets = program
    z = spend(gamma, w, limits, budgets)
    assert (z >= 0).all() and at_most(z, limits) and at_most(z.cumsum(), budgets)
    # HiGHS lets each constraint slip by 1e-7, which is worth as much as the dearest position
    slack = 1e-6 * max(1.0, float((gamma / w).max(initial=0.0)))
    assert math.fsum(gamma / w * z) == pytest.approx(solve(gamma, w, limits, budgets), rel=1e-6, abs=slack)


@given(program=programs(monotone=True))
def test_the_closed_form_is_the_greedy_choice(program: tuple[np.ndarray, ...]) -> None:
    """On input for which both are right; and `spend` takes the closed form, which spends where gamma is 0, too."""
    gamma, w, limits, budgets = program
    rates = gamma / w
    effective = np.minimum.accumulate(budgets[::-1])[::-1]
    closed, greedy = spend(gamma, w, limits, budgets), _greedy(gamma, w, limits, effective)
    assert rates @ closed == pytest.approx(rates @ greedy, rel=1e-10, abs=1e-12)
    S = 0.0
    for t, (limit, budget) in enumerate(zip(limits, effective, strict=True)):
        before, S = S, min(S + limit, budget)
        assert closed[t] == pytest.approx(S - before, rel=1e-9, abs=1e-12)


def test_a_later_budget_takes_from_the_cheapest() -> None:
    """gamma / w = 1, 3, 2 with limits 1 and 2 in all: the first gives way. If the first two may spend 1/2, they do."""
    one = np.ones(3)
    assert spend(np.array([1.0, 3, 2]), one, one, np.array([9.0, 9, 2])).tolist() == [0, 1, 1]
    assert spend(np.array([1.0, 3, 2]), one, one, np.array([9.0, 0.5, 2])).tolist() == [0, 0.5, 1]
    assert spend(np.array([1.0, 3, 2]), one, one, np.array([9.0, 1.25, 2])).tolist() == [0, 1, 1]
    assert spend(np.array([1.0, 3, 2]), one, one, np.array([9.0, 1.25, 9])).tolist() == [0.25, 1, 1]
    assert spend(np.array([3.0, 2, 1]), one, one, np.array([9.0, 9, 1.5])).tolist() == [1, 0.5, 0]


def test_four_tokens_by_hand() -> None:
    """w = 1, delta = 0.15, delta_b = 0.05: l = 0.05, 0.1, 0.15, 0.15 and u = 0.05 but for the last."""
    found = tightest_residual(np.ones(4), 0.15, 0.05)
    assert found.largest == pytest.approx([0.05, 0.1, 0.15, 0.15]) and found.expected[:3] == pytest.approx([0.05] * 3)
    assert found.bound == pytest.approx(4 * 0.05 * (0.4 + 0.3 + 0.15))
    product = tightest_residual(np.ones(4), 0.15, 0.05, form="product")
    assert product.bound == pytest.approx(0.2 * (3 - 0.9 * 0.85**2 - 0.85**2 - 0.85))
    # rule (8): delta at once, then delta_b a token; every token may be at delta
    rule = tightest_residual(np.ones(4), 0.15, 0.05, rule=True)
    assert rule.largest == pytest.approx([0.15] * 4) and rule.expected[:3] == pytest.approx([0.15, 0.05, 0.05])
    assert rule.bound == pytest.approx(4 * (0.15 * 0.45 + 0.05 * 0.3 + 0.05 * 0.15))
    # a slack of 0.02 goes to the first token
    slack = tightest_residual(np.ones(4), 0.15, 0.05, slack=0.02)
    assert slack.expected[:3] == pytest.approx([0.07, 0.05, 0.05])
    assert slack.largest == pytest.approx([0.07, 0.12, 0.15, 0.15])
    # a total variation is at most 1, whatever delta / w says
    assert tightest_residual([1.0, 0.1], 0.5, 0.5).largest.tolist() == [0.5, 1.0]


@pytest.mark.parametrize("rule", [False, True])
def test_the_papers_settings(rule: bool) -> None:
    """T = 8192, delta 0.15, delta_b 0.02, w_min 0.8 by a forward pass in plain Python (the schedule is monotone)."""
    T, delta, delta_b, w_min = 8192, 0.15, 0.02, 0.8
    w = [1 - (1 - w_min) * t / (T - 1) for t in range(T)]
    budgets = budgets_of(w, delta, delta_b, rule, 0.0)
    l = [min(delta, b) / x for b, x in zip(budgets, w, strict=True)]  # noqa: E741
    u, S = [], 0.0
    for b, x in zip(budgets, w, strict=True):
        u.append((min(S + delta, b) - S) / x)
        S = min(S + delta, b)
    rest, terms = math.fsum(l), []
    for mean, largest in zip(u, l, strict=True):
        rest -= largest
        terms.append(mean * rest)
    found = tightest_residual(w, delta, delta_b, xi=0.5, rule=rule)
    assert found.bound == pytest.approx(2 * math.fsum(terms), rel=1e-9)
    above = theory.implemented_rule if rule else theory.corollary_7
    assert 0.85 * above(T, delta, delta_b, w_min, xi=0.5) < found.bound < above(T, delta, delta_b, w_min, xi=0.5)


def test_no_residual() -> None:
    for w in ([1.0], [0.4]):
        assert tightest_residual(w, 0.1, 0.02).bound == 0
    assert tightest_residual(np.ones(5), 0.1, 0.0).bound == 0
    assert tightest_residual(np.ones(5), 0.1, 0.0, rule=True).bound == pytest.approx(4 * 0.1 * 0.4)


@every_chunk
def test_between_the_residual_and_the_theorems(chunk: int) -> None:
    """Never below Prop. 4 of the problem's own u and l, nor above Theorem 1, Prop. 8 or the product form."""
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        p = instance(seed)[1]
        T, xi, u, l = p.horizon, p.xi, p.expected_divergence, p.largest_divergence  # noqa: E741
        rng = np.random.default_rng(seed)
        schedules = [make_schedule(name, T, w_min) for name in theory.SCHEDULES for w_min in (0.3, 0.8)]
        schedules.append(rng.uniform(0.1, 1, T))
        for w in schedules:
            c = p.constraints(w)
            L = min(1.0, float((c.delta / w).max()))
            monotone = is_monotone(np.arange(T - 1, -1, -1.0), w)
            less = 0.5 * c.delta_b
            slack = max(0.0, float(((w * p.path_divergence[p.reachable]).cumsum(1) - less * w.cumsum())[:, :-1].max()))
            bit = 1 + 1e-12  # the thresholds are rounded, and the problem is at them
            options: list[tuple[float, dict[str, Any], float]] = [
                (c.delta_b, {}, 0.0),
                (less, {"slack": slack * bit}, slack),
                (c.rule_delta_b, {"rule": True}, c.delta),
            ]
            for delta_b, option, eta in options:
                previous = math.inf
                for form in FORMS:
                    found = tightest_residual(w, c.delta * bit, delta_b * bit, xi=xi, form=form, **option).bound
                    measured = theory.residual_bound(u, l, xi=xi, form=form)
                    assert at_most(measured * (1 - 1e-11), found, xi) and at_most(abs(p.residual), found, xi)
                    assert at_most(found, previous, xi)  # the product form is never larger
                    previous = found
                    if form == "sum" and monotone:
                        bound = theory.theorem_1(T, delta_b, L, weights=w, xi=xi, slack=eta)
                        assert at_most(found * (1 - 1e-11), bound, xi)
                    if form == "product" and is_monotone(theory.coefficients(T, L, form="product"), w):
                        bound = theory.product_form(T, delta_b, L, weights=w, xi=xi, slack=eta)
                        assert at_most(found * (1 - 1e-11), bound, xi)


# ------------------------------------------------------------------------------------------- sharpness (App. B.10)


@pytest.mark.parametrize("name", ["constant", "linear", "matched"])
def test_the_saturating_sequence_is_an_optimum(name: str) -> None:
    """Where every l_j is L, the optimum is Theorem 1's bound for any monotone weights; u = delta_b attains it."""
    T, delta, delta_b = 30, 0.15, 0.02
    w = make_schedule(name, T, 0.5)
    lam = theory.coefficients(T, delta)
    bound = theory.theorem_1(T, delta_b, delta, weights=w)
    budgets = np.append(delta_b * np.cumsum(w)[:-1], 1e3)
    assert lam @ theory.saturating(T, delta, delta_b) == pytest.approx(bound, rel=1e-12)
    assert solve(lam, w, np.full(T, delta), budgets) == pytest.approx(bound, rel=REL)
    assert lam @ (spend(lam, w, np.full(T, delta), budgets) / w) == pytest.approx(bound, rel=1e-12)


def test_a_pair_of_policies_attains_the_tightest_bound() -> None:
    """D_t = delta at every state: the constraints with delta_b = delta, and nothing is given away."""
    p = constant_divergence(5, 0.1)
    c = p.constraints(np.ones(5))
    prop4 = theory.residual_bound(p.expected_divergence, p.largest_divergence)
    assert tightest_residual(np.ones(5), c.delta, c.delta_b).bound == pytest.approx(prop4, rel=1e-12)
    assert theory.theorem_1(5, c.delta_b, c.delta) == pytest.approx(prop4, rel=1e-12)


# --------------------------------------------------------------------------------------------------------- schedules


@st.composite
def falling(draw: Any) -> np.ndarray:
    """w_1 = 1, non-increasing."""
    T = draw(st.integers(1, 60))
    return np.cumprod([1.0, *draw(st.lists(st.floats(0.7, 1), min_size=T - 1, max_size=T - 1))])


@given(w=falling(), delta=st.floats(0.01, 1), share=st.floats(0, 1.5), form=st.sampled_from(FORMS), rule=st.booleans())
def test_no_falling_schedule_is_below_the_constant_one(
    w: np.ndarray, delta: float, share: float, form: Any, rule: bool
) -> None:
    given_, constant = (
        tightest_residual(x, delta, share * delta, form=form, rule=rule).bound for x in (w, np.ones(w.size))
    )
    assert constant <= given_ * (1 + 1e-10) + 1e-14


def test_the_cost_of_schedules() -> None:
    """Every figure by the functions; the smallest bound first, which is the constant schedule's."""
    T, delta, delta_b, xi = 40, 0.15, 0.02, 0.5
    costs = theory.compare_schedules(T, delta, delta_b, w_min=0.1, xi=xi)
    assert {cost.name for cost in costs} == set(theory.SCHEDULES)
    bounds = [cost.tightest for cost in costs if cost.name != "reversed"]
    assert bounds == sorted(bounds) and [c.tightest for c in costs] == sorted(c.tightest for c in costs)
    assert next(cost.name for cost in costs if cost.name != "reversed") == "constant"
    for cost in costs:
        w = make_schedule(cost.name, T, 0.1)
        assert cost == schedule_cost(cost.name, w, delta, delta_b, xi=xi)
        assert cost.tightest == tightest_residual(w, delta, delta_b, xi=xi).bound
        assert cost.tightest_rule == tightest_residual(w, delta, delta_b, xi=xi, rule=True).bound
        assert cost.tightest_product == tightest_residual(w, delta, delta_b, xi=xi, form="product").bound
        assert (cost.first, cost.last) == pytest.approx((min(1, delta / w[0]), min(1, delta / w[-1])))
        if is_monotone(np.arange(T - 1, -1, -1), w):
            L = min(1.0, delta / w.min())
            assert cost.theorem == pytest.approx(theory.theorem_1(T, delta_b, L, weights=w, xi=xi), rel=1e-12)
            assert cost.tightest < cost.theorem
        else:
            assert cost.theorem is None
        moved = solve(np.ones(T), w, np.minimum(delta, w), finite(budgets_of(w, delta, delta_b, False, 0.0)))
        assert cost.room == pytest.approx(moved / (delta_b * T), rel=REL)
    by_name = {cost.name: cost for cost in costs}
    assert by_name["cosine"].theorem is None and by_name["linear"].theorem is not None
    assert by_name["linear"].room > by_name["constant"].room  # what smaller weights buy
