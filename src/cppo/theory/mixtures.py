"""The policy behind the soft gate: pi_g = (1 - g) mu + g pi at each state (Eq. 21), and what it is certain to satisfy.

TV(mu, pi_g) = g TV(mu, pi). With Z_t = w_t D_t, S_t their sum and B_t = delta + delta_b W_{t-1}, the paper's gate is

    g_t = g(x_t)      x_t = max(Z_t / delta, S_t / B_t)      g non-increasing, 1 up to x = 1, x g(x) <= 1 beyond

* Token by token g_t Z_t <= delta and g_t S_t <= B_t. Both by x g(x) <= 1.
* The prefix of pi_g itself is sum_{j<=t} g_j Z_j, in which every token has the gate of its own prefix. It is at most
  B_t (1 + log(max(1, S_t / B_t))) and can be beyond B_t: for Z_t = B_t = 1 it is the harmonic series.
* `causal_gate` gives a gate for which it never is: what is left of the budget of pi_g, not of pi.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cppo.theory.checks import Array, above_0, at_least_0, weights_of
from cppo.theory.tabular import TabularProblem

Gate = Callable[[Array], Array]


def reciprocal(x: Array) -> Array:
    """g(x) = min(1, 1/x) (Eq. 20)."""
    return 1 / np.maximum(x, 1.0)


def mixture(problem: TabularProblem, gates: Sequence[Array]) -> TabularProblem:
    """The problem with pi_g in place of pi.

    gates : for t = 1..T the g of each state, ``[V^(t-1)]``, in [0, 1].
    """
    levels = []
    for t, (mu, pi, g) in enumerate(zip(problem.rollout, problem.policy, gates, strict=True)):
        if g.shape != mu.shape[:1] or not ((g >= 0) & (g <= 1)).all():
            raise ValueError(f"the gates of position {t + 1} are not [{mu.shape[0]}] numbers between 0 and 1.")
        levels.append((1 - g)[:, None] * mu + g[:, None] * pi)
    return problem.with_policy(levels)


def paper_gate(
    problem: TabularProblem, weights: Any, delta: float, delta_b: float, gate: Gate = reciprocal
) -> list[Array]:
    """g(x_t) at each state (Eq. 19-20), where the sign of the advantage is such that the gate applies.

    weights : ``[T]``, by position: a state does not know the length of its response. Gives for t = 1..T ``[V^(t-1)]``.
    """
    return _gates(problem, weights, delta, delta_b, lambda z, s, _, budget: gate(np.maximum(z / delta, s / budget)))


def causal_gate(problem: TabularProblem, weights: Any, delta: float, delta_b: float) -> list[Array]:
    """g_t = min(1, delta / Z_t, (B_t - sum_{j<t} g_j Z_j) / Z_t): the largest gate whose own prefix stays within B_t.

    Under it pi_g satisfies all constraints of rule (8), and those of Theorem 1 with the slack delta (Prop. 8). Not in
    the paper. Arguments and result as in `paper_gate`.
    """

    def gate(z: Array, s: Array, spent: Array, budget: float) -> Array:
        room = np.minimum(delta, budget - spent).clip(min=0.0)  # below it by rounding, where the budget is spent
        return np.minimum(1.0, np.divide(room, z, out=np.ones_like(z), where=z > 0))

    return _gates(problem, weights, delta, delta_b, gate)


def _gates(
    problem: TabularProblem,
    weights: Any,
    delta: float,
    delta_b: float,
    gate: Callable[[Array, Array, Array, float], Array],
) -> list[Array]:
    """gate(Z_t, S_t, sum_{j<t} g_j Z_j, B_t) at each state, prefix by prefix."""
    above_0(delta=delta)
    at_least_0(delta_b=delta_b)
    w = weights_of(weights, problem.horizon)
    before = np.cumsum(w) - w
    s, spent, found = np.zeros(1), np.zeros(1), []
    for t, D in enumerate(problem.divergence):
        z = w[t] * D
        s = s + z
        g = gate(z, s, spent, delta + delta_b * float(before[t]))
        spent = spent + g * z
        found.append(g)
        s, spent = (np.repeat(x, problem.vocabulary) for x in (s, spent))
    return found
