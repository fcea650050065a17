"""What the theorems promise: upper bounds of |Delta|, the error of the surrogate, in closed form.

    J(pi) - J(mu) = L'(pi) - Delta        |Delta| <= the numbers below

Every number is in units of the reward. xi bounds abs(R); since neither the gain nor Delta changes when a constant is
added to the reward, xi is half of its range: 0.5 for a verifier that says 0 or 1. T is the horizon: the longest
response (shorter ones end in absorbing states). D_t is a total variation distance. u_t = E_mu[D_t], and l_t is the
largest D_t at any state of position t that mu can reach. Numbering: Mao et al., arXiv 2606.10968v2.

A statement about thresholds (`theorem_1` and below) is about pairs (mu, pi) that satisfy its constraints on every
rollout. A mask does not force pi to do so; docs/theory.md says what it does.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

from cppo.theory.checks import (
    Array,
    AssumptionError,
    above_0,
    at_least_0,
    at_most_1,
    horizon_of,
    total_variations,
    weights_of,
)
from cppo.theory.schedules import require_monotone

Form = Literal["sum", "product"]


# -- from measured divergences ----------------------------------------------------------------------------------------


def suffix_tv_bounds(largest: Any) -> tuple[Array, Array]:
    """Lemma 3: (1 - prod_{j>t} (1 - l_j), sum_{j>t} l_j) for t = 1..T, each float64 ``[T]``.

    Both bound the TV of what mu and pi write after t tokens, at every prefix; the product is the smaller one.
    largest : l_1..l_T, each in [0, 1].
    """
    later = total_variations("largest", largest)[1:]
    product, total = np.zeros(later.size + 1), np.zeros(later.size + 1)
    product[:-1] = 1 - np.cumprod((1 - later)[::-1])[::-1]
    total[:-1] = np.cumsum(later[::-1])[::-1]
    return product, total


def residual_bound(expected: Any, largest: Any, *, xi: float = 1.0, form: Form = "sum") -> float:
    """|Delta| <= 4 xi sum_{t<T} u_t sum_{j>t} l_j (Prop. 4), or with 1 - prod_{j>t} (1 - l_j) for the sum (App. B.9).

    Parameters
    ----------
    expected : u_t = E_mu[D_t], ``[T]``, in [0, 1]. largest : l_t >= D_t at every state that mu reaches, ``[T]``.
    form : "sum" or "product"; the product is never larger.

    Raises
    ------
    ValueError : shapes that differ, numbers outside of [0, 1], or an expected divergence above the largest.
    """
    at_least_0(xi=xi)
    l = total_variations("largest", largest)  # noqa: E741
    u = total_variations("expected", expected, l.size)
    above = u > l * (1 + 1e-9) + 1e-12
    if above.any():
        at = int(above.argmax())
        raise ValueError(f"at position {at + 1} the expected divergence {u[at]} is above the largest, {l[at]}.")
    product, total = suffix_tv_bounds(l)
    return float(4 * xi * u @ (choose(form, product, total)))


def choose(form: str, product: Array, total: Array) -> Array:
    """The one of the two that `form` names."""
    if form not in ("sum", "product"):
        raise ValueError(f"form is {form!r}, expected 'sum' or 'product'.")
    return product if form == "product" else total


def coefficients(horizon: int, largest: float, *, xi: float = 1.0, form: Form = "sum") -> Array:
    """What a unit of u_t costs when every D_j is at most L = `largest`: lambda_t = 4 xi L (T - t) (Prop. 4), or
    4 xi (1 - (1 - L)^(T - t)) in product form (App. B.9). float64 ``[T]``; the last one is 0.
    """
    T = horizon_of(horizon)
    at_least_0(xi=xi, largest=largest)
    later = np.arange(T - 1, -1, -1, dtype=np.float64)
    if form == "product":
        total_variations("largest", [largest])
    return 4 * xi * choose(form, -np.expm1(later * _log1m(largest)), largest * later)


def _log1m(x: float) -> float:
    """log(1 - x), finite at 1 (exp of T times it is 0 all the same)."""
    return math.log1p(-x) if x < 1 else -800.0


# -- from thresholds --------------------------------------------------------------------------------------------------


def theorem_1(
    horizon: int, delta_b: float, largest: float, *, weights: Any = None, xi: float = 1.0, slack: float = 0.0
) -> float:
    """2 xi T (T - 1) L delta_b, plus 4 xi L (T - 1) eta / w_1 where the prefix constraints have a slack (Theorem 1,
    (7), Prop. 8).

    Needs, on every rollout, S_m = sum_{t<=m} w_t D_t <= delta_b W_m + eta for m = 1..T-1, and D_t <= L; and of the
    weights that lambda_t / w_t = 4 xi L (T - t) / w_t is non-increasing.

    Parameters
    ----------
    largest : L = max_t tau_t / w_t, tau_t the token limit of w_t D_t. weights : w_1..w_T, default all 1. slack : eta.

    Raises
    ------
    AssumptionError : lambda_t / w_t increases somewhere. ValueError : a negative threshold, a horizon below 1.
    """
    T = horizon_of(horizon)
    at_least_0(delta_b=delta_b, largest=largest, xi=xi, slack=slack)
    w = np.ones(T) if weights is None else weights_of(weights, T)
    if weights is not None:
        require_monotone(coefficients(T, 1.0, xi=1.0), w, "Theorem 1")
    return 2 * xi * T * (T - 1) * largest * delta_b + (4 * xi * largest * (T - 1) * slack / float(w[0]))


def corollary_6(horizon: int, delta: float, delta_b: float, *, xi: float = 1.0) -> float:
    """2 xi T (T - 1) delta delta_b: the prefix constraints, and D_t <= delta for all t (Cor. 6).

    delta_b / delta times the uniform rule's constant, for every schedule that Theorem 1 allows.
    """
    return theorem_1(horizon, delta_b, delta, xi=xi)


def corollary_7(horizon: int, delta: float, delta_b: float, w_min: float, *, xi: float = 1.0) -> float:
    """2 xi T (T - 1) (delta / w_min) delta_b: the prefix constraints, and w_t D_t <= delta (Cor. 7).

    delta_b / (delta w_min) times the uniform rule's constant: larger than it where delta_b > delta w_min. Holds for the
    linear schedule (Prop. 5), and any other with this minimum that Theorem 1 allows.
    """
    at_most_1(w_min=w_min)
    return theorem_1(horizon, delta_b, delta / w_min, xi=xi)


def implemented_rule(horizon: int, delta: float, delta_b: float, w_min: float, *, xi: float = 1.0) -> float:
    """2 xi T (T - 1) L delta_b + 4 xi L (T - 1) delta with L = delta / w_min: rule (8), whose limit tau_t leaves the
    prefix constraints a slack of delta (Prop. 8; w_1 = 1).
    """
    at_most_1(w_min=w_min)
    return theorem_1(horizon, delta_b, delta / w_min, xi=xi, slack=delta)


def own_lengths(
    horizon: int, delta: float, delta_b: float, w_min: float, *, xi: float = 1.0, slack: float = 0.0
) -> float:
    """2 xi T (T - 1) (delta / w_min) delta_b (1 + w_min) / (2 w_min) + 4 xi (delta / w_min) (T - 1) eta / w_min: Cor. 7
    and Prop. 8 where the linear weights run over each response's own length, as in the rule, and mu can be forced to
    end.

    Theorem 1 is about weights by position. A response of n < T tokens has others, v_t <= w_t, and its constraints are
    looser by that. Where mu can go on to T tokens from every state (a softmax policy always can) this does not matter:
    every state lies on a response of T tokens, whose weights are those by position, and Cor. 7 holds as it is. Else,
    from v non-increasing: sum_{t<=m} D_t <= S_m / v_m <= (delta_b V_m + eta) / v_m, and V_m / v_m = m (1 + v_m) / (2
    v_m) <= m (1 + w_min) / (2 w_min): the constraints of Theorem 1 for w = 1. Not in the paper.
    """
    at_most_1(w_min=w_min)
    return theorem_1(horizon, delta_b * (1 + w_min) / (2 * w_min), delta / w_min, xi=xi, slack=slack / w_min)


def terminal_only(horizon: int, delta_b: float, largest: float, *, weights: Any = None, xi: float = 1.0) -> float:
    """delta_b W_{T-1} max_t (lambda_t / w_t): with S_{T-1} <= delta_b W_{T-1} alone, no constraint before it (Eq. 18).

    Never below Theorem 1's bound, and equal to it only for w_t proportional to T - t; for w = 1 larger by 2 - 2/T.
    Needs no monotonicity. Arguments as in `theorem_1`.
    """
    T = horizon_of(horizon)
    at_least_0(delta_b=delta_b)
    w = np.ones(T) if weights is None else weights_of(weights, T)
    if T == 1:
        return 0.0
    rate = coefficients(T, largest, xi=xi)[:-1] / w[:-1]
    return float(delta_b * w[:-1].sum() * rate.max())


def product_form(
    horizon: int, delta_b: float, largest: float, *, weights: Any = None, xi: float = 1.0, slack: float = 0.0
) -> float:
    """4 xi delta_b sum_{t<T} (1 - (1 - L)^(T - t)), plus the slack's 4 xi (1 - (1 - L)^(T - 1)) eta / w_1 (App. B.9).

    At most 4 xi (T - 1) delta_b: linear in T where `theorem_1` is quadratic. Its condition is (1 - (1 - L)^(T - t)) /
    w_t non-increasing. The numerator is nearly constant over most of a long response, so that only weights that do not
    fall there satisfy it: the constant schedule always does, the linear one does not once T L is large.

    Raises
    ------
    AssumptionError : the condition does not hold; `tightest_residual(form="product")` gives the bound that does.
    """
    T = horizon_of(horizon)
    at_least_0(delta_b=delta_b, slack=slack)
    w = np.ones(T) if weights is None else weights_of(weights, T)
    gamma = coefficients(T, largest, xi=xi, form="product")
    require_monotone(gamma, w, "the product form")
    return float(delta_b * gamma.sum() + gamma[0] * slack / w[0])


# -- the rules that it is compared with -------------------------------------------------------------------------------


def uniform(horizon: int, delta: float, *, xi: float = 1.0, form: Form = "sum") -> float:
    """2 xi T (T - 1) delta^2: D_t <= delta for every token and nothing else (DPPO, and Sec. 3 of the paper); in
    product form 4 xi delta sum_{t<T} (1 - (1 - delta)^(T - t)).
    """
    return float(delta * coefficients(horizon, delta, xi=xi, form=form).sum())


def trm_max(horizon: int, delta: float, *, xi: float = 1.0) -> float:
    """(4/3) xi T^(3/2) delta: KL(mu || pi) <= delta at every token (TRM-Max; Li et al., arXiv 2512.23075: the
    Pinsker-marginal bound).

    From Pinsker on both factors: u_t <= sqrt(delta / 2), and what follows t tokens differs by at most
    sqrt((T - t) delta / 2) in TV, by the chain rule of KL.
    """
    T = horizon_of(horizon)
    at_least_0(delta=delta, xi=xi)
    return 4 / 3 * xi * T**1.5 * delta


def trm_avg(horizon: int, delta: float, *, xi: float = 1.0) -> float:
    """2 xi T^(3/2) delta: KL(mu || pi) at most delta on average over the T tokens of every rollout (TRM-Avg).

    sum_t u_t <= T sqrt(delta / 2) (Jensen), and what follows a prefix differs by at most sqrt(T delta / 2) in TV. An
    average over a shorter response's own tokens is a smaller sum, and covered.
    """
    T = horizon_of(horizon)
    at_least_0(delta=delta, xi=xi)
    return 2 * xi * T**1.5 * delta


def trm_max_avg(horizon: int, delta: float, delta_avg: float, *, xi: float = 1.0) -> float:
    """The smaller of `trm_max` and `trm_avg`: both limits hold (TRM-Max&Avg).

    The mixed bound of arXiv 2512.23075, 2 xi T sqrt(delta KL(mu || pi)) with the KL of whole responses, is smaller
    where that KL is known. From the limits alone it is at most T delta_avg, and the mixed bound never the smallest.
    """
    at_least_0(delta=delta, delta_avg=delta_avg)
    return min(trm_max(horizon, delta, xi=xi), trm_avg(horizon, delta_avg, xi=xi))


def saturating(horizon: int, delta: float, delta_b: float) -> Array:
    """u_t = delta_b for all t: satisfies every constraint and attains sum_t lambda_t u_t = delta_b sum_t lambda_t (App.
    B.10). float64 ``[T]``.

    Raises
    ------
    AssumptionError : delta_b > delta; then the token constraint, not the prefix, is what binds.
    """
    above_0(delta=delta)
    at_least_0(delta_b=delta_b)
    if delta_b > delta:
        raise AssumptionError(
            f"delta_b = {delta_b} is above delta = {delta}: the token constraint holds D_t below delta_b, the prefix "
            "constraints never bind, and their bound is not attained."
        )
    return np.full(horizon_of(horizon), float(delta_b))
