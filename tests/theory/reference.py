"""Slow reference of the tabular theory: plain loops over sequences of tokens that stop at the end-of-sequence token.

Written from the definitions alone (arXiv 2606.10968, Eq. 1 and 8-12): a policy is a dictionary from a prefix, a tuple
of tokens, to the distribution of the next token; no absorbing states, no arrays. Nothing here imports `cppo`.
With `fractions.Fraction` for numbers every sum is exact, else it is rounded once (`math.fsum`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

Tokens = tuple[int, ...]
Policy = dict[Tokens, Sequence[Any]]


@dataclass(frozen=True)
class Case:
    """Rollout policy mu and policy pi, at every prefix that has not ended, and the reward of every response."""

    vocabulary: int
    horizon: int
    eos: int | None
    mu: Policy
    pi: Policy
    reward: dict[Tokens, Any]


def total(values: Iterable[Any]) -> Any:
    found = list(values)
    return sum(found, Fraction(0)) if any(isinstance(x, Fraction) for x in found) else math.fsum(found)


# ------------------------------------------------------------------------------------------------------------ sequences


def ended(tokens: Tokens, horizon: int, eos: int | None) -> bool:
    return len(tokens) == horizon or (eos is not None and eos in tokens)


def prefixes(vocabulary: int, horizon: int, eos: int | None) -> Iterator[Tokens]:
    """Every prefix after which another token is written."""
    for t in range(horizon):
        for tokens in itertools.product(range(vocabulary), repeat=t):
            if not ended(tokens, horizon, eos):
                yield tokens


def endings(vocabulary: int, horizon: int, eos: int | None, prefix: Tokens = ()) -> list[Tokens]:
    """Everything that can follow a prefix, up to the end of the response."""
    if ended(prefix, horizon, eos):
        return [()]
    found = {}
    for rest in itertools.product(range(vocabulary), repeat=horizon - len(prefix)):
        found[rest[: rest.index(eos) + 1] if eos is not None and eos in rest else rest] = None
    return list(found)


def of(case: Case, prefix: Tokens = ()) -> list[Tokens]:
    return endings(case.vocabulary, case.horizon, case.eos, prefix)


def probability(policy: Policy, ending: Tokens, prefix: Tokens = ()) -> Any:
    found: Any = 1
    for i, token in enumerate(ending):
        found = found * policy[prefix + ending[:i]][token]
    return found


def rollouts(case: Case) -> list[Tokens]:
    """The responses that mu can give."""
    return [y for y in of(case) if probability(case.mu, y) > 0]


def visited(case: Case) -> list[Tokens]:
    """The prefixes that mu can reach and that another token follows."""
    every = prefixes(case.vocabulary, case.horizon, case.eos)
    return [s for s in every if probability(case.mu, s) > 0]


# ------------------------------------------------------------------------------------------------- objective, surrogate


def ratios(case: Case, y: Tokens) -> list[Any]:
    """rho_t = pi(y_t | s_t) / mu(y_t | s_t)."""
    return [case.pi[y[:t]][token] / case.mu[y[:t]][token] for t, token in enumerate(y)]


def objective(case: Case, policy: Policy) -> Any:
    """J = E[R]."""
    return total(probability(policy, y) * case.reward[y] for y in of(case))


def surrogate(case: Case) -> Any:
    """L' = E_mu[R sum_t (rho_t - 1)]."""
    return total(
        probability(case.mu, y) * case.reward[y] * total(rho - 1 for rho in ratios(case, y)) for y in rollouts(case)
    )


def residual(case: Case) -> Any:
    """Delta = E_mu[R sum_t (rho_t - 1) (1 - prod_{j>t} rho_j)]."""
    terms = []
    for y in rollouts(case):
        rho = ratios(case, y)
        inner = total((rho[t] - 1) * (1 - math.prod(rho[t + 1 :])) for t in range(len(y)))
        terms.append(probability(case.mu, y) * case.reward[y] * inner)
    return total(terms)


def largest_reward(case: Case) -> Any:
    return max(abs(case.reward[y]) for y in rollouts(case))


# ---------------------------------------------------------------------------------------------------------- divergences


def divergence(case: Case, prefix: Tokens) -> Any:
    """Total variation at one state; 0 where nothing follows."""
    if ended(prefix, case.horizon, case.eos):
        return 0
    return total(abs(m - p) for m, p in zip(case.mu[prefix], case.pi[prefix], strict=True)) / 2


def kl(case: Case, prefix: Tokens) -> float:
    """KL(mu || pi) at one state."""
    pairs = [(m, p) for m, p in zip(case.mu[prefix], case.pi[prefix], strict=True) if m > 0]
    return math.inf if any(p == 0 for _, p in pairs) else math.fsum(m * math.log(m / p) for m, p in pairs)


def expected_divergence(case: Case) -> list[Any]:
    """u_t: the mean over responses of the divergence at position t, 0 after the end of one."""
    return [
        total(probability(case.mu, y) * divergence(case, y[:t]) for y in rollouts(case) if t < len(y))
        for t in range(case.horizon)
    ]


def largest_divergence(case: Case) -> list[Any]:
    """l_t."""
    states = visited(case)
    return [max((divergence(case, s) for s in states if len(s) == t), default=0) for t in range(case.horizon)]


def suffix_tv(case: Case, prefix: Tokens) -> Any:
    """TV between what mu and pi write after a prefix."""
    return total(abs(probability(case.mu, z, prefix) - probability(case.pi, z, prefix)) for z in of(case, prefix)) / 2


def pathwise_bound(case: Case, xi: Any) -> Any:
    """2 xi E_mu[sum_t |rho_t - 1| sum_{j>t} D_j]."""
    terms = []
    for y in rollouts(case):
        D = [divergence(case, y[:t]) for t in range(len(y))]
        rho = ratios(case, y)
        terms.append(probability(case.mu, y) * total(abs(rho[t] - 1) * total(D[t + 1 :]) for t in range(len(y))))
    return 2 * xi * total(terms)


def ratio_bound(case: Case, xi: Any) -> Any:
    """2 xi E_mu[sum_t |rho_t - 1| TV of what follows y_1..y_t]."""
    following: dict[Tokens, Any] = {}
    terms = []
    for y in rollouts(case):
        rho = ratios(case, y)
        for t in range(len(y)):
            prefix = y[: t + 1]
            if prefix not in following:
                following[prefix] = suffix_tv(case, prefix)
            terms.append(probability(case.mu, y) * abs(rho[t] - 1) * following[prefix])
    return 2 * xi * total(terms)


# ---------------------------------------------------------------------------------------------------------- constraints


@dataclass(frozen=True)
class Paths:
    """(w_t, w_t D_t) along each rollout up to its end; `horizon` is T."""

    horizon: int
    rows: list[tuple[list[float], list[float]]]


def paths(case: Case, weights: Sequence[float] | None = None, w_min: float | None = None) -> Paths:
    """weights : by position; or w_min : linear over each response's own length (Eq. 9)."""
    rows = []
    for y in rollouts(case):
        n = len(y)
        if w_min is None:
            assert weights is not None
            w = list(weights[:n])
        else:
            w = [1.0 if n == 1 else 1 - (1 - w_min) * t / (n - 1) for t in range(n)]
        rows.append((w, [w[t] * divergence(case, y[:t]) for t in range(n)]))
    return Paths(case.horizon, rows)


def obeys_theorem_1(given: Paths, delta: float, delta_b: float, slack: float = 0.0) -> bool:
    """w_t D_t <= delta, and S_m <= delta_b W_m + slack for m = 1..T-1, on every rollout."""
    for w, z in given.rows:
        S = W = 0.0
        for m, (weight, spent) in enumerate(zip(w, z, strict=True), start=1):
            S, W = S + spent, W + weight
            if spent > delta or (m < given.horizon and delta_b * W + slack < S):
                return False
    return True


def obeys_rule_8(given: Paths, delta: float, delta_b: float) -> bool:
    """No token is beyond c_t = min(delta, delta + delta_b W_{t-1} - S_{t-1})."""
    for w, z in given.rows:
        S = W = 0.0
        for weight, spent in zip(w, z, strict=True):
            if spent > min(delta, delta + delta_b * W - S):
                return False
            S, W = S + spent, W + weight
    return True


def smallest_thresholds(given: Paths) -> tuple[float, float, float, float]:
    """(delta, delta_b, the rule's delta_b for that delta, its slack), all as small as the rollouts allow."""
    delta = max(max(z) for _, z in given.rows)
    delta_b = rule_delta_b = slack = 0.0
    for w, z in given.rows:
        for m in range(1, len(w) + 1):
            S, W, before = math.fsum(z[:m]), math.fsum(w[:m]), math.fsum(w[: m - 1])
            if m < given.horizon:
                delta_b = max(delta_b, S / W)
            if m > 1:
                rule_delta_b = max(rule_delta_b, (S - delta) / before)
    for w, z in given.rows:
        for m in range(1, min(len(w), given.horizon - 1) + 1):
            slack = max(slack, math.fsum(z[:m]) - rule_delta_b * math.fsum(w[:m]))
    return delta, delta_b, rule_delta_b, slack
