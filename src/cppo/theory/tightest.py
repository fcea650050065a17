"""The tightest bound that a set of constraints implies, by a linear program, and what a schedule costs or buys in it.

Prop. 4 says |Delta| <= 4 xi sum_t u_t sum_{j>t} l_j. Theorem 1 bounds the right-hand side in two steps that give
something away: every l_j is replaced by the largest, L = delta / w_min, and the sum over u is bounded by parts. Here
both are exact: l_j is the largest divergence that the constraints allow at position j, and u maximises the sum.

The program: maximise sum_t a_t z_t with z_t = w_t u_t and a_t = coefficient_t / w_t, subject to 0 <= z_t <= delta and
z_1 + ... + z_m <= B_m for all m. The feasible set is a polymatroid (its constraints are a chain of prefixes), on which
a greedy choice is optimal: spend on the largest a_t first. With a non-increasing that is a forward pass in closed form,
    S_t = min(S_{t-1} + delta, B_t);
else a heap gives up the cheapest spending so far whenever a prefix is beyond its budget: O(T log T).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any

import numpy as np

from cppo.theory.bounds import Form, choose, suffix_tv_bounds, theorem_1
from cppo.theory.checks import Array, above_0, at_least_0, horizon_of, weights_of
from cppo.theory.schedules import SCHEDULES, is_monotone, make_schedule


@dataclass(frozen=True, eq=False)
class Tightest:
    """The optimum: `bound` >= |Delta|, attained in Prop. 4 by `expected` (u_t) and `largest` (l_t), each ``[T]``."""

    bound: float
    expected: Array
    largest: Array


def prefix_budgets(weights: Any, delta: float, delta_b: float, *, rule: bool = False, slack: float = 0.0) -> Array:
    """B_1..B_T, upper limits of S_m = sum_{t<=m} w_t D_t. float64 ``[T]``.

    Theorem 1: delta_b W_m + slack, and nothing new at m = T (delta more than at T - 1). rule: tau_t of rule (8), that
    is S_t <= delta + delta_b W_{t-1}.
    """
    w = weights_of(weights, horizon_of(len(weights)))
    above_0(delta=delta)
    at_least_0(delta_b=delta_b, slack=slack)
    if rule and slack:
        raise ValueError("the rule's slack follows from its limit; give either rule=True or slack.")
    W = np.cumsum(w)
    if rule:
        return delta + delta_b * (W - w)
    budgets = delta_b * W + slack
    budgets[-1] = delta + (budgets[-2] if budgets.size > 1 else 0.0)
    return budgets


def largest_allowed(weights: Any, delta: float, budgets: Array) -> Array:
    """l_j = min(delta, B_j) / w_j, at most 1: the largest D_j that a rollout within the constraints has, ``[T]``."""
    w = weights_of(weights, budgets.size)
    return np.minimum(np.minimum(delta, budgets) / w, 1.0)


def tightest_residual(
    weights: Any,
    delta: float,
    delta_b: float,
    *,
    xi: float = 1.0,
    rule: bool = False,
    slack: float = 0.0,
    form: Form = "sum",
) -> Tightest:
    """max 4 xi sum_{t<T} u_t sum_{j>t} l_j over all u and l that the constraints allow: no bound through Prop. 4 is
    smaller.

    Needs w_t D_t <= delta and S_m <= B_m (`prefix_budgets`) on every rollout; of the weights nothing but w_t > 0. u, a
    mean over rollouts, satisfies the constraints because each rollout does; l is the largest on any rollout, and
    different positions may take theirs on different ones.

    Parameters
    ----------
    weights : w_1..w_T. rule : the constraints of rule (8) instead of Theorem 1's. slack : eta of Prop. 8.
    form : "product": with 1 - prod_{j>t} (1 - l_j) (App. B.9), never larger.
    """
    w = weights_of(weights, horizon_of(len(weights)))
    at_least_0(xi=xi)
    budgets = prefix_budgets(w, delta, delta_b, rule=rule, slack=slack)
    l = largest_allowed(w, delta, budgets)  # noqa: E741
    gamma = choose(form, *suffix_tv_bounds(l))
    u = spend(gamma, w, np.minimum(delta, w), budgets) / w  # D_t <= 1
    return Tightest(float(4 * xi * gamma @ u), u, l)


def spend(gamma: Array, weights: Array, limits: Array, budgets: Array) -> Array:
    """z maximising sum_t (gamma_t / w_t) z_t subject to 0 <= z_t <= limits_t and z_1 + ... + z_m <= budgets_m. ``[T]``.

    gamma >= 0; budgets need not be monotone: a later one may bind earlier tokens.
    """
    effective = np.minimum.accumulate(budgets[::-1])[::-1]
    if is_monotone(np.append(gamma, 0.0), np.append(weights, 1.0)):  # of t = 1..T: it leaves out the last
        # S_t = min(S_{t-1} + limit_t, B_t) = C_t + min(0, min_{m<=t} (B_m - C_m)), C the cumulated limits
        C = np.cumsum(limits)
        S = C + np.minimum(np.minimum.accumulate(effective - C), 0.0)
        return np.diff(S, prepend=0.0).clip(min=0.0)
    return _greedy(gamma, weights, limits, effective)


def _greedy(gamma: Array, weights: Array, limits: Array, budgets: Array) -> Array:
    rates = (gamma / weights).tolist()
    heap: list[tuple[float, int]] = []
    z, spent = limits.tolist(), 0.0
    for t, (rate, budget) in enumerate(zip(rates, budgets.tolist(), strict=True)):
        if rate <= 0:
            z[t] = 0.0
            continue
        heapq.heappush(heap, (rate, t))
        spent += z[t]
        while spent > budget and heap:
            cheapest = heap[0][1]
            if z[cheapest] > spent - budget:
                z[cheapest] -= spent - budget
                spent = budget
            else:
                spent -= z[cheapest]
                z[cheapest] = 0.0
                heapq.heappop(heap)
    return np.asarray(z)


@dataclass(frozen=True)
class ScheduleCost:
    """What a schedule costs and buys at one horizon, delta and delta_b.

    theorem : Theorem 1's bound with L = delta / min w, None where lambda_t / w_t is not monotone. tightest,
    tightest_rule, tightest_product : `tightest_residual` of Theorem 1's constraints, of rule (8), and in product form.
    first, last : the largest D_t that the token limit allows at t = 1 and t = T. room : the largest sum_t u_t that the
    constraints allow, as a multiple of delta_b T: how far the policy may move in all.
    """

    name: str
    theorem: float | None
    tightest: float
    tightest_rule: float
    tightest_product: float
    first: float
    last: float
    room: float


def schedule_cost(name: str, weights: Any, delta: float, delta_b: float, *, xi: float = 1.0) -> ScheduleCost:
    """The figures of `ScheduleCost` for weights ``[T]``, the largest of them 1 (a common factor would only rescale
    delta).
    """
    w = weights_of(weights, horizon_of(len(weights)))
    above_0(delta_b=delta_b)
    if abs(float(w.max()) - 1) > 1e-9:
        raise ValueError(f"the largest weight is {w.max()}, expected 1: schedules are compared at one scale.")
    T = w.size
    later = np.arange(T - 1, -1, -1, dtype=np.float64)
    theorem = theorem_1(T, delta_b, min(delta / float(w.min()), 1.0), xi=xi) if is_monotone(later, w) else None
    moved = spend(np.ones(T), w, np.minimum(delta, w), prefix_budgets(w, delta, delta_b)) / w
    return ScheduleCost(
        name,
        theorem,
        tightest_residual(w, delta, delta_b, xi=xi).bound,
        tightest_residual(w, delta, delta_b, xi=xi, rule=True).bound,
        tightest_residual(w, delta, delta_b, xi=xi, form="product").bound,
        min(delta / float(w[0]), 1.0),
        min(delta / float(w[-1]), 1.0),
        float(moved.sum()) / (delta_b * T),
    )


def compare_schedules(
    horizon: int, delta: float, delta_b: float, *, w_min: float = 0.8, xi: float = 1.0
) -> list[ScheduleCost]:
    """`schedule_cost` of every schedule of `SCHEDULES`, the smallest `tightest` first.

    Among non-increasing schedules with w_1 = 1 the constant one always has the smallest bound: each l_j = min(delta,
    B_j) / w_j is at least what it is for w = 1, and u = delta_b (App. B.10), optimal for w = 1, is feasible for all of
    them. docs/theory.md says what smaller weights buy.
    """
    T = horizon_of(horizon)
    costs = [schedule_cost(name, make_schedule(name, T, w_min), delta, delta_b, xi=xi) for name in SCHEDULES]
    return sorted(costs, key=lambda cost: cost.tightest)
