"""Weight schedules w_1..w_T, and the condition that the bounds put on them: coefficient over weight must not increase.

Where D_t is weighted by w_t, the bounds sum by parts, and that needs lambda_t / w_t (t = 1..T-1) to be non-increasing:
the prefix constraints then hold early tokens at least as short as the residual weighs them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cppo.theory.checks import Array, AssumptionError, at_most_1, horizon_of, weights_of

#: Differences of coefficient / weight up to this, relative to its largest value, are rounding.
ROUNDING = 1e-12


def linear(horizon: int, w_min: float) -> Array:
    """w_t = 1 - (1 - w_min) (t - 1) / (T - 1); 1 where T = 1 (Eq. 9). ``[T]``."""
    t = np.arange(horizon, dtype=np.float64)
    return 1 - (1 - w_min) * t / max(horizon - 1, 1)


def constant(horizon: int, w_min: float) -> Array:
    """w_t = 1: the uniform trust region. `w_min` has no effect."""
    return np.ones(horizon)


def cosine(horizon: int, w_min: float) -> Array:
    """w_t = w_min + (1 - w_min) (1 + cos(pi (t - 1) / (T - 1))) / 2."""
    t = np.arange(horizon, dtype=np.float64)
    return w_min + (1 - w_min) * (1 + np.cos(np.pi * t / max(horizon - 1, 1))) / 2


def reversed_linear(horizon: int, w_min: float) -> Array:
    """The linear schedule from the end: late tokens are limited most."""
    return linear(horizon, w_min)[::-1].copy()


def matched(horizon: int, w_min: float) -> Array:
    """w_t = max(w_min, (T - t) / (T - 1)): as the residual weighs a token, with a floor.

    Where w_min < 1 / (T - 1) the floor touches w_T alone, and the terminal constraint gives the bound of all prefix
    constraints (Eq. 18).
    """
    t = np.arange(1, horizon + 1, dtype=np.float64)
    return np.maximum(w_min, (horizon - t) / max(horizon - 1, 1)) if horizon > 1 else np.ones(1)


SCHEDULES: dict[str, Callable[[int, float], Array]] = {
    "linear": linear,
    "constant": constant,
    "cosine": cosine,
    "reversed": reversed_linear,
    "matched": matched,
}


def make_schedule(name: str, horizon: int, w_min: float = 0.8) -> Array:
    """The weights w_1..w_T of a schedule of `SCHEDULES`, float64 ``[T]``, the largest of them 1.

    Raises
    ------
    ValueError : an unknown name, a horizon below 1, w_min outside of (0, 1].
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule is {name!r}, expected one of {', '.join(SCHEDULES)}.")
    at_most_1(w_min=w_min)
    return SCHEDULES[name](horizon_of(horizon), w_min)


def monotonicity_gaps(coefficients: Any, weights: Any) -> Array:
    """a_t - a_{t+1} with a_t = coefficient_t / w_t, for t = 1..T-2, and a_{T-1} last (a_T = 0). ``[T-1]``.

    The bounds that sum by parts need all of them >= 0. For coefficients T - t and the linear schedule they are
    w_min / (w_t w_{t+1}) (Prop. 5).
    """
    found: Array = np.asarray(coefficients, dtype=np.float64)
    w = weights_of(weights, found.size)
    a = found[:-1] / w[:-1]
    return a - np.append(a[1:], 0.0)[: a.size]


def is_monotone(coefficients: Any, weights: Any) -> bool:
    """Whether coefficient_t / w_t is non-increasing over t = 1..T-1, up to rounding."""
    gaps = monotonicity_gaps(coefficients, weights)
    return bool(_violations(gaps, coefficients, weights).size == 0)


def require_monotone(coefficients: Any, weights: Any, what: str) -> None:
    """Raise an `AssumptionError` that names the first position from which coefficient_t / w_t increases.

    what : the statement that needs it, for the sentence.
    """
    violations = _violations(monotonicity_gaps(coefficients, weights), coefficients, weights)
    if violations.size:
        t = int(violations[0]) + 1
        raise AssumptionError(
            f"{what} needs coefficient_t / w_t to be non-increasing, and it increases from position {t} to {t + 1}: "
            "these weights fall faster than the residual's. Raise w_min, choose the constant schedule, or ask for the "
            "tightest bound (tightest_residual), which needs no such condition."
        )


def _violations(gaps: Array, coefficients: Any, weights: Any) -> Any:
    if gaps.size == 0:
        return np.empty(0, dtype=np.int64)
    ratio = np.asarray(coefficients, dtype=np.float64)[:-1] / np.asarray(weights, dtype=np.float64)[:-1]
    return np.flatnonzero(gaps < -ROUNDING * max(float(np.abs(ratio).max()), 1e-300))
